"""Read the attention that the network's blocks store.

    with storing_attention(mmdit):
        mmdit(latents, text, t, need="velocity")
        maps = patches_to_words(mmdit)

Shapes: K blocks, N image tokens, L text tokens.
"""

from contextlib import contextmanager
from typing import Iterator

import torch
from torch import Tensor

from model import MMDiT


@contextmanager
def storing_attention(mmdit: MMDiT) -> Iterator[None]:
    """In this context, each block stores the attention map of the batch's first row.

    Compiled blocks run uncompiled, so results can differ from theirs in rounding."""
    for block in mmdit.blocks:
        block.stores_attention = True
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for block in mmdit.blocks:
            block.stores_attention = False
            block.stored_attention = None


def patches_to_words(mmdit: MMDiT) -> Tensor:
    """Return how much each image token attended to each text token, (K, N, L), float16, on the CPU.

    Call it after an evaluation with need="velocity" or "both".  Heads are averaged."""
    maps = []
    for block in mmdit.blocks:
        maps.append(block.stored_attention[:block.image_tokens, block.image_tokens:])
    return torch.stack(maps).cpu()


def words_to_patches(mmdit: MMDiT) -> Tensor:
    """Return how much each text token attended to each image token, (K, L, N), float16, on the CPU.

    Call it after an evaluation with need="logits" or "both", or with a cached image."""
    maps = []
    for block in mmdit.blocks:
        text_tokens = block.stored_attention.shape[1] - block.image_tokens
        maps.append(block.stored_attention[-text_tokens:, :block.image_tokens])
    return torch.stack(maps).cpu()
