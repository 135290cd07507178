"""Measure captions, answers and drawings on the emoji set.

    caption     the caption written for an image equals the true one, word for word
    answers     the answer written to a question equals the true one; by type of question, one
                phrasing of each.  Yes/no questions also get POPE's figures (arXiv 2305.10355), with
                "yes" as the positive class
    drawing     "emoji": the image of the whole set that is nearest to a drawing in pixel distance
                shows the right emoji; also separately for "people", who come in many variants, and
                for "all else".  "exact": the nearest image is the prompt's own.  "read back": the
                caption that the model writes for its own drawing equals the prompt

Each is measured on the images trained on and on the two held-out splits: `tone`, an emoji in a skin
tone not trained on in that style, and `style`, an emoji not trained on in that style.

Shapes: B batch, n images, P pixels a side.
"""

import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Iterable

import torch
from PIL import Image
from torch import Tensor

from common import seeding
from common.cli import require
from common.progress import batches, chunks
from dataset import emoji
from inference import text_to_image
from inference.image_to_text import ReadConfig, encode, write
from inference.parts import Parts
from inference.text_to_image import DrawConfig
from metrics.answers import pope
from viz import grids
from viz.samples import caption_cells

BATCH = 64
PEOPLE = "people & body"                        # a record's "kind", from Unicode
TYPES = ["caption", *emoji.FIELD_QUESTIONS, "yes/no kind", "yes/no sort", "yes/no name"]


def nearest(drawn: Tensor, images: Tensor) -> list[int]:
    """Return for each drawing (B, 3, P, P) the index of the nearest of the images (n, 3, P, P), by
    L2 distance."""
    return torch.cdist(drawn.flatten(1), images.flatten(1)).argmin(1).tolist()


def one_of_each(record: dict) -> list[dict]:
    """Return one question of a record for each type and answer; a hash of the record's key decides
    which phrasing."""
    def order(question: dict) -> float:
        return seeding.fraction(f"{record['key']} {question['question']}")

    chosen = {}
    for question in sorted(record["questions"], key=order):
        chosen[question["type"], question["answer"]] = question
    return list(chosen.values())


def percent(correct: list[bool]) -> float:
    return 100 * statistics.mean(correct)


@dataclass
class EmojiTest:
    """A model, and the images that it is measured on."""
    parts: Parts
    records: list[dict]
    images: Tensor              # one per record, (n, 3, P, P) in [-1, 1]

    def captions(self, indices: list[int]) -> list[str]:
        return [self.records[i]["caption"] for i in indices]

    def read(self, split: str, limit: int, seed: int, config: ReadConfig) -> dict[str, float]:
        """Score captions and answers for the first `limit` images of a split, in percent."""
        shown = emoji.of_split(self.records, split)[:limit]
        require((shown, f"no image of the emoji tar is in the split \"{split}\""))
        latents = dict(zip(shown, encode(self.parts, self.images[shown])))
        captions, questions = [], []                             # (image, question) pairs
        for i in shown:
            true = self.records[i]["caption"]
            captions.append((i, dict(type="caption", question=None, answer=true)))
            questions += [(i, question) for question in one_of_each(self.records[i])]
        answered = []
        for title, pairs in (("captions", captions), ("answers", questions)):
            for batch in batches(f"{split}, {title}", pairs, BATCH):
                batch_latents = torch.stack([latents[i] for i, _ in batch])
                texts = [question["question"] for _, question in batch]
                numbers = range(len(answered), len(answered) + len(batch))
                seeds = [seeding.seed_of(f"{seed} {number}") for number in numbers]
                answers = write(self.parts, batch_latents, texts, config, seeds)
                answered += [(question, answer) for (_, question), answer in zip(batch, answers)]
        return score_answers(answered, TYPES)

    def draw(self, split: str, limit: int, seed: int, config: DrawConfig) -> dict[str, float]:
        """Score drawings for the first `limit` captions of a split, in percent."""
        correct = {name: [] for name in ("emoji", "people", "all else", "exact", "read back")}
        prompted = emoji.of_split(self.records, split)[:limit]
        for batch in batches(f"{split}, drawings, seed {seed}", prompted, BATCH):
            prompts = self.captions(batch)
            first_seed = seed * 1000 + len(correct["emoji"])
            drawn = text_to_image.draw(self.parts, prompts, first_seed, **vars(config))
            texts = write(self.parts, encode(self.parts, drawn), [None] * len(drawn))
            closest = nearest(drawn, self.images)
            for i, j, prompt, text in zip(batch, closest, prompts, texts):
                is_emoji = self.records[j]["emoji"] == self.records[i]["emoji"]
                kind = "people" if self.records[i]["kind"] == PEOPLE else "all else"
                correct["emoji"].append(is_emoji)
                correct[kind].append(is_emoji)
                correct["exact"].append(j == i)
                correct["read back"].append(text == prompt)
        return {f"drawing: {name}": percent(values) for name, values in correct.items() if values}

    def page(self, drawing: DrawConfig, reading: ReadConfig) -> Image.Image:
        """Return an image with drawings and captions.  They are not cherry-picked.

        Drawn: the first captions of 14 objects and 7 people that were trained on, and of 7 held-out
        people.  Captioned: ten held-out images."""
        train, tone, style = (emoji.of_split(self.records, split) for split in emoji.SPLITS)
        people = [i for i in train if self.records[i]["kind"] == PEOPLE]
        objects = [i for i in train if self.records[i]["kind"] != PEOPLE]
        prompts = self.captions(objects[:14] + people[:7] + tone[:7])
        drawn = text_to_image.draw(self.parts, prompts, **vars(drawing))
        rows = chunks(list(zip(drawn, prompts)), 7)
        shown = tone[-6:] + style[:4]
        cells = caption_cells(self.parts, self.images[shown], self.captions(shown), reading)
        return grids.above(grids.rows(*rows), grids.page(cells[::2], cells[1::2]))


def score_answers(answered: Iterable[tuple[dict, str]], types: list[str]) -> dict[str, float]:
    """Return the accuracy of (question, answer) pairs of each type, in this order, and POPE's
    figures for the yes/no questions, in percent."""
    correct = {kind: [] for kind in types}
    yes_no = []
    for question, answer in answered:
        kind = question["type"]
        correct[kind].append(answer == question["answer"])
        if kind.startswith("yes/no"):
            yes_no.append((answer, question["answer"]))
    scores = {f"reading: {kind}": percent(values) for kind, values in correct.items() if values}
    for name, value in pope(*zip(*yes_no)).items():
        scores[f"POPE: {name}"] = value
    return scores


def tables(results: dict[str, list[dict]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Turn {split: scores of each seed} into {table: {split: {column: a value for each seed}}}."""
    by_table = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for split, runs in results.items():
        for scores in runs:
            for name, value in scores.items():
                title, column = name.split(": ")
                by_table[title][split][column].append(value)
    return by_table
