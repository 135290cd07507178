"""Draw images from text, from noise or over another image; a mask keeps parts of that image.

    images = draw(parts, ["red apple, noto style"], seed=0, steps=28)      # (1, 3, H, W)
    edit = Edit(latents, strength=0.6)          # start from that image at t = 0.6
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
from common.progress import Progress, chunks
from inference import compiled
from inference.parts import Parts

# the lowest noise level above 0, before the shift, by what the network predicts.  Models that
# predict clean images have trained little below it (--time-floor)
LOWEST = dict(data=0.05, velocity=1e-3)


@dataclass
class DrawConfig:
    """Settings of a drawing; each one is a flag of sample.py.  None: the checkpoint's default."""
    steps: int = option(28, "largest number of velocity evaluations", low=1, high=10**5)
    solver: str = option("euler", "a heun step takes up to two evaluations", choices=flow.SOLVERS,
                         group="drawing, with --prompt or --prompts")
    guidance_interval: tuple[float, float] = option((0.0, 1.0), "guide between these noise levels",
                                                    low=0, high=1)
    negative_prompt: str = option("", "guide away from this, not from the empty prompt")
    guidance: float | None = option(None, "guidance scale; 1: none (a run's own, or 1.5; published "
                                    "7)", low=0.001, high=1000)
    shift: float | None = option(None, "shift towards high noise (a run's own, or 1; published 3)",
                                 low=0.001, high=1000)
    batch: int | None = option(None, "images drawn at once (16; published 4)", low=1, high=10**5)
    compile: bool = option(False, "compile the blocks, on a CPU with a C++ compiler; on a GPU "
                           "capture a CUDA graph")

    def __post_init__(self):
        flow.find_solver(self.solver)                            # raises ValueError
        low, high = self.guidance_interval
        self.guidance_interval = (low, high)
        if low > high:
            raise ValueError(f"guidance interval {low:g} {high:g}: expected the lower level first")
        if self.guidance == 1 and (self.negative_prompt or self.guidance_interval != (0, 1)):
            raise ValueError("guidance 1 is none: a negative prompt or an interval changes nothing")


@dataclass
class Edit:
    """An image to start from."""
    latents: Tensor                     # clean, (1, C, h, w)
    strength: float = 1.0               # the t to start at: 0 returns the image, 1 ignores it
    mask: Tensor | None = None          # (1, 1, h, w), True where to draw; the rest stays

    def noised(self, noise: Tensor, t: Tensor) -> Tensor:
        """Return the image at noise level t, (B, C, h, w)."""
        return (1 - t) * self.latents.to(noise) + t * noise

    def pin(self, noise: Tensor) -> flow.Pin | None:
        """Return a function that keeps x outside the mask on the straight line to the noise."""
        if self.mask is None:
            return None
        return lambda x, t: torch.where(self.mask.to(x.device), x, self.noised(noise, t))


@dataclass
class Step:
    """All images of a sampling run at one noise level, (C, h, w) each."""
    t: float
    x: list[Tensor] = field(default_factory=list)
    clean: list[Tensor] = field(default_factory=list)       # predicted at t


@dataclass
class Trace:
    """A record of a sampling run, which `drawings` fills in."""
    evaluations: int = 0                # of the network, over all images
    steps: list[Step] | None = None     # None: not recorded; the last step is the result

    def add(self, i: int, t: Tensor, x: Tensor, clean: Tensor) -> None:
        """Add step i of a batch, (B, C, h, w) each."""
        if self.steps is None:
            return
        if i == len(self.steps):
            self.steps.append(Step(float(t)))
        self.steps[i].x += x
        self.steps[i].clean += clean


def noise_levels(parts: Parts, config: DrawConfig, edit: Edit | None = None) -> Tensor:
    """Return the noise levels, from 1, or the edit's strength, down to 0.

    config.steps limits the evaluations: a step of Heun's solver takes up to two, and an edit leaves
    out the levels above its strength."""
    config = parts.complete(config)
    steps = math.ceil(config.steps / flow.SOLVERS[config.solver].evaluations)
    levels = flow.sigmas(steps, config.shift, LOWEST[parts.sizes.predicts])
    if edit is None:
        return levels
    return torch.cat([torch.tensor([edit.strength]), levels[levels < edit.strength]])


def encode_prompts(parts: Parts, prompts: list[str]) -> dict[str, Tensor]:
    """Return the text states (1, L, E) of each prompt.

    Each one is encoded by itself, so that its rounding does not depend on the others."""
    parts.hold("text")
    states = {}
    for prompt in dict.fromkeys(prompts):
        ids = parts.tokenizer.encode(prompt, parts.length)[None]                  # (1, L)
        states[prompt] = parts.text(ids.to(parts.device))
    return states


def draw_noise(parts: Parts, seeds: Sequence[int]) -> Tensor:
    """Return noise (B, C, h, w), one row for each seed, the same in any batch and on any device."""
    shape = (parts.sizes.channels, parts.height // parts.factor, parts.width // parts.factor)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(parts.device)


def text_velocity(network: Callable, text: Tensor, count: int, trace: Trace) -> flow.Velocity:
    """Return the velocity as a function of (x, t).

    text: (2B, L, E), B prompts and then B negative prompts.  2B images use all of them, B images
    only the prompts.  count: the images of the batch that trace.evaluations counts, at most B."""
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        passes = 2 * len(x) // len(text)                         # 2 with guidance
        trace.evaluations += passes * count
        return network(x, text[:len(x)], t, need="velocity")[0].float()
    return velocity


@torch.no_grad()
def decode(parts: Parts, latents: Tensor) -> Tensor:
    """Decode one image, (C, h, w) -> (3, H, W) on the CPU."""
    return parts.vae.decode(latents[None])[0].float().cpu()


def choose_network(parts: Parts, config: DrawConfig) -> Callable:
    if config.compile:
        return compiled.fast_network(parts.mmdit)
    return parts.mmdit


def make_batch(parts: Parts, jobs: list[tuple[str, int]], size: int, states: dict[str, Tensor],
               config: DrawConfig) -> tuple[Tensor, Tensor]:
    """Return the text states (2B, L, E) of B prompts and B negative prompts, and noise (B, C, h, w).

    B is the number of jobs, or `size` for a compiled network, which needs one shape."""
    if config.compile:
        jobs = jobs + jobs[-1:] * (size - len(jobs))
    prompts = [prompt for prompt, _ in jobs] + [config.negative_prompt] * len(jobs)
    text = torch.cat([states[prompt] for prompt in prompts])
    return text, draw_noise(parts, [seed for _, seed in jobs])


def walk(velocity: flow.Velocity, noise: Tensor, levels: Tensor, config: DrawConfig,
         edit: Edit | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Return flow.walk from the noise (B, C, h, w), or from the edited image, with guidance."""
    if config.guidance != 1:
        velocity = flow.guide(velocity, config.guidance, config.guidance_interval)
    if edit is None:
        return flow.walk(velocity, noise, levels, config.solver)
    start = edit.noised(noise, levels[0].to(noise))
    return flow.walk(velocity, start, levels, config.solver, edit.pin(noise))


@torch.no_grad()
def drawings(parts: Parts, prompts: Sequence[str], seeds: Sequence[int], config: DrawConfig,
             edit: Edit | None = None, trace: Trace | None = None) -> Iterator[Tensor]:
    """Yield an image for each prompt and its seed, (3, H, W) in [-1, 1], on the CPU.

    In float32, a prompt and a seed give the same image in any batch.  In bfloat16, a CPU may round
    differently in another batch, by up to 8 of 255 levels (AMX).  If the models don't fit in memory
    together, 16 batches are drawn before they are decoded."""
    config = parts.complete(config)
    trace = trace or Trace()
    jobs = list(zip(prompts, seeds, strict=True))
    batch_size = min(config.batch, len(jobs) or 1)
    chunk_size = batch_size if parts.keep else 16 * batch_size
    levels = noise_levels(parts, config, edit)
    batches = math.ceil(len(jobs) / batch_size)
    progress = Progress("drawing, steps", (len(levels) - 1) * batches, silent=parts.silent)
    network = None
    for chunk in chunks(jobs, chunk_size):
        states = encode_prompts(parts, [config.negative_prompt] + [prompt for prompt, _ in chunk])
        parts.hold("mmdit")
        network = network or choose_network(parts, config)
        finished = []
        for batch in chunks(chunk, batch_size):
            count = len(batch)
            text, noise = make_batch(parts, batch, batch_size, states, config)
            velocity = text_velocity(network, text, count, trace)
            for i, (t, x, clean) in enumerate(walk(velocity, noise, levels, config, edit)):
                trace.add(i, t, x[:count], clean[:count])
                if i > 0:                                        # the first state is the noise
                    progress.advance()
            finished.extend(x[:count])
        if not parts.keep:                                       # free it for the autoencoder
            network = velocity = None
        parts.hold("vae")
        for latents in finished:
            yield decode(parts, latents).clamp(-1, 1)


def draw(parts: Parts, prompts: Sequence[str], seed: int = 0, edit: Edit | None = None,
         trace: Trace | None = None, **settings) -> Tensor:
    """Return an image for each prompt, with this seed and the next ones, (B, 3, H, W) in [-1, 1].

    settings: fields of DrawConfig."""
    seeds = range(seed, seed + len(prompts))
    images = drawings(parts, prompts, seeds, DrawConfig(**settings), edit, trace)
    return torch.stack(list(images))
