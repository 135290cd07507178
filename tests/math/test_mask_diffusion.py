"""mask_diffusion.py against an oracle: the exact conditionals of a known joint over 3 tokens of 4 values."""

import math

import pytest
import torch

import mask_diffusion

def joint_of(tokens, values):
    p = torch.rand([values] * tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    return p / p.sum()


def oracle_of(joint):
    """ids (B, n) -> log p(x_i | the unmasked ones), (B, n, V + 1); [MASK], V, gets the largest, as a trap.

    Looked up in a table of all states, which is computed by enumeration."""
    n, V = joint.ndim, joint.shape[0]
    place = (V + 1) ** torch.arange(n - 1, -1, -1)
    states = torch.arange((V + 1) ** n)[:, None] // place % (V + 1)
    weight = joint.expand(len(states), *joint.shape).clone()
    for axis in range(n):
        allowed = torch.nn.functional.one_hot(states[:, axis].clamp(max=V - 1), V).double()
        allowed[states[:, axis] == V] = 1
        weight *= allowed.view([-1] + [V if a == axis else 1 for a in range(n)])
    p = torch.stack([weight.sum([a + 1 for a in range(n) if a != axis]) for axis in range(n)], 1)
    logits = torch.log(p / p.sum(-1, keepdim=True) + 1e-300)
    table = torch.cat([logits, torch.full((len(states), n, 1), 50.0, dtype=torch.float64)], -1)
    return lambda ids: table[ids @ place]


V, MASK = 4, 4
JOINT = joint_of(3, V)
oracle = oracle_of(JOINT)
WIDE, WIDE_MASK = joint_of(4, 5), 5
wide = oracle_of(WIDE)


def chi_square(samples, joint=JOINT):
    n, V = joint.ndim, joint.shape[0]
    cells = samples @ (V ** torch.arange(n - 1, -1, -1))
    seen, wanted = torch.bincount(cells, minlength=V ** n).double(), joint.flatten() * len(samples)
    big = wanted >= 5  # small cells are pooled into one, as the test asks
    seen, wanted = (torch.cat([x[big], x[~big].sum()[None]]) for x in (seen, wanted))
    return float(((seen - wanted) ** 2 / wanted.clamp(min=1e-9)).sum()), len(seen) - 1


def misfit(samples):
    """Chi-square of draws of the wide joint over its degrees of freedom, and what chance reaches once in some
    30,000 times: four deviations."""
    statistic, freedom = chi_square(samples, WIDE)
    return statistic / freedom, 1 + 4 * (2 / freedom) ** 0.5


def test_one_step_is_biased_towards_independent_tokens():
    """With all tokens revealed at once the joint is lost, the marginals are not."""
    samples = mask_diffusion.sample(oracle, torch.full((20_000, 3), MASK), MASK, 1,
                                    torch.Generator().manual_seed(1))
    statistic, freedom = chi_square(samples)
    assert statistic > 2 * freedom + 100
    marginal = torch.bincount(samples[:, 0], minlength=V) / len(samples)
    assert torch.allclose(marginal.double(), JOINT.sum((1, 2)), atol=0.015)      # 4 deviations


def test_expected_loss_with_the_oracle_is_the_negative_log_likelihood():
    for x in ([0, 1, 2], [3, 3, 0]):
        exact = -float(torch.log(JOINT[tuple(x)]))
        ids = torch.tensor(x).expand(400_000, 3)
        bound = 3 * float(mask_diffusion.loss(oracle, ids, MASK, generator=torch.Generator().manual_seed(2)))
        assert bound == pytest.approx(exact, rel=0.01)      # Monte Carlo deviation under 0.3 %, T_MIN 0.1 %


def test_frozen_tokens_are_never_masked_and_carry_no_loss():
    frozen = torch.tensor([True, False, False]).expand(512, 3)
    seen = []

    def watch(ids):
        seen.append(ids)
        return oracle(ids)
    ids = torch.tensor([2, 1, 0]).expand(512, 3)
    value = mask_diffusion.loss(watch, ids, MASK, frozen, torch.Generator().manual_seed(0))
    assert (seen[0][:, 0] == 2).all() and (seen[0][:, 1:] == MASK).any()

    def wrong_at_frozen(ids):
        logits = oracle(ids).clone()
        logits[:, 0] = -logits[:, 0]
        return logits
    assert value == mask_diffusion.loss(wrong_at_frozen, ids, MASK, frozen, torch.Generator().manual_seed(0))
    exact = -float(torch.log(JOINT[2, 1, 0] / JOINT[2].sum()))                # p(x2, x3 | x1), over 2 tokens
    ids = torch.tensor([2, 1, 0]).expand(400_000, 3)
    value = mask_diffusion.loss(oracle, ids, MASK, frozen[:1].expand(400_000, 3),
                                torch.Generator().manual_seed(1))
    assert 2 * float(value) == pytest.approx(exact, rel=0.01)


def test_sampling_changes_masked_tokens_only():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V + 1, (1000, 3), generator=generator)
    states = []
    out = mask_diffusion.sample(oracle, ids, MASK, 5, generator, trajectory=states)
    given = ids != MASK
    assert torch.equal(out[given], ids[given]) and (out != MASK).all()
    for _, state in states:
        assert torch.equal(state[given], ids[given])
    for (_, before), (_, after) in zip(states, states[1:]):
        assert torch.equal(before[before != MASK], after[before != MASK])     # once revealed, for good


def picked(ids, at, rows=None):
    return oracle(ids).flatten(0, 1)[at]


def test_a_batch_costs_at_most_one_evaluation_a_masked_token_and_rows_that_are_done_cost_none():
    whole, rows, tokens = [], [], []
    masked = torch.full((500, 3), MASK)
    masked[100:, 1:], masked[300:] = 2, torch.tensor([3, 1, 0])
    how = dict(mask_id=MASK, steps=1000, temperature=0)
    for order in ("random", "confidence"):
        for seen in (whole, rows, tokens):
            seen.clear()
        a = mask_diffusion.sample(lambda ids: whole.append(len(ids)) or oracle(ids), masked, order=order,
                                  generator=torch.Generator().manual_seed(0), **how)
        b = mask_diffusion.sample(lambda ids, at, live: rows.append(live) or tokens.append(len(at)) or picked(
            ids, at), masked, order=order, generator=torch.Generator().manual_seed(0), picks=True, **how)
        assert whole == [500] * 3 and torch.equal(a, b)
        assert [len(live) for live in rows] == [300, 100, 100] and rows[1].tolist() == list(range(100))
        assert tokens == ([300, 100, 100] if order == "random" else [500, 200, 100])   # of the head


def test_every_token_may_come_first_in_the_random_order():
    first = torch.zeros(3)
    walk = mask_diffusion.walk(oracle, torch.full((6000, 3), MASK), MASK, 10_000,
                               torch.Generator().manual_seed(0))
    (step, before), (_, after) = next(walk), next(walk)
    assert not step.any() and (before == MASK).all()
    first = (after != MASK).float().sum(0)
    assert torch.allclose(first / 6000, torch.full((3,), 1 / 3), atol=0.025)     # 4 deviations
    # and in 4 steps half of the tokens are there after two of them: each token's step is uniform
    ids, half = torch.full((20_000, 3), MASK), None
    for step, state in mask_diffusion.walk(oracle, ids, MASK, 4, torch.Generator().manual_seed(1)):
        half = state if half is None else torch.where((step <= 2)[:, None], state, half)
    # 4 deviations of independent steps
    assert float((half != MASK).float().mean()) == pytest.approx(0.5, abs=0.012)


def test_the_surest_token_comes_first_and_every_row_is_done_in_time():
    states, ids = [], torch.tensor([[MASK] * 3, [0, MASK, MASK], [1, 2, 3]])
    out = mask_diffusion.sample(oracle, ids, MASK, 10, temperature=0, trajectory=states, order="confidence")
    assert len(states) == 1 + 3 and (out != MASK).all() and torch.equal(out[2], ids[2]) and out[1, 0] == 0
    peaks = oracle(ids[:1])[..., :V].exp().amax(-1)[0]                        # of three masks, by enumeration
    first = states[1][1][0] != MASK
    assert first.sum() == 1 and first[peaks.argmax()]
    for steps in (1, 2):  # three masks over two evaluations: 2 + 1
        states = []
        mask_diffusion.sample(oracle, ids, MASK, steps, temperature=0, trajectory=states, order="confidence")
        assert len(states) == 1 + steps
    # at temperature 1 one token alone is drawn from its distribution: 4 deviations
    one = torch.tensor([[2, MASK, 1]]).expand(20_000, 3)
    drawn = mask_diffusion.sample(oracle, one, MASK, 1, torch.Generator().manual_seed(0), temperature=1.0,
                                  order="confidence")
    share = torch.bincount(drawn[:, 1], minlength=V) / 20_000
    assert torch.allclose(share.double(), JOINT[2, :, 1] / JOINT[2, :, 1].sum(), atol=0.015)


def test_training_times_cover_the_unit_interval_evenly():
    for seed in range(20):
        t, _ = mask_diffusion.draw((50, 1), torch.Generator().manual_seed(seed))
        assert 0 < t.min() and t.max() <= 1
        unit = (t - mask_diffusion.T_MIN) / (1 - mask_diffusion.T_MIN)
        gaps = unit.sort().values.diff()
        assert torch.allclose(gaps, torch.full((49,), 1 / 50), atol=1e-5)     # exactly 1/B apart
    t, _ = mask_diffusion.draw((100_000, 1), torch.Generator().manual_seed(0))
    assert 0.001 <= t.min() < 0.0011 and t.max() > 0.9999


def test_draws_follow_the_softmax_and_its_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]], dtype=torch.float64)
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for temperature in (1.0, 0.5):
        drawn = mask_diffusion.choose(logits.expand(100_000, 4), temperature, uniform)
        share = torch.bincount(drawn, minlength=4) / 100_000
        assert torch.allclose(share.double(), (logits[0] / temperature).softmax(0), atol=2e-5)
    assert mask_diffusion.choose(logits, 0.0, uniform[:1]).tolist() == [2]
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)       # the largest number below one
    assert mask_diffusion.choose(logits, 1.0, last).tolist() == [2]


def test_draws_are_made_in_float64_whatever_the_network_computes_in():
    """A float32 sum of 50,000 probabilities loses the tokens at its end, and a float32 number hits none."""
    logits = torch.full((1, 1, 50_001), 0.0).bfloat16()
    logits[..., 0] = 12.0                                        # a probability of 0.76
    seen = set()
    for seed in range(200):
        found = mask_diffusion.sample(lambda ids: logits, torch.full((1, 1), 50_000), 50_000, 1, seeds=[seed])
        u = mask_diffusion.uniforms((1, 1), torch.device("cpu"), None, [seed])
        u()
        p = logits[0, 0, :-1].double().softmax(0)
        assert int(found) == int((p.cumsum(0) <= float(u()) * p.sum()).sum())
        seen.add(int(found))
    assert 0 in seen and len(seen) > 20


@pytest.mark.parametrize("order, steps", [("random", [1, 4, 10_000]), ("confidence", [1, 2, 4])])
def test_one_token_at_a_time_is_an_exact_draw_of_the_joint(order, steps):
    """Which comes first is decided by what is known, not by what is drawn: the joint is kept."""
    found = []
    for each in steps:
        drawn = mask_diffusion.sample(wide, torch.full((50_000, 4), WIDE_MASK), WIDE_MASK, each,
                                      torch.Generator().manual_seed(1), order=order)
        ratio, chance = misfit(drawn)
        found.append(ratio)
    assert found == sorted(found, reverse=True) and found[-1] < chance < 10 < found[0]


@pytest.mark.parametrize("order, levels", [("threshold", [0.2, 0.4, 1.0]), ("eb", [9.0, 2.0, 0.01])])
def test_a_parallel_order_loses_less_the_tighter_it_is_and_nothing_in_the_limit(order, levels):
    found, evaluations = [], []
    for level in levels:
        calls = []
        drawn = mask_diffusion.sample(lambda ids: calls.append(1) or wide(ids), torch.full(
            (50_000, 4), WIDE_MASK), WIDE_MASK, 4, torch.Generator().manual_seed(1), order=order, level=level)
        ratio, chance = misfit(drawn)
        found.append(ratio)
        evaluations.append(len(calls))
    assert found == sorted(found, reverse=True) and evaluations == sorted(evaluations)
    assert evaluations[-1] == 4 and found[-1] < chance and found[0] > 20


def test_which_tokens_pass_at_once():
    """The first row has three masked tokens of five, the second two; a given one is never selected."""
    masked = torch.tensor([[True, False, True, True, False], [False, True, False, False, True]])
    quota, when = torch.tensor([[2], [1]]), torch.tensor([[3, 1, 2, 2, 1], [1, 4, 1, 1, 5]])
    p = torch.tensor([[0.95, 0.05], [0.4, 0.6], [0.01, 0.99], [0.5, 0.5], [0.3, 0.7]], dtype=torch.float64)

    def selected(order, level=None):
        row = mask_diffusion.ORDERS[order]
        turn = mask_diffusion.Turn(masked, when, quota, level or row.level, p if row.needs_p else None)
        return [[i for i, chosen in enumerate(row) if chosen] for row in (masked & row.select(turn)).tolist()]
    assert selected("random") == [[2, 3], [1]]                   # whose step is next
    assert selected("confidence") == [[0, 3], [4]]               # two, and one
    assert selected("threshold", 0.9) == [[0, 3], [4]] and selected("threshold", 0.55) == [[0, 2, 3], [4]]
    entropy = torch.special.entr(p).sum(-1).tolist()             # 0.20, 0.67, 0.06; 0.69, 0.61
    assert selected("eb", 0.01) == [[3], [4]]
    assert selected("eb", entropy[2] + 1e-6) == [[0, 3], [4]]
    assert selected("eb", entropy[4] + 1e-6) == [[0, 2, 3], [1, 4]]
    assert selected("eb", 9.0) == [[0, 2, 3], [1, 4]]


def test_a_new_order_is_one_function_and_one_row(monkeypatch):
    """From right to left, one token a step: an exact draw of the joint, as any order is."""
    def select_last(turn):
        place = torch.arange(turn.masked.shape[1]).expand_as(turn.masked)
        return mask_diffusion.largest(torch.where(turn.masked, place, -1), 1)
    monkeypatch.setitem(mask_diffusion.ORDERS, "right to left", mask_diffusion.Order(select_last, needs_p=False))
    states = []
    drawn = mask_diffusion.sample(wide, torch.full((50_000, 4), WIDE_MASK), WIDE_MASK, 9, order="right to left",
                                  generator=torch.Generator().manual_seed(1), trajectory=states)
    ratio, chance = misfit(drawn)
    assert ratio < chance and len(states) == 1 + 4
    assert (states[1][1][:, :3] == WIDE_MASK).all() and (states[1][1][:, 3] != WIDE_MASK).all()


def ending(ids):
    """Three tokens, 3 being the end: behind an end all is end, before it anything is as likely."""
    logits = torch.zeros(*ids.shape, V + 1, dtype=torch.float64)
    behind = ((ids == 3).cumsum(1) - (ids == 3).long()) > 0
    logits[behind] = torch.tensor([-torch.inf] * 3 + [0.0, 9.0], dtype=torch.float64)
    return logits


def test_behind_an_end_all_is_padding_at_once_and_is_not_evaluated():
    ids, asked = torch.full((200, 8), MASK), []
    ids[:, 0] = 3                                                # given, and so no end of what is written
    how = dict(mask_id=MASK, steps=100, end=(3, 2))
    tail = lambda ids: ending(ids[:, 1:])[:, [0, *range(7)]].flatten(0, 1)       # of the first: never asked
    out = mask_diffusion.sample(lambda ids, at, rows: asked.append(len(at)) or tail(ids)[at], ids,
                                generator=torch.Generator().manual_seed(0), picks=True, **how)
    for row in out.tolist():
        assert row[0] == 3
        if 3 in row[1:]:
            at = row.index(3, 1)
            assert row[at + 1:] == [2] * (7 - at)
    plain = []
    mask_diffusion.sample(lambda ids, at, rows: plain.append(len(at)) or tail(ids)[at], ids, MASK, 100,
                          torch.Generator().manual_seed(0), picks=True)
    assert sum(plain) == 200 * 7 and sum(asked) < 0.7 * sum(plain)
    states = []                                                  # its marginal: 0.25 everywhere, so at 1
    cut = mask_diffusion.sample(ending, ids[:, 1:], generator=torch.Generator().manual_seed(0), canvas=0.2,
                                trajectory=states, **how)
    assert (cut == torch.tensor([3] + [2] * 6)).all() and len(states) == 2


def test_a_row_of_its_own_seed_is_the_same_in_any_batch():
    ids = torch.full((64, 3), MASK)
    for order in mask_diffusion.ORDERS:
        how = dict(mask_id=MASK, steps=5, order=order)
        seeds = list(range(64))
        whole = mask_diffusion.sample(oracle, ids, seeds=seeds, **how)
        some = mask_diffusion.sample(oracle, ids[:20], seeds=seeds[30:50], **how)
        assert torch.equal(some, whole[30:50]) and len(whole.unique(dim=0)) > 8
        same = mask_diffusion.sample(oracle, ids[:4], seeds=[7] * 4, **how)
        assert torch.equal(same, whole[7:8].expand(4, -1))


def test_the_likelihood_is_exact_with_the_oracle_within_its_error():
    for x, given in (([0, 1, 2], 0), ([3, 3, 0], 0), ([2, 1, 0], 1)):
        exact = -float(torch.log(JOINT[tuple(x)] / (JOINT[x[0]].sum() if given else 1)))
        few, error = mask_diffusion.likelihood(picked, torch.tensor(x), MASK, torch.arange(3) < given, 60,
                                               torch.Generator().manual_seed(0))
        assert abs(few - exact) < 4 * error < 3.0
        many, small = mask_diffusion.likelihood(picked, torch.tensor(x), MASK, torch.arange(3) < given, 6000,
                                                torch.Generator().manual_seed(0))
        assert abs(many - exact) < 4 * small and small == pytest.approx(error / 10, rel=0.5)
    assert mask_diffusion.likelihood(picked, torch.tensor(x), MASK, torch.ones(3, dtype=torch.bool)) == (0, 0)


def test_guidance_of_text_is_a_power_of_the_two_likelihoods():
    """With scale s: p^s / q^(s - 1), normalised."""
    known, null = torch.randn(2, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ask = lambda logits: lambda ids, at, rows: 3 + logits.flatten(0, 1)[at]
    ids, at = torch.tensor([[MASK, MASK, MASK], [1, MASK, 2]]), torch.tensor([0, 4])
    p, q = (mask_diffusion.forbid(x, MASK).softmax(-1).flatten(0, 1)[at] for x in (known, null))
    found = mask_diffusion.guide(ask(known), ask(null), 2.5, MASK)(ids, at, None).softmax(-1)
    wanted = (p ** 2.5 / q ** 1.5).nan_to_num(0.0)
    assert torch.allclose(found, wanted / wanted.sum(-1, keepdim=True))


def test_bad_arguments_are_refused():
    ids = torch.full((1, 3), MASK)
    for how, message in ((dict(steps=0), "steps must be at least 1"),
                         (dict(steps=1, order="sideways"), "sideways"),
                         (dict(steps=1, temperature=-1), "temperature must be 0 or more"),
                         (dict(steps=1, level=0.5), "order random has no level"),
                         (dict(steps=1, level=1.5, order="threshold"), "above 0 and at most 1, got 1.5"),
                         (dict(steps=1, level=0, order="eb"), "must be above 0, got 0")):
        with pytest.raises(ValueError, match=message):
            mask_diffusion.sample(oracle, ids, MASK, **how)
    with pytest.raises(ValueError, match="together"):
        mask_diffusion.loss(oracle, ids, MASK, t=torch.ones(1))


def test_a_flat_weight_is_as_much_as_one_over_t_over_all_times_and_less_at_small_ones():
    """Of four tokens that are equally likely both losses are log 4 a token; a row's is 2 t against 1."""
    ids = torch.randint(0, 4, (4000, 8), generator=torch.Generator().manual_seed(0))
    drawn = dict(zip(("t", "uniform"), mask_diffusion.draw((4000, 8), torch.Generator().manual_seed(1))))
    even = lambda ids: torch.zeros(*ids.shape, 5)
    steep, flat = (mask_diffusion.errors(even, ids, 4, **drawn, weight=weight) for weight in ("1/t", "flat"))
    assert torch.allclose(flat, 2 * drawn["t"] * steep, rtol=1e-5)
    assert float(flat.mean()) / 8 == pytest.approx(math.log(4), rel=0.03)
    assert float(steep.mean()) / 8 == pytest.approx(math.log(4), rel=0.1)


def test_logits_of_the_masked_tokens_alone_are_enough():
    ids = torch.randint(0, 4, (5, 8), generator=torch.Generator().manual_seed(0))
    frozen = torch.rand(5, 8, generator=torch.Generator().manual_seed(1)) < 0.2
    drawn = dict(zip(("t", "uniform"), mask_diffusion.draw((5, 8), torch.Generator().manual_seed(2))))
    told = torch.randn(5, 8, 5, generator=torch.Generator().manual_seed(3))
    asked, how = [], dict(frozen=frozen, **drawn)
    whole = mask_diffusion.errors(lambda noised: told, ids, 4, **how)
    answer = lambda noised, at: asked.append((noised, at)) or told.flatten(0, 1)[at]
    some = mask_diffusion.errors(answer, ids, 4, **how, picks=True)
    (noised, at), = asked
    assert torch.equal(whole, some) and 0 < len(at) < 30
    assert (noised.flatten()[at] == 4).all() and not frozen.flatten()[at].any()
