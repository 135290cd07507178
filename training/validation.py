"""Measure the averaged weights on the same images, texts, times, noise and masks each time.

    val_image      the velocity's error, mean over t ~ U(0, 1)
    val_nats       the bound of -log p(text | image) in nats, summed over all texts and divided by
                   the number n of all positions that may be masked.  The bound of a text is
                   E_l [n/l sum of the masked tokens' cross-entropies]; l of its n positions are
                   masked, 1 to n with equal probability.  This is far less noisy than the weight
                   1/t (LLaDA, arXiv 2502.09992).  For a perfect model it is the entropy per
                   position.  Padding counts as text, because visible padding shows the length
    val_bits       the bound in bits per byte of text, to compare tokenizers
    val_image_t    the velocity's error in each of ten bins of t
    val_text_t     the cross-entropy of a masked token in each bin, in nats

The samples are held out if the first source has held-out samples; otherwise they are training
samples.  The random draws for a sample depend only on its number, not on the run, its seed or its
processes.  Image errors at times below the floor are weighed by (t / floor)^2; the floor is 0.05, or
--time-floor if that is higher.  So two runs can be compared if they have the same data, stage,
--question-share, --time-floor, --pixels and --text-length.

Shapes: B samples at once, L tokens.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Callable, Iterator

import torch
from torch import Tensor

from common import processes, seeding
from common.progress import chunks
from mask_diffusion import fix_mask_counts
from training.batches import Batch, BatchMaker, TextBatch

BINS = 10
ROWS = 32               # samples at once
SAMPLES = 160           # images, and texts, of a validation


def spread(rows: list[int], size: int) -> Tensor:
    """Return times (B,): row i is in bin i mod 10, and the times of a bin are evenly spaced."""
    rows_per_bin = math.ceil(size / BINS)
    times = []
    for row in rows:
        within_bin = (row // BINS + 0.5) / rows_per_bin
        times.append((row % BINS + within_bin) / BINS)
    return torch.tensor(times)


def rounded(value: Tensor) -> float:
    return round(float(value), 6)


def mean_by_bin(values: Tensor) -> list[float]:
    """Return the mean of values (size,) in each bin of t; row i is in bin i mod 10.

    NaN does not count: a long question can leave no token of its text to mask."""
    return [rounded(values[first::BINS].nanmean()) for first in range(BINS)]


def mask_exactly(batch: TextBatch) -> TextBatch:
    """Replace the times of masking, so that the number of masked tokens is not random."""
    t, uniform = fix_mask_counts(batch.t, batch.uniform, batch.frozen)
    return replace(batch, t=t, uniform=uniform)


@dataclass
class Validation:
    """The samples that a run is measured on."""
    maker: BatchMaker
    errors: Callable[[str, Batch], Tensor]      # (loss, batch on the CPU) -> (B,)
    size: int = SAMPLES                         # samples of each loss

    @cached_property
    def samples(self) -> dict[str, list[dict]]:
        """Return the samples of each loss, read at first use, so that a run starts fast."""
        samples = {}
        for name, mix in self.maker.mixes.items():
            samples[name] = mix.shown(self.size, True, name == "image")
        return samples

    @torch.no_grad()
    def measure(self, rank: int, world: int) -> dict:
        """Return the numbers listed at the top of this file.  Collective."""
        results = {}
        if "image" in self.maker.mixes:
            parts = []
            for batch in self.batches("image", rank, world):
                parts.append(self.errors("image", batch)[None])                        # (1, B)
            velocity_errors = self.gather(parts, rank, world)[0]
            results["val_image"] = rounded(velocity_errors.mean())
            results["val_image_t"] = mean_by_bin(velocity_errors)
        parts = []
        for batch in self.batches("text", rank, world):
            batch = mask_exactly(batch)
            bounds = self.errors("text", batch).cpu().double()
            counts = self.count(batch.ids, batch.frozen)
            parts.append(torch.cat([bounds[None], counts]))                       # (3, B)
        bounds, tokens, sizes = self.gather(parts, rank, world)
        results["val_nats"] = rounded(bounds.sum() / tokens.sum())
        results["val_bits"] = rounded(bounds.sum() / sizes.sum() / math.log(2))
        results["val_text_t"] = mean_by_bin(bounds / tokens)
        return results

    def batches(self, name: str, rank: int, world: int) -> Iterator[Batch]:
        """Yield batches of every world-th sample, starting at sample `rank`.

        FSDP2 needs all processes to run the network equally often.  So the first samples are used
        again after the last one, and `gather` drops them."""
        samples = self.samples[name]
        make = self.maker.image_batch if name == "image" else self.maker.text_batch
        count = math.ceil(self.size / world)
        rows = [row % self.size for row in range(rank, count * world, world)]
        for part in chunks(rows, ROWS):
            chosen = [samples[row % len(samples)] for row in part]
            generators = [seeding.seeded("validation", name, row) for row in part]
            yield make(chosen, generators, spread(part, self.size))

    def gather(self, parts: list[Tensor], rank: int, world: int) -> Tensor:
        """Join the parts (k, B) of all processes in the order of samples, (k, size) float64."""
        values = torch.cat(parts, dim=1).cpu().double()
        table = torch.zeros(*values.shape, world, dtype=torch.float64)
        table[:, :, rank] = values
        processes.mean(table).mul_(world)
        return table.flatten(1)[:, :self.size]

    def count(self, ids: Tensor, frozen: Tensor) -> Tensor:
        """Count each text's tokens that may be masked, and its bytes: (B, L) -> (2, B)."""
        special = (self.maker.tokenizer.end_id, self.maker.tokenizer.pad_id)
        sizes = []
        for row, prompt in zip(ids, frozen):
            words = [token for token in row[~prompt].tolist() if token not in special]
            text = self.maker.tokenizer.bpe.decode(words)
            sizes.append(max(1, len(text.encode())))
        return torch.stack([(~frozen).sum(1), torch.tensor(sizes)]).double()
