"""The kinds of sources: a length, and a sample at a position, read when it is asked for.

    photos/                   a folder of pictures, each with NAME.txt (a caption a line), or with a
                              metadata.jsonl of {"file_name": ..., "text": ...}
    shards/{000..127}.tar     tars in WebDataset layout, also as *.tar or as their folder: a jpg, jpeg, png or
                              webp with a txt or a json ("caption", "re_caption") each
    captions.json             a list of {image_path, height, width, caption, re_caption}
    latents/                  what `python data.py latents` stored
    tokens.safetensors        what `python data.py pack` made of plain text

A sample is a dict: "key"; "picture", a file's bytes, or "latents" (C, h, w); "captions"; "recaption",
"questions", and T5's "states" (L, E) of the caption "stated" where there are any.  Plain text is "ids" (L,).
"""

import glob
import gzip
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import time
import zlib
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Iterator

import numpy as np

from cli import UserError, require
from tensors import Tensors

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
TEXTS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
SHARDS = "latents-{}.safetensors"
WHOLE_GZIP = 2**31      # bytes of a .tar.gz once unpacked: it is held in memory


@contextmanager
def tar_whole(path: str | Path) -> Iterator[None]:
    """What is wrong with a tar that is read here, in one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such tar file")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}: not a whole tar file ({error}); fetch or build it again")


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a file in a tar: its name up to the first dot of the last part, and the rest.
    Files with one key are one sample."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def read_tar(path: Path) -> Iterator[dict]:
    """The samples of a tar in WebDataset layout, .tar or .tar.gz, in order.

    Each is {"__key__": name, extension: bytes, ...}.  Raises UserError for a file that is missing, no tar, or
    cut off."""
    sample: dict = {}
    with tar_whole(path), tarfile.open(path, "r|*") as tar:
        for member in tar:
            if not member.isfile():
                continue
            key, extension = split_name(member.name)
            if sample and sample["__key__"] != key:
                yield sample
                sample = {}
            sample["__key__"] = key
            sample[extension] = tar.extractfile(member).read()
    if sample:
        yield sample


class Folder:
    """Pictures with a caption file each, or with a metadata.jsonl.  UserError for what does not fit."""

    def __init__(self, path: Path):
        self.name, self.entries = str(path), []
        if (path / "metadata.jsonl").exists():
            for number, line in enumerate(read_text(path / "metadata.jsonl").splitlines(), 1):
                try:
                    entry = json.loads(line)
                    self.entries.append((path / entry["file_name"], [entry["text"]]))
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(f"{path}/metadata.jsonl:{number}: expected file_name and text ({error})")
        else:
            files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
            pictures = {p.with_suffix(""): p for p in files if p.suffix.lower() in PICTURES}
            texts = {p.with_suffix(""): p for p in files if p.suffix.lower() == ".txt"}
            for alone, lacking in ((texts.keys() - pictures.keys(), "a picture of that name"),
                                   (pictures.keys() - texts.keys(), "its caption in a .txt of that name")):
                if alone:
                    first = min(alone)
                    raise UserError(f"{(texts | pictures)[first]}: expected {lacking}, found none; "
                                    f"{len(alone)} such")
            self.entries = [(file,
                             [line.strip() for line in read_text(texts[stem]).splitlines() if line.strip()])
                            for stem, file in pictures.items()]
        if not self.entries:
            found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
            raise UserError(f"{path}: expected pictures ({', '.join(PICTURES)}) with captions, or .tar "
                            f"files, found {found}")

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
        self.name = str(path)
        try:
            self.entries = [(folder / entry["image_path"], entry.get("caption"), entry.get("re_caption"))
                            for entry in content]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: expected a list of objects with image_path, caption, re_caption "
                            f"({error})")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> dict:
        file, caption, recaption = self.entries[i]
        return dict(key=str(file), picture=read_bytes(file), captions=[caption] if caption else [],
                    recaption=recaption)

    def texts(self) -> Iterator[str]:
        return (text for _, *texts in self.entries for text in texts if text)


class Tars:
    """WebDataset shards, read at random: one contiguous read a sample, by an index beside each tar."""

    def __init__(self, name: str, paths: list[str]):
        self.name, self.paths, self.indexes, self.blobs, said = name, paths, [], {}, time.time()
        for n, path in enumerate(paths):
            if path.endswith((".gz", ".tgz")):
                self.blobs[n] = unpacked(path)
            self.indexes.append(scan_tar(path, self.blobs[n]) if n in self.blobs else tar_index(path))
            if time.time() - said > 5:
                said = time.time()
                print(f"{n + 1}/{len(paths)} tars indexed", file=sys.stderr, flush=True)
        self.starts = np.cumsum([0] + [len(index) for index in self.indexes])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> dict:
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        path, (offset, length) = self.paths[shard], map(int, self.indexes[shard][i - self.starts[shard]])
        block = self.blobs[shard][offset:offset + length] if shard in self.blobs else os.pread(
            opened(path).fileno(), length, offset)
        try:
            with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as tar:
                files = {m.name: block[m.offset_data:m.offset_data + m.size] for m in tar if m.isfile()}
        except tarfile.TarError as error:
            raise UserError(f"{path}: sample at byte {offset} can't be read ({error})")
        return tar_sample(path, files)


def tar_sample(path: str, files: dict[str, bytes]) -> dict:
    """One sample's files by name as a sample.  UserError when it lacks a picture, or its json is broken."""
    kinds = {"." + split_name(name)[1]: content for name, content in files.items()}
    key = f"{path}:{split_name(next(iter(files)))[0]}"
    picture = next((kinds[kind] for kind in PICTURES if kind in kinds), None)
    if picture is None:
        raise UserError(f"{key}: no picture in this sample, found {', '.join(kinds)}")
    sample = dict(key=key, picture=picture, captions=[])
    if ".txt" in kinds:
        sample["captions"] = [kinds[".txt"].decode("utf-8", "replace").strip()]
    if ".json" in kinds:
        try:
            found = json.loads(kinds[".json"])
            sample["captions"] = [found["caption"]] if found.get("caption") else sample["captions"]
            for name, given in (("recaption", "re_caption"), ("questions", "questions")):
                if found.get(given):
                    sample[name] = found[given]
        except (ValueError, AttributeError) as error:
            raise UserError(f"{key}: its json can't be read ({error})")
    return sample


def scan_tar(path: str, blob: bytes | None = None) -> np.ndarray:
    """The (offset, length) of each sample of a tar, int64 (n, 2).  Raises UserError."""
    rows, key, end = [], None, 0
    with tar_whole(path), open(path, "rb") if blob is None else io.BytesIO(blob) as file:
        size = file.seek(0, 2)
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members.clear()                              # tarfile would keep a whole shard's headers
                end = member.offset_data + -(-member.size // 512) * 512
                if end > size:
                    raise tarfile.ReadError("unexpected end of data")
                if member.isfile() and key != (key := split_name(member.name)[0]):
                    rows.append([member.offset, 0])
                if rows:
                    rows[-1][1] = end - rows[-1][0]
        file.seek(end)
        if file.read(512) != bytes(512):                         # tarfile takes half a header for the end
            raise tarfile.ReadError("unexpected end of data")
    if not rows:
        raise UserError(f"{path}: no samples in this tar")
    return np.array(rows, np.int64)


@lru_cache(maxsize=1024)
def tar_index(path: str) -> np.ndarray:
    """A tar's index, mapped; made where there is none.  UserError for one that is older than its tar."""
    file = Path(path + ".index.npy")
    if not Path(path).exists():
        raise UserError(f"{path}: no such tar file")
    if not file.exists():
        return make_index(path)
    if file.stat().st_mtime < Path(path).stat().st_mtime:
        raise UserError(f"{file}: older than its tar; make it again with python data.py index {path}")
    try:
        index = np.load(file, mmap_mode="r", allow_pickle=False)
        if index.dtype != np.int64 or index.ndim != 2 or index.shape[1] != 2:
            raise ValueError(f"{index.dtype} {index.shape}")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not an index ({error}); make it again with python data.py index {path}")
    return index


def make_index(path: str) -> np.ndarray:
    """Scan a tar and leave its index beside it, where that can be written."""
    index, temporary = scan_tar(path), Path(path + ".index.tmp.npy")
    try:
        np.save(temporary, index)
        temporary.replace(path + ".index.npy")
    except OSError:
        temporary.unlink(missing_ok=True)
    return index


@lru_cache(maxsize=256)
def opened(path: str):
    return open(path, "rb")


def unpacked(path: str) -> bytes:
    """A .tar.gz in memory: it can't be read at random otherwise.  Raises UserError above 2 GiB."""
    with tar_whole(path), gzip.open(path) as file:
        content = file.read(WHOLE_GZIP + 1)
    if len(content) > WHOLE_GZIP:
        raise UserError(f"{path}: over {WHOLE_GZIP >> 30} GiB unpacked, and a .tar.gz is held in memory; "
                        f"gunzip it")
    return content


class Latents:
    """Latents with their texts, a row at a time from mapped files.

    stamp: what made them, the same in all files of a folder: "source", "shards", "dtype", "vae" (the digest
    of its weights), "pixels" and "channels"; with T5's states "t5", "tokenizer", "length" too, which `states`
    has alone; without them it is None."""

    def __init__(self, folder: Path):
        self.name, self.files = str(folder), sorted(map(str, folder.glob(SHARDS.format("*"))))
        self.stamp, counts = read_stamp(self.files[0]), [0]
        for file in self.files:
            require((read_stamp(file) == self.stamp, f"{file}: made with other settings than "
                     f"{Path(self.files[0]).name}: {read_stamp(file)}, not {self.stamp}"))
            counts.append(mapped(file).get_slice("latents").get_shape()[0])
        states = {name: self.stamp[name] for name in ("t5", "tokenizer", "length") if name in self.stamp}
        self.states = states or None
        require((len(self.files) == int(self.stamp["shards"]), f"{folder}: {len(self.files)} of "
                 f"{self.stamp['shards']} shards; the same python data.py latents makes the others"))
        self.starts = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> dict:
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        tensors, row = mapped(self.files[shard]), i - int(self.starts[shard])
        begin, end = tensors.get_slice("ends")[row:row + 2].tolist()
        try:
            sample = json.loads(tensors.get_slice("texts")[begin:end].numpy().tobytes())
        except ValueError as error:
            raise UserError(f"{self.files[shard]}: sample {row} can't be read ({error})")
        for name in {"latents", "states"} & set(tensors.keys()):
            sample[name] = tensors.get_slice(name)[row]
        return sample


def read_stamp(file: str) -> dict[str, str]:
    """What made a file of latents.  Raises UserError."""
    try:
        return json.loads((mapped(file).metadata() or {})["stamp"])
    except (KeyError, ValueError):
        raise UserError(f"{file}: not what python data.py latents writes; it names no autoencoder")


class Tokens:
    """Plain text as one row of tokens, mapped, and cut into texts of L tokens.

    tokenizer: the digest of the one that made them."""

    stamp = None                # it has no pictures

    def __init__(self, path: Path, length: int):
        self.name, self.length, tensors = str(path), length, mapped(str(path))
        require(("tokens" in tensors.keys() and "tokenizer" in (tensors.metadata() or {}),
                 f"{path}: not what python data.py pack writes; its tensors are "
                 f"{', '.join(list(tensors.keys())[:4]) or 'none'}"))
        self.tokenizer = tensors.metadata()["tokenizer"]
        self.size, = tensors.get_slice("tokens").get_shape()
        require((self.size >= length, f"{path}: {self.size} tokens, one text takes {length}"))

    def __len__(self) -> int:
        return self.size // self.length

    def __getitem__(self, i: int) -> dict:
        cut = mapped(self.name).get_slice("tokens")[i * self.length:(i + 1) * self.length]
        return dict(key=f"{self.name}:{i}", ids=cut.long(), captions=[])


@lru_cache(maxsize=64)
def mapped(path: str):
    return Tensors.open(Path(path))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})")


def read_json(path: Path):
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error})")


def read_text(path: Path) -> str:
    return read_bytes(path).decode("utf-8", "replace")


def expand(pattern: str) -> list[str]:
    """Paths of a pattern with {000..127} ranges, {a,b} choices and *; in order."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match:
        first, last, names = match.groups()
        names = names.split(",") if names else [
            str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
        return [path for name in names
                for path in expand(pattern[:match.start()] + name + pattern[match.end():])]
    return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]


def of_path(pattern: str, length: int = 256) -> Folder | Tars | Latents | Tokens:
    """The source that a path, or a pattern of tars, is; plain text in pieces of `length`.  UserError."""
    paths = expand(pattern)
    if not paths:
        raise UserError(f"{pattern}: no file has such a name")
    path, tar = Path(paths[0]), (".tar", ".tar.gz", ".tgz")
    if path.is_dir():
        shards = sorted(str(file) for file in path.iterdir() if file.name.endswith(tar))
        stored = any(path.glob(SHARDS.format("*")))
        return Tars(pattern, shards) if shards else Latents(path) if stored else Folder(path)
    if path.name.endswith(tar):
        return Tars(pattern, paths)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        return Tokens(path, length)
    if path.name.endswith(TEXTS):
        raise UserError(f"{path}: plain text is made tokens first: python data.py pack {path} "
                        f"tokens.safetensors")
    raise UserError(f"{path}: expected a folder of pictures with captions, tars, or a .json of a known form")
