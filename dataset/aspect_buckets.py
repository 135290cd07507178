"""Batches of images of similar shape, for train.py --buckets.

WINDOW consecutive batches form a window.  Each batch of a window has one image size, chosen from
the shapes of the data; the order of the sizes is random in each window.  Row r of the WINDOW
batches shares WINDOW images: the tallest image goes to the batch with the tallest size, and so on.
So each image is used as often as without buckets, nothing is stored, and a row depends on no other
row: any number of processes gets the same batches.  The paper uses square images only.
"""

import math
from functools import lru_cache

import torch

from common import seeding

WINDOW = 8
LOOK = 256              # the shapes of the first images, this many, decide the sizes


def sizes(pixels: int, unit: int) -> list[tuple[int, int]]:
    """Return sizes (height, width) from tall to wide, with ratios up to 2 to 1, of about the area
    of a square of `pixels` a side.

    Sides are multiples of pixels / 8 (64 at 512 pixels), rounded down to a multiple of `unit`, but
    at least to `unit`."""
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

    unit: every side of a batch is a multiple of this many pixels."""

    def __init__(self, mix, name: str, unit: int):
        self.mix = mix
        self.name = name
        shapes = sorted(self.shapes(range(LOOK)))
        share = LOOK // WINDOW
        table = sizes(mix.pixels, unit)
        self.sizes = []
        for shape in shapes[share // 2::share]:                  # the median of each share
            distances = [abs(math.log(width / height) - shape) for height, width in table]
            nearest = distances.index(min(distances))
            self.sizes.append(table[nearest])

    def rows(self, step: int, count: int, rows: range) -> tuple[list[int], tuple[int, int]]:
        """Return the positions of these rows of a step's batch, and the batch's (height, width).

        count: rows of the whole batch, over all processes."""
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
        """Return log(width / height) of the image at a place; 0, as for a square, if it is stored as
        square pixels or unreadable."""
        try:
            width, height = self.mix.image_size(place)
            return math.log(width / height)
        except Exception:                # reading the whole sample will report the error
            return 0.0
