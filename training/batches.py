"""Make the batches of both losses.  A batch depends only on the run and the step.

Shapes: B rows of this process, L tokens, C latent channels, h and w latent height and width.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Callable

import torch
from torch import Tensor

import data
import flow
import mask_diffusion
from common import seeding
from dataset import sources
from dataset.aspect_buckets import Buckets
from dataset.sources import question_prompt
from pretrained.tokenizer import Tokenizer
from training.config import TrainConfig

VALIDATION_FLOOR = 0.05     # of flow.errors, unless the run's is higher


@dataclass
class Batch:
    """This process's rows of one loss, made on the CPU."""
    images: Tensor | None       # (B, 3, H, W) in [-1, 1], or stored latents (B, C, h, w)
    ids: Tensor                 # (B, L) clean tokens
    t: Tensor                   # (B,) times of the image loss, or of masking

    @property
    def denominator(self) -> int:
        """Return the number by which the loss divides the sum of the errors."""
        raise NotImplementedError

    def map(self, change: Callable[[str, Tensor], Tensor]) -> "Batch":
        """Return a batch with each tensor replaced by change(name, tensor)."""
        changed = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Tensor):
                changed[each.name] = change(each.name, value)
        return replace(self, **changed)

    def move_large_tensors(self, device: torch.device) -> "Batch":
        """Move images, ids, noise and states to the device.

        Masks stay on the CPU, where counting the masked tokens does not wait for the device."""
        def move(name: str, tensor: Tensor) -> Tensor:
            if name not in ("images", "ids", "noise", "states"):
                return tensor
            if device.type == "cuda":
                tensor = tensor.pin_memory()                     # the copy overlaps with kernels
            return tensor.to(device, non_blocking=True)
        return self.map(move)

    def split(self, rows: int) -> list["Batch"]:
        """Split into n micro-batches of `rows` rows; 0: into one.

        Each one takes every n-th row.  Masking times fall from row to row, so neighbouring rows
        could all be almost fully masked, and their logits would need much memory."""
        if not rows:
            return [self]
        count = len(self.ids) // rows
        return [self.map(lambda name, tensor: tensor[first::count]) for first in range(count)]


@dataclass
class ImageBatch(Batch):
    """Images to be noised, with clean captions."""
    noise: Tensor                   # (B, C, h, w)
    dropped: Tensor                 # (B,) bool: the prompt is empty, for guidance
    states: Tensor | None = None    # (B, L, E) T5's, if the data store them
    floor: float = 0.0              # see flow.errors

    @property
    def denominator(self) -> int:
        return len(self.ids)


@dataclass
class TextBatch(Batch):
    """Clean images, or none, with texts to be masked."""
    uniform: Tensor                 # (B, L): a token is masked where this is below t
    frozen: Tensor                  # (B, L) bool: a prompt
    time_weight: str = "1/t"        # a key of mask_diffusion.WEIGHTS

    @property
    def denominator(self) -> int:
        """Return the number of all positions, prompts included, as in the published mean."""
        return self.ids.numel()


Errors = Callable[..., Tensor]      # the errors of a loss: (models, batch) -> (B,)


@dataclass
class StepBatches:
    """The batches of a step, and messages for the log."""
    image: ImageBatch | None
    text: TextBatch
    bad_samples: list[str]          # a message about each sample that another one replaces
    cut_texts: int                  # texts longer than --text-length
    cut_example: str                # what the first one lost, "" if none was cut


@dataclass
class BatchMaker:
    """Make the batches of a run.  Each process has its own maker; only the rank differs."""
    config: TrainConfig
    tokenizer: Tokenizer
    mixes: dict[str, data.Mix]      # "text", and "image" if the stage has that loss
    key: str                        # seeds all draws of this run
    rank: int
    world: int
    channels: int = 3               # of latents
    factor: int = 1                 # pixels per latent, along a side
    stored_states: bool = False     # T5's states of captions come with the samples
    buckets: dict[str, Buckets] = field(default_factory=dict)   # of each mix; {} without --buckets

    def make_buckets(self, patch: int) -> None:
        """Group images by shape, for --buckets.  patch: latents per side of an image token."""
        if self.config.buckets:
            unit = patch * self.factor
            self.buckets = {name: mix.buckets(name, unit) for name, mix in self.mixes.items()}

    def make_batches(self, step: int) -> StepBatches:
        """Make this process's rows of both batches, on the CPU, for steps in any order."""
        config = self.config
        self.tokenizer.cut = 0
        image = None
        if "image" in self.mixes:
            image = self.image_batch(*self.rows(step, config.image_batch, "image"))
        # evenly spaced over the batch; processes take rows in turn, so each has low and high t
        generator = seeding.seeded(self.key, "times", step)
        t = mask_diffusion.draw_times(config.text_batch, generator)
        samples, generators = self.rows(step, config.text_batch, "text")
        text = self.text_batch(samples, generators, t[self.rank::self.world])
        bad_samples = []
        for mix in self.mixes.values():
            bad_samples += mix.newly_bad()
        return StepBatches(image, text, bad_samples, self.tokenizer.cut, self.tokenizer.first_cut)

    def rows(self, step: int, size: int, name: str) -> tuple[list[dict], list[torch.Generator]]:
        """Return the samples of this process's rows of a batch, and a generator for each.

        A row's draws depend on the run and on its position, not on the number of processes."""
        rows = range(self.rank, size, self.world)
        if self.buckets:
            positions, shape = self.buckets[name].rows(step, size, rows)
        else:
            positions, shape = [step * size + row for row in rows], None
        generators = [seeding.seeded(self.key, name, position) for position in positions]
        return self.mixes[name].take(positions, name, shape), generators

    def image_batch(self, samples: list[dict], generators: list[torch.Generator],
                    times: Tensor | None = None) -> ImageBatch:
        """Draw noise and times, and choose captions.  times (B,): replace the drawn ones."""
        config = self.config
        images = sources.latents_of(samples)
        shape = self.latent_shape(images)
        t, noise, dropped, ids = [], [], [], []
        for sample, generator in zip(samples, generators):
            t.append(flow.draw_times(1, generator, config.time_shift, config.times))
            noise.append(torch.randn(shape, generator=generator))
            drop_draw, caption_draw = torch.rand(2, generator=generator).tolist()
            drop = drop_draw < config.text_dropout
            caption = ""
            if not drop:
                caption = sources.choose_caption(sample, config.recaption, caption_draw)
            dropped.append(drop)
            ids.append(self.tokenizer.encode(caption, config.text_length))
        batch = ImageBatch(images, torch.stack(ids), torch.cat(t), torch.cat(noise),
                           torch.tensor(dropped), floor=config.time_floor)
        if times is not None:
            batch.t = times      # t is drawn nevertheless, so that the noise stays the same
        if self.stored_states:
            batch.states = torch.stack([sample["states"] for sample in samples])
        return batch

    def latent_shape(self, images: Tensor) -> tuple[int, ...]:
        """Return the shape (1, C, h, w) of one image's latents, for images or stored latents."""
        _, channels, height, width = images.shape
        are_latents = channels == self.channels                  # or pixels, with a factor of 1
        factor = 1 if are_latents else self.factor
        return 1, self.channels, height // factor, width // factor

    def text_batch(self, samples: list[dict], generators: list[torch.Generator],
                   times: Tensor) -> TextBatch:
        """Choose texts, and draw the numbers that decide which tokens are masked at times (B,)."""
        uniform, ids, frozen = [], [], []
        for sample, generator in zip(samples, generators):
            uniform.append(torch.rand(self.config.text_length, generator=generator))
            row_ids, prompt_length = self.choose_text(sample, generator)
            ids.append(row_ids)
            frozen.append(torch.arange(self.config.text_length) < prompt_length)
        return TextBatch(sources.latents_of(samples), torch.stack(ids), times, torch.stack(uniform),
                         torch.stack(frozen), self.config.text_loss)

    def choose_text(self, sample: dict, generator: torch.Generator) -> tuple[Tensor, int]:
        """Choose a caption, a question with its answer, or plain text.

        Return its ids (L,) and the length of its prompt, which is 0 except for questions."""
        config, tokenizer = self.config, self.tokenizer
        if "ids" in sample:
            return sample["ids"], 0
        question_draw, choice_draw = torch.rand(2, generator=generator).tolist()
        share = config.question_share if config.stage == "instruct" else 0.0
        questions = sample.get("questions")
        captioned = sample["captions"] or sample.get("recaption")
        if questions and (question_draw < share or not captioned):
            question = questions[int(choice_draw * len(questions))]
            prompt = tokenizer.pieces(question_prompt(question["question"]))
            answer = question["answer"]
        else:
            prompt, answer = [], sources.choose_caption(sample, config.recaption, choice_draw)
        ids = tokenizer.fit(prompt + tokenizer.pieces(answer), config.text_length)
        return ids, len(prompt)

    def for_validation(self) -> "BatchMaker":
        """Return a maker without dropped captions or re-captions, and with the weight 1/t.

        `times` must be the same for all runs, too: their draws come before the noise, from the same
        generator."""
        plain = replace(self.config, text_dropout=0.0, recaption=0.0, times="logit-normal",
                        text_loss="1/t", time_floor=max(VALIDATION_FLOOR, self.config.time_floor))
        return replace(self, config=plain)
