"""Write a transformer as a folder that the published pipeline loads; describe a checkpoint's part.
"""

import shutil
import sys
from pathlib import Path

import torch

from common.files import write_json
from model import MMDiT
from pretrained import layouts
from pretrained.safetensors_io import Tensors, write_tensors

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "spiece.model")


def write_folder(model: MMDiT, target: Path, layout: str, dtype: torch.dtype, shift: float,
                 tokenizer: Path, mask_embedding: Path) -> None:
    """Write a transformer in `dtype`, without the autoencoder and T5.

    layout: "release" or "sd3", see `checkpoint.export`.  shift: of the noise levels.  tokenizer: a
    folder with T5's tokenizer.  mask_embedding: a file.  Both are copied if they exist."""
    tokenizer_target = target / ("tokenizer" if layout == "release" else "tokenizer_3")
    for folder in (target / "transformer", target / "scheduler", tokenizer_target):
        folder.mkdir(parents=True, exist_ok=True)
    file = target / "transformer" / "diffusion_pytorch_model.safetensors"
    write_tensors(file, layouts.published_state(model, layout), dtype)
    for name, content in layouts.published_files(model.config, layout, shift).items():
        write_json(target / name, content)
    copies = {mask_embedding: target / mask_embedding.name}
    for name in TOKENIZER_FILES:
        copies[tokenizer / name] = tokenizer_target / name
    for original, copy in copies.items():
        if original.exists():
            shutil.copyfile(original, copy)
    if not any(tokenizer_target.iterdir()):
        print(f"note: {tokenizer} has no tokenizer; put T5's into {tokenizer_target}",
              file=sys.stderr)


def describe(title: str, tensors: Tensors, sizes) -> str:
    """Return two lines of text about a part: its tensors, and its sizes.  sizes: a dataclass."""
    dtypes = ", ".join(sorted(set(tensors.dtype.values())))
    fields = ", ".join(f"{name} {value}" for name, value in vars(sizes).items())
    return (f"{title}: {len(tensors.file)} tensors, {tensors.values() / 1e6:,.1f} M values, "
            f"{dtypes}, {len(tensors.files)} file(s)\n    {fields}")
