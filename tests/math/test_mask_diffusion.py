"""Test mask_diffusion.py with an oracle: exact conditionals of a known joint over a few tokens.

Time goes from t = 1 (all [MASK]) to t = 0 (text).  All draws are seeded.  The probability next to a
tolerance is that of a failure with another seed.
"""

import math

import pytest
import torch

import mask_diffusion
from helpers import seeded
from mask_diffusion import SampleConfig, at_positions, likelihood, sample


def random_joint(tokens, values):
    p = torch.rand([values] * tokens, dtype=torch.float64, generator=seeded(0)) ** 3
    return p / p.sum()


def oracle_for(joint):
    """Return a function: ids (B, n) -> log p(x_i | the unmasked tokens), (B, n, V + 1).

    [MASK], which is id V, gets the largest logit on purpose: it must never be drawn.  A table holds
    all states."""
    n, V = joint.ndim, joint.shape[0]
    place = (V + 1) ** torch.arange(n - 1, -1, -1)
    states = torch.arange((V + 1) ** n)[:, None] // place % (V + 1)
    weight = joint.expand(len(states), *joint.shape).clone()
    for axis in range(n):
        allowed = torch.nn.functional.one_hot(states[:, axis].clamp(max=V - 1), V).double()
        allowed[states[:, axis] == V] = 1
        shape = [-1] + [1] * n
        shape[axis + 1] = V
        weight *= allowed.view(shape)
    marginals = []
    for axis in range(n):
        others = [other + 1 for other in range(n) if other != axis]
        marginals.append(weight.sum(others))
    p = torch.stack(marginals, 1)
    logits = torch.log(p / p.sum(-1, keepdim=True) + 1e-300)
    trap = torch.full((len(states), n, 1), 50.0, dtype=torch.float64)
    table = torch.cat([logits, trap], -1)
    return lambda ids: table[ids @ place]


V, MASK = 4, 4
JOINT = random_joint(3, V)
oracle = oracle_for(JOINT)
WIDE, WIDE_MASK = random_joint(4, 5), 5
wide_oracle = oracle_for(WIDE)


oracle_at = at_positions(oracle)


def record(logits_fn, ids, mask_id, steps, generator=None, **settings):
    """Return all states (step, ids) of a sampling run."""
    config = SampleConfig(steps, **settings)
    return list(mask_diffusion.walk(at_positions(logits_fn), ids, mask_id, config, generator))


def all_masked(rows, tokens=3, mask_id=MASK):
    return torch.full((rows, tokens), mask_id)


def chi_square(samples, joint):
    """Return Pearson's chi-square statistic of samples (B, n), and its degrees of freedom."""
    n, V = joint.ndim, joint.shape[0]
    cells = samples @ (V ** torch.arange(n - 1, -1, -1))
    counts = torch.bincount(cells, minlength=V ** n).double()
    expected = joint.flatten() * len(samples)
    large = expected >= 5                                # smaller cells are pooled
    counts = torch.cat([counts[large], counts[~large].sum()[None]])
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    return float(((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()), len(counts) - 1


def misfit(samples):
    """Return chi-square / degrees of freedom for the wide joint, and its limit.

    The limit is 4 standard deviations: exact draws exceed it with about one seed in 30,000."""
    statistic, freedom = chi_square(samples, WIDE)
    return statistic / freedom, 1 + 4 * (2 / freedom) ** 0.5


# ----------------------------------------------------------------------------------------- the loss

@pytest.mark.parametrize("text", [[0, 1, 2], [3, 3, 0]])
def test_expected_loss_is_the_negative_log_likelihood(text):
    ids = torch.tensor(text).expand(400_000, 3)
    bound = 3 * float(mask_diffusion.loss(oracle, ids, MASK, generator=seeded(2)))
    # 3 standard errors of 400,000 draws (0.3 % each) and T_MIN's bias of 0.1 %
    assert bound == pytest.approx(-math.log(JOINT[tuple(text)]), rel=0.01)


def test_frozen_tokens_are_never_masked():
    ids = torch.tensor([2, 1, 0]).expand(512, 3)
    frozen = torch.tensor([True, False, False]).expand(512, 3)
    inputs = []

    def logits_fn(ids):
        inputs.append(ids)
        return oracle(ids)
    mask_diffusion.loss(logits_fn, ids, MASK, frozen, seeded(0))
    assert (inputs[0][:, 0] == 2).all() and (inputs[0][:, 1:] == MASK).any()


def test_frozen_tokens_carry_no_loss():
    ids = torch.tensor([2, 1, 0]).expand(512, 3)
    frozen = torch.tensor([True, False, False]).expand(512, 3)

    def wrong_at_frozen(ids):
        logits = oracle(ids).clone()
        logits[:, 0] = -logits[:, 0]
        return logits
    loss = mask_diffusion.loss(oracle, ids, MASK, frozen, seeded(0))
    assert loss == mask_diffusion.loss(wrong_at_frozen, ids, MASK, frozen, seeded(0))


def test_expected_loss_of_a_prompt_is_the_conditional_likelihood():
    ids = torch.tensor([2, 1, 0]).expand(400_000, 3)
    frozen = torch.tensor([True, False, False]).expand(400_000, 3)
    bound = 3 * float(mask_diffusion.loss(oracle, ids, MASK, frozen, seeded(1)))
    exact = -math.log(JOINT[2, 1, 0] / JOINT[2].sum())           # p(x2, x3 | x1); the loss is per token
    assert bound == pytest.approx(exact, rel=0.01)               # as without a prompt


@pytest.mark.parametrize("name", mask_diffusion.WEIGHTS)
def test_each_weight_is_finite_and_keeps_a_perfect_text_at_zero(name):
    weigh = mask_diffusion.WEIGHTS[name]
    t = mask_diffusion.draw_times(100, seeded(0))
    weighted = weigh(torch.ones(100), t)
    assert weighted.shape == (100,) and weighted.isfinite().all() and (weighted >= 0).all()
    assert weighted.sum() > 0 and (weigh(torch.zeros(100), t) == 0).all()


def test_flat_weight_equals_one_over_t_on_average():
    """With four equally likely tokens both losses are log 4 per token; a row's flat loss is 2 t
    times the other one."""
    ids = torch.randint(0, 4, (4000, 8), generator=seeded(0))
    t = mask_diffusion.draw_times(4000, seeded(1))
    uniform = torch.rand(4000, 8, generator=seeded(2))
    even = lambda ids, at: torch.zeros(len(at), 5)
    steep = mask_diffusion.errors(even, ids, 4, t, uniform)
    flat = mask_diffusion.errors(even, ids, 4, t, uniform, weight="flat")
    assert torch.allclose(flat, 2 * t * steep, rtol=1e-5)        # float32
    # standard errors of 4000 rows: 0.7 % flat, 1.7 % with 1/t, which has a heavy tail
    assert float(flat.mean()) / 8 == pytest.approx(math.log(4), rel=0.03)
    assert float(steep.mean()) / 8 == pytest.approx(math.log(4), rel=0.1)


def test_the_loss_asks_for_masked_tokens_only():
    ids = torch.randint(0, 4, (5, 8), generator=seeded(0))
    frozen = torch.rand(5, 8, generator=seeded(1)) < 0.2
    generator = seeded(2)
    t = mask_diffusion.draw_times(5, generator)
    uniform = torch.rand(5, 8, generator=generator)
    logits = torch.randn(5, 8, 5, generator=seeded(3))
    calls = []

    def picked(noised, at):
        calls.append((noised, at))
        return logits.flatten(0, 1)[at]
    whole = mask_diffusion.loss(lambda noised: logits, ids, 4, frozen, seeded(2))
    some = mask_diffusion.errors(picked, ids, 4, t, uniform, frozen)
    some = some.sum() / ids.numel()
    [(noised, at)] = calls
    assert torch.equal(whole, some) and 0 < len(at) < 30
    assert (noised.flatten()[at] == 4).all() and not frozen.flatten()[at].any()


def test_training_times_cover_the_unit_interval_evenly():
    for seed in range(20):
        t = mask_diffusion.draw_times(50, seeded(seed))
        assert 0 < t.min() and t.max() <= 1
        unit = (t - mask_diffusion.T_MIN) / (1 - mask_diffusion.T_MIN)
        gaps = unit.sort().values.diff()
        assert torch.allclose(gaps, torch.full((49,), 1 / 50), atol=1e-5)        # float32
    t = mask_diffusion.draw_times(100_000, seeded(0))
    assert 0.001 <= t.min() < 0.0011 and t.max() > 0.9999


# ---------------------------------------------------------------------------------- drawing a token

def test_choose_follows_the_softmax_and_its_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]], dtype=torch.float64)
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for temperature in (1.0, 0.5):
        drawn = mask_diffusion.choose(logits.expand(100_000, 4), temperature, uniform)
        share = torch.bincount(drawn, minlength=4) / 100_000
        expected = (logits[0] / temperature).softmax(0)
        assert torch.allclose(share.double(), expected, atol=2e-5)  # two cells of the even grid
    assert mask_diffusion.choose(logits, 0.0, uniform[:1]).tolist() == [2]
    largest = torch.tensor([1 - 2**-53], dtype=torch.float64)  # the largest number below 1
    assert mask_diffusion.choose(logits, 1.0, largest).tolist() == [2]


def test_tokens_are_drawn_in_float64_for_bfloat16_logits():
    """A float32 sum of 50,000 probabilities would lose the last tokens."""
    logits = torch.full((1, 1, 50_001), 0.0).bfloat16()
    logits[..., 0] = 12.0                                        # a probability of 0.76
    p = logits[0, 0, :-1].double().softmax(0)
    tokens = set()
    for seed in range(200):
        ids = sample(lambda ids: logits, all_masked(1, 1, 50_000), 50_000, 1, [seeded(seed)])
        generator = seeded(seed)
        torch.rand(1, generator=generator, dtype=torch.float64)  # draws the step
        uniform = torch.rand(1, generator=generator, dtype=torch.float64)
        assert int(ids) == int((p.cumsum(0) <= float(uniform) * p.sum()).sum())
        tokens.add(int(ids))
    assert 0 in tokens and len(tokens) > 20


def test_single_token_is_drawn_from_its_conditional():
    ids = torch.tensor([[2, MASK, 1]]).expand(20_000, 3)
    drawn = sample(oracle, ids, MASK, 1, seeded(0), temperature=1.0, order="confidence")
    share = torch.bincount(drawn[:, 1], minlength=V) / 20_000
    expected = JOINT[2, :, 1] / JOINT[2, :, 1].sum()
    assert torch.allclose(share.double(), expected, atol=0.015)  # 4 standard errors of 20,000 draws


def test_row_with_its_own_seed_is_the_same_in_any_batch():
    ids = all_masked(64)
    generators = lambda seeds: [seeded(seed) for seed in seeds]
    for order in mask_diffusion.ORDERS:
        settings = dict(mask_id=MASK, steps=5, order=order)
        whole = sample(oracle, ids, generator=generators(range(64)), **settings)
        part = sample(oracle, ids[:20], generator=generators(range(30, 50)), **settings)
        assert torch.equal(part, whole[30:50]) and len(whole.unique(dim=0)) > 8
        same = sample(oracle, ids[:4], generator=generators([7] * 4), **settings)
        assert torch.equal(same, whole[7:8].expand(4, -1))


# ------------------------------------------------------------------------------ orders of unmasking

def test_one_step_loses_the_joint_but_not_the_marginals():
    samples = sample(oracle, all_masked(20_000), MASK, 1, seeded(1))
    statistic, freedom = chi_square(samples, JOINT)
    assert statistic > 2 * freedom + 100
    marginal = torch.bincount(samples[:, 0], minlength=V) / len(samples)
    # 4 standard errors of 20,000 draws
    assert torch.allclose(marginal.double(), JOINT.sum((1, 2)), atol=0.015)


@pytest.mark.parametrize("order, steps", [("random", [1, 4, 10_000]), ("confidence", [1, 2, 4])])
def test_one_token_at_a_time_is_an_exact_draw(order, steps):
    """The order depends on the known tokens only, not on the drawn one, so the joint is exact."""
    ratios = []
    for count in steps:
        ids = all_masked(50_000, 4, WIDE_MASK)
        drawn = sample(wide_oracle, ids, WIDE_MASK, count, seeded(1), order=order)
        ratio, limit = misfit(drawn)
        ratios.append(ratio)
    assert ratios == sorted(ratios, reverse=True) and ratios[-1] < limit < 10 < ratios[0]


@pytest.mark.parametrize("order, levels", [("threshold", [0.2, 0.4, 1.0]),
                                           ("eb", [9.0, 2.0, 0.01])])
def test_parallel_order_is_exact_at_its_tightest_level(order, levels):
    ratios, evaluations = [], []
    for level in levels:
        calls = []

        def logits_fn(ids):
            calls.append(ids)
            return wide_oracle(ids)
        ids = all_masked(50_000, 4, WIDE_MASK)
        drawn = sample(logits_fn, ids, WIDE_MASK, 4, seeded(1), order=order, level=level)
        ratio, limit = misfit(drawn)
        ratios.append(ratio)
        evaluations.append(len(calls))
    assert ratios == sorted(ratios, reverse=True) and evaluations == sorted(evaluations)
    assert evaluations[-1] == 4 and ratios[-1] < limit < 20 < ratios[0]


def test_each_order_selects_the_expected_tokens():
    """The first row has three masked tokens, the second two; the others are given."""
    masked = torch.tensor([[True, False, True, True, False], [False, True, False, False, True]])
    left = 2                                                     # evaluations; each takes half
    step = torch.tensor([[3, 1, 2, 2, 1], [1, 4, 1, 1, 5]])
    p = torch.tensor([[0.95, 0.05], [0.4, 0.6], [0.01, 0.99], [0.5, 0.5], [0.3, 0.7]])

    def selected(name, level=None):
        order = mask_diffusion.ORDERS[name]
        known_p = None if order.follows_reveal_step else p.double()
        state = mask_diffusion.State(masked, step, left, level or order.level, known_p)
        return [row.nonzero()[:, 0].tolist() for row in masked & order.select(state)]
    assert selected("random") == [[2, 3], [1]]                   # the tokens whose step is next
    assert selected("confidence") == [[0, 3], [4]]               # two, and one
    assert selected("threshold", 0.9) == [[0, 3], [4]]
    assert selected("threshold", 0.55) == [[0, 2, 3], [4]]
    entropy = torch.special.entr(p.double()).sum(-1).tolist()    # 0.20, 0.67, 0.06; 0.69, 0.61
    assert selected("eb", 0.01) == [[3], [4]]
    assert selected("eb", entropy[2] + 1e-6) == [[0, 3], [4]]
    assert selected("eb", 0.2) == [[0, 3], [4]]                  # 0.06 + 0.20 is above the level
    assert selected("eb", entropy[4] + 1e-6) == [[0, 2, 3], [1, 4]]
    assert selected("eb", 9.0) == [[0, 2, 3], [1, 4]]


def test_new_order_is_one_function_and_one_row(monkeypatch):
    """Reveal one token per step from right to left: such an order draws the exact joint."""
    def select_last(state):
        place = torch.arange(state.masked.shape[1]).expand_as(state.masked)
        return mask_diffusion.largest(torch.where(state.masked, place, -1), 1)
    order = mask_diffusion.Order(select_last)
    monkeypatch.setitem(mask_diffusion.ORDERS, "right to left", order)
    states = record(wide_oracle, all_masked(50_000, 4, WIDE_MASK), WIDE_MASK, 9, seeded(1),
                    order="right to left")
    ratio, limit = misfit(states[-1][1])
    assert ratio < limit and len(states) == 1 + 4
    _, first = states[1]
    assert (first[:, :3] == WIDE_MASK).all() and (first[:, 3] != WIDE_MASK).all()


def test_each_token_is_equally_likely_to_come_first():
    walk = mask_diffusion.walk(oracle_at, all_masked(6000), MASK, SampleConfig(10_000), seeded(0))
    step, start = next(walk)
    assert not step.any() and (start == MASK).all()
    _, state = next(walk)
    share = (state != MASK).float().mean(0)
    # 4 standard errors of 6000 rows
    assert torch.allclose(share, torch.full((3,), 1 / 3), atol=0.025)


def test_half_the_tokens_are_revealed_after_half_the_steps():
    half = all_masked(20_000)
    for step, state in record(oracle, half, MASK, 4, seeded(1)):
        half = torch.where((step <= 2)[:, None], state, half)
    # 6 standard errors of 60,000 independent tokens
    assert float((half != MASK).float().mean()) == pytest.approx(0.5, abs=0.012)


def test_confidence_reveals_the_surest_token_first():
    states = record(oracle, all_masked(1), MASK, 10, temperature=0, order="confidence")
    surest = oracle(all_masked(1))[0, :, :V].amax(-1).argmax()
    assert (states[1][1][0] != MASK).nonzero().tolist() == [[surest]]


@pytest.mark.parametrize("steps, evaluations", [(1, 1), (2, 2), (10, 3)])
def test_confidence_finishes_every_row_within_its_steps(steps, evaluations):
    """Two evaluations reveal three masked tokens as 2 + 1."""
    ids = torch.tensor([[MASK] * 3, [0, MASK, MASK], [1, 2, 3]])
    states = record(oracle, ids, MASK, steps, temperature=0, order="confidence")
    _, out = states[-1]
    assert len(states) == 1 + evaluations
    assert (out != MASK).all() and torch.equal(out[2], ids[2]) and out[1, 0] == 0


# ------------------------------------------------------------------------------------ sampling runs

def test_sampling_changes_masked_tokens_only_and_once():
    ids = torch.randint(0, V + 1, (1000, 3), generator=seeded(0))
    states = record(oracle, ids, MASK, 5, seeded(1))
    _, out = states[-1]
    given = ids != MASK
    assert torch.equal(out[given], ids[given]) and (out != MASK).all()
    for _, state in states:
        assert torch.equal(state[given], ids[given])
    for (_, before), (_, after) in zip(states, states[1:]):
        assert torch.equal(before[before != MASK], after[before != MASK])


@pytest.mark.parametrize("order, expected", [("random", [300, 100, 100]),
                                             ("confidence", [500, 200, 100])])
def test_finished_rows_cost_nothing(order, expected):
    """A batch costs at most one evaluation per masked token; `expected`: tokens for the head."""
    ids = all_masked(500)
    ids[100:, 1:] = 2
    ids[300:] = torch.tensor([3, 1, 0])
    rows, tokens = [], []

    def counted(ids, at):
        rows.append((at // 3).unique().tolist())
        tokens.append(len(at))
        return oracle_at(ids, at)
    config = SampleConfig(1000, temperature=0, order=order)
    out = mask_diffusion.sample_at(counted, ids, MASK, config, seeded(0))
    assert torch.equal(out, sample(oracle, ids, MASK, 1000, seeded(0), temperature=0, order=order))
    assert [len(live) for live in rows] == [300, 100, 100] and rows[1] == list(range(100))
    assert tokens == expected


END, PAD = 3, 2


def ending_oracle(ids):
    """Predict only end tokens after an end; before it, all four tokens are equally likely."""
    logits = torch.zeros(*ids.shape, V + 1, dtype=torch.float64)
    is_end = (ids == END).long()
    behind = is_end.cumsum(1) - is_end > 0
    logits[behind] = torch.tensor([-torch.inf] * 3 + [0.0, 9.0], dtype=torch.float64)
    return logits


def test_written_end_pads_the_rest_at_once():
    ids = all_masked(200, 7)
    counts = dict(end=[], plain=[])

    def counted(name):
        def logits_at(ids, at):
            counts[name].append(len(at))
            return ending_oracle(ids).flatten(0, 1)[at]
        return logits_at
    ending = SampleConfig(100, end_id=END, pad_id=PAD)
    out = mask_diffusion.sample_at(counted("end"), ids, MASK, ending, seeded(0))
    ended = [row for row in out.tolist() if END in row]
    assert len(ended) > 100
    for row in ended:
        at = row.index(END)
        assert row[at + 1:] == [PAD] * (6 - at)
    mask_diffusion.sample_at(counted("plain"), ids, MASK, SampleConfig(100), seeded(0))
    assert sum(counts["plain"]) == 200 * 7
    assert sum(counts["end"]) < 0.8 * sum(counts["plain"])         # padding is not evaluated


def test_given_text_is_kept_around_ends():
    """An end token in given text ends nothing; padding after a written end skips given tokens."""
    ids = all_masked(200, 8)
    ids[:, :3] = torch.tensor([0, END, 1])
    ids[:, 6:] = torch.tensor([1, 0])
    given = ids != MASK
    even = lambda ids: torch.zeros(*ids.shape, V + 1)
    for length_at in (None, 0.99):
        states = record(even, ids, MASK, 100, seeded(0), end_id=END, pad_id=PAD,
                        length_at=length_at)
        for _, state in states:
            assert torch.equal(state[given], ids[given])
        _, out = states[-1]
        assert set(out[:, 3].tolist()) == {0, 1, PAD, END}       # 200 draws miss one: 1 in 10^24
        ended = out[:, 3] == END
        assert (out[ended, 4:6] == PAD).all()


def test_length_at_ends_the_text_at_the_first_likely_end():
    """While all is masked, the end has probability 0.25 everywhere, so it is put first."""
    for length_at, ends_at_once in ((0.2, True), (0.3, False)):
        out = sample(ending_oracle, all_masked(200, 7), MASK, 100, seeded(0), end_id=END,
                     pad_id=PAD, length_at=length_at)
        assert bool((out == torch.tensor([END] + [PAD] * 6)).all()) == ends_at_once


@pytest.mark.parametrize("settings, message", [
    (dict(steps=0), "steps.* 0"), (dict(steps=1, order="sideways"), "sideways"),
    (dict(steps=1, temperature=-1), "temperature.* -1"),
    (dict(steps=1, level=0.5), "random.* no level"),
    (dict(steps=1, level=1.5, order="threshold"), "threshold.* 1.5"),
    (dict(steps=1, level=0, order="eb"), "eb.* 0")])
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sample(oracle, all_masked(1), MASK, **settings)


# -------------------------------------------------------------------------- likelihood and guidance

@pytest.mark.parametrize("text, prompt", [([0, 1, 2], 0), ([3, 3, 0], 0), ([2, 1, 0], 1)])
def test_likelihood_is_exact_within_its_standard_error(text, prompt):
    frozen = torch.arange(3) < prompt
    p_prompt = JOINT[text[0]].sum() if prompt else 1
    exact = -math.log(JOINT[tuple(text)] / p_prompt)
    nats, error = likelihood(oracle_at, torch.tensor(text), MASK, frozen, 60, seeded(0))
    assert abs(nats - exact) < 4 * error < 3.0                   # 4 standard errors of 60 draws
    nats, small = likelihood(oracle_at, torch.tensor(text), MASK, frozen, 6000, seeded(0))
    assert abs(nats - exact) < 4 * small
    assert small == pytest.approx(error / 10, rel=0.5)           # 60 draws give it to about 15 %


def test_likelihood_masks_each_number_of_tokens_as_often():
    """Of n = 4 tokens ceil(t n) are masked: each of 1 to 4 has a quarter of the levels."""
    masked = []

    def picked(ids, at):
        masked.extend((ids == MASK).sum(1).tolist())
        return torch.zeros(len(at), V + 1)
    likelihood(picked, torch.tensor([0, 1, 2, 3]), MASK, copies=400, generator=seeded(0))
    assert [masked.count(n) for n in range(5)] == [0, 100, 100, 100, 100]


def test_likelihood_of_a_prompt_without_an_answer_is_zero():
    frozen = torch.ones(3, dtype=torch.bool)
    assert likelihood(oracle_at, torch.tensor([2, 1, 0]), MASK, frozen) == (0, 0)


def test_an_all_prompt_row_has_no_error_beside_other_rows():
    frozen = torch.tensor([[True, True, True], [True, False, False]])
    ids = torch.tensor([[2, 1, 0], [2, 1, 0]])
    uniform = torch.rand(2, 3, generator=seeded(0))
    t, uniform = mask_diffusion.fix_mask_counts(torch.tensor([0.5, 1.0]), uniform, frozen)
    empty, other = mask_diffusion.errors(oracle_at, ids, MASK, t, uniform, frozen)
    assert empty == 0 and 0 < other < math.inf


def test_text_guidance_is_a_power_of_two_likelihoods():
    """Guidance of scale s draws from p^s / q^(s - 1), normalised."""
    text, null = torch.randn(2, 6, 5, dtype=torch.float64, generator=seeded(0))
    guided = mask_diffusion.guide(3 + text, null, 2.5, MASK)     # a constant moves no probability
    p = mask_diffusion.forbid(text, MASK).softmax(-1)
    q = mask_diffusion.forbid(null, MASK).softmax(-1)
    expected = (p ** 2.5 / q ** 1.5).nan_to_num(0.0)             # [MASK]: 0 / 0
    expected = expected / expected.sum(-1, keepdim=True)
    assert torch.allclose(guided.softmax(-1), expected)
