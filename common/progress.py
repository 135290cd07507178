"""Print the progress of a long job: a line on stderr every two seconds, with time left."""

import sys
import time
from typing import Iterator, Sequence


def pace(per_second: float, unit: str = "") -> str:
    """Return a speed as "12.0 steps/s" or, below one per second, "2.5 s/step"; without a unit as
    "12.0/s" or "2.5 s each"."""
    if per_second >= 1:
        return f"{per_second:,.1f} {unit}s/s" if unit else f"{per_second:,.1f}/s"
    return f"{1 / per_second:,.1f} s/{unit}" if unit else f"{1 / per_second:,.1f} s each"


def time_left(seconds: float) -> str:
    return f"{seconds / 60:.1f} min left" if seconds >= 60 else f"{max(0, seconds):.0f} s left"


class Progress:
    """Count how many of `total` items are done, and print it; only the first process prints."""

    def __init__(self, title: str, total: int = 0, rank: int = 0, world: int = 1,
                 silent: bool = False):
        self.title = title if world == 1 else f"{title}, the first of {world} processes'"
        self.total = total
        self.silent = silent or rank > 0
        self.done = 0
        self.started = self.printed = time.monotonic()

    def advance(self) -> None:
        """Count one more item."""
        self.update(self.done + 1)

    def update(self, done: int, total: int | None = None) -> None:
        self.done = done
        if total is not None:
            self.total = total
        now = time.monotonic()
        if self.silent or now - self.printed <= 2:
            return
        self.printed = now
        rate = done / (now - self.started)
        left = f"{pace(rate)}, {time_left((self.total - done) / rate)}" if done else "nothing yet"
        print(f"{self.title}: {done:,}/{self.total:,}, {left}", file=sys.stderr, flush=True)


def chunks(items: Sequence, size: int) -> list[Sequence]:
    """Cut a sequence into parts of this size; the last one may be shorter."""
    return [items[start:start + size] for start in range(0, len(items), size)]


def batches(title: str, items: list, size: int) -> Iterator[list]:
    """Yield `chunks` of a list, and print the progress."""
    progress = Progress(title, len(items))
    for batch in chunks(items, size):
        yield batch
        progress.update(progress.done + len(batch))
