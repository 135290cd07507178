"""A folder of drawings: one PNG for each, numbered, with all that made it in its text fields.

    jobs = [("red apple, noto style", 0), ("snowman, noto style", 0)]      # (prompt, seed)
    fill(parts, jobs, Path("drawn"), steps=28)                             # drawn/00000.png, drawn/00001.png

A number whose file is there is skipped, so that what was stopped goes on; a file is there whole or not at
all.
"""

from pathlib import Path

import drawing
from cli import UserError, require
from parts import Parts
from pictures import text_fields, to_picture, write_png


def described(parts: Parts, jobs: list[tuple[str, int]], how: dict) -> list[dict[str, str]]:
    """The text fields of each drawing; `how`: what drawing.drawings is told of the walk."""
    guidance, shift = (how.get(name, parts.defaults[name]) for name in ("guidance", "shift"))
    given = dict(steps=drawing.STEPS, solver="euler", rule="plain", interval=(0.0, 1.0), zero=0, negative="")
    given |= {name: value for name, value in how.items() if name in given}
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
    for i in set(range(len(jobs))) - set(missing):
        found = text_fields(paths[i])
        for name in (name for name in fields[i] if found.get(name) != fields[i][name]):
            raise UserError(f"{paths[i]}: was drawn with {name} {found.get(name)!r}, asked for is "
                            f"{fields[i][name]!r}; name another folder, or remove it")
    if missing:
        pictures = drawing.drawings(parts, [jobs[i][0] for i in missing], seed=[jobs[i][1] for i in missing],
                                    **how)
        for i, picture in zip(missing, pictures):
            write_png(paths[i], to_picture(picture), fields[i])
    return len(jobs) - len(missing)
