"""Tars in WebDataset layout: consecutive files with the same key are a sample.

A damaged tar raises UserError.

A plain tar is read in any order, with the help of an index file beside it.  A packed tar, .tar.gz
or .tgz, is held in memory, and gzip's checksum is checked.  Tars that were joined by `cat` are read
to the end.  Some files are skipped: folders, hidden files (macOS leaves ._x and .DS_Store), READMEs
and licences, and names without an extension.
"""

import gzip
import hashlib
import io
import os
import re
import tarfile
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Iterator

import numpy as np

from common.cli import UserError, require
from common.files import is_hidden, replacing

SUFFIXES = (".tar", ".tar.gz", ".tgz")
PACKED = SUFFIXES[1:]
LIKE = re.compile(r"\.(tar(\.\w+)?|tgz)$", re.IGNORECASE)         # also those that are not read
WHOLE_GZIP = 2**31      # most bytes that a packed tar may have once unpacked: it is held in memory
BLOCK = bytes(512)      # a block of zeros, which follows the last file
INDEX = ".index.npy"    # added to a tar's name; the index's last two rows are the tar's `stamp`
RULES = 3               # version of the rules that group files into samples
BESIDE = re.compile(r"(readme|licen[sc]e|copying|notice)\.(md|txt|rst|html)", re.IGNORECASE)


@contextmanager
def whole(path: str) -> Iterator[None]:
    """Turn any error while reading a tar into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such tar file")
    except Exception as error:      # tarfile and gzip raise whatever the damage led to
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{path}: can't be read ({error.strerror})")
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: not a whole tar file ({reason}); fetch or build it again")


def members(file) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield each member of a tar, and of tars joined to it, with the byte where its blocks end."""
    end, size = 0, file.seek(0, 2)
    while True:
        file.seek(end)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members.clear()          # else tarfile keeps the headers of a whole shard
                end = tar.offset
                if end > size:
                    raise tarfile.ReadError("unexpected end of data")
                yield member, end
        file.seek(end)
        if file.read(512) != BLOCK:              # tarfile mistakes a damaged header for the end
            raise tarfile.ReadError(f"no header and no end at byte {end}")
        end += 512
        while (block := file.read(512)) == BLOCK:
            end += 512
        if not block.strip(b"\0"):
            return


def part(path: str, member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Return (key, extension) of a member that belongs to a sample; None for a skipped one.

    The key is the path up to the first dot of the file name.  Raises UserError for a link."""
    *folders, file = member.name.split("/")
    stem, _, extension = file.partition(".")
    beside = BESIDE.fullmatch(file) or "__MACOSX" in folders
    if member.isdir() or not extension or is_hidden(member.name) or beside:
        return None
    require((member.isreg() and not member.issparse(),
             f"{path}: {member.name} is a link or no plain file, expected the file itself; tar it "
             f"again with --dereference --hard-dereference"))
    return "/".join([*folders, stem]), extension.lower()


def scan(path: str, content: bytes | None = None) -> np.ndarray:
    """Return the (offset, length) of each sample of a tar, int64 (n, 2).  Raises UserError."""
    rows, parts, keys = [], set(), []
    with whole(path), open(path, "rb") if content is None else io.BytesIO(content) as file:
        for member, end in members(file):
            if (name := part(path, member)) is None:
                continue
            require((name not in parts, f"{path}: {member.name} is in it twice"))
            parts.add(name)
            if not keys or name[0] != keys[-1]:
                keys.append(name[0])
                rows.append([member.offset, 0])
            rows[-1][1] = end - rows[-1][0]
    require((rows, f"{path}: no samples in this tar"),
            (len(set(keys)) == len(keys), f"{path}: the files of a sample stand in two places, "
             f"expected them side by side; tar it again with --sort=name"))
    return np.array(rows, np.int64)


def unpacked(path: str) -> bytes:
    """Unpack a tar into memory: gzip allows no random access.  Raises UserError above 2 GiB."""
    with whole(path), gzip.open(path) as file:
        content = file.read(WHOLE_GZIP + 1)              # up to the end, to check gzip's checksum
    require((len(content) <= WHOLE_GZIP,
             f"{path}: over 2 GiB unpacked, and a .tar.gz is held in memory; gunzip it"))
    return content


class Tar:
    """The samples of one tar, by index; each takes one contiguous read.  Raises UserError."""

    def __init__(self, path: str):
        self.path, self.content = path, None
        if path.endswith(PACKED):
            self.content = unpacked(path)
            self.index = scan(path, self.content)
        else:
            self.index = read_index(path)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[str, dict[str, bytes]]:
        """Return a sample's key and the bytes of its files by extension.  Raises UserError."""
        offset, length = map(int, self.index[i])
        files = {}
        with whole(self.path):
            if self.content is None:
                block = os.pread(opened(self.path).fileno(), length, offset)
            else:
                block = self.content[offset:offset + length]
            for member, _ in members(io.BytesIO(block + BLOCK)):
                if name := part(self.path, member):
                    key, extension = name
                    files[extension] = block[member.offset_data:member.offset_data + member.size]
            return key, files


@lru_cache(maxsize=1024)
def read_index(path: str) -> np.ndarray:
    """Return a tar's index as `scan` does, memory-mapped; make the index file if there is none, or
    if it is damaged or of another tar."""
    expected = stamp(path)
    try:
        index = np.load(path + INDEX, mmap_mode="r", allow_pickle=False)
        if index.dtype == np.int64 and index[-2:].tolist() == expected:
            return index[:-2]
    except Exception:               # numpy raises whatever the damage led to
        pass
    return make_index(path)


def stamp(path: str) -> list[list[int]]:
    """Return numbers that identify a tar's content and RULES, as two rows of an index."""
    with whole(path), open(path, "rb") as file:
        tar = os.fstat(file.fileno())
        blocks = file.read(512)                                  # the first, and the last
        file.seek(max(0, tar.st_size - 512))
        blocks += file.read()
    digest = int.from_bytes(hashlib.sha256(blocks).digest()[:7])
    return [[tar.st_size, tar.st_mtime_ns], [digest, RULES]]


def make_index(path: str) -> np.ndarray:
    """Scan a tar, and write its index beside it if the folder is writable; return the index."""
    last = stamp(path)
    index = scan(path)
    with suppress(OSError), replacing(Path(path + INDEX)) as temporary:
        with open(temporary, "wb") as file:
            np.save(file, np.vstack([index, last]))
    return index


@lru_cache(maxsize=256)
def opened(path: str):
    return open(path, "rb")
