"""The dual diffusion transformer: one MMDiT, two diffusions, one forward pass with two results.

    velocity, logits = model(latents, text, t)

Two residual streams, image and text, each with its own weights in every block, meet in one joint,
unmasked attention.  The image stream ends in a velocity (rectified flow, `flow.py`), the text
stream in a distribution over tokens (absorbing-state diffusion, `mask_diffusion.py`).  It is
Stable Diffusion 3's MMDiT (arXiv 2403.03206) with the changes of "Dual Diffusion" (arXiv
2501.00289): the time is the only conditioning, the last block keeps its whole text stream, there is
a text head, and eight trained tokens stand in for the image in training on text only.

Shapes: B batch, C latent channels, h and w latent height and width, p patch, N image tokens (h/p *
w/p), L text tokens, D width, H heads, E width of the text embeddings, V vocabulary."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def size(default: int):
    """Return a dataclass field for a size of the model; config.json can't set it below 1."""
    return field(default=default, metadata=dict(low=1))


@dataclass
class MMDiTConfig:
    """Sizes of the model.  To add one, add a field with a default that JSON can store."""
    depth: int = size(24)           # blocks
    heads: int = size(24)           # attention heads, of size 64 in every published model
    width: int = size(1536)         # D
    patch: int = size(2)            # p, latents per side of an image token
    channels: int = size(16)        # C
    position_size: int = size(192)  # side of the position table, in patches: the largest image
    position_base: int = size(64)   # unit steps that the table spans: 1024 pixels in SD3
    text_width: int = size(4096)    # E, the width of T5-XXL's or TokenEmbedding's output
    vocab_size: int = size(32100)   # V, rows of the text head: the tokenizer's size with [MASK]
    null_tokens: int = size(8)      # trained tokens that stand in for a missing image
    qk_norm: bool = False           # RMSNorm on q and k, as in SD3.5; SD3 and D-DiT have none
    # positions of TokenEmbedding; 0: the text states come from T5
    text_length: int = field(default=0, metadata=dict(low=0))
    predicts: str = "velocity"      # image head's output: "velocity", or "data" (clean latents)


PRESETS = {
    # SD3-medium with D-DiT's heads, "2B": 2.10 B parameters and a 56.6 M position table.
    "sd3-medium": dict(),
    # The end-to-end variant.  The paper gives its size, 1.1 B, but no shape.  With heads of size 64
    # and, as in SD3, about one head per block, 18 x 1216 has 1.09 B with the token embedding.
    "e2e-1.1b": dict(depth=18, heads=19, width=1216, text_width=1216, vocab_size=50258,
                     text_length=256),
    # The end-to-end variant for a laptop: 64x64 pixels in patches of 8, with room for 128x128 in
    # the table.  8.3 M parameters, without the vocabulary.  A patch has 192 numbers, as many as the
    # width.  So the network has no room to carry a patch of noise besides its features, but it has
    # room for a clean patch.  Therefore the head predicts the clean image.
    "emoji": dict(depth=6, heads=6, width=192, patch=8, channels=3, position_size=16,
                  position_base=16, text_width=192, vocab_size=50258, qk_norm=True, text_length=28,
                  predicts="data"),
    # The same for the shapes world of dataset/shapes.py, 24x24 pixels in patches of 4: 2.5 M
    # parameters, without the vocabulary.
    "shapes": dict(depth=4, heads=4, width=128, patch=4, channels=3, position_size=6,
                   position_base=6, text_width=128, vocab_size=50258, qk_norm=True, text_length=16,
                   predicts="data"),
}


def layer_norm(x: Tensor) -> Tensor:
    """Normalise the last axis; scale and shift follow in `modulate`."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)              # (B or 1, D) -> (B, ., D)


def velocity_to(data: Tensor, latents: Tensor, t: Tensor) -> Tensor:
    """Return the velocity that leads from noised latents (B, ...) to clean data, in float32:

        v = (x_t - x) / t = e - x

    t: (B,) or (1,).  A t below 0.001 counts as 0.001."""
    t = t.to(torch.promote_types(t.dtype, torch.float32)).clamp(min=1e-3)
    t = t.view(-1, *[1] * (data.ndim - 1))                                # (B or 1, 1, 1, 1)
    difference = latents.to(t.dtype) - data.to(t.dtype)
    return difference / t


def timestep_embedding(t: Tensor, channels: int = 256, max_period: float = 10_000.0) -> Tensor:
    """Return sinusoids of 1000 t, cosine half first: t (B,) in [0, 1] -> (B, channels) float32.

    The result is always float32: bfloat16 would round 1000 t = 501 to 500."""
    half = channels // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(max_period) * exponents / half)
    angles = 1000 * t.float()[:, None] * frequencies                        # (B, channels/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(width: int, size: int, base: int) -> Tensor:
    """Return fixed 2-D sin-cos positions (size, size, width), float32, columns first as in SD3.

    The `size` positions span `base` unit steps: neighbours are base / size apart."""
    if torch.get_default_device().type == "meta":
        return torch.empty(size, size, width)
    quarter = width // 4
    exponents = torch.arange(quarter, dtype=torch.float64) / quarter
    frequencies = 1 / 10_000 ** exponents
    coordinates = torch.arange(size, dtype=torch.float64) / (size / base)
    angles = coordinates[:, None] * frequencies                                   # (size, D/4)
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)                        # (size, D/2)
    columns = line[None].expand(size, -1, -1)
    rows = line[:, None].expand(-1, size, -1)
    return torch.cat([columns, rows], dim=-1).float()                             # (size, size, D)


class TimeEmbedding(nn.Module):
    """t (B,) -> conditioning vector (B, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(256, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        sinusoids = timestep_embedding(t).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(sinusoids)))


class TokenEmbedding(nn.Module):
    """The end-to-end variant's text encoder: ids (B, L) -> (B, L, E), tokens plus positions.

    Raises ValueError for an L above the length of the position table."""

    def __init__(self, vocab_size: int, length: int, width: int):
        super().__init__()
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(length, width)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        L = ids.shape[1]
        length = self.position.num_embeddings
        if L > length:
            raise ValueError(f"text of {L} tokens, expected at most {length}, the positions that "
                             f"were trained")
        positions = torch.arange(L, device=ids.device)
        return self.token(ids) + self.position(positions)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in x's dtype.  (nn.RMSNorm warns under autocast.)"""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.weight.to(x.dtype)


class Modulation(NamedTuple):
    """Shifts, scales and gates that the time sets in a stream, in DiT's order, (B or 1, D) each."""
    shift: Tensor
    scale: Tensor
    gate: Tensor                # on the attention's output
    mlp_shift: Tensor
    mlp_scale: Tensor
    mlp_gate: Tensor


class Stream(nn.Module):
    """One modality's half of a block: its modulation, qkv, output projection and MLP."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        D = config.width
        head = D // config.heads
        self.heads = config.heads
        self.modulation = nn.Linear(D, 6 * D)
        self.qkv = nn.Linear(D, 3 * D)
        self.q_norm = RMSNorm(head) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(D, D)
        self.fc1 = nn.Linear(D, 4 * D)
        self.fc2 = nn.Linear(4 * D, D)

    def modulations(self, vec: Tensor) -> Modulation:
        return Modulation(*self.modulation(vec).chunk(6, dim=-1))

    def attention_input(self, x: Tensor, mod: Modulation) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> queries, keys and values, (B, H, T, D/H) each."""
        B, T, D = x.shape
        x = modulate(layer_norm(x), mod.shift, mod.scale)
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).unbind(2)
        q = self.q_norm(q)
        k = self.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def finish(self, x: Tensor, attended: Tensor, mod: Modulation) -> Tensor:
        """Add the attention's output and the MLP: x, attended (B, T, D) -> (B, T, D)."""
        x = x + mod.gate.unsqueeze(1) * self.out(attended)
        y = modulate(layer_norm(x), mod.mlp_shift, mod.mlp_scale)
        hidden = F.gelu(self.fc1(y), approximate="tanh")
        return x + mod.mlp_gate.unsqueeze(1) * self.fc2(hidden)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v, each (B, H, T, d)."""
    if q.requires_grad and q.device.type == "cpu":       # takes 0.7 of the time of torch's kernel
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """Return softmax(q k' / sqrt(d)) of the batch's first row, the mean over heads, in float16.

    q (B, H, queries, d), k (B, H, keys, d) -> (queries, keys)."""
    total = 0.0
    with torch.autocast(q.device.type, enabled=False):
        for q_head, k_head in zip(q[0], k[0]):           # one by one, for less memory
            scores = (q_head.float() * q_head.shape[-1] ** -0.5) @ k_head.float().T
            total = total + scores.softmax(-1)
    return (total / q.shape[1]).half()


def merge_heads(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)                                  # (B, H, T, d) -> (B, T, D)


class BlockCache(NamedTuple):
    """A block's image keys and values, and text modulation, which `Block.read` reuses."""
    keys: Tensor                # (B, H, N, D/H)
    values: Tensor              # (B, H, N, D/H)
    txt_modulation: Modulation  # one time for the whole batch

    def rows(self, index: Tensor) -> "BlockCache":
        """Return the cache of these rows of the batch."""
        return BlockCache(self.keys[index], self.values[index], self.txt_modulation)


class Block(nn.Module):
    """Joint attention: both streams' queries see both streams' keys under one unmasked softmax."""

    attention = staticmethod(attention)         # an attribute, so that plan.py can replace it
    stores_attention = False                    # True: `attend` stores its attention map
    stored_attention: Tensor | None = None      # map of the last call, (queries, keys)
    image_tokens = 0                            # N: the first N keys of that map are the image's

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.img = Stream(config)
        self.txt = Stream(config)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor,
                need: str = "both") -> tuple[Tensor, Tensor]:
        """img (B, N, D), txt (B, L, D), vec (B or 1, D) -> the same shapes.

        need: "both"; or, in the last block, "velocity" or "logits": then the stream that no head
        reads stops after its keys and values, and is returned unchanged."""
        img, txt, _ = self.joint(img, txt, vec, need)
        return img, txt

    def joint(self, img: Tensor, txt: Tensor, vec: Tensor,
              need: str) -> tuple[Tensor, Tensor, BlockCache]:
        """Run the block; also return the cache of its image and time, for `read`."""
        N = img.shape[1]
        L = txt.shape[1]
        vec = F.silu(vec)
        img_mod = self.img.modulations(vec)
        txt_mod = self.txt.modulations(vec)
        img_q, img_k, img_v = self.img.attention_input(img, img_mod)              # (B, H, N, D/H)
        txt_q, txt_k, txt_v = self.txt.attention_input(txt, txt_mod)              # (B, H, L, D/H)
        q = torch.cat([img_q, txt_q], dim=2)                              # (B, H, N + L, D/H)
        k = torch.cat([img_k, txt_k], dim=2)
        v = torch.cat([img_v, txt_v], dim=2)
        if need == "velocity":
            q = q[:, :, :N]
        elif need == "logits":
            q = q[:, :, N:]
        y = self.attend(q, k, v, N)                                               # (B, <= N + L, D)
        if need != "logits":
            img = self.img.finish(img, y[:, :N], img_mod)
        if need != "velocity":
            txt = self.txt.finish(txt, y[:, -L:], txt_mod)
        return img, txt, BlockCache(img_k, img_v, txt_mod)

    def read(self, txt: Tensor, cache: BlockCache) -> Tensor:
        """Run only the text stream (B, L, D), with the image and the time from the cache."""
        mod = cache.txt_modulation
        q, k, v = self.txt.attention_input(txt, mod)                              # (B, H, L, D/H)
        k = torch.cat([cache.keys, k], dim=2)                             # (B, H, N + L, D/H)
        v = torch.cat([cache.values, v], dim=2)
        y = self.attend(q, k, v, cache.keys.shape[2])
        return self.txt.finish(txt, y, mod)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, N: int) -> Tensor:
        """Attend to the keys, the first N from the image, and merge the heads: (B, T, D)."""
        if self.stores_attention:
            self.stored_attention = attention_map(q, k)
            self.image_tokens = N
        return merge_heads(self.attention(q, k, v))


class MMDiT(nn.Module):
    """The whole model.  Under `torch.device("meta")` it takes no memory, to count parameters.

    Raises ValueError for a width or `predicts` that is not possible."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        D, p, C = config.width, config.patch, config.channels
        if D % config.heads or D % 4:
            raise ValueError(f"width {D} must be a multiple of 4 and of the {config.heads} heads")
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
        # adaLN-zero (DiT, arXiv 2212.09748): blocks start as the identity, the velocity as zero
        zero = [self.img_modulation, self.img_out]
        for block in self.blocks:
            zero += [block.img.modulation, block.txt.modulation]
        for linear in zero:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def crop_positions(self, rows: int, columns: int) -> Tensor:
        """Return the central rows x columns of the position table, (N, D).  Raises ValueError."""
        size = self.config.position_size
        if max(rows, columns) > size:
            raise ValueError(f"an image of {rows}x{columns} patches, the position table has "
                             f"{size}x{size}")
        top, left = (size - rows) // 2, (size - columns) // 2
        return self.positions[top:top + rows, left:left + columns].flatten(0, 1)

    def embed(self, latents: Tensor | None, text: Tensor,
              t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the input of the blocks: image (B, N, D), text (B, L, D) and time (B or 1, D)."""
        txt = self.txt_in(text)
        vec = self.time_in(t)
        if latents is None:
            img = self.null_image.expand(len(text), -1, -1).to(txt.dtype)         # (B, 8, D)
            return img, txt, vec
        B, C, h, w = latents.shape
        p = self.config.patch
        if h % p or w % p:
            raise ValueError(f"latents of {h}x{w} are not a multiple of the patch size {p}")
        patches = latents.view(B, C, h // p, p, w // p, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)     # (B, N, C p p)
        positions = self.crop_positions(h // p, w // p)                           # (N, D)
        img = self.img_in(patches.to(txt.dtype))
        return img + positions.to(img.dtype), txt, vec

    def velocity_head(self, img: Tensor, vec: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """img (B, N, D) -> velocity (B, C, h, w)."""
        B, C, h, w = latents.shape
        p = self.config.patch
        shift, scale = self.img_modulation(F.silu(vec)).chunk(2, dim=-1)
        patches = self.img_out(modulate(layer_norm(img), shift, scale))           # (B, N, p p C)
        # SD3's weights have the channels last here, and first in `embed`
        patches = patches.view(B, h // p, w // p, p, p, C)
        image = patches.permute(0, 5, 1, 3, 2, 4).reshape(B, C, h, w)
        if self.config.predicts == "velocity":
            return image
        return velocity_to(image, latents, t)

    def text_head(self, txt: Tensor, at: Tensor | None) -> Tensor:
        """txt (B, L, D) -> logits (B, L, V), or (n, V) at positions `at`."""
        with torch.autocast(txt.device.type, enabled=False):     # bfloat16: errors of 0.06 nats
            if at is not None:
                txt = txt.flatten(0, 1).index_select(0, at)                       # (n, D)
            txt = layer_norm(txt)
            return self.txt_out(txt.to(self.txt_out.weight.dtype))

    def forward(self, latents: Tensor | None, text: Tensor, t: Tensor, need: str = "both",
                at: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Return the velocity (B, C, h, w), a prediction of noise - data, and logits (B, L, V) over
        clean tokens.

        latents: (B, C, h, w) at noise level t, h and w multiples of the patch.  None for text
        without an image: the trained null image stands in, and the velocity is None.
        text: embeddings (B, L, E).
        t: (B,) in [0, 1], the noise level of each image, 0 for a clean one; or (1,), one for all.
        need: "both", "velocity" or "logits"; a result that is not needed is None.
        at: positions (n,) among the B x L tokens; logits are then (n, V).  This saves most of the
        text head, which is most of the work of a text.
        Raises ValueError for latents that the patch does not divide, or larger than the position
        table."""
        img, txt, vec = self.embed(latents, text, t)
        for block in self.blocks[:-1]:
            img, txt = block(img, txt, vec)
        img, txt = self.blocks[-1](img, txt, vec, need)
        velocity = logits = None
        if latents is not None and need != "logits":
            velocity = self.velocity_head(img, vec, latents, t)
        if need != "velocity":
            logits = self.text_head(txt, at)
        return velocity, logits

    def read_and_cache(self, latents: Tensor, text: Tensor, t: Tensor,
                       at: Tensor | None = None) -> tuple[Tensor, list[BlockCache]]:
        """Return `forward`'s logits, and a cache of the image for `read_cached`."""
        img, txt, vec = self.embed(latents, text, t)
        cache = []
        for block in self.blocks:
            need = "logits" if block is self.blocks[-1] else "both"
            img, txt, block_cache = block.joint(img, txt, vec, need)
            cache.append(block_cache)
        return self.text_head(txt, at), cache

    def read_cached(self, text: Tensor, cache: list[BlockCache],
                    at: Tensor | None = None) -> Tensor:
        """Return the logits of another text, without computing the image's stream again.

        This is an approximation: the image's stream depends on the text, and the cache comes from
        an earlier text."""
        txt = self.txt_in(text)
        for block, block_cache in zip(self.blocks, cache, strict=True):
            txt = block.read(txt, block_cache)
        return self.text_head(txt, at)
