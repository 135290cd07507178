"""Processes: one without torchrun, several under it.

Every function here is collective: all processes call it, or none.
"""

import ctypes
import os
import re
import sys
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from common.cli import UserError
from common.devices import choose_device


def several() -> bool:
    return dist.is_available() and dist.is_initialized()


def keep_memory(keep: bool = True) -> None:
    """Have malloc keep what a step frees for the next one (glibc, or nothing happens).  Otherwise each large
    tensor is new pages, zeroed one fault at a time: a third of the step of the emoji preset at 50,258 tokens.
    keep False: as glibc would have come to do it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    settings = {trim_threshold: 2**31 - 1, mmap_max: 0} if keep else {
        trim_threshold: 2**26, mmap_threshold: 2**25, mmap_max: 2**16}
    for name, value in settings.items() if mallopt else ():
        mallopt(name, value)


def start(device: str) -> tuple[int, int, torch.device]:
    """Return (rank, world, device) for a --device; a process group is made only under torchrun."""
    kind = choose_device(device)
    if kind == "cpu":
        keep_memory()
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, torch.device(kind)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(place)
    host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=host)
    # torchrun keeps its store over restarts: without a prefix an attempt would find the addresses of the dead
    attempt = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", store=attempt, rank=rank,
                            world_size=world)
    return rank, world, place


def sync() -> None:
    if several():
        dist.barrier()


def mean(x: Tensor) -> Tensor:
    """The mean over processes, in place."""
    if several():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def agree(*flags: bool, device: torch.device) -> list[bool]:
    """Tell for each flag if it is set on any process, in one exchange."""
    return [vote > 0 for vote in mean(torch.tensor(flags, dtype=torch.float32, device=device)).tolist()]


def gather(items: list, group: dist.ProcessGroup | None = None) -> list:
    """Return the items of all processes' lists.  group: another one than the default."""
    lists = [items]
    if several():
        lists = [None] * dist.get_world_size()
        dist.all_gather_object(lists, items, group=group)
    return [item for part in lists for item in part]


def first(function: Callable[[], Any]) -> Any:
    """Call a function on process 0, and return its result, or raise its UserError, on all of them."""
    said = [None, None]
    if not several() or dist.get_rank() == 0:
        try:
            said = [function(), None]
        except UserError as error:
            said = [None, str(error)]
    if several():
        dist.broadcast_object_list(said, src=0)
    if said[1]:
        raise UserError(said[1])
    return said[0]


def last() -> bool:
    """Return True on the process that calls this last, which then does what is left.  Nobody waits."""
    return not several() or (dist.distributed_c10d._get_default_store().add("asked", 1)
                             == dist.get_world_size())


@contextmanager
def one_voice() -> Iterator[None]:
    """End all processes when an error ends one of them; the first one prints it, in one line."""
    try:
        yield
    except (UserError, KeyboardInterrupt, RuntimeError) as error:
        lost = isinstance(error, RuntimeError)
        if not several() or lost and not re.search("[Cc]onnection|gloo|NCCL|peer|[Bb]roken pipe", str(error)):
            raise
        status, said = (130, "stopped") if isinstance(error, KeyboardInterrupt) else (1, f"error: {error}")
        if lost:
            said = "error: another process was lost; the same command goes on from what was saved"
        try:
            store = dist.distributed_c10d._get_default_store()
            if store.add("ended", 1) == 1:
                sys.stderr.write(said + "\n")
                sys.stderr.flush()
                store.set("said", "")
            store.wait(["said"], timedelta(seconds=5))           # torchrun ends all when the first one ends
        except RuntimeError:                                     # torchrun has gone, and has said so
            pass
        os._exit(status)
    if several():
        dist.destroy_process_group()
