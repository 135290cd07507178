"""The published layouts: how to recognise a part, its sizes, and the names of its parameters.

Nothing here opens a file.
"""

import math
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from common.cli import require
from model import MMDiT, MMDiTConfig
from pretrained.safetensors_io import Tensors
from pretrained.t5 import T5Config, T5Encoder
from pretrained.vae import AutoencoderKL, VAEConfig

# Our names (left) and those in the published files (right).  Rows are applied in order, and each
# replaces one occurrence.  {q,k,v}: three tensors that we stack; {way}: "down" or "up".
SD3_FILE = {
    "positions": "pos_embed",
    "img_in.": "x_embedder.proj.",
    "txt_in.": "context_embedder.",
    "time_in.fc1.": "t_embedder.mlp.0.",
    "time_in.fc2.": "t_embedder.mlp.2.",
    "img_modulation.": "final_layer.adaLN_modulation.1.",
    "img_out.": "final_layer.linear.",
    "blocks.": "joint_blocks.",
    ".img.": ".x_block.",
    ".txt.": ".context_block.",
    ".modulation.": ".adaLN_modulation.1.",
    ".qkv.": ".attn.qkv.",
    ".out.": ".attn.proj.",
    ".q_norm.": ".attn.ln_q.",
    ".k_norm.": ".attn.ln_k.",
    ".fc1.": ".mlp.fc1.",
    ".fc2.": ".mlp.fc2.",
}
DIFFUSERS = {
    "positions": "pos_embed.pos_embed",
    "img_in.": "pos_embed.proj.",
    "txt_in.": "context_embedder.",
    "time_in.fc1.": "time_text_embed.timestep_embedder.linear_1.",
    "time_in.fc2.": "time_text_embed.timestep_embedder.linear_2.",
    "blocks.": "transformer_blocks.",
    ".img.modulation.": ".norm1.linear.",
    ".txt.modulation.": ".norm1_context.linear.",
    ".img.qkv.": ".attn.to_{q,k,v}.",
    ".txt.qkv.": ".attn.add_{q,k,v}_proj.",
    ".img.out.": ".attn.to_out.0.",
    ".txt.out.": ".attn.to_add_out.",
    ".img.q_norm.": ".attn.norm_q.",
    ".img.k_norm.": ".attn.norm_k.",
    ".txt.q_norm.": ".attn.norm_added_q.",
    ".txt.k_norm.": ".attn.norm_added_k.",
    ".img.fc1.": ".ff.net.0.proj.",
    ".img.fc2.": ".ff.net.2.",
    ".txt.fc1.": ".ff_context.net.0.proj.",
    ".txt.fc2.": ".ff_context.net.2.",
}
SD3_FOLDER = DIFFUSERS | {
    "img_modulation.": "norm_out.linear.",
    "img_out.": "proj_out.",
}
RELEASE = DIFFUSERS | {
    "img_modulation.": "image_norm_out.linear.",
    "img_out.": "image_proj_out.",
    "txt_out.": "text_proj_out.",
    "null_image": "null_image_embd",
}
VAE_FILE = {
    ".mid_1.": ".mid.block_1.",
    ".mid_2.": ".mid.block_2.",
    ".attention.out.": ".mid.attn_1.proj_out.",
    ".attention.": ".mid.attn_1.",
    ".blocks.": ".block.",
    ".shortcut.": ".nin_shortcut.",
    ".resample.": ".{way}sample.conv.",
    "coder.norm.": "coder.norm_out.",
}
VAE_FOLDER = {
    ".mid_1.": ".mid_block.resnets.0.",
    ".mid_2.": ".mid_block.resnets.1.",
    ".attention.norm.": ".mid_block.attentions.0.group_norm.",
    ".attention.out.": ".mid_block.attentions.0.to_out.0.",
    ".attention.": ".mid_block.attentions.0.to_",
    ".down.": ".down_blocks.",
    ".up.": ".up_blocks.",
    ".blocks.": ".resnets.",
    ".shortcut.": ".conv_shortcut.",
    ".resample.": ".{way}samplers.0.conv.",
    "coder.norm.": "coder.conv_norm_out.",
}
T5_NAMES = {
    "position_bias.": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.",
    "blocks.": "encoder.block.",
    ".attention_norm.": ".layer.0.layer_norm.",
    ".mlp_norm.": ".layer.1.layer_norm.",
    ".q.": ".layer.0.SelfAttention.q.",
    ".k.": ".layer.0.SelfAttention.k.",
    ".v.": ".layer.0.SelfAttention.v.",
    ".o.": ".layer.0.SelfAttention.o.",
    ".wi_0.": ".layer.1.DenseReluDense.wi_0.",
    ".wi_1.": ".layer.1.DenseReluDense.wi_1.",
    ".wo.": ".layer.1.DenseReluDense.wo.",
    "final_norm.": "encoder.final_layer_norm.",
}
TRANSFORMERS = dict(release=RELEASE, sd3=SD3_FOLDER, sd3_file=SD3_FILE)
AUTOENCODERS = dict(folder=VAE_FOLDER, file=VAE_FILE)
FAMILIES = dict(ours="ours", release="D-DiT", sd3="SD3", sd3_file="SD3")
POOLED = ("y_embedder.", "time_text_embed.text_embedder.")      # SD3's CLIP branch; D-DiT drops it
POOLED_WIDTH = 2048                                             # width of that branch's input
T5_TABLES = ("shared.weight", "encoder.embed_tokens.weight")    # the token table's two names
# tensors of a T5 file that are not the encoder's: the decoder, and second copies of the token table
BESIDE_T5 = ("decoder.", "lm_head.", "logit_scale", *T5_TABLES)

SUBFOLDERS = dict(transformer=["transformer"], vae=["vae"], t5=["text_encoder_3", "text_encoder"],
                  tokenizer=["tokenizer_3", "tokenizer"])
PREFIXES = dict(transformer="model.diffusion_model.", vae="first_stage_model.",
                t5="text_encoders.t5xxl.transformer.")          # in a file of several parts
# the tensor that identifies a part in each layout; the first one that is present decides
SIGNS = dict(
    transformer=dict(release="text_proj_out.weight", sd3="transformer_blocks.0.attn.to_q.weight",
                     sd3_file="joint_blocks.0.x_block.attn.qkv.weight"),
    vae=dict(folder="decoder.mid_block.attentions.0.to_q.weight",
             file="decoder.mid.attn_1.q.weight"),
    t5=dict(any="encoder.block.0.layer.0.SelfAttention.q.weight"))
TITLES = dict(transformer="SD3 or D-DiT transformer", vae="SD3 autoencoder", t5="T5 encoder")


@dataclass
class Part:
    """A transformer, VAE or T5 on disk."""
    tensors: Tensors
    config: dict                # its config.json; {} if there is none
    layout: str                 # "ours", or a key of SIGNS[part]

    @property
    def family(self) -> str:
        """Return a transformer's family: "ours", "D-DiT" or "SD3"."""
        return FAMILIES[self.layout]


@dataclass
class Entry:
    """How a file stores one of our parameters."""
    keys: list[str]                 # names of the tensors that we stack along the first axis
    shape: tuple[int, ...]          # the shape of each of these tensors
    swap: bool = False              # the file has (scale, shift), our parameter (shift, scale)
    fresh: Tensor | None = None     # initial values of the last rows, which the file lacks


def rename(name: str, table: dict[str, str]) -> list[str]:
    """Return the names of a parameter's tensors in a file: one, or q, k and v, which we stack."""
    for ours, theirs in table.items():
        name = name.replace(ours, theirs, 1)
    if "{q,k,v}" not in name:
        return [name]
    return [name.replace("{q,k,v}", letter) for letter in "qkv"]


def shown(value: Any) -> str:
    return "null" if value is None else repr(value)[:60]


class Config:
    """Read the values of a part's config.json, with defaults.

    Only values that the tensors' shapes do not show are read from it; the others are compared
    (`expect`).  Each method raises UserError for a wrong value."""

    def __init__(self, tensors: Tensors, values: dict):
        self.values = values
        self.where = tensors.files[0].parent / "config.json"

    def check(self, key: str, valid: bool, expected: Any) -> None:
        value = shown(self.values.get(key))
        require((valid, f"{self.where}: \"{key}\" is {value}, expected {expected}"))

    def whole(self, key: str, default: int) -> int:
        """Read a whole number above 0."""
        value = self.values.get(key, default)
        self.check(key, type(value) is int and value > 0, "a whole number above 0")
        return value

    def expect(self, key: str, value: int) -> int:
        """Return `value`, a size of the tensors.  config.json must agree: a difference may mean
        that the file lacks its last blocks."""
        self.check(key, self.whole(key, value) == value, f"{value}, which its tensors have")
        return value

    def real(self, key: str, default: float, low: float = -math.inf) -> float:
        """Read a finite number above `low`, which is 0 or minus infinity."""
        value = self.values.get(key, default)
        number = type(value) in (int, float) and math.isfinite(value)
        expected = "a number" if low else "a number above 0"
        self.check(key, number and value > low, expected)
        return float(value)

    def only(self, key: str, *accepted: Any) -> None:
        """Check that a value is one that this code implements; the first is the default."""
        value = self.values.get(key, accepted[0])
        valid = any(type(value) is type(each) and value == each for each in accepted)
        self.check(key, valid, " or ".join(map(shown, accepted)))


def check_size(field: Field, kind: type, value: Any, where: Path) -> None:
    """Raise UserError for a value that a field of MMDiTConfig can't have."""
    low = field.metadata.get("low")
    expected = kind.__name__
    valid = type(value) is kind or (kind is float and type(value) is int)     # JSON: 1.0 as 1
    if low is not None:
        expected += f" of at least {low}"
        valid = valid and value >= low
    require((valid, f"{where}: \"{field.name}\" is {shown(value)}, expected {expected}"))


def our_config(values: dict, where: Path) -> MMDiTConfig:
    """Return the sizes in our config.json.  Raises UserError for a wrong name or value."""
    kinds = get_type_hints(MMDiTConfig)
    unknown = ", ".join(sorted(values.keys() - kinds))
    require((not unknown, f"{where}: unknown sizes {unknown}, expected {', '.join(kinds)}"))
    for field in fields(MMDiTConfig):
        if field.name in values:
            check_size(field, kinds[field.name], values[field.name], where)
    c = MMDiTConfig(**values)
    side = f"{where}: \"position_size\" is {c.position_size}, expected"
    require((c.position_base <= c.position_size,
             f"{side} at least \"position_base\", {c.position_base}"),
            (c.position_size ** 2 * c.width < 2**30, f"{side} a table of less than 4 GiB"))
    return c


def our_entries(module: nn.Module) -> dict[str, Entry]:
    """Return the entries of a file in our layout: the module's own names and shapes."""
    entries = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        entries[name] = Entry([name], tuple(tensor.shape))
    return entries


def renamed_entries(module: nn.Module, table: dict[str, str]) -> dict[str, Entry]:
    """Return the entries of a file with the names of a table; see `rename`."""
    entries = our_entries(module)
    for name, entry in entries.items():
        entry.keys = rename(name, table)
        rows, *columns = entry.shape
        entry.shape = (rows // len(entry.keys), *columns)
    return entries


def mmdit_config(part: Part, vocab_size: int = 32100) -> MMDiTConfig:
    """Return a transformer's sizes, from its tensors' shapes and config.json.

    vocab_size: rows of the text head if the file, as SD3's, lacks one.  Raises UserError if shapes
    and config.json differ."""
    tensors = part.tensors
    c = Config(tensors, part.config)
    if part.layout == "ours":
        sizes = part.config["mmdit"]
        blocks = tensors.count("blocks.")
        # checked before the model is built: a depth of a million blocks would take hours
        require((sizes.depth == blocks, f"{c.where}: \"depth\" is {sizes.depth}, "
                 f"{tensors.files[0].name} has {blocks} blocks"))
        return sizes
    table = TRANSFORMERS[part.layout]
    patches = table["img_in."] + "weight"
    [q_norm] = rename("blocks.0.img.q_norm.weight", table)
    qk_norm = q_norm in tensors
    c.only("qk_norm", "rms_norm" if qk_norm else None)
    head = c.whole("attention_head_dim", 64)                     # 64 in every published model
    heads = c.expect("num_attention_heads", max(1, tensors.size(patches, 0) // head))
    patch = tensors.size(patches, 2)
    side = math.isqrt(tensors.size(table["positions"], 1))
    base = max(1, c.whole("sample_size", 64 * patch) // patch)
    depth = c.expect("num_layers", tensors.count(table["blocks."]))
    channels = tensors.size(patches, 1)
    text_width = tensors.size("context_embedder.weight", 1)
    sizes = MMDiTConfig(
        depth, heads, heads * head, patch, channels, position_size=side,
        position_base=min(side, base), text_width=text_width, vocab_size=vocab_size,
        qk_norm=qk_norm)
    if part.layout == "release":
        sizes.vocab_size = tensors.size("text_proj_out.weight", 0)
        sizes.null_tokens = tensors.size("null_image_embd", 1)
    return sizes


def mmdit_entries(model: MMDiT, layout: str) -> dict[str, Entry]:
    """Return the entry of each parameter, and of the position table, in a transformer's layout."""
    if layout == "ours":
        return our_entries(model)
    entries = renamed_entries(model, TRANSFORMERS[layout])
    c = model.config
    entries["positions"].shape = (1, c.position_size ** 2, c.width)
    entries["img_in.weight"].shape = (c.width, c.channels, c.patch, c.patch)
    for name in ("img_modulation.weight", "img_modulation.bias"):
        entries[name].swap = layout != "sd3_file"                # diffusers swaps the halves
    if layout != "release":
        add_fresh(entries, c, layout)
    return entries


def add_fresh(entries: dict[str, Entry], c: MMDiTConfig, layout: str) -> None:
    """Add initial values to the entries for the parameters that D-DiT has and SD3 lacks."""
    # a new model of one block is enough: of the blocks, only SD3's last one lacks parameters
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new = MMDiT(replace(c, depth=1, position_size=1)).state_dict()
    last = f"blocks.{c.depth - 1}.txt."
    for name, entry in entries.items():
        if name.startswith(last + "modulation."):         # SD3 has only attention's shift and scale
            columns = entry.shape[1:]
            entry.swap = layout == "sd3"
            entry.fresh = torch.zeros(4 * c.width, *columns)
            entry.shape = (2 * c.width, *columns)
        elif name.startswith(("txt_out.", "null_image", f"{last}out.", f"{last}fc")):
            entry.keys = []
            entry.fresh = new[name.replace(last, "blocks.0.txt.")]


def vae_config(part: Part) -> VAEConfig:
    """Return an autoencoder's sizes from shapes; scale and shift from config.json, else SD3's."""
    tensors = part.tensors
    c = Config(tensors, part.config)
    c.only("latents_mean", None)
    c.only("latents_std", None)
    table = AUTOENCODERS[part.layout]
    [levels] = rename("encoder.down.", table)
    [blocks] = rename("encoder.down.0.blocks.", table)
    widths = []
    require((tensors.count(levels), f"{tensors.files[0]}: this autoencoder has no encoder"))
    for level in range(tensors.count(levels)):
        [convolution] = rename(f"encoder.down.{level}.blocks.0.conv1.weight", table)
        widths.append(tensors.size(convolution, 0))
    latent = tensors.size("decoder.conv_in.weight", 1)
    groups = c.whole("norm_num_groups", VAEConfig.groups)
    scale = c.real("scaling_factor", VAEConfig.scale, 0)
    shift = 0.0
    if c.values.get("shift_factor", 0) is not None:
        shift = c.real("shift_factor", VAEConfig.shift)
    return VAEConfig(tuple(widths), tensors.count(blocks), latent, groups, scale, shift)


def vae_entries(vae: AutoencoderKL, layout: str) -> dict[str, Entry]:
    """Return the entry of each parameter of an autoencoder in the layout "file" or "folder"."""
    entries = our_entries(vae)
    for name, entry in entries.items():
        way, level = name.split(".")[1:3]               # "down" or "up", and the level's number
        if layout == "file" and way == "up":            # the file counts from the largest image
            mirrored = len(vae.config.widths) - 1 - int(level)
            name = name.replace(level, str(mirrored), 1)
        if layout == "file" and ".attention." in name and len(entry.shape) == 2:
            entry.shape += (1, 1)                       # 1x1 convolutions
        [key] = rename(name, AUTOENCODERS[layout])
        entry.keys = [key.replace("{way}", way)]
    return entries


def t5_config(part: Part) -> T5Config:
    """Return a T5 encoder's sizes, from shapes, and from config.json what no shape shows."""
    tensors = part.tensors
    c = Config(tensors, part.config)
    c.only("feed_forward_proj", "gated-gelu")
    bias = T5_NAMES["position_bias."] + "weight"
    [query] = rename("blocks.0.q.weight", T5_NAMES)
    [mlp] = rename("blocks.0.wi_0.weight", T5_NAMES)
    table = t5_table(tensors)
    depth = c.expect("num_layers", tensors.count("encoder.block."))
    heads = c.expect("num_heads", tensors.size(bias, 1))
    head = c.expect("d_kv", max(1, tensors.size(query, 0) // heads))
    return T5Config(
        vocab_size=tensors.size(table, 0), width=tensors.size(table, 1), depth=depth, heads=heads,
        head=head, hidden=tensors.size(mlp, 0), buckets=tensors.size(bias, 0),
        distance=c.whole("relative_attention_max_distance", T5Config.distance),
        eps=c.real("layer_norm_epsilon", T5Config.eps, 0))


def t5_table(tensors: Tensors) -> str:
    """Return the name of a T5 file's token table; the first name if both are present."""
    first, second = T5_TABLES
    return first if first in tensors else second


def t5_entries(t5: T5Encoder, table: str) -> dict[str, Entry]:
    """Return the entry of each parameter of T5.  table: see `t5_table`."""
    entries = renamed_entries(t5, T5_NAMES)
    entries["embed.weight"].keys = [table]
    return entries


def published_state(model: MMDiT, layout: str) -> dict[str, Tensor]:
    """Return a transformer's tensors with the names and shapes of the "release" or "sd3" layout."""
    ours = model.state_dict() | dict(model.named_buffers())
    state = {}
    for name, entry in mmdit_entries(model, layout).items():
        tensor = ours[name]
        if not entry.keys:
            continue                                             # SD3 has no such parameter
        if entry.fresh is not None:                              # SD3 lacks the last rows
            tensor = tensor[:-len(entry.fresh)]
        if entry.swap:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        for key, piece in zip(entry.keys, tensor.chunk(len(entry.keys))):
            state[key] = piece.reshape(entry.shape).contiguous()
    if layout == "sd3":                                          # its pooled text embedding is zero
        width = model.config.width
        for i, inputs in (1, POOLED_WIDTH), (2, width):
            state[f"time_text_embed.text_embedder.linear_{i}.weight"] = torch.zeros(width, inputs)
            state[f"time_text_embed.text_embedder.linear_{i}.bias"] = torch.zeros(width)
    return state


SHIFT = 3.0             # of the noise levels, in SD3's published scheduler


def published_files(c: MMDiTConfig, layout: str, shift: float) -> dict[str, dict]:
    """Return the contents of a published folder's JSON files, by file name, for its pipeline."""
    sizes = dict(
        attention_head_dim=c.width // c.heads, caption_projection_dim=c.width,
        dual_attention_layers=[], in_channels=c.channels, joint_attention_dim=c.text_width,
        num_attention_heads=c.heads, num_layers=c.depth, out_channels=c.channels,
        patch_size=c.patch, pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=c.position_size, qk_norm="rms_norm" if c.qk_norm else None,
        sample_size=c.position_base * c.patch)
    t5 = ["transformers", "T5EncoderModel"]
    tokenizer = ["transformers", "T5TokenizerFast"]
    parts = dict(scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
                 vae=["diffusers", "AutoencoderKL"])
    if layout == "release":
        sizes.update(_class_name="SD3JointModelFlexible", vocab_size=c.vocab_size)
        parts.update(_class_name="DualDiffSD3Pipeline", text_encoder=t5, tokenizer=tokenizer,
                     transformer=["sd3_modules.sd3_model", "SD3JointModelFlexible"])
    else:
        sizes.update(_class_name="SD3Transformer2DModel")
        parts.update(_class_name="StableDiffusion3Pipeline", text_encoder_3=t5,
                     tokenizer_3=tokenizer, transformer=["diffusers", "SD3Transformer2DModel"])
        for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
            parts[name] = [None, None]
    scheduler = dict(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000,
                     shift=shift, use_dynamic_shifting=False)
    return {"transformer/config.json": sizes, "scheduler/scheduler_config.json": scheduler,
            "model_index.json": parts}
