"""Shard the models over the processes of a run with FSDP2.

Each process stores a part of the float32 weights, optimizer state and averaged weights, and
computes on its own rows of a global batch.  Every function is collective: all processes call it, or
none.
"""

import os
import warnings
from contextlib import contextmanager
from typing import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common.cli import require


def hsdp_shards(world_size: int, machine: int) -> int:
    """Return how many processes share a copy: those of a machine, or half of a single machine's."""
    if machine < world_size:
        return machine
    return max(1, world_size // 2)


def make_mesh(mode: str, device_type: str) -> DeviceMesh | None:
    """Return the processes as a mesh (copies, shards), or None: FSDP2 then makes one copy."""
    if mode in ("zero2", "zero3"):
        return None
    world_size = dist.get_world_size()
    shards = 1
    if mode == "hsdp":
        shards = hsdp_shards(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        require((world_size % shards == 0, f"--shard hsdp: {world_size} processes don't divide into "
                 f"groups of {shards}"))
    shape = (world_size // shards, shards)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: nn.ModuleDict, dtype: torch.dtype, mode: str) -> None:
    """Wrap the text head, each block and each module in FSDP2, in place.

    mode: "zero2", the paper's, gathers each module's weights once in a step, and keeps them and
    whole gradients until the last backward pass (`set_reductions`); "zero3" gathers them in every
    pass, and shards gradients after it; "hsdp" is zero2 within each machine, or within each half of
    a single machine; "none" keeps a copy in each process.  Matrix products are in `dtype`; stored
    weights, reductions and the text head are in float32."""
    mesh = make_mesh(mode, next(model.parameters()).device.type)

    def wrap(module: nn.Module, param_dtype: torch.dtype) -> None:
        policy = MixedPrecisionPolicy(param_dtype, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=mode == "zero3")
    # linear layers and reshapes return views; nothing here works on them in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    wrap(model["mmdit"].txt_out, torch.float32)
    for block in model["mmdit"].blocks:
        wrap(block, dtype)
    for name, module in model.items():
        wrap(module, torch.float32 if name == "mask" else dtype)


def shard_frozen(t5: nn.Module) -> None:
    """Shard a frozen T5, in place; a forward pass gathers one block at a time."""
    for module in [*t5.blocks, t5]:
        fully_shard(module, reshard_after_forward=True)


def set_reductions(model: nn.ModuleDict, shared: bool, others: bool, mode: str) -> None:
    """Set which modules reduce their gradients in the next backward pass.

    shared: the modules that have gradients from both losses, which are all blocks but the last, and
    the embedding.  They need it once, after both losses, and keep gradients and parameters
    unsharded until then: with 24 blocks, this takes 29 gathers and 29 reductions instead of 53.
    others: the other modules.  They need it after each loss, because FSDP2 reduces all tensors of a
    module, and some have no gradient from one of the losses.
    zero3, which saves memory, always reduces all."""
    mmdit = model["mmdit"]
    if not isinstance(mmdit, FSDPModule):
        return
    due = {module: shared for module in [*mmdit.blocks, *model.values()]}
    for module in (mmdit, mmdit.blocks[-1], mmdit.txt_out):
        due[module] = others
    for module, reduces in due.items():
        module.set_requires_gradient_sync(reduces or mode == "zero3", recurse=False)
        module.set_reshard_after_backward(reduces or mode == "zero3", recurse=False)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def averaged(model: nn.ModuleDict, ema: dict[str, Tensor]) -> Iterator[None]:
    """In this context, the model has the averaged weights, and is in eval mode."""
    weights = [local(p.detach()) for p in model.parameters()]
    averages = [local(average) for average in ema.values()]
    backup = [weight.clone() for weight in weights]

    def copy_in(values: list[Tensor]) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()        # else weights gathered by a forward pass would stay in use
        torch._foreach_copy_(weights, values)
    copy_in(averages)
    model.eval()
    try:
        yield
    finally:
        copy_in(backup)
        model.train()
