"""Every picture that a person looks at: grids, pages of results, a text being unmasked, loss curves.

Shapes: B batch, L tokens, H and W height and width in pixels.
"""

import math
import textwrap
from pathlib import Path
from typing import Iterable

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cli import UserError
from pictures import to_picture
from tokenizer import Tokenizer


def enlarge(picture: Image.Image, least: int = 256) -> Image.Image:
    """Small pictures shown at a whole multiple of their size, at least 256 pixels wide."""
    times = max(1, math.ceil(least / picture.width))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.BICUBIC)


def grid(images: Iterable[Tensor]) -> Image.Image:
    """Pictures (3, H, W) of one size -> one picture of all, as square as their number allows."""
    tiles = [enlarge(to_picture(image)) for image in images]
    columns = math.ceil(math.sqrt(len(tiles)))
    (width, height), gap = tiles[0].size, 8 if len(tiles) > 1 else 0
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def page(*columns: list[tuple[Tensor, list[str]]]) -> Image.Image:
    """Columns of pictures (3, H, W), each with lines of text beside it."""
    sheet = Image.new("RGB", (500 * len(columns), 104 * max(map(len, columns))), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, cells in enumerate(columns):
        for row, (image, lines) in enumerate(cells):
            x, y = column * 500, row * 104
            sheet.paste(enlarge(to_picture(image), 96).resize((96, 96)), (x + 4, y + 4))
            wrapped = [part for line in lines for part in textwrap.wrap(line, 52)][:5]   # what has room
            for i, line in enumerate(wrapped):
                pen.text((x + 110, y + 52 - 9 * len(wrapped) + 18 * i), line, fill="black", font=font)
    return sheet


def text_frame(tokenizer: Tokenizer, ids: Tensor, step: int, steps: int) -> Image.Image:
    """A state of a text being unmasked, as in the paper's Figure 2: [MASK]s grey, words black, ends blue."""
    frame, x, y = Image.new("RGB", (640, 200), "white"), 12, 40
    pen, font = ImageDraw.Draw(frame), ImageFont.load_default(18)
    pen.text((12, 10), f"t = {1 - step / steps:.2f}", fill=(120, 120, 120), font=font)
    for i in map(int, ids):
        word, colour = tokenizer.bpe.decode([i]), "black"
        if i == tokenizer.mask_id:
            word, colour = " [MASK]", (190, 190, 190)
        elif i == tokenizer.end_id:
            word, colour = " <end>", (120, 150, 220)
        width = pen.textlength(word, font=font)
        if x + width > 628:
            x, y = 12, y + 28
        pen.text((x, y), word, fill=colour, font=font)
        x += width
    return frame


def curves(rows: list[dict], path: Path, size: tuple[int, int] = (720, 360)) -> None:
    """The losses over steps on log axes of their own: left of images, blue, right of texts, red."""
    picture = Image.new("RGB", size, "white")
    pen, (width, height), margin = ImageDraw.Draw(picture), size, 50
    for key, colour, side in (("image_loss", (40, 90, 200), "left"), ("text_loss", (200, 60, 40), "right")):
        if key not in rows[-1]:
            continue
        values = torch.tensor([row[key] for row in rows]).clamp(min=1e-4).log10()
        low, high = float(values.min()), float(values.max())
        spread = max(high - low, 1e-3)
        at = lambda i, v: (margin + (width - 2 * margin) * rows[i]["step"] / max(rows[-1]["step"], 1),
                           height - margin - (height - 2 * margin) * (float(v) - low) / spread)
        pen.line([at(i, v) for i, v in enumerate(values)], fill=colour, width=2)
        for value, y in ((low, height - margin), (high, margin)):
            pen.text((4 if side == "left" else width - margin + 4, y - 6), f"{10 ** value:.3g}", fill=colour)
        pen.text((margin if side == "left" else width - 140, 12), key.replace("_", " "), fill=colour)
    pen.rectangle((margin, margin, width - margin, height - margin), outline=(180, 180, 180))
    pen.text((width // 2 - 40, height - 30), f"{rows[-1]['step']} steps", fill="black")
    picture.save(path)


def write_picture(path: Path, *frames: Image.Image) -> None:
    """One picture, or several as an animation that rests on the last."""
    times = [120] * (len(frames) - 1) + [2000]
    motion = dict(save_all=True, append_images=frames[1:], loop=0, duration=times) if len(frames) > 1 else {}
    try:
        frames[0].save(path, **motion)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error})")
