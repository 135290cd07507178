"""Pictures, and tar shards in WebDataset layout.

Shapes: P pixels a side.
"""

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cli import UserError


def question_prompt(question: str) -> str:
    """The paper's prompt format; the answer follows it directly."""
    return f"Q: {question} A: "


def fraction(text: str) -> float:
    """A text's hash as a number in [0, 1): the same on every machine, so splits never move."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def seeded(*key) -> torch.Generator:
    """A generator of random numbers that depend on the key alone."""
    return torch.Generator().manual_seed(int(fraction(repr(key)) * 2**53))


def shuffled(key: str, groups: list[list[int]], positions: Iterable[int]) -> list[int]:
    """The samples at these positions of an endless run of shuffled epochs; `key` says which run.

    An epoch takes one sample of every group, which one drawn anew each time (`emoji.fair`).  A function of
    its arguments alone, so that a resumed run, or another number of processes, sees the same."""
    picked, drawn = [], None
    for position in positions:
        epoch, at = divmod(position, len(groups))
        if epoch != drawn:
            generator, drawn = seeded(key, epoch), epoch
            places = torch.randperm(len(groups), generator=generator)
            member = torch.rand(len(groups), generator=generator)
        group = groups[int(places[at])]
        picked.append(group[int(float(member[at]) * len(group))])
    return picked


def read_picture(source: Path | bytes) -> Image.Image:
    """Any picture file as RGB, transparent parts on white.  Raises UserError when it can't be read."""
    name = source if isinstance(source, Path) else "a picture"
    try:
        picture = Image.open(source if isinstance(source, Path) else io.BytesIO(source))
        picture.load()
    except FileNotFoundError:
        raise UserError(f"{name}: no such picture file")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a picture that can be read ({str(error).splitlines()[0]})")
    if picture.mode != "RGB":
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture


def fit_picture(picture: Image.Image, height: int, width: int | None = None) -> Image.Image:
    """Resized (bicubic) to just cover height x width (a square without a width), then cut to the centre."""
    target = (width or height, height)
    scale = max(to / side for to, side in zip(target, picture.size))
    size = [max(to, round(side * scale)) for to, side in zip(target, picture.size)]
    left, top = (size[0] - target[0]) // 2, (size[1] - target[1]) // 2
    return picture.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + target[0], top + target[1]))


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> (3, P, P) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


def to_picture(image: Tensor) -> Image.Image:
    """(3, P, P) in [-1, 1], clipped -> RGB picture."""
    array = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def read_tar(path: Path) -> Iterator[dict]:
    """The samples of a tar in WebDataset layout, .tar or .tar.gz, in order.

    Files whose names agree up to the first dot of the last part are one sample: {"__key__": name, extension:
    bytes, ...}.  Raises UserError for a file that is missing, no tar, or cut off."""
    sample: dict = {}
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if sample and sample["__key__"] != key:
                    yield sample
                    sample = {}
                sample["__key__"] = key
                sample[extension.lower()] = tar.extractfile(member).read()
    except FileNotFoundError:
        raise UserError(f"{path}: no such tar file")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a whole tar file ({error}); fetch or build it again")
    if sample:
        yield sample
