"""Sources of pictures with texts: a sample at a position; mixed by weight, in an order without state.

    python data.py show PATH[:WEIGHT] ... --out page.png     # what the trainer would see, and what is wrong
    python data.py index SHARD.tar ...                       # where a tar's samples are; also at first use
    python data.py latents PATH FOLDER --vae VAE             # pictures encoded once, before training
    python data.py build-emoji                               # the emoji set anew
    python data.py pack BOOK.txt WEB.jsonl.gz T.safetensors  # plain text as tokens

A source is a path, told by what it is: a folder of pictures with captions, tars, a JSON list, stored latents
or tokens (dataset/sources.py), the published files of questions (dataset/questions.py), or the embedded set (dataset/emoji.py), whose
epoch has each emoji and style once or, with @each behind its path, each picture.  The sample at position i of
a run is a function of (run, i) alone: there are no iterators, and nothing about order is stored.

Shapes: n samples or positions, P pixels a side.
"""

from common import cli
cli.interruptible(__name__)

import argparse
import hashlib
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import checkpoint
from common.cli import UserError, require
from common.devices import DEVICES
from common.files import sha256
from common.seeding import fraction
from dataset import emoji, precompute, questions, sources, webdataset
from dataset.aspect_buckets import Buckets
from dataset.images import fit_picture, picture_size, read_picture
from viz import grids

PIXELS = dict(vae="pixels", channels="3")       # the stamp of pictures that are not encoded
LOOK = 1000                                     # samples that `show` looks at
EACH = "@each"                                  # behind the emoji tar's path: each picture as often


# ------------------------------------------------------------------------------------------------------ order

def permute(at: Tensor, size: int, key: str) -> Tensor:
    """Where a random permutation of range(size) takes each place, (n,) int64 -> (n,), without storing it.

    A Feistel network of six rounds on the smallest even number of bits that holds `size`; what falls outside
    is sent through again until it is inside (cycle walking, Black and Rogaway 2002): four times at most, on
    average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low, keys = (1 << half) - 1, np.frombuffer(hashlib.sha256(key.encode()).digest(), np.uint32)[:6].tolist()
    at, outside = at.clone(), torch.ones_like(at, dtype=torch.bool)
    while outside.any():
        left, right = at[outside] >> half, at[outside] & low
        for k in keys:                                           # murmur's mixing, modulo 2^32
            mixed = (right + k) * 0x9E3779B1 & 0xFFFFFFFF
            mixed = (mixed ^ mixed >> 15) * 0x85EBCA77 & 0xFFFFFFFF
            left, right = right, left ^ ((mixed ^ mixed >> 13) & low)
        at[outside] = left << half | right
        outside = at >= size
    return at


def locate(positions: Tensor, sizes: list[int], weights: list[float], key: str) -> list[tuple[int, int, int]]:
    """(source, epoch, place in the source) of each position (n,) of an endless mix of shuffled epochs.

    weights: of all samples of a source together, len(source) times that of one.
    Source k fills its share of positions as evenly as can be: of the first p positions left to it and to the
    sources after it, floor(p share).  That count says which epoch of the source, and where in it, a position
    is.
    """
    found, todo, left = [(0, 0, 0)] * len(positions), torch.arange(len(positions)), positions
    for k, (size, weight) in enumerate(zip(sizes, weights)):
        share = round(weight / sum(weights[k:]) * 2**24)         # in 2^-24, so that it is exact
        before = (left * share) >> 24
        mine = ((left + 1) * share) >> 24 > before
        epochs, at = before[mine] // size, before[mine] % size
        for e in epochs.unique().tolist():
            places = permute(at[epochs == e], size, f"{key} source {k} epoch {e}").tolist()
            for i, place in zip(todo[mine][epochs == e].tolist(), places):
                found[i] = (k, e, place)
        todo, left = todo[~mine], (left - before)[~mine]
    return found


# ---------------------------------------------------------------------------------------------------- mixture

def open_source(path: str, pixels: int, length: int = 256):
    """The source at a path; plain text in pieces of `length` tokens.  Raises UserError."""
    if re.search(r"\.json(@|$)", path):
        return questions.of_json(path)
    source = sources.of_path(path.removesuffix(EACH), length)
    known, each = emoji.is_emoji(source), path.endswith(EACH)
    require((known or not each, f"{path}: {EACH} is of the emoji set, {source.name} is another"))
    return emoji.Emoji(source.tars[0], pixels, each) if known else source


def split_weight(spec: str) -> tuple[str, float]:
    """PATH[:WEIGHT] in its parts.  Raises UserError."""
    path, _, weight = spec.rpartition(":")
    if not path or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight):
        return spec, 1.0
    if float(weight) <= 0:
        raise UserError(f"{spec}: a weight of {weight}, expected PATH or PATH:WEIGHT with one above 0")
    return path, float(weight)


def fingerprint(spec: str) -> str:
    """Return a hash that identifies a source, wherever it lies, with its weight and EACH.

    It covers a file's contents; of many files the names, the sizes, and the beginning of the first."""
    path, weight = split_weight(spec)
    each, path = EACH * path.endswith(EACH), re.sub(r"(\.json)@.*", r"\1", path.removesuffix(EACH))
    places = [Path(place) for place in sources.expand(path)]
    if len(places) == 1 and places[0].is_file() and places[0].stat().st_size < 2**28:
        return f"{sha256(places[0])[:16]}:{weight}{each}"
    files = [(file, str(file.relative_to(place))) for place in places if place.is_dir()
             for file in sorted(place.rglob("*")) if file.is_file() and not file.name.startswith(".")
             and not file.name.endswith(webdataset.INDEX)]
    files += [(place, place.name) for place in places if place.is_file()]
    listed = "".join(f"{name} {file.stat().st_size}\n" for file, name in files)
    if files:
        with open(files[0][0], "rb") as file:                    # the stamp of what was stored is there
            listed += file.read(2**10).hex()
    return f"{hashlib.sha256(listed.encode()).hexdigest()[:16]}:{weight}{each}"


@dataclass
class Filters:
    """Which samples training leaves out."""
    min_side: int = 1               # pixels of an image's shorter side
    max_ratio: float = 4.0          # of the longer side to the shorter
    min_caption: int = 0            # characters of a caption


PUBLISHED = Filters(min_side=256, max_ratio=4.5, min_caption=6)


class Filtered(UserError):
    """A sample that `Filters` leave out: nothing is wrong with it."""


class Mix:
    """Sources, PATH[:WEIGHT] each, in the order that `key` gives; pictures cut to P x P, plain text to `length`
    tokens.  Every sample is drawn as often as any other, WEIGHT times as often where one is given.
    asks: its questions are asked, so that an empty list of them is a mistake.

    stamp: what its latents are, "vae", "pixels" and "channels", also where they are the pixels; None for
    plain text.  bad: what samples were of no use since `newly_bad` was asked, and why; lost, of seen: how
    many of all that were asked for.  Raises UserError, also where sources can't be in one batch."""

    def __init__(self, specs: list[str], pixels: int, key: str = "", filters: Filters = Filters(),
                 length: int = 256, asks: bool = False):
        self.pixels, self.key, self.filters, self.asks = pixels, key, filters, asks
        self.sources, self.weights = [], []
        self.bad, self.lost, self.seen = [], 0, 0
        for spec in specs:
            path, weight = split_weight(spec)
            self.sources.append(open_source(path, pixels, length))
            self.weights.append(weight * len(self.sources[-1]))
        for source, weight in zip(self.sources, self.weights):
            require((weight / sum(self.weights) > 2**-23, f"{source.name}: {len(source):,} samples of {len(self):,}"
                     f" are too few to be drawn; give it a weight, PATH:WEIGHT"))
        stamps = [getattr(source, "stamp", PIXELS | {"pixels": str(pixels)}) for source in self.sources]
        stamps = [stamp and {name: stamp[name] for name in (*PIXELS, "pixels")} for stamp in stamps]
        self.stamp, said = stamps[0], [str(stamp or "plain text").replace("'", "") for stamp in stamps]
        require(*((stamp == self.stamp, f"{source.name}: is {what}, {self.sources[0].name} is {said[0]}; one "
                   f"batch can't have both") for stamp, what, source in zip(stamps, said, self.sources)))

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def take(self, positions: Iterable[int], name: str, size: tuple[int, int] | None = None) -> list[dict]:
        """The samples at these positions of the run's order `name`: "picture" (3, P, P) uint8, or of another
        size (height, width), "latents" (C, h, w) or "ids" (L,)."""
        return [self.read(*place, name == "image", size) for place in self.places(positions, name)]

    def places(self, positions: Iterable[int], name: str) -> list[tuple[int, int, int]]:
        """(source, epoch, place in the source) of each position."""
        return locate(torch.tensor(list(positions)), list(map(len, self.sources)), self.weights,
                      f"{self.key} {name}")

    def read(self, k: int, epoch: int, place: int, captioned: bool,
             size: tuple[int, int] | None = None) -> dict:
        """Return a sample of source k; the next one stands in for one that is of no use or filtered out.

        Raises UserError after 100 in a row, or when over 5 % are of no use; filters may leave out any share."""
        source = self.sources[k]
        for at in range(place, place + 100):
            self.seen += 1
            try:
                return self.sample(k, epoch, at % len(source), captioned, size)
            except UserError as error:
                self.bad.append(str(error))
                if not isinstance(error, Filtered):
                    self.lost += 1
            if self.lost > 0.05 * self.seen and self.seen >= 200:
                raise UserError(f"{source.name}: {self.lost} of {self.seen} samples are of no use, the last: "
                                f"{self.bad[-1]}")
        raise UserError(f"{source.name}: 100 samples in a row are of no use, the last: {self.bad[-1]}")

    def sample(self, k: int, epoch: int, place: int, captioned: bool = False,
               size: tuple[int, int] | None = None) -> dict:
        return self.cut(self.sources[k][self.index(k, epoch, place)], captioned, size)

    def index(self, k: int, epoch: int, place: int) -> int:
        """Return the index at a place of source k in an epoch; a source may choose one of several."""
        if hasattr(self.sources[k], "choose"):
            return self.sources[k].choose(place, fraction(f"{self.key} {k} {epoch} {place}"))
        return place

    def buckets(self, name: str, unit: int) -> Buckets:
        """Return batches of sizes of about the square's area, of this mixture's order `name`.

        Raises UserError where there are no pictures to cut."""
        kind = "stored latents" if self.stamp else "plain text"
        require((self.stamp and self.stamp["vae"] == "pixels",
                 f"--buckets: {self.sources[0].name} has no pictures to cut, but {kind}"))
        return Buckets((self.key, name), self.pixels, unit, partial(self.places, name=name), self.picture_size)

    def picture_size(self, place: tuple[int, int, int]) -> tuple[int, int]:
        """Return (width, height) of the picture at a place, from its file's header."""
        k, epoch, at = place
        return picture_size(self.sources[k][self.index(k, epoch, at)]["picture"])

    def newly_bad(self) -> list[str]:
        """The bad ones since this was last asked."""
        new, self.bad = self.bad, []
        return new

    def cut(self, sample: dict, captioned: bool = False, size: tuple[int, int] | None = None) -> dict:
        """The sample with its picture (3, P, P) uint8, or of a size.  UserError where it's of no use."""
        if "ids" in sample and not captioned:
            return sample
        if isinstance(sample.get("picture"), bytes):
            picture = read_picture(sample["picture"], sample["key"])
            self.check_size(picture, sample["key"])
            array = torch.from_numpy(np.array(fit_picture(picture, *(size or (self.pixels,)))))
            sample["picture"] = array.permute(2, 0, 1)
        self.filter_captions(sample, captioned)
        asks, asked = self.asks and not captioned, sample.get("questions")
        require((not asks or asked != [], f"{sample['key']}: \"questions\" is [], and this stage asks some"))
        if not sample["captions"] and not sample.get("recaption") and (captioned or not asked):
            raise UserError(f"{sample['key']}: no caption{'' if captioned else ' and no question'}")
        return sample

    def check_size(self, picture: Image.Image, name: str) -> None:
        """Raise Filtered for a picture that is too small or too long."""
        short, long = sorted(picture.size)
        if short < self.filters.min_side or long > self.filters.max_ratio * short:
            raise Filtered(f"{name}: a picture of {picture.width}x{picture.height}, expected sides of at least "
                           f"{self.filters.min_side} and at most {self.filters.max_ratio:g} to 1")

    def filter_captions(self, sample: dict, captioned: bool) -> None:
        """Drop captions that are too short.  Raise Filtered where that leaves nothing to learn from."""
        least, recaption = self.filters.min_caption, sample.get("recaption")
        captions = [text for text in sample["captions"] if len(text) >= least]
        if recaption and len(recaption) < least:
            recaption = sample["recaption"] = ""
        others = recaption or (sample.get("questions") and not captioned)
        if sample["captions"] and not captions and not others:
            raise Filtered(f"{sample['key']}: no caption of at least {least} characters")
        sample["captions"] = captions

    def texts(self) -> list[str] | None:
        """Every text of the sources, or None where that would take reading all of them."""
        if not all(hasattr(source, "texts") for source in self.sources):
            return None
        return [text for source in self.sources for text in source.texts()]

    def shown(self, count: int, held: bool, captioned: bool = True) -> list[dict]:
        """Samples to look at, of the first source: learnt ones, or held-out ones where it has any."""
        source = self.sources[0]
        kept = getattr(source, "held", [])[:count] if held else []
        if kept:
            return [self.cut(source[i], captioned) for i in kept]
        count = min(count, len(source))
        places = [i * len(source) // count for i in range(count)]        # a folder is often sorted: of all of it
        return [self.read(0, 0, place, captioned) for place in places]


def latent_factor(specs: list[str]) -> int | None:
    """Pixels per latent, along a side, of the first stored latents among the sources; None without any."""
    for spec in specs:
        for file in map(str, Path(split_weight(spec)[0]).glob(sources.SHARDS.format("*"))):
            side = sources.mapped(file).get_slice("latents").get_shape()[-1]
            return int(sources.read_stamp(file)["pixels"]) // side
    return None


def check_stamps(image: Mix | None, text: Mix, channels: int, learnt: str | None,
                 encoder: str | None) -> str | None:
    """Return what the latents of both losses are: "pixels", or the digest of their autoencoder.

    image: None in a stage without pictures.  channels: of the model's latents; learnt: what those were that
    it has learnt, if any; encoder: the autoencoder that is here, if any.  Raises UserError."""
    require((not image or image.stamp, "--image-data is plain text, which has no pictures; give it as "
             "--text-data"), (image or text.stamp is None, "--text-data: has pictures, which --stage text "
                              "has not; expected plain text (python data.py pack)"))
    stamps = []
    for flag, mix in (("--image-data", image), ("--text-data", text)):
        if mix and mix.stamp:
            raw = mix.stamp["vae"] == "pixels"
            found = dict(mix.stamp, vae=encoder, channels=str(channels)) if raw and encoder else mix.stamp
            need = "pictures" if channels == 3 else (
                "an autoencoder, --vae, or its latents (python data.py latents makes them)")
            require((found["channels"] == str(channels), f"{flag}: {found['channels']} channels, this "
                     f"model's latents have {channels}: expected {need}"),
                    (found["pixels"] == str(mix.pixels), f"{flag}: latents of pictures of {found['pixels']} "
                     f"pixels, this run's have {mix.pixels}; give --pixels {found['pixels']}, or make them "
                     f"again"),
                    (learnt in (None, found["vae"]), f"{flag}: latents of the autoencoder {found['vae']}, "
                     f"the model has learnt those of {learnt}"),
                    (encoder in (None, found["vae"]), f"{flag}: latents of the autoencoder {found['vae']}, "
                     f"--vae is {encoder}"))
            stamps.append(found)
    require((len(stamps) < 2 or stamps[0] == stamps[1], f"--text-data: {stamps[-1:]}, --image-data: "
             f"{stamps[:1]}; expected the same"))
    return stamps[0]["vae"] if stamps else encoder or learnt


def check_questions(mix: Mix, texts: list[str], tokenizer, length: int) -> None:
    """Raises UserError where a mix that asks has no question among each source's first samples, or where one
    of the texts would leave no room for its answer, and for the end."""
    def asked(source, i: int) -> list:
        try:
            return source[i].get("questions")
        except UserError:                                        # which counts as of no use when it is drawn
            return []
    names = ", ".join(source.name for source in mix.sources)
    some = any(asked(source, i) for source in mix.sources if mix.asks for i in range(len(source))[:20])
    require((some or not mix.asks, f"{names}: no questions among the first 20 samples, and this stage "
             f"asks some; --question-share 0 learns captions alone"))
    sizes = {text: len(tokenizer.pieces(text)) for text in set(texts) if text.startswith("Q: ")}
    longest = max(sizes, key=sizes.get, default="")
    taken = sizes.get(longest, 0)
    require((taken < length - 1, f"--text-length {length}: \"{longest}\" has {taken} tokens and leaves no "
             f"room for an answer"))


def check_tokens(mix: Mix, tokenizer, name: str) -> None:
    """Raises UserError for plain text that another tokenizer cut than that of the checkpoint `name`."""
    for source in mix.sources:
        other = getattr(source, "tokenizer", None) not in (None, tokenizer.digest())
        require((not other, f"{source.name}: tokens of another tokenizer than that of {name}; pack its text "
                            f"again with --tokenizer {name}"))


# ------------------------------------------------------------------------------------------------- the commands

def show_sources(args: argparse.Namespace) -> None:
    """Write a page of twelve samples as the trainer sees them; print counts, and each unreadable
    sample."""
    mix = Mix(args.paths, args.pixels, "show", length=args.text_length)
    tokenizer = checkpoint.load_tokenizer(args.tokenizer)
    check_tokens(mix, tokenizer, args.tokenizer)
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
        grids.write_picture(args.out, grids.page(cells[:6], cells[6:]))
        print(args.out)


def preview(sample: dict) -> Tensor:
    """Return an image (3, h, w) in [-1, 1]: the first three channels of latents, white for plain
    text."""
    latents = sources.latents_of([sample])
    return torch.ones(3, 8, 8) if latents is None else latents[0, :3]


def index(args: argparse.Namespace) -> None:
    """Write an index beside each tar."""
    for path in precompute.expand(args.paths):
        require((not path.endswith(webdataset.PACKED), f"{path}: is packed; gunzip it to index it"))
        print(f"{path}: {len(webdataset.make_index(path)):,} samples")


def build_emoji(args: argparse.Namespace) -> None:
    emoji.build(args.out)


def latents(args: argparse.Namespace) -> None:
    """Encode a source's images, once its networks are found to fit."""
    defaults = dict(tokenizer=None, text_length=256, recaption=1.0)        # settings of the stored T5 states
    for name, default in defaults.items():
        given = getattr(args, name) is not None
        require((args.t5 or not given, f"{cli.flag(name)} needs --t5: without it no states are stored"))
        if not given:
            setattr(args, name, default)
    encoder = precompute.Encoder(args)
    mix = Mix([args.source], args.pixels, filters=PUBLISHED if args.filtered else Filters())
    precompute.store_latents(args, encoder, mix, fingerprint(args.source))


def part(text: str) -> tuple[int, int]:
    """Read I/N, the I-th of N parts, from 0."""
    first, _, last = text.partition("/")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got {text!r}")
    return int(first), int(last)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable, about: str) -> cli.Parser:
        command = commands.add_parser(name, doc=about, help=about)
        command.set_defaults(run=run)
        return command

    def add_number(command: cli.Parser, flag: str, low: int, default: int, about: str) -> None:
        command.add_argument(flag, type=cli.number(int, low), default=default, metavar="N",
                             help=f"{about} ({default})")

    page = add("show", show_sources, "a page of what the trainer would see; on stdout all that is wrong")
    page.add_argument("paths", nargs="+", metavar="PATH[:WEIGHT]", help="sources")
    page.add_argument("--out", type=Path, default=Path("data.png"), help="the page (data.png)")
    indexed = add("index", index, "where each sample of a tar is, in a file beside it")
    indexed.add_argument("paths", nargs="+", metavar="TAR", help="tars, or patterns of them")
    coded = add("latents", latents, "a source's images as latents, in shards; a stopped command goes on")
    coded.add_argument("source", metavar="PATH", help="a source of images")
    coded.add_argument("out", type=Path, metavar="FOLDER", help="of the shards")
    coded.add_argument("--vae", required=True, metavar="PATH", help="autoencoder, of any layout")
    coded.add_argument("--t5", metavar="PATH", help="store its states of a caption as well")
    coded.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16",
                       help="of what is stored (bfloat16)")
    coded.add_argument("--recaption", type=cli.number(float, 0, 1), metavar="N",
                       help="of states: the share that is of re-captions (1)")
    coded.add_argument("--filtered", action="store_true",
                       help="leave out what train.py --filtered does")
    add_number(coded, "--batch", 1, 16, "images at a time")
    add_number(coded, "--workers", 0, 0, "processes that read ahead")
    coded.add_argument("--part", type=part, default=(0, 1), metavar="I/N",
                       help="every N-th shard from I on: one process a GPU (0/1)")
    coded.add_argument("--device", choices=DEVICES, default="auto", help="where (auto)")
    packed = add("pack", precompute.pack, "plain text as one file of tokens, an end token behind each document")
    packed.add_argument("paths", nargs="+", metavar="FILE",
                        help=".txt, or .jsonl with an object with \"text\" a line; also .gz")
    packed.add_argument("out", type=Path, metavar="T.safetensors", help="the tokens")
    built = add("build-emoji", build_emoji, "the emoji set anew, from two npm packages")
    built.add_argument("--out", type=Path, default=emoji.TAR, help="(assets/emoji.tar.gz)")
    for command in (page, coded):
        add_number(command, "--pixels", 8, 256, "a side")
        add_number(command, "--text-length", 2, 256, "tokens")
    coded.set_defaults(text_length=None)                                   # `latents` checks these three
    for command, default in ((page, "gpt2"), (packed, "gpt2"), (coded, None)):
        command.add_argument("--tokenizer", metavar="PATH", default=default,
                             help=f"gpt2, or a folder that has one ({default or 'that of --t5'})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
