"""dataset/shapes.py and metrics/shapes.py: what is held out stays held out, and pixels are read
exactly."""

import itertools
import json
import os
import random
from collections import Counter

import pytest
import torch
from PIL import Image

import checkpoint
import data
import evaluate
import train
from common.cli import UserError
from dataset import shapes
from dataset.shapes import HELD_COUNTS, HELD_ORDERS, HELD_PAIRS, Scene, Thing
from experiments import shapes_settings
from helpers import rows
from inference import text_to_image
from inference.image_to_text import ReadConfig
from inference.parts import Parts
from inference.text_to_image import DrawConfig
from metrics import shapes as scores, shape_scores
from pretrained.tokenizer import gpt2_subset, gpt2_tokenizer
from training import plan

SAMPLES = int(os.environ.get("SAMPLES", 3_000))       # SAMPLES=100000 takes minutes


def held_out_in(text):
    """Return the held-out combinations that a text names, found by its words alone."""
    words = text.lower().replace("?", "").replace(",", "").split()
    words = [word.removesuffix("es") if word == "crosses" else word for word in words]
    pairs = [pair for pair in zip(words, words[1:]) if pair in HELD_PAIRS]
    for count, shape in HELD_COUNTS:
        if words.count(shape) == count:
            pairs.append((count, shape))                         # "a blue ring and a green ring"
    for count, shape in HELD_COUNTS:
        plural = shape + "s"
        at = words.index(plural) if plural in words else 0
        if at and shapes.COUNTS[count - 1] in words[:at]:
            pairs.append((count, shape))
    for relation in (" left of ", " above "):
        if relation in text:
            first, second = (side.split(" on ")[0].split()[-1] for side in text.split(relation))
            if (first, second) in HELD_ORDERS:
                pairs.append((first, second))
    return pairs


def held_out_on(image):
    """Return the kinds of held-out combinations on an image, found by its pixels."""
    _, things = scores.parse(image)
    counts = Counter(thing.shape for thing in things)
    kinds = set()
    if any((thing.colour, thing.shape) in HELD_PAIRS for thing in things):
        kinds.add("pairs")
    if any(counts[shape] == count for count, shape in HELD_COUNTS):
        kinds.add("counts")
    for first, second in itertools.permutations(things, 2):
        before = second.x - first.x > 6 or second.y - first.y > 6
        if before and len(things) == 2 and (first.shape, second.shape) in HELD_ORDERS:
            kinds.add("orders")
    return kinds


def test_training_names_and_shows_nothing_that_is_held_out():
    assert held_out_in("two small red rings") and held_out_in("a square left of a red disc on black")
    for i in range(SAMPLES):
        sample = shapes.sample(i)
        assert not held_out_on(sample["image"])
        texts = sample["captions"] + [pair["question"] for pair in sample["questions"]]
        for pair in sample["questions"]:
            if "How many" in pair["question"]:
                shape = pair["question"].split()[2]
                texts.append(f"{pair['answer']} {shape}")
            elif pair["type"] == "place":
                other = pair["question"].rstrip("?").split()[-1]
                texts.append(f"{pair['answer']} left of a {other}")
        assert [text for text in texts if held_out_in(text)] == []


@pytest.mark.parametrize("split", shapes.SPLITS[1:])
def test_a_held_out_split_shows_its_own_kind_only(split):
    for i in range(200):
        assert held_out_on(shapes.sample(i, split)["image"]) == {split}


def test_the_small_world_has_one_or_two_large_objects_on_white():
    samples = [shapes.sample(i, world="shapes-small") for i in range(300)]
    assert Counter(len(sample["scene"].things) for sample in samples).keys() == {1, 2}
    categories = {scores.read_caption(sample["captions"][0]).category for sample in samples}
    assert categories == {*scores.CATEGORIES} - {"counting"}
    assert shapes.sample(0)["key"] != samples[0]["key"]
    for sample in samples:
        assert {thing.size for thing in sample["scene"].things} == {"large"}
        assert sample["scene"].background == "white"
        assert not {"small", "large", "white"} & set(sample["captions"][0].split())


def test_two_objects_are_named_in_reading_order_or_in_any_order():
    in_order = Counter()
    for world, i in itertools.product(["shapes", "shapes-any-order"], range(300)):
        sample = shapes.sample(i, world=world)
        claim = scores.read_caption(sample["captions"][0])
        if claim.category == "attribute binding":
            by_name = {thing.pair: (thing.y, thing.x) for thing in sample["scene"].things}
            first, second = [by_name[noun.colour, noun.shape] for noun in claim.nouns]
            in_order[world, first < second] += 1
    assert in_order["shapes", True] > 50 and not in_order["shapes", False]
    assert min(in_order["shapes-any-order", True], in_order["shapes-any-order", False]) > 20


def says(claim):
    """Count what a caption says: colours, sizes, a relation, a background."""
    counts = Counter(relation=bool(claim.relation), background=bool(claim.background))
    for noun in claim.nouns:
        counts.update(colour=noun.count * bool(noun.colour), size=noun.count * bool(noun.size),
                    objects=noun.count)
    return counts


def test_captions_leave_something_open_and_are_true():
    captions = [shapes.sample(i)["captions"][0] for i in range(2000)]
    claims = [scores.read_caption(caption) for caption in captions]
    assert None not in claims
    counts = sum(map(says, claims), Counter())
    assert 0.3 < counts["size"] / counts["objects"] < 0.5 < counts["colour"] / counts["objects"] < 0.8
    categories = Counter(claim.category for claim in claims)
    assert set(categories) == set(scores.CATEGORIES) and min(categories.values()) > 40
    for i, claim in enumerate(claims):
        scene = shapes.make_scene(i)
        assert scores.is_true(claim, scene.background, scene.things)


def test_questions_are_balanced_and_their_answers_right():
    answers = Counter()
    for i in range(500):
        scene = shapes.make_scene(i)
        for pair in shapes.questions_of(scene, random.Random(i)):
            answers[pair["type"], pair["answer"]] += 1
            words = pair["question"].rstrip("?").split()
            if pair["type"] == "yes/no":
                shown = any(thing.pair == tuple(words[-2:]) for thing in scene.things)
                assert pair["answer"] == ("yes" if shown else "no")
            if pair["type"] == "colour":
                assert pair["answer"] in [t.colour for t in scene.things if t.shape == words[-1]]
    assert answers["yes/no", "yes"] == answers["yes/no", "no"]


def key(thing):
    return thing.size, thing.colour, thing.shape


def test_pixels_are_read_exactly():
    for i in range(SAMPLES // 5):
        split = shapes.SPLITS[i % 4]
        scene = shapes.make_scene(i, split)
        background, things = scores.parse(shapes.render(scene))
        assert background == scene.background
        assert sorted(map(key, things)) == sorted(map(key, scene.things))
        for thing in things:
            assert min(abs(thing.x - true.x) + abs(thing.y - true.y) for true in scene.things) < 1


def test_noise_makes_drawings_wrong():
    generator = torch.Generator().manual_seed(0)
    right = []
    for sigma in (10, 40, 120):
        count = 0
        for i in range(60):
            sample = shapes.sample(i)
            noise = sigma * torch.randn(sample["image"].shape, generator=generator)
            image = (sample["image"] + noise).clamp(0, 255).to(torch.uint8)
            count += scores.is_drawn(sample["captions"][0], image)
        right.append(count)
    assert right[0] >= 59 and right[0] > right[1] > right[2] == 0


RED_DISC = Thing("small", "red", "disc", 6, 6)
BLUE_SQUARE = Thing("large", "blue", "square", 18, 6)
BLUE_RING = Thing("small", "blue", "ring", 6, 18)


@pytest.mark.parametrize("caption, things, true", [
    ("a disc", [RED_DISC], True), ("a disc on white", [RED_DISC], True),
    ("a disc on black", [RED_DISC], False), ("a large disc", [RED_DISC], False),
    ("a disc", [RED_DISC, BLUE_RING], False), ("two discs", [RED_DISC], False),
    ("a red disc left of a blue square", [RED_DISC, BLUE_SQUARE], True),
    ("a blue square left of a red disc", [RED_DISC, BLUE_SQUARE], False),
    ("a red disc above a blue square", [RED_DISC, BLUE_SQUARE], False),
    ("a disc above a ring", [BLUE_RING, RED_DISC], True),
    ("a blue disc and a red square", [RED_DISC, BLUE_SQUARE], False),
    ("a blue ring and a red disc", [RED_DISC, BLUE_RING], True),
    ("a blue ring and a red disc", [RED_DISC, BLUE_SQUARE, BLUE_RING], False),
    ("two blue discs", [RED_DISC, RED_DISC], False), ("two red discs", [RED_DISC, RED_DISC], True)])
def test_a_caption_is_true_or_not(caption, things, true):
    assert scores.is_true(scores.read_caption(caption), "white", things) == true
    scene = Scene("white", things, "pair")
    if len({(thing.x, thing.y) for thing in things}) == len(things):
        assert scores.is_drawn(caption, shapes.render(scene)) == true


@pytest.mark.parametrize("text", ["", "a", "disc", "a red", "a discs on green", "a discs", "two disc",
                                  "a disc on green", "five discs", "a disc and",
                                  "two discs left of a ring", "a disc left of a ring and a cross", "a disc, a ring and a cross",
                                  "a pink disc", "a red red disc"])
def test_a_text_that_is_not_of_the_grammar_says_nothing(text):
    assert scores.read_caption(text) is None


def test_what_is_no_shape_is_not_parsed():
    image = shapes.render(Scene("white", [], "one"))
    assert scores.parse(image) == ("white", [])
    bar = image.clone()
    bar[:, 10:12, 2:22] = torch.tensor(shapes.RGB["red"], dtype=torch.uint8)[:, None, None]
    assert scores.parse(bar) is None
    patch = shapes.render(Scene("white", [RED_DISC], "one"))
    patch[:, 14:20, 14:20] = 0                                   # black, the colour of a background
    assert scores.parse(patch) is None
    touching = shapes.render(Scene("white", [RED_DISC, Thing("small", "red", "disc", 12, 6)], "pair"))
    assert scores.parse(touching) is None


def test_calibration_of_known_distributions():
    assert scores.total_variation(Counter("aabbccdd"), [*"abcd"]) == 0
    assert scores.total_variation(Counter("aaaa"), [*"abcd"]) == 0.75
    assert scores.total_variation(Counter("abcdeeee"), [*"abcd"]) == 0.5
    assert scores.total_variation(Counter(), [*"abcd"]) == 1


def test_the_world_is_a_source(tmp_path, monkeypatch):
    mix = data.Mix(["shapes:2"], shapes.SIDE, "run")
    samples = mix.take(range(100), "image")
    again = mix.take(range(50, 60), "image")
    assert [s["key"] for s in again] == [s["key"] for s in samples[50:60]]
    assert len({s["key"] for s in samples}) == 100
    assert all(torch.equal(one["image"], other["image"]) for one, other in zip(again, samples[50:]))
    second_epoch = mix.take(range(len(mix), len(mix) + 9), "image")
    assert not {s["key"] for s in second_epoch} & {s["key"] for s in samples}
    held = {s["key"].split()[1] for s in mix.shown(9, held=True)}
    assert held == {"pairs", "counts", "orders"}
    with pytest.raises(UserError, match="--pixels 24"):
        data.Mix(["shapes"], 64)
    before = data.fingerprint("shapes")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()                                # a folder of that name wins
    with pytest.raises(UserError, match="expected images"):
        data.open_source("shapes", 24)
    assert data.fingerprint("shapes") != before


def test_the_vocabulary_has_every_word_and_some_more():
    texts = list(data.open_source("shapes", shapes.SIDE).texts())
    small, full = gpt2_tokenizer(gpt2_subset(texts)), gpt2_tokenizer()
    assert small.vocab_size < 500
    for text in [shapes.sample(i)["captions"][0] for i in range(5000, 5300)] + [
            "a pink star left of an orange disc"]:
        pieces = [small.decode([i]) for i in small.pieces(text)]
        assert pieces == [full.decode([i]) for i in full.pieces(text)], text


# ------------------------------------------------------------------------------ training and measuring

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train for 60 steps from nothing: a quarter of a minute."""
    out = tmp_path_factory.mktemp("shapes") / "run"
    flags = ("--preset shapes --stage instruct --image-data shapes-small --pixels 24 --question-share 0.3 "
             "--optimizer muon --lr 3e-3 --warmup 10 --image-batch 16 --text-batch 16 --steps 60 "
             "--log-every 10 --eval-every 30 --sample-every 0 --save-every 60 --dtype float32 "
             "--guidance 3")
    train.main([*flags.split(), "--out", str(out)])
    return out


def test_a_short_training_learns_something(trained):
    log = rows(trained)
    first, last = log[0], log[-1]
    assert last["text_loss"] < 0.4 * first["text_loss"]
    measured = [row for row in log if "val_nats" in row]
    assert measured[-1]["val_nats"] < 0.9 * measured[0]["val_nats"]
    assert measured[-1]["val_image"] < 0.7 * measured[0]["val_image"]     # single steps vary too much


def test_work_is_counted_with_the_vocabulary_in_use(trained):
    _, sizes = checkpoint.read_sizes(trained)
    assert sizes.vocab_size < 1000
    config = train.parse(["--init", str(trained), "--image-batch", "16", "--text-batch", "16"])
    work = plan.work(config, sizes, 1)
    for row in rows(trained):
        assert row["tflop_per_s"] / row["samples_per_s"] == pytest.approx(
            work["tflop"] / work["samples"], rel=0.01)           # four digits are kept


def test_weights_keep_their_own_guidance_and_shift(trained):
    parts = Parts(trained)
    config = parts.complete(DrawConfig())
    assert (config.guidance, config.shift) == (3.0, 2.0)         # of the flag, and of the preset
    assert parts.complete(DrawConfig(guidance=4.0)).guidance == 4
    assert train.parse(["--init", str(trained)]).guidance == 3


def test_evaluate_prints_exact_scores(trained, tmp_path, capsys):
    flags = ["shapes", "--checkpoint", trained, "--world", "shapes-small", "--limit", 6, "--prompts", 1,
             "--open", 2, "--seeds", 0, 1, "--steps", 2, "--json", tmp_path / "s.json"]
    evaluate.main(list(map(str, flags)))
    text = capsys.readouterr().out
    for title in ("drawing", "reading", "calibration"):
        assert f"| {title}, % |" in text
    results = json.loads((tmp_path / "s.json").read_text())["results"]
    assert results.keys() == {"seen", "held-out", "open prompts"}
    assert all(0 <= value <= 100 for runs in results.values() for run in runs for value in run.values())
    evaluate.main(["shapes", "--checkpoint", str(trained), "--steps", "1", "--page",
                   str(tmp_path / "p.png")])
    assert Image.open(tmp_path / "p.png").width > 900


def test_settings_are_compared_on_the_same_prompts(trained, tmp_path, capsys, monkeypatch):
    reading = {cache: ReadConfig(order="random", steps=1, image_cache=cache) for cache in ("off", "once")}
    configs = dict(guidance=dict(one=DrawConfig(steps=1), again=DrawConfig(steps=1)), orders=reading)
    monkeypatch.setattr(shapes_settings, "CONFIGS", configs)
    flags = ["--checkpoint", str(trained), "--seeds", "0", "1", "--prompts", "1", "--open", "2", "--limit", "6"]
    shapes_settings.main(["guidance", *flags])
    _, _, one, again = capsys.readouterr().out.splitlines()
    assert one.removeprefix("| one") == again.removeprefix("| again")
    shapes_settings.main(["orders", *flags, "--json", str(tmp_path / "orders.json")])
    off, once = json.loads((tmp_path / "orders.json").read_text()).values()
    assert off["evaluations"] == once["evaluations"] == [1, 1] and min(once["time"]) > 0


def test_a_perfect_painter_and_reader_scores_100(monkeypatch):
    """In place of the network, the true images and texts."""
    wanted, shown = {}, {}

    def remember(*which):
        for sample in real(*which):
            wanted.setdefault(sample["captions"][0], sample["image"])
            texts = shown.setdefault(sample["image"].numpy().tobytes(), dict(questions=[]))
            texts["captions"] = sample["captions"]
            texts["questions"] += sample["questions"]            # an image may come twice
            yield sample
    real = shape_scores.samples
    monkeypatch.setattr(shape_scores, "samples", remember)

    def draw(parts, texts, seed, **_):
        return torch.stack([wanted[text] for text in texts]) / 127.5 - 1
    monkeypatch.setattr(text_to_image, "draw", draw)
    monkeypatch.setattr(shape_scores, "encode", lambda parts, images: images)

    def write(parts, x, questions, config, seeds):
        texts = []
        for image, question in zip(shape_scores.to_pixels(x), questions):
            sample = shown[image.numpy().tobytes()]
            answers = {pair["question"]: pair["answer"] for pair in sample["questions"]}
            texts.append(answers[question] if question else sample["captions"][0])
        return texts
    monkeypatch.setattr(shape_scores, "write", write)
    test = shape_scores.ShapesTest(None)
    for row in shape_scores.ROWS:
        assert set(test.draw(row, 3, 0, DrawConfig()).values()) == {100}
        read = test.captions(row, 30, 0, ReadConfig()) | test.answers(row, 30, 0, ReadConfig())
        assert read.pop("POPE: yes-ratio") == 50 and 20 < read.pop("reading: complete") < 100
        assert set(read.values()) == {100}


def test_held_out_prompts_name_what_is_held_out():
    for row, world in itertools.product(shape_scores.ROWS, shapes.WORLDS):
        captions = shape_scores.prompts(row, 5, 1, world)
        counts = Counter(scores.read_caption(caption).category for caption in captions)
        assert counts == dict.fromkeys(shape_scores.categories(row, world), 5)
        for caption in captions:
            assert bool(held_out_in(caption)) == (row == "held-out"), caption


def test_calibration_finds_a_painter_with_one_colour(monkeypatch):
    rng = random.Random(0)

    def draw(parts, texts, seed, **_):
        images = []
        for text in texts:
            shape = text.split()[1]
            colour = draw.colour or rng.choice([c for c in shapes.RGB if (c, shape) not in HELD_PAIRS])
            thing = Thing(rng.choice(list(shapes.RADII)), colour, shape, rng.choice([6, 18]), rng.choice([6, 18]))
            images.append(shapes.render(Scene(rng.choice(list(shapes.BACKGROUNDS)), [thing], "one")))
        return torch.stack(images) / 127.5 - 1
    monkeypatch.setattr(text_to_image, "draw", draw)
    scores_of = []
    for draw.colour in ("", "cyan"):
        scores_of.append(shape_scores.ShapesTest(None).calibrate(100, 0, DrawConfig()))
    true, one_colour = scores_of
    assert true["calibration: right"] == 100 and true["calibration: colour"] < 12
    assert one_colour["calibration: colour"] == pytest.approx(80) and one_colour["calibration: cell"] < 10
