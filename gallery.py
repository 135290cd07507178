"""A folder of drawings: one PNG for each, with all that made it in its text fields.

    jobs = [("red apple, noto style", 0), ("snowman, noto style", 0)]      # (prompt, seed)
    fill(parts, jobs, Path("drawn"), steps=28)                             # drawn/00000.png, drawn/00001.png

A file that is there is skipped, so that what was stopped goes on; a file is there whole or not at all.
Several processes share the work: each looks for what is `missing` among its part, and draws a part of that.
"""

import hashlib
import inspect
import math
from pathlib import Path
from typing import Iterable, Iterator

import torch
from torch import Tensor

import drawing
from cli import require
from parts import Parts
from pictures import text_fields, to_picture, write_png

Jobs = list[tuple[str, int]]

DEFAULTS = {name: inspect.signature(drawing.drawings).parameters[name].default
            for name in ("steps", "solver", "interval", "negative")}


def digest_of(*tensors: Tensor | None) -> str:
    """Of the values of what a drawing begins with."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(b"" if x is None else x.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def settings(parts: Parts, **how) -> dict[str, str]:
    """What all drawings of a folder share; `how`: what drawing.drawings is told of the walk."""
    guidance, shift = (how.get(name, parts.defaults[name]) for name in ("guidance", "shift"))
    given = {name: how.get(name, default) for name, default in DEFAULTS.items()}
    if edit := how.get("edit"):
        given |= dict(strength=edit.strength, over=digest_of(edit.latents, edit.mask))
    same = given | dict(guidance=guidance, shift=shift, size=f"{parts.width}x{parts.height}",
                        dtype=str(parts.dtype).removeprefix("torch."), checkpoint=parts.digest())
    return {name: str(value) for name, value in same.items()}


def seeds(seed: int, each: int) -> list[int]:
    """Of the `each` drawings that one file shows."""
    return [seed + i for i in range(each)]


def fields(job: tuple[str, int], each: int, shared: dict[str, str]) -> dict[str, str]:
    """The text fields of a file."""
    return dict(prompt=job[0], seed=" ".join(map(str, seeds(job[1], each)))) | shared


def numbered(jobs: Jobs) -> list[str]:
    return [f"{i:05}.png" for i in range(len(jobs))]


def missing(jobs: Jobs, names: list[str], folder: Path, among: Iterable[int], shared: dict[str, str],
            each: int = 1) -> list[int]:
    """Those `among` the jobs whose file isn't there.  Raises UserError for one that shows another drawing
    than it should."""
    lacking = []
    for i in among:
        path, wanted = folder / names[i], fields(jobs[i], each, shared)
        if not path.exists():
            lacking.append(i)
            continue
        found = text_fields(path)
        for name in wanted | found:
            was, asked = found.get(name), wanted.get(name)
            require((was == asked, f"{path}: was drawn with {name} {was!r}, asked for is {asked!r}; name "
                     f"another folder, or remove it"))
    return lacking


def tiled(pictures: list[Tensor]) -> Tensor:
    """Pictures (3, H, W) in rows without a gap, as square as their number allows: four as two by two."""
    columns = math.ceil(math.sqrt(len(pictures)))
    padded = pictures + [torch.ones_like(pictures[0])] * (-len(pictures) % columns)
    return torch.cat([torch.cat(padded[at:at + columns], 2) for at in range(0, len(padded), columns)], 1)


def draw(parts: Parts, jobs: Jobs, names: list[str], folder: Path, which: list[int], shared: dict[str, str],
         each: int = 1, **how) -> Iterator[int]:
    """Draw these jobs, and tell which one is done; each file shows `each` drawings, of its seed and the next
    ones."""
    many = [(jobs[i][0], seed) for i in which for seed in seeds(jobs[i][1], each)]
    pictures = drawing.drawings(parts, [prompt for prompt, _ in many], seed=[seed for _, seed in many], **how)
    for i in which:
        path = folder / names[i]
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = tiled([next(pictures) for _ in range(each)])
        write_png(path, to_picture(picture), fields(jobs[i], each, shared))
        yield i


def fill(parts: Parts, jobs: Jobs, folder: Path, **how) -> int:
    """Draw what is missing, by one process; returns how many were there.  Raises UserError for a file that
    shows another drawing than it should, before anything is drawn."""
    require((folder.is_dir() or not folder.exists(), f"{folder}: is a file, expected a folder"))
    folder.mkdir(exist_ok=True)
    names, shared = numbered(jobs), settings(parts, **how)
    lacking = missing(jobs, names, folder, range(len(jobs)), shared)
    for _ in draw(parts, jobs, names, folder, lacking, shared, **how):
        pass
    return len(jobs) - len(lacking)
