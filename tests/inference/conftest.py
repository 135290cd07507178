"""Fixtures of the inference tests."""

from functools import partial
from pathlib import Path

import pytest
import torch

from dataset import emoji
from inference import image_to_text
from inference.parts import Parts


@pytest.fixture(scope="session")
def emoji_images(small_tar):
    """Return (records, images (60, 3, 64, 64) in [-1, 1]) of the emoji set's first samples."""
    records, pixels = emoji.load(Path(small_tar), 64)
    return records, pixels.float() / 127.5 - 1


@pytest.fixture(scope="session")
def tiny_parts(tiny):
    """Return the tiny model with random weights, in float32."""
    return Parts(tiny, dtype=torch.float32)


@pytest.fixture
def fast_score(monkeypatch):
    """Score texts with 16 masking levels instead of 64: enough to compare very different texts."""
    score = partial(image_to_text.score, copies=16)
    monkeypatch.setattr(image_to_text, "score", score)
