"""The commands of data.py: what a person looks at, and what a machine computes once, before training.

Stored latents are the mean of the autoencoder's posterior, in shards of 512 samples with their texts, and a
stamp of what made them.  T5's states of a clean caption can be stored too; those of masked text can't: a mask
is drawn anew each time, and T5 reads both ways, so that every state depends on what is masked elsewhere.

Shapes: B batch, L tokens, E width of T5's states, C channels, h and w latent height and width.
"""

import argparse
import gzip
import itertools
import json
import os
import re
import sys
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

import checkpoint
import cli
import data
import show
import sources
import tars
from cli import UserError, require
from files import replacing
from progress import Progress
from devices import DEVICES, choose_device
from parts import load_text_encoder
from tensors import finite
from tokenizer import Tokenizer

SHARD = 512             # samples of a file of latents
DOCUMENT = 2**16        # characters: a longer text is cut up in pieces of about as many
HEADER = 512            # bytes of a token file before its tokens


# ------------------------------------------------------------------------------------------------------- show

def show_sources(args: argparse.Namespace) -> None:
    """A page of twelve samples as the trainer would see them; on stdout counts, and all that is wrong."""
    mix = data.Mix(args.paths, args.pixels, "show", length=args.text_length)
    tokenizer, wrong, cells = checkpoint.load_tokenizer(args.tokenizer), Counter(), []
    data.check_tokens(mix, tokenizer, args.tokenizer)
    for source, weight in zip(mix.sources, mix.weights):
        share = weight / sum(mix.weights)
        print(f"{source.name}: {type(source).__name__}, {len(source):,} samples, {share:.1%} of the mix")
    longest, over, positions = 0, 0, torch.arange(0, len(mix), max(1, len(mix) // args.look))
    for place in data.locate(positions, list(map(len, mix.sources)), mix.weights, "show"):
        try:
            sample = mix.sample(*place)
        except UserError as error:
            wrong[re.sub(r"^.*?: |\d+", "", str(error))] += 1
            print(f"wrong: {error}")
            continue
        texts = [text for text in (*sample["captions"], sample.get("recaption")) if text]
        counts = [len(tokenizer.pieces(text)) for text in texts]
        longest, over = max([longest, *counts]), over + sum(count >= args.text_length for count in counts)
        if len(cells) < 12:
            lines = [f"{text} ({count} tokens)" for text, count in zip(texts, counts)][:2]
            lines += [f"Q: {q['question']} A: {q['answer']}" for q in sample.get("questions") or []][:1]
            lines += [tokenizer.bpe.decode(sample["ids"].tolist())] if "ids" in sample else []
            cells.append((preview(sample), [str(sample["key"])[-50:], *lines]))
    if cells:
        show.write_picture(args.out, show.page(cells[:6], cells[6:]))
    print(f"looked at {len(positions):,} samples, {sum(wrong.values()):,} of no use"
          + (f"; the longest caption has {longest} tokens" if longest else "")
          + (f"; --text-length {args.text_length} cuts {over} of them" if over else "")
          + (f"; {args.out}" if cells else ""))
    for what, count in wrong.most_common():
        print(f"{count:6} {what}")


def preview(sample: dict) -> Tensor:
    """A picture (3, h, w) in [-1, 1]; of an autoencoder's latents three channels, of plain text nothing."""
    latents = data.latents_of([sample])
    if latents is None:
        return torch.ones(3, 8, 8)
    return latents[0] if latents.shape[1] == 3 else latents[0, :3] / 3


# ---------------------------------------------------------------------------------------------------- latents

def encoder(args: argparse.Namespace,
            device: torch.device) -> tuple[Callable, dict[str, str], Tokenizer | None]:
    """(samples -> latents (B, C, h, w) and, with --t5, captions and their states (B, L, E); the stamp; the
    tokenizer, with --t5)."""
    dtype, vae = getattr(torch, args.dtype), checkpoint.load_vae(args.vae)
    tokenizer = t5 = None
    require((args.pixels % vae.factor == 0,
             f"--pixels {args.pixels}: expected a multiple of {vae.factor}"))
    stamp = dict(vae=checkpoint.digest(vae), pixels=str(args.pixels), channels=str(vae.channels),
                 dtype=args.dtype)
    if args.t5:
        tokenizer = checkpoint.load_tokenizer(args.tokenizer)
        tokenizer.pad_id = tokenizer.end_id                      # as train.py pads
        t5 = load_text_encoder(args.t5, torch.bfloat16, tokenizer)
        stamp |= dict(t5=checkpoint.digest(t5), tokenizer=tokenizer.digest(),
                      length=str(args.text_length), recaption=str(args.recaption))
    for model in (vae, t5):
        if isinstance(model, torch.nn.Module):
            model.to(device)

    @torch.inference_mode()
    def encode(samples: list[dict]) -> dict:
        made = dict(latents=vae.encode(data.latents_of(samples).to(device)).to("cpu", dtype))
        if t5 is not None:
            made["stated"] = [data.choose_caption(sample, args.recaption, data.fraction(sample["key"]))
                              for sample in samples]
            ids = torch.stack([tokenizer.encode(text, args.text_length) for text in made["stated"]])
            made["states"] = t5(ids.to(device)).to("cpu", dtype)
        return made
    return encode, stamp, tokenizer


def read(mix: data.Mix, captioned: bool, batches: list[range], number: int) -> dict:
    """The samples of a batch of positions, and what was of no use."""
    samples, bad = [], []
    for at in batches[number]:
        try:
            samples.append(mix.cut(mix.sources[0][at], captioned))
        except UserError as error:
            bad.append(str(error))
    return dict(samples=samples, bad=bad)


def latents(args: argparse.Namespace) -> None:
    """Store a source's pictures as latents, in files that are written whole or not at all."""
    encode, stamp, tokenizer = encoder(args, torch.device(choose_device(args.device)))
    mix = data.Mix([args.source], args.pixels, filters=data.PUBLISHED if args.filtered else data.Filters())
    require((not hasattr(mix.sources[0], "stamp"), f"{args.source}: has no pictures to encode"))
    every = getattr(mix.sources[0], "every", range(len(mix)))
    shards = [every[at:at + SHARD] for at in range(0, len(every), SHARD)]
    stamp |= dict(source=data.fingerprint(args.source), shards=str(len(shards)))
    files = {args.out / sources.SHARDS.format(f"{number:05d}"): shards[number]
             for number in range(args.part[0], len(shards), args.part[1])}
    for file in [file for file in files if file.exists()]:
        found = sources.read_stamp(str(file))
        require((found == stamp,
                 f"{file}: made with other settings, {found}, not {stamp}; use another FOLDER"))
        del files[file]
    args.out.mkdir(parents=True, exist_ok=True)
    batches = {file: [places[at:at + args.batch] for at in range(0, len(places), args.batch)]
               for file, places in files.items()}
    flat = sum(batches.values(), [])
    reading = data.feed(partial(read, mix, args.t5 is not None, flat), range(len(flat)), args.workers)
    progress, seen, lost = Progress("samples", sum(map(len, flat))), 0, 0
    for file, parts in batches.items():
        rows = []
        for places, made in zip(parts, reading):
            seen, lost = seen + len(places), lost + len(made["bad"])
            for name in made["bad"]:
                print(f"left out: {name}", file=sys.stderr)
            require((lost <= 0.05 * seen or seen < 200, f"{args.source}: {lost} of {seen} samples are of no "
                     f"use, the last: {(made['bad'] or [''])[-1]}"))
            if made["samples"]:
                rows.append((made["samples"], encode(made["samples"])))
            progress.update(seen)
        require((rows, f"{args.source}: {len(places)} samples in a row are of no use"))
        write_shard(file, rows, stamp)
    print(f"{args.out}: {len(shards)} shards, {seen - lost:,} samples encoded now, {lost:,} left out"
          + (f", {tokenizer.cut:,} captions cut to {args.text_length - 1} tokens"
             if tokenizer and tokenizer.cut else ""))


def write_shard(file: Path, rows: list[tuple[list[dict], dict]], stamp: dict[str, str]) -> None:
    """Batches of samples with what was made of them, as one file: their texts as JSON, end to end."""
    lines = []
    for samples, made in rows:
        for i, sample in enumerate(samples):
            kept = {name: sample[name] for name in ("key", "captions", "recaption", "questions")
                    if name in sample}
            kept |= {"stated": made["stated"][i]} if "stated" in made else {}
            lines.append(json.dumps(kept).encode())
    names = [name for name in ("latents", "states") if name in rows[0][1]]
    tensors = {name: torch.cat([made[name] for _, made in rows]) for name in names}
    for name in names:
        require((finite(tensors[name]), f"{file}: {name} are not finite in {stamp['dtype']}"))
    tensors["texts"] = torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.uint8)
    tensors["ends"] = torch.tensor([0, *itertools.accumulate(map(len, lines))])
    with replacing(file) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata={"stamp": json.dumps(stamp)})
        except safetensors.SafetensorError as error:
            raise UserError(f"{file}: can't be written ({error}); the same command goes on from here")


# ------------------------------------------------------------------------------------------------------- pack

def documents(path: str, told: Callable[[int], None]) -> Iterator[tuple[str, bool]]:
    """The texts of a file in pieces, and whether a document ends there; `told` hears of the bytes read.

    A long .txt is cut where one line break stands between two letters: tokenizers cut there too."""
    plain, number = path.removesuffix(".gz").endswith(".txt"), 0
    try:
        with open(path, "rb") as raw, (gzip.open(raw) if path.endswith(".gz") else raw) as file:
            held = ""
            for number, line in enumerate(file, 1):
                line = line.decode("utf-8")
                told(raw.tell())
                if not plain:
                    if line.strip():
                        found = json.loads(line)
                        found = found if isinstance(found, str) else found["text"]
                        found.encode()                           # half of a surrogate pair is no text
                        yield found, True
                elif len(held) > DOCUMENT and not line[0].isspace() and not held[-2].isspace():
                    yield held, False
                    held = line
                else:
                    held += line
            if held:
                yield held, True
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 text ({error.reason})")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}:{number}: expected a JSON object with \"text\", or a string ({error})")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: can't be read ({error})")


def pack(args: argparse.Namespace) -> None:
    """Documents as one safetensors file of tokens, uint16 where the vocabulary allows, else uint32."""
    require((args.out.suffix == ".safetensors", f"{args.out}: expected the .safetensors to write"))
    tokenizer = checkpoint.load_tokenizer(args.tokenizer)
    kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    paths = [path for pattern in args.paths for path in sources.expand(pattern)]
    for path in paths:
        require((path.endswith(sources.TEXTS), f"{path}: expected {', '.join(sources.TEXTS)}"),
                (Path(path).is_file(), f"{path}: no such file"))
    sizes, total, count = list(map(os.path.getsize, paths)), 0, 0
    progress = Progress("bytes", sum(sizes))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as temporary, open(temporary, "wb") as file:
        file.write(bytes(HEADER))
        for n, path in enumerate(paths):
            found = documents(path, lambda at: progress.update(sum(sizes[:n]) + at))
            while batch := list(itertools.islice(found, 64)):
                for ids, (_, ends) in zip(tokenizer.many([text for text, _ in batch]), batch):
                    np.array(ids + [tokenizer.end_id] * ends, kind).tofile(file)
                    total, count = total + len(ids) + ends, count + ends
        require((total, f"{', '.join(args.paths)}: no text in it"))
        about = {"__metadata__": dict(tokenizer=tokenizer.digest(), documents=str(count)),
                 "tokens": dict(dtype={2: "U16", 4: "U32"}[kind().itemsize], shape=[total],
                                data_offsets=[0, total * kind().itemsize])}
        file.seek(0)
        file.write((HEADER - 8).to_bytes(8, "little") + json.dumps(about).encode().ljust(HEADER - 8))
    print(f"{args.out}: {total:,} tokens, {count:,} document(s)")


# --------------------------------------------------------------------------------------------------- commands

def part(text: str) -> tuple[int, int]:
    """I/N, the I-th of N parts, from 0."""
    first, _, last = text.partition("/")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got {text!r}")
    return int(first), int(last)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(data.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = lambda name, said: commands.add_parser(name, doc=said, help=said)
    count = lambda low: cli.number(int, low)
    page = add("show", "a page of what the trainer would see; on stdout all that is wrong")
    page.add_argument("paths", nargs="+", metavar="PATH[:WEIGHT]", help="sources")
    page.add_argument("--out", type=Path, default=Path("data.png"), help="the page (data.png)")
    page.add_argument("--look", type=count(1), default=1000, metavar="N", help="samples looked at (1000)")
    index = add("index", "where each sample of a tar is, in a file beside it")
    index.add_argument("paths", nargs="+", metavar="TAR", help="tars, or patterns of them")
    coded = add("latents", "a source's pictures as latents, in shards; after a stop the same command goes on")
    coded.add_argument("source", metavar="PATH", help="a source of pictures")
    coded.add_argument("out", type=Path, metavar="FOLDER", help="of the shards")
    coded.add_argument("--vae", required=True, metavar="PATH", help="autoencoder, of any layout")
    coded.add_argument("--t5", metavar="PATH", help="store its states of a caption as well")
    coded.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16",
                       help="of what is stored (bfloat16)")
    coded.add_argument("--recaption", type=cli.number(float, 0, 1), metavar="N",
                       help="of states: the share that is of re-captions (1)")
    coded.add_argument("--filtered", action="store_true", help="leave out what train.py --filtered does")
    for flag, low, default, said in (("batch", 1, 16, "pictures at a time"),
                                     ("workers", 0, 0, "processes that read ahead")):
        coded.add_argument(f"--{flag}", type=count(low), default=default, metavar="N",
                           help=f"{said} ({default})")
    coded.add_argument("--part", type=part, default=(0, 1), metavar="I/N",
                       help="every N-th shard from I on: one process a GPU (0/1)")
    coded.add_argument("--device", choices=DEVICES, default="auto", help="where (auto)")
    packed = add("pack", "plain text as one file of tokens, an end token behind each document")
    packed.add_argument("paths", nargs="+", metavar="FILE",
                        help=".txt, one document, or .jsonl, an object with \"text\" a line; also .gz")
    packed.add_argument("out", type=Path, metavar="T.safetensors", help="the tokens")
    for command in (page, coded):
        command.add_argument("--pixels", type=count(8), default=256, metavar="N", help="a side (256)")
        command.add_argument("--text-length", type=count(2), metavar="N", help="tokens (256)")
    for command, own in ((page, "gpt2"), (packed, "gpt2"), (coded, "that of --t5")):
        command.add_argument("--tokenizer", metavar="PATH", help=f"gpt2, or a folder that has one ({own})")
    args = parser.parse_args(argv)
    encoded = args.command == "latents"
    tokenizer = args.t5 if encoded else "gpt2"
    for name, own in (("text_length", 256), ("recaption", 1.0), ("tokenizer", tokenizer)):
        if encoded and not args.t5 and getattr(args, name) is not None:
            parser.error(f"{cli.flag(name)} changes nothing without --t5")
        if getattr(args, name, None) is None:
            setattr(args, name, own)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.command == "index":
        for path in [path for pattern in args.paths for path in sources.expand(pattern)]:
            if path.endswith(tars.PACKED):
                raise UserError(f"{path}: a packed tar can't be read at random; gunzip it")
            print(f"{path}: {len(tars.make_index(path)):,} samples")
    else:
        dict(show=show_sources, latents=latents, pack=pack)[args.command](args)
