"""Measure whether the two losses pull against each other: train.py --meter-every.

    cosine = <g_image, g_text> / (|g_image| |g_text|)

over all trained weights, and over each block.  A step follows g_image + g_text; each includes the
weight of its loss.
"""

import torch
from torch import Tensor, nn

from training import distributed


def gradients(model: nn.Module) -> list[Tensor | None]:
    """Return a copy of the gradients accumulated so far, sharded as they are."""
    copies = []
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is not None:
            gradient = gradient.detach().clone()
        copies.append(gradient)
    return copies


def inner_products(image: Tensor, text: Tensor) -> Tensor:
    """Return |image|^2, |text|^2 and <image, text>, (3,) float64 on the CPU.  Collective."""
    products = []
    for a, b in ((image, image), (text, text), (image, text)):
        products.append(distributed.whole((a * b).sum()))
    return torch.stack(products).cpu().double()


def norms_and_cosine(products: Tensor) -> list[float]:
    """Return |image|, |text| and their cosine from `inner_products`."""
    image, text, both = products.tolist()
    cosine = both / max((image * text) ** 0.5, 1e-30)
    return [round(value, 6) for value in (image ** 0.5, text ** 0.5, cosine)]


def compare(model: nn.ModuleDict, image: list[Tensor | None]) -> dict:
    """Compare the gradients of the image loss with those that the text loss has added since.

    image: `gradients` after the image loss.  Return values for the log; "meter_blocks" has [image
    norm, text norm, cosine] for each block.  Collective."""
    total = torch.zeros(3, dtype=torch.float64)
    blocks = torch.zeros(len(model["mmdit"].blocks), 3, dtype=torch.float64)
    for (name, parameter), before in zip(model.named_parameters(), image, strict=True):
        if parameter.grad is None:
            continue
        after = parameter.grad.detach()
        if before is None:
            before = torch.zeros_like(after)
        products = inner_products(before, after - before)
        total += products
        if name.startswith("mmdit.blocks."):
            blocks[int(name.split(".")[2])] += products
    image_norm, text_norm, cosine = norms_and_cosine(total)
    return dict(meter_image=image_norm, meter_text=text_norm, meter_cosine=cosine,
                meter_blocks=[norms_and_cosine(block) for block in blocks])
