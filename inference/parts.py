"""Load the models of one checkpoint, in any layout, and keep in memory those that are needed.

    parts = Parts("assets/emoji")
    parts.hold("text", "mmdit")             # load these; then parts.text(ids), parts.mmdit(...)

Shapes: B batch, L tokens, E width of text states.
"""

import hashlib
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import checkpoint
from common.cli import ROOT, UserError, option, require, warn
from common.devices import DEVICES, choose_device, has_bfloat16
from common.files import sha256
from dataset import aspect_buckets
from pretrained.layouts import SHIFT
from pretrained.safetensors_io import Tensors

EMOJI = ROOT / "assets" / "emoji"               # the shipped weights
SHAPES = ROOT / "assets" / "shapes"

# The values that replace None in a DrawConfig or ReadConfig, for models with a token embedding, and
# for those that read T5, as D-DiT and SD3 are sampled (the batch is ours).  A checkpoint of ours
# may have its own guidance and shift.
WITH_EMBEDDING = dict(guidance=1.5, shift=1.0, batch=16,
                      temperature=0.0, order="threshold", image_cache="once")
PUBLISHED = dict(guidance=7.0, shift=SHIFT, batch=4,
                 temperature=1.0, order="random", image_cache="off")


@dataclass
class ModelConfig:
    """The weights to use, and how; each field is a flag of sample.py and evaluate.py."""
    checkpoint: Path = option(EMOJI, "weights: a file or a folder, in any layout", group="models")
    device: str = option("auto", "where to compute", choices=DEVICES)
    dtype: str | None = option(None, "dtype (bfloat16; the shipped weights: where native)",
                               choices=["float32", "bfloat16"])
    height: int | None = option(None, "of an image, in pixels (as trained; published 512)", low=1)
    width: int | None = option(None, "of an image, in pixels (as trained; published 512)", low=1)
    length: int | None = option(None, "of a text, in tokens (as trained; published 256, to answer "
                                "128)", low=2, high=10**5)
    vae: Path | None = option(None, "autoencoder, in place of the checkpoint's")
    t5: Path | None = option(None, "T5 encoder, in place of the checkpoint's")
    tokenizer: Path | None = option(None, "T5's tokenizer.json, in place of the checkpoint's")
    mask_embedding: Path | None = option(None, "file of T5's trained [MASK] vector")


def available(device: torch.device) -> int:
    """Return the bytes of free memory, half of all memory on a Mac, 0 where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        meminfo = Path("/proc/meminfo").read_text()
        kilobytes = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
        return int(kilobytes[1]) * 1024
    except (OSError, TypeError):                                 # no such file, or no such line
        if not hasattr(os, "sysconf"):                           # Windows has no sysconf
            return 0
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class Parts:
    """The parts of a checkpoint: text (T5 or an embedding), mmdit, vae; `hold` loads them.

    keep: True keeps all parts in memory once loaded.  The default is True if they take at most two
    thirds of the free memory.  With False, `hold` frees the parts that it does not name, and
    drawing takes only the memory of the largest part."""

    def __init__(self, path: str | Path = EMOJI, device: str | torch.device = "cpu",
                 dtype: str | torch.dtype | None = None, keep: bool | None = None, **more):
        """more: the other fields of ModelConfig.  Raises UserError if parts don't fit together."""
        config = ModelConfig(path, **more)
        self.family, self.sizes = checkpoint.read_sizes(path)
        saved = {"null_image": self.family == "D-DiT"}           # SD3 has none
        if self.family == "ours":
            saved = checkpoint.read_config(path)
        self.has_embedding = self.sizes.text_length > 0          # the end-to-end variant; or T5
        self.defaults = WITH_EMBEDDING if self.has_embedding else PUBLISHED
        self.set_defaults(saved)
        self.latents_digest = saved.get("latents")               # of their autoencoder
        self.null_trained = bool(saved.get("null_image"))        # reads texts without an image
        self.paths = dict(text=config.t5 or saved.get("t5") or path, mmdit=path,
                          vae=config.vae or saved.get("vae") or path)
        self.silent = False                                      # True: print no progress
        self.device = torch.device(device)
        self.choose_dtype(dtype)
        self.tokenizer = checkpoint.load_tokenizer(config.tokenizer or path)
        self.choose_length(config, saved.get("text_length"))
        self.check_text(config)
        self.choose_size(config, saved.get("pixels"), bool(saved.get("buckets")))
        self.keep = 1.5 * self.memory_bytes() < available(self.device) if keep is None else keep
        if keep or (self.has_embedding and self.keep):           # small, or keep=True was given
            self.hold("text", "mmdit", "vae")

    def choose_dtype(self, dtype: str | torch.dtype | None) -> None:
        """Choose the dtype of the models, if it is not given."""
        if dtype is None:
            half = not self.has_embedding or has_bfloat16(self.device)
            dtype = torch.bfloat16 if half else torch.float32
        self.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype

    def choose_length(self, config: ModelConfig, trained: int | None) -> None:
        """Choose the number of tokens of a text, and of a question with its answer.

        trained: the number in a run of ours."""
        trained = self.sizes.text_length or trained
        self.length = config.length or trained or 256
        self.answer_length = config.length or trained or 128

    def choose_size(self, config: ModelConfig, pixels: int | None, buckets: bool) -> None:
        """Choose the size of an image.  pixels, buckets: as trained, if known."""
        sizes = self.sizes
        self.factor = 1                                          # pixels per latent, along a side
        if sizes.channels == 3:
            require((not config.vae, "--vae: this checkpoint works on pixels, and has no autoencoder"))
        else:
            self.factor = checkpoint.vae_sizes(self.paths["vae"]).factor
        self.height = config.height or pixels or 512
        self.width = config.width or pixels or 512
        unit = sizes.patch * self.factor
        most = unit * sizes.position_size
        for side in ("height", "width"):
            value = getattr(self, side)
            require((value <= most and value % unit == 0, f"{self.paths['mmdit']}: --{side} {value}, "
                     f"expected a multiple of {unit} up to {most}"))
        self.trained_sizes = [(pixels, pixels)] if pixels else []        # (height, width)
        if pixels and buckets:
            self.trained_sizes += aspect_buckets.sizes(pixels, unit)

    def check_text(self, config: ModelConfig) -> None:
        """Check that tokenizer, text encoder and text head fit, before the slow loading starts."""
        path, width = self.paths["mmdit"], self.sizes.text_width
        self.vector = None
        if self.has_embedding:
            require((not config.mask_embedding, "--mask-embedding is a row of T5's table; this "
                     "checkpoint has an embedding of its own"),
                    (not config.t5, "--t5: this checkpoint has an embedding of its own, and reads no "
                     "T5"),
                    (self.length <= self.sizes.text_length, f"--length {self.length}: {path} reads at "
                     f"most {self.sizes.text_length} tokens"))
        else:
            checkpoint.check_text_encoder(self.paths["text"], self.tokenizer, width)
            vector = config.mask_embedding or Path(path) / checkpoint.MASK_EMBEDDING
            if config.mask_embedding or vector.exists():
                self.vector = checkpoint.load_mask_embedding(vector, width)
        heads, tokens = self.sizes.vocab_size, self.tokenizer.vocab_size
        require((self.family == "SD3" or heads == tokens,
                 f"{path}: the tokenizer has {tokens} tokens, the model's text head {heads}"))

    @classmethod
    def of(cls, models, pixels: int, length: int, dtype: torch.dtype = torch.float32) -> "Parts":
        """Wrap models that are being trained (`training.models.Models`); no file is read."""
        parts = cls.__new__(cls)
        mmdit = models.trainable["mmdit"]
        parts.family, parts.sizes = "ours", mmdit.config
        parts.has_embedding = models.t5 is None
        parts.mmdit, parts.vae, parts.text = mmdit, models.vae, models.text
        parts.tokenizer, parts.device, parts.dtype = models.tokenizer, models.device, dtype
        parts.height = parts.width = pixels
        parts.factor = models.vae.factor
        parts.length = parts.answer_length = length
        parts.keep = parts.silent = parts.null_trained = True
        # FSDP gathers its shards in `forward`, which a cached image does not call
        defaults = WITH_EMBEDDING if parts.has_embedding else PUBLISHED
        parts.defaults = defaults | dict(image_cache="off")
        return parts

    def set_defaults(self, about: dict) -> None:
        """Use a checkpoint's own guidance and shift, if it has them.  about: its config.json."""
        saved = {name: about[name] for name in ("guidance", "shift") if about.get(name)}
        self.defaults = self.defaults | saved

    def complete(self, config):
        """Return a DrawConfig or ReadConfig with this checkpoint's defaults in place of None."""
        missing = {}
        for name, value in self.defaults.items():
            if getattr(config, name, value) is None:
                missing[name] = value
        try:
            return replace(config, **missing)
        except ValueError as error:                              # they don't fit the given flags
            raise UserError(str(error)) from None

    def check_text_head(self) -> None:
        """Raise UserError for SD3's own weights, which can't read an image."""
        require((self.family != "SD3",
                 "this checkpoint is SD3's, which has no text head: it only draws"))

    def transformer(self) -> Tensors:
        """Open the transformer's tensors on disk."""
        path = self.paths["mmdit"]
        if self.family == "ours":
            return Tensors([checkpoint.weights_file(path, False)])
        return checkpoint.find(path, "transformer").tensors

    def digest(self) -> str:
        """Hash the files that the transformer is read from."""
        hashes = b"".join(bytes.fromhex(sha256(file)) for file in self.transformer().files)
        return hashlib.sha256(hashes).hexdigest()[:16]

    def memory_bytes(self) -> int:
        """Return the bytes of all parts in memory, from the headers of their files."""
        values = self.transformer().values()
        if not self.has_embedding:
            values += checkpoint.find(self.paths["text"], "t5").tensors.values()
        size = values * self.dtype.itemsize
        if self.sizes.channels != 3:
            vae = checkpoint.find(self.paths["vae"], "vae")
            size += 4 * vae.tensors.values()                     # in float32
        return size

    def load_text(self):
        if self.has_embedding:
            return checkpoint.load_embedding(self.paths["text"], self.dtype)
        return checkpoint.load_text_encoder(self.paths["text"], self.dtype, self.tokenizer,
                                            self.sizes.text_width, self.vector)

    def load_mmdit(self):
        return checkpoint.load_mmdit(self.paths["mmdit"], self.dtype)

    def load_vae(self):
        vae = checkpoint.load_autoencoder(self.paths["vae"], self.sizes.channels)
        if self.family == "ours":
            digest = checkpoint.digest(vae)
            require((self.latents_digest == digest, f"{self.paths['vae']}: is the autoencoder {digest}, "
                     f"this transformer was trained on the latents of {self.latents_digest}"))
        return vae

    def hold(self, *names: str) -> None:
        """Load these of "text", "mmdit" and "vae"; free the others first, unless all are kept."""
        loaded = vars(self)
        for name in {"text", "mmdit", "vae"}.difference(names):
            if not self.keep:
                loaded.pop(name, None)
        for name in names:
            if name not in loaded:
                loaded[name] = getattr(self, f"load_{name}")().to(self.device)


def open_parts(config: ModelConfig, device: str | torch.device | None = None) -> Parts:
    """Open the models that the flags name, on config.device unless `device` is given."""
    settings = vars(config).copy()
    path, name = settings.pop("checkpoint"), settings.pop("device")
    parts = Parts(path, device or choose_device(name), **settings)
    if parts.dtype == torch.bfloat16 and not config.dtype and not has_bfloat16(parts.device):
        print("note: bfloat16 takes half the memory of float32, but this device does not compute in "
              "it natively; if memory allows, --dtype float32 is faster", file=sys.stderr)
    if parts.trained_sizes and (parts.height, parts.width) not in parts.trained_sizes:
        height, width = parts.trained_sizes[0]
        warn(f"a height of {parts.height} and a width of {parts.width}; these weights were trained "
             f"on images of {height} by {width}, and may show tiles at another size")
    return parts
