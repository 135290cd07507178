"""Measure solvers and guidance on the emoji set: share of right emoji, pixel error, and network
evaluations.

    python -m experiments.measure_drawing            # all rows, 192 prompts; minutes on two cores
    python -m experiments.measure_drawing solvers --prompts 96 --checkpoint out/instruct
    python -m experiments.measure_drawing --page assets/drawing.webp  # figure of docs/sampling.md
    python -m experiments.measure_drawing objects --page objects.png  # four drawings of 20 things
    python -m experiments.measure_drawing outside --page outside.png  # of things not in the set

Every row draws the same captions of the split with the same seeds.  This is not part of the test
run.

    emoji, %           how often the image of the set that is nearest, pixel by pixel, shows the
                       prompted emoji
    single objects, %  the same for emoji that do not show people
    distance           root mean square difference from the prompted image, in levels of 255
    evaluations        network evaluations per image
    seconds            of the row

Shapes: n images of the set, P pixels along a side, B drawings.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import flow
from common import cli
from common.devices import choose_device
from common.files import write_json
from common.progress import chunks
from dataset import emoji
from inference import text_to_image
from inference.parts import EMOJI, Parts
from inference.text_to_image import DrawConfig, Edit, Trace
from metrics import emojis
from viz import grids

SHIFTS = {f"shift {shift:g}": DrawConfig(shift=shift) for shift in (0.5, 1.0, 2.0, 3.0)}


def solvers() -> dict[str, DrawConfig]:
    rows = {}
    for steps in (28, 12, 6):
        for solver in flow.SOLVERS:
            rows[f"{solver}, {steps} evaluations"] = DrawConfig(solver=solver, steps=steps)
    return rows


def guidance() -> dict[str, DrawConfig]:
    rows = {}
    for scale in (1.0, 1.5, 2.0, 4.0, 7.0):
        rows[f"guidance {scale:g}"] = DrawConfig(guidance=scale)
    for low, high in ((0.2, 0.9), (0.3, 1.0), (0.7, 1.0)):
        limited = DrawConfig(guidance=4.0, guidance_interval=(low, high))
        rows[f"guidance 4 for t in {low:g} .. {high:g}"] = limited
    return rows


TABLES = dict(solvers=solvers(), guidance=guidance(), shifts=SHIFTS)
OBJECTS = ["red apple", "snowman", "cat face", "slice of pizza", "rocket", "dog face", "elephant",
           "penguin", "fire", "flag of Japan", "guitar", "sunflower", "bicycle", "strawberry",
           "octopus", "hammer", "umbrella", "steam locomotive", "cheese wedge", "anchor"]
OUTSIDE = ["blue apple, noto style", "a blue apple", "a cat on a train", "pizza"]
Cells = list[tuple[Tensor, str]]            # images (3, P, P), each with the text below it


@dataclass
class EmojiSet:
    records: list[dict]
    images: Tensor              # one per record, (n, 3, P, P) in [-1, 1]

    def image(self, caption: str) -> Tensor:
        return self.images[self.index(caption)]

    def index(self, caption: str) -> int:
        return next(i for i, record in enumerate(self.records) if record["caption"] == caption)

    def nearest(self, drawn: Tensor) -> list[dict]:
        """Return the record of the image that is nearest to each drawing (B, 3, P, P)."""
        return [self.records[i] for i in emojis.nearest(drawn, self.images)]


@torch.no_grad()
def score(parts: Parts, data: EmojiSet, indices: list[int], config: DrawConfig) -> dict[str, float]:
    """Draw the captions at these indices, and return a row of the table."""
    records = [data.records[i] for i in indices]
    captions = [record["caption"] for record in records]
    trace = Trace()
    started = time.time()
    drawn = text_to_image.draw(parts, captions, trace=trace, **vars(config))             # (B, 3, P, P)
    seconds = time.time() - started
    right, right_objects = [], []
    for record, nearest in zip(records, data.nearest(drawn)):
        is_right = nearest["emoji"] == record["emoji"]
        right.append(is_right)
        if record["kind"] != emojis.PEOPLE:
            right_objects.append(is_right)
    squared_error = (drawn - data.images[indices]).square().mean((1, 2, 3))              # (B,)
    distance = squared_error.sqrt().mean() * 127.5
    return dict(emoji=100 * sum(right) / len(right),
                single=100 * sum(right_objects) / max(1, len(right_objects)),
                distance=float(distance), evaluations=trace.evaluations / len(indices),
                seconds=seconds)


def draw_one(parts: Parts, prompt: str, **settings) -> Tensor:
    return text_to_image.draw(parts, [prompt], seed=0, **settings)[0]


@torch.no_grad()
def write_page(parts: Parts, data: EmojiSet, path: Path) -> None:
    """Write a page: a sampling run, solvers at few evaluations, guidance, strengths, a part drawn
    anew.  The samples are not cherry-picked."""
    apple, farmer = "red apple, noto style", "woman farmer, medium skin tone, noto style"
    trace = Trace(steps=[])
    draw_one(parts, apple, trace=trace)
    states = [(step.x[0], f"x at t = {step.t:.2f}") for step in trace.steps[::4]]
    predictions = [(step.clean[0], f"predicted at t = {step.t:.2f}") for step in trace.steps[::4]]

    few_steps = []
    for steps in (4, 7):
        for solver in flow.SOLVERS:
            image = draw_one(parts, apple, steps=steps, solver=solver)
            few_steps.append((image, f"{solver}, {steps} evaluations"))
    guided = []
    for scale in (1, 2, 4, 7):
        guided.append((draw_one(parts, apple, guidance=scale), f"guidance {scale:g}"))

    # these weights' latents are the images
    original = data.image(farmer)[None]
    darker: Cells = [(original[0], "the set's own image")]
    for strength in (0.2, 0.4, 0.6, 0.8, 1.0):
        edit = Edit(original, strength)
        image = draw_one(parts, "woman farmer, dark skin tone, noto style", edit=edit)
        darker.append((image, f"dark, strength {strength:g}"))
    upper_part = torch.zeros(1, 1, parts.height, parts.width, dtype=torch.bool)
    upper_part[..., :parts.height * 15 // 32, :] = True
    hats: Cells = [(original[0], "the set's own image")]
    for job in ("firefighter", "astronaut", "cook", "mechanic", "artist"):
        edit = Edit(original, 1.0, upper_part)
        image = draw_one(parts, f"woman {job}, medium skin tone, noto style", edit=edit)
        hats.append((image, f"above: {job}"))
    grids.write_image(path, grids.rows(states, predictions, few_steps, guided, darker, hats))


@torch.no_grad()
def draw_objects(parts: Parts, data: EmojiSet, style: str, path: Path) -> None:
    """Draw each object as `sample.py --n 4` does; print how often it is the nearest, and write an
    image of all."""
    cells: Cells = []
    right = 0
    for name in OBJECTS:
        caption = f"{name}, {style} style"
        expected = data.records[data.index(caption)]["emoji"]
        drawn = text_to_image.draw(parts, [caption] * 4, seed=0)
        for image, nearest in zip(drawn, data.nearest(drawn)):
            is_right = nearest["emoji"] == expected
            right += is_right
            cells.append((image, name if is_right else f"{name}: {nearest['name']}"))
    print(f"{style}: {right} of {len(cells)} drawings are nearest to the emoji of the prompt")
    grids.write_image(path, grids.rows(*chunks(cells, 8)))


@torch.no_grad()
def draw_outside(parts: Parts, path: Path) -> None:
    """Write a page of objects that the set does not have.  Nothing can be measured on them."""
    cells: Cells = []
    for prompt in OUTSIDE:
        drawn = text_to_image.draw(parts, [prompt] * 4, seed=0)
        cells += [(image, prompt) for image in drawn]
    grids.write_image(path, grids.rows(*chunks(cells, 8)))


def print_tables(parts: Parts, data: EmojiSet, indices: list[int], names: list[str]) -> dict:
    """Print each row when it is measured; return them by name."""
    print("| | emoji, % | single objects, % | distance | evaluations | seconds |")
    print("|---|---|---|---|---|---|")
    rows = {}
    for table in names:
        for name, config in TABLES[table].items():
            row = score(parts, data, indices, config)
            rows[name] = row
            print(f"| {name} | {row['emoji']:.1f} | {row['single']:.1f} | {row['distance']:.1f} | "
                  f"{row['evaluations']:.0f} | {row['seconds']:.0f} |", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    pages = ("objects", "outside")
    parser.add_argument("tables", nargs="*", choices=[[], *TABLES, *pages], metavar="TABLE",
                        help=" ".join([*TABLES, *pages]))
    parser.add_argument("--checkpoint", type=Path, default=EMOJI, help="(the shipped weights)")
    parser.add_argument("--split", choices=emoji.SPLITS, default="train", help="(train)")
    parser.add_argument("--prompts", type=cli.number(int, 1), default=192, help="(192)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="(as sample.py)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--page", type=Path, help="write an image of the drawings here")
    args = parser.parse_args(argv)
    for name in pages:
        is_single = name not in args.tables or len(args.tables) == 1
        cli.require((is_single, f"{name}: expected no other table beside it"))
    parts = Parts(args.checkpoint, choose_device("auto"), args.dtype)
    if args.tables == ["outside"]:
        draw_outside(parts, args.page or Path("outside.png"))
        return
    records, images = emoji.load(pixels=parts.height)
    data = EmojiSet(records, images.float() / 127.5 - 1)
    if args.tables == ["objects"]:
        page = args.page or Path("objects.png")
        for style in emoji.STYLES:
            draw_objects(parts, data, style, page.with_stem(f"{page.stem}_{style}"))
    elif args.page:
        write_page(parts, data, args.page)
    else:
        indices = emoji.of_split(records, args.split)[:args.prompts]
        rows = print_tables(parts, data, indices, args.tables or list(TABLES))
        if args.json:
            write_json(args.json, rows)


if __name__ == "__main__":
    cli.run(main)
