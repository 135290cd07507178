"""Do the two losses pull against each other?  Their gradients, apart: train.py --meter-every.

    cosine = <g_image, g_text> / (|g_image| |g_text|),    g = g_image + g_text is what the step takes

over all that learns and over each block.  g_text has its weight lambda in it, as it has in the step.
"""

import torch
from torch import Tensor, nn

from training import distributed


def gradients(model: nn.Module) -> list[Tensor | None]:
    """A copy of what has been added up so far, sharded as it is."""
    return [None if p.grad is None else p.grad.detach().clone() for p in model.parameters()]


def compare(model: nn.ModuleDict, image: list[Tensor | None]) -> dict:
    """Norms and cosine of the image loss's gradients, `gradients` of before, and of what came on top.

    "blocks" has [image norm, text norm, cosine] of each block.  Collective."""
    sums: dict[str, Tensor | float] = {}
    for (name, p), before in zip(model.named_parameters(), image, strict=True):
        if p.grad is None:
            continue
        after = p.grad.detach()
        a = torch.zeros_like(after) if before is None else before
        b = after - a
        products = [distributed.whole((x * y).sum()) for x, y in ((a, a), (b, b), (a, b))]
        products = torch.stack(products).cpu().double()
        for group in ["all", *([name.split(".")[2]] if name.startswith("mmdit.blocks.") else [])]:
            sums[group] = sums.get(group, 0) + products

    def shown(found: Tensor) -> list[float]:
        aa, bb, ab = found.tolist()
        return [round(x, 6) for x in (aa ** 0.5, bb ** 0.5, ab / max((aa * bb) ** 0.5, 1e-30))]
    one, other, cosine = shown(sums.pop("all"))
    return dict(meter_image=one, meter_text=other, meter_cosine=cosine,
                meter_blocks=[shown(sums[block]) for block in sorted(sums, key=int)])
