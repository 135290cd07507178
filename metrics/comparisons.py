"""The commands of evaluate.py that compare images with images, or with their captions.

They are functions of the command line's flags, which evaluate.py declares.
"""

import argparse
import functools
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image

from common.cli import require
from common.files import sha256
from dataset.images import fit_picture, read_picture
from metrics import benchmarks, clip, fid, inception
from metrics.tables import about, left_out, tell


def load_network(args: argparse.Namespace) -> tuple[inception.Inception, dict[str, str]]:
    """Return Inception, and what to print of it."""
    if str(args.inception) == "random":
        network = inception.untrained().to(args.device)
        return network, dict(inception="random weights: this shows that it runs, and no quality")
    return inception.load(args.inception, args.device), dict(inception=sha256(args.inception)[:16])


def fid_command(args: argparse.Namespace) -> None:
    """FID, and KID where the features of both are there."""
    network, notes = load_network(args)
    first, second = args.sources
    a, bad = fid.measure(first, network, args.device)
    b, more = fid.measure(second, network, args.device)
    scores = {"FID": fid.frechet(a, b)}
    if a.features is not None and b.features is not None:
        mean, spread = fid.kid(a.features, b.features)
        scores["KID x 1000"] = 1000 * mean
        if spread:
            scores["its spread"] = 1000 * spread
    notes["pictures"] = f"{a.count or 'an unknown number'} and {b.count or 'an unknown number'}"
    tell(args, about(Path(first)), {first: scores}, bad + more, 3, **notes)


def statistics_command(args: argparse.Namespace) -> None:
    """A source's statistics as a file that `fid`, and pytorch-fid, take in its place."""
    network, _ = load_network(args)
    statistics, bad = fid.measure(args.source, network, args.device)
    fid.save(args.out, statistics, args.features)
    print(f"{args.out}: {statistics.count} pictures")
    left_out(bad)


def read_statistics(args: argparse.Namespace, network: inception.Inception,
                    groups: dict[str, list[str]], side: str, read: Callable[[str], Image.Image]
                    ) -> tuple[dict[str, fid.Statistics], list[str]]:
    """Return the statistics of each group of names, and of "overall" if there are several groups;
    and a line about each image that can't be read, and each group without two that can."""
    features, bad = {}, []
    for group, names in groups.items():
        listing = [(name, functools.partial(read, name)) for name in names]
        features[group], lost = fid.features(network, listing, args.device,
                                             f"{group}, {side} pictures")
        bad += lost
    if len(groups) > 1:
        readable = [values for values in features.values() if len(values)]
        overall = np.concatenate(readable) if readable else []
        features = {"overall": overall, **features}
    statistics = {}
    for group, values in features.items():
        if len(values) > 1:
            statistics[group] = fid.statistics(values)
        else:
            bad.append(f"{group}: {len(values)} {side} pictures that can be read, so no score")
    return statistics, bad


def against(args: argparse.Namespace, network: inception.Inception, groups: dict[str, list[str]],
            read_real: Callable[[str], Image.Image]) -> tuple[dict[str, float], list[str]]:
    """Return the FID of each group of drawings against the real images, and a line about each thing
    that can't be measured.  Raises UserError if nothing is left."""
    def read_drawn(name: str) -> Image.Image:
        return read_picture(args.drawn / name)

    drawn, bad = read_statistics(args, network, groups, "drawn", read_drawn)
    real, more = read_statistics(args, network, groups, "real", read_real)
    bad += more
    scores = {group: fid.frechet(drawn[group], real[group]) for group in drawn if group in real}
    require((bool(scores), f"{args.drawn}: nothing to compare; {''.join(bad[:1])}"))
    return scores, bad


def coco(args: argparse.Namespace) -> None:
    """FID of 30,000 drawings against their captions' pictures, cut to the same shape; CLIP score."""
    network, notes = load_network(args)
    asked = benchmarks.read("coco", [str(args.captions)])
    # all drawings have the size of the first one
    first = min(args.drawn.glob("*.png"), default=args.drawn / asked.names[0])
    width, height = read_picture(first).size

    def read_real(name: str) -> Image.Image:
        return fit_picture(read_picture(args.real / asked.real[name]), height, width)

    scores, bad = against(args, network, {"FID": asked.names}, read_real)
    if args.clip:
        pairs = [(name, args.drawn / name, prompt)
                 for name, (prompt, _) in zip(asked.names, asked.jobs)]
        cosines, more = clip_cosines(args, pairs)
        scores.update(clip.summarize(cosines))
        bad = list(dict.fromkeys(bad + more))               # an image that can't be read is in both
    tell(args, about(args.drawn), {"these drawings": scores}, asked.bad + bad, 2, "coco", **notes)


def mjhq(args: argparse.Namespace) -> None:
    """FID against the real pictures of the same prompts, of all and of each category."""
    network, notes = load_network(args)
    asked = benchmarks.read("mjhq", [str(args.captions)])

    def read_real(name: str) -> Image.Image:
        return read_picture(args.real / asked.real[name])

    scores, bad = against(args, network, asked.categories, read_real)
    tell(args, about(args.drawn), {"these drawings": scores}, asked.bad + bad, 2, "mjhq", **notes)


def clip_cosines(args: argparse.Namespace, pairs: clip.Pairs) -> tuple[list[float], list[str]]:
    model = clip.load(args.clip, args.device)
    return clip.score(pairs, model, clip.load_tokenizer(args.clip), args.device)


def clip_command(args: argparse.Namespace) -> None:
    """How well pictures fit their captions."""
    cosines, bad = clip_cosines(args, clip.read_pairs(args.drawn))
    scores = clip.summarize(cosines)
    tell(args, about(args.drawn), {str(args.drawn): scores}, bad, 2, pairs=len(cosines),
         clip=str(args.clip))
