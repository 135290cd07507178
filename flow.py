"""Rectified flow for images.  Time runs from t = 1 (noise) to t = 0 (data).

    x_t = (1 - t) x + t e,   e ~ N(0, 1);   the network predicts the velocity  v = dx_t/dt = e - x.

This is the image half of L = L_image + lambda L_text in "Dual Diffusion for Unified Image
Generation and Understanding" (arXiv 2501.00289).  Times and noise levels are those of Stable
Diffusion 3 (arXiv 2403.03206).  This file does not depend on the network: `velocity` is any
callable (x_t, t) -> v.

Shapes: B batch, C latent channels, h and w latent height and width.
"""

from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
Pin = Callable[[Tensor, Tensor], Tensor]


def at_least_float32(x: Tensor) -> Tensor:
    """Convert x to float32, or keep a wider dtype: bfloat16 would round a time of 0.501 to 0.5."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_image(t: Tensor, x: Tensor) -> Tensor:
    """Reshape times (B,) to (B, 1, 1, 1), so that they multiply images x (B, C, h, w)."""
    return t.view(-1, *[1] * (x.ndim - 1))


# ------------------------------------------------------------------------------------ training

def device_of(generator: torch.Generator | None) -> torch.device | None:
    return generator.device if generator else None


def logit_normal_times(batch: int, generator: torch.Generator | None) -> Tensor:
    """Draw times (B,) as SD3 does: most near 0.5, few near the ends."""
    return torch.sigmoid(torch.randn(batch, generator=generator, device=device_of(generator)))


def uniform_times(batch: int, generator: torch.Generator | None) -> Tensor:
    """Draw times (B,), uniform in [0, 1)."""
    return torch.rand(batch, generator=generator, device=device_of(generator))


# Training draws the time of each image separately (batch = 1), so that its draws depend on no other
# image.  A function here can therefore not spread the times over a batch.
TIMES = {
    "logit-normal": logit_normal_times,
    "uniform": uniform_times,
}


def shifted(t: Tensor | float, shift: float) -> Tensor | float:
    """Move times towards noise, for a shift above 1: add log(shift) to the logit of t."""
    return shift * t / (1 + (shift - 1) * t)


def draw_times(batch: int, generator: torch.Generator | None = None, shift: float = 1.0,
               times: str = "logit-normal") -> Tensor:
    """Draw training times t (B,) in [0, 1].  times: a key of TIMES.

    A shift above 1 moves them towards noise, where the content of an image is decided: a shift of 2
    moves the median from 0.5 to 0.67."""
    return shifted(TIMES[times](batch, generator), shift)


def errors(velocity: Velocity, x: Tensor, t: Tensor, noise: Tensor, floor: float = 0.0) -> Tensor:
    """Return |v(x_t, t) - (e - x)|^2, averaged over each image's values, (B,) float32.

    x: clean latents (B, C, h, w).
    t (B,) and noise (B, C, h, w) are drawn by the caller, so that a batch keeps its draws when it
    is split over processes.
    floor: weigh times below it by (t / floor)^2.  The squared error of v is that of x, divided by
    t^2: without a floor, a network that predicts x would learn most from the images with hardly
    any noise."""
    x = at_least_float32(x)
    t = at_least_float32(t).to(x.device, non_blocking=True)
    noise = at_least_float32(noise).to(x.device, non_blocking=True)

    t_image = per_image(t, x)
    x_t = (1 - t_image) * x + t_image * noise
    target = noise - x
    predicted = velocity(x_t, t).to(x.dtype)
    error = (predicted - target).square().flatten(1).mean(1)
    if floor:
        error = error * (t / floor).clamp(max=1).square()
    return error


def loss(velocity: Velocity, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return L_image, the mean of `errors` over a batch x (B, C, h, w), a scalar.

    train.py computes the same from `errors`, in micro-batches and with draws of its own."""
    t = draw_times(len(x), generator)
    noise = torch.randn(x.shape, generator=generator, device=device_of(generator))
    return errors(velocity, x, t, noise).mean()


# ------------------------------------------------------------------------------------ sampling

def sigmas(steps: int, shift: float = 3.0, least: float = 1e-3) -> Tensor:
    """Return the noise levels of a sampling run, (steps + 1,) float32, from 1 down to 0.

    The shift places more steps at high noise, which large images need.  The lowest level above 0 is
    shifted(shifted(least)): SD3's published scheduler, with which the released weights are sampled,
    shifts it once to end the grid there, and then shifts the grid.  Raises ValueError for fewer
    than one step."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    grid = torch.linspace(1, shifted(least, shift), steps, dtype=torch.float64)
    levels = shifted(grid, shift)
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)]).float()


def euler_step(velocity: Velocity, x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Take an Euler step from t to s, as the paper does; the error is of first order.

    x, v: (B, C, h, w).  t, s: scalars."""
    return x + (s - t) * v


def heun_step(velocity: Velocity, x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Take a Heun step, with the mean velocity of t and s; the error is of second order.

    If the step removes more than half of the noise, take an Euler step instead."""
    x_s = euler_step(velocity, x, v, t, s)
    if not leaves_half(float(t), float(s)):
        return x_s
    v_s = velocity(x_s, s.view(1)).to(x)
    return x + (s - t) * ((v + v_s) / 2)


def leaves_half(t: float, s: float) -> bool:
    """Return True if a step from t to s leaves at least half of the noise.

    In a larger step, Heun's second velocity, (x - x_clean) / s, would multiply an error of the
    predicted clean image by |s - t| / 2s, which is more than 1/2."""
    return 2 * s >= t * (1 - 1e-6)


class Solver(NamedTuple):
    """A row of SOLVERS."""
    step: Callable[..., Tensor]     # step(velocity, x_t, v_t, t, s) -> x_s
    evaluations: int                # of the velocity in a step, at most; v_t included


SOLVERS = {
    "euler": Solver(euler_step, 1),
    "heun": Solver(heun_step, 2),
}


def find_solver(name: str) -> Solver:
    """Return a row of SOLVERS.  Raises ValueError for an unknown name."""
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {name!r}")
    return SOLVERS[name]


def walk(velocity: Velocity, noise: Tensor, sigmas: Tensor, solver: str = "euler",
         pin: Pin | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Integrate dx/dt = v(x, t) from noise at sigmas[0] to data at sigmas[-1].

    Yield (t, x_t, the clean image predicted at t) before each step, and (sigmas[-1], x, x) at the
    end.  `velocity` receives t of shape (1,), one time for the whole batch.  pin(x, t), if given,
    returns a replacement of x after each step, to keep a part of an image.  Raises ValueError for
    an unknown solver."""
    step = find_solver(solver).step
    x = at_least_float32(noise)
    sigmas = at_least_float32(sigmas).to(noise.device)
    for t, s in zip(sigmas[:-1], sigmas[1:]):
        v = velocity(x, t.view(1)).to(x)
        yield t, x, x - t * v
        x = step(velocity, x, v, t, s)
        if pin:
            x = pin(x, s)
    yield sigmas[-1], x, x


def euler(velocity: Velocity, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Sample with Euler steps, as the paper does, and return x at the last level."""
    for _, x, _ in walk(velocity, noise, sigmas):
        pass
    return x


def guide(velocity: Velocity, scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> Velocity:
    """Return the velocity of classifier-free guidance, v_null + scale (v_text - v_null).

    At times outside the interval it is v_text, at half the cost (arXiv 2404.07724).  Inside the
    interval, `velocity` receives 2B images: the first B use the text, the others the null text.
    Outside, it receives B images, which use the text.  Raises ValueError if the interval is
    reversed."""
    low, high = interval
    if low > high:
        raise ValueError(f"the interval must be from low to high, got {interval}")
    everywhere = interval == (0.0, 1.0)          # if so, skip float(t): it waits for the GPU

    def guided(x: Tensor, t: Tensor) -> Tensor:
        if not everywhere and not low <= float(t) <= high:
            return velocity(x, t)
        v_text, v_null = velocity(torch.cat([x, x]), t).chunk(2)                 # (B, C, h, w) each
        return v_null + scale * (v_text - v_null)
    return guided
