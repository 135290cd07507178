"""Weights on disk: what is read, by hand, from safetensors, and what is written.

    python checkpoint.py inspect PATH                         # layout, parts, sizes, dtypes
    python checkpoint.py export SRC DST --layout release      # any layout -> a D-DiT release folder
    python checkpoint.py export SRC DST --layout sd3          # what of it SD3 has, for diffusers to draw with

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
from common.files import read_json_object, write_json, write_text
from model import MMDiT, MMDiTConfig, TokenEmbedding, position_table
from pretrained import layouts
from pretrained.export import describe, write_folder
from pretrained.layouts import Entry
from pretrained.safetensors_io import (FLOATS, NAMES, Tensors, finite, is_safetensors, read_any,
                                       write_tensors)
from pretrained.t5 import T5Config, T5Encoder
from pretrained.tokenizer import Tokenizer, gpt2_tokenizer, t5_tokenizer
from pretrained.vae import AutoencoderKL, Pixels, VAEConfig

FORMAT = "dual-diffusion-transformer"
MASK_EMBEDDING = "mask_embedding.safetensors"      # T5's [MASK] row, where a checkpoint has its own


def fill(module: nn.Module, tensors: Tensors, entries: dict[str, Entry], dtype: torch.dtype,
         ignore: tuple[str, ...] = ()) -> None:
    """Put tensors into a module on the meta device; the entries name each of its parameters.
    Raises UserError with the missing, left-over, misshapen or non-finite tensors in one message."""
    shapes = {key: entry.shape for entry in entries.values() for key in entry.keys}
    problems = {}
    for key in shapes.keys() | tensors.file.keys():
        if key not in tensors:
            problems[key] = "is missing"
        elif key not in shapes:
            if not key.startswith(ignore):
                problems[key] = "is not a part of this model"
        elif tensors.shape[key] != shapes[key]:
            problems[key] = f"is {tensors.shape[key]}, this model's sizes ask for {shapes[key]}"
        elif tensors.dtype[key] not in FLOATS:
            problems[key] = f"has numbers of type {tensors.dtype[key]}, expected floats"
    tensors.refuse(problems)
    buffers = dict(module.named_buffers())
    wanted = module.state_dict() | buffers
    state = {}
    for name, entry in entries.items():
        pieces = []
        for key in entry.keys:
            piece = tensors.read(key, dtype)
            if not finite(piece):
                problems[key] = "holds NaN or infinity"
            pieces += piece.chunk(2)[::-1] if entry.swap else [piece]
        if entry.fresh is not None:
            pieces.append(entry.fresh.to(dtype))
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)     # one piece stays mapped
        state[name] = whole.reshape(wanted[name].shape)
    tensors.handle = None
    tensors.refuse(problems)
    for name in buffers.keys() & state.keys():
        setattr(module, name, state.pop(name))
    module.load_state_dict(state, assign=True)


def part_folder(path: Path, part: str) -> Path:
    """Return the folder of a part inside a checkpoint, or the path itself where there is none."""
    return next((path / name for name in layouts.SUBFOLDERS[part] if (path / name).is_dir()), path)


def listing(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"


def is_ours(path: Path) -> bool:
    """Tell a folder of ours by a config.json that neither diffusers nor transformers wrote."""
    if (path / "transformer").is_dir() or not (path / "config.json").exists():
        return False
    config = read_json_object(path / "config.json")
    return not {"_class_name", "model_type", "architectures"} & config.keys()


def shards(folder: Path) -> list[Path]:
    """Return the safetensors files of a part's folder: those that an index names, or the only one.
    Raises UserError when there is none, an index names a missing one, or the choice is not clear."""
    missing = None
    for index in sorted(folder.glob("*.safetensors.index*.json"), key=lambda path: len(path.name)):
        weight_map = read_json_object(index).get("weight_map")
        require((isinstance(weight_map, dict) and weight_map, f"{index}: names no file"))
        names = sorted(set(map(str, weight_map.values())))
        absent = [name for name in names if "/" in name or not (folder / name).exists()]
        if not absent:
            return [folder / name for name in names]             # of several, such as fp16's, the one that is here
        missing = missing or f"{index} names {absent[0]}, which is missing; download it again"
    require((not missing, missing))
    files = list(filter(is_safetensors, folder.iterdir()))
    plain = [file for file in files if file.stem in ("model", "diffusion_pytorch_model")]
    require((files, f"{folder}: expected .safetensors files, found {listing(folder)}"),
            (plain or len(files) == 1, f"{folder}: {len(files)} safetensors files and no index"))
    return plain or files


def find(path: str | Path, part: str) -> tuple[Tensors, dict, str]:
    """Return the tensors of a "transformer", "vae" or "t5", its config.json, empty if there is none, and the
    naming, "file" or "folder".  Raises UserError, saying what was found, when the path holds no such part."""
    path = Path(path)
    require((path.exists(), f"{path}: expected a checkpoint, a folder or a .safetensors file, found "
             f"nothing"))
    folder = part_folder(path, part)
    files = shards(folder) if path.is_dir() else [path]
    file = folder / "config.json"
    config = read_json_object(file) if file.is_file() else {}
    for prefix in ("", layouts.PREFIXES[part]):
        tensors = Tensors(files, prefix)
        for naming, sign in layouts.SIGNS[part].items():
            if sign in tensors:
                return tensors, config, naming
    begins = Counter(".".join(key.split(".")[:2]) for key in Tensors(files).file)
    raise UserError(f"{files[0]}: no {layouts.TITLES[part]} in it; its tensors begin with "
                    f"{', '.join(name for name, _ in begins.most_common(4))}")


def named(path: str | Path, part: str) -> tuple[Tensors, dict, str]:
    """Find a "vae" or "t5"; an error names the flag."""
    try:
        return find(path, part)
    except UserError as error:
        raise UserError(f"{error}; name the right one with --{part}")


def vae_sizes(path: str | Path) -> VAEConfig:
    """Read an autoencoder's sizes from file headers.  Raises UserError."""
    return layouts.vae_config(*named(path, "vae"))


def t5_sizes(path: str | Path) -> T5Config:
    """Read T5's sizes from file headers.  Raises UserError."""
    return layouts.t5_config(*named(path, "t5"))


class Uninitialized(TorchFunctionMode):
    """Leaves parameters as made: to fill them on the meta device torch imports its compiler, for a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == nn.init.__name__:
            return [*args, *(kwargs or {}).values()][0]
        return function(*args, **(kwargs or {}))


def build(make: Callable[[], nn.Module], where: Path) -> nn.Module:
    """Make a module without memory; sizes that no model can have are the file's mistake."""
    try:
        with torch.device("meta"), Uninitialized():
            return make()
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{where}: no model has these sizes ({error})")


def read_config(path: str | Path) -> dict:
    """Read config.json of a folder of ours, with "mmdit" as an MMDiTConfig.  Raises UserError."""
    file = Path(path) / "config.json"
    config = read_json_object(file)
    if config.get("format") != FORMAT or not isinstance(config.get("mmdit"), dict):
        raise UserError(f"{file}: expected \"format\": \"{FORMAT}\", found {config.get('format')!r}")
    kinds = dict(pixels=int, buckets=bool, text_length=int, step=int, latents=str, t5=str, vae=str)
    for name in kinds.keys() & config.keys():
        require((type(config[name]) in (kinds[name], type(None)), f"{file}: \"{name}\" is "
                 f"{config[name]!r}, expected {kinds[name].__name__}"))
    return config | {"mmdit": layouts.own_config(config["mmdit"], file)}


def read_sizes(path: str | Path) -> tuple[str, MMDiTConfig]:
    """Read a transformer's family, "ours", "D-DiT" or "SD3", and its sizes from file headers."""
    if is_ours(Path(path)):
        return "ours", read_config(path)["mmdit"]
    tensors, config, naming = find(path, "transformer")
    return layouts.family(tensors), layouts.mmdit_config(tensors, config, naming)


def own_weights(path: str | Path, training: bool) -> Path:
    """The averaged weights of a folder of ours or, to train on, the float32 ones that a run leaves."""
    weights = Path(path) / "weights.safetensors"
    return weights if training and weights.exists() else Path(path) / "model.safetensors"


def load_mmdit(path: str | Path, dtype: torch.dtype = torch.float32, vocab_size: int = 32100,
               training: bool = False) -> MMDiT:
    """Load the transformer of any layout, in eval mode, on the CPU.

    vocab_size: rows of the new text head when the weights are SD3's (T5's tokenizer has 32100).
    Tensors stored in `dtype` stay mapped to the file: it must not be written to.  Raises UserError."""
    path = Path(path)
    if not is_ours(path):
        model, tensors, entries = published(path, vocab_size)
        ignore = layouts.POOLED if layouts.family(tensors) == "SD3" else ()
        fill(model, tensors, entries, dtype, ignore)
        return model.eval()
    config = read_config(path)["mmdit"]
    tensors = Tensors([own_weights(path, training)], "mmdit.")
    blocks = tensors.count("blocks.")                            # a model of a million would take hours
    require((config.depth == blocks, f"{path / 'config.json'}: \"depth\" is {config.depth}, "
             f"{tensors.files[0].name} has {blocks} blocks"))
    model = build(lambda: MMDiT(config), path / "config.json")
    if "positions" in tensors:          # a table that came with published weights, in their precision
        fill(model, tensors, layouts.own_entries(model, "positions"), dtype)
    else:
        fill(model, tensors, layouts.own_entries(model), dtype)
        table = position_table(config.width, config.position_size, config.position_base)
        model.positions = table.to(dtype)
    return model.eval()


def published(path: Path, vocab_size: int) -> tuple[MMDiT, Tensors, dict[str, Entry]]:
    """Return a published transformer without memory, its tensors, and where each part is in them."""
    tensors, config, naming = find(path, "transformer")
    sizes = layouts.mmdit_config(tensors, config, naming, vocab_size)
    model = build(lambda: MMDiT(sizes), tensors.files[0])
    return model, tensors, layouts.mmdit_entries(model, layouts.family(tensors), naming)


def carried_over(path: str | Path, vocab_size: int) -> str:
    """Count the values that D-DiT takes from SD3's transformer, and those that start fresh."""
    _, _, entries = published(Path(path), vocab_size)
    titles = dict(txt_out="text head", null_image="null image", blocks="the last block's text stream")
    kept, fresh = 0, Counter()
    for name, entry in entries.items():
        kept += math.prod(entry.shape) * len(entry.keys)
        if entry.fresh is not None:
            fresh[titles[name.split(".")[0]]] += entry.fresh.numel()
    parts = ", ".join(f"{title} {count:,}" for title, count in fresh.items())
    return f"{kept:,} values carried over; fresh: {parts}"


def learnt_mask(path: str | Path) -> Tensor | None:
    """Read the [MASK] embedding (E,) that a run of ours trains, if it does; not its average."""
    weights = own_weights(path, True)
    if not weights.exists():
        return None
    tensors = Tensors([weights], "mask.")
    return tensors.read("vector", torch.float32) if "vector" in tensors else None


def load_embedding(path: str | Path, dtype: torch.dtype = torch.float32,
                   training: bool = False) -> TokenEmbedding:
    """Load the end-to-end variant's token embedding, in eval mode.  Raises UserError."""
    config = read_config(path)["mmdit"]
    sizes = config.vocab_size, config.text_length, config.text_width
    embedding = build(lambda: TokenEmbedding(*sizes), path)
    tensors = Tensors([own_weights(path, training)], "embedding.")
    fill(embedding, tensors, layouts.own_entries(embedding), dtype)
    return embedding.eval()


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL | Pixels:
    """Load what turns images into latents and back, in eval mode.  Raises UserError."""
    if is_ours(Path(path)):
        latents = read_config(path).get("latents")
        require((latents == "pixels", f"{path}: \"latents\" is {latents!r}; name its autoencoder"))
        return Pixels()
    tensors, config, naming = find(path, "vae")
    vae = build(lambda: AutoencoderKL(layouts.vae_config(tensors, config, naming)), tensors.files[0])
    fill(vae, tensors, layouts.vae_entries(vae, naming), dtype)
    return vae.eval()


def digest(model: nn.Module | Pixels) -> str:
    """Hash all values of a model, in the type that they have; "pixels" has none."""
    if isinstance(model, Pixels):
        return "pixels"
    hashed = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()[:16]


def load_t5(path: str | Path, dtype: torch.dtype = torch.float32) -> T5Encoder:
    """Load the T5 encoder, in eval mode.  Raises UserError."""
    require((not is_ours(Path(path)), f"{path}: no T5 encoder in it; name its file or folder"))
    tensors, config, naming = find(path, "t5")
    t5 = build(lambda: T5Encoder(layouts.t5_config(tensors, config, naming)), tensors.files[0])
    entries = layouts.t5_entries(t5, layouts.t5_table(tensors))
    fill(t5, tensors, entries, dtype, layouts.BESIDE_T5)
    return t5.eval()


def load_mask_embedding(path: str | Path, width: int | None = None) -> Tensor:
    """Read the aligned [MASK] embedding, one vector (E,): a .safetensors or a .pth that holds one tensor.

    width: E, if it is known.  A .pth is unpickled with weights_only.  Raises UserError."""
    path = Path(path)
    content = read_any(path, lambda error: f"not a file of one tensor ({str(error).splitlines()[0]})")
    tensors = list(content.values()) if isinstance(content, dict) else [content]
    [vector] = tensors if len(tensors) == 1 else [None]
    require((isinstance(vector, Tensor) and vector.numel() == max(vector.shape, default=0),
             f"{path}: expected one vector, the [MASK] embedding"))
    row = len(vector.flatten())
    require((finite(vector), f"{path}: the [MASK] embedding holds NaN or infinity"),
            (width in (None, row), f"{path}: a [MASK] embedding of {row} numbers, this T5 has {width}"))
    return vector.detach().flatten()


def check_text_encoder(path: str | Path, tokenizer: Tokenizer, width: int | None = None) -> None:
    """Raise UserError, from T5's headers, where it lacks rows for the tokenizer's ids, or its states
    have not the `width` that the transformer reads."""
    sizes, ids = t5_sizes(path), tokenizer.vocab_size
    require((ids <= sizes.vocab_size, f"{path}: T5's table has {sizes.vocab_size} rows, the tokenizer {ids} "
             f"tokens; name T5's own with --tokenizer"),
            (width in (None, sizes.width), f"{path}: T5 gives {sizes.width} numbers a token, the transformer "
             f"reads {width}"))


def load_text_encoder(path: str | Path, dtype: torch.dtype, tokenizer: Tokenizer, width: int | None = None,
                      vector: Tensor | None = None) -> T5Encoder:
    """Load a T5 that fits (`check_text_encoder`), with `vector` (E,), if any, as its [MASK] embedding."""
    check_text_encoder(path, tokenizer, width)
    encoder = load_t5(path, dtype)
    if vector is not None:
        encoder.set_embedding(tokenizer.mask_id, vector)
    return encoder


def load_autoencoder(path: str | Path, channels: int) -> AutoencoderKL | Pixels:
    """Load it in float32, for it is one percent of the whole.  Raises UserError where a transformer on
    latents of so many channels can't use it."""
    autoencoder = load_vae(path)
    require((autoencoder.channels == channels, f"{path}: latents of {autoencoder.channels} channels, the "
             f"transformer has {channels}; name the right one with --vae"))
    return autoencoder


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer in a folder of any layout or a tokenizer.json, or "gpt2".  Raises UserError."""
    if str(path) == "gpt2":
        return gpt2_tokenizer()
    path = Path(path)
    require((not is_safetensors(path), f"{path}: a safetensors file has no tokenizer; name a folder or a "
             f"tokenizer.json with --tokenizer"))
    if path.is_dir():
        folder = part_folder(path, "tokenizer")
        path = folder / "tokenizer.json"
        require((path.exists(), f"{folder}: expected tokenizer.json, found {listing(folder)}; fetch that "
                 f"of T5 v1.1 XXL, and name it with --tokenizer"))
    content = read_json_object(path)
    if "model" in content:
        return t5_tokenizer(path)
    if content.get("tokenizer") != "gpt2":
        raise UserError(f"{path}: expected \"tokenizer\": \"gpt2\" or T5's tokenizer.json, "
                        f"found {content.get('tokenizer')!r}")
    lists = {name: content[name] for name in ("keep", "seen", "capitals") if content.get(name) is not None}
    try:
        return gpt2_tokenizer(**lists)
    except (TypeError, UserError) as error:
        raise UserError(f"{path}: {error}")


def save(folder: Path, tensors: dict[str, Tensor], mmdit: MMDiTConfig, tokenizer: Tokenizer,
         dtype: torch.dtype = torch.float32, gather: Callable[[Tensor], Tensor] = Tensor.detach,
         **more) -> None:
    """Write a checkpoint folder of ours; `more` goes into config.json.  Each file is replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors, dtype, gather)
    write_json(folder / "config.json", {"format": FORMAT, "mmdit": asdict(mmdit), "latents": "pixels"} | more)
    for name, content in tokenizer.files().items():
        write_text(folder / name, content)


def check_config(mmdit: MMDiTConfig) -> None:
    """Raise UserError if a checkpoint's config.json with these sizes could not be read back as the same."""
    try:
        again = layouts.own_config(json.loads(json.dumps(asdict(mmdit))), Path("config.json"))
    except TypeError as error:                                   # a field that is no text, number or list
        raise UserError(f"MMDiTConfig: config.json can't hold it ({error})")
    require((again == mmdit, f"MMDiTConfig: config.json would turn {mmdit} into {again}"))


# ------------------------------------------------------------------------------------------- the commands

def export(source: Path, target: Path, layout: str = "release", tokenizer: Path | None = None) -> None:
    """Write any layout's transformer as a folder that its published pipeline loads, in its stored dtype,
    a run's averaged weights.  The autoencoder and T5 come from the release or from SD3.

    layout: "release", D-DiT's; or "sd3", without what D-DiT added, and with SD3's pooled CLIP branch at
    zero: the same velocity.  A learned [MASK] embedding comes along as a file.  Raises UserError."""
    require((not target.exists() or not any(target.iterdir()), f"{target}: expected an empty folder"))
    if is_ours(source):
        sizes = read_config(source)["mmdit"]
        require((sizes.predicts == "velocity", f"{source}: its image head predicts {sizes.predicts}, the "
                 f"published layouts' a velocity"),
                (not sizes.text_length, f"{source}: its text comes from a token embedding; the published "
                 f"layouts are made for T5"))
        tensors = Tensors([source / "model.safetensors"], "mmdit.")
    else:
        tensors, _, _ = find(source, "transformer")
    stored = Counter(tensors.dtype.values()).most_common(1)[0][0]
    dtype = next((dtype for dtype, name in NAMES.items() if name == stored), torch.float32)
    model = load_mmdit(source, dtype)
    write_folder(model, target, layout, dtype, tokenizer or part_folder(source, "tokenizer"),
                 source / MASK_EMBEDDING)


def inspect(path: Path) -> str:
    """Return layout, parts, sizes, dtypes and parameter counts, a screenful."""
    if is_ours(path):
        config, tensors = read_config(path), Tensors([path / "model.safetensors"], "mmdit.")
        return (f"{path}: ours, latents {config.get('latents')}, step {config.get('step')}\n"
                + describe("transformer", tensors, config["mmdit"]))
    sizes = dict(transformer=layouts.mmdit_config, vae=layouts.vae_config, t5=layouts.t5_config)
    lines, absent = [f"{path}:"], []
    for name in sizes:
        try:
            tensors, config, naming = find(path, name)
        except UserError as error:
            absent.append(f"{name}: {error}")
            continue
        title = layouts.TITLES[name]
        if name == "transformer":
            title = f"{layouts.family(tensors)} transformer"
        lines.append(describe(title, tensors, sizes[name](tensors, config, naming)))
    require((len(absent) < len(sizes), absent and absent[0].removeprefix("transformer: ")))
    return "\n".join(lines + absent)


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("command", choices=["inspect", "export"])
    parser.add_argument("source", type=Path, help="a folder or a file of any layout")
    parser.add_argument("target", type=Path, nargs="?", help="export: the new folder")
    parser.add_argument("--layout", choices=["release", "sd3"], default="release")
    parser.add_argument("--tokenizer", type=Path, help="export: a folder with T5's tokenizer, if not in SRC")
    args = parser.parse_args()
    if (args.target is None) == (args.command == "export"):
        parser.error("export takes SRC and DST" if args.command == "export" else "inspect takes one path")
    if args.command == "export":
        export(args.source, args.target, args.layout, args.tokenizer)
    print(args.target or inspect(args.source))


if __name__ == "__main__":
    cli.run(main)
