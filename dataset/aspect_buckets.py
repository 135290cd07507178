"""Batches of images of about one shape, for train.py --buckets.

WINDOW batches in a row have one size each, in an order that is drawn anew for every window.  The
sizes follow the shapes of the data.  A row of the batch has one image for each of the WINDOW
batches; the tallest goes to the tallest batch, and so on.  So each image is seen as often as
without buckets, nothing is stored, and a row depends on no other row: any number of processes sees
the same batches.  The paper's images are all square.
"""

import math
from functools import lru_cache

import torch

from common import seeding

WINDOW = 8
LOOK = 256              # images whose shapes decide on the sizes


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
    """Group the samples of a `data.Mix` by shape, in its order `name`.

    unit: pixels that divide every side of a batch."""

    def __init__(self, mix, name: str, unit: int):
        self.mix = mix
        self.name = name
        shapes = sorted(self.shapes(range(LOOK)))
        share = LOOK // WINDOW
        table = sizes(mix.pixels, unit)
        self.sizes = []
        for shape in shapes[share // 2::share]:                  # the middle of each share
            distances = [abs(math.log(width / height) - shape) for height, width in table]
            nearest = distances.index(min(distances))
            self.sizes.append(table[nearest])

    def rows(self, step: int, count: int, rows: range) -> tuple[list[int], tuple[int, int]]:
        """Return the positions of these rows of the batch of `count` at a step, and their height
        and width."""
        window, batch = divmod(step, WINDOW)
        generator = seeding.seeded(self.mix.key, self.name, "sizes", window)
        rank = int(torch.randperm(WINDOW, generator=generator)[batch])
        chosen = []
        for row in rows:
            positions = [(window * WINDOW + i) * count + row for i in range(WINDOW)]
            ranked = sorted(zip(self.shapes(positions), positions))
            _, position = ranked[rank]
            chosen.append(position)
        return chosen, self.sizes[rank]

    def shapes(self, positions: list[int] | range) -> list[float]:
        """Return log(width / height) of the image at each position."""
        return list(map(self.shape, self.mix.places(positions, self.name)))

    @lru_cache(maxsize=2**16)
    def shape(self, place: tuple) -> float:
        """Return log(width / height) of the image at a place; 0, a square's, if unreadable."""
        try:
            width, height = self.mix.picture_size(place)
            return math.log(width / height)
        except Exception:                # the read that follows says what is wrong
            return 0.0
