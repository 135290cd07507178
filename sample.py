"""Draw images from text, and write text about images.

    python sample.py --prompt "red apple, noto style" --out apple.png       # draw
    python sample.py --prompts prompts.txt --out drawn                      # a line each
    python sample.py --image apple.png                                      # caption
    python sample.py --image apple.png --question "What kind of thing is this?"
    python sample.py --image apple.png --text "red [MASK], [MASK] style"    # fill in
    python sample.py --image apple.png --score "red apple, noto style"      # how likely
    python sample.py --image apple.png --strength 0.6 --prompt "green apple, noto style"

The weights are those in assets/emoji, which train.py trained, or --checkpoint: any layout that
checkpoint.py reads, such as the releases of D-DiT and SD3.  The same seed gives the same result.
Defaults are in brackets; those of D-DiT's and SD3's published weights come second.
"""

from common import cli
cli.interruptible(__name__)

import math
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from common.cli import UserError, option, require
from dataset.images import read_mask, read_picture
from inference import image_folder, image_to_text
from inference.image_to_text import ReadConfig
from inference.parts import ModelConfig, open_parts
from inference.pipeline import Pipeline
from inference.text_to_image import DrawConfig, Edit, Trace, chunks, drawings
from inference.texts import read_question
from viz import grids, trajectory


# ------------------------------------------------------------------------------------- the request

# names of rows of TASKS, below
DRAW = "draw folder edit"
READ = "caption answer questions fill chat"


@dataclass
class Request:
    """What to do: the flags of sample.py beside DrawConfig, ReadConfig and ModelConfig.

    tasks: those in which a flag works."""
    prompt: str = option("", "draw this", tasks="draw edit", group="what to do")
    prompts: Path | None = option(None, "draw these, a line each, into the folder --out",
                                  tasks="folder")
    image: list[Path] = option([], "caption these, or what follows", tasks=f"edit score choose {READ}")
    strength: float | None = option(None, "draw --prompt over --image, from this noise level",
                                    low=0, high=1, tasks="edit")
    mask: Path | None = option(None, "draw --prompt over --image, where this is white",
                               tasks="edit")
    question: str = option("", "answer this", tasks="answer score choose")
    questions: Path | None = option(None, "answer these, a line each", tasks="questions")
    chat: bool = option(False, "answer in the terminal, until an empty line", tasks="chat")
    text: str = option("", "replace each [MASK] of this", tasks="fill")
    score: list[str] = option([], "how likely these captions or answers are", tasks="score")
    choices: list[str] = option([], "the likeliest of these answers", tasks="choose")
    out: Path | None = option(None, "enlarged to 256 pixels (sample.png); with --prompts a folder "
                              "of images as drawn (drawn)", tasks=DRAW, group="results, and their seed")
    trajectory: Path | None = option(None, "how it forms: FILE.gif, or FILE.html with attention",
                                     tasks="draw edit caption answer fill")
    n: int = option(1, "images of a prompt, with this seed and the next ones", low=1, tasks=DRAW)
    best: bool = option(False, "sort these by how likely they make the prompt", tasks="draw edit")
    seed: int = option(0, "of noise and tokens", low=0, high=2**63 - 1, tasks=f"{DRAW} {READ}")
    steps: int | None = option(None, "evaluations (to draw 28, to write 128, to answer 32)", low=1,
                               tasks=f"{DRAW} {READ}")
    drawing: DrawConfig = field(default_factory=DrawConfig)
    reading: ReadConfig = field(default_factory=ReadConfig)
    models: ModelConfig = field(default_factory=ModelConfig)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file that are not empty.  Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})")
    lines = [line.strip() for line in lines if line.strip()]
    require((bool(lines), f"{path}: is empty; write one prompt or question a line"))
    return lines


# --------------------------------------------------------------------------------------- the tasks

def draw(pipeline: Pipeline, args: Request, edit: Edit | None = None) -> None:
    """Draw --n images of a prompt, as one grid."""
    [prompt] = pipeline.read_prompts(args.prompt, args.drawing)
    seeds = range(args.seed, args.seed + args.n)
    trace = Trace(steps=[] if args.trajectory else None)
    prompts = [prompt] * args.n
    images = list(drawings(pipeline.parts, prompts, seeds, args.drawing, edit, trace))
    if args.best:
        images = sort_by_score(pipeline, images, prompt)
    evaluations = trace.evaluations // args.n
    if args.out:
        grids.write_picture(args.out, grids.grid(images))
        print(f"{args.out}: {evaluations} evaluations an image")
    if args.trajectory:
        config = pipeline.parts.complete(args.drawing)
        about = dict(seed=args.seed, evaluations=evaluations, solver=config.solver,
                     guidance=config.guidance)
        trajectory.write_drawing(args.trajectory, pipeline.parts, prompt, trace, about)
        print(args.trajectory)


def sort_by_score(pipeline: Pipeline, images: list[Tensor], prompt: str) -> list[Tensor]:
    """Sort images (3, H, W) by -log p(prompt | image), which is printed."""
    pipeline.parts.check_text_head()
    ids = pipeline.parts.tokenizer.encode(prompt, pipeline.parts.length)
    latents = image_to_text.encode(pipeline.parts, torch.stack(images))
    nats = [image_to_text.score(pipeline.parts, x[None], ids)[0] for x in latents]
    order = sorted(range(len(images)), key=nats.__getitem__)
    print("nats of the prompt: " + " ".join(f"{nats[i]:.2f}" for i in order))
    return [images[i] for i in order]


def edit(pipeline: Pipeline, args: Request) -> None:
    """Draw over an image."""
    parts = pipeline.parts
    image = read_picture(args.image[0])
    if not args.mask:
        draw(pipeline, args, pipeline.start_edit(image, args.strength))
        return
    mask = read_mask(args.mask, image, parts.height, parts.width, parts.factor)
    strength = 1.0 if args.strength is None else args.strength   # the mask keeps the rest
    draw(pipeline, args, pipeline.start_edit(image, strength, mask))


def draw_folder(pipeline: Pipeline, args: Request) -> None:
    """Draw --n images of each prompt, a file each."""
    prompts = pipeline.read_prompts(read_lines(args.prompts), args.drawing)
    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.n)]
    skipped = image_folder.fill(pipeline.parts, jobs, args.out, args.drawing)
    print(f"{args.out}: {len(jobs)} images, {skipped} of which were there")


def read(pipeline: Pipeline, args: Request) -> None:
    """Print a caption of each image, or the answer to each question about it."""
    questions = [args.question or None]                          # None: a caption
    if args.questions:
        questions = read_lines(args.questions)
    for question in filter(None, questions):
        read_question(pipeline.parts, question)
    images = [read_picture(path) for path in args.image]
    latents = pipeline.encode(images)
    rows = [(path, x, q) for path, x in zip(args.image, latents) for q in questions]
    states = []
    for batch in chunks(rows, 16):
        paths, batch_latents, asked = zip(*batch)
        texts = pipeline.write(torch.stack(batch_latents), asked, args.seed, args.reading, states)
        for path, question, text in zip(paths, asked, texts):
            columns = [text]
            if args.questions:
                columns.insert(0, question)
            if len(rows) > 1:
                columns.insert(0, str(path))
            print("\t".join(columns), flush=True)
    if args.trajectory:
        reading = trajectory.Reading(pipeline.fit(images)[0], latents, states, args.reading)
        show_reading(pipeline, args, reading)


def fill(pipeline: Pipeline, args: Request) -> None:
    """Print a text with its [MASK]s filled in."""
    image = pixels = latents = None
    if args.image:
        image = read_picture(args.image[0])
    states = []
    print(pipeline.fill(image, args.text, args.seed, states, **vars(args.reading)))
    if args.trajectory:
        if image:
            pixels, latents = pipeline.fit(image)[0], pipeline.encode(image)
        show_reading(pipeline, args, trajectory.Reading(pixels, latents, states, args.reading))


def show_reading(pipeline: Pipeline, args: Request, reading: trajectory.Reading) -> None:
    about = dict(seed=args.seed, order=pipeline.parts.complete(args.reading).order)
    if args.question:
        about["question"] = args.question
    trajectory.write_reading(args.trajectory, pipeline.parts, reading, about)
    print(args.trajectory)


def score(pipeline: Pipeline, args: Request) -> None:
    """Print how likely captions or answers are, the likeliest first."""
    texts = args.score or args.choices
    for path in args.image:
        image = read_picture(path)
        prefix = f"{path}\t" if len(args.image) > 1 else ""
        for row in pipeline.rank(image, texts, args.question or None):
            tokens = len(pipeline.parts.tokenizer.pieces(row.text)) + 1           # with the end
            letters = max(1, len(row.text.encode()))
            bits = row.nats / math.log(2)
            share = f"{row.share:.1%}, " if args.choices else ""
            print(f"{prefix}{row.text}: {share}{row.nats:.2f} +- {row.error:.2f} nats, "
                  f"{row.nats / tokens:.3f} a token, {bits / letters:.3f} bits a byte", flush=True)


def chat(pipeline: Pipeline, args: Request) -> None:
    """Answer questions about an image until an empty line."""
    latents = pipeline.encode(read_picture(args.image[0]))
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        try:
            print(pipeline.write(latents, [question], args.seed, args.reading)[0], flush=True)
        except UserError as error:                               # the question is too long
            print(error, flush=True)


class Task(NamedTuple):
    """A row of TASKS."""
    run: Callable[[Pipeline, Request], None]
    flags: set[str]             # the task is the first whose flags are all given
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

RENAMED = {"--refresh": "--image-cache", "--separate": "--prompts", "--tokens-per-step": "--steps",
           "--top-p": "--temperature", "--vary": "--strength"}


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
    """Name the flags that ask for a task."""
    return " ".join(map(cli.flag, sorted(TASKS[task].flags)))


def parse(argv: list[str] | None = None) -> tuple[Task, Request]:
    """Read the flags; return the task that they ask for.  A mistake ends the program."""
    parser = cli.Parser(__doc__, RENAMED, usage="sample.py --prompt TEXT | --image FILE ... [FLAGS]")
    for config in (Request, DrawConfig, ReadConfig, ModelConfig):
        parser.add_fields(config)
    given = vars(parser.parse_args(argv))
    task = next((name for name in TASKS if TASKS[name].flags <= given.keys()), None)
    if task is None:
        parser.error("give --prompt TEXT to draw, or --image FILE to read an image")
    tasks_of = tasks_of_flags()
    for flag in given:
        if task not in tasks_of[flag]:
            works_with = " or ".join(map(name_flags, tasks_of[flag]))
            parser.error(f"{cli.flag(flag)} changes nothing with {name_flags(task)}; it works with "
                         f"{works_with}")
        if isinstance(given[flag], str) and not given[flag].strip() and flag != "negative_prompt":
            parser.error(f"{cli.flag(flag)} is empty")
    args = cli.take(Request, given)
    try:
        args.drawing = cli.take(DrawConfig, given)
    except ValueError as error:
        parser.error(str(error))
    args.reading = cli.take(ReadConfig, given)
    args.models = cli.take(ModelConfig, given)
    if not args.out and not args.trajectory:
        args.out = Path("drawn" if task == "folder" else "sample.png")
    check(parser, task, args)
    return TASKS[task], args


def check(parser: cli.Parser, task: str, args: Request) -> None:
    """Refuse values that do not fit each other, with status 2."""
    if task == "edit" and args.strength is None and not args.mask:
        parser.error("--prompt with --image draws over it: say from which noise level, "
                     "--strength 0.7, or where, --mask FILE")
    if len(args.image) > 1 and (TASKS[task].one_image or args.trajectory):
        parser.error(f"--image: expected one image with {name_flags(task)}, or with --trajectory")
    if task == "fill" and args.models.length == "auto":
        parser.error("--length auto changes nothing with --text")
    if args.best and args.n == 1:
        parser.error("--best sorts the images of --n; give --n 2 or more")
    if args.trajectory:
        if args.trajectory == args.out:
            parser.error(f"--out and --trajectory are both {args.out}")
        if trajectory.is_page(args.trajectory) and args.n > 1:
            parser.error("--trajectory FILE.html shows one image; leave out --n")
        check_path(parser, "--trajectory", args.trajectory, trajectory.SUFFIXES)
    if args.out and task == "folder":
        check_path(parser, "--out", args.out, [args.out.suffix])
    elif args.out:
        extensions = Image.registered_extensions().items()
        check_path(parser, "--out", args.out, [name for name, kind in extensions if kind in Image.SAVE])


def check_path(parser: cli.Parser, flag: str, path: Path, suffixes: list[str]) -> None:
    """Refuse a path that can't be written, before minutes of work."""
    if not path.parent.is_dir():
        parser.error(f"{flag} {path}: the folder {path.parent} does not exist")
    if path.suffix.lower() not in map(str.lower, suffixes):
        parser.error(f"{flag} {path}: expected a name such as {path.stem or 'a'}{suffixes[0]}")


def main(argv: list[str] | None = None) -> None:
    task, args = parse(argv)
    parts = open_parts(args.models)
    task.run(Pipeline.of(parts), args)


if __name__ == "__main__":
    cli.run(main)
