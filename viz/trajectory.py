"""Show how an image or a text came about, as a page (pages.py) or an animation (grids.py)."""

from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import mask_diffusion
from inference.image_to_text import fill
from inference.parts import Parts
from inference.text_to_image import Seen
from viz import grids, pages
from viz.attention import watching


def grid(parts: Parts) -> tuple[int, int]:
    """Return (rows, columns), the patches of an image."""
    unit = parts.factor * parts.sizes.patch
    return parts.height // unit, parts.width // unit


def pieces(parts: Parts, ids: list[int]) -> list[str]:
    """Return tokens as they are written, spaces too; "" for an end or padding."""
    tokenizer = parts.tokenizer
    special = {tokenizer.end_id: "", tokenizer.pad_id: "", tokenizer.mask_id: "[MASK]"}
    return [special[i] if i in special else tokenizer.bpe.decode([i]) for i in ids]


def is_page(path: Path) -> bool:
    """Tell a page from an animation."""
    return path.suffix.lower() == ".html"


def seen(parts: Parts, path: Path) -> Seen:
    """Return what `text_to_image.drawings` fills in, for a page with the attention to words, or an animation."""
    return Seen(watch=partial(watching, reads="words") if is_page(path) else None)


def drawing_page(parts: Parts, prompt: str, found: Seen, about: dict) -> str:
    """Return the page of one image's walk; of Heun's two evaluations at a time the later one's attention."""
    ids = parts.tokenizer.encode(prompt, parts.length).tolist()
    steps = [(t, x[0], clean[0]) for t, x, clean in found.states]
    attention = list(dict(zip(found.times, found.watched)).values())              # the later of two
    return pages.drawing(prompt, pieces(parts, ids), steps, attention, grid(parts), about)


def drawing_frames(found: Seen) -> list[Image.Image]:
    """Return x_t beside the image that is predicted there, of all images."""
    return [grids.beside(grids.grid(x), grids.grid(clean)) for _, x, clean in found.states]


def reading_frames(parts: Parts, states: list, steps: int) -> list[Image.Image]:
    """Return the first row's text at each state of mask_diffusion.walk, of so many steps; 0: of its own."""
    steps = steps or int(states[-1][0][0])
    return [grids.text_frame(parts.tokenizer, ids[0], int(step[0]), steps) for step, ids in states]


@torch.no_grad()
def reading_page(parts: Parts, picture: Tensor | None, latents: Tensor | None, ids: Tensor, about: dict,
                 **how) -> str:
    """Return the page of the [MASK]s of ids (L,) being filled about a picture (3, H, W), of latents
    (1, C, h, w), or none.  The text is written once more for it; `how` goes to `image_to_text.fill`."""
    parts.hold("text", "mmdit")
    states, asked = [], []          # (step, ids) of the walk; (number of the state it led to, tokens, logits)
    with watching(parts.mmdit, "patches") as maps:
        final = fill(parts, latents, ids[None], trajectory=states, asked=asked, **how)[0].tolist()
    looks = {number: (at.tolist(), logits, i) for i, (number, at, logits) in enumerate(asked)}
    revealed, probability, attention = [0] * len(ids), [None] * len(ids), [None] * len(ids)
    mask_id = parts.tokenizer.mask_id
    for i, token in enumerate(final):
        masked = [j for j, (_, row) in enumerate(states) if row[0, i] == mask_id]
        number = masked[-1] + 1 if masked else 0                                  # of the state it came in
        if number:
            revealed[i] = int(states[number][0][0])
        at, logits, look = looks.get(number or 1, ([], None, 0))
        if at and maps:
            attention[i] = maps[look][:, i]                                       # (K, N)
        if number and i in at:
            scores = mask_diffusion.forbid(logits[at.index(i)].cpu().double(), mask_id)
            probability[i] = float(scores.softmax(-1)[token])
    return pages.writing(picture, pieces(parts, final), revealed, probability, attention, grid(parts), about)
