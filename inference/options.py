"""Flags of how something is drawn and read, for sample.py and evaluate.py, and what inference is told of them."""

import sys
from pathlib import Path
from typing import Callable

import torch

import flow
import mask_diffusion
from common import cli
from common.devices import DEVICES, has_bfloat16
from dataset.questions import question_prompt
from inference.parts import EMOJI, Parts

above = dict(type=cli.number(float, 0.001), metavar="X")
count = lambda low, text: dict(type=cli.number(int, low), metavar="N", help=text)
other = lambda word, value, low: lambda text: value if text == word else cli.number(int, low)(text)


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
    """Return the arguments of `text_to_image.drawings` that the flags give."""
    names = dict(steps="steps", guidance="guidance", shift="shift", solver="solver", batch="batch",
                 guidance_interval="interval", compile="fast")
    how = {ours: args[name] for name, ours in names.items() if name in args}
    return how | ({"interval": tuple(how["interval"])} if "interval" in how else {})


# flags of how a text is written, and what `image_to_text.fill` calls them
READS = ["temperature", "order", "level", "image_cache", "steps"]


def reads(args: dict) -> dict:
    return {name: args[name] for name in READS if name in args}


def check_prompt(parts: Parts, text: str, which: str) -> None:
    """Raise UserError for a prompt that has no room for its end; which: how the message names it."""
    count, most = len(parts.tokenizer.pieces(parts.tokenizer.lowered(text))), parts.length - 1
    cli.require((count <= most, f"{which} has {count} tokens, expected at most {most}; cut it"))


def read_text(parts: Parts, name: str, text: str) -> str:
    """Return a text as the model reads it: words that no training caption capitalises are in lower case.

    That, and words that no training text had, are a note and a warning on stderr.  name: of the flag."""
    tokenizer, asked = parts.tokenizer, name == "question"
    read = text if asked else tokenizer.lowered(text)
    if read != text:
        print(f"note: {cli.flag(name)} is read as {read!r}, as captions were written in training",
              file=sys.stderr)
    name = "prompt" if name == "prompts" else name
    given = [question_prompt(read)] if asked else read.replace(" [MASK]", "[MASK]").split("[MASK]")
    if words := [word for text in given for word in tokenizer.strange(text)]:
        why = "no text in training had" if tokenizer.seen is not None else "the tokenizer has no piece for"
        print(f"warning: {cli.flag(name)}: {why} {' '.join(words)}", file=sys.stderr)
    return read
