"""experiments/bench.py and experiments/claims.py: the tables hold the measured numbers."""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from common.cli import UserError
from experiments import bench, claims, full_size_gpu
from model import PRESETS, MMDiTConfig
from training import cuda_graph, plan
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
    fresh = RANDOM_MODELS(models.trainable["mmdit"].config, 28, torch.device("cpu"))
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


def test_recomputed_activations_and_a_profile(capsys, monkeypatch, tmp_path):
    file = tmp_path / "profile.txt"
    values = table_of(capsys, monkeypatch, "train", *SMALL, "--rounds", "1",
                      "--checkpoint-activations", "--profile", str(file))
    assert values["recomputed"] and values["image_batch"] == 3
    assert "aten::" in file.read_text()


def test_only_a_gpu_grows_its_batches(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments/bench.py", "train", *SMALL, "--grow",
                                      "--device", "cpu"])
    with pytest.raises(UserError, match="--grow"):
        bench.main()


def test_jobs_on_a_gpu_keep_their_results_when_they_fail_or_take_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(full_size_gpu, "MOST", 3)
    monkeypatch.setattr(full_size_gpu, "LEAST", 0.5)
    say = "print('a warning'); print('{\"n\": %d}', flush=True); "
    jobs = [full_size_gpu.Job("good", ["-c", say % 1 + say % 2]),
            full_size_gpu.Job("bad", ["-c", say % 3 + "raise SystemExit(1)"]),
            full_size_gpu.Job("slow", ["-c", say % 4 + "import time; time.sleep(60)"]),
            full_size_gpu.Job("late", ["-c", say % 5])]
    rows = full_size_gpu.run_all(jobs[:3], tmp_path, limit=60)
    assert [row["status"] for row in rows] == ["done", "exit status 1", "stopped after 3 s"]
    assert [row["results"] for row in rows] == [[dict(n=1), dict(n=2)], [dict(n=3)], [dict(n=4)]]
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    assert (tmp_path / "log.txt").read_text().count("a warning") == 4
    [row] = full_size_gpu.run_all(jobs[3:], tmp_path, limit=0.1)
    assert row["status"] == "skipped" and row["results"] == []


def test_the_jobs_for_a_gpu_have_flags_that_exist(tmp_path, monkeypatch):
    for job in full_size_gpu.make_jobs(tmp_path, None):
        if "experiments.bench" in job.command:
            monkeypatch.setattr(sys, "argv", job.command[1:])
            assert bench.parse_args().preset == "sd3-medium"
        elif job.command[0] == "train.py":
            flags = job.command[1:]
            flags[flags.index("cuda")] = "cpu"
            config = parse(flags)
            assert config.steps == 60
            if config.cuda_graph:
                monkeypatch.setattr(cuda_graph, "choose_device", lambda name: "cuda")
                cuda_graph.check(config)                         # raises UserError
        else:
            files = [word for word in job.command if word.endswith(".py")]
            assert files and all((full_size_gpu.ROOT / file).exists() for file in files)


@pytest.fixture
def claim_runs(tmp_path, monkeypatch):
    """Run claims.py with programs that only write their files; return a function that runs a claim,
    and the commands that were called."""
    commands = []

    def call(command):
        commands.append(command)
        flags = dict(zip(command, command[1:]))
        if command[0] == "train.py":
            config = parse(command[1:])
            row = dict(val_image_t=[9] * 3 + [config.seed] * 7, val_nats=1.0, meter_cosine=0.5)
            folder = Path(config.out)
            assert not config.init or (Path(config.init) / "log.jsonl").exists()
            folder.mkdir(exist_ok=True)
            (folder / "log.jsonl").write_text(json.dumps(row) + "\n")
            (folder / "config.json").write_text(json.dumps(dict(step=config.steps)))
            return
        names = ["drawing: colours", "reading: true", "POPE: accuracy"]
        names += [f"reading: {name}" for name in ("number", "colour", "shape", "yes/no", "place")]
        open_prompts = {"calibration: colour": 7}
        results = {"seen": [dict.fromkeys(names, 60)], "held-out": [dict.fromkeys(names, 20)],
                   "open prompts": [open_prompts]}
        Path(flags["--json"]).write_text(json.dumps(dict(results=results)))
    monkeypatch.setattr(claims, "call", call)
    monkeypatch.setattr("training.config.read_base", start_of_shapes)
    return lambda claim: claims.main([claim, str(tmp_path), "--steps", "10"]), commands


def start_of_shapes(init, preset):
    """Return what `training.config.read_base` does, with every run a finished run of the shapes world."""
    sizes = MMDiTConfig(**PRESETS["shapes"])
    return ("ours" if init else ""), sizes, (dict(pixels=24) if init else {})


@pytest.mark.parametrize("claim", claims.CLAIMS)
def test_a_claim_runs_and_its_table_holds_the_scores(claim, claim_runs, capsys, tmp_path):
    run, commands = claim_runs
    run(claim)
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[0] for row in rows[2:]] == list(claims.CLAIMS[claim])
    column = dict(zip(rows[0], rows[2]))
    assert column["drawn right, %"] == "60.00" and column["held out, %"] == "20.00"
    assert column["velocity's error x 100, t > 0.3"] == "100.00 (0.00–200.00)"
    assert column["open colours, TV"] == "7.00"
    trained = [command for command in commands if command[0] == "train.py"]
    assert (tmp_path / f"{claim}.md").read_text().splitlines() == lines
    before = len(commands)
    run(claim)                                                   # train.py skips what is done
    assert [command for command in commands[before:] if command[0] != "train.py"] == []
    names = {Path(parse(command[1:]).out).name for command in trained}
    starts = {row.start.name for row in claims.CLAIMS[claim].values() if row.start}
    assert len(names) == 3 * (len(claims.CLAIMS[claim]) + len(starts))


def test_a_run_of_a_claim_changes_only_its_own_flags():
    default = parse(["--out", "x", *claims.PRESET, *claims.RECIPE, *claims.INSTRUCT])
    for row in [*claims.CLAIMS["weight"].values(), *claims.CLAIMS["losses"].values()]:
        config = parse(["--out", "x", *claims.PRESET, *claims.RECIPE, *row.flags])
        changed = set()
        for field in fields(TrainConfig):
            if getattr(config, field.name) != getattr(default, field.name):
                changed.add("--" + field.name.replace("_", "-"))
        own = row.flags[len(claims.INSTRUCT):]
        given = dict(zip(own[::2], own[1::2]))
        assert changed == set(given)
