"""Read the attention that the network's blocks store.

    with storing_attention(mmdit):
        mmdit(latents, text, t, need="velocity")
        maps = image_to_text(mmdit)

Shapes: K blocks kept, N image tokens, L text tokens.
"""

from contextlib import contextmanager
from typing import Iterator

import torch
from torch import Tensor

from model import MMDiT

NUMBERS = 4_000_000     # K N L that are kept of an evaluation


@contextmanager
def storing_attention(mmdit: MMDiT) -> Iterator[None]:
    """While this lasts, each block stores who attends to whom in the batch's first row.

    Compiled blocks run uncompiled; what the network computes stays the same."""
    for block in mmdit.blocks:
        block.stores_attention = True
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for block in mmdit.blocks:
            block.stores_attention = False
            block.stored_attention = None


def image_to_text(mmdit: MMDiT) -> Tensor:
    """Return how much each image token attended to each text token, (K, N, L), float16, on the CPU.

    The last evaluation was one with need="velocity" or "both".  Heads are averaged; blocks too,
    K = 1, where K N L is over 4 million."""
    return stack([block.stored_attention[:block.image_tokens, block.image_tokens:]
                  for block in mmdit.blocks])


def text_to_image(mmdit: MMDiT) -> Tensor:
    """Return how much each text token attended to each image token, (K, L, N), as `image_to_text`.

    The last evaluation was one with need="logits" or "both"."""
    maps = []
    for block in mmdit.blocks:
        text_tokens = block.stored_attention.shape[1] - block.image_tokens
        maps.append(block.stored_attention[-text_tokens:, :block.image_tokens])
    return stack(maps)


def stack(maps: list[Tensor]) -> Tensor:
    stacked = torch.stack(maps)
    if stacked.numel() > NUMBERS:
        stacked = stacked.float().mean(0, True).half()
    return stacked.cpu()
