"""The models of one checkpoint of any layout: tokenizer, text encoder, transformer, autoencoder.

    parts = Parts("assets/emoji")
    parts.hold("text", "mmdit")             # have these in memory; then parts.text(ids), parts.mmdit(...)

Shapes: B batch, L tokens, E width of text states.
"""

import hashlib
import math
import os
import re
from pathlib import Path

import torch
from torch import Tensor

import buckets
import checkpoint
from cli import UserError, require
from devices import has_bfloat16
from t5 import T5Encoder
from tensors import read_any
from tokenizer import Tokenizer
from vae import AutoencoderKL, Pixels

EMOJI = Path(__file__).parent / "assets" / "emoji"      # the shipped weights
# how each family of weights is sampled unless told otherwise; the published ones as published
OWN = dict(guidance=1.5, shift=1.0, temperature=0.0, order="threshold", image_cache="once")
PUBLISHED = dict(guidance=7.0, shift=3.0, temperature=1.0, order="random", image_cache="off")


def load_mask_embedding(path: str | Path, width: int | None = None) -> Tensor:
    """The aligned [MASK] embedding, one vector (E,): a .safetensors or a .pth that holds one tensor.

    width: E, if it is known.  A .pth is unpickled with weights_only.  Raises UserError."""
    path = Path(path)
    held = read_any(path, lambda error: f"not a file of one tensor ({str(error).splitlines()[0]})")
    found = list(held.values()) if isinstance(held, dict) else [held]
    if [isinstance(x, Tensor) and x.numel() == max(x.shape, default=0) for x in found] != [True]:
        shapes = [str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in found[:4]]
        raise UserError(f"{path}: expected one vector, the [MASK] embedding, found {', '.join(shapes)}")
    if not checkpoint.finite(found[0]):
        raise UserError(f"{path}: the [MASK] embedding holds NaN or infinity")
    row = found[0].numel()
    require((width in (None, row), f"{path}: a [MASK] embedding of {row} numbers, this T5 has {width}"))
    return found[0].detach().flatten()


def check_text_encoder(path: str | Path, tokenizer: Tokenizer, width: int | None = None) -> None:
    """Raises UserError, from T5's headers alone, where it lacks rows for the tokenizer's ids, or its states
    have not the `width` that the transformer reads."""
    sizes, ids = checkpoint.t5_sizes(path), tokenizer.vocab_size
    require((ids <= sizes.vocab_size, f"{path}: T5's table has {sizes.vocab_size} rows, the tokenizer {ids} "
             f"tokens; name T5's own with --tokenizer"),
            (width in (None, sizes.width), f"{path}: T5 gives {sizes.width} numbers a token, the transformer "
             f"reads {width}"))


def load_text_encoder(path: str | Path, dtype: torch.dtype, tokenizer: Tokenizer, width: int | None = None,
                      vector: Tensor | None = None) -> T5Encoder:
    """T5 that fits (`check_text_encoder`), with `vector` (E,), if any, as its [MASK] embedding."""
    check_text_encoder(path, tokenizer, width)
    encoder = checkpoint.load_t5(path, dtype)
    if vector is not None:
        encoder.set_embedding(tokenizer.mask_id, vector)
    return encoder


def load_autoencoder(path: str | Path, channels: int) -> AutoencoderKL | Pixels:
    """In float32, for it is one percent of the whole; for a transformer on latents of so many channels.

    Raises UserError."""
    autoencoder = checkpoint.load_vae(path)
    require((autoencoder.channels == channels, f"{path}: latents of {autoencoder.channels} channels, the "
             f"transformer has {channels}; name the right one with --vae"))
    return autoencoder


def available(device: torch.device) -> int:
    """Return the bytes of memory that are free, half of all memory on a Mac, 0 where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) * 1024
    except (OSError, TypeError):
        known = hasattr(os, "sysconf")                           # Windows has none
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if known else 0


class Parts:
    """The parts that a checkpoint lacks are named: vae, t5, tokenizer (paths of any layout), mask_embedding
    (the aligned [MASK] vector).  keep: all parts stay in memory once loaded, which is the default where they
    take up two thirds of what is free at most; otherwise only those that the moment needs, so that a drawing
    takes the memory of its largest part.  height, width: of pictures, in pixels.  length: positions of a
    text.  trained: the (height, width) that the weights have learnt, if known.  UserError where parts don't
    fit."""

    def __init__(self, path: str | Path = EMOJI, device: str = "cpu", dtype: torch.dtype | None = None, *,
                 vae: Path | None = None, t5: Path | None = None, tokenizer: Path | None = None,
                 mask_embedding: Path | None = None, height: int | None = None, width: int | None = None,
                 length: int | None = None, keep: bool | None = None):
        self.family, self.sizes = checkpoint.read_sizes(path)
        config = checkpoint.read_config(path) if self.family == "ours" else dict(pixels=512)
        self.paths = dict(text=t5 or config.get("t5") or path, mmdit=path,
                          vae=vae or config.get("vae") or path)
        self.own = self.sizes.text_length > 0                             # the end-to-end variant's embedding
        self.device, self.silent = torch.device(device), False     # no line of how far it is
        self.dtype = dtype or (torch.bfloat16 if not self.own or has_bfloat16(self.device) else torch.float32)
        self.defaults = OWN if self.own else PUBLISHED
        self.tokenizer = checkpoint.load_tokenizer(tokenizer or path)
        self.length = length or self.sizes.text_length or 256
        self.answer_length = length or self.sizes.text_length or 128
        learnt = Path(path) / checkpoint.MASK_EMBEDDING
        mask_embedding = mask_embedding or (learnt if learnt.exists() and not self.own else None)
        row = None if self.own else self.sizes.text_width
        self.vector = load_mask_embedding(mask_embedding, row) if mask_embedding else None
        self.height, self.width = height or config.get("pixels"), width or config.get("pixels")
        self.factor = 1 if self.sizes.channels == 3 else checkpoint.vae_sizes(self.paths["vae"]).factor
        if not self.own:                                                     # before minutes of loading
            check_text_encoder(self.paths["text"], self.tokenizer, self.sizes.text_width)
        unit, heads, tokens = self.sizes.patch * self.factor, self.sizes.vocab_size, self.tokenizer.vocab_size
        most = unit * self.sizes.position_size
        fits = lambda side: isinstance(side, int) and 0 < side <= most and side % unit == 0
        expected = f"expected a multiple of {unit} up to {most}"
        require(
            (not self.own or self.length <= self.sizes.text_length,
             f"{path}: texts of {self.length} tokens, its embedding has {self.sizes.text_length} positions"),
            (self.family == "SD3" or heads == tokens,
             f"{path}: the tokenizer has {tokens} tokens, the model's text head {heads}"),
            (not mask_embedding or not self.own,
             "--mask-embedding is a row of T5's table; this checkpoint has an embedding of its own"),
            (fits(self.height), f"{path}: a picture's height of {self.height!r}, {expected}"),
            (fits(self.width), f"{path}: a picture's width of {self.width!r}, {expected}"))
        pixels = config.get("pixels") if self.family == "ours" else None
        # published weights are trusted to have learnt it
        self.null_learnt = self.family != "ours" or bool(config.get("null_image"))
        self.trained = [(pixels, pixels)] if pixels else []
        self.trained += buckets.sizes(pixels, unit) if pixels and config.get("buckets") else []
        self.keep = 1.5 * self.weight() < available(self.device) if keep is None else keep
        if keep or self.own and self.keep:
            self.hold("text", "mmdit", "vae")

    @classmethod
    def of(cls, models, pixels: int, length: int, device: torch.device,
           dtype: torch.dtype = torch.float32) -> "Parts":
        """The parts that are in memory, being trained (`build.Models`); nothing is read."""
        parts, mmdit, own = cls.__new__(cls), models.learns["mmdit"], models.t5 is None
        vars(parts).update(
            family="ours", own=own, keep=True, sizes=mmdit.config,
            defaults=(OWN if own else PUBLISHED) | dict(image_cache="off"),   # FSDP gathers what a forward needs
            mmdit=mmdit, vae=models.vae, text=models.text, tokenizer=models.tokenizer, device=device,
            dtype=dtype, height=pixels, width=pixels, factor=models.vae.factor, length=length,
            answer_length=length, silent=True)
        return parts

    def transformer(self) -> checkpoint.Tensors:
        """Its tensors on disk."""
        path = self.paths["mmdit"]
        return checkpoint.Tensors([checkpoint.own_weights(path, False)]) if self.family == "ours" else (
            checkpoint.find(path, "transformer")[0])

    def digest(self) -> str:
        """Of the files that the transformer is read from."""
        found = hashlib.sha256()
        for file in self.transformer().files:
            with open(file, "rb") as opened:
                found.update(hashlib.file_digest(opened, "sha256").digest())
        return found.hexdigest()[:16]

    def weight(self) -> int:
        """Bytes of all parts in memory, from headers alone."""
        size = lambda tensors: sum(map(math.prod, tensors.shape.values()))
        count = size(self.transformer())
        count += 0 if self.own else size(checkpoint.find(self.paths["text"], "t5")[0])
        vae = 0 if self.sizes.channels == 3 else size(checkpoint.find(self.paths["vae"], "vae")[0])
        return count * self.dtype.itemsize + vae * 4

    def load_text(self):
        if self.own:
            return checkpoint.load_embedding(self.paths["text"], self.dtype)
        return load_text_encoder(self.paths["text"], self.dtype, self.tokenizer, self.sizes.text_width,
                                 self.vector)

    def load_mmdit(self):
        return checkpoint.load_mmdit(self.paths["mmdit"], self.dtype)

    def load_vae(self):
        autoencoder = load_autoencoder(self.paths["vae"], self.sizes.channels)
        found = checkpoint.digest(autoencoder) if self.family == "ours" else None
        learnt = found and checkpoint.read_config(self.paths["mmdit"]).get("latents")
        require((learnt == found, f"{self.paths['vae']}: is the autoencoder {found}, this transformer has "
                 f"learnt the latents of {learnt}"))
        return autoencoder

    def hold(self, *names: str) -> None:
        """Have these of text, mmdit and vae in memory; unless all are kept, free the others first."""
        for name in ("text", "mmdit", "vae"):
            if name not in names and not self.keep:
                self.__dict__.pop(name, None)
        for name in names:
            if name not in self.__dict__:
                part = getattr(self, f"load_{name}")()
                setattr(self, name, part.to(self.device) if isinstance(part, torch.nn.Module) else part)
