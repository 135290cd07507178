"""Read the objects off an image of the shapes world by its pixels, and score drawings and captions.

    background, things = parse(image)               # what a drawing shows
    is_true(read_caption("a red disc left of a blue square"), background, things)

A drawing is right if it shows what its caption says and no other object.  The categories are those
of GenEval (arXiv 2310.11513).  An image that can't be parsed counts as wrong.  Each prompt is drawn
once, and no drawing is repaired.

Shapes: S = SIDE pixels, n objects in an image, T templates.
"""

import functools
import itertools
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dataset.shapes import (BACKGROUNDS, CELL, COUNTS, RADII, RELATIONS, RGB, SHAPES, SIDE, Thing,
                            covered, is_related, noun)

LEAST = 6               # pixels of an object; fewer are a speck
FIT = 0.7               # least intersection / union with the best template; below it, no object
CATEGORIES = ["single object", "colours", "two objects", "position", "counting",
              "attribute binding"]


# ---------------------------------------------------------------------------------- image -> things

@functools.cache
def templates() -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Return the masks (T, CELL, CELL) of all shapes and sizes, moved to the upper left corner; and
    (shape, size) of each."""
    y, x = np.mgrid[:CELL, :CELL] + 0.5 - CELL / 2
    kinds = list(itertools.product(SHAPES, RADII))
    masks = [to_corner(covered(shape, x, y, RADII[size])) for shape, size in kinds]
    return np.stack(masks), kinds


def to_corner(mask: np.ndarray) -> np.ndarray:
    """Return a mask (CELL, CELL) of an object moved to the upper left corner; what is further than
    CELL pixels away is cut off."""
    rows, columns = np.nonzero(mask)
    part = mask[rows.min():, columns.min():][:CELL, :CELL]
    corner = np.zeros((CELL, CELL), bool)
    corner[:part.shape[0], :part.shape[1]] = part
    return corner


def connected(mask: np.ndarray) -> list[np.ndarray]:
    """Return the connected parts of a mask (S, S), each as a mask; corners connect."""
    parts = []
    mask = mask.copy()
    while mask.any():
        part = np.zeros_like(mask)
        pending = [tuple(np.argwhere(mask)[0])]
        while pending:
            y, x = pending.pop()
            if 0 <= y < SIDE and 0 <= x < SIDE and mask[y, x]:
                mask[y, x] = False
                part[y, x] = True
                pending += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        parts.append(part)
    return parts


def parse(image: Tensor) -> tuple[str, list[Thing]] | None:
    """Return the background and the objects of an image (3, S, S) uint8; None if a part of it is no
    object of this world."""
    pixels = image.permute(1, 2, 0).numpy().astype(np.int64)
    colours = {**RGB, **BACKGROUNDS}
    distances = np.stack([((pixels - rgb) ** 2).sum(-1) for rgb in colours.values()])    # (9, S, S)
    names = np.array(list(colours))[distances.argmin(0)]                                # (S, S)
    background = max(BACKGROUNDS, key=lambda name: (names == name).sum())
    masks, kinds = templates()
    things = []
    for colour in colours:
        if colour == background:
            continue
        for part in connected(names == colour):
            if part.sum() < LEAST:
                continue
            if colour in BACKGROUNDS:
                return None
            corner = to_corner(part)
            fits = (masks & corner).sum((1, 2)) / (masks | corner).sum((1, 2))
            best = int(fits.argmax())
            if fits[best] < FIT or part.sum() != corner.sum():
                return None
            rows, columns = np.nonzero(part)
            shape, size = kinds[best]
            x, y = (float(at.min() + at.max() + 1) / 2 for at in (columns, rows))
            things.append(Thing(size, colour, shape, x, y))
    return background, things


# --------------------------------------------------------------------------------- caption -> claim

@dataclass
class Noun:
    """A noun of a caption, with its number; "" for a size or a colour that it does not tell."""
    count: int
    size: str
    colour: str
    shape: str

    def fits(self, thing: Thing) -> bool:
        return (self.shape == thing.shape and self.size in ("", thing.size)
                and self.colour in ("", thing.colour))


@dataclass
class Claim:
    """The content of a caption: all objects, the relation of two of them, and the background."""
    nouns: list[Noun]
    relation: str = ""
    background: str = ""

    @property
    def category(self) -> str:
        """Return GenEval's category of a caption."""
        coloured = all(noun.colour for noun in self.nouns)
        if self.relation:
            return "position"
        if len(self.nouns) > 1:
            return "attribute binding" if coloured else "two objects"
        if self.nouns[0].count > 1:
            return "counting"
        return "colours" if coloured else "single object"


NOUN = re.compile(rf"(a|{'|'.join(COUNTS[1:])})(?: ({'|'.join(RADII)}))?(?: ({'|'.join(RGB)}))?"
                  rf" ({'|'.join(SHAPES)})(?:e?s)?")


def read_caption(text: str) -> Claim | None:
    """Return what a caption says; None for a text that can't be read."""
    text, separator, background = text.partition(" on ")
    relation = next((name for name in RELATIONS if f" {name} " in text), "")
    nouns = []
    for piece in text.split(f" {relation} " if relation else " and "):
        match = NOUN.fullmatch(piece)
        if match is None:
            return None
        number, size, colour, shape = match.groups(default="")
        count = 1 if number == "a" else COUNTS.index(number) + 1
        if piece != noun(size, colour, shape, count):            # "a discs", "two disc"
            return None
        nouns.append(Noun(count, size, colour, shape))
    if separator and background not in BACKGROUNDS:
        return None
    if relation and [each.count for each in nouns] != [1, 1]:
        return None
    return Claim(nouns, relation, background)


def is_true(claim: Claim, background: str, things: list[Thing]) -> bool:
    """Return True if a caption describes a scene: there is an object for each of its nouns and no
    other object, and the relation holds."""
    wanted = [noun for noun in claim.nouns for _ in range(noun.count)]
    if len(wanted) != len(things) or claim.background not in ("", background):
        return False
    for order in itertools.permutations(things):
        fits = all(noun.fits(thing) for noun, thing in zip(wanted, order))
        if fits and (not claim.relation or is_related(order[0], claim.relation, order[1])):
            return True
    return False


def is_drawn(caption: str, image: Tensor) -> bool:
    """Return True if an image (3, S, S) uint8 shows what a caption says, and no other object."""
    parsed = parse(image)
    return parsed is not None and is_true(read_caption(caption), *parsed)


# -------------------------------------------------------------------------------------- calibration

def total_variation(counts: Counter, values: list) -> float:
    """Return the distance of the counts' shares from equal shares of the values, and none of others:
    half of the sum of the shares' differences, from 0 to 1; 1 if nothing was counted."""
    total = sum(counts.values())
    if not total:
        return 1.0
    expected = dict.fromkeys(values, 1 / len(values))
    differences = [abs(counts[value] / total - expected.get(value, 0.0))
                   for value in expected | counts]
    return sum(differences) / 2
