"""Make the optimizers of a run: AdamW, and perhaps another one for the blocks' matrices.

config: a TrainConfig; its `optimizer` is a key of OPTIMIZERS.
"""

from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn

from training.muon import Muon


def make_adamw(parameters: list[nn.Parameter], config) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def make_muon(matrices: list[nn.Parameter], config) -> torch.optim.Optimizer:
    return Muon(matrices, config.lr, config.weight_decay, dtype=getattr(torch, config.dtype))


class ForMatrices(NamedTuple):
    """A row of OPTIMIZERS."""
    make: Callable[..., torch.optim.Optimizer]
    moments: int                # values stored for each weight


OPTIMIZERS = {"adamw": ForMatrices(make_adamw, 2), "muon": ForMatrices(make_muon, 1)}


def make_optimizers(model: nn.ModuleDict, config) -> list[torch.optim.Optimizer]:
    """Return AdamW for all trained weights, or AdamW and another one for the blocks' matrices."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        return [make_adamw(trained, config)]
    in_blocks = set(model["mmdit"].blocks.parameters())
    matrices, others = [], []
    for p in trained:
        if p in in_blocks and p.ndim == 2:
            matrices.append(p)
        else:
            others.append(p)
    return [make_adamw(others, config), OPTIMIZERS[config.optimizer].make(matrices, config)]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], lr: float | Tensor) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
