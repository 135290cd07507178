"""Muon (Keller Jordan et al., 2024): orthogonalized momentum for the matrices of a network.

torch.optim.Muon always multiplies in bfloat16.  A CPU without bfloat16 instructions does that 75
times slower than float32 (docs/benchmarks.md), so here the dtype is a setting.  Matrices of the
same shape are orthogonalized as one batch.
"""

from collections import defaultdict
from typing import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from training.distributed import whole

# x -> a x + b x^3 + c x^5: very steep at 0; repeated, it keeps values of [0, 1] below about 1.2
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return U V^T, approximately, for each matrix U S V^T: (n, rows, columns), in `dtype`.

    Newton-Schulz: an odd polynomial of a matrix acts on its singular values only.  Five steps bring
    each of them to between 0.7 and 1.2, except those below about 0.0015 of the Frobenius norm."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype)
    if tall:
        x = x.mT                                         # the smaller Gram matrix costs less
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)     # now no singular value is above 1
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)     # b G + c G^2
        x = torch.baddbmm(x, polynomial, x, beta=a)                       # a X + (b G + c G^2) X
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized and scaled to AdamW's size (arXiv 2502.16982).

    parameters: matrices (rows, columns), which FSDP2 may have sharded.  The learning rate may be a
    tensor, as a CUDA graph needs.  The state has the same form as that of torch.optim.Muon."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float | Tensor, weight_decay: float,
                 momentum: float = 0.95, dtype: torch.dtype = torch.bfloat16):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have a gradient.  torch's checkpoints pass closure=None."""
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.shape].append(p)
            for parameters in same_shape.values():
                self.update(parameters, group)

    def update(self, parameters: list[nn.Parameter], group: dict) -> None:
        """Update parameters that all have the same shape."""
        # entries are about 0.2 lr in AdamW's updates, 1 / sqrt(longer side) in an orthogonal matrix
        scale = group["lr"] * 0.2 * max(parameters[0].shape) ** 0.5
        momenta = [self.nesterov(p, group["momentum"]) for p in parameters]
        updates = orthogonalize(torch.stack(momenta), self.dtype).float() * scale
        for p, update in zip(parameters, updates):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(like(p, update))

    def nesterov(self, p: nn.Parameter, momentum: float) -> Tensor:
        """Return Nesterov's average of the gradients of p, gathered if p is sharded."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"]
        average.lerp_(p.grad, 1 - momentum)
        return whole(p.grad.lerp(average, momentum))


def like(p: Tensor, update: Tensor) -> Tensor:
    """Return the part of an update that belongs to this process's shard of p, without
    communication."""
    if not isinstance(p, DTensor):
        return update
    return distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
