"""mask_diffusion.py against an oracle: the exact conditionals of a known joint over 3 tokens of 4 values."""

import math

import pytest
import torch

import mask_diffusion

V, MASK = 4, 4
JOINT = torch.rand(V, V, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
JOINT /= JOINT.sum()


def oracle(ids):
    """log p(x_i | the unmasked ones), (B, 3, 5); [MASK] itself gets the largest logit, as a trap."""
    B = len(ids)
    weight = JOINT.expand(B, V, V, V).clone()
    for axis in range(3):
        allowed = torch.nn.functional.one_hot(ids[:, axis].clamp(max=V - 1), V).double()
        allowed[ids[:, axis] == MASK] = 1
        weight *= allowed.view([B] + [V if a == axis else 1 for a in range(3)])
    marginals = [weight.sum([a + 1 for a in range(3) if a != axis]) for axis in range(3)]
    p = torch.stack(marginals, 1)
    logits = torch.log(p / p.sum(-1, keepdim=True) + 1e-300)
    return torch.cat([logits, torch.full((B, 3, 1), 50.0, dtype=torch.float64)], -1)


def chi_square(samples):
    cells = samples @ torch.tensor([16, 4, 1])
    seen, wanted = torch.bincount(cells, minlength=64).double(), JOINT.flatten() * len(samples)
    big = wanted >= 5  # small cells are pooled into one, as the test asks
    seen, wanted = (torch.cat([x[big], x[~big].sum()[None]]) for x in (seen, wanted))
    return float(((seen - wanted) ** 2 / wanted.clamp(min=1e-9)).sum()), len(seen) - 1


def test_sampler_reproduces_a_known_joint_distribution():
    # 10 000 steps for 3 tokens: two reveals in one step once in 3 300 rows, so one reveal a step in effect
    ids = torch.full((20_000, 3), MASK)
    samples = mask_diffusion.sample(oracle, ids, MASK, 10_000, torch.Generator().manual_seed(1))
    statistic, freedom = chi_square(samples)
    # mean `freedom`, deviation sqrt(2 freedom): 4 deviations, one false alarm in about 5 000 seeds
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    assert (samples != MASK).all()


def test_one_step_is_biased_towards_independent_tokens():
    """The check above can fail: with all tokens revealed at once the joint is lost, the marginals are not."""
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


def test_a_batch_costs_at_most_one_evaluation_a_masked_token_and_rows_that_are_done_cost_none():
    whole, rows = [], []
    masked = torch.full((500, 3), MASK)
    masked[100:, 1:], masked[300:] = 2, torch.tensor([3, 1, 0])
    how = dict(mask_id=MASK, steps=1000, temperature=0)
    for order in mask_diffusion.ORDERS:
        whole.clear(), rows.clear()
        a = mask_diffusion.sample(lambda ids: whole.append(len(ids)) or oracle(ids), masked, order=order,
                                  generator=torch.Generator().manual_seed(0), **how)
        b = mask_diffusion.sample(lambda ids, live: rows.append(live) or oracle(ids), masked, order=order,
                                  generator=torch.Generator().manual_seed(0), by_row=True, **how)
        assert whole == [500] * 3 and torch.equal(a, b)
        assert [len(live) for live in rows] == [300, 100, 100] and rows[1].tolist() == list(range(100))


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
    logits = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    for temperature in (1.0, 0.5):
        drawn = mask_diffusion.categorical(logits.expand(100_000, 3), temperature,
                                           torch.Generator().manual_seed(0))
        share = torch.bincount(drawn, minlength=3) / 100_000
        # 4 deviations
        assert torch.allclose(share.double(), (logits[0] / temperature).softmax(0), atol=0.007)
    assert mask_diffusion.categorical(logits, 0.0).tolist() == [2]


def test_draws_are_made_in_float64_whatever_the_network_computes_in():
    """float32 uniforms end at 1 - 2^-24: Gumbel noise over 17 never comes, nor do unlikely tokens."""
    logits = torch.randn(1, 2000, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids, generator = torch.full((1, 2000), 49), torch.Generator().manual_seed(1)
    found = mask_diffusion.sample(lambda ids: logits, ids, 49, 1, generator, temperature=0.7)
    generator.manual_seed(1)
    torch.randint(1, 2, ids.shape, generator=generator)
    gumbel = -(-torch.rand(2000, 50, generator=generator, dtype=torch.float64).log()).log()
    assert torch.equal(found[0], (logits[0].double() / 0.7 + gumbel)[:, :49].argmax(-1))


def test_bad_arguments_are_refused():
    ids = torch.full((1, 3), MASK)
    for how, message in ((dict(steps=0), "steps must be at least 1"),
                         (dict(steps=1, order="sideways"), "sideways"),
                         (dict(steps=1, temperature=-1), "temperature must be 0 or more")):
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


def test_logits_of_the_scored_tokens_alone_are_enough():
    ids = torch.randint(0, 4, (5, 8), generator=torch.Generator().manual_seed(0))
    frozen, unscored = torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(1)) < 0.2
    drawn = dict(zip(("t", "uniform"), mask_diffusion.draw((5, 8), torch.Generator().manual_seed(2))))
    told = torch.randn(5, 8, 5, generator=torch.Generator().manual_seed(3))
    asked, how = [], dict(frozen=frozen, unscored=unscored, **drawn)
    whole = mask_diffusion.errors(lambda noised: told, ids, 4, **how)
    answer = lambda noised, at: asked.append((noised, at)) or told.flatten(0, 1)[at]
    some = mask_diffusion.errors(answer, ids, 4, **how, picks=True)
    (noised, at), = asked
    assert torch.equal(whole, some) and 0 < len(at) < 30
    assert (noised.flatten()[at] == 4).all() and not unscored.flatten()[at].any()


def test_tokens_that_are_not_scored_are_masked_like_others():
    ids, seen = torch.arange(6).expand(3, 6), []
    unscored = torch.arange(6).expand(3, 6) > 3
    uniform = torch.rand(3, 6, generator=torch.Generator().manual_seed(2))
    drawn = dict(t=torch.full((3,), 0.5), uniform=uniform)

    def even(ids):
        seen.append(ids)
        return torch.zeros(*ids.shape, 8)
    found = mask_diffusion.errors(even, ids, 7, **drawn, unscored=unscored)
    mask_diffusion.errors(even, ids, 7, **drawn)
    masked = drawn["uniform"] < 0.5
    assert torch.equal(*seen) and (masked & unscored).any()
    assert torch.allclose(found, (masked & ~unscored).sum(1) * math.log(7) / 0.5)
