"""Every image that a person looks at: grids, pages of results, a text being unmasked.

Shapes: L tokens, H and W height and width in pixels.
"""

import math
import textwrap
from itertools import accumulate
from pathlib import Path
from typing import Iterable

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from common.cli import UserError
from dataset.images import to_picture
from pretrained.tokenizer import Tokenizer

GAP = 8                 # pixels between images


def arrange(images: Iterable[Image.Image], corners: Iterable[tuple[int, int]]) -> Image.Image:
    """Paste images on a white sheet with their top left corners at these (x, y)."""
    placed = list(zip(images, corners))
    width = max(x + image.width for image, (x, _) in placed)
    height = max(y + image.height for image, (_, y) in placed)
    sheet = Image.new("RGB", (width, height), "white")
    for image, corner in placed:
        sheet.paste(image, corner)
    return sheet


def grid(images: Iterable[Tensor], least: int = 256, gap: int = GAP) -> Image.Image:
    """Arrange images (3, H, W) of one size, as square as their number allows.

    Small ones are shown at a whole multiple of their size, at least so many pixels wide."""
    tiles = [to_picture(image) for image in images]
    columns = math.ceil(math.sqrt(len(tiles)))
    times = math.ceil(least / tiles[0].width)
    tiles = [ImageOps.scale(tile, times) for tile in tiles]
    width, height = tiles[0].width + gap, tiles[0].height + gap
    return arrange(tiles, [(i % columns * width, i // columns * height) for i in range(len(tiles))])


def beside(*images: Image.Image) -> Image.Image:
    lefts = accumulate((image.width + GAP for image in images), initial=0)
    return arrange(images, [(left, 0) for left in lefts])


def above(*images: Image.Image) -> Image.Image:
    tops = accumulate((image.height for image in images), initial=0)
    return arrange(images, [(0, top) for top in tops])


def page(*columns: list[tuple[Tensor, list[str]]], most: int = 5) -> Image.Image:
    """Show columns of images (3, H, W), each with at most so many lines of text beside it."""
    height = max(104, 18 * most + 8)
    sheet = Image.new("RGB", (500 * len(columns), height * max(map(len, columns))), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, cells in enumerate(columns):
        for row, (image, lines) in enumerate(cells):
            x, middle = column * 500, row * height + height // 2
            sheet.paste(to_picture(image).resize((96, 96)), (x + 4, middle - 48))
            wrapped = [part for line in lines for part in textwrap.wrap(line, 52)]
            text = "\n".join(wrapped[:most])
            pen.text((x + 110, middle), text, fill="black", font=font, anchor="lm")
    return sheet


def rows(*tiles: list[tuple[Tensor, str]]) -> Image.Image:
    """Show rows of images (3, H, W), each above its text, 128 pixels wide."""
    texts = [[textwrap.fill(text, 20) for _, text in cells] for cells in tiles]
    height = 152 + 14 * max(text.count("\n") for row in texts for text in row)
    sheet = Image.new("RGB", (136 * max(map(len, tiles)), height * len(tiles)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, cells in enumerate(tiles):
        for column, (image, _) in enumerate(cells):
            x, y = 136 * column + 4, height * row + 4
            sheet.paste(to_picture(image).resize((128, 128)), (x, y))
            pen.text((x, y + 130), texts[row][column], fill="black", font=font, spacing=2)
    return sheet


def text_frame(tokenizer: Tokenizer, ids: Tensor, step: int, steps: int) -> Image.Image:
    """Show a text (L,) being unmasked, as in the paper's Figure 2: [MASK]s grey, words black, ends
    blue."""
    frame = Image.new("RGB", (640, 200), "white")
    pen, font = ImageDraw.Draw(frame), ImageFont.load_default(18)
    pen.text((12, 10), f"t = {1 - step / steps:.2f}", fill=(120, 120, 120), font=font)
    special = {tokenizer.mask_id: (" [MASK]", (190, 190, 190)),
               tokenizer.end_id: (" <end>", (120, 150, 220))}
    x, y = 12, 40
    for i in ids.tolist():
        word, colour = special.get(i) or (tokenizer.bpe.decode([i]), "black")
        width = pen.textlength(word, font=font)
        if x + width > 628:
            x, y = 12, y + 28
        pen.text((x, y), word, fill=colour, font=font)
        x += width
    return frame


def write_picture(path: Path, *frames: Image.Image) -> None:
    """Write one image, or several as an animation that rests on the last.  Raises UserError."""
    motion = {}
    if len(frames) > 1:
        times = [120] * (len(frames) - 1) + [2000]
        motion = dict(save_all=True, append_images=frames[1:], loop=0, duration=times)
    try:
        frames[0].save(path, **motion)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error})")
