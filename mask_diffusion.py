"""Absorbing-state diffusion for text.  Time runs from t = 1 (all [MASK]) to t = 0 (clean text).

Each token is [MASK] with probability t, independently (MDLM's log-linear schedule, arXiv 2406.07524: survival
1 - t).  The negative evidence bound is then a cross-entropy at the masked positions, weighted 1/t:

    -log p(x) <= E_t [ 1/t * sum_{i masked} -log p(x_i | x_t) ],   t ~ U(0, 1]

This is the text half of L = L_image + lambda L_text (arXiv 2501.00289).  Nothing here knows a network:
`logits_fn` is any callable ids (B, L) -> logits (B, L, V).  It is not told t, since the number of [MASK]s is.

Shapes: B batch, L tokens, V vocabulary, n positions picked out of B x L.
"""

import itertools
from functools import partial
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LogitsFn = Callable[[Tensor], Tensor]
T_MIN = 1e-3  # smallest training time: 1/t would otherwise let one token outweigh the batch


def draw(shape: tuple[int, int], generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """The random part of the loss: times t (B,) in (1e-3, 1] and one uniform number per token (B, L).

    Times are antithetic, one uniform offset plus i/B over the batch, so every batch covers (0, 1] evenly.
    A token is masked where its number is below its row's time."""
    B, device = shape[0], generator.device if generator is not None else None
    offset = torch.rand(1, generator=generator, device=device)
    t = 1 - (offset + torch.arange(B, device=device) / B) % 1                     # (B,) in (0, 1]
    return T_MIN + (1 - T_MIN) * t, torch.rand(shape, generator=generator, device=device)


def errors(logits_fn: LogitsFn, ids: Tensor, mask_id: int, frozen: Tensor | None = None,
           generator: torch.Generator | None = None, t: Tensor | None = None, uniform: Tensor | None = None,
           weight: str = "1/t", picks: bool = False) -> Tensor:
    """1/t-weighted cross-entropy of the clean tokens, summed over each row's masked positions, (B,) float32.

    ids: clean tokens (B, L) int64, padding included: predicting the padding is how the end is learned.
    frozen: (B, L) bool, True at prompt tokens, which are never masked and carry no loss.
    weight "flat": 2 in place of 1/t, as much over all times.
    t (B,), uniform (B, L): from `draw` unless both are given; ValueError when t comes without uniform.
    picks: `logits_fn` is called with ids and the masked tokens, (n,) out of B x L, and gives (n, V).
    """
    if (t is None) != (uniform is None):
        raise ValueError("mask_diffusion takes t and uniform together, or neither")
    if t is None:
        t, uniform = draw(tuple(ids.shape), generator)
    there = partial(Tensor.to, device=ids.device, non_blocking=True)      # draws of a CPU wait for no GPU
    masked = uniform < t[:, None]                                                 # (B, L)
    if frozen is not None:
        masked &= ~frozen.to(masked.device)
    at = masked.flatten().nonzero()[:, 0]                                         # (n,)
    rows, at, noised = there(at // ids.shape[1]), there(at), torch.where(there(masked), mask_id, ids)
    logits = logits_fn(noised, at) if picks else logits_fn(noised).flatten(0, 1)[at]
    found = F.cross_entropy(forbid(logits.float(), mask_id), ids.flatten()[at], reduction="none")    # (n,)
    found = torch.zeros(len(ids), device=ids.device).index_add(0, rows, found)
    return found / there(t) if weight == "1/t" else 2 * found


def loss(logits_fn: LogitsFn, ids: Tensor, mask_id: int, frozen: Tensor | None = None,
         generator: torch.Generator | None = None, **drawn: Tensor) -> Tensor:
    """`errors` per token, masked or not, of those that are not frozen: L_text, a float32 scalar."""
    tokens = ids.numel() if frozen is None else (~frozen).sum().clamp(min=1)
    return errors(logits_fn, ids, mask_id, frozen, generator, **drawn).sum() / tokens


def forbid(logits: Tensor, mask_id: int) -> Tensor:
    """"SUBS": the logit of [MASK] is minus infinity, so [MASK] is never predicted.  (..., V) -> (..., V)."""
    return logits.index_fill(-1, torch.tensor([mask_id]).to(logits.device, non_blocking=True), float("-inf"))


# ------------------------------------------------------------------------------------------ unmasking orders

class Turn(NamedTuple):
    """What an order may go by when it selects the tokens that an evaluation reveals."""
    masked: Tensor                  # (B, L) bool
    when: Tensor                    # (B, L) int64: each token's step in 1 .. steps, drawn by chance
    quota: Tensor                   # (B, 1): how many to reveal so that the last step is in time
    level: float | None             # --level
    p: Tensor | None = None         # (m, V): the distributions of the masked tokens, if the order needs them


def on_canvas(figures: Tensor, masked: Tensor) -> Tensor:
    """Put figures (m,) of the masked tokens in their places, (B, L); minus infinity elsewhere."""
    canvas = torch.full(masked.shape, -torch.inf, dtype=figures.dtype, device=figures.device)
    canvas[masked] = figures
    return canvas


def largest(figures: Tensor, count: Tensor | int) -> Tensor:
    """Mark the `count` (B, 1) largest figures in each row of (B, L), the first ones in a tie."""
    rank = figures.argsort(dim=1, descending=True, stable=True).argsort(1)
    return rank < count


def select_random(turn: Turn) -> Tensor:
    """The tokens whose step comes next: the paper's order, exact in the limit of many steps."""
    never = turn.when.max() + 1
    soonest = torch.where(turn.masked, turn.when, never).amin(1, keepdim=True)    # (B, 1)
    return turn.when == soonest


def select_confidence(turn: Turn) -> Tensor:
    """The tokens with the highest probabilities, evenly over the steps; exact when that is one a step."""
    return largest(on_canvas(turn.p.amax(-1), turn.masked), turn.quota)


def select_threshold(turn: Turn) -> Tensor:
    """All tokens with a probability of at least the level (Fast-dLLM, arXiv 2505.22618); exact at 1."""
    highest = on_canvas(turn.p.amax(-1), turn.masked)
    return (highest >= turn.level) | largest(highest, 1)


def select_entropy_bounded(turn: Turn) -> Tensor:
    """The tokens of least entropy, as many as sum to at most the level, the last one not counted.

    That bounds the error of drawing them independently (arXiv 2505.24857); exact at 0."""
    negative = on_canvas(-torch.special.entr(turn.p).sum(-1), turn.masked)
    entropy = -negative.sort(dim=1, descending=True).values.clamp(min=-1e9)       # finite sums
    before = entropy.cumsum(1) - entropy
    count = (before <= turn.level).sum(1, keepdim=True).clamp(min=1)
    return largest(negative, count)


class Order(NamedTuple):
    """A row of ORDERS."""
    select: Callable[[Turn], Tensor]    # -> (B, L) bool, at least one masked token of each row that has some
    level: float | None = None          # default of --level, None where the order has none
    needs_p: bool = True                # False: it selects before the evaluation, which is asked for no more


# None goes by what is drawn, only by what is known: revealing one token at a time is then an exact draw.
ORDERS = {
    "random": Order(select_random, needs_p=False),
    "confidence": Order(select_confidence),
    "threshold": Order(select_threshold, level=0.99),
    "eb": Order(select_entropy_bounded, level=0.05),
}


# -------------------------------------------------------------------------------------------------- sampling

def exact_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's MPS, which has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def uniforms(shape: tuple[int, int], device: torch.device, generator: torch.Generator | None,
             seeds: list[int] | None) -> Callable[[], Tensor]:
    """Gives numbers in [0, 1), (B, L) float64, anew at each call.  With seeds, one for each row, a row's do
    not depend on the batch that it is in, nor on the device."""
    if seeds is None:
        there = generator.device if generator is not None else device
        exact = exact_dtype(there)
        return lambda: torch.rand(shape, generator=generator, device=there, dtype=exact).to(device)
    rows = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.rand(shape[1], generator=row, dtype=torch.float64)
                                for row in rows]).to(device, exact_dtype(device))


def choose(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """The token of softmax(logits / temperature), (n, V) -> (n,), whose interval of the cumulative
    distribution holds the uniform number (n,), in the logits' precision; at temperature 0 the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    total = (logits / temperature).softmax(-1).cumsum(-1)
    below = torch.nextafter(total[:, -1], torch.zeros_like(total[:, -1]))         # u < 1, and so its product
    return torch.searchsorted(total, (uniform * total[:, -1]).minimum(below)[:, None], right=True)[:, 0]


def closed(ids: Tensor, written: Tensor, ends: Tensor, end: tuple[int, int]) -> Tensor:
    """Rows (B, L) with the end at the first of `ends` (B, L) and padding behind it, where text is written."""
    count = (ends & written).cumsum(1)
    first = (count == 1) & ends & written
    ids = torch.where(first, end[0], ids)
    return torch.where((count > 0) & written & ~first, end[1], ids)


def check(steps: int, temperature: float, order: str, level: float | None = None) -> None:
    """Raise ValueError for settings that no sampler can follow."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    if level is not None and ORDERS[order].level is None:
        raise ValueError(f"order {order} has no level")
    if level is not None and (level <= 0 or order == "threshold" and level > 1):
        most = " and at most 1" if order == "threshold" else ""
        raise ValueError(f"level of order {order} must be above 0{most}, got {level}")


def walk(logits_fn: Callable, ids: Tensor, mask_id: int, steps: int, generator: torch.Generator | None = None,
         temperature: float = 1.0, order: str = "random", picks: bool = False, *, level: float | None = None,
         seeds: list[int] | None = None, end: tuple[int, int] | None = None,
         canvas: float | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Replace every [MASK] of ids (B, L) by a token, other tokens never; yields (step (B,), ids (B, L)) at
    the start and after each evaluation: the step of the walk that each row has reached, and the state.

    order: a row of ORDERS, and its level.  "random" is the published (ancestral) sampler: t goes from 1 to 0
    in `steps` steps, and a masked token is revealed in the step t -> s with probability (t - s)/t, from the
    model's distribution.  That makes the step at which a token is revealed uniform over the steps and
    independent of the model, so it is drawn beforehand.  A row's distribution changes only when the row does,
    and the network has no time input: each row jumps to its own next step that reveals something, and a batch
    costs as many evaluations as its busiest row (at most min(steps, masked tokens)), with the same
    distribution of results as the full walk.

    A token is drawn by one uniform number, inverting the cumulative distribution in float64: float32 noise
    quietly lowers the temperature (arXiv 2409.02908).  generator: of all rows; or seeds, one for each.
    end: (end token, padding); behind an end that is revealed all is padding at once, which changes nothing
    where training texts were padded so.  canvas: the end is put where the first evaluation has it with so
    much probability: that position's marginal is the distribution of the text's length, of which the tail is
    cut off.  picks: `logits_fn` is called with the rows that are not done (n, L), with the tokens that are
    wanted, (m,) out of n x L, and the rows' numbers (n,), and gives (m, V); otherwise with all ids.
    Raises ValueError as `check` says."""
    check(steps, temperature, order, level)
    row = ORDERS[order]
    level = row.level if level is None else level
    ids, written = ids.clone(), ids == mask_id
    fresh = uniforms(tuple(ids.shape), ids.device, generator, seeds)
    when = (fresh() * steps).long() + 1                                           # (B, L) in 1 .. steps
    tokens = fresh()
    exact = exact_dtype(ids.device)
    step = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    yield step, ids.clone()
    for evaluation in itertools.count():
        masked = ids == mask_id                                                   # (B, L)
        live = masked.any(1).nonzero()[:, 0]
        if not len(live):
            return
        quota = -(-masked.sum(1, keepdim=True) // max(1, steps - evaluation))     # (B, 1) rounded up
        turn = Turn(masked, when, quota, level)
        first_canvas = canvas is not None and evaluation == 0
        chosen = None if row.needs_p else masked & row.select(turn)
        wanted = masked if row.needs_p or first_canvas else chosen                # whose logits are asked for
        at = wanted[live].flatten().nonzero()[:, 0]                               # (m,) out of n x L
        logits = logits_fn(ids[live], at, live) if picks else logits_fn(ids)[live].flatten(0, 1)[at]
        logits = forbid(logits.to(exact), mask_id)                                # (m, V)
        drawn = torch.zeros_like(ids)
        drawn[wanted] = choose(logits, temperature, tokens[wanted])
        if row.needs_p:
            chosen = masked & row.select(turn._replace(p=logits.softmax(-1)))
            step = torch.full_like(step, evaluation + 1)
        else:
            step = torch.where(masked, when, steps).amin(1)                       # (B,) each row's next event
        ids = torch.where(chosen, drawn, ids)
        if end and first_canvas:
            ends = torch.zeros_like(masked)
            ends[wanted] = logits.softmax(-1)[:, end[0]] >= canvas
            ids = closed(ids, written, ends, end)
        if end:
            ids = closed(ids, written, ids == end[0], end)
        yield step, ids.clone()


def sample(logits_fn: Callable, ids: Tensor, mask_id: int, steps: int,
           generator: torch.Generator | None = None, temperature: float = 1.0, order: str = "random",
           picks: bool = False, trajectory: list | None = None, **how) -> Tensor:
    """The end of `walk`, (B, L); without more arguments the paper's sampler.  `trajectory`, when given, is
    filled with all that the walk yields."""
    for state in walk(logits_fn, ids, mask_id, steps, generator, temperature, order, picks, **how):
        if trajectory is not None:
            trajectory.append(state)
    return state[1]


def guide(logits_fn: Callable, null_fn: Callable, scale: float, mask_id: int) -> Callable:
    """Classifier-free guidance of text: log p_null + scale (log p - log p_null), both normalised first.

    `logits_fn` and `null_fn`, with the picture and without it, are called as `walk` calls with picks."""
    def guided(ids: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        exact = exact_dtype(ids.device)
        known, null = (forbid(given(ids, at, rows).to(exact), mask_id).log_softmax(-1)
                       for given in (logits_fn, null_fn))
        return known + (scale - 1) * (known - null).nan_to_num(0.0)               # of [MASK]: inf - inf
    return guided


def exactly(t: Tensor, uniform: Tensor, frozen: Tensor) -> tuple[Tensor, Tensor]:
    """t (B,) and uniform (B, L) for `errors` so that of a row's n tokens that are not frozen exactly l, l =
    ceil(t n), are masked, in place of each with probability t; the weight 1/t is then n/l."""
    n = (~frozen).sum(1, keepdim=True)                                            # (B, 1)
    rank = uniform.masked_fill(frozen, 2).argsort(1).argsort(1)
    l = (t[:, None] * n).ceil().clamp(min=1)
    return (l / n)[:, 0], (rank + 0.5) / n


def likelihood(logits_fn: Callable, ids: Tensor, mask_id: int, frozen: Tensor | None = None,
               levels: int = 64, generator: torch.Generator | None = None) -> tuple[float, float]:
    """The bound of -log p of one text (L,), in nats, and its standard error; `logits_fn` as in `errors` with
    picks, for `levels` rows.

        -log p(x) <= E_l [ n/l sum of the masked tokens' cross-entropies ],   l of n tokens are masked

    l is spread evenly over 1 .. n: far less noise than by 1/t (LLaDA, arXiv 2502.09992, appendix B)."""
    frozen = torch.zeros_like(ids, dtype=torch.bool) if frozen is None else frozen
    rows, blocked = ids.expand(levels, -1), frozen.cpu().expand(levels, -1)
    if blocked.all():
        return 0.0, 0.0
    offset = torch.rand(1, generator=generator)
    t = (offset + torch.arange(levels)) / levels
    t, uniform = exactly(t, torch.rand(blocked.shape, generator=generator), blocked)
    found = errors(logits_fn, rows, mask_id, blocked, t=t, uniform=uniform, picks=True).cpu().double()
    return float(found.mean()), float(found.std() / levels ** 0.5)
