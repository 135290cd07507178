"""A transformer as a folder that its published pipeline loads, and what a person is told of a part."""

import shutil
import sys
from pathlib import Path

import torch

from common.files import write_json
from model import MMDiT
from pretrained import layouts
from pretrained.safetensors_io import Tensors, write_tensors


def write_folder(model: MMDiT, target: Path, layout: str, dtype: torch.dtype, tokenizer: Path,
                 mask_embedding: Path) -> None:
    """Write a transformer in `dtype`; the autoencoder and T5 come from the release or from SD3.

    layout: "release", D-DiT's; or "sd3", without what D-DiT added, and with SD3's pooled CLIP branch at
    zero: the same velocity.  tokenizer: a folder with T5's; mask_embedding: a file; both are copied where
    they exist."""
    place = target / ("tokenizer" if layout == "release" else "tokenizer_3")
    for folder in (target / "transformer", target / "scheduler", place):
        folder.mkdir(parents=True, exist_ok=True)
    file = target / "transformer" / "diffusion_pytorch_model.safetensors"
    write_tensors(file, layouts.published_state(model, layout), dtype)
    for name, content in layouts.published_files(model.config, layout).items():
        write_json(target / name, content)
    copies = {tokenizer / name: place / name for name in (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")}
    copies[mask_embedding] = target / mask_embedding.name
    for original, copy in copies.items():
        if original.exists():
            shutil.copyfile(original, copy)
    if not any(place.iterdir()):
        print(f"note: {tokenizer} has no tokenizer; put T5's into {place}", file=sys.stderr)


def describe(title: str, tensors: Tensors, sizes) -> str:
    """Return two lines on a part: how much there is of it, and its sizes, a dataclass."""
    fields = ", ".join(f"{name} {value}" for name, value in vars(sizes).items())
    return (f"{title}: {len(tensors.file)} tensors, {tensors.values() / 1e6:,.1f} M values, "
            f"{', '.join(set(tensors.dtype.values()))}, {len(tensors.files)} file(s)\n    {fields}")
