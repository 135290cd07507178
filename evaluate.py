"""Measure a checkpoint.

    python evaluate.py emoji                                  # the emoji set: captions, answers, drawings
    python evaluate.py draw geneval evaluation_metadata.jsonl out/geneval       # a benchmark's pictures
    torchrun --standalone --nproc_per_node=8 evaluate.py draw coco captions_val2014.json out/coco
    python evaluate.py fid out/drawn photos --inception pt_inception-2015-12-05-6726825d.pth
    python evaluate.py coco out/coco val2014 captions_val2014.json --inception ... --clip clip-vit-large
    python evaluate.py mjhq out/mjhq mjhq30k_imgs meta_data.json --inception ...
    python evaluate.py clip out/drawn --clip clip-vit-large
    python evaluate.py score geneval results.jsonl --drawn out/geneval          # what its scorer found, read

`draw` makes each picture from its prompt and a seed of its own: the same ones at any number of processes and
any batch; what was stopped goes on.  OUT.json says what made them, and stands beside every score.  Each
command names at its end what had to be left out; --json writes all of it.  What the scores are: metrics/.
"""

import cli
cli.interruptible(__name__)

import argparse
import functools
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Callable

import numpy as np

import emoji
import gallery
import parallel
import sample
import show
from checkpoint import write_text
from cli import Rate, require
from metrics import benchmarks, clip, emojis, fid, inception
from metrics.emojis import SPLITS
from pictures import fit_picture, read_picture, to_picture
from sources import read_json, sha256

WALK = ["--guidance", "--shift", "--solver", "--guidance-interval", "--guidance-rule", "--zero-steps"]
PARTS = ["--checkpoint", "--dtype", "--height", "--width", "--length", "--vae", "--t5", "--tokenizer",
         "--mask-embedding"]
SHOWN = 10              # of what was left out, lines on the terminal


def table(rows: dict[str, dict[str, list[float] | float]], decimals: int = 1, corner: str = "") -> str:
    """{row: {column: value}} -> a table; of values of several seeds the mean, and from least to most where
    they differ."""
    columns = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for row, cells in rows.items():
        shown = []
        for name in columns:
            values = cells.get(name, [])
            values = values if isinstance(values, list) else [values]
            text = f"{statistics.mean(values):.{decimals}f}" if values else ""
            low, high = (f"{find(values):.{decimals}f}" for find in (min, max)) if values else ("", "")
            shown.append(text + f" ({low}–{high})" * (low != high))
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def tell(args: argparse.Namespace, made: dict, rows: dict, bad: list[str] = (), decimals: int = 1,
         published: str = "", **more) -> None:
    """Print a table, of all that made it, and of what was left out; and write it to --json.

    made: the contents of OUT.json.  published: whose rows of the paper's tables stand below."""
    print(table(rows | benchmarks.PUBLISHED.get(published, {}), decimals))
    for name, value in [("command", args.command_line), *made.items(), *more.items()]:
        shown = ", ".join(f"{k} {v}" for k, v in value.items() if v) if isinstance(value, dict) else value
        print(f"{name}: {shown}")
    left_out(bad)
    if args.json:
        found = dict(command=args.command_line, drawn=made, **more, scores=rows, left_out=list(bad))
        write_text(args.json, json.dumps(found, indent=1) + "\n")


def left_out(bad: list[str], how: str = "left out") -> None:
    if bad:
        print(f"{how}: {len(bad)}", *bad[:SHOWN], *["..."] * (len(bad) > SHOWN), sep="\n  ")


def about(drawn: Path | None) -> dict:
    """What `draw` noted of a folder, if it was made so."""
    file = drawn and Path(f"{str(drawn).rstrip('/')}.json")
    return read_json(file) if file and file.exists() else {}


# ------------------------------------------------------------------------------------------------- commands

def draw(args: argparse.Namespace) -> None:
    """A benchmark's pictures, shared among the processes of torchrun."""
    rank, world, device = parallel.start(args.device)
    with parallel.one_voice():
        asked = benchmarks.read(args.benchmark, args.prompts, args.n, args.seed, args.limit)
        parts = sample.open_parts(vars(args), device)
        how = sample.walk(vars(args)) | dict(negative=getattr(args, "negative_prompt", ""))
        jobs = [(parts.tokenizer.lowered(prompt), seed) for prompt, seed in asked.jobs]
        lengths = map(len, parts.tokenizer.many([prompt for prompt, _ in jobs]))
        long = [f"{name}: has {tokens} tokens, room for {parts.length - 1}"
                for name, tokens in zip(asked.names, lengths) if tokens > parts.length - 1]
        parts.silent, parts.tokenizer.warns = True, False                # one line for all of it, at the end
        shared = gallery.settings(parts, **how)
        lacking = sorted(parallel.gather(gallery.missing(jobs, asked.names, args.out,
                                                         range(rank, len(jobs), world), shared, asked.each)))
        if rank == 0:
            note = dict(drawn_by=args.command_line, benchmark=args.benchmark, files=len(jobs),
                        drawings_a_file=asked.each, settings=shared)
            args.out.mkdir(parents=True, exist_ok=True)
            write_text(Path(f"{args.out}.json"), json.dumps(note, indent=1) + "\n")
            for name, text in asked.files.items():
                (args.out / name).parent.mkdir(parents=True, exist_ok=True)
                write_text(args.out / name, text)
        share = lacking[rank::world]
        rate = Rate("pictures" if world == 1 else f"pictures, the first of {world} processes'", len(share))
        for done, _ in enumerate(gallery.draw(parts, jobs, asked.names, args.out, share, shared, asked.each,
                                              **how), 1):
            if rank == 0:
                rate.at(done)
        if rank == 0:
            print(f"{args.out}: {len(jobs)} pictures, {len(jobs) - len(lacking)} of which were there")
            left_out(asked.bad)
            left_out(long, "cut")


def network(args: argparse.Namespace) -> tuple[inception.Inception, dict]:
    """(Inception, what to say of it)."""
    if str(args.inception) == "random":
        return inception.untrained().to(args.device), dict(
            inception="random weights, which have learnt nothing: this shows that it runs, and no quality")
    return inception.load(args.inception, args.device), dict(inception=sha256(args.inception)[:16])


def progress(what: str) -> Callable[[int, int], None]:
    """What is told how many of how many are done."""
    rate = Rate(what, 0)

    def say(done: int, total: int) -> None:
        rate.total = total
        rate.at(done)
    return say


def listed(source: str) -> fid.Listing | Path:
    """A split of the emoji set, emoji:train, or what `fid.measure` makes of a path."""
    if not source.startswith("emoji:"):
        return Path(source)
    split = source.removeprefix("emoji:")
    require((split in SPLITS, f"{source}: the emoji set has the splits {', '.join(SPLITS)}"))
    return [(record["key"], functools.partial(to_picture, picture / 127.5 - 1))
            for record, picture in zip(*emoji.load()) if record["split"] == split]


def of_source(args: argparse.Namespace, net: inception.Inception,
              source: str) -> tuple[fid.Statistics, list[str]]:
    return fid.measure(listed(source), net, batch=args.batch, device=args.device,
                       say=progress(f"{source}, pictures"))


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


def against(args: argparse.Namespace, net: inception.Inception, real: dict[str, str],
            groups: dict[str, list[str]], square: bool = False) -> tuple[dict[str, float], list[str]]:
    """FID of the drawings of each group of names against their `real` pictures, and "overall" of several
    groups; lines about what can't be measured.  --statistics: a file of each group, read if all are there.

    square: real pictures are cut to the shape of the drawings first."""
    groups = {group: names for group, names in groups.items() if names}
    every = [name for names in groups.values() for name in names]
    first = next((name for name in every if (args.drawn / name).exists()), None)
    size = read_picture(args.drawn / first).size if square and first else None

    def read(name: str):
        picture = read_picture(args.real / real[name])
        return fit_picture(picture, size[1], size[0]) if size else picture
    wanted = ["overall"] * (len(groups) > 1) + list(groups)
    files = {group: args.statistics / f"{group}.npz" for group in wanted if args.statistics}
    stored = bool(files) and all(file.exists() for file in files.values())
    found, bad, scores, gone = {}, [], {}, []
    for group, names in groups.items():
        for which, source in (("drawn", lambda name: read_picture(args.drawn / name)), ("real", read)):
            if which == "drawn" or not stored:
                listing = [(name, functools.partial(source, name)) for name in names]
                found[which, group], lost = fid.features(net, listing, args.batch, args.device,
                                                         progress(f"{group}, {which} pictures"))
                bad += lost
    for group in wanted:
        sides = {}
        for which in ("drawn", "real"):
            some = [found[which, g] for g in groups if (which, g) in found and group in (g, "overall")]
            some = np.concatenate([part for part in some if len(part)] or [np.empty((0, 1))])
            if which == "real" and stored:
                sides[which] = fid.load(files[group])
            elif len(some) > 1:
                sides[which] = fid.statistics(some)
            else:
                gone.append(f"{group}: {len(some)} {which} pictures that can be read, so it has no score")
        if "real" in sides and files and not stored:
            files[group].parent.mkdir(parents=True, exist_ok=True)
            fid.save(files[group], sides["real"])
        if len(sides) == 2:
            scores[group] = fid.frechet(sides["drawn"], sides["real"])
    return scores, gone + bad


def coco(args: argparse.Namespace) -> None:
    """FID of 30,000 drawings against the pictures that their captions are of, cut square; CLIP score."""
    asked, (net, said) = benchmarks.read("coco", [str(args.captions)]), network(args)
    scores, bad = against(args, net, asked.real, {"FID": asked.names}, square=True)
    if args.clip:
        pairs = [(name, args.drawn / name, prompt) for name, (prompt, _) in zip(asked.names, asked.jobs)]
        result, _, lost = clip_score(args, pairs)
        scores |= result
        bad += [line for line in lost if line not in bad]
    tell(args, about(args.drawn), {"these drawings": scores}, asked.bad + bad, 2, "coco", **said)


def mjhq(args: argparse.Namespace) -> None:
    """FID against the real pictures of the same prompts, of all and of each category."""
    asked, (net, said) = benchmarks.read("mjhq", [str(args.captions)]), network(args)
    scores, bad = against(args, net, asked.real, asked.categories)
    tell(args, about(args.drawn), {"these drawings": scores}, asked.bad + bad, 2, "mjhq", **said)


def clip_score(args: argparse.Namespace, pairs: list) -> tuple[dict[str, float], int, list[str]]:
    """(scores, how many pairs, lines about the others)."""
    model, vocabulary = clip.load(args.clip, args.device), clip.tokenizer_of(args.vocabulary or args.clip)
    found = clip.score(pairs, model, vocabulary, args.device, args.batch, progress("CLIP, pairs"))
    spread = {"its standard error": found.error} if found.count > 1 else {}
    return {"CLIP": found.mean} | spread, found.count, found.bad


def clip_command(args: argparse.Namespace) -> None:
    """How well pictures fit their captions."""
    scores, count, bad = clip_score(args, clip.pairs_of(args.drawn))
    tell(args, about(args.drawn), {str(args.drawn): scores}, bad, 2, pairs=count, clip=str(args.clip))


def score(args: argparse.Namespace) -> None:
    """What a benchmark's own scorer found, as the paper's table."""
    scores, bad = benchmarks.SCORES[args.benchmark](args.results)
    made = about(args.drawn or (args.results if args.results.is_dir() else None))
    tell(args, made, {"these drawings": scores}, bad, 1 if args.benchmark == "dpg" else 4, args.benchmark)


def small(args: argparse.Namespace) -> None:
    """The emoji set, as the paper's tables: drawings, reading, POPE."""
    given, parts = vars(args), sample.open_parts(vars(args), args.device)
    records, pictures = emoji.load(args.data, parts.height)
    pictures = pictures.float() / 127.5 - 1
    if args.page:
        train, tone, style = [[i for i, r in enumerate(records) if r["split"] == split][:11]
                              for split in SPLITS]
        drawn, read = train[:2] + tone[:6], tone[6:] + style[:3]        # learnt and held out; held out
        captions = lambda indices: [records[i]["caption"] for i in indices]
        show.write_picture(args.page, sample.results(parts, captions(drawn), captions(read), pictures[read]))
        return
    names = dict(temperature="temperature", order="order", level="level", top_p="top_p", refresh="refresh",
                 tokens_per_step="per_step", steps="steps")
    walk, how = sample.walk(given), {ours: given[name] for name, ours in names.items() if name in given}
    chance = how.get("temperature", parts.defaults["temperature"]) > 0 or (
        how.get("order", parts.defaults["order"]) == "random")
    results = {}
    for split in args.splits:
        once = None if chance or not args.limit else emojis.reading(
            parts, records, pictures, split, args.limit, 0, how)
        results[split] = [
            (emojis.drawings(parts, records, pictures, split, args.prompts, seed, walk)
             if args.prompts else {})
            | (once or (emojis.reading(parts, records, pictures, split, args.limit, seed, how)
                        if args.limit else {})) for seed in args.seeds]
    settings = gallery.settings(parts, **walk) | {"reading": how or "as sample.py does"}
    for kind, rows in emojis.tables(results).items():
        print(table(rows, corner=f"{kind}, %"), end="\n\n")
    print(f"command: {args.command_line}\ncheckpoint: {settings['checkpoint']}")
    if args.json:
        found = dict(command=args.command_line, settings=settings, results=results)
        write_text(args.json, json.dumps(found, indent=1) + "\n")


# ------------------------------------------------------------------------------------------- the command line

def borrow(parser: cli.Parser, names: list[str]) -> None:
    """Flags of sample.py, with its words."""
    def add(name: str, mode: str = "", **how) -> None:
        if name in names:
            parser.add_argument(name, default=argparse.SUPPRESS, **how)
    for group in (sample.draw_flags, sample.read_flags, sample.part_flags):
        group(add)


count = lambda low: dict(type=cli.number(int, low), metavar="N")


def own_flags(small_: cli.Parser, drawn: cli.Parser) -> None:
    """Of `emoji` and `draw`, which load a checkpoint."""
    small_.add_argument("--data", type=Path, default=emoji.TAR, help="the emoji tar")
    small_.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    small_.add_argument("--seeds", nargs="+", type=cli.number(int, 0, 2**50), default=[0],
                        help="of the drawings, and of reading where that is random (0)")
    small_.add_argument("--limit", default=200, **count(0), help="pictures a split that are read (200)")
    small_.add_argument("--prompts", default=200, **count(0), help="prompts a split that are drawn (200)")
    small_.add_argument("--page", type=Path, help="measure nothing: a picture of results on held-out samples")
    borrow(small_, [*WALK, *PARTS, "--steps", "--order", "--temperature", "--tokens-per-step", "--level",
                    "--top-p", "--refresh", "--compile"])
    drawn.add_argument("benchmark", choices=list(benchmarks.READ), help="see metrics/benchmarks.py")
    drawn.add_argument("prompts", nargs="+", metavar="PROMPTS", help="its published file, or files")
    drawn.add_argument("out", type=Path, metavar="OUT", help="a folder")
    drawn.add_argument("--n", default=None, **count(1), help="drawings of a prompt (as published, or 1)")
    drawn.add_argument("--limit", default=None, **count(1), help="the first N prompts (all)")
    drawn.add_argument("--seed", default=0, **count(0), help="of the first drawing (0)")
    borrow(drawn, [*WALK, *PARTS, "--steps", "--negative-prompt", "--batch", "--compile"])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = lambda name, does: commands.add_parser(name, doc=does.__doc__, help=does.__doc__.splitlines()[0])
    small_, drawn = add("emoji", small), add("draw", draw)
    own_flags(small_, drawn)
    two, one = add("fid", fid_command), add("statistics", statistics_command)
    two.add_argument("sources", nargs=2, metavar="SOURCE", help="a folder, a tar, emoji:SPLIT, or an .npz")
    one.add_argument("source", metavar="SOURCE", help="a folder, a tar, or emoji:SPLIT")
    one.add_argument("out", type=Path, metavar="OUT.npz")
    one.add_argument("--features", action="store_true", help="keep them too, for KID: 8 kB a picture")
    named = add("coco", coco), add("mjhq", mjhq)
    for command, real, captions in zip(named, ("val2014", "mjhq30k_imgs"), (
            "captions_val2014.json", "meta_data.json")):
        command.add_argument("drawn", type=Path, metavar="DRAWN", help="what `draw` made of these prompts")
        command.add_argument("real", type=Path, metavar="REAL", help=f"the folder {real}")
        command.add_argument("captions", type=Path, metavar=captions)
        command.add_argument("--statistics", type=Path, metavar="FOLDER", help="where those of REAL are "
                             "kept for the next time")
    pairs, found = add("clip", clip_command), add("score", score)
    pairs.add_argument("drawn", type=Path, metavar="FOLDER", help="pictures, each with its caption: the text "
                       "field \"prompt\" of a PNG, NAME.txt, or metadata.jsonl")
    found.add_argument("benchmark", choices=list(benchmarks.SCORES))
    found.add_argument("results", type=Path, metavar="RESULTS", help="GenEval's results.jsonl; DPG-Bench's "
                       "results.txt; of T2I-CompBench the folder that was drawn")
    found.add_argument("--drawn", type=Path, metavar="FOLDER", help="whose settings to print")
    for command in (pairs, named[0]):
        command.add_argument("--clip", type=Path, required=command is pairs, help="CLIP's weights, a folder "
                             "or a .safetensors file")
        command.add_argument("--vocabulary", type=Path, help="its vocabulary, if not beside them")
    for command in (two, one, *named):
        command.add_argument("--inception", type=Path, required=True, help="its weights as pytorch-fid has "
                             "them, .pth or .safetensors; random: to see that all runs")
    for command in (two, one, *named, pairs):
        command.add_argument("--batch", default=32, **count(1), help="pictures at once (32)")
    for command in (small_, drawn, two, one, *named, pairs):
        command.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(auto)")
    for command in (small_, two, *named, pairs, found):
        command.add_argument("--json", type=Path, help="also write all of it here")
    args = parser.parse_args(argv)
    for name in ("json", "page"):
        path = getattr(args, name, None)
        if path and not path.parent.is_dir():
            parser.error(f"{path}: the folder {path.parent} does not exist")
    args.command_line = shlex.join(["python", "evaluate.py", *argv])
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.command != "draw":
        args.device = cli.device(getattr(args, "device", "cpu"))
    dict(emoji=small, draw=draw, fid=fid_command, statistics=statistics_command, coco=coco, mjhq=mjhq,
         clip=clip_command, score=score)[args.command](args)


if __name__ == "__main__":
    cli.run(main)
