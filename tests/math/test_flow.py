"""Test flow.py on a Gaussian, for which velocity, flow map and minimal loss have closed forms."""

import math

import pytest
import torch

import flow
from helpers import seeded
from model import velocity_to

MEAN = torch.tensor([0.7, -1.2], dtype=torch.float64)
VARIANCE = torch.tensor([0.25, 2.0], dtype=torch.float64)     # of x, per axis


def exact_velocity(x, t):
    """Return E[e - x | x_t] for x ~ N(MEAN, VARIANCE): Gaussian conditioning, axis by axis."""
    t = t.double().view(-1, 1)
    x_t_variance = (1 - t) ** 2 * VARIANCE + t ** 2
    return -MEAN + (t - (1 - t) * VARIANCE) / x_t_variance * (x - (1 - t) * MEAN)


def exact_flow(noise):
    """Return the data that the Gaussian's flow maps noise to; the map is affine."""
    return MEAN + VARIANCE.sqrt() * noise


def draw_noise(n=2_000, seed=2):
    return torch.randn(n, 2, dtype=torch.float64, generator=seeded(seed))


def linear_grid(steps, shift=1.0):
    return flow.shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


# ----------------------------------------------------------------------------------------- the loss

def test_loss_is_least_at_the_true_velocity():
    x = exact_flow(draw_noise(200_000, seed=0))
    loss = lambda velocity: float(flow.loss(velocity, x, seeded(3)))
    best = loss(exact_velocity)
    t = flow.draw_times(200_000, seeded(3))
    t = t.double().view(-1, 1)
    x_t_variance = (1 - t) ** 2 * VARIANCE + t ** 2
    variance = 1 + VARIANCE - (t - (1 - t) * VARIANCE) ** 2 / x_t_variance
    # 5 standard errors of 200,000 draws (0.4 % each): one seed in two million
    assert best == pytest.approx(float(variance.mean()), rel=0.02)
    changes = [lambda x, t: 0.1, lambda x, t: -0.1, lambda x, t: 0.1 * x,
               lambda x, t: 0.1 * t.view(-1, 1)]
    for change in changes:
        assert loss(lambda x, t: exact_velocity(x, t) + change(x, t)) > best


def test_perfect_data_prediction_has_no_loss_at_any_time():
    x = torch.randn(4, 3, 8, 8, generator=seeded(0))
    noise = torch.randn(4, 3, 8, 8, generator=seeded(1))

    def errors(data, t):
        velocity = lambda x_t, s: velocity_to(data, x_t, s)
        return flow.errors(velocity, x, t, noise, floor=0.05)
    for time in (1e-3, 0.01, 0.04, 0.05, 0.1, 0.7, 1.0):
        t = torch.full((4,), time)
        assert errors(x, t).max() < 1e-8                         # float32: (6e-8 / 0.05)^2 = 1e-12
        for shift in (-0.05, 0.05):                              # least at the clean image
            assert (errors(x + shift * (noise - x), t) > 1e-4).all()


def test_floor_weighs_only_times_below_it():
    x = torch.randn(5, 3, 8, 8, generator=seeded(0))
    noise = torch.randn(5, 3, 8, 8, generator=seeded(1))
    t = torch.tensor([0.1, 0.3, 0.6, 1.0, 0.025])
    errors = lambda floor: flow.errors(lambda x_t, s: 0 * x_t, x, t, noise, floor)
    assert torch.equal(errors(0.0)[:4], errors(0.05)[:4])
    assert torch.allclose(errors(0.05)[4], errors(0.0)[4] / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_one_per_sample_in_float32(dtype):
    x = torch.randn(4, 3, 8, 8, generator=seeded(0)).to(dtype)
    noise = torch.randn(4, 3, 8, 8, generator=seeded(1))
    t = torch.tensor([0.501, 0.999, 0.2503, 0.7331])
    times = []

    def velocity(x_t, t):
        times.append(t)
        return torch.zeros_like(x_t)
    errors = flow.errors(velocity, x, t, noise)
    expected = (noise - x.float()).square().mean((1, 2, 3))
    assert errors.dtype == torch.float32
    assert torch.allclose(errors, expected, rtol=1e-6)           # float32 sums in another order
    assert torch.equal(times[0], t)                              # 0.501 would be 0.5 in bfloat16


def test_split_batch_has_the_loss_of_the_whole():
    x = torch.randn(8, 3, generator=seeded(1))
    generator = seeded(0)
    t = flow.draw_times(8, generator)
    noise = torch.randn(8, 3, generator=generator)
    velocity = lambda x, t: x * t[:, None]
    halves = [flow.errors(velocity, x[half], t[half], noise[half]).mean()
              for half in (slice(4), slice(4, 8))]
    whole = flow.loss(velocity, x, seeded(0))
    assert float(sum(halves) / 2) == pytest.approx(float(whole), rel=1e-6)       # float32 sums


# --------------------------------------------------------------------------------- times and levels

@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_times_are_logit_normal_with_a_shifted_mean(shift):
    t = flow.draw_times(100_000, seeded(0), shift)
    logit = torch.logit(t.double())
    assert abs(logit.mean() - math.log(shift)) < 0.02  # 6 standard errors of 100,000 draws
    assert abs(logit.std() - 1) < 0.02                           # 9 standard errors


@pytest.mark.parametrize("name", flow.TIMES)
def test_each_distribution_of_times_is_in_range_and_repeats(name):
    t = flow.draw_times(1000, seeded(0), times=name)
    assert t.shape == (1000,) and ((0 <= t) & (t <= 1)).all() and t.std() > 0
    assert torch.equal(t, flow.draw_times(1000, seeded(0), times=name))
    assert flow.draw_times(1, seeded(0), times=name).shape == (1,)


def test_uniform_times_are_uniform():
    t = flow.draw_times(100_000, seeded(1), times="uniform")
    bins = torch.bincount((t * 20).long().clamp(max=19), minlength=20).double()
    # chi-square of 100,000 draws in 20 bins: 43.8 at 19 degrees of freedom, one seed in 1000
    assert float(((bins - 5000) ** 2 / 5000).sum()) < 43.8


def test_sigmas_are_those_of_the_published_scheduler():
    # printed by the release's scheduler (shift 3), to six digits
    expected = [1.0, 0.857692, 0.602151, 0.008929, 0.0]
    assert flow.sigmas(4, 3.0).tolist() == pytest.approx(expected, abs=1e-6)
    expected = [0.199827, 0.110906, 0.008929, 0.0]
    assert flow.sigmas(28, 3.0)[-4:].tolist() == pytest.approx(expected, abs=1e-6)
    assert len(flow.sigmas(28)) == 29


def test_sigmas_end_at_the_least_level_and_zero():
    expected = [1, 0.683333, 0.366667, 0.05, 0]
    assert flow.sigmas(4, 1.0, 0.05).tolist() == pytest.approx(expected, abs=1e-6)   # six digits


def test_zero_steps_are_refused():
    with pytest.raises(ValueError, match="steps.* 0"):
        flow.sigmas(0)


# ------------------------------------------------------------------------------------------ solvers

@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_solver_error_falls_with_its_order(solver, order, shift):
    """Compare errors with 48 to 384 evaluations of the velocity, in even and uneven steps."""
    noise = draw_noise()
    errors = []
    for evaluations in (48, 96, 192, 384):
        grid = linear_grid(evaluations // flow.SOLVERS[solver].evaluations, shift)
        *_, (t, x, clean) = flow.walk(exact_velocity, noise, grid, solver)
        errors.append((x - exact_flow(noise)).abs().mean())
        assert t == 0 and x is clean
    for coarse, fine in zip(errors, errors[1:]):
        assert 0.8 * 2 ** order < coarse / fine < 1.2 * 2 ** order       # 20 % for higher orders
    if solver == "heun":
        euler = flow.euler(exact_velocity, noise, linear_grid(48, shift))
        assert errors[0] < 0.5 * (euler - exact_flow(noise)).abs().mean()


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_each_solver_converges(solver):
    noise = draw_noise()
    errors = []
    for steps in (64, 128):
        *_, (t, x, clean) = flow.walk(exact_velocity, noise, linear_grid(steps), solver)
        errors.append(float((x - exact_flow(noise)).abs().mean()))
    assert errors[1] < 0.6 * errors[0] < 0.02        # half the error, or less with a higher order


def test_euler_samples_have_the_mean_and_covariance_of_the_data():
    noise = draw_noise(100_000, seed=1)
    x = flow.euler(exact_velocity, noise, flow.sigmas(100, shift=1.0).double())
    # the standard errors of 100,000 draws are 0.0045 and 0.009; 100 Euler steps add under 0.02
    assert torch.allclose(x.mean(0), MEAN, atol=0.02)
    assert torch.allclose(x.T.cov(), torch.diag(VARIANCE), atol=0.06)


@pytest.mark.parametrize("solver, expected", [("euler", 4), ("heun", 6)])
def test_a_walk_evaluates_the_velocity_this_often(solver, expected):
    grid = torch.tensor([1.0, 0.5, 0.3, 0.1, 0.0])  # two steps leave half of the noise or more
    calls = []

    def velocity(x, t):
        calls.append(t)
        return exact_velocity(x, t)
    *_, _ = flow.walk(velocity, draw_noise(5), grid, solver)
    assert len(calls) == expected


def test_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="sideways"):
        next(flow.walk(exact_velocity, draw_noise(5), linear_grid(4), "sideways"))


def test_bfloat16_noise_is_walked_at_exact_times():
    times = []

    def velocity(x, t):
        times.append(t)
        return torch.zeros_like(x)
    x = flow.euler(velocity, torch.randn(4, 3, generator=seeded(0)).bfloat16(), flow.sigmas(28))
    assert torch.equal(torch.cat(times), flow.sigmas(28)[:-1]) and x.dtype == torch.float32


def test_walk_yields_each_state_and_pins_its_given_part():
    noise = torch.randn(5, 2, generator=seeded(0))
    given = torch.tensor([3.0, -4.0])
    is_given = torch.tensor([True, False])
    line = lambda t: (1 - t) * given + t * noise
    velocity = lambda x, t: exact_velocity(x, t).float()
    pin = lambda x, t: torch.where(is_given, line(t), x)
    states = list(flow.walk(velocity, noise, flow.sigmas(6, 1.0), pin=pin))
    assert [float(t) for t, _, _ in states] == flow.sigmas(6, 1.0).tolist()
    for t, x, clean in states:
        assert torch.equal(x[:, 0], line(t)[:, 0])
        predicted = x - t * velocity(x, t.view(1)) if t else x
        assert torch.allclose(clean, predicted, atol=1e-6)       # float32
    _, x, _ = states[-1]
    assert torch.equal(x[:, 0], given[0].expand(5)) and len(set(x[:, 1].tolist())) == 5


def test_predicted_data_samples_as_the_velocity_does():
    noise = draw_noise()

    def velocity(x, t):
        data = x - t.view(-1, 1) * exact_velocity(x, t)
        return velocity_to(data, x, t)
    for steps, shift in ((28, 1.0), (28, 3.0), (400, 1.0)):
        sigmas = flow.sigmas(steps, shift).double()
        x = flow.euler(velocity, noise, sigmas)
        assert torch.allclose(x, flow.euler(exact_velocity, noise, sigmas), atol=1e-9)   # float64


# ----------------------------------------------------------------------------------------- guidance

def test_guidance_combines_text_and_null_in_one_evaluation():
    batches = []

    def velocity(x, t):
        batches.append(len(x))
        return torch.cat([torch.full((2, 1), 3.0), torch.full((2, 1), 1.0)])
    v = flow.guide(velocity, 7.0)(torch.zeros(2, 1), torch.ones(1))
    assert batches == [4] and v.flatten().tolist() == [1 + 7 * 2] * 2


def text_and_null(x, t):
    """Return the velocities x^2 with the text and x without; only x^2 for five rows."""
    return torch.cat([x[:5] ** 2, x[5:]])


def test_guidance_outside_its_interval_is_plain_and_halves_the_batch():
    x = torch.randn(5, 3, 2, 2, generator=seeded(0))
    batches = []

    def velocity(x, t):
        batches.append(len(x))
        return text_and_null(x, t)
    guided = flow.guide(velocity, 3.0, interval=(0.2, 0.9))
    for t in (0.2, 0.5, 0.9):
        assert torch.equal(guided(x, torch.tensor([t])), x + 3 * (x ** 2 - x))
    for t in (0.1, 0.95):
        assert torch.equal(guided(x, torch.tensor([t])), x ** 2)
    assert batches == [10, 10, 10, 5, 5]


def test_guidance_of_scale_one_is_the_text_velocity():
    x = torch.randn(5, 3, 2, 2, generator=seeded(0))
    v = flow.guide(text_and_null, 1.0, interval=(0.0, 1.0))(x, torch.tensor([0.5]))
    assert torch.allclose(v, x ** 2, atol=1e-6)                  # float32: x + (x^2 - x)


def test_reversed_guidance_interval_is_refused():
    with pytest.raises(ValueError, match="interval.*0.9, 0.2"):
        flow.guide(text_and_null, 3.0, interval=(0.9, 0.2))
