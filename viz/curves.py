"""What a run's folder shows of it: loss.png, and run.html, a page with the curves, the samples over time and
the settings, which opens from a file and fetches nothing.  The curves of other runs, --compare, are grey.
"""

import html
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from common.files import replacing, write_text
from viz.templates import fill_template, image_address

BLUE, RED, GREY, GREEN = (40, 90, 200), (200, 60, 40), (170, 170, 170), (40, 140, 80)
SHOWN = 40              # pictures of samples on the page, at most


def chart(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], title: str,
          lines: list[tuple[list[float], list[float], tuple, int]], log: bool = True) -> None:
    """Lines of (x, y, colour, width) in a box of (left, top, right, bottom); y on a log axis if it can be."""
    left, top, right, bottom = box
    lines = [line for line in lines if line[0]]
    pen.rectangle(box, outline=(200, 200, 200))
    pen.text((left + 6, top - 20), title, fill="black", font=ImageFont.load_default(14))
    if not lines:
        return
    log = log and all(y > 0 for _, ys, *_ in lines for y in ys)
    scale = math.log10 if log else float
    shown = [[scale(y) for y in ys] for _, ys, *_ in lines]
    low, high = min(map(min, shown)), max(map(max, shown))
    first, last = min(min(xs) for xs, *_ in lines), max(max(xs) for xs, *_ in lines)
    across, up = max(last - first, 1e-9), max(high - low, 1e-9)
    at = lambda x, y: (left + (right - left) * (x - first) / across, bottom - (bottom - top) * (y - low) / up)
    for (xs, _, colour, width), ys in zip(lines, shown):
        points = [at(x, y) for x, y in zip(xs, ys)]
        pen.line(points, fill=colour, width=width)
        for x, y in points if len(points) < 40 else []:
            pen.ellipse((x - width, y - width, x + width, y + width), fill=colour)
    font = ImageFont.load_default(11)
    for value, y in ((low, bottom - 12), (high, top + 2)):
        pen.text((left + 4, y), f"{10 ** value if log else value:.4g}", fill=(90, 90, 90), font=font)
    pen.text((right - 60, bottom + 3), f"{last:g}", fill=(90, 90, 90), font=font)


def series(rows: list[dict], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the rows that have it."""
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
    return [step for step, _ in found], [value for _, value in found]


def curves(rows: list[dict], path: Path, others: list[list[dict]] = ()) -> None:
    """Six charts: both losses with their validation, the last one by bins of t, the rate, the gradients."""
    sheet = Image.new("RGB", (1080, 560), "white")
    pen, boxes = ImageDraw.Draw(sheet), [(20 + 360 * i, 30 + 280 * j, 340 + 360 * i, 250 + 280 * j)
                                         for j in range(2) for i in range(3)]
    for box, name, key, colour in ((boxes[0], "image", "val_image", BLUE),
                                   (boxes[1], "text", "val_nats", RED)):
        pale = tuple(int(255 - (255 - c) * 0.4) for c in colour)
        lines = [(*series(other, key), GREY, 2) for other in others]
        chart(pen, box, f"{name} loss; {key} bold" + ", others grey" * bool(others),
              lines + [(*series(rows, f"{name}_loss"), pale, 1), (*series(rows, key), colour, 3)])
    last = next((row for row in reversed(rows) if "val_text_t" in row), {})
    bins = [0.05 + 0.1 * b for b in range(10)]
    for box, key, colour in ((boxes[3], "val_image_t", BLUE), (boxes[4], "val_text_t", RED)):
        chart(pen, box, f"{key} over t, at step {last.get('step', 0)}",
              [(bins, last[key], colour, 3)] if key in last else [])
    chart(pen, boxes[2], "learning rate", [(*series(rows, "lr"), GREEN, 2)], log=False)
    cosine = series(rows, "meter_cosine")
    chart(pen, boxes[5], "cosine of the two gradients" if cosine[0] else "gradient norm",
          [(*cosine, GREEN, 2)] if cosine[0] else [(*series(rows, "grad_norm"), GREEN, 1)], log=not cosine[0])
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG")


def png_address(path: Path) -> str:
    return image_address("png", path.read_bytes())


def page(out: Path, settings: dict) -> None:
    """run.html of a run's folder: loss.png, its samples over time, and its settings."""
    found = sorted(out.glob("samples_*.png"), key=lambda file: int(file.stem.removeprefix("samples_")))
    files = found[::-(-len(found) // SHOWN) or 1]
    samples = "\n".join(f'<figure hidden><img src="{png_address(file)}" alt=""><figcaption>step '
                        f'{file.stem.removeprefix("samples_")}</figcaption></figure>' for file in files)
    table = "\n".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
                      for name, value in settings.items())
    last = len(files) - 1
    slider = f'<input id="at" type="range" min="0" max="{last}" value="{last}">' if files else ""
    text = fill_template("run.html", title=html.escape(str(out)), curves=png_address(out / "loss.png"),
                         slider=slider, samples=samples, table=table)
    write_text(out / "run.html", text)
