"""Compare each ablation flag of train.py with the defaults, with three seeds: the README's table.

    python -m experiments.ablations OUT             # 15 runs, two at a time: 15 minutes, two cores
    python -m experiments.ablations OUT --steps 20  # a quick test that it works

The runs are small runs of the emoji preset: 32 x 32 pixels, 16 images and 16 texts per step.
training/validation.py measures all of them in the same way, independent of their training loss: the
velocity's error and the text's nats on the same 160 images.  Finished runs are not repeated.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
from common import cli
from metrics.tables import table

FLAGS = {
    "the defaults": [],
    "--predicts velocity": ["--predicts", "velocity"],
    "--times uniform": ["--times", "uniform"],
    "--text-weight 1": ["--text-weight", "1"],
    "--text-loss flat": ["--text-loss", "flat"],
}


def run(out: Path, name: str, flags: list[str], seed: int, steps: int) -> dict:
    """Run train.py, which skips finished steps, and return the last row of the run's log."""
    folder = out / f"{name.replace('--', '').replace(' ', '_')}_{seed}"
    command = [sys.executable, "train.py", "--preset", "emoji", "--pixels", "32", "--image-batch", "16",
               "--text-batch", "16", "--dtype", "float32", "--ema", "0.99", "--steps", str(steps),
               "--eval-every", str(steps), "--sample-every", "0", "--save-every", str(steps),
               "--decay-steps", str(max(1, steps - 50)), "--device", "cpu", "--seed", str(seed), "--out", str(folder), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    row = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    print(f"{name}, seed {seed}: {row['val_image']:.4f} {row['val_nats']:.4f}, {row['seconds']:.0f} s",
          file=sys.stderr, flush=True)
    return row


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=cli.number(int, 1), default=180)
    args = parser.parse_args()
    with ThreadPoolExecutor(2) as two:
        made = {(name, seed): two.submit(run, args.out, name, flags, seed, args.steps)
                for seed in range(3) for name, flags in FLAGS.items()}
        rows = {name: [made[name, seed].result() for seed in range(3)] for name in FLAGS}
    print(table({name: {"velocity's error": [row["val_image"] for row in runs],
                        "the same, t > 0.5": [statistics.mean(row["val_image_t"][5:]) for row in runs],
                        "text, nats a token": [row["val_nats"] for row in runs]}
                 for name, runs in rows.items()}, 3))


if __name__ == "__main__":
    main()
