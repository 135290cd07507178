"""A run's folder: its log, its checkpoints, and going on from the newest.

    log.jsonl, loss.png     every number, and both losses as curves
    train.json              the configuration
    step_*/                 all that a resume needs (torch.distributed.checkpoint); the newest two
    model.safetensors config.json tokenizer.json        the averaged weights, that sample.py reads

What is written is written beside and renamed when it is whole.
"""

import json
import shutil
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import checkpoint
import parallel
import show
from cli import UserError


def number(folder: Path) -> int:
    """The step of a step_* folder."""
    return int(folder.name.removeprefix("step_"))


class Run:
    """A folder, what is trained in it, and where it stands: `step`, and the rows of the log.

    about: what else goes into config.json.  Methods are collective; process 0 alone writes and prints."""

    def __init__(self, out: Path, model: nn.ModuleDict, optimizers: list, ema: dict[str, Tensor],
                 keep: list[int] | None, about: dict, rank: int, world: int):
        self.out, self.model, self.optimizers, self.ema = out, model, optimizers, ema
        self.keep, self.about, self.rank, self.world = keep, about, rank, world
        self.step, self.rows, self.before = 0, [], 0.0           # before: seconds that earlier processes took

    def newest(self) -> Path | None:
        """The newest complete step_* folder."""
        done = [p for p in self.out.glob("step_*") if (p / ".metadata").exists()]
        return max(done, key=number, default=None)

    def begin(self, fresh: bool, config: dict) -> None:
        """Load the newest checkpoint, if there is one, and open the log behind it.  Raises UserError."""
        begun = self.newest()
        if begun is None and (self.out / "log.jsonl").exists() and not fresh:
            raise UserError(f"{self.out}: holds a log and no complete step_* folder to resume from; "
                            f"use --fresh to start over, or another --out")
        if begun is not None and not fresh:
            self.load(begun)
        parallel.sync(self.world)
        if self.step:
            self.rows = read_log(self.out / "log.jsonl", self.step)   # without what came after the checkpoint
            self.before = self.rows[-1]["seconds"] if self.rows else 0.0
        self.started, self.first = time.time(), self.step
        self.sums, self.summed = 0, 0                            # losses and gradient norm since the last row
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            for old in self.out.glob("step_*") if fresh else []:
                shutil.rmtree(old)
            checkpoint.write_json(self.out / "train.json", config)
            temporary = self.out / ".log.jsonl.tmp"
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            temporary.replace(self.out / "log.jsonl")

    def load(self, folder: Path) -> None:
        weights, state = get_state_dict(self.model, self.optimizers)
        held = {"model": weights, "optimizer": state, "ema": self.ema}
        try:
            dcp.load(held, checkpoint_id=folder, no_dist=self.world == 1)
        except (CheckpointException, RuntimeError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{folder}: can't be resumed from ({reason}); delete it to go on from the last")
        set_state_dict(self.model, self.optimizers, model_state_dict=held["model"],
                       optim_state_dict=held["optimizer"])
        self.step = number(folder)

    def save(self, resumable: bool = True) -> None:
        """Everything a resume needs, unless that is there, and the averaged weights.  Raises UserError."""
        averaged = {name: parallel.whole(tensor) for name, tensor in self.ema.items()}
        try:
            if resumable:
                self.save_step()
            if self.rank == 0:
                checkpoint.save(self.out, averaged, self.model["mmdit"].config, self.keep, torch.float16,
                                step=self.step, **self.about)
                show.curves(self.rows, self.out / "loss.png")
        except (CheckpointException, SafetensorError, OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{self.out}: step {self.step} could not be saved ({reason}); what was saved "
                            f"before is intact ({self.newest()}); make room and give the same command again")

    def save_step(self) -> None:
        weights, state = get_state_dict(self.model, self.optimizers)
        temporary, folder = self.out / f".tmp_step_{self.step}", self.out / f"step_{self.step}"
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        parallel.sync(self.world)
        dcp.save({"model": weights, "optimizer": state, "ema": self.ema}, checkpoint_id=temporary,
                 no_dist=self.world == 1)
        if self.rank == 0 and not folder.exists():
            temporary.rename(folder)
            for old in sorted(self.out.glob("step_*"), key=number)[:-2]:
                shutil.rmtree(old)
        parallel.sync(self.world)

    def note(self, losses: Tensor) -> None:
        """Add one step's (image loss, text loss, gradient norm), (3,), to the row that is due."""
        self.sums, self.summed = self.sums + losses, self.summed + 1

    def log(self, rate: float, samples: int, steps: int) -> None:
        """A row of means since the last one, and a line with the pace and the time left."""
        image, text, norm = parallel.mean(self.sums / self.summed, self.world).tolist()
        self.sums, self.summed, elapsed = 0, 0, time.time() - self.started
        pace, seconds = (self.step - self.first) / elapsed, round(self.before + elapsed, 1)
        self.rows.append(dict(step=self.step, image_loss=image, text_loss=text, grad_norm=norm, lr=rate,
                              seconds=seconds, samples_per_s=round(samples * pace, 1)))
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as log:
                log.write(json.dumps(self.rows[-1]) + "\n")
            left = (steps - self.step) / pace / 60
            print(f"step {self.step}/{steps}  image {image:.4f}  text {text:.4f}  grad {norm:.2f}  "
                  f"{samples * pace:.0f} samples/s  {left:.1f} min left", flush=True)


def read_log(path: Path, until: int) -> list[dict]:
    """The rows of a log up to a step; a last line that was cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return [row for row in rows if row["step"] <= until]
