"""Checkpoints for people and for other programs: the commands of checkpoint.py, inspect and export."""

import shutil
import sys
from collections import Counter
from pathlib import Path

import torch

import checkpoint
import cli
import layouts
from checkpoint import find, is_ours, part_folder, read_config
from cli import UserError, require
from files import write_json
from tensors import NAMES, Tensors, write_tensors


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
    model = checkpoint.load_mmdit(source, dtype)
    place = target / ("tokenizer" if layout == "release" else "tokenizer_3")
    for folder in (target / "transformer", target / "scheduler", place):
        folder.mkdir(parents=True, exist_ok=True)
    file = target / "transformer" / "diffusion_pytorch_model.safetensors"
    write_tensors(file, layouts.published_state(model, layout), dtype)
    for name, content in layouts.published_files(model.config, layout).items():
        write_json(target / name, content)
    origin = tokenizer or part_folder(source, "tokenizer")
    copies = {origin / name: place / name for name in (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")}
    copies[source / checkpoint.MASK_EMBEDDING] = target / checkpoint.MASK_EMBEDDING
    for original, copy in copies.items():
        if original.exists():
            shutil.copyfile(original, copy)
    if not any(place.iterdir()):
        print(f"note: {origin} has no tokenizer; put T5's into {place}", file=sys.stderr)


def describe(title: str, tensors: Tensors, sizes) -> str:
    """Return two lines on a part: how much there is of it, and its sizes, a dataclass."""
    fields = ", ".join(f"{name} {value}" for name, value in vars(sizes).items())
    return (f"{title}: {len(tensors.file)} tensors, {tensors.values() / 1e6:,.1f} M values, "
            f"{', '.join(set(tensors.dtype.values()))}, {len(tensors.files)} file(s)\n    {fields}")


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


def main(doc: str) -> None:
    parser = cli.Parser(doc)
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
