"""Run as one process, or as several under torchrun.

The functions that communicate are collective: either all processes call them or none.
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

from common.cli import UserError, in_one_line, require
from common.devices import choose_device, world_size


def several() -> bool:
    return dist.is_available() and dist.is_initialized()


def keep_memory() -> None:
    """Make malloc keep freed memory for the next step (with glibc only).

    Otherwise each large tensor gets new pages, and the kernel zeroes them one page fault at a time:
    a third of the step time of the emoji preset with a vocabulary of 50,258."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
        ctypes.CDLL(None).mallopt(mmap_max, 0)


def start(device: str) -> tuple[int, int, torch.device]:
    """Return (rank, world size, device) for a --device; join a process group if under torchrun.

    Raises UserError."""
    kind = choose_device(device)
    if kind == "cpu":
        keep_memory()
    environment = os.environ
    if not {"LOCAL_RANK", "RANK", "WORLD_SIZE"} <= environment.keys():
        return 0, 1, torch.device(kind)
    rank = int(environment["RANK"])
    world = world_size()
    local = torch.device(kind)
    backend = "gloo"
    if kind == "cuda":
        local = torch.device(kind, int(environment["LOCAL_RANK"]))
        gpus = torch.cuda.device_count()
        require((local.index < gpus, f"torchrun started more processes than this machine has GPUs, "
                 f"{gpus}; lower --nproc_per_node"))
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    is_master = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=is_master)
    # torchrun keeps its store across restarts: without this prefix, a new attempt would find the
    # addresses of dead processes
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", 0)
    store = dist.PrefixStore(f"attempt_{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return rank, world, local


def sync() -> None:
    if several():
        dist.barrier()


def mean(x: Tensor) -> Tensor:
    """Replace x by its mean over all processes, in place, and return it."""
    if several():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def agree(*flags: bool, device: torch.device) -> list[bool]:
    """Return for each flag True if any process sets it; all flags share one exchange."""
    votes = torch.tensor(flags, dtype=torch.float32, device=device)
    return (mean(votes) > 0).tolist()


def gather(items: list, group: dist.ProcessGroup | None = None) -> list:
    """Return the items of all processes' lists, joined.  group: None for the default group."""
    lists = [items]
    if several():
        lists = [None] * dist.get_world_size()
        dist.all_gather_object(lists, items, group=group)
    return [item for part in lists for item in part]


def first(function: Callable[[], Any]) -> Any:
    """Call a function on process 0, and return its result or raise its UserError on all."""
    outcome = [None, None]                                       # result, error
    if not several() or dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    if several():
        dist.broadcast_object_list(outcome, src=0)
    result, error = outcome
    if error:
        raise UserError(error)
    return result


def last() -> bool:
    """Return True on the process that calls this last.  No process waits."""
    if not several():
        return True
    store = dist.distributed_c10d._get_default_store()
    return store.add("finished", 1) == dist.get_world_size()


@contextmanager
def one_voice() -> Iterator[None]:
    """End all processes when one of them fails; only the first to fail prints its error, as a line.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, RuntimeError, OSError) as error:
        status = 1
        if isinstance(error, KeyboardInterrupt):
            status, message = 130, "stopped"
        elif isinstance(error, (UserError, OSError)):
            message = f"error: {in_one_line(error)}"
        else:
            if not re.search("[Cc]onnection|gloo|NCCL|peer|[Bb]roken pipe", str(error)):
                raise
            message = "error: another process was lost; run the same command again to resume"
        if not several():
            raise
        try:
            store = dist.distributed_c10d._get_default_store()
            if store.add("ended", 1) == 1:
                sys.stderr.write(f"{message}\n")
                sys.stderr.flush()
                store.set("printed", "")
            store.wait(["printed"], timedelta(seconds=5))   # torchrun ends all at the first exit
        except RuntimeError:                             # torchrun is gone, and has printed why
            pass
        os._exit(status)
    if several():
        dist.destroy_process_group()
