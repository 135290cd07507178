"""A drawing or a reading made into what shows how it came about: a page (page.py), an animation (show.py)."""

import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import mask_diffusion
import page
import show
from drawing import Seen
from parts import Parts
from reading import fill


def grid(parts: Parts) -> tuple[int, int]:
    """(rows, columns) of patches of a picture."""
    unit = parts.factor * parts.sizes.patch
    return parts.height // unit, parts.width // unit


def pieces(parts: Parts, ids: list[int]) -> list[str]:
    """Tokens as they are written, spaces too; "" for an end or padding."""
    tokenizer = parts.tokenizer
    special = {tokenizer.end_id: "", tokenizer.pad_id: "", tokenizer.mask_id: "[MASK]"}
    return [special[i] if i in special else tokenizer.bpe.decode([i]) for i in ids]


def is_page(path: Path) -> bool:
    """Or an animation."""
    return path.suffix.lower() == ".html"


def seen(parts: Parts, path: Path) -> Seen:
    """What drawing.drawings fills in, for a page with the attention to words, or for an animation."""
    patches = math.prod(grid(parts))
    return Seen(watch=partial(page.watching, patches=patches, reads="words") if is_page(path) else None)


def drawing_page(parts: Parts, prompt: str, found: Seen, about: dict) -> str:
    """Of one picture's walk; of two evaluations at a time (Heun's) the attention of the later is shown."""
    ids = parts.tokenizer.encode(prompt, parts.length).tolist()
    steps = [(t, x[0], clean[0]) for t, x, clean in found.states]
    attention = list(dict(zip(found.times, found.watched)).values())              # the later of two
    return page.drawing(prompt, pieces(parts, ids), steps, attention, grid(parts), about)


def drawing_frames(found: Seen) -> list[Image.Image]:
    """x_t beside the picture that is predicted there, of all pictures."""
    return [show.beside(show.grid(x), show.grid(clean)) for _, x, clean in found.states]


def reading_frames(parts: Parts, states: list, steps: int) -> list[Image.Image]:
    """The first row's text at each state of mask_diffusion.walk, of so many steps; 0: of its own."""
    steps = steps or int(states[-1][0][0])
    return [show.text_frame(parts.tokenizer, ids[0], int(step[0]), steps) for step, ids in states]


@torch.no_grad()
def reading_page(parts: Parts, picture: Tensor | None, latents: Tensor | None, ids: Tensor, about: dict,
                 **how) -> str:
    """Of the [MASK]s of ids (L,) being filled about a picture (3, H, W), of latents (1, C, h, w), or none.
    The text is written once more for it; `how` goes to reading.fill."""
    parts.hold("text", "mmdit")
    states, asked = [], []          # (step, ids) of the walk; (number of the state it led to, tokens, logits)
    watching = nullcontext([])
    if latents is not None:
        watching = page.watching(parts.mmdit, math.prod(grid(parts)), "patches")
    with watching as maps:
        final = fill(parts, latents, ids[None], trajectory=states, asked=asked, **how)[0].tolist()
    steps, texts = [int(step[0]) for step, _ in states], [row[0].tolist() for _, row in states]
    looks = {number: (at.tolist(), logits, maps[i] if maps else None)
             for i, (number, at, logits) in enumerate(asked)}
    revealed, probability, attention = [0] * len(ids), [None] * len(ids), [None] * len(ids)
    mask_id = parts.tokenizer.mask_id
    for i, token in enumerate(final):
        number = max((j for j, text in enumerate(texts) if text[i] == mask_id), default=-1) + 1
        revealed[i] = steps[number] if number else 0
        at, logits, look = looks.get(number or 1, ([], None, None))
        attention[i] = None if look is None else look[:, i]                       # (K, N)
        if number and i in at:
            known = mask_diffusion.forbid(logits[at.index(i)].cpu().double(), mask_id)
            probability[i] = float(known.softmax(-1)[token])
    return page.writing(picture, pieces(parts, final), revealed, probability, attention if maps else None,
                        grid(parts) if picture is not None else None, about)
