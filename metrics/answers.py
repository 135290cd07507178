"""Scores of answers to questions about pictures, from a benchmark's own files; no model is
imported.

    asked, bad = questions("vqav2", ["v2_OpenEnded_mscoco_val2014_questions.json"])
    ...                                   # a line {"question_id": q.id, "answer": "..."} for each q
    answers, damaged = read_answers("answers.jsonl")
    scores, amiss = score("vqav2", asked, answers)     # {"overall": ..., "yes/no": ...}, in percent

    kind      files, as published                         an answer's score                  own means
    vqav2     the questions; the annotations, if they     vqa                                types of answer
              are not beside them                                                            and question
    okvqa     the same                                    vqa, against "answer" (stemmed)    the same
    textvqa   TextVQA_0.5.1_val.json                      textvqa
    vizwiz    val.json; an id is the picture's name       vizwiz                             answer types
    gqa       testdev_balanced_questions.json             exact                              binary, open,
                                                                                             structural types
    chartqa   test_human.json, test_augmented.json;       relaxed                            files
              an id is FILE/NUMBER, from 0
    pope      coco_pope_{random,popular,adversarial}      five figures (`pope`)              files, and the
              .json; an id is random/1                                                       mean over them

Any of the first four may be scored as another: score("vqav2", asked_of_textvqa, ...).  An id is a
text here, whatever it is in the file.  What does not fit is counted and named in `bad`, a line a
kind of trouble.
"""

import math
import random
import re
from collections import defaultdict
from decimal import ROUND_HALF_UP, Decimal
from functools import lru_cache
from pathlib import Path

from common.cli import UserError, require
from common.files import read_json_lines
from dataset.questions import READ, VQA, Issues, Question, question_prompt
from dataset.sources import identity, text

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'                  # not ' : . and, oddly, not & $ % # * either
NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(),
                   map(str, range(11))),
               none="0")
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've
    mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
    wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
# a word is mended that lacks one apostrophe; the last one is the official table's own slip
CONTRACTIONS = {word[:i] + word[i + 1:]: word
                for word in CONTRACTED for i, c in enumerate(word) if c == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"


# ------------------------------------------------------------------------------- one answer's score

def tidy(said: str) -> str:
    return said.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=2**16)
def normal(said: str) -> str:
    """VQA's normal form: its processPunctuation, then its processDigitArticle.

    A mark that stands beside a space anywhere in the text is removed everywhere, as all marks are
    where a comma stands between two digits; any other mark becomes a space.  Periods go unless a
    digit follows, the first 32 of them: the official code passes re.UNICODE where `sub` takes its
    count.  Then lower case, number words as digits, no articles, contractions with their
    apostrophe."""
    compact = re.search("[0-9],[0-9]", said)
    bare = said
    for mark in PUNCTUATION:
        removed = compact or f"{mark} " in said or f" {mark}" in said
        bare = bare.replace(mark, "" if removed else " ")
    words = [NUMBERS.get(word, word)
             for word in re.sub(r"\.(?![0-9])", "", bare, count=32).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words
                    if word not in ("a", "an", "the"))


def agreement(said: str, answers: list[str]) -> float:
    """The mean over the annotators of min(1, n / 3), n of the others having said it: of ten
    annotators 0, 1, 2, 3, 4 that said it make 0, 0.3, 0.6, 0.9, 1."""
    same = [answer == said for answer in answers]
    return sum(min(1, (sum(same) - own) / 3) for own in same) / len(same)


def vqa(said: str, answers: list[str]) -> float:
    """VQA accuracy in [0, 1] (arXiv 1505.00468), as GT-Vision-Lab/VQA's vqaEval.py has it: where
    all annotators said the very same, nothing is normalised, and "Yes" is not their "yes"."""
    said, *answers = map(tidy, (said, *answers))
    if len(set(answers)) > 1:
        said, *answers = map(normal, (said, *answers))
    return agreement(said, answers)


def textvqa(said: str, answers: list[str]) -> float:
    """TextVQA accuracy in [0, 1], as facebookresearch/mmf's m4c_evaluators.py has it after EvalAI:
    all is normalised always, after commas and question marks are dropped and 's is made a word."""
    forms = []
    for each in (said, *answers):
        each = each.lower().replace(",", "").replace("?", "").replace("'s", " 's")
        forms.append(normal(tidy(each)))
    return agreement(forms[0], forms[1:])


def vizwiz(said: str, answers: list[str]) -> float:
    """VizWiz accuracy in [0, 1], as its vqaEval.py has it: the answer is normalised always, the
    annotators' never.  (Its table of contractions has curly apostrophes in many copies; here they
    are straight.)"""
    return agreement(normal(tidy(said)), answers)


def exact(said: str, answers: list[str]) -> float:
    """GQA's accuracy, 0 or 1: the same word, whatever its case; a period at the end is dropped, as
    LLaVA does before GQA's own eval.py compares."""
    return float(said.strip().rstrip(".").lower() == answers[0].strip().lower())


def number(said: str) -> float | None:
    try:
        value = float(said.replace(",", "").removesuffix("%")) / (100 if said.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def relaxed(said: str, answers: list[str]) -> float:
    """ChartQA's relaxed accuracy (arXiv 2203.10244), 0 or 1: a number within 5 % of the true one,
    any other text the same but for case.  As in google-research/pix2struct's metrics.py "10%" is
    0.1, so not "10"; commas in numbers are dropped, which they are not there."""
    said, true = said.strip(), answers[0].strip()
    value, wanted = number(said), number(true)
    if value is None or wanted is None:
        return float(said.lower() == true.lower())
    return float(abs(value - wanted) / abs(wanted) <= 0.05 if wanted else value == 0)


def yes_or_no(said: str) -> str:
    """Return what POPE's evaluate.py takes an answer for: "no" if "No", "no" or "not" is a word of
    its first sentence, else "yes", also where it is neither ("Not", "no!", "nope" and nothing at
    all are a yes)."""
    words = said.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope(taken: list[str], true: list[str]) -> dict[str, float]:
    """Return POPE's five figures (arXiv 2305.10355) in percent, "yes" being the positive class; 0
    where a ratio has a zero denominator.  What is neither "yes" nor "no" counts as a wrong no."""
    pairs = list(zip(taken, true))
    hits = pairs.count(("yes", "yes"))
    right = hits + pairs.count(("no", "no"))
    claimed = taken.count("yes")
    positive = true.count("yes")
    return {"accuracy": 100 * right / len(pairs), "precision": 100 * hits / max(claimed, 1),
            "recall": 100 * hits / max(positive, 1), "F1": 200 * hits / max(claimed + positive, 1),
            "yes-ratio": 100 * claimed / len(pairs)}


# ---------------------------------------------------------------------------------------- questions

def describe(issues: Issues, where: str = "") -> list[str]:
    """Return a line for each kind of trouble, with how many ids it has and the first five."""
    lines = []
    for what, ids in issues.items():
        if ids:
            more = ", ..." if len(ids) > 5 else ""
            lines.append(f"{where}{what}: {len(ids):,} ({', '.join(ids[:5])}{more})")
    return lines


def check_texts(q: Question, where: str) -> None:
    """Raise UserError for a field of a question that should be a text and is none."""
    fields = dict(image=[q.image], question=[q.question], answer=q.answers, type=q.types)
    for field, values in fields.items():
        for value in values:
            text(value, where, field)


def questions(kind: str, paths: list[str | Path], suffix: str = ""
              ) -> tuple[list[Question], list[str]]:
    """Return a benchmark's questions in the order of its files, and a line for each kind of
    trouble.

    suffix: follows every question; SUFFIX[kind] is the one of training.  Raises UserError for files
    that are not of the kind, and where no question has a true answer."""
    benchmark = READ[kind]
    # VQA's second file has the annotations
    parts = [paths] if benchmark is VQA else [[path] for path in paths]
    chosen, issues = {}, defaultdict(list)
    for part in parts:
        where = " and ".join(map(str, part))
        path, *annotations = map(Path, part)
        try:
            for q in benchmark.read(benchmark.load(path), path, issues, *annotations):
                q.id = str(identity(dict(question_id=q.id), where, "question_id"))
                if not q.balanced:
                    issues["questions outside the balanced set, which are not scored"].append(q.id)
                elif q.id in chosen:
                    issues["questions of one id, the first counts"].append(q.id)
                elif not q.answers:
                    issues["questions without a true answer, left out"].append(q.id)
                else:
                    check_texts(q, f"{where}: {q.id}")
                    q.question = q.with_suffix(suffix)
                    chosen[q.id] = q
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{where}: not of {kind} ({error!r}), expected {benchmark.form}")
    every = " and ".join(map(str, paths))
    require((bool(chosen), f"{every}: no question with a true answer, expected {benchmark.form}"))
    return list(chosen.values()), describe(issues, f"{every}: ")


def shots(examples: list[Question], k: int, key: str, before: Question | None = None) -> str:
    """Return k examples with their most common answer, "Q: ... A: ... Q: ... A: ... ", to stand
    before the prompt of another question.  The key, a seed and that question's id, decides
    which."""
    require((k <= len(examples),
             f"{k} examples, expected 0 to {len(examples)}, of as many questions"))
    drawn = random.Random(key).sample(examples, min(k + 1, len(examples)))
    others = [q for q in drawn if q != before][:k]
    return "".join(f"{question_prompt(q.question)}{q.common_answer()} " for q in others)


# ------------------------------------------------------------------------------------------- scores

ACCURACY = dict(vqav2=vqa, okvqa=vqa, textvqa=textvqa, vizwiz=vizwiz, gqa=exact, chartqa=relaxed)


def read_answers(path: str | Path) -> tuple[dict[str, str], list[str]]:
    """Read lines {"question_id": ..., "answer": ...}.

    Return the answers by id, and a line if a question has two of them, where the first counts.
    Raises UserError for any line that is not of this form."""
    answers, issues = {}, defaultdict(list)
    for where, record in read_json_lines(Path(path)):
        key = str(identity(record, where, "question_id"))
        answer = text(record.get("answer"), where, "answer")
        if key in answers:
            issues["answers to one question, the first counts"].append(key)
        answers.setdefault(key, answer)
    return answers, describe(issues, f"{path}: ")


def score(kind: str, asked: list[Question], answers: dict[str, str]
          ) -> tuple[dict[str, float], list[str]]:
    """Return scores in percent, not rounded, and a line for each kind of trouble.

    The scores are {"overall": ...} and a mean of each type; those of POPE are {"random: accuracy":
    ..., ..., "mean: yes-ratio": ...}, the mean being over the files that were given.  A question
    without an answer is wrong, and in POPE not a yes; the official code refuses such a file, and
    one with an answer to no question of it."""
    ids = {q.id for q in asked}
    bad = describe({
        "questions without an answer, scored as wrong": [q.id for q in asked
                                                         if q.id not in answers],
        "answers to no question, left out": [name for name in answers if name not in ids]})
    if kind == "pope":
        return pope_scores(asked, answers), bad
    values = defaultdict(list)
    for q in asked:
        right = ACCURACY[kind](answers[q.id], q.answers) if q.id in answers else 0.0
        for name in ("overall", *q.types):
            values[name].append(right)
    return {name: 100 * sum(each) / len(each) for name, each in values.items()}, bad


def pope_scores(asked: list[Question], answers: dict[str, str]) -> dict[str, float]:
    """Return POPE's five figures of each subset, "random: accuracy" and so on, and their means."""
    pairs = defaultdict(list)
    for q in asked:
        taken = yes_or_no(answers[q.id]) if q.id in answers else ""
        pairs[q.types[0]].append((taken, q.answers[0]))
    scores = {}
    figures = defaultdict(list)
    for subset, both in pairs.items():
        for name, value in pope(*zip(*both)).items():
            scores[f"{subset}: {name}"] = value
            figures[name].append(value)
    for name, values in figures.items():
        scores[f"mean: {name}"] = sum(values) / len(values)
    return scores


def rounded(scores: dict[str, float]) -> dict[str, float]:
    """Round scores as the official code does: to two decimals, halves up, as Python 2 rounds."""
    return {name: float(Decimal(value).quantize(Decimal("0.01"), ROUND_HALF_UP))
            for name, value in scores.items()}
