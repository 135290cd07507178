"""Measure a checkpoint.

    python evaluate.py emoji                                  # the emoji set: captions, answers, drawings
    python evaluate.py draw geneval evaluation_metadata.jsonl out/geneval       # a benchmark's pictures
    torchrun --standalone --nproc_per_node=8 evaluate.py draw coco captions_val2014.json out/coco
    python evaluate.py fid out/drawn photos --inception pt_inception-2015-12-05-6726825d.pth
    python evaluate.py coco out/coco val2014 captions_val2014.json --inception ... --clip clip-vit-large
    python evaluate.py mjhq out/mjhq mjhq30k_imgs meta_data.json --inception ...
    python evaluate.py clip out/drawn --clip clip-vit-large
    python evaluate.py score geneval results.jsonl --made out/geneval          # what its scorer found, read
    python evaluate.py answer vqav2 v2_OpenEnded_mscoco_val2014_questions.json val2014 vqa.jsonl
    python evaluate.py score vqav2 vqa.jsonl                                   # what these are worth

`draw` and `answer` give each prompt and question a seed of its own: what they make is the same at any number
of processes, and what was stopped goes on.  OUT.json says what made it, and stands beside every score.  Each
command names at its end what had to be left out; --json writes all of it.  What the scores are: metrics/.
"""

import cli
cli.interruptible(__name__)

import argparse
import functools
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from typing import Callable

import answering
import data
import emoji
import gallery
import parallel
import questions
import sample
import show
from answering import Ask
from cli import require
from files import write_json, write_text
from devices import DEVICES, choose_device
from metrics import answers, benchmarks, captions, comparisons, emojis
from metrics.tables import about, left_out, table, tell
from parts import Parts
from progress import Progress
from reading import STEPS

WALK = ["--guidance", "--shift", "--solver", "--guidance-interval"]
PARTS = ["--checkpoint", "--dtype", "--height", "--width", "--length", "--vae", "--t5", "--tokenizer",
         "--mask-embedding"]
ANSWER_ROOM = 32        # tokens of an answer behind the longest prompt with --shots


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
        shared = parallel.first(lambda: gallery.settings(parts, **how))  # reads the weights' file
        lacking = sorted(parallel.gather(gallery.missing(jobs, asked.names, args.out,
                                                         range(rank, len(jobs), world), shared, asked.each)))
        if rank == 0:
            note = dict(made_by=args.command_line, benchmark=args.benchmark, files=len(jobs),
                        drawings_a_file=asked.each, settings=shared)
            args.out.mkdir(parents=True, exist_ok=True)
            write_json(Path(f"{args.out}.json"), note)
            for name, text in asked.files.items():
                (args.out / name).parent.mkdir(parents=True, exist_ok=True)
                write_text(args.out / name, text)
        share, say = lacking[rank::world], Progress("pictures", rank=rank, world=world).update
        for done, _ in enumerate(gallery.draw(parts, jobs, asked.names, args.out, share, shared, asked.each,
                                              **how), 1):
            say(done, len(share))
        if rank == 0:
            print(f"{args.out}: {len(jobs)} pictures, {len(jobs) - len(lacking)} of which were there")
            left_out(asked.bad)
            left_out(long, "cut")


def asked_of(args: argparse.Namespace) -> tuple[list[Ask], list[str]]:
    """(what `answer` asks, lines about what it can't)."""
    if args.benchmark == "captions":
        require((len(args.questions) == 1, f"captions: {len(args.questions)} files, expected one"))
        _, names, bad = captions.read_captions(Path(args.questions[0]))
        return [Ask(name, file) for name, file in names.items()][:args.limit], bad
    suffix = questions.SUFFIX[args.benchmark] if args.suffix is None else args.suffix
    asked, bad = answers.questions(args.benchmark, args.questions, suffix)
    shown, more = answers.questions(args.benchmark, args.examples, suffix) if args.shots else ([], [])
    before = lambda q: answers.shots(shown, args.shots, f"{args.seed} {q.id}", q)
    return [Ask(q.id, q.image, f"{before(q)}Q: {q.question}".removeprefix("Q: "))
            for q in asked[:args.limit]], bad + more


def make_room(parts: Parts, asked: list[Ask], args: argparse.Namespace) -> None:
    """Lengthen the answers' positions so that the longest prompt with its --shots fits.

    Raises UserError where --length, or the checkpoint's position table, leaves room for none."""
    prompts = [data.question_prompt(ask.question) for ask in asked]
    sizes = sorted(map(len, parts.tokenizer.many(prompts)))
    needed = sizes[-1] + ANSWER_ROOM
    if needed <= parts.answer_length:
        return
    if getattr(args, "length", "auto") == "auto" and not parts.own:          # T5 has no position table
        parts.answer_length = needed
        return
    advice = f"at most {parts.sizes.text_length} positions: use fewer --shots" if parts.own else (
        f"--length {parts.answer_length}: use --length {needed}")
    require((sizes[0] + 2 <= parts.answer_length, f"--shots {args.shots}: the prompts have {sizes[0]} to "
             f"{sizes[-1]} tokens, {advice}"))


def answer(args: argparse.Namespace) -> None:
    """Answers to a benchmark's questions, or captions, a line each, shared among torchrun's processes."""
    rank, world, device = parallel.start(args.device)
    with parallel.one_voice():
        asked, bad = asked_of(args)
        parts = sample.open_parts(vars(args), device)
        require((parts.family != "SD3", "this checkpoint is SD3's, which has no text head: it only draws"))
        if args.shots and asked:
            make_room(parts, asked, args)
        kind = "text" if args.benchmark == "captions" else "answer"
        how = dict(steps=STEPS[kind]) | sample.reads(vars(args))
        parts.silent = True
        note = dict(made_by=args.command_line, benchmark=args.benchmark, questions=args.questions,
                    asked=len(asked), limit=args.limit, shots=args.shots, examples=args.examples,
                    suffix=args.suffix, choices=args.choices, seed=args.seed,
                    checkpoint=parallel.first(parts.digest), length=parts.answer_length,
                    dtype=str(parts.dtype).removeprefix("torch."),
                    settings={name: how.get(name, parts.defaults.get(name))
                              for name in sample.READS})
        lost = answering.fill(parts, asked, args.pictures, args.out, note, rank, world, args.seed,
                              args.choices, Progress("questions", rank=rank, world=world).update, **how)
        if lost is not None:
            print(f"{args.out}: {len(asked) - len(lost)} of {len(asked)}")
            left_out(bad + lost)


def score(args: argparse.Namespace) -> None:
    """What a benchmark's own scorer found of drawings, or what was answered, as the paper's tables."""
    kind, made = args.benchmark, about(args.made or args.results)
    if kind in benchmarks.SCORES:
        scores, bad = benchmarks.SCORES[kind](args.results)
        tell(args, made, {"these drawings": scores}, bad, 1 if kind == "dpg" else 4, kind)
        return
    files = args.questions or made.get("questions")
    require((bool(files), f"{args.results}: no {args.results.name}.json beside it says what was asked; name "
             f"the files with --questions"))
    if kind == "captions":
        references, names, bad = captions.read_captions(Path(files[0]))
        said, more = captions.read_results(args.results)
        some = {name: references[name] for name in list(names)[:made.get("limit")] if name in references}
        scores, _, lost = captions.score(some, said)
        tell(args, made, {"these captions": scores}, bad + more + lost, 4)
        return
    asked, bad = answers.questions(kind, files)
    said, more = answers.read_answers(args.results)
    scores, lost = answers.score(kind, asked[:made.get("limit")], said)
    rows = defaultdict(dict)
    for name, value in scores.items():                           # "random: F1"; "overall", "binary: choose"
        of, _, figure = name.rpartition(": ")
        if kind == "pope" or not of:
            rows[of or "these answers"][figure] = value
    tell(args, made, rows, bad + more + lost, 1, kind, hidden={"every type": scores})


def small(args: argparse.Namespace) -> None:
    """The emoji set, as the paper's tables: drawings, reading, POPE."""
    given, parts = vars(args), sample.open_parts(vars(args), args.device)
    records, pictures = emoji.load(args.data, parts.height)
    pictures = pictures.float() / 127.5 - 1
    walk, how = sample.walk(given), sample.reads(given)
    if args.page:
        show.write_picture(args.page, emojis.page(parts, records, pictures, walk, how))
        return
    chance = how.get("temperature", parts.defaults["temperature"]) > 0 or (
        how.get("order", parts.defaults["order"]) == "random")

    @functools.cache
    def read(split: str, seed: int) -> dict[str, float]:
        return emojis.reading(parts, records, pictures, split, args.limit, seed, how) if args.limit else {}

    def drawn(split: str, seed: int) -> dict[str, float]:
        if not args.prompts:
            return {}
        return emojis.drawings(parts, records, pictures, split, args.prompts, seed, walk)
    results = {split: [drawn(split, seed) | read(split, seed if chance else 0) for seed in args.seeds]
               for split in args.splits}
    settings = gallery.settings(parts, **walk) | {"reading": how or "as sample.py does"}
    for kind, rows in emojis.tables(results).items():
        print(table(rows, corner=f"{kind}, %"), end="\n\n")
    print(f"command: {args.command_line}\ncheckpoint: {settings['checkpoint']}")
    if args.json:
        write_json(args.json, dict(command=args.command_line, settings=settings, results=results))


# ------------------------------------------------------------------------------------------- the command line

def borrow(parser: cli.Parser, names: list[str]) -> None:
    """Flags of sample.py, with its words."""
    def add(name: str, mode: str = "", **how) -> None:
        if name in names:
            parser.add_argument(name, default=argparse.SUPPRESS, **how)
    for group in (sample.draw_flags, sample.read_flags, sample.part_flags):
        group(add)


count = lambda low: dict(type=cli.number(int, low), metavar="N")


def own_flags(small_: cli.Parser, drawn: cli.Parser, said: cli.Parser) -> None:
    """Of `emoji`, `draw` and `answer`, which load a checkpoint."""
    small_.add_argument("--data", type=Path, default=emoji.TAR, help="the emoji tar")
    small_.add_argument("--splits", nargs="+", choices=emoji.SPLITS, default=emoji.SPLITS)
    small_.add_argument("--seeds", nargs="+", type=cli.number(int, 0, 2**50), default=[0],
                        help="of the drawings, and of reading where that is random (0)")
    small_.add_argument("--limit", default=200, **count(0), help="pictures a split that are read (200)")
    small_.add_argument("--prompts", default=200, **count(0), help="prompts a split that are drawn (200)")
    small_.add_argument("--page", type=Path, help="measure nothing: a picture of what is drawn and read")
    borrow(small_, [*WALK, *PARTS, *map(cli.flag, sample.READS), "--compile"])
    drawn.add_argument("benchmark", choices=list(benchmarks.READ), help="see metrics/benchmarks.py")
    drawn.add_argument("prompts", nargs="+", metavar="PROMPTS", help="its published file, or files")
    drawn.add_argument("out", type=Path, metavar="OUT", help="a folder")
    drawn.add_argument("--n", default=None, **count(1), help="drawings of a prompt (as published, or 1)")
    drawn.add_argument("--limit", default=None, **count(1), help="the first N prompts (all)")
    drawn.add_argument("--seed", default=0, **count(0), help="of the first drawing (0)")
    borrow(drawn, [*WALK, *PARTS, "--steps", "--negative-prompt", "--batch", "--compile"])
    said.add_argument("benchmark", choices=[*answers.READ, "captions"], help="see metrics/answers.py; of "
                      "captions COCO's file")
    said.add_argument("questions", nargs="+", metavar="QUESTIONS", help="its published file, or files")
    said.add_argument("pictures", type=Path, metavar="PICTURES", help="the folder its pictures lie in")
    said.add_argument("out", type=Path, metavar="OUT.jsonl")
    said.add_argument("--limit", default=None, **count(1), help="the first N questions (all)")
    said.add_argument("--seed", default=0, **count(0), help="of all; each question has its own of it (0)")
    said.add_argument("--shots", default=0, **count(0), help="questions with their answers before each (0)")
    said.add_argument("--examples", nargs="+", metavar="QUESTIONS", help="the files that --shots come from")
    said.add_argument("--suffix", help="behind each question (as in training)")
    said.add_argument("--by", choices=["writing", "likelihood"], default="writing", help="likelihood: the "
                      "likeliest of --choices is the answer (writing)")
    said.add_argument("--choices", nargs="+", metavar="TEXT")
    borrow(said, [*PARTS, *map(cli.flag, sample.READS)])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, does: Callable) -> cli.Parser:
        command = commands.add_parser(name, doc=does.__doc__, help=does.__doc__.splitlines()[0])
        command.set_defaults(does=does)
        return command
    small_, drawn, said = add("emoji", small), add("draw", draw), add("answer", answer)
    own_flags(small_, drawn, said)
    two, one = add("fid", comparisons.fid_command), add("statistics", comparisons.statistics_command)
    two.add_argument("sources", nargs=2, metavar="SOURCE", help="a folder, a tar, emoji:SPLIT, or an .npz")
    one.add_argument("source", metavar="SOURCE", help="a folder, a tar, or emoji:SPLIT")
    one.add_argument("out", type=Path, metavar="OUT.npz")
    one.add_argument("--features", action="store_true", help="keep them too, for KID: 8 kB a picture")
    named = add("coco", comparisons.coco), add("mjhq", comparisons.mjhq)
    for command, real, file in zip(named, ("val2014", "mjhq30k_imgs"), (
            "captions_val2014.json", "meta_data.json")):
        command.add_argument("drawn", type=Path, metavar="DRAWN", help="what `draw` made of these prompts")
        command.add_argument("real", type=Path, metavar="REAL", help=f"the folder {real}")
        command.add_argument("captions", type=Path, metavar=file)
        command.add_argument("--statistics", type=Path, metavar="FOLDER", help="where those of REAL are "
                             "kept for the next time")
    pairs, found = add("clip", comparisons.clip_command), add("score", score)
    pairs.add_argument("drawn", type=Path, metavar="FOLDER", help="pictures, each with its caption: the text "
                       "field \"prompt\" of a PNG, NAME.txt, or metadata.jsonl")
    found.add_argument("benchmark", choices=[*benchmarks.SCORES, *answers.READ, "captions"])
    found.add_argument("results", type=Path, metavar="RESULTS", help="what `answer` wrote; GenEval's "
                       "results.jsonl; DPG-Bench's results.txt; of T2I-CompBench the folder that was drawn")
    found.add_argument("--made", type=Path, metavar="OUT", help="the drawings whose settings to print")
    found.add_argument("--questions", nargs="+", metavar="QUESTIONS", help="the files that were asked, if no "
                       "OUT.jsonl.json says so")
    for command in (pairs, named[0]):
        command.add_argument("--clip", type=Path, required=command is pairs, help="CLIP's weights, a folder "
                             "or a .safetensors file")
        command.add_argument("--vocabulary", type=Path, help="its vocabulary, if not beside them")
    for command in (two, one, *named):
        command.add_argument("--inception", type=Path, required=True, help="its weights as pytorch-fid has "
                             "them, .pth or .safetensors; random: to see that all runs")
    for command in (two, one, *named, pairs):
        command.add_argument("--batch", default=32, **count(1), help="pictures at once (32)")
    for command in (small_, drawn, said, two, one, *named, pairs):
        command.add_argument("--device", choices=DEVICES, default="auto", help="(auto)")
    for command in (small_, two, *named, pairs, found):
        command.add_argument("--json", type=Path, help="also write all of it here")
    args = parser.parse_args(argv)
    for name in ("json", "page"):
        path = getattr(args, name, None)
        if path and not path.parent.is_dir():
            parser.error(f"{path}: the folder {path.parent} does not exist")
    if args.command == "answer":
        if (args.by == "likelihood") != bool(args.choices):
            parser.error("--by likelihood and --choices go together")
        if bool(args.shots) != bool(args.examples):
            parser.error("--shots and --examples go together")
    args.command_line = shlex.join(["python", "evaluate.py", *argv])
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.command not in ("draw", "answer"):
        args.device = choose_device(getattr(args, "device", "cpu"))
    args.does(args)


if __name__ == "__main__":
    cli.run(main)
