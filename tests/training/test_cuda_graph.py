"""train.py --cuda-graph on a CPU, where its step runs without a graph: it equals the plain step."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

import train
from helpers import rows
from training import cuda_graph
from training.muon import orthogonalize

SMALL = ["--image-batch", 4, "--text-batch", 4, "--dtype", "float32", "--log-every", 1,
         "--sample-every", 0, "--save-every", 2, "--device", "cpu", "--warmup", 2]


def checkpoint_tensors(folder):
    """Return all tensors of a checkpoint: weights, moments, averages."""
    parts = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(part.size) for name, part in parts.items()
               if hasattr(part, "properties")}
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


@pytest.fixture
def one_thread():
    """Use one thread: on a busy machine two threads take 20 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("stage, more, graphed", [
    # the third step is a plain one, and each kind resumes from the other
    ("pretrain", ["--text-dropout", 0.5, "--eval-every", 4], [(True, 2), (False, 3), (True, 4)]),
    ("instruct", ["--text-loss", "flat", "--decay-steps", 2, "--eval-every", 0, "--workers", 1],
     [(True, 4)])])
def test_graphed_run_equals_a_plain_one(
        stage, more, graphed, tiny, small_tar, tmp_path, monkeypatch, one_thread):
    """Muon multiplies in float64 here.  A gradient of few samples has a low rank; in the missing
    directions the update is mostly rounding, so in float32 two runs would soon differ."""
    monkeypatch.setattr("training.muon.orthogonalize",
                        lambda matrices, dtype: orthogonalize(matrices, torch.float64))
    monkeypatch.setattr(cuda_graph, "check", lambda config: None)        # accept a CPU
    for name, parts in (("plain", [(False, 4)]), ("graphed", graphed)):
        for graph, steps in parts:
            flags = ["--stage", stage, "--init", tiny, "--image-data", small_tar, *SMALL, *more,
                     "--steps", steps, "--out", tmp_path / name]
            if graph:
                flags.append("--cuda-graph")
            train.main(list(map(str, flags)))
    for a, b in zip(rows(tmp_path / "plain"), rows(tmp_path / "graphed"), strict=True):
        missing = a.keys() ^ b.keys()                            # a run validates where it ends
        assert all(name.startswith("val_") for name in missing), missing
        for name in ("image_loss", "text_loss", "grad_norm", "lr", "val_image", "val_nats"):
            if name in a:                                        # float32 in another order
                assert b[name] == pytest.approx(a[name], rel=1e-5), name
    expected = checkpoint_tensors(tmp_path / "plain" / "step_4")
    tensors = checkpoint_tensors(tmp_path / "graphed" / "step_4")
    assert expected.keys() == tensors.keys() and len(expected) > 200
    for name in expected:  # AdamW magnifies a gradient's rounding
        difference = (tensors[name] - expected[name]).abs()
        assert difference.max() < 1e-4 and (difference > 1e-5).sum() <= 2, name


@pytest.mark.parametrize("flags, names", [
    ([], ["--cuda-graph", "GPU"]),
    (["--micro-batch", 2], ["--cuda-graph", "--micro-batch"]),
    (["--preset", "e2e-1.1b"], ["--cuda-graph", "e2e-1.1b"]),
    (["--stage", "text"], ["--cuda-graph", "--stage text"]),
])
def test_what_a_graph_cannot_hold_is_refused(flags, names, run_program):
    status, error = run_program(train.main, [*flags, "--cuda-graph", "--device", "cpu"])
    assert status == 1 and error.count("\n") == 1
    for name in names:
        assert name in error
