"""viz/trajectory.py: what a page is told of a walk is what happened in it."""

from pathlib import Path

import pytest
import torch

import mask_diffusion
import sample
from inference import text_to_image
from inference.image_to_text import canvas, encode, fill
from viz import pages, trajectory
from viz.attention import watching


@pytest.fixture
def told(monkeypatch):
    """What pages.drawing or pages.writing is called with."""
    calls = []
    for name in ("drawing", "writing"):
        whole = getattr(pages, name)
        monkeypatch.setattr(pages, name, lambda *args, whole=whole: calls.append(args) or whole(*args))
    return calls


@pytest.mark.parametrize("solver, steps", [("euler", 3), ("heun", 6)])
def test_a_drawing_is_shown_with_each_steps_states_and_attention(parts, told, solver, steps):
    seen, prompt = trajectory.seen(parts, Path("a.html")), "red apple, noto style"
    drawn = text_to_image.draw(parts, [prompt], steps=steps, solver=solver, seen=seen)
    html = trajectory.drawing_page(parts, prompt, seen, dict(seed=0))
    (_, words, shown, attention, grid, _), = told
    assert "".join(words) == prompt and html.startswith("<!DOCTYPE html>") and grid == (8, 8)
    assert [t for t, _, _ in shown] == text_to_image.levels(parts, steps, solver=solver).tolist()
    assert torch.equal(shown[-1][1].clamp(-1, 1), drawn[0]) and len(attention) == len(shown) - 1
    text = parts.text(parts.tokenizer.encode(prompt, parts.length)[None])
    with torch.no_grad(), watching(parts.mmdit, "words") as alone:
        for t, x, _ in shown[:-1]:
            parts.mmdit(x[None], text, torch.tensor([t]), need="velocity")
    for a, b in zip(attention, alone):                           # of the step's own state, not of Heun's look
        assert torch.allclose(a.float(), b.float(), atol=1e-3)


@pytest.mark.parametrize("order", ["confidence", "threshold", "random"])
def test_a_texts_tokens_are_shown_with_their_step_and_probability(parts, emoji_all, told, order):
    latents, ids = encode(parts, emoji_all[1][:1]), canvas(parts, "What kind of thing is this?")
    how, states = dict(order=order, image_cache="off", steps=8, temperature=0.0), []
    final = fill(parts, latents, ids[None], trajectory=states, **how)[0]
    trajectory.reading_page(parts, emoji_all[1][0], latents, ids, {}, **how)
    (_, pieces, revealed, probability, attention, _, _), = told
    assert pieces == trajectory.pieces(parts, final.tolist())
    given = ids != parts.tokenizer.mask_id
    for i in range(len(ids)):
        assert (revealed[i] == 0) == bool(given[i]) and attention[i].shape == (6, 64)
        if given[i] or probability[i] is None:
            continue
        before = [row for step, row in states if int(step[0]) < revealed[i]][-1]   # was masked, and then not
        assert before[0, i] == parts.tokenizer.mask_id
        with torch.no_grad():
            logits = parts.mmdit(latents, parts.text(before), torch.zeros(1), need="logits")[1][0, i]
        p = mask_diffusion.forbid(logits.double(), parts.tokenizer.mask_id).softmax(-1)[final[i]]
        assert probability[i] == pytest.approx(float(p), abs=1e-3)
    assert sum(p is not None for p in probability) >= 2


def test_the_command_writes_the_page_and_names_it(apple, tmp_path, capsys):
    for flags in (["--image", apple], ["--image", apple, "--text", "red [MASK], noto style"],
                  ["--prompt", "snowman, noto style", "--steps", 2, "--out", tmp_path / "a.png"]):
        path = tmp_path / f"{len(flags)}.HTML"
        sample.main(list(map(str, [*flags, "--trajectory", path])))
        assert capsys.readouterr().out.splitlines()[-1] == str(path)
        assert "Content-Security-Policy" in path.read_text(encoding="utf-8")
