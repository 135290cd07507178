"""Helpers that several test files use: programs in other processes, logs of runs, small files.

A program runs under torchrun, as a user starts it, or in forks, which take a fifth of the time: the
fork server of multiprocessing imports torch and its compiler once for all forks.
"""

import importlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Callable

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "evaluate", "torch._dynamo"])


def launch(processes: int, *flags, program="train.py") -> subprocess.Popen:
    """Start a program with torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", program, *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=environment)


def forked(name: str, flags: list[str], environment: dict[str, str], files: list[str],
           prepare: Callable[[], None] | None = None) -> None:
    """Run a program in this fork as on the command line; its stdout and stderr go to two files.

    prepare: called first, for example to insert a fault."""
    for file, stream in zip(files, (sys.stdout, sys.stderr)):
        with open(file, "w") as target:
            os.dup2(target.fileno(), stream.fileno())
    os.chdir(ROOT)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [f"{name}.py", *flags]
    if prepare:
        prepare()
    run = importlib.import_module("common.cli").run              # `prepare` may replace the module
    run(importlib.import_module(name).main)


class Forked:
    """A program that runs in one or several forks, like under torchrun; has a Popen's methods."""

    def __init__(self, processes: int, *flags, program: str = "train",
                 prepare: Callable[[], None] | None = None):
        self.folder = tempfile.TemporaryDirectory()
        self.ranks = []
        self.files = []
        if processes > 1:
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(processes):
            environment = {}
            if processes > 1:
                environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes,
                                   LOCAL_WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1",
                                   MASTER_PORT=self.store.port, TORCHELASTIC_USE_AGENT_STORE=True)
                environment = {name: str(value) for name, value in environment.items()}
            self.files.append([f"{self.folder.name}/{rank}.{name}" for name in ("out", "err")])
            arguments = (program, list(map(str, flags)), environment, self.files[rank], prepare)
            self.ranks.append(FORKS.Process(target=forked, args=arguments))
            self.ranks[rank].start()

    def poll(self) -> int | None:
        codes = [rank.exitcode for rank in self.ranks]
        self.returncode = None if None in codes else max(codes, key=abs)
        return self.returncode

    def send_signal(self, number: int) -> None:
        for rank in self.ranks:
            os.kill(rank.pid, number)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for the end; return stdout and stderr of all ranks.  Raises TimeoutError."""
        deadline = time.time() + timeout
        for rank in self.ranks:
            rank.join(max(0, deadline - time.time()))
        stopped = self.poll() is not None
        if not stopped:
            self.kill()
        output, errors = "", ""
        for output_file, error_file in self.files:
            output += Path(output_file).read_text()
            errors += Path(error_file).read_text()
        if not stopped:
            raise TimeoutError(f"{timeout} s: {output[-2000:]}{errors[-2000:]}")
        return output, errors


def wait_until(condition, process: subprocess.Popen | Forked) -> None:
    """Wait until a condition holds; fail if the process ends first, or after two minutes."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def kill_when(process: subprocess.Popen | Forked, condition) -> None:
    """Send SIGKILL as soon as a condition holds."""
    wait_until(condition, process)
    process.kill()
    process.communicate()


def to_the_end(process: subprocess.Popen | Forked) -> tuple[str, str]:
    """Wait until the process ends, check that it succeeded, and return stdout and stderr."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    return output, errors


def rows(out):
    """Return the rows of a run's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def equal_runs(one, other, tolerance=1e-5):
    """Check that two runs have the same losses at each step and end with the same weights.

    tolerance: several processes add up float32 gradients in another order."""
    for row, other_row in zip(rows(one), rows(other), strict=True):
        for name in ("image_loss", "text_loss"):
            expected = pytest.approx(other_row[name], abs=tolerance)
            assert row[name] == expected, (row["step"], name)
    weights = load_file(one / "weights.safetensors")
    other_weights = load_file(other / "weights.safetensors")
    assert weights.keys() == other_weights.keys()
    for name, tensor in weights.items():
        difference = (tensor - other_weights[name]).abs()
        if name.endswith("qkv.bias"):
            # the gradient of a key's bias is only rounding, which AdamW scales to full-size steps
            query, _, value = difference.chunk(3)
            difference = torch.cat([query, value])
        assert float(difference.max()) <= tolerance, name


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps_logged(out):
    return [row["step"] for row in rows(out)]


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def flip_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def jpeg(colour, size=(40, 30)):
    """Return the bytes of a JPEG file of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG")
    return file.getvalue()


def write_tar(path, files):
    """Write a tar of files, [(name or TarInfo, content)]; return its path."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def forget_project() -> None:
    """Forget the imports of this repository's modules, except the tests' and installed packages."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or not Path(file).is_relative_to(ROOT):
            continue
        if Path(file).relative_to(ROOT).parts[0] not in (".venv", "tests"):
            del sys.modules[name]


def use_fresh_sources(folder: str, missing: tuple, environment: dict) -> None:
    """Make later imports load the project from a folder; imports of `missing` modules fail."""
    os.chdir(folder)
    os.environ.update(environment)
    forget_project()
    sys.path.insert(0, folder)
    sys.modules.update(dict.fromkeys(missing))


def run_fresh(*calls, folder=ROOT, missing=(), environment={}) -> tuple[int, str]:
    """Run calls, (program, flags) each, until one fails; return (exit status, stderr).

    folder: the copy of the repository to import; missing: modules that can't be imported."""
    prepare = partial(use_fresh_sources, str(folder), missing, environment)
    errors = ""
    for program, flags in calls:
        process = Forked(1, *flags, program=program, prepare=prepare)
        errors += process.communicate()[1]
        if process.returncode:
            break
    return process.returncode, errors


def assert_lines(lines, *expected):
    """Check that each line holds its expected words, and that there are no other lines."""
    assert len(lines) == len(expected), lines
    for line, words in zip(lines, expected):
        assert "\n" not in line
        for word in words:
            assert word in line
