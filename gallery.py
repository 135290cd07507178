"""A folder of drawings: one PNG for each, numbered, with all that made it in its text fields.

    jobs = [("red apple, noto style", 0), ("snowman, noto style", 0)]      # (prompt, seed)
    fill(parts, jobs, Path("drawn"), steps=28)                             # drawn/00000.png, drawn/00001.png

A number whose file is there is skipped, so that what was stopped goes on; a file is there whole or not at
all.
"""

import hashlib
import inspect
from pathlib import Path

from torch import Tensor

import drawing
from cli import require
from parts import Parts
from pictures import text_fields, to_picture, write_png


DEFAULTS = {name: inspect.signature(drawing.drawings).parameters[name].default
            for name in ("steps", "solver", "rule", "interval", "zero", "negative")}


def digest_of(*tensors: Tensor | None) -> str:
    """Of the values of what a drawing begins with."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(b"" if x is None else x.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def described(parts: Parts, jobs: list[tuple[str, int]], how: dict) -> list[dict[str, str]]:
    """The text fields of each drawing; `how`: what drawing.drawings is told of the walk."""
    guidance, shift = (how.get(name, parts.defaults[name]) for name in ("guidance", "shift"))
    given = {name: how.get(name, default) for name, default in DEFAULTS.items()}
    if edit := how.get("edit"):
        given |= dict(strength=edit.strength, over=digest_of(edit.latents, edit.mask))
    same = given | dict(guidance=guidance, shift=shift, size=f"{parts.width}x{parts.height}",
                        dtype=str(parts.dtype).removeprefix("torch."), checkpoint=parts.digest())
    return [dict(prompt=prompt, seed=str(seed)) | {name: str(value) for name, value in same.items()}
            for prompt, seed in jobs]


def fill(parts: Parts, jobs: list[tuple[str, int]], folder: Path, **how) -> int:
    """Draw what is missing; returns how many were there.  Raises UserError for a file that shows another
    drawing than it should, before anything is drawn."""
    require((folder.is_dir() or not folder.exists(), f"{folder}: is a file, expected a folder"))
    folder.mkdir(exist_ok=True)
    paths, fields = [folder / f"{i:05}.png" for i in range(len(jobs))], described(parts, jobs, how)
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    for path, wanted in zip(paths, fields):
        found = text_fields(path) if path.exists() else wanted
        for name in wanted | found:
            was, asked = found.get(name), wanted.get(name)
            require((was == asked, f"{path}: was drawn with {name} {was!r}, asked for is {asked!r}; name "
                     f"another folder, or remove it"))
    if missing:
        pictures = drawing.drawings(parts, [jobs[i][0] for i in missing], seed=[jobs[i][1] for i in missing],
                                    **how)
        for i, picture in zip(missing, pictures):
            write_png(paths[i], to_picture(picture), fields[i])
    return len(jobs) - len(missing)
