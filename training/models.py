"""The models of a run: what learns, from --init or a preset, and what stays as it is, T5 and the autoencoder.

Shapes: B batch, L tokens, E width of text states, C latent channels, h and w latent height and width.
"""

import sys
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint as recompute

import checkpoint
from checkpoint import load_mask_embedding, load_text_encoder
from common.cli import UserError, require
from model import MMDiT, MMDiTConfig, TokenEmbedding, position_table
from pretrained.t5 import MaskEmbedding, T5Encoder
from pretrained.tokenizer import Tokenizer, gpt2_subset, gpt2_tokenizer
from pretrained.vae import AutoencoderKL, Pixels
from training.config import STAGES, TrainConfig


@dataclass
class Models:
    """learns: "mmdit" and, of the end-to-end variant, "embedding"; or "mask", T5's [MASK], in its stage."""
    learns: nn.ModuleDict
    tokenizer: Tokenizer
    t5: T5Encoder | None
    vae: AutoencoderKL | Pixels | None      # None: the latents are stored, or there is no picture
    empty: Tensor | None = None             # T5's states of the empty prompt, (1, L, E)
    kept: dict[str, Tensor] = field(default_factory=dict)   # what a checkpoint holds beside what learns

    def text(self, ids: Tensor) -> Tensor:
        """What the transformer reads of ids (B, L), (B, L, E).  Only a [MASK] that learns has a gradient
        through T5, and none of T5's weights has one."""
        if self.t5 is None:
            return self.learns["embedding"](ids)
        mask = self.learns["mask"] if "mask" in self.learns else None
        with torch.set_grad_enabled(mask is not None and torch.is_grad_enabled()):
            return self.t5(ids, mask)

    def captions(self, ids: Tensor, dropped: Tensor, states: Tensor | None = None) -> Tensor:
        """Return the text states (B, L, E) of clean captions; those that are dropped (B,) are empty prompts.

        states: T5's, where they are stored, (B, L, E)."""
        if self.t5 is None:
            return self.learns["embedding"](ids)
        text = self.empty.repeat(len(ids), 1, 1)                                  # (B, L, E)
        kept = ~dropped
        with torch.no_grad():
            if states is not None:
                text[kept] = states[kept].to(text.dtype)
            elif kept.any():
                text[kept] = self.t5(ids[kept])
            elif isinstance(self.t5, FSDPModule):
                self.t5(ids[:1])        # the other processes wait for this one's shards
        return text

    @torch.no_grad()
    def latents(self, images: Tensor | None) -> Tensor | None:
        """Pictures (B, 3, H, W) in [-1, 1] -> the posterior's means (B, C, h, w); stored latents stay."""
        if images is None or isinstance(self.vae, Pixels | None) or images.shape[1] != 3:
            return images
        return self.vae.encode(images.to(next(self.vae.parameters()).dtype)).float()


def check(config: TrainConfig, sizes: MMDiTConfig, factor: int | None) -> None:
    """Raise UserError for a stage that a model of these sizes can't have.  factor: pixels per latent, along
    a side, None where there are no images."""
    name = f"--init {config.init}" if config.init else f"--preset {config.preset}"
    own = sizes.text_length
    require((not own or config.stage != "mask-emb", f"--stage mask-emb: teaches T5's [MASK], {name} has a "
             f"token embedding of its own"),
            (own or config.stage != "text", f"--stage text: is the end-to-end variant's, {name} reads T5's "
             f"states"),
            (not own or config.text_length <= own, f"--text-length {config.text_length}: expected at most "
             f"{own}, which {name} has positions for"))
    if factor:
        unit = sizes.patch * factor
        most = unit * sizes.position_size
        require((config.pixels % unit == 0 and config.pixels <= most, f"--pixels {config.pixels}: expected a "
                 f"multiple of the patch, {unit}, up to {most}, this model's position table"))


def places(config: TrainConfig, sizes: MMDiTConfig, about: dict) -> dict[str, str]:
    """Return where the "t5" and "vae" are that a model of these sizes needs: its flag, what --init
    remembers of its run (`about`), or --init.  Raises UserError where a flag names no such part."""
    paths = {}
    for part, needed in (("t5", not sizes.text_length), ("vae", sizes.channels != 3)):
        flag = getattr(config, part)
        path = flag or about.get(part) or config.init
        if needed and path:
            try:
                checkpoint.named(path, part)
                paths[part] = path
            except UserError:
                if flag:
                    raise
    return paths


def freeze(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    model.to(device, dtype).eval().requires_grad_(False)


def load_tokenizer(config: TrainConfig, own: bool, texts: list[str] | None) -> Tokenizer:
    """Load --init's or --tokenizer's, or make a new one: GPT-2's, or the part of it that the texts use."""
    if own and not config.init:
        used = config.vocabulary == "used" and texts is not None
        return gpt2_tokenizer(gpt2_subset(texts) if used else None)
    path = config.tokenizer or config.init
    require((path, f"--preset {config.preset} reads T5's states: name its tokenizer with --tokenizer, T5 "
             f"with --t5 and the autoencoder with --vae"))
    tokenizer = checkpoint.load_tokenizer(path)
    tokenizer.pad_id = tokenizer.end_id                          # as the published trainer pads, not <pad>
    return tokenizer


def text_encoder(config: TrainConfig, sizes: MMDiTConfig, path: str, tokenizer: Tokenizer) -> T5Encoder:
    """Load T5 in --dtype, with the [MASK] embedding that is named, or that --init has.  Raises UserError."""
    require((path, f"{config.init or config.preset}: no T5 encoder in it; name its file or folder with --t5"))
    vector = checkpoint.learnt_mask(config.init) if config.init else None
    if config.mask_embedding:
        vector = load_mask_embedding(config.mask_embedding, sizes.text_width)
    return load_text_encoder(path, getattr(torch, config.dtype), tokenizer, sizes.text_width, vector)


def build(config: TrainConfig, sizes: MMDiTConfig, where: dict[str, str], texts: list[str] | None,
          plain: bool, vae: AutoencoderKL | Pixels | None, device: torch.device) -> Models:
    """Build all models of a run, on the device.  Raises UserError where parts are missing or don't fit.

    sizes: as --init or the preset has them; where: `places`; texts: all of the training data, if known;
    plain: they have no images, and the null image is trained."""
    stage, own, dtype = STAGES[config.stage], sizes.text_length > 0, getattr(torch, config.dtype)
    tokenizer = load_tokenizer(config, own, texts)
    if own and (not config.init or tokenizer.seen is not None):  # otherwise what --init saw is not known
        tokenizer.meet(texts)
    tokenizer.warns = False                                      # the log says how many texts are cut
    torch.manual_seed(config.seed)
    if config.init:
        mmdit = checkpoint.load_mmdit(config.init, vocab_size=tokenizer.vocab_size, training=True)
        sizes = mmdit.config
        require((sizes.vocab_size == tokenizer.vocab_size, f"{config.init}: its text head has "
                 f"{sizes.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}; name the right one with "
                 f"--tokenizer"))
    else:
        sizes = replace(sizes, vocab_size=tokenizer.vocab_size,
                        text_length=config.text_length if own else 0,
                        predicts=config.predicts or sizes.predicts)
        mmdit = MMDiT(sizes)
    models = Models(nn.ModuleDict(dict(mmdit=mmdit)), tokenizer, None, vae)
    learns, blocks = models.learns, [*mmdit.blocks]
    recomputed = [*blocks]
    table = position_table(sizes.width, sizes.position_size, sizes.position_base)
    if not torch.equal(mmdit.positions, table):
        models.kept["mmdit.positions"] = mmdit.positions
    if not own:
        models.t5 = text_encoder(config, sizes, where.get("t5", ""), tokenizer)
        vector = models.t5.embed.weight[tokenizer.mask_id].detach().float().clone()
        models.kept["mask.vector"] = vector
        if "[MASK]" in stage.learns:
            learns["mask"] = MaskEmbedding(vector, tokenizer.mask_id)
            recomputed += models.t5.blocks
        freeze(models.t5, dtype, device)
        with torch.no_grad():
            models.empty = models.t5(tokenizer.encode("", config.text_length)[None].to(device))
    elif config.init:
        learns["embedding"] = checkpoint.load_embedding(config.init, training=True)
    else:
        learns["embedding"] = TokenEmbedding(sizes.vocab_size, sizes.text_length, sizes.text_width)
    mmdit.null_image.requires_grad_(plain)
    if stage.losses == "text":                                   # these parts only give a velocity
        last = blocks[-1].img
        for part in (mmdit.img_in, mmdit.img_modulation, mmdit.img_out, last.out, last.fc1, last.fc2):
            part.requires_grad_(False)
    if config.checkpoint_activations:
        for block in recomputed:
            block.forward = partial(recompute, block.forward, use_reentrant=False)
    if config.compile:
        torch._dynamo.config.recompile_limit = 64                # image, text, and last-block variants
        for block in blocks:
            block.compile()
    if isinstance(vae, AutoencoderKL):
        freeze(vae, dtype, device)
    learns.to(device).train()
    return models


def stated(config: TrainConfig, mix, models: Models, where: dict[str, str]) -> bool:
    """Tell if the captions' states are stored, all by this T5 as published: its [MASK] is in none of them.
    Raises UserError where they are another's."""
    if not mix or not models.t5 or any(getattr(source, "states", None) is None for source in mix.sources):
        return False
    t5 = checkpoint.load_t5(where["t5"], torch.bfloat16)
    stamp = dict(t5=checkpoint.digest(t5), tokenizer=models.tokenizer.digest(),
                 length=str(config.text_length), recaption=str(config.recaption))
    for source in mix.sources:
        require((source.states == stamp, f"{source.name}: stored states of {source.states}, this run's are "
                 f"of {stamp}; make them again, or without --t5"))
    return True


def report(config: TrainConfig, vocab_size: int) -> None:
    """On stderr, what SD3's weights give to a run, and what it starts without."""
    print(f"from SD3: {checkpoint.carried_over(config.init, vocab_size)}", file=sys.stderr)
    if config.stage == "instruct":
        print("warning: --stage instruct from SD3, which has no text head: a new one learns answers "
              "before it has learnt captions; --stage pretrain comes first", file=sys.stderr)
