"""Read files with one-line errors (UserError), and replace files atomically."""

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from common.cli import UserError, require

try:
    import resource
except ImportError:                                              # on Windows
    resource = None


def is_hidden(path: str) -> bool:
    """Return True if the last name of a path, or that of a folder before it, begins with a dot."""
    return any(name.startswith(".") and name not in (".", "..") for name in path.split("/"))


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files by `count`, or up to the system's limit: a
    memory-mapped file stays open.  Raises UserError if that can't be enough."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    limit = soft + count
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    require((count < limit, f"{count} files must stay open, and this system allows {hard} (ulimit "
             f"-n)"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """Return the paths that match a pattern, sorted, without hidden ones.  Raises OSError."""
    if folder.is_dir():
        os.scandir(folder).close()                               # glob skips a folder it may not read
    return [path for path in sorted(folder.glob(pattern))
            if not is_hidden(str(path.relative_to(folder)))]


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files in and below a folder in order, but no hidden ones or those of hidden folders.

    Links are followed, but no folder is read twice.  A broken link is yielded: who reads it will
    say so.  Raises OSError."""
    top = folder.resolve()
    read = set()
    pending = visible(folder)[::-1]
    while pending:
        path = pending.pop()
        if not path.is_dir():
            if path.is_file() or not path.exists():
                yield path
            continue
        target = path.resolve()
        in_top = target.is_relative_to(top) and not is_hidden(str(target.relative_to(top)))
        if path.is_symlink() and in_top:
            continue                                             # it is read in its own place
        if target not in read:
            read.add(target)
            pending += visible(path)[::-1]


def listing(folder: Path) -> str:
    """Return the first eight file names in a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) or "nothing"


def numbered(folder: Path, prefix: str, suffix: str = "") -> dict[int, Path]:
    """Return the files and folders named PREFIX, a number and SUFFIX, by their numbers in order."""
    paths = {}
    for path in folder.glob(f"{prefix}*{suffix}"):
        number = path.name.removeprefix(prefix).removesuffix(suffix)
        if number.isascii() and number.isdecimal() and path.name == f"{prefix}{int(number)}{suffix}":
            paths[int(number)] = path
    return dict(sorted(paths.items()))


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that another file names, relative to a folder.

    Raises UserError if the name leads out of the folder.  A link in the folder may lead anywhere:
    it was not made by the file."""
    require(("\0" not in name, f"{folder}: {name!r} is no name of a file"))
    relative = os.path.relpath(folder / name, folder)
    require((relative.split(os.sep)[0] != os.pardir,
             f"{name}: expected a file in {folder}, and this one lies outside"))
    return folder / relative


def is_there(path: Path) -> bool:
    """Return True unless nothing has this name; a broken link is there, and can't be read."""
    return os.path.lexists(path)


def check_plain(path: Path) -> None:
    """Raise UserError for a device or a FIFO: reading it could wait for ever."""
    is_special = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    require((not is_special, f"{path}: is no plain file"))


def read_bytes(path: Path) -> bytes:
    """Raises UserError, also for a device or a FIFO, unless it is one of those in /dev: a program's
    output may be given as /dev/stdin or /dev/fd/63."""
    if path.parts[:2] != ("/", "dev"):
        check_plain(path)
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:                       # ValueError: no possible name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: can't be read ({reason})")


def decode_text(content: bytes, name: str | Path, first: int = 1) -> str:
    """Decode UTF-8, with or without a byte order mark.  Raises UserError, with the line.

    first: the number of the content's first line."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[:error.start].count(b"\n") + first
        raise UserError(f"{name}:{line}: not UTF-8 text ({error.reason} at byte {error.start})")


def split_lines(text: str) -> list[str]:
    r"""Cut a text at \n and \r\n, and nowhere else: str.splitlines cuts at more characters."""
    return text.replace("\r\n", "\n").split("\n")


def text_lines(text: str) -> list[str]:
    """Return the lines of a caption file, or of one of prompts, that are not blank."""
    return list(filter(None, map(str.strip, split_lines(text))))


def parse_json(content: bytes | str, name: str | Path) -> Any:
    if isinstance(content, bytes):
        content = decode_text(content, name)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not readable as JSON ({error})")


def read_text(path: Path) -> str:
    return decode_text(read_bytes(path), path)


def read_json(path: Path) -> Any:
    return parse_json(read_bytes(path), path)


def read_json_object(path: Path) -> dict:
    """Read a JSON object from a file, for example config.json.  Raises UserError."""
    if not is_there(path):
        raise UserError(f"{path}: no such file; a checkpoint has it beside a model.safetensors")
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_lines(path: Path) -> list[tuple[str, str]]:
    """Return ("PATH:NUMBER", line) for each line that is not blank; numbers count from 1."""
    lines = split_lines(read_text(path))
    return [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("PATH:NUMBER", value) for each JSON line that is not blank.  Raises UserError."""
    for where, line in read_lines(path):
        yield where, parse_json(line, where)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends, this file replaces `path`.

    After an error the temporary file is deleted, since it could keep a full disk full."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, content: str) -> None:
    with replacing(path) as temporary:
        # a lone surrogate, in a file's name that is no text, becomes \udcff; JSON reads that again
        temporary.write_text(content, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")
