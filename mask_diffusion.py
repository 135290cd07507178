"""Absorbing-state diffusion for text.  Time runs from t = 1 (all [MASK]) to t = 0 (clean text).

Each token is [MASK] with probability t, independently (MDLM's log-linear schedule, arXiv
2406.07524).  The bound of -log p(x) is then a cross-entropy at the masked tokens, weighted by 1/t:

    -log p(x) <= E_t [ 1/t * sum_{i masked} -log p(x_i | x_t) ],   t ~ U(0, 1]

This is the text half of L = L_image + lambda L_text (arXiv 2501.00289).  This file does not depend
on the network.  The network does not receive t, because the number of [MASK]s shows it.  Functions
take the network in one of two forms:

    logits_fn(ids) -> (B, L, V)             for `loss` and `sample`
    logits_at(ids, at) -> (n, V)            at n positions only: the text head is the largest cost

Shapes: B batch, L tokens, V vocabulary, n positions among the B x L tokens, numbered row by row.
"""

import itertools
from dataclasses import dataclass
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LogitsFn = Callable[[Tensor], Tensor]
LogitsAt = Callable[[Tensor, Tensor], Tensor]
Draws = torch.Generator | list[torch.Generator] | None
T_MIN = 1e-3        # smallest training time: 1/t would otherwise let one token outweigh the batch


def at_positions(logits_fn: LogitsFn) -> LogitsAt:
    """Turn a `logits_fn` into a `logits_at`."""
    return lambda ids, at: logits_fn(ids).flatten(0, 1)[at]


def positions(marked: Tensor) -> Tensor:
    """Return the positions (n,) of the True entries of (B, L), for `logits_at`."""
    return marked.flatten().nonzero()[:, 0]


def forbid(logits: Tensor, mask_id: int) -> Tensor:
    """Set the logit of [MASK] to minus infinity, so that it is never predicted (MDLM's SUBS)."""
    column = torch.tensor([mask_id]).to(logits.device, non_blocking=True)
    return logits.index_fill(-1, column, float("-inf"))


# ------------------------------------------------------------------------------------ training

def draw_times(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw training times t (B,) in (1e-3, 1]: one random offset plus i/B.

    So every batch covers (0, 1] evenly, which MDLM's code calls antithetic sampling."""
    device = generator.device if generator else None
    offset = torch.rand(1, generator=generator, device=device)
    spread = torch.arange(batch, device=device) / batch
    t = 1 - (offset + spread) % 1                                                 # (B,) in (0, 1]
    return T_MIN + (1 - T_MIN) * t


def inverse_time(per_text: Tensor, t: Tensor) -> Tensor:
    """Weight the cross-entropy of each text, summed over its masked tokens, (B,), by 1/t, as in the
    bound."""
    return per_text / t


def flat(per_text: Tensor, t: Tensor) -> Tensor:
    """Weight by 2 at all times.

    A token is masked with probability t.  Its mean weight over all times is the integral of 2 t,
    which is 1, the same as with 1/t."""
    return 2 * per_text


WEIGHTS = {
    "1/t": inverse_time,
    "flat": flat,
}


def errors(logits_at: LogitsAt, ids: Tensor, mask_id: int, t: Tensor, uniform: Tensor,
           frozen: Tensor | None = None, weight: str = "1/t") -> Tensor:
    """Return the weighted cross-entropy of each text, summed over its masked tokens, (B,) float32.

    ids: clean tokens (B, L) int64, padding included: by predicting it, the network learns where
    texts end.
    t (B,) and uniform (B, L): a token is masked if its uniform number is below the time of its row.
    frozen: (B, L) bool, True at prompt tokens, which are never masked and have no loss.
    weight: a key of WEIGHTS.
    t, uniform and frozen may stay on the CPU: then counting the masks does not wait for the GPU."""
    masked = uniform < t[:, None]                                                 # (B, L)
    if frozen is not None:
        masked &= ~frozen.to(masked.device)
    at = positions(masked)                                                        # (n,)
    masked, at, t = (x.to(ids.device, non_blocking=True) for x in (masked, at, t))

    noised = torch.where(masked, mask_id, ids)
    logits = forbid(logits_at(noised, at).float(), mask_id)                       # (n, V)
    cross_entropy = F.cross_entropy(logits, ids.flatten()[at], reduction="none")
    row = at // ids.shape[1]
    per_text = torch.zeros(len(ids), device=ids.device).index_add(0, row, cross_entropy)
    return WEIGHTS[weight](per_text, t)


def loss(logits_fn: LogitsFn, ids: Tensor, mask_id: int, frozen: Tensor | None = None,
         generator: torch.Generator | None = None) -> Tensor:
    """Return L_text, a float32 scalar: the sum of `errors`, divided by the number of tokens, masked,
    frozen or not.

    train.py computes the same from `errors`, in micro-batches and with draws of its own."""
    t = draw_times(len(ids), generator)
    uniform = torch.rand(ids.shape, generator=generator, device=t.device)
    per_text = errors(at_positions(logits_fn), ids, mask_id, t, uniform, frozen)
    return per_text.sum() / ids.numel()


# --------------------------------------------------------------------------------- unmasking orders

# An order is exact if the sampled texts follow the model's joint distribution.  An order sees the
# probabilities, but never the drawn tokens.  So it is exact as long as it reveals one token at a
# time.

class State(NamedTuple):
    """The input of an order's `select`."""
    masked: Tensor                      # (B, L) bool
    reveal_step: Tensor                 # (B, L) int64: a random step for each token, 1 to steps
    steps_left: int                     # evaluations that are left, this one included
    level: float | None                 # the order's parameter, if it has one
    probabilities: Tensor | None = None # (n, V) at the n masked tokens, at temperature 1


def scatter_scores(scores: Tensor, masked: Tensor) -> Tensor:
    """Put the scores (n,) of masked tokens in their places, (B, L); minus infinity elsewhere."""
    placed = torch.full(masked.shape, -torch.inf, dtype=scores.dtype, device=scores.device)
    placed[masked] = scores
    return placed


def largest(scores: Tensor, count: Tensor | int) -> Tensor:
    """Mark the `count` (B, 1) largest scores in each row of (B, L), the first ones in a tie."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(1)
    return rank < count


def select_random(state: State) -> Tensor:
    """Select tokens with the earliest step, as in the paper; exact in the limit of many steps."""
    never = state.reveal_step.max() + 1
    soonest = torch.where(state.masked, state.reveal_step, never).amin(1, keepdim=True)  # (B, 1)
    return state.reveal_step == soonest


def select_confidence(state: State) -> Tensor:
    """Select the most probable tokens, equally many per step; exact with one token per step."""
    masked = state.masked.sum(1, keepdim=True)                                    # (B, 1)
    count = (masked + state.steps_left - 1) // state.steps_left                   # rounded up
    return largest(scatter_scores(state.probabilities.amax(-1), state.masked), count)


def select_threshold(state: State) -> Tensor:
    """Select all tokens with a probability of at least `level`, or else the most probable one.

    This is exact at level 1 (Fast-dLLM, arXiv 2505.22618)."""
    highest = scatter_scores(state.probabilities.amax(-1), state.masked)
    return (highest >= state.level) | largest(highest, 1)


def select_entropy_bounded(state: State) -> Tensor:
    """Select tokens by rising entropy, while the sum of the earlier entropies is at most `level`.

    This bounds the error of drawing the tokens independently (arXiv 2505.24857).  It is exact in
    the limit of level 0."""
    entropy = torch.special.entr(state.probabilities).sum(-1)                     # (n,)
    scores = scatter_scores(-entropy, state.masked)                               # (B, L)
    ascending = (-scores).sort(dim=1).values.clamp(max=1e9)      # infinity - infinity would be NaN
    before = ascending.cumsum(1) - ascending
    count = (before <= state.level).sum(1, keepdim=True).clamp(min=1)
    return largest(scores, count)


class Order(NamedTuple):
    """A row of ORDERS."""
    select: Callable[[State], Tensor]   # -> (B, L) bool; `walk` ignores unmasked tokens
    level: float | None = None          # the default; None: the order has no level
    # True: reveals tokens by their reveal_step, so it needs no probabilities: only the revealed
    # tokens' logits are computed, and steps that reveal nothing are skipped
    follows_reveal_step: bool = False
    uses_steps: bool = False            # False: the texts decide how many evaluations they take


ORDERS = {
    "random": Order(select_random, follows_reveal_step=True, uses_steps=True),
    "confidence": Order(select_confidence, uses_steps=True),
    "threshold": Order(select_threshold, level=0.99),
    "eb": Order(select_entropy_bounded, level=0.05),
}


# ------------------------------------------------------------------------------------ sampling

@dataclass
class SampleConfig:
    """Settings of the sampler, by default the paper's.  Raises ValueError for a wrong value."""
    steps: int = 128
    temperature: float = 1.0            # 0: take the most probable token
    order: str = "random"               # a key of ORDERS
    level: float | None = None          # None: the default of the order, if it has a level
    end_id: int | None = None           # once it is revealed, all written tokens behind it become
                                        # padding
    pad_id: int | None = None
    length_at: float | None = None      # before the first step, end the text at the first [MASK]
                                        # with at least this probability of end_id

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        # logits divided by a lower temperature could overflow
        if self.temperature != 0 and self.temperature < 1e-3:
            raise ValueError(f"temperature must be 0, or at least 0.001, got {self.temperature}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        default = ORDERS[self.order].level
        if self.level is None:
            self.level = default
        elif default is None:
            raise ValueError(f"order {self.order} has no level, got {self.level}")
        elif self.level <= 0:
            raise ValueError(f"level of order {self.order} must be above 0, got {self.level}")
        elif self.order == "threshold" and self.level > 1:
            raise ValueError(f"level of order threshold must be at most 1, got {self.level}")
        if self.end_id is not None and self.pad_id is None:
            raise ValueError("end_id needs pad_id, which fills the text behind the end")
        if self.length_at is not None and self.end_id is None:
            raise ValueError("length_at needs end_id")


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's MPS, which does not support float64.

    float32 noise quietly lowers the temperature (arXiv 2409.02908)."""
    return torch.float32 if device.type == "mps" else torch.float64


def exact_logits(logits_at: LogitsAt, ids: Tensor, at: Tensor, mask_id: int) -> Tensor:
    """Return logits (n, V) at positions (n,), in `exact_dtype` and without [MASK], to draw from."""
    return forbid(logits_at(ids, at).to(exact_dtype(ids.device)), mask_id)


def uniforms(shape: tuple[int, int], device: torch.device, generator: Draws) -> Tensor:
    """Draw numbers in [0, 1), (B, L).

    generator: one for all rows, or a list of CPU generators, one per row; then the numbers of a row
    depend on neither the batch nor the device."""
    if isinstance(generator, list):
        rows = [torch.rand(shape[1], generator=row, dtype=torch.float64) for row in generator]
        return torch.stack(rows).to(device, exact_dtype(device))
    source = generator.device if generator else device
    exact = exact_dtype(source)
    numbers = torch.rand(shape, generator=generator, device=source, dtype=exact)
    return numbers.to(device, exact_dtype(device))


def choose(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Draw tokens (n,) from softmax(logits / temperature), by a uniform number for each token.

    logits: (n, V).  uniform: (n,) in [0, 1); each number selects the token with this number in its
    interval of the cumulative distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits / temperature).softmax(-1).cumsum(-1)
    mass = cumulative[:, -1]
    below = torch.nextafter(mass, torch.zeros_like(mass))     # uniform * mass can round to mass
    threshold = (uniform * mass).minimum(below)
    return torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0]


def cut_after_end(ids: Tensor, ends: Tensor, written: Tensor, config: SampleConfig) -> Tensor:
    """End each row at its first token that is in `ends` and `written`; pad the rest.

    ids: (B, L).  ends: (B, L) bool.  written: (B, L) bool; only these tokens may change."""
    ended = (ends & written).cumsum(1) > 0                                   # from the first end on
    ids = torch.where(ended & written, config.pad_id, ids)
    return torch.where(ended.cumsum(1) == 1, config.end_id, ids)


def place_end(logits_at: LogitsAt, ids: Tensor, mask_id: int, config: SampleConfig) -> Tensor:
    """End each row at the first [MASK] with an end-token probability of at least `length_at`.

    While all tokens are masked, these probabilities are the distribution of the text's length.
    Without `length_at`, return ids (B, L) unchanged."""
    masked = ids == mask_id
    if config.length_at is None or not masked.any():
        return ids
    logits = exact_logits(logits_at, ids, positions(masked), mask_id)
    probability = logits.softmax(-1)[:, config.end_id]
    is_likely = scatter_scores(probability, masked) >= config.length_at
    return cut_after_end(ids, is_likely, masked, config)


def walk(logits_at: LogitsAt, ids: Tensor, mask_id: int, config: SampleConfig,
         generator: Draws = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Replace every [MASK] of ids (B, L) by a token; other tokens stay.

    Yield (step (B,), ids (B, L)) at the start and after each evaluation: the step that each row has
    reached, and the text.  generator: one for all rows, or a list of CPU generators, one per row.

    Order "random" is the published (ancestral) sampler: t goes from 1 to 0 in `steps` steps, and a
    masked token is revealed in the step t -> s with probability (t - s)/t.  So the step of each
    token is uniform and independent of the model, and can be drawn beforehand.  The network does
    not see the time, so a step that reveals no token changes nothing.  Each row therefore jumps to
    its next step that reveals a token; the distribution of texts stays the same."""
    order = ORDERS[config.order]
    written = ids == mask_id
    reveal_step = uniforms(ids.shape, ids.device, generator) * config.steps
    reveal_step = reveal_step.long() + 1                         # (B, L) in 1 .. steps
    uniform = uniforms(ids.shape, ids.device, generator)                      # chooses each token
    ids = place_end(logits_at, ids.clone(), mask_id, config)
    yield torch.zeros_like(reveal_step[:, 0]), ids
    for evaluation in itertools.count():
        masked = ids == mask_id                                                   # (B, L)
        if not masked.any():
            return
        state = State(masked, reveal_step, max(1, config.steps - evaluation), config.level)
        wanted = masked                                          # tokens that need logits
        if order.follows_reveal_step:
            wanted = masked & order.select(state)
        logits = exact_logits(logits_at, ids, positions(wanted), mask_id)         # (n, V)
        if order.follows_reveal_step:
            selected = wanted
            reached = torch.where(masked, reveal_step, config.steps).amin(1)
        else:
            selected = masked & order.select(state._replace(probabilities=logits.softmax(-1)))
            reached = torch.full_like(ids[:, 0], evaluation + 1)
        tokens = choose(logits, config.temperature, uniform[wanted])              # (n,)
        ids = torch.where(selected, ids.masked_scatter(wanted, tokens), ids)
        if config.end_id is not None:
            ids = cut_after_end(ids, ids == config.end_id, written, config)
        yield reached, ids


def sample_at(logits_at: LogitsAt, ids: Tensor, mask_id: int, config: SampleConfig,
              generator: Draws = None) -> Tensor:
    """Run `walk`, and return its last ids (B, L)."""
    for _, ids in walk(logits_at, ids, mask_id, config, generator):
        pass
    return ids


def sample(logits_fn: LogitsFn, ids: Tensor, mask_id: int, steps: int,
           generator: Draws = None, **settings) -> Tensor:
    """Fill in the [MASK]s of ids (B, L).  settings: other fields of SampleConfig."""
    config = SampleConfig(steps, **settings)
    return sample_at(at_positions(logits_fn), ids, mask_id, config, generator)


def guide(logits: Tensor, null_logits: Tensor, scale: float, mask_id: int) -> Tensor:
    """Apply classifier-free guidance: log p_null + scale (log p - log p_null), (n, V).

    logits (n, V) come from a network that sees the image, null_logits (n, V) from one that does
    not.  p and p_null are normalised; the result is not."""
    exact = exact_dtype(logits.device)
    log_p = forbid(logits.to(exact), mask_id).log_softmax(-1)
    log_p_null = forbid(null_logits.to(exact), mask_id).log_softmax(-1)
    difference = (log_p - log_p_null).nan_to_num(0.0)           # for [MASK] both are minus infinity
    return log_p + (scale - 1) * difference


# ------------------------------------------------------------------------------------ likelihood

def fix_mask_counts(t: Tensor, uniform: Tensor, frozen: Tensor) -> tuple[Tensor, Tensor]:
    """Return times (B,) and numbers (B, L) with which `errors` masks an exact number of tokens.

    In a row with n unfrozen tokens, l = ceil(t n) of them are masked, those with the smallest
    `uniform`, instead of each one with probability t.  The time is l/n, so the weight 1/t is n/l.
    A row that is all frozen has an infinite time, and an error of 0."""
    n = (~frozen).sum(1, keepdim=True)                                            # (B, 1)
    rank = uniform.masked_fill(frozen, 2).argsort(1).argsort(1)            # frozen tokens come last
    l = (t[:, None] * n).ceil().clamp(min=1)
    return (l / n)[:, 0], (rank + 0.5) / n


def likelihood(logits_at: LogitsAt, ids: Tensor, mask_id: int, frozen: Tensor | None = None,
               copies: int = 64, generator: torch.Generator | None = None) -> tuple[float, float]:
    """Return an upper bound of -log p of one text (L,) in nats, and its standard error.

        -log p(x) <= E_l [ n/l sum of the masked tokens' cross-entropies ],   l of n are masked

    l takes values spread evenly over 1 .. n, which gives far less noise than the weight 1/t (LLaDA,
    arXiv 2502.09992, appendix B).  The standard error is that of independent l, so the true one is
    smaller.  logits_at receives `copies` (at least 2) copies of the text, each with its own mask."""
    if frozen is None:
        frozen = torch.zeros_like(ids, dtype=torch.bool)
    if frozen.all():
        return 0.0, 0.0
    frozen = frozen.cpu().expand(copies, -1)
    offset = torch.rand(1, generator=generator)
    t = (offset + torch.arange(copies)) / copies
    t, uniform = fix_mask_counts(t, torch.rand(frozen.shape, generator=generator), frozen)
    ids = ids.expand(copies, -1)
    bounds = errors(logits_at, ids, mask_id, t, uniform, frozen).cpu().double()
    return float(bounds.mean()), float(bounds.std() / copies ** 0.5)
