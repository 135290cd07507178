"""Weights on disk: read any published layout strictly, write our own, export to the published ones.

    python checkpoint.py inspect PATH                         # layout, parts, sizes, dtypes
    python checkpoint.py export SRC DST --layout release      # any layout -> a D-DiT release folder
    python checkpoint.py export SRC DST --layout sd3          # only SD3's weights, for diffusers

PATH is a folder or a file in one of these layouts:

    ours         a folder with model.safetensors, config.json (with "format"), tokenizer.json
    release      dual_diff_sd3_512_base and _sft: transformer/ vae/ text_encoder/ tokenizer/
    SD3 folder   transformer/ vae/ text_encoder_3/ tokenizer_3/
    SD3 file     sd3_medium*.safetensors, tensors named model.diffusion_model.*,
                 first_stage_model.* and text_encoders.t5xxl.*
    one part     only a transformer, VAE or T5, as a folder with its config.json or as a file

From SD3, D-DiT takes every weight that both have.  D-DiT's other weights start fresh, with zero
gates: the velocity then equals SD3's with a pooled text embedding of zero.

Reading is strict: an error names the first tensors that are missing, unexpected, of a wrong shape or
not finite.
"""

from common import cli
cli.interruptible(__name__)

import hashlib
import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.cli import UserError, require
from common.files import (inside, is_there, listing, read_json_object, visible, write_json,
                          write_text)
from model import MMDiT, MMDiTConfig, TokenEmbedding, position_table
from pretrained import layouts
from pretrained.export import describe, write_folder
from pretrained.layouts import Entry, Part
from pretrained.safetensors_io import (FLOATS, NAMES, Tensors, finite, is_safetensors, read_any,
                                       write_tensors)
from pretrained.t5 import T5Config, T5Encoder
from pretrained.tokenizer import Tokenizer, gpt2_tokenizer, t5_tokenizer
from pretrained.vae import AutoencoderKL, Pixels, VAEConfig

FORMAT = "dual-diffusion-transformer"
MASK_EMBEDDING = "mask_embedding.safetensors"       # T5's trained [MASK] row, beside our weights
PART_SIZES = dict(transformer=layouts.mmdit_config, vae=layouts.vae_config, t5=layouts.t5_config)
# a run's settings in config.json, and their types
ABOUT = dict(pixels=int, buckets=bool, text_length=int, step=int, latents=str, t5=str, vae=str,
             guidance=float, shift=float)
ABOVE_ZERO = ("pixels", "text_length", "guidance", "shift")


# -------------------------------------------------------------------- find parts at a path

def part_folder(path: Path, part: str) -> Path:
    """Return the folder of a part inside a checkpoint; `path` itself if it has no such folder."""
    for name in layouts.SUBFOLDERS[part]:
        if (path / name).is_dir():
            return path / name
    return path


def is_ours(path: str | Path) -> bool:
    """Return True for a folder with a config.json that neither diffusers nor transformers wrote, and
    without a transformer/."""
    file = Path(path) / "config.json"
    if (file.parent / "transformer").is_dir() or not file.exists():
        return False
    return not {"_class_name", "model_type", "architectures"} & read_json_object(file).keys()


def shards(folder: Path) -> list[Path]:
    """Return the safetensors files of a part's folder: those that an index names, or the only one.

    Raises UserError if there is none, if a shard is missing, and for several files without an
    index."""
    problems = []
    # a folder may have a plain index and an fp16 one, and the files of only one of them
    indexes = visible(folder, "*.safetensors.index*.json")
    for index in sorted(indexes, key=lambda path: len(path.name)):
        weight_map = read_json_object(index).get("weight_map")
        require((isinstance(weight_map, dict) and weight_map, f"{index}: names no file"))
        files = [inside(folder, name) for name in sorted(set(map(str, weight_map.values())))]
        absent = [file.name for file in files if not file.exists()]
        if not absent:
            return files
        problems.append(f"{index} names {absent[0]}, which is missing; download it again")
    if problems:
        raise UserError(problems[0])
    files = list(filter(is_safetensors, visible(folder)))
    require((files, f"{folder}: expected .safetensors files, found {listing(folder)}"))
    plain = [file for file in files if file.stem in ("model", "diffusion_pytorch_model")]
    require((len(plain) == 1 or len(files) == 1, f"{folder}: {len(files)} safetensors files and no "
             f"index; name one file"))
    return plain or files


def weights_file(path: str | Path, training: bool) -> Path:
    """Return the file of a run's averaged weights or, for training, of its float32 weights before
    averaging."""
    weights = Path(path) / "weights.safetensors"
    return weights if training and weights.exists() else Path(path) / "model.safetensors"


def find(path: str | Path, part: str, training: bool = False) -> Part:
    """Find a part at a path, in any layout; only headers are read.

    part: "transformer", "vae" or "t5".  training: see `weights_file`.  Raises UserError, which says
    what the path holds instead."""
    path = Path(path)
    require((path.exists(), f"{path}: expected a checkpoint, a folder or a .safetensors file, "
             f"found nothing"))
    if part == "transformer" and is_ours(path):
        config = read_config(path)
        return Part(Tensors([weights_file(path, training)], "mmdit."), config, "ours")
    folder, files = path.parent, [path]
    if path.is_dir():
        folder = part_folder(path, part)
        files = shards(folder)
    config_file = folder / "config.json"
    config = read_json_object(config_file) if is_there(config_file) else {}
    if config.get("format") == FORMAT:          # a run's, which says nothing of this part
        config = {}
    for prefix in ("", layouts.PREFIXES[part]):
        tensors = Tensors(files, prefix)
        for layout, sign in layouts.SIGNS[part].items():
            if sign in tensors:
                return Part(tensors, config, layout)
    if part == "transformer" and path.is_file() and is_ours(path.parent):
        raise UserError(f"{path}: is one file of a checkpoint in our layout; give the folder "
                        f"{path.parent}")
    beginnings = Counter(".".join(key.split(".")[:2]) for key in Tensors(files).file)
    frequent = ", ".join(beginning for beginning, _ in beginnings.most_common(4))
    raise UserError(f"{files[0]}: no {layouts.TITLES[part]} in it; its tensors begin with "
                    f"{frequent}")


def named(path: str | Path, part: str) -> Part:
    """Find a "vae" or "t5".  Raises UserError with advice to use its flag."""
    try:
        return find(path, part)
    except UserError as error:
        raise UserError(f"{error}; name the right one with --{part}")


# ----------------------------------------------------------------------------------- sizes

def read_config(path: str | Path) -> dict:
    """Read config.json of a checkpoint in our layout, with "mmdit" as an MMDiTConfig.

    Raises UserError for a file of another format or a wrong setting."""
    file = Path(path) / "config.json"
    config = read_json_object(file)
    require((config.get("format") == FORMAT,
             f"{file}: expected \"format\": \"{FORMAT}\", found {config.get('format')!r}"),
            (isinstance(config.get("mmdit"), dict), f"{file}: expected \"mmdit\": an object with "
             f"the sizes, found {layouts.shown(config.get('mmdit'))}"))
    for name in ABOUT.keys() & config.keys():
        value, kind = config[name], ABOUT[name]
        kinds = (int, float) if kind is float else (kind,)       # JSON: 1.0 as 1
        require((value is None or type(value) in kinds,
                 f"{file}: \"{name}\" is {value!r}, expected {kind.__name__}"))
        if name in ABOVE_ZERO and value is not None:
            require((0 < value < math.inf, f"{file}: \"{name}\" is {value}, expected more than 0"))
    config["mmdit"] = layouts.our_config(config["mmdit"], file)
    return config


def read_sizes(path: str | Path) -> tuple[str, MMDiTConfig]:
    """Read a transformer's family, "ours", "D-DiT" or "SD3", and its sizes from file headers."""
    part = find(path, "transformer")
    return part.family, layouts.mmdit_config(part)


def vae_sizes(path: str | Path) -> VAEConfig:
    """Read an autoencoder's sizes from file headers.  Raises UserError."""
    return layouts.vae_config(named(path, "vae"))


def t5_sizes(path: str | Path) -> T5Config:
    """Read T5's sizes from file headers.  Raises UserError."""
    return layouts.t5_config(named(path, "t5"))


# ------------------------------------------------------------------------ modules from tensors

class Uninitialized(TorchFunctionMode):
    """Skip torch.nn.init: on the meta device it imports torch's compiler, which takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == nn.init.__name__:
            return [*args, *kwargs.values()][0]
        return function(*args, **kwargs)


def build(module: Callable[..., nn.Module], path: str | Path, *sizes) -> nn.Module:
    """Build module(*sizes) on the meta device, without allocating its weights.

    Raises UserError for impossible sizes."""
    try:
        with torch.device("meta"), Uninitialized():
            return module(*sizes)
    except (IndexError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: no model has these sizes ({error})")


def check_headers(tensors: Tensors, entries: dict[str, Entry], ignore: tuple[str, ...]) -> None:
    """Raise UserError for tensors that are missing, unexpected, of a wrong shape, or not floats.

    ignore: prefixes of the names of unexpected tensors that are allowed."""
    problems = []
    shapes = {}
    for entry in entries.values():
        shapes.update(dict.fromkeys(entry.keys, entry.shape))
    for key, expected in shapes.items():
        shape = tensors.shape.get(key, "missing")
        if shape != expected:
            problems.append(f"{tensors.where(key)} is {shape}, expected {expected}")
        elif tensors.dtype[key] not in FLOATS:
            problems.append(f"{tensors.where(key)} is {tensors.dtype[key]}, expected floats")
    for key in tensors.file.keys() - shapes.keys():
        if not key.startswith(ignore):
            problems.append(f"{tensors.where(key)} is not a part of this model")
    problems.sort()
    if len(problems) > 4:
        problems[4:] = [f"and {len(problems) - 4} more"]
    require((not problems, "; ".join(problems)))


def read_entry(tensors: Tensors, entry: Entry, dtype: torch.dtype) -> Tensor:
    """Read a parameter; its pieces are concatenated.  Raises UserError for NaN and infinity."""
    pieces = []
    for key in entry.keys:
        piece = tensors.read(key, dtype)
        if not finite(piece):
            raise UserError(f"{tensors.where(key)} holds NaN or infinity, or a number that is too "
                            f"large for {str(dtype or piece.dtype).removeprefix('torch.')}")
        pieces.append(piece)
    if entry.swap:
        pieces = pieces[0].chunk(2)[::-1]
    if entry.fresh is not None:
        pieces = [*pieces, entry.fresh.to(dtype)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)      # cat would copy a mapped piece


def load_tensors(module: nn.Module, tensors: Tensors, entries: dict[str, Entry], dtype: torch.dtype,
                 ignore: tuple[str, ...] = ()) -> None:
    """Load tensors into a module on the meta device; there is one entry for each parameter.

    ignore: see `check_headers`.  Raises UserError, which names the wrong tensors."""
    check_headers(tensors, entries, ignore)
    shapes = layouts.our_entries(module)
    state = {}
    for name, entry in entries.items():
        state[name] = read_entry(tensors, entry, dtype).reshape(shapes[name].shape)
    if "positions" in state:                    # a buffer of MMDiT that its state_dict leaves out
        module.positions = state.pop("positions")
    module.load_state_dict(state, strict=True, assign=True)


# ------------------------------------------------------------------------------- the loaders

def build_mmdit(part: Part, vocab_size: int) -> tuple[MMDiT, dict[str, Entry]]:
    """Return a transformer on the meta device, and the file entry of each of its parameters."""
    file = part.tensors.files[0]
    if part.family == "ours":
        file = file.with_name("config.json")                     # it holds all sizes
    model = build(MMDiT, file, layouts.mmdit_config(part, vocab_size))
    return model, layouts.mmdit_entries(model, part.layout)


def load_mmdit(path: str | Path, dtype: torch.dtype = torch.float32, vocab_size: int = 32100,
               training: bool = False) -> MMDiT:
    """Load a transformer of any layout, in eval mode, on the CPU.

    vocab_size: rows of the new text head when the weights are SD3's (T5's tokenizer has 32100).
    training: see `weights_file`.  Tensors that are stored in `dtype` stay mapped to the file, so
    the file must not be overwritten in place.  Raises UserError."""
    part = find(path, "transformer", training)
    model, entries = build_mmdit(part, vocab_size)
    if part.family == "ours" and "positions" not in part.tensors:
        # only runs that start from published weights store the table, in those weights' precision
        del entries["positions"]
        c = model.config
        model.positions = position_table(c.width, c.position_size, c.position_base).to(dtype)
    ignore = layouts.POOLED if part.family == "SD3" else ()
    load_tensors(model, part.tensors, entries, dtype, ignore)
    return model.eval()


def carried_over(path: str | Path, vocab_size: int) -> str:
    """Return a text with the number of values that D-DiT takes from SD3, and that start fresh."""
    _, entries = build_mmdit(find(path, "transformer"), vocab_size)
    titles = dict(txt_out="text head", null_image="null image",
                  blocks="the last block's text stream")
    kept = 0
    fresh = Counter()
    for name, entry in entries.items():
        kept += math.prod(entry.shape) * len(entry.keys)
        if entry.fresh is not None:
            title = titles[name.split(".")[0]]
            fresh[title] += entry.fresh.numel()
    parts = ", ".join(f"{title} {count:,}" for title, count in fresh.items())
    return f"{kept:,} values carried over; fresh: {parts}"


def trained_mask(path: str | Path) -> Tensor | None:
    """Return the [MASK] embedding (E,) that a run of ours trained, before averaging; None if there
    is none."""
    if not is_ours(path):
        return None
    tensors = Tensors([weights_file(path, training=True)], "mask.")
    return tensors.read("vector", torch.float32) if "vector" in tensors else None


def load_embedding(path: str | Path, dtype: torch.dtype = torch.float32,
                   training: bool = False) -> TokenEmbedding:
    """Load the token embedding of an end-to-end model, in eval mode.  Raises UserError."""
    c = read_config(path)["mmdit"]
    embedding = build(TokenEmbedding, path, c.vocab_size, c.text_length, c.text_width)
    tensors = Tensors([weights_file(path, training)], "embedding.")
    load_tensors(embedding, tensors, layouts.our_entries(embedding), dtype)
    return embedding.eval()


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL | Pixels:
    """Load the autoencoder, in eval mode; `Pixels` for a model without one.  Raises UserError."""
    if is_ours(path) and read_config(path).get("latents") == "pixels":
        return Pixels()
    part = named(path, "vae")
    vae = build(AutoencoderKL, path, layouts.vae_config(part))
    load_tensors(vae, part.tensors, layouts.vae_entries(vae, part.layout), dtype)
    return vae.eval()


def load_t5(path: str | Path, dtype: torch.dtype = torch.float32) -> T5Encoder:
    """Load the T5 encoder, in eval mode.  Raises UserError."""
    part = named(path, "t5")
    t5 = build(T5Encoder, path, layouts.t5_config(part))
    entries = layouts.t5_entries(t5, layouts.t5_table(part.tensors))
    load_tensors(t5, part.tensors, entries, dtype, layouts.BESIDE_T5)
    return t5.eval()


def digest(model: nn.Module) -> str:
    """Return a hash of all of a model's values in their dtype, and of an autoencoder's scale and shift
    unless they are SD3's; "pixels" for `Pixels`."""
    if isinstance(model, Pixels):
        return "pixels"
    sha256 = hashlib.sha256()
    if isinstance(model, AutoencoderKL):
        scaling = model.config.scale, model.config.shift
        if scaling != (VAEConfig.scale, VAEConfig.shift):
            sha256.update(f"scaling {scaling}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha256.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()[:16]


def load_mask_embedding(path: str | Path, width: int | None = None) -> Tensor:
    """Read a [MASK] embedding (E,) from a .safetensors or .pth file that holds one tensor.

    width: E, if it is known.  A .pth is unpickled with weights_only.  Raises UserError."""
    path = Path(path)
    content = read_any(path, "a file of one tensor")
    if isinstance(content, dict) and len(content) == 1:
        [content] = content.values()
    require((isinstance(content, Tensor) and content.numel() == max(content.shape, default=0),
             f"{path}: expected one vector, the [MASK] embedding"))
    require((content.is_floating_point(), f"{path}: a [MASK] embedding of {content.dtype}, expected "
             f"floats"))
    vector = content.detach().flatten().float()
    require((finite(vector), f"{path}: the [MASK] embedding holds NaN or infinity"),
            (width in (None, len(vector)),
             f"{path}: a [MASK] embedding of {len(vector)} numbers, this T5 has {width}"))
    return vector


def check_text_encoder(path: str | Path, tokenizer: Tokenizer, width: int | None = None) -> None:
    """Raise UserError if T5's table has fewer rows than the tokenizer has tokens, or T5's width is
    not the `width` that the transformer reads.  Only headers are read."""
    sizes = t5_sizes(path)
    require((tokenizer.vocab_size <= sizes.vocab_size,
             f"{path}: T5's table has {sizes.vocab_size} rows, the tokenizer "
             f"{tokenizer.vocab_size} tokens; name T5's own with --tokenizer"),
            (width in (None, sizes.width), f"{path}: T5 gives {sizes.width} numbers a token, the "
             f"transformer reads {width}"))


def load_text_encoder(path: str | Path, dtype: torch.dtype, tokenizer: Tokenizer,
                      width: int | None = None, vector: Tensor | None = None) -> T5Encoder:
    """Load T5 after `check_text_encoder`.  vector: (E,), replaces its [MASK] row."""
    check_text_encoder(path, tokenizer, width)
    encoder = load_t5(path, dtype)
    if vector is not None:
        encoder.set_embedding(tokenizer.mask_id, vector)
    return encoder


def load_autoencoder(path: str | Path, channels: int) -> AutoencoderKL | Pixels:
    """Load an autoencoder in float32, which is cheap: it has one percent of all weights.

    Raises UserError if its latents do not have the transformer's `channels`."""
    autoencoder = load_vae(path)
    require((autoencoder.channels == channels,
             f"{path}: latents of {autoencoder.channels} channels, the transformer has {channels}; "
             f"name the right one with --vae"))
    return autoencoder


def training_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer that pads with its end token, as in D-DiT's training: T5's own is <pad>."""
    tokenizer = load_tokenizer(path)
    tokenizer.pad_id = tokenizer.end_id
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer: from a folder of any layout, from a tokenizer.json, or by the name "gpt2".

    Raises UserError."""
    path = Path(path)
    if str(path) == "gpt2" and not path.exists():
        return gpt2_tokenizer()
    require((path.exists(), f"{path}: expected a folder or a tokenizer.json, found nothing; name "
             f"the right one with --tokenizer"),
            (not is_safetensors(path), f"{path}: a safetensors file has no tokenizer; name a "
             f"folder or a tokenizer.json with --tokenizer"))
    if path.is_dir():
        folder = part_folder(path, "tokenizer")
        path = folder / "tokenizer.json"
        require((path.exists(), f"{folder}: expected tokenizer.json, found {listing(folder)}; "
                 f"fetch that of T5 v1.1 XXL, and name it with --tokenizer"))
    content = read_json_object(path)
    if "model" in content:
        return t5_tokenizer(path)
    kind = content.get("tokenizer")
    require((kind == "gpt2", f"{path}: expected \"tokenizer\": \"gpt2\" or T5's tokenizer.json, "
             f"found {kind!r}"))
    try:
        return gpt2_tokenizer(content.get("keep"), content.get("seen"), content.get("capitals", ()))
    except (TypeError, UserError) as error:
        raise UserError(f"{path}: {error}")


# --------------------------------------------------------------------------------- writing

def save(folder: Path, tensors: dict[str, Tensor], mmdit: MMDiTConfig, tokenizer: Tokenizer,
         dtype: torch.dtype = torch.float32, gather: Callable[[Tensor], Tensor] = Tensor.detach,
         **more) -> None:
    """Write a checkpoint in our layout; `more` goes into config.json.

    dtype, gather: see `write_tensors`.  Each file is replaced atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors, dtype, gather)
    config = dict(format=FORMAT, mmdit=asdict(mmdit), latents="pixels")
    write_json(folder / "config.json", config | more)
    for name, content in tokenizer.files().items():
        write_text(folder / name, content)


def check_config(mmdit: MMDiTConfig) -> None:
    """Raise UserError for sizes that would change when config.json is written and read again."""
    try:
        values = json.loads(json.dumps(asdict(mmdit)))
    except TypeError as error:                                   # a value of no JSON type
        raise UserError(f"MMDiTConfig: config.json can't hold it ({error})")
    read = layouts.our_config(values, Path("config.json"))
    require((read == mmdit, f"MMDiTConfig: config.json would turn {mmdit} into {read}"))


# ---------------------------------------------------------------------------- the commands

def export(source: Path, target: Path, layout: str = "release",
           tokenizer: Path | None = None) -> None:
    """Write a transformer in its stored dtype, as a folder that the published pipeline loads.  Of a
    run, the averaged weights are written.  The autoencoder and T5 are not written: take them from
    the release or from SD3.

    layout: "release", D-DiT's; or "sd3", without the parts that D-DiT added and with SD3's pooled
    CLIP branch at zero: the velocity stays the same.  A trained [MASK] embedding is copied as a
    file.  Raises UserError."""
    require((not target.exists() or not any(target.iterdir()),
             f"{target}: expected a new or empty folder; name another one, or delete what a "
             f"stopped export left there"))
    part = find(source, "transformer")
    sizes = layouts.mmdit_config(part)
    require((sizes.predicts == "velocity", f"{source}: its image head predicts {sizes.predicts}, "
             f"the published layouts' a velocity"),
            (not sizes.text_length, f"{source}: its text comes from a token embedding; the "
             f"published layouts are made for T5"))
    if tokenizer:
        require((tokenizer.is_dir(),
                 f"--tokenizer {tokenizer}: expected a folder with T5's tokenizer"))
        size = load_tokenizer(tokenizer).vocab_size
        require((part.family == "SD3" or size == sizes.vocab_size, f"--tokenizer {tokenizer}: has "
                 f"{size} tokens, the model's text head {sizes.vocab_size}"))
    stored = Counter(part.tensors.dtype.values()).most_common(1)[0][0]
    dtypes = {name: dtype for dtype, name in NAMES.items()}
    dtype = dtypes.get(stored, torch.float32)
    shift = layouts.SHIFT
    if part.family == "ours":
        shift = part.config.get("shift") or shift
    write_folder(load_mmdit(source, dtype), target, layout, dtype, shift,
                 part_folder(tokenizer or source, "tokenizer"), source / MASK_EMBEDDING)


def inspect(path: Path) -> str:
    """Return a text with layout, parts, sizes, dtypes and parameter counts.  Raises UserError."""
    if is_ours(path):
        part = find(path, "transformer")
        config = part.config
        return (f"{path}: ours, latents {config.get('latents')}, step {config.get('step')}\n"
                + describe("transformer", part.tensors, layouts.mmdit_config(part)))
    lines = [f"{path}:"]
    absent = []
    for name, read_part in PART_SIZES.items():
        try:
            part = find(path, name)
        except UserError as error:
            absent.append(f"{name}: {error}")
            continue
        title = f"{part.family} transformer" if name == "transformer" else layouts.TITLES[name]
        lines.append(describe(title, part.tensors, read_part(part)))
    if len(absent) == len(PART_SIZES):
        find(path, "transformer")                                # raises the error
    return "\n".join(lines + absent)


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("command", choices=["inspect", "export"])
    parser.add_argument("source", type=Path, help="a folder or a file in any layout")
    parser.add_argument("target", type=Path, nargs="?", help="export: the folder to write")
    parser.add_argument("--layout", choices=["release", "sd3"], help="export: (release)")
    parser.add_argument("--tokenizer", type=Path,
                        help="export: a folder with T5's tokenizer, if not in SRC")
    args = parser.parse_args()
    if args.command == "inspect" and not (args.target or args.layout or args.tokenizer):
        print(inspect(args.source))
    elif args.command == "export" and args.target:
        export(args.source, args.target, args.layout or "release", args.tokenizer)
        print(args.target)
    else:
        parser.error("export takes SRC, DST and flags, inspect one path and no flag")


if __name__ == "__main__":
    cli.run(main)
