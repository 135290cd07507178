"""The models of one checkpoint of any layout: tokenizer, text encoder, transformer, autoencoder.

    parts = Parts("assets/emoji")
    parts.hold("text", "mmdit")             # have these in memory; then parts.text(ids), parts.mmdit(...)

Shapes: B batch, L tokens, E width of text states.
"""

import hashlib
import os
import re
from pathlib import Path

import torch

import checkpoint
from common.cli import require
from common.devices import has_bfloat16
from common.files import sha256
from dataset import aspect_buckets
from pretrained.safetensors_io import Tensors
from pretrained.vae import Pixels

EMOJI = Path(__file__).parents[1] / "assets" / "emoji"      # the shipped weights
# how each family of weights is sampled unless told otherwise; the published ones as published
OWN = dict(guidance=1.5, shift=1.0, temperature=0.0, order="threshold", image_cache="once")
PUBLISHED = dict(guidance=7.0, shift=3.0, temperature=1.0, order="random", image_cache="off")


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
    """A checkpoint's parts, each loaded when it is needed.

    vae, t5, tokenizer, mask_embedding: paths of the parts that the checkpoint lacks.  keep: all parts stay in
    memory once loaded, by default where they take up two thirds of what is free at most; otherwise only
    those that the moment needs, so that drawing takes the memory of its largest part.  height, width: of
    images, in pixels.  length: positions of a text.  trained: the (height, width) that the weights were
    trained on, if known.  Raises UserError where parts don't fit."""

    def __init__(self, path: str | Path = EMOJI, device: str = "cpu", dtype: torch.dtype | None = None, *,
                 vae: Path | None = None, t5: Path | None = None, tokenizer: Path | None = None,
                 mask_embedding: Path | None = None, height: int | None = None, width: int | None = None,
                 length: int | None = None, keep: bool | None = None):
        self.family, self.sizes = checkpoint.read_sizes(path)
        sizes = self.sizes
        config = checkpoint.read_config(path) if self.family == "ours" else {"null_image": True}
        pixels = config.get("pixels")
        self.paths = dict(text=t5 or config.get("t5") or path, mmdit=path,
                          vae=vae or config.get("vae") or path)
        self.own = sizes.text_length > 0                            # the end-to-end variant's embedding
        self.defaults = OWN if self.own else PUBLISHED
        self.null_learnt = bool(config.get("null_image"))
        self.silent = False                                         # prints no progress
        self.device = torch.device(device)
        half = not self.own or has_bfloat16(self.device)
        self.dtype = dtype or (torch.bfloat16 if half else torch.float32)
        self.tokenizer = checkpoint.load_tokenizer(tokenizer or path)
        self.length = length or sizes.text_length or 256
        self.answer_length = length or sizes.text_length or 128
        self.height = height or pixels or 512
        self.width = width or pixels or 512
        self.factor, self.vector = 1, None
        if sizes.channels != 3:
            self.factor = checkpoint.vae_sizes(self.paths["vae"]).factor
        if self.own:
            require((not mask_embedding, "--mask-embedding is a row of T5's table; this checkpoint has an "
                     "embedding of its own"),
                    (self.length <= sizes.text_length, f"{path}: texts of {self.length} tokens, its "
                     f"embedding has {sizes.text_length} positions"))
        else:                                                       # before minutes of loading
            checkpoint.check_text_encoder(self.paths["text"], self.tokenizer, sizes.text_width)
            learnt = Path(path) / checkpoint.MASK_EMBEDDING
            if mask_embedding or learnt.exists():
                self.vector = checkpoint.load_mask_embedding(mask_embedding or learnt, sizes.text_width)
        heads, tokens = sizes.vocab_size, self.tokenizer.vocab_size
        require((self.family == "SD3" or heads == tokens,
                 f"{path}: the tokenizer has {tokens} tokens, the model's text head {heads}"))
        unit = sizes.patch * self.factor
        most = unit * sizes.position_size
        for side in ("height", "width"):
            value = getattr(self, side)
            require((0 < value <= most and value % unit == 0, f"{path}: a picture's {side} of {value}, "
                     f"expected a multiple of {unit} up to {most}"))
        self.trained = [(pixels, pixels)] if pixels else []
        if pixels and config.get("buckets"):
            self.trained += aspect_buckets.sizes(pixels, unit)
        self.keep = 1.5 * self.weight() < available(self.device) if keep is None else keep
        if keep or self.own and self.keep:
            self.hold("text", "mmdit", "vae")

    @classmethod
    def of(cls, models, pixels: int, length: int, device: torch.device,
           dtype: torch.dtype = torch.float32) -> "Parts":
        """Take parts that are in memory, being trained (`training.models.Models`); nothing is read."""
        parts, mmdit, own = cls.__new__(cls), models.learns["mmdit"], models.t5 is None
        vars(parts).update(
            family="ours", own=own, keep=True, sizes=mmdit.config,
            # FSDP gathers what a forward needs
            defaults=(OWN if own else PUBLISHED) | dict(image_cache="off"),
            mmdit=mmdit, vae=models.vae, text=models.text, tokenizer=models.tokenizer, device=device,
            dtype=dtype, height=pixels, width=pixels, factor=models.vae.factor, length=length,
            answer_length=length, silent=True)
        return parts

    def check_text_head(self) -> None:
        """Raise UserError for SD3's own weights, which read no picture."""
        require((self.family != "SD3", "this checkpoint is SD3's, which has no text head: it only draws"))

    def transformer(self) -> Tensors:
        """Open the transformer's tensors on disk."""
        path = self.paths["mmdit"]
        if self.family == "ours":
            return Tensors([checkpoint.own_weights(path, False)])
        return checkpoint.find(path, "transformer")[0]

    def digest(self) -> str:
        """Hash the files that the transformer is read from."""
        hashes = b"".join(bytes.fromhex(sha256(file)) for file in self.transformer().files)
        return hashlib.sha256(hashes).hexdigest()[:16]

    def weight(self) -> int:
        """Return the bytes of all parts in memory, from headers."""
        values, size = self.transformer().values(), 0
        if not self.own:
            values += checkpoint.find(self.paths["text"], "t5")[0].values()
        if self.sizes.channels != 3:
            size = 4 * checkpoint.find(self.paths["vae"], "vae")[0].values()
        return size + values * self.dtype.itemsize

    def load_text(self):
        if self.own:
            return checkpoint.load_embedding(self.paths["text"], self.dtype)
        return checkpoint.load_text_encoder(self.paths["text"], self.dtype, self.tokenizer, self.sizes.text_width,
                                 self.vector)

    def load_mmdit(self):
        return checkpoint.load_mmdit(self.paths["mmdit"], self.dtype)

    def load_vae(self):
        autoencoder = checkpoint.load_autoencoder(self.paths["vae"], self.sizes.channels)
        if self.family == "ours":
            digest = checkpoint.digest(autoencoder)
            latents = checkpoint.read_config(self.paths["mmdit"]).get("latents")
            require((latents == digest, f"{self.paths['vae']}: is the autoencoder {digest}, this transformer "
                     f"was trained on the latents of {latents}"))
        return autoencoder

    def hold(self, *names: str) -> None:
        """Have these of text, mmdit and vae in memory; unless all are kept, free the others first."""
        held = vars(self)
        for name in {"text", "mmdit", "vae"}.difference(names):
            if not self.keep:
                held.pop(name, None)
        for name in names:
            if name not in held:
                part = getattr(self, f"load_{name}")()
                held[name] = part if isinstance(part, Pixels) else part.to(self.device)
