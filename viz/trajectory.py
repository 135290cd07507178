"""Show how an image or a text was made: as an animation, FILE.gif, or as a page, FILE.html.

A page (pages.py) also shows what the network attended to.  The sampling run recorded only its
states; here the network is evaluated again at each state, and its blocks store their attention.

Shapes: L tokens, K blocks, N image tokens, C latent channels, h and w latent height and width.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import mask_diffusion
from common.files import write_text
from inference import text_to_image
from inference.image_to_text import Reader, ReadConfig
from inference.parts import Parts
from inference.text_to_image import Trace, decode
from viz import attention, grids, pages

SUFFIXES = [".gif", ".html"]


def is_page(path: Path) -> bool:
    return path.suffix.lower() == ".html"


def patch_grid(parts: Parts) -> tuple[int, int]:
    """Return (rows, columns) of patches.

    Row by row, they are the network's image tokens; a modified network may have more after them."""
    unit = parts.factor * parts.sizes.patch
    return parts.height // unit, parts.width // unit


def pieces(parts: Parts, ids: list[int]) -> list[str]:
    """Return the text of each token, with its spaces; "" for an end token or padding."""
    tokenizer = parts.tokenizer
    special = {tokenizer.end_id: "", tokenizer.pad_id: "", tokenizer.mask_id: "[MASK]"}
    return [special[i] if i in special else tokenizer.behind([i]) for i in ids]


def write_drawing(path: Path, parts: Parts, prompt: str, trace: Trace, about: dict) -> None:
    """Show x_t beside the clean image predicted at t; a page shows only the first image."""
    if is_page(path):
        write_text(path, drawing_page(parts, prompt, trace, about))
        return
    parts.hold("vae")
    frames = []
    for step in trace.steps:
        x = grids.grid([decode(parts, latents) for latents in step.x])
        clean = grids.grid([decode(parts, latents) for latents in step.clean])
        frames.append(grids.beside(x, clean))
    grids.write_image(path, *frames)


@torch.no_grad()
def drawing_page(parts: Parts, prompt: str, trace: Trace, about: dict) -> str:
    """Return the page of the first image, with each patch's attention to the prompt."""
    parts.hold("vae")
    shown = [(step.t, decode(parts, step.x[0]), decode(parts, step.clean[0]))
             for step in trace.steps]
    text = text_to_image.encode_prompts(parts, [prompt])[prompt]                  # (1, L, E)
    parts.hold("mmdit")
    rows, columns = patch_grid(parts)
    maps = []
    with attention.storing_attention(parts.mmdit):
        for step in trace.steps[:-1]:                            # the last one is the result
            t = torch.tensor([step.t], device=parts.device)
            parts.mmdit(step.x[0][None], text, t, need="velocity")
            maps.append(attention.patches_to_words(parts.mmdit)[:, :rows * columns])
    words = pieces(parts, parts.tokenizer.encode(prompt, parts.length).tolist())
    return pages.drawing(prompt, words, shown, maps, (rows, columns), about)


@dataclass
class Reading:
    """A text that was written about one image, or none."""
    image: Tensor | None        # (3, H, W) in [-1, 1]
    latents: Tensor | None      # (1, C, h, w)
    states: list[tuple[Tensor, Tensor]]     # of mask_diffusion.walk: (step (1,), ids (1, L))
    config: ReadConfig


def write_reading(path: Path, parts: Parts, reading: Reading, about: dict) -> None:
    """Show how the text is unmasked."""
    if is_page(path):
        write_text(path, reading_page(parts, reading, about))
        return
    states = reading.states
    steps = max(1, int(states[-1][0][0]))       # 0 if `length_at` left nothing to write
    order = mask_diffusion.ORDERS[parts.complete(reading.config).order]
    if order.follows_reveal_step:                                # the last steps may reveal nothing
        steps = reading.config.steps or steps
    frames = [grids.text_frame(parts.tokenizer, ids[0], int(step[0]), steps)
              for step, ids in states]
    grids.write_image(path, *frames)


@torch.no_grad()
def reading_page(parts: Parts, reading: Reading, about: dict) -> str:
    """Return the page of a text, with the attention of each token when it was revealed.

    A token that was given shows its attention in the first evaluation.  With --length-at, the
    image cache is computed with a shorter text than in the run, which changes probabilities by
    1e-3."""
    parts.hold("text", "mmdit")
    config = parts.complete(reading.config)
    reader = Reader(parts, reading.latents, config.image_cache, config.text_guidance)
    final = reading.states[-1][1][0].tolist()
    revealed, probability, maps = [0] * len(final), [None] * len(final), []
    rows, columns = patch_grid(parts)
    mask_id = parts.tokenizer.mask_id
    with attention.storing_attention(parts.mmdit):
        for (_, ids), (step, after) in zip(reading.states, reading.states[1:]):
            masked = mask_diffusion.positions(ids == mask_id)                     # (n,)
            if not len(masked):                                  # only other rows had [MASK]s left
                break
            logits = mask_diffusion.forbid(reader(ids, masked).cpu().double(), mask_id)
            looks = attention.words_to_patches(parts.mmdit)[..., :rows * columns]    # (K, L, N)
            maps = maps or list(looks.unbind(1))                 # of the tokens that were given
            for i, p in zip(masked.tolist(), logits.softmax(-1)):
                if after[0, i] != mask_id:
                    revealed[i] = int(step[0])
                    probability[i] = float(p[final[i]])
                    maps[i] = looks[:, i].clone()                # a copy, to free the others
    if reading.latents is None:
        maps = [None] * len(final)
    return pages.writing(reading.image, pieces(parts, final), revealed, probability, maps,
                         (rows, columns), about)
