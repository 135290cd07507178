"""data.py: the order of an epoch; dataset/workers.py: batches that other processes prepare."""

import multiprocessing
import os
import signal
from collections import Counter

import pytest
import torch

import data
from common.cli import UserError
from dataset import workers
from dataset.workers import feed

# -------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 7025])
def test_each_epoch_is_another_permutation(size):
    epochs = [data.permute(torch.arange(size), size, f"epoch {e}").tolist() for e in range(40)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 7:
        assert len(set(map(tuple, epochs))) == 40
        assert len({epoch[0] for epoch in epochs}) > 30  # of 1,000: 0.8 repeats expected


def test_a_permutation_of_a_billion_is_uniform_without_repeats():
    size, n = 10**9, 10**6
    places = data.permute(torch.arange(n), size, "run")
    assert len(places.unique()) == n
    assert places.min() >= 0 and places.max() < size
    bins = torch.bincount(places * 1000 // size, minlength=1000).double()
    chi_square = float(((bins - 1000) ** 2 / 1000).sum())
    assert chi_square < 999 + 4 * (2 * 999) ** 0.5       # 999 df, 4 deviations: p < 1e-4
    neighbours = torch.stack([places[:-1], places[1:]]).double()
    correlation = float(torch.corrcoef(neighbours)[0, 1])
    assert abs(correlation) < 0.004                          # 4 standard errors of 10^6 pairs


SIZES, WEIGHTS, POSITIONS = [50, 30, 7], [5.0, 2.0, 1.0], 4000


@pytest.fixture(scope="module")
def mixture():
    """Return [(source, epoch, place)] of the first positions in a mixture of three sources."""
    return data.locate(torch.arange(POSITIONS), SIZES, WEIGHTS, "run")


def test_a_mixture_has_exactly_the_shares_of_its_weights(mixture):
    counts = Counter(source for source, _, _ in mixture)
    for source, weight in enumerate(WEIGHTS):
        assert abs(counts[source] - POSITIONS * weight / 8) <= 1         # a share is rounded down


def test_a_mixture_takes_every_sample_once_an_epoch(mixture):
    for source, size in enumerate(SIZES):
        epochs = [epoch for k, epoch, _ in mixture if k == source]
        places = [place for k, _, place in mixture if k == source]
        assert epochs == [i // size for i in range(len(epochs))]
        for begin in range(0, len(places) - size + 1, size):
            assert sorted(places[begin:begin + size]) == list(range(size))


def test_each_epoch_of_each_source_is_shuffled_anew():
    places = data.locate(torch.arange(400), [50, 50], [1.0, 1.0], "run")
    orders = set()
    for source in range(2):
        for epoch in range(4):
            orders.add(tuple(place for k, e, place in places if (k, e) == (source, epoch)))
    assert len(orders) == 8


def test_ranks_share_one_mixture_that_depends_on_the_key(mixture):
    ranks = [data.locate(torch.arange(rank, 400, 4), SIZES, WEIGHTS, "run") for rank in range(4)]
    assert [place for row in zip(*ranks) for place in row] == mixture[:400]
    assert data.locate(torch.arange(400), SIZES, WEIGHTS, "another") != mixture[:400]


# --------------------------------------------------------------------------------------- made ahead

def square(step):
    return dict(step=torch.tensor(step), square=torch.tensor(step) ** 2)


def test_batches_are_the_same_with_any_number_of_workers():
    for count in (0, 1, 2):
        batches = [(int(b["step"]), int(b["square"])) for b in feed(square, range(3, 40), count)]
        assert batches == [(step, step * step) for step in range(3, 40)]


def broken(step):
    if step == 4:
        raise UserError("photo 4 is broken")
    return square(step)


@pytest.mark.parametrize("count", [0, 1])
def test_an_error_in_a_worker_reaches_the_main_process(count):
    with pytest.raises(UserError, match="^photo 4 is broken$"):
        list(feed(broken, range(9), count))


def crashed(step):
    raise RuntimeError("the sizes do not match")


def test_a_crash_in_a_worker_keeps_its_reason():
    with pytest.raises(RuntimeError, match="the sizes do not match"):
        list(feed(crashed, range(9), 2))


@pytest.mark.parametrize("size", [1, 2, 3, 10, 100, 10_007])
def test_replacements_visit_all_rows_far_from_each_other(size):
    step = data.stride(size)
    assert sorted(n * step % size for n in range(size)) == list(range(size))
    assert size < 10 or min(step % size, -step % size) > size / 4


def terminated(step):
    if step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return square(step)


def test_workers_ignore_sigterm():
    """SIGTERM goes to every process of a job; the main process must finish its step and save."""
    assert [int(batch["step"]) for batch in feed(terminated, range(9), 2)] == list(range(9))


def test_workers_end_with_their_feed():
    before = set(multiprocessing.active_children())
    batches = feed(terminated, range(50), 2)
    next(batches)
    readers = set(multiprocessing.active_children()) - before
    batches.close()
    assert len(readers) == 2
    assert not any(reader.is_alive() for reader in readers)


def killed(step):
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(step)


def test_a_killed_worker_is_a_user_error():
    before = set(multiprocessing.active_children())
    with pytest.raises(UserError, match="process.*lost") as error:
        for _ in feed(killed, range(9), 2):
            pass
    assert "\n" not in str(error.value)
    assert set(multiprocessing.active_children()) == before      # the other one has ended


def test_the_signal_of_a_lost_worker_may_come_after_the_error(monkeypatch):
    def raises(number, frame):                                   # as torch's handler does
        if late:
            raise RuntimeError("killed by signal")

    def signal_then_str(value):
        late.append(value)
        os.kill(os.getpid(), signal.SIGCHLD)
        return str(value)
    late = []
    list(feed(square, range(1), 1))                              # torch sets its handler, once
    torchs_handler = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(signal, "getsignal", lambda number: raises)
    monkeypatch.setattr(workers, "str", signal_then_str, raising=False)
    try:
        with pytest.raises(UserError, match="process.*lost"):
            list(feed(killed, range(9), 2))
        assert late
    finally:
        signal.signal(signal.SIGCHLD, torchs_handler)
