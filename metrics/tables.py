"""Print scores: a table, what made them, what was left out; and write the same as JSON.

    tell(args, about(folder), {"these drawings": {"FID": 9.4}}, bad)   # args: command_line and json
"""

import argparse
import statistics
from pathlib import Path

from common.files import read_json, write_json
from metrics import benchmarks

SHOWN = 10              # lines about what was left out


def cell(values: list[float] | float, decimals: int) -> str:
    """Return the mean of a value per seed, and from the least to the greatest where they differ."""
    values = values if isinstance(values, list) else [values]
    mean, low, high = (f"{value:.{decimals}f}"
                       for value in (statistics.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def table(rows: dict[str, dict[str, list[float] | float]], decimals: int = 1,
          corner: str = "") -> str:
    """Return {row: {column: value, or a value per seed}} as a Markdown table."""
    columns = list(dict.fromkeys(name for values in rows.values() for name in values))
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for row, values in rows.items():
        cells = [cell(values[name], decimals) if name in values else "" for name in columns]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tell(args: argparse.Namespace, made: dict, rows: dict, bad: list[str], decimals: int = 1,
         published: str = "", hidden: dict = {}, **more) -> None:
    """Print a table, everything that made it, and what was left out; and write it to --json.

    made: the contents of OUT.json.  published: the benchmark whose rows of the paper's tables are
    added.  hidden: further scores for --json only."""
    print(table(rows | benchmarks.PUBLISHED.get(published, {}), decimals))
    for name, value in dict(command=args.command_line, **made, **more).items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {part}" for key, part in value.items() if part)
        print(f"{name}: {value}")
    left_out(bad)
    if args.json:
        write_json(args.json,
                   dict(command=args.command_line, made=made, **more, scores=rows | hidden,
                                   left_out=bad))


def left_out(bad: list[str]) -> None:
    if bad:
        print(f"left out: {len(bad)}", *bad[:SHOWN], sep="\n  ")
    if len(bad) > SHOWN:
        print("  ...")


def about(made: Path) -> dict:
    """Return what `draw` noted about a folder, or `answer` about a file, if one of them made it."""
    file = Path(f"{made}.json")
    return read_json(file) if file.exists() else {}
