"""The models of a run: those that are trained, and the frozen T5 and autoencoder.

Shapes: B batch, L tokens, E width of text states, C latent channels, h, w latent height and width.
"""

import sys
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint as recompute

import checkpoint
from common.cli import UserError, flag, warn
from dataset import aspect_buckets
from dataset.precompute import states_stamp
from inference.compiled import compile_blocks
from model import MMDiT, MMDiTConfig, TokenEmbedding, position_table
from pretrained.t5 import MaskEmbedding, T5Encoder
from pretrained.tokenizer import Tokenizer, gpt2_subset, gpt2_tokenizer
from pretrained.vae import AutoencoderKL, Pixels
from training.config import STAGES, TrainConfig


@dataclass
class Models:
    trainable: nn.ModuleDict            # "mmdit", and "embedding" or T5's "mask"
    tokenizer: Tokenizer
    t5: T5Encoder | None                # None: the end-to-end variant
    vae: AutoencoderKL | Pixels | None  # None: the latents are stored, or there are no images
    empty: Tensor | None = None         # T5's states of the empty prompt, (1, L, E)
    extra_tensors: dict[str, Tensor] = field(default_factory=dict)   # stored, but not trained

    @property
    def device(self) -> torch.device:
        return next(self.trainable.parameters()).device

    def text(self, ids: Tensor) -> Tensor:
        """Return the text states (B, L, E) that the transformer reads for ids (B, L).

        T5's weights are frozen; gradients pass through T5 only to reach a trained [MASK]."""
        if self.t5 is None:
            return self.trainable["embedding"](ids)
        if "mask" in self.trainable:
            return self.t5(ids, self.trainable["mask"])
        with torch.no_grad():
            return self.t5(ids, None)

    def captions(self, ids: Tensor, dropped: Tensor, states: Tensor | None = None) -> Tensor:
        """Return text states (B, L, E) of clean captions, or of "" where `dropped` (B,) is True.

        states: T5's states (B, L, E), if the data store them."""
        if self.t5 is None:
            return self.trainable["embedding"](ids)
        text = self.empty.repeat(len(ids), 1, 1)                          # (B, L, E)
        kept = ~dropped
        with torch.no_grad():
            if states is not None:
                text[kept] = states[kept].to(text.dtype)
            elif kept.any():
                text[kept] = self.t5(ids[kept])
            elif isinstance(self.t5, FSDPModule):
                self.t5(ids[:1])        # the other processes need this one's shards
        return text

    @torch.no_grad()
    def latents(self, images: Tensor | None) -> Tensor | None:
        """Encode images (B, 3, H, W) in [-1, 1] to the posterior's means (B, C, h, w), float32.

        Stored latents are returned as they are."""
        if not isinstance(self.vae, AutoencoderKL) or images is None or images.shape[1] != 3:
            return images
        dtype = next(self.vae.parameters()).dtype
        return self.vae.encode(images.to(dtype)).float()


def check(config: TrainConfig, sizes: MMDiTConfig, factor: int | None) -> None:
    """Raise UserError for a stage, text length or --pixels that a model of these sizes can't have.

    factor: pixels per latent, along a side; None without images."""
    name = f"--init {config.init}" if config.init else f"--preset {config.preset}"
    if config.vae and sizes.channels == 3:
        raise UserError(f"--vae: {name} works on pixels, and has no autoencoder")
    if sizes.text_length:
        for part in ("t5", "tokenizer", "mask_embedding"):
            if getattr(config, part):
                raise UserError(f"{flag(part)}: {name} has a token embedding of its own, and reads no "
                                f"T5")
        if config.stage == "mask-emb":
            raise UserError(f"--stage mask-emb: teaches T5's [MASK], {name} has a token embedding "
                            f"of its own; choose another stage")
        if config.text_length > sizes.text_length:
            raise UserError(f"--text-length {config.text_length}: expected at most "
                            f"{sizes.text_length}, the positions of {name}")
    elif config.stage == "text":
        raise UserError(f"--stage text: is the end-to-end variant's, {name} reads T5's states; "
                        f"start with --stage pretrain")
    if factor and STAGES[config.stage].images:
        unit = sizes.patch * factor
        largest = unit * sizes.position_size
        side = config.pixels
        named = f"--pixels {config.pixels}"
        if config.buckets:
            side = max(map(max, aspect_buckets.sizes(config.pixels, unit)))
            named += f" (--buckets has sides of {side})"
        if config.pixels % unit or side > largest:
            raise UserError(f"{named}: expected a multiple of the patch, {unit}, up to {largest}, this "
                            f"model's position table")


def find_parts(config: TrainConfig, sizes: MMDiTConfig, about: dict) -> dict[str, str]:
    """Return the paths of the "t5" and the "vae" that a model of these sizes needs.

    A path comes from the flag, or from config.json of --init (`about`), or it is --init itself.
    If the part is not at this path, raise UserError if a flag named it; otherwise leave it out."""
    parts = []
    if not sizes.text_length:
        parts.append("t5")
    if sizes.channels != 3:
        parts.append("vae")
    paths = {}
    for part in parts:
        path_given = getattr(config, part)
        path = path_given or about.get(part) or config.init
        if not path:
            continue
        try:
            checkpoint.named(path, part)
            paths[part] = path
        except UserError:
            if path_given:
                raise
    return paths


def build(config: TrainConfig, sizes: MMDiTConfig, where: dict[str, str], tokenizer: Tokenizer,
          no_images: bool, vae: AutoencoderKL | Pixels | None, device: torch.device) -> Models:
    """Build the models of a run on the device.

    sizes: of --init or the preset.  where: see `find_parts`.  no_images: the text loss has no
    images, so the null image is trained.  vae: in eval mode.  Raises UserError if parts are missing
    or don't fit together."""
    torch.manual_seed(config.seed)
    mmdit = build_transformer(config, sizes, tokenizer)
    models = Models(nn.ModuleDict({"mmdit": mmdit}), tokenizer, None, vae)
    table = position_table(sizes.width, sizes.position_size, sizes.position_base)
    if not torch.equal(mmdit.positions, table):                  # SD3's is in half precision
        models.extra_tensors["mmdit.positions"] = mmdit.positions
    if sizes.text_length:
        models.trainable["embedding"] = build_embedding(config, mmdit.config)
    else:
        add_text_encoder(models, config, where.get("t5"), device)
    if vae:
        vae.to(device, getattr(torch, config.dtype)).requires_grad_(False)
    mmdit.null_image.requires_grad_(no_images)
    if not STAGES[config.stage].images:
        freeze_velocity_parts(mmdit)
    if config.checkpoint_activations:
        recompute_blocks(models)
    models.trainable.to(device).train()
    if config.compile:
        compile_blocks(mmdit, dynamic=None)
    return models


def build_tokenizer(config: TrainConfig, sizes: MMDiTConfig, texts: list[str] | None) -> Tokenizer:
    """Load the tokenizer of --tokenizer or --init, or else make GPT-2's or a part of it.

    texts: all training texts, or None.  Raises UserError."""
    end_to_end = sizes.text_length > 0
    if end_to_end and not config.init:
        used_tokens = None
        if config.vocabulary == "used":
            if texts is None:
                warn("--vocabulary used: the texts of tars, latents, files of questions and plain "
                     "text can't be listed without reading all data; the whole vocabulary is used")
            else:
                used_tokens = gpt2_subset(texts)
        tokenizer = gpt2_tokenizer(used_tokens)
        tokenizer.meet(texts)
    else:
        path = config.tokenizer or config.init
        if not path:
            raise UserError(f"--preset {config.preset} reads T5's states: name its tokenizer with "
                            f"--tokenizer, T5 with --t5 and the autoencoder with --vae")
        tokenizer = checkpoint.training_tokenizer(path)
        if end_to_end and tokenizer.seen is not None:    # it has met all earlier texts
            tokenizer.meet(texts)
    tokenizer.warns = False                              # the log counts the texts that are cut
    return tokenizer


def build_transformer(config: TrainConfig, sizes: MMDiTConfig, tokenizer: Tokenizer) -> MMDiT:
    """Load the transformer of --init, or make one with as many tokens as the tokenizer has."""
    vocab_size = tokenizer.vocab_size
    if config.init:
        mmdit = checkpoint.load_mmdit(config.init, vocab_size=vocab_size, training=True)
        if mmdit.config.vocab_size != vocab_size:
            raise UserError(f"{config.init}: its text head has {mmdit.config.vocab_size} tokens, "
                            f"the tokenizer {vocab_size}; name the right one with --tokenizer")
        return mmdit
    sizes = replace(sizes, vocab_size=vocab_size, predicts=config.predicts or sizes.predicts)
    if sizes.text_length:
        sizes.text_length = config.text_length
    return MMDiT(sizes)


def build_embedding(config: TrainConfig, sizes: MMDiTConfig) -> TokenEmbedding:
    """Load the token embedding of --init, or make one."""
    if config.init:
        return checkpoint.load_embedding(config.init, training=True)
    return TokenEmbedding(sizes.vocab_size, sizes.text_length, sizes.text_width)


def add_text_encoder(models: Models, config: TrainConfig, path: str | None,
                     device: torch.device) -> None:
    """Load T5, frozen, with its [MASK] embedding, which --stage mask-emb trains.

    Raises UserError if there is no T5."""
    if not path:
        raise UserError(f"{config.init or config.preset}: no T5 encoder in it; name its file or "
                        f"folder with --t5")
    tokenizer = models.tokenizer
    width = models.trainable["mmdit"].config.text_width
    vector = None
    if config.mask_embedding:
        vector = checkpoint.load_mask_embedding(config.mask_embedding, width)
    elif config.init:
        vector = checkpoint.trained_mask(config.init)
    dtype = getattr(torch, config.dtype)
    t5 = checkpoint.load_text_encoder(path, dtype, tokenizer, width, vector)
    if vector is None:
        vector = t5.embed.weight[tokenizer.mask_id].detach()
    vector = vector.float().clone()                              # not rounded to T5's dtype
    models.extra_tensors["mask.vector"] = vector
    if STAGES[config.stage].trains_mask:
        models.trainable["mask"] = MaskEmbedding(vector, tokenizer.mask_id)
    models.t5 = t5.to(device).requires_grad_(False)
    empty_prompt = tokenizer.encode("", config.text_length)[None].to(device)     # (1, L)
    with torch.no_grad():
        models.empty = t5(empty_prompt)


def freeze_velocity_parts(mmdit: MMDiT) -> None:
    """Freeze the modules that only lead to the velocity, which --stage text doesn't compute."""
    last = mmdit.blocks[-1].img
    for module in (mmdit.img_in, mmdit.img_modulation, mmdit.img_out, last.out, last.fc1, last.fc2):
        module.requires_grad_(False)


def recompute_blocks(models: Models) -> None:
    """Make all blocks with gradients store only their inputs, and compute the rest again."""
    blocks = [*models.trainable["mmdit"].blocks]
    if "mask" in models.trainable:
        blocks += models.t5.blocks
    for block in blocks:
        block.forward = partial(recompute, block.forward, use_reentrant=False)


def has_stored_states(config: TrainConfig, mix, models: Models, where: dict[str, str]) -> bool:
    """Return True if every source of captions stores T5's states.

    Raises UserError if they were made with another T5, tokenizer, text length or --recaption than
    this run has."""
    if not mix or not models.t5:
        return False
    states = [source.states for source in mix.sources]
    if None in states:
        return False
    # stored states come from the published T5 in bfloat16: captions have no [MASK]
    t5 = checkpoint.load_t5(where["t5"], torch.bfloat16)
    stamp = states_stamp(t5, models.tokenizer, config.text_length, config.recaption)
    for source in mix.sources:
        if source.states != stamp:
            raise UserError(f"{source.name}: stored states of {source.states}, this run's are of "
                            f"{stamp}; make them again, or without --t5")
    return True


def report(config: TrainConfig, vocab_size: int) -> None:
    """Print on stderr which weights come from SD3 and which ones are new."""
    print(f"from SD3: {checkpoint.carried_over(config.init, vocab_size)}", file=sys.stderr)
    if config.stage == "instruct":
        warn("--stage instruct from SD3, which has no text head: a new one is trained on answers "
             "before it was trained on captions; --stage pretrain comes first")
