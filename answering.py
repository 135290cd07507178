"""Questions answered and pictures captioned into a file, a line each, in the order in which they are asked.

    fill(parts, asked, Path("val2014"), Path("answers.jsonl"))   # {"question_id": "42", "answer": "a cat"}

What is asked is cut into blocks, always the same ones, each of which is a file beside the answers when it is
done, whole or not at all: what was stopped goes on, several processes share what is missing, and the lines
are the same ones however it was.  The last process joins them.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

import parallel
from cli import UserError, require
from files import read_json, read_json_lines, write_json, write_text
from data import fraction
from parts import Parts
from pictures import fit_picture, read_picture, to_tensor
from reading import canvas, encode, ranked, write

BLOCK = 64              # questions


@dataclass
class Ask:
    """One line to write: its number, a picture's file name, and a question, or None for a caption."""
    id: str | int
    image: str
    question: str | None = None


def block(parts: Parts, some: list[Ask], folder: Path, seed: int, choices: list[str] | None,
          how: dict) -> list[dict]:
    """Lines of these, {"question_id", "answer"} or {"image_id", "caption"}; {"id", "left_out": why} where a
    picture can't be read or a question is too long.

    The seed of each is its own: what else is asked changes nothing, but for the last bits of what is computed
    beside other rows, and blocks are always the same ones.  choices: the likeliest of these is the
    answer; else `how` goes to reading.write."""
    why, pixels = {}, {}
    for ask in some:
        try:
            canvas(parts, ask.question)
            if ask.image not in pixels:
                picture = read_picture(folder / ask.image)
                pixels[ask.image] = to_tensor(fit_picture(picture, parts.height, parts.width))
        except UserError as error:
            why[ask.id] = str(error)
    latents = dict(zip(pixels, encode(parts, torch.stack(list(pixels.values()))))) if pixels else {}
    able = [ask for ask in some if ask.id not in why]
    said = []
    if choices:
        said = [ranked(parts, latents[ask.image][None], ask.question, choices)[0][0] for ask in able]
    elif able:
        seeds = [int(fraction(f"{seed} {ask.id}") * 2**53) for ask in able]
        said = write(parts, torch.stack([latents[ask.image] for ask in able]),
                     [ask.question for ask in able], seed=seeds, **how)
    answers = dict(zip((ask.id for ask in able), said))
    rows = []
    for ask in some:
        if ask.id in why:
            rows.append(dict(id=ask.id, left_out=why[ask.id]))
        elif ask.question is None:
            rows.append(dict(image_id=ask.id, caption=answers[ask.id]))
        else:
            rows.append(dict(question_id=ask.id, answer=answers[ask.id]))
    return rows


def lines_of(found: list[dict]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)


def part(out: Path, number: int) -> Path:
    """The file of a block that is done."""
    return Path(f"{out}.blocks") / f"{number:06}.jsonl"


def started(out: Path, note: dict, blocks: int) -> list[int] | None:
    """Make a folder for blocks, and return which aren't done; return None if the answers are there.

    Raises UserError for answers of another note."""
    about = Path(f"{out}.json")
    if about.exists():
        made = read_json(about)
        differ = [name for name in note | made
                  if name != "made_by" and made.get(name) != note.get(name)]
        require((not differ, f"{out}: was made otherwise ({', '.join(differ)}); name another file, or "
                 f"remove it and {about.name}"))
    else:
        require((not out.exists(), f"{out}: is there, and no {about.name}; name another file"))
    if out.exists():
        return None
    part(out, 0).parent.mkdir(parents=True, exist_ok=True)
    write_json(about, note)
    return [number for number in range(blocks) if not part(out, number).exists()]


def fill(parts: Parts, asked: list[Ask], folder: Path, out: Path, note: dict, rank: int = 0, world: int = 1,
         seed: int = 0, choices: list[str] | None = None, say: Callable[[int, int], None] = lambda *_: None,
         **how) -> list[str] | None:
    """Write `out`; returns a line for each question that had to be left out, on all processes but the last
    one None.

    note: what makes the answers what they are; it is written beside `out`.  Raises UserError where answers
    of another note are there."""
    blocks = [asked[at:at + BLOCK] for at in range(0, len(asked), BLOCK)]
    missing = parallel.first(lambda: started(out, note, len(blocks)))
    if missing is None:
        return []
    share = missing[rank::world]
    for done, number in enumerate(share, 1):
        rows = block(parts, blocks[number], folder, seed, choices, how)
        write_text(part(out, number), lines_of(rows))
        say(done * BLOCK, len(share) * BLOCK)
    if not parallel.last():
        return None
    answered, lost = [], []
    for number in range(len(blocks)):
        for _, row in read_json_lines(part(out, number)):
            if "left_out" in row:
                lost.append(f"{row['id']}: {row['left_out']}")
            else:
                answered.append(row)
    write_text(out, lines_of(answered))
    shutil.rmtree(part(out, 0).parent)
    return lost
