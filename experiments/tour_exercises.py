"""Measure the exercises of docs/exercises.md: change tour.py, train it, and see what moves.

    python -m experiments.tour_exercises                       # all exercises, three seeds each
    python -m experiments.tour_exercises uniform-times little-data --seeds 1
    python -m experiments.tour_exercises --out rows.jsonl      # keep the rows; a second run resumes

Each exercise replaces pieces of tour.py, which must occur in it exactly once.  Exercises that only
change sampling use the weights of the unchanged file.
"""

import importlib.util
import json
import tempfile
from functools import cache
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import NamedTuple

import torch

from common import cli
from common.cli import ROOT, require
from common.files import read_json_lines

CHANGES = {
    "unchanged": [],
    "uniform-times": [("torch.sigmoid(torch.randn(B, 1, 1, 1) + 0.7)", "torch.rand(B, 1, 1, 1)")],
    "flat-weight": [("return (errors * masked / t).mean()", "return (2 * errors * masked).mean()")],
    "no-guidance": [("GUIDANCE = 3.0", "GUIDANCE = 1.0")],
    "predict-velocity": [
        ("velocity = (images - clean) / t[:, None, None, None]", "velocity = clean")],
    "clean-side-apart": [
        ("def block(img_stream, txt_stream, img, txt, time):",
         "def block(img_stream, txt_stream, img, txt, time, noised):"),
        ("    N = img.shape[1]\n",
         "    N = img.shape[1]\n"
         "    if noised:                  # words don't see the image\n"
         "        scores[:, :, N:, :N] = -math.inf\n"
         "    else:                       # the image does not see words\n"
         "        scores[:, :, :N, N:] = -math.inf\n"),
        ("block(img_stream, txt_stream, img, txt, time)\n",
         "block(img_stream, txt_stream, img, txt, time, t.max() > 0)\n")],
    "left-to-right": [("surest = probability.argmax(1, keepdim=True)",
                       "surest = torch.full((len(ids), 1), step)")],
    "shared-weights": [
        ("self.txt_streams = nn.ModuleList(Stream() for _ in range(DEPTH))",
         "self.txt_streams = self.img_streams")],
    "half-the-data": [("IMAGES = 8000", "IMAGES = 4000")],
    "little-data": [("IMAGES = 8000", "IMAGES = 500")],
}
SAMPLING = {"no-guidance", "left-to-right"}
PARTS = {"new": False, "held-out": True}


class Row(NamedTuple):
    exercise: str
    seed: int
    steps: int | None           # None: those of tour.py
    shares: dict[str, float]


@cache
def changed(exercise: str) -> ModuleType:
    """Import a changed copy of tour.py.  Raises UserError if a piece is not there once."""
    source = (ROOT / "tour.py").read_text(encoding="utf-8")
    for old, new in CHANGES[exercise]:
        require((source.count(old) == 1,
                 f"{exercise}: expected once in tour.py, found {source.count(old)} times: {old!r}"))
        source = source.replace(old, new)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tour.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("tour", path)
        tour = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tour)
    return tour


@cache
def train(exercise: str, seed: int, steps: int | None) -> dict[str, torch.Tensor]:
    tour = changed(exercise)
    torch.manual_seed(seed)
    images, captions = tour.make_data(tour.IMAGES, seed=0, held_out=False)
    return tour.train(images, captions, steps or tour.STEPS).state_dict()


def measure(exercise: str, seed: int, steps: int | None) -> Row:
    weights = train("unchanged" if exercise in SAMPLING else exercise, seed, steps)
    tour = changed(exercise)
    model = tour.MMDiT()
    model.load_state_dict(weights)
    shares = {}
    for part, held_out in PARTS.items():
        images, captions = tour.make_data(200, seed=1, held_out=held_out)
        for name, share in tour.measure(model, images, captions).items():
            shares[f"{part}, {name}"] = share
    return Row(exercise, seed, steps, shares)


def print_table(rows: list[Row]) -> None:
    """Print captions and shapes: the mean over seeds, and the smallest and largest value.

    The last column is the lowest mean of the other checks."""
    columns = [f"{part}, {name}" for part in PARTS for name in ("read", "shapes")]
    others = [name for name in rows[0].shares if name not in columns]
    print("| exercise | " + " | ".join(columns) + " | colours, number and places |")
    print("|---" * (len(columns) + 2) + "|")
    for exercise in CHANGES:
        shares = [row.shares for row in rows if row.exercise == exercise]
        if not shares:
            continue
        cells = [exercise]
        for name in columns:
            values = [100 * share[name] for share in shares]
            cells.append(f"{mean(values):.0f} ({min(values):.0f}–{max(values):.0f})")
        lowest = min(mean(100 * share[name] for share in shares) for name in others)
        cells.append(f"at least {lowest:.0f}")
        print("| " + " | ".join(cells) + " |")


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("exercises", nargs="*", metavar="NAME", help=", ".join(CHANGES))
    parser.add_argument("--seeds", type=cli.number(int, 1), default=3, help="how many, from 0 (3)")
    parser.add_argument("--steps", type=cli.number(int, 1), help="of training (those of tour.py)")
    parser.add_argument("--out", type=Path, help="a .jsonl file of rows, to resume")
    args = parser.parse_args(argv)
    unknown = set(args.exercises) - set(CHANGES)
    require((not unknown, f"{', '.join(sorted(unknown))}: expected one of {', '.join(CHANGES)}"))
    rows = []
    if args.out and args.out.exists():
        rows = [Row(**row) for _, row in read_json_lines(args.out)]
        rows = [row for row in rows if row.steps == args.steps]
    done = {(row.exercise, row.seed) for row in rows}
    for seed in range(args.seeds):
        for exercise in args.exercises or CHANGES:
            if (exercise, seed) in done:
                continue
            print(f"{exercise}, seed {seed}", flush=True)
            row = measure(exercise, seed, args.steps)
            rows.append(row)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(row._asdict()) + "\n")
    print_table(rows)


if __name__ == "__main__":
    cli.run(main)
