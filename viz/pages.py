"""Pages that show a walk: an image being drawn, or a text being written, with what the network attended to at
each step.  A page opens from a file and fetches nothing; walk.html is its template.

    with watching(mmdit, "words") as attention: ...   # viz/attention.py: (K, N, L) of each evaluation
    Path("walk.html").write_text(drawing(prompt, words, steps, attention, (8, 8), dict(seed=0)), "utf-8")

Shapes: K blocks kept, N image tokens (rows x columns patches), L text tokens, W maps in one tensor;
images (3, height, width) in [-1, 1].
"""

import base64
import html
import io
import json

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dataset.images import to_picture
from viz.templates import fill_template, image_address

SIDE = 256              # pixels of an image on the page, at most
COARSE = 16             # patches a side where there are too many
MOST = 450_000          # numbers of attention on the page, where more are reduced
VIEW = '<figure><div><img {} alt=""><canvas></canvas></div><figcaption>{}</figcaption></figure>'


def inline(picture: Tensor) -> str:
    """A picture as an address of its own: PNG up to 64 pixels a side, WebP above, and 256 at most."""
    shown, content = to_picture(picture), io.BytesIO()
    shown.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)                       # a small one stays
    kind = "png" if max(shown.size) <= 64 else "webp"
    shown.save(content, kind, quality=80)
    return image_address(kind, content.getvalue())


def packed(maps: list[Tensor | None], grid: tuple[int, int], per: str) -> tuple[list, tuple[int, int], str]:
    """Pack maps (K, W, N), one per "step" or "word", for the page.  Return each as scales (K,) and base64 of
    K W N bytes, the grid that they have, and a note.

    A byte is 255 sqrt(p / scale), which keeps the weak beside the strong; scale is the greatest p of a block.
    Too many numbers are reduced: to the mean of the blocks, and to 16 patches a side.  Pooled patches show a
    step's mean, and the sum for a word, which attends to them."""
    reduced = sum(x.numel() for x in maps if x is not None) > MOST
    few, entries = grid, []
    note = (f" Attention: mean over heads, in 8 bits of its square root, scaled by the greatest of each {per}"
            " and block")
    if reduced:
        few = tuple(max(1, round(side * min(1, COARSE / max(grid)))) for side in grid)
        note += (f"; reduced: the mean of the blocks, pooled from {grid[0]} x {grid[1]} to {few[0]} x {few[1]}"
                 " patches")
    for x in maps:
        if x is None:
            entries.append(None)
            continue
        x = x.float()
        if reduced:
            x = F.adaptive_avg_pool2d(x.mean(0, True).unflatten(2, grid), few).flatten(2)
            if per == "word":
                x *= grid[0] * grid[1] / (few[0] * few[1])
        x = x.nan_to_num(0.0).clamp(min=1e-9)
        scales = x.amax((1, 2), True)
        content = (x / scales).sqrt().mul(255).round().byte().numpy().tobytes()
        entries.append(dict(scales=scales.flatten().tolist(), bytes=base64.b64encode(content).decode()))
    return entries, few, f"{note}." if any(entries) else ""


def drawing(prompt: str, words: list[str], steps: list[tuple[float, Tensor, Tensor]],
            attention: list[Tensor], grid: tuple[int, int], about: dict) -> str:
    """Return the page of an image being drawn.  about: settings, for one line.

    words: the prompt's L tokens as they are written, spaces too, "" for an end or padding: not shown.  steps:
    (t, x_t, the clean image predicted there) of each evaluation, and (0.0, x, x), the result.  attention:
    (K, N, L) of each evaluation, as `watching` reads words.  grid: (rows, columns) of patches."""
    shown = [i for i, word in enumerate(words) if word]
    maps, coarse, note = packed([x[..., shown].transpose(1, 2) for x in attention if shown], grid, "step")
    strip = "\n".join(f'<button><img src="{inline(x)}" alt=""><img src="{inline(clean)}" alt=""> {t:.2f}'
                      '</button>' for t, x, clean in steps)
    views = "".join(VIEW.format("", text) for text in ("x<sub>t</sub>", "x&#770;, clean as predicted there"))
    labels = [f"step {i} of {len(steps) - 1}, t = {t:.3f}" for i, (t, *_) in enumerate(steps[:-1], 1)]
    return filled("drawing", prompt, about, views, strip, note, [words[i] for i in shown],
                  maps=maps, grid=coarse, labels=labels + ["the result, t = 0"])


def writing(picture: Tensor | None, pieces: list[str], revealed: list[int], probability: list[float | None],
            attention: list[Tensor | None], grid: tuple[int, int], about: dict) -> str:
    """Return the page of a text being unmasked, the paper's Figure 2.

    pieces: the final L tokens as they are written, spaces too, "" for an end or padding.  revealed: the step
    at which each came, 0 where it was given; probability: its own at that moment, or None.  attention: each
    token's (K, N), its row as `watching` reads patches, or None.  picture: None for a text about none."""
    last = max(2, *revealed)
    maps = [None if x is None else x[:, None] for x in attention]                 # (K, 1, N) each
    maps, coarse, note = packed(maps, grid, "word")

    def tint(step: float) -> str:
        return f"hsl({220 + 170 * (step - 1) / (last - 1):.0f} 80% 55% / 0.38)" if step else ""
    view = "" if picture is None else VIEW.format(f'src="{inline(picture)}"', "the picture that is read")
    view += (f'<p id="legend" class="small">Written at step 1 <i style="background: linear-gradient(90deg, '
             f'{tint(1)}, {tint((1 + last) / 2)}, {tint(last)})"></i> {last}; plain: given</p>')
    known = []
    for step, p in zip(revealed, probability):
        certainty = "unknown" if p is None else f"{p:.3f}"
        known.append(f"step {step}, probability {certainty}" if step else "given")
    states, labels = [], []
    for now in sorted({0, *revealed}):
        states.append([None if step <= now else "[MASK]" for step in revealed])   # None: the final piece
        masked = sum(step > now for step in revealed)
        labels.append(f"step {now} of {max(revealed)}, {masked} masked")
    return filled("writing", "A text, step by step", about, view, "", note, pieces, labels=labels,
                  known=known, tints=list(map(tint, revealed)), states=states, maps=maps, grid=coarse)


def filled(kind: str, title: str, about: dict, views: str, strip: str, note: str, words: list[str],
           **data) -> str:
    """Fill in walk.html."""
    data = json.dumps(dict(data, words=[word.strip() for word in words]), separators=(",", ":"))
    buttons = []
    for word in words:
        space = " " if word.startswith(" ") else ""
        buttons.append(f"{space}<button>{html.escape(word.strip())}</button>")
    about = html.escape(" · ".join(f"{name} {value}" for name, value in about.items()))
    return fill_template("walk.html", kind=kind, title=html.escape(title), about=about, views=views,
                         strip=strip, note=note, words="".join(buttons), data=data.replace("<", "\\u003c"))
