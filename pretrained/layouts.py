"""What published files call things: how each part is told, its sizes, and where our parameters are found.

Nothing here opens a file: `tensors` are `tensors.Tensors`, the names and shapes in the files of one part,
`config` is the part's config.json or {}, `naming` is "file" (one SD3 file) or "folder" (the part's own).
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_type_hints

import torch
from torch import Tensor, nn

from common.cli import require
from model import MMDiT, MMDiTConfig
from pretrained.t5 import T5Config, T5Encoder
from pretrained.vae import AutoencoderKL, VAEConfig

# Our names (left) in the published files (right); each line is applied once, in order.  {q,k,v} are three
# tensors stacked, "~" marks (scale, shift) where ours is (shift, scale).
SD3_FILE = [
    ("positions", "pos_embed"), ("img_in.", "x_embedder.proj."), ("txt_in.", "context_embedder."),
    ("time_in.fc1.", "t_embedder.mlp.0."), ("time_in.fc2.", "t_embedder.mlp.2."),
    ("img_modulation.", "final_layer.adaLN_modulation.1."), ("img_out.", "final_layer.linear."),
    ("blocks.", "joint_blocks."), (".img.", ".x_block."), (".txt.", ".context_block."),
    (".modulation.", ".adaLN_modulation.1."), (".qkv.", ".attn.qkv."), (".out.", ".attn.proj."),
    (".q_norm.", ".attn.ln_q."), (".k_norm.", ".attn.ln_k."), (".fc1.", ".mlp.fc1."), (".fc2.", ".mlp.fc2."),
]
DIFFUSERS = [
    ("positions", "pos_embed.pos_embed"), ("img_in.", "pos_embed.proj."), ("txt_in.", "context_embedder."),
    ("time_in.fc1.", "time_text_embed.timestep_embedder.linear_1."),
    ("time_in.fc2.", "time_text_embed.timestep_embedder.linear_2."), ("blocks.", "transformer_blocks."),
    (".img.modulation.", ".norm1.linear."), (".txt.modulation.", ".norm1_context.linear."),
    (".img.qkv.", ".attn.to_{q,k,v}."), (".txt.qkv.", ".attn.add_{q,k,v}_proj."),
    (".img.out.", ".attn.to_out.0."), (".txt.out.", ".attn.to_add_out."),
    (".img.q_norm.", ".attn.norm_q."), (".img.k_norm.", ".attn.norm_k."),
    (".txt.q_norm.", ".attn.norm_added_q."), (".txt.k_norm.", ".attn.norm_added_k."),
    (".img.fc1.", ".ff.net.0.proj."), (".img.fc2.", ".ff.net.2."),
    (".txt.fc1.", ".ff_context.net.0.proj."), (".txt.fc2.", ".ff_context.net.2."),
]
SD3_FOLDER = DIFFUSERS + [("img_modulation.", "~norm_out.linear."), ("img_out.", "proj_out.")]
RELEASE = DIFFUSERS + [("img_modulation.", "~image_norm_out.linear."), ("img_out.", "image_proj_out."),
                       ("txt_out.", "text_proj_out."), ("null_image", "null_image_embd")]
VAE_FILE = [
    (".mid_1.", ".mid.block_1."), (".mid_2.", ".mid.block_2."), (".attention.out.", ".mid.attn_1.proj_out."),
    (".attention.", ".mid.attn_1."), (".blocks.", ".block."), (".shortcut.", ".nin_shortcut."),
    ("coder.norm.", "coder.norm_out."),
]
VAE_FOLDER = [
    (".mid_1.", ".mid_block.resnets.0."), (".mid_2.", ".mid_block.resnets.1."),
    (".attention.norm.", ".mid_block.attentions.0.group_norm."),
    (".attention.out.", ".mid_block.attentions.0.to_out.0."),
    (".attention.", ".mid_block.attentions.0.to_"), (".down.", ".down_blocks."), (".up.", ".up_blocks."),
    (".blocks.", ".resnets."), (".shortcut.", ".conv_shortcut."), ("coder.norm.", "coder.conv_norm_out."),
]
T5_NAMES = [
    ("position_bias.", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias."),
    ("blocks.", "encoder.block."), (".attention_norm.", ".layer.0.layer_norm."),
    (".mlp_norm.", ".layer.1.layer_norm."), (".q.", ".layer.0.SelfAttention.q."),
    (".k.", ".layer.0.SelfAttention.k."), (".v.", ".layer.0.SelfAttention.v."),
    (".o.", ".layer.0.SelfAttention.o."), (".wi_0.", ".layer.1.DenseReluDense.wi_0."),
    (".wi_1.", ".layer.1.DenseReluDense.wi_1."), (".wo.", ".layer.1.DenseReluDense.wo."),
    ("final_norm.", "encoder.final_layer_norm."),
]
POOLED = ("y_embedder.", "time_text_embed.text_embedder.")      # SD3's pooled CLIP branch, which D-DiT drops
POOLED_WIDTH = 2048                                             # of what it reads
T5_TABLES = ("shared.weight", "encoder.embed_tokens.weight")    # the token table's two names
# what a T5 file has beside its encoder: the decoder, and the same table under both names
BESIDE_T5 = ("decoder.", "lm_head.", "logit_scale", *T5_TABLES)

SUBFOLDERS = dict(transformer=["transformer"], vae=["vae"], t5=["text_encoder_3", "text_encoder"],
                  tokenizer=["tokenizer_3", "tokenizer"])
PREFIXES = dict(transformer="model.diffusion_model.", vae="first_stage_model.",
                t5="text_encoders.t5xxl.transformer.")
SIGNS = dict(  # a tensor that tells each part, in each naming
    transformer=dict(file="joint_blocks.0.x_block.attn.qkv.weight",
                     folder="transformer_blocks.0.attn.to_q.weight"),
    vae=dict(file="decoder.mid.attn_1.q.weight", folder="decoder.mid_block.attentions.0.to_q.weight"),
    t5=dict(file="encoder.block.0.layer.0.SelfAttention.q.weight"))
TITLES = dict(transformer="SD3 or D-DiT transformer", vae="SD3 autoencoder", t5="T5 encoder")


@dataclass
class Entry:
    """Where a parameter of ours is found."""
    keys: list[str]                 # tensors of the file, stacked along the first axis
    shape: tuple[int, ...]          # of each of them in the file
    swap: bool = False              # halves change places: (scale, shift) in the file
    fresh: Tensor | None = None     # rows that the file lacks, put last


def rename(name: str, table: list[tuple[str, str]]) -> tuple[list[str], bool]:
    """Our parameter's keys in a file, and whether its halves change places there."""
    for ours, theirs in table:
        name = name.replace(ours, theirs, 1)
    keys = [name.replace("{q,k,v}", part) for part in "qkv"] if "{q,k,v}" in name else [name]
    return [key.lstrip("~") for key in keys], name.startswith("~")


def family(tensors) -> str:
    """Return "D-DiT" for a transformer with a text head, otherwise "SD3"."""
    return "D-DiT" if "text_proj_out.weight" in tensors else "SD3"


def shown(value) -> str:
    return "null" if value is None else repr(value)[:60]


class Config:
    """Values of a part's config.json that no shape shows, each checked, with defaults.
    A size that a shape shows is not read here."""

    def __init__(self, tensors, config: dict):
        self.found = config
        self.where = tensors.files[0].parent / "config.json"

    def check(self, key: str, holds: bool, expected) -> None:
        require((holds, f"{self.where}: \"{key}\" is {shown(self.found.get(key))}, expected {expected}"))

    def whole(self, key: str, default: int) -> int:
        """Read a whole number above 0."""
        value = self.found.get(key, default)
        self.check(key, type(value) is int and value > 0, "a whole number")
        return value

    def expect(self, key: str, value: int) -> int:
        """Return a size that the tensors have.  Raises UserError where config.json has another value: the
        file may lack its last blocks."""
        self.check(key, self.whole(key, value) == value, f"{value}, which its tensors have")
        return value

    def real(self, key: str, default: float, low: float = -math.inf) -> float:
        value = self.found.get(key, default)
        number = type(value) in (int, float) and math.isfinite(value)
        self.check(key, number and value > low, "a number" if low else "a number above 0")
        return float(value)

    def only(self, key: str, *values) -> None:
        """Refuse a value that means something which is not read here."""
        value = self.found.get(key, values[0])
        known = [(type(each), each) for each in values]
        self.check(key, (type(value), value) in known, " or ".join(map(shown, values)))


def own_config(config: dict, where: Path) -> MMDiTConfig:
    """Return the "mmdit" of a config.json of ours.  Raises UserError for an unknown name or a bad value."""
    kinds = get_type_hints(MMDiTConfig)
    lows = {field.name: field.metadata.get("low", -math.inf) for field in fields(MMDiTConfig)}
    unknown = sorted(config.keys() - kinds)
    require((not unknown, f"{where}: unknown sizes {', '.join(unknown)}, known are {', '.join(kinds)}"))
    for name, value in config.items():
        kind, low = kinds[name], lows[name]
        accepted = (int, float) if kind is float else (kind,)    # JSON may write 1.0 as 1
        limit = f" of at least {low}" if math.isfinite(low) else ""
        good = type(value) in accepted and (not limit or value >= low)
        require((good, f"{where}: \"{name}\" is {shown(value)}, expected {kind.__name__}{limit}"))
    c = MMDiTConfig(**config)
    side = f"{where}: \"position_size\" is {c.position_size}, expected"
    require((c.position_base <= c.position_size, f"{side} at least \"position_base\", {c.position_base}"),
            (c.position_size ** 2 * c.width < 2**30, f"{side} a table of less than 4 GiB"))
    return c


def own_entries(module: nn.Module, *buffers: str) -> dict[str, Entry]:
    """Describe a file of ours: it has the module's names and shapes."""
    held = dict(module.named_parameters()) | {name: getattr(module, name) for name in buffers}
    return {name: Entry([name], tuple(tensor.shape)) for name, tensor in held.items()}


def mmdit_config(tensors, config: dict, naming: str, vocab_size: int = 32100) -> MMDiTConfig:
    """Return a published transformer's sizes: from the shapes, and from config.json what no shape shows."""
    c = Config(tensors, config)
    names = SD3_FILE if naming == "file" else DIFFUSERS
    [patch_in, table, blocks, q_norm] = [rename(name, names)[0][0] for name in (
        "img_in.weight", "positions", "blocks.", "blocks.0.img.q_norm.weight")]
    c.only("qk_norm", "rms_norm" if q_norm in tensors else None)
    head = c.whole("attention_head_dim", 64)                                  # 64 in every published model
    heads = c.expect("num_attention_heads", max(1, tensors.size(patch_in, 0) // head))
    patch = tensors.size(patch_in, 2)
    side = math.isqrt(tensors.size(table, 1))
    base = min(side, max(1, c.whole("sample_size", 64 * patch) // patch))
    nulls = 8
    if family(tensors) == "D-DiT":
        vocab_size = tensors.size("text_proj_out.weight", 0)
        nulls = tensors.size("null_image_embd", 1)
    return MMDiTConfig(
        depth=c.expect("num_layers", tensors.count(blocks)), heads=heads, width=heads * head, patch=patch,
        channels=tensors.size(patch_in, 1), position_size=side, position_base=base,
        vocab_size=vocab_size, null_tokens=nulls, text_width=tensors.size("context_embedder.weight", 1),
        qk_norm=q_norm in tensors)


def mmdit_entries(model: MMDiT, family: str, naming: str) -> dict[str, Entry]:
    """Where each parameter, and the position table, is found in a published transformer."""
    config = model.config
    D, last = config.width, f"blocks.{config.depth - 1}.txt."
    table = SD3_FILE if naming == "file" else SD3_FOLDER if family == "SD3" else RELEASE
    entries = {}
    for name, tensor in [*model.named_parameters(), ("positions", model.positions)]:
        keys, swap = rename(name, table)
        shape = (tensor.shape[0] // len(keys), *tensor.shape[1:])
        if name == "positions":
            shape = (1, config.position_size ** 2, D)
        elif name == "img_in.weight":
            shape = (D, config.channels, config.patch, config.patch)
        entries[name] = Entry(keys, shape, swap)
    if family == "D-DiT":
        return entries
    # a model of one block has everything that SD3's last block lacks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new = MMDiT(replace(config, depth=1, position_size=1)).state_dict()
    for name, entry in entries.items():
        if name.startswith(last + "modulation."):                # SD3 has (shift, scale) of attention only
            entry.swap = naming == "folder"
            entry.fresh = torch.zeros(4 * D, *entry.shape[1:])
            entry.shape = (2 * D, *entry.shape[1:])
        elif name.startswith(("txt_out.", "null_image", f"{last}out.", f"{last}fc")):
            entries[name] = Entry([], (), fresh=new[name.replace(last, "blocks.0.txt.")])
    return entries


def vae_config(tensors, config: dict, naming: str) -> VAEConfig:
    """Return an autoencoder's sizes, from the shapes, and its scale and shift: config.json's or SD3's."""
    c = Config(tensors, config)
    for key in ("latents_mean", "latents_std"):
        c.only(key, None)
    level, block = ("encoder.down.", ".block.") if naming == "file" else ("encoder.down_blocks.", ".resnets.")
    widths = [tensors.size(f"{level}{i}{block}0.conv1.weight", 0) for i in range(tensors.count(level))]
    shift = 0.0
    if c.found.get("shift_factor", 0) is not None:
        shift = c.real("shift_factor", VAEConfig.shift)
    return VAEConfig(
        tuple(widths), blocks=tensors.count(f"{level}0{block}"),
        latent=tensors.size("decoder.conv_in.weight", 1),
        groups=c.whole("norm_num_groups", VAEConfig.groups),
        scale=c.real("scaling_factor", VAEConfig.scale, 0), shift=shift)


def vae_entries(vae: AutoencoderKL, naming: str) -> dict[str, Entry]:
    """Return where each parameter of an autoencoder is found in the naming of the "file" or "folder"."""
    entries = {}
    for name, parameter in vae.named_parameters():
        shape = tuple(parameter.shape)
        way, level = name.split(".")[1:3]               # of a level: "down" or "up", and its number
        if naming == "folder":
            keys, _ = rename(name, VAE_FOLDER + [(".resample.", f".{way}samplers.0.conv.")])
        else:   # 1x1 convolutions in attention, and up levels numbered from the largest image
            if ".attention." in name and len(shape) == 2:
                shape += (1, 1)
            table = VAE_FILE + [(".resample.", f".{way}sample.conv.")]
            if way == "up":
                mirrored = len(vae.config.widths) - 1 - int(level)
                table += [(f".up.{level}.", f".up.{mirrored}.")]
            keys, _ = rename(name, table)
        entries[name] = Entry(keys, shape)
    return entries


def t5_config(tensors, config: dict, naming: str) -> T5Config:
    """Return a T5 encoder's sizes: from the shapes, and from config.json what no shape shows."""
    c = Config(tensors, config)
    c.only("feed_forward_proj", "gated-gelu")
    [bias, query, mlp] = [rename(name, T5_NAMES)[0][0] for name in (
        "position_bias.weight", "blocks.0.q.weight", "blocks.0.wi_0.weight")]
    table = t5_table(tensors)
    heads = c.expect("num_heads", tensors.size(bias, 1))
    return T5Config(
        vocab_size=tensors.size(table, 0), width=tensors.size(table, 1),
        depth=c.expect("num_layers", tensors.count("encoder.block.")), heads=heads,
        head=c.expect("d_kv", max(1, tensors.size(query, 0) // heads)),
        hidden=tensors.size(mlp, 0), buckets=tensors.size(bias, 0),
        distance=c.whole("relative_attention_max_distance", T5Config.distance),
        eps=c.real("layer_norm_epsilon", T5Config.eps, 0))


def t5_table(tensors) -> str:
    """Return the name of a T5 file's token table; with both names, the first."""
    table, twin = T5_TABLES
    return table if table in tensors else twin


def t5_entries(t5: T5Encoder, table: str) -> dict[str, Entry]:
    """Return where each parameter of T5 is found; table: `t5_table`."""
    names = [("embed.weight", table)] + T5_NAMES
    return {name: Entry(rename(name, names)[0], tuple(p.shape)) for name, p in t5.named_parameters()}


def published_state(model: MMDiT, layout: str) -> dict[str, Tensor]:
    """Return a transformer's tensors as D-DiT's "release" or the "sd3" folder names and shapes them."""
    held = dict(model.named_parameters()) | {"positions": model.positions}
    state = {}
    for name, entry in mmdit_entries(model, "SD3" if layout == "sd3" else "D-DiT", "folder").items():
        if not entry.keys:
            continue                                             # SD3 has no such part
        tensor = held[name].detach()
        if entry.fresh is not None:                              # nor these rows
            tensor = tensor[:-len(entry.fresh)]
        if entry.swap:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        for key, piece in zip(entry.keys, tensor.chunk(len(entry.keys))):
            state[key] = piece.reshape(entry.shape).contiguous()
    if layout == "sd3":
        D = model.config.width
        for i, inputs in (1, POOLED_WIDTH), (2, D):
            state[f"time_text_embed.text_embedder.linear_{i}.weight"] = torch.zeros(D, inputs)
            state[f"time_text_embed.text_embedder.linear_{i}.bias"] = torch.zeros(D)
    return state


def published_files(c: MMDiTConfig, layout: str) -> dict[str, dict]:
    """Return the JSON files of a folder in that layout, by name, as its pipeline reads them."""
    t5, tokenizer = ["transformers", "T5EncoderModel"], ["transformers", "T5TokenizerFast"]
    sizes = dict(
        attention_head_dim=c.width // c.heads, caption_projection_dim=c.width, dual_attention_layers=[],
        in_channels=c.channels, joint_attention_dim=c.text_width, num_attention_heads=c.heads,
        num_layers=c.depth, out_channels=c.channels, patch_size=c.patch, pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=c.position_size, qk_norm="rms_norm" if c.qk_norm else None,
        sample_size=c.position_base * c.patch)
    parts = dict(scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
                 vae=["diffusers", "AutoencoderKL"])
    if layout == "release":
        sizes.update(_class_name="SD3JointModelFlexible", vocab_size=c.vocab_size)
        parts.update(_class_name="DualDiffSD3Pipeline", text_encoder=t5, tokenizer=tokenizer,
                     transformer=["sd3_modules.sd3_model", "SD3JointModelFlexible"])
    else:
        sizes.update(_class_name="SD3Transformer2DModel")
        parts.update(_class_name="StableDiffusion3Pipeline", text_encoder_3=t5, tokenizer_3=tokenizer,
                     transformer=["diffusers", "SD3Transformer2DModel"])
        for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
            parts[name] = [None, None]
    scheduler = dict(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, shift=3.0,
                     use_dynamic_shifting=False)
    return {"transformer/config.json": sizes, "scheduler/scheduler_config.json": scheduler,
            "model_index.json": parts}
