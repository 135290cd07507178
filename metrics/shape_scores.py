"""Measure a model on the shapes world: drawings, captions, answers, and how open prompts are filled.

    drawing      a drawing shows what its caption says and nothing else, in GenEval's six categories
    reading      "true": a caption of this world that is true of its image; "complete": it also names
                 each object's colour; answers word for word, and POPE's figures of the yes/no ones
    calibration  of drawings of "a disc" and its like, whose colour, size, cell and background are
                 open: total variation of their shares against the true ones; a perfect painter, too,
                 is above 0 in so few drawings

"Held-out" captions name, and held-out images show, a combination that training never has.

Shapes: B batch, S = SIDE pixels.
"""

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Iterator

import torch
from PIL import Image
from torch import Tensor

from common.progress import batches, chunks
from dataset import shapes
from dataset.images import to_pixels
from dataset.shapes import (CELL, HELD_COUNTS, HELD_ORDERS, HELD_PAIRS, RGB, SHAPES, SPLITS, WORLDS,
                            World)
from inference import text_to_image
from inference.image_to_text import ReadConfig, encode, write
from inference.parts import Parts
from inference.text_to_image import DrawConfig
from metrics.emojis import percent, score_answers
from metrics.shapes import (CATEGORIES, Claim, is_drawn, is_true, parse, read_caption,
                            total_variation)
from viz import grids

BATCH = 64
TYPES = ["number", "colour", "shape", "yes/no", "place"]         # of questions
ROWS = {"seen": SPLITS[:1], "held-out": SPLITS[1:]}


def names_held_out(claim: Claim) -> bool:
    """Return True if a caption names a combination that training never has."""
    counts = Counter()
    for noun in claim.nouns:
        counts[noun.shape] += noun.count
    order = tuple(noun.shape for noun in claim.nouns)
    return (any((noun.colour, noun.shape) in HELD_PAIRS for noun in claim.nouns)
            or any((count, shape) in HELD_COUNTS for shape, count in counts.items())
            or bool(claim.relation) and order in HELD_ORDERS)


def samples(row: str, seed: int, world: str) -> Iterator[dict]:
    """Yield test samples of a row, of each split in turn."""
    for i in itertools.count(seed * 10**6):
        for split in ROWS[row]:
            yield shapes.sample(i, split, world)


def categories(row: str, world: str) -> list[str]:
    """Return the categories that a row of a world has."""
    absent = []
    if row == "held-out":
        absent += ["single object", "two objects"]               # they name no combination
    if "group" not in WORLDS[world].kinds:
        absent.append("counting")
    return [name for name in CATEGORIES if name not in absent]


def prompts(row: str, count: int, seed: int, world: str) -> list[str]:
    """Return `count` captions of each category in turn; held-out ones name what is held out."""
    captions = {name: [] for name in categories(row, world)}
    for sample in samples(row, seed, world):
        text = sample["captions"][0]
        claim = read_caption(text)
        if claim.category in captions and names_held_out(claim) == (row == "held-out"):
            captions[claim.category].append(text)
        if all(len(texts) >= count for texts in captions.values()):
            return [text for texts in captions.values() for text in texts[:count]]


def judge(text: str, scene: shapes.Scene) -> tuple[bool, bool]:
    """Return whether a caption is true of a scene, and whether it also names all colours."""
    claim = read_caption(text)
    is_right = claim is not None and is_true(claim, scene.background, scene.things)
    return is_right, is_right and all(noun.colour for noun in claim.nouns)


@dataclass
class ShapesTest:
    """A model to be measured, and the world that it has learned."""
    parts: Parts
    world: str = "shapes"

    def drawn(self, texts: list[str], seed: int, config: DrawConfig, title: str
              ) -> Iterator[tuple[str, Tensor]]:
        """Yield each text with its drawing (3, S, S) uint8."""
        for n, batch in enumerate(batches(f"{title}, seed {seed}", texts, BATCH)):
            first_seed = seed * 10**6 + n * BATCH
            images = text_to_image.draw(self.parts, batch, first_seed, **vars(config))
            yield from zip(batch, to_pixels(images).cpu())

    def draw(self, row: str, count: int, seed: int, config: DrawConfig) -> dict[str, float]:
        """Return the share of right drawings in each category, in percent."""
        correct = defaultdict(list)
        texts = prompts(row, count, seed, self.world)
        for text, image in self.drawn(texts, seed, config, f"{row}, drawings"):
            correct[read_caption(text).category].append(is_drawn(text, image))
        return {f"drawing: {name}": percent(values) for name, values in correct.items()}

    def written(self, jobs: list[tuple[dict, str | None]], seed: int, config: ReadConfig, title: str
                ) -> Iterator[str]:
        """Yield a text for each (sample, question); the question None asks for a caption."""
        for n, batch in enumerate(batches(f"{title}, seed {seed}", jobs, BATCH)):
            images = torch.stack([sample["image"] for sample, _ in batch]) / 127.5 - 1
            first_seed = seed * 10**6 + n * BATCH
            yield from write(self.parts, encode(self.parts, images), [question for _, question in batch],
                             config, list(range(first_seed, first_seed + len(batch))))

    def captions(self, row: str, count: int, seed: int, config: ReadConfig) -> dict[str, float]:
        """Return the shares of true and of complete captions of `count` images, in percent."""
        shown = list(itertools.islice(samples(row, seed, self.world), count))
        texts = self.written([(sample, None) for sample in shown], seed, config, f"{row}, captions")
        judged = [judge(text, sample["scene"]) for sample, text in zip(shown, texts)]
        true, complete = zip(*judged)
        return {"reading: true": percent(true), "reading: complete": percent(complete)}

    def answers(self, row: str, count: int, seed: int, config: ReadConfig) -> dict[str, float]:
        """Return the shares of right answers about `count` images, in percent, and POPE's figures."""
        shown = itertools.islice(samples(row, seed, self.world), count)
        jobs, pairs = [], []
        for sample in shown:
            for pair in sample["questions"]:
                jobs.append((sample, pair["question"]))
                pairs.append(pair)
        texts = self.written(jobs, seed, config, f"{row}, answers")
        return score_answers(zip(pairs, texts), TYPES)

    def calibrate(self, count: int, seed: int, config: DrawConfig) -> dict[str, float]:
        """Compare drawings of "a disc", "a square" and so on with the true distribution."""
        scores = defaultdict(list)
        for shape in SHAPES:
            right = []
            for _, image in self.drawn([f"a {shape}"] * count, seed, config, f"a {shape}"):
                parsed = parse(image)
                is_one = parsed is not None and [thing.shape for thing in parsed[1]] == [shape]
                scores["right"].append(is_one)
                if is_one:
                    right.append(open_features(*parsed))
            for name, values in open_values(shape, WORLDS[self.world]).items():
                counts = Counter(features[name] for features in right)
                scores[name].append(total_variation(counts, values))
        return {f"calibration: {name}": percent(values) for name, values in scores.items()}

    def page(self, drawing: DrawConfig) -> Image.Image:
        """Return 48 drawings or fewer, each with its caption and what was parsed; half are held out."""
        rows = []
        for row in ROWS:
            count = 24 // len(categories(row, self.world))
            cells = []
            for text, image in self.drawn(prompts(row, count, 0, self.world), 0, drawing, row):
                verdict = "right" if is_drawn(text, image) else f"wrong: {describe(image)}"
                cells.append((image / 127.5 - 1, f"{text} ({verdict})"))
            rows += chunks(cells, 8)
        return grids.rows(*rows)


def open_values(shape: str, world: World) -> dict[str, list]:
    """Return the possible values of each open feature of an object of this shape; all are equally
    likely."""
    colours = [colour for colour in RGB if (colour, shape) not in HELD_PAIRS]
    values = dict(colour=colours, size=world.sizes, cell=list(itertools.product(range(2), range(2))),
                  background=world.backgrounds)
    return {name: possible for name, possible in values.items() if len(possible) > 1}


def open_features(background: str, things: list[shapes.Thing]) -> dict:
    """Return the values of these features in an image of one object."""
    thing, = things
    return dict(colour=thing.colour, size=thing.size, background=background,
                cell=(int(thing.x / CELL), int(thing.y / CELL)))


def describe(image: Tensor) -> str:
    """Return in words what an image (3, S, S) uint8 shows."""
    parsed = parse(image)
    if parsed is None:
        return "not only shapes"
    return ", ".join(shapes.noun(thing.size, *thing.pair) for thing in parsed[1]) or "nothing"
