"""train.py: a loop written out, stop and resume, both stages, the recipe, mistakes at the command line."""

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
from pathlib import Path

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
from dataset import workers
from dataset.workers import feed
from helpers import Forked, to_the_end, wait_until
from train import learning_rate, main as train_main, parse
from training.batches import BatchMaker, micro_batches, text_batch
from training.run_folder import read_log

ROOT = Path(__file__).parents[2]
QUICK = ["--image-batch", "4", "--text-batch", "2", "--dtype", "float32", "--log-every", "1",
         "--sample-every", "0", "--eval-every", "0", "--warmup", "2"]


def here(*flags):
    train_main(list(map(str, flags)))


def losses(out):
    return {row["step"]: (row["image_loss"], row["text_loss"])
            for row in map(json.loads, (out / "log.jsonl").read_text().splitlines())}


def plain_loop(config, folder, tar):
    """train.py for one process, an update written out: losses, norm and rate; weights; their average."""
    tokenizer = checkpoint.load_tokenizer(folder)
    model = nn.ModuleDict(dict(mmdit=checkpoint.load_mmdit(folder),
                               embedding=checkpoint.load_embedding(folder))).train()
    weights = {name: p for name, p in model.named_parameters() if name != "mmdit.null_image"}
    m, v = ({name: torch.zeros_like(p) for name, p in weights.items()} for _ in range(2))
    average, rows = {name: p.detach().clone() for name, p in model.named_parameters()}, []
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
    key = f"{config.seed} {config.stage} {digest}"
    mix = data.Mix([tar], 16, key)
    images = lambda samples: torch.stack([sample["picture"] for sample in samples]).float() / 127.5 - 1
    for step in range(config.steps):
        at = range(4 * step, 4 * step + 4)
        samples, draws = mix.take(at, "image"), [seeding.seeded(key, "image", i) for i in at]
        t, noise = map(torch.cat, zip(*(flow.draw((1, 3, 16, 16), g, config.time_shift) for g in draws)))
        captions = [sample["captions"][0] if torch.rand(2, generator=g)[0] >= 0.5 else ""
                    for sample, g in zip(samples, draws)]
        text = model["embedding"](torch.stack([tokenizer.encode(caption, 28) for caption in captions]))
        image_loss = flow.loss(lambda x, t: model["mmdit"](x, text, t)[0],
                               images(samples), t=t, noise=noise, floor=0.05)

        at, ids, frozen = range(2 * step, 2 * step + 2), [], []
        samples, draws = mix.take(at, "text"), [seeding.seeded(key, "text", i) for i in at]
        t, uniform = mask_diffusion.draw((2, 0), seeding.seeded(key, "times", step))[0], []
        for sample, g in zip(samples, draws):
            uniform.append(torch.rand(28, generator=g))
            ask, which = torch.rand(2, generator=g).tolist()
            q = sample["questions"][int(which * len(sample["questions"]))] if ask < 0.5 else None
            q = None if config.stage == "pretrain" else q
            prompt = tokenizer.pieces(f"Q: {q['question']} A: ") if q else []
            answer = tokenizer.pieces(q["answer"] if q else sample["captions"][0])
            ids.append(tokenizer.fit(prompt + answer, 28))
            frozen.append(torch.tensor([True] * len(prompt) + [False] * (28 - len(prompt))))
        x = images(samples)
        text_loss = mask_diffusion.errors(lambda ids: model["mmdit"](x, model["embedding"](ids),
                                                                     torch.zeros(1))[1],
                                          torch.stack(ids), tokenizer.mask_id, torch.stack(frozen), t=t,
                                          uniform=torch.stack(uniform)).sum() / (2 * 28)

        model.zero_grad()
        image_loss.backward()
        (0.3 * text_loss).backward()
        norm = torch.cat([p.grad.double().flatten() for p in weights.values()]).norm()
        rate = 1e-3 * min(1, (step + 1) / 2) * min(1, (config.steps - step) / 2)  # 2 of warm-up, 2 of decay
        with torch.no_grad():
            for name, p in weights.items():
                g = p.grad * min(1, 0.5 / float(norm + 1e-6))
                m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g ** 2
                p *= 1 - rate * 0.01
                p -= rate * m[name] / (1 - 0.9 ** (step + 1)) / ((v[name] / (1 - 0.999 ** (step + 1))).sqrt()
                                                                 + 1e-8)
            for name, p in model.named_parameters():
                decay = min(0.15, (step + 1) / (step + 10))
                average[name] = decay * average[name] + (1 - decay) * p
        rows.append((image_loss.item(), text_loss.item(), norm.item(), rate))
    return rows, dict(model.named_parameters()), average


def test_the_text_loss_is_the_mean_over_all_positions_prompts_included(tiny, small_tar, tmp_path):
    """The published normalisation: sum over masked tokens of CE / t, over B L, however much of it is prompt."""
    tokenizer = checkpoint.load_tokenizer(tiny)
    held = BatchMaker(tokenizer, {}, "key", 0, 1)
    sample = dict(key="a", latents=torch.zeros(3, 8, 8), captions=[],
                  questions=[dict(question="is this a flag of somewhere", answer="yes")])
    config = replace(parse(["--stage", "instruct"]), text_length=28)
    draws = [torch.Generator().manual_seed(i) for i in range(6)]
    batch = text_batch(config, held, [sample] * 6, draws, torch.linspace(0.2, 1, 6))
    assert batch["frozen"].sum() > 40 and batch["count"] == 6 * 28


def test_a_micro_batch_of_any_size_has_its_share_of_early_and_late_times():
    """So that the logits of its masked tokens never take more than plan.memory says."""
    for rows, world, size in ((64, 1, 8), (512, 8, 8), (512, 8, 1), (2048, 8, 32), (48, 1, 6)):
        t, _ = mask_diffusion.draw((rows, 0), torch.Generator().manual_seed(rows))
        own = t[0::world]
        parts = micro_batches(dict(ids=own, t=own, weight="flat"), size)
        assert sorted(torch.cat([part["t"] for part in parts]).tolist()) == sorted(own.tolist())
        assert {len(part["t"]) for part in parts} == {size} and parts[0]["weight"] == "flat"
        assert max(float(part["t"].mean()) for part in parts) <= 0.5 + 0.5 / size + 1e-3


def test_texts_that_are_cut_are_said_once_and_counted(tiny, small_tar, tmp_path, capsys):
    """By two processes that read ahead, in steps of 8 captions; after a stop it is not said again."""
    flags = list(map(str, ["--init", tiny, "--image-data", small_tar, "--out", tmp_path, *QUICK,
                           "--text-length", 5, "--text-batch", 4, "--workers", 2]))
    for steps, warnings in ((4, 1), (6, 0)):
        train_main([*flags, "--steps", str(steps)])
        said = capsys.readouterr().err
        assert said.count("warning: a text has ") == said.count("cut_texts in log.jsonl") == warnings
        assert "tokens, room for 4: kept up to " in said or not warnings
        counts = [json.loads(line).get("cut_texts", 0) for line in (tmp_path / "log.jsonl").open()]
    assert len(counts) == 6 and sum(counts) > 20 and max(counts) <= 8     # of 8 a step, some of them empty


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_training_equals_a_loop_written_out(stage, tiny, small_tar, tmp_path, monkeypatch):
    flags = ["--stage", stage, "--init", tiny, "--image-data", small_tar, "--out", tmp_path, "--steps", 3,
             *QUICK,
             "--optimizer", "adamw", "--lr", 1e-3, "--warmup", 2, "--decay-steps", 2,
             "--clip", 0.5,
             "--ema", 0.15, "--text-weight", 0.3, "--text-dropout", 0.5, "--save-every", 1, "--device", "cpu",
             *(["--question-share", 0.5] if stage == "instruct" else [])]
    flags, saved, save = list(map(str, flags)), [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda folder, tensors, *a, **k: (
        saved.append({k: v.clone() for k, v in tensors.items()}), save(folder, tensors, *a, **k)))
    train_main(flags)
    rows, weights, average = plain_loop(parse(flags), tiny, small_tar)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = [(row["image_loss"], row["text_loss"], row["grad_norm"], row["lr"]) for row in logged]
    assert found == [pytest.approx(row, rel=1e-6) for row in rows]
    assert min(norm for _, _, norm, _ in rows) > 1.0             # so that clipping at 0.5 is seen
    held = {"model": {name: torch.empty_like(p) for name, p in weights.items()}}
    dcp.load(held, checkpoint_id=tmp_path / "step_3", no_dist=True)
    for name in weights:
        assert torch.allclose(held["model"][name], weights[name], rtol=0, atol=1e-6), name
        assert torch.allclose(saved[-1][name], average[name], rtol=0, atol=1e-6), name
    assert {p.name for p in tmp_path.glob("step_*")} == {"step_2", "step_3"}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_run_sees_the_same_samples_with_any_number_of_processes_and_of_workers(small_tar, tiny, tmp_path):
    """Of a mixture of the emoji set and a folder with a picture of no use; draws and tokens included."""
    for i in range(40):
        Image.new("RGB", (20, 20 + i), (6 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"red {i}\nalso red {i}")
    (tmp_path / "7.png").write_text("no picture")
    config = replace(parse([]), image_batch=8, text_batch=4, text_length=28, pixels=16, stage="instruct")
    mix, tokenizer = [f"{tmp_path}:2", small_tar], checkpoint.load_tokenizer(tiny)

    def seen(world, workers):
        made = []
        for rank in range(world):
            mixes = {name: data.Mix(mix, 16, "key") for name in ("image", "text")}
            held = BatchMaker(tokenizer, mixes, "key", rank, world)
            made.append(list(feed(partial(held.batches, config), range(9), workers)))
        rows = [{(name, key): torch.stack([part[name][key] for part in parts], dim=1).flatten(0, 1)
                 for name in ("image", "text") for key, x in parts[0][name].items() if torch.is_tensor(x)}
                for parts in zip(*made)]
        return rows, sorted(sum((part["bad"] for parts in made for part in parts), []))
    alone, bad = seen(1, 0)
    assert len(alone) == 9 and len(bad) >= 1 and set(bad) == {bad[0]} and "7.png" in bad[0]
    for world, workers in ((1, 1), (1, 3), (2, 0), (2, 3), (4, 0), (4, 1)):
        rows, found = seen(world, workers)
        assert found == bad
        for one, other in zip(alone, rows, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(small_tar, tiny, tmp_path):
    flags = ["--image-data", small_tar, "--init", tiny, *QUICK, "--ema", "0.5", "--save-every", "3"]
    here("--out", tmp_path / "whole", *flags, "--steps", 6)
    here("--out", tmp_path / "parts", *flags, "--steps", 3)
    torch.rand(3)                                                # what a new process's generator hasn't drawn
    here("--out", tmp_path / "parts", *flags, "--steps", 6)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert ((tmp_path / "whole" / "model.safetensors").read_bytes()
            == (tmp_path / "parts" / "model.safetensors").read_bytes())


def test_a_signal_saves_and_both_stages_run(small_tar, tiny, tmp_path):
    out = tmp_path / "pretrain"
    process = Forked(1, "--out", out, "--image-data", small_tar, "--init", tiny, "--steps", 9999, *QUICK,
                     "--save-every", 9999)
    wait_until(lambda: len(read_log(out / "log.jsonl", 99)) >= 3, process)
    process.send_signal(signal.SIGTERM)
    assert "saved; the same command goes on" in to_the_end(process)[0]
    assert len(list(out.glob("step_*"))) == 1

    here("--stage", "instruct", "--init", out, "--out", tmp_path / "instruct", "--image-data", small_tar,
         "--steps", 2, *QUICK, "--sample-every", "2")
    made = {p.name for p in (tmp_path / "instruct").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "train.json", "log.jsonl", "loss.png",
            "samples_2.png", "step_2"} <= made
    assert json.loads((tmp_path / "instruct" / "train.json").read_text())["text_weight"] == 1.0


def test_a_loss_of_weight_zero_is_shown_and_nothing_is_learnt_from_it(small_tar, tiny, tmp_path):
    flags = ["--image-data", small_tar, "--init", tiny, *QUICK, "--steps", 2, "--weight-decay", 0]
    before = load_file(tiny / "model.safetensors")
    for other, name in (("image", "img_out"), ("text", "txt_out")):
        here(*flags, "--out", tmp_path / other, f"--{other}-weight", 0)
        after = load_file(tmp_path / other / "weights.safetensors")
        for head in ("img_out", "txt_out"):
            moved = (after[f"mmdit.{head}.weight"] - before[f"mmdit.{head}.weight"]).abs().max()
            assert (moved > 1e-5) == (head != name)
        assert all(image > 0.1 and text > 0.1 for image, text in losses(tmp_path / other).values())
        assert all(value.isfinite().all() for value in after.values())


def test_the_rate_warms_up_stays_and_falls_to_zero():
    rates = lambda *flags: [round(learning_rate(step, config), 6) for config in [parse(["--lr", "1", *flags])]
                            for step in range(config.steps)]
    assert rates("--steps", "6", "--warmup", "4") == [0.25, 0.5, 0.75, 1, 1, 1]
    falling = ["--warmup", "2", "--decay-steps", "4"]
    assert rates("--steps", "8", *falling) == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert rates("--steps", "6", *falling) == [0.5, 1, 1, 0.75, 0.5, 0.25]


def test_a_run_whose_time_is_up_ends_early_and_a_finished_one_writes_its_weights_again(
        small_tar, tiny, tmp_path, capsys):
    flags = ["--image-data", small_tar, "--init", tiny, "--out", tmp_path, *QUICK, "--save-every", "2",
             "--lr", "1e-3"]
    here(*flags, "--steps", 2)
    flags += ["--decay-steps", 2]
    here(*flags, "--steps", 5)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and rows[-1]["lr"] == pytest.approx(1e-3 / 2)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()                # as a kill between the last two files leaves it
    capsys.readouterr()
    here(*flags, "--steps", 5)
    assert "has its 5 steps" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert not list(tmp_path.glob(".tmp*"))


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(small_tar, tmp_path, monkeypatch,
                                                                        mistake):
    flags = ["--image-data", small_tar, "--out", tmp_path, *QUICK, "--save-every", "1", "--log-every", "9",
             "--steps", "5"]
    calls, errors = [], flow.errors
    monkeypatch.setattr(flow, "errors", lambda *a, **k: (
        calls.append(0) or errors(*a, **k) * (1, 1, math.nan)[len(calls) - 1]))
    code, said = mistake(train_main, flags)
    assert code == 1 and "step 3: the gradient is not finite (image loss nan" in said
    assert "step_2 with a smaller --lr" in said
    assert {p.name for p in tmp_path.glob("step_*")} == {"step_1", "step_2"}


def test_the_recipe_skips_what_is_done_and_does_not_go_on_from_what_is_not(tmp_path):
    """runs/emoji.sh with stand-ins: a python that notes how it was called, and ends a stage or not; a driver
    that has no GPU, or has one."""
    (tmp_path / "runs").mkdir()
    shutil.copy(ROOT / "runs" / "emoji.sh", tmp_path / "runs")
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$@" >>called\n'
                    '[ -f stop ] || { mkdir -p $3; cat $5.json >$3/config.json; }\n')
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\n[ -f gpu ]\n")
    for program in (stub, driver):
        program.chmod(0o755)
    for steps in (5000, 15000):
        write_json(tmp_path / f"{steps}.json", dict(mmdit=dict(depth=6), step=steps, stage="x"))
    call = lambda *flags: subprocess.run(["bash", "runs/emoji.sh", *flags], cwd=tmp_path, env=os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}"}).returncode
    lines = lambda: (tmp_path / "called").read_text().splitlines()
    stages = lambda: [line.split()[2] for line in lines()]
    (tmp_path / "stop").touch()
    assert call() == 1 and stages() == ["out/pretrain"]
    (tmp_path / "stop").unlink()
    (tmp_path / "25000.json").touch()
    assert call() == 0 and stages()[1:] == ["out/pretrain", "out/instruct", "out/each"]
    assert call("--steps", "200", "--decay-steps", "100") == 0 and stages()[4:] == ["out/each"]
    (tmp_path / "gpu").touch()
    shutil.rmtree(tmp_path / "out")
    assert call() == 0 and stages()[5:] == stages()[1:4]
    assert ["--cuda-graph" in line for line in lines()] == 5 * [False] + 3 * [True]
    flags = [re.sub("--init out/[a-z]*", "--init assets/emoji", line).split()[1:] for line in lines()]
    settings = list(map(parse, flags))
    assert (settings[4].decay_steps, settings[4].steps) == (100, 200)
    assert {config.workers for config in settings} == {0, 12} and not any(c.compile for c in settings[5:])


@pytest.mark.parametrize("flags, status, message", [
    (["--stage", "nonsense"], 2, "invalid choice: 'nonsense'"),
    (["--stepz", "3"], 2, "unknown argument --stepz; did you mean --steps?"),
    (["--steps", "0"], 2, "--steps: expected a whole number, at least 1, got '0'"),
    (["--steps", "many"], 2, "--steps: expected a whole number, at least 1, got 'many'"),
    (["--text-dropout", "1.5"], 2, "--text-dropout: expected a number from 0 to 1, got '1.5'"),
    (["--init", "nowhere"], 1,
     "nowhere: expected a checkpoint, a folder or a .safetensors file, found nothing"),
    (["--image-data", "nowhere.tar"], 1, "nowhere.tar: no such tar file"),
    (["--pixels", "30"], 1, "--pixels 30: expected a multiple of the patch, 8, up to 128"),
    (["--pixels", "0"], 2, "--pixels: expected a whole number, at least 1, got '0'"),
    (["--time-shift", "0"], 2, "--time-shift: expected a number from 0.001 to 1000, got '0'"),
    (["--preset", "e2e-1.1b", "--pixels", "64"], 1, "3 channels, this model's latents have 16: expected an"),
])
def test_mistakes_get_one_line_and_a_status(flags, status, message, tmp_path, small_tar, mistake):
    flags = [*(["--image-data", small_tar] if "--image-data" not in flags else []), "--out", tmp_path / "x",
             *flags]
    code, said = mistake(train_main, flags)
    assert code == status and message in said and len(said.splitlines()) == 1
