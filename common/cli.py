"""Parse flags and report errors in the same way in every program.

    from common import cli
    cli.interruptible(__name__)     # before torch is imported, so that Ctrl-C prints no traceback
    ...
    if __name__ == "__main__":
        cli.run(main)

A program that can't continue prints one line on stderr and exits with status 1, or 2 for wrong
flags.
"""

import argparse
import dataclasses
import difflib
import functools
import io
import math
import os
import re
import signal
import sys
import types
from pathlib import Path
from typing import Any, Callable, Iterable, get_args, get_origin, get_type_hints

ROOT = Path(__file__).parents[1]                # the project's folder
METAVARS = {str: "TEXT", Path: "FILE"}
# control characters but \t and \n, line separators, and what changes the direction of writing
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Escape control characters: a terminal would obey those in a file's name."""
    return CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def one_line(text: str) -> str:
    return printable(text).replace("\n", "\\n")


def is_text(value) -> bool:
    """Return True for a str without lone surrogates, which stand for bytes that are no text."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


class UserError(Exception):
    """An error that the user can fix; `run` prints it as one line and exits with status 1."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def in_one_line(error: UserError | OSError) -> str:
    """Return an error's message; an OSError without a file is about stdout, or a full disk."""
    if isinstance(error, OSError):
        return one_line(f"{error.filename or 'output'}: {error.strerror}")
    return str(error)


def warn(message: str) -> None:
    """Print a warning on stderr; under torchrun, only the first process prints it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {one_line(message)}", file=sys.stderr, flush=True)


def require(*conditions: tuple[Any, str]) -> None:
    """Raise UserError with the message of the first condition that is false or empty."""
    for holds, message in conditions:
        if not holds:
            raise UserError(message)


def option(default: Any, help: str, **limits):
    """Return a dataclass field that `Parser.add_fields` turns into a flag.

    limits: `low` and `high` of a number; `choices`; `bare`, the value if the flag has no number;
    `group`, a title in --help above this field and the following ones.  All limits, also others,
    are kept in the field's metadata."""
    metadata = dict(help=help, **limits)
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def number(kind: type, low: float | None = None, high: float | None = None
           ) -> Callable[[str], float]:
    """Return a function for argparse that reads a finite number from low to high."""
    def read(text: str) -> float:
        wanted = "a whole number" if kind is int else "a number"
        if high is not None:
            wanted += f" from {low} to {high}"
        elif low is not None:
            wanted += f", at least {low}"
        try:
            value = kind(text)
            math.isfinite(value)                                 # a huge int raises OverflowError
        except (ValueError, OverflowError):
            value = math.nan
        too_low = low is not None and value < low
        too_high = high is not None and value > high
        if not math.isfinite(value) or too_low or too_high:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value
    return read


def flag(name: str) -> str:
    """Return a field's flag: "--text-batch" for "text_batch"."""
    return "--" + name.replace("_", "-")


def own_default(field: dataclasses.Field) -> Any:
    """Return the default of a dataclass field, from its default or its default_factory."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def help_text(field: dataclasses.Field, default: Any) -> str:
    """Return a field's help, followed by its default in brackets unless that is empty."""
    text = field.metadata.get("help", "").replace("%", "%%")
    if default is None or default is False or default in ("", []):
        return text
    values = default if isinstance(default, (list, tuple)) else [default]
    shown = " ".join(map(str, values)).replace(f"{ROOT}{os.sep}", "")
    return f"{text} ({shown})".strip()


def reader(field: dataclasses.Field, kind: type) -> dict:
    """Return the arguments of `add_argument` that fit a field's type and limits."""
    limits = field.metadata
    if kind is bool:
        return dict(action="store_true")
    arguments = {}
    if isinstance(kind, types.UnionType):                        # int | None is read as int
        kind = get_args(kind)[0]
    if get_origin(kind) is list:
        arguments["nargs"] = "+"
        [kind] = get_args(kind)
    elif get_origin(kind) is tuple:
        arguments["nargs"] = len(get_args(kind))
        kind = get_args(kind)[0]
    if limits.get("choices"):
        return arguments | dict(choices=list(limits["choices"]))
    if kind in METAVARS:
        return arguments | dict(type=kind, metavar=METAVARS[kind])
    arguments.update(type=number(kind, limits.get("low"), limits.get("high")), metavar="N")
    if "bare" in limits:
        arguments.update(nargs="?", const=limits["bare"])
    return arguments


def take(config: type, values: dict) -> Any:
    """Make a `config` from those values that are its fields.  Raises UserError for its ValueError.
    """
    names = {field.name for field in dataclasses.fields(config)}
    try:
        return config(**{name: value for name, value in values.items() if name in names})
    except ValueError as error:
        raise UserError(str(error))


class Parser(argparse.ArgumentParser):
    """An argparse parser that suggests the closest flag for an unknown one, accepts no abbreviated
    flags, and reports an error in one line."""

    def __init__(self, doc: str, **more):
        # more room for the help of each flag
        formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=26)
        super().__init__(description=doc, formatter_class=formatter, allow_abbrev=False, **more)

    def add_fields(self, config: type, defaults: dict = {}) -> None:
        """Add a flag for each field of a dataclass; the result has only the flags that were given.

        defaults: shown in --help in place of the class's own, for example those of a stage.  A flag
        that already exists is kept."""
        kinds = get_type_hints(config)
        group = self
        for field in dataclasses.fields(config):
            kind = kinds[field.name]
            if dataclasses.is_dataclass(kind) or flag(field.name) in self._option_string_actions:
                continue
            if field.metadata.get("group"):
                group = self.add_argument_group(field.metadata["group"])
            default = defaults.get(field.name, own_default(field))
            group.add_argument(flag(field.name), default=argparse.SUPPRESS,
                               help=help_text(field, default), **reader(field, kind))

    def parse_args(self, args=None):
        parsed, unknown = self.parse_known_args(args)
        if unknown:
            name = unknown[0].split("=")[0]
            flags = list(self._option_string_actions)
            for action in self._subparsers._group_actions if self._subparsers else []:
                for command in action.choices.values():
                    flags += command._option_string_actions
            if not name.startswith("-"):
                self.error(f"unknown argument {name}; see --help, and put quotes around a text")
            [nearest] = difflib.get_close_matches(name, flags, n=1, cutoff=0)
            if nearest == name:
                self.error(f"{name} is no flag of this command; see its --help")
            self.error(f"unknown argument {name}; did you mean {nearest}?")
        for name, text in vars(parsed).items():
            for part in text if isinstance(text, list) else [text]:
                if isinstance(part, str) and not is_text(part):
                    self.error(f"{flag(name)} is no text in this terminal's encoding: {ascii(part)}")
        return parsed

    def check_name(self, flag: str, path: Path) -> None:
        """Exit with an error for a path without a name: "" and "." are the same Path."""
        if not path.name:
            self.error(f"{flag}: expected a name, got '{path}'")

    def check_parent(self, flag: str, path: Path) -> None:
        """Exit with an error, before the long work, if nothing can be written at a path."""
        self.check_name(flag, path)
        if not path.parent.is_dir():
            self.error(f"{flag} {path}: the folder {path.parent} does not exist")
        if not os.access(path.parent, os.W_OK):
            self.error(f"{flag} {path}: the folder {path.parent} can't be written to")

    def check_file(self, flag: str, path: Path, suffixes: Iterable[str] = ()) -> None:
        """Exit with an error, before the long work, if no file can be written at a path.

        suffixes: those that are allowed, if any."""
        self.check_parent(flag, path)
        if suffixes and path.suffix.lower() not in suffixes:
            self.error(f"{flag} {path}: expected a file name that ends in {', '.join(suffixes)}")
        if path.exists() and not path.is_file():
            self.error(f"{flag} {path}: is no plain file; name another one")

    def check_list(self, flag: str, values: list) -> None:
        """Exit with an error if a list has a blank text, or the same value twice."""
        for value in values:
            if not str(value).strip():
                self.error(f"{flag} is empty; write a text behind it")
            if values.count(value) > 1:
                self.error(f"{flag}: {value} stands twice; remove one")

    def error(self, message: str):
        self.exit(2, f"error: {one_line(message).removeprefix('argument ')}\n")


def interruptible(name: str) -> None:
    """Make Ctrl-C during the imports print one line and exit with status 130.  Call it before the
    other imports, with __name__."""
    if name == "__main__":
        signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"stopped\n"), os._exit(130)))


def ran_out_of_memory(error: Exception) -> bool:
    """Return True if memory ran out, on a GPU or a CPU."""
    is_gpu = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or is_gpu or "can't allocate memory" in str(error)


def run(main: Callable[[], None]) -> None:
    """Call a program.  Print a UserError, an OSError and Ctrl-C (status 130) as one line; end
    silently if a pipe is closed.  Print characters that the terminal lacks as \\N{SNOWMAN}, and
    control characters as \\x1b."""
    for stream in filter(None, (sys.stdout, sys.stderr)):        # a closed one is None
        stream.reconfigure(errors="namereplace")
        stream.write = lambda text, write=stream.write: write(printable(text))
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")          # `is_text` finds such bytes
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        print(end="", flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        sys.exit("error: not enough memory; use smaller batches, images or texts")
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(130)
    except BrokenPipeError:                        # else Python prints a second error when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno is None:
            raise
        if error.filename is None:                             # stdout, for example on a full disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"error: {in_one_line(error)}")
