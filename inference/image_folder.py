"""Fill a folder with drawings: PNG files, each with its settings in its text fields.

    jobs = [("red apple, noto style", 0), ("snowman, noto style", 0)]      # (prompt, seed)
    draw_missing(parts, jobs, Path("drawn"), DrawConfig())      # drawn/00000.png, drawn/00001.png

A file is written completely or not at all.  An existing file is skipped, so an interrupted run
can resume.  Before that, its text fields are compared with the settings.  They identify the
transformer, but not --length or the other models.  Several processes can share the work, as those
of evaluate.py do.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator

from common.cli import require
from dataset.images import text_fields, write_png
from inference.parts import Parts
from inference.text_to_image import DrawConfig, drawings
from viz.grids import grid

# the fields of a DrawConfig that decide the image, and their names in a file
RECORDED = dict(steps="steps", solver="solver", guidance_interval="interval",
                negative_prompt="negative", guidance="guidance", shift="shift")


def settings(parts: Parts, config: DrawConfig) -> dict[str, str]:
    """Return the text fields that are the same for all drawings of a folder."""
    complete = parts.complete(config)
    shared = {name: str(getattr(complete, field)) for field, name in RECORDED.items()}
    shared.update(size=f"{parts.width}x{parts.height}", checkpoint=parts.digest(),
                  dtype=str(parts.dtype).removeprefix("torch."))
    return shared


@dataclass
class ImageFolder:
    """The files of a folder, and the drawings in each one."""
    path: Path
    jobs: list[tuple[str, int]]     # (prompt, seed of a file's first drawing)
    names: list[str]                # of the files
    shared: dict[str, str]          # `settings` of all files
    each: int = 1                   # drawings in a file, of its seed and the next ones

    def fields(self, i: int) -> dict[str, str]:
        """Return the text fields of a file."""
        prompt, seed = self.jobs[i]
        seeds = " ".join(map(str, range(seed, seed + self.each)))
        return dict(prompt=prompt, seed=seeds) | self.shared

    def missing(self, among: Iterable[int]) -> list[int]:
        """Return the jobs in `among` (indices) that have no file.

        Raises UserError for a file with other text fields than this job has."""
        lacking = []
        for i in among:
            path = self.path / self.names[i]
            if not path.exists():
                lacking.append(i)
                continue
            written, expected = text_fields(path), self.fields(i)
            for name in expected | written:
                old, new = written.get(name), expected.get(name)
                require((old == new, f"{path}: was drawn with {name} {old!r}, asked for is {new!r}; "
                         f"name another folder, or remove this file"))
        return lacking

    def draw(self, parts: Parts, which: list[int], config: DrawConfig) -> Iterator[int]:
        """Draw these jobs, and yield each one when its file is written."""
        prompts, seeds = [], []
        for i in which:
            prompt, seed = self.jobs[i]
            prompts += [prompt] * self.each
            seeds += range(seed, seed + self.each)
        images = drawings(parts, prompts, seeds, config)
        for i in which:
            path = self.path / self.names[i]
            path.parent.mkdir(parents=True, exist_ok=True)
            image = grid(itertools.islice(images, self.each), least=1, gap=0)
            write_png(path, image, self.fields(i))
            yield i


def draw_missing(parts: Parts, jobs: list[tuple[str, int]], path: Path, config: DrawConfig) -> int:
    """Draw the files that are missing, and return the number of files that existed before.

    Raises UserError, before anything is drawn, for a file with other text fields than expected."""
    path.mkdir(exist_ok=True)
    names = [f"{i:05}.png" for i in range(len(jobs))]
    folder = ImageFolder(path, jobs, names, settings(parts, config))
    missing = folder.missing(range(len(jobs)))
    for _ in folder.draw(parts, missing, config):
        pass
    return len(jobs) - len(missing)
