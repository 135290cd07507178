"""Use a checkpoint in notebooks and sample.py: PIL images and strings in, the same out.

    from inference.pipeline import Pipeline
    pipeline = Pipeline()                   # the shipped weights; or a path, in any layout
    images = pipeline.draw(["red apple, noto style"], seed=0)      # a list of PIL images
    images = pipeline.edit(images[0], ["green apple, noto style"], strength=0.6)
    captions = pipeline.caption(images)                            # a list of str
    answers = pipeline.answer(images, "What kind of thing is this?")
    text = pipeline.fill(images[0], "red [MASK], [MASK] style")
    nats = pipeline.score(images[0], "red apple, noto style")      # lower is likelier

A text that is too long raises UserError; unknown words print a warning on stderr.
"""

from pathlib import Path
from typing import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from common.cli import require, warn
from common.devices import choose_device
from dataset.images import fit_image, to_image, to_rgb, to_tensor
from inference import image_to_text, text_to_image
from inference.image_to_text import Likelihood, ReadConfig
from inference.parts import EMOJI, Parts
from inference.text_to_image import DrawConfig, Edit
from inference.texts import check_question, read_prompt, read_text

Images = Image.Image | Sequence[Image.Image]


def as_list(value) -> list:
    """Return a list, also for a single image or string."""
    return [value] if isinstance(value, (str, Image.Image)) else list(value)


class Pipeline:
    """The models of one checkpoint (`parts`), and what they can do."""

    def __init__(self, checkpoint: str | Path = EMOJI, device: str = "auto",
                 dtype: str | torch.dtype | None = None, **more):
        """more: the other fields of `parts.ModelConfig`, such as height=512 or vae=PATH.

        Raises UserError for a checkpoint that can't be read, or parts that don't fit."""
        self.parts = Parts(checkpoint, choose_device(device), dtype, **more)
        self.parts.silent = True

    @classmethod
    def of(cls, parts: Parts) -> "Pipeline":
        """Return a pipeline with models that are already open."""
        pipeline = cls.__new__(cls)
        pipeline.parts = parts
        return pipeline

    def read_prompts(self, prompts: str | Sequence[str], config: DrawConfig) -> list[str]:
        """Apply `texts.read_prompt` to prompts, and in place to config.negative_prompt."""
        negative = config.negative_prompt
        config.negative_prompt = read_prompt(self.parts, negative, "negative prompt")
        return [read_prompt(self.parts, prompt) for prompt in as_list(prompts)]

    def draw(self, prompts: str | Sequence[str], seed: int = 0, edit: Edit | None = None,
             **settings) -> list[Image.Image]:
        """Return an image for each prompt, with this seed and the next ones.

        settings: fields of DrawConfig, such as steps=8 or guidance=3."""
        config = DrawConfig(**settings)
        prompts = self.read_prompts(prompts, config)
        seeds = range(seed, seed + len(prompts))
        images = text_to_image.drawings(self.parts, prompts, seeds, config, edit)
        return [to_image(image) for image in images]

    def edit(self, image: Image.Image, prompts: str | Sequence[str], strength: float | None = None,
             mask: Tensor | None = None, seed: int = 0, **settings) -> list[Image.Image]:
        """Draw over an image, as `draw` does.

        strength: the noise level to start at, by default 0.7, or 1 with a mask.  mask: (1, 1, h,
        w), in the size of the latents, True where to draw; see `dataset.images.read_mask`."""
        return self.draw(prompts, seed, self.start_edit(image, strength, mask), **settings)

    def start_edit(self, image: Image.Image, strength: float | None, mask: Tensor | None) -> Edit:
        """Encode an image to draw over, in float32, so that kept parts have their exact values.

        Raises UserError for a strength that is no noise level."""
        if strength is None:
            strength = 0.7 if mask is None else 1.0
        require((0 <= strength <= 1, f"strength {strength}: expected 0 to 1"))
        latents = image_to_text.encode(self.parts, self.fit(image), torch.float32)
        return Edit(latents, strength, mask)

    def caption(self, images: Images, seed: int = 0, **settings) -> list[str]:
        """Return a caption for each image.

        settings: fields of ReadConfig, such as order="random"."""
        latents = self.encode(images)
        return self.write(latents, [None] * len(latents), seed, ReadConfig(**settings))

    def answer(self, images: Images, question: str, seed: int = 0, **settings) -> list[str]:
        """Return the answer to a question about each image.  settings: fields of ReadConfig."""
        check_question(self.parts, question)
        latents = self.encode(images)
        return self.write(latents, [question] * len(latents), seed, ReadConfig(**settings))

    def write(self, latents: Tensor, questions: Sequence[str | None], seed: int,
              config: ReadConfig, states: list | None = None) -> list[str]:
        """Write the answers to questions about latents (B, C, h, w); None asks for a caption."""
        image_to_text.check_steps(self.parts, config)
        if config.text_guidance != 1:
            self.warn_of_null_image()
        seeds = [seed] * len(questions)
        return image_to_text.write(self.parts, latents, questions, config, seeds, states)

    def fill(self, image: Image.Image | None, text: str, seed: int = 0, **settings) -> str:
        """Return the text with its [MASK]s filled in, given an image or None.

        The rest of the text is unchanged.  settings: fields of ReadConfig."""
        latents = None
        if image is not None:
            latents = self.encode(image)
        return self.infill(latents, text, seed, ReadConfig(**settings))

    def infill(self, latents: Tensor | None, text: str, seed: int, config: ReadConfig,
               states: list | None = None) -> str:
        """Fill the [MASK]s of a text about latents (1, C, h, w), or about no image."""
        require(("[MASK]" in text,
                 f"text {text[:40]!r} holds no [MASK]; write [MASK] where words are missing"))
        image_to_text.check_steps(self.parts, config)
        read_text(self.parts, text, "text")                      # for its warnings
        if latents is None or config.text_guidance != 1:
            self.parts.check_text_head()
            self.warn_of_null_image()
        return image_to_text.infill(self.parts, latents, text, config, seed, states)

    def warn_of_null_image(self) -> None:
        if not self.parts.null_trained:
            warn("these weights were never trained on text without an image")

    def score(self, image: Image.Image, text: str) -> float:
        """Estimate an upper bound of -log p(text | image), in nats."""
        [[caption]] = self.rank(image, [text])
        return caption.nats

    def rank(self, images: Images, texts: str | Sequence[str],
             question: str | None = None) -> Iterator[list[Likelihood]]:
        """Yield, for each image, the captions or answers in `texts`, the likeliest first."""
        if question is not None:
            check_question(self.parts, question)
        texts = [read_text(self.parts, text, "text") for text in as_list(texts)]
        texts = list(dict.fromkeys(texts))                       # lower case can make two alike
        for latents in self.encode(images):
            yield image_to_text.rank(self.parts, latents[None], texts, question)

    def encode(self, images: Images) -> Tensor:
        """Return clean latents (B, C, h, w) of images."""
        self.parts.check_text_head()
        return image_to_text.encode(self.parts, self.fit(images))

    def fit(self, images: Images) -> Tensor:
        """Return images (B, 3, H, W) in [-1, 1], cropped around the middle and resized.

        Images may have any mode.  An EXIF orientation is ignored; `dataset.images.read_image` opens
        a photo upright."""
        height, width = self.parts.height, self.parts.width
        tensors = []
        for image in as_list(images):
            tensors.append(to_tensor(fit_image(to_rgb(image), height, width)))
        return torch.stack(tensors)
