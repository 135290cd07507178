"""experiments/bench.py and experiments/ablations.py: the tables hold the measured numbers."""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments import ablations, bench
from model import PRESETS, MMDiTConfig
from training import plan
from training.config import TrainConfig, parse

RANDOM_MODELS = bench.random_models
SMALL = ["--preset", "emoji", "--image-batch", "3", "--text-batch", "2", "--pixels", "16"]


def table_of(capsys, monkeypatch, *flags):
    """Run the benchmark and return its last line, JSON with the table's names as keys."""
    monkeypatch.setattr(sys, "argv", ["experiments/bench.py", *flags, "--device", "cpu"])
    bench.main()
    *table, last = capsys.readouterr().out.splitlines()
    values = json.loads(last)
    assert [line.split()[0] for line in table] == list(values)
    return values


@pytest.fixture
def trained_models(monkeypatch):
    """Collect the models that the benchmark trains."""
    models = []

    def build(*args):
        models.append(RANDOM_MODELS(*args))
        return models[-1]
    monkeypatch.setattr(bench, "random_models", build)
    return models


def test_the_timed_step_trains_and_its_table_holds_the_planned_work(capsys, monkeypatch,
                                                                     trained_models):
    flags = [*SMALL, "--dtype", "float32"]
    values = table_of(capsys, monkeypatch, "train", *flags, "--vocab-size", "60", "--rounds", "1")
    work = plan.work(parse(flags), replace(MMDiTConfig(**PRESETS["emoji"]), vocab_size=60), 1)
    assert values["vocabulary"] == 60 and values["seconds"] > 0
    assert work["samples"] == 5 and work["tokens"] == 5 * (4 + 28)
    for name, amount in work.items():
        # the table is not rounded; the tolerance is for one float64 division
        assert values[f"{name}_per_s"] * values["seconds"] == pytest.approx(amount, rel=1e-6)
    # both losses and the optimizer move the weights; a key's bias has no gradient
    [models] = trained_models
    fresh = RANDOM_MODELS(models.trainable["mmdit"].config, 28, "cpu")
    moved = []
    for parameter, initial in zip(models.trainable.parameters(), fresh.trainable.parameters()):
        if parameter.requires_grad:
            moved.append(not torch.equal(parameter, initial))
    assert sum(moved) > 0.95 * len(moved)


@pytest.mark.parametrize("flags, fewest", [([], 2), (["--preset", "emoji", "--pixels", "16"], 28)])
def test_the_table_of_samples_counts_evaluations(flags, fewest, capsys, monkeypatch):
    """Captions of random weights never end, so they take the evaluations of all 28 tokens."""
    values = table_of(capsys, monkeypatch, "sample", "--n", "2", "--steps", "2", "--rounds", "1",
                      *flags)
    assert values["n"] == 2 and min(values["draws_per_s"], values["captions_per_s"]) > 0
    assert values["evaluations_a_drawing"] == 2 * 2              # with guidance
    assert fewest <= values["evaluations_a_batch_of_captions"] <= 28


@pytest.fixture
def ablation_runs(tmp_path, monkeypatch, capsys):
    """Run ablations.py with a trainer that only writes a log; return its commands and its table."""
    commands = []

    def train(command, **how):
        commands.append(command[2:])
        seed = int(command[command.index("--seed") + 1])
        out = Path(command[command.index("--out") + 1])
        loss = seed + 10 * ("flat" in command)
        row = dict(val_image=loss, val_image_t=[0] * 5 + [loss / 2] * 5, val_nats=loss + 1,
                   seconds=1.0)
        out.mkdir(parents=True)
        (out / "log.jsonl").write_text(json.dumps(row) + "\n")
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(ablations.subprocess, "run", train)
    monkeypatch.setattr(sys, "argv", ["ablations.py", str(tmp_path), "--steps", "9"])
    ablations.main()
    return commands, capsys.readouterr().out.splitlines()


def test_the_table_of_ablations_holds_means_and_ranges_of_the_logs(ablation_runs):
    _, lines = ablation_runs
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert ["the defaults", "1.000 (0.000–2.000)", "0.500 (0.000–1.000)",
            "2.000 (1.000–3.000)"] in rows
    assert ["--text-loss flat", "11.000 (10.000–12.000)", "5.500 (5.000–6.000)",
            "12.000 (11.000–13.000)"] in rows
    assert len(rows) - 2 == len(ablations.FLAGS)


def test_each_ablation_changes_only_its_own_flags(ablation_runs):
    commands, _ = ablation_runs
    configs = [parse(command) for command in commands]
    assert len({config.out for config in configs}) == 3 * len(ablations.FLAGS)
    default = next(config for config in configs if "the_defaults_1" in config.out)
    flags_of = {}
    for name, flags in ablations.FLAGS.items():
        flags_of[name.replace("--", "").replace(" ", "_")] = flags
    for config in configs:
        changed = set()
        for field in fields(TrainConfig):
            if getattr(config, field.name) != getattr(default, field.name):
                changed.add(field.name)
        name, _, _ = Path(config.out).name.rpartition("_")
        assert len(changed - {"seed", "out"}) == len(flags_of[name]) // 2
