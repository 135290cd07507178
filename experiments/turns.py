"""Time jobs in turns, so that a slow moment of the machine hits all of them alike; count how many
texts the network evaluates."""

import statistics
import time
from contextlib import contextmanager
from typing import Callable, Iterator

from torch import nn

from common.progress import Progress


@contextmanager
def count_texts(text_encoder: nn.Module) -> Iterator[list[int]]:
    """Yield a list.  In this context, each call of the text encoder appends its number of texts: it
    is called once in each evaluation of the network."""
    counts = []
    hook = text_encoder.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    try:
        yield counts
    finally:
        hook.remove()


def time_in_turns(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each job in each round."""
    times = {name: [] for name in jobs}
    progress = Progress("jobs", rounds * len(jobs))
    for _ in range(rounds):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - started)
            progress.update(progress.done + 1)
    return times


def compare(seconds: list[float], base: list[float]) -> str:
    """Return how long a job takes, as a share of another: median, least and most over the rounds."""
    ratios = [a / b for a, b in zip(seconds, base)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
