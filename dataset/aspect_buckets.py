"""Batches of pictures that keep about their shape, each of one size: train.py --buckets.

Of WINDOW batches in a row each has a size of its own, in an order drawn anew: together they are the
sizes that the shapes of the data ask for.  A row of the batch has a picture in each of them, and
gives the tallest to the tallest batch, and so on.  So each picture is seen as often as without
buckets, nothing is stored, and a row depends on no other row: any number of processes sees the
same.  The paper's pictures are all square.
"""

import math
from functools import lru_cache
from typing import Callable, Iterable

import torch

from common import seeding

WINDOW = 8
LOOK = 256              # pictures whose shapes decide on the sizes


def sizes(pixels: int, unit: int) -> list[tuple[int, int]]:
    """Return (height, width) from tall to wide, up to 2 to 1, of about the square's area.

    Sides are multiples of an eighth of the square's (64 at 512 pixels) or, where `unit` does not
    divide that, of the next less."""
    step = max(pixels // 8 // unit, 1) * unit
    wide = []
    for height in range(step, pixels, step):
        width = round(pixels ** 2 / height / step) * step
        if height < width <= 2 * height:
            wide.append((height, width))
    tall = [(width, height) for height, width in wide]
    return [*tall, (pixels, pixels), *wide[::-1]]


class Buckets:
    """The batches of one of a run's mixtures.

    key: of the mixture in this run.  pixels: side of the square of the same area.  unit: pixels that divide
    every side.  places: gives the places of positions in the run's order, and picture_size (width, height) of
    the picture at a place."""

    def __init__(self, key: tuple, pixels: int, unit: int, places: Callable[[Iterable[int]], list],
                 picture_size: Callable[[tuple], tuple[int, int]]):
        self.key, self.places, self.picture_size = key, places, picture_size
        shapes = sorted(map(self.shape, places(range(LOOK))))
        self.sizes = []
        for shape in shapes[LOOK // WINDOW // 2::LOOK // WINDOW]:
            def distance(size: tuple[int, int]) -> float:
                return abs(math.log(size[1] / size[0]) - shape)
            self.sizes.append(min(sizes(pixels, unit), key=distance))

    def rows(self, step: int, count: int, rows: range) -> tuple[list[int], tuple[int, int]]:
        """Return (positions of these rows of the batch of `count` at a step, their height and
        width)."""
        window, at = divmod(step, WINDOW)
        generator = seeding.seeded(*self.key, "sizes", window)
        rank = int(torch.randperm(WINDOW, generator=generator)[at])
        chosen = []
        for row in rows:
            positions = [(window * WINDOW + i) * count + row for i in range(WINDOW)]
            shapes = map(self.shape, self.places(positions))
            ranked = sorted(zip(shapes, positions))
            chosen.append(ranked[rank][1])
        return chosen, self.sizes[rank]

    @lru_cache(maxsize=2**16)
    def shape(self, place: tuple[int, int, int]) -> float:
        """Return log(width / height) of the image at a place; 0, a square's, where it can't be
        read."""
        try:
            width, height = self.picture_size(place)
            return math.log(width / height)
        except Exception:                # the read that follows says what is wrong
            return 0.0
