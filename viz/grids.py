"""Arrange images and texts on one sheet: grids, tables of results, a text being unmasked.

Shapes: L tokens; H and W, height and width in pixels.  Images are tensors (3, H, W) in [-1, 1].
"""

import math
import textwrap
from itertools import chain
from pathlib import Path
from typing import Iterable

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from common.cli import UserError, one_line
from common.files import replacing
from common.progress import chunks
from dataset.images import to_image
from pretrained.tokenizer import Tokenizer

SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"]
GAP = 8                 # pixels between images


def beside(*images: Image.Image, gap: int = GAP) -> Image.Image:
    """Arrange images from left to right, `gap` pixels apart, on a white sheet."""
    width = sum(image.width + gap for image in images) - gap
    height = max(image.height for image in images)
    sheet = Image.new("RGB", (width, height), "white")
    x = 0
    for image in images:
        sheet.paste(image, (x, 0))
        x += image.width + gap
    return sheet


def above(*images: Image.Image, gap: int = 0) -> Image.Image:
    """Arrange images from top to bottom, `gap` pixels apart: `beside` with x and y swapped."""
    swap = Image.Transpose.TRANSPOSE
    swapped = [image.transpose(swap) for image in images]
    return beside(*swapped, gap=gap).transpose(swap)


def grid(images: Iterable[Tensor], least: int = 256, gap: int = GAP) -> Image.Image:
    """Arrange images (3, H, W) of one size, as square as their number allows.

    Small images are enlarged to a whole multiple of their size, at least `least` pixels wide."""
    tiles = [to_image(image) for image in images]
    columns = math.ceil(math.sqrt(len(tiles)))
    times = math.ceil(least / tiles[0].width)
    tiles = [ImageOps.scale(tile, times) for tile in tiles]
    rows = [beside(*row, gap=gap) for row in chunks(tiles, columns)]
    return above(*rows, gap=gap)


def page(*columns: list[tuple[Tensor, list[str]]], most: int = 5) -> Image.Image:
    """Show columns of images (3, H, W), each with at most `most` lines of text on its right."""
    height = max(104, 18 * most + 8)
    size = 500 * len(columns), height * max(map(len, columns))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, cells in enumerate(columns):
        x = 500 * column
        middle = height // 2
        for image, texts in cells:
            image = to_image(image).resize((96, 96))
            sheet.paste(image, (x + 4, middle - 48))
            lines = []
            for text in texts:
                lines += textwrap.wrap(text, 52)
            text = "\n".join(lines[:most])
            pen.text((x + 110, middle), text, fill="black", font_size=14, anchor="lm")
            middle += height
    return sheet


def rows(*tiles: list[tuple[Tensor, str]]) -> Image.Image:
    """Show rows of images (3, H, W), each above its text, 128 pixels wide."""
    lines = [len(textwrap.wrap(text, 20)) for _, text in chain(*tiles)]
    height = 138 + 14 * max(1, *lines)
    sheet = Image.new("RGB", (136 * max(map(len, tiles)), height * len(tiles)), "white")
    pen = ImageDraw.Draw(sheet)
    y = 4
    for row in tiles:
        x = 4
        for image, text in row:
            image = to_image(image).resize((128, 128))
            sheet.paste(image, (x, y))
            text = textwrap.fill(text, 20)
            pen.text((x, y + 130), text, fill="black", font_size=12, spacing=2)
            x += 136
        y += height
    return sheet


def text_frame(tokenizer: Tokenizer, ids: Tensor, step: int, steps: int) -> Image.Image:
    """Show a text (L,) while it is unmasked, as in the paper's Figure 2.

    [MASK]s are grey, words black, end tokens blue.  The frame has room for seven tokens a line."""
    height = max(200, 68 + 28 * math.ceil(len(ids) / 7))
    frame = Image.new("RGB", (640, height), "white")
    pen = ImageDraw.Draw(frame)
    pen.font = ImageFont.load_default(18)
    pen.text((12, 10), f"t = {1 - step / steps:.2f}", fill="#787878")
    special = {tokenizer.mask_id: (" [MASK]", "#bebebe"), tokenizer.end_id: (" <end>", "#7896dc")}
    x, y = 12, 40
    for token in ids.tolist():
        word, colour = special.get(token) or (tokenizer.behind([token]), "black")
        word = one_line(word)
        width = pen.textlength(word)
        if x + width > 628:             # start the next line
            x, y = 12, y + 28
        pen.text((x, y), word, fill=colour)
        x += width
    return frame


def write_image(path: Path, *frames: Image.Image) -> None:
    """Write one image, or several as an animation that pauses on the last.

    Raises UserError, also for an image that is too large for its format."""
    animation = {}
    if len(frames) > 1:
        durations = [120] * (len(frames) - 1) + [2000]          # milliseconds
        animation = dict(save_all=True, append_images=frames[1:], loop=0, duration=durations)
    kind = Image.registered_extensions()[path.suffix.lower()]
    try:
        with replacing(path) as temporary:
            frames[0].save(temporary, kind, **animation)
    except (OSError, OverflowError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        width, height = frames[0].size
        raise UserError(f"{path}: can't be written ({reason}); it has {width}x{height} pixels")
