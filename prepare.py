"""The commands of data.py: a page for a person to look at, and what is computed once, before
training.

Stored latents are the mean of the autoencoder's posterior, in shards of 512 samples with their
texts, and a stamp of the settings that made them.  T5's states of a clean caption can be stored
too.  States of masked text can't: a mask is drawn anew each time, and T5 reads both ways, so that
every state depends on all masks.

Shapes: B batch, L tokens, E width of T5's states, C channels, h and w latent height and width.
"""

import argparse
import gzip
import itertools
import json
import os
import sys
import zlib
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
from files import parse_json, replacing
from progress import Progress
from devices import DEVICES, choose_device
from parts import load_text_encoder
from tensors import finite

SHARD = 512             # samples of a file of latents
DOCUMENT = 2**16        # characters: a longer text is cut up in pieces of about as many
HEADER = 512            # bytes of a token file before its tokens
LOOK = 1000             # samples that `show` looks at


# --------------------------------------------------------------------------------------------- show

def show_sources(args: argparse.Namespace) -> None:
    """Write a page of twelve samples as the trainer sees them; print counts, and each unreadable
    sample."""
    mix = data.Mix(args.paths, args.pixels, "show", length=args.text_length)
    tokenizer = checkpoint.load_tokenizer(args.tokenizer)
    data.check_tokens(mix, tokenizer, args.tokenizer)
    for source, weight in zip(mix.sources, mix.weights):
        share = weight / sum(mix.weights)
        kind = type(source).__name__
        print(f"{source.name}: {kind}, {len(source):,} samples, {share:.1%} of the mix")
    places = mix.places(range(0, len(mix), max(1, len(mix) // LOOK)), "show")
    cells, longest, bad = [], 0, 0
    for place in places:
        try:
            sample = mix.sample(*place)
        except UserError as error:
            bad += 1
            print(f"wrong: {error}")
            continue
        lines = [sample["key"][-50:]]
        for text in [*sample["captions"], sample.get("recaption")]:
            if text:
                count = len(tokenizer.pieces(text))
                longest = max(longest, count)
                lines.append(f"{text} ({count} tokens)")
        for pair in sample.get("questions") or []:
            lines.append(f"Q: {pair['question']} A: {pair['answer']}")
        if "ids" in sample:
            lines.append(tokenizer.bpe.decode(sample["ids"].tolist()))
        if len(cells) < 12:
            cells.append((preview(sample), lines))
    print(f"looked at {len(places):,} samples, {bad:,} of no use")
    print(f"the longest caption has {longest} tokens")
    if cells:
        show.write_picture(args.out, show.page(cells[:6], cells[6:]))
        print(args.out)


def preview(sample: dict) -> Tensor:
    """Return an image (3, h, w) in [-1, 1]: the first three channels of latents, white for plain
    text."""
    latents = data.latents_of([sample])
    return torch.ones(3, 8, 8) if latents is None else latents[0, :3]


# ------------------------------------------------------------------------------------------ latents

class Encoder:
    """The networks that encode samples; stamp: the settings that made what is stored."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(choose_device(args.device))
        self.vae, self.t5 = checkpoint.load_vae(args.vae), None
        factor = self.vae.factor
        require((args.pixels % factor == 0,
                 f"--pixels {args.pixels}: expected a multiple of {factor}"))
        self.stamp = dict(vae=checkpoint.digest(self.vae), pixels=str(args.pixels),
                          channels=str(self.vae.channels), dtype=args.dtype)
        if isinstance(self.vae, torch.nn.Module):
            self.vae.to(self.device)
        if args.t5:
            self.tokenizer = checkpoint.load_tokenizer(args.tokenizer or args.t5)
            self.tokenizer.pad_id = self.tokenizer.end_id                # as train.py pads
            self.t5 = load_text_encoder(args.t5, torch.bfloat16, self.tokenizer)
            self.stamp.update(t5=checkpoint.digest(self.t5), tokenizer=self.tokenizer.digest(),
                              length=str(args.text_length), recaption=str(args.recaption))
            self.t5.to(self.device)

    @torch.inference_mode()
    def encode(self, samples: list[dict]) -> dict[str, Tensor]:
        """Return latents (B, C, h, w) and, with T5, states (B, L, E) of each sample's caption
        "stated"."""
        encoded = dict(latents=self.vae.encode(data.latents_of(samples).to(self.device)))
        if self.t5 is not None:
            ids = []
            for sample in samples:
                chance = data.fraction(sample["key"])
                sample["stated"] = data.choose_caption(sample, self.args.recaption, chance)
                ids.append(self.tokenizer.encode(sample["stated"], self.args.text_length))
            encoded["states"] = self.t5(torch.stack(ids).to(self.device))
        dtype = getattr(torch, self.args.dtype)
        return {name: tensor.to("cpu", dtype) for name, tensor in encoded.items()}


def read(mix: data.Mix, captioned: bool, batches: list[range], number: int) -> dict:
    """Return the samples of a batch of positions, and what is wrong with the unreadable ones."""
    samples, bad = [], []
    for at in batches[number]:
        try:
            samples.append(mix.cut(mix.sources[0][at], captioned))
        except UserError as error:
            bad.append(str(error))
    return dict(samples=samples, bad=bad)


def latents(args: argparse.Namespace) -> None:
    """Store a source's images as latents, in files that are written whole or not at all."""
    encoder = Encoder(args)
    filters = data.PUBLISHED if args.filtered else data.Filters()
    mix = data.Mix([args.source], args.pixels, filters=filters)
    source = mix.sources[0]
    require((not hasattr(source, "stamp"), f"{args.source}: has no images to encode"))
    every = getattr(source, "every", range(len(mix)))
    shards = [every[at:at + SHARD] for at in range(0, len(every), SHARD)]
    stamp = dict(encoder.stamp, source=data.fingerprint(args.source), shards=str(len(shards)))
    files, batches = [], []                                      # of each batch
    first, step = args.part
    for number in range(first, len(shards), step):
        file = args.out / sources.SHARDS.format(f"{number:05d}")
        if file.exists():
            other = sources.read_stamp(str(file))
            require((other == stamp, f"{file}: made with other settings, {other}, not {stamp}"))
            continue
        for at in range(0, len(shards[number]), args.batch):
            files.append(file)
            batches.append(shards[number][at:at + args.batch])
    args.out.mkdir(parents=True, exist_ok=True)
    read_batch = partial(read, mix, bool(args.t5), batches)
    reading = data.feed(read_batch, range(len(batches)), args.workers)
    progress = Progress("samples", sum(map(len, batches)))
    stored = lost = 0
    for file, group in itertools.groupby(zip(files, reading), lambda pair: pair[0]):
        samples, encoded = [], []
        for _, batch in group:
            for message in batch["bad"]:
                print(f"left out: {message}", file=sys.stderr)
            lost += len(batch["bad"])
            if batch["samples"]:
                encoded.append(encoder.encode(batch["samples"]))
                samples += batch["samples"]
            progress.update(stored + len(samples) + lost)
        require((samples, f"{file}: all of its samples are of no use"))
        tensors = {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}
        write_shard(file, samples, tensors, stamp)
        stored += len(samples)
    print(f"{args.out}: {len(shards)} shards, {stored:,} samples encoded now, {lost:,} left out")


def write_shard(file: Path, samples: list[dict], tensors: dict[str, Tensor],
                stamp: dict[str, str]) -> None:
    """Write samples as one file: their tensors, and their texts as JSON, end to end."""
    for name, tensor in tensors.items():
        require((finite(tensor), f"{file}: {name} are not finite in {stamp['dtype']}"))
    lines = []
    for sample in samples:
        names = ("key", "captions", "recaption", "questions", "stated")
        texts = {name: sample[name] for name in names if name in sample}
        lines.append(json.dumps(texts).encode())
    tensors["texts"] = torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.uint8)
    tensors["ends"] = torch.tensor([0, *itertools.accumulate(map(len, lines))])
    with replacing(file) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata={"stamp": json.dumps(stamp)})
        except safetensors.SafetensorError as error:
            raise UserError(f"{file}: can't be written ({error}); run it again to go on")


# --------------------------------------------------------------------------------------------- pack

def documents(path: str, report: Callable[[int], None]) -> Iterator[tuple[str, bool]]:
    """Yield the texts of a file in pieces, and if a document ends there; `report` the bytes read.

    A long .txt is cut where one line break stands between two letters: tokenizers cut there too."""
    plain, text = path.removesuffix(".gz").endswith(".txt"), ""
    try:
        with open(path, "rb") as raw, (gzip.open(raw) if path.endswith(".gz") else raw) as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                report(raw.tell())
                if plain:
                    line = line.decode("utf-8")
                    if len(text) > DOCUMENT and not line[0].isspace() and not text[-2].isspace():
                        yield text, False
                        text = ""
                    text += line
                elif line.strip():
                    record = parse_json(line, where)
                    if isinstance(record, dict):
                        record = record.get("text")
                    yield sources.text(record, where, "text"), True
        if text:
            yield text, True
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason})")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: can't be read ({error})")


def pack(args: argparse.Namespace) -> None:
    """Write documents as one safetensors file of tokens, uint16 where the vocabulary allows, else
    uint32."""
    require((args.out.suffix == ".safetensors", f"{args.out}: expected the .safetensors to write"))
    tokenizer = checkpoint.load_tokenizer(args.tokenizer)
    bits = 16 if tokenizer.vocab_size <= 2**16 else 32
    paths = expand(args.paths)
    for path in paths:
        require((path.endswith(sources.TEXTS), f"{path}: expected {', '.join(sources.TEXTS)}"))
    sizes = list(map(os.path.getsize, paths))
    progress = Progress("bytes", sum(sizes))
    total = count = 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as temporary, open(temporary, "wb") as file:
        file.write(bytes(HEADER))
        for n, path in enumerate(paths):
            pieces = documents(path, lambda at: progress.update(sum(sizes[:n]) + at))
            while batch := list(itertools.islice(pieces, 64)):
                for ids, (_, ends) in zip(tokenizer.many([text for text, _ in batch]), batch):
                    if ends:
                        ids = [*ids, tokenizer.end_id]
                        count += 1
                    np.array(ids, f"uint{bits}").tofile(file)
                    total += len(ids)
        require((total, f"{', '.join(args.paths)}: no text in it"))
        tensor = dict(dtype=f"U{bits}", shape=[total], data_offsets=[0, total * bits // 8])
        metadata = dict(tokenizer=tokenizer.digest(), documents=str(count))
        header = json.dumps({"__metadata__": metadata, "tokens": tensor})
        file.seek(0)
        file.write((HEADER - 8).to_bytes(8, "little"))
        file.write(header.encode().ljust(HEADER - 8))
    print(f"{args.out}: {total:,} tokens, {count:,} document(s)")


# ----------------------------------------------------------------------------------------- commands

def expand(patterns: list[str]) -> list[str]:
    return [path for pattern in patterns for path in sources.expand(pattern)]


def index(args: argparse.Namespace) -> None:
    """Write an index beside each tar."""
    for path in expand(args.paths):
        require((not path.endswith(tars.PACKED), f"{path}: is packed; gunzip it to index it"))
        print(f"{path}: {len(tars.make_index(path)):,} samples")


def part(text: str) -> tuple[int, int]:
    """Read I/N, the I-th of N parts, from 0."""
    first, _, last = text.partition("/")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got {text!r}")
    return int(first), int(last)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(data.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(run: Callable, about: str) -> cli.Parser:
        command = commands.add_parser(run.__name__.partition("_")[0], doc=about, help=about)
        command.set_defaults(run=run)
        return command

    def add_number(command: cli.Parser, flag: str, low: int, default: int, about: str) -> None:
        command.add_argument(flag, type=cli.number(int, low), default=default, metavar="N",
                             help=f"{about} ({default})")

    page = add(show_sources, "a page of what the trainer would see; on stdout all that is wrong")
    page.add_argument("paths", nargs="+", metavar="PATH[:WEIGHT]", help="sources")
    page.add_argument("--out", type=Path, default=Path("data.png"), help="the page (data.png)")
    indexed = add(index, "where each sample of a tar is, in a file beside it")
    indexed.add_argument("paths", nargs="+", metavar="TAR", help="tars, or patterns of them")
    coded = add(latents, "a source's images as latents, in shards; a stopped command goes on")
    coded.add_argument("source", metavar="PATH", help="a source of images")
    coded.add_argument("out", type=Path, metavar="FOLDER", help="of the shards")
    coded.add_argument("--vae", required=True, metavar="PATH", help="autoencoder, of any layout")
    coded.add_argument("--t5", metavar="PATH", help="store its states of a caption as well")
    coded.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16",
                       help="of what is stored (bfloat16)")
    coded.add_argument("--recaption", type=cli.number(float, 0, 1), default=1.0, metavar="N",
                       help="of states: the share that is of re-captions (1)")
    coded.add_argument("--filtered", action="store_true",
                       help="leave out what train.py --filtered does")
    add_number(coded, "--batch", 1, 16, "images at a time")
    add_number(coded, "--workers", 0, 0, "processes that read ahead")
    coded.add_argument("--part", type=part, default=(0, 1), metavar="I/N",
                       help="every N-th shard from I on: one process a GPU (0/1)")
    coded.add_argument("--device", choices=DEVICES, default="auto", help="where (auto)")
    packed = add(pack, "plain text as one file of tokens, an end token behind each document")
    packed.add_argument("paths", nargs="+", metavar="FILE",
                        help=".txt, or .jsonl with an object with \"text\" a line; also .gz")
    packed.add_argument("out", type=Path, metavar="T.safetensors", help="the tokens")
    for command in (page, coded):
        add_number(command, "--pixels", 8, 256, "a side")
        add_number(command, "--text-length", 2, 256, "tokens")
    for command, default in ((page, "gpt2"), (packed, "gpt2"), (coded, None)):
        command.add_argument("--tokenizer", metavar="PATH", default=default,
                             help=f"gpt2, or a folder that has one ({default or 'that of --t5'})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.run(args)
