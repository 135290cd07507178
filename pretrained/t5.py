"""The T5 v1.1 encoder (arXiv 1910.10683, 2002.05202), which gives D-DiT its text embeddings.

It differs from the usual transformer: RMSNorm without a mean, no bias in any layer, no 1/sqrt(K)
in attention, and a gated tanh-GELU.  Positions enter as a learned bias on each head's attention
logits, one value per bucket of distances; all blocks share it.  There is no attention mask: D-DiT
was trained with padding tokens visible, like any other token.

Shapes: B batch, L tokens, E width, H heads, K size of a head.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass
class T5Config:
    vocab_size: int = 32128     # rows of the table, more than the tokenizer's 32100
    width: int = 4096           # E
    depth: int = 24             # blocks
    heads: int = 64             # H
    head: int = 64              # K
    hidden: int = 10240         # hidden width of the MLP
    buckets: int = 32           # buckets of distances, half of them for each direction
    distance: int = 128         # all longer distances share the last bucket
    eps: float = 1e-6           # RMSNorm's epsilon


def buckets(length: int, number: int, distance: int) -> Tensor:
    """Return the bucket of the distance key - query, (L, L) int64.

    Distances below number / 4 have a bucket each, longer ones share logarithmic buckets.  Keys
    after the query use the upper half of the buckets."""
    positions = torch.arange(length)
    offset = positions[None] - positions[:, None]                                 # (L, L)
    half = number // 2
    exact = number // 4
    far = offset.abs()
    # float32, as published: at the border of two buckets float64 may choose the other one
    scaled = torch.log(far.clamp(min=1).float() / exact) / math.log(distance / exact)
    logarithmic = exact + (scaled * (half - exact)).long()
    bucket = torch.where(far < exact, far, logarithmic.clamp(max=half - 1))
    return bucket + half * (offset > 0)


class RMSNorm(nn.Module):
    """Normalise x (..., width) float32 and return it in the weight's dtype.  The residual stream
    itself stays float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        return x.to(self.weight.dtype) * self.weight


class T5Block(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        inner = config.heads * config.head
        self.heads = config.heads
        self.attention_norm = RMSNorm(config.width, config.eps)
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)
        self.mlp_norm = RMSNorm(config.width, config.eps)
        self.wi_0 = nn.Linear(config.width, config.hidden, bias=False)
        self.wi_1 = nn.Linear(config.width, config.hidden, bias=False)
        self.wo = nn.Linear(config.hidden, config.width, bias=False)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)                  # (B, H, L, K)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, E) float32, bias (1, H, L, L) -> (B, L, E) float32."""
        y = self.attention_norm(x)
        q = self.split_heads(self.q(y))
        k = self.split_heads(self.k(y))
        v = self.split_heads(self.v(y))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        y = y.transpose(1, 2).flatten(2)                                          # (B, L, H K)
        x = x + self.o(y).float()
        y = self.mlp_norm(x)
        gate = F.gelu(self.wi_0(y), approximate="tanh")                           # (B, L, hidden)
        value = self.wi_1(y)                                                      # (B, L, hidden)
        if gate.dtype == torch.float16:    # T5-XXL's MLP exceeds 65504, float16's largest number
            return x + F.linear(gate.float() * value.float(), self.wo.weight.float())
        return x + self.wo(gate * value).float()


class MaskEmbedding(nn.Module):
    """T5's [MASK] row, the one part of T5 that D-DiT trains.

    It replaces the embeddings (B, L, E) of the [MASK] ids among ids (B, L).  Its gradient flows
    back through the frozen blocks."""

    def __init__(self, vector: Tensor, mask_id: int):
        super().__init__()
        self.vector = nn.Parameter(vector.clone())
        self.mask_id = mask_id

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        masked = (ids == self.mask_id)[..., None]                                 # (B, L, 1)
        return torch.where(masked, self.vector, x)


class T5Encoder(nn.Module):
    """Encode ids (B, L) int64 as states (B, L, E) in the weights' dtype."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.position_bias = nn.Embedding(config.buckets, config.heads)
        self.blocks = nn.ModuleList(T5Block(config) for _ in range(config.depth))
        self.final_norm = RMSNorm(config.width, config.eps)

    @torch.no_grad()
    def set_embedding(self, token: int, vector: Tensor) -> None:
        """Replace a row of the table by a vector (E,)."""
        self.embed.weight[token] = vector.to(self.embed.weight)

    def forward(self, ids: Tensor, mask: MaskEmbedding | None = None) -> Tensor:
        """ids (B, L) -> (B, L, E).  mask: replaces the table's [MASK] row while it is trained."""
        bucket = buckets(ids.shape[1], self.config.buckets, self.config.distance)
        bias = self.position_bias(bucket.to(ids.device))                          # (L, L, H)
        bias = bias.permute(2, 0, 1)[None]                                        # (1, H, L, L)
        x = self.embed(ids).float()                                               # (B, L, E)
        if mask is not None:
            x = mask(ids, x)
        for block in self.blocks:
            x = block(x, bias)
        return self.final_norm(x)
