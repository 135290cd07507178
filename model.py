"""The dual diffusion transformer: one MMDiT, two diffusions, one forward pass with two results.

    velocity, logits = model(latents, text, t)

Two residual streams, image and text, each with its own weights in every block, meet in one joint, unmasked
attention.  The image stream ends in a velocity (rectified flow, `flow.py`), the text stream in a distribution
over tokens (absorbing-state diffusion, `mask_diffusion.py`).  It is Stable Diffusion 3's MMDiT (arXiv
2403.03206) with the changes of "Dual Diffusion" (arXiv 2501.00289): conditioning is the time alone, the last
block keeps its whole text stream, a text head, and eight learned tokens in place of the image for text alone.

Shapes: B batch, C latent channels, h and w latent height and width, p patch, N image tokens (h/p * w/p),
L text tokens, D width, H heads, E width of the text embeddings, V vocabulary.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def size(default: int):
    """Return a field for a size of the model, at least 1; a config.json with less is refused."""
    return field(default=default, metadata=dict(low=1))


@dataclass
class MMDiTConfig:
    """Sizes of the model.  A new field needs a default that JSON can hold, nothing else."""
    depth: int = size(24)           # blocks
    heads: int = size(24)           # attention heads
    width: int = size(1536)         # D; the size of a head is width / heads, 64 in every published model
    patch: int = size(2)            # p, latents per side of an image token
    channels: int = size(16)        # C
    position_size: int = size(192)  # side of the position table, in patches: the largest image
    position_base: int = size(64)   # side that the table spans in unit steps: SD3's first resolution
    text_width: int = size(4096)    # E, of T5-XXL or of our own TokenEmbedding
    vocab_size: int = size(32100)   # V, rows of the text head: the tokenizer's size, [MASK] included
    null_tokens: int = size(8)      # learned tokens that stand in for the image when there is none
    qk_norm: bool = False           # RMSNorm on q and k, as in SD3.5; SD3 and D-DiT have none
    text_length: int = field(default=0, metadata=dict(low=0))   # positions of TokenEmbedding; 0: T5's states
    predicts: str = "velocity"      # what the image head gives: "velocity", or "data", the clean latents


PRESETS = {
    # SD3-medium with D-DiT's heads, "2B": 2.10 B parameters and a 56.6 M position table.
    "sd3-medium": dict(),
    # The end-to-end variant.  The paper gives its size, 1.1 B, and no shape.  SD3's head size of 64 and its
    # habit of width growing with depth give 18 x 1216: 1.09 B with the token embedding.
    "e2e-1.1b": dict(depth=18, heads=19, width=1216, text_width=1216, vocab_size=50258, text_length=256),
    # The end-to-end variant for a laptop: 64x64 pixels in patches of 8, with room for 128x128 in the table.
    # 8.3 M parameters and the vocabulary.  A patch has 192 numbers, as many as the width: noise does not fit
    # through beside what the network computes, a clean patch does, so the head gives the clean picture.
    "emoji": dict(depth=6, heads=6, width=192, patch=8, channels=3, position_size=16, position_base=16,
                  text_width=192, vocab_size=50258, qk_norm=True, text_length=28, predicts="data"),
}


T_FLOOR = dict(train=0.05, draw=1e-3)   # of the division that turns predicted data into a velocity


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)                      # (B or 1, D) -> (B, ., D)


def velocity_to(data: Tensor, latents: Tensor, t: Tensor, floor: float) -> Tensor:
    """The velocity at noised latents (B, ...) that leads to the clean `data` of the same shape, in float32:

        v = (x_t - x) / max(t, floor) = e - x    from t = floor on

    t: (B,) or (1,).  Its squared error is that of x over t^2: in training a floor of 0.05 keeps a rare small
    t from outweighing the batch (JiT, arXiv 2511.13720); a walk goes on to its smallest level and ends at x.
    """
    t = t.to(torch.promote_types(t.dtype, torch.float32)).clamp(min=floor)
    return (latents.to(t.dtype) - data.to(t.dtype)) / t.view(-1, *[1] * (data.ndim - 1))


def timestep_embedding(t: Tensor, channels: int = 256, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of 1000 t, cosine half first: t (B,) in [0, 1] -> (B, channels) float32.

    Always float32: in bf16, 1000 t = 501 would become 500."""
    half = channels // 2
    rates = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = 1000 * t.float()[:, None] * rates                                    # (B, channels/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(width: int, size: int, base: int) -> Tensor:
    """Fixed 2-D sin-cos positions, (size, size, width) float32, the column's half first as in SD3.

    The table's `size` positions span `base` unit steps, so that neighbours are base / size apart."""
    if torch.get_default_device().type == "meta":
        return torch.empty(size, size, width)
    quarter = width // 4
    rates = 1 / 10_000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    at = torch.arange(size, dtype=torch.float64) / (size / base)
    angles = at[:, None] * rates                                                  # (size, D/4)
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)                        # (size, D/2)
    columns, rows = line[None].expand(size, -1, -1), line[:, None].expand(-1, size, -1)
    return torch.cat([columns, rows], dim=-1).float()                             # (size, size, D)


class TimeEmbedding(nn.Module):
    """t (B,) -> conditioning vector (B, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(256, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(timestep_embedding(t).to(self.fc1.weight.dtype))))


class TokenEmbedding(nn.Module):
    """The end-to-end variant's text encoder, a token table plus learned positions: ids (B, L) -> (B, L, E).
    Raises ValueError when L is over the length of the position table."""

    def __init__(self, vocab_size: int, length: int, width: int):
        super().__init__()
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(length, width)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        L, length = ids.shape[1], self.position.num_embeddings
        if L > length:
            raise ValueError(f"text of {L} tokens is longer than the {length} positions that were trained")
        return self.token(ids) + self.position(torch.arange(L, device=ids.device))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in x's dtype (nn.RMSNorm warns where autocast makes two)."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.weight.to(x.dtype)


class Stream(nn.Module):
    """One modality's half of a block: its modulation, qkv, output projection and MLP."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        D, head = config.width, config.width // config.heads
        self.heads = config.heads
        self.modulation = nn.Linear(D, 6 * D)
        self.qkv = nn.Linear(D, 3 * D)
        self.q_norm = RMSNorm(head) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(D, D)
        self.fc1 = nn.Linear(D, 4 * D)
        self.fc2 = nn.Linear(4 * D, D)

    def attention_input(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, D = x.shape
        x = modulate(F.layer_norm(x, (D,), eps=1e-6), shift, scale)
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).unbind(2)
        return self.q_norm(q), self.k_norm(k), v                                  # each (B, T, H, D/H)

    def finish(self, x: Tensor, attended: Tensor, gate: Tensor, shift: Tensor, scale: Tensor,
               mlp_gate: Tensor) -> Tensor:
        x = x + gate.unsqueeze(1) * self.out(attended)
        y = modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale)
        return x + mlp_gate.unsqueeze(1) * self.fc2(F.gelu(self.fc1(y), approximate="tanh"))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v, each (B, H, T, d): by torch's kernel, and written out to train on a CPU."""
    if q.requires_grad and q.device.type == "cpu":       # 0.7 of the time of torch's plain products
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    """Joint attention: both streams' queries see both streams' keys under one unmasked softmax."""

    attention = staticmethod(attention)

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.img = Stream(config)
        self.txt = Stream(config)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, need: str = "both",
                kept: list | None = None) -> tuple[Tensor, Tensor]:
        """img (B, N, D), txt (B, L, D), vec (B or 1, D) -> the same shapes.

        need: "both", "velocity" or "logits": in the last block the stream that no head reads stops after its
        keys and values (its old value is returned).  kept: gets what `read` takes."""
        (N, L), vec = (img.shape[1], txt.shape[1]), F.silu(vec)
        modulation = self.txt.modulation(vec)                                     # (B or 1, 6D)
        img_shift, img_scale, *img_mod = self.img.modulation(vec).chunk(6, dim=-1)  # 6 of (B or 1, D)
        txt_shift, txt_scale, *txt_mod = modulation.chunk(6, dim=-1)
        # (shift, scale) of the attention are used here; gate, shift, scale, gate of what follows in finish
        streams = zip(self.img.attention_input(img, img_shift, img_scale),
                      self.txt.attention_input(txt, txt_shift, txt_scale))
        q, k, v = (torch.cat([x.transpose(1, 2) for x in pair], dim=2)            # (B, H, N + L, D/H)
                   for pair in streams)
        if kept is not None:
            kept.append((k[:, :, :N], v[:, :, :N], modulation))
        rows = dict(both=slice(None), velocity=slice(N), logits=slice(N, None))[need]
        y = self.attention(q[:, :, rows], k, v).transpose(1, 2).flatten(2)        # (B, <= N + L, D)
        if need != "logits":
            img = self.img.finish(img, y[:, :N], *img_mod)
        if need != "velocity":
            txt = self.txt.finish(txt, y[:, -L:], *txt_mod)
        return img, txt

    def read(self, txt: Tensor, keys: Tensor, values: Tensor, modulation: Tensor) -> Tensor:
        """The text's half alone, (B, L, D), beside an image's keys and values (B, H, N, D/H) of before, and
        with the text's modulation (B or 1, 6D) of before, which depends on t alone."""
        shift, scale, *mod = modulation.chunk(6, dim=-1)
        q, k, v = (x.transpose(1, 2) for x in self.txt.attention_input(txt, shift, scale))   # (B, H, L, D/H)
        y = self.attention(q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2))
        return self.txt.finish(txt, y.transpose(1, 2).flatten(2), *mod)


class MMDiT(nn.Module):
    """The whole model.  Build it under `torch.device("meta")` to count parameters without memory."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        D, p, C = config.width, config.patch, config.channels
        if D % config.heads or D % 4:
            raise ValueError(f"width {D} must be a multiple of 4 and of the number of heads, {config.heads}")
        if config.predicts not in ("velocity", "data"):
            raise ValueError(f"predicts is {config.predicts!r}, expected \"velocity\" or \"data\"")
        self.config = config
        self.img_in = nn.Linear(C * p * p, D)
        self.txt_in = nn.Linear(config.text_width, D)
        self.time_in = TimeEmbedding(D)
        self.null_image = nn.Parameter(torch.empty(1, config.null_tokens, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.img_modulation = nn.Linear(D, 2 * D)
        self.img_out = nn.Linear(D, p * p * C)
        self.txt_out = nn.Linear(D, config.vocab_size)
        table = position_table(D, config.position_size, config.position_base)
        self.register_buffer("positions", table, persistent=False)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.time_in.fc1.weight, std=0.02)
        nn.init.normal_(self.time_in.fc2.weight, std=0.02)
        nn.init.normal_(self.null_image, std=0.02)
        nn.init.normal_(self.txt_out.weight, std=0.02)
        # adaLN-zero (DiT, arXiv 2212.09748): every block starts as the identity, the velocity as zero
        streams = [stream for block in self.blocks for stream in (block.img, block.txt)]
        for linear in [stream.modulation for stream in streams] + [self.img_modulation, self.img_out]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def crop_positions(self, rows: int, columns: int) -> Tensor:
        """The centre of the position table for a rows x columns picture, in patches: (N, D)."""
        size = self.config.position_size
        if max(rows, columns) > size:
            raise ValueError(f"{rows}x{columns} patches of a picture, the position table has {size}x{size}")
        top, left = (size - rows) // 2, (size - columns) // 2
        return self.positions[top:top + rows, left:left + columns].flatten(0, 1)

    def forward(self, latents: Tensor | None, text: Tensor, t: Tensor, need: str = "both",
                at: Tensor | None = None, kept: list | None = None) -> tuple[Tensor | None, Tensor | None]:
        """velocity (B, C, h, w), predicting noise - data; and logits (B, L, V) over the clean tokens.

        latents: (B, C, h, w) at noise level t, h and w multiples of the patch; None for text alone (then the
        learned null image stands in and velocity is None).  text: embeddings (B, L, E).  t: (B,) in [0, 1],
        the IMAGE's noise level, 0 for a clean picture; of shape (1,), one time for the whole batch, whose
        modulation is computed once.  need: "both", or "velocity" / "logits" alone; the other is then None.
        at: (n,) tokens, counted over B x L, whose logits are wanted, then (n, V); the head is most of a text.
        kept: an empty list is filled with each block's (image's keys, values, text's modulation); a full one
        stands for image and t, of which nothing is computed again.  That is an approximation where the text
        has changed since, for the image's stream sees the text; velocity is then None.
        Raises ValueError for latents the patch doesn't divide or larger than the position table."""
        p, C, before = self.config.patch, self.config.channels, list(kept or [])
        vec = None if before else self.time_in(t)                                 # (B or 1, D)
        txt = self.txt_in(text)                                                   # (B, L, D)
        if before:
            img, need = None, "logits"
        elif latents is None:
            img = self.null_image.expand(len(text), -1, -1).to(txt.dtype)         # (B, 8, D)
        else:
            B, _, h, w = latents.shape
            if h % p or w % p:
                raise ValueError(f"latents of {h}x{w} are not a multiple of the patch size {p}")
            img = latents.view(B, C, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)  # (B, h/p, w/p, C, p, p)
            img = self.img_in(img.reshape(B, -1, C * p * p).to(txt.dtype))        # (B, N, D)
            img = img + self.crop_positions(h // p, w // p).to(img.dtype)
        for i, block in enumerate(self.blocks):
            if before:
                txt = block.read(txt, *before[i])
            else:
                img, txt = block(img, txt, vec, need if i == len(self.blocks) - 1 else "both", kept)

        velocity = logits = None
        if latents is not None and need != "logits":
            shift, scale = self.img_modulation(F.silu(vec)).chunk(2, dim=-1)
            img = self.img_out(modulate(F.layer_norm(img, img.shape[-1:], eps=1e-6), shift, scale))
            img = img.view(B, h // p, w // p, p, p, C).permute(0, 5, 1, 3, 2, 4)  # (B, C, h/p, p, w/p, p)
            velocity = img.reshape(B, C, h, w)
            if self.config.predicts == "data":
                velocity = velocity_to(velocity, latents, t, T_FLOOR["train" if self.training else "draw"])
        if need != "velocity":
            with torch.autocast(txt.device.type, enabled=False):              # in bf16: 0.06 nats a token off
                txt = txt if at is None else txt.flatten(0, 1).index_select(0, at)          # (B, L or n, D)
                txt = F.layer_norm(txt, txt.shape[-1:], eps=1e-6)
                logits = self.txt_out(txt.to(self.txt_out.weight.dtype))          # (B, L, V) or (n, V)
        return velocity, logits
