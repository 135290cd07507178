"""Draw pictures from text, and text from pictures.

    python sample.py --prompt "red apple, noto style" --out apple.png       # text -> picture
    python sample.py --image apple.png                                      # picture -> caption
    python sample.py --image apple.png --question "What kind of thing is this?"
    python sample.py --image apple.png --text "red [MASK], [MASK] style"    # fills the masks and nothing else

Without --checkpoint the weights in assets/emoji are used; they were trained by train.py.  With it, any layout
that checkpoint.py reads, D-DiT's releases and SD3 among them:

    python sample.py --checkpoint dual_diff_sd3_512_base --prompt "a red fox" --height 512 --width 768

The same seed gives the same result.  --trajectory FILE.gif shows the picture form, or the text appear.

Shapes: B batch, L tokens, E width of text states, H and W height and width in pixels.
"""

import cli
cli.interruptible(__name__)

import argparse
import itertools
import math
import sys
import time
from pathlib import Path
from typing import Iterator

import torch
from PIL import Image
from torch import Tensor

import data
import flow
import mask_diffusion
import show
from cli import require
from parts import EMOJI, Parts
from pictures import fit_picture, read_picture, to_tensor

MAX_MASK_TOKENS = 3      # a [MASK] of --text stands for one to three tokens
STEPS = dict(draw=28, text=128, answer=32)


def watched(parts: Parts, function, evaluations: int, what: str):
    """The function, and every two seconds a line on stderr of how far it is; none while a run trains."""
    calls, started, said = 0, time.time(), time.time()

    def call(*args):
        nonlocal calls, said
        result, calls = function(*args), calls + 1
        if time.time() - said > 2:
            rate, said = calls / (time.time() - started), time.time()
            print(f"{what}: {calls}/{evaluations} evaluations, {rate:.2f}/s, "
                  f"{max(0, evaluations - calls) / rate:.0f} s left", file=sys.stderr, flush=True)
        return result
    return function if parts.trains else call


@torch.no_grad()
def drawings(parts: Parts, prompts: list[str], negative: str = "", steps: int = STEPS["draw"],
             guidance: float | None = None, seed: int = 0, shift: float | None = None,
             trajectory: list | None = None) -> Iterator[Tensor]:
    """A picture for each prompt, one after the other, (3, H, W) in [-1, 1] on the CPU.  They are walked in
    batches of 16, of large models 4, and decoded one at a time; the batch changes no picture's noise.

    trajectory, when given, is filled in the end with the predicted clean pictures of every step, (B, 3, H, W)
    each."""
    guidance = parts.defaults["guidance"] if guidance is None else guidance
    shift = parts.defaults["shift"] if shift is None else shift
    parts.hold("text")
    texts = list(dict.fromkeys([*prompts, negative]))
    states = parts.text(torch.stack([parts.tokenizer.encode(text, parts.length) for text in texts]).to(
        parts.device))                                                            # (n, L, E)
    parts.hold("mmdit")
    shape = parts.sizes.channels, parts.height // parts.factor, parts.width // parts.factor
    size, generator = 16 if parts.own else 4, torch.Generator().manual_seed(seed)
    model = watched(parts, lambda x, text, t: parts.mmdit(x, text, t, need="velocity")[0].float(),
                    steps * math.ceil(len(prompts) / size), "drawing")
    clean, walks = [], []
    for some in (prompts[at:at + size] for at in range(0, len(prompts), size)):
        rows = [texts.index(text) for text in some + [negative] * len(some) * (guidance != 1)]
        noise = torch.randn(len(some), *shape, generator=generator).to(parts.device)
        velocity = lambda x, t: model(x, states[rows], t)                         # of B or 2B rows
        walks.append([])
        clean += flow.euler(velocity if guidance == 1 else flow.guide(velocity, guidance), noise,
                            flow.sigmas(steps, shift), None if trajectory is None else walks[-1])
    parts.hold("vae")
    decode = lambda z: parts.vae.decode(z[None])[0].float().cpu()                 # (3, H, W)
    for z in clean:
        yield decode(z).clamp(-1, 1)
    if trajectory is not None:
        trajectory[:] = [torch.stack(list(map(decode, torch.cat(step)))) for step in zip(*walks)]


def draw(parts: Parts, prompts: list[str], *args, **how) -> Tensor:
    """`drawings` as one tensor, (B, 3, H, W)."""
    return torch.stack(list(drawings(parts, prompts, *args, **how)))


def encode(parts: Parts, images: Tensor, seed: int | None = None) -> Tensor:
    """Clean latents of images (B, 3, H, W): the posterior's mean, or with a seed a draw from it."""
    parts.hold("vae")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    z = parts.vae.encode(images.to(parts.device), generator).to(parts.dtype)
    parts.hold("text", "mmdit")
    return z


def logits(parts: Parts, latents: Tensor):
    """The text half of the model given clean latents (B, C, h, w): ids (n, L) of some rows -> (n, L, V)."""
    clean = torch.zeros(1, device=parts.device)
    return lambda ids, rows=slice(None): parts.mmdit(latents[rows], parts.text(ids), clean, need="logits")[1]


@torch.no_grad()
def fill(parts: Parts, latents: Tensor, ids: Tensor, steps: int = STEPS["text"],
         temperature: float | None = None, seed: int = 0, order: str | None = None,
         trajectory: list | None = None) -> Tensor:
    """Replace every [MASK] of ids (B, L) given clean latents (B, C, h, w); everything else stays.

    order: "random", the paper's walk, or "confidence", the surest token first (`mask_diffusion.walk`)."""
    temperature = parts.defaults["temperature"] if temperature is None else temperature
    evaluations = min(steps, int((ids == parts.tokenizer.mask_id).sum(1).max()))
    function = watched(parts, logits(parts, latents), evaluations, "reading")
    return mask_diffusion.sample(function, ids.to(parts.device), parts.tokenizer.mask_id, steps,
                                 torch.Generator().manual_seed(seed), temperature, trajectory,
                                 order or parts.defaults["order"], by_row=True).cpu()


def write(parts: Parts, images: Tensor, question: str | list[str] | None = None,
          max_tokens: int | None = None, posterior: str = "mean", seed: int = 0, **how) -> list[str]:
    """A caption for each picture (B, 3, H, W); with a question (or one for each), its answer.

    posterior: what the autoencoder gives, "mean" or a "draw" as in the published code.  `how` goes to `fill`.
    """
    questions = question if isinstance(question, list) else [question] * len(images)
    ids = torch.stack([canvas(parts, q, max_tokens) for q in questions])          # (B, L)
    starts = [0 if q is None else len(parts.tokenizer.pieces(data.question_prompt(q))) for q in questions]
    latents = encode(parts, images, seed if posterior == "draw" else None)
    filled = fill(parts, latents, ids, seed=seed, **how)
    return [parts.tokenizer.decode(row[start:]) for row, start in zip(filled, starts)]


def canvas(parts: Parts, question: str | None = None, max_tokens: int | None = None) -> Tensor:
    """What a caption or an answer is written on, (L,): the prompt, [MASK]s, and padding past max_tokens."""
    tokenizer = parts.tokenizer
    prompt = [] if question is None else tokenizer.pieces(data.question_prompt(question))
    room = (parts.length if question is None else parts.answer_length) - len(prompt)
    require((room > 0, f"the question has {len(prompt)} tokens and leaves no room for an answer: this model "
             f"reads {parts.answer_length}"))
    masks = room if max_tokens is None else min(room, max_tokens)
    return torch.tensor(prompt + [tokenizer.mask_id] * masks + [tokenizer.pad_id] * (room - masks))


def cuts(parts: Parts, text: str) -> tuple[Tensor, list[tuple[int, ...]]]:
    """A text with up to two [MASK]s in all ways that give each 1 to 3 tokens, (n, L), and those numbers; more
    get one each.

    A [MASK] takes the space before it along, as GPT-2's tokens do.  Raises UserError for too long a text."""
    first, *others = text.replace(" [MASK]", "[MASK]").split("[MASK]")
    pieces = [parts.tokenizer.pieces(first)] + [parts.tokenizer.continuation(other) for other in others]
    masks, rows, widths = len(others), [], []
    for cut in itertools.product(range(1, 1 + (MAX_MASK_TOKENS if masks <= 2 else 1)), repeat=masks):
        ids = list(pieces[0])
        for width, piece in zip(cut, pieces[1:]):
            ids += [parts.tokenizer.mask_id] * width + piece
        if len(ids) < parts.length:
            rows.append(parts.tokenizer.fit(ids, parts.length))
            widths.append(cut)
    count, most = sum(map(len, pieces)) + masks, parts.length - 1
    require((count <= most, f"--text has {count} tokens, expected at most {most}"))
    return torch.stack(rows), widths


def written(parts: Parts, text: str, words: list[Tensor]) -> str:
    """A text with words, as ids (n,), in the place of its [MASK]s.  What was given stays as it was written,
    also where the tokenizer has no piece for it."""
    said, *others = text.split("[MASK]")
    for ids, other in zip(words, others, strict=True):
        word = parts.tokenizer.behind(ids)
        said += (word.lstrip(" ") if said[-1:] in ("", " ") else word) + other
    return said


@torch.no_grad()
def infill(parts: Parts, image: Tensor, text: str, posterior: str = "mean", seed: int = 0,
           trajectory: list | None = None, **how) -> str:
    """Fill the [MASK]s of a text about one picture (3, H, W).

    All ways to cut the masks into tokens are filled as one batch, and the likeliest is kept: by the bound of
    `mask_diffusion.loss`, averaged over 64 levels of masking (16 for large models)."""
    rows, widths = cuts(parts, parts.tokenizer.lowered(text))                     # (n, L)
    latents = encode(parts, image[None], seed if posterior == "draw" else None)
    filled = fill(parts, latents.expand(len(rows), -1, -1, -1), rows, seed=seed, trajectory=trajectory, **how)
    levels, mask_id = 64 if parts.own else 16, parts.tokenizer.mask_id
    function = logits(parts, latents.expand(levels, -1, -1, -1))
    bound = lambda row: float(mask_diffusion.loss(function, row.expand(levels, -1).to(parts.device), mask_id,
                                                  generator=torch.Generator().manual_seed(0)))
    best = min(range(len(filled)), key=lambda i: bound(filled[i])) if len(filled) > 1 else 0
    if trajectory is not None:
        trajectory[:] = [(step[best:best + 1], ids[best:best + 1]) for step, ids in trajectory]
    words = filled[best][rows[best] == mask_id].split(widths[best])
    return written(parts, text, words)


def results(parts: Parts, prompts: list[str], captions: list[str], images: Tensor) -> Image.Image:
    """Two columns: prompts with what is drawn for them, and images (B, 3, H, W) with the caption that is
    written, above the true one."""
    drawn, said = draw(parts, prompts), write(parts, images)
    return show.page([(image, [f"drawn: {text}"]) for image, text in zip(drawn, prompts)],
                     [(image, [f"read: {text}", f"true: {true}"])
                      for image, text, true in zip(images, said, captions)])


# ------------------------------------------------------------------------------------------------ the command

def flags() -> tuple[cli.Parser, dict[str, str]]:
    """The parser, and for each flag that one of the two ways has alone, the flag it goes with."""
    parser, goes_with = cli.Parser(__doc__), {}

    def add(name: str, mode: str = "", **how) -> None:
        parser.add_argument(name, default=argparse.SUPPRESS, **how)
        if mode:
            goes_with[name.removeprefix("--").replace("-", "_")] = mode
    above = dict(type=cli.number(float, 0.001), metavar="X")
    count = lambda low, text: dict(type=cli.number(int, low), metavar="N", help=text)
    add("--prompt", help="draw this")
    add("--image", type=Path, help="caption this picture, or answer about it, or complete --text about it")
    add("--negative-prompt", "--prompt", help="guide away from this, not from the empty prompt")
    add("--n", "--prompt", **count(1, "pictures drawn, as one grid (1)"))
    add("--guidance", "--prompt", **above, help="classifier-free guidance; 1: none (4; published weights: 7)")
    add("--shift", "--prompt", **above, help="shift of the noise levels; 1: none (1; published weights: 3)")
    add("--out", "--prompt", type=Path, help="where the picture goes (sample.png)")
    add("--question", "--image", help="what to answer")
    add("--text", "--image", help="a text whose [MASK]s to fill")
    add("--temperature", "--image", type=cli.number(float, 0), metavar="X",
        help="0 takes the likeliest token, 1 samples (0; published weights: 1)")
    add("--order", "--image", choices=mask_diffusion.ORDERS, help="of unmasking: the surest token first; or "
        "random, which with --temperature 1 is the paper's sampler (confidence; published weights: random)")
    add("--posterior", "--image", choices=["mean", "draw"], help="what the autoencoder gives (mean)")
    add("--max-tokens", "--image", **count(1, "longest caption or answer"))
    add("--steps", **count(1, "of the walk: 28 to draw, 128 for a text, 32 to answer"))
    add("--seed", type=cli.number(int, 0, 2**63 - 1), metavar="N", help="the same seed, the same result (0)")
    add("--trajectory", type=Path, help="a .gif of the picture forming, or of the text being unmasked")
    add("--checkpoint", type=Path, help="any layout (the shipped emoji weights)")
    add("--device", choices=["auto", "cpu", "cuda"], help="(auto)")
    add("--dtype", choices=["float32", "bfloat16"], help="of transformer and T5 (bfloat16 if published)")
    add("--height", **count(1, "of the picture (as trained; published weights: 512)"))
    add("--width", **count(1, "of the picture (as trained; published weights: 512)"))
    add("--length", **count(2, "tokens of a text (as trained; published weights: 256, with --question 128)"))
    add("--vae", type=Path, help="where the autoencoder is, if not in --checkpoint")
    add("--t5", type=Path, help="where T5 is, if not in --checkpoint")
    add("--tokenizer", type=Path, help="where T5's tokenizer.json is, if not in --checkpoint")
    add("--mask-embedding", type=Path, help="the aligned [MASK] embedding, a .pth or .safetensors file")
    return parser, goes_with


def parse(argv: list[str] | None = None) -> dict:
    """The flags that were given, checked against each other."""
    parser, goes_with = flags()
    args = vars(parser.parse_args(argv))
    if ("prompt" in args) == ("image" in args):
        parser.error("give --prompt TEXT to draw, or --image FILE to read a picture, and not both")
    if "question" in args and "text" in args:
        parser.error("give --question or --text, not both")
    for name, mode in goes_with.items():
        if name in args and mode.removeprefix("--") not in args:
            parser.error(f"{cli.flag(name)} changes nothing without {mode}")
    if "max_tokens" in args and "text" in args:
        parser.error("--max-tokens changes nothing with --text, which is as long as it is")
    for name, use in dict(prompt="draw", question="ask", text="fill").items():
        if not args.get(name, "x").strip():
            parser.error(f"--{name} is empty; write what to {use}")
    if "[MASK]" not in args.get("text", "[MASK]"):
        parser.error("--text holds no [MASK]; write [MASK] where words are missing")
    pictures = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    for name, kinds, such in (("out", pictures, ".png"), ("trajectory", {".gif"}, ".gif")):
        path = args.get(name, Path(f"sample{such}"))
        if not path.parent.is_dir():
            parser.error(f"--{name} {path}: the folder {path.parent} does not exist")
        if path.suffix.lower() not in kinds:
            parser.error(f"--{name} {path}: expected a picture's name, such as {path.stem}{such}")
    return args


def heard(parts: Parts, name: str, text: str) -> str:
    """What the model reads of a flag's text: in lower case what no caption that it learnt capitalises.  That,
    and words that it never met, are said on stderr."""
    tokenizer, asked = parts.tokenizer, name == "question"
    read = text if asked else tokenizer.lowered(text)
    if read != text:
        print(f"note: {cli.flag(name)} is read as {read!r}, as captions were written in training",
              file=sys.stderr)
    given = [data.question_prompt(read)] if asked else read.replace(" [MASK]", "[MASK]").split("[MASK]")
    if words := [word for text in given for word in tokenizer.strange(text)]:
        why = "no text in training had" if tokenizer.seen is not None else "the tokenizer has no piece for"
        print(f"warning: {cli.flag(name)}: {why} {' '.join(words)}", file=sys.stderr)
    return read


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    take = lambda *names: {name: args[name] for name in names if name in args}
    device = cli.device(args.get("device", "auto"))
    image = read_picture(args["image"]) if "image" in args else None     # a bad file, before a slow load
    dtype = getattr(torch, args["dtype"]) if "dtype" in args else None
    parts = Parts(args.get("checkpoint", EMOJI), device, dtype,
                  **take("vae", "t5", "tokenizer", "mask_embedding", "height", "width", "length"))
    states, out = [] if "trajectory" in args else None, args.get("out", Path("sample.png"))
    if parts.trained and (parts.height, parts.width) not in parts.trained:
        print(f"warning: a height of {parts.height} and a width of {parts.width}; these weights have learnt "
              f"pictures of {' by '.join(map(str, parts.trained[0]))}, and may show tiles at another size",
              file=sys.stderr)

    texts = {name: heard(parts, name, text) for name, text in take(
        "prompt", "negative_prompt", "question", "text").items()}

    if "prompt" in args:
        for name, text in texts.items():
            count, most = len(parts.tokenizer.pieces(text)), parts.length - 1
            require((count <= most, f"{cli.flag(name)} has {count} tokens, expected at most {most}; cut it"))
        drawn = drawings(parts, [texts["prompt"]] * args.get("n", 1), texts.get("negative_prompt", ""),
                         trajectory=states, **take("steps", "guidance", "seed", "shift"))
        show.write_picture(out, show.grid(drawn))
        print(out)
        if states:
            show.write_picture(args["trajectory"], *map(show.grid, states))
        return

    longest = args.get("max_tokens", 1)
    require((parts.family != "SD3", "this checkpoint is SD3's, which has no text head: it only draws"),
            (longest <= parts.length, f"--max-tokens {longest}: expected at most {parts.length}"))
    pixels = to_tensor(fit_picture(image, parts.height, parts.width))
    steps = args.get("steps", STEPS["answer" if "question" in args else "text"])
    how = take("temperature", "order", "seed", "posterior") | dict(steps=steps, trajectory=states)
    if "text" in args:
        print(infill(parts, pixels, args["text"], **how))
    else:
        print(write(parts, pixels[None], **take("question", "max_tokens"), **how)[0])
    if states:
        steps = steps if args.get("order", parts.defaults["order"]) == "random" else int(states[-1][0][0])
        show.write_picture(args["trajectory"], *[show.text_frame(parts.tokenizer, ids[0], int(step[0]), steps)
                                                 for step, ids in states])


if __name__ == "__main__":
    cli.run(main)
