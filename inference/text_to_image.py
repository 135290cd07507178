"""Draw images from text: from noise, or over another image, parts of which may stay as they are.

    images = draw(parts, ["red apple, noto style"], seed=0, steps=28)      # (1, 3, H, W)
    edit = Edit(latents, strength=0.6)          # begin with that image at t = 0.6
    edit = Edit(latents, mask=mask)             # draw only where the mask is True

t = 1 is noise, t = 0 is the image.  Shapes: B batch, L tokens, E width of text states, C latent
channels, h and w latent height and width, H and W height and width in pixels.
"""

import math
from dataclasses import dataclass, field
from typing import Callable, Iterator, Sequence

import torch
from torch import Tensor

import flow
from common.cli import option
from common.progress import Progress
from inference import compiled
from inference.parts import Parts
from model import T_FLOOR


@dataclass
class DrawConfig:
    """Settings of a drawing; each one is a flag of sample.py.  None: the checkpoint's default."""
    steps: int = option(28, "evaluations of the velocity", low=1)
    solver: str = option("euler", "heun: two evaluations a step", choices=flow.SOLVERS,
                         group="drawing, with --prompt or --prompts")
    guidance_interval: tuple[float, float] = option((0.0, 1.0), "noise levels with guidance",
                                                    low=0, high=1)
    negative_prompt: str = option("", "guide away from this, not from the empty prompt")
    guidance: float | None = option(None, "classifier-free; 1: none (1.5; published 7)", low=0.001)
    shift: float | None = option(None, "towards high noise (1; published 3)", low=0.001)
    batch: int | None = option(None, "images drawn at once (16; published 4)", low=1)
    compile: bool = option(False, "compile the blocks; on a GPU capture a CUDA graph")

    def __post_init__(self):
        low, high = self.guidance_interval
        if low > high:
            raise ValueError(f"--guidance-interval {low:g} {high:g}: expected the lower one first")


@dataclass
class Edit:
    """An image to begin with."""
    latents: Tensor                     # clean, (1, C, h, w)
    strength: float = 1.0               # the t to begin at: 0 returns the image, 1 draws anew
    mask: Tensor | None = None          # (1, 1, h, w), True where to draw; the rest stays

    def noised(self, noise: Tensor, t: Tensor) -> Tensor:
        """Return the image at noise level t, (B, C, h, w)."""
        return (1 - t) * self.latents.to(noise) + t * noise

    def pin(self, noise: Tensor) -> flow.Pin | None:
        """Return the function that keeps the rest of x on its straight line to the noise."""
        if self.mask is None:
            return None
        return lambda x, t: torch.where(self.mask.to(x.device), x, self.noised(noise, t))


@dataclass
class Step:
    """A state of a sampling run, of every image, (C, h, w) each."""
    t: float
    x: list[Tensor] = field(default_factory=list)
    clean: list[Tensor] = field(default_factory=list)       # the image predicted there


@dataclass
class Trace:
    """What `drawings` notes about a sampling run."""
    evaluations: int = 0                # of the network, over all images
    steps: list[Step] | None = None     # a list is filled, with the result as its last step

    def add(self, i: int, state: tuple[Tensor, Tensor, Tensor], count: int) -> None:
        """Add step i of `count` images."""
        if self.steps is None:
            return
        t, x, clean = state
        if i == len(self.steps):
            self.steps.append(Step(float(t)))
        self.steps[i].x += x[:count]
        self.steps[i].clean += clean[:count]


def noise_levels(parts: Parts, config: DrawConfig, edit: Edit | None = None) -> Tensor:
    """Return the noise levels, from 1, or the edit's strength, down to 0.

    `steps` counts evaluations, of which a step of Heun's solver takes two.  A network that predicts
    the clean image is not evaluated below the least t of its training."""
    config = parts.complete(config)
    least = T_FLOOR["train"] if parts.sizes.predicts == "data" else 1e-3
    steps = math.ceil(config.steps / flow.SOLVERS[config.solver].evaluations)
    levels = flow.sigmas(steps, config.shift, least)
    if edit is None:
        return levels
    return torch.cat([torch.tensor([edit.strength]), levels[levels < edit.strength]])


def encode_prompts(parts: Parts, prompts: list[str]) -> dict[str, Tensor]:
    """Return the states (1, L, E) of each text.

    Each one is encoded by itself, so that its rounding does not depend on the others."""
    parts.hold("text")
    states = {}
    for prompt in dict.fromkeys(prompts):
        ids = parts.tokenizer.encode(prompt, parts.length)[None]                  # (1, L)
        states[prompt] = parts.text(ids.to(parts.device))
    return states


def draw_noise(parts: Parts, seeds: Sequence[int]) -> Tensor:
    """Return one noise for each seed, (B, C, h, w), the same in any batch and on any device."""
    shape = (parts.sizes.channels, parts.height // parts.factor, parts.width // parts.factor)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(parts.device)


def text_velocity(network: Callable, text: Tensor, count: int, trace: Trace) -> flow.Velocity:
    """Return the velocity of x (B or 2B, C, h, w) under the first texts of (2B, L, E).

    count: images of the batch that are wanted; a batch may be filled up beyond them."""
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        passes = 2 * len(x) // len(text)                         # 2 with guidance
        trace.evaluations += passes * count
        return network(x, text[:len(x)], t, need="velocity")[0].float()
    return velocity


@torch.no_grad()
def decode(parts: Parts, latents: Tensor) -> Tensor:
    """Decode one image, (C, h, w) -> (3, H, W) on the CPU."""
    return parts.vae.decode(latents[None])[0].float().cpu()


def chunks(items: list, size: int) -> list[list]:
    return [items[at:at + size] for at in range(0, len(items), size)]


def walk(parts: Parts, velocity: flow.Velocity, seeds: Sequence[int], config: DrawConfig,
         edit: Edit | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Return flow.walk from these seeds' noise, or from the edited image, with guidance."""
    levels = noise_levels(parts, config, edit)
    if config.guidance != 1:
        velocity = flow.guide(velocity, config.guidance, config.guidance_interval)
    noise = draw_noise(parts, seeds)                                              # (B, C, h, w)
    if edit is None:
        return flow.walk(velocity, noise, levels, config.solver)
    start = edit.noised(noise, levels[0].to(noise))
    return flow.walk(velocity, start, levels, config.solver, edit.pin(noise))


@torch.no_grad()
def drawings(parts: Parts, prompts: Sequence[str], seeds: Sequence[int], config: DrawConfig,
             edit: Edit | None = None, trace: Trace | None = None) -> Iterator[Tensor]:
    """Yield an image for each prompt and its seed, (3, H, W) in [-1, 1], on the CPU.

    A prompt and a seed give the same image in any batch.  Where the models don't fit in memory
    together, 16 batches are drawn before they are decoded."""
    config = parts.complete(config)
    trace = trace or Trace()
    jobs = list(zip(prompts, seeds, strict=True))
    batch_size = min(config.batch, len(jobs))
    chunk_size = batch_size if parts.keep else 16 * batch_size
    states_to_come = len(noise_levels(parts, config, edit)) * math.ceil(len(jobs) / batch_size)
    progress = Progress("drawing, steps", states_to_come, silent=parts.silent)
    network = None
    for chunk in chunks(jobs, chunk_size):
        states = encode_prompts(parts, [config.negative_prompt] + [prompt for prompt, _ in chunk])
        parts.hold("mmdit")
        if network is None or not parts.keep:
            network = compiled.fast_network(parts.mmdit) if config.compile else parts.mmdit
        finished = []
        for batch in chunks(chunk, batch_size):
            count = len(batch)
            if config.compile:                                   # all batches have one shape
                batch = batch + batch[-1:] * (batch_size - count)
            prompts, seeds = zip(*batch)
            text = [states[prompt] for prompt in prompts + (config.negative_prompt,) * len(batch)]
            velocity = text_velocity(network, torch.cat(text), count, trace)      # (2B, L, E)
            for i, state in enumerate(walk(parts, velocity, seeds, config, edit)):
                trace.add(i, state, count)
                progress.update(progress.done + 1)
            finished += state[1][:count]
        parts.hold("vae")
        for latents in finished:
            yield decode(parts, latents).clamp(-1, 1)


def draw(parts: Parts, prompts: Sequence[str], seed: int = 0, edit: Edit | None = None,
         trace: Trace | None = None, **settings) -> Tensor:
    """Draw a list of prompts with this seed and the next ones, (B, 3, H, W) in [-1, 1].

    settings: fields of DrawConfig."""
    seeds = range(seed, seed + len(prompts))
    images = drawings(parts, prompts, seeds, DrawConfig(**settings), edit, trace)
    return torch.stack(list(images))
