"""Draw pictures from text, and text from pictures.

    python sample.py --prompt "red apple, noto style" --out apple.png       # text -> picture
    python sample.py --image apple.png                                      # picture -> caption
    python sample.py --image apple.png --question "What kind of thing is this?"
    python sample.py --image apple.png --text "red [MASK], [MASK] style"    # fills the masks and nothing else
    python sample.py --image apple.png --question "Is this food?" --choices yes no     # which is likelier
    python sample.py --image apple.png --score "red apple, noto style"      # how likely it is
    python sample.py --image apple.png pear.png --questions questions.txt   # all of them about each
    python sample.py --image apple.png --strength 0.6 --prompt "green apple, noto style"    # drawn over it
    python sample.py --image apple.png --mask mask.png --prompt "red apple, noto style"    # where it is white
    python sample.py --prompts prompts.txt --out drawn                      # a line each, into a folder

Without --checkpoint the weights in assets/emoji are used; they were trained by train.py.  With it, any layout
that checkpoint.py reads, D-DiT's releases and SD3 among them:

    python sample.py --checkpoint dual_diff_sd3_512_base --prompt "a red fox" --height 512 --width 768

The same seed gives the same result.  --trajectory FILE.gif shows the picture form, or the text appear, and
FILE.html, for a browser, what the network looks at meanwhile.

Shapes: B batch, L tokens, E width of text states, H and W height and width in pixels.
"""

from common import cli
cli.interruptible(__name__)

import argparse
import math
import sys
from pathlib import Path
from typing import Iterator

import torch
from PIL import Image
from torch import Tensor

import mask_diffusion
from common.cli import UserError, require
from common.devices import choose_device
from common.files import write_text
from dataset.images import fit_picture, read_mask, read_picture, to_tensor
from inference import image_folder
from inference.image_to_text import STEPS, encode, infill, ranked, write
from inference.options import (READS, check_prompt, draw_flags, open_parts, part_flags, read_flags,
                               read_text, reads, walk)
from inference.parts import Parts
from inference.text_to_image import Edit, Seen, drawings, likeliest
from viz import grids, trajectory


# ------------------------------------------------------------------------------------------------ the command

RENAMED = {"--refresh": "--image-cache", "--separate": "--prompts", "--tokens-per-step": "--steps",
           "--top-p": "--temperature", "--vary": "--strength"}


def flags() -> tuple[cli.Parser, dict[str, str]]:
    """The parser, and for each flag that some of the ways have alone, the flags it goes with."""
    parser, goes_with = cli.Parser(__doc__, RENAMED), {}

    def add(name: str, mode: str = "", **how) -> None:
        parser.add_argument(name, default=argparse.SUPPRESS, **how)
        if mode:
            goes_with[name.removeprefix("--").replace("-", "_")] = mode
    draw_flags(add)
    read_flags(add)
    add("--trajectory", type=Path, help="a .gif of the picture forming, x_t beside the predicted one, or of "
        "the text being unmasked; or an .html page of it, with what the network looks at")
    part_flags(add)
    return parser, goes_with


# how a text is written
WRITES = [*READS, "text_guidance", "max_tokens", "seed"]
# of these at most one
APART = [("text", "question", "questions", "score", "chat"), ("choices", "score", "text"),
         ("trajectory", "questions", "score", "choices", "chat", "prompts"),
         ("prompt", "prompts", "text"), ("prompts", "image")]


def parse(argv: list[str] | None = None) -> dict:
    """The flags that were given, checked against each other."""
    parser, goes_with = flags()
    args = vars(parser.parse_args(argv))
    if not {"prompt", "prompts", "image", "text"} & set(args):
        parser.error("give --prompt TEXT to draw, or --image FILE to read a picture")
    pictures, edits = len(args.get("image", [])), {"image", "prompt"} <= set(args)
    if edits and not {"strength", "mask"} & set(args):
        parser.error("--prompt with --image draws over it: say from which noise level, --strength 0.7, or "
                     "where, --mask FILE")
    for group in APART:
        given = [cli.flag(name) for name in group if name in args]
        if len(given) > 1 and given != ["--question", "--score"]:
            parser.error(f"give {given[0]} or {given[1]}, not both")
    for name, mode in goes_with.items():
        given = set(args) - {"image"} if edits else set(args)
        if name in args and not any(cli.flag(other) in mode.split(" or ") for other in given):
            parser.error(f"{cli.flag(name)} changes nothing without {mode}" + edits * ", and no --prompt")
    page = trajectory.is_page(args.get("trajectory", Path()))
    for name, wrong, why in (
            ("max_tokens", "text" in args, "changes nothing with --text, which is as long as it is"),
            ("length", "text" in args and args.get("length") == "auto", "auto changes nothing with --text"),
            ("best", args.get("n", 1) == 1, "changes nothing without --n, of which to show the best"),
            *((name, not edits, "is about drawing over a picture: give --image with --prompt")
              for name in ("strength", "mask")),
            *((name, pictures > 1, "is about one picture") for name in ("text", "chat", "trajectory", "mask",
                                                                        "strength", "prompt")),
            ("trajectory", page and args.get("n", 1) > 1, "FILE.html is about one picture; leave out --n"),
            ("trajectory", page and "compile" in args,
             "FILE.html looks into blocks that are not compiled; leave out --compile"),
            *((name, bool({"score", "choices"} & set(args)), "changes nothing where no text is written")
              for name in WRITES)):
        if name in args and wrong:
            parser.error(f"{cli.flag(name)} {why}")
    low, high = args.get("guidance_interval", (0, 1))
    if low > high:
        parser.error(f"--guidance-interval {low:g} {high:g}: expected the lower noise level first")
    for name, use in dict(prompt="draw", question="ask", text="fill", score="score").items():
        if not args.get(name, "x").strip():
            parser.error(f"--{name} is empty; write what to {use}")
    if "[MASK]" not in args.get("text", "[MASK]"):
        parser.error("--text holds no [MASK]; write [MASK] where words are missing")
    if args.get("trajectory") is not None and args["trajectory"] == args.get("out"):
        parser.error(f"--out and --trajectory are both {args['out']}; name two files")
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    for name, kinds, such in (("out", known, ".png"), ("trajectory", {".gif", ".html"}, ".gif")):
        path = args.get(name, Path(f"sample{such}"))
        if not path.parent.is_dir():
            parser.error(f"--{name} {path}: the folder {path.parent} does not exist")
        if path.suffix.lower() not in kinds and not (name == "out" and "prompts" in args):
            parser.error(f"--{name} {path}: expected a picture's name, such as {path.stem}{such}")
    return args


def paint(args: dict, parts: Parts, images: list[Image.Image]) -> None:
    """--prompt, --prompts: what is drawn goes to --out."""
    how, prompts = walk(args), args.get("prompts") or [args.get("prompt", "")]
    if images:
        pixels = to_tensor(fit_picture(images[0], parts.height, parts.width))[None]
        latents = encode(parts, pixels, dtype=torch.float32)                      # that pixels come back
        strength = args.get("strength", 1.0 if "mask" in args else 0.7)
        how["edit"] = Edit(latents, strength, args.get("mask"))
    negative, flag = args.get("negative_prompt", ""), "prompts" if "prompts" in args else "prompt"
    for text in [negative, *prompts]:
        which = "--negative-prompt" if text is negative else cli.flag(flag) + f", {text[:40]!r}," * (
            flag == "prompts")
        check_prompt(parts, text, which)
    prompts = [read_text(parts, flag, text) for text in prompts]
    how["negative"] = read_text(parts, "negative_prompt", negative)
    seed, n = args.get("seed", 0), args.get("n", 1)
    jobs = [(prompt, seed + i) for prompt in prompts for i in range(n)]
    if "prompts" in args:
        out = args.get("out", Path("drawn"))
        there = image_folder.fill(parts, jobs, out, **how)
        print(f"{out}: {len(jobs)} pictures, {there} of which were there")
        return
    out, path = args.get("out", Path("sample.png")), args.get("trajectory")
    seen = trajectory.seen(parts, path) if path else Seen(states=None)
    drawn = list(drawings(parts, [prompt for prompt, _ in jobs], seed=seed, seen=seen, **how))
    if "best" in args:
        nats, drawn = zip(*likeliest(parts, drawn, prompts[0]))
        print("nats of the prompt: " + " ".join(f"{x:.2f}" for x in nats))
    grids.write_picture(out, grids.grid(drawn))
    print(f"{out}: {seen.rows // n} evaluations a picture")
    if path:
        about = dict(seed=seed, evaluations=seen.rows) | {
            name: how[name] for name in ("solver", "guidance", "interval") if name in how}
        if trajectory.is_page(path):
            write_text(path, trajectory.drawing_page(parts, prompts[0], seen, about))
        else:
            grids.write_picture(path, *trajectory.drawing_frames(seen))
        print(path)


def told(parts: Parts, latents: Tensor, args: dict) -> Iterator[str]:
    """Lines of --choices, the likeliest first, or of --score, for one picture, (1, C, h, w)."""
    for answer, share, nats, error in ranked(parts, latents, args.get("question"), args["answers"]):
        tokens = len(parts.tokenizer.pieces(answer)) + 1                          # with the end
        each = f"{nats:.2f} +- {error:.2f} nats, {nats / tokens:.3f} a token, " \
               f"{nats / math.log(2) / max(1, len(answer.encode())):.3f} bits a byte"
        yield f"{answer}: {share:.1%}, {each}" if "choices" in args else f"{answer}: {each}"


def lines(args: dict, parts: Parts, latents: Tensor, how: dict) -> Iterator[str]:
    """What is said of pictures (B, C, h, w), line after line; of several, each after its file's name."""
    questions = [read_text(parts, "question", line) for line in args.get("questions", [])]
    questions = questions or [args.get("question")]
    several = len(latents) > 1 or len(questions) > 1
    asked = [(path, z, question) for path, z in zip(args["image"], latents) for question in questions]
    for some in (asked[at:at + 16] for at in range(0, len(asked), 16)):
        if "answers" in args:
            said = ["\n".join(told(parts, z[None], args)) for _, z, _ in some]
        else:
            questions = [question for _, _, question in some]
            batch = torch.stack([z for _, z, _ in some])
            said = write(parts, batch, questions, args.get("max_tokens"), **how)
        for (path, _, question), text in zip(some, said):
            yield "\t".join([str(path), *[question] * ("questions" in args), text]) if several else text


def read_lines(path: Path, what: str = "question") -> list[str]:
    """The lines of a file that are not empty.  Raises UserError."""
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})")
    require((bool(found), f"{path}: holds no {what}; write one a line"))
    return found


def chat(parts: Parts, latents: Tensor, max_tokens: int | None, how: dict) -> None:
    """Ask about a picture (1, C, h, w) in the terminal, until an empty line."""
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        try:
            print(write(parts, latents, question, max_tokens, **how)[0], flush=True)
        except UserError as error:
            print(error, flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    take = lambda *names: {name: args[name] for name in names if name in args}
    device, auto = choose_device(args.get("device", "auto")), args.get("length") == "auto"
    images = [read_picture(path) for path in args.get("image", [])]      # a bad file, before a slow load
    args |= {name: read_lines(args[name], use) for name, use in (("questions", "question"),
                                                                 ("prompts", "prompt")) if name in args}
    parts = open_parts(args, device)
    states = [] if "trajectory" in args else None
    if parts.trained and (parts.height, parts.width) not in parts.trained:
        print(f"warning: a height of {parts.height} and a width of {parts.width}; these weights have learnt "
              f"pictures of {' by '.join(map(str, parts.trained[0]))}, and may show tiles at another size",
              file=sys.stderr)
    if "mask" in args:
        args["mask"] = read_mask(args["mask"], images[0], parts.height, parts.width, parts.factor)
    for name in {"question", "text"} & set(args):
        read_text(parts, name, args[name])
    for name in {"choices", "score"} & set(args):
        given = args[name] if name == "choices" else [args[name]]
        args["answers"] = [read_text(parts, name, text) for text in given]
    draws = bool({"prompt", "prompts"} & set(args))
    if not draws or "best" in args:
        parts.check_text_head()
    if draws:
        paint(args, parts, images)
        return

    steps = args.get("steps", STEPS["answer" if {"question", "questions", "chat"} & set(args) else "text"])
    order = args.get("order", parts.defaults["order"])
    how = reads(args) | take("seed")
    how |= dict(steps=steps, guidance=args.get("text_guidance", 1.0), length_at=0.95 if auto else None)
    try:
        mask_diffusion.ReadConfig(steps, 0, order, how.get("level"))
    except ValueError as error:
        raise UserError(f"--order {order}: {error}")
    pixels = [to_tensor(fit_picture(image, parts.height, parts.width)) for image in images]
    latents = encode(parts, torch.stack(pixels)) if images else None
    if not images and not parts.null_learnt:
        print("warning: these weights have never learnt text without a picture", file=sys.stderr)
    if "chat" in args:
        chat(parts, latents, args.get("max_tokens"), how)
    elif "text" in args:
        print(infill(parts, latents, args["text"], trajectory=states, **how))
    else:
        for line in lines(args, parts, latents, how | dict(trajectory=states)):
            print(line, flush=True)
    if states:
        path, start = args["trajectory"], states[0][1][0]
        if trajectory.is_page(path):
            about = {name: args[name] for name in ("question", "seed") if name in args} | dict(order=order)
            write_text(path, trajectory.reading_page(parts, pixels[0] if images else None, latents, start,
                                                     about, **how))
        else:
            grids.write_picture(path, *trajectory.reading_frames(parts, states, steps * (order == "random")))
        print(path)


if __name__ == "__main__":
    cli.run(main)
