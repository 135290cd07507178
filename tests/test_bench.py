"""bench.py and tests/ablations.py: the tables say what was found."""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import ablations
import pytest

import bench
import plan
from model import PRESETS, MMDiTConfig
from stages import TrainConfig, parse

SMALL = ["--preset", "emoji", "--image-batch", "3", "--text-batch", "2", "--pixels", "16"]


def test_the_table_of_a_step(capsys, monkeypatch):
    flags = [*SMALL, "--vocab-size", "60", "--rounds", "3", "--steps", "1",
             "--peak", "0.5", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench.py", "train", *flags])
    bench.main()
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert [line.split()[0] for line in table] == list(found) and found["vocabulary"] == 60
    parts = [found[name] for name in ("forward", "backward", "optimizer")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(found["seconds"], rel=0.7)   # mean and median of 3
    work = plan.work(parse(SMALL), replace(MMDiTConfig(**PRESETS["emoji"]), vocab_size=60), 1)
    assert work["samples"] == 5 and work["tokens"] == 5 * (4 + 28)
    assert found["mfu"] == pytest.approx(work["tflop"] / found["seconds"] / 0.5, rel=0.02)


@pytest.mark.parametrize("of", [[], ["--preset", "emoji", "--pixels", "16"]])
def test_the_table_of_drawings_and_captions(of, capsys, monkeypatch):
    flags = "--n 2 --steps 3 --rounds 1 --device cpu --dtype float32 --profile".split()
    monkeypatch.setattr(sys, "argv", ["bench.py", "sample", *flags, *of])
    bench.main()
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert [line.split()[0] for line in table[-len(found):]] == list(found) and found["n"] == 2
    assert any(line.split()[:1] == ["aten::addmm"] for line in table)        # the profile
    assert found["evaluations_a_drawing"] == 6 and min(found["draws_per_s"], found["captions_per_s"]) > 0
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
