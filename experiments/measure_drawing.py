"""Measure solvers and guidance on the emoji set: share of right emoji, pixel error, and network
evaluations.

    python -m experiments.measure_drawing            # all rows, 192 prompts; minutes on two cores
    python -m experiments.measure_drawing solvers --prompts 96 --checkpoint out/instruct
    python -m experiments.measure_drawing --page assets/drawing.webp  # docs/sampling.md's image, no table
    python -m experiments.measure_drawing objects --page objects.png  # four drawings of 20 things
    python -m experiments.measure_drawing outside --page outside.png  # of things not in the set

Every row draws the same captions of the split with the same seeds.  `emoji`: how often the image of
the whole set that is nearest pixel by pixel shows the prompted emoji; `distance`: root mean square
difference from the prompted image, in levels of 255; `evaluations`: network evaluations per image.
This is not part of the test run.
"""

import time
from pathlib import Path

import torch

import flow
from common import cli
from common.devices import choose_device
from common.files import write_json
from dataset import emoji
from inference import text_to_image
from inference.parts import EMOJI, Parts
from inference.text_to_image import DrawConfig
from metrics import emojis
from viz import grids

SOLVERS = {f"{solver}, {steps} evaluations": DrawConfig(solver=solver, steps=steps)
           for steps in (28, 12, 6) for solver in flow.SOLVERS}
GUIDANCE = {
    **{f"guidance {scale:g}": DrawConfig(guidance=scale) for scale in (1.0, 1.5, 2.0, 4.0, 7.0)},
    **{f"guidance 4 for t in {low:g} .. {high:g}": DrawConfig(guidance=4.0, guidance_interval=(low, high))
       for low, high in ((0.2, 0.9), (0.3, 1.0), (0.7, 1.0))},
}
SHIFTS = {f"shift {shift:g}": DrawConfig(shift=shift) for shift in (0.5, 1.0, 2.0, 3.0)}
TABLES = dict(solvers=SOLVERS, guidance=GUIDANCE, shifts=SHIFTS)
OBJECTS = ["red apple", "snowman", "cat face", "slice of pizza", "rocket", "dog face", "elephant", "penguin",
           "fire", "flag of Japan", "guitar", "sunflower", "bicycle", "strawberry", "octopus", "hammer",
           "umbrella", "steam locomotive", "cheese wedge", "anchor"]
OUTSIDE = ["blue apple, noto style", "a blue apple", "a cat on a train", "pizza"]


@torch.no_grad()
def measured(parts: Parts, captions: list[str], own: list[int], records: list[dict], images: torch.Tensor,
             config: DrawConfig) -> dict[str, float]:
    """Return one row of the table.  own: the indices of the captions' images in `images` (n, 3,
    P, P)."""
    trace, begun = text_to_image.Trace(), time.time()
    drawn = text_to_image.draw(parts, captions, trace=trace, **vars(config))
    seconds, found = time.time() - begun, emojis.nearest(drawn, images)
    right = [records[f]["emoji"] == records[i]["emoji"] for f, i in zip(found, own)]
    single = [hit for hit, i in zip(right, own) if records[i]["kind"] != emojis.PEOPLE]
    off = (drawn - images[own]).square().mean((1, 2, 3)).sqrt() * 127.5
    return dict(emoji=100 * sum(right) / len(right), single=100 * sum(single) / max(1, len(single)),
                distance=float(off.mean()), evaluations=trace.evaluations / len(own), seconds=seconds)


@torch.no_grad()
def write_page(parts: Parts, records: list[dict], images: torch.Tensor, path: Path) -> None:
    """Write a page: a sampling run, solvers at 7 evaluations, guidance, strengths, a hat drawn
    anew, variations.  The samples are not cherry-picked."""
    draw = lambda prompt, **how: text_to_image.draw(parts, [prompt], seed=0, **how)[0]
    number = {record["caption"]: i for i, record in enumerate(records)}
    apple, farmer = "red apple, noto style", "woman farmer, medium skin tone, noto style"
    original, trace = images[number[farmer]], text_to_image.Trace(steps=[])
    draw(apple, trace=trace)                                     # these weights' latents are the images
    walk = [[(step.x[0], f"x at t = {step.t:.2f}") for step in trace.steps[::4]],
            [(step.clean[0], f"predicted at t = {step.t:.2f}") for step in trace.steps[::4]]]
    few = [(draw(apple, steps=steps, solver=solver), f"{solver}, {steps} evaluations")
           for steps in (4, 7) for solver in flow.SOLVERS]
    guided = [(draw(apple, guidance=scale), f"guidance {scale:g}") for scale in (1, 2, 4, 7)]
    over = [(draw("woman farmer, dark skin tone, noto style", edit=text_to_image.Edit(original[None], strength)),
             f"dark, strength {strength:g}") for strength in (0.2, 0.4, 0.6, 0.8, 1.0)]
    mask = torch.zeros(1, 1, parts.height, parts.width, dtype=torch.bool)
    mask[..., :parts.height * 15 // 32, :] = True
    anew = [(draw(f"woman {who}, medium skin tone, noto style", edit=text_to_image.Edit(original[None], 1.0, mask)),
             f"above: {who}") for who in ("firefighter", "astronaut", "cook", "mechanic", "artist")]
    first = [(original, "the set's own image")]
    grids.write_image(path, grids.rows(*walk, few, guided, first + over, first + anew))


def write_rows(path: Path, cells: list[tuple[torch.Tensor, str]]) -> None:
    grids.write_image(path, grids.rows(*(cells[at:at + 8] for at in range(0, len(cells), 8))))


@torch.no_grad()
def objects(parts: Parts, records: list[dict], images: torch.Tensor, style: str, path: Path) -> None:
    """Draw each object as `sample.py --n 4` does; print how often it is the nearest, and write an
    image of all."""
    number, cells, right = {record["caption"]: i for i, record in enumerate(records)}, [], []
    for name in OBJECTS:
        caption = f"{name}, {style} style"
        drawn = text_to_image.draw(parts, [caption] * 4, seed=0)
        found = [records[i] for i in emojis.nearest(drawn, images)]
        right += [record["emoji"] == records[number[caption]]["emoji"] for record in found]
        cells += zip(drawn, [name if hit else f"{name}: {record['name']}"
                             for hit, record in zip(right[-4:], found)])
    print(f"{style}: {sum(right)} of {len(right)} drawings are nearest to the emoji asked for")
    write_rows(path, cells)


@torch.no_grad()
def outside(parts: Parts, path: Path) -> None:
    """Write a page of objects that the set does not have.  Nothing can be measured on them."""
    write_rows(path, [(x, prompt) for prompt in OUTSIDE for x in text_to_image.draw(parts, [prompt] * 4, seed=0)])


def main(argv: list[str] | None = None) -> None:
    parser, alone = cli.Parser(__doc__), ("objects", "outside")
    parser.add_argument("tables", nargs="*", choices=[[], *TABLES, *alone], metavar="TABLE",
                        help=" ".join([*TABLES, *alone]))
    parser.add_argument("--checkpoint", type=Path, default=EMOJI, help="(the shipped weights)")
    parser.add_argument("--split", choices=emoji.SPLITS, default="train", help="(train)")
    parser.add_argument("--prompts", type=cli.number(int, 1), default=192, help="(192)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="(as sample.py)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--page", type=Path, help="write an image of the drawings here")
    args = parser.parse_args(argv)
    cli.require(*((name not in args.tables or len(args.tables) == 1, f"{name}: is measured alone")
                  for name in alone))
    parts = Parts(args.checkpoint, choose_device("auto"), getattr(torch, args.dtype) if args.dtype else None)
    if args.tables == ["outside"]:
        return outside(parts, args.page or Path("outside.png"))
    records, images = emoji.load(pixels=parts.height)
    images = images.float() / 127.5 - 1
    if args.tables == ["objects"]:
        page = args.page or Path("objects.png")
        for style in emoji.STYLES:
            objects(parts, records, images, style, page.with_stem(f"{page.stem}_{style}"))
        return
    if args.page:
        write_page(parts, records, images, args.page)
        return
    own = [i for i, record in enumerate(records) if record["split"] == args.split][:args.prompts]
    print("| | emoji, % | single objects, % | distance | evaluations | seconds |\n|---|---|---|---|---|---|")
    rows, captions = {}, [records[i]["caption"] for i in own]
    for table in args.tables or TABLES:
        for name, config in TABLES[table].items():
            row = rows[name] = measured(parts, captions, own, records, images, config)
            print(f"| {name} | {row['emoji']:.1f} | {row['single']:.1f} | {row['distance']:.1f} | "
                  f"{row['evaluations']:.0f} | {row['seconds']:.0f} |", flush=True)
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    cli.run(main)
