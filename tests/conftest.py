"""Fixtures that several test files use."""

import functools
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
from pretrained import tokenizer
from pretrained.tokenizer import gpt2_subset, gpt2_tokenizer


@pytest.fixture(scope="session", autouse=True)
def cached_merges():
    """Parse GPT-2's file of merges once per session: it takes 50 ms for each tokenizer."""
    read_merges = tokenizer.read_merges

    @functools.cache
    def merges_of(path):
        return read_merges()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "read_merges", lambda: merges_of(tokenizer.MERGES))
        yield


@pytest.fixture(scope="session")
def emoji_set():
    """Return (records, images (7572, 3, 64, 64) uint8) of the whole emoji set."""
    return emoji.load()


@pytest.fixture
def run_program(capsys):
    """Return a function that calls a program as `cli.run` does: -> (exit status, stderr)."""
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
    """A folder with room for 40 MiB: four checkpoints of the tiny model and a run's other files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine does not let this user mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.fixture(scope="session")
def small_tar(tmp_path_factory):
    """Write a tar of the first 60 samples of the emoji set, and return its path."""
    path = tmp_path_factory.mktemp("data") / "small.tar"
    with tarfile.open(emoji.TAR) as whole, tarfile.open(path, "w") as small:
        for _ in range(120):                                     # a webp and a json for each
            member = whole.next()
            small.addfile(member, whole.extractfile(member))
    return str(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, small_tar):
    """A checkpoint of two narrow blocks.  All weights are random, so that each has a gradient:
    a new model's gates are zero."""
    folder = tmp_path_factory.mktemp("tiny")
    generator = torch.Generator().manual_seed(0)
    keep = gpt2_subset(emoji.texts(emoji.load(Path(small_tar), 16)[0]))
    vocab_size = len(keep) + 2
    sizes = dict(depth=2, heads=2, width=64, text_width=64, vocab_size=vocab_size)
    config = MMDiTConfig(**(PRESETS["emoji"] | sizes))
    embedding = TokenEmbedding(vocab_size, 28, 64)
    parts = nn.ModuleDict(dict(mmdit=MMDiT(config), embedding=embedding))
    weights = {}
    for name, p in parts.named_parameters():
        weights[name] = torch.randn(p.shape, generator=generator) * 0.1
    checkpoint.save(folder, weights, config, gpt2_tokenizer(keep), pixels=16)
    return folder


@pytest.fixture(scope="session")
def parts():
    """The shipped weights, in float32."""
    return Parts(dtype=torch.float32)


@pytest.fixture(scope="session")
def emoji_all(parts, emoji_set):
    """Return (records, images (7572, 3, 64, 64) in [-1, 1]) for the shipped weights."""
    assert parts.height == 64
    records, images = emoji_set
    return records, images.float() / 127.5 - 1


@pytest.fixture(scope="session")
def apple(tmp_path_factory):
    """Write the red apple of the emoji set as an image file, and return its path."""
    for _, files in Tar(str(emoji.TAR)):
        if json.loads(files["json"])["caption"] == "red apple, noto style":
            path = tmp_path_factory.mktemp("apple") / "apple.webp"
            path.write_bytes(files["webp"])
            return path
