"""Score answers to questions about images, with a benchmark's published files and rules.

    scored, left_out = questions("vqav2", ["v2_OpenEnded_mscoco_val2014_questions.json"])
    ...                                   # a line {"question_id": q.id, "answer": "..."} for each q
    answers, repeated = read_answers("answers.jsonl")
    scores, problems = score("vqav2", scored, answers)    # {"overall": ..., "yes/no": ...}, percent

    kind      files, as published                     an answer's score         means over
    vqav2     the questions; the annotations, if      vqa                       types of answer
              they are in another folder                                        and question
    okvqa     the same                                vqa of stemmed answers    the same
    textvqa   TextVQA_0.5.1_val.json                  textvqa
    vizwiz    val.json; an id is the image's name     vizwiz                    answer types
    gqa       testdev_balanced_questions.json         exact                     binary, open,
                                                                                structural types
    chartqa   test_human.json, test_augmented.json;   relaxed                   files
              an id is FILE/NUMBER, from 0
    pope      coco_pope_{random,popular,              five figures (`pope`)     files, and the mean
              adversarial}.json; an id is random/1                              over them

Any of the first four may be scored with another's rule: score("vqav2", questions_of_textvqa, ...).
Ids are converted to text.  Questions and answers that can't be scored are listed, with one line for
each kind of problem.
"""

import math
import random
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

from common.cli import UserError, require
from common.files import read_json_lines
from dataset.questions import READ, VQA, Issues, Question
from dataset.sources import identity, question_prompt, text

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'                  # as in VQA's code: without ' : . & $ % # *
NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(),
                   map(str, range(11))),
               none="0")
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've""".split()
# a word that lacks one apostrophe -> the word; the last row is an error of the official table
CONTRACTIONS = {word[:i] + word[i + 1:]: word
                for word in CONTRACTED for i, c in enumerate(word) if c == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"


# ------------------------------------------------------------------------------- one answer's score

def tidy(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=2**16)
def normal(answer: str) -> str:
    """Return VQA's normal form: its processPunctuation, then its processDigitArticle.

    If the text has a comma between two digits, all punctuation marks are removed.  Otherwise a mark
    is removed everywhere if it is next to a space anywhere in the text; else it becomes a space.
    The first 32 periods that no digit follows are removed: the official code passes re.UNICODE, 32,
    where `sub` expects a count.  Then the text is lower-cased, number words become digits, articles
    are dropped, and contractions get their apostrophe."""
    has_thousands = re.search("[0-9],[0-9]", answer)
    bare = answer
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        bare = bare.replace(mark, "" if has_thousands or beside_space else " ")
    bare = re.sub(r"\.(?![0-9])", "", bare, count=32)
    words = []
    for word in bare.lower().split():
        word = NUMBERS.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


def agreement(answer: str, annotators: list[str]) -> float:
    """Return the mean over annotators of min(1, n / 3), where n of the other annotators gave the
    answer.  If 0, 1, 2, 3 or 4 of ten annotators gave it, the result is 0, 0.3, 0.6, 0.9 or 1."""
    same = [annotator == answer for annotator in annotators]
    return sum(min(1, (sum(same) - itself) / 3) for itself in same) / len(same)


def vqa(answer: str, annotators: list[str]) -> float:
    """Return VQA accuracy in [0, 1] (arXiv 1505.00468), as GT-Vision-Lab/VQA's vqaEval.py does: if
    all annotators gave exactly the same text, nothing is normalised, and "Yes" differs from "yes".
    """
    answer, *annotators = map(tidy, [answer, *annotators])
    if len(set(annotators)) > 1:
        answer, *annotators = map(normal, [answer, *annotators])
    return agreement(answer, annotators)


def textvqa(answer: str, annotators: list[str]) -> float:
    """Return TextVQA accuracy in [0, 1], as facebookresearch/mmf's m4c_evaluators.py does.

    All texts are always normalised, after commas and question marks are dropped and 's is made a
    word of its own."""
    forms = []
    for each in [answer, *annotators]:
        bare = each.lower().replace(",", "").replace("?", "").replace("'s", " 's")
        forms.append(normal(tidy(bare)))
    return agreement(forms[0], forms[1:])


def vizwiz(answer: str, annotators: list[str]) -> float:
    """Return VizWiz accuracy in [0, 1], as its vqaEval.py does: the answer is always normalised,
    the annotators' answers never.  (Many copies of its table of contractions have curly
    apostrophes; here they are straight.)"""
    return agreement(normal(tidy(answer)), annotators)


def exact(answer: str, true: list[str]) -> float:
    """Return GQA's accuracy, 0 or 1: 1 if the texts are equal without regard to case.  A period at
    the end of the answer is dropped, as LLaVA does before it calls GQA's eval.py."""
    return float(answer.strip().rstrip(".").lower() == true[0].strip().lower())


def number(answer: str) -> float | None:
    """Return a text as a finite number, or None; "10%" is 0.1."""
    digits = answer.replace(",", "").removesuffix("%")
    try:
        value = float(digits)
    except ValueError:
        return None
    if answer.endswith("%"):
        value /= 100
    return value if math.isfinite(value) else None


def relaxed(answer: str, true: list[str]) -> float:
    """Return ChartQA's relaxed accuracy (arXiv 2203.10244), 0 or 1.

    It is 1 for numbers if |value - true| / |true| <= 0.05, and for other texts if they are equal
    without regard to case.  As in google-research/pix2struct's metrics.py, "10%" is 0.1 and differs
    from "10"; unlike there, commas in numbers are dropped."""
    answer = answer.strip()
    expected = true[0].strip()
    value = number(answer)
    target = number(expected)
    if value is None or target is None:
        return float(answer.lower() == expected.lower())
    if target == 0:
        return float(value == 0)
    return float(abs(value - target) / abs(target) <= 0.05)


def yes_or_no(answer: str) -> str:
    """Read an answer as POPE's evaluate.py does: "no" if its first sentence has the word "No", "no"
    or "not"; else "yes", even for "Not", "no!", "nope" and ""."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope(answers: list[str], true: list[str]) -> dict[str, float]:
    """Return POPE's five figures (arXiv 2305.10355) in percent, with "yes" as the positive class:

        precision = hits / yes answers,  recall = hits / true yes,
        F1 = 2 hits / (yes answers + true yes)

    A ratio with a zero denominator is 0.  An answer that is neither "yes" nor "no" counts as a
    wrong no."""
    pairs = list(zip(answers, true))
    hits = pairs.count(("yes", "yes"))
    correct = hits + pairs.count(("no", "no"))
    claimed = answers.count("yes")
    positive = true.count("yes")
    return {"accuracy": 100 * correct / len(pairs),
            "precision": 100 * hits / max(claimed, 1),
            "recall": 100 * hits / max(positive, 1),
            "F1": 200 * hits / max(claimed + positive, 1),
            "yes-ratio": 100 * claimed / len(pairs)}


# ---------------------------------------------------------------------------------------- questions

def describe(issues: Issues, where: str = "") -> list[str]:
    """Return a line for each kind of problem, with the number of its ids and the first five."""
    lines = []
    for problem, ids in issues.items():
        if ids:
            more = ", ..." if len(ids) > 5 else ""
            lines.append(f"{where}{problem}: {len(ids):,} ({', '.join(ids[:5])}{more})")
    return lines


def check_texts(q: Question, where: str) -> None:
    """Raise UserError if a field of a question that should be a text is not one."""
    require((isinstance(q.answers, list), f"{where}: \"answers\" is {ascii(q.answers)[:60]}, expected a "
             f"list"))
    fields = dict(image=[q.image], question=[q.question], answer=q.answers, type=q.types)
    for field, values in fields.items():
        for value in values:
            text(value, where, field)


def questions(kind: str, paths: list[str | Path], suffix: str = ""
              ) -> tuple[list[Question], list[str]]:
    """Return a benchmark's questions in the order of its files, and a line for each kind of
    problem.

    suffix: added after every question; training uses SUFFIX[kind].  Raises UserError for files of
    another kind, and if no question has a true answer."""
    benchmark = READ[kind]
    # of VQA's two files, the second has the annotations
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
                elif isinstance(q.question, str) and not q.question.strip():
                    issues["blank questions, left out"].append(q.id)
                else:
                    check_texts(q, f"{where}: {q.id}")
                    q.question = q.with_suffix(suffix)
                    chosen[q.id] = q
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{where}: not of {kind} ({error!r}), expected {benchmark.form}")
    every = " and ".join(map(str, paths))
    require((chosen, f"{every}: no question with a true answer, expected {benchmark.form}"))
    return list(chosen.values()), describe(issues, f"{every}: ")


def shots(examples: list[Question], k: int, key: str, before: Question | None = None) -> str:
    """Return k examples with their most common answers, "Q: ... A: ... Q: ... A: ... ", as text to
    put before the prompt of the question `before`, which is never one of them.

    key: a seed and the id of `before`; it decides which examples are taken.  Raises UserError for
    too few examples."""
    sample = random.Random(key).sample(examples, min(k + 1, len(examples)))
    others = [q for q in sample if q != before][:k]
    require((len(others) == k, f"{k} examples, expected at most {len(others)}, as many as there are "
             f"other questions"))
    return "".join(f"{question_prompt(q.question)}{q.common_answer()} " for q in others)


# ------------------------------------------------------------------------------------------- scores

ACCURACY = dict(vqav2=vqa, okvqa=vqa, textvqa=textvqa, vizwiz=vizwiz, gqa=exact, chartqa=relaxed)


def read_answers(path: str | Path) -> tuple[dict[str, str], list[str]]:
    """Read lines {"question_id": ..., "answer": ...}.

    Return the answers by id, and a line that lists questions with several answers, of which the
    first is used.  Raises UserError for any line that is not of this form."""
    answers, issues = {}, defaultdict(list)
    for where, record in read_json_lines(Path(path)):
        key = str(identity(record, where, "question_id"))
        answer = text(record.get("answer"), where, "answer")
        if key in answers:
            issues["answers to one question, the first counts"].append(key)
        answers.setdefault(key, answer)
    return answers, describe(issues, f"{path}: ")


def score(kind: str, scored: list[Question], answers: dict[str, str]
          ) -> tuple[dict[str, float], list[str]]:
    """Return scores in percent, not rounded, and a line for each kind of problem.

    The scores are {"overall": ...} and a mean for each type.  For POPE they are {"random:
    accuracy": ..., ..., "mean: yes-ratio": ...}, with means over the files that were given.  A
    question without an answer counts as wrong, in POPE also as not a yes.  The official code
    rejects a file with missing answers, or with answers to unknown questions."""
    by_id = {q.id: q for q in scored}
    left_out = describe({
        "questions without an answer, scored as wrong": [i for i in by_id if i not in answers],
        "answers to no question, left out": [i for i in answers if i not in by_id]})
    if kind == "pope":
        return score_pope(scored, answers), left_out
    values = defaultdict(list)
    for q in scored:
        value = ACCURACY[kind](answers[q.id], q.answers) if q.id in answers else 0.0
        for name in ("overall", *q.types):
            values[name].append(value)
    return {name: 100 * sum(each) / len(each) for name, each in values.items()}, left_out


def score_pope(scored: list[Question], answers: dict[str, str]) -> dict[str, float]:
    """Return POPE's five figures for each subset, "random: accuracy" and so on, and their means."""
    pairs = defaultdict(list)
    for q in scored:
        answer = yes_or_no(answers[q.id]) if q.id in answers else ""
        pairs[q.types[0]].append((answer, q.answers[0]))
    scores = {}
    figures = defaultdict(list)
    for subset, both in pairs.items():
        for name, value in pope(*zip(*both)).items():
            scores[f"{subset}: {name}"] = value
            figures[name].append(value)
    for name, values in figures.items():
        scores[f"mean: {name}"] = sum(values) / len(values)
    return scores
