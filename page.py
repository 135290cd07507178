"""A walk that can be seen: one html file of a picture being drawn, or of a text being written, with what the
network attended to at each step.  It opens from a file and can fetch nothing.

    with watching(mmdit, patches=64, reads="words") as attention: ...   # (K, N, L) of each evaluation
    Path("walk.html").write_text(drawing(prompt, words, steps, attention, (8, 8), dict(seed=0)), "utf-8")

Shapes: B batch, H heads, K blocks kept, N image tokens (rows x columns patches), L text tokens, d size of a
head, W maps in one tensor; pictures (3, height, width) in [-1, 1].
"""

import base64
import html
import io
import json
import re
from contextlib import ExitStack, contextmanager
from typing import Iterator, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model import MMDiT
from pictures import to_picture

SIDE, COARSE = 256, 16  # pixels of a picture on the page, at most; patches a side where there are too many
MOST, NUMBERS = 600_000, 4_000_000    # characters of attention on the page; K N L that an evaluation keeps


@contextmanager
def watching(mmdit: MMDiT, patches: int, reads: str,
             chosen: list[int] | None = None) -> Iterator[list[Tensor]]:
    """While it lasts, each evaluation adds to the list what the batch's first row attended to, softmax(q k' /
    sqrt(d)) in float32 and its mean over heads, float16 on the CPU; what the network computes stays the same.

    reads: "words", each patch's to each token, (K, N, L), of evaluations that give a velocity; or "patches",
    each token's to each patch, (K, L, N), of those that give logits; those without a picture add nothing.
    chosen: the blocks kept, all by default.  Where K N L is over 4 million they are averaged, K = 1: an
    evaluation keeps at most 8 MB, or 2 N L bytes.  Not under torch.compile.  Raises ValueError."""
    if reads not in ("words", "patches"):
        raise ValueError(f"reads is {reads!r}, expected \"words\" or \"patches\"")
    blocks = list(mmdit.blocks) if chosen is None else [mmdit.blocks[k] for k in chosen]
    found, seen, wanted = [], {}, False

    def start(_, args, named):
        nonlocal wanted
        given = dict(zip(("latents", "text", "t", "need", "at", "kept"), args)) | named
        z, need = given["latents"], "logits" if given.get("kept") else given.get("need", "both")
        wanted = z is not None and need in ("both", "velocity" if reads == "words" else "logits")
        if wanted and patches != (there := z.shape[2] * z.shape[3] // mmdit.config.patch ** 2):
            raise ValueError(f"a picture of {there} patches, watching expects {patches}")

    def end(*_):
        if wanted:
            maps = torch.stack([seen.pop(i) for i in range(len(blocks))])         # (K, N, L) or (K, L, N)
            found.append((maps.float().mean(0, True).half() if maps.numel() > NUMBERS else maps).cpu())

    def watched(i, attention):
        @torch.no_grad()
        def call(q, k, v):
            if wanted:          # image first, then text; in the last block and in `read` one's queries alone
                both = slice(patches), slice(patches - k.shape[2], None)
                rows, columns = both if reads == "words" else both[::-1]
                with torch.autocast(q.device.type, enabled=False):
                    heads = (((a[rows].float() * a.shape[-1] ** -0.5) @ b.float().T).softmax(-1)[:, columns]
                             for a, b in zip(q[0], k[0]))        # one by one: N (N + L) numbers at a time
                    seen[i] = (sum(heads) / q.shape[1]).half()                    # (N, L) or (L, N)
            return attention(q, k, v)
        return call

    with ExitStack() as stack:
        stack.callback(mmdit.register_forward_pre_hook(start, with_kwargs=True).remove)
        stack.callback(mmdit.register_forward_hook(end).remove)
        for i, block in enumerate(blocks):
            own = vars(block).get("attention")
            stack.callback(*(setattr, block, "attention", own) if own else (delattr, block, "attention"))
            block.attention = watched(i, block.attention)
        yield found


def inline(picture: Tensor) -> str:
    """A picture as an address of its own: PNG up to 64 pixels a side, WebP above, and 256 at most."""
    shown, content = to_picture(picture), io.BytesIO()
    shown.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)                       # a small one stays
    kind = "png" if max(shown.size) <= 64 else "webp"
    shown.save(content, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def packed(maps: Sequence[Tensor | None], shape: tuple[int, int], grid: tuple[int, int],
           per: str) -> tuple[list, tuple[int, int], str]:
    """Maps (K, W, N), one per "step" or "word", for the page: (each as scales (K,) and base64 of K W N bytes,
    the grid that they are of, what was done to them).  Raises ValueError where (W, N) is another shape.

    A byte is 255 sqrt(p / scale), which keeps the weak beside the strong; scale is the greatest p of a block.
    Of patches pooled a step has the mean, a word, which attends to them, the sum."""
    if wrong := {tuple(x.shape[1:]) for x in maps if x is not None} - {shape}:
        raise ValueError(f"attention of {wrong} (words, patches), expected {shape}, of a grid of {grid}")
    done, every = [], lambda function: [None if x is None else function(x) for x in maps]
    size = lambda: sum(x.numel() for x in maps if x is not None) * 4 / 3
    few = tuple(max(1, round(side * min(1, COARSE / max(1, *grid)))) for side in grid)
    if size() > MOST and few != grid:
        times = shape[1] / (few[0] * few[1]) if per == "word" else 1
        maps = every(lambda x: F.adaptive_avg_pool2d(x.float().unflatten(2, grid), few).flatten(2) * times)
        done, grid = [f"pooled from {grid[0]} x {grid[1]} to {few[0]} x {few[1]} patches"], few
    if size() > MOST and any(x is not None and len(x) > 1 for x in maps):
        maps = every(lambda x: x.float().mean(0, True))
        done += ["the mean of the blocks alone"]
    if (apart := int(size() // MOST) + 2) > 2:                   # not + 1, for the first is always kept
        maps = [x if i % apart == 0 else None for i, x in enumerate(maps)]
        done += [f"of one {per} in {apart}"]
    maps = every(lambda x: x.float().nan_to_num(0.0).clamp(min=1e-9))
    levels = lambda x: (x / x.amax((1, 2), True)).sqrt().mul(255).round().byte().numpy().tobytes()
    found = every(lambda x: dict(scales=x.amax((1, 2)).tolist(), bytes=base64.b64encode(levels(x)).decode()))
    kept = f" Attention: mean over heads, in 8 bits of its square root, scaled by the greatest of each {per}"
    return found, grid, "; reduced: ".join([f"{kept} and block", *done]) + "." if any(found) else ""


def drawing(prompt: str, words: list[str], steps: list[tuple[float, Tensor, Tensor]],
            attention: list[Tensor | None] | None, grid: tuple[int, int], about: dict) -> str:
    """The page of a picture being drawn.  about: settings, for one line.  Raises ValueError for a misfit.

    words: the prompt's L tokens as they are written, spaces too, "" for an end or padding: not shown.  steps:
    (t, x_t, the clean picture predicted there) of each evaluation, and (0.0, x, x), the result.  attention:
    (K, N, L) of each evaluation, as `watching` reads words, or None.  grid: (rows, columns) of patches."""
    maps, shown = list(attention or []), [i for i, word in enumerate(words) if word]
    if len(maps) not in (0, len(steps), len(steps) - 1) or any(
            x.shape[2] != len(words) for x in maps if x is not None):
        raise ValueError(f"attention of {len(maps)} steps, expected {len(steps)}, of {len(words)} words each")
    maps = [None if x is None else x[..., shown].transpose(1, 2) for x in maps if shown]
    maps, coarse, done = packed(maps, (len(shown), grid[0] * grid[1]), grid, "step")
    strip = "\n".join(f'<button><img src="{inline(x)}" alt=""><img src="{inline(clean)}" alt=""> {t:.2f}'
                      '</button>' for t, x, clean in steps)
    views = "".join(VIEW.format("", text) for text in ("x<sub>t</sub>", "x&#770;, clean as predicted there"))
    labels = [f"step {i} of {len(steps) - 1}, t = {t:.3f}" for i, (t, *_) in enumerate(steps[:-1], 1)]
    return filled("drawing", prompt, about, views, strip, steps[0][1], done, [
        words[i] for i in shown if any(maps)], maps=maps, grid=coarse, labels=labels + ["the result, t = 0"])


def writing(picture: Tensor | None, pieces: list[str], revealed: list[int], probability: list[float | None],
            attention: list[Tensor | None] | None, grid: tuple[int, int] | None, about: dict) -> str:
    """The page of a text being unmasked, the paper's Figure 2.  Raises ValueError for a misfit.

    pieces: the final L tokens as they are written, spaces too, "" for an end or padding.  revealed: the step
    at which each came, 0 where it was given; probability: its own at that moment, or None.  attention: each
    token's (K, N), its row as `watching` reads patches, or None.  picture, grid: None for a text about no picture."""
    L, attention, grid, last = len(pieces), list(attention or []), grid or (0, 0), max(2, *revealed)
    if {len(revealed), len(probability), len(attention) or L} != {L}:
        raise ValueError(f"{L} pieces need as many of revealed, probability and attention")
    states = [(step, [piece if when <= step else "[MASK]" for piece, when in zip(pieces, revealed)])
              for step in sorted({0, *revealed})]
    maps = [None if x is None else x[:, None] for x in attention]                 # (K, 1, N) each
    maps, coarse, done = packed(maps, (1, grid[0] * grid[1]), grid, "word")
    tint = lambda step: f"hsl({220 + 170 * (step - 1) / (last - 1):.0f} 80% 55% / 0.38)" if step else ""
    view = "" if picture is None else VIEW.format(f'src="{inline(picture)}"', "the picture that is read")
    view += (f'<p id="legend" class="small">Written at step 1 <i style="background: linear-gradient(90deg, '
             f'{tint(1)}, {tint((1 + last) / 2)}, {tint(last)})"></i> {last}; plain: given</p>')
    known = [f"step {step}, probability {'unknown' if p is None else f'{p:.3f}'}" if step else "given"
             for step, p in zip(revealed, probability)]
    labels = [f"step {step} of {states[-1][0]}, {ids.count('[MASK]')} masked" for step, ids in states]
    states = [[None if a == b else a.strip() for a, b in zip(ids, pieces)] for _, ids in states]
    return filled("writing", "A text, step by step", about, view, "", picture, done, pieces, labels=labels,
                  known=known, tints=list(map(tint, revealed)), states=states, maps=maps, grid=coarse)


def filled(kind: str, title: str, about: dict, views: str, strip: str, picture: Tensor | None, note: str,
           words: list[str], **data) -> str:
    """The page.  Every text goes in by one pass, so that none can stand for another's place."""
    if picture is not None and max(picture.shape[1:]) > SIDE:
        note = f" Pictures: of {picture.shape[2]} x {picture.shape[1]}, shrunk to {SIDE} pixels.{note}"
    data = json.dumps(dict(data, words=[word.strip() for word in words]), separators=(",", ":"))
    shown = [" " * word.startswith(" ") + f"<button>{html.escape(word.strip())}</button>" for word in words]
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
