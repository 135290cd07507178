"""inference/answer_file.py and its commands: any number of processes writes the same lines."""

import json
import re
from pathlib import Path

import pytest
import torch

import evaluate
from common.cli import UserError
from dataset.images import fit_image, read_image, to_image, to_tensor
from dataset.sources import question_prompt
from helpers import Forked, kill_when, to_the_end
from inference import answer_file
from inference.answer_file import AnswerFile, Ask
from inference.image_to_text import ReadConfig, encode, write
from inference.parts import Parts

FIXTURES = Path(__file__).parents[1] / "fixtures"
QUESTIONS = ["Is it a flag?", "Is it food?", "What is it?"]
SAMPLED = ReadConfig(steps=5, temperature=1.0, order="random")


@pytest.fixture(scope="module")
def photos(emoji_images, tmp_path_factory):
    """Write a folder of 20 images and a corrupt one."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(20):
        to_image(emoji_images[1][i]).save(folder / f"{i}.png")
    (folder / "20.png").write_bytes((folder / "0.png").read_bytes()[:400])
    return folder


def run_evaluate(*args):
    evaluate.main(list(map(str, args)))


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pope_label(i):
    return ("yes", "no")[i // 2 % 2]


def pope_file(folder, count, kind="popular"):
    """Write a file of POPE with `count` questions about 21 images."""
    file = folder / f"coco_pope_{kind}.json"
    write_rows(file, [dict(question_id=i, image=f"{i % 21}.png", text=QUESTIONS[i % 2],
                           label=pope_label(i)) for i in range(count)])
    return file


def test_a_killed_run_resumed_by_two_processes_gives_the_same_file(tiny, photos, tmp_path):
    count = 384                                                  # six blocks
    flags = ["answer", "pope", pope_file(tmp_path, count), photos]
    settings = ["--checkpoint", tiny, "--suffix", "", "--temperature", "1", "--order", "random",
                "--steps", "16"]
    run_evaluate(*flags, tmp_path / "one.jsonl", *settings)
    out, folder = tmp_path / "two.jsonl", tmp_path / "two.jsonl.blocks"

    def start(processes):
        return Forked(processes, *flags, out, *settings, program="evaluate")

    def blocks():
        return list(folder.glob("0*.jsonl"))
    kill_when(start(1), lambda: len(blocks()) >= 2)
    assert 2 <= len(blocks()) < 6 and not out.exists()
    first, kept = sorted(blocks())[:2]
    first.unlink()
    marked = read_rows(kept)
    marked[0]["answer"] = "kept"                         # shows that no process writes it again
    write_rows(kept, marked)
    printed, _ = to_the_end(start(2))
    rows = read_rows(out)
    assert [row["question_id"] for row in rows] == [
        f"popular/{i}" for i in range(count) if i % 21 != 20]
    expected = {row["question_id"]: row["answer"] for row in read_rows(tmp_path / "one.jsonl")}
    expected[marked[0]["question_id"]] = "kept"
    assert {row["question_id"]: row["answer"] for row in rows} == expected
    assert f"{out}: 366 of 384\nleft out: 18\n" in printed and "20.png" in printed
    assert not folder.exists()


def test_an_answer_does_not_depend_on_other_questions(tiny_parts, photos, tmp_path):
    asks = [Ask(str(i), f"{i % 20}.png", QUESTIONS[i % 3]) for i in range(70)] + [Ask(7, "3.png")]
    for name, asked in (("all", asks), ("some", asks[::-1][:9])):
        file = AnswerFile(tmp_path / name, asked, photos, {}, SAMPLED)
        assert file.write(tiny_parts) == []
    rows = read_rows(tmp_path / "all")
    assert all(row in rows for row in read_rows(tmp_path / "some"))
    assert rows[-1].keys() == {"image_id", "caption"}            # an Ask without a question


def test_each_question_id_has_its_own_seed(tiny_parts, photos, tmp_path):
    """With sampling, the same question on the same image gets another answer under another id."""
    asks = [Ask(str(i), "0.png", QUESTIONS[0]) for i in range(8)]
    for seed in (0, 1):
        file = AnswerFile(tmp_path / str(seed), asks, photos, {}, SAMPLED, seed=seed)
        file.write(tiny_parts)
    answers = {row["answer"] for seed in "01" for row in read_rows(tmp_path / seed)}
    assert len(answers) == 16


def test_answers_of_other_settings_are_refused(tiny_parts, photos, tmp_path):
    out, asks = tmp_path / "a.jsonl", [Ask("a", "0.png", QUESTIONS[0])]
    fill = lambda settings: AnswerFile(out, asks, photos, dict(settings=settings),
                                       ReadConfig(steps=1)).write(tiny_parts)
    fill("first")
    with pytest.raises(UserError, match=r"a\.jsonl: .*\(settings\)"):
        fill("second")
    content = out.read_bytes()
    out.write_bytes(content + b"marked")
    assert fill("first") == [] and out.read_bytes() == content + b"marked"      # not written again
    (tmp_path / "a.jsonl.json").unlink()
    with pytest.raises(UserError, match=r"no a\.jsonl\.json"):
        fill("first")


def test_questions_that_cannot_be_answered_are_left_out(tiny_parts, photos, tmp_path):
    asks = [Ask("a", "0.png", QUESTIONS[0]), Ask("b", "0.png", "flag " * 40),
            Ask("c", "none.png", "Is?")]
    file = AnswerFile(tmp_path / "a.jsonl", asks, photos, {}, ReadConfig(steps=2))
    long, missing = file.write(tiny_parts)
    assert [row["question_id"] for row in read_rows(tmp_path / "a.jsonl")] == ["a"]
    assert long.startswith("b: ") and "tokens" in long
    assert missing.startswith("c: ") and "none.png" in missing


def test_left_out_questions_are_remembered(tiny_parts, photos, tmp_path):
    asks = [Ask("a", "0.png", QUESTIONS[0]), Ask("c", "none.png", "Is?")]
    file = AnswerFile(tmp_path / "a.jsonl", asks, photos, {}, ReadConfig(steps=1))
    [first] = file.write(tiny_parts)
    assert "none.png" in first and file.write(tiny_parts) == [first]


def test_a_question_without_room_for_a_choice_is_left_out(tiny_parts, photos, tmp_path):
    """The question leaves room for one token; a choice with its end token needs more."""
    tokenizer = tiny_parts.tokenizer
    question = "Is it food?"
    while len(tokenizer.pieces(question_prompt(question))) < tiny_parts.length - 1:
        question = "Is " + question
    asks = [Ask("a", "0.png", question), Ask("b", "0.png", QUESTIONS[0])]
    file = AnswerFile(tmp_path / "a.jsonl", asks, photos, {}, choices=["yes", "no"])
    [left_out] = file.write(tiny_parts)
    assert left_out.startswith("a: ") and len(read_rows(tmp_path / "a.jsonl")) == 1


def test_blocks_of_unknown_settings_are_not_used(tiny_parts, photos, tmp_path):
    out, asks = tmp_path / "a.jsonl", [Ask("a", "0.png", QUESTIONS[0])]
    AnswerFile(out, asks, photos, {}, choices=["no"]).write(tiny_parts)
    out.unlink()
    (tmp_path / "a.jsonl.json").unlink()
    stale = tmp_path / "a.jsonl.blocks" / "000000.jsonl"
    stale.parent.mkdir()
    write_rows(stale, [dict(question_id="a", answer="stale")])
    AnswerFile(out, asks, photos, {}, choices=["yes"]).write(tiny_parts)
    assert [row["answer"] for row in read_rows(out)] == ["yes"]


def test_a_line_separator_in_an_answer_does_not_split_its_line(tiny_parts, photos, tmp_path,
                                                               monkeypatch):
    monkeypatch.setattr(answer_file, "write", lambda *args, **how: ["a\u2028b"])
    asks, out = [Ask("a", "0.png", "Is?")], tmp_path / "a.jsonl"
    assert AnswerFile(out, asks, photos, {}).write(tiny_parts) == []
    assert out.read_bytes().decode() == '{"question_id": "a", "answer": "a\u2028b"}\n'


def test_pope_is_answered_and_scored_with_the_shipped_weights(photos, tmp_path, capsys):
    files = [pope_file(tmp_path, 6, kind) for kind in ("random", "adversarial")]
    out, result = tmp_path / "answers.jsonl", tmp_path / "scores.json"
    run_evaluate("answer", "pope", *files, photos, out, "--suffix", "")
    rows = read_rows(out)
    assert {row["answer"] for row in rows} <= {"yes", "no"}
    run_evaluate("score", "pope", out, "--json", result)
    printed, scores = capsys.readouterr().out, json.loads(result.read_text())["scores"]
    assert "| accuracy | precision | recall | F1 | yes-ratio |" in printed
    assert set(scores) == {"random", "adversarial", "mean", "every type"}
    correct = [row["answer"] == pope_label(int(row["question_id"].removeprefix("random/")))
               for row in rows if row["question_id"].startswith("random")]
    assert scores["random"]["accuracy"] == pytest.approx(100 * sum(correct) / 6)
    assert f"checkpoint: {Parts().digest()}" in printed and "seed: 0" in printed


def test_the_likeliest_choice_is_the_answer(tiny, photos, tmp_path):
    """Random weights prefer the text of fewer tokens, here the last choice."""
    out, choices = tmp_path / "answers.jsonl", ["a person or a body part", "no"]
    run_evaluate("answer", "pope", pope_file(tmp_path, 4), photos, out, "--checkpoint", tiny,
                 "--suffix", "", "--choices", *choices, "--limit", 2)
    assert [row["answer"] for row in read_rows(out)] == ["no", "no"]


def vqa_file(folder, count):
    """Write VQAv2's questions on 6 images.  3 + i of 10 answers are yes; the last one has none."""
    questions, annotations = [], []
    for i in range(count):
        questions.append(dict(question_id=i, image_id=i % 6, question=QUESTIONS[i % 3]))
        answers = [dict(answer_id=k, answer="yes" if k < 3 + i else "no") for k in range(10)]
        annotations.append(dict(question_id=i, image_id=i, question_type="is it",
                                answer_type=("yes/no", "other")[i % 2], answers=answers,
                                multiple_choice_answer="yes"))
    file = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    file.write_text(json.dumps(dict(questions=questions, data_subtype="val2014")))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(
        json.dumps(dict(annotations=annotations[:-1])))
    for i in range(6):
        to_image(torch.rand(3, 32, 32)).save(folder / f"COCO_val2014_{i:012}.jpg")
    return file


def test_vqav2_is_answered_with_shots_and_scored(tiny, tmp_path, capsys, monkeypatch):
    file, out, prompts = vqa_file(tmp_path, 6), tmp_path / "a.jsonl", []

    def always_yes(parts, latents, questions, config, seeds):
        prompts.extend(questions)
        return ["yes"] * len(questions)
    monkeypatch.setattr(answer_file, "write", always_yes)
    run_evaluate("answer", "vqav2", file, tmp_path, out, "--checkpoint", tiny, "--suffix", "",
                 "--shots", "1", "--examples", file)
    assert len(prompts) == 5
    for i, prompt in enumerate(prompts):
        assert prompt.count("Q: ") == prompt.count(" A: ") == 1
        assert prompt.endswith(f"Q: {QUESTIONS[i % 3]}")
    assert "left out: 1 (5)" in capsys.readouterr().out          # question 5 has no answers
    run_evaluate("score", "vqav2", out, "--json", tmp_path / "scores.json")
    printed = capsys.readouterr().out
    # 3 to 7 of ten people said yes: 0.9 for the first question, 1 for the others.
    assert "| these answers | 98.0 | 96.7 | 100.0 |" in printed
    assert "question type" not in printed.split("made_by")[0]
    assert "32-shot | 60.3 |" in printed                         # the paper's row
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores["every type"]["question type: is it"] == pytest.approx(98)
    run_evaluate("score", "okvqa", out, "--questions", file)
    assert "98.0" in capsys.readouterr().out


@pytest.fixture
def shots_flags(tmp_path):
    """Return flags that ask three questions with 32 examples before each."""
    file = vqa_file(tmp_path, 60)
    return ["answer", "vqav2", file, tmp_path, tmp_path / "a.jsonl", "--shots", "32", "--examples",
            file, "--suffix", "", "--limit", "3", "--order", "random", "--steps", "2"]


def test_shots_lengthen_the_prompts_of_t5(shots_flags, tmp_path, run_program, capsys):
    """T5 has no position table: any prompt gets room for an answer, unless --length is given."""
    release = ["--checkpoint", FIXTURES / "release", "--vae", FIXTURES / "sd3.safetensors",
               "--height", "16", "--width", "16"]
    status, error = run_program(evaluate.main, [*shots_flags, *release, "--length", "100"])
    advice = re.search(r"--shots 32.* --length 100.* --length (\d+)\n", error)
    assert status == 1 and advice and not (tmp_path / "a.jsonl").exists()
    run_evaluate(*shots_flags, *release)
    assert "a.jsonl: 3 of 3" in capsys.readouterr().out
    assert len(read_rows(tmp_path / "a.jsonl")) == 3
    settings = json.loads((tmp_path / "a.jsonl.json").read_text())
    assert settings["length"] == int(advice[1])


def test_shots_beyond_the_position_table_are_refused(shots_flags, tiny, run_program):
    status, error = run_program(evaluate.main, [*shots_flags, "--checkpoint", tiny])
    assert status == 1 and "--shots 32" in error and "28 positions" in error


def test_captions_are_written_and_scored(tiny_parts, tiny, photos, tmp_path, capsys):
    file, out, result = tmp_path / "captions.json", tmp_path / "c.jsonl", tmp_path / "scores.json"
    file.write_text(json.dumps(dict(
        images=[dict(id=i, file_name=f"{i}.png") for i in range(21)],
        annotations=[dict(image_id=i, id=i, caption=f"a red cat {i}") for i in range(20)])))
    run_evaluate("answer", "captions", file, photos, out, "--checkpoint", tiny, "--order", "confidence",
                 "--steps", 3, "--dtype", "float32")
    printed = capsys.readouterr().out
    assert "20 of 21" in printed and "20.png" in printed
    image = to_tensor(fit_image(read_image(photos / "4.png"), 16, 16))
    config = ReadConfig(steps=3, order="confidence")
    caption, = write(tiny_parts, encode(tiny_parts, image[None]), [None], config)
    assert read_rows(out)[4] == dict(image_id=4, caption=caption)
    write_rows(out, [dict(image_id=i, caption=f"a red cat {i}") for i in range(19)])
    run_evaluate("score", "captions", out, "--json", result)
    report = json.loads(result.read_text())
    assert report["scores"]["these captions"]["BLEU-4"] == pytest.approx(1)
    assert any(re.search(r"\b19: .*caption", line) for line in report["left_out"])


@pytest.mark.parametrize("flags, missing", [(["--shots", "2"], "--examples"),
                                            (["--choices", "a", "b", "--level", "0.5"], "--level")])
def test_a_flag_without_its_partner_is_refused(flags, missing, run_program):
    status, error = run_program(evaluate.main,
                            ["answer", "pope", "a.json", "photos", "out.jsonl", *flags])
    assert status == 2 and flags[0] in error and missing in error


@pytest.mark.parametrize("command", [["answer", "captions", "a.json", "b.json", "photos", "o.jsonl"],
                                     ["score", "captions", "o.jsonl", "--questions", "a.json", "b.json"]])
def test_captions_have_one_file(command, run_program):
    status, error = run_program(evaluate.main, command)
    assert status == 2 and "captions" in error and "2" in error


def test_steps_of_an_order_without_steps_are_refused(shots_flags, tiny, run_program):
    flags = ["eb" if flag == "random" else flag for flag in shots_flags]
    status, error = run_program(evaluate.main, [*flags, "--checkpoint", tiny])
    assert status == 1 and "steps 2" in error and "order eb" in error
