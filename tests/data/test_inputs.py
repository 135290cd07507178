"""Folders, paths and text files as people have them: read completely, or refused by name."""

import gzip
import json
import os

import pytest

import data
import evaluate
import sample
from common import files
from common.cli import UserError
from dataset import precompute, sources
from helpers import jpeg, write_tar
from metrics import answers, benchmarks, clip, fid, tables
from pretrained import tokenizer

RED, BLUE = jpeg("red"), jpeg("blue")


def write(folder, **contents):
    """Write files; their names are given with _ in place of the dot.  Return the folder."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        content = content if isinstance(content, bytes) else content.encode()
        (folder / name.replace("_", ".")).write_bytes(content)
    return folder


def captions(path):
    source = data.open_source(str(path), 16)
    return [source[i]["captions"] for i in range(len(source))]


# ------------------------------------------------------------------------- data lost without a warning

def test_two_images_of_one_name_are_refused_by_name(tmp_path):
    folder = write(tmp_path / "d", a_JPEG=RED, a_webp=BLUE, a_txt="which?")
    with pytest.raises(UserError, match="a.JPEG and .*a.webp"):
        data.open_source(str(folder), 16)
    tar = data.open_source(write_tar(tmp_path / "t.tar", [("a.jpg", RED), ("a.png", BLUE)]), 16)
    with pytest.raises(UserError, match=r"t.tar: a: several .*\.jpg, \.png"):
        tar[0]


def test_a_folder_of_several_kinds_is_refused_by_name(tmp_path):
    folder = write(tmp_path / "d", a_jpg=RED)
    write_tar(folder / "0.tar", [("b.jpg", BLUE), ("b.txt", b"blue")])
    assert captions(folder) == [["blue"]]                        # a preview beside tars
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "red"}')
    with pytest.raises(UserError, match="0.tar and .*metadata.jsonl"):
        data.open_source(str(folder), 16)
    (folder / "metadata.jsonl").unlink()
    (folder / "latents-00000.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="0.tar and .*latents-00000"):
        data.open_source(str(folder), 16)


def test_hidden_files_and_folders_are_left_out_everywhere(tmp_path):
    folder = write(tmp_path / "d", a_jpg=RED, a_txt="red")
    before = data.fingerprint(str(folder))
    write(folder / ".cache", b_jpg=BLUE, b_txt="blue")
    (folder / "._a.jpg").write_bytes(b"of macOS")
    assert captions(folder) == [["red"]] and data.fingerprint(str(folder)) == before
    assert fid.image_files(folder) == [folder / "a.jpg"]
    members = [("./a.jpg", RED), ("./a.txt", b"red"), ("./.cache/b.jpg", BLUE)]
    write_tar(tmp_path / "0.tar", members)
    (tmp_path / "._0.tar").write_bytes(b"of macOS")
    assert sources.tars_at(tmp_path) == [str(tmp_path / "0.tar")]
    assert captions(tmp_path / "0.tar") == [["red"]]


def test_what_is_not_read_is_counted_and_named(tmp_path, capsys):
    folder = write(tmp_path / "d", a_jpg=RED, a_txt="red", b_heic="?", c_TIFF="?")
    assert captions(folder) == [["red"]]
    warning = capsys.readouterr().err
    assert "2 left out" in warning and "b.heic" in warning and warning.count("\n") == 1
    fid.image_files(folder)
    assert capsys.readouterr().err == warning
    write(folder / "train", metadata_jsonl="{}")
    write(folder, metadata_csv="file_name,text\n")
    captions(folder)
    lines = capsys.readouterr().err.splitlines()
    assert [name for name in ("metadata.csv", "train/metadata.jsonl")
            if any(name in line for line in lines)] == ["metadata.csv", "train/metadata.jsonl"]


def test_images_that_the_metadata_does_not_name_are_counted(tmp_path, capsys):
    folder = write(tmp_path / "d", a_jpg=RED, b_jpg=BLUE, c_jpg=BLUE,
                   metadata_jsonl='{"file_name": "./a.jpg", "text": "red"}')
    assert captions(folder) == [["red"]]
    assert "2 left out" in (warning := capsys.readouterr().err) and "b.jpg" in warning


def test_an_image_of_another_kind_is_read_if_the_metadata_names_it(tmp_path, capsys):
    folder = write(tmp_path / "d", a_gif=RED, metadata_jsonl='{"file_name": "a.gif", "text": "red"}')
    assert captions(folder) == [["red"]] and capsys.readouterr().err == ""


@pytest.mark.parametrize("place", ["sub/0.tar", "1.TAR", "2.tar.bz2", "unmounted"])
def test_tars_and_broken_links_that_are_not_read_are_named(place, tmp_path, capsys):
    folder = write(tmp_path / "d", a_jpg=RED, a_txt="red")
    shards = tmp_path / "shards"
    shards.mkdir()
    write_tar(shards / "00.tar", [("a.jpg", RED), ("a.txt", b"red")])
    for source in (folder, shards):
        (source / place).parent.mkdir(exist_ok=True)
        if place == "unmounted":
            (source / place).symlink_to(tmp_path / "nowhere")
        else:
            write_tar(source / place, [("b.jpg", BLUE)])
    assert captions(folder) == [["red"]]
    assert place in capsys.readouterr().err
    assert captions(shards) == [["red"]]
    assert place in capsys.readouterr().err or place == "unmounted"


def test_a_pattern_of_folders_reads_all_of_them_or_none(tmp_path):
    for i in range(2):
        write_tar(write(tmp_path / f"t{i}") / "0.tar", [("a.jpg", RED), ("a.txt", b"%d" % i)])
        write(tmp_path / f"d{i}", a_jpg=RED, a_txt="red")
    assert captions(tmp_path / "t*") == [["0"], ["1"]]
    with pytest.raises(UserError, match="2 files or folders"):
        data.open_source(str(tmp_path / "d*"), 16)
    write(tmp_path / "t1", b_jpg=BLUE, b_txt="blue")
    with pytest.raises(UserError, match="t1: .*several kinds"):
        data.open_source(str(tmp_path / "t*"), 16)
    assert captions(tmp_path / "t0" / "*") == [["0"]]            # not the index that it wrote


# ------------------------------------------------------------------------------ where data may lie

def test_a_folder_in_a_linked_folder_is_read_once(tmp_path):
    for name in ("all", "coco"):
        (tmp_path / name).mkdir()
    write(tmp_path / "coco" / "val", a_jpg=RED, a_txt="red")
    (tmp_path / "all" / "coco").symlink_to(tmp_path / "coco")
    (tmp_path / "all" / "coco_val").symlink_to(tmp_path / "coco" / "val")
    assert captions(tmp_path / "all") == [["red"]]


def test_an_empty_text_in_the_metadata_is_no_caption(tmp_path):
    line = json.dumps(dict(file_name="a.jpg", text=" "))
    folder = write(tmp_path / "d", a_jpg=RED, metadata_jsonl=line)
    assert captions(folder) == [[]]


def test_links_are_followed_and_a_cycle_ends(tmp_path):
    folder = write(tmp_path / "d", a_jpg=RED, a_txt="red")
    write(tmp_path / "real", b_jpg=BLUE, b_txt="blue")
    (tmp_path / "real" / "back").symlink_to(folder)
    for name in ("one", "two"):
        (folder / name).symlink_to(tmp_path / "real")            # read once
    assert captions(folder) == [["red"], ["blue"]]
    (folder / "c.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "c.txt").write_text("green")
    source = data.open_source(str(folder), 16)
    with pytest.raises(UserError, match="c.jpg: .*No such file"):
        source[1]


NAMES = ["../b.jpg", "more/../../b.jpg", "/etc/passwd", "fifo", "zero", "", "n\0l", "\ud800.jpg"]


def listed(folder, name):
    (folder / "l.json").write_text(json.dumps([dict(image_path=name, caption="x")]))
    return folder / "l.json"


def conversations(folder, name):
    turns = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]
    (folder / "l.json").write_text(json.dumps([dict(image=name, conversations=turns)]))
    return folder / "l.json"


def described(folder, name):
    (folder / "metadata.jsonl").write_text(json.dumps(dict(file_name=name, text="x")))
    return folder


@pytest.mark.parametrize("form", [listed, conversations, described])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_names_no_other_file_than_those_of_its_folder(name, form, tmp_path):
    folder = write(tmp_path / "d", a_jpg=RED)
    write(tmp_path, b_jpg=BLUE)
    os.mkfifo(folder / "fifo")
    (folder / "zero").symlink_to("/dev/zero")
    with pytest.raises(UserError) as error:
        data.open_source(str(form(folder, name)), 16)[0]
    assert "\n" not in str(error.value) and "\0" not in str(error.value)


@pytest.mark.parametrize("form", [listed, conversations, described])
def test_a_file_names_links_and_folders_inside(form, tmp_path):
    folder = write(tmp_path / "d")
    write(tmp_path / "cache", b_jpg=BLUE)
    (folder / "linked").symlink_to(tmp_path / "cache")
    for name in ("linked/b.jpg", "linked/../linked/b.jpg", str(folder / "linked" / "b.jpg")):
        assert data.open_source(str(form(folder, name)), 16)[0]["image"] == BLUE


def test_links_between_folders_do_not_multiply_their_files(tmp_path):
    for i in range(12):
        write(tmp_path / f"{i}", a_jpg=RED, a_txt="red")
        for j in range(12):
            if j != i:
                (tmp_path / f"{i}" / f"to{j}").symlink_to(tmp_path / f"{j}")
    assert len(captions(tmp_path)) == 12
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "0").symlink_to(tmp_path / "0")      # and through it to all others
    assert len(captions(tmp_path / "outside")) == 12


def test_a_fifo_is_not_waited_for(tmp_path):
    folder = write(tmp_path / "d", a_jpg=RED)
    os.mkfifo(folder / "metadata.jsonl")
    with pytest.raises(UserError, match="metadata.jsonl: .*plain"):
        data.open_source(str(folder), 16)


def test_an_index_of_weights_names_no_file_outside(tmp_path):
    import checkpoint
    write(tmp_path, outside_safetensors="x")
    index = json.dumps(dict(weight_map=dict(x="../outside.safetensors")))
    folder = write(tmp_path / "d", model_safetensors_index_json=index)
    with pytest.raises(UserError, match="outside.safetensors: .*lies outside"):
        checkpoint.shards(folder)


# ---------------------------------------------------------------------- paths on the command line

def test_a_path_that_exists_wins_over_all_other_readings(tmp_path):
    shards = write(tmp_path / "shards [1]")
    for i in range(2):
        write_tar(shards / f"{i}.tar", [("a.jpg", RED), ("a.txt", b"%d" % i)])
    assert captions(shards / "*.tar") == captions(shards / "{0..1}.tar") == [["0"], ["1"]]
    for name in ("a{1,2}b", "a{1..2}b", "a:2", "x.json@2024", "x@each"):
        folder = write(tmp_path / name, a_jpg=RED, a_txt="red")
        assert captions(folder) == [["red"]]
        assert data.split_weight(str(folder)) == (str(folder), 1.0)
        assert data.split_weight(f"{folder}:3") == (str(folder), 3.0)


def test_a_folder_behind_a_list_may_end_in_a_number(tmp_path):
    listed(tmp_path, "a.jpg")
    write(tmp_path / "at 12:30", a_jpg=RED)
    spec = f"{tmp_path}/l.json@{tmp_path}/at 12:30"
    assert data.split_weight(spec) == (spec, 1.0)
    assert data.open_source(spec, 16)[0]["image"] == RED
    assert data.split_weight(f"{tmp_path}/l.json@{tmp_path}:2") == (
        f"{tmp_path}/l.json@{tmp_path}", 2.0)


def test_an_empty_path_is_refused():
    with pytest.raises(UserError, match="empty path"):
        data.Mix([""], 16)


# --------------------------------------------------------------------------------------- text files

ODD = "a\u2028b\x85c\x0bd\x1ce"       # str.splitlines would make five lines of it


def test_a_text_file_has_the_same_lines_wherever_it_is_read(tmp_path):
    content = f"\ufeff{ODD}\r\n \r\nlast".encode()
    folder = write(tmp_path / "d", a_jpg=RED, a_txt=content)
    tar = write_tar(tmp_path / "a.tar", [("a.jpg", RED), ("a.txt", content)])
    assert captions(folder) == captions(tar) == [[ODD, "last"]]
    assert clip.read_caption(folder / "a.jpg") == ODD
    assert sample.read_lines(folder / "a.txt") == [ODD, "last"]
    prompts = benchmarks.read("lines", [str(folder / "a.txt")]).jobs
    assert [prompt for prompt, _ in prompts] == [ODD, "last"]


@pytest.mark.parametrize("packed", [False, True])
def test_plain_text_to_pack_has_no_byte_order_mark(packed, tmp_path):
    content = f"\ufeff{ODD}\n".encode()
    path = tmp_path / ("a.txt.gz" if packed else "a.txt")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert [text for text, _ in precompute.documents(str(path))] == [f"{ODD}\n"]


def test_lines_of_json_may_hold_any_character(tmp_path):
    rows = [dict(question_id=ODD, answer=ODD), dict(question_id=2, answer="b")]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write(tmp_path, a_jsonl=b"\xef\xbb\xbf" + lines.encode())
    assert answers.read_answers(tmp_path / "a.jsonl")[0] == {ODD: ODD, "2": "b"}


def test_bytes_that_are_no_text_are_named_by_file_and_line(tmp_path):
    path = write(tmp_path, p_txt=b"red\ncaf\xe9\n") / "p.txt"
    for read in (sample.read_lines, files.read_json, files.read_text):
        with pytest.raises(UserError, match="p.txt:2: not UTF-8"):
            read(path)
    (tmp_path / "u.json").write_bytes("{}".encode("utf-16"))
    with pytest.raises(UserError, match="u.json:1: not UTF-8"):
        files.read_json(tmp_path / "u.json")


def test_a_file_that_cannot_be_read_is_not_taken_for_absent(tmp_path):
    (tmp_path / "out.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="out.json: "):
        tables.read_note(tmp_path / "out")
    folder = write(tmp_path / "d", a_jpg=RED, a_txt="red")
    (folder / "metadata.jsonl").mkdir()
    with pytest.raises(UserError, match="metadata.jsonl: "):
        data.open_source(str(folder), 16)


def test_gpt2s_merges_may_have_windows_line_ends(monkeypatch, tmp_path):
    cut = tokenizer.MERGES.read_text(encoding="utf-8").replace("\n", "\r\n")
    (tmp_path / "merges.txt").write_text(cut, encoding="utf-8", newline="")
    monkeypatch.setattr(tokenizer, "MERGES", tmp_path / "merges.txt")
    assert tokenizer.read_merges()[-1][1].isalpha() and len(tokenizer.read_merges()) == 50000


# ---------------------------------------------------------------------- lists given twice or empty

@pytest.mark.parametrize("flags, name", [
    (["answer", "pope", "q.json", ".", "o.jsonl", "--choices", "no", "no"],
     "--choices: no"),
    (["answer", "pope", "q.json", "q.json", ".", "o.jsonl"], "--questions: q.json"),
    (["emoji", "--seeds", "1", "2", "1"], "--seeds: 1"),
    (["draw", "lines", "a.txt", " ", "o"], "--prompts is empty")])
def test_a_list_with_a_value_twice_or_blank_is_refused(flags, name, run_program):
    status, message = run_program(evaluate.main, flags)
    assert status == 2 and name in message and message.count("\n") == 1


def test_scores_likelihoods_of_different_texts_only(run_program):
    status, message = run_program(sample.main, ["--image", "a.png", "--score", "a cat", "a cat"])
    assert status == 2 and "--score: a cat" in message


def test_blank_prompts_are_left_out_and_named(tmp_path):
    write(tmp_path, g_jsonl='{"tag": "counting", "prompt": "\\u3000"}\n{"tag": "colors", "prompt": "a"}',
          m_json=json.dumps({"x": dict(category="art", prompt="\t"),
                             "y": dict(category="art", prompt="b")}))
    write(tmp_path / "dpg", a_txt="\ufeff\n", b_txt="c")
    for kind, name in dict(geneval="g.jsonl", mjhq="m.json", dpg="dpg").items():
        benchmark = benchmarks.read(kind, [str(tmp_path / name)], 1 if kind == "mjhq" else 4)
        assert len({prompt for prompt, _ in benchmark.jobs}) == 1
        assert len(benchmark.left_out) == 1 and "blank" in benchmark.left_out[0]
    assert list(benchmarks.read("geneval", [str(tmp_path / "g.jsonl")]).files) == [
        "00001/metadata.jsonl"]


def test_two_prompts_of_one_file_name_are_refused(tmp_path):
    paths = [str(write(tmp_path / name, color_val_txt="a cat") / "color.val.txt")
             for name in ("one", "two")]
    with pytest.raises(UserError, match="drawn as color.val/samples/a cat_000000.png"):
        benchmarks.read("t2i", paths)


@pytest.mark.parametrize("content", ['[{"answer": "NaN"}]', "[{}]", "{}", "[]", '[{"answer": []}]'])
def test_malformed_scores_of_t2i_are_named(content, tmp_path):
    folder = tmp_path / "color"
    (folder / "samples").mkdir(parents=True)
    (folder / "annotation_blip").mkdir()
    (folder / "annotation_blip" / "vqa_result.json").write_text(content)
    with pytest.raises(UserError, match="color/annotation_blip/vqa_result.json: "):
        benchmarks.t2i_scores(tmp_path)


def test_scores_of_an_unknown_task_or_of_one_image_twice_are_named(tmp_path):
    (tmp_path / "r.jsonl").write_text(
        '{"tag": "colours", "correct": true}\n{"tag": "colors", "correct": false}')
    scores, left_out = benchmarks.geneval_scores(tmp_path / "r.jsonl")
    assert scores["overall"] == 0 and "'colours'" in left_out[-1]
    (tmp_path / "r.txt").write_text("a.png, 1.0\na.png, 0.0\nDPG-Bench score: 50\n")
    scores, left_out = benchmarks.dpg_scores(tmp_path / "r.txt")
    assert scores["overall"] == 100 and len(left_out) == 1 and "a.png" in left_out[0]


@pytest.mark.parametrize("line", ["a.png, 0.5, -", "a.png, ", "\tentity: 1e", "a.png, nan"])
def test_malformed_scores_of_dpg_are_named_by_line(line, tmp_path):
    (tmp_path / "r.txt").write_text(f"b.png, 1.0\n{line}\n")
    with pytest.raises(UserError, match="r.txt:2: "):
        benchmarks.dpg_scores(tmp_path / "r.txt")


@pytest.mark.parametrize("content", ["[]", "3", '{"images": []}'])
def test_json_of_another_program_is_no_note(content, tmp_path):
    (tmp_path / "o.json").write_text(content)
    assert tables.read_note(tmp_path / "o") == {}


def test_a_malformed_note_is_named(tmp_path):
    (tmp_path / "o.json").write_text("{")
    with pytest.raises(UserError, match="o.json: "):
        tables.read_note(tmp_path / "o")


@pytest.mark.parametrize("note", [dict(questions=5), dict(questions=[None]), dict(limit="x"),
                                  dict(limit=-1)])
def test_a_note_with_odd_values_is_named(note, tmp_path, run_program):
    (tmp_path / "o").write_text("")
    (tmp_path / "o.json").write_text(json.dumps(dict(made_by="answer", questions=["q.json"]) | note))
    status, message = run_program(evaluate.main, ["score", "pope", tmp_path / "o"])
    assert status == 1 and "o.json" in message and list(note)[0] in message


@pytest.mark.parametrize("kind, content", [
    ("t2i", "a\0b"), ("mjhq", r'{"\ud800": {"category": "a", "prompt": "b"}}')])
def test_names_that_no_file_can_have_are_refused(kind, content, tmp_path):
    (tmp_path / "p").write_text(content)
    with pytest.raises(UserError, match="p: "):
        benchmarks.read(kind, [str(tmp_path / "p")])


def test_names_of_several_lines_give_one_line(tmp_path, capsys, run_program):
    folder = write(tmp_path / "a\nb", a_jpg=RED, a_txt="red", b_heic="?")
    captions(folder)
    tables.print_left_out(["x\ny"])
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and out == "left out: 1\n  x\\ny\n"
    assert run_program(sample.main, ["--prompt", "a", "--out", "a\nb.txt"])[1].count("\n") == 1


def test_file_names_that_are_no_text_are_names_nevertheless(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for name, content in ((b"caf\xe9.jpg", RED), (b"caf\xe9.txt", b"red")):
        (folder / os.fsdecode(name)).write_bytes(content)
    assert captions(folder) == [["red"]] and data.fingerprint(str(folder))
