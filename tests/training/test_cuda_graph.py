"""train.py --cuda-graph on a CPU, where its step is run as it stands: it is the plain one."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp

import train
from training import cuda_graph
from training.muon import orthogonalize

SMALL = ["--image-batch", 6, "--text-batch", 4, "--dtype", "float32", "--log-every", 1, "--sample-every", 0,
         "--device", "cpu", "--warmup", 2]


def state(folder):
    """All tensors of a checkpoint: weights, moments, averages."""
    parts = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items()
    held = {name: torch.empty(part.size) for name, part in parts if hasattr(part, "properties")}
    dcp.load(held, checkpoint_id=folder, no_dist=True)
    return held


@pytest.mark.parametrize("stage, more", [
    ("pretrain", ["--text-dropout", 0.5, "--eval-every", 4]),
    ("instruct", ["--text-loss", "flat", "--decay-steps", 2, "--eval-every", 0, "--workers", 1])])
def test_a_run_is_train_pys(stage, more, tiny, small_tar, tmp_path, monkeypatch):
    """Four steps; of the first stage the third is made by train.py, from where the other stopped.
    Muon's products in float64: of a gradient of few samples rounding is most of what they give in the
    directions that it lacks, and two runs whose gradients differ by a rounding part at once."""
    monkeypatch.setattr("training.muon.orthogonalize", lambda matrices, dtype: orthogonalize(matrices, torch.float64))
    monkeypatch.setattr(cuda_graph, "check", lambda config: None)        # a CPU will do
    threads, rows, held = torch.get_num_threads(), {}, {}
    torch.set_num_threads(1)                                     # two on a busy machine: 20 times as long
    graph, plain = ["--cuda-graph"], []
    mixed = [(graph, 2), (plain, 3), (graph, 4)] if stage == "pretrain" else [(graph, 4)]
    for out, parts in {"plain": [(plain, 4)], "graphed": mixed}.items():
        for how, steps in parts:
            flags = ["--stage", stage, "--init", tiny, "--image-data", small_tar, *SMALL, *more, *how, "--steps",
                     steps, "--out", tmp_path / out]
            train.main(list(map(str, flags)))
        rows[out] = list(map(json.loads, (tmp_path / out / "log.jsonl").open()))
        held[out] = state(tmp_path / out / "step_4")
    torch.set_num_threads(threads)
    for row, ours in zip(*rows.values(), strict=True):
        for name in ("image_loss", "text_loss", "grad_norm", "lr", "val_image", "val_nats"):
            assert name not in row or ours[name] == pytest.approx(row[name], rel=1e-5), name
    assert held["plain"].keys() == held["graphed"].keys() and len(held["plain"]) > 200
    for name, x in held["plain"].items():                        # AdamW magnifies a gradient's rounding
        apart = (held["graphed"][name] - x).abs()
        assert apart.max() < 1e-4 and (apart > 1e-5).sum() <= 2, name


def test_what_has_no_place_in_a_graph_is_said_in_a_line(mistake):
    for flags, said in (([], "--cuda-graph needs an NVIDIA GPU"), (["--micro-batch", 2], "with --micro-batch: not"),
                        (["--preset", "e2e-1.1b"], "expected a token embedding of its own, and pixels"),
                        (["--stage", "text"], "--stage text: has one loss")):
        status, shown = mistake(train.main, [*flags, "--cuda-graph", "--device", "cpu"])
        assert status == 1 and said in shown and shown.count("\n") == 1
