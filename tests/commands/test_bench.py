"""experiments/bench.py and tests/ablations.py: the tables say what was found."""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

from experiments import ablations
import pytest
import torch

from experiments import bench
from model import PRESETS, MMDiTConfig
from training import plan
from training.config import TrainConfig, parse

SMALL = ["--preset", "emoji", "--image-batch", "3", "--text-batch", "2", "--pixels", "16"]


def table_of(capsys, monkeypatch, *flags):
    """The JSON of the last line, whose names the table has."""
    monkeypatch.setattr(sys, "argv", ["experiments/bench.py", *flags, "--device", "cpu"])
    bench.main()
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert [line.split()[0] for line in table] == list(found)
    return found


def test_the_table_of_a_step(capsys, monkeypatch):
    found = table_of(capsys, monkeypatch, "train", *SMALL, "--vocab-size", "60", "--rounds", "2")
    work = plan.work(parse(SMALL), replace(MMDiTConfig(**PRESETS["emoji"]), vocab_size=60), 1)
    assert found["vocabulary"] == 60 and found["seconds"] > 0
    assert work["samples"] == 5 and work["tokens"] == 5 * (4 + 28)
    for name, amount in work.items():
        assert found[f"{name}_per_s"] * found["seconds"] == pytest.approx(amount, rel=1e-6)


def test_a_step_that_is_timed_is_the_trainers(monkeypatch):
    """Both losses, the optimizers and the average move the weights of the model that is timed."""
    config = parse([*SMALL, "--dtype", "float32", "--device", "cpu"])
    models, random_models = [], bench.random_models
    monkeypatch.setattr(bench, "random_models", lambda *a: models.append(random_models(*a)) or models[0])
    bench.bench_train(config, 60, 1)
    fresh = random_models(models[0].learns["mmdit"].config, config.text_length, "cpu")
    moved = [not torch.equal(a, b) for a, b in zip(models[0].learns.parameters(), fresh.learns.parameters())
             if a.requires_grad]
    assert sum(moved) > 0.95 * len(moved)


@pytest.mark.parametrize("of", [[], ["--preset", "emoji", "--pixels", "16"]])
def test_the_table_of_drawings_and_captions(of, capsys, monkeypatch):
    found = table_of(capsys, monkeypatch, "sample", "--n", "2", "--steps", "3", "--rounds", "1", *of)
    assert found["n"] == 2 and min(found["draws_per_s"], found["captions_per_s"]) > 0
    assert found["evaluations_a_drawing"] == 6
    assert found["evaluations_a_batch_of_captions"] == 28 if of else (
        1 < found["evaluations_a_batch_of_captions"] <= 28)


def test_each_ablation_is_one_flag_and_the_table_has_what_its_logs_say(tmp_path, monkeypatch, capsys):
    commands = []

    def trained(command, **how):
        commands.append(command[2:])
        seed, out = (command[command.index(flag) + 1] for flag in ("--seed", "--out"))
        value = int(seed) + 10 * ("flat" in command)
        row = dict(val_image=value, val_image_t=[0] * 5 + [value / 2] * 5, val_nats=value + 1, seconds=1.0)
        Path(out).mkdir(parents=True)
        (Path(out) / "log.jsonl").write_text(json.dumps(row) + "\n")
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(ablations.subprocess, "run", trained)
    monkeypatch.setattr(sys, "argv", ["ablations.py", str(tmp_path), "--steps", "9"])
    ablations.main()
    lines = capsys.readouterr().out.splitlines()
    assert "| the defaults | 1.000 (0.000–2.000) | 0.500 (0.000–1.000) | 2.000 (1.000–3.000) |" in lines
    assert ("| --text-loss flat | 11.000 (10.000–12.000) | 5.500 (5.000–6.000) | 12.000 (11.000–13.000) |"
            in lines)
    configs = {(config := parse(command)).out: config for command in commands}
    assert len(configs) == 3 * len(ablations.FLAGS) == 3 * (len(lines) - 2)
    plain = next(config for name, config in configs.items() if "the_defaults_1" in name)
    for name, config in configs.items():
        other = [field.name for field in fields(TrainConfig)
                 if getattr(config, field.name) != getattr(plain, field.name)]
        flags = {flag.replace("--", "").replace(" ", "_"): given for flag, given in ablations.FLAGS.items()}
        assert len(set(other) - {"seed", "out"}) == len(flags[Path(name).name.rpartition("_")[0]]) // 2
