"""Rectified flow for images.  Time runs from t = 1 (noise) to t = 0 (data).

    x_t = (1 - t) x + t e,   e ~ N(0, 1);   the network predicts the velocity  v = dx_t/dt = e - x.

This is the image half of L = L_image + lambda L_text in "Dual Diffusion for Unified Image Generation and
Understanding" (arXiv 2501.00289); times and schedule are those of Stable Diffusion 3 (arXiv 2403.03206).
Nothing here knows a network: `velocity` is any callable (x_t, t) -> v.

Shapes: B batch, C latent channels, h and w latent height and width.
"""

from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


def shifted(t: Tensor | float, shift: float) -> Tensor | float:
    """Times moved towards noise, s' = shift s / (1 + (shift - 1) s): the logit grows by log(shift)."""
    return shift * t / (1 + (shift - 1) * t)


def draw(shape: tuple[int, ...], generator: torch.Generator | None = None, shift: float = 1.0,
         times: str = "logit-normal") -> tuple[Tensor, Tensor]:
    """The random part of the loss: times t (B,) in (0, 1) and noise of the given shape (B, ...).

    t = sigmoid(N(0, 1)), SD3's logit-normal: most of the effort goes to the middle, where the velocity is
    hardest to tell.  A shift above 1 moves them towards noise, where what is in a picture is decided (2: the
    middle from 0.5 to 0.67).  times "uniform": t ~ U(0, 1) before the shift.  Drawn apart from the loss so
    that a batch split over processes keeps its draws."""
    device = generator.device if generator is not None else None
    t = torch.sigmoid(torch.randn(shape[0], generator=generator, device=device))  # (B,)
    t = t if times == "logit-normal" else torch.special.ndtr(t.logit())           # N(0, 1)'s quantile
    return shifted(t, shift), torch.randn(shape, generator=generator, device=device)


def errors(velocity: Velocity, x: Tensor, generator: torch.Generator | None = None,
           t: Tensor | None = None, noise: Tensor | None = None, floor: float = 0.0) -> Tensor:
    """Mean over pixels of |v(x_t, t) - (e - x)|^2 for each sample, (B,), in float32 whatever x is.

    floor: of the t in v = (x_t - x) / max(t, floor), for a network that predicts x and divides so; the target
    is divided alike (JiT, arXiv 2511.13720), so that a perfect network's error is 0 at every t.
    x: clean latents (B, C, h, w).  t (B,) and noise (B, C, h, w) are drawn by `draw` unless both are given.
    Raises ValueError when only one of them is."""
    if (t is None) != (noise is None):
        raise ValueError("flow takes t and noise together, or neither")
    if t is None:
        t, noise = draw(tuple(x.shape), generator)
    x, (t, noise) = precise(x), (precise(y).to(x.device, non_blocking=True) for y in (t, noise))
    tt = t.view(-1, *[1] * (x.ndim - 1))                                          # (B, 1, 1, 1)
    v = velocity((1 - tt) * x + tt * noise, t)
    target = noise - x
    if floor:
        target = target * (tt / floor).clamp(max=1)                               # (x_t - x) / max(t, floor)
    return (v.to(x.dtype) - target).square().flatten(1).mean(1)


def loss(velocity: Velocity, x: Tensor, generator: torch.Generator | None = None, **drawn: Tensor) -> Tensor:
    """The mean over the batch of `errors`, a scalar: L_image."""
    return errors(velocity, x, generator, **drawn).mean()


def precise(x: Tensor) -> Tensor:
    """float32 at least: bf16 would make the time 0.501 0.5, and the target off by 2^-9 of itself."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sigmas(steps: int, shift: float = 3.0, least: float = 1e-3) -> Tensor:
    """Noise levels of a walk, (steps + 1,) float32, from 1 down to 0.

    The shift spends more steps at high noise, which large pictures need.  The grid ends at the shifted least
    level and is shifted as a whole, its last level twice: the published scheduler does so, with 1/1000, and
    released weights are sampled with it.  Raises ValueError below one step."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    grid = torch.linspace(1, shifted(least, shift), steps, dtype=torch.float64)
    return torch.cat([shifted(grid, shift), torch.zeros(1, dtype=torch.float64)]).float()


def euler_step(velocity: Velocity, x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x_s = x_t + h v_t, h = s - t: the paper's solver; its error falls like h."""
    return x + (s - t) * v


def heun_step(velocity: Velocity, x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x_s = x_t + h (v_t + v(x_t + h v_t, s)) / 2: an error like h^2 for two evaluations.

    Euler's where less than half of the noise is left (`keeps_half`)."""
    if not keeps_half(float(t), float(s)):
        return euler_step(velocity, x, v, t, s)
    v_s = velocity(euler_step(velocity, x, v, t, s), s.view(1)).to(x)
    return x + (s - t) * ((v + v_s) / 2)


def keeps_half(t: float, s: float) -> bool:
    """Whether a step from t to s leaves at least half of the noise.  Where it leaves less, Heun's second
    velocity, (x - x_clean) / s, would count an error of the predicted clean picture |h| / 2s times."""
    return 2 * s >= t * (1 - 1e-6)


class Solver(NamedTuple):
    """A row of SOLVERS: step(velocity, x_t, v_t, t, s) -> x_s, and how often it asks for the velocity."""
    step: Callable[..., Tensor]
    evaluations: int            # of a step, v_t included


SOLVERS = {"euler": Solver(euler_step, 1), "heun": Solver(heun_step, 2)}


def evaluations(sigmas: Tensor, solver: str) -> int:
    """Return how often a walk along these noise levels asks for the velocity."""
    levels = sigmas.tolist()
    second = sum(keeps_half(t, s) for t, s in zip(levels[:-1], levels[1:])) if solver == "heun" else 0
    return len(levels) - 1 + second


def walk(velocity: Velocity, noise: Tensor, sigmas: Tensor, solver: str = "euler",
         pin: Callable[[Tensor, Tensor], Tensor] | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Integrate dx/dt = v(x, t) from noise at sigmas[0] to data at sigmas[-1]; yields before each step
    (t, x_t, the predicted clean x_t - t v), and in the end (sigmas[-1], x, x).

    `velocity` gets t as a tensor of shape (1,), one time for the batch.  The walk is in float32 at least.
    pin(x, t): what x is put to after each step, where a part of the picture is known.  Raises ValueError for
    an unknown solver."""
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    x = precise(noise)
    sigmas = precise(sigmas).to(noise.device)
    for t, s in zip(sigmas[:-1], sigmas[1:]):
        v = velocity(x, t.view(1)).to(x)
        yield t, x, x - t * v
        x = SOLVERS[solver].step(velocity, x, v, t, s)
        x = pin(x, s) if pin else x
    yield sigmas[-1], x, x


def euler(velocity: Velocity, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Sample with Euler steps, as the paper does, and return x at the last level, of noise's shape."""
    *_, (_, x, _) = walk(velocity, noise, sigmas)
    return x


def guide(velocity: Velocity, scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> Velocity:
    """Classifier-free guidance v = v_null + scale (v_text - v_null), for times in the interval; outside of it
    v_text alone, for half the work (arXiv 2404.07724).

    `velocity` must answer a doubled batch (2B, ...), the text half first, and the text half alone.  Raises
    ValueError for an interval that is reversed."""
    if interval[0] > interval[1]:
        raise ValueError(f"the interval must be from low to high, got {interval}")

    def guided(x: Tensor, t: Tensor) -> Tensor:
        if interval != (0.0, 1.0) and not interval[0] <= float(t) <= interval[1]:
            return velocity(x, t)
        v_text, v_null = velocity(torch.cat([x, x]), t).chunk(2)                  # (B, C, h, w) each
        return v_null + scale * (v_text - v_null)
    return guided
