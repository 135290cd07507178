"""A world of coloured shapes that needs no files: sample i is a function of i, without end.

    python data.py show shapes --pixels 24          # "shapes" is the name of the source
    sample(8)["image"], sample(8)["captions"]       # (3, SIDE, SIDE) uint8, ["two small red squares"]

An image has four cells, and one to four of them hold an object.  A caption says how many there are
and the shape of each, two objects in reading order or with their relation.  What it does not say
is open: "a disc" may have any colour, size and cell.  So a drawing can be right in many ways, and
pixels show exactly whether it is (metrics/shapes.py).

Three kinds of combinations are never shown or named in training: some colours of a shape, some
numbers of a shape, and some shapes left of or above another.  Two colours and a shape have a word
in the vocabulary and occur nowhere: they are there to be learned later.
"""

import random
from dataclasses import dataclass
from typing import Iterator, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.cli import require
from dataset.sources import Location, Source, texts_in

RULES = 5               # increase it when the same i gives another sample
SIDE = 24               # pixels along a side of an image
CELL = SIDE // 2        # and of a cell; an object stands in the middle of one
RGB = dict(red=(230, 40, 40), green=(40, 170, 60), blue=(50, 80, 230), yellow=(240, 210, 40),
           purple=(150, 60, 180), cyan=(60, 200, 220))
BACKGROUNDS = dict(white=(255, 255, 255), grey=(128, 128, 128), black=(0, 0, 0))
SHAPES = ["disc", "square", "triangle", "ring", "cross"]
RADII = dict(small=3.6, large=5.0)                               # pixels
COUNTS = ["one", "two", "three", "four"]
RELATIONS = ["left of", "above"]
UNUSED = ["orange", "pink", "star"]                              # words for later


class World(NamedTuple):
    """The choices of a world, besides shapes, colours and cells."""
    kinds: list[str]        # of scenes: "one" object, a "pair", a "group" of two to four of one shape
    sizes: list[str]
    backgrounds: list[str]
    in_order: bool = True   # a caption "a disc and a ring" has the objects in reading order


# By the path of the source.  "pair" twice: pairs are the hardest to learn.  Named in reading order,
# they are drawn right sooner; in any order, questions about them are answered sooner
# (docs/results.md).  The small world is learned in minutes.
FULL = World(["one", "pair", "pair", "group"], list(RADII), list(BACKGROUNDS))
WORLDS = {"shapes": FULL,
          "shapes-any-order": FULL._replace(in_order=False),
          "shapes-small": World(["one", "pair"], ["large"], ["white"])}

HELD_PAIRS = {("red", "ring"), ("blue", "cross"), ("green", "triangle"), ("yellow", "square"),
              ("purple", "disc")}
HELD_COUNTS = {(2, "ring"), (3, "square"), (4, "triangle")}
HELD_ORDERS = {("square", "disc"), ("cross", "triangle")}        # the first left of, or above
SPLITS = ["train", "pairs", "counts", "orders"]

EPOCH = 2**16           # samples; each epoch has new ones
HELD = 2**53            # held-out samples have the indices from here on


@dataclass
class Thing:
    """An object: what it is, and where its centre is, in pixels."""
    size: str
    colour: str
    shape: str
    x: float
    y: float

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass
class Scene:
    background: str
    things: list[Thing]
    kind: str           # see World

    def count(self, shape: str) -> int:
        return sum(thing.shape == shape for thing in self.things)


def is_related(first: Thing, relation: str, second: Thing) -> bool:
    """Return True if `first` is left of, or above, `second`, by most of a cell."""
    if relation == "left of":
        return second.x - first.x > CELL / 2
    return second.y - first.y > CELL / 2


def orders(scene: Scene) -> Iterator[tuple[Thing, str, Thing]]:
    """Yield what is left of or above what in a scene of two objects."""
    if scene.kind == "pair":
        for first, second in (scene.things, scene.things[::-1]):
            for relation in RELATIONS:
                if is_related(first, relation, second):
                    yield first, relation, second


def held_out(scene: Scene) -> set[str]:
    """Return the kinds of held-out combinations that a scene shows."""
    kinds = set()
    if any(thing.pair in HELD_PAIRS for thing in scene.things):
        kinds.add("pairs")
    if any((scene.count(shape), shape) in HELD_COUNTS for shape in SHAPES):
        kinds.add("counts")
    if any((first.shape, second.shape) in HELD_ORDERS for first, _, second in orders(scene)):
        kinds.add("orders")
    return kinds


# ------------------------------------------------------------------------------------------- scenes

def draw_scene(rng: random.Random, world: World) -> Scene:
    """Return a random scene, which may show held-out combinations."""
    kind = rng.choice(world.kinds)
    group_size = rng.randint(2, 4)
    count = dict(one=1, pair=2, group=group_size)[kind]
    shape = rng.choice(SHAPES)
    colour = rng.choice(list(RGB))
    size = rng.choice(world.sizes)
    alike = rng.random() < 0.5                      # a group may have one colour and one size
    things = []
    for cell in rng.sample(range(4), count):
        if kind != "group":
            shape = rng.choice(SHAPES)
        if kind != "group" or not alike:
            colour, size = rng.choice(list(RGB)), rng.choice(world.sizes)
        x, y = (CELL / 2 + CELL * place for place in (cell % 2, cell // 2))
        things.append(Thing(size, colour, shape, x, y))
    return Scene(rng.choice(world.backgrounds), things, kind)


def make_scene(i: int, split: str = "train", world: str = "shapes") -> Scene:
    """Return the scene of sample i.  A scene of "train" shows no held-out combination; one of another
    split shows held-out combinations of exactly that kind."""
    rng = random.Random(f"{world} {split} {i}")
    wanted = set() if split == "train" else {split}
    while True:
        scene = draw_scene(rng, WORLDS[world])
        pairs = [thing.pair for thing in scene.things]
        # captions and questions could not tell two red discs apart
        is_clear = scene.kind == "group" or len(set(pairs)) == len(pairs)
        if is_clear and held_out(scene) == wanted:
            return scene


def covered(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Return which of the points at (dx, dy) from a shape's centre it covers, bool."""
    distance = np.hypot(dx, dy)
    if shape == "disc":
        return distance <= radius
    if shape == "ring":
        return (distance <= radius) & (distance >= 0.5 * radius)
    if shape == "triangle":
        return (dy <= 0.8 * radius) & (2 * abs(dx) <= dy + radius)
    long, short = np.maximum(abs(dx), abs(dy)), np.minimum(abs(dx), abs(dy))
    if shape == "square":
        return long <= 0.9 * radius
    return (long <= radius) & (short <= 0.35 * radius)           # a cross


def render(scene: Scene) -> Tensor:
    """Return the image (3, SIDE, SIDE) uint8."""
    image = np.empty((SIDE, SIDE, 3), np.uint8)
    image[:] = BACKGROUNDS[scene.background]
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    for thing in scene.things:
        mask = covered(thing.shape, x - thing.x, y - thing.y, RADII[thing.size])
        image[mask] = RGB[thing.colour]
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


# -------------------------------------------------------------------------------------------- texts

def plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def noun(size: str, colour: str, shape: str, count: int = 1) -> str:
    """Return "a small red disc", or "two discs"; an empty size or colour is left out."""
    words = ["a", size, colour, shape]
    if count > 1:
        words = [COUNTS[count - 1], size, colour, plural(shape)]
    return " ".join(filter(None, words))


def caption_of(scene: Scene, world: World, rng: random.Random) -> str:
    """Return a random caption.  It never names a size or background that all images of the world
    share."""
    things = scene.things
    if world.in_order:
        things = sorted(things, key=lambda thing: (thing.y, thing.x))
    says_size = rng.random() < 0.5 and len(world.sizes) > 1
    says_colour = rng.random() < 0.7
    if scene.kind == "group":
        sizes = {thing.size for thing in things}
        colours = {thing.colour for thing in things}
        size = sizes.pop() if says_size and len(sizes) == 1 else ""
        colour = colours.pop() if says_colour and len(colours) == 1 else ""
        text = noun(size, colour, things[0].shape, len(things))
    else:
        if len({thing.shape for thing in things}) < len(things):
            says_colour = True                      # two discs are told apart by their colours

        def name(thing: Thing) -> str:
            size = thing.size if says_size else ""
            colour = thing.colour if says_colour else ""
            return noun(size, colour, thing.shape)
        text = " and ".join(map(name, things))
        related = list(orders(scene))
        if related and rng.random() < 0.4:
            first, relation, second = rng.choice(related)
            text = f"{name(first)} {relation} {name(second)}"
    says_background = rng.random() < 0.3 and len(world.backgrounds) > 1
    return f"{text} on {scene.background}" if says_background else text


def questions_of(scene: Scene, rng: random.Random) -> list[dict]:
    """Return questions with their answers.  No question names a held-out combination that the scene
    does not show, and there are as many with the answer yes as with no."""
    questions = []

    def ask(kind: str, question: str, answer: str) -> None:
        questions.append(dict(type=kind, question=question, answer=answer))
    things = scene.things
    ask("number", "How many things are there?", COUNTS[len(things) - 1])
    for shape in dict.fromkeys(thing.shape for thing in things):
        ask("number", f"How many {plural(shape)} are there?", COUNTS[scene.count(shape) - 1])
    for thing in things:
        if scene.count(thing.shape) == 1:
            ask("colour", f"What colour is the {thing.shape}?", thing.colour)
        if sum(other.colour == thing.colour for other in things) == 1:
            ask("shape", f"What shape is the {thing.colour} thing?", thing.shape)
        present = {other.pair for other in things}
        absent = [(colour, shape) for colour in RGB for shape in SHAPES
                  if (colour, shape) not in present | HELD_PAIRS
                  and (colour == thing.colour or shape == thing.shape)]
        for (colour, shape), answer in ((thing.pair, "yes"), (rng.choice(absent), "no")):
            ask("yes/no", f"Is there {noun('', colour, shape)}?", answer)
    for first, relation, second in orders(scene):
        if first.shape != second.shape:
            ask("place", f"What is {relation} the {second.shape}?", noun("", *first.pair))
    return questions


# ------------------------------------------------------------------------------------------- source

def sample(i: int, split: str = "train", world: str = "shapes") -> dict:
    """Return sample i of a split as `Source.__getitem__` does, with its "scene"."""
    scene = make_scene(i, split, world)
    rng = random.Random(f"{world} texts {split} {i}")
    caption = caption_of(scene, WORLDS[world], rng)
    return dict(key=f"{world} {split} {i}", image=render(scene), captions=[caption],
                questions=questions_of(scene, rng), scene=scene)


class Shapes(Source):
    """A world as a source of `data.Mix`.  Each epoch has EPOCH new samples."""

    held = range(HELD, HELD + 1000)

    def __init__(self, location: Location):
        self.name = location.name
        require((location.pixels == SIDE, f"{self.name}: images of {SIDE} pixels, not of "
                 f"{location.pixels}; give --pixels {SIDE}"))

    def __len__(self) -> int:
        return EPOCH

    def choose(self, row: int, chance: float) -> int:
        return int(chance * HELD)

    def __getitem__(self, i: int) -> dict:
        split = "train"
        if i >= HELD:
            i -= HELD
            split = SPLITS[1:][i % 3]
        shown = sample(i, split, self.name)
        del shown["scene"]
        return shown

    def texts(self) -> Iterator[str]:
        """Yield texts with every word of the world, and those of UNUSED."""
        yield from map(" {}".format, UNUSED)
        for i in range(2000):
            yield from texts_in(sample(i, world=self.name))
