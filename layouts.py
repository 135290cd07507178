"""What published files call things: how each part is told, its sizes, and where our parameters are found.

Nothing here opens a file: `tensors` are `checkpoint.Tensors`, the names and shapes in the files of one part,
`config` is the part's config.json or None, `naming` is "file" (one SD3 file) or "folder" (the part's own).
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from cli import UserError, require
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
SCALED = ("scale_weight", "scale_input", "weight_scale", "input_scale", "scaled_fp8")   # of "scaled fp8"
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


def check_kind(tensors) -> None:
    """Raises UserError for files of the same names that are something else."""
    for key, file in tensors.file.items():
        where = f"{file}: {tensors.prefix}{key}"
        require((not key.endswith(SCALED), f"{where} is of \"scaled fp8\" weights, whose scales are not read "
                 f"here; fetch them in half precision or plain float8"),
                (".attn2." not in key, f"{where} is of SD3.5-medium, whose blocks have a second attention; "
                 f"expected SD3's or D-DiT's transformer"))


def shown(value) -> str:
    return "null" if value is None else repr(value)[:60]


class Config:
    """Values of a part's config.json that no shape shows, each checked, with defaults where it has none.
    A size that a shape shows is not read here."""

    def __init__(self, tensors, config: dict | None):
        self.found, self.where = config or {}, tensors.files[0].parent / "config.json"

    def refuse(self, key: str, expected) -> UserError:
        return UserError(f"{self.where}: \"{key}\" is {shown(self.found[key])}, expected {expected}")

    def whole(self, key: str, default: int) -> int:
        """A whole number that no shape shows."""
        value = self.found.get(key, default)
        if type(value) is not int or value < 1:
            raise self.refuse(key, "a whole number")
        return value

    def expect(self, key: str, value: int) -> int:
        """Return a size that no shape shows: of the heads, or the number of blocks, which tells a file that
        lacks the last ones.  Raises UserError where config.json has another value."""
        if self.whole(key, value) != value:
            raise self.refuse(key, f"{value}, which its tensors have")
        return value

    def real(self, key: str, default: float, low: float = -math.inf) -> float:
        value = self.found.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= low:
            raise self.refuse(key, "a number" if low else "a number above 0")
        return float(value)

    def only(self, key: str, *values) -> None:
        """Refuse a value that means something which is not read here."""
        value = self.found.get(key, values[0])
        if not any(type(value) is type(known) and value == known for known in values):
            raise self.refuse(key, " or ".join(map(shown, values)))


def has_type(value, kind) -> bool:
    """Tell whether a value read from JSON has the type of an annotation, such as float or int | None."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else [kind]
    if float in kinds and type(value) is int:                    # JSON may write 1.0 as 1
        return True
    return type(value) in [get_origin(each) or each for each in kinds]


def own_config(found: dict, where: Path) -> MMDiTConfig:
    """Return the "mmdit" of a config.json of ours.  Raises UserError for an unknown name or a bad value."""
    kinds, known = get_type_hints(MMDiTConfig), {field.name: field for field in fields(MMDiTConfig)}
    unknown = sorted(set(found) - set(known))
    require((not unknown, f"{where}: unknown sizes {', '.join(unknown)}, known are {', '.join(known)}"))
    for name, value in found.items():
        kind, low = kinds[name], known[name].metadata.get("low")
        expected = getattr(kind, "__name__", str(kind))
        if low is not None:
            expected += f" of at least {low}"
        good = has_type(value, kind) and (low is None or value >= low)
        require((good, f"{where}: \"{name}\" is {shown(value)}, expected {expected}"))
    c = MMDiTConfig(**found)
    side = f"{where}: \"position_size\" is {c.position_size}, expected"
    require((c.position_base <= c.position_size, f"{side} at least \"position_base\", {c.position_base}"),
            (c.position_size ** 2 * c.width < 2**30, f"{side} a table of less than 4 GiB"))
    return c


def own_entries(module: nn.Module, *buffers: str) -> dict[str, Entry]:
    """A file of ours has the module's names and shapes."""
    held = dict(module.named_parameters()) | {name: getattr(module, name) for name in buffers}
    return {name: Entry([name], tuple(tensor.shape)) for name, tensor in held.items()}


def mmdit_config(tensors, config: dict | None, naming: str, vocab_size: int = 32100) -> MMDiTConfig:
    """Return a published transformer's sizes: from the shapes, and from config.json what no shape shows."""
    c = Config(tensors, config)
    c.only("dual_attention_layers", [], None)                    # SD3.5-medium has some
    c.only("quantization_config", None)
    c.only("qk_norm", None, "rms_norm")
    patch_in = "x_embedder.proj.weight" if naming == "file" else "pos_embed.proj.weight"
    table, blocks = ("pos_embed", "joint_blocks.") if naming == "file" else (
        "pos_embed.pos_embed", "transformer_blocks.")
    qk_norm = ("joint_blocks.0.x_block.attn.ln_q.weight" if naming == "file" else
               "transformer_blocks.0.attn.norm_q.weight") in tensors
    head = c.whole("attention_head_dim", 64)                                  # 64 in every published model
    heads = c.expect("num_attention_heads", max(1, tensors.size(patch_in, 0) // head))
    patch = tensors.size(patch_in, 2)
    side = math.isqrt(tensors.size(table, 1))
    base = max(1, c.whole("sample_size", 64 * patch) // patch)
    base = base if config else position_base(tensors, table, side)
    if "text_proj_out.weight" in tensors:
        vocab_size = tensors.size("text_proj_out.weight", 0)
    nulls = tensors.size("null_image_embd", 1) if "null_image_embd" in tensors else 8
    return MMDiTConfig(
        depth=c.expect("num_layers", tensors.count(blocks)), heads=heads, width=heads * head, patch=patch,
        channels=tensors.size(patch_in, 1), position_size=side, position_base=base,
        vocab_size=vocab_size, null_tokens=nulls, text_width=tensors.size("context_embedder.weight", 1),
        qk_norm=c.found["qk_norm"] is not None if "qk_norm" in c.found else qk_norm)


def position_base(tensors, table: str, side: int) -> int:
    """The base of a stored position table: its second position is at base / side, and the first entry there
    is the sine of that.  Few bits say 61 for 64: then it is a power of two that rounds to what is stored."""
    stored = tensors.read(table).flatten()[tensors.size(table, 2)]
    exact = max(1.0, side * math.asin(min(1, max(-1, float(stored)))))
    near = 2 ** round(math.log2(exact))
    fits = float(torch.tensor(math.sin(near / side), device="cpu").to(stored.dtype)) == float(stored)
    return near if fits else round(exact)


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
    """Return an autoencoder's sizes, from the shapes, and its scale and shift: config.json's or SD3's."""
    c = Config(tensors, config)
    for key in ("latents_mean", "latents_std"):
        c.only(key, None)
    for key in ("use_quant_conv", "use_post_quant_conv"):
        c.only(key, False, None)
    level, block = ("encoder.down.", ".block.") if naming == "file" else ("encoder.down_blocks.", ".resnets.")
    widths = [tensors.size(f"{level}{i}{block}0.conv1.weight", 0) for i in range(tensors.count(level))]
    shift = 0.0 if c.found.get("shift_factor", 0) is None else c.real("shift_factor", VAEConfig.shift)
    return VAEConfig(
        tuple(widths), blocks=tensors.count(f"{level}0{block}"),
        latent=tensors.size("decoder.conv_in.weight", 1),
        groups=c.whole("norm_num_groups", VAEConfig.groups),
        scale=c.real("scaling_factor", VAEConfig.scale, 0), shift=shift)


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
    """Return a T5 encoder's sizes: from the shapes, and from config.json what no shape shows."""
    c = Config(tensors, config)
    c.only("feed_forward_proj", "gated-gelu")
    c.only("quantization_config", None)
    table, attention = t5_table(tensors), "encoder.block.0.layer.0.SelfAttention."
    bias = attention + "relative_attention_bias.weight"
    heads = c.expect("num_heads", tensors.size(bias, 1))
    return T5Config(
        vocab_size=tensors.size(table, 0), width=tensors.size(table, 1),
        depth=c.expect("num_layers", tensors.count("encoder.block.")), heads=heads,
        head=c.expect("d_kv", max(1, tensors.size(attention + "q.weight", 0) // heads)),
        hidden=tensors.size("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0),
        buckets=tensors.size(bias, 0),
        distance=c.whole("relative_attention_max_distance", T5Config.distance),
        eps=c.real("layer_norm_epsilon", T5Config.eps, 0))


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
