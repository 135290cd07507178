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

import cli
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

import layouts
from cli import UserError, require
from files import read_json_object, write_json, write_text
from layouts import Entry
from model import MMDiT, MMDiTConfig, TokenEmbedding, position_table
from t5 import T5Config, T5Encoder
from tensors import FLOATS, Tensors, finite, is_safetensors, write_tensors
from tokenizer import Tokenizer, gpt2_tokenizer, t5_tokenizer
from vae import AutoencoderKL, Pixels, VAEConfig

FORMAT = "dual-diffusion-transformer"
MASK_EMBEDDING = "mask_embedding.safetensors"      # T5's [MASK] row, where a checkpoint has its own


def fill(module: nn.Module, tensors: Tensors, entries: dict[str, Entry], dtype: torch.dtype,
         ignore: tuple[str, ...] = ()) -> None:
    """Put tensors into a module that was built on the meta device; the entries name each of its parameters.
    Raises UserError with every missing, left-over, misshapen or non-finite tensor in one message."""
    where = lambda key: f"{tensors.file.get(key, tensors.files[0]).name}: {tensors.prefix}{key}"
    shapes = {key: entry.shape for entry in entries.values() for key in entry.keys}
    problems = [f"{where(key)} is missing" for key in shapes if key not in tensors]
    problems += [f"{where(key)} is {tensors.shape[key]}, this model's sizes ask for {shape}"
                 for key, shape in shapes.items() if tensors.shape.get(key, shape) != shape]
    problems += [f"{where(key)} is not a part of this model" for key in tensors.file
                 if key not in shapes and not key.startswith(ignore)]
    problems += [f"{where(key)} has numbers of type {tensors.dtype[key]}, expected floats" for key in shapes
                 if tensors.dtype.get(key, "F32") not in FLOATS]
    if not problems:
        buffers, state = dict(module.named_buffers()), {}
        wanted = module.state_dict() | buffers
        for name, entry in entries.items():
            pieces = [tensors.read(key, dtype) for key in entry.keys]
            problems += [f"{where(key)} holds NaN or infinity"
                         for key, piece in zip(entry.keys, pieces) if not finite(piece)]
            if entry.swap:
                pieces = [half for piece in pieces for half in piece.chunk(2)[::-1]]
            if entry.fresh is not None:
                pieces.append(entry.fresh.to(dtype))
            whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            state[name] = whole.reshape(wanted[name].shape)
        tensors.handle = None
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"{tensors.files[0].parent}/{'; '.join(sorted(problems)[:4])}{more}")
    for name in buffers.keys() & state.keys():
        setattr(module, name, state.pop(name))
    module.load_state_dict(state, assign=True)


def part_folder(path: Path, part: str) -> Path:
    """The folder of a part inside a checkpoint, or the path itself where there is none."""
    return next((path / name for name in layouts.SUBFOLDERS[part] if (path / name).is_dir()), path)


def listing(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"


def kind(path: Path) -> str:
    """"file", "ours" (a folder with a config.json that neither diffusers nor transformers wrote, so that what
    is wrong with it is told as ours), or "published"."""
    if not path.is_dir():
        return "file"
    if (path / "transformer").is_dir() or not (path / "config.json").exists():
        return "published"
    theirs = {"_class_name", "model_type", "architectures"} & read_json_object(path / "config.json").keys()
    return "published" if theirs else "ours"


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a part's folder: those that an index names, or the only one.  Raises UserError
    when there is none, when an index names one that is missing, or when the choice is not clear."""
    shortest, lacking = lambda path: (len(path.name), path.name), ""
    for index in sorted(folder.glob("*.safetensors.index*.json"), key=shortest):
        table = read_json_object(index).get("weight_map")
        names = sorted(set(map(str, table.values()))) if isinstance(table, dict) else []
        absent = [name for name in names if "/" in name or not (folder / name).exists()]
        if names and not absent:
            return [folder / name for name in names]
        lacking = lacking or f"{folder}: {index.name} names {(absent or ['no file'])[0]}, which is missing"
    if lacking:
        raise UserError(f"{lacking}; download it again")
    files = sorted(filter(is_safetensors, folder.iterdir()), key=shortest)
    if not files:
        raise UserError(f"{folder}: expected .safetensors files, found {listing(folder)}")
    plain = [f for f in files if f.name in ("model.safetensors", "diffusion_pytorch_model.safetensors")]
    if len(files) > 1 and not plain:
        raise UserError(f"{folder}: {len(files)} safetensors files, expected an index that names some")
    return plain or files


def find(path: str | Path, part: str) -> tuple[Tensors, dict | None, str]:
    """(tensors, config.json or None, naming "file" or "folder") of the transformer, vae or t5 in a path.
    Raises UserError, saying what was found, when it holds no such part."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: expected a checkpoint, a folder or a .safetensors file, found nothing")
    folder, wanted = part_folder(path, part), " or ".join(layouts.SUBFOLDERS[part])
    if folder == path and path.is_dir() and not any(
            is_safetensors(file) or ".safetensors.index" in file.name for file in path.iterdir()):
        raise UserError(f"{path}: expected a folder {wanted} with safetensors, found {listing(path)}")
    files = shards(folder) if path.is_dir() else [path]
    config = read_json_object(folder / "config.json") if (folder / "config.json").is_file() else None
    for prefix in ("", layouts.PREFIXES[part]):
        tensors = Tensors(files, prefix)
        for naming, sign in layouts.SIGNS[part].items():
            if sign in tensors:
                layouts.check_kind(tensors)
                return tensors, config, naming
    begins = Counter(".".join(key.split(".")[:2]) for key in Tensors(files).file)
    raise UserError(f"{files[0]}: no {layouts.TITLES[part]} in it; its tensors begin with "
                    f"{', '.join(name for name, _ in begins.most_common(4)) or 'nothing, it is empty'}")


def named(path: str | Path, part: str) -> tuple[Tensors, dict | None, str]:
    """As `find`, of a "vae" or "t5" that a flag of this name would name."""
    try:
        return find(path, part)
    except UserError as error:
        raise UserError(f"{error}; name the right one with --{part}")


def holds(path: str | Path, part: str) -> bool:
    """Whether `find` finds it."""
    try:
        return bool(find(path, part))
    except UserError:
        return False


def vae_sizes(path: str | Path) -> VAEConfig:
    """Of the autoencoder in a path, from file headers alone.  Raises UserError."""
    return layouts.vae_config(*named(path, "vae"))


def t5_sizes(path: str | Path) -> T5Config:
    """As `vae_sizes`, of T5."""
    return layouts.t5_config(*named(path, "t5"))


class Uninitialized(TorchFunctionMode):
    """Leaves parameters as made: to fill them on the meta device torch imports its compiler, for a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == nn.init.__name__:
            return [*args, *(kwargs or {}).values()][0]
        return function(*args, **(kwargs or {}))


def build(make: Callable[[], nn.Module], where: Path) -> nn.Module:
    """A module without memory; sizes that no model can have are the file's mistake."""
    try:
        with torch.device("meta"), Uninitialized():
            return make()
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{where}: no model has these sizes ({error})")


def read_config(path: str | Path) -> dict:
    """config.json of a folder of ours, with "mmdit" as an MMDiTConfig.  Raises UserError, naming the file."""
    if not Path(path).is_dir():
        found = "a file" if Path(path).exists() else "nothing"
        raise UserError(f"{path}: expected a checkpoint folder, found {found}")
    file = Path(path) / "config.json"
    config = read_json_object(file)
    if config.get("format") != FORMAT or not isinstance(config.get("mmdit"), dict):
        raise UserError(f"{file}: expected \"format\": \"{FORMAT}\", found {config.get('format')!r}")
    known = dict(pixels=int, buckets=bool, text_length=int, step=int, latents=str, t5=str, vae=str)
    for name in known.keys() & config.keys():
        require((type(config[name]) in (known[name], type(None)), f"{file}: \"{name}\" is {config[name]!r}, "
                 f"expected {known[name].__name__}"))
    return config | {"mmdit": layouts.own_config(config["mmdit"], file)}


def read_sizes(path: str | Path, vocab_size: int = 32100) -> tuple[str, MMDiTConfig]:
    """What the transformer in a path is, from file headers alone: ("ours", "D-DiT" or "SD3", its sizes)."""
    path = Path(path)
    if kind(path) == "ours":
        return "ours", read_config(path)["mmdit"]
    tensors, config, naming = find(path, "transformer")
    family = "D-DiT" if "text_proj_out.weight" in tensors else "SD3"
    return family, layouts.mmdit_config(tensors, config, naming, vocab_size)


def own_weights(path: str | Path, training: bool) -> Path:
    """The averaged weights of a folder of ours or, to train on, the float32 ones that a run leaves."""
    weights = Path(path) / "weights.safetensors"
    return weights if training and weights.exists() else Path(path) / "model.safetensors"


def load_mmdit(path: str | Path, dtype: torch.dtype = torch.float32, vocab_size: int = 32100,
               training: bool = False) -> MMDiT:
    """The transformer of any layout, in eval mode, on the CPU.

    vocab_size: rows of the new text head when the weights are SD3's (T5's tokenizer has 32100).  Tensors that
    are stored in `dtype` stay mapped to the file: it must not be written to.  Raises UserError."""
    path = Path(path)
    if kind(path) == "ours":
        config, tensors = read_config(path)["mmdit"], Tensors([own_weights(path, training)], "mmdit.")
        blocks = tensors.count("blocks.")                        # a model of a million would take hours
        require((config.depth == blocks, f"{path / 'config.json'}: \"depth\" is {config.depth}, "
                 f"{tensors.files[0].name} has {blocks} blocks"))
        model = build(lambda: MMDiT(config), path / "config.json")
        stored = "positions" in tensors     # a table that came with published weights, in their precision
        fill(model, tensors, layouts.own_entries(model, *["positions"] * stored), dtype)
        if not stored:
            table = position_table(config.width, config.position_size, config.position_base)
            model.positions = table.to(dtype)
        return model.eval()
    model, tensors, entries = published(path, vocab_size)
    fill(model, tensors, entries, dtype, () if "text_proj_out.weight" in tensors else layouts.POOLED)
    return model.eval()


def published(path: Path, vocab_size: int) -> tuple[MMDiT, Tensors, dict[str, Entry]]:
    """(a transformer of a published one's sizes, without memory, its tensors, where each part is in them)."""
    tensors, config, naming = find(path, "transformer")
    from_sd3 = "text_proj_out.weight" not in tensors
    sizes = layouts.mmdit_config(tensors, config, naming, vocab_size)
    model = build(lambda: MMDiT(sizes), tensors.files[0])
    table = layouts.SD3_FILE if naming == "file" else layouts.SD3_FOLDER if from_sd3 else layouts.RELEASE
    return model, tensors, layouts.mmdit_entries(model, table, from_sd3)


def carried_over(path: str | Path, vocab_size: int) -> str:
    """What of SD3's transformer D-DiT goes on with, and what starts fresh, in numbers of values."""
    _, tensors, entries = published(Path(path), vocab_size)
    titles, new = {"txt_out": "text head", "null_image": "null image"}, Counter()
    for name, entry in entries.items():
        new[titles.get(name.split(".")[0], "the last block's text output, MLP and gates")] += (
            0 if entry.fresh is None else entry.fresh.numel())
    kept = sum(math.prod(entry.shape) for entry in entries.values() for _ in entry.keys)
    left = sum(math.prod(shape) for name, shape in tensors.shape.items() if name.startswith(layouts.POOLED))
    return (f"{kept:,} values carried over; fresh: "
            + ", ".join(f"{what} {count:,}" for what, count in new.items())
            + f"; left out: the pooled CLIP branch {left:,}")


def learnt_mask(path: str | Path) -> Tensor | None:
    """The [MASK] embedding (E,) that a run of ours has learnt, or goes on with: not its average."""
    weights = own_weights(path, True)
    if not weights.exists():
        return None
    tensors = Tensors([weights], "mask.")
    return tensors.read("vector", torch.float32) if "vector" in tensors else None


def load_embedding(path: str | Path, dtype: torch.dtype = torch.float32,
                   training: bool = False) -> TokenEmbedding:
    """The end-to-end variant's token embedding, in eval mode.  Raises UserError where text comes from T5."""
    config = read_config(path)["mmdit"]
    if not config.text_length:
        raise UserError(f"{path}: this checkpoint has no token embedding of its own (text_length is 0)")
    sizes = config.vocab_size, config.text_length, config.text_width
    embedding = build(lambda: TokenEmbedding(*sizes), path)
    tensors = Tensors([own_weights(path, training)], "embedding.")
    fill(embedding, tensors, layouts.own_entries(embedding), dtype)
    return embedding.eval()


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL | Pixels:
    """What turns pictures into latents and back, in eval mode.  Raises UserError."""
    if kind(Path(path)) == "ours":
        latents = read_config(path).get("latents")
        if latents != "pixels":
            raise UserError(f"{path}: \"latents\" is {latents!r}; name the file of its autoencoder")
        return Pixels()
    tensors, config, naming = find(path, "vae")
    vae = build(lambda: AutoencoderKL(layouts.vae_config(tensors, config, naming)), tensors.files[0])
    fill(vae, tensors, layouts.vae_entries(vae, naming), dtype)
    return vae.eval()


def digest(model: nn.Module | Pixels) -> str:
    """Of all values of a model, in the type that they have; "pixels" of one that has none."""
    if isinstance(model, Pixels):
        return "pixels"
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def load_t5(path: str | Path, dtype: torch.dtype = torch.float32) -> T5Encoder:
    """The T5 encoder, in eval mode.  Raises UserError."""
    if kind(Path(path)) == "ours":
        raise UserError(f"{path}: no T5 encoder in it; name its file or folder")
    tensors, config, naming = find(path, "t5")
    where, table, twin = tensors.files[0], layouts.t5_table(tensors), layouts.T5_TWIN
    t5 = build(lambda: T5Encoder(layouts.t5_config(tensors, config, naming)), where)
    twice = table != twin and twin in tensors
    if twice and not torch.equal(tensors.read(table), tensors.read(twin)):
        raise UserError(f"{where}: {table} and {twin} differ, expected one table under two names")
    fill(t5, tensors, layouts.t5_entries(t5, table), dtype, layouts.DECODER + (twin,) * twice)
    return t5.eval()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """"gpt2", or the tokenizer in a folder of any layout, or a tokenizer.json.  Raises UserError."""
    if str(path) == "gpt2":
        return gpt2_tokenizer()
    path = Path(path)
    if path.is_dir():
        folder = part_folder(path, "tokenizer")
        path = folder / "tokenizer.json"
        if not path.exists() and kind(folder) != "ours":
            raise UserError(f"{folder}: expected tokenizer.json, found {listing(folder)}; fetch that of T5 "
                            f"v1.1 XXL, or of the tokenizer_3 folder of Stable Diffusion 3")
    elif is_safetensors(path):
        raise UserError(f"{path}: a safetensors file has no tokenizer; name a folder or a tokenizer.json")
    content = read_json_object(path)
    if "model" in content:
        return t5_tokenizer(path)
    if content.get("tokenizer") != "gpt2":
        raise UserError(f"{path}: expected \"tokenizer\": \"gpt2\" or T5's tokenizer.json, "
                        f"found {content.get('tokenizer')!r}")
    known = {name: content[name] for name in ("keep", "seen", "capitals") if content.get(name) is not None}
    for name, values in known.items():
        each = str if name == "capitals" else int
        require((isinstance(values, list) and all(type(value) is each for value in values),
                 f"{path}: \"{name}\" is {str(values)[:40]}, expected a list of {each.__name__}"))
    return gpt2_tokenizer(**known)


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


def main() -> None:
    import publish                                               # here: its commands read through this file
    publish.main(__doc__)


if __name__ == "__main__":
    cli.run(main)
