"""viz/trajectory.py and viz/grids.py: pages and grids show what happened in a sampling run."""

import pytest
import torch

import mask_diffusion
import sample
from inference import text_to_image
from inference.image_to_text import ReadConfig, canvas, encode, fill
from inference.text_to_image import DrawConfig, Trace
from viz import grids, pages, trajectory
from viz.attention import patches_to_words, storing_attention

APPLE = "red apple, noto style"


@pytest.fixture
def page_arguments(monkeypatch):
    """Return a list that collects the arguments of calls of pages.drawing and pages.writing."""
    calls = []

    def record(function):
        def recorded(*args):
            calls.append(args)
            return function(*args)
        return recorded
    for name in ("drawing", "writing"):
        monkeypatch.setattr(pages, name, record(getattr(pages, name)))
    return calls


@pytest.mark.parametrize("solver, steps", [("euler", 3), ("heun", 6)])
def test_a_drawings_page_shows_each_state_with_its_attention(parts, page_arguments, solver, steps):
    trace = Trace(steps=[])
    settings = dict(steps=steps, solver=solver)
    drawn = text_to_image.draw(parts, [APPLE], trace=trace, **settings)
    html = trajectory.drawing_page(parts, APPLE, trace, dict(seed=0))
    (_, words, states, attention, grid, _), = page_arguments
    assert "".join(words) == APPLE and html.startswith("<!DOCTYPE html>") and grid == (8, 8)
    levels = text_to_image.noise_levels(parts, DrawConfig(**settings))
    assert [t for t, _, _ in states] == levels.tolist()
    assert torch.equal(states[-1][1].clamp(-1, 1), drawn[0])
    text = parts.text(parts.tokenizer.encode(APPLE, parts.length)[None])
    for (t, x, _), stored in zip(states[:-1], attention, strict=True):
        with torch.no_grad(), storing_attention(parts.mmdit):
            parts.mmdit(x[None], text, torch.tensor([t]), need="velocity")
            assert torch.equal(stored, patches_to_words(parts.mmdit))


@pytest.mark.parametrize("order", ["confidence", "threshold", "random"])
def test_a_texts_page_shows_steps_and_probabilities(parts, emoji_images, page_arguments, order):
    image = emoji_images[1][0]
    latents, ids = encode(parts, image[None]), canvas(parts, "What kind of thing is this?")
    config, states = ReadConfig(8, 0.0, order, image_cache="off"), []
    final = fill(parts, latents, ids[None], config, states=states)[0]
    trajectory.reading_page(parts, trajectory.Reading(image, latents, states, config), {})
    (_, pieces, revealed, probability, attention, _, _), = page_arguments
    assert pieces == trajectory.pieces(parts, final.tolist())
    mask_id = parts.tokenizer.mask_id
    for i, token in enumerate(ids.tolist()):
        assert (revealed[i] == 0) == (token != mask_id) and attention[i].shape == (6, 64)
        if probability[i] is None:
            continue
        # The last state in which token i was still masked gave its probability.
        before = [state for step, state in states if int(step[0]) < revealed[i]][-1]
        assert before[0, i] == mask_id
        with torch.no_grad():
            logits = parts.mmdit(latents, parts.text(before), torch.zeros(1), need="logits")[1]
        expected = mask_diffusion.forbid(logits[0, i].double(), mask_id).softmax(-1)[final[i]]
        assert probability[i] == pytest.approx(float(expected), abs=1e-3)  # float32 rounding
    assert sum(p is not None for p in probability) >= 2


@pytest.mark.parametrize("flags", [
    ["--image", "{apple}"], ["--image", "{apple}", "--text", "red [MASK], noto style"],
    ["--prompt", "snowman, noto style", "--steps", "2", "--out", "{folder}/a.png"]])
def test_the_command_writes_the_page_and_prints_its_name(parts, apple, tmp_path, capsys, fast_score,
                                                         monkeypatch, flags):
    monkeypatch.setattr(sample, "open_parts", lambda config: parts)
    page = tmp_path / "page.HTML"
    flags = [flag.format(apple=apple, folder=tmp_path) for flag in flags]
    sample.main([*flags, "--trajectory", str(page)])
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    assert "Content-Security-Policy" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("count, columns, rows", [(1, 1, 1), (2, 2, 1), (3, 2, 2), (5, 3, 2)])
def test_a_grid_is_as_square_as_its_number_allows(count, columns, rows):
    images = torch.linspace(-1, 1, count).view(-1, 1, 1, 1).expand(count, 3, 8, 16)
    sheet = grids.grid(images, least=32, gap=4)                  # each image at twice its size
    assert sheet.size == (columns * 36 - 4, rows * 20 - 4)
    for i in range(count):
        level = round(127.5 * (float(images[i, 0, 0, 0]) + 1))
        corner = sheet.getpixel((i % columns * 36, i // columns * 20))
        assert corner == pytest.approx((level,) * 3, abs=1)      # rounding to a byte
