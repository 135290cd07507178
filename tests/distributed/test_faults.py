"""What a run owes its user when something breaks: nothing runs from a file, sound weights are saved
before the run ends, and a line says what to do."""

import errno
import fcntl
import io
import json
import math
import os
import pickle
import re
import shutil
import time

import pytest
import torch
from torch import nn

import data
import train
from common import cli
from common.cli import UserError
from common.files import sha256
from dataset import emoji
from experiments import survive
from helpers import Forked, edit_json, names, rows, steps_logged
from training import run_folder
from training.checkpoint_reader import Unpickler
from training.run_folder import complete
from viz import curves


# ---------------------------------------------------------------------------- nothing runs from a file

class Code:
    """Unpickling this runs a command."""

    def __reduce__(self):
        return os.system, (f"touch {os.environ['RAN']}",)


@pytest.fixture
def ran(tmp_path, monkeypatch):
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    return tmp_path / "ran"


def replace_file(folder, name, content):
    """Replace a file of a checkpoint as somebody would who wants it to be read."""
    (folder / name).write_bytes(content)
    edit_json(folder / "digests.json", **{name: sha256(folder / name)})


def test_code_in_the_metadata_does_not_run(run, run_training, ran):
    replace_file(run / "step_6", ".metadata", pickle.dumps(Code()))
    message = run_training("--steps", 8)
    assert "step_6/.metadata: " in message and "system" in message and "--resume-step 4" in message
    assert not ran.exists()


def test_code_in_another_file_of_metadata_is_not_read(run, run_training, ran):
    """torch would prefer a file of metadata for its own process."""
    replace_file(run / "step_6", "__0.metadata", pickle.dumps(Code()))
    assert run_training("--steps", 7) == "" and not ran.exists()


def read_metadata(folder):
    with open(folder / ".metadata", "rb") as file:
        return Unpickler(file).load()


def test_code_in_place_of_a_number_does_not_run(run, run_training, ran):
    """Each number of the optimizer is stored as a pickle of its own."""
    folder = run / "step_6"
    metadata, shard = read_metadata(folder), (folder / "__0_0.distcp").read_bytes()
    [place] = [place for index, place in metadata.storage_data.items()
               if index.fqn.endswith("param_groups.0.lr")]
    number = io.BytesIO()
    torch.save(Code(), number)
    place.offset, place.length = len(shard), len(number.getvalue())
    replace_file(folder, "__0_0.distcp", shard + number.getvalue())
    replace_file(folder, ".metadata", pickle.dumps(metadata))
    assert "step_6" in run_training("--steps", 8) and not ran.exists()


@pytest.mark.parametrize("path", ["../step_4/__0_0.distcp", "/etc/passwd"])
def test_metadata_names_no_file_outside(path, run, run_training):
    file = run / "step_6" / ".metadata"
    metadata = read_metadata(run / "step_6")
    for place in metadata.storage_data.values():
        place.relative_path = path
    replace_file(run / "step_6", ".metadata", pickle.dumps(metadata))
    message = run_training("--steps", 8)
    assert f"{file}: names {path}" in message and "--resume-step 4" in message


# ---------------------------------------------------------------------------- files that can't be written

def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_log(monkeypatch):
    def opened(path, mode="r"):
        return full() if mode == "a" else open(path, mode)
    monkeypatch.setattr(run_folder, "open", opened, raising=False)


def no_stdout(monkeypatch):
    monkeypatch.setattr(run_folder, "print", full, raising=False)


def no_curves(monkeypatch):
    monkeypatch.setattr(curves, "curves", full)


def no_page(monkeypatch):
    monkeypatch.setattr(curves, "write_text", full)


@pytest.mark.parametrize("fault, name, done", [
    (no_log, "log.jsonl", 2), (no_stdout, "stdout", 2), (no_curves, "run.html", 3), (no_page, "run.html", 3)])
def test_a_full_disk_between_saves_ends_a_run_that_is_saved(fault, name, done, run_training, trained,
                                                            tmp_path, monkeypatch):
    """The curves are written at the save of step 2."""
    with monkeypatch.context() as patch:
        fault(patch)
        message = run_training("--steps", 6)
    assert f"{name}: No space" in message and f"step {done} is saved" in message
    assert complete(tmp_path / "run")[-1].name == f"step_{done}"
    assert run_training("--steps", 6) == ""
    assert survive.same_weights(tmp_path / "run", trained)


def test_a_disk_with_room_for_the_weights_only(small_disk, run_training, trained):
    """The first save fails after weights.safetensors: the same command works once there is room."""
    out, filler = small_disk / "run", small_disk / "filler"
    run_training("--steps", 2, out=out)
    needed = (out / "weights.safetensors").stat().st_size
    shutil.rmtree(out)
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - needed - 2**20))
    message = run_training("--steps", 6, out=out)
    assert "step 2 could not be saved" in message and "same command" in message
    filler.unlink()
    assert run_training("--steps", 6, out=out) == ""
    assert survive.same_weights(out, trained)


def test_an_image_on_a_full_disk_stays_as_it_was(tmp_path, monkeypatch):
    from PIL import Image
    from viz import grids
    path = tmp_path / "a.png"
    grids.write_image(path, Image.new("RGB", (8, 8), "red"))
    before = path.read_bytes()

    def half(self, target, *_, **__):
        target.write_bytes(b"half")
        full()
    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(UserError, match="a.png: .*No space"):
        grids.write_image(path, Image.new("RGB", (8, 8), "blue"))
    assert path.read_bytes() == before and names(tmp_path) == ["a.png"]


# ---------------------------------------------------------------------------------- ends that lose work

def test_a_set_that_goes_bad_ends_a_run_that_is_saved(run_training, trained, tmp_path, monkeypatch):
    read = data.Mix.take

    def take(self, positions, name, size=None):
        positions = list(positions)
        if min(positions) >= 4 * 4:                              # the fifth step
            raise UserError("the set: 9 of 99 samples are unreadable")
        return read(self, positions, name, size)
    with monkeypatch.context() as patch:
        patch.setattr(data.Mix, "take", take)
        message = run_training("--steps", 6)
    assert "9 of 99" in message and "step 4 is saved" in message
    assert run_training("--steps", 6) == ""
    assert survive.same_weights(tmp_path / "run", trained)


def test_a_gradient_that_is_not_finite_ends_a_run_that_is_saved(run, run_training, trained,
                                                                monkeypatch):
    def clip(parameters, limit):
        clip.calls += 1
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        return norm * float("nan") if clip.calls == 2 else norm
    clip.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "clip_grad_norm_", clip)
        message = run_training("--steps", 12)
    assert "step 8: the gradient is not finite" in message and "step_7" in message
    # no older checkpoint was deleted, since the newest one may be on its way to the fault
    assert [folder.name for folder in complete(run)] == ["step_4", "step_6", "step_7"]
    assert run_training("--steps", 8) == "" and steps_logged(run) == list(range(1, 9))


def test_a_deleted_folder_is_made_again(run_training, trained, tmp_path, monkeypatch):
    out = tmp_path / "run"
    note = run_folder.Run.note

    def delete_at_step_3(self, *arguments):
        note(self, *arguments)
        if self.step == 3:
            self.saver.join()
            shutil.rmtree(out)
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.Run, "note", delete_at_step_3)
        message = run_training("--steps", 6)
    assert "log.jsonl: No such file" in message and "step 4 is saved" in message
    assert run_training("--steps", 6) == "" and steps_logged(out) == [1, 2, 3, 4, 5, 6]
    assert survive.same_weights(out, trained)


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), AssertionError("torn")])
def test_any_error_of_the_saving_thread_ends_the_run(error, run_training, tmp_path, monkeypatch):
    def broken(*_):
        raise error
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.Run, "publish", broken)
        message = run_training("--steps", 6)
    assert "could not be saved" in message
    assert run_training("--steps", 6) == ""


@pytest.mark.parametrize("delay", [0, 1])           # seconds; the next save is due before that
def test_a_save_that_failed_once_is_tried_again(delay, run_training, trained, tmp_path, monkeypatch):
    publish, failures = run_folder.Run.publish, iter(["gone"])

    def fail_once(self, *arguments):
        failure = next(failures, "")
        if failure:
            time.sleep(delay)
        return failure or publish(self, *arguments)
    monkeypatch.setattr(run_folder.Run, "publish", fail_once)
    message = run_training("--steps", 6)
    step = int(re.search(r"step 2 could not be saved \(gone\), but step (\d) is", message)[1])
    assert [folder.name for folder in complete(tmp_path / "run")] == [f"step_{step}"]
    assert run_training("--steps", 6) == ""
    assert survive.same_weights(tmp_path / "run", trained)


@pytest.mark.parametrize("name", ["latents", "states"])
def test_a_latent_that_is_not_finite_is_a_bad_sample(name, tmp_path):
    from dataset import precompute
    stamp = dict(source="s", shards="1", dtype="float32", vae="v", pixels="16", channels="4")
    samples = [dict(key=f"{i}.png", captions=["red"]) for i in range(3)]
    tensors = dict(latents=torch.ones(3, 4, 2, 2), states=torch.ones(3, 5, 6))
    file = tmp_path / "latents-00000.safetensors"
    with pytest.raises(UserError, match="not finite"):
        wrong = tensors | {name: tensors[name] * float("inf")}
        precompute.write_shard(file, samples, wrong, stamp)
    precompute.write_shard(file, samples, dict(tensors), stamp)
    content = bytearray(file.read_bytes())
    header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
    size = tensors[name][0].nbytes
    start = 8 + int.from_bytes(content[:8], "little") + header[name]["data_offsets"][0] + size
    content[start:start + 4] = b"\0\0\xc0\x7f"                   # NaN, in the second sample
    file.write_bytes(content)
    mix = data.Mix([str(tmp_path)], 16, "run")
    taken = [sample["key"] for sample in mix.take(range(3), "image")]
    assert set(taken) == {"0.png", "2.png"}
    [message] = mix.newly_bad()
    assert "latents-00000.safetensors" in message and "1.png" in message and name in message


def test_latents_without_a_sample_are_refused(tmp_path):
    from dataset import precompute
    stamp = dict(source="s", shards="1", dtype="float32", vae="v", pixels="16", channels="4")
    file = tmp_path / "latents-00000.safetensors"
    precompute.write_shard(file, [], dict(latents=torch.ones(0, 4, 2, 2)), stamp)
    with pytest.raises(UserError, match="no sample"):
        data.Mix([str(tmp_path)], 16, "run")


def test_the_limit_of_bad_samples_allows_for_chance():
    """Against the sum of the Poisson distribution, and at the limits that a run needs."""
    below = sum(math.exp(-15) * 15**k / math.factorial(k) for k in range(30))
    assert data.poisson_tail(30, 15) == pytest.approx(1 - below, rel=1e-8)
    for seen in (100, 1000, 10_000, 10**6):                      # 4 % never do, 3.3 sigma above
        four = 0.04 * seen + 3.3 * (0.04 * 0.96 * seen) ** 0.5
        assert four < 0.05 * seen or data.poisson_tail(round(four), 0.05 * seen) > 1e-4
    assert data.poisson_tail(100, 0.05 * 1000) < 1e-4            # 10 % end


# --------------------------------------------------------------------------------------------- messages

def test_missing_data_are_called_missing(run_training, small_tar, tmp_path):
    moved = shutil.copy(small_tar, tmp_path / "set.tar")
    assert run_training("--steps", 2, "--image-data", moved) == ""
    os.remove(moved)
    message = run_training("--steps", 4, "--image-data", moved)
    assert f"{moved}: no such file" in message and "contents" not in message


def test_all_differences_from_a_run_are_listed(run, run_training):
    message = run_training("--steps", 8, "--seed", 3, "--text-length", 20, "--optimizer", "adamw")
    assert all(name in message for name in ("--seed 0, not 3", "--text-length", "--optimizer"))


def test_a_file_system_without_locks_is_named(run_training, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", flock)
    message = run_training("--steps", 1)
    assert "No locks available" in message and "another run" not in message


@pytest.mark.parametrize("change", [dict(steps="six"), dict(decay_steps=[1]), dict(rules=None),
                                    dict(image_data=3), dict(seed={})])
def test_settings_changed_by_hand_give_one_line(change, run, run_training):
    edit_json(run / "train.json", **change)
    if "image_data" in change:                                   # then there is no digest to compare
        edit_json(run / "train.json", image_data_digest=None)
    assert list(change)[0].replace("_", "-") in run_training("--steps", 8).replace("_", "-")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"../x": "0"}', '{".metadata": 3}'])
def test_a_damaged_list_of_digests_offers_the_checkpoint_before(content, run, run_training):
    (run / "step_6" / "digests.json").write_text(content)
    message = run_training("--steps", 8)
    assert "step_6" in message and "--resume-step 4" in message
    assert run_training("--steps", 8, "--resume-step", 4) == ""


def test_files_with_odd_names_are_left_alone(run, run_training):
    for name in ("step_²", "step_007", "step_x", "samples_best.png", "samples_².png"):
        (run / name).mkdir()
        (run / name / "digests.json").write_text("{}")
    assert run_training("--steps", 8, "--sample-every", 8) == ""
    assert (run / "samples_8.png").exists() and (run / "step_²").exists()
    assert run_training("--steps", 1, "--fresh") == "" and (run / "step_²").exists()
    assert (run / "samples_best.png").exists() and not (run / "samples_8.png").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_oserror_of_one_process_is_one_line(rank, base, tmp_path):
    flags = [*base, "--out", tmp_path / "run", "--steps", 2]
    process = Forked(2, *flags, prepare=[break_rank_0, break_rank_1][rank])
    _, errors = process.communicate()
    assert errors.count("error: ") == 1 and "x.tar: Stale file handle" in errors
    assert "Traceback" not in errors


def break_rank(rank):
    def load(*_):
        raise OSError(errno.ESTALE, "Stale file handle", "x.tar")
    if os.environ["RANK"] == rank:
        emoji.load = load


def break_rank_0():
    break_rank("0")


def break_rank_1():
    break_rank("1")


def test_no_pace_is_infinite_when_the_clock_stands(run, run_training, monkeypatch):
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: 5.0)
    assert run_training("--steps", 8) == ""
    assert all(row["seconds"] >= 0 for row in rows(run))


def test_cli_names_the_file_of_an_oserror():
    assert cli.in_one_line(OSError(28, "No space", "a\nb")) == "a\\nb: No space"
