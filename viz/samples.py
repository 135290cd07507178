"""The trainer's samples: prompts with what is drawn for them, images with what is read."""

from PIL import Image
from torch import Tensor

from inference.image_to_text import compared
from inference.parts import Parts
from inference.text_to_image import draw
from viz import grids


def samples_page(parts: Parts, prompts: list[str], captions: list[str], images: Tensor) -> Image.Image:
    """Two columns: prompts with what is drawn for them, and images (B, 3, H, W) with the caption that is written and the true one."""
    drawn = [(image, [f"drawn: {text}"]) for image, text in zip(draw(parts, prompts), prompts)]
    return grids.page(drawn, compared(parts, images, captions))
