"""Measure training, drawing and reading at the size of SD3-medium on one GPU, in ten minutes.

    python -m experiments.full_size_gpu OUT --published PUBLISHED --limit 560

It runs the programs that measure, one after the other, the most important first.  A job that takes
longer than its share is stopped, and one that the time limit leaves too little time for is skipped.
OUT/results.json has what was measured, after each job; OUT/log.txt what the programs printed;
OUT/profile.txt the kernels of a training step.  The weights are random: nothing is downloaded.

PUBLISHED is a clone of D-DiT's repository; without it, drawing and reading are not compared.
experiments/compare_published.py says what else that needs.  Nobody has run this on a GPU yet; the
tests try its logic on a CPU.
"""

from common import cli
cli.interruptible(__name__)

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, TextIO

from common.cli import ROOT
from common.files import write_json

MOST, LEAST = 180, 20           # seconds that a job may take, and that it needs to be started


class Job(NamedTuple):
    name: str
    command: list[str]          # what follows `python`


def make_jobs(out: Path, published: Path | None) -> list[Job]:
    """Return the jobs, the most important first."""
    train = ["-m", "experiments.bench", "train", "--preset", "sd3-medium", "--dtype", "bfloat16",
             "--rounds", "4"]
    rows_64 = ["--image-batch", "64", "--text-batch", "64"]
    recipe = ["train.py", "--preset", "emoji", "--device", "cuda", "--dtype", "bfloat16",
              "--steps", "60", "--fresh"]
    jobs = [
        Job("a step, 256 pixels", [*train, "--image-batch", "16", "--text-batch", "16", "--grow"]),
        Job("a step, 512 pixels", [*train, "--image-batch", "8", "--text-batch", "8", "--grow",
                                   "--pixels", "512"]),
        Job("a step, 256 pixels, compiled", [*train, *rows_64, "--compile"]),
        Job("a step, 256 pixels, recomputed", [*train, *rows_64, "--checkpoint-activations",
                                               "--grow"]),
        Job("a profiled step", [*train, *rows_64, "--profile", str(out / "profile.txt")]),
        Job("the emoji preset", [*recipe, "--compile", "--out", str(out / "emoji")]),
        Job("the emoji preset as a graph", [*recipe, "--cuda-graph", "--out", str(out / "graph")]),
        Job("tests on the GPU", ["-m", "pytest", "-q", "tests/inference/test_image_folder.py",
                                 "tests/training/test_devices.py"]),
    ]
    if published:
        compare = ["-m", "experiments.compare_published", str(published), "--size", "full",
                   "--device", "cuda", "--dtype", "bfloat16", "--steps", "28", "--rounds", "3",
                   "--pixels", "512", "1024", "--compile"]
        jobs.insert(2, Job("drawing and reading", compare))
    return jobs


def run(command: list[str], seconds: float, log: TextIO) -> tuple[str, list[dict]]:
    """Run a Python program; return how it ended, and the lines of JSON that it printed.

    seconds: then the program and all that it has started are killed."""
    started_at = log.tell()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=log,
                               stderr=subprocess.STDOUT, start_new_session=True)
    try:
        code = process.wait(seconds)
        status = "done" if code == 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        status = f"stopped after {seconds:.0f} s"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:                           # all of them have ended
            pass
        process.wait()
    log.seek(started_at)
    results = [json.loads(line) for line in log if line.startswith("{")]
    return status, results


def run_all(jobs: list[Job], out: Path, limit: float) -> list[dict]:
    """Run the jobs within `limit` seconds; write OUT/results.json after each one, and return it."""
    rows = []
    started = time.monotonic()
    with open(out / "log.txt", "w+") as log:
        for job in jobs:
            left = limit - (time.monotonic() - started)
            row = dict(job=job.name, command=" ".join(job.command), status="skipped", results=[])
            if left >= LEAST:
                print(f"== {job.name}", file=log, flush=True)
                row["status"], row["results"] = run(job.command, min(left, MOST), log)
            rows.append(row)
            write_json(out / "results.json", rows)
            print(f"{job.name}: {row['status']}, {len(row['results'])} results, "
                  f"{limit - (time.monotonic() - started):.0f} s left", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("out", type=Path, help="a folder")
    parser.add_argument("--published", type=Path, help="a clone of D-DiT's repository")
    parser.add_argument("--limit", type=cli.number(float, 1), default=560, help="seconds (560)")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    published = args.published.resolve() if args.published else None
    run_all(make_jobs(out, published), out, args.limit)


if __name__ == "__main__":
    cli.run(main)
