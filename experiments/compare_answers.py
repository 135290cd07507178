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

import ast
import contextlib
import io
import json
import random
import subprocess
import tempfile
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Optional

from common import cli
from common.cli import require
from metrics import answers

# run by Python 2: scores.json gets the accuracies with 2 and with 12 decimals, and the contractions
PUBLISHED_VQA = """
import json, sys
code, folder = sys.argv[1:]
sys.path += [code + "/PythonHelperTools/vqaTools", code + "/PythonEvaluationTools/vqaEvaluation"]
from vqa import VQA
from vqaEval import VQAEval
scores = []
for decimals in (2, 12):
    truth = VQA(folder + "/annotations.json", folder + "/questions.json")
    results = truth.loadRes(folder + "/results.json", folder + "/questions.json")
    scorer = VQAEval(truth, results, n=decimals)
    scorer.evaluate()
    scores.append([scorer.accuracy, scorer.evalQA])
json.dump(scores + [scorer.contractions], open(folder + "/scores.json", "w"))
"""
ANSWER_TYPES = ("yes/no", "number", "other")
QUESTION_TYPES = ("what is the", "how many", "none of the above", "is")
MARKS = ';/[]"{}()=+\\_-><@`,?!.:\'&%$#'
WORDS = ["yes", "no", "red", "dog", "3", "3.5", "1,000", "10,000.5", "2015", ".5", "u.s.a.", "mr.",
         "x", "it's", "éclair", "a", "an", "the", *answers.NUMBERS, *answers.CONTRACTED,
         *answers.CONTRACTIONS, "Im", "Ive", "Id've", "let's", "lets", "she's", "shes", "couldntve",
         "." * 40]
ARABIC = ["\u0663,\u0664", "\u0663.\u0664"]     # 3,4 and 3.4: digits in Python 3, not in 2
SEPARATORS = (" ", " ", " ", "  ", "\t", "\n", "-", ", ", ",", "/")


# ------------------------------------------------------------------------------- made-up answers

def retype_word(word: str, draw: random.Random) -> str:
    """Write a number as a word or the other way, drop an apostrophe, change capitals, add a mark;
    each sometimes."""
    names = {value: name for name, value in answers.NUMBERS.items()}
    word = draw.choice((word, word, names.get(word, word), answers.NUMBERS.get(word, word)))
    if draw.random() < 0.2:
        word = word.replace("'", "", 1)
    word = draw.choice((word, word, word.upper(), word.capitalize()))
    if draw.random() < 0.25:
        at = draw.randrange(len(word) + 1)
        mark = draw.choice(MARKS)
        word = word[:at] + draw.choice((mark, mark + " ", " " + mark)) + word[at:]
    return word


def retype(words: list[str], draw: random.Random) -> str:
    """Return the words as another person may type them, often with the same normal form."""
    typed = []
    for word in words:
        article = draw.choice(("a", "The", "an"))
        if draw.random() < 0.2:
            typed.append(article)
        typed.append(retype_word(word, draw))
    text = "".join(word + draw.choice(SEPARATORS) for word in typed)
    return draw.choice((text, text[:-1], f" {text[:-1]}.", text[:-1]))


@dataclass
class Pair:
    """An answer to score, and those of ten annotators."""
    answer: str
    annotators: list[str]


def make_pair(draw: random.Random, words: list[str]) -> Pair:
    """Make a pair.  In 15 % all annotators agree; in the others, 0 to 10 of them give a variant of
    one answer, the rest of another."""
    one, other = [], []
    for chosen in (one, other):
        for _ in range(draw.choice((1, 1, 1, 2, 2, 3))):
            chosen.append(draw.choice(words))
    same = retype(one, draw)
    count = draw.randrange(11)
    are_alike = draw.random() < 0.5
    annotators = [same if are_alike else retype(one, draw) for _ in range(count)]
    annotators += [retype(other, draw) for _ in range(10 - count)]
    if draw.random() < 0.15:
        annotators = [same] * 10
    else:
        annotators = draw.sample(annotators, 10)
    answer = draw.choice((same, retype(one, draw), retype(one, draw), draw.choice(annotators)))
    return Pair(answer, annotators)


def make_pairs(count: int, seed: int, words: list[str]) -> list[Pair]:
    draw = random.Random(seed)
    return [make_pair(draw, words) for _ in range(count)]


# -------------------------------------------------------------------------------------------- VQA

def write_vqa(folder: Path, pairs: list[Pair]) -> None:
    """Write questions, annotations and results as VQA's files, and the results as ours."""
    draw = random.Random(0)
    questions, annotations, results = [], [], []
    for i, pair in enumerate(pairs):
        ids = dict(question_id=i, image_id=i)
        texts = [dict(answer_id=j, answer=text) for j, text in enumerate(pair.annotators, 1)]
        questions.append(dict(ids, question="What?"))
        annotations.append(dict(ids, answer_type=draw.choice(ANSWER_TYPES),
                                question_type=draw.choice(QUESTION_TYPES), answers=texts))
        results.append(dict(question_id=i, answer=pair.answer))
    head = dict(info={}, license={}, task_type="Open-Ended", data_type="mscoco",
                data_subtype="val2014")
    (folder / "questions.json").write_text(json.dumps(head | dict(questions=questions)))
    (folder / "annotations.json").write_text(json.dumps(head | dict(annotations=annotations)))
    (folder / "results.json").write_text(json.dumps(results))
    lines = [json.dumps(result) + "\n" for result in results]
    (folder / "results.jsonl").write_text("".join(lines))


def round_like_python2(scores: dict[str, float]) -> dict[str, float]:
    """Round scores to two decimals, halves away from zero."""
    hundredth = Decimal("0.01")
    return {name: float(Decimal(value).quantize(hundredth, ROUND_HALF_UP))
            for name, value in scores.items()}


def means_by_name(accuracy: dict) -> dict[str, float]:
    """Return the published means under our names."""
    means = dict(overall=accuracy["overall"], **accuracy["perAnswerType"])
    for kind, value in accuracy["perQuestionType"].items():
        means[f"question type: {kind}"] = value
    return means


def largest_difference(ours: dict[str, float], published: dict[str, float]) -> float:
    return max(abs(ours[name] - published[name]) for name in published)


def compare_vqa(code: Path, count: int, python2: str) -> None:
    pairs = make_pairs(count, 0, WORDS + 10 * ARABIC)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_vqa(folder, pairs)
        subprocess.run([python2, "-c", PUBLISHED_VQA, code, folder], check=True,
                       stdout=subprocess.DEVNULL)
        coarse, fine, contractions = json.loads((folder / "scores.json").read_text())
        files = [folder / "questions.json", folder / "annotations.json"]
        scored, left_out = answers.questions("vqav2", files)
        by_id, repeated = answers.read_answers(folder / "results.jsonl")
    our_means, problems = answers.score("vqav2", scored, by_id)
    assert not left_out + repeated + problems
    our_scores = {q.id: 100 * answers.vqa(by_id[q.id], q.answers) for q in scored}

    (accuracy, scores), (fine_accuracy, fine_scores) = coarse, fine
    our_rounded = round_like_python2(our_scores)
    equal_scores = sum(our_rounded[key] == scores[key] for key in scores)
    means = means_by_name(accuracy)
    our_rounded_means = round_like_python2(our_means)
    equal_means = sum(our_rounded_means[name] == means[name] for name in means)
    difference = max(largest_difference(our_scores, fine_scores),
                     largest_difference(our_means, means_by_name(fine_accuracy)))
    # entries with capitals or without a change have no effect on lower-case texts
    contractions = {short: long for short, long in contractions.items()
                    if short == short.lower() and short != long}
    accuracies = [round(value) for value in scores.values()]
    spread = {value: accuracies.count(value) for value in (0, 30, 60, 90, 100)}
    print(f"VQA: {equal_scores} of {count} questions and {equal_means} of {len(our_means)} means "
          f"equal, unrounded {difference:.0e} percent apart at most; {len(contractions)} "
          f"contractions, equal: {contractions == answers.CONTRACTIONS}; overall "
          f"{our_rounded_means['overall']}, by accuracy {spread}")
    assert equal_scores == count and our_rounded_means == means
    assert contractions == answers.CONTRACTIONS and difference < 1e-9


# -------------------------------------------------------------------------- TextVQA and ChartQA

def compare_textvqa(code: Path, count: int) -> None:
    file = code / "mmf/utils/m4c_evaluators.py"
    module = {}
    exec(compile(file.read_text(), str(file), "exec"), module)
    evaluator = module["TextVQAAccuracyEvaluator"]()
    pairs = make_pairs(count, 1, WORDS)
    equal = unlike_vqa = 0
    for pair in pairs:
        ours = answers.textvqa(pair.answer, pair.annotators)
        entry = dict(pred_answer=pair.answer, gt_answers=pair.annotators)
        equal += evaluator.eval_pred_list([entry]) == ours
        unlike_vqa += answers.vqa(pair.answer, pair.annotators) != ours
    print(f"TextVQA: {equal} of {count} questions equal; {unlike_vqa} are scored otherwise by VQA's "
          f"rule")
    assert equal == count


def as_text(value: float, draw: random.Random) -> str:
    """Write a number in one of several ways, or write yes."""
    return draw.choice((f"{value}", f"{value:g}", f"{value}%", f"{value:.1f}", "Yes", "yes"))


def compare_chartqa(code: Path, count: int) -> None:
    file = code / "pix2struct/metrics.py"
    tree = ast.parse(file.read_text())             # take one function: the file imports much more
    tree.body = [part for part in tree.body if getattr(part, "name", "") == "relaxed_correctness"]
    module = dict(Optional=Optional)
    exec(compile(tree, str(file), "exec"), module)
    draw = random.Random(3)
    compared = equal = right = 0
    for _ in range(10 * count):
        value = draw.choice((draw.randint(1, 3000), round(draw.uniform(-20, 20), 2) or 1, 0.5))
        near = value * draw.choice((1, 0.95, 1.05, draw.uniform(0.9, 1.1), 0.01, 100))
        true = as_text(value, draw)
        answer = as_text(near, draw)
        if answers.number(true) == 0:              # pix2struct compares 0 as a text
            continue
        ours = answers.relaxed(answer, [true])
        compared += 1
        equal += module["relaxed_correctness"](true, answer) == ours
        right += ours
    print(f"ChartQA: {equal} of {compared} pairs equal, {right:.0f} right")
    assert equal == compared


# ------------------------------------------------------------------------------------------- POPE

def published_pope(source: str, labels: Path, texts: list[str]) -> list[float]:
    """Run POPE's evaluate.py on answers, and return its five figures in percent."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file, io.StringIO() as printed:
        file.writelines(json.dumps(dict(answer=text)) + "\n" for text in texts)
        file.flush()
        program = source.replace("ans_file = ''", f"ans_file = {file.name!r}")
        program = program.replace("label_file = ''", f"label_file = {str(labels)!r}")
        with contextlib.redirect_stdout(printed):
            exec(program, {})
        lines = printed.getvalue().splitlines()[2:]
    return [100 * float(line.split(": ")[1]) for line in lines]


def compare_pope(code: Path, count: int) -> None:
    draw = random.Random(2)
    source = (code / "evaluate.py").read_text()
    labels = {subset: code / f"output/coco/coco_pope_{subset}.json"
              for subset in ("random", "popular", "adversarial")}
    scored, left_out = answers.questions("pope", list(labels.values()))
    words = "yes no No NO not Not Yes, no, no. Yes. there is a cat . , not. nothing n't no\n no!"
    words = words.split(" ")
    by_id = {}
    for q in scored:
        by_id[q.id] = " ".join(draw.choices(words, k=draw.choice((0, 1, 1, 1, 2, 3, 6))))
    scores, problems = answers.score("pope", scored, by_id)
    assert not left_out + problems
    difference = 0.0
    for subset, path in labels.items():
        texts = [by_id[q.id] for q in scored if q.types == (subset,)]
        published = published_pope(source, path, texts)
        ours = [scores[f"{subset}: {name}"]
                for name in ("accuracy", "precision", "recall", "F1", "yes-ratio")]
        for a, b in zip(ours, published, strict=True):
            difference = max(difference, abs(a - b))
        print(f"POPE, {subset}: {' '.join(f'{value:.2f}' for value in ours)}")
    print(f"POPE: {len(scored)} questions, figures {difference:.0e} percent apart at most")
    assert difference < 1e-9


COMPARISONS = dict(mmf=compare_textvqa, pix2struct=compare_chartqa, POPE=compare_pope)


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python2", default="python2.7")
    parser.add_argument("--count", type=cli.number(int, 1), default=2000)
    args = parser.parse_args()
    cloned = [name for name in ("VQA", *COMPARISONS) if (args.folder / name).exists()]
    require((cloned, f"{args.folder}: has none of VQA, {', '.join(COMPARISONS)}"))
    for name in cloned:
        if name == "VQA":
            compare_vqa(args.folder / name, args.count, args.python2)
        else:
            COMPARISONS[name](args.folder / name, args.count)


if __name__ == "__main__":
    cli.run(main)
