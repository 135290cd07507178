"""Tars in WebDataset layout: files with one key, side by side, are a sample; whole, or refused.

A plain tar is read at random, by an index beside it; a packed one, .tar.gz or .tgz, is held in memory, and
gzip's checksum is checked.  Tars that `cat` joined are read to the end.  What lies beside the samples is left
out: folders, hidden files (macOS leaves ._x and .DS_Store), READMEs and licences, names without an extension.
"""

import gzip
import io
import os
import re
import tarfile
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Iterator

import numpy as np

from cli import UserError, require

KINDS = (".tar", ".tar.gz", ".tgz")
PACKED = KINDS[1:]
WHOLE_GZIP = 2**31      # bytes of a packed tar once unpacked: it is held in memory
BLOCK = bytes(512)      # of zeros: behind the last file
INDEX = ".index.npy"    # behind a tar's name; its last row is the tar's size, and
RULES = 2               # of what is a sample, that made it
BESIDE = re.compile(r"(readme|licen[sc]e|copying|notice)\.(md|txt|rst|html)", re.IGNORECASE)


@contextmanager
def whole(path: str) -> Iterator[None]:
    """What is wrong with a tar that is read here, in one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such tar file")
    except Exception as error:      # tarfile and gzip let out whatever the damage led to
        raise UserError(f"{path}: not a whole tar file ({error or type(error).__name__}); fetch or build it "
                        f"again")


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a file in a tar: its name up to the first dot of the last part, and the rest."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def members(file) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Each member of a tar, and of tars that were joined to it, and where its last block ends."""
    end, size = 0, file.seek(0, 2)
    while True:
        file.seek(end)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members.clear()                              # it would keep the headers of a whole shard
                end = tar.offset
                if end > size:
                    raise tarfile.ReadError("unexpected end of data")
                yield member, end
        file.seek(end)
        if file.read(512) != BLOCK:                              # tarfile takes a damaged header for the end
            raise tarfile.ReadError(f"no header and no end at byte {end}")
        end += 512
        while (block := file.read(512)) == BLOCK:
            end += 512
        if not block.strip(b"\0"):
            return


def part(path: str, member: tarfile.TarInfo) -> tuple[str, str] | None:
    """(key, extension) of a member that belongs to a sample, None of another.  UserError for a link."""
    key, extension = split_name(member.name)
    *folders, file = member.name.split("/")
    beside = file.startswith(".") or BESIDE.fullmatch(file) or "__MACOSX" in folders
    if member.isdir() or not extension or beside:
        return None
    if not member.isreg() or member.issparse():
        kind = "a hard link" if member.islnk() else "a symbolic link" if member.issym() else "no plain file"
        raise UserError(f"{path}: {member.name} is {kind}, expected the file itself; tar it again with "
                        f"--dereference --hard-dereference")
    return key, extension


def scan(path: str, blob: bytes | None = None) -> np.ndarray:
    """The (offset, length) of each sample of a tar, int64 (n, 2).  Raises UserError."""
    rows, keys, key, extensions = [], set(), None, set()
    with whole(path), open(path, "rb") if blob is None else io.BytesIO(blob) as file:
        for member, end in members(file):
            if (found := part(path, member)) is None:
                continue
            if found[0] != key:
                key, extensions = found[0], set()
                require((key not in keys, f"{path}: files of {key} stand in two places; a sample's stand "
                         f"side by side, and once: tar it again with --sort=name"))
                keys.add(key)
                rows.append([member.offset, 0])
            require((found[1] not in extensions, f"{path}: {member.name} is in it twice"))
            extensions.add(found[1])
            rows[-1][1] = end - rows[-1][0]
    require((rows, f"{path}: no samples in this tar"))
    return np.array(rows, np.int64)


def unpacked(path: str) -> bytes:
    """A packed tar in memory: it can't be read at random otherwise.  Raises UserError above 2 GiB."""
    with whole(path), gzip.open(path) as file:
        content = file.read(WHOLE_GZIP + 1)                      # up to the end: there is its checksum
    require((len(content) <= WHOLE_GZIP, f"{path}: over {WHOLE_GZIP >> 30} GiB unpacked, and a .tar.gz is "
             f"held in memory; gunzip it"))
    return content


class Tar:
    """The samples of one tar at random, one contiguous read each.  Raises UserError."""

    def __init__(self, path: str):
        self.path, self.blob = path, unpacked(path) if path.endswith(PACKED) else None
        self.index = read_index(path) if self.blob is None else scan(path, self.blob)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[str, dict[str, bytes]]:
        """(key, its files by extension)."""
        offset, length = map(int, self.index[i])
        with whole(self.path):
            block = self.blob[offset:offset + length] if self.blob is not None else os.pread(
                opened(self.path).fileno(), length, offset)
            found = [(part(self.path, member), block[member.offset_data:member.offset_data + member.size])
                     for member, _ in members(io.BytesIO(block + BLOCK))]
            files = {name[1]: content for name, content in found if name}
            return next(name[0] for name, _ in found if name), files


@lru_cache(maxsize=1024)
def read_index(path: str) -> np.ndarray:
    """A tar's index, mapped; made where there is none.  UserError for one of another state of the tar."""
    file, again = Path(path + INDEX), f"make it again with python data.py index {path}"
    require((Path(path).exists(), f"{path}: no such tar file"))
    if not file.exists():
        return make_index(path)
    tar = Path(path).stat()
    require((file.stat().st_mtime >= tar.st_mtime, f"{file}: older than its tar; {again}"))
    try:
        index = np.load(file, mmap_mode="r", allow_pickle=False)
        if index.dtype != np.int64 or index.ndim != 2 or index.shape[1] != 2:
            raise ValueError(f"{index.dtype} {index.shape}")
    except Exception as error:      # numpy raises whatever the damage led to
        raise UserError(f"{file}: not an index ({error}); {again}")
    require((len(index) > 1 and index[-1].tolist() == [tar.st_size, RULES], f"{file}: of another tar, or of "
             f"other rules; {again}"))
    return index[:-1]


def make_index(path: str) -> np.ndarray:
    """Scan a tar and leave its index beside it, where that can be written."""
    index, temporary = scan(path), Path(path + ".index.tmp.npy")
    try:
        np.save(temporary, np.vstack([index, [[Path(path).stat().st_size, RULES]]]))
        temporary.replace(path + INDEX)
    except OSError:
        temporary.unlink(missing_ok=True)
    return index


@lru_cache(maxsize=256)
def opened(path: str):
    return open(path, "rb")
