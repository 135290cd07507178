"""evaluate.py: a benchmark's pictures, however many processes draw them; its scores; the small benchmark."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from common.cli import UserError
from dataset.images import read_picture, text_fields
from helpers import Forked, kill_when, to_the_end
from inference.parts import Parts
from metrics import benchmarks, comparisons, emojis, fid

ROOT = Path(__file__).parents[2]


class Mean(torch.nn.Module):
    """A network for the tests: 16 features, the means of a picture's quarters in each colour, and sums."""

    def forward(self, x):
        cells = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)                      # (B, 12)
        return torch.cat([cells, cells.view(len(x), 3, 4).sum(1)], 1)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(comparisons.inception, "untrained", Mean)


def run(*args):
    evaluate.main(list(map(str, args)))


def noise(path, seed, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def pngs(folder):
    return {path.relative_to(folder): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------- pictures

def test_a_process_killed_at_half_and_two_that_go_on_end_with_the_files_of_one(tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(f"red apple number {i}" for i in range(60)))
    flags = [str(tmp_path / "prompts.txt"), "--checkpoint", str(tiny), "--steps", "12"]
    run("draw", "lines", *flags, tmp_path / "one", "--batch", "7")

    start = lambda processes: Forked(processes, "draw", "lines", *flags, tmp_path / "two", "--batch", 3,
                                     program="evaluate")
    there = lambda: list((tmp_path / "two").glob("*.png"))
    kill_when(start(1), lambda: len(there()) >= 20)
    before = {path: path.stat().st_mtime_ns for path in there()}
    assert 20 <= len(before) < 60
    said, _ = to_the_end(start(2))
    assert f"60 pictures, {len(before)} of which were there" in said and said.count("pictures") == 1
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert pngs(tmp_path / "two") == pngs(tmp_path / "one")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["settings"] == two["settings"] and one["settings"]["checkpoint"] == Parts(tiny).digest()


def test_a_drawing_does_not_depend_on_what_else_is_drawn(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("a cat\na dog\n\na red bus\n")
    flags = ["--checkpoint", tiny, "--steps", 2, "--seed", 5]
    run("draw", "lines", tmp_path / "a.txt", tmp_path / "two", "--n", 2, *flags)
    run("draw", "lines", tmp_path / "a.txt", tmp_path / "one", "--limit", 2, *flags)
    two, one = pngs(tmp_path / "two"), pngs(tmp_path / "one")
    assert len(two) == 6 and len(one) == 2
    assert [one[Path(f"0000{i}.png")] for i in (0, 1)] == [two[Path(f"0000{i}.png")] for i in (0, 2)]
    seeds = [text_fields(tmp_path / "two" / name)["seed"] for name in two]
    assert seeds == ["5", "6", "1005", "1006", "2005", "2006"]
    with pytest.raises(UserError, match="00000.png: was drawn with steps '2', asked for is '3'"):
        run("draw", "lines", tmp_path / "a.txt", tmp_path / "two", "--n", 2, *flags, "--steps", 3)


def test_genevals_layout_and_its_results_read_back(tiny, tmp_path, capsys):
    entries = [dict(tag="single_object", include=[{"class": "bench"}], prompt="a photo of a bench"),
               dict(tag="colors", include=[], prompt="a photo of a red apple")]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")
    out = tmp_path / "out"
    run("draw", "geneval", tmp_path / "m.jsonl", out, "--checkpoint", tiny, "--steps", 1)
    names = [f"0000{i}/{name}" for i in (0, 1) for name in
             ["metadata.jsonl", *[f"samples/0000{k}.png" for k in range(4)]]]
    assert list(map(str, pngs(out))) == names
    assert [json.loads((out / f"0000{i}/metadata.jsonl").read_text()) for i in (0, 1)] == entries
    results = [dict(tag=tag, prompt="p", correct=right) for tag, right in
               [("single_object", i < 3) for i in range(4)] + [("colors", False), ("colors", True)]]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, results)))
    run("score", "geneval", tmp_path / "results.jsonl", "--made", out, "--json", tmp_path / "s.json")
    said = capsys.readouterr().out
    assert "| these drawings | 0.7500 | 0.5000 | 0.6250 |" in said and "published |  |  | 0.6500 |" in said
    assert "no picture of counting" in said and "left out: 4" in said
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["scores"]["these drawings"] == {"single object": 0.75, "colors": 0.5, "overall": 0.625}
    assert found["made"]["settings"]["checkpoint"] == Parts(tiny).digest()
    assert found["command"].startswith("python evaluate.py score geneval ")


def test_t2i_compbenchs_layout_and_its_results_read_back(tiny, tmp_path, capsys):
    for category, prompts in dict(color="a red cup\tand more\na blue/green cup", shape="a round box").items():
        (tmp_path / f"{category}_val.txt").write_text(prompts + "\n")
    out = tmp_path / "out"
    run("draw", "t2i", *(tmp_path / f"{c}_val.txt" for c in ("color", "shape")), out, "--checkpoint", tiny,
        "--steps", 1, "--n", 2)
    assert list(map(str, pngs(out))) == [
        "color/samples/a blue green cup_000002.png", "color/samples/a blue green cup_000003.png",
        "color/samples/a red cup_000000.png", "color/samples/a red cup_000001.png",
        "shape/samples/a round box_000000.png", "shape/samples/a round box_000001.png"]
    (out / "color/annotation_blip").mkdir()
    (out / "color/annotation_blip/vqa_result.json").write_text(json.dumps(
        [dict(question_id=i, answer=answer) for i, answer in enumerate(["0.5000", "0.2500", "1.0000"])]))
    run("score", "t2i", out)
    said = capsys.readouterr().out
    assert "| these drawings | 0.5833 |" in said and "| 0.8001 | 0.5703 | 0.6856 |" in said
    assert f"{out}/shape: no scorer has left its vqa_result.json there" in said
    assert "3 answers, 4 drawings" in said and "settings: steps 1" in said


def test_dpg_benchs_grids_and_its_results_read_back(tiny, tmp_path, capsys):
    (tmp_path / "prompts").mkdir()
    for name in ("12", "partiprompts3"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"a long\nstory {name}")
    run("draw", "dpg", tmp_path / "prompts", tmp_path / "out", "--checkpoint", tiny, "--steps", 1)
    run("draw", "dpg", tmp_path / "prompts", tmp_path / "one", "--checkpoint", tiny, "--steps", 1, "--n", 1)
    grid = np.array(read_picture(tmp_path / "out/partiprompts3.png"))
    assert list(map(str, pngs(tmp_path / "out"))) == ["12.png", "partiprompts3.png"]
    assert grid.shape == (32, 32, 3)
    assert np.array_equal(grid[:16, :16], np.array(read_picture(tmp_path / "one/partiprompts3.png")))
    assert text_fields(tmp_path / "out/12.png")["seed"] == "0 1 2 3"
    assert len({grid[y:y + 16, x:x + 16].tobytes() for y in (0, 16) for x in (0, 16)}) == 4
    lines = ["out/12.png, 1.0, 0.5, 0.5, 1.0, 0.75", "out/partiprompts3.png, 0.5, 0.5, 0.5, 0.5, 0.5",
             "Model: out", "L1 category scores:", "\tentity: 80.5", "\tglobal: 60", "L2 category scores:",
             "\tentity - whole: 80.5", "DPG-Bench score: 62.5"]
    (tmp_path / "r.txt").write_text("\n".join(lines))
    run("score", "dpg", tmp_path / "r.txt")
    said = capsys.readouterr().out
    assert "|  | entity | global | overall |" in said and "| these drawings | 80.5 | 60.0 | 62.5 |" in said
    assert "left out" not in said
    (tmp_path / "r.txt").write_text("\n".join(lines[:2]))
    run("score", "dpg", tmp_path / "r.txt")
    assert "the scorer was stopped" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- scores

@pytest.fixture
def categories(tmp_path, quick):
    """Drawings and real pictures of three categories, of which one was never drawn; one is corrupt."""
    meta = {f"id{i}": dict(category=("cats", "dogs", "none")[i % 3], prompt=f"p{i}") for i in range(18)}
    meta["id18"] = dict(category="cats", prompt="")
    (tmp_path / "meta_data.json").write_text(json.dumps(meta))
    for i, (name, entry) in enumerate(meta.items()):
        noise(tmp_path / "real" / entry["category"] / f"{name}.jpg", i, (48, 32))
        if entry["category"] != "none":
            noise(tmp_path / "drawn" / entry["category"] / f"{name}.png", 100 + i)
    (tmp_path / "drawn/cats/id3.png").write_bytes((tmp_path / "drawn/cats/id3.png").read_bytes()[:300])
    (tmp_path / "real/dogs/id4.jpg").unlink()
    return [tmp_path / "drawn", tmp_path / "real", tmp_path / "meta_data.json", "--inception", "random"]


def test_mjhqs_categories_and_what_is_missing_is_named(categories, tmp_path, capsys):
    drawn, real = categories[:2]
    run("mjhq", *categories, "--json", tmp_path / "s.json")
    said, found = capsys.readouterr().out, json.loads((tmp_path / "s.json").read_text())
    scores = found["scores"]["these drawings"]
    side = lambda paths: fid.statistics(fid.features(Mean(), [
        (str(path), lambda path=path: read_picture(path)) for path in paths])[0])
    numbers = dict(cats=range(0, 18, 3), dogs=range(1, 18, 3))
    wanted = lambda c: fid.frechet(side([drawn / f"{c}/id{i}.png" for i in numbers[c] if i != 3]),
                                   side([real / f"{c}/id{i}.jpg" for i in numbers[c] if i != 4]))
    assert scores["cats"] == pytest.approx(wanted("cats")) and scores["dogs"] == pytest.approx(wanted("dogs"))
    assert set(scores) == {"overall", "cats", "dogs"} and "| 15.16 |" in said
    named = "\n".join(found["left_out"])
    assert "none: 0 drawn pictures that can be read, so no score" in named
    assert "drawn/cats/id3.png: not a picture that can be read" in named and "id18: no prompt" in named
    assert "real/dogs/id4.jpg: no such picture file" in named and "drawn/none/id2.png: no such" in named
    assert f"left out: {len(found['left_out'])}" in said and len(found["left_out"]) == 10


def test_cocos_pictures_are_chosen_by_number_and_cut_to_the_drawings_shape(tmp_path, quick, capsys,
                                                                           monkeypatch):
    monkeypatch.setattr(benchmarks, "COCO", 6)
    images = [dict(id=i, file_name=f"COCO_val2014_{i:012}.jpg") for i in range(8)]
    captions = [dict(id=30 - i, image_id=i, caption=f" a  cat {i}") for i in range(8)]
    captions += [dict(id=100 + i, image_id=i, caption="a later one") for i in range(8)]
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(dict(images=images, annotations=captions)))
    asked = benchmarks.read("coco", [str(file)])
    assert len(asked.jobs) == 6 and asked.jobs == benchmarks.read("coco", [str(file)]).jobs
    assert all(prompt == f"a cat {int(name[:12])}" and seed == 1000 * int(name[:12])
               for (prompt, seed), name in zip(asked.jobs, asked.names))
    for i, name in enumerate(asked.names):
        noise(tmp_path / "drawn" / name, i)
        wide = np.zeros((32, 96, 3), np.uint8)                   # what is cut off is white
        wide[:, :32], wide[:, 64:] = 255, 255
        wide[:, 32:64] = np.array(read_picture(tmp_path / "drawn" / name))
        (tmp_path / "val").mkdir(exist_ok=True)
        Image.fromarray(wide).save(tmp_path / "val" / asked.real[name], "PNG")
    run("coco", tmp_path / "drawn", tmp_path / "val", file, "--inception", "random", "--json",
        tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["scores"]["these drawings"]["FID"] < 1e-9
    said = capsys.readouterr().out
    assert "| D-DiT from SD3 (2B), published | 9.40 | 31.20 |" in said and "random weights" in said


def test_fid_of_sources_of_every_kind(tmp_path, quick, capsys):
    for i in range(6):
        noise(tmp_path / "a" / f"{i}.png", i)
        noise(tmp_path / "b" / f"{i}.png", 50 + i)
    (tmp_path / "b" / "bad.png").write_bytes(b"\x89PNG")
    how = ["--inception", "random", "--json", tmp_path / "s.json"]
    run("statistics", tmp_path / "b", tmp_path / "b.npz", "--inception", "random", "--features")
    assert "bad.png" in capsys.readouterr().out
    scores = []
    for other in (tmp_path / "b", tmp_path / "b.npz"):
        run("fid", tmp_path / "a", other, *how)
        scores.append(next(iter(json.loads((tmp_path / "s.json").read_text())["scores"].values())))
    assert scores[0] == pytest.approx(scores[1]) and scores[0]["FID"] > 0 and "KID x 1000" in scores[0]
    run("statistics", tmp_path / "b", tmp_path / "c.npz", "--inception", "random")
    run("fid", tmp_path / "a", tmp_path / "c.npz", *how)
    assert "KID" not in capsys.readouterr().out.split("python evaluate.py fid")[-2]
    with pytest.raises(UserError, match="emoji:nose: the emoji set has the splits train, tone, style"):
        run("fid", tmp_path / "a", "emoji:nose", *how)
    with pytest.raises(UserError, match="nowhere"):
        run("fid", tmp_path / "nowhere", tmp_path / "b", *how)


@pytest.mark.parametrize("benchmark, name, content, said", [
    ("geneval", "m.jsonl", '{"prompt": "a"}', "m.jsonl:1: expected an object with tag and prompt"),
    ("geneval", "m.jsonl", '{"tag": "colors", "prompt": null}', '"prompt" is null, expected a text'),
    ("geneval", "m.jsonl", "", "holds no prompt"),
    ("mjhq", "m.json", '{"../x": {"category": "a", "prompt": "b"}}', "'a/../x' can't be a category and a file's name"),
    ("mjhq", "m.json", "[]", "expected an object of {id: {category, prompt}}"),
    ("coco", "c.json", '{"images": []}', "expected COCO's captions, with images and annotations"),
    ("t2i", "color_val.txt", "x" * 300, "which no file's name can have"),
    ("lines", "a.txt", "\n\n", "holds no prompt"), ("emoji", "nose", None, "the emoji set has the splits")])
def test_prompts_that_are_not_a_benchmarks_are_refused_in_a_line(benchmark, name, content, said, tmp_path,
                                                                 mistake):
    if content is not None:
        (tmp_path / name).write_text(content)
        name = tmp_path / name
    status, line = mistake(evaluate.main, ["draw", benchmark, name, tmp_path / "out"])
    assert status == 1 and said in line and len(line.splitlines()) == 1
    if benchmark in ("coco", "mjhq"):
        status, line = mistake(evaluate.main, ["draw", benchmark, name, tmp_path / "out", "--n", 2])
        assert status == 1 and f"--n 2: {benchmark} is scored with one drawing each" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("benchmark, content", [("geneval", '{"tag": "colors", "correct": 1}'), ("dpg", "x"),
                                                ("geneval", "")])
def test_results_that_no_scorer_wrote_are_refused_in_a_line(benchmark, content, tmp_path, mistake):
    (tmp_path / "r").write_text(content)
    status, line = mistake(evaluate.main, ["score", benchmark, tmp_path / "r"])
    assert status == 1 and len(line.splitlines()) == 1 and str(tmp_path / "r") in line


# ------------------------------------------------------------------------------------------------ the emoji

def test_the_emoji_set_is_measured_as_the_papers_tables(tmp_path, capsys, emoji_all, monkeypatch):
    monkeypatch.setattr(evaluate.emoji, "load", lambda *args: (emoji_all[0], (emoji_all[1] + 1) * 127.5))
    how, asked = ["emoji", "--splits", "tone", "--limit", 3, "--prompts", 2], []
    write = emojis.write
    monkeypatch.setattr(emojis, "write", lambda *args, **how: asked.append(how) or write(*args, **how))
    run(*how, "--seeds", 0, 1, "--steps", 2, "--json", tmp_path / "r.json")
    said = capsys.readouterr().out
    assert "| drawing, % | emoji | people | exact | read back |\n" in said and "| tone | " in said
    assert "| reading, % | caption | name | kind |" in said and "| POPE, % | accuracy |" in said
    found = json.loads((tmp_path / "r.json").read_text())
    runs = found["results"]["tone"]
    assert len(runs) == 2 and all(0 <= value <= 100 for run in runs for value in run.values())
    assert sum("seed" in how for how in asked) == 2              # reading is not random: once for both seeds
    assert found["settings"]["steps"] == "2" and found["settings"]["reading"] == {"steps": 2}
    asked.clear()
    run(*how, "--seeds", 3, 4, "--prompts", 0, "--order", "confidence", "--temperature", 1,
        "--image-cache", "off")
    sampled = [how for how in asked if "seed" in how]
    assert [how["seed"] for how in sampled] == [3, 3, 4, 4] and all(
        (how["order"], how["temperature"], how["image_cache"]) == ("confidence", 1, "off") for how in sampled)
    assert "drawing" not in capsys.readouterr().out


def test_the_page_of_the_set_draws_what_it_says_and_reads_what_is_held_out(tmp_path, emoji_all, monkeypatch):
    records, pictures = emoji_all
    monkeypatch.setattr(evaluate.emoji, "load", lambda *args: (records, (pictures + 1) * 127.5))
    rows, page, seen = emojis.grids.rows, emojis.grids.page, []
    monkeypatch.setattr(emojis.grids, "rows", lambda *tiles: seen.extend(sum(tiles, [])) or rows(*tiles))
    monkeypatch.setattr(emojis.grids, "page", lambda *cells: seen.extend(sum(cells, [])) or page(*cells))
    run("emoji", "--page", tmp_path / "page.png", "--steps", 1)
    known = {record["caption"]: record for record in records}
    drawn, read = seen[:28], [lines for _, lines in seen[28:]]
    assert [known[text]["split"] for _, text in drawn] == ["train"] * 21 + ["tone"] * 7
    assert all(known[text]["kind"] != "people & body" for _, text in drawn[:14])
    assert len(read) == 10 and all(said.startswith("read: ") for said, _ in read)
    assert {known[true.removeprefix("true: ")]["split"] for _, true in read} == {"tone", "style"}
    assert Image.open(tmp_path / "page.png").width == 1000


def test_the_clip_score_of_a_drawn_folder_names_what_has_no_caption(tiny, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a cat\na dog\na red bus\n")
    run("draw", "lines", tmp_path / "a.txt", tmp_path / "out", "--checkpoint", tiny, "--steps", 1)
    noise(tmp_path / "out/other.png", 0)
    clip_ = ["--clip", ROOT / "tests/fixtures/clip"]
    run("clip", tmp_path / "out", *clip_, "--json", tmp_path / "s.json")
    found = json.loads((tmp_path / "s.json").read_text())
    scores, = found["scores"].values()
    assert set(scores) == {"CLIP", "its standard error"} and -100 < scores["CLIP"] < 100
    assert found["left_out"] == ["other.png: has no caption"] and "pairs: 3" in capsys.readouterr().out
    drawn = sorted((tmp_path / "out").glob("0*.png"))
    pairs = [(str(path), path, text_fields(path)["prompt"]) for path in drawn]
    model, vocabulary = comparisons.clip.load(clip_[1]), comparisons.clip.load_tokenizer(clip_[1])
    cosines, _ = comparisons.clip.score(pairs, model, vocabulary, "cpu")
    assert scores["CLIP"] == pytest.approx(np.mean(cosines))
