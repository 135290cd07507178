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

import cli
cli.interruptible(__name__)

import argparse
import math
import sys
from pathlib import Path
from typing import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor

import data
import flow
import gallery
import mask_diffusion
import show
import trajectory
from cli import UserError, require
from files import write_text
from devices import DEVICES, choose_device, has_bfloat16
from drawing import Edit, Seen, draw, drawings, likeliest
from parts import EMOJI, Parts
from pictures import fit_picture, read_mask, read_picture, to_tensor
from reading import STEPS, compared, encode, infill, ranked, write


def results(parts: Parts, prompts: list[str], captions: list[str], images: Tensor) -> Image.Image:
    """Two columns: prompts with what is drawn for them, and images (B, 3, H, W) as `reading.compared`."""
    drawn = [(image, [f"drawn: {text}"]) for image, text in zip(draw(parts, prompts), prompts)]
    return show.page(drawn, compared(parts, images, captions))


# ------------------------------------------------------------------------------------------------ the command

above = dict(type=cli.number(float, 0.001), metavar="X")
count = lambda low, text: dict(type=cli.number(int, low), metavar="N", help=text)
other = lambda word, value, low: lambda text: value if text == word else cli.number(int, low)(text)


RENAMED = {"--refresh": "--image-cache", "--separate": "--prompts", "--tokens-per-step": "--steps",
           "--top-p": "--temperature", "--vary": "--strength"}


def draw_flags(add: Callable) -> None:
    pictures = "--prompt or --prompts"
    add("--prompt", help="draw this")
    add("--prompts", type=Path, metavar="FILE", help="draw these, a line each, into the folder --out; what "
        "is there already is skipped")
    add("--image", type=Path, nargs="+", metavar="FILE", help="caption these pictures, a line each, or "
        "answer about them, or score a text; fill --text, or --chat, about one; with --prompt: draw over it")
    add("--strength", type=cli.number(float, 0, 1), metavar="X", help="the noise level from which --image is "
        "drawn over: 0 gives it back, 1 is a drawing from nothing (0.7; with --mask 1)")
    add("--mask", type=Path, metavar="FILE", help="a picture of the size of --image; what is black "
        "there stays")
    add("--negative-prompt", pictures, help="guide away from this, not from the empty prompt")
    add("--n", pictures, **count(1, "pictures drawn of each prompt, with this seed and the next ones, as one "
        "grid (1)"))
    add("--best", "--prompt", action="store_true", help="the --n pictures in the order of how likely they "
        "make the prompt")
    add("--guidance", pictures, **above, help="classifier-free guidance; 1: none (1.5; published weights: 7)")
    add("--guidance-interval", pictures, nargs=2, type=cli.number(float, 0, 1), metavar="T", help="guided at "
        "these noise levels alone, for half the work outside (0 1)")
    add("--solver", pictures, choices=list(flow.SOLVERS), help="see flow.py; heun takes two evaluations a "
        "step, and half of --steps (euler)")
    add("--batch", pictures, **count(1, "pictures drawn at once; changes time and memory alone (16; large "
        "models 4)"))
    add("--compile", pictures, action="store_true", help="compile the blocks first, which takes a minute; on "
        "a GPU one CUDA graph")
    add("--shift", pictures, **above, help="shift of the noise levels; 1: none (1; published weights: 3)")
    add("--out", pictures, type=Path, help="where the picture goes (sample.png), or the pictures (drawn)")


def read_flags(add: Callable) -> None:
    reads = "--image or --text"
    levels = ", ".join(f"{name} {order.level}" for name, order in mask_diffusion.ORDERS.items() if order.level)
    add("--question", "--image", help="what to answer")
    add("--questions", "--image", type=Path, metavar="FILE", help="what to answer, a line each")
    add("--chat", "--image", action="store_true", help="ask in the terminal, until an empty line")
    add("--choices", "--question", nargs="+", metavar="TEXT", help="how likely each of these answers is")
    add("--score", "--image", metavar="TEXT", help="how likely this caption, or answer to --question, is")
    add("--text", help="a text whose [MASK]s to fill; without --image about no picture")
    add("--temperature", reads, type=cli.number(float, 0), metavar="X",
        help="0 takes the likeliest token, 1 samples (0; published weights: 1)")
    add("--order", reads, choices=list(mask_diffusion.ORDERS), help="of unmasking, see mask_diffusion.py; random, "
        "with --temperature 1, is the paper's sampler (threshold; published weights: random)")
    add("--level", reads, type=cli.number(float, 1e-9), metavar="X", help=f"of an order with one ({levels})")
    add("--image-cache", reads, choices=["once", "off"], help="compute the image's keys and values once, or "
        "at each evaluation, which is exact (once; published weights: off)")
    add("--text-guidance", "--image", **above, help="away from what is written without the picture (1: none)")
    add("--max-tokens", "--image", **count(1, "longest caption or answer; above --length it goes on in "
                                           "blocks"))


def part_flags(add: Callable) -> None:
    add("--steps", **count(1, "evaluations of the walk: 28 to draw, 128 for a text, 32 to answer"))
    add("--seed", type=cli.number(int, 0, 2**63 - 1), metavar="N", help="the same seed, the same result (0)")
    add("--checkpoint", type=Path, help="any layout (the shipped emoji weights)")
    add("--device", choices=DEVICES, help="(auto)")
    add("--dtype", choices=["float32", "bfloat16"], help="of transformer, T5 (bfloat16 where it is native)")
    add("--height", **count(1, "of the picture (as trained; published weights: 512)"))
    add("--width", **count(1, "of the picture (as trained; published weights: 512)"))
    add("--length", type=other("auto", "auto", 2), metavar="N", help="tokens of a text (as trained; "
        "published weights: 256, with --question 128); auto: as many as the first evaluation expects")
    add("--vae", type=Path, help="where the autoencoder is, if not in --checkpoint")
    add("--t5", type=Path, help="where T5 is, if not in --checkpoint")
    add("--tokenizer", type=Path, help="where T5's tokenizer.json is, if not in --checkpoint")
    add("--mask-embedding", type=Path, help="the aligned [MASK] embedding, a .pth or .safetensors file")


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


def open_parts(args: dict, device: torch.device | str) -> Parts:
    """The models that the flags name."""
    names = ["vae", "t5", "tokenizer", "mask_embedding", "height", "width"]
    names += ["length"] * (args.get("length") != "auto")
    dtype = getattr(torch, args["dtype"]) if "dtype" in args else None
    parts = Parts(args.get("checkpoint", EMOJI), device, dtype, **{n: args[n] for n in names if n in args})
    if parts.dtype == torch.bfloat16 and dtype is None and not has_bfloat16(parts.device):
        print("note: this device has no native bfloat16, which fits in half the memory; --dtype float32 is "
              "faster if memory allows it", file=sys.stderr)
    return parts


def walk(args: dict) -> dict:
    """What drawing.drawings is told, of the flags."""
    names = dict(steps="steps", guidance="guidance", shift="shift", solver="solver", batch="batch",
                 guidance_interval="interval", compile="fast")
    how = {ours: args[name] for name, ours in names.items() if name in args}
    return how | ({"interval": tuple(how["interval"])} if "interval" in how else {})


# flags of how a text is written, and what reading.fill calls them
READS = ["temperature", "order", "level", "image_cache", "steps"]


def reads(args: dict) -> dict:
    return {name: args[name] for name in READS if name in args}


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


def heard(parts: Parts, name: str, text: str) -> str:
    """What the model reads of a flag's text: in lower case what no caption that it learnt capitalises.  That,
    and words that it never met, are said on stderr."""
    tokenizer, asked = parts.tokenizer, name == "question"
    read = text if asked else tokenizer.lowered(text)
    if read != text:
        print(f"note: {cli.flag(name)} is read as {read!r}, as captions were written in training",
              file=sys.stderr)
    name = "prompt" if name == "prompts" else name
    given = [data.question_prompt(read)] if asked else read.replace(" [MASK]", "[MASK]").split("[MASK]")
    if words := [word for text in given for word in tokenizer.strange(text)]:
        why = "no text in training had" if tokenizer.seen is not None else "the tokenizer has no piece for"
        print(f"warning: {cli.flag(name)}: {why} {' '.join(words)}", file=sys.stderr)
    return read


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
        count, most = len(parts.tokenizer.pieces(parts.tokenizer.lowered(text))), parts.length - 1
        which = "--negative-prompt" if text is negative else cli.flag(flag) + f", {text[:40]!r}," * (
            flag == "prompts")
        require((count <= most, f"{which} has {count} tokens, expected at most {most}; cut it"))
    prompts = [heard(parts, flag, text) for text in prompts]
    how["negative"] = heard(parts, "negative_prompt", negative)
    seed, n = args.get("seed", 0), args.get("n", 1)
    jobs = [(prompt, seed + i) for prompt in prompts for i in range(n)]
    if "prompts" in args:
        out = args.get("out", Path("drawn"))
        there = gallery.fill(parts, jobs, out, **how)
        print(f"{out}: {len(jobs)} pictures, {there} of which were there")
        return
    out, path = args.get("out", Path("sample.png")), args.get("trajectory")
    seen = trajectory.seen(parts, path) if path else Seen(states=None)
    drawn = list(drawings(parts, [prompt for prompt, _ in jobs], seed=seed, seen=seen, **how))
    if "best" in args:
        nats, drawn = zip(*likeliest(parts, drawn, prompts[0]))
        print("nats of the prompt: " + " ".join(f"{x:.2f}" for x in nats))
    show.write_picture(out, show.grid(drawn))
    print(f"{out}: {seen.rows // n} evaluations a picture")
    if path:
        about = dict(seed=seed, evaluations=seen.rows) | {
            name: how[name] for name in ("solver", "guidance", "interval") if name in how}
        if trajectory.is_page(path):
            write_text(path, trajectory.drawing_page(parts, prompts[0], seen, about))
        else:
            show.write_picture(path, *trajectory.drawing_frames(seen))
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
    questions = [heard(parts, "question", line) for line in args.get("questions", [])]
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
        heard(parts, name, args[name])
    for name in {"choices", "score"} & set(args):
        given = args[name] if name == "choices" else [args[name]]
        args["answers"] = [heard(parts, name, text) for text in given]
    require((parts.family != "SD3" or bool({"prompt", "prompts"} & set(args)) and "best" not in args,
             "this checkpoint is SD3's, which has no text head: it only draws"))
    if {"prompt", "prompts"} & set(args):
        paint(args, parts, images)
        return

    steps = args.get("steps", STEPS["answer" if {"question", "questions", "chat"} & set(args) else "text"])
    order = args.get("order", parts.defaults["order"])
    how = reads(args) | take("seed")
    how |= dict(steps=steps, guidance=args.get("text_guidance", 1.0), canvas=0.95 if auto else None)
    try:
        mask_diffusion.check(steps, 0, order, how.get("level"))
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
            show.write_picture(path, *trajectory.reading_frames(parts, states, steps * (order == "random")))
        print(path)


if __name__ == "__main__":
    cli.run(main)
