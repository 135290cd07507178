"""What is made ahead by other processes, in order, and how they end."""

import signal
from contextlib import contextmanager
from typing import Any, Callable, Iterator

import torch

from common.cli import UserError


class Ahead(torch.utils.data.Dataset):
    """make(step), in another process; a UserError comes back as a result."""

    def __init__(self, make: Callable[[int], Any]):
        self.make = make

    def __getitem__(self, step: int) -> Any:
        try:
            return self.make(step)
        except UserError as error:
            return error


def deaf(_: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def feed(make: Callable[[int], Any], steps: range, workers: int) -> Iterator[Any]:
    """make(step) for each step in order: here, or by `workers` processes ahead.  The same either way.

    What ends a job (SLURM, `timeout`) sends SIGTERM to all of its processes: the workers leave it to this
    one, which saves first, and end with it."""
    loader = map(make, steps) if workers == 0 else torch.utils.data.DataLoader(
        Ahead(make), sampler=steps, batch_size=None, num_workers=workers, worker_init_fn=deaf)
    for result in loader:
        if isinstance(result, UserError):
            raise result
        yield result


@contextmanager
def readers_watched() -> Iterator[None]:
    """torch says wherever the main process is that a worker of `feed` was killed, or that nobody is there
    whose tensor it is about to take: here it is a UserError."""
    try:
        yield
    except (RuntimeError, ConnectionResetError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"a process that reads data ahead was lost ({said}); the same command goes on from "
                        f"the newest checkpoint")
