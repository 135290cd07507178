"""What a step learns from: the batches of both losses, a function of the run and the step alone.

Shapes: B rows of this process, L tokens, C latent channels, h and w latent height and width.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

import data
import flow
import mask_diffusion
from common import seeding
from dataset import questions, sources
from dataset.aspect_buckets import Buckets
from dataset.questions import question_prompt
from pretrained.tokenizer import Tokenizer
from training.config import TrainConfig
from training.validation import Validation


def image_batch(config: TrainConfig, held: "BatchMaker", samples: list[dict], draws: list[torch.Generator],
                times: Tensor | None = None) -> dict:
    """Noised pictures with clean captions, now and then with none; times (B,) in place of drawn ones."""
    images = sources.latents_of(samples)
    shape = held.latent_shape(images)
    t, noise = map(torch.cat, zip(*(flow.draw(shape, generator, config.time_shift, config.times)
                                         for generator in draws)))
    t = t if times is None else times
    chances = [torch.rand(2, generator=generator).tolist() for generator in draws]
    dropped = torch.tensor([drop < config.text_dropout for drop, _ in chances])
    texts = ["" if none else sources.choose_caption(sample, config.recaption, chance)
             for sample, none, (_, chance) in zip(samples, dropped, chances)]
    ids = torch.stack([held.tokenizer.encode(text, config.text_length) for text in texts])
    made = dict(images=images, ids=ids, dropped=dropped, t=t, noise=noise, count=len(ids))
    return made | ({"states": torch.stack([sample["states"] for sample in samples])} if held.stated else {})


def text_batch(config: TrainConfig, held: "BatchMaker", samples: list[dict], draws: list[torch.Generator],
               times: Tensor) -> dict:
    """Clean pictures, or none, with texts to be masked, each with its probability, times (B,)."""
    uniform = torch.stack([torch.rand(config.text_length, generator=generator) for generator in draws])
    pairs = [text_sample(held.tokenizer, *row, config) for row in zip(samples, draws)]
    ids, frozen = map(torch.stack, zip(*pairs))                                   # (B, L) each
    # the published mean is over all B L positions, prompts included
    return dict(images=sources.latents_of(samples), ids=ids, frozen=frozen, t=times, uniform=uniform,
                count=ids.numel(), mask_id=held.tokenizer.mask_id, weight=config.text_loss)


def text_sample(tokenizer: Tokenizer, sample: dict, generator: torch.Generator,
                config: TrainConfig) -> tuple[Tensor, Tensor]:
    """ids (L,), and frozen (L,), True at the prompt: a caption or, in `instruct`, now and then a question;
    or a piece of plain text."""
    if "ids" in sample:
        return sample["ids"], torch.zeros(config.text_length, dtype=torch.bool)
    ask, which = torch.rand(2, generator=generator).tolist()
    questions, share = sample.get("questions"), config.question_share if config.stage == "instruct" else 0.0
    if questions and (ask < share or not sample["captions"]):
        asked = questions[int(which * len(questions))]
        prompt, answer = tokenizer.pieces(question_prompt(asked["question"])), asked["answer"]
    else:
        prompt, answer = [], sources.choose_caption(sample, config.recaption, which)
    ids = tokenizer.fit(prompt + tokenizer.pieces(answer), config.text_length)
    return ids, torch.arange(config.text_length) < len(prompt)


@dataclass
class BatchMaker:
    """What batches are made of, the same on every process."""
    tokenizer: Tokenizer
    mixes: dict[str, data.Mix]      # "image" and "text", or the latter alone
    key: str                        # of all draws of this run
    rank: int
    world: int
    channels: int = 3               # of latents
    factor: int = 1                 # pixels per latent, along a side
    stated: bool = False            # T5's states of captions are stored
    buckets: dict[str, Buckets] = field(default_factory=dict)   # of each mix, where pictures are not square

    def latent_shape(self, images: Tensor) -> tuple[int, ...]:
        """(1, C, h, w) of what the model diffuses for a batch of pictures, or of latents that are stored."""
        factor = self.factor if images.shape[1] != self.channels else 1
        return 1, self.channels, images.shape[2] // factor, images.shape[3] // factor

    def rows(self, step: int, size: int, name: str) -> tuple[list[dict], list[torch.Generator]]:
        """The samples of this process's rows of a global batch, and a generator for each: what is drawn with
        it depends on the run and on the row's position alone, whatever the number of processes."""
        rows = range(self.rank, size, self.world)
        positions, shape = [step * size + row for row in rows], None
        if self.buckets:
            positions, shape = self.buckets[name].rows(step, size, rows)
        return (self.mixes[name].take(positions, name, shape),
                [seeding.seeded(self.key, name, position) for position in positions])

    def validation(self, config: TrainConfig) -> Validation:
        """What this run is measured on, in the same way whatever the losses that it learns by."""
        plain = replace(config, text_dropout=0.0, recaption=0.0, text_loss="1/t")
        make = dict(image=partial(image_batch, plain, self), text=partial(text_batch, plain, self))
        return Validation(self.mixes, make, self.tokenizer)

    def batches(self, config: TrainConfig, step: int) -> dict:
        """This process's rows of both global batches, on the CPU, what samples were of no use for them, and
        what was lost of each text that was cut: a function of the step alone, so that it can be made ahead,
        anywhere."""
        self.tokenizer.cut, made = 0, {}
        if "image" in self.mixes:
            made["image"] = image_batch(config, self, *self.rows(step, config.image_batch, "image"))
        # antithetic over the global batch; dealt out row by row, each process has early and late times
        t, _ = mask_diffusion.draw((config.text_batch, 0), seeding.seeded(self.key, "times", step))
        made["text"] = text_batch(config, self, *self.rows(step, config.text_batch, "text"),
                                  t[self.rank::self.world])
        return made | dict(bad=[name for mix in self.mixes.values() for name in mix.newly_bad()],
                           cut=[self.tokenizer.lost] * self.tokenizer.cut)


def on_device(batch: dict, device: torch.device) -> dict:
    """With what is large there; times and masks stay on the CPU, so that nothing waits to learn of them."""
    large = {key: batch[key] for key in ("images", "ids", "states", "noise") if batch.get(key) is not None}
    pinned = lambda x: x.pin_memory() if device.type == "cuda" else x            # copied while others compute
    return batch | {key: pinned(x).to(device, non_blocking=True) for key, x in large.items()}


def micro_batches(batch: dict, size: int) -> list[dict]:
    """Return a batch in parts of `size` rows; 0: as one.

    Each part takes every so-manieth row: times of masking fall from row to row, and a part of neighbours could
    have nearly all of its tokens masked, whose logits it would hold at once."""
    rows = len(batch["ids"])
    count = rows // size if size else 1
    return [{name: x[first::count] if isinstance(x, Tensor) else x for name, x in batch.items()}
            for first in range(count)]
