"""inference/image_to_text.py with the shipped weights: orders, batches, a picture looked at once, scores, the ways to ask."""

import pytest
import torch

import mask_diffusion
import sample
from inference import image_to_text

NOISE = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))      # of which little is sure


def test_infilling_changes_masked_tokens_only(parts, emoji_all):
    records, pictures = emoji_all
    g = torch.Generator().manual_seed(0)
    ids = torch.stack([parts.tokenizer.encode(r["caption"], parts.length) for r in records[:128]])
    masked = torch.where(torch.rand(ids.shape, generator=g) < 0.5, parts.tokenizer.mask_id, ids)
    filled = image_to_text.fill(parts, pictures[:128], masked, steps=4, temperature=1.0)
    kept = masked != parts.tokenizer.mask_id
    assert torch.equal(filled[kept], ids[kept]) and (filled != parts.tokenizer.mask_id).all()


def test_the_order_of_unmasking_is_the_one_asked_for(parts):
    """Each order's result is that of `mask_diffusion.sample`, end and seeds included."""
    ids, tokenizer = image_to_text.canvas(parts).expand(3, -1), parts.tokenizer
    with torch.inference_mode():
        true = {order: mask_diffusion.sample(
            image_to_text.logits(parts, NOISE[:3]), ids, tokenizer.mask_id, 6, None, 1.0, order, True,
            seeds=[3] * 3, end=(tokenizer.end_id, tokenizer.pad_id)) for order in mask_diffusion.ORDERS}
    assert len({tuple(found.flatten().tolist()) for found in true.values()}) > 2
    for given, order in [(order, order) for order in true] + [(None, "threshold")]:
        found = image_to_text.fill(parts, NOISE[:3], ids, 6, 1.0, 3, given, image_cache="off")
        assert torch.equal(found, true[order])
    assert (ids == tokenizer.mask_id).all() and parts.defaults["image_cache"] == "once"


@pytest.mark.parametrize("order, image_cache", [("random", "off"), ("threshold", "once"), ("eb", "off")])
def test_a_text_is_the_same_alone_and_in_any_batch(parts, emoji_all, order, image_cache):
    records, pictures = emoji_all
    asked = ["What kind of thing is this?", "Which style is it drawn in?", "Is this clothing?"] * 3
    how = dict(order=order, image_cache=image_cache, temperature=3.0, steps=12)
    ids = torch.stack([image_to_text.canvas(parts, question) for question in asked[:8]])
    seeds = [5, 6, 7, 5, 6, 7, 5, 6]
    batch = image_to_text.fill(parts, pictures[:8], ids, seed=seeds, **how)
    for i in range(8):
        alone = image_to_text.fill(parts, pictures[i:i + 1], ids[i:i + 1], seed=seeds[i], **how)
        assert torch.equal(batch[i:i + 1], alone)
    backwards = image_to_text.fill(parts, pictures[:8].flip(0), ids.flip(0), seed=seeds[::-1], **how)
    assert torch.equal(batch, backwards.flip(0))
    other = image_to_text.fill(parts, pictures[:8], ids, seed=[seed + 9 for seed in seeds], **how)
    assert order != "random" or not torch.equal(batch, other)        # sure of each token


def test_a_picture_that_is_looked_at_once_costs_once_and_reads_the_same(parts, emoji_all, monkeypatch):
    records, pictures = emoji_all
    shown = [i for i, r in enumerate(records) if r["split"] == "train"][:24]
    image = type(parts.mmdit.blocks[0].img)
    calls, times, finish, time_in = [], [], image.finish, type(parts.mmdit.time_in).forward
    monkeypatch.setattr(image, "finish", lambda self, *a: calls.append(1) or finish(self, *a))
    monkeypatch.setattr(type(parts.mmdit.time_in), "forward", lambda *a: times.append(1) or time_in(*a))
    said = {}
    for image_cache in ("off", "once"):
        states = []
        calls.clear(), times.clear()
        said[image_cache] = image_to_text.write(parts, pictures[shown], image_cache=image_cache, order="confidence",
                                          steps=12, trajectory=states)
        n, blocks = len(states) - 1, len(parts.mmdit.blocks)
        assert n == 12
        looks = dict(off=n, once=1)[image_cache]
        assert len(calls) == n * blocks + looks * (blocks - 1)   # the image's last block isn't finished
        assert len(times) == looks
    right = {image_cache: sum(text == records[i]["caption"] for text, i in zip(texts, shown))
             for image_cache, texts in said.items()}
    assert right["once"] >= right["off"] - 1 > 12


def test_the_length_is_read_off_the_first_evaluation(parts, emoji_all):
    records, pictures = emoji_all
    shown = [i for i, r in enumerate(records) if r["split"] == "train"][:32]
    counts = {}
    for canvas in (None, 0.95):
        states = []
        said = image_to_text.write(parts, pictures[shown], order="random", canvas=canvas, trajectory=states)
        counts[canvas] = int((states[1][1] == parts.tokenizer.mask_id).sum())
        assert sum(text == records[i]["caption"] for text, i in zip(said, shown)) > 16
    assert counts[0.95] < 0.7 * counts[None]


def test_a_long_text_goes_on_in_blocks(parts, emoji_all, monkeypatch):
    _, pictures = emoji_all
    tokenizer, length = parts.tokenizer, parts.length
    seen = []

    def counting(parts, latents, ids, **how):
        """A token of its place: 300 more than the one before it."""
        seen.append(ids[0].tolist())
        row, masks = ids[0].tolist(), (ids[0] == tokenizer.mask_id).nonzero()[:, 0].tolist()
        for at in masks:
            row[at] = row[at - 1] + 1 if at else 300
        return torch.tensor([row])
    monkeypatch.setattr(image_to_text, "fill", counting)
    monkeypatch.setattr(tokenizer, "decode", list)
    assert image_to_text.write(parts, pictures[:1], max_tokens=60)[0][:60] == list(range(300, 360))
    assert all(len(row) == length for row in seen) and len(seen) > 2
    seen.clear()
    image_to_text.write(parts, pictures[:1], "What kind of thing is this?", max_tokens=60)
    question = image_to_text.prompt_ids(parts, "What kind of thing is this?")
    assert len(seen) > 2 and all(row[:len(question)] == question for row in seen)


def test_guidance_away_from_no_picture_changes_what_is_read(parts):
    ids = image_to_text.canvas(parts).expand(4, -1)
    fill = lambda **how: image_to_text.fill(parts, NOISE[:4], ids, order="confidence", **how)
    calls, text = [], parts.text.forward
    parts.text.forward = lambda ids: calls.append(len(ids)) or text(ids)
    states = []
    fill(guidance=2.0, trajectory=states)
    del parts.text.forward
    assert len(calls) == len(states) - 1                         # once for both halves
    plain = fill(guidance=1.0)
    assert torch.equal(plain, fill(guidance=1.0 + 1e-9)) and not torch.equal(plain, fill(guidance=3.0))


def test_the_likeliest_cut_of_the_masks_is_kept(parts, emoji_all, monkeypatch):
    """"[MASK] apple" about a red apple: one token for the mask, wherever that cut stands among the others."""
    records, pictures = emoji_all
    picture = pictures[[r["caption"] for r in records].index("red apple, noto style")]
    cuts = image_to_text.cuts
    for order in (slice(None), slice(None, None, -1)):
        rows, widths = cuts(parts, "[MASK] apple, noto style")
        found = rows[list(range(3))[order]], widths[order]
        monkeypatch.setattr(image_to_text, "cuts", lambda parts, text: found)
        assert sample.infill(parts, picture[None], "[MASK] apple, noto style") == "red apple, noto style"


def test_the_ways_to_read_and_to_score(parts, apple, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, "Parts", lambda *a, **how: parts)

    def said(*flags):
        sample.main(list(map(str, flags)))
        return capsys.readouterr().out.splitlines()
    other = tmp_path / "other.png"
    assert said("--prompt", "dog face, noto style", "--steps", 4, "--out", other) == [
        f"{other}: 8 evaluations a picture"]
    assert said("--image", apple, other)[0] == f"{apple}\tred apple, noto style"
    questions = tmp_path / "questions.txt"
    questions.write_text("Is this clothing?\n\nWhich style is it drawn in?\n")
    found = said("--image", apple, other, "--questions", questions)
    assert found[:2] == [f"{apple}\tIs this clothing?\tno", f"{apple}\tWhich style is it drawn in?\tnoto"]
    assert len(found) == 4 and found[2].startswith(f"{other}\tIs this clothing?\t")
    found = said("--image", apple, "--question", "Is this clothing?", "--choices", "yes", "no")
    assert [line.split(":")[0] for line in found] == ["no", "yes"] and "nats" in found[1]
    right, wrong = (said("--image", apple, "--score", text)[0] for text in (
        "red apple, noto style", "dog face, noto style"))
    nats = lambda line: float(line.split(": ")[1].split(" +- ")[0])
    assert nats(right) < 2 < 8 < nats(wrong) and "bits a byte" in right
    best = said("--prompt", "red apple, noto style", "--n", 3, "--best", "--steps", 6, "--out", other)
    numbers = [float(x) for x in best[0].removeprefix("nats of the prompt: ").split()]
    assert numbers == sorted(numbers) and len(numbers) == 3 and best[1].startswith(f"{other}: 12 ")
    assert said("--image", apple, "--length", "auto", "--order", "random") == ["red apple, noto style"]
    asked = iter(["Is this clothing?", "why " * 40, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked))
    no, refused = said("--image", apple, "--chat")
    assert no == "no" and "leaves no room" in refused
    sample.main(["--text", "red [MASK], noto style"])
    assert capsys.readouterr().err == "warning: these weights have never learnt text without a picture\n"
