"""What several test files call."""

import json
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoint
from common.cli import UserError
from dataset import emoji
from dataset.webdataset import Tar
from inference.parts import Parts
from model import PRESETS, MMDiT, MMDiTConfig, TokenEmbedding
from pretrained.tokenizer import gpt2_subset, gpt2_tokenizer


@pytest.fixture(scope="session")
def emoji_set():
    """(records, pictures (7572, 3, 64, 64) uint8) of the whole set."""
    return emoji.load()


@pytest.fixture
def mistake(capsys):
    """(exit status, what stderr shows) of a program called with these flags, as `cli.run` has it."""
    def call(main, flags):
        try:
            main(list(map(str, flags)))
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        except UserError as error:
            return 1, f"error: {error}\n"
        return 0, ""
    return call


@pytest.fixture
def small_disk(tmp_path):
    """A folder that holds 40 MiB: four saves of the tiny model, and what lies beside them."""
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", tmp_path / "disk"],
                             capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


@pytest.fixture(scope="session")
def small_tar(tmp_path_factory):
    """The first 60 samples of the emoji set."""
    path = tmp_path_factory.mktemp("data") / "small.tar"
    with tarfile.open(emoji.TAR) as whole, tarfile.open(path, "w") as small:
        for _ in range(120):
            member = whole.next()
            small.addfile(member, whole.extractfile(member))
    return str(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, small_tar):
    """A checkpoint of two narrow blocks with random weights, gates too, so that everything has a gradient."""
    folder, generator = tmp_path_factory.mktemp("tiny"), torch.Generator().manual_seed(0)
    keep = gpt2_subset(emoji.texts(emoji.load(Path(small_tar), 16)[0]))
    sizes = MMDiTConfig(**PRESETS["emoji"]
                        | dict(depth=2, heads=2, width=64, text_width=64, vocab_size=len(keep) + 2))
    parts = nn.ModuleDict(dict(mmdit=MMDiT(sizes), embedding=TokenEmbedding(len(keep) + 2, 28, 64)))
    weights = {name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in parts.named_parameters()}
    checkpoint.save(folder, weights, sizes, gpt2_tokenizer(keep), pixels=16)
    return folder


@pytest.fixture(scope="session")
def parts():
    """The shipped weights, in float32."""
    return Parts(dtype=torch.float32)


@pytest.fixture(scope="session")
def emoji_all(parts, emoji_set):
    """(records, pictures (7572, 3, 64, 64) in [-1, 1]), as the shipped weights read them."""
    assert parts.height == 64
    return emoji_set[0], emoji_set[1].float() / 127.5 - 1


@pytest.fixture(scope="session")
def apple(tmp_path_factory):
    """The set's own red apple, as a file."""
    for _, files in Tar(str(emoji.TAR)):
        if json.loads(files["json"])["caption"] == "red apple, noto style":
            path = tmp_path_factory.mktemp("apple") / "apple.webp"
            path.write_bytes(files["webp"])
            return path
