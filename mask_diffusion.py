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
from typing import Callable, Iterator

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
           unscored: Tensor | None = None, weight: str = "1/t", picks: bool = False) -> Tensor:
    """1/t-weighted cross-entropy of the clean tokens, summed over each row's masked positions, (B,) float32.

    ids: clean tokens (B, L) int64, padding included: predicting the padding is how the end is learned.
    frozen: (B, L) bool, True at prompt tokens, which are never masked and carry no loss; unscored: at tokens
    that are masked like others and carry none.  weight "flat": 2 in place of 1/t, as much over all times.
    t (B,), uniform (B, L): from `draw` unless both are given; ValueError when t comes without uniform.
    picks: `logits_fn` is called with ids and the tokens that are scored, (n,) out of B x L, and gives (n, V).
    """
    if (t is None) != (uniform is None):
        raise ValueError("mask_diffusion takes t and uniform together, or neither")
    if t is None:
        t, uniform = draw(tuple(ids.shape), generator)
    there = partial(Tensor.to, device=ids.device, non_blocking=True)      # draws of a CPU wait for no GPU
    masked = uniform < t[:, None]                                                 # (B, L)
    if frozen is not None:
        masked &= ~frozen.to(masked.device)
    scored = masked if unscored is None else masked & ~unscored.to(masked.device)
    at = scored.flatten().nonzero()[:, 0]                                         # (n,)
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


# Which masked tokens are revealed after an evaluation.  The surest are so by a figure of their distribution,
# never of what is drawn from it, so that one at a time is an exact draw from the joint, whatever the order.
#
#   order       revealed                                                                exact in the limit of
#   random      whose step has come: uniform over `steps`, drawn beforehand; the paper's   many steps
#   confidence  the surest by their highest p: `per_step`, or evenly over `steps`          one a step
#   margin      the surest by p(1st) - p(2nd) (arXiv 2502.06768), as many                  one a step
#   entropy     the surest by their entropy (arXiv 2508.15487), as many                    one a step
#   threshold   all whose highest p >= level (Fast-dLLM, arXiv 2505.22618)                 level 1
#   factor      the most n whose n-th highest p >= 1 - level / (n + 1) (the same)          level 0
#   eb          the most whose entropies, but for the last, sum to <= level (2505.24857)   level 0
#   remask      as random, by chance at each step; and what was revealed is masked again   many steps of
#               with probability min(level, (1 - a_s) / a_t) (ReMDM, arXiv 2503.00307)     small level
#
# threshold, factor and eb reveal the surest one where none passes.
LEVELS = dict(random=None, confidence=None, margin=None, entropy=None, threshold=0.99, factor=0.1, eb=0.05,
              remask=0.05)
ORDERS = list(LEVELS)


def sureness(logits: Tensor, order: str) -> Tensor:
    """The figure that an order goes by, of masked tokens' logits (m, V), (m,)."""
    p = logits.softmax(-1)
    if order in ("entropy", "eb"):
        return torch.special.entr(p).sum(-1).neg()
    if order == "margin":
        return p.topk(2).values.diff().neg()[:, 0]
    return p.amax(-1)


def at_once(ranked: Tensor, order: str, level: float | None, quota: Tensor) -> Tensor:
    """How many are revealed, at least one, (n,): ranked (n, L) has each row's figures, the surest first and
    -inf behind the last [MASK]; quota (n,) is what `steps` or `per_step` give."""
    place = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
    if order == "threshold":
        fits = ranked >= level
    elif order == "factor":
        fits = ranked >= 1 - level / (place + 1)
    elif order == "eb":
        entropy = ranked.neg().clamp(max=1e9)                    # finite, so that the sums are
        fits = (entropy.cumsum(1) - entropy <= level) & ranked.isfinite()
    else:
        fits = place <= quota[:, None]
    return (fits * place).amax(1).clamp(min=1)


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


def choose(logits: Tensor, temperature: float, uniform: Tensor, top_p: float = 1.0) -> Tensor:
    """The token of softmax(logits / temperature), (n, V) -> (n,), whose interval of the cumulative
    distribution holds the uniform number (n,), in the logits' precision; at temperature 0 the likeliest.

    top_p: out of the fewest tokens that have so much probability together (arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits / temperature).softmax(-1)
    if top_p < 1:
        ranked, tokens = p.sort(dim=-1, descending=True, stable=True)
        p = torch.zeros_like(p).scatter(-1, tokens, ranked * (ranked.cumsum(-1) - ranked < top_p))
    total = p.cumsum(-1)
    below = torch.nextafter(total[:, -1], torch.zeros_like(total[:, -1]))         # u < 1, and so its product
    return torch.searchsorted(total, (uniform * total[:, -1]).minimum(below)[:, None], right=True)[:, 0]


def closed(ids: Tensor, written: Tensor, ends: Tensor, end: tuple[int, int]) -> Tensor:
    """Rows (B, L) with the end at the first of `ends` (B, L) and padding behind it, where text is written."""
    count = (ends & written).cumsum(1)
    first = (count == 1) & ends & written
    ids = torch.where(first, end[0], ids)
    return torch.where((count > 0) & written & ~first, end[1], ids)


def check(steps: int, temperature: float, order: str, level: float | None = None,
          per_step: int | None = None, top_p: float = 1.0) -> None:
    """Raises ValueError for what no walk can be told."""
    highest = dict(threshold=1.0, remask=1.0).get(order, float("inf"))
    for wrong, message in (
            (steps < 1, f"steps must be at least 1, got {steps}"),
            (temperature < 0, f"temperature must be 0 or more, got {temperature}"),
            (order not in ORDERS, f"order must be one of {', '.join(ORDERS)}, got {order!r}"),
            (level is not None and LEVELS.get(order, 0) is None, f"order {order} has no level"),
            (level is not None and not 0 < level <= highest, f"level of order {order} must be above 0"
             f"{' and at most 1' if highest == 1 else ''}, got {level}"),
            (not 0 < top_p <= 1, f"top_p must be above 0 and at most 1, got {top_p}"),
            (per_step is not None and (per_step < 1 or order not in ("confidence", "margin", "entropy")),
             f"per_step is a number of tokens for the orders confidence, margin, entropy, got {per_step} for "
             f"{order}")):
        if wrong:
            raise ValueError(message)


def walk(logits_fn: Callable, ids: Tensor, mask_id: int, steps: int, generator: torch.Generator | None = None,
         temperature: float = 1.0, order: str = "random", picks: bool = False, *, level: float | None = None,
         per_step: int | None = None, top_p: float = 1.0, seeds: list[int] | None = None,
         end: tuple[int, int] | None = None, canvas: float | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Replace every [MASK] of ids (B, L) by a token, other tokens never; yields (step (B,), ids (B, L)) at
    the start and after each evaluation: the step of the walk that each row has reached, and the state.

    order: the table above, which also says what `level` is; None takes LEVELS'.  "random" is the published
    (ancestral) sampler: t goes from 1 to 0 in `steps` steps, and a masked token is revealed in the step
    t -> s with probability (t - s)/t, from the model's distribution.  That makes the step at which a token
    is revealed uniform over the steps and independent of the model, so it is drawn beforehand.  A row's
    distribution changes only when the row does, and the network has no time input: each row jumps to its
    own next step that reveals something, and a batch costs as many evaluations as its busiest row (at most
    min(steps, masked tokens)), with the same distribution of results as the full walk.

    A token is drawn by one uniform number, inverting the cumulative distribution in float64: float32 noise
    quietly lowers the temperature (arXiv 2409.02908).  generator: of all rows; or seeds, one for each.
    end: (end token, padding); behind an end that is revealed all is padding at once, which changes nothing
    where training texts were padded so.  canvas: the end is put where the first evaluation has it with so
    much probability: that position's marginal is the distribution of the text's length, of which the tail is
    cut off.  picks: `logits_fn` is called with the rows that are not done (n, L), with the tokens that are
    wanted, (m,) out of n x L, and the rows' numbers (n,), and gives (m, V); otherwise with all ids.
    Raises ValueError as `check` says."""
    check(steps, temperature, order, level, per_step, top_p)
    level = LEVELS[order] if level is None else level
    ids, written = ids.clone(), ids == mask_id
    fresh = uniforms(tuple(ids.shape), ids.device, generator, seeds)
    whens, tokens, step = fresh(), fresh(), torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    exact = exact_dtype(ids.device)
    yield step, ids.clone()
    for evaluation in itertools.count():
        masked = ids == mask_id                                                   # (B, L)
        live = (written if order == "remask" and evaluation < steps else masked).any(1).nonzero()[:, 0]
        if not len(live):
            return
        now, step = turn(masked, written, whens, steps, evaluation, order, level)
        by_chance, drawn = order in ("random", "remask"), torch.zeros_like(ids)
        wanted = masked & now if by_chance and not (canvas and not evaluation) else masked
        at = wanted[live].flatten().nonzero()[:, 0]                               # (m,) out of n x L
        if len(at):  # else nothing is asked
            logits = logits_fn(ids[live], at, live) if picks else logits_fn(ids)[live].flatten(0, 1)[at]
            logits = forbid(logits.to(exact), mask_id)                             # (m, V)
            drawn[wanted] = choose(logits, temperature, tokens[wanted], top_p)
        if not by_chance:
            sure = torch.full(ids.shape, -torch.inf, dtype=exact, device=ids.device)
            sure[wanted] = sureness(logits, order)                                # (B, L), else -inf
            quota = torch.full_like(step, per_step) if per_step else (
                -(-masked.sum(1) // max(1, steps - evaluation)))                  # (B,) rounded up
            ranked, places = sure.sort(dim=1, descending=True, stable=True)
            count = at_once(ranked, order, level, quota)[:, None]
            now = masked & (places.argsort(1) < count)
        ids = torch.where(now & masked, drawn, torch.where(now, mask_id, ids))    # some are masked again
        if end and canvas and not evaluation:
            ends = torch.zeros_like(masked)
            ends[wanted] = logits.softmax(-1)[:, end[0]] >= canvas
            ids = closed(ids, written, ends, end)
        if end and order != "remask":
            ids = closed(ids, written, ids == end[0], end)
        if order == "remask":
            whens, tokens = fresh(), fresh()
        yield step, ids.clone()


def turn(masked: Tensor, written: Tensor, whens: Tensor, steps: int, evaluation: int, order: str,
         level: float | None) -> tuple[Tensor, Tensor]:
    """Whose turn it is by chance alone, (B, L), and the step that each row has then reached, (B,).

    whens: (B, L) in [0, 1).  In "remask" also tokens that were revealed, to be masked again (ReMDM)."""
    step = torch.full_like(masked[:, 0], evaluation + 1, dtype=torch.long)
    if order == "random":
        when = (whens * steps).long() + 1                                         # (B, L) in 1 .. steps
        step = torch.where(masked, when, steps).amin(1)                           # (B,) each row's next event
        return masked & (when == step[:, None]), step
    if order == "remask":
        a, b = evaluation / steps, (evaluation + 1) / steps                       # a_t and a_s of the paper
        again = min(level, (1 - b) / a) if a else 0.0
        return written & (whens < torch.where(masked, (b - (1 - again) * a) / (1 - a), again)), step
    return masked, step


def sample(logits_fn: Callable, ids: Tensor, mask_id: int, steps: int,
           generator: torch.Generator | None = None, temperature: float = 1.0, order: str = "random",
           picks: bool = False, trajectory: list | None = None, **how) -> Tensor:
    """The end of `walk`, (B, L); without more arguments the paper's sampler.  `trajectory`, when given, is
    filled with all that the walk yields."""
    for state in walk(logits_fn, ids, mask_id, steps, generator, temperature, order, picks, **how):
        if trajectory is not None:
            trajectory.append(state)
    return state[1]


def guide(logits_fn: Callable, null_fn: Callable, scale: float, mask_id: int, ramp: bool = False) -> Callable:
    """Classifier-free guidance of text: log p_null + scale (log p - log p_null), both normalised first.

    `logits_fn` and `null_fn`, with the picture and without it, are called as `walk` calls with picks.  ramp:
    the scale grows from 1, while all is masked, to its own when little is: weak early (arXiv 2507.08965)."""
    def guided(ids: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        exact = exact_dtype(ids.device)
        known, null = (forbid(given(ids, at, rows).to(exact), mask_id).log_softmax(-1)
                       for given in (logits_fn, null_fn))
        share = (ids == mask_id).to(exact).mean(1)[at // ids.shape[1], None] if ramp else 0.0  # (m, 1)
        pull = (scale - 1) * (1 - share) * (known - null).nan_to_num(0.0)         # of [MASK]: inf - inf
        return known + pull
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
