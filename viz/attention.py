"""Record what the network attends to while it draws or reads.

Shapes: B batch, H heads, K blocks kept, N image tokens, L text tokens, d size of a head.
"""

from contextlib import contextmanager
from typing import Iterator

import torch
from torch import Tensor

from model import MMDiT

NUMBERS = 4_000_000     # K N L that an evaluation keeps


def attention_map(q: Tensor, k: Tensor, rows: slice, columns: slice) -> Tensor:
    """Return these rows and columns of softmax(q k' / sqrt(d)), (T, N + L), of the batch's first
    row, the mean over heads, in float16."""
    total = 0.0
    with torch.autocast(q.device.type, enabled=False):
        for q_head, k_head in zip(q[0], k[0]):             # one by one: N (N + L) numbers at a time
            scores = (q_head[rows].float() * q_head.shape[-1] ** -0.5) @ k_head.float().T
            total = total + scores.softmax(-1)[:, columns]
    return (total / q.shape[1]).half()


@contextmanager
def watching(mmdit: MMDiT, reads: str) -> Iterator[list[Tensor]]:
    """Record in the list what the batch's first row attends to in each evaluation: softmax(q k' /
    sqrt(d)) in float32 and its mean over heads, float16 on the CPU.  What the network computes
    stays the same.

    reads: "words", each patch's to each token, (K, N, L), of evaluations that give a velocity; or
    "patches", each token's to each patch, (K, L, N), of those that give logits; those without an
    image add nothing. Where K N L is over 4 million the blocks are averaged, K = 1: an evaluation
    keeps at most 8 MB, or 2 N L bytes.  Not under torch.compile."""
    recorded, maps, patches = [], [], 0
    heads = ("both", "velocity" if reads == "words" else "logits")
    def evaluate(method, image_tokens: int, head: str, *given):
        """Run an evaluation, and record it where it is one of those that `reads` names."""
        nonlocal patches
        patches = image_tokens if head in heads else 0
        result = method(*given)
        if patches:
            stacked = torch.stack(maps)                                     # (K, N, L) or (K, L, N)
            maps.clear()
            if stacked.numel() > NUMBERS:
                stacked = stacked.float().mean(0, True).half()
            recorded.append(stacked.cpu())
        return result

    def tokens(latents: Tensor | None) -> int:
        if latents is None:
            return 0
        return latents.shape[2] * latents.shape[3] // mmdit.config.patch ** 2

    def watched(attention):
        @torch.no_grad()
        def call(q, k, v):
            if patches:
                # image first, then text; in the last block and in `read` only one has queries
                image, text = slice(patches), slice(patches - k.shape[2], None)
                rows, columns = (image, text) if reads == "words" else (text, image)
                maps.append(attention_map(q, k, rows, columns))
            return attention(q, k, v)
        return call

    forward = mmdit.forward
    read_and_cache, read_cached = mmdit.read_and_cache, mmdit.read_cached

    def watched_forward(latents, text, t, need="both", at=None):
        return evaluate(forward, tokens(latents), need, latents, text, t, need, at)

    def watched_read(latents, text, t, at=None):
        return evaluate(read_and_cache, tokens(latents), "logits", latents, text, t, at)

    def watched_cached(text, cache, at=None):
        return evaluate(read_cached, cache[0].keys.shape[2], "logits", text, cache, at)

    mmdit.forward = watched_forward
    mmdit.read_and_cache, mmdit.read_cached = watched_read, watched_cached
    for block in mmdit.blocks:
        block.attention = watched(block.attention)
    try:
        yield recorded
    finally:
        for name in ("forward", "read_and_cache", "read_cached"):
            delattr(mmdit, name)
        for block in mmdit.blocks:
            del block.attention
