"""The folder of a run: its identity, its checkpoints and its log.

    train.json          what identifies the run, and the settings of its last start
    log.jsonl           a row of numbers for each printed line of the log
    loss.png run.html   the log as curves; a page of curves, samples over time and settings
    step_N/             a checkpoint: all that resuming needs, in shards that any number of
                        processes can read; the newest two are kept
    step_N/digests.json the SHA-256 of each file there, because torch loads a flipped bit silently
    model.safetensors config.json tokenizer.json
                        the averaged weights in half precision, for sample.py
    weights.safetensors the weights themselves in float32, for --init

Files and checkpoints are written under a temporary name, and renamed when they are complete.
"""

import json
import os
import shutil
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Iterator

try:
    import fcntl
    import resource
except ImportError:                     # Windows
    fcntl = resource = None

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import checkpoint
import data
from common import cli, processes, progress
from common.cli import UserError, in_one_line, require, warn
from common.files import (inside, numbered, read_json_object, sha256, split_lines, write_json,
                          write_text)
from pretrained.safetensors_io import write_tensors
from training import distributed, plan
from training.checkpoint_reader import Planner, Reader
from viz import curves

# settings that identify a run: it can't resume with another value of one of them
IDENTITY = ("stage", "preset", "init", "vae", "t5", "tokenizer", "mask_embedding", "image_data",
            "text_data", "vocabulary", "pixels", "buckets", "text_length", "image_batch",
            "text_batch", "optimizer", "seed", "predicts", "times", "text_loss")
# increase it when the same settings no longer train the same run
RULES = 2       # 2: mixtures by samples, padding with </s>, the text loss over all positions
# CheckpointException is not a subclass of Exception
FAILURES = (CheckpointException, Exception)
# the last file of a checkpoint: without it the folder is incomplete
DIGESTS = "digests.json"
# a folder that is there until the first checkpoint is complete.  A run that is killed before may
# leave weights; where this folder is beside them, they are worth nothing, and the run starts over
UNSAVED = ".unsaved"


# -------------------------------------------------------------------------- files

def saved_steps(out: Path) -> list[int]:
    """Return the steps of the complete checkpoints of a run, in order."""
    return [step for step, folder in numbered(out, "step_").items() if (folder / DIGESTS).exists()]


def complete(out: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return [out / f"step_{step}" for step in saved_steps(out)]


def last_line(error: BaseException) -> str:
    """Return the last line of an error message, or the error's type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def digest_weights(init: str) -> str:
    """Hash the weights of --init, from which training starts; "" without --init."""
    if not init:
        return ""
    weights = checkpoint.weights_file(init, True)
    if weights.is_file():
        return sha256(weights)[:16]
    return data.fingerprint(init)


def add_digests(settings: dict) -> None:
    """Add hashes of the files that the settings name: a file may move between two starts."""
    settings["rules"] = RULES
    settings["init_digest"] = digest_weights(settings["init"])
    for name in ("image_data", "text_data"):
        settings[f"{name}_digest"] = [data.fingerprint(spec) for spec in settings[name]]
    for name in ("vae", "t5", "tokenizer", "mask_embedding"):
        path = settings.get(name)
        settings[f"{name}_digest"] = path and data.fingerprint(path)


def lock(out: Path) -> IO:
    """Lock a run's folder until the returned file is closed.  Raises UserError."""
    if fcntl is None:
        raise UserError("training needs the file locks of Linux or macOS; on Windows, run it in "
                        "WSL")
    file = open(out / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        reason = "another run is training here now; wait for it, or use another --out"
    except OSError as error:
        reason = (f"its file system can't lock a file ({error.strerror}), and two runs must not "
                  f"write here at once; use an --out on another disk")
    file.close()
    raise UserError(f"{out}: {reason}")


def read_settings(file: Path) -> dict:
    """Read a train.json.  Raises UserError for one that can't be of this program."""
    settings = read_json_object(file)
    for name in ("steps", "decay_steps", "rules"):
        value = settings.get(name, 0)
        require((type(value) is int, f"{file}: \"{name}\" is {ascii(value)[:60]}, expected a whole "
                 f"number; mend it, or use another --out"))
    return settings


def reader(folder: Path) -> Reader:
    return Reader(folder, set(read_json_object(folder / DIGESTS)))


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is physically on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_log(path: Path, until: float = float("inf")) -> list[dict]:
    """Read the rows of a log up to a step; skip broken lines, because a kill can cut one off."""
    rows = []
    if not path.exists():
        return rows
    for line in split_lines(path.read_text(errors="replace")):
        try:
            row = json.loads(line)
            if row["step"] <= until and isinstance(row["seconds"], float):
                rows.append(row)
        except (ValueError, TypeError, KeyError):
            continue
    return rows


def read_other(path: str) -> list[dict]:
    """Read another run's log, for --compare.  Raises UserError for one without a validation."""
    rows = read_log(Path(path))
    if not any("val_nats" in row for row in rows):
        raise UserError(f"--compare {path}: expected a log.jsonl with validations (--eval-every), "
                        f"found {len(rows)} rows without any")
    return rows


def show_setting(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def check_identity(out: Path, before: dict, settings: dict) -> None:
    """Raise UserError if a setting that identifies the run differs from the start of the run."""
    rules = before.get("rules", 1)
    if rules != RULES:
        raise UserError(f"{out}: this run began under older rules of training ({rules}, now "
                        f"{RULES}: mixtures, padding, the text loss); go on with the commit that "
                        f"began it, or start another with another --out (--init {out} takes its "
                        f"weights along)")
    differences = []
    for name in IDENTITY:
        key = f"{name}_digest"          # a file with the same contents may be anywhere
        if key not in before:
            key = name
        if key not in before or before[key] == settings[key]:
            continue
        old = show_setting(before.get(name))
        new = show_setting(settings[name])
        if old == new:
            new += " with other contents"
        differences.append(f"{cli.flag(name)} {old}, not {new}")
    require((not differences, f"{out}: this run began with {'; '.join(differences)}; go on so, or "
             f"start another with another --out (--init {out} takes its weights along)"))


# -------------------------------------------------------------------------- the run

class Run:
    """A run in its folder: `step`, `model` and its average `ema`, `optimizers`, the log's `rows`.

    settings: all flags.  `previous`: the settings of the previous start.  Methods are collective;
    process 0 writes and prints.  Raises UserError if the folder holds another run, or if another
    process trains this run now."""

    def __init__(self, out: Path, settings: dict, rank: int, fresh: bool = False,
                 resume_step: int = 0):
        self.out = out
        self.settings = settings
        self.rank = rank
        self.world = settings["world"]
        self.others = [read_other(path) for path in settings.get("compare", [])]
        self.saver = None               # the thread that writes a checkpoint
        self.saver_step = 0
        self.saver_group = None         # separate: the main thread communicates meanwhile
        self.save_error = ""            # what failed in the saver
        self.keeps_all = False          # it deletes no older checkpoint
        self.stop_reason = None         # an error that ends the run once this step is saved
        self.outdated = []              # files and folders that `begin` deletes
        if processes.several():
            self.saver_group = dist.new_group(backend="gloo")
        self.step, self.rows, self.previous, self.key = processes.first(
            lambda: self.open(fresh, resume_step))
        self.seconds_before = 0.0       # all earlier starts
        if self.rows:
            self.seconds_before = self.rows[-1]["seconds"]

    def open(self, fresh: bool, resume_step: int) -> tuple[int, list[dict], dict, str]:
        """Lock the folder, and find out how to start; change nothing yet.  Process 0 only.

        Return the step to resume from or 0, the log's rows up to it, the settings of the previous
        start, and the key that seeds all random draws."""
        out = self.out
        settings = self.settings
        init = settings["init"]
        if init and out.resolve() == Path(init).resolve():
            raise UserError(f"--out {out}: is --init's folder, its weights would be lost; use "
                            f"another --out")
        out.mkdir(parents=True, exist_ok=True)
        self.lock = lock(out)
        add_digests(settings)
        key = f"{settings['seed']} {settings['stage']} {settings['init_digest']}"
        before = {}
        if (out / "train.json").exists():
            before = read_settings(out / "train.json")
        results = sorted([*out.glob("*.safetensors"), *numbered(out, "step_").values()])
        if results and not before:
            raise UserError(f"{out}: holds {results[0].name}, which no run made there; use another "
                            f"--out")
        steps = saved_steps(out)
        saved = ", ".join(f"step_{step}" for step in steps) or "no checkpoint"
        require((not resume_step or not fresh, f"--resume-step {resume_step}: --fresh would delete it; "
                 f"give one of the two"),
                (resume_step in (0, *steps), f"--resume-step {resume_step}: {out} has {saved}"))
        unfinished = [*out.glob(".tmp_*"), *out.glob(UNSAVED)]   # saves that were killed or failed
        if results and not steps and not unfinished and not fresh:
            raise UserError(f"{out}: holds weights and no whole step_* folder to go on from; "
                            f"--fresh starts over, another --out keeps them")
        self.outdated = unfinished
        if fresh:
            self.outdated += [*results, *numbered(out, "left_step_").values(),
                              *numbered(out, "samples_", ".png").values()]
        if fresh or not steps:
            return 0, [], {}, key
        check_identity(out, before, settings)
        step = resume_step or steps[-1]
        return step, read_log(out / "log.jsonl", step), before, key

    def begin(self, models, optimizers: list, about: dict, work: dict[str, float]) -> None:
        """Attach the models and optimizers, and load the checkpoint to resume from, if any.

        models: `training.models.Models`.  about: entries of config.json besides the sizes.
        work: samples, tokens and TFLOP of a step, from `plan.work`.  Raises UserError."""
        self.models = models
        self.model = models.trainable
        self.optimizers = optimizers
        self.about = about
        self.work = work
        self.ema = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        if self.step:
            self.load(self.out / f"step_{self.step}")
        self.started = time.monotonic()
        self.first_step = self.step
        self.start_row()
        if self.rank == 0:
            self.delete_outdated()
            self.forget_later_steps()
            if self.settings["steps"] > self.step:
                self.write_settings()
        processes.sync()

    def delete_outdated(self) -> None:
        """Delete what a killed start or, with --fresh, the old run has left.  Process 0 only.

        It comes so late that a start which is refused deletes nothing."""
        for path in self.outdated:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        if not self.step:
            (self.out / UNSAVED).mkdir()

    def forget_later_steps(self) -> None:
        """Rename later checkpoints to left_step_N; cut the log at this step.  Process 0 only."""
        for step in saved_steps(self.out):
            if step > self.step:
                left = self.out / f"left_step_{step}"
                shutil.rmtree(left, ignore_errors=True)          # of an earlier --resume-step
                (self.out / f"step_{step}").rename(left)
        self.write_log()

    def write_settings(self) -> None:
        write_json(self.out / "train.json", self.settings)

    def write_log(self) -> None:
        write_text(self.out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """In this context, an error of writing makes the run save and end after the next step."""
        try:
            yield
        except (OSError, UserError) as error:
            if isinstance(error, OSError):
                error.filename = error.filename or path
            self.stop_reason = error

    def due(self, every: int) -> bool:
        """Return True at each `every`-th step and at the last one; never if `every` is 0."""
        return every > 0 and (self.step % every == 0 or self.step == self.settings["steps"])

    def end(self, steps: int) -> None:
        """Wait for the last save, write the weights if they are missing, print how to continue."""
        self.wait()
        if not processes.first(self.is_exported):                # a kill can come between two files
            self.export()
        problem_here = in_one_line(self.stop_reason) if self.stop_reason else ""
        for problem in processes.gather([problem_here]):
            require((not problem, f"{problem}; step {self.step} is saved, and the same command goes "
                     f"on from there"))
        if self.rank > 0:
            return
        if self.step < steps:
            print(f"stopped at step {self.step}, saved; the same command goes on from here",
                  flush=True)
        else:
            print(f"{self.out}: has its {steps} steps; more --steps go on, --init {self.out} "
                  f"starts another run", flush=True)

    def close(self) -> None:
        """Unlock the folder."""
        if self.rank == 0:
            self.lock.close()

    # ---------------------------------------------------------------------- reading a checkpoint

    def newest(self) -> Path | str:
        """Return the newest checkpoint, or "the start"."""
        checkpoints = complete(self.out)
        return checkpoints[-1] if checkpoints else "the start"

    def state(self) -> dict:
        """Return the contents of a checkpoint, sharded as in memory."""
        weights, optimizer = get_state_dict(self.model, self.optimizers)
        return {"model": weights, "optimizer": optimizer, "ema": self.ema}

    def load(self, folder: Path) -> None:
        """Read a checkpoint, written by any number of processes; fill `ema` in place.

        Raises UserError."""
        processes.first(lambda: self.verify(folder))
        state = self.state()
        try:
            dcp.load(state, checkpoint_id=folder, storage_reader=reader(folder), planner=Planner(),
                     no_dist=not processes.several())
        except FAILURES as error:
            raise UserError(f"{folder}: does not fit this model ({last_line(error)}); it is not "
                            f"damaged, go on with the code that wrote it")
        set_state_dict(self.model, self.optimizers, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])
        for optimizer in self.optimizers:                        # the checkpoint's may be another
            for group in optimizer.param_groups:
                group["weight_decay"] = self.settings["weight_decay"]

    def verify(self, folder: Path) -> None:
        """Raise UserError if a file of a checkpoint has changed since it was written."""
        older = [step for step in saved_steps(self.out) if step < self.step]
        advice = "--fresh starts over"
        if older:
            advice = f"--resume-step {older[-1]} takes the one before"
        try:
            for name, digest in read_json_object(folder / DIGESTS).items():
                file = inside(folder, name)
                require((file.exists() and sha256(file) == digest,
                         f"{file}: damaged, its SHA-256 is not what was written"))
            reader(folder).read_metadata()
        except UserError as error:
            raise UserError(f"{error}; {advice}")

    # ---------------------------------------------------------------------- writing a checkpoint

    def save(self) -> None:
        """Export the weights, and start a thread that writes a checkpoint.

        Raises UserError, also if the save before has failed."""
        self.join_saver()
        if self.save_error:
            self.save_again()
        self.saver_step = self.step
        temporary = self.out / f".tmp_step_{self.step}"
        if processes.first(lambda: self.prepare(temporary)):
            try:
                future = dcp.async_save(self.state(), checkpoint_id=temporary,
                                        process_group=self.saver_group,
                                        no_dist=not processes.several())
            except FAILURES as error:
                raise self.failed(last_line(error))
            self.saver = threading.Thread(target=self.finish, args=(future, temporary))
            self.saver.start()
        self.export()

    def prepare(self, temporary: Path) -> bool:
        """Make the folder to write to, unless this step is saved already.  Process 0 only.

        If the run is killed, this folder shows `open` that a save had begun."""
        if self.step in saved_steps(self.out):
            return False
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            if not (self.out / "train.json").exists():           # someone has deleted the folder
                self.write_settings()
                self.write_log()
        except OSError as error:
            raise self.failed(last_line(error))
        return True

    def finish(self, future: Future, temporary: Path) -> None:
        """Hash the files that all processes wrote; publish the checkpoint.  Runs in the saver."""
        try:
            digests = {}
            problem = ""
            hashed = self.hash_files(future, temporary)
            for part, part_problem in processes.gather([hashed], self.saver_group):
                digests |= part
                problem = problem or part_problem
            if self.rank == 0 and not problem:
                problem = self.publish(temporary, digests)
            self.save_error = processes.gather([problem], self.saver_group)[0]
        except FAILURES as error:                                # another process was lost
            self.save_error = last_line(error)

    def hash_files(self, future: Future, temporary: Path) -> tuple[dict[str, str], str]:
        """Return the SHA-256 of each file that this process wrote, and an error message or ""."""
        try:
            future.result()
            files = list(temporary.glob(f"__{self.rank}_*"))
            if self.rank == 0:
                files.append(temporary / ".metadata")
            return {file.name: sha256(file) for file in files}, ""
        except FAILURES as error:
            return {}, last_line(error)

    def publish(self, temporary: Path, digests: dict[str, str]) -> str:
        """Rename a complete checkpoint; of the older ones, keep only the newest.

        Return an error message, or ""."""
        folder = self.out / f"step_{self.saver_step}"
        outdated = [] if self.keeps_all else complete(self.out)[:-1]
        if folder.exists():                                      # incomplete, see `prepare`
            outdated.append(folder)
        try:
            write_json(temporary / DIGESTS, digests)
            for path in [*temporary.iterdir(), temporary]:
                sync_to_disk(path)
            for old in outdated:
                deleted = self.out / f".tmp_old_{old.name}"
                old.rename(deleted)                              # a kill can't leave half of it
                shutil.rmtree(deleted)
            temporary.rename(folder)
            sync_to_disk(self.out)
            shutil.rmtree(self.out / UNSAVED, ignore_errors=True)
        except OSError as error:
            return last_line(error)
        return ""

    def join_saver(self) -> None:
        """Wait for the save in progress, if any; then `save_error` has its result."""
        if self.saver is not None:
            self.saver.join()
            self.saver = None

    def wait(self) -> None:
        """Wait for the save in progress, if any.  Raises UserError if it failed."""
        self.join_saver()
        if self.save_error:
            raise self.failed(self.save_error)

    def save_again(self) -> None:
        """Save this step where an earlier save has failed, and end with a UserError."""
        self.join_saver()                           # another process may know of its error before
        why, step = self.save_error, self.saver_step
        error = self.failed(why)
        self.save_error = ""
        self.rescue()
        if self.step not in processes.first(lambda: saved_steps(self.out)):
            raise error
        raise UserError(f"{self.out}: step {step} could not be saved ({why}), but step {self.step} "
                        f"is, and the same command goes on from there")

    def rescue(self) -> None:
        """Save the weights after the last complete step, and delete no older checkpoint."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.step > self.first_step:
            self.keeps_all = True
            self.save()
            self.wait()

    def failed(self, why: str) -> UserError:
        """Delete what was written of this step, to free the disk, and return the error to raise."""
        self.join_saver()
        if self.rank == 0:
            for folder in self.out.glob(".tmp_*"):
                shutil.rmtree(folder, ignore_errors=True)
            for file in self.out.glob(".*.tmp"):
                file.unlink(missing_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)
        weights = [*self.model.parameters(), *self.ema.values()]
        # the optimizers' state is as large again
        needed = 2 * sum(p.numel() * p.element_size() for p in weights)
        free = shutil.disk_usage(self.out).free
        return UserError(f"{self.out}: step {self.saver_step} could not be saved ({why}): it takes "
                         f"about {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free; what "
                         f"was saved before is intact ({self.newest()}); make room and give the "
                         f"same command again")

    # ---------------------------------------------------------------------- weights

    def export(self) -> None:
        """Write the averaged weights, for sample.py, and the weights in float32, for --init.

        Raises UserError if a file can't be written."""
        dtype = self.half_precision()
        weights = self.models.extra_tensors | dict(self.model.named_parameters())
        average = self.models.extra_tensors | self.ema
        mask = {}
        if "mask.vector" in average:
            mask["vector"] = average.pop("mask.vector")
        if self.rank > 0:               # process 0 gathers each tensor as it writes it, in order
            for tensor in [*weights.values(), *mask.values(), *average.values()]:
                distributed.whole(tensor)
            return
        out = self.out
        gather = distributed.whole
        try:
            write_tensors(out / "weights.safetensors", weights, torch.float32, gather)
            if mask:
                write_tensors(out / checkpoint.MASK_EMBEDDING, mask, torch.float32, gather)
            checkpoint.save(out, average, self.model["mmdit"].config, self.models.tokenizer, dtype,
                            gather, step=self.step, **self.about)
        except OSError as error:
            raise self.failed(last_line(error))
        self.show()

    def half_precision(self) -> torch.dtype:
        """Return float16, or bfloat16 if a weight is too large for float16."""
        largest = 0.0
        for tensor in self.ema.values():
            part = distributed.local(tensor)
            if part.numel():
                largest = max(largest, float(part.abs().max()))
        overflows_here = largest > torch.finfo(torch.float16).max
        [overflows] = processes.agree(overflows_here, device=self.models.device)
        return torch.bfloat16 if overflows else torch.float16

    def is_exported(self) -> bool:
        """Return True if the weights of this step are written.  Process 0 only."""
        for name in ("config.json", "tokenizer.json", "model.safetensors", "weights.safetensors"):
            if not (self.out / name).exists():
                return False
        return read_json_object(self.out / "config.json").get("step") == self.step

    def show(self) -> None:
        """Write loss.png and run.html.  Process 0 only."""
        with self.writing(self.out / "run.html"):
            curves.curves(self.rows, self.out / "loss.png", self.others)
            curves.page(self.out, self.settings, self.step)

    # ---------------------------------------------------------------------- the log

    def start_row(self) -> None:
        """Empty the sums that become the next row of the log."""
        self.sums = {}                  # of each number
        self.summed = 0                 # steps in these sums
        self.bad_samples = []           # a message about each
        self.cut_texts = 0
        self.cut_example = ""           # what the first one lost

    def note(self, numbers: dict[str, Tensor], batch) -> None:
        """Add a step to the next row, which holds the means of its numbers.

        numbers: scalars by their names in the row, the same names in each step."""
        self.sums = {name: self.sums.get(name, 0) + value for name, value in numbers.items()}
        self.summed += 1
        self.bad_samples += batch.bad_samples
        self.cut_texts += batch.cut_texts
        self.cut_example = self.cut_example or batch.cut_example         # workers cut other texts

    def log(self, learning_rate: float, steps: int, measured: dict) -> None:
        """Write and print a row: means over the steps since the last row, pace, and `measured`.

        steps: --steps.  The pace is that of all processes since this start; the time of validation,
        sampling and saving counts."""
        sums = torch.stack([*self.sums.values()])
        means = dict(zip(self.sums, processes.mean(sums / self.summed).tolist()))
        elapsed = max(time.monotonic() - self.started, 1e-6)     # some clocks stand for a while
        pace = (self.step - self.first_step) / elapsed           # steps per second
        row = dict(step=self.step, over=self.summed) | means
        row["lr"] = learning_rate
        row["seconds"] = round(self.seconds_before + elapsed, 1)
        for name, amount in self.work.items():
            row[f"{name}_per_s"] = float(f"{amount * pace:.4g}")
        row |= self.device_use(pace) | measured | self.count_samples()
        self.rows.append(row)
        self.start_row()
        if self.rank > 0:
            return
        path = self.out / "log.jsonl"
        with self.writing(path), open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
        grad_norm = means.pop("grad_norm")
        numbers = "  ".join(f"{name.removesuffix('_loss')} {x:.4f}" for name, x in means.items())
        lines = [f"step {self.step}/{steps}  {numbers}  grad {grad_norm:.2f}  "
                 f"{progress.pace(pace, 'step')}  {progress.time_left((steps - self.step) / pace)}"]
        scores = [f"{name} {x:.4f}" for name, x in measured.items() if isinstance(x, float)]
        if scores:
            lines.append(f"at step {self.step}  {'  '.join(scores)}")
        with self.writing(Path("stdout")):
            print("\n".join(lines), flush=True)

    def device_use(self, pace: float) -> dict[str, float]:
        """Return "gib", the peak memory of this process, on its GPU if it has one, and "mfu".

        mfu: FLOP/s as a share of the peak of all devices, if the peak is known.  pace: steps/s."""
        device = self.models.device
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if sys.platform != "darwin":
                memory *= 1024                                   # from KiB; macOS counts bytes
        use = {"gib": round(memory / 2**30, 3)}
        peak = plan.peak(device, self.settings["dtype"]) * self.world
        if peak:
            use["mfu"] = round(self.work["tflop"] * pace / peak, 4)
        return use

    def count_samples(self) -> dict:
        """Count, over all processes, the samples that were replaced and the texts that were cut."""
        bad_samples = processes.gather(self.bad_samples)
        cut_texts = sum(processes.gather([self.cut_texts]))
        cut_examples = processes.gather([self.cut_example])
        counts = {}
        if bad_samples:
            counts.update(bad_samples=len(bad_samples), bad_names=bad_samples[:20])
        if cut_texts:
            counts["cut_texts"] = cut_texts
            is_first = not any("cut_texts" in row for row in self.rows)
            if is_first:
                example = next(filter(None, cut_examples), "")
                warn(f"a text has {example}; --text-length has more room, cut_texts in log.jsonl "
                     f"counts such texts")
        return counts
