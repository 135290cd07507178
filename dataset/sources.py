"""The kinds of sources: a length, and a sample at a position, read when it is asked for.

    photos/                   a folder of pictures, each with NAME.txt (a caption a line), or with a
                              metadata.jsonl of {"file_name": ..., "text": ...}
    shards/{000..127}.tar     tars in WebDataset layout, also as *.tar or as their folder: a jpg,
                              jpeg, png or webp with a txt or a json ("caption", "re_caption") each
    captions.json             a list of {image_path, height, width, caption, re_caption}
    latents/                  what `python data.py latents` stored
    tokens.safetensors        what `python data.py pack` made of plain text

A sample is a dict: "key"; "picture", a file's bytes, or "latents" (C, h, w); "captions";
"recaption", "questions", and T5's "states" (L, E) of the caption "stated" where there are any.
Plain text is "ids" (L,).
"""

import glob
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from common.cli import UserError, require
from common.files import decode_text, parse_json, read_bytes, read_json_lines, read_text
from common.progress import Progress
from dataset import webdataset
from dataset.webdataset import Tar
from pretrained.safetensors_io import Tensors, is_safetensors

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
TEXTS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
CAPTIONS = ("caption", "re_caption")                             # of a record
SHARDS = "latents-{}.safetensors"


def is_text(value) -> bool:
    """Tell a str without half a surrogate pair, which no encoding has."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def text(value, where: str, field: str) -> str:
    """Check a field of a record.  Raises UserError for null, another type, or half a surrogate
    pair."""
    shown = "null" if value is None else ascii(value)[:60]
    require((is_text(value), f"{where}: \"{field}\" is {shown}, expected a text"))
    return value


def identity(record, where: str, field: str) -> int | str:
    """Return a record's id, a whole number or a text.  Raises UserError for anything else."""
    value = record.get(field) if isinstance(record, dict) else None
    require((type(value) is int or is_text(value),
             f"{where}: expected an object with \"{field}\", a whole number or a text, found "
             f"{ascii(record)[:60]}"))
    return value


def described(record, where: str) -> dict:
    """Return the texts of a record, as a sample has them; null or "" is no caption.

    Raises UserError for one of the wrong type."""
    require((isinstance(record, dict),
             f"{where}: expected a JSON object, found {ascii(record)[:60]}"))
    sample = {}
    if record.get("caption"):
        sample["captions"] = [text(record["caption"], where, "caption")]
    if record.get("re_caption"):
        sample["recaption"] = text(record["re_caption"], where, "re_caption")
    pairs = record.get("questions")
    if pairs is not None:
        require((isinstance(pairs, list) and all(isinstance(pair, dict) for pair in pairs),
                 f"{where}: \"questions\" is {ascii(pairs)[:60]}, expected a list of objects"))
        for n, pair in enumerate(pairs):
            for name in ("question", "answer"):
                text(pair.get(name), where, f"questions[{n}].{name}")
        sample["questions"] = pairs
    return sample


def choose_caption(sample: dict, recaption: float, chance: float) -> str:
    """One of a sample's captions or, for a share `recaption` of draws, the re-caption; chance: in [0, 1)."""
    again, captions = sample.get("recaption"), sample["captions"]
    if again and (not captions or chance < recaption):
        return again
    if again:
        chance = (chance - recaption) / (1 - recaption)
    return captions[int(chance * len(captions))]


def latents_of(samples: list[dict]) -> Tensor | None:
    """Return stored latents or images in [-1, 1], (B, C, h, w) float32; None for text."""
    if "ids" in samples[0]:
        return None
    return torch.stack([sample["latents"].float() if "latents" in sample else
                        sample["picture"].float() / 127.5 - 1 for sample in samples])


class Folder:
    """Images with a caption file each, or with a metadata.jsonl.  Raises UserError for what does
    not fit."""

    def __init__(self, path: Path):
        self.name = str(path)
        metadata = path / "metadata.jsonl"
        self.entries = self.listed(metadata) if metadata.exists() else self.paired(path)
        if not self.entries:
            names = ", ".join(sorted(file.name for file in path.iterdir())[:6]) or "nothing"
            raise UserError(f"{path}: expected pictures ({', '.join(PICTURES)}) with captions, or "
                            f".tar files, found {names}")

    def listed(self, metadata: Path) -> list[tuple[Path, list[str]]]:
        entries = []
        for where, record in read_json_lines(metadata):
            try:
                file, caption = metadata.parent / record["file_name"], record["text"]
            except (KeyError, TypeError) as error:
                raise UserError(f"{where}: expected file_name and text ({error})")
            entries.append((file, [text(caption, where, "text")]))
        return entries

    def paired(self, path: Path) -> list[tuple[Path, list[str]]]:
        images, texts = {}, {}                                   # by their path without suffix
        for file in sorted(path.rglob("*")):
            suffix = file.suffix.lower()
            if file.is_file() and not file.name.startswith(".") and suffix in (*PICTURES, ".txt"):
                files = texts if suffix == ".txt" else images
                files[file.with_suffix("")] = file
        if single := images.keys() ^ texts.keys():
            first = min(single)
            file = (texts | images)[first]
            lacking = "its caption in a .txt" if first in images else "a picture"
            raise UserError(f"{file}: expected {lacking} of that name, found none")
        entries = []
        for stem, file in images.items():
            lines = map(str.strip, read_text(texts[stem]).split("\n"))
            entries.append((file, list(filter(None, lines))))
        return entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> dict:
        file, captions = self.entries[i]
        return dict(key=str(file), picture=read_bytes(file), captions=captions)

    def texts(self) -> Iterator[str]:
        return (caption for _, captions in self.entries for caption in captions)


class Listed:
    """A JSON list of {image_path, height, width, caption, re_caption}, with paths from a folder."""

    def __init__(self, path: Path, content: list[dict], folder: Path):
        self.name, self.folder, self.content = str(path), folder, content
        for entry in content:
            require((isinstance(entry, dict) and is_text(entry.get("image_path")),
                     f"{path}: expected objects with image_path, found {ascii(entry)[:60]}"))

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, i: int) -> dict:
        file = self.folder / self.content[i]["image_path"]
        sample = dict(key=str(file), picture=read_bytes(file), captions=[])
        return sample | described(self.content[i], f"{self.name}: {file}")

    def texts(self) -> Iterator[str]:
        for entry in self.content:
            yield from filter(is_text, map(entry.get, CAPTIONS))


class Sharded:
    """Rows of several files in a row; counts: of each file."""

    def __init__(self, counts: list[int]):
        self.starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, i: int) -> tuple[int, int]:
        """Return (file, row in it) of a row of all."""
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        return shard, i - int(self.starts[shard])


class Tars(Sharded):
    """WebDataset shards (webdataset.py), read at random."""

    def __init__(self, name: str, paths: list[str]):
        self.name, self.tars = name, []
        progress = Progress("tars indexed", len(paths))
        for path in paths:
            self.tars.append(Tar(path))
            progress.update(len(self.tars))
        super().__init__(list(map(len, self.tars)))

    def __getitem__(self, i: int) -> dict:
        shard, row = self.place(i)
        key, files = self.tars[shard][row]
        where = f"{self.tars[shard].path}: {key}"
        kinds = [kind for kind in PICTURES if kind[1:] in files]
        require((kinds, f"{where}: no picture in this sample, found .{', .'.join(files)}"))
        sample = dict(key=where + kinds[0], picture=files[kinds[0][1:]], captions=[])
        if "txt" in files:
            sample["captions"] = [decode_text(files["txt"], f"{where}.txt").strip()]
        if "json" in files:
            where += ".json"
            sample |= described(parse_json(files["json"], where), where)
        return sample


class Latents(Sharded):
    """Latents with their texts, a row at a time from mapped files.

    stamp: the settings that made them, the same in all files of a folder: "source", "shards",
    "dtype", "vae" (the digest of its weights), "pixels" and "channels"; with T5's states also those
    of `states`, which is None without them."""

    def __init__(self, folder: Path):
        self.name, self.files = str(folder), sorted(map(str, folder.glob(SHARDS.format("*"))))
        self.stamp = read_stamp(self.files[0])
        for file in self.files:
            require((read_stamp(file) == self.stamp,
                     f"{file}: made with other settings than {self.files[0]}"))
        names = self.stamp.keys() & {"t5", "tokenizer", "length", "recaption"}
        self.states = {name: self.stamp[name] for name in names} or None
        require((len(self.files) == int(self.stamp["shards"]), f"{folder}: {len(self.files)} of "
                 f"{self.stamp['shards']} shards; the same python data.py latents makes the rest"))
        super().__init__([mapped(file).get_slice("latents").get_shape()[0] for file in self.files])

    def __getitem__(self, i: int) -> dict:
        shard, row = self.place(i)
        tensors = mapped(self.files[shard])
        begin, end = tensors.get_slice("ends")[row:row + 2].tolist()
        content = tensors.get_slice("texts")[begin:end].numpy().tobytes()
        sample = parse_json(content, f"{self.files[shard]}: sample {row}")
        for name in {"latents", "states"} & set(tensors.keys()):
            sample[name] = tensors.get_slice(name)[row]
        return sample


def read_stamp(file: str) -> dict[str, str]:
    """Return the settings that made a file of latents.  Raises UserError."""
    try:
        return json.loads((mapped(file).metadata() or {})["stamp"])
    except (KeyError, ValueError):
        raise UserError(f"{file}: not what python data.py latents writes; it names no autoencoder")


class Tokens:
    """Plain text as one row of tokens, mapped, and cut into texts of L tokens.

    tokenizer: the digest of the one that made them."""

    stamp = None                # it has no pictures

    def __init__(self, path: Path, length: int):
        self.name, self.length = str(path), length
        tensors = mapped(self.name)
        self.tokenizer = (tensors.metadata() or {}).get("tokenizer")
        require((self.tokenizer and "tokens" in tensors.keys(),
                 f"{path}: not what python data.py pack writes"))
        [size] = tensors.get_slice("tokens").get_shape()
        self.count = size // length
        require((self.count, f"{path}: {size} tokens, one text takes {length}"))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        ids = mapped(self.name).get_slice("tokens")[i * self.length:(i + 1) * self.length]
        return dict(key=f"{self.name}:{i}", ids=ids.long(), captions=[])


@lru_cache(maxsize=64)
def mapped(path: str):
    return Tensors.open(Path(path))


def expand(pattern: str) -> list[str]:
    """Return the paths of a pattern with {000..127} ranges and *; in order."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
    first, last = match.groups()
    paths = []
    for i in range(int(first), int(last) + 1):
        number = str(i).zfill(len(first))
        paths += expand(pattern[:match.start()] + number + pattern[match.end():])
    return paths


def of_path(pattern: str, length: int = 256) -> Folder | Tars | Latents | Tokens:
    """Open a path, or a pattern of tars, as a source; plain text in pieces of `length`.  Raises
    UserError."""
    paths = expand(pattern)
    require((paths, f"{pattern}: no file has such a name"))
    path = Path(paths[0])
    if path.is_dir():
        shards = sorted(str(file) for file in path.iterdir() if file.name.endswith(webdataset.KINDS))
        if shards:
            return Tars(pattern, shards)
        return Latents(path) if any(path.glob(SHARDS.format("*"))) else Folder(path)
    if path.name.endswith(webdataset.KINDS):
        return Tars(pattern, paths)
    require((path.exists(), f"{path}: no such file or folder"))
    if is_safetensors(path):
        return Tokens(path, length)
    raise UserError(f"{path}: expected a folder of pictures with captions, tars, a .json, or "
                    f"tokens; plain text is made tokens first: python data.py pack ...")
