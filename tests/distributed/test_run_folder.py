"""training/run_folder.py and training/distributed.py: a run's identity, checkpoints, log, resumes
and kills, and runs of several processes."""

import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import tarfile
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import checkpoint
import mask_diffusion
import train
from common import cli, processes
from common.cli import UserError
from dataset import emoji
from experiments import survive
from helpers import (Forked, edit_json, equal_runs, flip_bit, forked, launch, names, rows,
                     steps_logged, to_the_end, wait_until)
from training import distributed, run_folder
from training.run_folder import Run, complete, read_log

# settings that identify a run; listed here, so that losing one in the program fails a test
FIXED = ["--stage", "--preset", "--init", "--vae", "--t5", "--tokenizer", "--mask-embedding",
         "--image-data", "--text-data", "--vocabulary", "--pixels", "--buckets", "--text-length",
         "--image-batch", "--text-batch", "--optimizer", "--seed", "--predicts", "--times",
         "--text-loss"]


def contents(folder):
    """Return the bytes of every file, by path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy_with_weights(folder, target, change):
    """Copy a checkpoint with other weights: change(name, tensor) returns each new tensor."""
    shutil.copytree(folder, target)
    weights = load_file(folder / "model.safetensors")
    weights = {name: change(name, tensor) for name, tensor in weights.items()}
    checkpoint.write_tensors(target / "model.safetensors", weights, torch.float32)
    return target


# --------------------------------------------------------------------------------- a run's identity

def test_every_fixed_setting_is_refused_when_it_changes(run, run_training):
    file = run / "train.json"
    settings = json.loads(file.read_text())
    for flag in sorted({*FIXED, *map(cli.flag, run_folder.IDENTITY)}):
        name = flag.removeprefix("--").replace("-", "_")
        changed = {name: "another"}
        if f"{name}_digest" in settings:
            changed[f"{name}_digest"] = "another"
        file.write_text(json.dumps(settings | changed))
        assert f"{flag} another" in run_training("--steps", 8), flag


@pytest.mark.parametrize("flag, before, after", [
    ("--text-length", 28, 20), ("--optimizer", "muon", "adamw"),
    ("--stage", "pretrain", "instruct")])
def test_a_refused_flag_leaves_the_folder_untouched(flag, before, after, run, run_training):
    files = contents(run)
    message = run_training("--steps", 8, flag, after)
    assert f"{flag} {before}" in message and str(run) in message
    assert contents(run) == files


def test_a_run_under_older_rules_is_refused(run, run_training, tmp_path):
    settings = json.loads((run / "train.json").read_text())
    del settings["rules"]                                        # as in version 1 of the rules
    (run / "train.json").write_text(json.dumps(settings))
    files = contents(run)
    message = run_training("--steps", 8)
    assert "rules" in message and f"--init {run}" in message
    assert contents(run) == files
    assert run_training("--steps", 1, "--init", run, out=tmp_path / "other") == ""


def test_data_may_move_but_not_change(run, run_training, small_tar, tmp_path):
    moved = shutil.copy(small_tar, tmp_path / "moved.tar")
    assert run_training("--steps", 7, "--image-data", moved) == ""
    assert steps_logged(run)[-1] == 7
    with tarfile.open(moved, "a") as tar:
        tar.addfile(tarfile.TarInfo("more"))
    message = run_training("--steps", 8, "--image-data", moved)
    assert f"--image-data {moved}" in message and "contents" in message


def test_init_may_move_but_not_change(run, run_training, tiny, tmp_path):
    moved = shutil.copytree(tiny, tmp_path / "moved")
    assert run_training("--steps", 7, "--init", moved) == ""
    other = copy_with_weights(tiny, tmp_path / "other", lambda name, tensor: tensor + 1)
    message = run_training("--steps", 8, "--init", other)
    assert f"--init {moved}" in message and str(other) in message


def test_other_settings_may_change(run, run_training):
    changes = ["--lr", 1e-4, "--log-every", 2, "--save-every", 7, "--sample-every", 8,
               "--workers", 1]
    assert run_training("--steps", 8, *changes) == ""
    assert names(run) == [".lock", "config.json", "log.jsonl", "loss.png", "model.safetensors",
                          "run.html", "samples_8.png", "step_7", "step_8", "tokenizer.json",
                          "train.json", "weights.safetensors"]
    assert steps_logged(run) == [1, 2, 3, 4, 5, 6, 8]
    assert json.loads((run / "train.json").read_text())["lr"] == rows(run)[-1]["lr"] == 1e-4


def test_fewer_steps_than_done_keep_the_settings(run, run_training):
    assert run_training("--steps", 3) == ""
    assert json.loads((run / "train.json").read_text())["steps"] == 6


def test_a_learning_rate_does_not_rise_after_its_decay(run, run_training):
    decay = ["--decay-steps", 2, "--lr", 1e-3]
    assert run_training("--steps", 8, *decay) == ""              # the decay had not begun at step 6
    assert [row["lr"] for row in rows(run)[6:]] == pytest.approx([1e-3, 5e-4])
    for flags in (decay, []):
        message = run_training("--steps", 12, *flags)
        assert "--steps 12" in message and "step 8" in message and "--init" in message


def test_settings_of_other_versions_do_not_matter(run, run_training):
    edit_json(run / "train.json", schedule="constant", extend=False, eval_samples=160)
    assert run_training("--steps", 7) == ""
    assert steps_logged(run) == [1, 2, 3, 4, 5, 6, 7]


def test_other_initial_weights_draw_other_noise(tmp_path, tiny):
    other = copy_with_weights(tiny, tmp_path / "other", lambda name, tensor: tensor + 0.01)
    keys = []
    for number, init in enumerate((tiny, other, tiny)):
        settings = dict(image_data=[], text_data=[], seed=0, stage="instruct", world=1, steps=1,
                        init=str(init))
        keys.append(Run(tmp_path / f"run{number}", settings, 0).key)
    assert keys[0] == keys[2] != keys[1]


# ---------------------------------------------------------------------------- folders of other work

def test_a_folder_with_another_checkpoint_is_refused(run_training, tmp_path, tiny):
    other = shutil.copytree(tiny, tmp_path / "other")
    for flags in ([], ["--fresh"]):
        assert f"{other}: holds model.safetensors" in run_training("--steps", 2, *flags, out=other)
    assert f"--out {other}" in run_training("--steps", 2, "--init", other, out=other)
    assert names(other) == [".lock", "config.json", "model.safetensors", "tokenizer.json"]


def test_a_second_run_in_the_same_folder_is_refused(run, run_training):
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert f"{run}: another run is training" in run_training("--steps", 7)
    assert run_training("--steps", 7) == ""


def test_a_kill_before_the_first_save_starts_again(run, run_training):
    for folder in complete(run):
        folder.rename(run / f".tmp_{folder.name}")               # the name of an unfinished save
    assert run_training("--steps", 2) == ""
    assert steps_logged(run) == [1, 2]
    assert [path.name for path in run.glob("*step_*")] == ["step_2"]


def test_two_kills_around_the_first_save_start_again(run, run_training):
    """The first comes when the weights are written, and the second before anything is saved."""
    for folder in complete(run):
        shutil.rmtree(folder)
    (run / ".unsaved").mkdir()
    for steps in (0, 2):
        with pytest.MonkeyPatch.context() as patch:
            if not steps:                                        # it ends where a kill would come
                patch.setattr(Run, "begin", lambda *_: cli.require((False, "killed")))
            message = run_training("--steps", 2)
            assert message == ("" if steps else "error: killed\n")
    assert steps_logged(run) == [1, 2] and not (run / ".unsaved").exists()


def test_weights_without_a_checkpoint_need_fresh(run, run_training):
    for folder in complete(run):
        shutil.rmtree(folder)
    assert "--fresh" in run_training("--steps", 1)
    assert steps_logged(run) == [1, 2, 3, 4, 5, 6]
    assert run_training("--steps", 1, "--fresh") == ""
    assert steps_logged(run) == [1]


def test_a_refused_fresh_start_deletes_nothing(run, run_training, tmp_path):
    before = names(run)
    assert f"{tmp_path / 'none'}: no such" in run_training("--steps", 1, "--fresh", "--text-data",
                                                            tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert run_training("--steps", 1, "--fresh", "--text-data", tmp_path / "empty")
    assert names(run) == before


# -------------------------------------------------------------------------------------- checkpoints

def test_missing_or_older_weights_are_written_again(run, run_training):
    files = ("model.safetensors", "weights.safetensors", "config.json")
    before = {name: (run / name).read_bytes() for name in files}
    (run / "weights.safetensors").unlink()
    run_training("--steps", 6)
    edit_json(run / "config.json", step=2)
    (run / "model.safetensors").write_bytes(b"of step 2")
    run_training("--steps", 6)
    assert {name: (run / name).read_bytes() for name in files} == before


def test_weights_are_float32_and_init_reads_them(trained):
    weights = load_file(trained / "weights.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    read = checkpoint.load_mmdit(trained, training=True)
    for name, p in read.named_parameters():
        assert torch.equal(weights[f"mmdit.{name}"], p), name
    averaged = checkpoint.load_mmdit(trained)
    assert not torch.equal(averaged.img_in.weight, read.img_in.weight)


def test_files_of_a_run_have_the_mode_of_other_new_files(trained, tmp_path):
    (tmp_path / "new").touch()
    expected = (tmp_path / "new").stat().st_mode
    for path in contents(trained):
        assert path.stat().st_mode == expected, path


def test_files_are_replaced_not_written_in_place(run, run_training, tmp_path):
    """A hard link keeps the old file alive, so that the new file gets another inode."""
    links = tmp_path / "links"
    links.mkdir()
    for name in names(run):
        if (run / name).is_file() and name != ".lock":
            os.link(run / name, links / name)
    run_training("--steps", 7)
    assert len(names(links)) == 8
    for name in names(links):
        assert not (run / name).samefile(links / name), name


def test_an_incomplete_step_folder_is_replaced(run, run_training):
    (run / "step_6" / "digests.json").unlink()
    run_training("--steps", 6)
    assert [path.name for path in complete(run)] == ["step_4", "step_6"]
    assert steps_logged(run) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("damage", [flip_bit, os.remove])
def test_a_damaged_shard_is_refused_by_name(damage, run, run_training):
    shard = run / "step_6" / "__0_0.distcp"
    damage(shard)
    message = run_training("--steps", 8)
    assert f"{shard}: damaged" in message and "--resume-step 4" in message
    assert steps_logged(run) == [1, 2, 3, 4, 5, 6]


def test_resume_step_goes_back_and_keeps_the_later_one(run, run_training):
    message = run_training("--steps", 8, "--resume-step", 3)
    assert "--resume-step 3" in message and "step_4, step_6" in message
    flip_bit(run / "step_6" / "__0_0.distcp")
    assert run_training("--steps", 8, "--resume-step", 4) == ""
    assert [path.name for path in complete(run)] == ["step_6", "step_8"]
    assert (run / "left_step_6").is_dir()
    assert steps_logged(run) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert run_training("--steps", 8, "--resume-step", 6) == ""
    assert run_training("--steps", 8, "--resume-step", 6) == ""  # left_step_8 is there already
    assert [path.name for path in complete(run)] == ["step_6", "step_8"]


def test_resume_step_deletes_and_starts_nothing_in_its_place(run, run_training, tmp_path):
    message = run_training("--steps", 8, "--resume-step", 4, "--fresh")
    assert "--resume-step 4" in message and "--fresh" in message
    assert [path.name for path in complete(run)] == ["step_4", "step_6"]
    message = run_training("--steps", 8, "--resume-step", 4, out=tmp_path / "mistyped")
    assert "--resume-step 4" in message and "no checkpoint" in message


def test_hsdp_needs_groups_of_one_size(monkeypatch):
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.raises(UserError, match="hsdp: 5 processes .* groups of 2"):
        distributed.make_mesh("hsdp", "cpu")


def test_weights_too_large_for_float16_are_saved_in_bfloat16(run_training, tmp_path, tiny):
    def enlarge(name, tensor):
        return tensor + 70_000 if name == "mmdit.img_in.bias" else tensor
    large = copy_with_weights(tiny, tmp_path / "large", enlarge)
    run_training("--steps", 1, "--init", large)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    bias = checkpoint.load_mmdit(tmp_path / "run").img_in.bias.detach()
    assert float(bias.max()) > 65_504                            # the largest float16


@pytest.mark.parametrize("save", [1, 2, 3])
def test_a_full_disk_loses_nothing(save, small_disk, run_training, trained):
    """The disk is full at the first, second or last save; later the same command ends the run."""
    out, filler = small_disk / "run", small_disk / "filler"
    if save > 1:
        run_training("--steps", 2 * (save - 1), out=out)
    before = complete(out)
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(max(0, free - 2**20)))
    message = run_training("--steps", 6, out=out)
    assert f"step {2 * save} " in message and "MiB" in message
    assert complete(out) == before
    assert not [*out.glob(".tmp*"), *out.glob(".*.tmp")]
    assert (out / ".unsaved").exists() == (save == 1)
    filler.unlink()
    assert run_training("--steps", 6, out=out) == ""
    assert survive.same_weights(out, trained)


def test_two_kills_change_no_bit_of_the_weights(base, tmp_path, monkeypatch):
    """This is a short form of `python -m experiments.survive`, which kills a run twenty times."""
    flags = [*map(str, base), "--steps", "12", "--save-every", "3"]
    monkeypatch.setattr(survive, "start", lambda out, flags: Forked(1, "--out", out, *flags))
    survive.finish(survive.start(tmp_path / "whole", flags))     # also in a fork: equal threads
    # seed 1: the first kill comes 40 ms after a new step, early in the run
    kills, _ = survive.killed_run(tmp_path / "killed", flags, kills=2, seed=1)
    assert kills == 2 and survive.same_weights(tmp_path / "whole", tmp_path / "killed")


# ------------------------------------------------------------------------------------------ the log

def test_unreadable_lines_of_a_log_are_dropped(run, run_training):
    log = run / "log.jsonl"
    good = log.read_text().splitlines()
    lines = [good[0], "{", "\0\0", good[1], "[]", *good[2:5], good[5][:20]]
    log.write_bytes("\n".join(lines).encode() + b"\xff")
    assert [row["step"] for row in read_log(log, 9)] == [1, 2, 3, 4, 5]
    run_training("--steps", 7)
    assert steps_logged(run) == [1, 2, 3, 4, 5, 7]


def test_the_log_names_unusable_samples(run_training, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(9):
        Image.new("RGB", (40, 40 if number else 400)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("black")
    run_training("--steps", 3, "--image-data", folder)
    bad_names = []
    for row in rows(tmp_path / "run"):
        assert row.get("bad_samples", 0) == len(row.get("bad_names", []))
        bad_names += row.get("bad_names", [])
    assert bad_names                     # the image loss uses 12 samples, more than an epoch of 9
    for name in bad_names:
        assert name.startswith(f"{folder}/0.png: ") and "40x400" in name


def test_each_row_counts_the_steps_it_averages(run_training, tmp_path):
    run_training("--steps", 7, "--log-every", 4)
    run_training("--steps", 9, "--log-every", 4)
    assert [(row["step"], row["over"]) for row in rows(tmp_path / "run")] == [
        (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (7, 2), (8, 1), (9, 1)]


def test_pace_after_a_resume_counts_only_new_steps(run, run_training, monkeypatch):
    clock = itertools.count()      # a second each time it is read: at the start and at each row
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    run_training("--steps", 8)
    old, first, second = rows(run)[5:]
    assert first["samples_per_s"] == second["samples_per_s"] == 6        # 4 images and 2 texts
    assert first["seconds"] == pytest.approx(old["seconds"] + 1)
    assert second["seconds"] == pytest.approx(old["seconds"] + 2)


def test_the_loss_of_frozen_texts_is_zero():
    ids = torch.zeros(2, 3, dtype=torch.long)
    frozen = torch.ones(2, 3, dtype=torch.bool)

    def logits(ids):
        return torch.zeros(2, 3, 9, requires_grad=True)
    logits_at = mask_diffusion.at_positions(logits)
    t, uniform = torch.ones(2), torch.zeros(2, 3)
    assert mask_diffusion.errors(logits_at, ids, 8, t, uniform, frozen).tolist() == [0, 0]
    assert mask_diffusion.loss(logits, ids, 8, frozen) == 0


def test_a_question_that_fills_the_text_length_is_refused(run_training):
    message = run_training("--stage", "instruct", "--text-length", 12, "--steps", 1)
    assert re.search(r'--text-length 12: "Q: .* A: "', message)


# -------------------------------------------------------------------------------- several processes

@pytest.fixture(scope="module")
def flags(tiny, small_tar):
    """Return flags of a run that is the same with any number of processes.

    The learning rate is small, because AdamW's first step, g / (|g| + eps), magnifies the rounding
    of tiny gradients."""
    return ["--init", tiny, "--image-data", small_tar, "--image-batch", 8, "--text-batch", 8,
            "--dtype", "float32", "--warmup", 2, "--log-every", 1, "--save-every", 4,
            "--sample-every", 8, "--eval-every", 0, "--optimizer", "adamw", "--lr", 2e-4,
            "--stage", "instruct", "--text-weight", 0.5, "--device", "cpu", "--steps", 8]


@pytest.fixture(scope="module")
def single(flags, tmp_path_factory):
    """Return the folder of a run of eight steps by one process."""
    out = tmp_path_factory.mktemp("single") / "run"
    train.main(list(map(str, [*flags, "--out", out])))
    return out


@pytest.fixture(scope="module")
def double(flags, tmp_path_factory):
    """Train the same run with two processes; return its folder, stdout and stderr."""
    out = tmp_path_factory.mktemp("double") / "run"
    output, errors = to_the_end(Forked(2, *flags, "--out", out, "--shard", "zero2"))
    return out, output, errors


def check_same_run(single, out, output, errors):
    equal_runs(single, out)
    assert output.count("from step 0") == 1 and "Warning" not in errors
    assert (out / "samples_8.png").exists()


def test_two_processes_with_zero2_equal_one(single, double):
    check_same_run(single, *double)


def test_two_processes_with_zero3_equal_one(flags, single, tmp_path):
    output, errors = to_the_end(Forked(2, *flags, "--out", tmp_path, "--shard", "zero3"))
    check_same_run(single, tmp_path, output, errors)


def test_two_processes_in_bfloat16_stay_close_to_one(flags, tmp_path):
    half = [*flags, "--dtype", "bfloat16", "--steps", 3, "--sample-every", 0, "--out"]
    train.main(list(map(str, [*half, tmp_path / "1"])))
    to_the_end(Forked(2, *half, tmp_path / "2"))
    for one, two in zip(rows(tmp_path / "1"), rows(tmp_path / "2"), strict=True):
        for name in ("image_loss", "text_loss"):                 # bfloat16 has eight bits: 0.4 %
            assert one[name] == pytest.approx(two[name], rel=0.02), name


def test_sharding_reduces_gradients_in_float32(tiny, monkeypatch):
    policies = {}

    def record(part, mesh, mp_policy, reshard_after_forward):
        policies[part] = mp_policy
    monkeypatch.setattr(distributed, "fully_shard", record)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    mmdit = checkpoint.load_mmdit(tiny)
    distributed.shard(nn.ModuleDict(dict(mmdit=mmdit)), torch.bfloat16, "zero2")
    assert set(policies) == {mmdit, mmdit.txt_out, *mmdit.blocks}
    for part, policy in policies.items():
        assert policy.reduce_dtype == torch.float32
        # the text head computes in float32, like its weights
        assert policy.param_dtype == (torch.float32 if part is mmdit.txt_out else torch.bfloat16)


def test_one_and_four_processes_resume_what_two_saved(flags, single, double, tmp_path):
    for name in ("one", "four"):
        shutil.copytree(double[0], tmp_path / name)
    resume = [*flags, "--resume-step", 4, "--out"]
    train.main(list(map(str, [*resume, tmp_path / "one"])))
    _, errors = to_the_end(Forked(4, *resume, tmp_path / "four", "--shard", "hsdp"))
    assert "Warning" not in errors
    for out in (tmp_path / "one", tmp_path / "four"):
        assert (out / "left_step_8").exists()
        equal_runs(single, out)


def die_once():
    """Make rank 1 of the first attempt kill itself at the seventh exchange, in the fifth step."""
    agree = processes.agree
    calls = itertools.count(1)

    def agree_or_die(*flags, device):
        if next(calls) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return agree(*flags, device=device)
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        processes.agree = agree_or_die


def train_attempt(flags, folder):
    """Run train.py in a fork of torchrun's agent; its output goes to ATTEMPT_RANK.out and .err."""
    name = f"{os.environ['TORCHELASTIC_RESTART_COUNT']}_{os.environ['RANK']}"
    forked("train", flags, {}, [f"{folder}/{name}.out", f"{folder}/{name}.err"], die_once)


def test_torchruns_agent_restarts_a_killed_run(flags, single, tmp_path):
    config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=3,
                          start_method="forkserver", monitor_interval=0.05)
    out = tmp_path / "run"
    run_flags = list(map(str, [*flags, "--out", out, "--save-every", 2]))
    elastic_launch(config, train_attempt)(run_flags, tmp_path)
    outputs = [file.read_text() for file in tmp_path.glob("*.out")]
    assert len(outputs) == 4                                     # two attempts of two processes
    starts = re.findall("from step (.)", "".join(outputs))
    assert len(starts) == 2 and starts.count("0") == 1
    equal_runs(single, out)


def fail_on_rank_1():
    def load(*arguments):
        raise UserError("the tar is cut on machine 1")
    if os.environ["RANK"] == "1":
        emoji.load = load


@pytest.mark.parametrize("more, prepare, line", [
    (["--image-data", "nowhere.tar"], None, "error: nowhere.tar: no such file or folder"),
    ([], fail_on_rank_1, "error: the tar is cut on machine 1")], ids=["all", "rank 1"])
def test_an_error_ends_all_processes_with_one_line(more, prepare, line, flags, tmp_path):
    process = Forked(2, *flags, "--out", tmp_path, *more, prepare=prepare)
    _, errors = process.communicate()
    assert [rank.exitcode for rank in process.ranks] == [1, 1]
    assert errors == line + "\n"


def test_sigterm_to_torchrun_saves_once_and_resumes(flags, single, tmp_path):
    """This is the only test that starts the real torchrun."""
    command = [*flags, "--out", tmp_path, "--shard", "none"]
    process = launch(2, *command)
    wait_until(lambda: read_log(tmp_path / "log.jsonl"), process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert output.count("saved; the same command") == 1 and "[rank" not in errors
    assert 1 <= len(rows(tmp_path)) < 8
    to_the_end(Forked(2, *command))
    equal_runs(single, tmp_path)


def test_weight_decay_may_change_when_a_run_resumes(run, run_training, monkeypatch):
    step, used = torch.optim.AdamW.step, set()

    def watched_step(self, closure=None):
        used.update(group["weight_decay"] for group in self.param_groups)
        return step(self, closure)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched_step)
    assert run_training("--steps", 7, "--weight-decay", 0.25) == ""
    assert used == {0.25}


def test_a_signal_to_one_process_stops_all_of_them(flags, tmp_path):
    process = Forked(2, *flags, "--out", tmp_path, "--steps", 9999)
    wait_until(lambda: read_log(tmp_path / "log.jsonl"), process)
    os.kill(process.ranks[1].pid, signal.SIGTERM)
    output, _ = to_the_end(process)
    assert output.count("saved; the same command") == 1


def test_agree_of_one_process_returns_its_flags():
    assert processes.agree(True, False, device=torch.device("cpu")) == [True, False]


def test_first_returns_the_value_or_raises_the_error():
    def fail():
        raise UserError("no")
    assert processes.first(lambda: 3) == 3
    with pytest.raises(UserError, match="^no$"):
        processes.first(fail)
