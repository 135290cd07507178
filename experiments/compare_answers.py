"""Compare metrics/answers.py with the benchmarks' published code, on random answers full of special
cases.

    git clone https://github.com/GT-Vision-Lab/VQA                               # needs Python 2
    git clone https://github.com/facebookresearch/mmf                            # TextVQA's
    git clone https://github.com/google-research/pix2struct                      # ChartQA's
    git clone https://github.com/AoiDragon/POPE
    python -m experiments.compare_answers . --python2 python2.7

The folder may hold any of the four.  VQA: 2,000 questions of ten annotators; the means over all,
over both kinds of types, and each question's score are compared, rounded and not.  TextVQA: each of
2,000 questions.  ChartQA: 20,000 pairs.  POPE: its own 3 x 3,000 questions, five figures each.  It
takes some 20 seconds and is not part of the test run.
"""

import argparse
import ast
import contextlib
import io
import json
import random
import subprocess
import tempfile
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Optional

from metrics import answers

OFFICIAL = """
import json, sys
code, folder = sys.argv[1:]
sys.path += [code + "/PythonHelperTools/vqaTools", code + "/PythonEvaluationTools/vqaEvaluation"]
from vqa import VQA
from vqaEval import VQAEval
found = []
for n in (2, 12):                                           # decimals
    truth = VQA(folder + "/annotations.json", folder + "/questions.json")
    scorer = VQAEval(truth, truth.loadRes(folder + "/said.json", folder + "/questions.json"), n=n)
    scorer.evaluate()
    found.append([scorer.accuracy, scorer.evalQA])
json.dump(found + [scorer.contractions], open(folder + "/found.json", "w"))
"""
TYPES = ("yes/no", "number", "other"), ("what is the", "how many", "none of the above", "is")
MARKS = ';/[]"{}()=+\\_-><@`,?!.:\'&%$#'
WORDS = ["yes", "no", "red", "dog", "3", "3.5", "1,000", "10,000.5", "2015", ".5", "u.s.a.", "mr.", "x",
         "it's", "éclair", "a", "an", "the", *answers.NUMBERS, *answers.CONTRACTED, *answers.CONTRACTIONS,
         "Im", "Ive", "Id've", "let's", "lets", "she's", "shes", "couldntve", "." * 40]
ARABIC = ["\u0663,\u0664", "\u0663.\u0664"]         # 3,4 and 3.4: digits in Python 3, not in 2


def rounded(scores: dict[str, float]) -> dict[str, float]:
    """Round scores as the official code does in Python 2: to two decimals, halves away from zero.
    """
    return {name: float(Decimal(value).quantize(Decimal("0.01"), ROUND_HALF_UP))
            for name, value in scores.items()}


def variant(words: list[str], draw: random.Random) -> str:
    """Return the words as another person may type them, often with the same normal form."""
    names, said = {value: key for key, value in answers.NUMBERS.items()}, []
    for word in words:
        said += [draw.choice(("a", "The", "an"))] * (draw.random() < 0.2)
        word = draw.choice((word, word, names.get(word, word), answers.NUMBERS.get(word, word)))
        word = word.replace("'", "", 1) if draw.random() < 0.2 else word
        word = draw.choice((word, word, word.upper(), word.capitalize()))
        if draw.random() < 0.25:
            at, mark = draw.randrange(len(word) + 1), draw.choice(MARKS)
            word = word[:at] + draw.choice((mark, mark + " ", " " + mark)) + word[at:]
        said.append(word)
    joined = "".join(w + draw.choice((" ", " ", " ", "  ", "\t", "\n", "-", ", ", ",", "/")) for w in said)
    return draw.choice((joined, joined[:-1], " " + joined[:-1] + ".", joined[:-1]))


def pairs(count: int, seed: int, words: list[str]) -> list[tuple[str, list[str]]]:
    """Return pairs (answer, ten annotators' answers).  In 15 % all annotators agree; in the others,
    0 to 10 of them give a variant of the answer."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        one, other = ([draw.choice(words) for _ in range(draw.choice((1, 1, 1, 2, 2, 3)))] for _ in "12")
        same, times, alike = variant(one, draw), draw.randrange(11), draw.random() < 0.5
        ten = [same if alike else variant(one, draw) for _ in range(times)]
        ten += [variant(other, draw) for _ in range(10 - times)]
        ten = [same] * 10 if draw.random() < 0.15 else draw.sample(ten, 10)
        found.append((draw.choice((same, variant(one, draw), variant(one, draw), draw.choice(ten))), ten))
    return found


def compare_vqa(code: Path, python2: str, count: int) -> None:
    draw, made = random.Random(0), pairs(count, 0, WORDS + 10 * ARABIC)
    notes = [dict(question_id=i, image_id=i, answer_type=draw.choice(TYPES[0]),
                  question_type=draw.choice(TYPES[1]), answers=[
                      dict(answer_id=j, answer=said) for j, said in enumerate(ten, 1)])
             for i, (_, ten) in enumerate(made)]
    head = dict(info={}, license={}, task_type="Open-Ended", data_type="mscoco", data_subtype="val2014")
    asked = [dict(question_id=i, image_id=i, question="What?") for i in range(count)]
    results = [dict(question_id=i, answer=said) for i, (said, _) in enumerate(made)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, content in (("questions", head | dict(questions=asked)), ("said", results),
                              ("annotations", head | dict(annotations=notes))):
            (folder / f"{name}.json").write_text(json.dumps(content))
        (folder / "said.jsonl").write_text("".join(json.dumps(line) + "\n" for line in results))
        subprocess.run([python2, "-c", OFFICIAL, code, place], check=True, stdout=subprocess.DEVNULL)
        *theirs, table = json.loads((folder / "found.json").read_text())
        asked, bad = answers.questions("vqav2", [folder / "questions.json", folder / "annotations.json"])
        said, damaged = answers.read_answers(folder / "said.jsonl")
    found, amiss = answers.score("vqav2", asked, said)
    assert not bad + damaged + amiss
    means, finer = ({"overall": of["overall"]} | of["perAnswerType"] | {
        f"question type: {kind}": value for kind, value in of["perQuestionType"].items()} for of, _ in theirs)
    ours, each = {q.id: 100 * answers.vqa(said[q.id], q.answers) for q in asked}, theirs[0][1]
    equal = [rounded(ours)[key] == each[key] for key in each]
    away = max(abs(a[key] - b[key]) for a, b in ((ours, theirs[1][1]), (found, finer)) for key in b)
    spread = {n: sum(round(value) == n for value in each.values()) for n in (0, 30, 60, 90, 100)}
    table = {key: value for key, value in table.items() if key == key.lower() and key != value}
    found = rounded(found)
    print(f"VQA: {sum(equal)} of {count} questions and {sum(found[k] == means[k] for k in means)} of "
          f"{len(found)} means equal, unrounded {away:.0e} percent apart at most; {len(table)} contractions, "
          f"equal: {table == answers.CONTRACTIONS}; overall {found['overall']}, by accuracy {spread}")
    assert all(equal) and found == means and table == answers.CONTRACTIONS and away < 1e-9


def compare_textvqa(path: Path, count: int) -> None:
    names, made = {}, pairs(count, 1, WORDS)
    exec(compile(path.read_text(), str(path), "exec"), names)
    theirs = names["TextVQAAccuracyEvaluator"]()
    equal = [theirs.eval_pred_list([dict(pred_answer=said, gt_answers=ten)]) == answers.textvqa(said, ten)
             for said, ten in made]
    other = sum(answers.vqa(*pair) != answers.textvqa(*pair) for pair in made)
    print(f"TextVQA: {sum(equal)} of {len(made)} questions equal; {other} are scored otherwise by VQA's rule")
    assert all(equal)


def compare_relaxed(path: Path, count: int) -> None:
    tree = ast.parse(path.read_text())             # take one function: the file imports much more
    tree.body = [part for part in tree.body if getattr(part, "name", "") == "relaxed_correctness"]
    names = dict(Optional=Optional)
    exec(compile(tree, str(path), "exec"), names)
    draw, equal, right = random.Random(3), [], 0
    for _ in range(count):
        value = draw.choice((draw.randint(1, 3000), round(draw.uniform(-20, 20), 2) or 1, 0.5))
        near = value * draw.choice((1, 0.95, 1.05, draw.uniform(0.9, 1.1), 0.01, 100))
        true, said = (draw.choice((f"{x}", f"{x:g}", f"{x}%", f"{x:.1f}", "Yes", "yes"))
                      for x in (value, near))
        if answers.number(true) != 0:                      # pix2struct compares 0 as a text
            equal.append(names["relaxed_correctness"](true, said) == answers.relaxed(said, [true]))
            right += answers.relaxed(said, [true])
    print(f"ChartQA: {sum(equal)} of {len(equal)} pairs equal, {right:.0f} right")
    assert all(equal)


def compare_pope(code: Path) -> None:
    draw, source, away = random.Random(2), (code / "evaluate.py").read_text(), 0.0
    paths = {name: code / f"output/coco/coco_pope_{name}.json"
             for name in ("random", "popular", "adversarial")}
    asked, bad = answers.questions("pope", list(paths.values()))
    words = "yes no No NO not Not Yes, no, no. Yes. there is a cat . , not. nothing n't no\n no!".split(" ")
    said = {q.id: " ".join(draw.choices(words, k=draw.choice((0, 1, 1, 1, 2, 3, 6)))) for q in asked}
    found, amiss = answers.score("pope", asked, said)
    assert not bad + amiss
    for subset, path in paths.items():
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file, io.StringIO() as out:
            file.writelines(json.dumps(dict(answer=said[q.id])) + "\n"
                            for q in asked if q.types == (subset,))
            file.flush()
            with contextlib.redirect_stdout(out):
                exec(source.replace("ans_file = ''", f"ans_file = {file.name!r}").replace(
                    "label_file = ''", f"label_file = {str(path)!r}"), {})
            theirs = [100 * float(line.split(": ")[1]) for line in out.getvalue().splitlines()[2:]]
        ours = [found[f"{subset}: {name}"] for name in ("accuracy", "precision", "recall", "F1", "yes-ratio")]
        away = max([away, *(abs(a - b) for a, b in zip(ours, theirs, strict=True))])
        print(f"POPE, {subset}: {' '.join(f'{value:.2f}' for value in ours)}")
    print(f"POPE: {len(asked)} questions, figures {away:.0e} percent apart at most")
    assert away < 1e-9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python2", default="python2.7")
    parser.add_argument("--count", type=int, default=2000)
    args = parser.parse_args()
    for name, compare in dict(
            VQA=lambda path: compare_vqa(path, args.python2, args.count),
            mmf=lambda path: compare_textvqa(path / "mmf/utils/m4c_evaluators.py", args.count),
            pix2struct=lambda path: compare_relaxed(path / "pix2struct/metrics.py", 10 * args.count),
            POPE=compare_pope).items():
        if (args.folder / name).exists():
            compare(args.folder / name)


if __name__ == "__main__":
    main()
