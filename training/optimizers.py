"""Make the optimizers of a run: AdamW, and perhaps another one for the blocks' matrices.

config: a TrainConfig; its `optimizer` is a key of OPTIMIZERS.
"""

from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn

from training.muon import Muon


def make_muon(matrices: list[nn.Parameter], config) -> torch.optim.Optimizer:
    return Muon(matrices, config.lr, config.weight_decay, dtype=getattr(torch, config.dtype))


class ForMatrices(NamedTuple):
    """A row of OPTIMIZERS."""
    moments: int                # values stored for each weight
    make: Callable[..., torch.optim.Optimizer] | None = None    # None: AdamW trains all weights


OPTIMIZERS = {"adamw": ForMatrices(2), "muon": ForMatrices(1, make_muon)}


def make_optimizers(model: nn.ModuleDict, config) -> list[torch.optim.Optimizer]:
    """Return AdamW for all trained weights, or AdamW and another one for the blocks' matrices."""
    make = OPTIMIZERS[config.optimizer].make
    in_blocks = set(model["mmdit"].blocks.parameters())
    matrices, others = [], []
    for p in model.parameters():
        if not p.requires_grad:
            continue
        if make and p in in_blocks and p.ndim == 2:
            matrices.append(p)
        else:
            others.append(p)
    adamw = torch.optim.AdamW(others, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    return [adamw, make(matrices, config)] if make else [adamw]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], lr: float | Tensor) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
