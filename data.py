"""Mix sources of images and texts by weight, in an order that is computed, not stored.

    python data.py show PATH[:WEIGHT] ... --out page.png     # a page of samples; lists errors
    python data.py index SHARD.tar ...                       # write an index beside each tar
    python data.py latents PATH FOLDER --vae VAE             # encode images once, before training
    python data.py build-emoji                               # build the emoji set again
    python data.py pack BOOK.txt WEB.jsonl.gz T.safetensors  # store plain text as tokens

A source is a path: a folder of images with captions, tars, a JSON list, stored latents or tokens
(dataset/sources.py), published files of questions (dataset/questions.py), or the embedded emoji set
(dataset/emoji.py); or one of the words `shapes`, `shapes-any-order` and `shapes-small`, worlds made
on the spot (dataset/shapes.py).  An epoch of the emoji set has each emoji once in each style; with
@each after its path, it has each image once.
docs/data.md shows how to add a kind of source.

The sample at position i of a run is a function of (run, i): there are no iterators, and nothing
about the order is stored.

Shapes: n samples or positions, P pixels a side.
"""

from common import cli
cli.interruptible(__name__)

import argparse
import hashlib
import itertools
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import checkpoint
from common.cli import UserError, option, require
from common.devices import DEVICES
from common.files import sha256, walk
from common.seeding import fraction
from dataset import emoji, precompute, questions, shapes, sources, webdataset
from dataset.aspect_buckets import Buckets
from dataset.images import fit_image, image_pixels, image_size, read_image, to_image
from dataset.sources import Location, Source
from pretrained.safetensors_io import is_safetensors
from viz import grids

LOOK = 1000             # about how many samples `show` checks
Size = tuple[int, int]  # height and width
EACH = "@each"          # after the emoji tar's path: draw each image equally often


# ------------------------------------------------------------------------------------------ order

class Place(NamedTuple):
    """The place of a sample in an epoch of one of a mixture's sources."""
    source: int
    epoch: int
    row: int


def permute(places: Tensor, size: int, key: str) -> Tensor:
    """Return where a random permutation of range(size) takes each place, (n,) int64 -> (n,).

    The permutation is not stored: it is a Feistel network of six rounds on the smallest even number
    of bits that holds `size`.  A result outside the range goes through the network again until it
    is inside (cycle walking, Black and Rogaway 2002): at most four times, on average."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)            # bits of each half
    low = (1 << half) - 1                                        # mask of the lower half
    digest = hashlib.sha256(key.encode()).digest()
    round_keys = np.frombuffer(digest, np.uint32)[:6].tolist()
    places = places.clone()
    outside = torch.ones_like(places, dtype=torch.bool)
    while outside.any():
        left = places[outside] >> half
        right = places[outside] & low
        for round_key in round_keys:                             # murmur's mixing, modulo 2^32
            mixed = (right + round_key) * 0x9E3779B1 & 0xFFFFFFFF
            mixed = (mixed ^ mixed >> 15) * 0x85EBCA77 & 0xFFFFFFFF
            mixed = (mixed ^ mixed >> 13) & low
            left, right = right, left ^ mixed
        places[outside] = left << half | right
        outside = places >= size
    return places


def locate(positions: Tensor, sizes: list[int], weights: list[float], key: str) -> list[Place]:
    """Return the place of each position (n,) in an endless mix of shuffled epochs.

    weights: one per source, the weight of all its samples together.
    Source k spreads its share of positions evenly: it fills floor(p * share) of the first p
    positions that earlier sources leave free.  That count gives the epoch and the place in it."""
    places = [Place(0, 0, 0)] * len(positions)
    indices = torch.arange(len(positions))                       # of the positions still free
    free = positions                                             # renumbered without filled ones
    for k, size in enumerate(sizes):
        share = round(weights[k] / sum(weights[k:]) * 2**24)     # in units of 2^-24: exact integers
        before = (free * share) >> 24                            # samples of k at earlier positions
        is_taken = ((free + 1) * share) >> 24 > before
        taken = indices[is_taken]
        epochs = before[is_taken] // size
        rows = before[is_taken] % size
        for epoch in epochs.unique().tolist():
            now = epochs == epoch
            shuffled = permute(rows[now], size, f"{key} source {k} epoch {epoch}").tolist()
            for i, row in zip(taken[now].tolist(), shuffled):
                places[i] = Place(k, epoch, row)
        indices = indices[~is_taken]
        free = (free - before)[~is_taken]
    return places


# ---------------------------------------------------------------------------------------- sources

def open_tars(location: Location) -> Source:
    """Open tars as a source.  The first sample shows if they are the emoji set."""
    source = sources.Tars(location)
    if emoji.is_emoji(source):
        each = location.option == "each"
        return emoji.Emoji(source.tars[0], location.pixels, each)
    return source


def is_list(path: Path) -> bool:
    return path.suffix == ".json" and not path.is_dir()


# (test of a path, function that opens it as a source); the first row that fits is used
OPENERS = [
    (is_list, questions.open_json),
    (sources.tars_at, open_tars),
    (sources.shards_at, sources.Latents),
    (Path.is_dir, sources.Folder),
    (is_safetensors, sources.Tokens),
]
WITH_OPTION = (emoji.Emoji, questions.Questions, sources.Listed)


def split_option(path: str) -> tuple[str, str]:
    """Split LIST.json@IMAGES or TAR@each into path and option, "" if there is no option.

    A path that exists is not split."""
    if Path(path).exists():
        return path, ""
    name, at, folder = path.partition(".json@")
    if at:
        return f"{name}.json", folder
    if path.endswith(EACH):
        return path.removesuffix(EACH), "each"
    return path, ""


def open_source(path: str, pixels: int, length: int = 256) -> Source:
    """Open a path as a source.  Plain text is cut into pieces of `length` tokens.

    Raises UserError for a path that is missing or not a source."""
    if is_shapes(path):
        return shapes.Shapes(Location(path, [path], "", pixels, length))
    pattern, suffix = split_option(path)
    paths = sources.expand(pattern)
    require((pattern.strip(), "an empty path, expected a source"),
            (paths, f"{pattern}: no file has such a name"))
    location = Location(path, paths, suffix, pixels, length)
    require((location.path.exists(), f"{location.path}: no such file or folder"),
            (len(paths) == 1 or sources.tars_at(location.path),
             f"{pattern}: {len(paths)} files or folders, and only tars are read together; give "
             f"each as a source of its own"))
    for each in paths:
        check_one_kind(Path(each))
    for is_kind, open_kind in OPENERS:
        if is_kind(location.path):
            source = open_kind(location)
            require((not suffix or isinstance(source, WITH_OPTION),
                     f"{path}: {EACH} goes with the emoji set; this is another source"))
            return source
    raise UserError(f"{pattern}: expected a folder of images with captions, tars, a .json, or "
                    f"tokens; turn plain text into tokens first: python data.py pack ...")


def is_shapes(path: str) -> bool:
    return path in shapes.WORLDS and not Path(path).exists()


def stride(size: int) -> int:
    """Return a step that leads through all `size` rows of a source, each far from the one before."""
    step = max(1, int(0.618 * size))
    while math.gcd(step, size) > 1:
        step += 1
    return step


def check_one_kind(path: Path) -> None:
    """Raise UserError for a folder with samples of several kinds: one would be read, and the others
    be left out."""
    if not path.is_dir():
        return
    examples = [files[0] for files in (sources.tars_at(path), sources.shards_at(path)) if files]
    if examples:
        examples += itertools.islice(sources.captioned_at(path), 1)
    require((len(examples) < 2, f"{path}: has samples of several kinds, {' and '.join(examples)}; "
             f"keep one kind in a folder"))


def split_weight(spec: str) -> tuple[str, float]:
    """Split PATH[:WEIGHT]; the default weight is 1.  A path that exists is not split.

    Raises UserError for a weight of 0."""
    path, _, weight = spec.rpartition(":")
    name, folder = split_option(spec)
    exists = Path(name).exists() and (folder in ("", "each") or Path(folder).exists())
    if exists or not path or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight):
        return spec, 1.0
    if float(weight) <= 0:
        raise UserError(f"{spec}: a weight of {weight}, expected one above 0")
    return path, float(weight)


def fingerprint(spec: str) -> str:
    """Return a hash that identifies a source, wherever it is stored, with its weight and EACH.

    The hash covers the contents of one file below 256 MiB, and of its VQA annotations.  Otherwise it
    covers the names and sizes of all files, and the first 1024 bytes of the first file."""
    path, weight = split_weight(spec)
    if is_shapes(path):
        return f"{path} {shapes.RULES}:{weight}"
    each = EACH if path.endswith(EACH) else ""
    pattern, _ = split_option(path)
    paths = list(map(Path, sources.expand(pattern)))
    require((paths and paths[0].exists(), f"{pattern}: no such file or folder"))
    if len(paths) == 1 and paths[0].is_file() and paths[0].stat().st_size < 2**28:
        digest = sha256(paths[0])
        answers = questions.annotations_of(paths[0])
        if answers != paths[0] and answers.exists():
            digest = hashlib.sha256((digest + sha256(answers)).encode()).hexdigest()
    else:
        digest = hashlib.sha256(os.fsencode(list_files(paths))).hexdigest()
    return f"{digest[:16]}:{weight}{each}"


def list_files(paths: list[Path]) -> str:
    """List the names and sizes of the files at or below paths, and the beginning of the first."""
    files = {}                                                   # path -> name to list
    for folder in filter(Path.is_dir, paths):
        for file in walk(folder):
            if file.is_file() and not file.name.endswith(webdataset.INDEX):
                files[file] = file.relative_to(folder)
    for file in filter(Path.is_file, paths):
        files[file] = file.name
    listed = "".join(f"{name} {file.stat().st_size}\n" for file, name in files.items())
    if files:
        with open(next(iter(files)), "rb") as file:              # has the stamp of stored latents
            listed += file.read(2**10).hex()
    return listed


# ---------------------------------------------------------------------------------------- mixture

@dataclass
class Filters:
    """Limits for the samples to train on."""
    min_side: int = 1               # pixels of an image's shorter side
    max_ratio: float = 4.0          # longer side / shorter side
    min_caption: int = 0            # characters of a caption


PUBLISHED = Filters(min_side=256, max_ratio=4.5, min_caption=6)


def poisson_tail(count: int, mean: float) -> float:
    """Return the probability of at least `count` events, of which `mean` are expected."""
    numbers = torch.tensor([count, mean], dtype=torch.float64)
    return float(torch.special.gammainc(*numbers))


class Filtered(UserError):
    """A readable sample that `Filters` leave out."""


class Mix:
    """A mixture of sources, each given as PATH[:WEIGHT], in a random order that `key` decides.

    Images are cut to P x P, plain text to `length` tokens.  All samples are drawn equally often; a
    weight multiplies how often the samples of its source are drawn.  asks: training takes questions
    from this mix, so an empty list of questions is an error.

    stamp: "vae", "pixels" and "channels" of its latents ("vae" is "pixels" for images); None for
    plain text.  bad: messages about unusable samples since the last call of `newly_bad`.  lost: the
    number of unreadable samples among the `seen` ones.  Raises UserError for a source that can't be
    opened, and for sources that can't be in one batch."""

    def __init__(self, specs: list[str], pixels: int, key: str = "", filters: Filters = Filters(),
                 length: int = 256, asks: bool = False):
        self.pixels = pixels
        self.key = key
        self.filters = filters
        self.asks = asks
        self.sources = []
        self.weights = []
        self.bad = []
        self.seen = Counter()       # samples of each source that were read
        self.lost = Counter()       # those that were unreadable
        for spec in specs:
            path, weight = split_weight(spec)
            source = open_source(path, pixels, length)
            require((len(source), f"{source.name}: has no sample"))
            self.sources.append(source)
            self.weights.append(weight * len(source))
        first = self.sources[0]
        self.stamp = self.stamp_of(first)
        for source, weight in zip(self.sources, self.weights):
            stamp = self.stamp_of(source)
            require((weight / sum(self.weights) > 2**-23,
                     f"{source.name}: {len(source):,} samples of {len(self):,} are too few to be "
                     f"drawn; give it a weight, PATH:WEIGHT"),
                    (stamp == self.stamp,
                     f"{source.name}: {source.holds}, {stamp}, but {first.name}: {first.holds}, "
                     f"{self.stamp}; one batch can't have both"))

    def stamp_of(self, source: Source) -> dict[str, str] | None:
        """Return the settings that must be equal in all sources of a batch; None for plain text."""
        if source.holds == "plain text":
            return None
        if source.holds == "images":
            return dict(vae="pixels", channels="3", pixels=str(self.pixels))
        return {name: source.stamp[name] for name in ("vae", "channels", "pixels")}

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def take(self, positions: Iterable[int], name: str, size: Size | None = None) -> list[dict]:
        """Return the samples at these positions of the run's order `name`, "image" or "text".

        Each sample has "image" (3, P, P) uint8, or (3, *size) where `size` is given; or "latents"
        (C, h, w); or "ids" (L,)."""
        captioned = name == "image"
        return [self.read(place, captioned, size) for place in self.places(positions, name)]

    def places(self, positions: Iterable[int], name: str) -> list[Place]:
        """Return the place of each position."""
        sizes = list(map(len, self.sources))
        return locate(torch.tensor(list(positions)), sizes, self.weights, f"{self.key} {name}")

    def read(self, place: Place, captioned: bool, size: Size | None = None) -> dict:
        """Return the sample at a place, or else a usable one far from it in its source, because
        neighbours in a sorted folder are often alike.

        Raises UserError after 100 unusable samples in a row, or if so many are unreadable that a
        source with 5 % of unreadable samples would show as many with a probability below 1e-4.
        Filters may leave out any share."""
        source = self.sources[place.source]
        step = stride(len(source))
        tries = min(100, len(source))
        for n in range(tries):
            self.seen[place.source] += 1
            candidate = place._replace(row=(place.row + n * step) % len(source))
            try:
                return self.sample(candidate, captioned, size)
            except UserError as error:
                self.bad.append(str(error))
                if not isinstance(error, Filtered):
                    self.lost[place.source] += 1
                    lost, seen = self.lost[place.source], self.seen[place.source]
                    expected = 0.05 * seen
                    too_many = lost > expected and poisson_tail(lost, expected) < 1e-4
                    require((not too_many, f"{source.name}: {lost} of {seen} samples are unreadable, "
                             f"the last: {error}"))
        raise UserError(f"{source.name}: {tries} samples in a row are unusable, the last: "
                        f"{self.bad[-1]}")

    def sample(self, place: Place, captioned: bool = False, size: Size | None = None) -> dict:
        return self.prepare(self.at(place), captioned, size)

    def at(self, place: Place) -> dict:
        """Return the sample at a place, not yet decoded or cut."""
        return self.sources[place.source][self.index(place)]

    def index(self, place: Place) -> int:
        """Return the index of a place's sample in its source."""
        source, epoch, row = place
        chance = fraction(f"{self.key} {source} {epoch} {row}")
        return self.sources[source].choose(row, chance)

    def buckets(self, name: str, unit: int) -> Buckets:
        """Group this mixture's samples into batches of images of one size, in the order `name`.

        Raises UserError if the sources hold no images to cut."""
        source = self.sources[0]                                 # all sources hold the same
        require((source.holds == "images",
                 f"--buckets: {source.name} has no images to cut, but {source.holds}"))
        return Buckets(self, name, unit)

    def image_size(self, place: Place) -> tuple[int, int]:
        """Return (width, height) of the image at a place; only the file's header is decoded."""
        return image_size(self.at(place)["image"])

    def newly_bad(self) -> list[str]:
        """Return the messages about unusable samples since the last call."""
        messages, self.bad = self.bad, []
        return messages

    def prepare(self, sample: dict, captioned: bool = False, size: Size | None = None) -> dict:
        """Return the sample with its image decoded to (3, P, P) uint8, or to (3, *size).

        captioned: the sample must have a caption.  Raises UserError for an unusable sample."""
        if "ids" in sample and not captioned:
            return sample
        if isinstance(sample.get("image"), bytes):
            image = read_image(sample["image"], sample["key"])
            self.check_size(image, sample["key"])
            sample["image"] = self.fit(image, size)
        elif size and "image" in sample:                         # square pixels, in a bucket
            sample["image"] = self.fit(to_image(sample["image"] / 127.5 - 1), size)
        self.filter_captions(sample, captioned)
        pairs = None if captioned else sample.get("questions")
        require((pairs != [] or not self.asks,
                 f"{sample['key']}: \"questions\" is [], and this stage trains on questions"),
                (sample["captions"] or sample.get("recaption") or pairs,
                 f"{sample['key']}: no caption{'' if captioned else ' and no question'}"))
        return sample

    def fit(self, image: Image.Image, size: Size | None) -> Tensor:
        """Return the image cropped and resized, (3, P, P) uint8, or (3, *size)."""
        height, width = size or (self.pixels, self.pixels)
        return image_pixels(fit_image(image, height, width))

    def check_size(self, image: Image.Image, name: str) -> None:
        """Raise Filtered for an image that is too small or too elongated."""
        short, long = sorted(image.size)
        if short < self.filters.min_side or long > self.filters.max_ratio * short:
            raise Filtered(f"{name}: an image of {image.width}x{image.height}, expected sides of "
                           f"at least {self.filters.min_side} and at most "
                           f"{self.filters.max_ratio:g} to 1")

    def filter_captions(self, sample: dict, captioned: bool) -> None:
        """Drop captions that are too short.  Raise Filtered if no text is left to train on."""
        least = self.filters.min_caption
        captions = [text for text in sample["captions"] if len(text) >= least]
        recaption = sample.get("recaption")
        had_text = sample["captions"] or recaption
        if recaption and len(recaption) < least:
            recaption = sample["recaption"] = ""
        rest = captions or recaption or (sample.get("questions") and not captioned)
        if had_text and not rest:
            raise Filtered(f"{sample['key']}: no caption of at least {least} characters")
        sample["captions"] = captions

    def shown(self, count: int, held: bool, captioned: bool = True) -> list[dict]:
        """Return up to `count` samples of the first source, to show and for validation.

        held: prefer held-out samples, if the source has any."""
        source = self.sources[0]
        if held and len(source.held):
            return [self.prepare(source[i], captioned) for i in source.held[:count]]
        count = min(count, len(source))
        # evenly spaced, because neighbours in a sorted folder are often alike
        places = [Place(0, 0, i * len(source) // count) for i in range(count)]
        samples = [self.read(place, captioned) for place in places]
        self.newly_bad()                                         # they are not training's
        return samples


# ----------------------------------------------------------------------------------------- checks

def latent_factor(specs: list[str]) -> int | None:
    """Return the pixels per latent, along a side, of the first stored latents; None if no source
    has stored latents."""
    for spec in specs:
        pattern, _ = split_weight(spec)
        paths = sources.expand(pattern)
        files = sources.shards_at(Path(paths[0])) if len(paths) == 1 else []     # several are tars
        if files:
            pixels = int(sources.read_stamp(files[0])["pixels"])
            return pixels // sources.latents_shape(files[0])[-1]
    return None


def check_stamps(image: Mix | None, text: Mix, channels: int, trained: str | None,
                 encoder: str | None) -> str | None:
    """Return the autoencoder of the latents of both losses: its digest, or "pixels".

    image: None in a stage without images.  channels: of the model's latents.  trained, encoder: the
    digest of the autoencoder that the model was trained with, and of the one that is loaded, if
    any.  Raises UserError if data, model and autoencoder do not agree."""
    require((not image or image.stamp,
             "--image-data is plain text, which has no images; give it as --text-data"),
            (image or text.stamp is None,
             "--text-data has images, which --stage text has not; expected plain text (python "
             "data.py pack)"))
    vae = None
    for flag, mix in (("--image-data", image), ("--text-data", text)):
        if not mix or not mix.stamp:
            continue
        stamp = dict(mix.stamp)
        if encoder and stamp["vae"] == "pixels":                 # the run encodes its images
            stamp.update(vae=encoder, channels=str(channels))
        remedy = "an autoencoder, --vae, or its latents (python data.py latents makes them)"
        if channels == 3:
            remedy = "images"
        require((stamp["channels"] == str(channels),
                 f"{flag}: {stamp['channels']} channels, this model's latents have {channels}: "
                 f"expected {remedy}"),
                (stamp["pixels"] == str(mix.pixels),
                 f"{flag}: latents of images of {stamp['pixels']} pixels, this run's have "
                 f"{mix.pixels}; give --pixels {stamp['pixels']}, or make them again"))
        for owner, other in (("the model was trained on those of", trained), ("--vae is", encoder),
                             ("--image-data has those of", vae)):
            require((other in (None, stamp["vae"]),
                     f"{flag}: latents of the autoencoder {stamp['vae']}, {owner} {other}"))
        vae = stamp["vae"]
    return vae or encoder or trained


def check_questions(mix: Mix, texts: list[str], tokenizer, length: int) -> None:
    """Raise UserError if a mix with `asks` has no question in the first samples of any source, or
    if a question among `texts` leaves no room for its answer and the end token."""
    names = ", ".join(source.name for source in mix.sources)
    require((not mix.asks or any(map(has_questions, mix.sources)),
             f"{names}: no questions among the first 20 samples, and this stage trains on them; "
             f"--question-share 0 trains on captions only"))
    prompts = {text for text in texts if text.startswith("Q: ")}
    sizes = {text: len(tokenizer.pieces(text)) for text in prompts}
    longest = max(sizes, key=sizes.get, default="")
    size = sizes.get(longest, 0)
    require((size < length - 1, f"--text-length {length}: \"{longest}\" has {size} tokens and "
             f"leaves no room for an answer"))


def has_questions(source: Source) -> bool:
    """Return True if one of the first 20 samples has questions."""
    for i in range(min(20, len(source))):
        try:
            if source[i].get("questions"):
                return True
        except UserError:                                        # reported when training reads it
            continue
    return False


def check_tokens(mix: Mix, tokenizer, name: str) -> None:
    """Raise UserError if stored tokens were made with another tokenizer than that of `name`."""
    for source in mix.sources:
        require((source.tokenizer in (None, tokenizer.digest()),
                 f"{source.name}: tokens of another tokenizer than that of {name}; pack its text "
                 f"again with --tokenizer {name}"))


# ------------------------------------------------------------------------------------------- show

@dataclass
class ShowFlags:
    """Flags of `show`."""
    out: Path = option(Path("data.png"), "image file to write the page to")
    pixels: int = option(256, "side of an image", low=8)
    text_length: int = option(256, "tokens of a piece of plain text", low=2)
    tokenizer: str = option("gpt2", "gpt2, or a folder that has one")


def show_sources(args: argparse.Namespace) -> None:
    """Write a page of twelve samples as the trainer sees them; print counts and bad samples."""
    args.parser.check_file("--out", args.out, grids.SUFFIXES)
    mix = Mix(args.paths, args.pixels, "show", length=args.text_length)
    tokenizer = checkpoint.training_tokenizer(args.tokenizer)
    check_tokens(mix, tokenizer, args.tokenizer)
    for source, weight in zip(mix.sources, mix.weights):
        share = weight / sum(mix.weights)
        kind = type(source).__name__
        print(f"{source.name}: {kind}, {len(source):,} samples, {share:.1%} of the mix")
    step = max(1, len(mix) // LOOK)
    places = mix.places(range(0, len(mix), step), "show")
    cells = []
    captions = []
    bad = 0
    for place in places:
        try:
            sample = mix.sample(place)
        except UserError as error:
            bad += 1
            print(f"wrong: {error}")
            continue
        captions += captions_of(sample)
        if len(cells) < 12:
            cells.append((preview(sample), describe(sample, tokenizer)))
    longest = max(map(len, map(tokenizer.pieces, captions)), default=0)
    print(f"looked at {len(places):,} samples, {bad:,} unusable")
    print(f"the longest caption has {longest} tokens")
    if cells:
        grids.write_image(args.out, grids.page(cells[:6], cells[6:]))
        print(args.out)


def captions_of(sample: dict) -> list[str]:
    """Return the captions of a sample, with its re-caption."""
    return list(filter(None, [*sample["captions"], sample.get("recaption")]))


def describe(sample: dict, tokenizer) -> list[str]:
    """Return the lines beside a sample's image."""
    lines = [sample["key"][-50:]]
    for text in captions_of(sample):
        lines.append(f"{text} ({len(tokenizer.pieces(text))} tokens)")
    for pair in sample.get("questions") or []:
        lines.append(f"Q: {pair['question']} A: {pair['answer']}")
    if "ids" in sample:
        lines.append(tokenizer.bpe.decode(sample["ids"].tolist()))
    return lines


def preview(sample: dict) -> Tensor:
    """Return an image (3, h, w): the sample's image in [-1, 1], or the first three channels of its
    latents; white for plain text."""
    latents = sources.latents_of([sample])
    return torch.ones(3, 8, 8) if latents is None else latents[0, :3]


# --------------------------------------------------------------------------------- other commands

def make_indexes(args: argparse.Namespace) -> None:
    """Write an index beside each tar."""
    for path in sources.expand_all(args.paths):
        require((not path.endswith(webdataset.PACKED), f"{path}: is packed; gunzip it to index it"))
        count = len(webdataset.make_index(path))
        require((os.path.isfile(path + webdataset.INDEX),
                 f"{path}{webdataset.INDEX}: can't be written"))
        print(f"{path}: {count:,} samples")


def part(text: str) -> tuple[int, int]:
    """Read I/N, the I-th of N parts, counted from 0."""
    first, _, last = text.partition("/")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got {text!r}")
    return int(first), int(last)


@dataclass
class LatentsFlags:
    """Flags of `latents`."""
    t5: str | None = option(None, "T5 weights; also store T5's states of one caption per image")
    dtype: str = option("bfloat16", "of stored values", choices=["float32", "bfloat16", "float16"])
    recaption: float | None = option(None, "share of states made from the re-caption (1)",
                                     low=0, high=1)
    filtered: bool = option(False, "leave out the samples that train.py --filtered leaves out")
    batch: int = option(16, "images encoded at a time", low=1)
    workers: int = option(0, "processes that read ahead", low=0)
    device: str = option("auto", "device that encodes", choices=DEVICES)
    pixels: int = option(256, "side of an image", low=8)
    text_length: int | None = option(None, "tokens of a caption for T5 (256)", low=2)
    tokenizer: str | None = option(None, "gpt2, or a folder that has one (that of --t5)")

    def __post_init__(self):
        of_states = dict(tokenizer=None, text_length=256, recaption=1.0)
        for name, default in of_states.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
            elif not self.t5:
                raise ValueError(f"{cli.flag(name)} needs --t5: without it no states are stored")


def store_latents(args: argparse.Namespace) -> None:
    """Load and check the networks, then encode a source's images and store their latents."""
    encoder = precompute.Encoder(args)
    filters = PUBLISHED if args.filtered else Filters()
    mix = Mix([args.source], args.pixels, filters=filters)
    precompute.store_latents(args, encoder, mix, fingerprint(args.source))


@dataclass
class PackFlags:
    """Flags of `pack`."""
    tokenizer: str = option("gpt2", "gpt2, or a folder that has one")


@dataclass
class BuildFlags:
    """Flags of `build-emoji`."""
    out: Path = option(emoji.TAR, "where to write it")


def build_emoji(args: argparse.Namespace) -> None:
    emoji.build(args.out)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command and its flags.  A wrong flag ends the program."""
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable, flags: type | None, about: str) -> cli.Parser:
        command = commands.add_parser(name, doc=about, help=about)
        command.set_defaults(run=run, flags=flags, parser=command)
        if flags:
            command.add_fields(flags)
        return command

    page = add("show", show_sources, ShowFlags,
               "write a page of samples as the trainer sees them; print errors on stdout")
    page.add_argument("paths", nargs="+", metavar="PATH[:WEIGHT]", help="sources")
    indexed = add("index", make_indexes, None,
                  "write an index of a tar's samples beside it; also made at first use")
    indexed.add_argument("paths", nargs="+", metavar="TAR", help="tars, or patterns of them")
    encoded = add("latents", store_latents, LatentsFlags,
                  "store a source's images as latents, in shards; a stopped command resumes")
    encoded.add_argument("source", metavar="PATH", help="a source of images")
    encoded.add_argument("out", type=Path, metavar="FOLDER", help="for the shards")
    encoded.add_argument("--vae", required=True, metavar="PATH", help="autoencoder, of any layout")
    encoded.add_argument("--part", type=part, default=(0, 1), metavar="I/N",
                         help="make every N-th shard, from I on: one process per GPU (0/1)")
    packed = add("pack", precompute.pack, PackFlags,
                 "store plain text as one file of tokens, with an end token after each document")
    packed.add_argument("paths", nargs="+", metavar="FILE",
                        help=".txt, or .jsonl with one text, or object with \"text\", per line; also .gz")
    packed.add_argument("out", type=Path, metavar="T.safetensors", help="the token file to write")
    add("build-emoji", build_emoji, BuildFlags, "build the emoji set again from two npm packages")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.flags:
        flags = cli.take(args.flags, vars(args))
        vars(args).update(vars(flags))                           # add the defaults
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
