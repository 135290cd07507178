"""Measure what settings of drawing and reading change on the shapes world, without training again.

    python -m experiments.shapes_settings guidance          # some minutes of two cores each
    python -m experiments.shapes_settings solvers
    python -m experiments.shapes_settings orders --checkpoint out/shapes --seeds 0

guidance and solvers: the share of right drawings, the mean over the categories of each row, and how
far the drawings of open prompts are from the true shares (metrics/shape_scores.py).
orders: captions of seen images by each order of unmasking, with the image cache and without;
"evaluations" is the number of network evaluations for a text, "time" is relative to the first row.
This is not part of the test run.
"""

import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import flow
from common import cli
from common.devices import choose_device
from common.files import write_json
from dataset.shapes import WORLDS
from experiments.turns import count_texts
from inference.image_to_text import ReadConfig
from inference.parts import SHAPES, Parts
from inference.text_to_image import DrawConfig
from metrics.shape_scores import ROWS, ShapesTest
from metrics.tables import table

GUIDANCE = {f"guidance {scale:g}": DrawConfig(guidance=scale)
            for scale in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)}


def solvers() -> dict[str, DrawConfig]:
    rows = {}
    for steps in (1, 2, 4, 8, 16, 32, 64):
        for solver, row in flow.SOLVERS.items():
            # Heun with at most two evaluations takes one Euler step
            if steps > 2 or row.evaluations == 1:
                config = DrawConfig(steps=steps, solver=solver)
                rows[f"{solver}, at most {steps} evaluations"] = config
    return rows


def orders() -> dict[str, ReadConfig]:
    settings = {}
    for order in ("random", "confidence"):
        for steps in (16, 8, 4, 2, 1):
            settings[f"{order}, {steps} steps"] = dict(order=order, steps=steps)
    for order, levels in dict(threshold=(0.99, 0.9, 0.7), eb=(0.05, 0.5)).items():
        for level in levels:
            settings[f"{order} {level:g}"] = dict(order=order, level=level)
    rows = {}
    for name, values in settings.items():
        for cache in ("off", "once"):
            rows[f"{name}, cache {cache}"] = ReadConfig(**values, image_cache=cache)
    return rows


CONFIGS = dict(guidance=GUIDANCE, solvers=solvers(), orders=orders())


def drawing_scores(test: ShapesTest, config: DrawConfig, seed: int, prompts: int, count: int
                   ) -> dict[str, float]:
    """Return the scores of one row of a table of drawing settings, in percent."""
    scores = {}
    for row in ROWS:
        right = test.draw(row, prompts, seed, config).values()
        scores[f"right, {row}"] = statistics.mean(right)
    for name, value in test.calibrate(count, seed, config).items():
        scores[name.replace("calibration", "open")] = value
    return scores


def reading_scores(test: ShapesTest, config: ReadConfig, seed: int, count: int) -> dict[str, float]:
    """Return the scores of one row of the table of orders, with the seconds that it took."""
    with count_texts(test.parts.text) as counts:
        started = time.perf_counter()
        scores = test.captions("seen", count, seed, config)
        seconds = time.perf_counter() - started
    return scores | {"evaluations": sum(counts) / count, "time": seconds}


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("what", choices=CONFIGS)
    parser.add_argument("--checkpoint", type=Path, default=SHAPES, help="(assets/shapes)")
    parser.add_argument("--world", choices=WORLDS, default="shapes",
                        help="that it was trained on (shapes)")
    parser.add_argument("--seeds", nargs="+", type=cli.number(int, 0, 1000), default=[0, 1, 2],
                        help="(0 1 2)")
    parser.add_argument("--prompts", type=cli.number(int, 1), default=20,
                        help="in each category (20)")
    parser.add_argument("--open", type=cli.number(int, 1), default=40,
                        help="drawings of each open prompt (40)")
    parser.add_argument("--limit", type=cli.number(int, 1), default=200,
                        help="images to caption (200)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)
    parts = Parts(args.checkpoint, choose_device("auto"))
    parts.silent = True
    test = ShapesTest(parts, args.world)
    configs = CONFIGS[args.what]
    rows = {name: defaultdict(list) for name in configs}         # columns, each with a value per seed
    for seed in args.seeds:
        for name, config in configs.items():
            if args.what == "orders":
                scores = reading_scores(test, config, seed, args.limit)
            else:
                scores = drawing_scores(test, config, seed, args.prompts, args.open)
            print(name, scores, file=sys.stderr, flush=True)
            for column, value in scores.items():
                rows[name][column].append(value)
    if args.what == "orders":
        first = statistics.mean(next(iter(rows.values()))["time"])
        for columns in rows.values():
            columns["time"] = [seconds / first for seconds in columns["time"]]
    print(table(rows, decimals=2 if args.what == "orders" else 1))
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    cli.run(main)
