"""tour.py and its exercises: it is one file, its losses fall, and counting pixels is right."""

import ast
import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import tour
from experiments import tour_exercises


def test_it_imports_nothing_from_the_project():
    modules = set()
    for node in ast.walk(ast.parse(Path(tour.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    assert modules <= {"torch", "PIL", *sys.stdlib_module_names}


@pytest.fixture(scope="module")
def world():
    """Return images and captions, without and with a held-out pair."""
    return tour.make_data(64, seed=3, held_out=False), tour.make_data(64, seed=3, held_out=True)


@torch.no_grad()
def losses(model, images, captions):
    """Return the image loss and the text loss, means over eight draws of times and masks."""
    torch.manual_seed(0)
    ids = tour.encode(captions).repeat(8, 1)
    images = images.repeat(8, 1, 1, 1)
    return [float(loss(model, images, ids)) for loss in (tour.image_loss, tour.text_loss)]


def test_both_losses_fall(world, capsys):
    images, captions = world[0]
    torch.manual_seed(0)
    before = losses(tour.MMDiT(), images, captions)
    after = losses(tour.train(images, captions, steps=40), images, captions)
    # measured: 4.8 and 2.70 before, 0.88 and 2.17 after
    assert after[0] < 0.4 * before[0] and after[1] < 0.9 * before[1]
    assert "step 40/40" in capsys.readouterr().out


def test_held_out_pairs_are_in_no_training_caption(world):
    for (_, captions), held_out in zip(world, (False, True)):
        for caption in captions:
            assert tour.HELD_OUT.isdisjoint(tour.pairs_in(caption)) != held_out
            assert len(caption.split()) <= tour.LENGTH
        assert tour.decode(tour.encode(captions)) == captions


@pytest.mark.parametrize("caption", [f"{colour} {shape}" for colour, shape in tour.PAIRS])
def test_counting_pixels_finds_one_object(caption):
    image = tour.paint(caption, random.Random(1))
    assert all(tour.check(image, caption).values())
    assert not any(tour.check(torch.ones_like(image), caption).values())


def test_counting_pixels_finds_what_is_wrong():
    image = tour.paint("red disc left of blue square", random.Random(1))
    right = dict(colours=True, number=True, places=True, shapes=True)
    wrong = {"red disc left of blue square": {},
             "blue square left of red disc": dict(places=False),
             "red disc above blue square": dict(places=False),
             "red square left of blue disc": dict(shapes=False),
             "red disc left of cyan square": dict(colours=False, places=False, shapes=False),
             "red disc": dict(colours=False, number=False, places=False, shapes=False)}
    for caption, differences in wrong.items():
        assert tour.check(image, caption) == right | differences
    image[:, :3, :3] = image[:, 8, 4, None, None]       # a second red part
    assert not tour.check(image, "red disc left of blue square")["number"]


def test_reading_reveals_one_word_a_step(world):
    torch.manual_seed(0)
    states = tour.read(tour.MMDiT(), world[0][0][:4])
    masks = [(ids == tour.MASK).sum(1).tolist() for ids in states]
    assert masks == [[tour.LENGTH - step] * 4 for step in range(tour.LENGTH + 1)]
    for earlier, later in zip(states, states[1:]):
        revealed = earlier != tour.MASK
        assert torch.equal(earlier[revealed], later[revealed])


def test_the_program_writes_its_sheet(tmp_path, monkeypatch, capsys):
    make_data = tour.make_data
    monkeypatch.setattr(tour, "make_data", lambda count, **more: make_data(min(count, 16), **more))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tour.py", "--steps", "2"])
    tour.main()
    assert capsys.readouterr().out.count("shapes") == 2
    assert Image.open(tmp_path / "tour.png").width == 900


@pytest.mark.parametrize("exercise", tour_exercises.CHANGES)
def test_an_exercise_changes_this_file(exercise):
    """The pieces that it replaces occur once, and the changed network runs."""
    changed = tour_exercises.changed(exercise)
    torch.manual_seed(0)
    images, captions = changed.make_data(4, seed=0, held_out=False)
    model = changed.MMDiT()
    ids = changed.encode(captions)
    loss = changed.image_loss(model, images, ids) + changed.text_loss(model, images, ids)
    assert loss.isfinite()
    assert len(changed.read(model, images)) == changed.LENGTH + 1
    assert changed.draw(model, captions, seed=0, steps=2)[-1].isfinite().all()
