"""Random numbers that depend only on a key, and are the same on every machine."""

import hashlib

import torch


def fraction(text: str) -> float:
    """Return a text's hash as a number in [0, 1).  Splits that use it never change."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def seed_of(text: str) -> int:
    """Return a seed below 2^53 that depends only on the text."""
    return int(fraction(text) * 2**53)


def seeded(*key) -> torch.Generator:
    """Return a random generator on the CPU, with a seed that depends only on the key."""
    return torch.Generator().manual_seed(seed_of(repr(key)))
