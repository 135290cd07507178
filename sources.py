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
import json
import re
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Iterator

import numpy as np

import tars
from cli import UserError, require
from files import decode_text, parse_json, read_bytes, read_json_lines, read_text
from tars import Tar
from tensors import Tensors, is_safetensors

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
TEXTS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
CAPTIONS = ("caption", "re_caption")                             # of a record
SHARDS = "latents-{}.safetensors"


def is_text(found) -> bool:
    """A str without half a surrogate pair, which no encoding has."""
    return isinstance(found, str) and not any("\ud800" <= c <= "\udfff" for c in found)


def text(found, where: str, field: str) -> str:
    """A field of a record.  Raises UserError for null, another type, or half a surrogate pair."""
    if not is_text(found):
        shown = "null" if found is None else ascii(found)[:60]
        raise UserError(f"{where}: \"{field}\" is {shown}, expected a text")
    return found


def identity(record, where: str, field: str) -> int | str:
    """Return a record's id, a whole number or a text.  Raises UserError for anything else."""
    value = record.get(field) if isinstance(record, dict) else None
    require((isinstance(value, int) and not isinstance(value, bool) or is_text(value),
             f"{where}: expected an object with \"{field}\", a whole number or a text, found "
             f"{ascii(record)[:60]}"))
    return value


def described(found, where: str, captions: tuple[str, ...] = ()) -> dict:
    """The texts of a record, as a sample has them; captions: what else there is.

    Raises UserError for one of the wrong type; null is none where there is another caption."""
    require((isinstance(found, dict), f"{where}: expected a JSON object, found {ascii(found)[:60]}"))
    names = [name for name in CAPTIONS if found.get(name) is not None] or [
        name for name in CAPTIONS if name in found and not captions]
    given = {name: text(found[name], where, name) for name in names}
    sample = dict(captions=[given["caption"]] if given.get("caption") else list(captions))
    if given.get("re_caption"):
        sample["recaption"] = given["re_caption"]
    if (asked := found.get("questions")) is not None:
        require((isinstance(asked, list) and all(isinstance(one, dict) for one in asked),
                 f"{where}: \"questions\" is {ascii(asked)[:60]}, expected a list of objects"))
        for n, one in enumerate(asked):
            for name in ("question", "answer"):
                text(one.get(name), where, f"questions[{n}].{name}")
        sample["questions"] = asked
    return sample


class Folder:
    """Pictures with a caption file each, or with a metadata.jsonl.  UserError for what does not fit."""

    def __init__(self, path: Path):
        self.name, self.entries = str(path), []
        if (path / "metadata.jsonl").exists():
            for where, record in read_json_lines(path / "metadata.jsonl"):
                try:
                    file, caption = path / record["file_name"], record["text"]
                except (KeyError, TypeError) as error:
                    raise UserError(f"{where}: expected file_name and text ({error})")
                self.entries.append((file, [text(caption, where, "text")]))
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
                             [line.strip() for line in read_text(texts[stem]).split("\n") if line.strip()])
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
            self.entries = [(folder / entry["image_path"],
                             {name: entry[name] for name in CAPTIONS if name in entry})
                            for entry in content]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: expected a list of objects with image_path, caption, re_caption "
                            f"({error})")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> dict:
        file, found = self.entries[i]
        return dict(key=str(file), picture=read_bytes(file)) | described(found, f"{self.name}: {file}")

    def texts(self) -> Iterator[str]:
        return (found for _, texts in self.entries for found in texts.values() if is_text(found))


class Tars:
    """WebDataset shards (tars.py), read at random."""

    def __init__(self, name: str, paths: list[str]):
        self.name, self.tars, said = name, [], time.time()
        for n, path in enumerate(paths, 1):
            self.tars.append(Tar(path))
            if time.time() - said > 5:
                said = time.time()
                print(f"{n}/{len(paths)} tars indexed", file=sys.stderr, flush=True)
        self.starts = np.cumsum([0] + [len(tar) for tar in self.tars])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> dict:
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        tar = self.tars[shard]
        key, files = tar[i - int(self.starts[shard])]
        where, kind = f"{tar.path}: {key}", next((kind for kind in PICTURES if kind[1:] in files), None)
        require((kind, f"{where}: no picture in this sample, found .{', .'.join(files)}"))
        captions = (decode_text(files["txt"], f"{where}.txt").strip(),) if "txt" in files else ()
        found = parse_json(files["json"], f"{where}.json") if "json" in files else {}
        return dict(key=where + kind, picture=files[kind[1:]]) | described(found, f"{where}.json", captions)


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
        states = {name: self.stamp[name] for name in ("t5", "tokenizer", "length", "recaption") if name in self.stamp}
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
    path = Path(paths[0])
    if path.is_dir():
        shards = sorted(str(file) for file in path.iterdir() if file.name.endswith(tars.KINDS))
        stored = any(path.glob(SHARDS.format("*")))
        return Tars(pattern, shards) if shards else Latents(path) if stored else Folder(path)
    if path.name.endswith(tars.KINDS):
        return Tars(pattern, paths)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if is_safetensors(path):
        return Tokens(path, length)
    if path.name.endswith(TEXTS):
        raise UserError(f"{path}: plain text is made tokens first: python data.py pack {path} "
                        f"tokens.safetensors")
    raise UserError(f"{path}: expected a folder of pictures with captions, tars, or a .json of a known form")
