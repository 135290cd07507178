"""Print scores as a table, with their settings and what was left out; write the same as JSON.

    note = read_note(Path("out/coco"))                  # what `draw` wrote about its images
    tell(args, {"these drawings": {"FID": 9.4}}, left_out, note)
"""

import argparse
import statistics
from pathlib import Path

from common.files import read_json, write_json
from metrics import benchmarks

SHOWN = 10              # lines about what was left out
# of a benchmark's scores, or a command's; else one
DECIMALS = dict(geneval=4, t2i=4, captions=4, fid=3, coco=2, mjhq=2, clip=2)

# {row: {column: value, or a value for each seed}}
Rows = dict[str, dict[str, list[float] | float]]


def cell(values: list[float] | float, decimals: int) -> str:
    """Return the mean of a value for each seed, with the range where they differ."""
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
    """Print a table with the paper's rows, all settings, and what was left out; write it to --json.

    note: from `read_note`.  settings: of the measurement.  hidden: scores for --json only."""
    name = vars(args).get("benchmark", args.command)
    published = benchmarks.PUBLISHED.get(name, {})
    print(table(rows | published, DECIMALS.get(name, 1)))
    command = dict(command=args.command_line)
    for key, value in (command | note | settings).items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {part}" for name, part in value.items() if part)
        print(f"{key}: {value}")
    print_left_out(left_out)
    if args.json:
        scores = dict(scores=rows | hidden, left_out=left_out)
        write_json(args.json, command | dict(made=note) | settings | scores)


def print_left_out(lines: list[str]) -> None:
    if lines:
        print(f"left out: {len(lines)}", *lines[:SHOWN], sep="\n  ")
    if len(lines) > SHOWN:
        print("  ...")


def read_note(path: Path) -> dict:
    """Return what `draw` noted about a folder, or `answer` about a file; {} for any other."""
    file = Path(f"{path}.json")
    return read_json(file) if file.exists() else {}
