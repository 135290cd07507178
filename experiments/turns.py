"""Time jobs in turns, so that a slow moment of the machine hits all of them alike; count how many
texts the network evaluates; name the device."""

import statistics
import time
from contextlib import contextmanager
from typing import Callable, Iterator

import torch
from torch import nn

from common.progress import Progress


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all work that it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()            # torch.cuda, torch.mps


def machine(device: torch.device) -> dict:
    """Return the device and torch's version; of an NVIDIA GPU also its name and the peak memory."""
    about = dict(device=device.type, torch=torch.__version__)
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name(device)
        about["gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return about


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


def time_in_turns(jobs: dict[str, Callable[[], object]], rounds: int,
                  device: torch.device = torch.device("cpu")) -> dict[str, list[float]]:
    """Return the seconds of each job in each round.  device: wait for its work to be done."""
    times = {name: [] for name in jobs}
    progress = Progress("jobs", rounds * len(jobs))
    for _ in range(rounds):
        for name, job in jobs.items():
            wait_for(device)
            started = time.perf_counter()
            job()
            wait_for(device)
            times[name].append(time.perf_counter() - started)
            progress.advance()
    return times


def compare(seconds: list[float], base: list[float]) -> str:
    """Return how long a job takes, as a share of another: median, least and most over the rounds."""
    ratios = [a / b for a, b in zip(seconds, base)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
