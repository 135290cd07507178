"""Programs in processes of their own: under torchrun, as a person starts them, or forked, which takes a fifth
of the time: a server (multiprocessing's) has imported torch and its compiler once for all of them."""

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
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file

from common import cli

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "evaluate", "torch._dynamo"])


def launch(processes: int, *flags, program="train.py") -> subprocess.Popen:
    """A program by several processes of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               program, *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def forked(name: str, flags: list[str], environment: dict[str, str], said: list[str]) -> None:
    """In a fork: a program as it is on the command line, what it says into two files."""
    for file, stream in zip(said, (sys.stdout, sys.stderr)):
        with open(file, "w") as taken:
            os.dup2(taken.fileno(), stream.fileno())
    os.chdir(ROOT)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [f"{name}.py", *flags]
    cli.run(importlib.import_module(name).main)


class Forked:
    """Some processes of a program, with a process group where they are several; used as a Popen is."""

    def __init__(self, processes: int, *flags, program: str = "train"):
        self.store = processes > 1 and dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.folder, self.ranks = tempfile.TemporaryDirectory(), []
        self.said = [[f"{self.folder.name}/{rank}.{name}" for name in ("out", "err")]
                     for rank in range(processes)]
        for rank in range(processes):
            group = {} if processes == 1 else dict(
                RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes,
                MASTER_ADDR="127.0.0.1", MASTER_PORT=self.store.port, TORCHELASTIC_USE_AGENT_STORE=True)
            given = (program, list(map(str, flags)), {name: str(value) for name, value in group.items()},
                     self.said[rank])
            self.ranks.append(FORKS.Process(target=forked, args=given))
            self.ranks[-1].start()

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
        until = time.time() + timeout
        for rank in self.ranks:
            rank.join(max(0, until - time.time()))
        if self.poll() is None:
            self.kill()
            raise TimeoutError(f"{timeout} s: {self.said}")
        said = zip(*([Path(file).read_text() for file in pair] for pair in self.said))
        return tuple(map("".join, said))


def wait_until(reached, process: subprocess.Popen | Forked) -> None:
    """Until that holds; a process that has ended by then fails the test."""
    while not reached():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def kill_when(process: subprocess.Popen | Forked, reached) -> None:
    """SIGKILL, as soon as that holds."""
    wait_until(reached, process)
    process.kill()
    process.communicate()


def to_the_end(process: subprocess.Popen | Forked) -> tuple[str, str]:
    """What it says, and complains about."""
    said, complaints = process.communicate(timeout=120)
    assert process.returncode == 0, complaints[-2000:]
    return said, complaints


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def equal_runs(one, other, tolerance=1e-5):
    for a, b in zip(rows(one), rows(other), strict=True):
        for name in ("image_loss", "text_loss"):
            assert a[name] == pytest.approx(b[name], abs=tolerance), (a["step"], name)
    a, b = (load_file(out / "weights.safetensors") for out in (one, other))
    for name in a:  # a key's bias has no gradient but rounding, which AdamW turns into steps of the full size
        D = len(a[name]) // 3
        rest = torch.cat([torch.arange(D),
                          torch.arange(2 * D, 3 * D)]) if name.endswith("qkv.bias") else slice(None)
        assert torch.allclose(a[name][rest], b[name][rest], rtol=0, atol=tolerance), name


def jpeg(colour, size=(40, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG")
    return file.getvalue()


def write_tar(path, files):
    """Write a tar of files, [(name or TarInfo, content)], and return its path."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)
