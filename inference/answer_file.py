"""Questions answered and pictures captioned into a file, a line each, in the order in which they
are asked.

    # writes {"question_id": "42", "answer": "a cat"}
    fill(parts, asked, Path("val2014"), Path("answers.jsonl"), note)

What is asked is cut into blocks, always the same ones, each of which is a file beside the answers
when it is done, whole or not at all: what was stopped goes on, several processes share what is
missing, and the lines are the same ones however it was.  The last process joins them.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

from common import processes
from common.cli import UserError, require
from common.files import read_json, read_json_lines, write_json, write_text
from common.seeding import fraction
from dataset.images import fit_picture, read_picture, to_tensor
from inference.image_to_text import canvas, encode, ranked, write
from inference.parts import Parts

BLOCK = 64              # questions


@dataclass
class Ask:
    """One line to write: its number, a picture's file name, and a question, or None for a
    caption."""
    id: str | int
    image: str
    question: str | None = None


def block(parts: Parts, asks: list[Ask], folder: Path, seed: int, choices: list[str] | None,
          how: dict) -> list[dict]:
    """Return a line for each: {"question_id", "answer"}, {"image_id", "caption"}, or {"id",
    "left_out": why} where a picture can't be read or a question is too long.

    The seed of each is its own: what else is asked changes nothing, but for the last bits of what
    is computed beside other rows, and blocks are always the same ones.  choices: the likeliest of
    these is the answer; else `how` goes to reading.write."""
    rows, pixels, readable = {}, {}, []
    for ask in asks:
        try:
            canvas(parts, ask.question)
            if ask.image not in pixels:
                image = read_picture(folder / ask.image)
                pixels[ask.image] = to_tensor(fit_picture(image, parts.height, parts.width))
            readable.append(ask)
        except UserError as error:
            rows[ask.id] = dict(id=ask.id, left_out=str(error))
    if not readable:
        return list(rows.values())
    encoded = dict(zip(pixels, encode(parts, torch.stack(list(pixels.values())))))
    latents = torch.stack([encoded[ask.image] for ask in readable])
    if choices:
        answers = []
        for ask, x in zip(readable, latents):
            ranking = ranked(parts, x[None], ask.question, choices)
            answers.append(ranking[0][0])
    else:
        seeds = [int(fraction(f"{seed} {ask.id}") * 2**53) for ask in readable]
        answers = write(parts, latents, [ask.question for ask in readable], seed=seeds, **how)
    for ask, answer in zip(readable, answers):
        if ask.question is None:
            rows[ask.id] = dict(image_id=ask.id, caption=answer)
        else:
            rows[ask.id] = dict(question_id=ask.id, answer=answer)
    return [rows[ask.id] for ask in asks]


def write_lines(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def start(out: Path, note: dict, paths: list[Path]) -> list[Path] | None:
    """Make a folder for blocks, and return those that aren't done; return None if the answers are
    there.

    Raises UserError for answers of another note."""
    about = Path(f"{out}.json")
    if about.exists():
        old = read_json(about)
        differ = [name for name in note | old
                  if name != "made_by" and old.get(name) != note.get(name)]
        require((not differ, f"{out}: was made otherwise ({', '.join(differ)}); name another file, "
                 f"or remove it and {about.name}"))
    else:
        require((not out.exists(), f"{out}: is there, and no {about.name}; name another file"))
    if out.exists():
        return None
    Path(f"{out}.blocks").mkdir(parents=True, exist_ok=True)
    write_json(about, note)
    return [path for path in paths if not path.exists()]


def fill(parts: Parts, asked: list[Ask], folder: Path, out: Path, note: dict, rank: int = 0,
         world: int = 1, seed: int = 0, choices: list[str] | None = None,
         say: Callable[[int, int], None] = lambda *_: None, **how) -> list[str] | None:
    """Write `out`; return a line for each question that had to be left out, on all processes but
    the last one None.

    note: the settings that make the answers; it is written beside `out`.  Raises UserError where
    answers of another note are there."""
    blocks = {Path(f"{out}.blocks") / f"{at // BLOCK:06}.jsonl": asked[at:at + BLOCK]
              for at in range(0, len(asked), BLOCK)}
    missing = processes.first(lambda: start(out, note, list(blocks)))
    if missing is None:
        return []
    share = missing[rank::world]
    for done, path in enumerate(share, 1):
        write_lines(path, block(parts, blocks[path], folder, seed, choices, how))
        say(done * BLOCK, len(share) * BLOCK)
    if not processes.last():
        return None
    answered, lost = [], []
    for path in blocks:
        for _, row in read_json_lines(path):
            if "left_out" in row:
                lost.append(f"{row['id']}: {row['left_out']}")
            else:
                answered.append(row)
    write_lines(out, answered)
    shutil.rmtree(f"{out}.blocks")
    return lost
