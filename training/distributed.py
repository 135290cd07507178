"""Processes: one without torchrun, several under it, and FSDP2 between them.

Several processes each hold a part of gradients, optimizer state and averaged weights, and compute on their
own rows of a global batch.  Every function here is collective: all processes call it, or none.
"""

import os
import warnings
from contextlib import contextmanager
from typing import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor



def shard(model: nn.ModuleDict, dtype: torch.dtype, mode: str) -> None:
    """FSDP2: each block and the text head, then each root.  Master weights, reductions, text head: float32.

    mode: "zero2" shards gradients and optimizer state (the paper's), "zero3" parameters too, "hsdp" as zero2
    within a machine (or within halves of one) with a copy in each, "none" nothing: a copy in each process."""
    world, local_world = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    inner = dict(none=1, hsdp=local_world if local_world < world else world // 2).get(mode)
    mesh = inner and init_device_mesh(next(model.parameters()).device.type, (world // inner, inner),
                                      mesh_dim_names=("replicate", "shard"))
    policy = lambda kept: MixedPrecisionPolicy(param_dtype=None if kept == torch.float32 else kept,
                                               reduce_dtype=torch.float32, cast_forward_inputs=False)
    wrap = lambda part, kept: fully_shard(part, mesh=mesh, mp_policy=policy(kept),
                                          reshard_after_forward=mode == "zero3")
    # linear layers and reshapes return views; nothing here works on them in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    wrap(model["mmdit"].txt_out, torch.float32)
    for name, part in model.items():
        for block in part.blocks if name == "mmdit" else []:
            wrap(block, dtype)
        wrap(part, torch.float32 if name == "mask" else dtype)


def shard_frozen(t5: nn.Module) -> None:
    """A T5 that is only read, a block gathered at a time."""
    for part in [*t5.blocks, t5]:
        fully_shard(part, reshard_after_forward=True)


def last_backward(model: nn.ModuleDict, last: bool, of_loss: bool, mode: str) -> None:
    """Before each backward: whether it is the `last` of the step, and the last of its loss.

    What both losses use, all blocks but the last and the embedding, keeps its gradients whole until the last
    backward, and its parameters too: with 24 blocks 29 gathers and 29 reductions, not 53.  The rest waits for
    its loss's: FSDP2 reduces all tensors of a part, and some have no gradient there.  zero3, which is there
    to save memory, keeps nothing whole."""
    mmdit, zero3 = model["mmdit"], mode == "zero3"
    if not isinstance(mmdit, FSDPModule):
        return
    for part, now in ((mmdit, of_loss), (mmdit.blocks[-1], of_loss), (mmdit.txt_out, of_loss),
                      *((part, last) for part in (*mmdit.blocks[:-1], *model.values()) if part is not mmdit)):
        part.set_requires_gradient_sync(now or zero3, recurse=False)
        part.set_reshard_after_backward(now or zero3, recurse=False)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def averaged(model: nn.ModuleDict, ema: dict[str, Tensor]) -> Iterator[None]:
    """While this lasts the model has its averaged weights, and draws rather than learns."""
    pairs = [(local(p.detach()), local(ema[name])) for name, p in model.named_parameters()]
    held = [p.clone() for p, _ in pairs]

    def put(values: list[Tensor]) -> None:
        for module in model.modules():           # whole parameters that a forward left would hide the change
            if isinstance(module, FSDPModule):
                module.reshard()
        torch._foreach_copy_([p for p, _ in pairs], values)
    put([e for _, e in pairs])
    model.eval()
    try:
        yield
    finally:
        put(held)
        model.train()
