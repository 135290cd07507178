"""Fixtures of the tests of runs in folders."""

import shutil

import pytest

import train


@pytest.fixture(scope="module")
def base(tiny, small_tar):
    """Flags of a small run on one process, without --steps and --out."""
    return ["--init", tiny, "--image-data", small_tar, "--image-batch", 4, "--text-batch", 2,
            "--dtype", "float32", "--warmup", 2, "--log-every", 1, "--save-every", 2,
            "--sample-every", 0, "--eval-every", 0, "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Return the folder of a run of six steps, with step_4 and step_6.  Only read it; to write,
    use the copy `run`."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train.main(list(map(str, [*base, "--out", out, "--steps", 6])))
    return out


@pytest.fixture
def run(trained, tmp_path):
    """Return a copy of the run of six steps."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def run_training(base, tmp_path, run_program):
    """Return a function that trains in the folder `run` and returns stderr, at most one line."""
    def call(*flags, out=tmp_path / "run"):
        status, message = run_program(train.main, [*base, "--out", out, *flags])
        assert status in (0, 1) and len(message.splitlines()) == status
        return message
    return call
