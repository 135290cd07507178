"""The commands of evaluate.py that compare pictures with pictures, or with their captions.

They are functions of the command line's flags, which evaluate.py declares.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
from PIL import Image

import emoji
from cli import require
from files import sha256
from metrics import benchmarks, clip, fid, inception
from metrics.tables import about, left_out, tell
from progress import Progress
from pictures import fit_picture, read_picture, to_picture


def network(args: argparse.Namespace) -> tuple[inception.Inception, dict]:
    """(Inception, what to say of it)."""
    if str(args.inception) == "random":
        return inception.untrained().to(args.device), dict(
            inception="random weights, which have learnt nothing: this shows that it runs, and no quality")
    return inception.load(args.inception, args.device), dict(inception=sha256(args.inception)[:16])


def listed(source: str) -> fid.Listing | Path:
    """A split of the emoji set, emoji:train, or what `fid.measure` makes of a path."""
    if not source.startswith("emoji:"):
        return Path(source)
    split, (records, pictures) = emoji.split_named(source), emoji.load()
    return [(records[i]["key"], functools.partial(to_picture, pictures[i] / 127.5 - 1))
            for i in emoji.of_split(records, split)]


def of_source(args: argparse.Namespace, net: inception.Inception,
              source: str) -> tuple[fid.Statistics, list[str]]:
    return fid.measure(listed(source), net, batch=args.batch, device=args.device,
                       say=Progress(f"{source}, pictures").update)


def fid_command(args: argparse.Namespace) -> None:
    """FID, and KID where the features of both are there."""
    net, said = network(args)
    (a, bad), (b, more) = (of_source(args, net, source) for source in args.sources)
    scores = {"FID": fid.frechet(a, b)}
    if a.features is not None and b.features is not None:
        mean, spread = fid.kid(a.features, b.features)
        scores |= {"KID x 1000": 1000 * mean} | ({"its spread": 1000 * spread} if spread else {})
    said |= {"pictures": " and ".join(f"{found.count or 'an unknown number'}" for found in (a, b))}
    tell(args, about(Path(args.sources[0])), {args.sources[0]: scores}, bad + more, 3, **said)


def statistics_command(args: argparse.Namespace) -> None:
    """A source's statistics as a file that `fid`, and pytorch-fid, take in its place."""
    found, bad = of_source(args, network(args)[0], args.source)
    fid.save(args.out, found, args.features)
    print(f"{args.out}: {found.count} pictures")
    left_out(bad)


def looked_at(args: argparse.Namespace, net: inception.Inception, real: dict[str, str],
              groups: dict[str, list[str]], cut: bool,
              sides: list[str]) -> tuple[dict[tuple[str, str], np.ndarray], list[str]]:
    """({(side, group): features (n, D)}, lines about what can't be read) of the "drawn" and the "real" side
    of each group of names; cut: the real ones are cut, and resized, as large as the drawings."""
    found, bad, sizes = {}, [], []

    def drawing(name: str) -> Image.Image:
        picture = read_picture(args.drawn / name)
        sizes[:] = sizes or [picture.size]
        return picture

    def original(name: str) -> Image.Image:
        picture = read_picture(args.real / real[name])
        return fit_picture(picture, sizes[0][1], sizes[0][0]) if cut and sizes else picture
    for group, names in groups.items():
        for side in sides:
            read = dict(drawn=drawing, real=original)[side]
            listing = [(name, functools.partial(read, name)) for name in names]
            found[side, group], lost = fid.features(net, listing, args.batch, args.device,
                                                    Progress(f"{group}, {side} pictures").update)
            bad += lost
    return found, bad


def against(args: argparse.Namespace, net: inception.Inception, real: dict[str, str],
            groups: dict[str, list[str]], cut: bool = False) -> tuple[dict[str, float], list[str]]:
    """FID of the drawings of each group of names against their `real` pictures, and "overall" of several
    groups; lines about what can't be measured.  --statistics: a file of each group, read if all are there.

    Raises UserError if nothing is left."""
    groups = {group: names for group, names in groups.items() if names}
    wanted = ["overall"] * (len(groups) > 1) + list(groups)
    files = {group: args.statistics / f"{group}.npz" for group in wanted if args.statistics}
    stored = bool(files) and all(file.exists() for file in files.values())
    sides, scores, gone = ["drawn"] if stored else ["drawn", "real"], {}, []
    found, bad = looked_at(args, net, real, groups, cut, sides)
    for group in wanted:
        both = {"real": fid.load(files[group])} if stored else {}
        for side in sides:
            parts = [found[side, g] for g in groups if group in (g, "overall") and len(found[side, g])]
            some = np.concatenate(parts) if parts else []
            if len(some) > 1:
                both[side] = fid.statistics(some)
            else:
                gone.append(f"{group}: {len(some)} {side} pictures that can be read, so it has no score")
        if "real" in both and files and not stored:
            files[group].parent.mkdir(parents=True, exist_ok=True)
            fid.save(files[group], both["real"])
        if len(both) == 2:
            scores[group] = fid.frechet(both["drawn"], both["real"])
    require((bool(scores), f"{args.drawn}: nothing to compare; {''.join((gone + bad)[:1])}"))
    return scores, gone + bad


def coco(args: argparse.Namespace) -> None:
    """FID of 30,000 drawings against the pictures that their captions are of, cut as they are; CLIP score."""
    asked, (net, said) = benchmarks.read("coco", [str(args.captions)]), network(args)
    found, bad = against(args, net, asked.real, {"coco": asked.names}, cut=True)
    scores = {"FID": found["coco"]}
    if args.clip:
        pairs = [(name, args.drawn / name, prompt) for name, (prompt, _) in zip(asked.names, asked.jobs)]
        result, _, lost = clip_score(args, pairs)
        scores |= result
        bad = list(dict.fromkeys(bad + lost))                    # a picture that can't be read is in both
    tell(args, about(args.drawn), {"these drawings": scores}, asked.bad + bad, 2, "coco", **said)


def mjhq(args: argparse.Namespace) -> None:
    """FID against the real pictures of the same prompts, of all and of each category."""
    asked, (net, said) = benchmarks.read("mjhq", [str(args.captions)]), network(args)
    scores, bad = against(args, net, asked.real, asked.categories)
    tell(args, about(args.drawn), {"these drawings": scores}, asked.bad + bad, 2, "mjhq", **said)


def clip_score(args: argparse.Namespace, pairs: list) -> tuple[dict[str, float], int, list[str]]:
    """(scores, how many pairs, lines about the others)."""
    model, vocabulary = clip.load(args.clip, args.device), clip.tokenizer_of(args.vocabulary or args.clip)
    found = clip.score(pairs, model, vocabulary, args.device, args.batch, Progress("CLIP, pairs").update)
    spread = {"its standard error": found.error} if found.count > 1 else {}
    return {"CLIP": found.mean} | spread, found.count, found.bad


def clip_command(args: argparse.Namespace) -> None:
    """How well pictures fit their captions."""
    scores, count, bad = clip_score(args, clip.pairs_of(args.drawn))
    tell(args, about(args.drawn), {str(args.drawn): scores}, bad, 2, pairs=count, clip=str(args.clip))
