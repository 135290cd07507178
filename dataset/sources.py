"""Kinds of sources: a source has a length, and a sample at each index, read on demand.

    photos/                   a folder of images, each with NAME.txt (one caption per line), or with
                              a metadata.jsonl of {"file_name": ..., "text": ...}; hidden files and
                              folders are left out, links are followed
    shards/{000..127}.tar     tars in WebDataset layout, also given as *.tar or as a folder; each
                              sample is a jpg, jpeg, png or webp with a txt or a json ("caption",
                              "re_caption")
    captions.json             a list of {image_path, height, width, caption, re_caption}
    latents/                  written by `python data.py latents`
    tokens.safetensors        plain text, written by `python data.py pack`

Each is a subclass of `Source`; a row of `data.OPENERS` names the class that opens a path.
docs/data.md shows step by step how to add a kind.
"""

import glob
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Iterable, Iterator, Sequence

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from common.cli import UserError, is_text, require, warn
from common.files import (allow_open_files, decode_text, inside, is_there, listing, parse_json,
                          read_bytes, read_json_lines, read_text, text_lines, visible, walk)
from common.progress import Progress
from dataset import webdataset
from dataset.webdataset import Tar
from pretrained.safetensors_io import Tensors

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
OTHER_SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jxl", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")     # only the first one is read
TEXTS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
SHARDS = "latents-{}.safetensors"


@dataclass
class Location:
    """A path from the command line, and the settings to open it with."""
    name: str                   # as written, without its weight
    paths: list[str]            # several if `name` is a pattern
    option: str                 # text after @: the folder of a list's images, or "each"; else ""
    pixels: int                 # side of an image
    length: int                 # tokens of a piece of plain text

    @property
    def path(self) -> Path:
        return Path(self.paths[0])


class Source:
    """Samples at indices: images with texts, stored latents with texts, or plain text.

    A kind of source defines `__len__` and `__getitem__`.  If all its texts can be listed without
    reading the images, it also defines `texts`; then a tokenizer can keep only the tokens in use.
    All other members have defaults.  All methods raise UserError, with the file's name, for an
    unreadable file."""

    name: str                                   # for messages
    holds = "images"                            # or "stored latents", "plain text"
    stamp: dict[str, str] = {}                  # the settings that made stored latents
    states: dict[str, str] | None = None        # the settings that made T5's stored states
    tokenizer: str | None = None                # digest of the tokenizer that made stored tokens
    held: Sequence[int] = ()                    # indices of samples that are never trained on

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""

    def __getitem__(self, index: int) -> dict:
        """Return a sample as a dict:

        "key": the sample's name in messages;
        "image": the bytes of an image file or its pixels (3, P, P) uint8, or instead
        "latents" (C, h, w), or "ids" (L,) of plain text;
        "captions": a list of texts, which may be empty;
        "recaption": a text, if there is one;
        "questions": [{"question": ..., "answer": ...}], if there are any;
        "states": T5's (L, E), and "stated", the caption that they encode, if they are stored."""

    @cached_property
    def every(self) -> Sequence[int]:
        """Return the indices of all samples that are trained on."""
        return range(len(self))

    def texts(self) -> Iterable[str] | None:
        """Return every text, or None if that would mean reading every sample."""
        return None

    def choose(self, row: int, chance: float) -> int:
        """Return the index of the sample at a row of an epoch.

        A source that groups its samples uses `chance`, in [0, 1) and new each epoch, to draw one of
        the group."""
        return row


# ----------------------------------------------------------------------------------------- records

def text(value, where: str, field: str) -> str:
    """Check that a field's value is a text, and return it.  Raises UserError.

    where: the record, for the message."""
    shown = "null" if value is None else ascii(value)[:60]
    require((is_text(value), f"{where}: \"{field}\" is {shown}, expected a text"))
    return value


def identity(record, where: str, field: str) -> int | str:
    """Return a record's id, a whole number or a text.  Raises UserError for any other type."""
    value = record.get(field) if isinstance(record, dict) else None
    require((type(value) is int or is_text(value),
             f"{where}: expected an object with \"{field}\", a whole number or a text, found "
             f"{ascii(record)[:60]}"))
    return value


def stripped(record: dict, field: str, where: str) -> str:
    """Return a field's text without white space at its ends; "" for null.  Raises UserError."""
    value = record.get(field)
    return "" if value is None else text(value, where, field).strip()


def described(record, where: str) -> dict:
    """Return a record's texts under a sample's names: "captions", "recaption" and "questions".

    A caption that is null or blank is left out.  Raises UserError for a field of the wrong type."""
    require((isinstance(record, dict),
             f"{where}: expected a JSON object, found {ascii(record)[:60]}"))
    sample = {}
    if caption := stripped(record, "caption", where):
        sample["captions"] = [caption]
    if recaption := stripped(record, "re_caption", where):
        sample["recaption"] = recaption
    pairs = record.get("questions")
    if pairs is not None:
        require((isinstance(pairs, list) and all(isinstance(pair, dict) for pair in pairs),
                 f"{where}: \"questions\" is {ascii(pairs)[:60]}, expected a list of objects"))
        for n, pair in enumerate(pairs):
            for name in ("question", "answer"):
                text(pair.get(name), where, f"questions[{n}].{name}")
        sample["questions"] = pairs
    return sample


def question_prompt(question: str) -> str:
    """Return a question in the paper's prompt format; the answer follows it directly."""
    return f"Q: {question} A: "


def texts_in(sample: dict) -> Iterator[str]:
    """Yield a sample's texts as they are tokenized: captions, question prompts, answers."""
    yield from sample.get("captions", [])
    if sample.get("recaption"):
        yield sample["recaption"]
    for pair in sample.get("questions", []):
        yield question_prompt(pair["question"])
        yield pair["answer"]


def image_in(files: dict[str, bytes], where: str) -> tuple[str, bytes]:
    """Return the suffix and the content of the image among a tar sample's files.

    Raises UserError if there is none, or if there are several."""
    suffixes = [suffix for suffix in IMAGE_SUFFIXES if suffix[1:] in files]
    names = ", .".join(files)
    require((suffixes, f"{where}: no image in this sample, found .{names}"),
            (len(suffixes) == 1, f"{where}: several images of one name, found .{names}"))
    return suffixes[0], files[suffixes[0][1:]]


def warn_left_out(name: str, files: list[Path], reason: str) -> None:
    """Warn that images of a source are left out: their number, and one of them."""
    if files:
        warn(f"{name}: {len(files)} left out, such as {files[0]}: {reason}")


def list_images(folder: Path, named: set[str] = set()) -> tuple[list[Path], list[Path]]:
    """Return the images in and below a folder, and the other files.  Warn of images, tars and
    broken links among them, unless a metadata.jsonl has `named` them."""
    images, others, unread = [], [], []
    for file in walk(folder):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            images.append(file)
            continue
        others.append(file)
        is_data = file.suffix.lower() in OTHER_SUFFIXES or webdataset.LIKE.search(file.name)
        if (is_data or not file.exists()) and os.path.abspath(file) not in named:
            unread.append(file)
    warn_left_out(str(folder), unread, f"expected {', '.join(IMAGE_SUFFIXES)}")
    return images, others


def by_stem(files: list[Path]) -> dict[Path, Path]:
    """Return files by their path without suffix.  Raises UserError if two have the same."""
    table = {}
    for file in files:
        other = table.setdefault(file.with_suffix(""), file)
        require((other == file, f"{other} and {file}: expected one .txt and one image of a name"))
    return table


# ----------------------------------------------------------------------------------------- samples

def choose_caption(sample: dict, recaption: float, chance: float) -> str:
    """Return one of a sample's captions or, if `chance` < `recaption`, its re-caption.

    chance: random in [0, 1).  recaption: the share of re-captions."""
    again = sample.get("recaption")
    captions = sample["captions"]
    if again and (not captions or chance < recaption):
        return again
    if again:
        chance = (chance - recaption) / (1 - recaption)
    return captions[int(chance * len(captions))]


def latents_of(samples: list[dict]) -> Tensor | None:
    """Return the samples' latents, or their images in [-1, 1], (B, C, h, w) float32; None for plain
    text."""
    if "ids" in samples[0]:
        return None
    rows = []
    for sample in samples:
        if "latents" in sample:
            rows.append(sample["latents"].float())
        else:
            rows.append(sample["image"].float() / 127.5 - 1)
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------- kinds

class Folder(Source):
    """Images with a caption file each, or with a metadata.jsonl."""

    def __init__(self, location: Location):
        self.folder = location.path
        self.name = str(self.folder)
        metadata = self.folder / METADATA[0]
        named = set()
        if is_there(metadata):
            self.entries = list(self.read_metadata(metadata))
            named = {os.path.abspath(self.folder / name) for name, _ in self.entries}
        images, others = list_images(self.folder, named)
        for file in others:
            if file.name in METADATA and file != metadata:
                warn(f"{file} is not read; write it as {metadata}, or give {file.parent} as a "
                     f"source of its own")
        if is_there(metadata):
            unnamed = [file for file in images if os.path.abspath(file) not in named]
            warn_left_out(self.name, unnamed, f"{metadata.name} does not name it")
        else:
            self.entries = list(self.pair(images, others))
        if not self.entries:
            raise UserError(f"{self.folder}: expected images ({', '.join(IMAGE_SUFFIXES)}) with "
                            f"captions, or .tar files, found {listing(self.folder)}")

    def read_metadata(self, metadata: Path) -> Iterator[tuple[str, list[str]]]:
        for where, record in read_json_lines(metadata):
            require((isinstance(record, dict) and isinstance(record.get("file_name"), str),
                     f"{where}: expected an object with file_name and text, found "
                     f"{ascii(record)[:60]}"))
            caption = text(record.get("text"), where, "text").strip()
            yield record["file_name"], [caption] if caption else []

    def pair(self, images: list[Path], others: list[Path]) -> Iterator[tuple[str, list[str]]]:
        """Pair images with caption files of the same name."""
        images = by_stem(images)
        texts = by_stem([file for file in others if file.suffix.lower() == ".txt"])
        if single := images.keys() ^ texts.keys():
            raise UserError(f"{(texts | images)[min(single)]}: expected one .txt and one image "
                            f"({', '.join(IMAGE_SUFFIXES)}) of a name")
        for stem, file in images.items():
            captions = text_lines(read_text(texts[stem]))
            yield str(file.relative_to(self.folder)), captions

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict:
        name, captions = self.entries[index]
        file = inside(self.folder, name)
        return dict(key=str(file), image=read_bytes(file), captions=captions)

    def texts(self) -> Iterator[str]:
        for _, captions in self.entries:
            yield from captions


class Listed(Source):
    """A JSON list of {image_path, caption, re_caption, questions}; paths start at `folder`."""

    def __init__(self, path: Path, content: list[dict], folder: Path):
        self.name = str(path)
        self.folder = folder
        self.content = content
        for entry in content:
            require((isinstance(entry, dict) and is_text(entry.get("image_path")),
                     f"{path}: expected objects with image_path, found {ascii(entry)[:60]}"))

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, index: int) -> dict:
        record = self.content[index]
        file = inside(self.folder, record["image_path"])
        sample = dict(key=str(file), image=read_bytes(file), captions=[])
        return sample | described(record, f"{self.name}: {file}")

    def texts(self) -> Iterator[str]:
        for entry in self.content:
            with suppress(UserError):            # training names and replaces such an entry
                yield from texts_in(described(entry, self.name))


class Sharded(Source):
    """Rows of several files, one file after another."""

    starts: np.ndarray          # index of each file's first row; last, the number of all rows

    def __len__(self) -> int:
        return int(self.starts[-1])

    def find(self, index: int) -> tuple[int, int]:
        """Return the number of the file that holds a row, and the row's place in it."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, index - int(self.starts[shard])


def tars_at(path: Path) -> list[str]:
    """Return the tars in a folder, sorted; for the path of a tar, this path."""
    if not path.is_dir():
        return [str(path)] if path.name.endswith(webdataset.SUFFIXES) else []
    return [str(file) for file in visible(path) if file.name.endswith(webdataset.SUFFIXES)]


def captioned_at(folder: Path) -> Iterator[str]:
    """Yield the captioned images in a folder, and its metadata.jsonl."""
    for file in walk(folder):
        is_image = file.suffix.lower() in IMAGE_SUFFIXES
        if file == folder / METADATA[0] or is_image and file.with_suffix(".txt").exists():
            yield str(file)


class Tars(Sharded):
    """WebDataset shards (webdataset.py), read in any order."""

    def __init__(self, location: Location):
        paths = sum((tars_at(Path(path)) or [path] for path in location.paths), [])
        self.name = location.name
        self.tars = []
        read = set(paths)
        for folder in filter(Path.is_dir, map(Path, location.paths)):
            others = [file for file in walk(folder) if webdataset.LIKE.search(file.name)
                      and str(file) not in read]
            warn_left_out(self.name, others, f"expected {', '.join(webdataset.SUFFIXES)} in {folder}")
        allow_open_files(len(paths))                             # their indexes are memory-mapped
        progress = Progress("tars indexed", len(paths))
        for path in paths:
            self.tars.append(Tar(path))
            progress.update(len(self.tars))
        self.starts = np.cumsum([0, *map(len, self.tars)])

    def __getitem__(self, index: int) -> dict:
        shard, row = self.find(index)
        tar = self.tars[shard]
        key, files = tar[row]
        where = f"{tar.path}: {key}"
        suffix, image = image_in(files, where)
        sample = dict(key=where + suffix, image=image, captions=[])
        if "txt" in files:
            sample["captions"] = text_lines(decode_text(files["txt"], f"{where}.txt"))
        if "json" in files:
            where += ".json"
            sample |= described(parse_json(files["json"], where), where)
        return sample


class Latents(Sharded):
    """Stored latents with their texts, read a row at a time from mapped files.

    stamp: the settings that made the latents, the same in all files of a folder: "source",
    "shards", "dtype", "vae" (the digest of its weights), "pixels" and "channels"; "filtered" with
    --filtered; if T5's states are stored, also the settings in `states`."""

    holds = "stored latents"

    def __init__(self, location: Location):
        self.name = str(location.path)
        self.files = shards_at(location.path)
        self.stamp = read_stamp(self.files[0])
        for file in self.files:
            require((read_stamp(file) == self.stamp,
                     f"{file}: made with other settings than {self.files[0]}"))
        names = self.stamp.keys() & {"t5", "tokenizer", "length", "recaption"}
        self.states = {name: self.stamp[name] for name in names} or None
        expected = self.stamp["shards"]
        require((len(self.files) == int(expected), f"{self.name}: {len(self.files)} of {expected} "
                 f"shards; the same python data.py latents makes the rest"))
        counts = [latents_shape(file)[0] for file in self.files]
        self.starts = np.cumsum([0, *counts])

    def __getitem__(self, index: int) -> dict:
        shard, row = self.find(index)
        tensors = mapped(self.files[shard])
        begin, end = tensors.get_slice("ends")[row:row + 2].tolist()
        content = tensors.get_slice("texts")[begin:end].numpy().tobytes()
        where = f"{self.files[shard]}: sample {row}"
        sample = parse_json(content, where)
        for name in {"latents", "states"} & set(tensors.keys()):
            sample[name] = tensors.get_slice(name)[row]
            require((sample[name].isfinite().all(),
                     f"{where}, {sample['key']}: its {name} are not finite"))
        return sample


def shards_at(path: Path) -> list[str]:
    """Return the files of stored latents in a folder, sorted."""
    return list(map(str, visible(path, SHARDS.format("*"))))


def latents_shape(file: str) -> list[int]:
    """Return the shape (N, C, h, w) of a file of latents."""
    return mapped(file).get_slice("latents").get_shape()


def read_stamp(file: str) -> dict[str, str]:
    """Return the settings that made a file of latents.  Raises UserError."""
    try:
        stamp = json.loads((mapped(file).metadata() or {})["stamp"])
        is_whole = ("vae" in stamp and int(stamp["shards"]) > 0 and int(stamp["pixels"]) > 0
                    and len(latents_shape(file)) == 4)
    except (KeyError, TypeError, ValueError, SafetensorError):
        is_whole = False
    require((is_whole, f"{file}: not written by python data.py latents; it names no autoencoder"))
    return stamp


class Tokens(Source):
    """Plain text as one long row of tokens in a mapped file, cut into texts of L tokens."""

    holds = "plain text"

    def __init__(self, location: Location):
        self.name = str(location.path)
        self.length = location.length
        tensors = mapped(self.name)
        self.tokenizer = (tensors.metadata() or {}).get("tokenizer")
        require((self.tokenizer and "tokens" in tensors.keys(),
                 f"{self.name}: not written by python data.py pack"))
        tokens = tensors.get_slice("tokens")
        shape, dtype = tokens.get_shape(), tokens.get_dtype()
        require((len(shape) == 1 and dtype in ("U16", "U32"), f"{self.name}: its tokens are {dtype} "
                 f"{shape}, expected a row of U16 or U32 from python data.py pack"))
        self.size = shape[0] // self.length
        require((self.size, f"{self.name}: {shape[0]} tokens, one text takes {self.length}"))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        start = index * self.length
        ids = mapped(self.name).get_slice("tokens")[start:start + self.length]
        return dict(key=f"{self.name}:{index}", ids=ids.long(), captions=[])


@lru_cache(maxsize=64)
def mapped(path: str):
    return Tensors.open(Path(path))


def expand(pattern: str) -> list[str]:
    """Return the paths that match a pattern with {000..127} ranges and *, in order.

    The part of it that exists is no pattern: the name of a folder may have brackets."""
    path = Path(pattern)
    if path.exists():
        return [pattern]
    folder = next(parent for parent in [*path.parents, Path()] if parent.exists())
    rest = str(path.relative_to(folder))
    match = re.search(r"\{(\d+)\.\.(\d+)\}", rest)
    if not match:
        if not glob.has_magic(rest):
            return [pattern]
        names = sorted(glob.glob(rest, root_dir=folder))
        return [str(folder / name) for name in names if not name.endswith(webdataset.INDEX)]
    first, last = match.groups()
    paths = []
    for i in range(int(first), int(last) + 1):
        number = str(i).zfill(len(first))
        paths += expand(str(folder / (rest[:match.start()] + number + rest[match.end():])))
    return paths


def expand_all(patterns: list[str]) -> list[str]:
    """Return the paths of all patterns, in order.  Raises UserError if one matches nothing."""
    paths = []
    for pattern in patterns:
        matches = expand(pattern)
        require((matches, f"{pattern}: no file has such a name"))
        paths += matches
    return paths
