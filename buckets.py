"""Batches of pictures that keep about their shape, each of one size: train.py --buckets.

Of WINDOW batches in a row each has a size of its own, in an order drawn anew: together they are the sizes
that the shapes of the data ask for.  A row of the batch has a picture in each of them, and gives the tallest
to the tallest batch, and so on.  So each picture is seen as often as without buckets, nothing is stored, and
a row depends on no other row: any number of processes sees the same.  The paper's pictures are all square.
"""

import math

import torch

import data
from cli import require
from pictures import picture_size

WINDOW = 8
LOOK = 256              # pictures whose shapes decide on the sizes


def sizes(pixels: int, unit: int) -> list[tuple[int, int]]:
    """(height, width) from tall to wide, up to 2 to 1, of about the square's area.  Sides are multiples of an
    eighth of the square's (64 at 512 pixels) or, where `unit` does not divide that, of the next less."""
    step = max(pixels // 8 // unit, 1) * unit
    flat = [(height, round(pixels ** 2 / height / step) * step) for height in range(step, pixels, step)]
    flat = [(height, width) for height, width in flat if height < width <= 2 * height]
    return [(width, height) for height, width in flat] + [(pixels, pixels)] + flat[::-1]


class Buckets:
    """The batches of one of a run's mixes, by its name in the run; unit: pixels that divide every side.

    Raises UserError for a mix whose samples have one size."""

    def __init__(self, mix: data.Mix, name: str, unit: int):
        require((mix.stamp and mix.stamp["vae"] == "pixels", f"--buckets: {mix.sources[0].name} has no "
                 f"pictures to cut, but {'stored latents' if mix.stamp else 'plain text'}"))
        self.mix, self.name, self.shapes = mix, name, {}
        known = sorted(map(self.shape, mix.places(range(LOOK), name)))
        quantiles, every = known[LOOK // WINDOW // 2::LOOK // WINDOW], sizes(mix.pixels, unit)
        self.sizes = [min(every, key=lambda size: abs(math.log(size[1] / size[0]) - shape))
                      for shape in quantiles]

    def rows(self, step: int, count: int, rows: range) -> tuple[list[int], tuple[int, int]]:
        """(positions of these rows of the batch of `count` at a step, their pictures' height and width)."""
        window, at = divmod(step, WINDOW)
        order = torch.randperm(WINDOW, generator=data.seeded(self.mix.key, self.name, "sizes", window))
        found, rank = [], int(order[at])
        for row in rows:
            positions = [(window * WINDOW + i) * count + row for i in range(WINDOW)]
            shapes = list(map(self.shape, self.mix.places(positions, self.name)))
            found.append(positions[sorted(range(WINDOW), key=lambda i: (shapes[i], i))[rank]])
        return found, self.sizes[rank]

    def shape(self, place: tuple[int, int, int]) -> float:
        """log(width / height) of the picture at a place; 0, a square's, where that can't be told."""
        if place not in self.shapes:
            if len(self.shapes) > 2**16:
                self.shapes.clear()
            try:
                k, epoch, at = place
                width, height = picture_size(self.mix.sources[k][self.mix.index(k, epoch, at)]["picture"])
                self.shapes[place] = math.log(width / height)
            except Exception:                                    # what is wrong is said when it is read
                self.shapes[place] = 0.0
        return self.shapes[place]
