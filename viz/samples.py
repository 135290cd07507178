"""Show the trainer's samples: images drawn from prompts, and captions written for images."""

from PIL import Image
from torch import Tensor

from inference.image_to_text import ReadConfig, encode, write
from inference.parts import Parts
from inference.text_to_image import draw
from viz import grids


def caption_cells(parts: Parts, images: Tensor, captions: list[str],
                  config: ReadConfig = ReadConfig()) -> list[tuple[Tensor, list[str]]]:
    """Return cells of `grids.page`: images (B, 3, H, W), with the written and true captions."""
    written = write(parts, encode(parts, images), [None] * len(images), config)
    return [(image, [f"read: {text}", f"true: {caption}"])
            for image, text, caption in zip(images, written, captions)]


def samples_page(parts: Parts, prompts: list[str], captions: list[str],
                 images: Tensor) -> Image.Image:
    """Draw prompts, and caption images (B, 3, H, W); show the results in two columns."""
    drawn = [(image, [f"drawn: {prompt}"]) for image, prompt in zip(draw(parts, prompts), prompts)]
    return grids.page(drawn, caption_cells(parts, images, captions))
