"""Sources of pictures with texts: a sample at a position; mixed by weight, in an order without state.

    python data.py show PATH[:WEIGHT] ... --out page.png     # what the trainer would see, and what is wrong
    python data.py index SHARD.tar ...                       # where a tar's samples are; also at first use
    python data.py latents PATH FOLDER --vae VAE             # pictures encoded once, before training
    python data.py pack BOOK.txt WEB.jsonl.gz T.safetensors  # plain text as tokens

A source is a path, told by what it is: a folder of pictures with captions, tars, a JSON list, stored latents
or tokens (sources.py), the published files of questions (questions.py), or the embedded set (emoji.py), whose
epoch has each emoji and style once or, with @each behind its path, each picture.  The sample at position i of
a run is a function of (run, i) alone: there are no iterators, and nothing about order is stored.

Shapes: n samples or positions, P pixels a side.
"""

import cli
cli.interruptible(__name__)

import hashlib
import re
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import questions
import sources
import tars
from cli import UserError, require
from files import sha256
from pictures import fit_picture, read_picture

PIXELS = dict(vae="pixels", channels="3")       # the stamp of pictures that are not encoded
EACH = "@each"                                  # behind the emoji tar's path: each picture as often


def question_prompt(question: str) -> str:
    """The paper's prompt format; the answer follows it directly."""
    return f"Q: {question} A: "


# ------------------------------------------------------------------------------------------------------ order

def fraction(text: str) -> float:
    """A text's hash as a number in [0, 1): the same on every machine, so splits never move."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def seeded(*key) -> torch.Generator:
    """A generator of random numbers that depend on the key alone."""
    return torch.Generator().manual_seed(int(fraction(repr(key)) * 2**53))


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
    import emoji                # here: it reads its pictures through this file
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
    """What a source is, wherever it lies: a file's contents, or names and sizes of many and how the first of
    them begins; its weight, and EACH."""
    path, weight = split_weight(spec)
    each, path = EACH * path.endswith(EACH), re.sub(r"(\.json)@.*", r"\1", path.removesuffix(EACH))
    places = [Path(place) for place in sources.expand(path)]
    if len(places) == 1 and places[0].is_file() and places[0].stat().st_size < 2**28:
        return f"{sha256(places[0])[:16]}:{weight}{each}"
    files = [(file, str(file.relative_to(place))) for place in places if place.is_dir()
             for file in sorted(place.rglob("*")) if file.is_file() and not file.name.startswith(".")
             and not file.name.endswith(tars.INDEX)]
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
        """What stands at a place of source k in an epoch; a source may choose one of several for it."""
        if hasattr(self.sources[k], "choose"):
            return self.sources[k].choose(place, fraction(f"{self.key} {k} {epoch} {place}"))
        return place

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


class Ahead(torch.utils.data.Dataset):
    """make(step), made by another process; a UserError comes back as what was made."""

    def __init__(self, make: Callable[[int], dict]):
        self.make = make

    def __getitem__(self, step: int) -> dict:
        try:
            return self.make(step)
        except UserError as error:
            return dict(error=str(error))


def deaf(_: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def feed(make: Callable[[int], dict], steps: range, workers: int) -> Iterator[dict]:
    """make(step) for each step in order: here, or by `workers` processes ahead.  The same either way.

    What ends a job (SLURM, `timeout`) sends SIGTERM to all of its processes: the workers leave it to this
    one, which saves first, and end with it."""
    loader = map(make, steps) if workers == 0 else torch.utils.data.DataLoader(
        Ahead(make), sampler=steps, batch_size=None, num_workers=workers, worker_init_fn=deaf)
    for made in loader:
        if "error" in made:
            raise UserError(made["error"])
        yield made


@contextmanager
def readers_watched() -> Iterator[None]:
    """torch says wherever the main process is that a worker of `feed` was killed, or that nobody is there
    whose tensor it is about to take: here it is a UserError."""
    try:
        yield
    except (RuntimeError, ConnectionResetError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"a process that reads data ahead was lost ({said}); the same command goes on from "
                        f"the newest checkpoint")


def latent_factor(specs: list[str]) -> int | None:
    """Pixels per latent, along a side, of the first stored latents among the sources; None without any."""
    for spec in specs:
        for file in map(str, Path(split_weight(spec)[0]).glob(sources.SHARDS.format("*"))):
            side = sources.mapped(file).get_slice("latents").get_shape()[-1]
            return int(sources.read_stamp(file)["pixels"]) // side
    return None


def choose_caption(sample: dict, recaption: float, chance: float) -> str:
    """One of a sample's captions or, for a share `recaption` of draws, the re-caption; chance: in [0, 1)."""
    again, captions = sample.get("recaption"), sample["captions"]
    if again and (not captions or chance < recaption):
        return again
    if again:
        chance = (chance - recaption) / (1 - recaption)
    return captions[int(chance * len(captions))]


def latents_of(samples: list[dict]) -> Tensor | None:
    """What a model diffuses, (B, C, h, w) float32: stored latents or pictures in [-1, 1]; None for text."""
    if "ids" in samples[0]:
        return None
    return torch.stack([sample["latents"].float() if "latents" in sample else
                        sample["picture"].float() / 127.5 - 1 for sample in samples])


def check_stamps(image: Mix | None, text: Mix, channels: int, learnt: str | None,
                 encoder: str | None) -> str | None:
    """What the latents of both losses are: "pixels", or the digest of the autoencoder that makes them.

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


def main(argv: list[str] | None = None) -> None:
    import prepare                                               # here: its commands read through this file
    prepare.main(argv)


if __name__ == "__main__":
    cli.run(main)
