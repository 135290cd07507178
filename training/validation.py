"""What a run has learnt: the same pictures, texts, times, noise and masks every --eval-every steps.

    val_image      the velocity's error, mean over t ~ U(0, 1)
    val_nats       E_l [1/l sum of the masked tokens' cross-entropies] in nats for each of the n positions that
                   may be masked, padding included; l of them are, 1 to n as likely.  n val_nats is the bound of
                   -log p(text | image) with far less noise than 1/t (LLaDA, arXiv 2502.09992), the entropy for
                   a perfect model.  Padding counts: where it is seen, it tells the length
    val_bits       the bound in bits for each byte of text: tokenizers compare
    val_image_t    the error in each of ten bins of t
    val_text_t     the cross-entropy of a masked token in each, in nats

Pictures are held-out ones where the first source has some, otherwise the first of it.  What is drawn for a
sample depends on its number alone, not on the run, its seed or its processes, so that curves of runs compare.
The averaged weights are measured, with the loss that they were trained with.

Shapes: B samples at once, L tokens.
"""

import math
from functools import cached_property
from typing import Callable, Iterator

import torch
from torch import Tensor

import data
from common import processes, seeding
from mask_diffusion import exactly
from pretrained.tokenizer import Tokenizer

BINS = 10
ROWS = 32               # samples at once
SAMPLES = 160           # images, and texts, of a validation


def spread(rows: list[int], size: int) -> Tensor:
    """A time for each of `size` samples: row i is in bin i mod 10, and its times there are evenly apart."""
    each = -(-size // BINS)
    return torch.tensor([(row % BINS + (row // BINS + 0.5) / each) / BINS for row in rows])


class Validation:
    """`size` samples for each loss of a run.

    make: of each loss, a batch of (samples, generators, times (B,)), as train.py makes it."""

    def __init__(self, mixes: dict[str, data.Mix], make: dict[str, Callable], tokenizer: Tokenizer,
                 size: int = SAMPLES):
        self.mixes, self.make, self.tokenizer, self.size = mixes, make, tokenizer, size

    @cached_property
    def samples(self) -> dict[str, list[dict]]:
        """Of each loss; read when they are first measured on, so that a run starts at once."""
        return {name: mix.shown(self.size, True, name == "image") for name, mix in self.mixes.items()}

    def batches(self, name: str, rank: int, world: int) -> Iterator[tuple[list[int], dict]]:
        """This process's rows, as many as any other's: where they run out the first ones are read again."""
        rows, samples = list(range(rank, world * -(-self.size // world), world)), self.samples[name]
        for some in (rows[at:at + ROWS] for at in range(0, len(rows), ROWS)):
            real = [row % self.size for row in some]
            yield some, self.make[name]([samples[row % len(samples)] for row in real],
                                        [seeding.seeded("validation", name, row) for row in real],
                                        spread(real, self.size))

    @torch.no_grad()
    def measure(self, errors: dict[str, Callable], rank: int, world: int) -> dict:
        """errors: of each loss, those of a batch on the CPU, (B,).  Collective."""
        tables = {name: torch.zeros(3, self.size, dtype=torch.float64) for name in self.samples}
        for name, table in tables.items():
            for rows, made in self.batches(name, rank, world):
                if name == "text":
                    t, uniform = exactly(made["t"], made["uniform"], made["frozen"])
                    made |= dict(t=t, uniform=uniform)
                found = torch.zeros(3, len(rows), dtype=torch.float64)
                found[0] = errors[name](made).cpu().double()
                found[1:] = self.counts(made) if name == "text" else 0
                own = [i for i, row in enumerate(rows) if row < self.size]
                table[:, [rows[i] for i in own]] = found[:, own]
            processes.mean(table).mul_(world)
        found = {}
        if "image" in tables:
            found |= dict(val_image=float(tables["image"][0].mean()),
                          val_image_t=[float(tables["image"][0, b::BINS].mean()) for b in range(BINS)])
        bound, tokens, size = tables["text"]
        found |= dict(val_nats=float(bound.sum() / tokens.sum()),
                      val_bits=float(bound.sum() / size.sum()) / math.log(2),
                      val_text_t=[float((bound / tokens)[b::BINS].mean()) for b in range(BINS)])
        return {name: [round(x, 6) for x in value] if isinstance(value, list) else round(value, 6)
                for name, value in found.items()}

    def counts(self, made: dict) -> Tensor:
        """Return how many tokens of each text may be masked, and the bytes of these, (2, B)."""
        sizes = []
        for ids, frozen in zip(made["ids"], made["frozen"]):
            words = [i for i in ids[~frozen].tolist()
                     if i not in (self.tokenizer.end_id, self.tokenizer.pad_id)]
            sizes.append(max(1, len(self.tokenizer.bpe.decode(words).encode())))
        return torch.stack([(~made["frozen"]).sum(1), torch.tensor(sizes)]).double()
