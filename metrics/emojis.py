"""The emoji set as a small benchmark of everything: captions, answers, drawings.

    caption     the caption written for a picture is the true one, word for word
    answers     the answer written to a question is the true one, by type of question, one phrasing of each;
                all yes/no also the way POPE reports it (arXiv 2305.10355), "yes" being the positive class
    drawing     a prompt is drawn, and the nearest picture of the whole set by pixel distance has the right
                emoji ("emoji"; people, who come in many variants, and all else apart), or is the very
                picture asked for ("exact"); and the caption that the model then writes for its own drawing
                is the prompt ("read back")

each of the pictures trained on and of the two held-out splits: `tone`, an emoji in a skin tone not seen on it
in that style, and `style`, an emoji never seen in that style.

Shapes: B batch, n pictures, P pixels a side.
"""

import statistics
from collections import defaultdict
from typing import Iterator

import torch
from PIL import Image
from torch import Tensor

import data
import drawing
import emoji
import show
from cli import require
from metrics.answers import pope
from parts import Parts
from progress import Progress
from reading import STEPS, compared, encode, write

BATCH = 64
PEOPLE = "people & body"                        # a record's kind, Unicode's
TYPES = [*emoji.ASKED, "yes/no kind", "yes/no sort", "yes/no name"]


def batches(what: str, items: list) -> Iterator[list]:
    progress = Progress(what, len(items))
    for at in range(0, len(items), BATCH):
        yield items[at:at + BATCH]
        progress.update(min(at + BATCH, len(items)))


def nearest(drawn: Tensor, pictures: Tensor) -> list[int]:
    """For each drawing (B, 3, P, P) the index of the picture (n, 3, P, P) at the least Euclidean distance."""
    return torch.cdist(drawn.flatten(1), pictures.flatten(1)).argmin(1).tolist()


def one_of_each(record: dict) -> list[dict]:
    """Of a picture's questions one for each type and answer, in a phrasing that its key decides."""
    shuffled = sorted(record["questions"], key=lambda q: data.fraction(f"{record['key']} {q['question']}"))
    return list({(q["type"], q["answer"]): q for q in shuffled}.values())


def reading(parts: Parts, records: list[dict], pictures: Tensor, split: str, limit: int, seed: int,
            how: dict) -> dict[str, float]:
    """Captions and answers about one split's pictures, in percent.  pictures: (n, 3, P, P) in [-1, 1].

    how: goes to reading.write; `steps` are 128 and 32 unless given."""
    shown = emoji.of_split(records, split)[:limit]
    require((bool(shown), f"no picture of the emoji tar is in the split \"{split}\""))
    right, answers, latents = [], defaultdict(list), dict(zip(shown, encode(parts, pictures[shown])))
    for batch in batches(f"{split}, captions", shown):
        said = write(parts, torch.stack([latents[i] for i in batch]), seed=seed, **how)
        right += [text == records[i]["caption"] for text, i in zip(said, batch)]

    asked = [(i, q) for i in shown for q in one_of_each(records[i])]
    for batch in batches(f"{split}, answers", asked):
        said = write(parts, torch.stack([latents[i] for i, _ in batch]), [q["question"] for _, q in batch],
                     seed=seed, **dict(steps=STEPS["answer"]) | how)
        for text, (_, q) in zip(said, batch):
            answers[q["type"]].append((text, q["answer"]))
    percent = lambda pairs: 100 * statistics.mean(said == true for said, true in pairs)
    pairs = [pair for kind in answers if kind.startswith("yes/no") for pair in answers[kind]]
    return ({"caption": 100 * statistics.mean(right)}
            | {f"answer: {kind}": percent(answers[kind]) for kind in TYPES if kind in answers}
            | {f"POPE: {name}": value for name, value in pope(*zip(*pairs)).items()})


def drawings(parts: Parts, records: list[dict], pictures: Tensor, split: str, prompts: int, seed: int,
             how: dict) -> dict[str, float]:
    """Drawings of one split's captions, in percent; `how` goes to drawing.draw."""
    results = {name: [] for name in ("emoji", "people", "all else", "exact", "read back")}
    for batch in batches(f"{split}, drawings, seed {seed}", emoji.of_split(records, split)[:prompts]):
        captions, start = [records[i]["caption"] for i in batch], seed * 1000 + len(results["emoji"])
        drawn = drawing.draw(parts, captions, seed=start, **how)
        for i, found, text in zip(batch, nearest(drawn, pictures), write(parts, encode(parts, drawn))):
            right = records[found]["emoji"] == records[i]["emoji"]
            results["emoji"].append(right)
            whose = "people" if records[i]["kind"] == PEOPLE else "all else"
            results[whose].append(right)
            results["exact"].append(found == i)
            results["read back"].append(text == records[i]["caption"])
    return {f"drawing: {name}": 100 * statistics.mean(values) for name, values in results.items() if values}


def page(parts: Parts, records: list[dict], pictures: Tensor, walk: dict, how: dict) -> Image.Image:
    """The first of each split, none chosen: 14 single objects and 7 people that were learnt and 7 that are
    held out, drawn; held-out pictures, captioned.  pictures: (n, 3, P, P) of all records; walk, how: of the
    drawings and of the captions."""
    train, tone, style = (emoji.of_split(records, split) for split in emoji.SPLITS)
    people = {i for i, record in enumerate(records) if record["kind"] == PEOPLE}
    shown = ([i for i in train if i not in people][:14] + [i for i in train if i in people][:7] + tone[:7])
    captions = lambda indices: [records[i]["caption"] for i in indices]
    drawn = [*zip(drawing.draw(parts, captions(shown), **walk), captions(shown))]
    read = tone[-6:] + style[:4]
    cells = compared(parts, pictures[read], captions(read), **how)
    return show.above(show.rows(*(drawn[at:at + 7] for at in range(0, len(drawn), 7))),
                      show.page(cells[::2], cells[1::2]))


def tables(results: dict[str, list[dict]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """{split: figures of each seed} -> for each kind of figure a table: {kind: {split: {name: values}}}."""
    found = defaultdict(lambda: defaultdict(dict))
    for split, runs in results.items():
        for name in dict.fromkeys(name for run in runs for name in run):
            kind, _, figure = name.partition(": ")
            kind = "reading" if kind in ("caption", "answer") else kind
            found[kind][split][figure or name] = [run[name] for run in runs if name in run]
    return found
