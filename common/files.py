"""Read files with one-line errors (UserError), and replace files atomically."""

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from common.cli import UserError


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})")


def decode_text(content: bytes, name: str | Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})")


def parse_json(content: bytes, name: str | Path) -> Any:
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
    if not path.exists():
        raise UserError(f"{path}: no such file; a checkpoint has it beside a model.safetensors")
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_lines(path: Path) -> list[tuple[str, bytes]]:
    """Return ("PATH:NUMBER", line) for each line that is not blank; numbers count from 1."""
    lines = read_bytes(path).split(b"\n")
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
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, content: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")
