"""The command line's manners, the same for every program.

    from common import cli
    cli.interruptible(__name__)     # before torch is imported: Ctrl-C then, too, is one line
    ...
    if __name__ == "__main__":
        cli.run(main)

A program that can't go on says so in one line on stderr; its status is 1, or 2 for flags it can't take.
"""

import argparse
import dataclasses
import difflib
import math
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any, Callable, Iterable, get_args, get_origin, get_type_hints

ROOT = Path(__file__).parents[1]                # of the project
METAVARS = {str: "TEXT", Path: "FILE"}


class UserError(Exception):
    """A mistake that the person at the keyboard can mend; `run` prints it as one line and exits with 1."""


def require(*conditions: tuple[bool, str]) -> None:
    """Raise UserError with the message of the first condition that does not hold."""
    for holds, message in conditions:
        if not holds:
            raise UserError(message)


def option(default: Any, help: str, **limits):
    """Return a dataclass field that `Parser.add_fields` turns into a flag.

    limits: `low` and `high` of a number; `choices`; `bare`, the value of the flag without a number;
    `word`, a text that stands in place of a number; `group`, a title in --help above this field and
    those that follow it.  More of them are kept as the field's metadata."""
    metadata = dict(help=help, **limits)
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def number(kind: type, low: float | None = None, high: float | None = None,
           word: str | None = None) -> Callable[[str], float | str]:
    """Return a reader of finite numbers for argparse, from low to high, or of a word."""
    def read(text: str) -> float | str:
        if text == word:
            return text
        wanted = "a whole number" if kind is int else "a number"
        if high is not None:
            wanted += f" from {low} to {high}"
        elif low is not None:
            wanted += f", at least {low}"
        if word:
            wanted += f", or {word}"
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        too_low = low is not None and value < low
        too_high = high is not None and value > high
        if not math.isfinite(value) or too_low or too_high:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value
    return read


def flag(name: str) -> str:
    """"text_batch" -> "--text-batch"."""
    return "--" + name.replace("_", "-")


def own_default(field: dataclasses.Field) -> Any:
    """Return the default of a dataclass field, whichever way it was given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def help_text(field: dataclasses.Field, default: Any) -> str:
    """Return a field's help, with its default behind it unless that is empty."""
    text = field.metadata.get("help", "").replace("%", "%%")
    if default is None or default is False or default in ("", []):
        return text
    values = default if isinstance(default, (list, tuple)) else [default]
    shown = " ".join(map(str, values)).replace(f"{ROOT}{os.sep}", "")
    return f"{text} ({shown})".strip()


def reader(field: dataclasses.Field, kind: type) -> dict:
    """Return the arguments of `add_argument` by which a field's type is read."""
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
    read = number(kind, limits.get("low"), limits.get("high"), limits.get("word"))
    arguments.update(type=read, metavar="N")
    if "bare" in limits:
        arguments.update(nargs="?", const=limits["bare"])
    return arguments


def take(config: type, values: dict) -> Any:
    """Make a dataclass of those values that are its fields.  Its ValueErrors become UserErrors."""
    names = {field.name for field in dataclasses.fields(config)}
    try:
        return config(**{name: value for name, value in values.items() if name in names})
    except ValueError as error:
        raise UserError(str(error))


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Leave more room for the help of each flag."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26)


class Parser(argparse.ArgumentParser):
    """argparse that names the closest flag for an unknown one, takes no abbreviation and ends in one line.

    renamed: flags that somebody may try, and those that do it here."""

    def __init__(self, doc: str, renamed: dict[str, str] = {}, **more):
        self.renamed = renamed
        super().__init__(description=doc, formatter_class=Formatter, allow_abbrev=False, **more)

    def add_fields(self, config: type, defaults: dict = {}) -> None:
        """Add a flag for each field of a dataclass; only flags that are given are in the result.

        `defaults` are shown in place of the class's own: the chosen stage's.  A flag that is there
        already stays."""
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
            name, known = unknown[0].split("=")[0], list(self._option_string_actions)
            for action in self._subparsers._group_actions if self._subparsers else []:
                known += [flag for each in action.choices.values() for flag in each._option_string_actions]
            if not name.startswith("-"):
                self.error(f"unknown argument {name}; see --help, and put quotes around a text")
            nearest = self.renamed.get(name) or difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            if nearest == name:
                self.error(f"{name} is no flag of this command; see its --help")
            self.error(f"unknown argument {name}; did you mean {nearest}?")
        for name, text in vars(parsed).items():
            for part in text if isinstance(text, list) else [text]:
                if isinstance(part, str) and any("\ud800" <= c <= "\udfff" for c in part):
                    self.error(f"{flag(name)} is no text in this terminal's encoding: {ascii(part)}")
        return parsed

    def check_folder(self, flag: str, path: Path) -> None:
        """Refuse a path in no folder, before minutes of work."""
        if not path.parent.is_dir():
            self.error(f"{flag} {path}: the folder {path.parent} does not exist")

    def check_path(self, flag: str, path: Path, suffixes: Iterable[str]) -> None:
        """Refuse a path in no folder, or of another kind of file."""
        self.check_folder(flag, path)
        if path.suffix.lower() not in suffixes or path.is_dir():
            self.error(f"{flag} {path}: expected a file name that ends in {', '.join(suffixes)}")

    def error(self, message: str):
        self.exit(2, f"error: {message.removeprefix('argument ')}\n")


def interruptible(name: str) -> None:
    """Make Ctrl-C during the imports end in one line, with status 130; call it first, with __name__."""
    if name == "__main__":
        signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"stopped\n"), os._exit(130)))


def run(main: Callable[[], None]) -> None:
    """Call a program and end as it should: a mistake, a file that can't be opened and Ctrl-C (status 130) in
    one line, a closed pipe in silence.  What the terminal's encoding lacks is printed as \\N{SNOWMAN}."""
    for stream in filter(None, (sys.stdout, sys.stderr)):        # a closed one is None
        stream.reconfigure(errors="namereplace")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        print(end="", flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(130)
    except BrokenPipeError:                                    # python would complain once more while it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno is None:
            raise
        if error.filename is None:                             # stdout, as when a disk is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"error: {error.filename or 'output'}: {error.strerror}")
