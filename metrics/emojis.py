"""The emoji set as a small benchmark of everything: captions, answers, drawings.

    caption     the caption written for a picture is the true one, word for word
    answers     the answer written to a question is the true one, by type of question, one phrasing of each;
                all yes/no also the way POPE reports it (arXiv 2305.10355), "yes" being the positive class
    drawing     a prompt is drawn, and the nearest picture of the whole set by pixel distance has the right
                emoji ("emoji"; people, who come in many variants, and all else apart), or is the very
                picture asked for ("exact"); and the caption that the model then writes for its own drawing
                is the prompt ("read back")

each of the pictures trained on and of the two held-out splits: `tone`, an emoji in a skin tone not
seen on it in that style, and `style`, an emoji never seen in that style.

Shapes: B batch, n pictures, P pixels a side.
"""

import statistics
from collections import defaultdict
from typing import Iterator

import torch
from PIL import Image
from torch import Tensor

from common import seeding
from common.cli import require
from common.progress import Progress
from dataset import emoji
from inference import text_to_image
from inference.image_to_text import ReadConfig, encode, write
from inference.parts import Parts
from inference.text_to_image import DrawConfig
from metrics.answers import pope
from viz import grids
from viz.samples import caption_cells

BATCH = 64
PEOPLE = "people & body"                        # a record's kind, Unicode's
TYPES = [*emoji.ASKED, "yes/no kind", "yes/no sort", "yes/no name"]


def batches(what: str, items: list) -> Iterator[list]:
    progress = Progress(what, len(items))
    for at in range(0, len(items), BATCH):
        yield items[at:at + BATCH]
        progress.update(min(at + BATCH, len(items)))


def nearest(drawn: Tensor, pictures: Tensor) -> list[int]:
    """Return for each drawing (B, 3, P, P) the index of the nearest picture (n, 3, P, P) in L2
    distance."""
    return torch.cdist(drawn.flatten(1), pictures.flatten(1)).argmin(1).tolist()


def one_of_each(record: dict) -> list[dict]:
    """Return one question of an image for each type and answer, in a phrasing that the image's key
    decides."""
    shuffled = sorted(record["questions"],
                      key=lambda q: seeding.fraction(f"{record['key']} {q['question']}"))
    return list({(q["type"], q["answer"]): q for q in shuffled}.values())


def percent(results: list[bool]) -> float:
    return 100 * statistics.mean(results)


def reading(parts: Parts, records: list[dict], pictures: Tensor, split: str, limit: int, seed: int,
            config: ReadConfig) -> dict[str, float]:
    """Measure captions and answers about one split's images, (n, 3, P, P) in [-1, 1], in percent."""
    shown = emoji.of_split(records, split)[:limit]
    require((bool(shown), f"no picture of the emoji tar is in the split \"{split}\""))
    latents = dict(zip(shown, encode(parts, pictures[shown])))

    def texts(indices: list[int], questions: list[str | None]) -> list[str]:
        batch = torch.stack([latents[i] for i in indices])
        return write(parts, batch, questions, config, [seed] * len(indices))
    captions = []
    for batch in batches(f"{split}, captions", shown):
        for i, text in zip(batch, texts(batch, [None] * len(batch))):
            captions.append(text == records[i]["caption"])

    answers, yes_no = defaultdict(list), []
    asked = [(i, q) for i in shown for q in one_of_each(records[i])]
    for batch in batches(f"{split}, answers", asked):
        indices, questions = zip(*batch)
        for text, q in zip(texts(indices, [q["question"] for q in questions]), questions):
            answers[q["type"]].append(text == q["answer"])
            if q["type"].startswith("yes/no"):
                yes_no.append((text, q["answer"]))
    scores = {"caption": percent(captions)}
    for kind in TYPES:
        if kind in answers:
            scores[f"answer: {kind}"] = percent(answers[kind])
    for name, value in pope(*zip(*yes_no)).items():
        scores[f"POPE: {name}"] = value
    return scores


def drawings(parts: Parts, records: list[dict], pictures: Tensor, split: str, prompts: int,
             seed: int, config: DrawConfig) -> dict[str, float]:
    """Measure drawings of one split's captions, in percent."""
    results = {name: [] for name in ("emoji", "people", "all else", "exact", "read back")}
    for batch in batches(f"{split}, drawings, seed {seed}",
                         emoji.of_split(records, split)[:prompts]):
        captions = captions_of(records, batch)
        drawn = text_to_image.draw(parts, captions, seed * 1000 + len(results["emoji"]),
                                   **vars(config))
        texts = write(parts, encode(parts, drawn), [None] * len(drawn))
        for i, found, caption, text in zip(batch, nearest(drawn, pictures), captions, texts):
            right = records[found]["emoji"] == records[i]["emoji"]
            results["emoji"].append(right)
            results["people" if records[i]["kind"] == PEOPLE else "all else"].append(right)
            results["exact"].append(found == i)
            results["read back"].append(text == caption)
    return {f"drawing: {name}": percent(values) for name, values in results.items() if values}


def captions_of(records: list[dict], indices: list[int]) -> list[str]:
    return [records[i]["caption"] for i in indices]


def page(parts: Parts, records: list[dict], pictures: Tensor, drawing: DrawConfig,
         reading: ReadConfig) -> Image.Image:
    """Draw the first ones of each split, not cherry-picked: 14 single objects and 7 people that
    were trained on, and 7 held-out people; and caption held-out images.

    pictures: (n, 3, P, P) of all records."""
    train, tone, style = (emoji.of_split(records, split) for split in emoji.SPLITS)
    people = [i for i in train if records[i]["kind"] == PEOPLE]
    objects = [i for i in train if records[i]["kind"] != PEOPLE]
    prompts = captions_of(records, objects[:14] + people[:7] + tone[:7])
    drawn = list(zip(text_to_image.draw(parts, prompts, **vars(drawing)), prompts))
    read = tone[-6:] + style[:4]
    cells = caption_cells(parts, pictures[read], captions_of(records, read), reading)
    rows = grids.rows(*(drawn[at:at + 7] for at in range(0, len(drawn), 7)))
    return grids.above(rows, grids.page(cells[::2], cells[1::2]))


def tables(results: dict[str, list[dict]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Turn {split: scores of each seed} into a table for each kind: {kind: {split: {name:
    values}}}."""
    kinds = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for split, runs in results.items():
        for run in runs:
            for name, value in run.items():
                kind, _, figure = name.rpartition(": ")
                kind = kind if kind in ("drawing", "POPE") else "reading"
                kinds[kind][split][figure].append(value)
    return kinds
