"""Compute results ahead of time in other processes, and return them in order."""

import signal
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
    the main process first writes a checkpoint, then ends them.  Raises UserError if one is lost."""
    if not workers:
        yield from map(make, steps)
        return
    results = iter(torch.utils.data.DataLoader(Ahead(make), sampler=steps, batch_size=None,
                                               num_workers=workers, worker_init_fn=ignore_sigterm))
    torchs_handler = signal.getsignal(signal.SIGCHLD)    # raises an error if a worker was lost
    waits = False

    def raise_while_waiting(number: int, frame) -> None:
        if waits:                   # elsewhere, weights could be left half updated
            torchs_handler(number, frame)
    signal.signal(signal.SIGCHLD, raise_while_waiting)
    try:
        for _ in steps:
            waits = True
            try:
                result = next(results)
            except (RuntimeError, ConnectionResetError, EOFError) as error:
                waits = False       # before any call: the signal may come after the error
                if str(error).startswith("Caught "):             # an error of `make` itself
                    raise
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise UserError(f"a process that reads data ahead was lost ({reason})")
            waits = False
            if isinstance(result, UserError):
                raise result
            yield result
    finally:
        results._shutdown_workers()      # at the program's end, Python would wait for them for ever
        signal.signal(signal.SIGCHLD, torchs_handler)


def look_ahead(results: Iterator[Any]) -> Iterator[tuple[Any, UserError | None]]:
    """Yield each result with the error that the next one will raise, or None.

    So a run can finish a step, and save it, before it ends."""
    result = next(results, None)
    while result is not None:
        following = error = None
        try:
            following = next(results, None)
        except UserError as problem:
            error = problem
        yield result, error
        result = following
