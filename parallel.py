"""Processes: one without torchrun, several under it, and FSDP2 between them.

Several processes each hold a part of gradients, optimizer state and averaged weights, and compute on their
own rows of a global batch.  Every function here is collective: all processes call it, or none.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import cli


def start(device: str) -> tuple[int, int, torch.device]:
    """(rank, world, device) for a --device of auto, cpu or cuda; a process group only under torchrun."""
    kind = cli.device(device)
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, torch.device(kind)
    place = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), place


def end(world: int) -> None:
    if world > 1:
        dist.destroy_process_group()


def shard(model: nn.ModuleDict, dtype: torch.dtype) -> None:
    """FSDP2: each block and the text head, then each root.  Gradients and optimizer state are sharded
    (ZeRO-2, the paper's); master weights, reductions and the text head are float32."""
    policy = lambda kept: MixedPrecisionPolicy(param_dtype=None if kept == torch.float32 else kept,
                                               reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(model["mmdit"].txt_out, mp_policy=policy(torch.float32), reshard_after_forward=False)
    for part in [*model["mmdit"].blocks, *model.values()]:
        fully_shard(part, mp_policy=policy(dtype), reshard_after_forward=False)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sync(world: int) -> None:
    if world > 1:
        dist.barrier()


def mean(x: Tensor, world: int) -> Tensor:
    """The mean over processes, in place."""
    if world > 1:
        dist.all_reduce(x)
    return x.div_(world)


def agree(asked: bool, sound: bool, world: int, device: torch.device) -> tuple[bool, bool]:
    """(asked by any process, sound on all): what all of them do next, in one exchange."""
    votes = mean(torch.tensor([float(asked), float(not sound)], device=device), world).tolist()
    return votes[0] > 0, votes[1] == 0
