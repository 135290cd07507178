"""A walk that can be seen: one html file of a picture being drawn, or of a text being written, with what the
network attended to at each step.  It opens from a file and can fetch nothing.

    with watching(mmdit, "words") as attention: ...   # (K, N, L) of each evaluation
    Path("walk.html").write_text(drawing(prompt, words, steps, attention, (8, 8), dict(seed=0)), "utf-8")

Shapes: B batch, H heads, K blocks kept, N image tokens (rows x columns patches), L text tokens, d size of a
head, W maps in one tensor; images (3, height, width) in [-1, 1].
"""

import base64
import html
import io
import json
import re
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dataset.images import to_picture
from model import MMDiT

SIDE = 256              # pixels of an image on the page, at most
COARSE = 16             # patches a side where there are too many
MOST = 450_000          # numbers of attention on the page, where more are reduced
NUMBERS = 4_000_000     # K N L that an evaluation keeps


@contextmanager
def watching(mmdit: MMDiT, reads: str) -> Iterator[list[Tensor]]:
    """Record in the list what the batch's first row attends to in each evaluation: softmax(q k' / sqrt(d)) in
    float32 and its mean over heads, float16 on the CPU.  What the network computes stays the same.

    reads: "words", each patch's to each token, (K, N, L), of evaluations that give a velocity; or "patches",
    each token's to each patch, (K, L, N), of those that give logits; those without an image add nothing.
    Where K N L is over 4 million the blocks are averaged, K = 1: an evaluation keeps at most 8 MB, or 2 N L
    bytes.  Not under torch.compile."""
    recorded, maps, patches = [], [], 0

    def start(_, args, named):
        nonlocal patches
        given = signature(mmdit.forward).bind(*args, **named).arguments
        latents = given["latents"]
        need = "logits" if given.get("kept") else given.get("need", "both")
        patches = 0
        if latents is not None and need in ("both", "velocity" if reads == "words" else "logits"):
            patches = latents.shape[2] * latents.shape[3] // mmdit.config.patch ** 2

    def end(*_):
        if patches:
            stacked = torch.stack(maps)                                           # (K, N, L) or (K, L, N)
            maps.clear()
            if stacked.numel() > NUMBERS:
                stacked = stacked.float().mean(0, True).half()
            recorded.append(stacked.cpu())

    def watched(attention):
        @torch.no_grad()
        def call(q, k, v):
            if patches:         # image first, then text; in the last block and in `read` only one's queries
                rows, columns = slice(patches), slice(patches - k.shape[2], None)
                if reads == "patches":
                    rows, columns = columns, rows
                with torch.autocast(q.device.type, enabled=False):
                    heads = (((a[rows].float() * a.shape[-1] ** -0.5) @ b.float().T).softmax(-1)[:, columns]
                             for a, b in zip(q[0], k[0]))        # one by one: N (N + L) numbers at a time
                    maps.append((sum(heads) / q.shape[1]).half())                 # (N, L) or (L, N)
            return attention(q, k, v)
        return call

    with ExitStack() as stack:
        stack.callback(mmdit.register_forward_pre_hook(start, with_kwargs=True).remove)
        stack.callback(mmdit.register_forward_hook(end).remove)
        for block in mmdit.blocks:
            block.attention = watched(block.attention)
            stack.callback(delattr, block, "attention")
        yield recorded


def inline(picture: Tensor) -> str:
    """A picture as an address of its own: PNG up to 64 pixels a side, WebP above, and 256 at most."""
    shown, content = to_picture(picture), io.BytesIO()
    shown.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)                       # a small one stays
    kind = "png" if max(shown.size) <= 64 else "webp"
    shown.save(content, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


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
    """Fill in the page.  Every text goes in by one pass, so that none can stand for another's place."""
    data = json.dumps(dict(data, words=[word.strip() for word in words]), separators=(",", ":"))
    shown = []
    for word in words:
        space = " " if word.startswith(" ") else ""
        shown.append(f"{space}<button>{html.escape(word.strip())}</button>")
    about = html.escape(" · ".join(f"{name} {value}" for name, value in about.items()))
    texts = dict(kind=kind, title=html.escape(title), about=about, views=views, strip=strip, note=note,
                 words="".join(shown), data=data.replace("<", "\\u003c"), style=STYLE, script=SCRIPT)
    return re.sub("@([a-z]+)@", lambda place: texts[place[1]], PAGE)


VIEW = '<figure><div><img {} alt=""><canvas></canvas></div><figcaption>{}</figcaption></figure>'
PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>@title@</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>@style@</style></head>
<body class="@kind@"><h1>@title@</h1><p class="small">@about@</p>
<div id="bar"><button id="play">&#9654;</button><input id="at" type="range" min="0" aria-label="step">
<output id="label"></output><select id="block" aria-label="block"><option value="">all blocks</select></div>
<main>@views@<div id="panel"><p id="words">@words@</p><p id="line" class="small"></p></div></main>
<div id="strip">@strip@</div><p class="small">Point to look, click to keep; arrows, space, Esc.@note@</p>
<script type="application/json" id="data">@data@</script><script>@script@</script></body></html>
"""
STYLE = """
:root { color-scheme: light dark; --faint: light-dark(#666, #a0a0a0); --mark: light-dark(#285ac8, #7ea6ff) }
body { font: 15px/1.4 sans-serif; max-width: 1080px; margin: 24px auto; padding: 0 12px; color:
  light-dark(#222, #e4e4e4); background: light-dark(#fff, #16181c); overflow-wrap: anywhere }
h1 { font-size: 22px } h1, figure { margin: 0 } figure div { position: relative; cursor: crosshair }
img { display: block; width: 100%; margin-bottom: 2px } img, canvas { image-rendering: pixelated }
canvas { position: absolute; inset: 0; width: 100%; height: 100% } #at { flex: 1 1 240px }
.small, figcaption, #strip, .mask { color: var(--faint); font-size: 13px; margin: 6px 0 }
#bar { display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: center } #line { min-height: 4em }
main { display: grid; gap: 8px 16px; margin: 16px 0; grid-template-columns: 1fr 1fr 0.9fr }
.writing main { grid-template-columns: 1fr 2fr } .writing #panel { grid-area: 1 / 2 / 3 }
#words { font-size: 20px; line-height: 1.75; margin: 0; white-space: pre-wrap } #words .mask { margin: 0 2px }
:where(main, #strip) button { all: unset; cursor: pointer; border-radius: 4px; padding: 2px 0 }
button.on, button:focus-visible { box-shadow: 0 0 0 2px var(--mark) } #legend i { display: inline-block;
  width: 100px; height: 12px } #strip { display: grid; gap: 6px; text-align: center;
  grid-template-columns: repeat(auto-fill, minmax(58px, 1fr)) }
@media (max-width: 720px) { main, .writing main { grid-template-columns: 1fr 1fr }
  #panel, .writing #panel, .writing figure, #legend { grid-area: auto / 1 / auto / -1 } }
"""
SCRIPT = """
const $ = id => document.getElementById(id), all = query => [...document.querySelectorAll(query)];
const page = JSON.parse($("data").textContent), words = page.words, draws = !page.states;
const [rows, columns] = page.grid, N = rows * columns, W = draws ? words.length : 1;
const part = (x, size, n) => Math.floor(x / (size + 1) * n), percent = p => (100 * p).toFixed(1) + " %";
const sum = values => values.reduce((a, b) => a + b, 0), last = page.labels.length - 1;
const maps = page.maps.map(map => map && { scales: map.scales,       // bytes: K x W x N, 255 sqrt(p / scale)
  bytes: Uint8Array.from(atob(map.bytes), letter => letter.charCodeAt(0)) });
let at = last, over = {}, pinned = {}, timer = 0, buttons = all("#words button");

function attention(w) {      // between word w and each patch, at this step, of a block or their mean; or []
  const map = draws ? maps.slice(0, at + 1).findLast(map => map) : maps[w], i = draws ? w : 0;
  const asked = $("block").value ? [$("block").value] : Object.keys(map ? map.scales : []);
  return [...Array(map ? N : 0)].map((_, n) => sum(asked.map(
    k => map.scales[k] * (map.bytes[(k * W + i) * N + n] / 255) ** 2)) / asked.length);
}
function point(element, what) {                  // pointing shows it; a click keeps it, or lets it go
  const look = now => { over = now; paint(); }, same = now => JSON.stringify(now) == JSON.stringify(pinned);
  element.onpointermove = element.onfocus = event => look(what(event));
  element.onpointerleave = element.onblur = () => look({});
  element.onclick = event => { pinned = same(what(event)) ? {} : what(event); look({}); };
}
function veil(canvas, clear) {                   // dark where `clear` is 0, nothing where it is greatest
  [canvas.width, canvas.height] = [columns, rows];
  const pen = canvas.getContext("2d"), most = Math.max(...clear);
  clear.forEach((p, n) => { pen.fillStyle = `rgb(8 12 40 / ${0.88 * (1 - p / most)})`;
    pen.fillRect(n % columns, Math.floor(n / columns), 1, 1); });
}
function paint() {
  const { word, patch } = Object.keys(over).length ? over : pinned, ps = word == null ? [] : attention(word);
  const share = ps => patch == null ? sum(ps) / N : ps[patch];
  const to = draws ? words.map((_, w) => share(attention(w)) || 0) : [], most = Math.max(...to);
  buttons.forEach((button, i) => {
    const then = draws ? null : page.states[at][i], masked = then == "[MASK]", alpha = 0.8 * to[i] / most;
    const colour = draws ? `rgb(240 140 30 / ${word == null ? alpha : 0})` : masked ? "none" : page.tints[i];
    const text = then ?? words[i], title = page.known?.[i] ?? percent(to[i]);
    Object.assign(button, { textContent: text, title, disabled: !text, style: "background:" + colour,
      className: (masked ? "mask " : "") + (i == word ? "on" : "") });
  });
  const clear = patch == null ? ps : [...Array(N)].map((_, n) => n == patch ? 1 : 0.5);
  all("canvas").forEach(canvas => veil(canvas, clear));
  all("#strip button").forEach((frame, i) => frame.className = i == at ? "on" : "");
  if (draws) all("figure img").forEach((view, i) => view.src = $("strip").children[at].children[i].src);
  const mean = `${patch == null ? "On average a" : "This"} patch attends ${percent(sum(to))} to these words`;
  const said = word == null ? (to.length ? mean : "") : `\u201c${words[word]}\u201d: ` +
    (page.known?.[word] ?? `up to ${percent(Math.max(...ps))} of a patch's attention`);
  [$("label").textContent, $("line").textContent, $("at").value] = [page.labels[at], said, at];
}
const go = to => { at = Math.min(last, Math.max(0, to)); paint(); };
function play() {
  timer = timer ? clearInterval(timer) : setInterval(() => go(at < last ? at + 1 : 0), 4000 / last + 80);
  $("play").textContent = timer ? "\u275a\u275a" : "\u25b6";
}
buttons.forEach((button, word) => point(button, () => ({ word })));
if (W) all(".drawing figure div").forEach(div => point(div, ({ offsetX: x, offsetY: y }) => ({
  patch: columns * part(y, div.clientHeight, rows) + part(x, div.clientWidth, columns) })));
all("#strip button").forEach((frame, i) => frame.onclick = () => go(i));
(maps.find(map => map)?.scales ?? []).forEach((_, k) => $("block").add(new Option(`block ${k + 1}`, k)));
Object.assign($("at"), { max: last, oninput: () => go(Number($("at").value)) });
Object.assign($("block"), { hidden: $("block").length < 3, onchange: paint }), $("play").onclick = play;
const free = () => { pinned = over = {}; paint(); };
const keys = { ArrowLeft: () => go(at - 1), ArrowRight: () => go(at + 1), " ": play, Escape: free };
document.onkeydown = event => {                  // a list and a pressed button have keys of their own
  const own = { SELECT: true, BUTTON: event.key == " " }[event.target.tagName];
  if (keys[event.key] && !own && !event.altKey) { event.preventDefault(); keys[event.key](); }
};
paint();
"""
