"""A folder of drawings: one PNG for each, with all that made it in its text fields.

    jobs = [("red apple, noto style", 0), ("snowman, noto style", 0)]      # (prompt, seed)
    fill(parts, jobs, Path("drawn"), steps=28)          # drawn/00000.png, drawn/00001.png

A file that is there is skipped, so that what was stopped goes on; a file is there whole or not at
all. Several processes share the work: each looks for what is `missing` among its part, and draws a
part of that.
"""

import hashlib
import inspect
import itertools
from pathlib import Path
from typing import Iterable, Iterator

from common.cli import require
from dataset.images import text_fields, write_png
from inference import text_to_image
from inference.parts import Parts
from viz.grids import grid

Jobs = list[tuple[str, int]]

DEFAULTS = {name: inspect.signature(text_to_image.drawings).parameters[name].default
            for name in ("steps", "solver", "interval", "negative")}


def settings(parts: Parts, **how) -> dict[str, str]:
    """Return what all drawings of a folder share; how: the keywords of text_to_image.drawings."""
    shared = {name: how.get(name, default) for name, default in DEFAULTS.items()}
    if edit := how.get("edit"):
        tensors = [edit.latents] if edit.mask is None else [edit.latents, edit.mask]
        content = b"".join(x.cpu().contiguous().numpy().tobytes() for x in tensors)
        shared.update(strength=edit.strength, over=hashlib.sha256(content).hexdigest()[:16])
    for name in ("guidance", "shift"):
        shared[name] = how.get(name, parts.defaults[name])
    shared.update(size=f"{parts.width}x{parts.height}", checkpoint=parts.digest(),
                  dtype=str(parts.dtype).removeprefix("torch."))
    return {name: str(value) for name, value in shared.items()}


def fields(job: tuple[str, int], each: int, shared: dict[str, str]) -> dict[str, str]:
    """Return the text fields of a file: it shows `each` drawings, of its seed and the next ones."""
    prompt, seed = job
    seeds = map(str, range(seed, seed + each))
    return dict(prompt=prompt, seed=" ".join(seeds)) | shared


def missing(jobs: Jobs, names: list[str], folder: Path, among: Iterable[int],
            shared: dict[str, str], each: int = 1) -> list[int]:
    """Return those `among` the jobs that have no file.  Raises UserError for one that shows another
    drawing than it should."""
    lacking = []
    for i in among:
        path = folder / names[i]
        if not path.exists():
            lacking.append(i)
            continue
        wanted, written = fields(jobs[i], each, shared), text_fields(path)
        for name in wanted | written:
            old, new = written.get(name), wanted.get(name)
            require((old == new, f"{path}: was drawn with {name} {old!r}, asked for is {new!r}; "
                     f"name another folder, or remove it"))
    return lacking


def draw(parts: Parts, jobs: Jobs, names: list[str], folder: Path, which: list[int],
         shared: dict[str, str], each: int = 1, **how) -> Iterator[int]:
    """Draw these jobs, and yield each one that is done; a file shows `each` drawings."""
    prompts, seeds = [], []
    for i in which:
        prompt, seed = jobs[i]
        prompts += [prompt] * each
        seeds += range(seed, seed + each)
    images = text_to_image.drawings(parts, prompts, seed=seeds, **how)
    for i in which:
        path = folder / names[i]
        path.parent.mkdir(parents=True, exist_ok=True)
        image = grid(itertools.islice(images, each), least=1, gap=0)
        write_png(path, image, fields(jobs[i], each, shared))
        yield i


def fill(parts: Parts, jobs: Jobs, folder: Path, **how) -> int:
    """Draw what is missing, by one process, and return how many files were there.

    Raises UserError for a file that shows another drawing than it should, before anything is
    drawn."""
    folder.mkdir(exist_ok=True)
    names = [f"{i:05}.png" for i in range(len(jobs))]
    shared = settings(parts, **how)
    lacking = missing(jobs, names, folder, range(len(jobs)), shared)
    for _ in draw(parts, jobs, names, folder, lacking, shared, **how):
        pass
    return len(jobs) - len(lacking)
