"""Every picture that a person looks at: grids, pages of results, a text being unmasked.

Shapes: B batch, L tokens, H and W height and width in pixels.
"""

import math
import textwrap
from pathlib import Path
from typing import Iterable

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


def beside(*pictures: Image.Image) -> Image.Image:
    """Pictures of one height in a row."""
    sheet = Image.new("RGB", (sum(p.width + 8 for p in pictures) - 8, pictures[0].height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (sum(p.width + 8 for p in pictures[:i]), 0))
    return sheet


def page(*columns: list[tuple[Tensor, list[str]]], most: int = 5) -> Image.Image:
    """Columns of pictures (3, H, W), each with text beside it, of at most so many lines."""
    height = max(104, 18 * most + 8)
    sheet = Image.new("RGB", (500 * len(columns), height * max(map(len, columns))), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, cells in enumerate(columns):
        for row, (image, lines) in enumerate(cells):
            x, y = column * 500, row * height
            sheet.paste(enlarge(to_picture(image), 96).resize((96, 96)), (x + 4, y + height // 2 - 48))
            wrapped = [part for line in lines for part in textwrap.wrap(line, 52)][:most]
            for i, line in enumerate(wrapped):
                at = x + 110, y + height // 2 - 9 * len(wrapped) + 18 * i
                pen.text(at, line, fill="black", font=font)
    return sheet


def above(*pictures: Image.Image) -> Image.Image:
    """Pictures, each below the last."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (0, sum(p.height for p in pictures[:i])))
    return sheet


def rows(*tiles: list[tuple[Tensor, str]]) -> Image.Image:
    """Rows of pictures (3, H, W), each above its text, 128 pixels wide."""
    wrapped = [[textwrap.wrap(text, 20) for _, text in cells] for cells in tiles]
    heights = [138 + 14 * max(map(len, texts)) for texts in wrapped]
    sheet = Image.new("RGB", (136 * max(map(len, tiles)), sum(heights)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, cells in enumerate(tiles):
        y = sum(heights[:row])
        for column, (image, _) in enumerate(cells):
            sheet.paste(enlarge(to_picture(image), 128).resize((128, 128)), (136 * column + 4, y + 4))
            text = "\n".join(wrapped[row][column])
            pen.multiline_text((136 * column + 4, y + 134), text, fill="black", font=font, spacing=2)
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


def write_picture(path: Path, *frames: Image.Image) -> None:
    """One picture, or several as an animation that rests on the last."""
    times = [120] * (len(frames) - 1) + [2000]
    motion = dict(save_all=True, append_images=frames[1:], loop=0, duration=times) if len(frames) > 1 else {}
    try:
        frames[0].save(path, **motion)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error})")
