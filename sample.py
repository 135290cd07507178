"""Draw images from text, and write text about images.

    python sample.py --prompt "red apple, noto style" --out apple.png       # draw
    python sample.py --prompts prompts.txt --out drawn                      # a line each
    python sample.py --image apple.png                                      # caption
    python sample.py --image apple.png --question "What kind of thing is this?"
    python sample.py --image apple.png --text "red [MASK], [MASK] style"    # fill in
    python sample.py --image apple.png --score "red apple, noto style"      # how likely
    python sample.py --image apple.png --strength 0.6 --prompt "green apple, noto style"

Without --checkpoint, the weights are those in assets/emoji, which train.py trained.  A checkpoint
can have any layout that checkpoint.py reads, such as the releases of D-DiT and SD3.  The same seed
gives the same result.  Defaults are in brackets; "published" is the default for the published
weights of D-DiT and SD3, where it differs.
"""

from common import cli
cli.interruptible(__name__)

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from common import files
from common.cli import UserError, is_text, option, require
from common.progress import chunks
from dataset.images import read_mask, read_image
from inference import image_folder, image_to_text
from inference.image_to_text import ReadConfig
from inference.parts import ModelConfig, open_parts
from inference.pipeline import Pipeline
from inference.text_to_image import DrawConfig, Edit, Trace, drawings
from inference.texts import check_question
from viz import grids, trajectory


# ------------------------------------------------------------------------------------- the request

# rows of TASKS, below, in which the settings of DrawConfig and ReadConfig have an effect
DRAW = "draw folder edit"
READ = "caption answer questions fill chat"


@dataclass
class Request:
    """The flags of sample.py, besides those of DrawConfig, ReadConfig and ModelConfig.

    tasks: rows of TASKS in which a flag has an effect."""
    prompt: str = option("", "draw an image of this text", tasks="draw edit", group="what to do")
    prompts: Path | None = option(None, "draw an image of each line, into a folder", tasks="folder")
    image: list[Path] = option([], "write a caption of each, or do what the next flags say",
                               tasks=f"edit score choose {READ}")
    strength: float | None = option(None, "draw --prompt over --image: 0 keeps it, 1 draws anew",
                                    low=0, high=1, tasks="edit")
    mask: Path | None = option(None, "draw --prompt over --image where this image is white",
                               tasks="edit")
    question: str = option("", "answer this question", tasks="answer score choose")
    questions: Path | None = option(None, "answer each line of this file", tasks="questions")
    chat: bool = option(False, "answer questions as they are typed", tasks="chat")
    text: str = option("", "replace each [MASK] of this text; --image is optional", tasks="fill")
    score: list[str] = option([], "print how likely these captions, or answers, are", tasks="score")
    choices: list[str] = option([], "rank these answers to --question", tasks="choose")
    out: Path | None = option(None, "image file, enlarged to 256 pixels (sample.png, without "
                              "--trajectory); with --prompts, folder of images in the size in "
                              "which they were drawn (drawn)", tasks=DRAW,
                              group="results")
    trajectory: Path | None = option(None, "show each step: FILE.gif, or FILE.html with attention",
                                     tasks="draw edit caption answer fill")
    n: int = option(1, "images per prompt, with seeds SEED, SEED + 1, ...", low=1, high=10**6,
                    tasks=DRAW)
    best: bool = option(False, "sort the --n images by how likely they make the prompt",
                        tasks="draw edit")
    seed: int = option(0, "seed of noise and tokens", low=0, high=2**63 - 1, tasks=f"{DRAW} {READ}")
    # used in drawing and reading; --help lists it here, once
    steps: int | None = option(None, "steps to draw (28); with --order random or confidence, to "
                               "write (128) or answer (32)", low=1, high=10**5,
                               tasks=f"{DRAW} {READ}")
    drawing: DrawConfig = field(default_factory=DrawConfig)
    reading: ReadConfig = field(default_factory=ReadConfig)
    models: ModelConfig = field(default_factory=ModelConfig)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file that are not blank.  Raises UserError."""
    lines = files.text_lines(files.read_text(path))
    require((lines, f"{path}: is empty; write one prompt or question a line"))
    return lines


# --------------------------------------------------------------------------------------- the tasks

def draw(pipeline: Pipeline, args: Request, start: Edit | None = None) -> None:
    """Draw --n images of a prompt, as one grid.  start: the image to draw over, if any."""
    if args.best:
        pipeline.parts.check_text_head()
    [prompt] = pipeline.read_prompts(args.prompt, args.drawing)
    seeds = range(args.seed, args.seed + args.n)
    trace = Trace(steps=[] if args.trajectory else None)
    prompts = [prompt] * args.n
    images = list(drawings(pipeline.parts, prompts, seeds, args.drawing, start, trace))
    if args.best:
        nats = score_images(pipeline, images, prompt)
        order = sorted(range(args.n), key=nats.__getitem__)
        images = [images[i] for i in order]
        print("seeds: " + " ".join(str(args.seed + i) for i in order))
        print("nats of the prompt: " + " ".join(f"{nats[i]:.2f}" for i in order))
    evaluations = trace.evaluations // args.n
    if args.out:
        grids.write_image(args.out, grids.grid(images))
        print(f"{args.out}: {evaluations} evaluations an image")
    if args.trajectory:
        config = pipeline.parts.complete(args.drawing)
        about = dict(seed=args.seed, evaluations=evaluations, solver=config.solver,
                     guidance=config.guidance)
        trajectory.write_drawing(args.trajectory, pipeline.parts, prompt, trace, about)
        print(args.trajectory)


def score_images(pipeline: Pipeline, images: list[Tensor], prompt: str) -> list[float]:
    """Estimate an upper bound of -log p(prompt | image) for each image (3, H, W), in nats."""
    ids = pipeline.parts.tokenizer.encode(prompt, pipeline.parts.length)
    latents = image_to_text.encode(pipeline.parts, torch.stack(images))
    return [image_to_text.score(pipeline.parts, x[None], ids)[0] for x in latents]


def edit(pipeline: Pipeline, args: Request) -> None:
    """Draw --prompt over --image; with --mask, only where it is white."""
    parts = pipeline.parts
    image = read_image(args.image[0])
    mask = None
    if args.mask:
        mask = read_mask(args.mask, image, parts.height, parts.width, parts.factor)
    draw(pipeline, args, pipeline.start_edit(image, args.strength, mask))


def draw_folder(pipeline: Pipeline, args: Request) -> None:
    """Draw --n images of each prompt, one file per image."""
    prompts = pipeline.read_prompts(read_lines(args.prompts), args.drawing)
    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.n)]
    skipped = image_folder.draw_missing(pipeline.parts, jobs, args.out, args.drawing)
    print(f"{args.out}: {len(jobs) - skipped} images drawn, {skipped} were there")


def read(pipeline: Pipeline, args: Request) -> None:
    """Print a caption of each image, or the answer to each question about it."""
    questions = [args.question or None]                          # None: a caption
    if args.questions:
        questions = read_lines(args.questions)
    for question in filter(None, questions):                     # warns before images are read
        check_question(pipeline.parts, question)
    images = [read_image(path) for path in args.image]
    latents = pipeline.encode(images)
    rows = [(path, x, q) for path, x in zip(args.image, latents) for q in questions]
    states = [] if args.trajectory else None
    for batch in chunks(rows, 16):
        paths, x, batch_questions = zip(*batch)
        texts = pipeline.write(torch.stack(x), batch_questions, args.seed, args.reading, states)
        for path, question, text in zip(paths, batch_questions, texts):
            columns = [text]
            if args.questions:
                columns.insert(0, question)
            if len(rows) > 1:
                columns.insert(0, str(path))
            print("\t".join(columns), flush=True)
    if args.trajectory:
        show_reading(pipeline, args, images[0], latents, states)


def fill(pipeline: Pipeline, args: Request) -> None:
    """Print a text with its [MASK]s filled in."""
    image = latents = None
    if args.image:
        image = read_image(args.image[0])
        latents = pipeline.encode(image)
    states = []
    print(pipeline.infill(latents, args.text, args.seed, args.reading, states))
    if args.trajectory:
        show_reading(pipeline, args, image, latents, states)


def show_reading(pipeline: Pipeline, args: Request, image: Image.Image | None,
                 latents: Tensor | None, states: image_to_text.States) -> None:
    """Write --trajectory of a text.  image, latents (1, C, h, w): None if it is about no image."""
    pixels = None
    if image is not None:
        [pixels] = pipeline.fit(image)
    config = image_to_text.with_steps(args.reading, args.question or None)
    reading = trajectory.Reading(pixels, latents, states, config)
    about = dict(seed=args.seed, order=pipeline.parts.complete(args.reading).order)
    if args.question:
        about["question"] = args.question
    trajectory.write_reading(args.trajectory, pipeline.parts, reading, about)
    print(args.trajectory)


def score(pipeline: Pipeline, args: Request) -> None:
    """Print how likely captions or answers are, the likeliest first."""
    texts = args.score or args.choices
    images = [read_image(path) for path in args.image]
    for path, ranking in zip(args.image, pipeline.rank(images, texts, args.question or None)):
        prefix = f"{path}\t" if len(args.image) > 1 else ""
        for row in ranking:
            tokens = len(pipeline.parts.tokenizer.pieces(row.text)) + 1           # with the end
            count_bytes = max(1, len(row.text.encode()))
            bits = row.nats / math.log(2)
            share = f"{row.share:.1%}, " if args.choices else ""
            print(f"{prefix}{row.text}: {share}{row.nats:.2f} +- {row.error:.2f} nats, "
                  f"{row.nats / tokens:.3f} a token, {bits / count_bytes:.3f} bits a byte", flush=True)


def chat(pipeline: Pipeline, args: Request) -> None:
    """Answer questions about an image until an empty line."""
    latents = pipeline.encode(read_image(args.image[0]))
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, RuntimeError):                         # RuntimeError: stdin is closed
            return
        if not question:
            return
        if not is_text(question):
            print("this line is no text in UTF-8", flush=True)
            continue
        check_question(pipeline.parts, question)
        try:
            print(pipeline.write(latents, [question], args.seed, args.reading)[0], flush=True)
        except UserError as error:                               # for example, too long a question
            print(error, flush=True)


class Task(NamedTuple):
    """A row of TASKS."""
    run: Callable[[Pipeline, Request], None]
    flags: set[str]             # the first task with all of these flags given is run
    one_image: bool = False


TASKS = {
    "folder": Task(draw_folder, {"prompts"}),
    "edit": Task(edit, {"prompt", "image"}, one_image=True),
    "draw": Task(draw, {"prompt"}),
    "fill": Task(fill, {"text"}, one_image=True),
    "chat": Task(chat, {"image", "chat"}, one_image=True),
    "score": Task(score, {"image", "score"}),
    "choose": Task(score, {"image", "question", "choices"}),
    "questions": Task(read, {"image", "questions"}),
    "answer": Task(read, {"image", "question"}),
    "caption": Task(read, {"image"}),
}


# ------------------------------------------------------------------------------------- the command

def tasks_of_flags() -> dict[str, list[str]]:
    """Return the tasks in which each flag works."""
    everywhere = " ".join(TASKS)
    tasks_of = {}
    for config, tasks in ((Request, everywhere), (DrawConfig, DRAW), (ReadConfig, READ),
                          (ModelConfig, everywhere)):
        for flag in fields(config):
            tasks_of.setdefault(flag.name, flag.metadata.get("tasks", tasks).split())
    return tasks_of


def name_flags(task: str) -> str:
    """Return the flags that select a task, as one text."""
    return " ".join(map(cli.flag, sorted(TASKS[task].flags)))


def parse(argv: list[str] | None = None) -> tuple[Task, Request]:
    """Return the task that the flags select, and the flags.

    A wrong flag exits with status 2.  Raises UserError for settings that don't fit each other."""
    usage = "sample.py --prompt TEXT | --image FILE ... | --text TEXT  [FLAGS]"
    parser = cli.Parser(__doc__, usage=usage)
    for config in (Request, DrawConfig, ReadConfig, ModelConfig):
        parser.add_fields(config)
    given = vars(parser.parse_args(argv))
    task = next((name for name in TASKS if TASKS[name].flags <= given.keys()), None)
    if task is None:
        parser.error("give --prompt TEXT or --prompts FILE to draw, --image FILE to read an image, "
                     "--text TEXT to fill its [MASK]s")
    tasks_of = tasks_of_flags()
    for flag in given:
        if task not in tasks_of[flag]:
            works_with = " or ".join(map(name_flags, tasks_of[flag]))
            parser.error(f"{cli.flag(flag)} changes nothing with {name_flags(task)}; it works with "
                         f"{works_with}")
    args = cli.take(Request, given)
    args.drawing = cli.take(DrawConfig, given)
    args.reading = cli.take(ReadConfig, given)
    args.models = cli.take(ModelConfig, given)
    if task in DRAW.split() and not args.out and not args.trajectory:
        args.out = Path("drawn" if task == "folder" else "sample.png")
    for flag in {"prompt", "question", "text", "score", "choices"} & given.keys():
        values = given[flag] if isinstance(given[flag], list) else [given[flag]]
        parser.check_list(cli.flag(flag), values)
    check(parser, task, args)
    return TASKS[task], args


def check(parser: cli.Parser, task: str, args: Request) -> None:
    """Refuse values that do not fit each other, with status 2."""
    if task == "edit" and args.strength is None and not args.mask:
        parser.error("--prompt with --image draws over it: say from which noise level, "
                     "--strength 0.7, or where, --mask FILE")
    if len(args.image) > 1 and TASKS[task].one_image:
        parser.error(f"--image: expected one with {name_flags(task)}, got {len(args.image)}")
    if len(args.image) > 1 and args.trajectory:
        parser.error(f"--trajectory shows one --image, got {len(args.image)}")
    if not args.image and (args.reading.text_guidance != 1 or args.reading.image_cache):
        parser.error("--text-guidance and --image-cache change nothing without --image")
    if args.best and args.n == 1:
        parser.error("--best sorts the images of --n; give --n 2 or more")
    check_paths(parser, task, args)


def check_paths(parser: cli.Parser, task: str, args: Request) -> None:
    """Refuse files that can't be written, before the slow work starts."""
    if args.trajectory:
        if args.trajectory == args.out:
            parser.error(f"--out and --trajectory are both {args.out}; name two files")
        if trajectory.is_page(args.trajectory) and args.n > 1:
            parser.error("--trajectory FILE.html shows one image; leave out --n")
        if args.best:
            parser.error("--trajectory shows images in the order of their seeds; leave out --best")
        parser.check_file("--trajectory", args.trajectory, trajectory.SUFFIXES)
    if args.out and task == "folder":
        if args.out.is_file():
            parser.error(f"--out {args.out}: is a file, expected a folder; name another one")
        if not args.out.is_dir():
            parser.check_parent("--out", args.out)
    elif args.out:
        parser.check_file("--out", args.out, grids.SUFFIXES)


def main(argv: list[str] | None = None) -> None:
    task, args = parse(argv)
    parts = open_parts(args.models)
    task.run(Pipeline.of(parts), args)


if __name__ == "__main__":
    cli.run(main)
