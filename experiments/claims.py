"""Test claims of the paper, and what users ask, in miniature: on the small shapes world, three seeds.

    python -m experiments.claims weight OUT            # the weight of the text loss, lambda
    python -m experiments.claims pretraining OUT       # Table 4: from a text-to-image model
    python -m experiments.claims losses OUT            # 1/t, prediction, times; one loss only
    python -m experiments.claims tuning OUT            # Table 5: instruction tuning, image data
    python -m experiments.claims weight out/quick --steps 20     # a quick test that it works

Two runs at a time share two cores, a thread each.  A run is a folder below OUT: one that was
stopped is resumed, and one that is done is not run again.  Claims share runs, so give them the same
OUT.  OUT/CLAIM.json has the scores of all seeds, OUT/CLAIM.md the table.  docs/results.md says what
counts as reproduced.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common import cli
from common.cli import ROOT, UserError
from common.files import read_json, write_json, write_text
from dataset import shapes
from dataset.images import to_image, write_png
from metrics.shape_scores import TYPES
from metrics.tables import table

WORLD = "shapes-small"
SEEDS = [0, 1, 2]
PRESET = ["--preset", "shapes"]
RECIPE = ["--image-data", WORLD, "--image-batch", "32", "--text-batch", "16", "--dtype", "float32",
          "--device", "cpu", "--sample-every", "0", "--meter-every", "50"]
INSTRUCT = ["--stage", "instruct"]


@dataclass
class Run:
    """A training run: its flags, beside those of RECIPE; the run that it starts from, if any; and
    its steps, as a share of --steps."""
    name: str
    flags: list[str]
    start: "Run | None" = None
    steps: float = 1.0


def changed(name: str, *flags: str, start: Run | None = None) -> Run:
    """Return a run that differs from the defaults in these flags."""
    return Run(name, [*INSTRUCT, *flags], start)


DEFAULT = changed("default")
# as many samples as the 32 images and 16 texts of RECIPE
IMAGE_ONLY = changed("image-only", "--text-weight", "0", "--image-batch", "47", "--text-batch", "1")
TEXT_ONLY = changed("text-only", "--image-weight", "0", "--image-batch", "1", "--text-batch", "47")
CAPTIONS = Run("captions", ["--stage", "pretrain"])

# instruction tuning: the texts are questions only
TUNE = [*INSTRUCT, "--text-data", WORLD, "--question-share", "1"]
IMAGE_DATA = {"no image data": ["--image-weight", "0"], "500 images": ["--image-data", "{some}"],
              "all image data": []}


def tuning_runs() -> dict[str, Run]:
    """Return a run for each choice of image data, with half of the steps and with all."""
    runs = {}
    for share in (0.5, 1.0):
        for title, flags in IMAGE_DATA.items():
            name = f"{title}-{share:g}".replace(" ", "-")
            runs[f"{title}, {share:g} of the steps"] = Run(name, [*TUNE, *flags], CAPTIONS, share)
    return runs


CLAIMS = dict(
    weight={f"λ = {weight}": changed(f"weight-{weight}", "--text-weight", weight)
            for weight in ("0.05", "0.2", "1", "5")},
    pretraining={"from a text-to-image model": changed("from-images", start=IMAGE_ONLY),
                 "from scratch": DEFAULT},
    losses={"the defaults": DEFAULT,
            "flat text weight": changed("flat", "--text-loss", "flat"),
            # the floor is for predicted images
            "velocity predicted": changed("velocity", "--predicts", "velocity", "--time-floor", "0"),
            "uniform times": changed("uniform", "--times", "uniform"),
            "image loss only": IMAGE_ONLY,
            "text loss only": TEXT_ONLY},
    tuning=tuning_runs())


def call(command: list[str]) -> None:
    """Run a program of the project on one thread.  Raises SystemExit with its error."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")


def train(run: Run, out: Path, steps: int, seed: int) -> Path:
    """Train a run, after the one that it starts from; return its folder.  Raises UserError if it was
    stopped, or has other steps."""
    folder = out / f"{run.name}_{seed}"
    steps = round(steps * run.steps)
    flags = [flag.format(some=out / "some") for flag in run.flags]
    start = PRESET
    if run.start:
        start = ["--init", str(out / f"{run.start.name}_{seed}")]
    call(["train.py", *start, *RECIPE, *flags, "--steps", str(steps), "--decay-steps", str(round(0.4 * steps)),
          "--save-every", "200", "--eval-every", str(steps), "--seed", str(seed),
          "--out", str(folder)])
    step = read_json(folder / "config.json")["step"]
    if step != steps:
        raise UserError(f"{folder}: is at step {step}, expected {steps}; the same command resumes a "
                        f"run that was stopped, other --steps need another OUT")
    return folder


def write_some(folder: Path, count: int = 500) -> None:
    """Write images of the world with their captions, as a folder.

    The first samples are left out: evaluate.py tests on them."""
    temporary = folder.with_name(folder.name + ".part")
    temporary.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        sample = shapes.sample(shapes.HELD - 1 - i, world=WORLD)
        write_png(temporary / f"{i:03}.png", to_image(sample["image"] / 127.5 - 1), {})
        write_text(temporary / f"{i:03}.txt", sample["captions"][0])
    temporary.rename(folder)


def measure(folder: Path, prompts: int) -> dict[str, float]:
    """Return the scores of a run, from evaluate.py and from its log."""
    file = folder / f"shapes_{prompts}.json"
    if not file.exists():
        call(["evaluate.py", "shapes", "--world", WORLD, "--checkpoint", str(folder), "--seeds", "0",
              "--prompts", str(prompts), "--open", str(prompts), "--limit", str(2 * prompts),
              "--device", "cpu", "--json", str(file)])
    results = read_json(file)["results"]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    [seen], [held_out], [open_prompts] = results["seen"], results["held-out"], results["open prompts"]
    titles = [f"reading: {kind}" for kind in TYPES]
    answers = [seen[title] for title in titles if title in seen]
    cosines = [row["meter_cosine"] for row in log if "meter_cosine" in row]
    last = next(row for row in reversed(log) if "val_nats" in row)
    scores = {
        "drawn right, %": mean_of(seen, "drawing"),
        "held out, %": mean_of(held_out, "drawing"),
        "open colours, TV": open_prompts["calibration: colour"],
        "captions true, %": seen["reading: true"],
        "answers, %": statistics.mean(answers),
        "POPE accuracy, %": seen["POPE: accuracy"],
        "velocity's error x 100, t > 0.3": 100 * statistics.mean(last["val_image_t"][3:]),
        "text, nats": last["val_nats"],
    }
    if any(cosines):                # there are none of so few steps, and all are 0 with one loss
        third = len(cosines) // 3 or 1
        scores["cosine, first third"] = statistics.mean(cosines[:third])
        scores["cosine, last third"] = statistics.mean(cosines[-third:])
    return scores


def mean_of(scores: dict[str, float], title: str) -> float:
    return statistics.mean(value for name, value in scores.items() if name.startswith(title))


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=cli.number(int, 2), default=1200, help="of a run (1200)")
    parser.add_argument("--prompts", type=cli.number(int, 1), default=40, help="in each category (40)")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    rows = CLAIMS[args.claim]
    if args.claim == "tuning" and not (out / "some").exists():
        write_some(out / "some")

    starts = {run.start.name: run.start for run in rows.values() if run.start}
    two = ThreadPoolExecutor(2)
    # these come first in the queue, so no run waits for one that can't begin
    started = {(name, seed): two.submit(train, run, out, args.steps, seed)
               for seed in SEEDS for name, run in starts.items()}

    def done(name: str, run: Run, seed: int) -> dict[str, float]:
        if run.start:
            started[run.start.name, seed].result()
        scores = measure(train(run, out, args.steps, seed), args.prompts)
        print(f"{name}, seed {seed}: {scores}", file=sys.stderr, flush=True)
        return scores
    try:
        jobs = {(name, seed): two.submit(done, name, run, seed)
                for seed in SEEDS for name, run in rows.items()}
        runs = {name: [jobs[name, seed].result() for seed in SEEDS] for name in rows}
    finally:
        two.shutdown(cancel_futures=True)           # after an error, start no other run
    columns = {name: {column: [scores[column] for scores in seeds] for column in seeds[0]}
               for name, seeds in runs.items()}
    shown = table(columns, decimals=2)
    write_json(out / f"{args.claim}.json", dict(steps=args.steps, prompts=args.prompts, runs=runs))
    write_text(out / f"{args.claim}.md", shown + "\n")
    print(shown)


if __name__ == "__main__":
    cli.run(main)
