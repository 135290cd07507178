"""Make pages that show, step by step, how an image is drawn or a text is written, and what the
network attended to.  A page needs no other file and no internet access; walk.html is its template.

    text = drawing(prompt, words, steps, attention, (8, 8), dict(seed=0))
    Path("walk.html").write_text(text, encoding="utf-8")

trajectory.py gathers the data of the pages.

Shapes: K blocks, N image tokens (rows x columns patches), L text tokens, W maps in one tensor;
images (3, height, width) in [-1, 1].
"""

import base64
import html
import io
import json
import math

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dataset.images import to_image
from viz.templates import fill_template, image_address

SIDE = 256              # pixels of an image on the page, at most
COARSE = 16             # patches on a side after pooling
MOST = 450_000          # attention numbers on a page; more are reduced
Grid = tuple[int, int]  # rows, columns of patches
VIEW = '<figure><div><img {} alt=""><canvas></canvas></div><figcaption>{}</figcaption></figure>'


def inline(image: Tensor) -> str:
    """Return an image (3, height, width) as a data: address, at most 256 pixels on a side.

    PNG up to 64 pixels, where it is small and exact; WebP above."""
    thumbnail = to_image(image)
    thumbnail.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)     # never enlarges
    kind = "png" if max(thumbnail.size) <= 64 else "webp"
    file = io.BytesIO()
    thumbnail.save(file, kind, quality=80)
    return image_address(kind, file.getvalue())


def quantized(p: Tensor) -> dict:
    """Return attention p (K, W, N) as bytes in base64, with the scale of each block, its largest p.

    A byte is 255 sqrt(p / scale): the root keeps small p visible next to large ones."""
    p = p.float().nan_to_num(0.0).clamp(min=1e-9)
    scales = p.amax((1, 2), True)                                           # (K, 1, 1)
    levels = (p / scales).sqrt().mul(255).round().byte()
    content = base64.b64encode(levels.numpy().tobytes())
    return dict(scales=scales.flatten().tolist(), bytes=content.decode())


def packed(maps: list[Tensor | None], grid: Grid, per: str) -> tuple[list, Grid, str]:
    """Quantize maps (K, W, N), one per "step" or "word"; return them, their grid, and a note.

    More than MOST numbers are reduced: averaged over the blocks, and pooled to at most 16 patches
    on a side.  A pooled patch holds the mean of its patches in a step's map, but about their sum in
    a word's map, because the word attends to all of these patches."""
    present = [p for p in maps if p is not None]
    if not present:
        return maps, grid, ""
    note = (" Attention: mean over heads, in 8 bits of its square root, relative to the largest"
            f" value of each {per} and block")
    coarse = grid
    reduced = sum(p.numel() for p in present) > MOST
    if reduced:
        scale = min(1, COARSE / max(grid))
        coarse = tuple(max(1, round(side * scale)) for side in grid)
        note += (f"; reduced: mean over blocks, pooled from {grid[0]} x {grid[1]} to"
                 f" {coarse[0]} x {coarse[1]} patches")
    entries = []
    for p in maps:
        if p is not None:
            if reduced:
                p = p.float().mean(0, True).unflatten(2, grid)              # (1, W, rows, columns)
                p = F.adaptive_avg_pool2d(p, coarse).flatten(2)
                if per == "word":
                    p *= math.prod(grid) / math.prod(coarse)
            p = quantized(p)
        entries.append(p)
    return entries, coarse, f"{note}."


def drawing(prompt: str, words: list[str], steps: list[tuple[float, Tensor, Tensor]],
            attention: list[Tensor], grid: Grid, about: dict) -> str:
    """Return the page of an image being drawn.

    words: the prompt's L tokens as text with their spaces; "" for an end token or padding, which
    is not shown.  steps: (t, x_t, the clean image predicted there) of each step, then
    (0.0, x, x), the result.  attention: (K, N, L) of each step, from viz/attention.py.
    grid: (rows, columns) of patches.  about: settings, for one line."""
    shown = [i for i, word in enumerate(words) if word]
    maps = []
    if shown:
        maps = [p[..., shown].transpose(1, 2) for p in attention]           # (K, W, N) each
    maps, grid, note = packed(maps, grid, "step")
    frames = []
    labels = []
    for step, (t, x, clean) in enumerate(steps, 1):
        frames.append(f'<button><img src="{inline(x)}" alt=""><img src="{inline(clean)}" alt="">'
                      f' {t:.2f}</button>')
        labels.append(f"step {step} of {len(steps) - 1}, t = {t:.3f}")
    labels[-1] = "the result, t = 0"
    views = VIEW.format("", "x<sub>t</sub>")
    views += VIEW.format("", "x&#770;, the clean image predicted at this step")
    words = [words[i] for i in shown]
    data = dict(maps=maps, grid=grid, labels=labels)
    return filled("drawing", prompt, about, words, data, views, note, "\n".join(frames))


def tint(step: float, last: int) -> str:
    """Return the colour of a word: from blue at step 1 to orange at the last step."""
    hue = 220 + 170 * (step - 1) / (last - 1)
    return f"hsl({hue:.0f} 80% 55% / 0.38)"


def writing(image: Tensor | None, pieces: list[str], revealed: list[int],
            probability: list[float | None], attention: list[Tensor | None],
            grid: Grid, about: dict) -> str:
    """Return the page of a text being unmasked, as in the paper's Figure 2.

    image: the image that the text describes, or None.  pieces: the final L tokens as text with
    their spaces; "" for an end token or padding.  revealed: the step that wrote each token; 0 for
    a given one.  probability: of each token at that step, or None.  attention: (K, N) of each
    token to the patches, or None.  grid, about: as in `drawing`."""
    maps = []
    for p in attention:
        if p is not None:
            p = p[:, None]                                                  # (K, 1, N)
        maps.append(p)
    maps, grid, note = packed(maps, grid, "word")
    last = max(2, *revealed)
    view = ""
    if image is not None:
        view = VIEW.format(f'src="{inline(image)}"', "the image")
    middle = (1 + last) / 2
    view += ('<p id="legend" class="small">Written at step 1 <i style="background: linear-gradient('
             f'90deg, {tint(1, last)}, {tint(middle, last)}, {tint(last, last)})"></i> {last};'
             ' plain: given</p>')
    tooltips = ["given"] * len(pieces)
    tints = [""] * len(pieces)
    for i, (step, p) in enumerate(zip(revealed, probability)):
        if step > 0:
            certainty = "unknown" if p is None else f"{p:.3f}"
            tooltips[i] = f"step {step}, probability {certainty}"
            tints[i] = tint(step, last)
    states = []
    labels = []
    for step in sorted({0, *revealed}):
        masked = np.array(revealed) > step
        states.append(np.where(masked, "[MASK]", None).tolist())            # None: the final token
        labels.append(f"step {step} of {max(revealed)}, {masked.sum()} masked")
    data = dict(labels=labels, tooltips=tooltips, tints=tints, states=states, maps=maps, grid=grid)
    return filled("writing", "A text, step by step", about, pieces, data, view, note)


def filled(kind: str, title: str, about: dict, words: list[str], data: dict, views: str,
           note: str, strip: str = "") -> str:
    """Fill in walk.html.  Each word becomes a button; `data` goes to the page's script as JSON."""
    buttons = []
    for word in words:
        space = " " if word.startswith(" ") else ""
        buttons.append(f"{space}<button>{html.escape(word.strip())}</button>")
    data["words"] = [word.strip() for word in words]
    content = json.dumps(data, separators=(",", ":"))
    content = content.replace("<", "\\u003c")            # no text can end the script element
    settings = " · ".join(f"{name} {value}" for name, value in about.items())
    return fill_template("walk.html", kind=kind, title=html.escape(title),
                         about=html.escape(settings), views=views, note=note, strip=strip,
                         words="".join(buttons), data=content)
