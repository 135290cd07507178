"""Write answers to questions, or captions, to a file: one per line, in the order of the questions.

    answers = AnswerFile(Path("answers.jsonl"), asks, Path("val2014"), note)
    answers.write(parts)            # writes {"question_id": "42", "answer": "a cat"}

The questions are always cut into the same blocks.  Each finished block is a file in OUT.blocks,
beside the answers.  So an interrupted run can resume, and several processes can share the missing
blocks; the lines are the same in all cases.  The process that finishes last joins the blocks.  A
question that can't be answered has no line; OUT.json, which holds the settings of the answers,
gives the reason.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

from common import processes
from common.cli import UserError, require
from common.files import inside, is_there, read_json_lines, read_json_object, write_json, write_text
from common.seeding import seed_of
from dataset.images import fit_image, read_image, to_tensor
from inference import image_to_text
from inference.image_to_text import ReadConfig, canvas, encode, write
from inference.parts import Parts

BLOCK = 64              # questions


@dataclass
class Ask:
    """A question to answer, or an image to caption: one line of the file."""
    id: str | int
    image: str                  # file name
    question: str | None = None     # None: a caption


def write_lines(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@dataclass
class AnswerFile:
    """A file of answers: its questions, and the settings that answer them."""
    out: Path
    asks: list[Ask]
    folder: Path                # of the images
    note: dict                  # all settings of the answers, written to OUT.json
    config: ReadConfig = field(default_factory=ReadConfig)
    choices: list[str] | None = None    # the answer is the likeliest of these
    seed: int = 0

    @property
    def note_path(self) -> Path:
        return Path(f"{self.out}.json")

    @property
    def blocks(self) -> Path:
        return Path(f"{self.out}.blocks")

    def block_path(self, at: int) -> Path:
        return self.blocks / f"{at // BLOCK:06}.jsonl"

    def missing_blocks(self) -> list[int] | None:
        """Return the index where each unfinished block begins; None if all answers are there.

        Raises UserError if OUT has answers with another note, or with none."""
        if is_there(self.note_path):
            old = read_json_object(self.note_path)
            different = []
            for name in (self.note | old).keys() - {"made_by", "left_out"}:       # not settings
                if old.get(name) != self.note.get(name):
                    different.append(name)
            require((not different, f"{self.out}: was made otherwise ({', '.join(different)}); name "
                     f"another file, or remove it and {self.note_path.name}"))
        else:
            require((not self.out.exists(),
                     f"{self.out}: is there, and no {self.note_path.name}; name another file"))
            shutil.rmtree(self.blocks, ignore_errors=True)            # their settings are unknown
        if self.out.exists():
            shutil.rmtree(self.blocks, ignore_errors=True)       # left by a kill in `join`
            return None
        self.blocks.mkdir(parents=True, exist_ok=True)
        write_json(self.note_path, self.note)
        return [at for at in range(0, len(self.asks), BLOCK) if not self.block_path(at).exists()]

    def read_images(self, parts: Parts, asks: list[Ask]) -> tuple[dict[str, Tensor], dict]:
        """Return images (3, H, W) by name, and a row by id for each Ask that can't be answered."""
        images, left_out = {}, {}
        for ask in asks:
            try:
                canvas(parts, ask.question)                      # raises if it is too long
                if self.choices:
                    image_to_text.rows_to_rank(parts, self.choices, ask.question)
                if ask.image not in images:
                    image = read_image(inside(self.folder, ask.image))
                    images[ask.image] = to_tensor(fit_image(image, parts.height, parts.width))
            except UserError as error:
                left_out[ask.id] = dict(id=ask.id, left_out=str(error))
        return images, left_out

    def answer(self, parts: Parts, asks: list[Ask], latents: Tensor) -> list[str]:
        """Answer questions about the images with these latents (B, C, h, w).

        Each question has its own seed, so its answer does not depend on the other questions."""
        if self.choices:
            texts = []
            for ask, x in zip(asks, latents):
                ranking = image_to_text.rank(parts, x[None], self.choices, ask.question)
                texts.append(ranking[0].text)
            return texts
        seeds = [seed_of(f"{self.seed} {ask.id}") for ask in asks]
        return write(parts, latents, [ask.question for ask in asks], self.config, seeds)

    def block(self, parts: Parts, asks: list[Ask]) -> list[dict]:
        """Return a row for each `Ask`: {"question_id", "answer"} or {"image_id", "caption"}.

        It is {"id", "left_out": why} if the image can't be read or the question is too long."""
        images, rows = self.read_images(parts, asks)
        answerable = [ask for ask in asks if ask.id not in rows]
        if answerable:
            encoded = dict(zip(images, encode(parts, torch.stack(list(images.values())))))
            latents = torch.stack([encoded[ask.image] for ask in answerable])
            for ask, text in zip(answerable, self.answer(parts, answerable, latents)):
                if ask.question is None:
                    rows[ask.id] = dict(image_id=ask.id, caption=text)
                else:
                    rows[ask.id] = dict(question_id=ask.id, answer=text)
        return [rows[ask.id] for ask in asks]

    def write(self, parts: Parts, rank: int = 0, world: int = 1,
              tell: Callable[[int, int], None] = lambda done, total: None) -> list[str] | None:
        """Write the file; return a message for each question that had to be left out.

        Only the process that finishes last returns them; the others return None.  tell(done, total)
        is called after each block, with counts of questions in this process's share."""
        missing = processes.first(self.missing_blocks)
        if missing is None:
            left_out = read_json_object(self.note_path).get("left_out", [])
            return left_out if processes.last() else None
        share = missing[rank::world]
        for done, at in enumerate(share, 1):
            write_lines(self.block_path(at), self.block(parts, self.asks[at:at + BLOCK]))
            tell(done * BLOCK, len(share) * BLOCK)
        if not processes.last():
            return None
        return self.join()

    def join(self) -> list[str]:
        """Join the blocks into the file; return a message for each question that was left out."""
        answered, left_out = [], []
        for at in range(0, len(self.asks), BLOCK):
            for _, row in read_json_lines(self.block_path(at)):
                if "left_out" in row:
                    left_out.append(f"{row['id']}: {row['left_out']}")
                else:
                    answered.append(row)
        write_json(self.note_path, self.note | dict(left_out=left_out))
        write_lines(self.out, answered)
        shutil.rmtree(self.blocks)
        return left_out
