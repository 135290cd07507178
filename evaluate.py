"""Measure a checkpoint.

    python evaluate.py emoji                            # the emoji set: captions, answers, drawings
    python evaluate.py draw geneval evaluation_metadata.jsonl out/geneval   # a benchmark's pictures
    torchrun --standalone --nproc_per_node=8 evaluate.py draw coco captions_val2014.json out/coco
    python evaluate.py fid out/drawn photos --inception pt_inception-2015-12-05-6726825d.pth
    python evaluate.py coco out/coco val2014 captions_val2014.json --inception ... --clip clip-vit-large
    python evaluate.py mjhq out/mjhq mjhq30k_imgs meta_data.json --inception ...
    python evaluate.py clip out/drawn --clip clip-vit-large
    python evaluate.py score geneval results.jsonl --made out/geneval         # its scorer's results
    python evaluate.py answer vqav2 v2_OpenEnded_mscoco_val2014_questions.json val2014 vqa.jsonl
    python evaluate.py score vqav2 vqa.jsonl                                   # their accuracy

`draw` and `answer` give each prompt and question a seed of its own: the results are the same at any
number of processes, and a stopped run resumes.  OUT.json has the settings, which are printed with
every score.  Each command ends with what had to be left out; --json writes all of it.  metrics/
explains the scores.
"""

from common import cli
cli.interruptible(__name__)

import argparse
import shlex
import sys
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

from common import processes
from common.cli import require
from common.devices import DEVICES, choose_device
from common.files import write_json, write_text
from common.progress import Progress
from dataset import emoji, questions
from dataset.questions import question_prompt
from inference import image_folder
from inference.answer_file import AnswerFile, Ask
from inference.image_folder import ImageFolder
from inference.image_to_text import ReadConfig
from inference.parts import ModelConfig, Parts, open_parts
from inference.text_to_image import DrawConfig
from inference.texts import read_prompt
from metrics import answers, benchmarks, captions, comparisons, emojis
from metrics.tables import about, left_out, table, tell
from viz import grids

ANSWERED = [*answers.READ, "captions"]
SEEDS = 2**50           # the largest; those of drawings follow from it
ANSWER_ROOM = 32        # tokens of an answer behind the longest prompt with --shots


# ----------------------------------------------------------------------------------------- commands

def write_notes(args: argparse.Namespace, asked: benchmarks.Asked,
                settings: dict[str, str]) -> None:
    """Write OUT.json, and the files that the benchmark's scorer reads."""
    args.out.mkdir(parents=True, exist_ok=True)
    note = dict(made_by=args.command_line, benchmark=args.benchmark, files=len(asked.jobs),
                drawings_a_file=asked.each, settings=settings)
    write_json(Path(f"{args.out}.json"), note)
    for name, content in asked.files.items():
        (args.out / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out / name, content)


def draw(args: argparse.Namespace) -> None:
    """A benchmark's pictures, shared among the processes of torchrun."""
    rank, world, device = processes.start(args.device)
    with processes.one_voice():
        config = cli.take(DrawConfig, vars(args))
        asked = benchmarks.read(args.benchmark, args.prompts, args.n, args.seed, args.limit)
        parts = open_parts(cli.take(ModelConfig, vars(args)), device)
        parts.silent = True
        negative = config.negative_prompt
        config.negative_prompt = read_prompt(parts, negative, "negative prompt")
        jobs = [(parts.tokenizer.lowered(prompt), seed) for prompt, seed in asked.jobs]
        shared = processes.first(lambda: image_folder.settings(parts, config))  # reads the weights
        folder = ImageFolder(args.out, jobs, asked.names, shared, asked.each)
        missing = folder.missing(range(rank, len(jobs), world))
        missing = sorted(processes.gather(missing))
        if rank == 0:
            write_notes(args, asked, shared)
        share = missing[rank::world]
        progress = Progress("pictures", len(share), rank, world)
        for done, _ in enumerate(folder.draw(parts, share, config), 1):
            progress.update(done)
        if rank == 0:
            print(f"{args.out}: {len(jobs)} pictures, {len(jobs) - len(missing)} of which were there")
            left_out(asked.bad)


def read_questions(args: argparse.Namespace) -> tuple[list[Ask], list[str]]:
    """Return what `answer` asks, and a line for each thing that it can't ask."""
    if args.benchmark == "captions":
        _, names, bad = captions.read_captions(Path(args.questions[0]))
        return [Ask(image_id, file) for image_id, file in names.items()][:args.limit], bad
    suffix = questions.SUFFIX[args.benchmark] if args.suffix is None else args.suffix
    asked, bad = answers.questions(args.benchmark, args.questions, suffix)
    examples = []
    if args.shots:
        examples, more = answers.questions(args.benchmark, args.examples, suffix)
        bad += more
    asks = []
    for q in asked[:args.limit]:
        shots = answers.shots(examples, args.shots, f"{args.seed} {q.id}", q)
        asks.append(Ask(q.id, q.image, f"{shots}Q: {q.question}".removeprefix("Q: ")))
    return asks, bad


def make_room(parts: Parts, asked: list[Ask], args: argparse.Namespace) -> None:
    """Lengthen the answers' positions so that the longest prompt with its --shots fits.

    Raises UserError where --length, or the checkpoint's position table, leaves room for none."""
    prompts = [question_prompt(ask.question) for ask in asked]
    sizes = sorted(map(len, parts.tokenizer.many(prompts)))
    needed = sizes[-1] + ANSWER_ROOM
    if needed <= parts.answer_length:
        return
    if vars(args).get("length", "auto") == "auto" and not parts.own:       # T5 has no position table
        parts.answer_length = needed
        return
    advice = f"--length {parts.answer_length}: use --length {needed}"
    if parts.own:
        advice = f"at most {parts.sizes.text_length} positions: use fewer --shots"
    require((sizes[0] + 2 <= parts.answer_length,
             f"--shots {args.shots}: the prompts have {sizes[0]} to "
             f"{sizes[-1]} tokens, {advice}"))


def answer(args: argparse.Namespace) -> None:
    """Answers to a benchmark's questions, or captions, shared among the processes of torchrun."""
    rank, world, device = processes.start(args.device)
    with processes.one_voice():
        require((args.pictures.is_dir(), f"{args.pictures}: no such folder; expected that of the "
                 "benchmark's pictures"))
        config = cli.take(ReadConfig, vars(args))
        asks, bad = read_questions(args)
        parts = open_parts(cli.take(ModelConfig, vars(args)), device)
        parts.check_text_head()
        parts.silent = True
        if args.shots:
            make_room(parts, asks, args)
        note = {name: getattr(args, name) for name in
                ("benchmark", "questions", "limit", "shots", "examples", "suffix", "choices",
                 "seed")}
        note |= dict(made_by=args.command_line, asked=len(asks), pictures=str(args.pictures),
                     checkpoint=processes.first(parts.digest),
                     length=parts.answer_length, dtype=str(parts.dtype).removeprefix("torch."),
                     settings=vars(parts.complete(config)))
        progress = Progress("questions", rank=rank, world=world)
        file = AnswerFile(args.out, asks, args.pictures, note, config, args.choices, args.seed)
        lost = file.fill(parts, rank, world, progress.update)
        if lost is not None:
            print(f"{args.out}: {len(asks) - len(lost)} of {len(asks)}")
            left_out(bad + lost)


def score(args: argparse.Namespace) -> None:
    """The paper's tables, from the results of a benchmark's own scorer or from answers."""
    kind = args.benchmark
    made = about(args.made or args.results)
    if kind in benchmarks.SCORES:
        scores, bad = benchmarks.SCORES[kind](args.results)
        tell(args, made, {"these drawings": scores}, bad, 1 if kind == "dpg" else 4, kind)
        return
    files = args.questions or made.get("questions")
    require((bool(files),
             f"{args.results}: has no {args.results.name}.json beside; give --questions"))
    if kind == "captions":
        references, names, bad = captions.read_captions(Path(files[0]))
        written, more = captions.read_results(args.results)
        asked = {name: references[name] for name in list(names)[:made.get("limit")]
                 if name in references}
        scores, lost = captions.score(asked, written)
        tell(args, made, {"these captions": scores}, bad + more + lost, 4)
        return
    asked, bad = answers.questions(kind, files)
    given, more = answers.read_answers(args.results)
    scores, lost = answers.score(kind, asked[:made.get("limit")], given)
    rows = defaultdict(dict)
    for name, value in scores.items():                   # "random: F1"; "overall", "binary: choose"
        row, _, column = name.rpartition(": ")
        if kind == "pope" or not row:
            rows[row or "these answers"][column] = value
    tell(args, made, rows, bad + more + lost, 1, kind, hidden={"every type": scores})


def measure_emoji(args: argparse.Namespace) -> None:
    """The emoji set, as the paper's tables: drawings, reading, POPE."""
    drawing = cli.take(DrawConfig, vars(args))
    reading = cli.take(ReadConfig, vars(args))
    parts = open_parts(cli.take(ModelConfig, vars(args)))
    records, pictures = emoji.load(emoji.TAR, parts.height)
    pictures = pictures.float() / 127.5 - 1
    if args.page:
        grids.write_picture(args.page, emojis.page(parts, records, pictures, drawing, reading))
        return
    complete = parts.complete(reading)
    is_random = complete.temperature > 0 or complete.order == "random"
    results = {split: [] for split in args.splits}
    for split, runs in results.items():
        for seed in args.seeds:
            run = {}
            if args.prompts:
                run |= emojis.drawings(parts, records, pictures, split, args.prompts, seed, drawing)
            if args.limit and (is_random or not runs):           # else every seed reads the same
                run |= emojis.reading(parts, records, pictures, split, args.limit, seed, reading)
            runs.append(run)
    shared = image_folder.settings(parts, drawing) | {"reading": vars(complete)}
    for kind, rows in emojis.tables(results).items():
        print(table(rows, corner=f"{kind}, %"), end="\n\n")
    print(f"command: {args.command_line}\ncheckpoint: {shared['checkpoint']}")
    if args.json:
        write_json(args.json, dict(command=args.command_line, settings=shared, results=results))


# --------------------------------------------------------------------------------- the command line

def count(low: int, default: int | None = None, high: int | None = None) -> dict:
    """Return how argparse reads a whole number."""
    return dict(type=cli.number(int, low, high), default=default, metavar="N")


def emoji_flags(parser: cli.Parser) -> None:
    add = parser.add_argument
    add("--splits", nargs="+", choices=emoji.SPLITS, default=emoji.SPLITS)
    add("--seeds", nargs="+", type=cli.number(int, 0, SEEDS), default=[0],
        help="of the drawings, and of reading where that is random (0)")
    add("--limit", **count(0, 200), help="pictures a split that are read (200)")
    add("--prompts", **count(0, 200), help="prompts a split that are drawn (200)")
    add("--page", type=Path, help="measure nothing: a picture of what is drawn and read")
    parser.add_fields(DrawConfig)
    parser.add_fields(ReadConfig)
    parser.add_fields(ModelConfig)


def draw_flags(parser: cli.Parser) -> None:
    add = parser.add_argument
    add("benchmark", choices=list(benchmarks.READ), help="see metrics/benchmarks.py")
    add("prompts", nargs="+", help="its published file, or files")
    add("out", type=Path, help="a folder")
    add("--n", **count(1, high=1000), help="drawings of a prompt (as published, or 1)")
    parser.add_fields(DrawConfig)
    parser.add_fields(ModelConfig)


def answer_flags(parser: cli.Parser) -> None:
    add = parser.add_argument
    add("benchmark", choices=ANSWERED, help="see metrics/answers.py; captions: COCO's file")
    add("questions", nargs="+", help="its published file, or files")
    add("pictures", type=Path, help="the folder of its pictures")
    add("out", type=Path, metavar="OUT.jsonl")
    add("--shots", **count(0, 0), help="questions with their answers before each (0)")
    add("--examples", nargs="+", help="the files that --shots come from")
    add("--suffix", help="follows each question (as in training)")
    add("--by", choices=["writing", "likelihood"], default="writing",
        help="likelihood: the likeliest of --choices is the answer (writing)")
    add("--choices", nargs="+")
    parser.add_fields(ReadConfig)
    parser.add_fields(ModelConfig)


def score_flags(parser: cli.Parser) -> None:
    add = parser.add_argument
    add("benchmark", choices=[*benchmarks.SCORES, *ANSWERED])
    add("results", type=Path, help="what `answer` wrote; GenEval's results.jsonl; "
        "DPG-Bench's results.txt; for T2I-CompBench the folder that was drawn")
    add("--made", type=Path, help="the drawings whose settings to print")
    add("--questions", nargs="+", help="the files that were asked, if no "
        "OUT.jsonl.json says so")


def pairwise_flags(parser: cli.Parser) -> None:
    add = parser.add_argument
    add("drawn", type=Path, help="what `draw` made of these prompts")
    add("real", type=Path, help="the folder of the benchmark's pictures")
    add("captions", type=Path, help="the file that was given to `draw`")


def fid_flags(parser: cli.Parser) -> None:
    parser.add_argument("sources", nargs=2, help="a folder, a tar, emoji:SPLIT, or an .npz")


def statistics_flags(parser: cli.Parser) -> None:
    add = parser.add_argument
    add("source", help="a folder, a tar, or emoji:SPLIT")
    add("out", type=Path, metavar="OUT.npz")
    add("--features", action="store_true", help="keep them too, for KID: 8 kB a picture")


def clip_flags(parser: cli.Parser) -> None:
    parser.add_argument("drawn", type=Path, help="pictures, each with its caption: the "
                        "text field \"prompt\" of a PNG, or NAME.txt")


COMMANDS = dict(
    emoji=(measure_emoji, emoji_flags), draw=(draw, draw_flags), answer=(answer, answer_flags),
    score=(score, score_flags), fid=(comparisons.fid_command, fid_flags),
    statistics=(comparisons.statistics_command, statistics_flags),
    coco=(comparisons.coco, pairwise_flags), mjhq=(comparisons.mjhq, pairwise_flags),
    clip=(comparisons.clip_command, clip_flags))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, add_flags) in COMMANDS.items():
        text = function.__doc__
        command = commands.add_parser(name, doc=text, help=text.splitlines()[0])
        command.set_defaults(function=function)
        add_flags(command)
        if name in ("draw", "answer"):
            command.add_argument("--limit", **count(1),
                                 help="the first N prompts or questions (all)")
            command.add_argument("--seed", **count(0, 0, SEEDS),
                                 help="each one's own seed follows from it (0)")
        if name in ("fid", "statistics", "coco", "mjhq"):
            command.add_argument("--inception", type=Path, required=True,
                                 help="pytorch-fid's file of its "
                                 "weights; random: to see that all runs")
        if name in ("coco", "clip"):
            command.add_argument("--clip", type=Path, required=name == "clip",
                                 help="CLIP's Hugging Face folder")
        if name not in ("draw", "answer", "statistics"):
            command.add_argument("--json", type=Path, help="also write all of it here")
        if name in ("fid", "statistics", "coco", "mjhq", "clip"):
            command.add_argument("--device", choices=DEVICES, default="auto", help="(auto)")
    args = parser.parse_args(argv)
    path = getattr(args, "json", None)
    if path and not path.parent.is_dir():
        parser.error(f"{path}: the folder {path.parent} does not exist")
    if args.command == "answer":
        if (args.by == "likelihood") != bool(args.choices):
            parser.error("--by likelihood and --choices go together")
        if bool(args.shots) != bool(args.examples):
            parser.error("--shots and --examples go together")
        if args.benchmark == "captions" and (args.suffix or args.shots or len(args.questions) > 1):
            parser.error("captions: expected one file, and no --suffix and no --shots")
        unused = {flag.name for flag in fields(ReadConfig)} & vars(args).keys()
        if args.choices and unused:
            parser.error(f"{cli.flag(min(unused))} changes nothing with --by likelihood")
    if getattr(args, "page", None):
        parser.check_path("--page", args.page, grids.SUFFIXES)
        if args.json:
            parser.error("--json changes nothing with --page, which measures nothing")
    elif args.command == "emoji" and not args.limit and not args.prompts:
        parser.error("--limit 0 and --prompts 0 leave nothing to measure")
    if args.command == "draw" and vars(args).get("length") == "auto":
        parser.error("--length auto changes nothing with draw")
    args.command_line = shlex.join(["python", "evaluate.py", *argv])
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    args.device = getattr(args, "device", "auto")
    if args.command not in ("draw", "answer", "emoji", "score"):
        args.device = choose_device(args.device)
    args.function(args)


if __name__ == "__main__":
    cli.run(main)
