"""data.py: the order of an epoch, and what is made ahead."""

import os
import signal
import time
from collections import Counter

import pytest
import torch

import data
from common.cli import UserError
from dataset import workers
from dataset.workers import feed


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 7025])
def test_an_epoch_is_a_permutation_and_differs_from_the_next_one(size):
    epochs = [data.permute(torch.arange(size), size, f"epoch {e}").tolist() for e in range(40)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 7:
        assert len({tuple(epoch) for epoch in epochs}) == 40
        assert len({epoch[0] for epoch in epochs}) > 30          # of 40: a repeat or two are expected


def test_a_billion_positions_need_no_memory_and_repeat_nothing():
    started, n = time.process_time(), 10**9
    found = data.permute(torch.arange(10**6), n, "run")
    assert 10**6 / (time.process_time() - started) > 2e5  # README: over a million a second on a free core
    assert len(found.unique()) == 10**6 and found.min() >= 0 and found.max() < n
    bins = torch.bincount(found * 1000 // n, minlength=1000).double()
    assert float(((bins - 1000) ** 2 / 1000).sum()) < 999 + 4 * (2 * 999) ** 0.5        # 4 deviations
    both = torch.stack([found[:-1], found[1:]]).double()
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.004


def test_a_mixture_has_its_shares_exactly_and_every_sample_once_an_epoch():
    sizes, weights, n = [50, 30, 7], [5.0, 2.0, 1.0], 8000
    found = data.locate(torch.arange(n), sizes, weights, "run")
    counts = Counter(k for k, _, _ in found)
    assert [abs(counts[k] - n * w / 8) <= 1 for k, w in enumerate(weights)] == [True] * 3
    for k, size in enumerate(sizes):
        places = [(epoch, place) for source, epoch, place in found if source == k]
        assert places == sorted(places, key=lambda found: found[0])
        for epoch in range(len(places) // size):
            assert sorted(place for e, place in places if e == epoch) == list(range(size))
    dealt = [data.locate(torch.arange(rank, n, 4), sizes, weights, "run") for rank in range(4)]
    assert [place for row in zip(*dealt) for place in row] == found
    assert data.locate(torch.arange(n), sizes, weights, "another") != found


def squares(step):
    return dict(step=torch.tensor(step), square=torch.tensor(step) ** 2)


def test_what_is_made_ahead_is_the_same_with_any_number_of_workers():
    made = [[(int(one["step"]), int(one["square"])) for one in feed(squares, range(3, 40), workers)]
            for workers in (0, 1, 3)]
    assert made[0] == made[1] == made[2] == [(step, step * step) for step in range(3, 40)]


def broken(step):
    if step == 4:
        raise UserError("photo 4 is broken")
    return squares(step)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_a_worker_is_told_as_it_would_be_here(workers):
    with pytest.raises(UserError, match="^photo 4 is broken$"):
        list(feed(broken, range(9), workers))


def terminated(step):
    if step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return squares(step)


def test_a_job_that_is_ended_ends_its_workers_last():
    """SIGTERM goes to every process of a job; the one that trains finishes its step, and saves."""
    made = feed(terminated, range(9), 2)
    assert [int(one["step"]) for one in made] == list(range(9))
    begun, made = time.time(), feed(terminated, range(50), 2)
    next(made)
    made.close()                                                 # the workers end without being told to
    assert time.time() - begun < 5


def killed(step):
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return squares(step)


def test_a_worker_that_is_killed_ends_the_run_with_one_line():
    with pytest.raises(UserError, match="a process that reads data ahead was lost .*; the same command"):
        with workers.readers_watched():
            for _ in feed(killed, range(9), 1):
                pass
