"""inference/answer_file.py and its commands: the same lines however many processes write them, killed or not."""

import json
import re
from pathlib import Path

import pytest
import torch

import evaluate
from common.cli import UserError
from dataset.images import fit_picture, read_picture, to_picture, to_tensor
from helpers import Forked, kill_when, to_the_end
from inference import answer_file
from inference.answer_file import Ask
from inference.image_to_text import encode, write
from inference.parts import Parts

FIXTURES = Path(__file__).parents[1] / "fixtures"
ASKED = ["Is it a flag?", "Is it food?", "What is it?"]


@pytest.fixture(scope="module")
def photos(emoji_set, tmp_path_factory):
    """Twenty pictures, and one that is corrupt."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(20):
        to_picture(emoji_set[1][i] / 127.5 - 1).save(folder / f"{i}.png")
    (folder / "20.png").write_bytes((folder / "0.png").read_bytes()[:400])
    return folder


def run(*args):
    evaluate.main(list(map(str, args)))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def questions(path, count, kind="popular"):
    """A file as POPE's: `count` questions about 21 pictures."""
    rows = [dict(question_id=i, image=f"{i % 21}.png", text=ASKED[i % 2], label=("yes", "no")[i // 2 % 2])
            for i in range(count)]
    file = path / f"coco_pope_{kind}.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_process_killed_at_half_and_two_that_go_on_end_with_the_lines_of_one(tiny, photos, tmp_path):
    flags = ["answer", "pope", questions(tmp_path, 640), photos]
    how = ["--checkpoint", tiny, "--suffix", "", "--temperature", "1", "--order", "random", "--steps", "24"]
    run(*flags, tmp_path / "one.jsonl", *how)
    out, blocks = tmp_path / "two.jsonl", tmp_path / "two.jsonl.blocks"

    start = lambda processes: Forked(processes, *flags, out, *how, program="evaluate")
    done = lambda: list(blocks.glob("0*.jsonl")) if blocks.exists() else []
    kill_when(start(1), lambda: len(done()) >= 3)
    before = {path: path.stat().st_mtime_ns for path in done()}
    assert 3 <= len(before) < 10 and not out.exists()
    (blocks / "000000.jsonl").unlink(missing_ok=True)
    said, _ = to_the_end(start(2))
    assert out.read_bytes() == (tmp_path / "one.jsonl").read_bytes() and not blocks.exists()
    assert f"{out}: 610 of 640\nleft out: 30\n" in said and "20.png: not a picture that can be read" in said
    found = lines(out)
    assert [row["question_id"] for row in found] == [f"popular/{i}" for i in range(640) if i % 21 != 20]
    assert len({row["answer"] for row in found}) > 100           # sampled, each by a seed of its own


def test_an_answer_does_not_depend_on_what_else_is_asked(tiny, photos, tmp_path):
    parts, note = Parts(tiny, dtype=torch.float32), dict(settings="any")
    asked = [Ask(str(i), f"{i % 20}.png", ASKED[i % 3]) for i in range(70)] + [Ask(7, "3.png")]
    fill = lambda asked, name: answer_file.fill(parts, asked, photos, tmp_path / name, note, steps=5,
                                              temperature=1.0, order="random")
    assert fill(asked, "all") == [] and fill(asked[::-1][:9], "some") == []
    assert all(row in lines(tmp_path / "all") for row in lines(tmp_path / "some"))
    assert lines(tmp_path / "all")[-1].keys() == {"image_id", "caption"}
    with pytest.raises(UserError, match=r"all: was made otherwise \(settings\); name another file"):
        answer_file.fill(parts, asked, photos, tmp_path / "all", dict(settings="other"))
    assert answer_file.fill(parts, asked, photos, tmp_path / "all", note) == []    # there: nothing is asked
    (tmp_path / "all.json").unlink()
    with pytest.raises(UserError, match="all: is there, and no all.json"):
        fill(asked, "all")


def test_a_question_that_is_too_long_is_left_out_and_the_rest_answered(tiny, photos, tmp_path):
    parts = Parts(tiny)
    asked = [Ask("a", "0.png", "Is it a flag?"), Ask("b", "0.png", "flag " * 40), Ask("c", "none.png", "Is?")]
    lost = answer_file.fill(parts, asked, photos, tmp_path / "a.jsonl", {}, steps=2)
    assert [row["question_id"] for row in lines(tmp_path / "a.jsonl")] == ["a"]
    assert lost[0].startswith("b: the question has") and lost[1].endswith("none.png: no such picture file")


def test_an_answer_with_a_line_separator_stays_one_line(tiny, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(answer_file, "write", lambda parts, latents, questions, **how: ["a\u2028b"])
    assert answer_file.fill(Parts(tiny), [Ask("a", "0.png", "Is?")], photos, tmp_path / "a.jsonl", {}) == []
    assert (tmp_path / "a.jsonl").read_bytes().decode() == '{"question_id": "a", "answer": "a\u2028b"}\n'


def test_popes_answers_and_scores_from_the_shipped_weights(photos, tmp_path, capsys):
    """What is read back is what was written, and the likeliest of two choices is one of them."""
    files = [questions(tmp_path, 6, kind) for kind in ("random", "adversarial")]
    likelihood = ["--by", "likelihood", "--choices", "yes", "no", "--limit", 3]
    for by, name in (([], "w.jsonl"), (likelihood, "l.jsonl")):
        run("answer", "pope", *files, photos, tmp_path / name, "--suffix", "", *by)
        assert {row["answer"] for row in lines(tmp_path / name)} <= {"yes", "no"}
    run("score", "pope", tmp_path / "w.jsonl", "--json", tmp_path / "s.json")
    said, scores = capsys.readouterr().out, json.loads((tmp_path / "s.json").read_text())["scores"]
    assert "| | accuracy | precision | recall | F1 | yes-ratio |" in said.replace("|  |", "| |")
    assert set(scores) == {"random", "adversarial", "mean", "every type"}
    right = [row["answer"] == ("yes", "no")[int(row["question_id"].split("/")[1]) // 2 % 2]
             for row in lines(tmp_path / "w.jsonl") if row["question_id"].startswith("random")]
    assert scores["random"]["accuracy"] == pytest.approx(100 * sum(right) / len(right))
    parts = Parts()
    assert f"checkpoint: {parts.digest()}" in said and "seed: 0" in said


def vqa_files(tmp_path, count=6):
    asked = [dict(question_id=i, image_id=i % 6, question=ASKED[i % 3]) for i in range(count)]
    notes = [dict(question_id=i, image_id=i, question_type="is it", answer_type=("yes/no", "other")[i % 2],
                  answers=[dict(answer_id=k, answer="yes" if k < 3 + i else "no") for k in range(10)],
                  multiple_choice_answer="yes") for i in range(count - 1)]
    file = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    file.write_text(json.dumps(dict(questions=asked, data_subtype="val2014")))
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text(json.dumps(dict(annotations=notes)))
    for i in range(6):
        to_picture(torch.rand(3, 32, 32)).save(tmp_path / f"COCO_val2014_{i:012}.jpg")
    return file


def test_vqav2_with_shots_and_the_papers_rows_below(tiny, tmp_path, capsys, monkeypatch):
    file, seen = vqa_files(tmp_path), []
    monkeypatch.setattr(answer_file, "write", lambda parts, latents, asked, **how: seen.extend(asked) or [
        "yes" for _ in asked])
    run("answer", "vqav2", file, tmp_path, tmp_path / "a.jsonl", "--checkpoint", tiny, "--suffix", "",
        "--shots", "1", "--examples", file)
    assert len(seen) == 5 and all(text.count("Q: ") == text.count(" A: ") == 1 for text in seen)
    assert all(text.endswith(f"Q: {ASKED[i % 3]}") for i, text in enumerate(seen))
    assert "questions without a true answer, left out: 1 (5)" in capsys.readouterr().out
    run("score", "vqav2", tmp_path / "a.jsonl", "--json", tmp_path / "s.json")
    said = capsys.readouterr().out
    # 3 to 7 of ten said yes: 0.9, then 1
    assert "| these answers | 98.0 | 96.7 | 100.0 |" in said
    assert "question type" not in said.split("made_by")[0]
    assert "32-shot | 60.3 |" in said
    scores = json.loads((tmp_path / "s.json").read_text())["scores"]
    assert scores["every type"]["question type: is it"] == pytest.approx(98)
    run("score", "okvqa", tmp_path / "a.jsonl", "--questions", file)
    assert "98.0" in capsys.readouterr().out


def test_as_many_shots_as_asked_find_room_or_a_line_says_what_would(tiny, tmp_path, mistake, capsys):
    """T5 has no position table: the answers' length follows.  A table, or --length, limits it."""
    file = vqa_files(tmp_path, 60)
    asked = ["answer", "vqav2", file, tmp_path, tmp_path / "a.jsonl", "--shots", "32", "--examples", file,
             "--suffix", "", "--limit", "3", "--steps", "2"]
    t5 = ["--checkpoint", FIXTURES / "release", "--vae", FIXTURES / "sd3.safetensors", "--height", "16",
          "--width", "16"]
    status, said = mistake(evaluate.main, [*asked, *t5, "--length", "100"])
    advised = re.search(r"--shots 32: the prompts have \d+ to \d+ tokens, --length 100: use --length (\d+)\n", said)
    assert status == 1 and advised and not (tmp_path / "a.jsonl").exists()
    status, said = mistake(evaluate.main, [*asked, "--checkpoint", tiny])
    assert status == 1 and "at most 28 positions: use fewer --shots" in said
    run(*asked, *t5)
    assert "a.jsonl: 3 of 3" in capsys.readouterr().out and len(lines(tmp_path / "a.jsonl")) == 3
    assert json.loads((tmp_path / "a.jsonl.json").read_text())["length"] == int(advised[1])


def test_captions_are_written_and_scored_by_cocos_file(tiny, photos, tmp_path, capsys):
    content = dict(images=[dict(id=i, file_name=f"{i}.png") for i in range(21)],
                   annotations=[dict(image_id=i, id=i, caption=f"a red cat {i}") for i in range(20)])
    (tmp_path / "captions.json").write_text(json.dumps(content))
    run("answer", "captions", tmp_path / "captions.json", photos, tmp_path / "c.jsonl", "--checkpoint", tiny,
        "--steps", 3, "--dtype", "float32")
    said = capsys.readouterr().out
    assert "20 of 21" in said and "20.png" in said
    parts, picture = Parts(tiny, dtype=torch.float32), read_picture(photos / "4.png")
    latents = encode(parts, to_tensor(fit_picture(picture, 16, 16))[None])
    assert lines(tmp_path / "c.jsonl")[4] == dict(image_id=4, caption=write(parts, latents, steps=3)[0])
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(dict(image_id=i, caption=f"a red cat {i}")) + "\n"
                                              for i in range(19)))
    run("score", "captions", tmp_path / "c.jsonl", "--json", tmp_path / "s.json")
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["scores"]["these captions"]["BLEU-4"] == pytest.approx(1)
    assert any("no caption was written" in line for line in scores["left_out"])


@pytest.mark.parametrize("flags, said", [
    (["--by", "likelihood"], "--by likelihood and --choices go together"),
    (["--shots", "2"], "--shots and --examples go together")])
def test_flags_that_lack_their_other_half_are_refused(flags, said, mistake):
    status, line = mistake(evaluate.main, ["answer", "pope", "a.json", "photos", "out.jsonl", *flags])
    assert (status, line) == (2, f"error: {said}\n")
