"""Measure a checkpoint.

    python evaluate.py emoji                            # the emoji set: captions, answers, images
    python evaluate.py shapes --checkpoint out/shapes   # the shapes world: exact scores
    python evaluate.py draw geneval evaluation_metadata.jsonl out/geneval   # a benchmark's images
    torchrun --standalone --nproc_per_node=8 evaluate.py draw coco captions_val2014.json out/coco
    python evaluate.py fid out/drawn photos --inception pt_inception-2015-12-05-6726825d.pth
    python evaluate.py coco out/coco val2014 captions_val2014.json --inception ... --clip clip-large
    python evaluate.py mjhq out/mjhq mjhq30k_imgs meta_data.json --inception ...
    python evaluate.py clip out/drawn --clip clip-large
    python evaluate.py score geneval results.jsonl --drawings out/geneval   # GenEval's results
    python evaluate.py answer vqav2 v2_OpenEnded_mscoco_val2014_questions.json val2014 vqa.jsonl
    python evaluate.py score vqav2 vqa.jsonl                            # accuracy of these answers

`draw` and `answer` give each prompt or question its own seed: the results are the same with any
number of processes, and an interrupted run resumes.  OUT.json has the settings, which are printed
with every score.  At their end, commands list what they left out, in ten lines at most; the --json
of those that print scores has the whole list.  The files in metrics/ explain the scores.
"""

from common import cli
cli.interruptible(__name__)

import argparse
import shlex
import sys
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Callable, NamedTuple

import mask_diffusion
from common import processes
from common.cli import is_text, require
from common.devices import DEVICES, choose_device
from common.files import is_there, write_json, write_text
from common.progress import Progress, chunks
from dataset import emoji, questions, shapes
from dataset.sources import question_prompt
from inference import image_folder
from inference.answer_file import AnswerFile, Ask
from inference.image_folder import ImageFolder
from inference.image_to_text import ReadConfig, check_steps
from inference.parts import SHAPES, ModelConfig, Parts, open_parts
from inference.text_to_image import DrawConfig
from inference.texts import read_prompt
from metrics import answers, benchmarks, captions, comparisons, emojis
from metrics.shape_scores import ROWS, ShapesTest
from metrics.tables import print_left_out, read_note, table, tell
from viz import grids

ANSWERED = [*answers.READ, "captions"]
MODELS = ["vae", "t5", "tokenizer", "mask_embedding"]            # flags that name parts of a model
SEEDS = 2**50           # the largest --seed; each drawing has a seed made from it and its number
ANSWER_ROOM = 32        # tokens kept free for an answer after the longest prompt with --shots


# ------------------------------------------------------------------------------------------ drawing

def write_notes(args: argparse.Namespace, benchmark: benchmarks.Benchmark,
                settings: dict[str, str]) -> None:
    """Write the settings to OUT.json, and the files that the benchmark's scorer reads."""
    args.out.mkdir(parents=True, exist_ok=True)
    note = dict(made_by=args.command_line, benchmark=args.benchmark, files=len(benchmark.jobs),
                images_per_file=benchmark.per_file, settings=settings)
    write_json(Path(f"{args.out}.json"), note)
    for name, content in benchmark.files.items():
        path = args.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, content)


def draw(args: argparse.Namespace) -> None:
    """Draw a benchmark's images.  Under torchrun the processes share the work."""
    rank, world, device = processes.start(args.device)
    with processes.one_voice():
        config = cli.take(DrawConfig, vars(args))
        benchmark = benchmarks.read(args.benchmark, args.prompts, args.n, args.seed, args.limit)
        note = Path(f"{args.out}.json")
        require((not is_there(note) or read_note(args.out),
                 f"{note}: is in the way: settings of drawings go there; name another folder"))
        parts = open_parts(cli.take(ModelConfig, vars(args)), device)
        parts.silent = True
        config.negative_prompt = read_prompt(parts, config.negative_prompt, "negative prompt")
        jobs = [(parts.tokenizer.lowered(prompt), seed) for prompt, seed in benchmark.jobs]
        # hashing the weights is slow: one process does it for all
        settings = processes.first(lambda: image_folder.settings(parts, config))
        folder = ImageFolder(args.out, jobs, benchmark.names, settings, benchmark.per_file)
        missing = folder.missing(range(rank, len(jobs), world))
        missing = sorted(processes.gather(missing))
        if rank == 0:
            write_notes(args, benchmark, settings)
        share = missing[rank::world]
        progress = Progress("images", len(share), rank, world)
        for done, _ in enumerate(folder.draw(parts, share, config), 1):
            progress.update(done)
        if processes.last():
            kept = len(jobs) - len(missing)
            print(f"{args.out}: {len(jobs)} images, {kept} were there")
            print_left_out(benchmark.left_out)


# ---------------------------------------------------------------------------------------- answering

def read_questions(args: argparse.Namespace) -> tuple[list[Ask], list[str]]:
    """Return the questions for `answer`, and a line for each one that is left out."""
    if args.benchmark == "captions":
        _, names, left_out = captions.read_captions(Path(args.questions[0]))
        asks = [Ask(image_id, file) for image_id, file in names.items()]
        return asks[:args.limit], left_out
    suffix = questions.SUFFIX[args.benchmark] if args.suffix is None else args.suffix
    scored, left_out = answers.questions(args.benchmark, args.questions, suffix)
    examples = []
    if args.shots:
        examples, more = answers.questions(args.benchmark, args.examples, suffix)
        left_out += more
    asks = []
    for q in scored[:args.limit]:
        shots = answers.shots(examples, args.shots, f"{args.seed} {q.id}", q)
        asks.append(Ask(q.id, q.image, f"{shots}Q: {q.question}".removeprefix("Q: ")))
    return asks, left_out


def make_room(parts: Parts, asks: list[Ask], args: argparse.Namespace) -> None:
    """Raise `parts.answer_length` so that the longest prompt with its --shots fits.

    Raises UserError if --length, or the checkpoint's position table, has no room for any prompt."""
    sizes = []
    for part in chunks(asks, 1024):     # the tokens of all prompts at once would need much memory
        sizes += map(len, parts.tokenizer.many([question_prompt(ask.question) for ask in part]))
    needed = max(sizes) + ANSWER_ROOM
    if needed <= parts.answer_length:
        return
    # only T5, which has no position table, can read longer texts
    if "length" not in vars(args) and not parts.has_embedding:
        parts.answer_length = needed
        return
    advice = f"--length {parts.answer_length}: use --length {needed}"
    if parts.has_embedding:
        advice = f"at most {parts.sizes.text_length} positions: use fewer --shots"
    require((min(sizes) + 2 <= parts.answer_length, f"--shots {args.shots}: the prompts have "
             f"{min(sizes)} to {max(sizes)} tokens, {advice}"))


def answer(args: argparse.Namespace) -> None:
    """Answer a benchmark's questions, or write captions; torchrun's processes share the work."""
    rank, world, device = processes.start(args.device)
    with processes.one_voice():
        require((args.images.is_dir(),
                 f"{args.images}: no such folder; expected that of the benchmark's images"))
        config = cli.take(ReadConfig, vars(args))
        asks, left_out = read_questions(args)
        parts = open_parts(cli.take(ModelConfig, vars(args)), device)
        check_steps(parts, config)
        parts.check_text_head()
        parts.silent = True
        if args.shots:
            make_room(parts, asks, args)
        recorded = "benchmark questions limit shots examples suffix choices seed".split()
        note = {name: getattr(args, name) for name in recorded}
        note |= dict(made_by=args.command_line, count=len(asks), images=str(args.images),
                     checkpoint=processes.first(parts.digest), length=parts.answer_length,
                     dtype=str(parts.dtype).removeprefix("torch."),
                     size=f"{parts.width}x{parts.height}",
                     settings=vars(parts.complete(config)))
        for name in MODELS:
            if path := getattr(args, name, None):
                note[name] = str(path)
        progress = Progress("questions", rank=rank, world=world)
        file = AnswerFile(args.out, asks, args.images, note, config, args.choices, args.seed)
        unanswered = file.write(parts, rank, world, progress.update)
        if unanswered is not None:                       # on the process that finishes last
            print(f"{args.out}: {len(asks) - len(unanswered)} of {len(asks)}")
            print_left_out(left_out + unanswered)


# ------------------------------------------------------------------------------------------ scoring

def score(args: argparse.Namespace) -> None:
    """Print scores as the paper's tables have them, from answers or from a benchmark's scorer."""
    if args.benchmark in benchmarks.SCORES:
        note = read_note(args.drawings or args.results)
        scores, left_out = benchmarks.SCORES[args.benchmark](args.results)
        tell(args, {"these drawings": scores}, left_out, note)
        return
    note = read_note(args.results)
    args.questions = args.questions or note.get("questions")
    limit = note.get("limit")
    texts = isinstance(args.questions, list) and all(map(is_text, args.questions))
    require((texts or not args.questions, f"{args.results}.json: \"questions\" are no paths"),
            (limit is None or type(limit) is int and limit > 0,
             f"{args.results}.json: \"limit\" is {ascii(limit)}, expected a number above 0"),
            (args.questions,
             f"{args.results}: no {args.results.name}.json of `answer` beside it; give "
             f"--questions"))
    if args.benchmark == "captions":
        score_captions(args, note)
    else:
        score_answers(args, note)


def score_captions(args: argparse.Namespace, note: dict) -> None:
    """Print the scores of captions that `answer` or another program wrote."""
    references, names, left_out = captions.read_captions(Path(args.questions[0]))
    written, more = captions.read_results(args.results)
    shown = list(names)[:note.get("limit")]
    references = {image_id: references[image_id] for image_id in shown if image_id in references}
    scores, unscored = captions.score(references, written)
    tell(args, {"these captions": scores}, left_out + more + unscored, note)


def score_answers(args: argparse.Namespace, note: dict) -> None:
    """Print the accuracy of answers; for POPE, one row for each subset."""
    scored, left_out = answers.questions(args.benchmark, args.questions)
    by_id, more = answers.read_answers(args.results)
    scores, problems = answers.score(args.benchmark, scored[:note.get("limit")], by_id)
    rows = defaultdict(dict)
    for name, value in scores.items():                   # "random: F1"; "overall", "structural: choose"
        row, _, column = name.rpartition(": ")
        if args.benchmark == "pope" or not row:
            rows[row or "these answers"][column] = value
    tell(args, rows, left_out + more + problems, note, hidden={"every type": scores})


# -------------------------------------------------------------------------------------------- emoji

def open_model(args: argparse.Namespace) -> tuple[Parts, DrawConfig, ReadConfig]:
    """Open the model that is measured, with the settings of drawing and reading."""
    drawing, reading = cli.take(DrawConfig, vars(args)), cli.take(ReadConfig, vars(args))
    parts = open_parts(cli.take(ModelConfig, vars(args)))
    parts.check_text_head()
    parts.silent = True
    return parts, drawing, reading


def measure_emoji(args: argparse.Namespace) -> None:
    """Measure drawing, reading and POPE on the emoji set, in tables like the paper's."""
    parts, drawing, reading = open_model(args)
    require((parts.height == parts.width,
             f"emoji: expected square images, not {parts.width}x{parts.height}"))
    records, images = emoji.load(emoji.TAR, parts.height)
    test = emojis.EmojiTest(parts, records, images.float() / 127.5 - 1)
    if args.page:
        grids.write_image(args.page, test.page(drawing, reading))
        return
    complete = parts.complete(reading)
    order = mask_diffusion.ORDERS[complete.order]
    is_random = complete.temperature > 0 or order.follows_reveal_step
    results = {split: [] for split in args.splits}
    for split, runs in results.items():
        for seed in args.seeds:
            scores = {}
            if args.prompts:
                scores |= test.draw(split, args.prompts, seed, drawing)
            if args.limit and (is_random or not runs):           # else every seed gives one result
                scores |= test.read(split, args.limit, seed, reading)
            runs.append(scores)
    print_results(args, parts, results, drawing, vars(complete))


def measure_shapes(args: argparse.Namespace) -> None:
    """Measure drawing, reading and calibration on the shapes world, whose scores are exact."""
    parts, drawing, reading = open_model(args)
    require(((parts.height, parts.width) == (shapes.SIDE, shapes.SIDE),
             f"shapes: expected images of {shapes.SIDE}x{shapes.SIDE} pixels, not {parts.width}x"
             f"{parts.height}"))
    test = ShapesTest(parts, args.world)
    if args.page:
        grids.write_image(args.page, test.page(drawing))
        return
    results = defaultdict(list)
    for seed in args.seeds:
        for row in ROWS:
            scores = {}
            if args.prompts:
                scores |= test.draw(row, args.prompts, seed, drawing)
            if args.limit:
                scores |= test.captions(row, args.limit, seed, reading)
                scores |= test.answers(row, args.limit, seed, reading)
            results[row].append(scores)
        if args.open:
            results["open prompts"].append(test.calibrate(args.open, seed, drawing))
    print_results(args, parts, results, drawing, vars(parts.complete(reading)))


def print_results(args: argparse.Namespace, parts: Parts, results: dict[str, list[dict]],
                  drawing: DrawConfig, reading: dict) -> None:
    """Print a table for each kind of score, and how they were made; with --json, also write them."""
    settings = image_folder.settings(parts, drawing) | {"reading": reading}
    for title, rows in emojis.tables(results).items():
        print(table(rows, corner=f"{title}, %"), end="\n\n")
    print(f"command: {args.command_line}\ncheckpoint: {settings['checkpoint']}")
    if args.json:
        write_json(args.json, dict(command=args.command_line, settings=settings, results=results))


# --------------------------------------------------------------------------------- the command line

def count(low: int, default: int | None = None, high: int | None = None) -> dict:
    """Return the arguments of `add_argument` for a whole number from low to high."""
    return dict(type=cli.number(int, low, high), default=default, metavar="N")


def emoji_flags(add: Callable) -> None:
    add("--splits", nargs="+", choices=emoji.SPLITS, default=emoji.SPLITS)
    add("--seeds", nargs="+", type=cli.number(int, 0, SEEDS), default=[0],
        help="seeds of the drawings, and of reading if that is random (0)")
    add("--limit", **count(0, 200), help="number of images to read from each split (200)")
    add("--prompts", **count(0, 200), help="number of prompts to draw from each split (200)")
    add("--page", type=Path, help="measure nothing; write an image with drawings and captions")


def shapes_flags(add: Callable) -> None:
    add("--checkpoint", type=Path, default=SHAPES, metavar="FILE", help="weights (assets/shapes)")
    add("--seeds", nargs="+", type=cli.number(int, 0, 1000), default=[0, 1, 2],
        help="seeds of the drawings, and of reading (0 1 2)")
    add("--limit", **count(0, 200), help="number of images to read, seen and held out (200)")
    add("--prompts", **count(0, 40), help="number of prompts to draw in each category (40)")
    add("--open", **count(0, 100), help="drawings of each open prompt, for calibration (100)")
    add("--world", choices=shapes.WORLDS, default="shapes",
        help="the source it was trained on (shapes)")
    add("--page", type=Path, help="measure nothing; write an image with drawings and what was read "
        "off them")


def draw_flags(add: Callable) -> None:
    add("benchmark", choices=list(benchmarks.READ), help="see metrics/benchmarks.py")
    add("prompts", nargs="+", help="the benchmark's published file or files")
    add("out", type=Path, help="the folder to write")
    add("--n", **count(1, high=1000), help="drawings per prompt (as published, or 1)")


def answer_flags(add: Callable) -> None:
    add("benchmark", choices=ANSWERED, help="see metrics/answers.py; captions: COCO's file")
    add("questions", nargs="+", help="the benchmark's published file or files")
    add("images", type=Path, help="the folder of the benchmark's images")
    add("out", type=Path, metavar="OUT.jsonl")
    add("--shots", **count(0, 0), help="number of answered examples before each question (0)")
    add("--examples", nargs="+", help="the files that --shots come from")
    add("--suffix", help="text after each question (as in training)")
    add("--choices", nargs="+", help="answer with the likeliest of these, and generate no text")


def score_flags(add: Callable) -> None:
    add("benchmark", choices=[*benchmarks.SCORES, *ANSWERED])
    add("results", type=Path, help="the file that `answer` wrote; GenEval's results.jsonl; "
        "DPG-Bench's results.txt; for T2I-CompBench the folder of drawings")
    add("--drawings", type=Path, help="the folder that `draw` wrote, to print its settings")
    add("--questions", nargs="+", help="the files that `answer` read, if no OUT.jsonl.json names "
        "them")


def pairwise_flags(add: Callable) -> None:
    add("drawn", type=Path, help="the folder that `draw` wrote for these prompts")
    add("real", type=Path, help="the folder of the benchmark's images")
    add("captions", type=Path, help="the file that was given to `draw`")


def fid_flags(add: Callable) -> None:
    add("sources", nargs=2, help="a folder, a tar, emoji:SPLIT, or an .npz, each")


def statistics_flags(add: Callable) -> None:
    add("source", help="a folder, a tar, or emoji:SPLIT")
    add("out", type=Path, metavar="OUT.npz")
    add("--features", action="store_true", help="also keep the features, for KID: 8 kB per image")


def clip_flags(add: Callable) -> None:
    add("drawn", type=Path, help="images, each with its caption: the text field \"prompt\" of a "
        "PNG, or NAME.txt")
    add("--clip", **SHARED["--clip"], required=True)


# flags that several commands share
SHARED = {
    "--limit": dict(count(1), help="the first N prompts or questions (all)"),
    "--seed": dict(count(0, 0, SEEDS), help="seeds each prompt or question (0)"),
    "--inception": dict(type=Path, required=True, help="pytorch-fid's file of Inception's weights; "
                        "random: only test that the command runs"),
    "--clip": dict(type=Path, help="CLIP's Hugging Face folder"),
    "--json": dict(type=Path, help="also write the full results to this file"),
    "--device": dict(choices=DEVICES, default="auto", help="(auto)"),
}


class Command(NamedTuple):
    """A row of COMMANDS."""
    run: Callable[[argparse.Namespace], None]
    add_flags: Callable[[Callable], None]   # receives parser.add_argument
    shared: str                             # keys of SHARED
    configs: tuple[type, ...] = ()          # dataclasses with a flag for each field


MEASURED = (DrawConfig, ReadConfig, ModelConfig)
COMMANDS = dict(
    emoji=Command(measure_emoji, emoji_flags, "--json", MEASURED),
    shapes=Command(measure_shapes, shapes_flags, "--json", MEASURED),
    draw=Command(draw, draw_flags, "--limit --seed", (DrawConfig, ModelConfig)),
    answer=Command(answer, answer_flags, "--limit --seed", (ReadConfig, ModelConfig)),
    score=Command(score, score_flags, "--json"),
    fid=Command(comparisons.fid_command, fid_flags, "--inception --json --device"),
    statistics=Command(comparisons.statistics_command, statistics_flags, "--inception --device"),
    coco=Command(comparisons.coco, pairwise_flags, "--inception --clip --json --device"),
    mjhq=Command(comparisons.mjhq, pairwise_flags, "--inception --json --device"),
    clip=Command(comparisons.clip_command, clip_flags, "--json --device"))


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command and its flags.  A wrong flag ends the program with status 2."""
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        text = command.run.__doc__
        subparser = commands.add_parser(name, doc=text, help=text.splitlines()[0])
        subparser.set_defaults(run=command.run)
        command.add_flags(subparser.add_argument)
        for config in command.configs:
            subparser.add_fields(config)
        for flag in command.shared.split():
            subparser.add_argument(flag, **SHARED[flag])
    args = parser.parse_args(argv)
    check(parser, args)
    args.command_line = shlex.join(["python", "evaluate.py", *argv])
    return args


def check(parser: cli.Parser, args: argparse.Namespace) -> None:
    """End the program with status 2 if flags contradict each other, or a file can't be written."""
    if vars(args).get("json"):
        parser.check_file("--json", args.json)
    for name in ("splits", "seeds", "prompts", "questions", "examples", "choices"):
        if isinstance(values := vars(args).get(name), list):
            parser.check_list(cli.flag(name), values)
    if vars(args).get("benchmark") == "captions" and len(args.questions or []) > 1:
        parser.error(f"captions: expected one file, got {len(args.questions)}")
    if args.command in ("draw", "answer"):
        parser.check_name("OUT", args.out)
    if args.command == "answer":
        check_answer(parser, args)
    if args.command == "score":
        check_score(parser, args)
    if args.command == "statistics":
        parser.check_file("OUT", args.out, [".npz"])
    if args.command in ("emoji", "shapes"):
        check_world(parser, args)


def check_answer(parser: cli.Parser, args: argparse.Namespace) -> None:
    if bool(args.shots) != bool(args.examples):
        parser.error("--shots and --examples go together")
    if args.benchmark == "captions" and (args.suffix or args.shots):
        parser.error("--suffix and --shots change nothing with captions")
    unused = {field.name for field in fields(ReadConfig)} & vars(args).keys()
    if args.choices and unused:
        parser.error(f"{cli.flag(min(unused))} changes nothing with --choices")


def check_score(parser: cli.Parser, args: argparse.Namespace) -> None:
    if args.drawings and args.benchmark not in benchmarks.SCORES:
        parser.error(f"--drawings changes nothing with {args.benchmark}")
    if args.questions and args.benchmark in benchmarks.SCORES:
        parser.error(f"--questions changes nothing with {args.benchmark}")


def check_world(parser: cli.Parser, args: argparse.Namespace) -> None:
    if args.page:
        parser.check_file("--page", args.page, grids.SUFFIXES)
        if args.json:
            parser.error("--json changes nothing with --page, which measures nothing")
    elif not args.limit and not args.prompts and not vars(args).get("open"):
        parser.error("--limit 0 and --prompts 0 leave nothing to measure")


def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    args.device = choose_device(vars(args).get("device", "auto"))
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
