"""Record what the network attends to while it draws or reads.

Shapes: B batch, H heads, K blocks kept, N image tokens, L text tokens, d size of a head.
"""

from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Iterator

import torch
from torch import Tensor

from model import MMDiT

NUMBERS = 4_000_000     # K N L that an evaluation keeps


@contextmanager
def watching(mmdit: MMDiT, reads: str) -> Iterator[list[Tensor]]:
    """Record in the list what the batch's first row attends to in each evaluation: softmax(q k' / sqrt(d)) in
    float32 and its mean over heads, float16 on the CPU.  What the network computes stays the same.

    reads: "words", each patch's to each token, (K, N, L), of evaluations that give a velocity; or "patches",
    each token's to each patch, (K, L, N), of those that give logits; those without an image add nothing.
    Where K N L is over 4 million the blocks are averaged, K = 1: an evaluation keeps at most 8 MB, or 2 N L
    bytes.  Not under torch.compile."""
    recorded, maps, patches = [], [], 0

    def start(_, args, named):
        nonlocal patches
        given = signature(mmdit.forward).bind(*args, **named).arguments
        latents = given["latents"]
        need = "logits" if given.get("kept") else given.get("need", "both")
        patches = 0
        if latents is not None and need in ("both", "velocity" if reads == "words" else "logits"):
            patches = latents.shape[2] * latents.shape[3] // mmdit.config.patch ** 2

    def end(*_):
        if patches:
            stacked = torch.stack(maps)                                           # (K, N, L) or (K, L, N)
            maps.clear()
            if stacked.numel() > NUMBERS:
                stacked = stacked.float().mean(0, True).half()
            recorded.append(stacked.cpu())

    def watched(attention):
        @torch.no_grad()
        def call(q, k, v):
            if patches:         # image first, then text; in the last block and in `read` only one's queries
                rows, columns = slice(patches), slice(patches - k.shape[2], None)
                if reads == "patches":
                    rows, columns = columns, rows
                with torch.autocast(q.device.type, enabled=False):
                    heads = (((a[rows].float() * a.shape[-1] ** -0.5) @ b.float().T).softmax(-1)[:, columns]
                             for a, b in zip(q[0], k[0]))        # one by one: N (N + L) numbers at a time
                    maps.append((sum(heads) / q.shape[1]).half())                 # (N, L) or (L, N)
            return attention(q, k, v)
        return call

    with ExitStack() as stack:
        stack.callback(mmdit.register_forward_pre_hook(start, with_kwargs=True).remove)
        stack.callback(mmdit.register_forward_hook(end).remove)
        for block in mmdit.blocks:
            block.attention = watched(block.attention)
            stack.callback(delattr, block, "attention")
        yield recorded
