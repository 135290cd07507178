"""Measure a checkpoint.

    python evaluate.py emoji                                    # the shipped weights, one seed
    python evaluate.py emoji --checkpoint out/instruct --seeds 0 1 2 --json results.json

`emoji`: for the pictures trained on and the two held-out splits (`tone`: an emoji in a skin tone not seen on
it in that style; `style`: an emoji never seen in that style),

    caption     the caption written for a picture is the true one, word for word
    answers     the answer written to a question is the true one, by type of question, one phrasing of each;
                all yes/no also the way POPE reports it (arXiv 2305.10355), "yes" being the positive class
    drawing     a prompt is drawn, and the nearest picture of the whole set by pixel distance has the right
                emoji ("emoji"; people, who come in many variants, and all else apart), or is the very
                picture asked for ("exact"); and the caption that the model then writes for its own drawing
                is the prompt ("read back")

Shapes: B batch, n pictures, P pixels a side.
"""

import cli
cli.interruptible(__name__)

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

import data
import drawing
import emoji
import sample
import show
from cli import UserError
from parts import EMOJI, Parts
from reading import STEPS, encode, write

BATCH = 64
SPLITS = ["train", "tone", "style"]


def progress(what: str, items: list) -> Iterator[list]:
    """Batches of items, with a line on stderr of how far, how fast and how long still."""
    started = time.time()
    for at in range(0, len(items), BATCH):
        yield items[at:at + BATCH]
        done = min(at + BATCH, len(items))
        rate = done / (time.time() - started)
        print(f"\r{what}: {done}/{len(items)}, {rate:.1f}/s, {(len(items) - done) / rate:.0f} s left   ",
              end="" if done < len(items) else "\n", file=sys.stderr, flush=True)


def pope(said: list[str], true: list[str]) -> dict[str, float]:
    """POPE's five figures for yes/no answers, in percent; an answer that is neither counts as a wrong no."""
    pairs = list(zip(said, true))
    hit = sum(s == t == "yes" for s, t in pairs)
    claimed, positive = sum(s == "yes" for s in said), sum(t == "yes" for t in true)
    precision, recall = hit / max(claimed, 1), hit / max(positive, 1)
    return {"accuracy": 100 * sum(s == t for s, t in pairs) / len(pairs), "precision": 100 * precision,
            "recall": 100 * recall, "F1": 200 * precision * recall / max(precision + recall, 1e-9),
            "yes-ratio": 100 * claimed / len(pairs)}


def nearest(drawn: Tensor, pictures: Tensor) -> list[int]:
    """For each drawing (B, 3, P, P) the index of the picture (n, 3, P, P) at the least Euclidean distance."""
    return torch.cdist(drawn.flatten(1), pictures.flatten(1)).argmin(1).tolist()


def one_of_each(record: dict) -> list[dict]:
    """Of a picture's questions one for each type and answer, in a phrasing that its key decides."""
    shuffled = sorted(record["questions"], key=lambda q: data.fraction(f"{record['key']} {q['question']}"))
    return list({(q["type"], q["answer"]): q for q in shuffled}.values())


def reading(parts: Parts, records: list[dict], pictures: Tensor, split: str, limit: int) -> dict[str, float]:
    """Captions and answers about one split's pictures, in percent.  pictures: (n, 3, P, P) in [-1, 1].

    The likeliest token at the surest place is no matter of chance, so that this needs no seeds."""
    shown = [i for i, r in enumerate(records) if r["split"] == split][:limit]     # the tar is in random order
    if not shown:
        raise UserError(f"no picture of the emoji tar is in the split \"{split}\"")
    right, answers, latents = [], defaultdict(list), dict(zip(shown, encode(parts, pictures[shown])))
    for batch in progress(f"{split}, captions", shown):
        said = write(parts, torch.stack([latents[i] for i in batch]))
        right += [text == records[i]["caption"] for text, i in zip(said, batch)]

    asked = [(i, q) for i in shown for q in one_of_each(records[i])]
    for batch in progress(f"{split}, answers", asked):
        said = write(parts, torch.stack([latents[i] for i, _ in batch]), [q["question"] for _, q in batch],
                     steps=STEPS["answer"])
        for text, (_, q) in zip(said, batch):
            answers[q["type"]].append((text, q["answer"]))
    percent = lambda pairs: 100 * statistics.mean(said == true for said, true in pairs)
    pairs = [pair for kind in answers if kind.startswith("yes/no") for pair in answers[kind]]
    return ({"caption": 100 * statistics.mean(right)}
            | {f"answer: {kind}": percent(pairs) for kind, pairs in answers.items()}
            | {f"POPE {name}": value for name, value in pope(*zip(*pairs)).items()})


def drawn_right(parts: Parts, records: list[dict], pictures: Tensor, split: str, seed: int, prompts: int,
            how: dict) -> dict[str, float]:
    """Drawings of one split's captions, in percent; `how` goes to drawing.draw."""
    pool, results = [i for i, r in enumerate(records) if r["split"] == split], defaultdict(list)
    for batch in progress(f"{split}, drawings, seed {seed}", pool[:prompts]):
        captions, start = [records[i]["caption"] for i in batch], seed * 1000 + len(results["emoji"])
        drawn = drawing.draw(parts, captions, seed=start, **how)
        for i, found, text in zip(batch, nearest(drawn, pictures), write(parts, encode(parts, drawn))):
            right = records[found]["emoji"] == records[i]["emoji"]
            results["emoji"].append(right)
            whose = "people" if records[i]["kind"] == "people & body" else "all else"
            results[f"emoji, {whose}"].append(right)
            results["exact"].append(found == i)
            results["read back"].append(text == records[i]["caption"])
    return {f"drawing: {name}": 100 * statistics.mean(values) for name, values in results.items()}


def table(results: dict[str, list[dict]]) -> str:
    """Splits as columns, figures as rows: mean over seeds, and from least to most where they differ."""
    lines = ["| % | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    for name in dict.fromkeys(name for runs in results.values() for name in runs[0]):
        cells = []
        for runs in results.values():
            values = [run[name] for run in runs if name in run]
            if not values:                                       # a split without such pictures
                cells.append("")
                continue
            spread = f" ({min(values):.1f}–{max(values):.1f})" if min(values) < max(values) else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser, above = cli.Parser(__doc__), dict(type=cli.number(float, 1e-3), metavar="X")
    count = lambda default, text: dict(type=cli.number(int, 1), default=default, help=f"{text} ({default})")
    parser.add_argument("what", choices=["emoji"])
    parser.add_argument("--checkpoint", type=Path, default=EMOJI, help="(the shipped weights)")
    parser.add_argument("--data", type=Path, default=emoji.TAR, help="the emoji tar")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument("--seeds", nargs="+", type=cli.number(int, 0, 2**50), default=[0],
                        help="of the drawings; reading is not random (0)")
    parser.add_argument("--limit", **count(200, "pictures a split that are captioned and asked about"))
    parser.add_argument("--prompts", **count(200, "prompts a split that are drawn"))
    parser.add_argument("--guidance", **above, help="of drawings (sample.py's default)")
    parser.add_argument("--shift", **above, help="of drawings (sample.py's default)")
    parser.add_argument("--steps", **count(drawing.STEPS, "Euler steps of a drawing"))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(auto)")
    parser.add_argument("--page", type=Path, help="measure nothing: a picture of results on held-out samples")
    parser.add_argument("--json", type=Path, help="also write every figure of every seed here")
    args = parser.parse_args(argv)
    for path in filter(None, (args.json, args.page)):
        if not path.parent.is_dir():
            parser.error(f"{path}: the folder {path.parent} does not exist")
    return args


def write_page(parts: Parts, records: list[dict], pictures: Tensor, path: Path) -> None:
    """Drawings of prompts that were learnt and held out, and captions of pictures that were held out."""
    train, tone, style = [[i for i, r in enumerate(records) if r["split"] == split][:11] for split in SPLITS]
    drawn, read = train[:2] + tone[:6], tone[6:] + style[:3]
    captions = lambda indices: [records[i]["caption"] for i in indices]
    show.write_picture(path, sample.results(parts, captions(drawn), captions(read), pictures[read]))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    parts = Parts(args.checkpoint, cli.device(args.device))
    records, pictures = emoji.load(args.data, parts.height)
    pictures = pictures.float() / 127.5 - 1
    if args.page:
        write_page(parts, records, pictures, args.page)
        return
    how = dict(guidance=args.guidance, shift=args.shift, steps=args.steps)
    results = {}
    for split in args.splits:
        read = reading(parts, records, pictures, split, args.limit)
        results[split] = [read | drawn_right(parts, records, pictures, split, seed, args.prompts, how)
                          for seed in args.seeds]
    print(table(results))
    if args.json:
        here = Path(__file__).parent                      # no folder of this machine's in a file to be shared
        named = {k: str(v.relative_to(here) if v.is_relative_to(here) else v) if isinstance(v, Path) else v
                 for k, v in vars(args).items()}
        args.json.write_text(json.dumps(dict(arguments=named, results=results), indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
