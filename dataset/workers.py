"""Compute results ahead of time in other processes, and return them in order."""

import signal
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import torch

from common.cli import UserError


@dataclass
class Ahead(torch.utils.data.Dataset):
    """A dataset with make(step) as item `step`.  A UserError is returned as the item: torch would
    add a traceback to the message of a raised one."""
    make: Callable[[int], Any]

    def __getitem__(self, step: int) -> Any:
        try:
            return self.make(step)
        except UserError as error:
            return error


def ignore_sigterm(_: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def feed(make: Callable[[int], Any], steps: range, workers: int) -> Iterator[Any]:
    """Yield make(step) for each step, in order.  workers: processes that compute ahead; 0: none.

    When a job is stopped (SLURM, `timeout`), all its processes get SIGTERM.  The workers ignore it:
    the main process first writes a checkpoint, then ends them."""
    results = map(make, steps)
    if workers:
        results = torch.utils.data.DataLoader(Ahead(make), sampler=steps, batch_size=None,
                                              num_workers=workers, worker_init_fn=ignore_sigterm)
    for result in results:
        if isinstance(result, UserError):
            raise result
        yield result


@contextmanager
def readers_watched() -> Iterator[None]:
    """Raise UserError if a worker of `feed` was killed.

    torch raises its errors anywhere in the main process, also while it receives a tensor."""
    try:
        yield
    except (RuntimeError, ConnectionResetError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"a process that reads data ahead was lost ({reason}); the same command "
                        f"resumes from the newest checkpoint")
