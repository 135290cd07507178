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
ORDERS = ["random", "confidence"]
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


def walk(logits_fn: Callable, ids: Tensor, mask_id: int, steps: int, generator: torch.Generator | None = None,
         temperature: float = 1.0, order: str = "random",
         by_row: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Replace every [MASK] of ids (B, L) by a token, other tokens never; yields (step (B,), ids (B, L)) at
    the start and after each evaluation: the step of the walk that each row has reached, and the state.

    order "random" is the published (ancestral) sampler: t goes from 1 to 0 in `steps` steps, and a masked
    token is revealed in the step t -> s with probability (t - s)/t, from the model's distribution.  That
    makes the step at which a token is revealed uniform over the steps and independent of the model, so it is
    drawn beforehand.  A row's distribution changes only when the row does, and the network has no time input:
    each row jumps to its own next step that reveals something, and a batch costs as many evaluations as its
    busiest row (at most min(steps, masked tokens)), with the same distribution of results as the full walk.

    order "confidence" reveals the tokens that the model is surest of first (MaskGIT, arXiv 2202.04200; LLaDA,
    arXiv 2502.09992), each row's [MASK]s spread evenly over at most `steps` evaluations.  That is not a draw
    from the model's joint distribution: it favours likely texts, which with temperature 0 is what one wants.

    temperature divides the logits; 0 takes the most likely token.  Draws are made in float64: float32 Gumbel
    noise quietly lowers the temperature (arXiv 2409.02908).  by_row: `logits_fn` is called with the rows that
    are not done yet, and their numbers (n,); otherwise with all ids.  Raises ValueError for steps below one,
    a negative temperature, an order that is neither."""
    for wrong, message in ((steps < 1, f"steps must be at least 1, got {steps}"),
                           (temperature < 0, f"temperature must be 0 or more, got {temperature}"),
                           (order not in ORDERS, f"order must be one of {', '.join(ORDERS)}, got {order!r}")):
        if wrong:
            raise ValueError(message)
    ids, device, step = ids.clone(), ids.device, torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    if order == "random":
        draw_device = generator.device if generator is not None else device
        when = torch.randint(1, steps + 1, ids.shape, generator=generator, device=draw_device).to(device)
    yield step, ids.clone()
    for evaluation in itertools.count():
        masked = ids == mask_id                                                   # (B, L)
        live = masked.any(1).nonzero()[:, 0]                                      # (n,)
        if not len(live):
            return
        if order == "random":
            step = torch.where(masked, when, steps).amin(1)                       # (B,) each row's next event
            masked &= when == step[:, None]
        else:
            step = torch.full_like(step, evaluation + 1)
        logits = logits_fn(ids[live], live)[masked[live]] if by_row else logits_fn(ids)[masked]   # (n, V)
        logits = forbid(logits.double(), mask_id)
        drawn = categorical(logits, temperature, generator)                       # (n,)
        if order == "confidence":
            sure = torch.full(ids.shape, -1.0, dtype=torch.float64, device=device)
            sure[masked] = logits.softmax(-1).gather(1, drawn[:, None])[:, 0]     # (B, L), else -1
            quota = -(-masked.sum(1) // (steps - evaluation))                     # (B,) rounded up
            surest = sure.argsort(dim=1, descending=True, stable=True).argsort(1) < quota[:, None]
            drawn, masked = drawn[surest[masked]], masked & surest
        ids[masked] = drawn
        yield step, ids.clone()


def sample(logits_fn: Callable, ids: Tensor, mask_id: int, steps: int,
           generator: torch.Generator | None = None, temperature: float = 1.0, trajectory: list | None = None,
           order: str = "random", by_row: bool = False) -> Tensor:
    """The end of `walk`, (B, L); without more arguments the paper's sampler.  `trajectory`, when given, is
    filled with all that the walk yields."""
    for state in walk(logits_fn, ids, mask_id, steps, generator, temperature, order, by_row):
        if trajectory is not None:
            trajectory.append(state)
    return state[1]


def categorical(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw from softmax(logits / temperature), (n, V) -> (n,), in the logits' precision; at 0 the argmax."""
    if temperature == 0:
        return logits.argmax(-1)
    device = generator.device if generator is not None else logits.device
    uniform = torch.rand(logits.shape, generator=generator, device=device, dtype=logits.dtype)
    gumbel = -torch.log(-torch.log(uniform.to(logits.device)))
    return (logits / temperature + gumbel).argmax(-1)
