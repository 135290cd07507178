"""training/run_folder.py and distributed.py: what a run is, saves, going on at any size, kills, several processes."""

import fcntl
import json
import os
import re
import shutil
import signal
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import checkpoint
import mask_diffusion
import train
from common import processes
from experiments import survive
from helpers import Forked, equal_runs, forked, launch, rows, to_the_end, wait_until
from training.run_folder import Run, complete, read_log

ROOT = Path(__file__).parents[2]


@pytest.fixture
def go(tiny, small_tar, tmp_path, mistake, capsys):
    """Train in the folder `run`; returns what is said, a mistake of the person's included."""
    def call(*flags, out=tmp_path / "run"):
        base = ["--init", tiny, "--image-data", small_tar, "--out", out, "--image-batch", 4, "--text-batch",
                2, "--dtype", "float32", "--warmup", 2, "--log-every", 1, "--save-every", 2,
                "--sample-every", 0, "--eval-every", 0, "--device", "cpu"]
        code, said = mistake(train.main, [*base, *flags])
        assert code in (0, 1) and len(said.splitlines()) <= 1
        return said
    return call


def names(out):
    return sorted(p.name for p in out.iterdir())


# ------------------------------------------------------------------------------------------ what a run is

def test_a_flag_that_makes_the_run_what_it_is_stays_as_it_began(go, tmp_path, small_tar):
    out = tmp_path / "run"
    assert go("--steps", 2) == ""
    whole = {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for flags, said in (
            (["--text-length", 20], "--text-length 28, not 20"),
            (["--optimizer", "adamw"], "--optimizer muon, not adamw"),
            (["--image-batch", 8], "--image-batch 4, not 8"), (["--text-batch", 4], "--text-batch 2, not 4"),
            (["--seed", 1], "--seed 0, not 1"), (["--pixels", 8], "--pixels 16, not 8"),
            (["--stage", "instruct"], "--stage pretrain, not instruct")):
        message = go("--steps", 4, *flags)
        assert f"began with {said}; go on so, or start another with another --out" in message
        assert "delete" not in message and str(out) in message
    assert whole == {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_run_under_older_rules_of_training_is_not_continued_silently(go, tmp_path):
    go("--steps", 2)
    file = tmp_path / "run" / "train.json"
    settings = json.loads(file.read_text())
    assert settings.pop("rules") == 2
    file.write_text(json.dumps(settings))                        # as written before mixtures went by samples
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    message = go("--steps", 4)
    assert "older rules of training" in message and "--init" in message
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert go("--steps", 4, "--init", tmp_path / "run", out=tmp_path / "other") == ""


def test_other_contents_are_another_run_and_another_place_is_not(go, tmp_path, small_tar, tiny):
    go("--steps", 2)
    moved = shutil.copy(small_tar, tmp_path / "moved.tar")
    assert go("--steps", 4, "--image-data", moved, "--init", shutil.copytree(tiny, tmp_path / "moved")) == ""
    with tarfile.open(moved, "a") as tar:
        tar.addfile(tarfile.TarInfo("more"))
    assert f"--image-data {moved}, not {moved} with other contents" in go("--steps", 6, "--image-data", moved)
    weights = load_file(tiny / "model.safetensors")
    other = shutil.copytree(tiny, tmp_path / "other")
    checkpoint.write_tensors(other / "model.safetensors", {k: v + 1 for k, v in weights.items()},
                             torch.float32)
    assert f"not {other}" in go("--steps", 6, "--image-data", moved, "--init", other)


def test_what_may_change_changes(go, tmp_path):
    go("--steps", 2)
    changed = ["--lr", 1e-4, "--log-every", 2, "--save-every", 3, "--sample-every", 4, "--workers", 1]
    assert go("--steps", 5, *changed) == ""
    assert names(tmp_path / "run") == [".lock", "config.json", "log.jsonl", "loss.png", "model.safetensors",
                                       "run.html", "samples_4.png", "samples_5.png", "step_3", "step_5",
                                       "tokenizer.json", "train.json", "weights.safetensors"]
    assert json.loads((tmp_path / "run" / "train.json").read_text())["lr"] == 1e-4
    assert go("--steps", 3) == "" and json.loads((tmp_path / "run" / "train.json").read_text())["steps"] == 5


def test_a_rate_that_has_begun_to_fall_does_not_rise_again(go, tmp_path):
    falling = ["--decay-steps", 2, "--lr", 1e-3]
    go("--steps", 2)
    assert go("--steps", 4, *falling) == ""                      # it had not begun
    for flags in (falling, []):
        message = go("--steps", 8, *flags)
        assert f"falls to zero at step 4; --init {tmp_path / 'run'} with another --out" in message
    assert [round(row["lr"] * 1e3, 3) for row in rows(tmp_path / "run")][2:] == [1, 0.5]


def test_a_run_with_a_setting_that_was_removed_is_refused_unless_it_is_the_default(go, tmp_path):
    file = tmp_path / "run" / "train.json"
    assert go("--steps", 2) == ""
    settings = json.loads(file.read_text())
    for name, default, other in (("image_loss", "velocity", "data"), ("text_mean", "token", "answer"),
                                 ("padding", "all", "end")):
        file.write_text(json.dumps(settings | {name: other}))
        message = go("--steps", 4)
        assert f"began with --{name.replace('_', '-')} {other}, which is no more" in message
    file.write_text(json.dumps(settings | dict(image_loss="velocity", text_mean="token", padding="all",
                                               schedule="constant", extend=False, eval_samples=160)))
    assert go("--steps", 4) == "" and [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]


def test_another_run_from_the_first_ones_weights_sees_other_noise(tmp_path, tiny):
    other = shutil.copytree(tiny, tmp_path / "other")
    weights = {name: value + 0.01 for name, value in load_file(tiny / "model.safetensors").items()}
    checkpoint.write_tensors(other / "model.safetensors", weights, torch.float32)
    flags = dict(image_data=[], text_data=[], seed=0, stage="instruct", world=1, steps=1)
    keys = [Run(tmp_path / f"run{i}", flags | dict(init=str(init)), 0).key
            for i, init in enumerate((tiny, other, tiny))]
    assert keys[0] == keys[2] != keys[1]


# -------------------------------------------------------------------------------------- over nobody's work

def test_a_folder_with_another_checkpoint_is_refused(go, tmp_path, tiny):
    there = shutil.copytree(tiny, tmp_path / "shipped")
    assert "holds model.safetensors, which no run made there; use another --out" in go("--steps", 2,
                                                                                       out=there)
    assert "holds model.safetensors" in go("--steps", 2, "--fresh", out=there)
    assert "is --init's folder, its weights would be lost" in go("--steps", 2, "--init", there, out=there)
    assert names(there) == [".lock", "config.json", "model.safetensors", "tokenizer.json"]


def test_two_runs_at_once_in_one_folder_are_refused(go, tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is training here now; wait for it, or use another --out" in go("--steps", 2)
    assert go("--steps", 2) == ""


def test_a_run_that_was_killed_before_its_first_save_starts_again(go, tmp_path):
    out = tmp_path / "run"
    go("--steps", 2)
    for old in complete(out):
        old.rename(out / f".tmp_{old.name}")
    assert go("--steps", 2) == "" and [row["step"] for row in rows(out)] == [1, 2]
    assert [p.name for p in out.glob("*step_*")] == ["step_2"]
    shutil.rmtree(out / "step_2")
    assert "holds weights and no whole step_* folder to go on from; --fresh starts over" in go("--steps", 2)
    assert go("--steps", 2, "--fresh") == ""


# ---------------------------------------------------------------------------------------------- the saves

def test_the_weights_of_a_finished_run_are_written_when_they_are_missing_or_older(go, tmp_path):
    out = tmp_path / "run"
    go("--steps", 4)
    whole = {name: (out / name).read_bytes()
             for name in ("model.safetensors", "weights.safetensors", "config.json")}
    (out / "weights.safetensors").unlink()
    go("--steps", 4)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | dict(step=2)))
    (out / "model.safetensors").write_bytes(b"of step 2")
    go("--steps", 4)
    assert whole == {name: (out / name).read_bytes() for name in whole}
    weights = load_file(out / "weights.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    taken = checkpoint.load_mmdit(out, training=True)
    assert all(torch.equal(weights[f"mmdit.{name}"], p) for name, p in taken.named_parameters())
    assert not torch.equal(checkpoint.load_mmdit(out).img_in.weight, taken.img_in.weight)
    assert all(path.stat().st_mode & 0o077 == 0o044 for path in out.rglob("*") if path.is_file())


def test_a_step_folder_that_is_not_whole_swallows_no_save(go, tmp_path):
    out = tmp_path / "run"
    go("--steps", 4)
    (out / "step_4" / "digests.json").unlink()
    go("--steps", 4)
    assert [p.name for p in complete(out)] == ["step_2", "step_4"]
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4]


def test_a_flipped_bit_is_refused_by_name_and_the_one_before_offered(go, tmp_path):
    out = tmp_path / "run"
    go("--steps", 4)
    file = out / "step_4" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    message = go("--steps", 6)
    assert message.startswith(f"error: {file}: damaged, its SHA-256 is not what was written; --resume-step 2")
    assert go("--steps", 6, "--resume-step",
              3).endswith("--resume-step 3: run has step_2, step_4\n".replace("run", str(out)))
    assert go("--steps", 6, "--resume-step", 2) == ""
    assert [p.name for p in complete(out)] == ["step_4", "step_6"] and (out / "left_step_4").is_dir()


def test_weights_too_large_for_float16_are_shared_in_bfloat16(go, tmp_path, tiny):
    big, weights = shutil.copytree(tiny, tmp_path / "big"), load_file(tiny / "model.safetensors")
    weights["mmdit.img_in.bias"][0] = 70_000.0
    checkpoint.write_tensors(big / "model.safetensors", weights, torch.float32)
    go("--steps", 1, "--init", big)
    assert {value.dtype
            for value in load_file(tmp_path / "run" / "model.safetensors").values()} == {torch.bfloat16}
    assert float(checkpoint.load_mmdit(tmp_path / "run").img_in.bias.max().detach()) > 65_504


@pytest.mark.parametrize("when", [1, 2, 3])
def test_a_full_disk_loses_nothing_and_the_same_command_ends_the_run(when, small_disk, go, tmp_path):
    """The disk is full at the first, a middle and the last save of three."""
    go("--steps", 6, out=tmp_path / "whole")
    out, filler = small_disk / "run", small_disk / "filler"
    if when > 1:
        go("--steps", 2 * (when - 1), out=out)
    before = [p.name for p in complete(out)]
    with open(filler, "wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(small_disk).free - 2**20)))
    message = go("--steps", 6, out=out)
    assert f"step {2 * when} could not be saved (" in message
    assert " MiB are free; what was saved before is intact (" in message
    assert [p.name for p in complete(out)] == before and not [*out.glob(".tmp*"), *out.glob(".*.tmp")]
    filler.unlink()
    assert go("--steps", 6, out=out) == ""
    assert survive.same_weights(out, tmp_path / "whole")


def test_two_kills_end_with_the_weights_of_a_run_that_nobody_touched(tiny, small_tar, tmp_path,
                                                                             monkeypatch):
    """`python tests/survive.py` does twenty."""
    flags = ["--init", str(tiny), "--image-data", small_tar, "--dtype", "float32", "--steps", "16",
             "--save-every", "4", "--image-batch", "4", "--text-batch", "4", "--log-every", "1",
             "--sample-every", "0"]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    monkeypatch.setattr(survive, "start", lambda out, flags: Forked(1, "--out", out, *flags))
    done, _ = survive.killed_run(tmp_path / "killed", flags, 2, 0)
    assert done == 2 and survive.same_weights(tmp_path / "whole", tmp_path / "killed")


# -------------------------------------------------------------------------------------------------- the log

def test_a_log_with_rubbish_loses_the_bad_lines_alone(go, tmp_path):
    out = tmp_path / "run"
    go("--steps", 4)
    good = (out / "log.jsonl").read_text().splitlines()
    (out / "log.jsonl").write_bytes("\n".join([good[0], "{", "\0\0", good[1], "[]", good[2],
                                               good[3][:20]]).encode() + b"\xff")
    assert [row["step"] for row in read_log(out / "log.jsonl", 9)] == [1, 2, 3]
    go("--steps", 5)
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 5]


def test_samples_of_no_use_are_named_in_the_log(go, tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(9):
        Image.new("RGB", (40, 40 if i else 400)).save(tmp_path / "photos" / f"{i}.png")
        (tmp_path / "photos" / f"{i}.txt").write_text("black")
    go("--steps", 3, "--image-data", tmp_path / "photos")
    bad = [row for row in rows(tmp_path / "run") if "bad_samples" in row]
    assert sum(row["bad_samples"] for row in bad) >= 1           # 12 samples of 9 were drawn, and 6 read
    assert {name.partition(", ")[0] for row in bad for name in row["bad_names"]} == {
        f"{tmp_path}/photos/0.png: a picture of 40x400"}


def test_each_row_says_over_how_many_steps_it_averages(go, tmp_path):
    go("--steps", 7, "--log-every", 4)
    go("--steps", 12, "--log-every", 4)
    assert [(row["step"], row["over"]) for row in rows(tmp_path / "run")] == [
        (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (7, 2), (8, 1), (12, 4)]


def test_a_text_batch_with_nothing_to_learn_has_loss_zero_and_questions_need_room(go, tiny):
    ids, frozen = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
    logits = lambda ids: torch.zeros(2, 3, 9, requires_grad=True)
    assert mask_diffusion.errors(logits, ids, 8, frozen).tolist() == [0, 0]
    assert mask_diffusion.loss(logits, ids, 8, frozen) == 0
    message = go("--stage", "instruct", "--text-length", 12, "--steps", 1)
    assert re.search(r'--text-length 12: "Q: .* A: " has \d+ tokens and leaves no room', message)


# ------------------------------------------------------------------------------------------ several processes

@pytest.fixture(scope="module")
def flags(tiny, small_tar):
    """AdamW's update is g / (|g| + eps) at first, last bits of tiny gradients grow: a small rate."""
    return ["--init", tiny, "--image-data", small_tar, "--image-batch", 8, "--text-batch", 8, "--dtype",
            "float32", "--warmup", 2, "--log-every", 1, "--save-every", 10, "--sample-every", 20,
            "--eval-every", 0, "--optimizer", "adamw", "--lr", 2e-4,
            "--stage", "instruct", "--text-weight", 0.5, "--device", "cpu"]


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
    """Twenty steps of one process: its folder."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train.main(list(map(str, [*flags, "--out", out, "--steps", 20])))
    return out


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory):
    """The same by two processes: its folder, and what they said."""
    out = tmp_path_factory.mktemp("two") / "run"
    return out, to_the_end(launch(2, *flags, "--out", out, "--steps", 20, "--shard", "zero2"))


@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_two_processes_take_the_same_steps_as_one(mode, flags, alone, two, tmp_path):
    """hsdp and none: two of the tests below."""
    out, (said, complaints) = two if mode == "zero2" else (tmp_path, to_the_end(Forked(
        2, *flags, "--out", tmp_path, "--steps", 20, "--shard", mode)))
    equal_runs(alone, out)
    assert said.count("from step 0") == 1 and "Warning" not in complaints
    assert (out / "samples_20.png").exists()


def test_two_processes_in_bfloat16_stay_close_to_one(flags, tmp_path):
    half = [*flags, "--dtype", "bfloat16", "--steps", 6, "--out"]
    train.main(list(map(str, [*half, tmp_path / "1"])))
    to_the_end(Forked(2, *half, tmp_path / "2"))
    for a, b in zip(rows(tmp_path / "1"), rows(tmp_path / "2"), strict=True):
        assert a["image_loss"] == pytest.approx(b["image_loss"], rel=0.02)
        assert a["text_loss"] == pytest.approx(b["text_loss"], rel=0.02)


def test_what_two_processes_saved_one_and_four_go_on_from(flags, alone, two, tmp_path):
    for name in ("one", "four"):
        shutil.copytree(two[0], tmp_path / name)
    on = [*flags, "--steps", 20, "--resume-step", 10, "--out"]
    from_ten = lambda name: list(map(str, [*on, tmp_path / name]))
    train.main(from_ten("one"))
    _, complaints = to_the_end(Forked(4, *from_ten("four"), "--shard", "hsdp"))
    assert "Warning" not in complaints
    for out in (tmp_path / "one", tmp_path / "four"):
        assert (out / "left_step_20").exists()                   # what two processes made of it
        equal_runs(alone, out)


def dying(given, folder):
    """train.py; rank 1 of the first attempt kills itself at a step."""
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    calls, agree = [], processes.agree

    def agreeing(*flags, device):
        calls.append(1)
        if (rank, attempt, len(calls)) == ("1", "0", 7):
            os.kill(os.getpid(), signal.SIGKILL)
        return agree(*flags, device=device)
    processes.agree = agreeing
    forked("train", given, {}, [str(folder / f"{attempt}_{rank}.{name}") for name in ("out", "err")])


def test_torchrun_restarts_what_is_killed_and_the_run_ends_as_if_nothing_had_happened(flags, alone, tmp_path):
    """Torchrun's agent, with forks."""
    how = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=3,
                       start_method="forkserver")
    given = [*flags, "--out", tmp_path / "run", "--steps", 20, "--save-every", 3]
    elastic_launch(how, dying)(list(map(str, given)), tmp_path)
    said = "".join(file.read_text() for file in tmp_path.glob("*.out"))
    assert said.count("M parameters") == 2 and len([*tmp_path.glob("*.out")]) == 4
    equal_runs(alone, tmp_path / "run")


def test_a_mistake_on_one_process_ends_all_with_one_line(flags, tmp_path):
    program = tmp_path / "fails.py"
    program.write_text("import os, train\nfrom dataset import emoji\nfrom common.cli import UserError\nload = emoji.load\n"
                       "def failing(*given):\n"
                       "    if os.environ['RANK'] == '1': raise UserError('the tar is cut on machine 1')\n"
                       "    return load(*given)\n"
                       "emoji.load = failing\n"
                       "from common import cli; cli.run(train.main)\n")
    given = [*flags, "--out", tmp_path / "run", "--steps", 2]
    for start, line in ((lambda: Forked(2, *given, "--image-data", "nowhere.tar"),
                         "error: nowhere.tar: no such tar file"),
                        (lambda: launch(2, *given, program=program), "error: the tar is cut on machine 1")):
        process = start()
        _, complaints = process.communicate(timeout=120)  # torchrun reports too, in its way
        assert process.returncode == 1 and complaints.splitlines().count(line) == 1
        assert sum(text.startswith("error: ")
                   for text in complaints.splitlines()) == 1 and "[rank" not in complaints


def test_a_signal_to_torchrun_saves_once_and_the_same_command_goes_on(flags, alone, tmp_path):
    how = [*flags, "--out", tmp_path, "--steps", 20, "--shard", "none"]
    process = launch(2, *how)
    wait_until(lambda: len(read_log(tmp_path / "log.jsonl", 99)) >= 3, process)
    process.send_signal(signal.SIGTERM)
    said, complaints = process.communicate(timeout=60)
    assert said.count("saved; the same command goes on from here") == 1 and "[rank" not in complaints
    to_the_end(Forked(2, *how))
    equal_runs(alone, tmp_path)


def test_process_zero_decides_for_all_and_its_mistake_is_everyones():
    assert processes.first(lambda: 3) == 3 and processes.agree(True, False,
                                                             device=torch.device("cpu")) == [True, False]
    with pytest.raises(train.UserError, match="^no$"):
        processes.first(lambda: (_ for _ in ()).throw(train.UserError("no")))
