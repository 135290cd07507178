"""Show a training run: loss.png, its curves, and run.html, a page of curves, samples and settings.

The page needs no other file and no internet access.  The curves of other runs (--compare) are grey.
"""

import html
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from common.files import numbered, read_bytes, write_text
from viz import grids
from viz.templates import fill_template, image_address

BLUE = (40, 90, 200)
RED = (200, 60, 40)
GREY = (170, 170, 170)
GREEN = (40, 140, 80)
# loss, validation, validation by bins of t, bold and pale colour
OBJECTIVES = (
    ("image", "val_image", "val_image_t", BLUE, (169, 189, 233)),
    ("text", "val_nats", "val_text_t", RED, (233, 177, 169)),
)
SHOWN = 40              # samples on the page, at most


class Line(NamedTuple):
    """A line of a chart."""
    points: list        # of (x, y)
    colour: tuple
    width: int = 2      # in pixels


def series(rows: list[dict], key: str) -> list[tuple]:
    """Return (step, value) of each row of a log that has a finite number under this key."""
    points = []
    for row in rows:
        value = row.get(key)
        if isinstance(value, (int, float)) and math.isfinite(value):
            points.append((row["step"], float(value)))
    return points


def chart(pen: ImageDraw.ImageDraw, column: int, row: int, title: str, *lines: Line,
          log: bool = True) -> None:
    """Draw lines in a box of 320 x 220 pixels, in this column and row of the sheet.

    log: make the y axis logarithmic, if all values are positive."""
    left = 20 + 360 * column
    bottom = 250 + 280 * row
    pen.rectangle((left, bottom - 220, left + 320, bottom), outline="#c8c8c8")
    pen.text((left + 6, bottom - 240), title, "black", font_size=14)
    lines = [line for line in lines if line.points]
    if not lines:
        return
    points = np.concatenate([line.points for line in lines])        # (n, 2): x and y
    _, low = points.min(0)
    last, high = points.max(0)
    if log and low > 0:
        points[:, 1] = np.log10(points[:, 1])
    points -= points.min(0)
    span = np.maximum(points.max(0), 1e-9)              # not 0, even if all values are equal
    pixels = [left, bottom] + [320, -220] * points / span
    for values, colour, width in lines:
        dots, pixels = np.split(pixels, [len(values)])
        pen.line(list(dots.flat), colour, width)
        if len(dots) < 40:                              # more dots would hide the line
            for box in np.hstack([dots - width, dots + width]):
                pen.ellipse(box.tolist(), colour)
    label = partial(pen.text, fill="#5a5a5a", font_size=11)
    label((left + 4, bottom - 12), f"{low:.4g}")
    label((left + 4, bottom - 218), f"{high:.4g}")
    label((left + 260, bottom + 3), f"{last:g}")


def curves(rows: list[dict], path: Path, others: list[list[dict]] = ()) -> None:
    """Write a PNG with six charts of a log's rows; `others` are the logs of other runs.

    First row: both losses with their validation, and the learning rate.  Second row: the last
    validation by ten bins of t, and the gradients."""
    sheet = Image.new("RGB", (1080, 560), "white")
    pen = ImageDraw.Draw(sheet)
    latest = {}
    for row in rows:
        if "val_text_t" in row:                         # a validation
            latest = row
    for column, (loss, validation, by_time, colour, pale) in enumerate(OBJECTIVES):
        title = f"{loss} loss; {validation} bold"
        if others:
            title += ", others grey"
        lines = [Line(series(other, validation), GREY) for other in others]
        lines.append(Line(series(rows, f"{loss}_loss"), pale, 1))
        lines.append(Line(series(rows, validation), colour, 3))
        chart(pen, column, 0, title, *lines)
        bins = [(0.05 + 0.1 * i, value) for i, value in enumerate(latest.get(by_time, []))
                if math.isfinite(value)]
        title = f"{by_time} over t, at step {latest.get('step', 0)}"
        chart(pen, column, 1, title, Line(bins, colour, 3))
    chart(pen, 2, 0, "learning rate", Line(series(rows, "lr"), GREEN), log=False)
    cosine = Line(series(rows, "meter_cosine"), GREEN)
    if cosine.points:
        chart(pen, 2, 1, "cosine of the two gradients", cosine, log=False)
    else:
        chart(pen, 2, 1, "gradient norm", Line(series(rows, "grad_norm"), GREEN, 1))
    grids.write_image(path, sheet)


def png_address(path: Path) -> str:
    return image_address("png", read_bytes(path))


def page(out: Path, settings: dict, step: int) -> None:
    """Write run.html in a run's folder: loss.png, samples up to this step, and the settings."""
    sheets = list(numbered(out, "samples_", ".png").items())
    sheets = [(at, path) for at, path in sheets if at <= step]   # later ones were left behind
    every = math.ceil(len(sheets) / SHOWN) or 1         # 1 if there are no samples yet
    figures = []
    first = (len(sheets) - 1) % every                   # so that the newest one is shown
    for at, path in sheets[first::every]:
        address = png_address(path)
        figures.append(f'<figure hidden><img src="{address}" alt="">'
                       f'<figcaption>step {at}</figcaption></figure>')
    last = len(figures) - 1
    slider = ""
    if figures:
        slider = f'<input id="at" type="range" min="0" max="{last}" value="{last}">'
    cells = []
    for name, value in settings.items():
        value = html.escape(str(value))
        cells.append(f"<tr><td>{html.escape(name)}</td><td>{value}</td></tr>")
    title = html.escape(str(out))
    loss = png_address(out / "loss.png")
    samples = "\n".join(figures)
    table = "\n".join(cells)
    text = fill_template("run.html", title=title, curves=loss, slider=slider, samples=samples,
                         table=table)
    write_text(out / "run.html", text)
