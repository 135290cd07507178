"""A checkpoint for notebooks: PIL images and strings in, PIL images and strings out.

    from inference.pipeline import Pipeline
    pipeline = Pipeline("assets/emoji")                            # any layout that checkpoint.py reads
    images = pipeline.draw(["red apple, noto style"], seed=0)      # a list of PIL images
    captions = pipeline.caption(images)                            # a list of str
    answers = pipeline.answer(images, "What kind of thing is this?")
    text = pipeline.fill(images[0], "red [MASK], [MASK] style")
    nats = pipeline.score(images[0], "red apple, noto style")      # lower is likelier

Texts are read as sample.py reads them: too long a one is a UserError, unknown words are a warning on stderr.
"""

from pathlib import Path
from typing import Sequence

import torch
from PIL import Image
from torch import Tensor

from common.cli import require
from dataset.images import fit_picture, to_picture, to_tensor
from inference import image_to_text, text_to_image
from inference.options import check_prompt, read_text
from inference.parts import EMOJI, Parts


def as_list(value) -> list:
    """Return a list as it is, and anything else, a string too, as a list of one."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


class Pipeline:
    """The models of one checkpoint, and what they can do.

    device: "cpu", "cuda" or "mps".  dtype: as the device is fast, unless given.  more: vae, t5, tokenizer,
    mask_embedding (paths), height, width (pixels), length (tokens), as for sample.py.  Raises UserError for a
    checkpoint that can't be read, or parts that don't fit."""

    def __init__(self, checkpoint: str | Path = EMOJI, device: str = "cpu",
                 dtype: torch.dtype | None = None, **more):
        self.parts = Parts(checkpoint, device, dtype, **more)
        self.parts.silent = True

    def draw(self, prompts: str | Sequence[str], seed: int = 0, negative: str = "", **how) -> list[Image.Image]:
        """Return an image for each prompt, with this seed and the next ones.

        how: steps, guidance, shift, solver, interval, batch, of `text_to_image.drawings`."""
        for text in (*as_list(prompts), negative):
            check_prompt(self.parts, text, f"prompt {text[:40]!r}")
        prompts = [read_text(self.parts, "prompt", prompt) for prompt in as_list(prompts)]
        negative = read_text(self.parts, "negative_prompt", negative)
        drawn = text_to_image.drawings(self.parts, prompts, negative=negative, seed=seed, **how)
        return [to_picture(image) for image in drawn]

    def caption(self, images: Image.Image | Sequence[Image.Image], **how) -> list[str]:
        """Return a caption for each image.  how: steps, order, temperature, seed, of `image_to_text.fill`."""
        return image_to_text.write(self.parts, self.encode(images), **how)

    def answer(self, images: Image.Image | Sequence[Image.Image], question: str, **how) -> list[str]:
        """Return the answer to a question about each image.  how: as for `caption`."""
        question = read_text(self.parts, "question", question)
        steps = how.pop("steps", image_to_text.STEPS["answer"])
        return image_to_text.write(self.parts, self.encode(images), question, steps=steps, **how)

    def fill(self, image: Image.Image, text: str, **how) -> str:
        """Return the text with its [MASK]s filled in; the rest stays to the letter.  how: as for `caption`."""
        require(("[MASK]" in text, f"{text[:40]!r} holds no [MASK]; write [MASK] where words are missing"))
        read_text(self.parts, "text", text)
        return image_to_text.infill(self.parts, self.encode(image), text, **how)

    def score(self, image: Image.Image, text: str) -> float:
        """Return the bound of -log p(text | image) in nats."""
        text = read_text(self.parts, "text", text)
        [(_, _, nats, _)] = image_to_text.ranked(self.parts, self.encode(image), None, [text])
        return nats

    def encode(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Return clean latents (B, C, h, w) of images, whose middle is cut to the model's size."""
        self.parts.check_text_head()
        fitted = [fit_picture(image.convert("RGB"), self.parts.height, self.parts.width)
                  for image in as_list(images)]
        return image_to_text.encode(self.parts, torch.stack(list(map(to_tensor, fitted))))
