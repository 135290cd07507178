"""What published files call things: how each part is told, its sizes, and where our parameters are found.

Nothing here opens a file: `tensors` are `checkpoint.Tensors`, the names and shapes in the files of one part,
`config` is the part's config.json or None, `naming` is "file" (one SD3 file) or "folder" (the part's own).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor, nn

from cli import UserError
from model import MMDiT, MMDiTConfig
from t5 import T5Config, T5Encoder
from vae import AutoencoderKL, VAEConfig

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
T5_TWIN = "encoder.embed_tokens.weight"                         # the token table's other name
DECODER = ("decoder.", "lm_head.", "logit_scale")               # what a whole T5 has beside its encoder

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


def said(tensors, config: dict | None) -> tuple[dict, Callable[[str, int], int], Path]:
    """(what a part's config.json says, a reader of its whole numbers with a default, where it is)."""
    config, where = config or {}, tensors.files[0].parent / "config.json"

    def number(key: str, default: int) -> int:
        value = config.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: \"{key}\" is {value!r}, expected a whole number")
        return value
    return config, number, where


def own_entries(module: nn.Module, *buffers: str) -> dict[str, Entry]:
    """A file of ours has the module's names and shapes."""
    held = dict(module.named_parameters()) | {name: getattr(module, name) for name in buffers}
    return {name: Entry([name], tuple(tensor.shape)) for name, tensor in held.items()}


def mmdit_config(tensors, config: dict | None, naming: str, vocab_size: int = 32100) -> MMDiTConfig:
    """Sizes of a published transformer: from config.json where it says them, otherwise from the shapes."""
    c, number, where = said(tensors, config)
    if c.get("dual_attention_layers"):
        raise UserError(f"{where}: \"dual_attention_layers\" is not empty (SD3.5-medium), expected SD3's")
    patch_in = "x_embedder.proj.weight" if naming == "file" else "pos_embed.proj.weight"
    table, block = ("pos_embed", "joint_blocks.{}.x_block.attn.qkv.weight") if naming == "file" else (
        "pos_embed.pos_embed", "transformer_blocks.{}.attn.to_q.weight")
    qk_norm = ("joint_blocks.0.x_block.attn.ln_q.weight" if naming == "file" else
               "transformer_blocks.0.attn.norm_q.weight") in tensors
    head = number("attention_head_dim", 64)                                   # 64 in every published model
    heads = number("num_attention_heads", max(1, tensors.size(patch_in, 0) // head))
    patch = number("patch_size", tensors.size(patch_in, 2))
    side = number("pos_embed_max_size", math.isqrt(tensors.size(table, 1)))
    if config:
        base = max(1, number("sample_size", 64 * patch) // patch)
    else:   # the table's second position is at base / size, and its first entry is the sine of that
        second = float(tensors.read(table).flatten()[tensors.size(table, 2)])
        base = max(1, round(side * math.asin(min(1, max(-1, second)))))
    if "text_proj_out.weight" in tensors:
        vocab_size = number("vocab_size", tensors.size("text_proj_out.weight", 0))
    nulls = tensors.size("null_image_embd", 1) if "null_image_embd" in tensors else 8
    return MMDiTConfig(
        depth=number("num_layers", tensors.count(block)), heads=heads, width=heads * head, patch=patch,
        channels=number("in_channels", tensors.size(patch_in, 1)), position_size=side, position_base=base,
        vocab_size=vocab_size, null_tokens=nulls,
        text_width=number("joint_attention_dim", tensors.size("context_embedder.weight", 1)),
        qk_norm=c["qk_norm"] is not None if "qk_norm" in c else qk_norm)


def mmdit_entries(model: MMDiT, table: list[tuple[str, str]], from_sd3: bool) -> dict[str, Entry]:
    """Where each parameter, and the position table, is found in a published transformer."""
    config = model.config
    D, p, last = config.width, config.patch, f"blocks.{config.depth - 1}.txt."
    entries = {}
    if from_sd3:    # a model of one block has everything that SD3's last block lacks
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            new = MMDiT(replace(config, depth=1, position_size=1)).state_dict()
    for name, parameter in [*model.named_parameters(), ("positions", model.positions)]:
        keys, swap = rename(name, table)
        shape = tuple(parameter.shape)
        shape = (shape[0] // len(keys), *shape[1:])
        if name == "positions":
            shape = (1, config.position_size ** 2, D)
        elif name == "img_in.weight":
            shape = (D, config.channels, p, p)
        entries[name] = Entry(keys, shape, swap)
        if not from_sd3:
            continue
        if name.startswith(last + "modulation."):                # SD3 has (shift, scale) of attention alone
            entries[name] = Entry(keys, (2 * D, *shape[1:]), table is SD3_FOLDER,
                                  torch.zeros(4 * D, *shape[1:]))
        elif name in ("txt_out.weight", "txt_out.bias", "null_image") or (
                name.startswith(last) and name.split(".")[3] in ("out", "fc1", "fc2")):
            entries[name] = Entry([], (), fresh=new[name.replace(last, "blocks.0.txt.")])
    return entries


def vae_config(tensors, config: dict | None, naming: str) -> VAEConfig:
    """Sizes of an autoencoder: from config.json, otherwise from the shapes, with SD3's scale and shift."""
    c, number, where = said(tensors, config)
    pattern = ("encoder.down.{}.block.{}.conv1.weight" if naming == "file" else
               "encoder.down_blocks.{}.resnets.{}.conv1.weight")
    level, block = pattern.format("{}", 0), pattern.format(0, "{}")
    found = [tensors.size(level.format(i), 0) for i in range(tensors.count(level))]
    widths = c.get("block_out_channels", found)
    if not isinstance(widths, list) or not widths or not all(isinstance(w, int) and w > 0 for w in widths):
        raise UserError(f"{where}: \"block_out_channels\" is {widths!r}, expected whole numbers")
    return VAEConfig(tuple(widths), number("layers_per_block", tensors.count(block)),
                     number("latent_channels", tensors.size("decoder.conv_in.weight", 1)),
                     number("norm_num_groups", VAEConfig.groups),
                     float(c.get("scaling_factor") or VAEConfig.scale),
                     float(c.get("shift_factor", VAEConfig.shift) or 0))


def vae_entries(vae: AutoencoderKL, naming: str) -> dict[str, Entry]:
    """Where each parameter of an autoencoder is found in the naming of the "file" or of the "folder"."""
    entries = {}
    for name, parameter in vae.named_parameters():
        shape, way = tuple(parameter.shape), name.split(".")[1]           # "down" or "up", where there is one
        if naming == "file":  # 1x1 convolutions in attention, and up levels numbered from the largest picture
            table = VAE_FILE + [(".resample.", f".{way}sample.conv.")]
            shape += (1, 1) if ".attention." in name and len(shape) == 2 else ()
        else:
            table = VAE_FOLDER + [(".resample.", f".{way}samplers.0.conv.")]
        keys, _ = rename(name, table)
        if naming == "file" and keys[0].startswith("decoder.up."):
            at = int(name.split(".")[2])
            keys = [keys[0].replace(f".up.{at}.", f".up.{len(vae.config.widths) - 1 - at}.")]
        entries[name] = Entry(keys, shape)
    return entries


def t5_config(tensors, config: dict | None, naming: str) -> T5Config:
    """Sizes of a T5 encoder: from config.json where it says them, otherwise from the shapes."""
    c, number, where = said(tensors, config)
    if c.get("feed_forward_proj", "gated-gelu") != "gated-gelu":
        raise UserError(f"{where}: \"feed_forward_proj\" is {c['feed_forward_proj']!r}, expected gated-gelu")
    table, attention = t5_table(tensors), "encoder.block.0.layer.0.SelfAttention."
    bias = attention + "relative_attention_bias.weight"
    heads = number("num_heads", tensors.size(bias, 1))
    return T5Config(number("vocab_size", tensors.size(table, 0)), number("d_model", tensors.size(table, 1)),
                    number("num_layers", tensors.count("encoder.block.{}.layer.0.layer_norm.weight")), heads,
                    number("d_kv", max(1, tensors.size(attention + "q.weight", 0) // heads)),
                    number("d_ff", tensors.size("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0)),
                    number("relative_attention_num_buckets", tensors.size(bias, 0)),
                    number("relative_attention_max_distance", T5Config.distance),
                    float(c.get("layer_norm_epsilon", T5Config.eps)))


def t5_table(tensors) -> str:
    """What a T5 file calls its token table; with both names, the first."""
    return "shared.weight" if "shared.weight" in tensors or T5_TWIN not in tensors else T5_TWIN


def t5_entries(t5: T5Encoder, table: str) -> dict[str, Entry]:
    """Where each parameter of T5 is found; `table` is what the file calls the token table."""
    return {name: Entry([table] if name == "embed.weight" else rename(name, T5_NAMES)[0], tuple(p.shape))
            for name, p in t5.named_parameters()}


def published_state(model: MMDiT, layout: str) -> dict[str, Tensor]:
    """A transformer's tensors as D-DiT's "release" or the "sd3" folder names and shapes them."""
    state, held = {}, dict(model.named_parameters()) | {"positions": model.positions}
    table = RELEASE if layout == "release" else SD3_FOLDER
    for name, entry in mmdit_entries(model, table, layout == "sd3").items():
        if not entry.keys:
            continue                                             # SD3 has no such part
        tensor = held[name].detach()
        if entry.fresh is not None:                              # nor these rows
            tensor = tensor[:-len(entry.fresh)]
        if entry.swap:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        pieces = zip(entry.keys, tensor.chunk(len(entry.keys)))
        state |= {key: piece.reshape(entry.shape).contiguous() for key, piece in pieces}
    if layout == "sd3":
        D, at = model.config.width, "time_text_embed.text_embedder.linear_"
        state |= {f"{at}1.weight": torch.zeros(D, POOLED_WIDTH), f"{at}2.weight": torch.zeros(D, D)}
        state |= {f"{at}{i}.bias": torch.zeros(D) for i in (1, 2)}
    return state


def published_files(c: MMDiTConfig, layout: str) -> dict[str, dict]:
    """The JSON files of a folder in that layout, by name, as its pipeline reads them."""
    release = layout == "release"
    sizes = dict(
        _class_name="SD3JointModelFlexible" if release else "SD3Transformer2DModel",
        attention_head_dim=c.width // c.heads, caption_projection_dim=c.width, dual_attention_layers=[],
        in_channels=c.channels, joint_attention_dim=c.text_width, num_attention_heads=c.heads,
        num_layers=c.depth, out_channels=c.channels, patch_size=c.patch, pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=c.position_size, qk_norm="rms_norm" if c.qk_norm else None,
        sample_size=c.position_base * c.patch)
    t5, tokenizer = ["transformers", "T5EncoderModel"], ["transformers", "T5TokenizerFast"]
    clip = {name: [None, None] for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")}
    parts = dict(_class_name="DualDiffSD3Pipeline", text_encoder=t5, tokenizer=tokenizer,
                 transformer=["sd3_modules.sd3_model", "SD3JointModelFlexible"]) if release else dict(
        _class_name="StableDiffusion3Pipeline", **clip, text_encoder_3=t5, tokenizer_3=tokenizer,
        transformer=["diffusers", "SD3Transformer2DModel"])
    return {
        "transformer/config.json": sizes | (dict(vocab_size=c.vocab_size) if release else {}),
        "scheduler/scheduler_config.json": dict(
            _class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, shift=3.0,
            use_dynamic_shifting=False),
        "model_index.json": parts | dict(scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
                                         vae=["diffusers", "AutoencoderKL"])}
