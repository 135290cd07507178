"""Random numbers that depend on a key alone, the same on every machine."""

import hashlib

import torch


def fraction(text: str) -> float:
    """A text's hash as a number in [0, 1): the same on every machine, so splits never move."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def seeded(*key) -> torch.Generator:
    """A generator of random numbers that depend on the key alone."""
    return torch.Generator().manual_seed(int(fraction(repr(key)) * 2**53))
