"""Captions by the shipped weights for each order of unmasking: the README's table, and a picture of it.

    python tests/orders.py OUT.png            # 192 captions of both splits each; ten minutes of two cores
    python tests/orders.py OUT.png --limit 16

Right: word for word.  Evaluations: of the network, a text (of those rows that were not done).  Time: against
the exact order that looks at the picture each time, one token a step, in the same run.
"""

import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import cli  # noqa: E402
import emoji  # noqa: E402
import reading  # noqa: E402
import report  # noqa: E402
from parts import Parts  # noqa: E402

ORDERS = {
    "confidence": dict(order="confidence"), "margin": dict(order="margin"), "entropy": dict(order="entropy"),
    "random": dict(order="random"), "remask 0.05, 32 steps": dict(order="remask", steps=32),
    "confidence, 2 a step": dict(order="confidence", per_step=2),
    **{f"threshold {x}": dict(order="threshold", level=x) for x in (0.99, 0.95, 0.9)},
    **{f"eb {x}": dict(order="eb", level=x) for x in (0.01, 0.05)},
    **{f"factor {x}": dict(order="factor", level=x) for x in (0.1, 0.5)},
}
REFRESH = {1: report.BLUE, 2: report.GREEN, 4: report.GREY, 0: report.RED}


def measure(parts: Parts, pictures, true: list[str], **how) -> tuple[float, float, float]:
    """Percent right, evaluations a text, seconds."""
    calls, mmdit = [], parts.mmdit.forward
    parts.mmdit.forward = lambda *a, **k: calls.append(len(a[1])) or mmdit(*a, **k)      # a[1]: the text
    started = time.perf_counter()
    said = reading.write(parts, pictures, **how)
    seconds = time.perf_counter() - started
    parts.mmdit.forward = mmdit
    return 100 * sum(map(str.__eq__, said, true)) / len(true), sum(calls) / len(true), seconds


def draw(found: dict, path: Path) -> None:
    """Percent right against evaluations, and against time, a colour for each K."""
    sheet = Image.new("RGB", (1080, 330), "white")
    pen = ImageDraw.Draw(sheet)
    for box, at, title in (((20, 40, 520, 300), 1, "right, %, against evaluations a text"),
                           ((560, 40, 1060, 300), 2, "right, %, against time")):
        lines = []
        for refresh, colour in REFRESH.items():
            points = sorted((row[at], row[0]) for (_, k), row in found.items() if k == refresh)
            lines.append(([x for x, _ in points], [y for _, y in points], colour, 2))
        report.chart(pen, box, title, lines, log=False)
    pen.text((20, 4), "the picture is looked at each time: blue, every 2nd: green, 4th: grey, once: red",
             fill="black")
    sheet.save(path)


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=cli.number(int, 1), default=192)
    args = parser.parse_args()
    parts, found = Parts(), {}
    records, pictures = emoji.load(pixels=parts.height)
    for split in ("tone", "train"):
        shown = [i for i, record in enumerate(records) if record["split"] == split][:args.limit]
        batch, true = pictures[shown].float() / 127.5 - 1, [records[i]["caption"] for i in shown]
        measure(parts, batch, true, **ORDERS["threshold 0.9"])                    # warm
        for name, how in ORDERS.items():
            for refresh in REFRESH if "remask" not in name else (1, 0):
                row = measure(parts, batch, true, refresh=refresh, **how)
                found.setdefault((name, refresh), []).append(row)
                print(name, refresh, row, file=sys.stderr, flush=True)
    print("| order | look | right, `tone` | right, `train` | evaluations | time |\n|---|---|---|---|---|---|")
    whole = sum(seconds for *_, seconds in found["confidence", 1])
    rows = {}
    for (name, refresh), (tone, train) in found.items():
        right, evaluations, seconds = ((a + b) / 2 for a, b in zip(tone, train))
        rows[name, refresh] = right, evaluations, 2 * seconds / whole
        print(f"| {name} | {refresh or 'once'} | {tone[0]:.1f} | {train[0]:.1f} | {evaluations:.1f} | "
              f"{2 * seconds / whole:.3f} |")
    draw(rows, args.out)


if __name__ == "__main__":
    cli.run(main)
