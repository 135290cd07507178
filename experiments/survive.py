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

ROOT = Path(__file__).parent.parent


def start(out: Path, flags: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "train.py", "--out", str(out), *flags], cwd=ROOT, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process: subprocess.Popen) -> None:
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(said[-2000:])


def lines(out: Path) -> int:
    log = out / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def killed_run(out: Path, flags: list[str], kills: int, seed: int) -> tuple[int, int]:
    """Run to the end through `kills` SIGKILLs; return (kills, kills during a save).

    Every second kill comes a random time after the first new step, the others just after a save
    begins.
    """
    draw, done, saving = random.Random(seed), 0, 0
    while done < kills:
        process, before = start(out, flags), lines(out)
        while process.poll() is None and lines(out) in (0, before):
            time.sleep(0.002)
            before = min(before, lines(out))  # a resume first drops the log's rows after the save
        if done % 2 == 0:
            time.sleep(draw.uniform(0, 0.3))
        else:
            until = time.time() + 2
            while process.poll() is None and not list(out.glob(".tmp_step_*")) and time.time() < until:
                time.sleep(0.0005)
            time.sleep(draw.uniform(0, 0.03))
        if process.poll() is not None:                           # it ended before the kill
            finish(process)
            break
        saving += bool(list(out.glob(".tmp_*")) + list(out.glob(".*.tmp")))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done += 1
    finish(start(out, flags))
    return done, saving


def same_weights(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes()
               for name in ("model.safetensors", "weights.safetensors", "config.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--random", type=int, default=0, help="seed of the kills' moments")
    args, flags = parser.parse_known_args()
    flags = ["--steps", "60", "--save-every", "5", "--image-batch", "4", "--text-batch", "4", "--log-every",
             "1",
             "--sample-every", "0", *flags]
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        finish(start(whole, flags))
        done, saving = killed_run(killed, flags, args.kills, args.random)
        same = same_weights(whole, killed)
    found = "bit-identical" if same else "NOT the same"
    print(f"{done} kills, {saving} of them during a save: final weights {found}")
    sys.exit(not same or done < args.kills)


if __name__ == "__main__":
    main()
