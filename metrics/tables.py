"""Print scores as a table, with their settings and a list of what was left out; write them as JSON.

    note = read_note(Path("out/coco"))                  # the settings that `draw` noted
    tell(args, {"these drawings": {"FID": 9.4}}, left_out, note)
"""

import argparse
import statistics
from pathlib import Path

from common.cli import one_line
from common.files import is_there, read_json, write_json
from metrics import benchmarks

SHOWN = 10              # lines printed of the list of what was left out
# decimals in the scores of a benchmark or command; 1 for all others
DECIMALS = dict(geneval=4, t2i=4, captions=4, fid=3, coco=2, mjhq=2, clip=2)

# {row: {column: value, or a list of values, one for each seed}}
Rows = dict[str, dict[str, list[float] | float]]


def cell(values: list[float] | float, decimals: int) -> str:
    """Return a value, or the mean over seeds with the range if the values differ, as text."""
    if not isinstance(values, list):
        values = [values]
    numbers = statistics.mean(values), min(values), max(values)
    mean, low, high = (f"{value:.{decimals}f}" for value in numbers)
    return mean if low == high else f"{mean} ({low}–{high})"


def table(rows: Rows, decimals: int = 1, corner: str = "") -> str:
    """Return scores as a Markdown table."""
    columns = {}
    for values in rows.values():
        columns |= values
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for row, values in rows.items():
        cells = [cell(values[name], decimals) if name in values else "" for name in columns]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tell(args: argparse.Namespace, rows: Rows, left_out: list[str], note: dict,
         settings: dict = {}, hidden: Rows = {}) -> None:
    """Print a table that includes the paper's rows, all settings, and what was left out.  With
    --json, write all of it to that file.

    note: from `read_note`.  settings: those of the measurement.  hidden: scores for --json only."""
    name = vars(args).get("benchmark", args.command)
    published = benchmarks.PUBLISHED.get(name, {})
    print(table(rows | published, DECIMALS.get(name, 1)))
    command = dict(command=args.command_line)
    for key, value in (command | note | settings).items():
        if key == "left_out":                       # by `answer`; `score` lists them itself
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {part}" for name, part in value.items()
                              if part not in (None, ""))
        print(f"{key}: {value}")
    print_left_out(left_out)
    if args.json:
        scores = dict(scores=rows | hidden, left_out=left_out)
        write_json(args.json, command | dict(note=note) | settings | scores)


def print_left_out(lines: list[str]) -> None:
    if lines:
        print(f"left out: {len(lines)}", *map(one_line, lines[:SHOWN]), sep="\n  ")
    if len(lines) > SHOWN:
        print("  ...")


def read_note(path: Path) -> dict:
    """Return the settings that `draw` noted for a folder, or `answer` for a file.

    Return {} if there are none: NAME.json may also be a file of another program."""
    file = Path(f"{path}.json")
    content = read_json(file) if is_there(file) else {}
    is_note = isinstance(content, dict) and "made_by" in content
    return content if is_note else {}
