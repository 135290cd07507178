"""How scores are told: a table, what made them, what was left out, and the same as JSON.

    tell(args, about(folder), {"these drawings": {"FID": 9.4}}, bad)       # args: command_line and json
"""

import argparse
import statistics
from pathlib import Path

from files import read_json, write_json
from metrics import benchmarks

SHOWN = 10              # of what was left out, lines on the terminal


def table(rows: dict[str, dict[str, list[float] | float]], decimals: int = 1, corner: str = "") -> str:
    """{row: {column: value}} -> a table; of values of several seeds the mean, and from least to most where
    they differ."""
    columns = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for row, cells in rows.items():
        shown = []
        for name in columns:
            values = cells.get(name, [])
            values = values if isinstance(values, list) else [values]
            text = f"{statistics.mean(values):.{decimals}f}" if values else ""
            low, high = (f"{find(values):.{decimals}f}" for find in (min, max)) if values else ("", "")
            shown.append(text + f" ({low}–{high})" * (low != high))
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def tell(args: argparse.Namespace, made: dict, rows: dict, bad: list[str] = (), decimals: int = 1,
         published: str = "", hidden: dict | None = None, **more) -> None:
    """Print a table, of all that made it, and of what was left out; and write it to --json.

    made: the contents of OUT.json.  published: whose rows of the paper's tables stand below.  hidden: further
    scores for --json alone."""
    print(table(rows | benchmarks.PUBLISHED.get(published, {}), decimals))
    for name, value in [("command", args.command_line), *made.items(), *more.items()]:
        shown = ", ".join(f"{k} {v}" for k, v in value.items() if v) if isinstance(value, dict) else value
        print(f"{name}: {shown}")
    left_out(bad)
    if args.json:
        found = dict(command=args.command_line, made=made, **more, scores=rows | (hidden or {}),
                     left_out=list(bad))
        write_json(args.json, found)


def left_out(bad: list[str], how: str = "left out") -> None:
    if bad:
        print(f"{how}: {len(bad)}", *bad[:SHOWN], *["..."] * (len(bad) > SHOWN), sep="\n  ")


def about(made: Path) -> dict:
    """What `draw` noted of a folder, or `answer` of a file, if it was made so."""
    file = Path(f"{made}.json")
    return read_json(file) if file.exists() else {}
