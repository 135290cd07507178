"""A run's folder: what the run is, its checkpoints, its log, and going on from the newest.

    train.json          what the run is, and the settings of its last start
    log.jsonl           a row of numbers for each line on the screen
    loss.png run.html   the log drawn; a page of it, of the samples over time and of the settings
    step_N/             all that a resume needs, in shards that any number of processes reads; the newest two
    step_N/digests.json the SHA-256 of each file there: DCP itself would load a flipped bit without a word
    model.safetensors config.json tokenizer.json    the averaged weights in half precision, for sample.py
    weights.safetensors the weights themselves in float32, that --init reads

What is written is written beside and renamed when it is whole; a step_N is synced to the disk before.
"""

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import IO

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
from common import cli, processes
from common.cli import UserError
from common.files import read_json_object, replacing, sha256, write_json
from common.progress import pace, time_left
from pretrained.safetensors_io import write_tensors
from training import distributed, plan
from viz import curves

# what a run is: with another value of one of these it would be another run
IDENTITY = ("stage", "preset", "init", "vae", "t5", "mask_embedding", "image_data", "text_data", "vocabulary",
            "pixels", "buckets", "text_length", "image_batch", "text_batch", "optimizer", "seed", "predicts",
            "times", "text_loss")
REMOVED = {"image_loss": "velocity", "text_mean": "token", "padding": "all"}     # settings of older runs
# what a step draws and learns, beside the settings: raised whenever the same settings would train another run
RULES = 2               # 2: mixtures by samples, padding with </s>, the text loss over all positions
FAILURES = (CheckpointException, RuntimeError, OSError, ValueError)      # CheckpointException is no Exception
DIGESTS = "digests.json"


def number(folder: Path) -> int:
    """The step of a step_* folder."""
    return int(folder.name.removeprefix("step_"))


def complete(out: Path) -> list[Path]:
    """The whole step_* folders of a run, oldest first."""
    whole = [p for p in out.glob("step_*") if p.name[5:].isdigit() and (p / DIGESTS).exists()]
    return sorted(whole, key=number)


def reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def digest(init: str) -> str:
    """Of the weights that --init takes: their SHA-256 from a folder of ours; "" where none is given."""
    file = checkpoint.own_weights(init, True)
    return sha256(file)[:16] if init and file.is_file() else init and data.fingerprint(init)


def lock(out: Path) -> IO:
    """Take the lock of a run's folder, until the file that is returned is closed.  Raises UserError."""
    if fcntl is None:
        raise UserError("training needs the file locks of Linux or macOS; on Windows, run it in WSL")
    file = open(out / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"{out}: another run is training here now; wait for it, or use another --out")
    return file


class Run:
    """A folder, what is trained in it, and where it stands: `step`, log `rows`, what it `was`.

    settings: every flag.  Opening the folder takes its lock; UserError where it holds another run's work.
    Methods are collective; process 0 alone writes and prints."""

    def __init__(self, out: Path, settings: dict, rank: int, fresh: bool = False, resume_step: int = 0):
        self.out, self.settings, self.rank, self.world = out, settings, rank, settings["world"]
        self.others = [read_other(Path(path)) for path in settings.get("compare", [])]  # before --fresh acts
        self.group = dist.new_group(backend="gloo") if processes.several() else None  # of the saving thread
        self.thread, self.error, self.saved = None, "", 0
        found = processes.first(lambda: self.open(fresh, resume_step))
        self.folder, self.rows, self.was, self.key = found
        self.step = number(Path(self.folder)) if self.folder else 0
        self.before = self.rows[-1]["seconds"] if self.rows else 0.0     # seconds that earlier processes took

    def open(self, fresh: bool, resume_step: int) -> tuple[str, list[dict], dict, str]:
        """(folder to go on from or "", the log's rows until there, the settings before, the key of draws)."""
        out, settings = self.out, self.settings
        if settings["init"] and out.resolve() == Path(settings["init"]).resolve():
            raise UserError(f"--out {out}: is --init's folder, its weights would be lost; use another --out")
        out.mkdir(parents=True, exist_ok=True)
        self.lock = lock(out)
        settings |= {"rules": RULES, "init_digest": digest(settings["init"])} | {
            f"{name}_digest": [data.fingerprint(spec) for spec in settings[name]]
            for name in ("image_data", "text_data")} | {
            f"{name}_digest": settings.get(name) and data.fingerprint(settings[name])
            for name in ("vae", "t5", "mask_embedding")}
        key = f"{settings['seed']} {settings['stage']} {settings['init_digest']}"
        was = read_json_object(out / "train.json") if (out / "train.json").exists() else {}
        held = sorted([*out.glob("*.safetensors"), *out.glob("step_*")])
        if held and not was:
            raise UserError(f"{out}: holds {held[0].name}, which no run made there; use another --out")
        steps, stale = complete(out), list(out.glob(".tmp_*"))
        if held and not steps and not stale and not fresh:
            raise UserError(f"{out}: holds weights and no whole step_* folder to go on from; --fresh starts "
                            f"over, another --out keeps them")
        for left in stale:                                       # a kill came in the middle of a save
            shutil.rmtree(left)
        for old in held if fresh else []:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        if fresh or not steps:                                   # or the kill came before the first was whole
            return "", [], {}, key
        self.compare(was)
        chosen = [p for p in steps if number(p) == (resume_step or number(steps[-1]))]
        if not chosen:
            raise UserError(f"--resume-step {resume_step}: {out} has {', '.join(p.name for p in steps)}")
        return str(chosen[0]), read_log(out / "log.jsonl", number(chosen[0])), was, key

    def compare(self, was: dict) -> None:
        """Raise UserError where a flag that makes the run what it is has another value than when it began."""
        if was.get("rules", 1) != RULES:
            raise UserError(f"{self.out}: this run began under older rules of training ({was.get('rules', 1)}, now "
                            f"{RULES}: mixtures, padding, the text loss); go on with the commit that began it, or "
                            f"start another with another --out (--init {self.out} takes its weights along)")
        for name, default in REMOVED.items():
            if was.get(name, default) != default:
                raise UserError(f"{self.out}: this run began with {cli.flag(name)} {was[name]}, which is no "
                                f"more; go on with the commit that began it, or start another with another --out")
        shown = lambda value: " ".join(value) if isinstance(value, list) else value
        for name in IDENTITY:
            old, new, hashed = was.get(name), self.settings[name], f"{name}_digest"
            if hashed in was and was[hashed] == self.settings[hashed]:
                continue                                         # the same file, wherever it lies
            if name in was and (old != new or hashed in was):
                changed = " with other contents" if old == new else ""
                said = f"{cli.flag(name)} {shown(old)}, not {shown(new)}{changed}"
                raise UserError(f"{self.out}: this run began with {said}; go on so, or start another with "
                                f"another --out (--init {self.out} takes its weights along)")

    def begin(self, models, optimizers: list, about: dict, work: dict[str, float]) -> None:
        """Take what is trained, and fill it from the checkpoint to go on from.  Raises UserError.

        models: `training.models.Models`; about: what goes into config.json beside the sizes; work: `plan.work`."""
        self.model, self.tokenizer, self.kept = models.learns, models.tokenizer, models.kept
        self.optimizers, self.about, self.work = optimizers, about, work
        self.ema = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        if self.folder:
            self.load(Path(self.folder))
        self.started, self.first = time.time(), self.step
        self.sums, self.summed = {}, 0                           # losses and gradient norm since the last row
        self.bad, self.cut = [], []                              # since then: samples of no use, texts cut
        if self.rank == 0:
            for newer in [p for p in complete(self.out) if number(p) > self.step]:
                newer.rename(self.out / f"left_{newer.name}")    # another future begins; that one is kept
            if self.settings["steps"] > self.step:
                write_json(self.out / "train.json", self.settings)
            with replacing(self.out / "log.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        processes.sync()

    def newest(self) -> Path | str:
        """The newest whole checkpoint."""
        return (complete(self.out) or ["the start"])[-1]

    def state(self) -> dict:
        weights, optimizer = get_state_dict(self.model, self.optimizers)
        return {"model": weights, "optimizer": optimizer, "ema": self.ema}

    # ------------------------------------------------------------------------------------------- checkpoints

    def load(self, folder: Path) -> None:
        """Whatever the processes and the sharding it was saved with; a file that was changed is named."""
        processes.first(lambda: self.verify(folder))
        state = self.state()
        try:
            dcp.load(state, checkpoint_id=folder, no_dist=not processes.several())
        except FAILURES as error:
            raise UserError(f"{folder}: does not fit this model ({reason(error)}); it is whole, and goes on "
                            f"with the code that wrote it")
        set_state_dict(self.model, self.optimizers, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])

    def verify(self, folder: Path) -> None:
        digests = read_json_object(folder / DIGESTS)
        same = lambda name: (folder / name).exists() and sha256(folder / name) == digests[name]
        bad = [name for name in digests if not same(name)]
        if bad:
            older = [str(number(p)) for p in complete(self.out) if number(p) < number(folder)]
            offer = f"--resume-step {older[-1]} takes the one before" if older else "--fresh starts over"
            raise UserError(f"{folder / bad[0]}: damaged, its SHA-256 is not what was written; {offer}")

    def save(self) -> None:
        """The weights, and in a thread all that a resume needs, when the save before is done.  UserError."""
        self.wait()
        self.saved, temporary = self.step, self.out / f".tmp_step_{self.step}"
        if processes.first(lambda: self.prepare(temporary)):
            try:
                future = dcp.async_save(self.state(), checkpoint_id=temporary, process_group=self.group,
                                        no_dist=not processes.several())
            except FAILURES as error:
                raise self.failed(reason(error))
            self.thread = threading.Thread(target=self.finish, args=(future, temporary, self.step))
            self.thread.start()
        self.export()

    def prepare(self, temporary: Path) -> bool:
        """Whether a step is not saved yet; then make a folder: after a kill it says that a save had begun."""
        if (self.out / f"step_{self.step}" / DIGESTS).exists():
            return False
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        except OSError as error:
            raise self.failed(reason(error))
        return True

    def finish(self, future, temporary: Path, step: int) -> None:
        """In the thread: digest what this process wrote; then process 0 makes the folder a checkpoint."""
        problem, digests = "", {}
        try:
            try:
                future.result()
                files = [*temporary.glob(f"__{self.rank}_*"), *[temporary / ".metadata"] * (self.rank == 0)]
                digests = {path.name: sha256(path) for path in files}
            except FAILURES as error:
                problem = reason(error)
            gathered = [(digests, problem)]
            if self.group is not None:
                gathered = [None] * dist.get_world_size()
                dist.all_gather_object(gathered, (digests, problem), group=self.group)
            said = [next((problem for _, problem in gathered if problem), "")]
            if self.rank == 0 and not said[0]:
                digests = {name: value for some, _ in gathered for name, value in some.items()}
                said = [self.complete(temporary, step, digests)]
            if self.group is not None:
                dist.broadcast_object_list(said, src=0, group=self.group)
            self.error = said[0]
        except FAILURES as error:                                # another process was lost
            self.error = reason(error)

    def complete(self, temporary: Path, step: int, digests: dict) -> str:
        """Rename a folder that is whole and drop the oldest; returns what went wrong, or nothing."""
        folder = self.out / f"step_{step}"
        try:
            (temporary / DIGESTS).write_text(json.dumps(digests, indent=1) + "\n")
            for path in [*temporary.iterdir(), temporary]:
                sync_file(path)
            for old in [folder] * folder.exists() + complete(self.out)[:-1]:    # that of this step: not whole
                gone = self.out / f".tmp_old_{old.name}"         # a step_* is never half there
                old.rename(gone)
                shutil.rmtree(gone)
            temporary.rename(folder)
            sync_file(self.out)
        except OSError as error:
            return reason(error)
        return ""

    def wait(self) -> None:
        """Until the save under way is done.  Raises UserError where it failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error:
            raise self.failed(self.error)

    def failed(self, why: str) -> UserError:
        """The mistake to raise; what was written of this step is taken away, so that it takes no room."""
        if self.thread is not None:                              # it may be writing still
            self.thread.join()
        if self.rank == 0:
            for left in [*self.out.glob(".tmp_*"), *self.out.glob(".*.tmp")]:
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        held = [*self.model.parameters(), *self.ema.values()]
        needed = 2 * sum(t.numel() * t.element_size() for t in held)     # the optimizer has as much again
        free = shutil.disk_usage(self.out).free
        return UserError(f"{self.out}: step {self.saved} could not be saved ({why}): it takes about "
                         f"{needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free; what was saved before "
                         f"is intact ({self.newest()}); make room and give the same command again")

    def export(self) -> None:
        """The averaged weights in half precision, for sample.py, and the weights in float32, for --init."""
        weights, ema = dict(self.model.named_parameters()), dict(self.ema)
        held = map(distributed.local, self.ema.values())
        most = max(float(tensor.abs().max()) for tensor in held if tensor.numel())
        device = next(iter(weights.values())).device
        wide, = processes.agree(most > torch.finfo(torch.float16).max, device=device)
        weights, ema = self.kept | weights, self.kept | ema
        mask = {"vector": ema.pop("mask.vector")} if "mask.vector" in ema else {}
        if self.rank > 0:                                        # each tensor is gathered in turn, and let go
            for tensor in [*weights.values(), *mask.values(), *ema.values()]:
                distributed.whole(tensor)
            return
        try:
            write_tensors(self.out / "weights.safetensors", weights, torch.float32, distributed.whole)
            if mask:
                write_tensors(self.out / checkpoint.MASK_EMBEDDING, mask, torch.float32, distributed.whole)
            half = torch.bfloat16 if wide else torch.float16
            checkpoint.save(self.out, ema, self.model["mmdit"].config, self.tokenizer, half, distributed.whole,
                            step=self.step, **self.about)
            self.show()
        except OSError as error:
            raise self.failed(reason(error))

    def show(self) -> None:
        """loss.png and run.html, as of now; on process 0."""
        curves.curves(self.rows, self.out / "loss.png", self.others)
        curves.page(self.out, self.settings)

    def exported(self) -> bool:
        """Whether the weights of this step are there; on process 0."""
        files = ("config.json", "tokenizer.json", "model.safetensors", "weights.safetensors")
        return all((self.out / name).exists() for name in files) and (
            read_json_object(self.out / "config.json").get("step") == self.step)

    def close(self) -> None:
        """Let the folder go; process 0 holds its lock."""
        if self.rank == 0:
            self.lock.close()

    def end(self, steps: int) -> None:
        """Wait for the last save, see that the weights are there, and say how to go on."""
        self.wait()
        if not processes.first(self.exported):                    # a kill may have come between two files
            self.export()
        said = f"{self.out}: has its {steps} steps; more --steps go on, --init {self.out} starts another run"
        if self.step < steps:
            said = f"stopped at step {self.step}, saved; the same command goes on from here"
        if self.rank == 0:
            print(said, flush=True)

    # --------------------------------------------------------------------------------------------------- log

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps (0: never), and at the last, is to be done now."""
        return every > 0 and (self.step % every == 0 or self.step == self.settings["steps"])

    def note(self, found: dict[str, Tensor], made: dict) -> None:
        """Add to the next row one step's losses by name, "image" and "text", and gradient norm, "grad"; and of
        its batches, `made`, the samples of no use, "bad", and what was lost of each text, "cut"."""
        self.sums = {name: self.sums.get(name, 0) + value for name, value in found.items()}
        self.summed += 1
        self.bad += made["bad"]
        self.cut += made["cut"]

    def device_use(self, steps_per_second: float) -> dict[str, float]:
        """Return the "gib" that were allocated at most and, where the peak is known, "mfu"."""
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            most = torch.cuda.max_memory_allocated(device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024       # of ru_maxrss, in bytes
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        use = {"gib": round(most / 2**30, 3)}
        if peak := plan.peak(device, self.settings["dtype"]) * self.settings["world"]:
            use["mfu"] = round(self.work["tflop"] * steps_per_second / peak, 4)
        return use

    def log(self, rate: float, steps: int, found: dict) -> None:
        """A row of means over the last `over` steps, and a line with the pace and the time left.

        Pace, tokens, arithmetic: of all processes since this start, validation, samples and saving included.
        mfu: that arithmetic over the peak of so many devices, where it is known; gib: the most memory that
        this process has had, of the GPU or else in all.

        Samples of no use since the last row are named in this one, and texts that were cut are counted; found:
        what validation and the meter say of this step."""
        means = processes.mean(torch.stack([*self.sums.values()]) / self.summed).tolist()
        *losses, (_, norm) = zip(self.sums, means)
        elapsed = time.time() - self.started
        steps_per_second, seconds = (self.step - self.first) / elapsed, round(self.before + elapsed, 1)
        self.rows.append(dict(
            step=self.step, over=self.summed, **{f"{name}_loss": loss for name, loss in losses},
            grad_norm=norm, lr=rate, seconds=seconds, **{f"{name}_per_s": float(
                f"{amount * steps_per_second:.4g}") for name, amount in self.work.items()},
            **self.device_use(steps_per_second), **found))
        bad, cut = (sum(lists, []) for lists in zip(*processes.gather([(self.bad, self.cut)])))
        self.sums, self.summed, self.bad, self.cut = {}, 0, [], []
        if bad:
            self.rows[-1] |= dict(bad_samples=len(bad), bad_names=bad[:20])
        if cut and self.rank == 0 and not any("cut_texts" in row for row in self.rows):
            print(f"warning: a text has {cut[0]}; --text-length has more room, cut_texts in log.jsonl counts "
                  f"such texts", file=sys.stderr, flush=True)
        if cut:
            self.rows[-1] |= dict(cut_texts=len(cut))
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as log:
                log.write(json.dumps(self.rows[-1]) + "\n")
            shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses)
            left = time_left((steps - self.step) / steps_per_second)
            print(f"step {self.step}/{steps}  {shown}  grad {norm:.2f}  {pace(steps_per_second, 'step')}  {left}",
                  flush=True)
            if single := [f"{name} {x:.4f}" for name, x in found.items() if isinstance(x, float)]:
                print(f"at step {self.step}  {'  '.join(single)}", flush=True)


def sync_file(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_log(path: Path, until: float = float("inf")) -> list[dict]:
    """The rows of a log up to a step; lines that are no rows, such as one cut off by a kill, are dropped."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows += [row] * (row["step"] <= until and isinstance(row["seconds"], float))
        except (ValueError, TypeError, KeyError):
            continue
    return rows


def read_other(path: Path) -> list[dict]:
    """The rows of another run's log, for --compare.  Raises UserError for one without a validation."""
    rows = read_log(path)
    if not any("val_nats" in row for row in rows):
        raise UserError(f"--compare {path}: expected a log.jsonl with validations (--eval-every), found "
                        f"{len(rows)} rows without any")
    return rows
