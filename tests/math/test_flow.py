"""flow.py against a Gaussian, whose velocity, flow map and least loss are known in closed form."""

import math

import pytest
import torch

import flow
from model import T_FLOOR, velocity_to

MEAN = torch.tensor([0.7, -1.2], dtype=torch.float64)
VARIANCE = torch.tensor([0.25, 2.0], dtype=torch.float64)     # of x, per axis


def velocity(x, t):
    """E[e - x | x_t] for x ~ N(MEAN, VARIANCE): Gaussian conditioning, axis by axis."""
    t = t.double().view(-1, 1)
    x_t_variance = (1 - t) ** 2 * VARIANCE + t ** 2
    return -MEAN + (t - (1 - t) * VARIANCE) / x_t_variance * (x - (1 - t) * MEAN)


def draw_data(n, seed=0):
    noise = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return MEAN + VARIANCE.sqrt() * noise


def test_a_perfect_network_that_predicts_data_has_no_loss_at_any_time():
    """Its velocity and its target are divided by the same max(t, floor); the loss is least at the clean image."""
    x, noise = (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))
    for time in (1e-3, 0.01, 0.04, 0.05, 0.1, 0.7, 1.0):
        t = torch.full((4,), time)
        error = lambda data: flow.errors(lambda x_t, s: velocity_to(data, x_t, s, 0.05), x, t=t, noise=noise,
                                         floor=0.05)
        assert error(x).max() < 1e-8
        for away in (-0.05, 0.05):
            assert (error(x + away * (noise - x)) > 1e-4).all()
    t = torch.tensor([0.1, 0.3, 0.6, 1.0])                       # above the floor nothing changes
    plain, floored = (flow.errors(lambda x_t, s: 0 * x_t, x, t=t, noise=noise, floor=f) for f in (0.0, 0.05))
    assert torch.equal(plain, floored)


def test_samples_have_the_mean_and_covariance_of_the_target():
    noise = torch.randn(100_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = flow.euler(velocity, noise, flow.sigmas(400, shift=1.0).double())
    # 100 000 draws: a mean is off by 1.4 / sqrt(1e5) = 0.0045, 0.02 is over four deviations; Euler adds 0.01
    assert torch.allclose(x.mean(0), MEAN, atol=0.02)
    assert torch.allclose(x.T.cov(), torch.diag(VARIANCE), atol=0.04)


def test_euler_error_falls_like_one_over_the_steps():
    noise = torch.randn(2_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    exact = MEAN + VARIANCE.sqrt() * noise                    # the flow map of a Gaussian is affine
    errors = [(flow.euler(velocity, noise,
                          torch.linspace(1, 0, n + 1, dtype=torch.float64)) - exact).abs().mean()
              for n in (50, 100, 200, 400)]
    for coarse, fine in zip(errors, errors[1:]):
        assert 1.8 < coarse / fine < 2.2


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_the_error_of_each_solver_falls_with_its_order(solver, order):
    """At 48 to 385 evaluations, of any solver, on a Gaussian, whose flow map is affine; uneven steps too."""
    noise = torch.randn(2_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    exact = MEAN + VARIANCE.sqrt() * noise
    for shift in (1.0, 3.0):
        errors = []
        for n in (48, 96, 192, 384):
            grid = torch.linspace(1, 0, n // flow.SOLVERS[solver].evaluations + 1, dtype=torch.float64)
            grid = flow.shifted(grid, shift)
            *_, (t, x, clean) = flow.walk(velocity, noise, grid, solver)
            errors.append((x - exact).abs().mean())
            assert t == 0 and x is clean
        for coarse, fine in zip(errors, errors[1:]):
            assert 0.8 * 2 ** order < coarse / fine < 1.2 * 2 ** order
    grid, calls = torch.tensor([1.0, 0.5, 0.3, 0.1, 0.0]), []    # two steps leave half of the noise or more
    counted = lambda x, t: calls.append(1) or velocity(x, t)
    *_, _ = flow.walk(counted, noise, grid, solver)
    assert len(calls) == flow.evaluations(grid, solver) == (4 if solver == "euler" else 6)
    assert order == 1 or errors[0] < 0.5 * (flow.euler(velocity, noise, flow.shifted(
        torch.linspace(1, 0, 49, dtype=torch.float64), 3.0)) - exact).abs().mean()
    with pytest.raises(ValueError, match="solver must be one of euler, heun, got 'rk4'"):
        next(flow.walk(velocity, noise, grid, "rk4"))


def test_the_walk_shows_its_states_and_a_pinned_part_stays_on_its_line():
    noise, known = torch.randn(5, 2), torch.tensor([3.0, -4.0])
    where = torch.tensor([False, True])                          # the first axis is known
    line = lambda t: (1 - t) * known + t * noise
    states = list(flow.walk(lambda x, t: velocity(x, t).float(), noise, flow.sigmas(6, 1.0),
                            pin=lambda x, t: torch.where(where, x, line(t))))
    assert [float(t) for t, _, _ in states] == flow.sigmas(6, 1.0).tolist()
    for t, x, clean in states:
        assert torch.equal(x[:, 0], line(t)[:, 0])
        assert torch.allclose(clean, x - t * velocity(x, t.view(1)).float() if t else x, atol=1e-6)
    assert torch.equal(states[-1][1][:, 0], known[0].expand(5)) and len(set(states[-1][1][:, 1])) == 5


def test_drawing_from_the_predicted_data_is_drawing_from_the_velocity():
    noise = torch.randn(2_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    predicted = lambda x, t: velocity_to(x - t.view(-1, 1) * velocity(x, t), x, t, T_FLOOR["draw"])
    for steps, shift in ((28, 1.0), (28, 3.0), (400, 1.0)):
        sigmas = flow.sigmas(steps, shift).double()
        assert torch.allclose(flow.euler(predicted, noise, sigmas), flow.euler(velocity, noise, sigmas),
                              atol=1e-9)
    exact = MEAN + VARIANCE.sqrt() * noise
    errors = [(flow.euler(predicted, noise, flow.sigmas(n, 1.0).double()) - exact).abs().mean()
              for n in (50, 100, 200)]
    assert errors[0] / errors[1] > 1.8 and errors[1] / errors[2] > 1.8


def test_loss_is_least_at_the_true_velocity_and_equals_the_conditional_variance_there():
    x = draw_data(200_000)
    at = lambda v: float(flow.loss(v, x, torch.Generator().manual_seed(3)))
    best = at(velocity)
    t, _ = flow.draw((200_000, 2), torch.Generator().manual_seed(3))
    t = t.double().view(-1, 1)
    left = 1 + VARIANCE - (t - (1 - t) * VARIANCE) ** 2 / ((1 - t) ** 2 * VARIANCE + t ** 2)
    assert best == pytest.approx(float(left.mean()), rel=0.02)  # Monte Carlo: relative deviation about 0.004
    for change in (lambda x, t: 0.1, lambda x, t: -0.1, lambda x, t: 0.1 * x, lambda x,
                   t: 0.1 * t.view(-1, 1)):
        assert at(lambda x, t: velocity(x, t) + change(x, t)) > best


def test_errors_are_one_a_sample_in_float32_and_bf16_latents_keep_their_times():
    x, noise = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    t, seen = torch.tensor([0.501, 0.999, 0.2503, 0.7331]), []
    target = lambda x_t, t: seen.append((t, x_t.dtype)) or torch.zeros_like(x_t)
    for latents in (x, x.bfloat16()):
        found = flow.errors(target, latents, t=t, noise=noise)
        true = (noise - latents.float()).square().mean((1, 2, 3))
        assert found.dtype == torch.float32 and torch.allclose(found, true, rtol=1e-6)
        assert torch.equal(seen[-1][0], t)                   # 0.501 would be 0.5 in bf16
        assert flow.loss(target, latents, t=t, noise=noise) == found.mean()
    seen.clear()
    flow.euler(target, x.bfloat16(), flow.sigmas(28))
    assert torch.equal(torch.cat([t for t, _ in seen]), flow.sigmas(28)[:-1])


def test_sigmas_are_the_published_schedulers():
    # printed by the release's scheduler (shift 3)
    assert flow.sigmas(4, 3.0).tolist() == pytest.approx([1.0, 0.857692, 0.602151, 0.008929, 0.0], abs=1e-6)
    assert flow.sigmas(28, 3.0)[-4:].tolist() == pytest.approx([0.199827, 0.110906, 0.008929, 0.0], abs=1e-6)
    assert flow.sigmas(4, 1.0, 0.05).tolist() == pytest.approx([1, 0.683333, 0.366667, 0.05, 0], abs=1e-6)
    assert len(flow.sigmas(28)) == 29
    with pytest.raises(ValueError, match="at least 1, got 0"):
        flow.sigmas(0)


def test_guidance_is_the_published_combination_in_one_evaluation():
    calls = []

    def pair(x, t):
        calls.append(len(x))
        return torch.cat([torch.full((2, 1), 3.0), torch.full((2, 1), 1.0)])
    v = flow.guide(pair, 7.0)(torch.zeros(2, 1), torch.ones(1))
    assert calls == [4] and v.flatten().tolist() == [1 + 7 * 2] * 2


def both(x, t):
    """Two velocities, the text's of x^2 and the null's of x, or of five rows the text's alone."""
    return torch.cat([x[:5] ** 2, x[5:]])


def test_guidance_on_an_interval_is_plain_outside_and_asks_half():
    x, asked = torch.randn(5, 3, 2, 2), []
    velocity = lambda y, t: asked.append(len(y)) or both(y, t)
    guided = flow.guide(velocity, 3.0, interval=(0.2, 0.9))
    for t in (0.1, 0.2, 0.5, 0.9, 0.95):
        found, plain = guided(x, torch.tensor([t])), x ** 2
        assert torch.equal(found, x + 3 * (plain - x) if 0.2 <= t <= 0.9 else plain)
    assert asked == [5, 10, 10, 10, 5]
    whole = flow.guide(both, 1.0, interval=(0.0, 1.0))(x, torch.tensor([0.5]))
    assert torch.allclose(whole, x ** 2, atol=1e-6)              # a scale of 1 guides nowhere
    with pytest.raises(ValueError, match="the interval must be from low to high"):
        flow.guide(both, 3.0, interval=(0.9, 0.2))


def test_times_are_logit_normal_and_a_split_batch_keeps_its_draws():
    for shift in (1.0, 2.0):
        t, noise = flow.draw((100_000, 1), torch.Generator().manual_seed(0), shift)
        logit = torch.logit(t.double())
        # 6 and 9 deviations
        assert abs(logit.mean() - math.log(shift)) < 0.02 and abs(logit.std() - 1) < 0.02
    x = torch.randn(8, 3)
    t, noise = flow.draw((8, 3), torch.Generator().manual_seed(0))
    v = lambda x, t: x * t[:, None]
    parts = [flow.loss(v, x[i:i + 4], t=t[i:i + 4], noise=noise[i:i + 4]) for i in (0, 4)]
    assert float(sum(parts) / 2) == pytest.approx(float(flow.loss(v, x, torch.Generator().manual_seed(0))),
                                                  rel=1e-6)
    with pytest.raises(ValueError, match="together"):
        flow.loss(v, x, t=t)


def test_uniform_times_are_uniform_and_change_no_expected_error_of_a_constant():
    """Of x, e ~ N(0, 1) and v = 0 the velocity's error is 2, at whatever times."""
    for times in ("logit-normal", "uniform"):
        generator = torch.Generator().manual_seed(1)
        t, noise = flow.draw((100_000, 1, 1, 4), generator, times=times)
        x = torch.randn(noise.shape, generator=generator)
        error = float(flow.loss(lambda x_t, t: torch.zeros_like(x_t), x, t=t, noise=noise))
        assert error == pytest.approx(2, rel=0.01)
        if times == "uniform":          # 100,000 draws in 20 bins: 19 degrees of freedom, p = 0.001 is 43.8
            bins = torch.bincount((t * 20).long().clamp(max=19), minlength=20).double()
            assert float(((bins - 5000) ** 2 / 5000).sum()) < 43.8
