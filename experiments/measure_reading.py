"""Measure how well the shipped weights read images, in every way of reading (docs/results.md).

    python -m experiments.measure_reading orders               # captions by each order
    python -m experiments.measure_reading choices              # yes or no: written, and ranked
    python -m experiments.measure_reading infill --limit 200   # held-out captions with random gaps
    python -m experiments.measure_reading page --out page.png  # unmasking, filling, likelihoods

This is not part of the test run.  Right: share of 192 captions per split that are right word for
word.  Evaluations: network evaluations per text, without finished rows.  Time: relative to the
exact order without the image cache, one token per step, in the same run.

Shapes: n images, C latent channels, h and w latent height and width.
"""

import random
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from common import cli
from dataset import emoji
from experiments.turns import count_texts
from inference import image_to_text
from inference.image_to_text import ReadConfig
from inference.parts import Parts
from metrics import emojis
from metrics.tables import table
from viz import grids
from viz.trajectory import pieces

ORDERS = {
    "confidence": dict(order="confidence"),
    "random": dict(order="random"),
    "confidence in 12 steps": dict(order="confidence", steps=12),
    "threshold 0.99": dict(order="threshold", level=0.99),
    "threshold 0.95": dict(order="threshold", level=0.95),
    "threshold 0.9": dict(order="threshold", level=0.9),
    "eb 0.01": dict(order="eb", level=0.01),
    "eb 0.05": dict(order="eb", level=0.05),
}
CACHES = ("off", "once")
SPLITS = ("tone", "train")


@dataclass
class EmojiSet:
    """The emoji set, as the shipped weights read it."""
    parts: Parts
    records: list[dict]
    latents: Tensor             # one per record, (n, C, h, w); these weights work on pixels

    def caption(self, i: int) -> str:
        return self.records[i]["caption"]


class Score(NamedTuple):
    right: float                # percent
    evaluations: float          # per text
    seconds: float


def percent_right(texts: list[str], true_texts: list[str]) -> float:
    pairs = zip(texts, true_texts, strict=True)
    return 100 * statistics.mean(text == true for text, true in pairs)


# ------------------------------------------------------------------------------------------ orders

def read_captions(data: EmojiSet, indices: list[int], config: ReadConfig) -> Score:
    with count_texts(data.parts.text) as counts:
        started = time.perf_counter()
        no_questions = [None] * len(indices)
        captions = image_to_text.write(data.parts, data.latents[indices], no_questions, config)
        seconds = time.perf_counter() - started
    right = percent_right(captions, [data.caption(i) for i in indices])
    return Score(right, sum(counts) / len(indices), seconds)


def orders(data: EmojiSet, limit: int) -> None:
    """Print how well and how fast each order reads captions."""
    scores = {}                                                  # one of each split
    for split in SPLITS:
        indices = emoji.of_split(data.records, split)[:limit]
        read_captions(data, indices, ReadConfig(**ORDERS["threshold 0.9"]))              # warm-up
        for name, settings in ORDERS.items():
            for cache in CACHES:
                score = read_captions(data, indices, ReadConfig(image_cache=cache, **settings))
                scores.setdefault((name, cache), []).append(score)
                print(name, cache, tuple(score), file=sys.stderr, flush=True)
    exact_seconds = sum(score.seconds for score in scores["confidence", "off"])
    print("| order | image cache | right, `tone` | right, `train` | evaluations | time |")
    print("|---|---|---|---|---|---|")
    for (name, cache), (tone, train) in scores.items():
        evaluations = (tone.evaluations + train.evaluations) / 2
        time_share = (tone.seconds + train.seconds) / exact_seconds
        print(f"| {name} | {cache} | {tone.right:.1f} | {train.right:.1f} | {evaluations:.1f} | "
              f"{time_share:.3f} |")


# ----------------------------------------------------------------------------------------- choices

def answer(data: EmojiSet, pairs: list[tuple[int, dict]], cache: str) -> list[str]:
    """Write answers to pairs of an image's index and a question."""
    latents = data.latents[[i for i, _ in pairs]]
    questions = [question["question"] for _, question in pairs]
    return image_to_text.write(data.parts, latents, questions, ReadConfig(image_cache=cache))


def rank_yes_and_no(data: EmojiSet, pairs: list[tuple[int, dict]]) -> list[str]:
    """Return the likelier one of "yes" and "no" for each pair."""
    answers = []
    for i, question in pairs:
        latents = data.latents[i:i + 1]
        ranking = image_to_text.rank(data.parts, latents, ["yes", "no"], question["question"])
        answers.append(ranking[0].text)
    return answers


def choices(data: EmojiSet, limit: int) -> None:
    """Print how many answers are right, for one question of each type and answer."""
    rows = {}
    for split in SPLITS:
        questions = []                                           # (image, question) pairs
        for i in emoji.of_split(data.records, split)[:limit]:
            questions += [(i, question) for question in emojis.one_of_each(data.records[i])]
        yes_or_no = [(i, question) for i, question in questions
                     if question["type"].startswith("yes/no")]
        rows[split] = {}
        for title, pairs in (("all questions", questions), ("yes or no", yes_or_no)):
            true_answers = [question["answer"] for _, question in pairs]
            for cache in CACHES:
                answers = answer(data, pairs, cache)
                rows[split][f"{title}, cache {cache}"] = percent_right(answers, true_answers)
        ranked = rank_yes_and_no(data, yes_or_no)
        rows[split]["yes or no, ranked"] = percent_right(ranked, true_answers)
    print(table(rows, corner="split"))


# ------------------------------------------------------------------------------------------ infill

def make_gaps(caption: str, chance: random.Random) -> str:
    """Replace one or two random words of a caption by [MASK]; a comma behind a word stays."""
    words = caption.split(" ")
    count = min(len(words), chance.randint(1, 2))
    for at in chance.sample(range(len(words)), count):
        comma = "," if words[at].endswith(",") else ""
        words[at] = f"[MASK]{comma}"
    return " ".join(words)


def infill(data: EmojiSet, limit: int) -> None:
    """Print how well missing words of held-out captions are filled in."""
    held_out = emoji.of_split(data.records, "tone")
    for cache in CACHES:
        chance = random.Random(0)
        right = kept = gaps = 0
        for _ in range(limit):
            i = chance.choice(held_out)
            text = make_gaps(data.caption(i), chance)
            filled = image_to_text.infill(data.parts, data.latents[i:i + 1], text,
                                          ReadConfig(image_cache=cache))
            given = ".*".join(map(re.escape, text.split("[MASK]")))
            gaps += text.count("[MASK]")
            right += filled == data.caption(i)
            kept += re.fullmatch(given, filled, re.DOTALL) is not None
        print(f"image cache {cache}: {limit} texts, {gaps} gaps: {kept} keep every given "
              f"character, {right} are the true caption", flush=True)


# -------------------------------------------------------------------------------------------- page

def unmasking(data: EmojiSet, i: int) -> list[str]:
    """Return the last seven states of a caption that is being written."""
    states = []
    image_to_text.write(data.parts, data.latents[i:i + 1], [None], states=states)
    lines = []
    for _, ids in states:
        text = "".join(pieces(data.parts, ids[0].tolist()))
        lines.append(text.replace("[MASK]", " _").strip())
    return lines[-7:]


def filling(data: EmojiSet, i: int) -> list[str]:
    """Return a caption without its first word and its tone, and the same filled in."""
    gaps = re.sub(r"[\w-]+(?= skin)|^\w+", "[MASK]", data.caption(i))
    filled = image_to_text.infill(data.parts, data.latents[i:i + 1], gaps)
    return [f"given: {gaps}", f"filled: {filled}"]


def likelihoods(data: EmojiSet, i: int) -> list[str]:
    """Return a yes-or-no question, and how likely each answer is."""
    questions = data.records[i]["questions"]
    question = next(q["question"] for q in questions if q["type"] == "yes/no sort")
    lines = [question]
    latents = data.latents[i:i + 1]
    for text, share, nats, error in image_to_text.rank(data.parts, latents, ["yes", "no"], question):
        lines.append(f"{text}: {share:.1%}, {nats:.3f} nats (+- {error:.3f})")
    return lines


def write_page(data: EmojiSet, out: Path) -> None:
    """Write a page of the first three held-out images."""
    cells = []
    for lines_of in (unmasking, filling, likelihoods):
        for i in emoji.of_split(data.records, "tone")[:3]:
            cells.append((data.latents[i], lines_of(data, i)))
    grids.write_image(out, grids.page(cells[:4], cells[4:], most=8))


MEASURES = dict(orders=orders, choices=choices, infill=infill)


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("what", choices=[*MEASURES, "page"])
    parser.add_argument("--out", type=Path, default=Path("page.png"), help="of page (page.png)")
    parser.add_argument("--limit", type=cli.number(int, 1), default=192, help="of all others (192)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    parts = Parts(dtype=args.dtype)
    records, images = emoji.load(pixels=parts.height)
    latents = image_to_text.encode(parts, images.float() / 127.5 - 1)
    data = EmojiSet(parts, records, latents)
    if args.what == "page":
        write_page(data, args.out)
    else:
        MEASURES[args.what](data, args.limit)


if __name__ == "__main__":
    cli.run(main)
