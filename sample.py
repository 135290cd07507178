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
from inference.image_to_text import ReadConfig, encode
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

    `tasks`: those in which a flag works."""
    prompt: str | None = option(None, "draw this", tasks="draw edit", group="tasks")
    prompts: Path | None = option(None, "draw these, a line each, into the folder --out; files "
                                  "that are there are skipped", tasks="folder")
    image: list[Path] = option([], "caption these images, or do with them what follows",
                               tasks=f"edit {READ} score choose")
    strength: float | None = option(None, "with --prompt: draw over --image from this noise level; "
                                    "0 returns it, 1 draws anew", low=0, high=1, tasks="edit")
    mask: Path | None = option(None, "with --prompt: draw over --image where this is white",
                               tasks="edit")
    question: str | None = option(None, "answer this", tasks="answer score choose")
    questions: Path | None = option(None, "answer these, a line each", tasks="questions")
    chat: bool = option(False, "answer questions in the terminal, until an empty line",
                        tasks="chat")
    text: str | None = option(None, "replace each [MASK] in this; also without --image",
                              tasks="fill")
    score: list[str] = option([], "how likely these captions, or answers, are", tasks="score")
    choices: list[str] = option([], "which of these answers to --question is likeliest",
                                tasks="choose")
    out: Path | None = option(None, "the image that is written, at least 256 pixels wide "
                              "(sample.png); of --prompts the folder (drawn)", tasks=DRAW,
                              group="what is written")
    trajectory: Path | None = option(None, "how the image or the text forms: FILE.gif, or FILE.html "
                                     "with what the network attends to; no --out then",
                                     tasks="draw edit caption answer fill")
    n: int = option(1, "images of a prompt, with this seed and the next ones", low=1, tasks=DRAW)
    best: bool = option(False, "sort the --n images by how likely they make the prompt",
                        tasks="draw edit")
    seed: int = option(0, "of the noise, or of the tokens", low=0, high=2**63 - 1,
                       tasks=f"{DRAW} {READ}")
    steps: int | None = option(None, "evaluations: 28 to draw, 128 for a text, 32 to answer", low=1,
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
    parts = pipeline.parts
    [prompt] = pipeline.read_prompts(args.prompt, args.drawing)
    seeds = range(args.seed, args.seed + args.n)
    trace = Trace(steps=[] if args.trajectory else None)
    images = list(drawings(parts, [prompt] * args.n, seeds, args.drawing, edit, trace))
    if args.best:
        images = sort_by_score(pipeline, images, prompt)
    evaluations = trace.evaluations // args.n
    if args.out:
        grids.write_picture(args.out, grids.grid(images))
        print(f"{args.out}: {evaluations} evaluations an image")
    if args.trajectory:
        config = parts.complete(args.drawing)
        about = dict(seed=args.seed, evaluations=evaluations, solver=config.solver,
                     guidance=config.guidance)
        trajectory.write_drawing(args.trajectory, parts, prompt, trace, about)
        print(args.trajectory)


def sort_by_score(pipeline: Pipeline, images: list[Tensor], prompt: str) -> list[Tensor]:
    """Sort images (3, H, W) by -log p(prompt | image), which is printed."""
    pipeline.parts.check_text_head()
    ids = pipeline.parts.tokenizer.encode(prompt, pipeline.parts.length)
    latents = encode(pipeline.parts, torch.stack(images))
    nats = [image_to_text.score(pipeline.parts, x[None], ids)[0] for x in latents]
    order = sorted(range(len(images)), key=nats.__getitem__)
    print("nats of the prompt: " + " ".join(f"{nats[i]:.2f}" for i in order))
    return [images[i] for i in order]


def edit(pipeline: Pipeline, args: Request) -> None:
    """Draw over an image."""
    parts = pipeline.parts
    image = read_picture(args.image[0])
    mask, strength = None, args.strength
    if args.mask:
        mask = read_mask(args.mask, image, parts.height, parts.width, parts.factor)
    if strength is None:
        strength = 1.0                                           # the mask keeps the rest
    latents = encode(parts, pipeline.fit(image), torch.float32)
    draw(pipeline, args, Edit(latents, strength, mask))


def draw_folder(pipeline: Pipeline, args: Request) -> None:
    """Draw --n images of each prompt, a file each."""
    prompts = pipeline.read_prompts(read_lines(args.prompts), args.drawing)
    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.n)]
    skipped = image_folder.fill(pipeline.parts, jobs, args.out, args.drawing)
    print(f"{args.out}: {len(jobs)} images, {skipped} of which were there")


def read(pipeline: Pipeline, args: Request) -> None:
    """Print a caption of each image, or the answer to each question about it."""
    questions = [args.question]                                  # None: a caption
    if args.questions:
        questions = read_lines(args.questions)
    for question in filter(None, questions):
        read_question(pipeline.parts, question)
    images = [read_picture(path) for path in args.image]
    latents = pipeline.encode(images)
    asks = [(path, x, q) for path, x in zip(args.image, latents) for q in questions]
    states = [] if args.trajectory else None
    for batch in chunks(asks, 16):
        paths, batch_latents, asked = zip(*batch)
        texts = pipeline.write(torch.stack(batch_latents), asked, args.seed, args.reading, states)
        for path, question, text in zip(paths, asked, texts):
            columns = [text]
            if args.questions:
                columns = [question, text]
            if len(asks) > 1:
                columns = [str(path), *columns]
            print("\t".join(columns), flush=True)
    if args.trajectory:
        show_reading(pipeline, args, images[0], states)


def fill(pipeline: Pipeline, args: Request) -> None:
    """Print a text with its [MASK]s filled in."""
    image = read_picture(args.image[0]) if args.image else None
    states = []
    print(pipeline.fill(image, args.text, args.seed, states, **vars(args.reading)))
    if args.trajectory:
        show_reading(pipeline, args, image, states)


def show_reading(pipeline: Pipeline, args: Request, image: Image.Image | None,
                 states: list) -> None:
    pixels = latents = None
    if image:
        pixels, latents = pipeline.fit(image)[0], pipeline.encode(image)
    about = dict(question=args.question) if args.question else {}
    about.update(seed=args.seed, order=pipeline.parts.complete(args.reading).order)
    reading = trajectory.Reading(pixels, latents, states, args.reading)
    trajectory.write_reading(args.trajectory, pipeline.parts, reading, about)
    print(args.trajectory)


def score(pipeline: Pipeline, args: Request) -> None:
    """Print how likely captions or answers are, the likeliest first."""
    for path in args.image:
        ranking = pipeline.rank(read_picture(path), args.score or args.choices, args.question)
        for row in ranking:
            tokens = len(pipeline.parts.tokenizer.pieces(row.text)) + 1           # with the end
            letters = max(1, len(row.text.encode()))
            line = (f"{row.nats:.2f} +- {row.error:.2f} nats, {row.nats / tokens:.3f} a token, "
                    f"{row.nats / math.log(2) / letters:.3f} bits a byte")
            if args.choices:
                line = f"{row.share:.1%}, {line}"
            prefix = f"{path}\t" if len(args.image) > 1 else ""
            print(f"{prefix}{row.text}: {line}", flush=True)


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
    tasks_of = {}
    everywhere = " ".join(TASKS)
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
    for flag in ("prompt", "question", "text"):
        value = getattr(args, flag)
        if value is not None and not value.strip():
            parser.error(f"--{flag} is empty")
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
