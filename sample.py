"""Draw pictures from text, and text from pictures.

    python sample.py --prompt "red apple, noto style" --out apple.png       # text -> picture
    python sample.py --image apple.png                                      # picture -> caption
    python sample.py --image apple.png --question "What kind of thing is this?"
    python sample.py --image apple.png --text "red [MASK], [MASK] style"    # fills the masks and nothing else
    python sample.py --image apple.png --question "Is this food?" --choices yes no     # which is likelier
    python sample.py --image apple.png --score "red apple, noto style"      # how likely it is
    python sample.py --image apple.png pear.png --questions questions.txt   # all of them about each

Without --checkpoint the weights in assets/emoji are used; they were trained by train.py.  With it, any layout
that checkpoint.py reads, D-DiT's releases and SD3 among them:

    python sample.py --checkpoint dual_diff_sd3_512_base --prompt "a red fox" --height 512 --width 768

The same seed gives the same result.  --trajectory FILE.gif shows the picture form, or the text appear.

Shapes: B batch, L tokens, E width of text states, H and W height and width in pixels.
"""

import cli
cli.interruptible(__name__)

import argparse
import math
import sys
from pathlib import Path
from typing import Iterator

import torch
from PIL import Image
from torch import Tensor

import data
import flow
import mask_diffusion
import show
from cli import UserError, require
from parts import EMOJI, Parts
from pictures import fit_picture, read_picture, to_tensor
from reading import STEPS, canvas, encode, infill, logits, ranked, score, watched, write

DRAW_STEPS = 28


@torch.no_grad()
def drawings(parts: Parts, prompts: list[str], negative: str = "", steps: int = DRAW_STEPS,
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


@torch.no_grad()
def likeliest(parts: Parts, pictures: list[Tensor], prompt: str) -> list[tuple[float, Tensor]]:
    """Pictures (3, H, W) by the bound of -log p(prompt | picture), in nats, the least first."""
    ids = parts.tokenizer.encode(prompt, parts.length)
    latents = encode(parts, torch.stack(pictures))
    found = [(score(parts, latents[i:i + 1], ids)[0], picture) for i, picture in enumerate(pictures)]
    return sorted(found, key=lambda pair: pair[0])


@torch.no_grad()
def joint(parts: Parts, steps: int = DRAW_STEPS, seed: int = 0, shift: float | None = None,
          temperature: float = 1.0) -> tuple[Tensor, str]:
    """A picture (3, H, W) and its caption, from noise and [MASK]s, by turns: a step of the one beside the
    text as it stands, then of the other beside the picture that is predicted.

    Beyond what the paper trains, where one of the two is always clean: expect little."""
    parts.hold("text", "mmdit")
    generator, mask_id = torch.Generator().manual_seed(seed), parts.tokenizer.mask_id
    shape = 1, parts.sizes.channels, parts.height // parts.factor, parts.width // parts.factor
    x = torch.randn(shape, generator=generator).to(parts.device)
    levels = flow.sigmas(steps, parts.defaults["shift"] if shift is None else shift).to(parts.device)
    walk = mask_diffusion.walk(lambda ids, at, rows: logits(parts, clean)(ids, at), canvas(parts)[None].to(
        parts.device), mask_id, steps, generator, temperature, "confidence", picks=True,
        end=(parts.tokenizer.end_id, parts.tokenizer.pad_id))
    _, ids = next(walk)
    for t, s in zip(levels[:-1], levels[1:]):
        v = parts.mmdit(x.to(parts.dtype), parts.text(ids), t.view(1), need="velocity")[0].float()
        clean, x = (x - t * v).to(parts.dtype), x + (s - t) * v
        _, ids = next(walk, (None, ids))                         # of the tokens as large a part
    parts.hold("vae")
    return parts.vae.decode(x.to(parts.dtype))[0].float().cpu().clamp(-1, 1), parts.tokenizer.decode(ids[0])


def results(parts: Parts, prompts: list[str], captions: list[str], images: Tensor) -> Image.Image:
    """Two columns: prompts with what is drawn for them, and images (B, 3, H, W) with the caption that is
    written, above the true one."""
    drawn, said = draw(parts, prompts), write(parts, encode(parts, images))
    return show.page([(image, [f"drawn: {text}"]) for image, text in zip(drawn, prompts)],
                     [(image, [f"read: {text}", f"true: {true}"])
                      for image, text, true in zip(images, said, captions)])


# ------------------------------------------------------------------------------------------------ the command

def flags() -> tuple[cli.Parser, dict[str, str]]:
    """The parser, and for each flag that some of the ways have alone, the flags it goes with."""
    parser, goes_with = cli.Parser(__doc__), {}

    def add(name: str, mode: str = "", **how) -> None:
        parser.add_argument(name, default=argparse.SUPPRESS, **how)
        if mode:
            goes_with[name.removeprefix("--").replace("-", "_")] = mode
    above = dict(type=cli.number(float, 0.001), metavar="X")
    count = lambda low, text: dict(type=cli.number(int, low), metavar="N", help=text)
    other = lambda word, value, low: lambda text: value if text == word else cli.number(int, low)(text)
    draws, reads = "--prompt or --joint", "--image or --text"
    levels = ", ".join(f"{order} {x}" for order, x in mask_diffusion.LEVELS.items() if x)
    add("--prompt", help="draw this")
    add("--image", type=Path, nargs="+", metavar="FILE", help="caption these pictures, a line each, or "
        "answer about them, or score a text; fill --text, or --chat, about one")
    add("--joint", action="store_true", help="a picture and its caption together, from nothing; the paper "
        "trains no such thing")
    add("--negative-prompt", "--prompt", help="guide away from this, not from the empty prompt")
    add("--n", "--prompt", **count(1, "pictures drawn, as one grid (1)"))
    add("--best", "--prompt", action="store_true", help="the --n pictures in the order of how likely they "
        "make the prompt")
    add("--guidance", "--prompt", **above, help="classifier-free guidance; 1: none (4; published weights: 7)")
    add("--shift", draws, **above, help="shift of the noise levels; 1: none (1; published weights: 3)")
    add("--out", draws, type=Path, help="where the picture goes (sample.png)")
    add("--question", "--image", help="what to answer")
    add("--questions", "--image", type=Path, metavar="FILE", help="what to answer, a line each")
    add("--chat", "--image", action="store_true", help="ask in the terminal, until an empty line")
    add("--choices", "--question", nargs="+", metavar="TEXT", help="how likely each of these answers is")
    add("--score", "--image", metavar="TEXT", help="how likely this caption, or answer to --question, is")
    add("--text", help="a text whose [MASK]s to fill; without --image about no picture")
    add("--temperature", f"{reads} or --joint", type=cli.number(float, 0), metavar="X",
        help="0 takes the likeliest token, 1 samples (0; published weights, --joint: 1)")
    add("--top-p", reads, type=cli.number(float, 1e-6, 1), metavar="X", help="sample out of so much of p (1)")
    add("--order", reads, choices=mask_diffusion.ORDERS, help="of unmasking, see mask_diffusion.py; random, "
        "with --temperature 1, is the paper's sampler (threshold; published weights: random)")
    add("--level", reads, type=cli.number(float, 1e-9), metavar="X", help=f"of an order with one ({levels})")
    add("--tokens-per-step", reads, **count(1, "of confidence, margin, entropy, in place of --steps"))
    add("--refresh", reads, type=other("once", 0, 1), metavar="N", help="look at the picture again every N "
        "evaluations, or once; 1 is exact (once; published weights: 1)")
    add("--text-guidance", "--image", **above, help="away from what is written without the picture (1: none)")
    add("--ramp", "--text-guidance", action="store_true", help="weak while little is written")
    add("--posterior", "--image", choices=["mean", "draw"], help="what the autoencoder gives (mean)")
    add("--max-tokens", "--image", **count(1, "longest caption or answer; above --length it goes on in "
                                           "blocks"))
    add("--steps", **count(1, "of the walk: 28 to draw, 128 for a text, 32 to answer"))
    add("--seed", type=cli.number(int, 0, 2**63 - 1), metavar="N", help="the same seed, the same result (0)")
    add("--trajectory", type=Path, help="a .gif of the picture forming, or of the text being unmasked")
    add("--checkpoint", type=Path, help="any layout (the shipped emoji weights)")
    add("--device", choices=["auto", "cpu", "cuda"], help="(auto)")
    add("--dtype", choices=["float32", "bfloat16"], help="of transformer, T5 (bfloat16 where it is native)")
    add("--height", **count(1, "of the picture (as trained; published weights: 512)"))
    add("--width", **count(1, "of the picture (as trained; published weights: 512)"))
    add("--length", type=other("auto", "auto", 2), metavar="N", help="tokens of a text (as trained; "
        "published weights: 256, with --question 128); auto: as many as the first evaluation expects")
    add("--vae", type=Path, help="where the autoencoder is, if not in --checkpoint")
    add("--t5", type=Path, help="where T5 is, if not in --checkpoint")
    add("--tokenizer", type=Path, help="where T5's tokenizer.json is, if not in --checkpoint")
    add("--mask-embedding", type=Path, help="the aligned [MASK] embedding, a .pth or .safetensors file")
    return parser, goes_with


# how a text is written
WRITES = ["temperature", "top_p", "order", "level", "tokens_per_step", "refresh", "text_guidance",
          "posterior", "max_tokens", "steps", "seed"]
# of these at most one
APART = [("text", "question", "questions", "score", "chat"), ("choices", "score", "text"),
         ("trajectory", "questions", "score", "choices", "chat", "joint"), ("prompt", "text"),
         ("joint", "text")]


def parse(argv: list[str] | None = None) -> dict:
    """The flags that were given, checked against each other."""
    parser, goes_with = flags()
    args = vars(parser.parse_args(argv))
    ways, pictures = [way for way in ("prompt", "image", "joint") if way in args], len(args.get("image", []))
    if len(ways) > 1 or not ways and "text" not in args:
        parser.error("give --prompt TEXT to draw, or --image FILE to read a picture, and not both")
    for group in APART:
        given = [cli.flag(name) for name in group if name in args]
        if len(given) > 1 and given != ["--question", "--score"]:
            parser.error(f"give {given[0]} or {given[1]}, not both")
    for name, mode in goes_with.items():
        if name in args and not any(cli.flag(given) in mode.split(" or ") for given in args):
            parser.error(f"{cli.flag(name)} changes nothing without {mode}")
    for name, wrong, why in (
            ("max_tokens", "text" in args, "changes nothing with --text, which is as long as it is"),
            ("length", "text" in args and args.get("length") == "auto", "auto changes nothing with --text"),
            ("best", args.get("n", 1) == 1, "changes nothing without --n, of which to show the best"),
            *((name, pictures > 1, "is about one picture") for name in ("text", "chat", "trajectory")),
            *((name, bool({"score", "choices"} & set(args)), "changes nothing where no text is written")
              for name in WRITES)):
        if name in args and wrong:
            parser.error(f"{cli.flag(name)} {why}")
    for name, use in dict(prompt="draw", question="ask", text="fill", score="score").items():
        if not args.get(name, "x").strip():
            parser.error(f"--{name} is empty; write what to {use}")
    if "[MASK]" not in args.get("text", "[MASK]"):
        parser.error("--text holds no [MASK]; write [MASK] where words are missing")
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    for name, kinds, such in (("out", known, ".png"), ("trajectory", {".gif"}, ".gif")):
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


def paint(args: dict, parts: Parts, texts: dict, states: list | None, take) -> None:
    """--prompt, --joint: what is drawn goes to --out."""
    out = args.get("out", Path("sample.png"))
    if "joint" in args:
        print("note: the paper trains one of picture and text while the other is clean; here both come from "
              "nothing", file=sys.stderr)
        picture, text = joint(parts, **take("steps", "seed", "shift", "temperature"))
        show.write_picture(out, show.grid([picture]))
        print(f"{out}: {text}")
        return
    for name, text in texts.items():
        count, most = len(parts.tokenizer.pieces(text)), parts.length - 1
        require((count <= most, f"{cli.flag(name)} has {count} tokens, expected at most {most}; cut it"))
    drawn = drawings(parts, [texts["prompt"]] * args.get("n", 1), texts.get("negative_prompt", ""),
                     trajectory=states, **take("steps", "guidance", "seed", "shift"))
    if "best" in args:
        nats, drawn = zip(*likeliest(parts, list(drawn), texts["prompt"]))
        print("nats of the prompt: " + " ".join(f"{x:.2f}" for x in nats))
    show.write_picture(out, show.grid(drawn))
    print(out)
    if states:
        show.write_picture(args["trajectory"], *map(show.grid, states))


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


def read_lines(path: Path) -> list[str]:
    """The lines of a file that are not empty.  Raises UserError."""
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})")
    require((bool(found), f"{path}: holds no question; write one a line"))
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
    device, auto = cli.device(args.get("device", "auto")), args.get("length") == "auto"
    images = [read_picture(path) for path in args.get("image", [])]      # a bad file, before a slow load
    if "questions" in args:
        args["questions"] = read_lines(args["questions"])
    dtype = getattr(torch, args["dtype"]) if "dtype" in args else None
    parts = Parts(args.get("checkpoint", EMOJI), device, dtype, **take(
        "vae", "t5", "tokenizer", "mask_embedding", "height", "width", *["length"] * (not auto)))
    states = [] if "trajectory" in args else None
    if parts.trained and (parts.height, parts.width) not in parts.trained:
        print(f"warning: a height of {parts.height} and a width of {parts.width}; these weights have learnt "
              f"pictures of {' by '.join(map(str, parts.trained[0]))}, and may show tiles at another size",
              file=sys.stderr)
    texts = {name: heard(parts, name, text) for name, text in take(
        "prompt", "negative_prompt", "question", "text").items()}
    for name in {"choices", "score"} & set(args):
        given = args[name] if name == "choices" else [args[name]]
        args["answers"] = [heard(parts, name, text) for text in given]
    require((parts.family != "SD3" or "prompt" in args,
             "this checkpoint is SD3's, which has no text head: it only draws"))
    if "prompt" in args or "joint" in args:
        paint(args, parts, texts, states, take)
        return

    steps = args.get("steps", STEPS["answer" if {"question", "questions", "chat"} & set(args) else "text"])
    order = args.get("order", parts.defaults["order"])
    how = take("temperature", "order", "seed", "level", "top_p", "refresh", "ramp")
    how |= dict(steps=steps, guidance=args.get("text_guidance", 1.0), canvas=0.95 if auto else None,
                per_step=args.get("tokens_per_step"))
    try:
        mask_diffusion.check(steps, 0, order, *(how.get(name) for name in ("level", "per_step")))
    except ValueError as error:
        raise UserError(f"--order {order}: {error}".replace("per_step", "--tokens-per-step"))
    pixels = [to_tensor(fit_picture(image, parts.height, parts.width)) for image in images]
    latents = encode(parts, torch.stack(pixels), **take("posterior", "seed")) if images else None
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
        steps = steps if order == "random" else int(states[-1][0][0])
        show.write_picture(args["trajectory"], *[show.text_frame(parts.tokenizer, ids[0], int(step[0]), steps)
                                                 for step, ids in states])


if __name__ == "__main__":
    cli.run(main)
