"""Absorbing-state diffusion for text.  Time runs from t = 1 (all [MASK]) to t = 0 (clean text).

Each token is [MASK] with probability t, independently (MDLM's log-linear schedule, arXiv 2406.07524: survival
1 - t).  For that schedule the negative evidence bound is a cross-entropy at the masked positions, weighted 1/t:

    -log p(x) <= E_t [ 1/t * sum_{i masked} -log p(x_i | x_t) ],   t ~ U(0, 1]

This is the text half of L = L_image + lambda L_text (arXiv 2501.00289).  Nothing here knows a network:
`logits_fn` is any callable ids (B, L) -> logits (B, L, V).  It is not told t, since the number of [MASK]s is.

Shapes: B batch, L tokens, V vocabulary, n positions picked out of B x L.
"""

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LogitsFn = Callable[[Tensor], Tensor]
T_MIN = 1e-3  # smallest training time: 1/t would otherwise let one token outweigh the batch


def draw(shape: tuple[int, int], generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """The random part of the loss: times t (B,) in (1e-3, 1] and one uniform number per token (B, L).

    Times are antithetic, one uniform offset plus i/B over the batch, so every batch covers (0, 1] evenly.
    A token is masked where its number is below its row's time.
    """
    B, device = shape[0], generator.device if generator is not None else None
    offset = torch.rand(1, generator=generator, device=device)
    t = 1 - (offset + torch.arange(B, device=device) / B) % 1                     # (B,) in (0, 1]
    return T_MIN + (1 - T_MIN) * t, torch.rand(shape, generator=generator, device=device)


def loss(logits_fn: LogitsFn, ids: Tensor, mask_id: int, frozen: Tensor | None = None,
         generator: torch.Generator | None = None, t: Tensor | None = None, uniform: Tensor | None = None,
         tokens: Tensor | float | None = None) -> Tensor:
    """1/t-weighted cross-entropy of the clean token at masked positions, per token, a float32 scalar.

    ids: clean tokens (B, L) int64, padding included: predicting the padding is how the end is learned.
    frozen: (B, L) bool, True at prompt tokens, which are never masked and carry no loss.
    t (B,), uniform (B, L): from `draw` unless both are given.  tokens: what the sum is divided by; all tokens
    that are not frozen, masked or not, unless given (a process that holds part of a batch gives its share).
    Raises ValueError when t comes without uniform.
    """
    if (t is None) != (uniform is None):
        raise ValueError("mask_diffusion.loss takes t and uniform together, or neither")
    if t is None:
        t, uniform = draw(tuple(ids.shape), generator)
    t = t.to(ids.device)
    masked = uniform.to(ids.device) < t[:, None]                                  # (B, L)
    if frozen is not None:
        masked &= ~frozen
    if tokens is None:
        tokens = ids.numel() if frozen is None else (~frozen).sum().clamp(min=1)
    logits = logits_fn(torch.where(masked, mask_id, ids))[masked].float()         # (n, V)
    logits = forbid(logits, mask_id)
    error = F.cross_entropy(logits, ids[masked], reduction="none")                # (n,)
    return (error / t[:, None].expand_as(masked)[masked]).sum() / tokens


def forbid(logits: Tensor, mask_id: int) -> Tensor:
    """"SUBS": the logit of [MASK] is minus infinity, so [MASK] is never predicted.  (..., V) -> (..., V)."""
    return logits.index_fill(-1, torch.tensor([mask_id], device=logits.device), float("-inf"))


def check(steps: int, temperature: float) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")


def sample(logits_fn: LogitsFn, ids: Tensor, mask_id: int, steps: int,
           generator: torch.Generator | None = None, temperature: float = 1.0,
           trajectory: list | None = None) -> Tensor:
    """Replace every [MASK] of ids (B, L) by a token; other tokens never change.  Returns (B, L).

    The published (ancestral) sampler walks t from 1 to 0 in `steps` steps and reveals a masked token in the
    step t -> s with probability (t - s)/t, from the model's distribution.  That makes the step at which a
    token is revealed uniform over the steps and independent of the model, so it is drawn beforehand.  A row's
    distribution changes only when the row does, and the network has no time input: each row therefore jumps
    to its own next step that reveals something, and a batch costs as many evaluations as its busiest row
    (at most min(steps, masked tokens)), with the same distribution of results as the full walk.

    temperature divides the logits; 0 takes the most likely token.  Draws are made in float64: float32 Gumbel
    noise quietly lowers the temperature (arXiv 2409.02908).  `trajectory`, when given, is filled with
    (step (B,), ids (B, L)): the state after each evaluation, and the step of the walk each row has reached.
    Raises ValueError below one step or for a negative temperature.
    """
    check(steps, temperature)
    ids, device = ids.clone(), ids.device
    never = steps + 1
    draw_device = generator.device if generator is not None else device
    when = torch.randint(1, never, ids.shape, generator=generator, device=draw_device).to(device)
    when = torch.where(ids == mask_id, when, never)                               # (B, L) step of reveal
    if trajectory is not None:
        trajectory.append((torch.zeros(len(ids), dtype=torch.long, device=device), ids.clone()))
    while (when < never).any():
        step = when.amin(1)                                                       # (B,) each row's next event
        now = (when == step[:, None]) & (when < never)                            # (B, L)
        logits = forbid(logits_fn(ids)[now].double(), mask_id)                    # (n, V)
        ids[now] = categorical(logits, temperature, generator)
        when[now] = never
        if trajectory is not None:
            trajectory.append((step.clamp(max=steps), ids.clone()))
    return ids


def sample_confident(logits_fn: LogitsFn, ids: Tensor, mask_id: int, steps: int,
                     generator: torch.Generator | None = None, temperature: float = 0.0,
                     trajectory: list | None = None) -> Tensor:
    """As `sample`, but the tokens that the model is surest of are revealed first (MaskGIT, arXiv 2202.04200;
    LLaDA, arXiv 2502.09992), each row's [MASK]s spread evenly over at most `steps` evaluations.

    Not a draw from the model's joint distribution: it favours likely texts.  With temperature 0 that is what one
    wants, while a random order then fixes tokens whose neighbours are not decided yet.
    """
    check(steps, temperature)
    ids, step = ids.clone(), 0
    if trajectory is not None:
        trajectory.append((torch.zeros(len(ids), dtype=torch.long, device=ids.device), ids.clone()))
    while (masked := ids == mask_id).any():
        logits = forbid(logits_fn(ids)[masked].double(), mask_id)                 # (n, V)
        drawn = categorical(logits, temperature, generator)                       # (n,)
        sure = torch.full(ids.shape, -1.0, dtype=torch.float64, device=ids.device)
        sure[masked] = logits.softmax(-1).gather(1, drawn[:, None])[:, 0]         # (B, L), -1 where nothing to do
        quota = -(-masked.sum(1) // (steps - step))                               # (B,) rounded up
        now = masked & (sure.argsort(1, descending=True).argsort(1) < quota[:, None])
        ids[now] = drawn[now[masked]]
        step += 1
        if trajectory is not None:
            trajectory.append((torch.full((len(ids),), step, device=ids.device), ids.clone()))
    return ids


def categorical(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw from softmax(logits / temperature), (n, V) float64 -> (n,); temperature 0 is the argmax."""
    if temperature == 0:
        return logits.argmax(-1)
    device = generator.device if generator is not None else logits.device
    uniform = torch.rand(logits.shape, generator=generator, device=device, dtype=torch.float64).to(logits.device)
    return (logits / temperature - torch.log(-torch.log(uniform))).argmax(-1)     # Gumbel-max
