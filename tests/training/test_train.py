"""train.py against a plain loop; stopping and resuming; the recipe; wrong flags."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import checkpoint
import data
import flow
import mask_diffusion
from common import seeding
from common.files import write_json
from dataset.workers import feed
from helpers import ROOT, Forked, assert_lines, rows, to_the_end, wait_until
from train import learning_rate, main as train_main, parse
from training.batches import Batch, BatchMaker
from training.run_folder import Run, read_log

QUICK = ["--image-batch", "4", "--text-batch", "2", "--dtype", "float32", "--log-every", "1",
         "--sample-every", "0", "--eval-every", "0", "--save-every", "9", "--warmup", "2"]


def run_training(*flags):
    train_main(list(map(str, flags)))


def losses(out):
    return {row["step"]: (row["image_loss"], row["text_loss"]) for row in rows(out)}


# --------------------------------------------------------------------------- the loop, written out

def scaled(samples):
    """Return the samples' images (B, 3, H, W) in [-1, 1]."""
    return torch.stack([sample["image"] for sample in samples]).float() / 127.5 - 1


def plain_image_loss(config, model, tokenizer, samples, generators):
    times, noises, captions = [], [], []
    for sample, generator in zip(samples, generators):
        if config.times == "uniform":
            t = torch.rand(1, generator=generator)
        else:
            t = torch.sigmoid(torch.randn(1, generator=generator))
        times.append(config.time_shift * t / (1 + (config.time_shift - 1) * t))
        noises.append(torch.randn(1, 3, 16, 16, generator=generator))
        dropped = torch.rand(2, generator=generator)[0] < config.text_dropout
        captions.append("" if dropped else sample["captions"][0])
    ids = torch.stack([tokenizer.encode(caption, 28) for caption in captions])
    text = model["embedding"](ids)
    errors = flow.errors(lambda x, t: model["mmdit"](x, text, t)[0], scaled(samples),
                         torch.cat(times), torch.cat(noises), floor=0.05)
    return errors.mean()


def plain_text_loss(config, model, tokenizer, samples, generators, t):
    uniform, ids, frozen = [], [], []
    for sample, generator in zip(samples, generators):
        uniform.append(torch.rand(28, generator=generator))
        ask, which = torch.rand(2, generator=generator).tolist()
        prompt, answer = [], sample["captions"][0]
        if config.stage == "instruct" and ask < config.question_share:
            question = sample["questions"][int(which * len(sample["questions"]))]
            prompt = tokenizer.pieces(f"Q: {question['question']} A: ")
            answer = question["answer"]
        ids.append(tokenizer.fit(prompt + tokenizer.pieces(answer), 28))
        frozen.append(torch.arange(28) < len(prompt))
    x = scaled(samples)
    logits_at = mask_diffusion.at_positions(
        lambda ids: model["mmdit"](x, model["embedding"](ids), torch.zeros(1))[1])
    errors = mask_diffusion.errors(logits_at, torch.stack(ids), tokenizer.mask_id, t,
                                   torch.stack(uniform), torch.stack(frozen))
    return errors.sum() / (2 * 28)  # a mean over all positions, including prompts


def plain_loop(config, folder, tar):
    """Train in a plain loop; return rows of (losses, norm, learning rate), weights, and average."""
    tokenizer = checkpoint.load_tokenizer(folder)
    model = nn.ModuleDict(dict(mmdit=checkpoint.load_mmdit(folder),
                               embedding=checkpoint.load_embedding(folder))).train()
    weights = {name: p for name, p in model.named_parameters() if name != "mmdit.null_image"}
    m = {name: torch.zeros_like(p) for name, p in weights.items()}
    v = {name: torch.zeros_like(p) for name, p in weights.items()}
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
    key = f"{config.seed} {config.stage} {digest}"
    mix = data.Mix([tar], 16, key)
    logged = []
    for step in range(config.steps):
        at = range(4 * step, 4 * step + 4)
        image_loss = plain_image_loss(config, model, tokenizer, mix.take(at, "image"),
                                      [seeding.seeded(key, "image", i) for i in at])
        at = range(2 * step, 2 * step + 2)
        t = mask_diffusion.draw_times(2, seeding.seeded(key, "times", step))
        text_loss = plain_text_loss(config, model, tokenizer, mix.take(at, "text"),
                                    [seeding.seeded(key, "text", i) for i in at], t)
        model.zero_grad()
        image_loss.backward()
        (0.3 * text_loss).backward()
        norm = torch.cat([p.grad.double().flatten() for p in weights.values()]).norm()
        # two warm-up steps and two decay steps
        rate = 1e-3 * min(1, (step + 1) / 2) * min(1, (config.steps - step) / 2)
        with torch.no_grad():
            for name, p in weights.items():
                g = p.grad * min(1, 0.5 / float(norm + 1e-6))
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g ** 2
                mean = m[name] / (1 - 0.9 ** (step + 1))
                deviation = (v[name] / (1 - 0.999 ** (step + 1))).sqrt()
                p *= 1 - rate * 0.01
                p -= rate * mean / (deviation + 1e-8)
            decay = min(config.ema, (step + 1) / (step + 10))    # at most 0.25 in three steps
            for name, p in model.named_parameters():
                average[name] = decay * average[name] + (1 - decay) * p
        logged.append((image_loss.item(), text_loss.item(), norm.item(), rate))
    return logged, dict(model.named_parameters()), average


@pytest.mark.parametrize("stage, more", [
    ("pretrain", ["--times", "uniform", "--ema", 0.9]),          # the average is still warming up
    ("instruct", ["--question-share", 0.5, "--ema", 0.15])])     # its warm-up ends after a step
def test_training_equals_a_loop_written_out(stage, more, tiny, small_tar, tmp_path, monkeypatch):
    flags = ["--stage", stage, "--init", tiny, "--image-data", small_tar, "--out", tmp_path,
             "--steps", 3, *QUICK, "--optimizer", "adamw", "--lr", 1e-3, "--decay-steps", 2,
             "--clip", 0.5, "--text-weight", 0.3, "--text-dropout", 0.5,
             "--save-every", 1, "--device", "cpu", *more]
    flags = list(map(str, flags))
    saved, save = [], checkpoint.save

    def save_and_keep(folder, tensors, *args, **more):
        saved.append({name: tensor.clone() for name, tensor in tensors.items()})
        return save(folder, tensors, *args, **more)
    monkeypatch.setattr(checkpoint, "save", save_and_keep)
    train_main(flags)
    expected, weights, average = plain_loop(parse(flags), tiny, small_tar)
    logged = [(row["image_loss"], row["text_loss"], row["grad_norm"], row["lr"])
              for row in rows(tmp_path)]
    assert logged == [pytest.approx(row, rel=1e-6) for row in expected]      # float32
    assert min(norm for _, _, norm, _ in expected) > 1.0         # so that clipping at 0.5 is seen
    state = {"model": {name: torch.empty_like(p) for name, p in weights.items()}}
    dcp.load(state, checkpoint_id=tmp_path / "step_3", no_dist=True)
    for name in weights:                                         # steps of 1e-3 in float32
        assert torch.allclose(state["model"][name], weights[name], rtol=0, atol=1e-6), name
        assert torch.allclose(saved[-1][name], average[name], rtol=0, atol=1e-6), name
    assert {p.name for p in tmp_path.glob("step_*")} == {"step_2", "step_3"}


# ------------------------------------------------------------------------------------- the batches

def test_text_loss_is_a_mean_over_all_positions(tiny):
    """As published, the sum of CE / t over masked tokens is divided by B L, including prompts."""
    sample = dict(key="a", latents=torch.zeros(3, 8, 8), captions=[],
                  questions=[dict(question="is this a flag of somewhere", answer="yes")])
    config = replace(parse(["--stage", "instruct"]), text_length=28)
    generators = [torch.Generator().manual_seed(i) for i in range(6)]
    maker = BatchMaker(config, checkpoint.load_tokenizer(tiny), {}, "key", 0, 1)
    batch = maker.text_batch([sample] * 6, generators, torch.linspace(0.2, 1, 6))
    assert batch.frozen.sum() > 40 and batch.denominator == 6 * 28


def test_times_flag_reaches_the_image_loss(tiny):
    sample = dict(key="a", latents=torch.zeros(3, 8, 8), captions=["a"])
    times = {}
    for name in ("logit-normal", "uniform"):
        config = replace(parse(["--times", name, "--time-shift", "1"]), text_length=28)
        generators = [torch.Generator().manual_seed(i) for i in range(400)]
        maker = BatchMaker(config, checkpoint.load_tokenizer(tiny), {}, "key", 0, 1)
        times[name] = maker.image_batch([sample] * 400, generators).t
    # P(t < 0.1) is 0.1 and P(N(0, 1) < logit 0.1) = 0.014; of 400, 4 standard errors are 0.06
    assert float((times["uniform"] < 0.1).float().mean()) == pytest.approx(0.1, abs=0.06)
    assert float((times["logit-normal"] < 0.1).float().mean()) < 0.04


def test_micro_batches_have_early_and_late_times():
    """Then the logits of a micro-batch's masked tokens never take more than plan.memory counts."""
    for size, world, micro in ((64, 1, 8), (512, 8, 8), (512, 8, 1), (2048, 8, 32), (48, 1, 6)):
        times = mask_diffusion.draw_times(size, torch.Generator().manual_seed(size))
        times = times[0::world]
        parts = Batch(None, times, times).split(micro)
        assert sorted(torch.cat([part.t for part in parts]).tolist()) == sorted(times.tolist())
        assert {len(part.t) for part in parts} == {micro}
        # evenly spread times: at most half a spacing of the part above 0.5, and T_MIN
        assert max(float(part.t.mean()) for part in parts) <= 0.5 + 0.5 / micro + 1e-3


def all_batches(config, sources, tokenizer, world, workers):
    """Return nine steps' global batches as tensors, and the names of unreadable samples."""
    ranks = []
    for rank in range(world):
        mixes = {name: data.Mix(sources, 16, "key") for name in ("image", "text")}
        maker = BatchMaker(config, tokenizer, mixes, "key", rank, world)
        ranks.append(list(feed(maker.make_batches, range(9), workers)))
    steps, bad = [], []
    for parts in zip(*ranks):
        tensors = {}
        for name in ("image", "text"):
            for key, value in vars(getattr(parts[0], name)).items():
                if torch.is_tensor(value):
                    columns = [getattr(getattr(part, name), key) for part in parts]
                    columns = torch.stack(columns, dim=1)
                    tensors[name, key] = columns.flatten(0, 1)
        steps.append(tensors)
        for part in parts:
            bad += part.bad_samples
    return steps, sorted(bad)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_processes_and_workers_do_not_change_the_batches(small_tar, tiny, tmp_path):
    """Test a mixture of the emoji set and a folder with an unreadable image; compare also random
    draws and tokens."""
    for i in range(40):
        Image.new("RGB", (20, 20 + i), (6 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"red {i}\nalso red {i}")
    (tmp_path / "7.png").write_text("no image")
    config = replace(parse([]), image_batch=8, text_batch=4, text_length=28, pixels=16,
                     stage="instruct")
    batches = partial(all_batches, config, [f"{tmp_path}:2", small_tar],
                      checkpoint.load_tokenizer(tiny))
    expected, bad = batches(1, 0)
    assert len(expected) == 9 and len(bad) >= 1
    assert set(bad) == {bad[0]} and "7.png" in bad[0]
    for world, workers in ((1, 3), (2, 1), (4, 0)):
        steps, names = batches(world, workers)
        assert names == bad
        for one, other in zip(expected, steps, strict=True):
            assert one.keys() == other.keys()
            for key in one:
                assert torch.equal(one[key], other[key]), key


def test_cut_texts_are_warned_about_once_and_counted(tiny, small_tar, tmp_path, capsys):
    """Two processes read ahead, 8 captions per step; a resumed run does not warn again."""
    flags = ["--init", tiny, "--image-data", small_tar, "--out", tmp_path, *QUICK,
             "--text-length", 5, "--text-batch", 4, "--workers", 2]
    for steps, warnings in ((3, 1), (5, 0)):
        run_training(*flags, "--steps", steps)
        errors = capsys.readouterr().err
        assert errors.count("warning") == errors.count("cut_texts") == warnings
        assert errors.count("--text-length") == warnings
    counts = [row.get("cut_texts", 0) for row in rows(tmp_path)]
    assert len(counts) == 5 and sum(counts) > 15 and max(counts) <= 8    # some captions are dropped


# --------------------------------------------------------------------------------- stop and resume

def test_resumed_run_equals_an_unbroken_one(small_tar, tiny, tmp_path):
    flags = ["--image-data", small_tar, "--init", tiny, *QUICK, "--ema", "0.5", "--save-every", "2"]
    run_training("--out", tmp_path / "whole", *flags, "--steps", 4)
    run_training("--out", tmp_path / "parts", *flags, "--steps", 2)
    torch.rand(3)  # changes the global random state, as a new process does
    run_training("--out", tmp_path / "parts", *flags, "--steps", 4)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert ((tmp_path / "whole" / "model.safetensors").read_bytes()
            == (tmp_path / "parts" / "model.safetensors").read_bytes())


@pytest.fixture(scope="module")
def stopped_run(small_tar, tiny, tmp_path_factory):
    """Stop a run with SIGTERM; return (folder, stdout)."""
    out = tmp_path_factory.mktemp("stopped") / "pretrain"
    process = Forked(1, "--out", out, "--image-data", small_tar, "--init", tiny, "--steps", 9999,
                     *QUICK, "--save-every", 9999)
    wait_until(lambda: len(read_log(out / "log.jsonl", 99)) >= 3, process)
    process.send_signal(signal.SIGTERM)
    return out, to_the_end(process)[0]


def test_sigterm_saves_a_checkpoint(stopped_run):
    out, output = stopped_run
    folder, = out.glob("step_*")
    assert f"step {folder.name.removeprefix('step_')}, saved" in output.splitlines()[-1]


def test_instruct_starts_from_a_pretrain_run(stopped_run, small_tar, tmp_path):
    run_training("--stage", "instruct", "--init", stopped_run[0], "--out", tmp_path,
                 "--image-data", small_tar, "--steps", 2, *QUICK, "--sample-every", "2")
    files = {p.name for p in tmp_path.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "train.json", "log.jsonl",
            "loss.png", "samples_2.png", "step_2"} <= files
    assert json.loads((tmp_path / "train.json").read_text())["text_weight"] == 1.0


def test_longer_decaying_run_resumes_and_rewrites_lost_weights(small_tar, tiny, tmp_path, capsys):
    flags = ["--image-data", small_tar, "--init", tiny, "--out", tmp_path, *QUICK,
             "--save-every", "2", "--lr", "1e-3"]
    run_training(*flags, "--steps", 2)
    flags += ["--decay-steps", 2]
    run_training(*flags, "--steps", 5)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert rows(tmp_path)[-1]["lr"] == pytest.approx(1e-3 / 2)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()  # as after a kill between two files
    capsys.readouterr()
    run_training(*flags, "--steps", 5)
    assert "5 steps" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert not list(tmp_path.glob(".tmp*"))


def test_gradient_that_is_not_finite_stops_before_a_save(
        small_tar, tiny, tmp_path, monkeypatch, run_program):
    flags = ["--init", tiny, "--image-data", small_tar, "--out", tmp_path, *QUICK,
             "--save-every", "1", "--log-every", "9", "--steps", "5"]
    factors, errors = iter([1, 1, math.nan]), flow.errors
    monkeypatch.setattr(flow, "errors", lambda *args: errors(*args) * next(factors))
    code, error = run_program(train_main, flags)
    assert code == 1
    for name in ("step 3", "image loss nan", str(tmp_path / "step_2"), "--lr"):
        assert name in error
    assert {p.name for p in tmp_path.glob("step_*")} == {"step_1", "step_2"}


# ------------------------------------------------------------------------------------ the settings

@pytest.mark.parametrize("unused, head", [("image", "img_out"), ("text", "txt_out")])
def test_loss_of_weight_zero_is_logged_and_trains_nothing(unused, head, small_tar, tiny, tmp_path):
    run_training("--image-data", small_tar, "--init", tiny, *QUICK, "--steps", 2,
                 "--weight-decay", 0, "--out", tmp_path, f"--{unused}-weight", 0)
    before = load_file(tiny / "model.safetensors")
    after = load_file(tmp_path / "weights.safetensors")
    for name in ("img_out", "txt_out"):
        key = f"mmdit.{name}.weight"
        moved = float((after[key] - before[key]).abs().max())
        assert (moved > 1e-5) == (name != head)
    for image, text in losses(tmp_path).values():
        assert image > 0.1 and text > 0.1
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_a_cut_text_is_described_also_if_another_worker_cut_none():
    run = SimpleNamespace(sums={}, summed=0, bad_samples=[], cut_texts=0, cut_example="", rows=[])
    for count, example in ((1, "9 tokens"), (0, "")):
        batch = SimpleNamespace(bad_samples=[], cut_texts=count, cut_example=example)
        Run.note(run, {}, batch)
    assert Run.count_samples(run) == {"cut_texts": 1}
    assert run.cut_example == "9 tokens"


def test_learning_rate_warms_up_stays_and_falls_to_zero():
    def rates(*flags):
        config = parse(["--lr", "1", *flags])
        return [round(learning_rate(step, config), 6) for step in range(config.steps)]
    assert rates("--steps", "6", "--warmup", "4") == [0.25, 0.5, 0.75, 1, 1, 1]
    falling = ["--warmup", "2", "--decay-steps", "4"]
    assert rates("--steps", "8", *falling) == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert rates("--steps", "6", *falling) == [0.5, 1, 1, 0.75, 0.5, 0.25]


def test_emoji_recipe_skips_finished_stages_and_stops_at_a_failed_one(tmp_path):
    """Run runs/emoji.sh with stand-ins: a python that records its flags and finishes a stage or
    fails, and a GPU driver with or without a GPU."""
    (tmp_path / "runs").mkdir()
    for name in ("emoji.sh", "stage.sh"):
        shutil.copy(ROOT / "runs" / name, tmp_path / "runs")
    stubs = {"python": '#!/bin/sh\necho "$@" >>called\n'
                       '[ -f stop ] || { mkdir -p $3; cat $5.json >$3/config.json; }\n',
             "nvidia-smi": "#!/bin/sh\n[ -f gpu ]\n"}
    for name, script in stubs.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    for steps in (5000, 15000):
        write_json(tmp_path / f"{steps}.json", dict(mmdit=dict(depth=6), step=steps, stage="x"))
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def call(*flags):
        return subprocess.run(["bash", "runs/emoji.sh", *flags], cwd=tmp_path,
                              env=environment).returncode

    def lines():
        return (tmp_path / "called").read_text().splitlines()

    def stages():
        return [line.split()[2] for line in lines()]
    (tmp_path / "stop").touch()
    assert call() == 1 and stages() == ["out/emoji/pretrain"]
    (tmp_path / "stop").unlink()
    (tmp_path / "25000.json").touch()
    assert call() == 0 and stages()[1:] == ["out/emoji/pretrain", "out/emoji/instruct", "out/emoji/each"]
    assert call("--steps", "200", "--decay-steps", "100") == 0 and stages()[4:] == ["out/emoji/each"]
    (tmp_path / "gpu").touch()
    shutil.rmtree(tmp_path / "out")
    assert call() == 0 and stages()[5:] == stages()[1:4]
    assert ["--cuda-graph" in line for line in lines()] == 5 * [False] + 3 * [True]
    configs = []
    for line in lines():
        flags = re.sub("--init out/[a-z/]*", "--init assets/emoji", line).split()[1:]
        configs.append(parse(flags))
    assert (configs[4].decay_steps, configs[4].steps) == (100, 200)
    assert {config.workers for config in configs} == {0, 12}
    assert not any(config.compile for config in configs[5:])


@pytest.mark.parametrize("flags, status, names", [
    (["--stage", "nonsense"], 2, ["--stage", "'nonsense'"]),
    (["--stepz", "3"], 2, ["--stepz", "--steps?"]),
    (["--steps", "0"], 2, ["--steps", "1", "'0'"]),
    (["--steps", "many"], 2, ["--steps", "1", "'many'"]),
    (["--text-dropout", "1.5"], 2, ["--text-dropout", "0 to 1", "'1.5'"]),
    (["--init", "nowhere"], 1, ["nowhere", "checkpoint"]),
    (["--image-data", "nowhere.tar"], 1, ["nowhere.tar"]),
    (["--pixels", "30"], 1, ["--pixels 30", "8", "128"]),
    (["--pixels", "0"], 2, ["--pixels", "1", "'0'"]),
    (["--time-shift", "0"], 2, ["--time-shift", "0.001", "1000", "'0'"]),
    (["--preset", "e2e-1.1b", "--pixels", "64"], 1, ["--image-data", "3 channels", "16"]),
])
def test_mistakes_get_one_line_and_a_status(flags, status, names, tmp_path, small_tar, run_program):
    given = ["--out", tmp_path / "x", *flags]
    if "--image-data" not in flags:
        given += ["--image-data", small_tar]
    code, error = run_program(train_main, given)
    assert code == status
    assert_lines(error.splitlines(), names)
