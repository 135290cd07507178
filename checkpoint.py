"""Weights on disk: what is read, by hand, from safetensors, and what is written.

    python checkpoint.py inspect PATH                         # layout, parts, sizes, dtypes
    python checkpoint.py export SRC DST --layout release      # any layout -> a D-DiT release folder

Five layouts are read; PATH is a folder or a file:

    ours         a folder with model.safetensors, config.json ("format"), tokenizer.json
    release      dual_diff_sd3_512_base and _sft: transformer/ vae/ text_encoder/ tokenizer/ scheduler/
    SD3 folder   transformer/ vae/ text_encoder_3/ tokenizer_3/
    SD3 file     sd3_medium*.safetensors with model.diffusion_model. first_stage_model. text_encoders.t5xxl.
    one part     a transformer, VAE or T5 alone, as a folder with its config.json or as a file

From SD3, D-DiT takes every weight that it shares; what SD3 lacks starts fresh, with zero gates, so that the
velocity is SD3's with a pooled text embedding of zero.

Reading is strict: a tensor that is missing, left over, misshapen or not finite is an error that names it.
"""

import json
import math
import shutil
import sys
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import data
from data import Tokenizer, UserError, gpt2_tokenizer, t5_tokenizer
from model import MMDiT, MMDiTConfig, TokenEmbedding, position_table
from t5 import T5Config, T5Encoder
from vae import AutoencoderKL, Pixels, VAEConfig

FORMAT = "dual-diffusion-transformer"

# Our names (left) in the published files (right); each line is applied once, in order.  {q,k,v} are three tensors
# stacked, "~" marks (scale, shift) where ours is (shift, scale).
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
DECODER = ("decoder.", "lm_head.", "logit_scale")               # what a whole T5 has beside its encoder


# ---------------------------------------------------------------------------------------------- reading files

def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a checkpoint is a folder with config.json, model.safetensors "
                        f"and tokenizer.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})")
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


class Tensors:
    """The tensors of one part: those under a prefix in one or several safetensors files, read one at a time.

    Raises UserError for a file that is missing, no safetensors, or cut off.
    """

    def __init__(self, files: list[Path], prefix: str = ""):
        self.prefix, self.files, self.handle, self.opened, self.converted = prefix, files, None, None, 0
        self.file, self.shape, self.dtype = {}, {}, {}
        for file in files:
            with self.open(file) as tensors:
                for key in tensors.keys():
                    if key.startswith(prefix):
                        part, name = tensors.get_slice(key), key.removeprefix(prefix)
                        self.file[name], self.shape[name] = file, tuple(part.get_shape())
                        self.dtype[name] = part.get_dtype()

    @staticmethod
    def open(file: Path):
        if file.suffix != ".safetensors":
            raise UserError(f"{file}: only .safetensors files are read; a {file.suffix or 'file without a suffix'} "
                            f"may be a pickle, which can run code; convert it first")
        try:
            return safe_open(file, framework="pt")
        except FileNotFoundError:
            raise UserError(f"{file}: no such file")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a whole safetensors file ({error}); copy it again")

    def __contains__(self, name: str) -> bool:
        return name in self.file

    def size(self, name: str, axis: int) -> int:
        """Raises UserError when the tensor isn't there or has fewer axes."""
        if name not in self.file or len(self.shape[name]) <= axis:
            raise UserError(f"{self.files[0]}: {self.prefix}{name} is missing, the model's sizes can't be read")
        return self.shape[name][axis]

    def count(self, pattern: str) -> int:
        """How many of pattern.format(0), pattern.format(1), ... there are."""
        number = 0
        while pattern.format(number) in self.file:
            number += 1
        return number

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """In the stored dtype (then mapped, not copied), or converted.

        The pages of a mapped file that were touched count as this process's memory until it is unmapped: after
        each gigabyte that was converted the file is opened anew, so that a conversion needs no memory for both.
        """
        if self.opened != self.file[name] or self.converted > 2**30:
            self.handle, self.opened, self.converted = None, None, 0
            self.handle, self.opened = self.open(self.file[name]), self.file[name]
        tensor = self.handle.get_tensor(self.prefix + name)
        if dtype in (None, tensor.dtype):
            return tensor
        self.converted += tensor.nbytes
        return tensor.to(dtype)


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


def finite(tensor: Tensor) -> bool:
    """No NaN and no infinity, in one pass: both survive a minimum and a maximum."""
    if tensor.numel() == 0:
        return True
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def fill(module: nn.Module, tensors: Tensors, entries: dict[str, Entry], dtype: torch.dtype,
         ignore: tuple[str, ...] = ()) -> None:
    """Put tensors into a module that was built on the meta device; the entries name each of its parameters.

    Raises UserError with every missing, left-over, misshapen or non-finite tensor in one message.
    """
    problems, used = [], set()
    for entry in entries.values():
        for key in entry.keys:
            used.add(key)
            if key not in tensors:
                problems.append(f"{tensors.files[0].name}: {tensors.prefix}{key} is missing")
            elif tensors.shape[key] != entry.shape:
                problems.append(f"{tensors.file[key].name}: {tensors.prefix}{key} is {tensors.shape[key]}, "
                                f"this model's sizes ask for {entry.shape}")
    problems += [f"{file.name}: {tensors.prefix}{key} is not a part of this model"
                 for key, file in tensors.file.items() if key not in used and not key.startswith(ignore or ("\0",))]
    if not problems:
        buffers, state = dict(module.named_buffers()), {}
        wanted = module.state_dict() | buffers
        for name, entry in entries.items():
            parts = [tensors.read(key, dtype) for key in entry.keys]
            problems += [f"{tensors.file[key].name}: {tensors.prefix}{key} holds NaN or infinity"
                         for key, part in zip(entry.keys, parts) if not finite(part)]
            if entry.swap:
                parts = [half for part in parts for half in part.chunk(2)[::-1]]
            if entry.fresh is not None:
                parts.append(entry.fresh.to(dtype))
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            state[name] = whole.reshape(wanted[name].shape)
        tensors.handle = None
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"{tensors.files[0].parent}/{'; '.join(sorted(problems)[:4])}{more}")
    for name in buffers.keys() & state.keys():
        setattr(module, name, state.pop(name))
    module.load_state_dict(state, assign=True)


# ---------------------------------------------------------------------------------------------- finding parts

SUBFOLDERS = dict(transformer=["transformer"], vae=["vae"], t5=["text_encoder_3", "text_encoder"],
                  tokenizer=["tokenizer_3", "tokenizer"])
PREFIXES = dict(transformer="model.diffusion_model.", vae="first_stage_model.",
                t5="text_encoders.t5xxl.transformer.")
SIGNS = dict(  # a tensor that tells each part, in each naming
    transformer=dict(file="joint_blocks.0.x_block.attn.qkv.weight", folder="transformer_blocks.0.attn.to_q.weight"),
    vae=dict(file="decoder.mid.attn_1.q.weight", folder="decoder.mid_block.attentions.0.to_q.weight"),
    t5=dict(file="encoder.block.0.layer.0.SelfAttention.q.weight"))
TITLES = dict(transformer="SD3 or D-DiT transformer", vae="SD3 autoencoder", t5="T5 encoder")


def part_folder(path: Path, part: str) -> Path:
    """The folder of a part inside a checkpoint, or the path itself where there is none."""
    return next((path / name for name in SUBFOLDERS[part] if (path / name).is_dir()), path)


def listing(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"


def is_ours(path: Path) -> bool:
    config = path / "config.json"
    return path.is_dir() and config.exists() and read_json(config).get("format") == FORMAT


def looks_ours(path: Path) -> bool:
    """A folder that isn't one of the published layouts is read as ours, so that its mistakes are told as ours."""
    if not path.is_dir() or (path / "transformer").is_dir() or not (path / "config.json").exists():
        return False
    return "_class_name" not in read_json(path / "config.json")


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a part's folder: those that an index names, or the only one.

    Raises UserError when there is none, when an index names one that is missing, or when the choice is not clear.
    """
    indexes = sorted(folder.glob("*.safetensors.index*.json"), key=lambda p: (len(p.name), p.name))
    lacking = ""
    for index in indexes:
        names = sorted(set(map(str, (read_json(index).get("weight_map") or {}).values())))
        absent = [name for name in names if "/" in name or not (folder / name).exists()]
        if names and not absent:
            return [folder / name for name in names]
        lacking = lacking or f"{folder}: {index.name} names {absent[0] if absent else 'no file'}, which is missing"
    if lacking:
        raise UserError(f"{lacking}; download it again")
    files = sorted(folder.glob("*.safetensors"), key=lambda p: (len(p.name), p.name))
    if not files:
        raise UserError(f"{folder}: expected .safetensors files, found {listing(folder)}")
    plain = [f for f in files if f.name in ("model.safetensors", "diffusion_pytorch_model.safetensors")]
    if len(files) > 1 and not plain:
        raise UserError(f"{folder}: {len(files)} safetensors files and no index that says which belong together")
    return plain or files


def find(path: str | Path, part: str) -> tuple[Tensors, dict | None, str]:
    """(tensors, config.json or None, naming "file" or "folder") of the transformer, vae or t5 in a path.

    Raises UserError, saying what was found, when the path holds no such part.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: expected a checkpoint, a folder or a .safetensors file, found nothing")
    config = None
    if path.is_dir():
        folder = part_folder(path, part)
        if folder == path and not any(path.glob("*.safetensors*")):
            raise UserError(f"{path}: expected a folder {' or '.join(SUBFOLDERS[part])} with safetensors files, "
                            f"found {listing(path)}")
        files = shards(folder)
        config = read_json(folder / "config.json") if (folder / "config.json").exists() else None
    else:
        files = [path]
    for prefix in ("", PREFIXES[part]):
        tensors = Tensors(files, prefix)
        for naming, sign in SIGNS[part].items():
            if sign in tensors:
                return tensors, config, naming
    begins = Counter(".".join(key.split(".")[:2]) for key in Tensors(files).file)
    raise UserError(f"{files[0]}: no {TITLES[part]} in it; its tensors begin with "
                    f"{', '.join(name for name, _ in begins.most_common(4)) or 'nothing, it is empty'}")


def whole_number(config: dict, key: str, default: int, where: Path) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where.parent / 'config.json'}: \"{key}\" is {value!r}, expected a whole number")
    return value


def build(make, where: Path) -> nn.Module:
    """A module without memory; sizes that no model can have are the file's mistake."""
    try:
        with torch.device("meta"):
            return make()
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{where}: no model has these sizes ({error})")


# ---------------------------------------------------------------------------------------------- the transformer

def read_config(path: str | Path) -> dict:
    """config.json of a folder of ours, with "mmdit" as an MMDiTConfig.  Raises UserError, naming the file."""
    path = Path(path)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise UserError(f"{path}: expected a checkpoint folder, found {found}")
    config = read_json(path / "config.json")
    if config.get("format") != FORMAT or not isinstance(config.get("mmdit"), dict):
        raise UserError(f"{path / 'config.json'}: expected \"format\": \"{FORMAT}\", found {config.get('format')!r}")
    known = {f.name for f in fields(MMDiTConfig)}
    if unknown := sorted(set(config["mmdit"]) - known):
        raise UserError(f"{path / 'config.json'}: unknown sizes {', '.join(unknown)}; "
                        f"known are {', '.join(sorted(known))}")
    return config | {"mmdit": MMDiTConfig(**config["mmdit"])}


def mmdit_config(tensors: Tensors, config: dict | None, naming: str, vocab_size: int) -> MMDiTConfig:
    """Sizes of a published transformer: from config.json where it says them, otherwise from the shapes."""
    c, where = config or {}, tensors.files[0]
    if c.get("dual_attention_layers"):
        raise UserError(f"{where.parent / 'config.json'}: \"dual_attention_layers\" is not empty (SD3.5-medium); "
                        f"this architecture is SD3's")
    patch_in = "x_embedder.proj.weight" if naming == "file" else "pos_embed.proj.weight"
    table, block = ("pos_embed", "joint_blocks.{}.x_block.attn.qkv.weight") if naming == "file" else (
        "pos_embed.pos_embed", "transformer_blocks.{}.attn.to_q.weight")
    qk_norm = ("joint_blocks.0.x_block.attn.ln_q.weight" if naming == "file" else
               "transformer_blocks.0.attn.norm_q.weight") in tensors
    head = whole_number(c, "attention_head_dim", 64, where)                       # 64 in every published model
    heads = whole_number(c, "num_attention_heads", max(1, tensors.size(patch_in, 0) // head), where)
    patch = whole_number(c, "patch_size", tensors.size(patch_in, 2), where)
    side = whole_number(c, "pos_embed_max_size", math.isqrt(tensors.size(table, 1)), where)
    if config:
        base = max(1, whole_number(c, "sample_size", 64 * patch, where) // patch)
    else:   # the table's second position is at base / size, and its first entry is the sine of that
        second = float(tensors.read(table).flatten()[tensors.size(table, 2)])
        base = max(1, round(side * math.asin(min(1, max(-1, second)))))
    if "text_proj_out.weight" in tensors:
        vocab_size = whole_number(c, "vocab_size", tensors.size("text_proj_out.weight", 0), where)
    nulls = tensors.size("null_image_embd", 1) if "null_image_embd" in tensors else 8
    return MMDiTConfig(
        depth=whole_number(c, "num_layers", tensors.count(block), where),
        heads=heads, width=heads * head, patch=patch,
        channels=whole_number(c, "in_channels", tensors.size(patch_in, 1), where), position_size=side,
        position_base=base, vocab_size=vocab_size, null_tokens=nulls,
        text_width=whole_number(c, "joint_attention_dim", tensors.size("context_embedder.weight", 1), where),
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


def read_sizes(path: str | Path, vocab_size: int = 32100) -> tuple[str, MMDiTConfig]:
    """What the transformer in a path is, from file headers alone: ("ours", "D-DiT" or "SD3", its sizes)."""
    path = Path(path)
    if looks_ours(path):
        return "ours", read_config(path)["mmdit"]
    tensors, config, naming = find(path, "transformer")
    kind = "D-DiT" if "text_proj_out.weight" in tensors else "SD3"
    return kind, mmdit_config(tensors, config, naming, vocab_size)


def load_mmdit(path: str | Path, dtype: torch.dtype = torch.float32, vocab_size: int = 32100) -> MMDiT:
    """The transformer of any layout, in eval mode, on the CPU.

    vocab_size: rows of the new text head when the weights are SD3's (T5's tokenizer has 32100).  Tensors that are
    stored in `dtype` stay mapped to the file: it must not be written to.  Raises UserError.
    """
    path = Path(path)
    if looks_ours(path):
        config, file = read_config(path)["mmdit"], path / "model.safetensors"
        model = build(lambda: MMDiT(config), path / "config.json")
        tensors = Tensors([file], "mmdit.")
        entries = {name: Entry([name], tuple(p.shape)) for name, p in model.named_parameters()}
        stored = "positions" in tensors     # a table that came with published weights, in their precision
        if stored:
            entries["positions"] = Entry(["positions"], tuple(model.positions.shape))
        fill(model, tensors, entries, dtype)
        if not stored:
            model.positions = position_table(config.width, config.position_size, config.position_base).to(dtype)
        return model.eval()
    tensors, config, naming = find(path, "transformer")
    from_sd3 = "text_proj_out.weight" not in tensors
    sizes = mmdit_config(tensors, config, naming, vocab_size)
    model = build(lambda: MMDiT(sizes), tensors.files[0])
    table = SD3_FILE if naming == "file" else SD3_FOLDER if from_sd3 else RELEASE
    fill(model, tensors, mmdit_entries(model, table, from_sd3), dtype, POOLED if from_sd3 else ())
    return model.eval()


def load_embedding(path: str | Path, dtype: torch.dtype = torch.float32) -> TokenEmbedding:
    """The end-to-end variant's token embedding, in eval mode.  Raises UserError where text comes from T5."""
    config = read_config(path)["mmdit"]
    if not config.text_length:
        raise UserError(f"{path}: this checkpoint has no token embedding of its own (text_length is 0)")
    embedding = build(lambda: TokenEmbedding(config.vocab_size, config.text_length, config.text_width), Path(path))
    entries = {name: Entry([name], tuple(p.shape)) for name, p in embedding.named_parameters()}
    fill(embedding, Tensors([Path(path) / "model.safetensors"], "embedding."), entries, dtype)
    return embedding.eval()


# ---------------------------------------------------------------------------------------------- VAE and T5

def vae_config(tensors: Tensors, config: dict | None, naming: str) -> VAEConfig:
    """Sizes of an autoencoder: from config.json where it says them, otherwise from the shapes, and SD3's scale."""
    c, where = config or {}, tensors.files[0]
    pattern = ("encoder.down.{}.block.{}.conv1.weight" if naming == "file" else
               "encoder.down_blocks.{}.resnets.{}.conv1.weight")
    level, block = pattern.format("{}", 0), pattern.format(0, "{}")
    widths = c.get("block_out_channels", [tensors.size(level.format(i), 0) for i in range(tensors.count(level))])
    if not isinstance(widths, list) or not widths or not all(isinstance(w, int) and w > 0 for w in widths):
        raise UserError(f"{where.parent / 'config.json'}: \"block_out_channels\" is {widths!r}, "
                        f"expected whole numbers")
    return VAEConfig(tuple(widths), whole_number(c, "layers_per_block", tensors.count(block), where),
                     whole_number(c, "latent_channels", tensors.size("decoder.conv_in.weight", 1), where),
                     whole_number(c, "norm_num_groups", VAEConfig.groups, where),
                     float(c.get("scaling_factor") or VAEConfig.scale),
                     float(c.get("shift_factor", VAEConfig.shift) or 0))


def vae_entries(vae: AutoencoderKL, naming: str) -> dict[str, Entry]:
    """Where each parameter of an autoencoder is found in the naming of the "file" or of the "folder"."""
    entries = {}
    for name, parameter in vae.named_parameters():
        shape, way = tuple(parameter.shape), name.split(".")[1]                   # "down" or "up", where there is one
        if naming == "file":     # 1x1 convolutions in attention, and up levels numbered from the largest picture
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


def t5_config(tensors: Tensors, config: dict | None, naming: str = "file") -> T5Config:
    """Sizes of a T5 encoder: from config.json where it says them, otherwise from the shapes."""
    c, where = config or {}, tensors.files[0]
    if c.get("feed_forward_proj", "gated-gelu") != "gated-gelu":
        raise UserError(f"{where.parent / 'config.json'}: \"feed_forward_proj\" is {c['feed_forward_proj']!r}, "
                        f"expected T5 v1.1's gated-gelu")
    table, attention = t5_table(tensors), "encoder.block.0.layer.0.SelfAttention."
    bias = attention + "relative_attention_bias.weight"
    heads = whole_number(c, "num_heads", tensors.size(bias, 1), where)
    return T5Config(whole_number(c, "vocab_size", tensors.size(table, 0), where),
                    whole_number(c, "d_model", tensors.size(table, 1), where),
                    whole_number(c, "num_layers", tensors.count("encoder.block.{}.layer.0.layer_norm.weight"), where),
                    heads, whole_number(c, "d_kv", max(1, tensors.size(attention + "q.weight", 0) // heads), where),
                    whole_number(c, "d_ff",
                                 tensors.size("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0), where),
                    whole_number(c, "relative_attention_num_buckets", tensors.size(bias, 0), where),
                    whole_number(c, "relative_attention_max_distance", T5Config.distance, where),
                    float(c.get("layer_norm_epsilon", T5Config.eps)))


def t5_table(tensors: Tensors) -> str:
    """What a T5 file calls its token table; with both names, the first."""
    return next((key for key in ("shared.weight", "encoder.embed_tokens.weight") if key in tensors), "shared.weight")


def t5_entries(t5: T5Encoder, table: str) -> dict[str, Entry]:
    """Where each parameter of T5 is found; `table` is what the file calls the token table."""
    return {name: Entry([table] if name == "embed.weight" else rename(name, T5_NAMES)[0], tuple(p.shape))
            for name, p in t5.named_parameters()}


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL | Pixels:
    """What turns pictures into latents and back, in eval mode.  Raises UserError."""
    if is_ours(Path(path)):
        kind = read_config(path).get("latents")
        if kind != "pixels":
            raise UserError(f"{Path(path) / 'config.json'}: \"latents\" is {kind!r}, so the autoencoder is another "
                            f"file's; name that one")
        return Pixels()
    tensors, config, naming = find(path, "vae")
    sizes, where = vae_config(tensors, config, naming), tensors.files[0]
    vae = build(lambda: AutoencoderKL(sizes), where)
    fill(vae, tensors, vae_entries(vae, naming), dtype)
    return vae.eval()


def load_t5(path: str | Path, dtype: torch.dtype = torch.float32) -> T5Encoder:
    """The T5 encoder, in eval mode.  Raises UserError."""
    if is_ours(Path(path)):
        raise UserError(f"{path}: no T5 encoder in it; name its file or folder")
    tensors, config, _ = find(path, "t5")
    where, table = tensors.files[0], t5_table(tensors)
    sizes = t5_config(tensors, config)
    t5 = build(lambda: T5Encoder(sizes), where)
    twin = "encoder.embed_tokens.weight"
    if table != twin and twin in tensors and not torch.equal(tensors.read(table), tensors.read(twin)):
        raise UserError(f"{where}: shared.weight and {twin} differ, expected one table under two names")
    fill(t5, tensors, t5_entries(t5, table), dtype, DECODER + ((twin,) if table != twin else ()))
    return t5.eval()


def load_mask_embedding(path: str | Path) -> Tensor:
    """The aligned [MASK] embedding, one vector (E,): a .safetensors or a .pth that holds one tensor.

    A .pth is unpickled with weights_only.  Raises UserError.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors = Tensors([path])
        found = [tensors.read(name) for name in tensors.file]
    else:
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file")
        except Exception as error:      # torch raises whatever the damaged or refused pickle led to
            raise UserError(f"{path}: not a file of one tensor ({str(error).splitlines()[0]})")
        found = list(held.values()) if isinstance(held, dict) else [held]
    if len(found) != 1 or not isinstance(found[0], Tensor) or found[0].numel() != max(found[0].shape, default=0):
        shapes = [str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in found[:4]]
        raise UserError(f"{path}: expected one vector, the [MASK] embedding, found {', '.join(shapes)}")
    if not finite(found[0]):
        raise UserError(f"{path}: the [MASK] embedding holds NaN or infinity")
    return found[0].detach().flatten()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """"gpt2", or the tokenizer in a folder of any layout, or a tokenizer.json.  Raises UserError."""
    if str(path) == "gpt2":
        return gpt2_tokenizer()
    path = Path(path)
    if path.is_dir():
        folder = part_folder(path, "tokenizer")
        path = folder / "tokenizer.json"
        if not path.exists() and not is_ours(folder):
            raise UserError(f"{folder}: expected tokenizer.json, found {listing(folder)}; fetch tokenizer.json of "
                            f"T5 v1.1 XXL, or of the tokenizer_3 folder of Stable Diffusion 3")
    elif path.suffix == ".safetensors":
        raise UserError(f"{path}: a safetensors file has no tokenizer; name a folder or a tokenizer.json")
    content = read_json(path)
    if "model" in content:
        return t5_tokenizer(path)
    if content.get("tokenizer") != "gpt2":
        raise UserError(f"{path}: expected \"tokenizer\": \"gpt2\" or T5's tokenizer.json, "
                        f"found {content.get('tokenizer')!r}")
    return gpt2_tokenizer(content.get("keep"))


# ---------------------------------------------------------------------------------------------- writing

def save(folder: Path, tensors: dict[str, Tensor], mmdit: MMDiTConfig, keep: list[int] | None,
         dtype: torch.dtype = torch.float32, **more) -> None:
    """Write a checkpoint folder of ours; `more` goes into config.json.  Each file is replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    config = {"format": FORMAT, "mmdit": asdict(mmdit), "latents": "pixels"} | more
    writers = {"model.safetensors": lambda to: save_file(tensors, to),
               "config.json": lambda to: write_json(to, config),
               "tokenizer.json": lambda to: to.write_text(json.dumps({"tokenizer": "gpt2", "keep": keep}) + "\n")}
    for name, write in writers.items():
        temporary = folder / f".{name}.tmp"
        write(temporary)
        temporary.replace(folder / name)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def export_release(source: Path, target: Path, tokenizer: Path | None = None) -> None:
    """Write any layout's transformer as a D-DiT release folder, in its stored dtype, as the published pipeline
    loads it; its vae/ and text_encoder/ come from the release or from SD3.  Raises UserError."""
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target}: expected a new folder, found one that is not empty")
    ours = read_config(source)["mmdit"] if is_ours(source) else None
    if ours and ours.predicts != "velocity":
        raise UserError(f"{source}: its image head predicts {ours.predicts}; the release layout's is a velocity")
    if ours and ours.text_length:
        raise UserError(f"{source}: its text comes from a token embedding of its own, which the release layout, "
                        f"made for T5, has no place for")
    tensors = Tensors([source / "model.safetensors"], "mmdit.") if ours else find(source, "transformer")[0]
    stored = Counter(tensors.dtype.values()).most_common(1)[0][0]
    dtype = dict(F16=torch.float16, BF16=torch.bfloat16).get(stored, torch.float32)
    model = load_mmdit(source, dtype)
    c = model.config
    state, held = {}, dict(model.named_parameters()) | {"positions": model.positions}
    for name, entry in mmdit_entries(model, RELEASE, False).items():
        tensor = held[name].detach()
        if entry.swap:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        parts = tensor.chunk(len(entry.keys))
        state |= {key: part.reshape(entry.shape).contiguous() for key, part in zip(entry.keys, parts)}
    for part in ("transformer", "scheduler", "tokenizer"):
        (target / part).mkdir(parents=True, exist_ok=True)
    save_file(state, target / "transformer" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    write_json(target / "transformer" / "config.json", dict(
        _class_name="SD3JointModelFlexible", attention_head_dim=c.width // c.heads, caption_projection_dim=c.width,
        dual_attention_layers=[], in_channels=c.channels, joint_attention_dim=c.text_width, num_attention_heads=c.heads,
        num_layers=c.depth, out_channels=c.channels, patch_size=c.patch, pooled_projection_dim=2048,
        pos_embed_max_size=c.position_size, qk_norm="rms_norm" if c.qk_norm else None,
        sample_size=c.position_base * c.patch, vocab_size=c.vocab_size))
    write_json(target / "scheduler" / "scheduler_config.json", dict(
        _class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=False))
    write_json(target / "model_index.json", dict(
        _class_name="DualDiffSD3Pipeline", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
        text_encoder=["transformers", "T5EncoderModel"], tokenizer=["transformers", "T5TokenizerFast"],
        transformer=["sd3_modules.sd3_model", "SD3JointModelFlexible"], vae=["diffusers", "AutoencoderKL"]))
    origin = tokenizer or part_folder(source, "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model"):
        if origin.is_dir() and (origin / name).exists():
            shutil.copyfile(origin / name, target / "tokenizer" / name)
    if not any((target / "tokenizer").iterdir()):
        print(f"note: {origin} has no tokenizer; put T5's into {target / 'tokenizer'}, or name it with --tokenizer",
              file=sys.stderr)


def inspect(path: Path) -> str:
    """Layout, parts, sizes, dtypes and parameter counts, a screenful."""
    if not path.exists():
        raise UserError(f"{path}: expected a checkpoint, a folder or a .safetensors file, found nothing")
    lines = []

    def part(title: str, tensors: Tensors, sizes) -> None:
        count, kinds = sum(math.prod(shape) for shape in tensors.shape.values()), Counter(tensors.dtype.values())
        lines.append(f"{title}: {len(tensors.file)} tensors, {count / 1e6:,.1f} M values, "
                     f"{', '.join(kinds)}, {len(tensors.files)} file(s)")
        lines.append("    " + ", ".join(f"{k} {v}" for k, v in vars(sizes).items()))

    if is_ours(path):
        config = read_config(path)
        lines.append(f"{path}: ours, latents {config.get('latents')}, step {config.get('step')}")
        part("transformer", Tensors([path / "model.safetensors"], "mmdit."), config["mmdit"])
        return "\n".join(lines)
    sizes = dict(transformer=lambda *found: mmdit_config(*found, 32100), vae=vae_config, t5=t5_config)
    absent = []
    for name in sizes:
        try:
            found = find(path, name)
        except UserError as error:
            absent.append(f"{name}: {error}")
            continue
        title = TITLES[name]
        if name == "transformer":
            title = "D-DiT transformer" if "text_proj_out.weight" in found[0] else "SD3 transformer"
        part(title, found[0], sizes[name](*found))
    if not lines:
        raise UserError(absent[0])
    return "\n".join([f"{path}:"] + lines + absent)


def main() -> None:
    parser = data.Parser(__doc__)
    parser.add_argument("command", choices=["inspect", "export"])
    parser.add_argument("source", type=Path, help="a folder or a file of any layout")
    parser.add_argument("target", type=Path, nargs="?", help="export: the new folder")
    parser.add_argument("--layout", choices=["release"], default="release")
    parser.add_argument("--tokenizer", type=Path, help="export: a folder with T5's tokenizer, if the source has none")
    args = parser.parse_args()
    if (args.target is None) == (args.command == "export"):
        parser.error("export takes SRC and DST" if args.command == "export" else "inspect takes one path")
    if args.command == "inspect":
        print(inspect(args.source))
    else:
        export_release(args.source, args.target, args.tokenizer)
        print(args.target)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
