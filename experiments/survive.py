"""Kill a training run with SIGKILL at random moments, half of them while it saves, and check that
it ends with the weights of an undisturbed run.

    python -m experiments.survive --kills 20        # 60 steps, a save every 5; two minutes on two cores

Other flags go to train.py.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.cli import ROOT


def start(out: Path, flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, "train.py", "--out", str(out), *flags]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors[-2000:])


def count_rows(out: Path) -> int:
    log = out / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def wait_for_a_step(process: subprocess.Popen, out: Path) -> None:
    """Wait until the log has a new row, or the process ends."""
    before = count_rows(out)
    while process.poll() is None and count_rows(out) in (0, before):
        time.sleep(0.002)
        before = min(before, count_rows(out))   # a resume first drops the log's rows after the save


def wait_for_a_save(process: subprocess.Popen, out: Path) -> None:
    """Wait until a save begins, the process ends, or two seconds have passed."""
    until = time.time() + 2
    while process.poll() is None and not list(out.glob(".tmp_step_*")) and time.time() < until:
        time.sleep(0.0005)


def killed_run(out: Path, flags: list[str], kills: int, seed: int) -> tuple[int, int]:
    """Run to the end through `kills` SIGKILLs; return (kills, kills during a save).

    Every second kill comes a random time after the first new step, the others just after a save
    begins."""
    draw = random.Random(seed)
    done = during_saves = 0
    while done < kills:
        process = start(out, flags)
        wait_for_a_step(process, out)
        if done % 2 == 0:
            time.sleep(draw.uniform(0, 0.3))
        else:
            wait_for_a_save(process, out)
            time.sleep(draw.uniform(0, 0.03))
        if process.poll() is not None:                           # it ended before the kill
            finish(process)
            break
        unfinished = [*out.glob(".tmp_*"), *out.glob(".*.tmp")]
        during_saves += bool(unfinished)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done += 1
    finish(start(out, flags))
    return done, during_saves


def same_weights(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes()
               for name in ("model.safetensors", "weights.safetensors", "config.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--random", type=int, default=0, help="seed of the kills' moments")
    args, flags = parser.parse_known_args()
    flags = ["--steps", "60", "--save-every", "5", "--image-batch", "4", "--text-batch", "4",
             "--log-every", "1", "--sample-every", "0", *flags]
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, killed = Path(folder) / "undisturbed", Path(folder) / "killed"
        finish(start(undisturbed, flags))
        done, during_saves = killed_run(killed, flags, args.kills, args.random)
        same = same_weights(undisturbed, killed)
    verdict = "bit-identical" if same else "NOT the same"
    print(f"{done} kills, {during_saves} of them during a save: final weights {verdict}")
    sys.exit(not same or done < args.kills)


if __name__ == "__main__":
    main()
