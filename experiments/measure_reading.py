"""Measure how well the shipped weights read images, in every way of reading (docs/results.md).

    python -m experiments.measure_reading orders               # captions by each order
    python -m experiments.measure_reading choices              # yes or no: written, and ranked
    python -m experiments.measure_reading infill --limit 200   # held-out captions with random gaps
    python -m experiments.measure_reading page --out page.png  # unmasking, filling, likelihoods

This is not part of the test run.  Right: share of 192 captions per split that are right word for
word.  Evaluations: network evaluations per text, without finished rows.  Time: relative to the
exact order without the image cache, one token per step, in the same run.
"""

import random
import re
import sys
import time
from pathlib import Path

import torch

from common import cli
from dataset import emoji
from experiments.turns import count_texts
from inference import image_to_text
from inference.image_to_text import ReadConfig
from inference.parts import Parts
from metrics import emojis
from viz import grids
from viz.trajectory import pieces

ORDERS = {
    "confidence": dict(order="confidence"), "random": dict(order="random"),
    "confidence in 12 steps": dict(order="confidence", steps=12),
    **{f"threshold {x}": dict(order="threshold", level=x) for x in (0.99, 0.95, 0.9)},
    **{f"eb {x}": dict(order="eb", level=x) for x in (0.01, 0.05)},
}
CACHES = ("off", "once")


def measure(parts: Parts, latents, true: list[str], **how) -> tuple[float, float, float]:
    """Return the percentage of right captions, the evaluations per text, and the seconds."""
    with count_texts(parts.text) as counts:
        started = time.perf_counter()
        written = image_to_text.write(parts, latents, [None] * len(latents), ReadConfig(**how))
        seconds = time.perf_counter() - started
    right = 100 * sum(map(str.__eq__, written, true)) / len(true)
    return right, sum(counts) / len(true), seconds


def orders(parts: Parts, records: list[dict], latents, limit: int) -> None:
    found = {}
    for split in ("tone", "train"):
        some = emoji.of_split(records, split)[:limit]
        batch, true = latents[some], [records[i]["caption"] for i in some]
        measure(parts, batch, true, **ORDERS["threshold 0.9"])                    # warm
        for name, how in ORDERS.items():
            for cache in CACHES:
                row = measure(parts, batch, true, image_cache=cache, **how)
                found.setdefault((name, cache), []).append(row)
                print(name, cache, row, file=sys.stderr, flush=True)
    print("| order | image cache | right, `tone` | right, `train` | evaluations | time |\n|---|---|---|---|---|---|")
    whole = sum(seconds for *_, seconds in found["confidence", "off"])
    for (name, cache), (tone, train) in found.items():
        evaluations, seconds = ((a + b) / 2 for a, b in zip(tone[1:], train[1:]))
        print(f"| {name} | {cache} | {tone[0]:.1f} | {train[0]:.1f} | {evaluations:.1f} | "
              f"{2 * seconds / whole:.3f} |")


def choices(parts: Parts, records: list[dict], latents, limit: int) -> None:
    """Measure answers to one question of each type and answer."""
    right = lambda said, asked: 100 * sum(a == q["answer"] for a, (_, q) in zip(said, asked)) / len(asked)
    print("| split | all questions, look each time | once | yes or no, each time | once | ranked |")
    for split in ("tone", "train"):
        some = emoji.of_split(records, split)[:limit]
        asked = [(i, q) for i in some for q in emojis.one_of_each(records[i])]
        cells = []
        for some in (asked, [(i, q) for i, q in asked if q["type"].startswith("yes/no")]):
            batch, questions = latents[[i for i, _ in some]], [q["question"] for _, q in some]
            for cache in CACHES:
                said = image_to_text.write(parts, batch, questions, ReadConfig(image_cache=cache))
                cells.append(f"{right(said, some):.1f}")
        ranks = [image_to_text.rank(parts, latents[i:i + 1], ["yes", "no"], q["question"])
                 for i, q in some]
        cells.append(f"{right([rank[0].text for rank in ranks], some):.1f}")
        print(f"| {split} | {' | '.join(cells)} |", flush=True)


def infill(parts: Parts, records: list[dict], latents, limit: int) -> None:
    """Measure filling in one or two missing words of held-out captions, with and without the image
    cache."""
    some = emoji.of_split(records, "tone")
    for cache in CACHES:
        chance, right, kept, gaps = random.Random(0), 0, 0, 0
        for i in (chance.choice(some) for _ in range(limit)):
            words = records[i]["caption"].split(" ")
            for at in chance.sample(range(len(words)), min(len(words), chance.randint(1, 2))):
                words[at] = "[MASK]" + "," * words[at].endswith(",")
            text, gaps = " ".join(words), gaps + " ".join(words).count("[MASK]")
            said = image_to_text.infill(parts, latents[i:i + 1], text, ReadConfig(image_cache=cache))
            pattern = ".*".join(map(re.escape, text.split("[MASK]")))
            right += said == records[i]["caption"]
            kept += bool(re.fullmatch(pattern, said, re.DOTALL))
        print(f"image cache {cache}: {limit} texts, {gaps} gaps: {kept} keep every given character, "
              f"{right} are the true caption", flush=True)


def page(parts: Parts, records: list[dict], latents, out: Path) -> None:
    """Write a page of the first three held-out images: unmasking and filling of captions, and
    likelihoods of answers.  These weights work on pixels, so the latents are the images."""
    begin, fill, answer = [], [], []
    for i in emoji.of_split(records, "tone")[:3]:
        record, look, states = records[i], latents[i:i + 1], []
        image_to_text.write(parts, look, [None], states=states)
        texts = ["".join(pieces(parts, ids[0].tolist())).replace("[MASK]", " _").strip() for _, ids in states]
        begin.append((latents[i], texts[-7:]))
        gaps = re.sub(r"[\w-]+(?= skin)|^\w+", "[MASK]", record["caption"])
        fill.append((latents[i], [f"given: {gaps}", f"filled: {image_to_text.infill(parts, look, gaps)}"]))
        asked = next(q for q in record["questions"] if q["type"] == "yes/no sort")["question"]
        ranks = image_to_text.rank(parts, look, ["yes", "no"], asked)
        answer.append((latents[i], [asked, *(f"{text}: {share:.1%}, {nats:.3f} nats (+- {error:.3f})"
                                             for text, share, nats, error in ranks)]))
    grids.write_image(out, grids.page(begin + fill[:1], fill[1:] + answer, most=8))


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("what", choices=["orders", "choices", "infill", "page"])
    parser.add_argument("--out", type=Path, default=Path("page.png"), help="of page (page.png)")
    parser.add_argument("--limit", type=cli.number(int, 1), default=192, help="of all others (192)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    parts = Parts(dtype=getattr(torch, args.dtype))
    records, images = emoji.load(pixels=parts.height)
    latents = image_to_text.encode(parts, images.float() / 127.5 - 1)
    measures = dict(orders=orders, choices=choices, infill=infill, page=page)
    measures[args.what](parts, records, latents, args.out if args.what == "page" else args.limit)


if __name__ == "__main__":
    cli.run(main)
