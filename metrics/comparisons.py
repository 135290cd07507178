"""The commands of evaluate.py that compare images with images or with captions.

Each is a function of the parsed flags, which evaluate.py declares.
"""

import argparse
import functools
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image

from common.cli import UserError, require
from common.files import inside, sha256
from dataset.images import fit_image, read_image
from metrics import benchmarks, clip, fid, inception
from metrics.tables import print_left_out, read_note, tell


def load_network(args: argparse.Namespace) -> tuple[inception.Inception, str]:
    """Return Inception, and the digest of its weights."""
    if str(args.inception) == "random":
        return inception.untrained().to(args.device), "random weights, which measure no quality"
    return inception.load(args.inception, args.device), sha256(args.inception)[:16]


def fid_command(args: argparse.Namespace) -> None:
    """Measure FID, and KID if features of both sources are available."""
    first, second = args.sources
    note = read_note(Path(first))
    for source in args.sources:
        require((source.startswith("emoji:") or Path(source).exists(),
                 f"{source}: no such file or folder"))
    network, digest = load_network(args)
    a, left_out = fid.measure(first, network, args.device, digest)
    b, more = fid.measure(second, network, args.device, digest)
    scores = {"FID": fid.frechet(a, b)}
    if a.features is not None and b.features is not None:
        mean, spread = fid.kid(a.features, b.features)
        scores["KID x 1000"] = 1000 * mean
        if spread:
            scores["its spread"] = 1000 * spread
    images = f"{a.count or 'an unknown number'} and {b.count or 'an unknown number'}"
    settings = dict(inception=digest, images=images)
    tell(args, {first: scores}, left_out + more, note, settings)


def statistics_command(args: argparse.Namespace) -> None:
    """Write a source's statistics to a file.  `fid` and pytorch-fid accept it as a source."""
    require((not fid.is_statistics(args.source),
             f"{args.source}: holds statistics already; expected images"))
    network, digest = load_network(args)
    statistics, left_out = fid.measure(args.source, network, args.device, digest)
    fid.save(args.out, statistics, args.features)
    print(f"{args.out}: {statistics.count} images")
    print_left_out(left_out)


def read_statistics(args: argparse.Namespace, network: inception.Inception,
                    groups: dict[str, list[str]], side: str, read: Callable[[str], Image.Image]
                    ) -> tuple[dict[str, fid.Statistics], list[str]]:
    """Return the statistics of each group of images, and of "overall" if there are several groups;
    and a line for each unreadable image, and for each group with fewer than two readable ones.

    side: "drawn" or "real", for messages.  read: returns the image of a name."""
    features, left_out = {}, []
    for group, names in groups.items():
        listing = [functools.partial(read, name) for name in names]
        title = f"{group}, {side} images"
        features[group], unread = fid.features(network, listing, args.device, title)
        left_out += unread
    if len(groups) > 1:
        readable = [values for values in features.values() if len(values)]
        overall = np.concatenate(readable) if readable else []
        features = {"overall": overall, **features}
    statistics = {}
    for group, values in features.items():
        if len(values) > 1:
            statistics[group] = fid.statistics(values)
        else:
            left_out.append(f"{group}: {len(values)} {side} images that can be read, so no score")
    return statistics, left_out


def compare(args: argparse.Namespace, benchmark: benchmarks.Benchmark,
            groups: dict[str, list[str]], size: tuple[int, int] | None = None
            ) -> tuple[dict[str, float], list[str], dict[str, str]]:
    """Return the FID of each group of drawings against its real images, a line for each image or
    group that is left out, and the settings.

    size: (height, width) to crop and resize real images to.  Raises UserError if no group is left.
    """
    def read_drawn(name: str) -> Image.Image:
        return read_image(args.drawn / name)

    def read_real(name: str) -> Image.Image:
        image = read_image(inside(args.real, benchmark.real[name]))
        return fit_image(image, *size) if size else image

    require((args.real.is_dir(), f"{args.real}: no such folder; expected that of the real images"))
    network, digest = load_network(args)
    drawn, left_out = read_statistics(args, network, groups, "drawn", read_drawn)
    real, more = read_statistics(args, network, groups, "real", read_real)
    left_out += more
    scores = {group: fid.frechet(drawn[group], real[group]) for group in drawn if group in real}
    require((scores, f"{args.drawn}: nothing to compare; {''.join(left_out[:1])}"))
    return scores, left_out, dict(inception=digest)


def size_of_drawings(folder: Path, names: list[str]) -> tuple[int, int]:
    """Return (height, width) of the first drawing that can be read; all have the same.  Raises
    UserError."""
    for name in names:
        try:
            image = read_image(folder / name)
        except UserError:
            continue
        return image.height, image.width
    raise UserError(f"{folder}: none of its drawings can be read; expected {names[0]} and others")


def coco(args: argparse.Namespace) -> None:
    """Measure FID of 30,000 drawings against real images, cut to the same size, and CLIP score."""
    benchmark = benchmarks.read("coco", [str(args.captions)])
    note = read_note(args.drawn)
    scorer = load_clip(args) if args.clip else None         # before FID, which takes long
    size = size_of_drawings(args.drawn, benchmark.names)
    scores, left_out, settings = compare(args, benchmark, {"FID": benchmark.names}, size)
    if scorer:
        pairs = []
        for name, (prompt, _) in zip(benchmark.names, benchmark.jobs):
            pairs.append((name, args.drawn / name, prompt))
        cosines, more = clip.score(pairs, *scorer, args.device)
        scores.update(clip.summarize(cosines))
        left_out = list(dict.fromkeys(left_out + more))     # both list the unreadable drawings
    left_out = benchmark.left_out + left_out
    tell(args, {"these drawings": scores}, left_out, note, settings)


def mjhq(args: argparse.Namespace) -> None:
    """Measure FID against the real images of the same prompts, for all and for each category."""
    benchmark = benchmarks.read("mjhq", [str(args.captions)])
    note = read_note(args.drawn)
    scores, left_out, settings = compare(args, benchmark, benchmark.categories)
    left_out = benchmark.left_out + left_out
    tell(args, {"these drawings": scores}, left_out, note, settings)


def load_clip(args: argparse.Namespace) -> tuple:
    """Return CLIP and its tokenizer.  Raises UserError if they do not fit together."""
    network, tokenizer = clip.load(args.clip, args.device), clip.load_tokenizer(args.clip)
    rows, tokens = network.embed.num_embeddings, tokenizer.get_vocab_size()
    require((tokens <= rows, f"{args.clip}: its tokenizer has {tokens} tokens, its table {rows} rows"))
    return network, tokenizer


def clip_command(args: argparse.Namespace) -> None:
    """Measure how well images fit their captions, as CLIP score."""
    note = read_note(args.drawn)
    scorer = load_clip(args)
    cosines, left_out = clip.score(clip.read_pairs(args.drawn), *scorer, args.device)
    rows = {str(args.drawn): clip.summarize(cosines)}
    settings = dict(pairs=len(cosines), clip=str(args.clip))
    tell(args, rows, left_out, note, settings)
