"""inference/image_to_text.py: orders, batches, the image cache, scores, and the ways to ask."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

import mask_diffusion
import sample
from dataset.images import fit_image, read_image, to_image, to_tensor
from inference import image_to_text
from inference.image_to_text import ReadConfig
from inference.pipeline import Pipeline
from viz import grids

APPLE = "red apple, noto style"
KIND = "What kind of thing is this?"
NOISE = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def training_images(emoji_images):
    """Return (captions, images (12, 3, 64, 64)) that the shipped weights were trained on."""
    records, images = emoji_images
    indices = [i for i, record in enumerate(records) if record["split"] == "train"][:12]
    return [records[i]["caption"] for i in indices], images[indices]


def count_correct(texts, captions):
    return sum(text == caption for text, caption in zip(texts, captions, strict=True))


def test_fill_changes_only_masked_tokens(parts, emoji_images):
    records, images = emoji_images
    captions = [record["caption"] for record in records[:32]]
    ids = torch.stack([parts.tokenizer.encode(caption, parts.length) for caption in captions])
    chance = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0))
    masked = torch.where(chance < 0.5, parts.tokenizer.mask_id, ids)
    filled = image_to_text.fill(parts, images[:32], masked,
                                ReadConfig(steps=4, temperature=1.0))
    kept = masked != parts.tokenizer.mask_id
    assert torch.equal(filled[kept], ids[kept])
    assert (filled != parts.tokenizer.mask_id).all()


def test_given_text_behind_an_end_is_kept(tiny_parts, monkeypatch):
    """The network predicts the end token everywhere; only masked tokens may become padding."""
    tokenizer = tiny_parts.tokenizer
    scores = torch.zeros(tokenizer.vocab_size)
    scores[tokenizer.end_id] = 50.0
    monkeypatch.setattr(image_to_text, "Reader", lambda *args: (
        lambda ids, at: scores.expand(len(at), -1)))
    given, mask = tokenizer.pieces("red apple"), tokenizer.mask_id
    ids = torch.tensor([[mask, mask, *given, mask]])
    filled = image_to_text.fill(tiny_parts, NOISE[:1], ids,
                                ReadConfig(order="confidence", temperature=0.0))
    assert filled[0].tolist() == [tokenizer.end_id, tokenizer.pad_id, *given, tokenizer.pad_id]


def test_fill_follows_the_requested_order(tiny_parts):
    """Each order gives the same result as `mask_diffusion.sample`, with equal seeds and ends."""
    ids, tokenizer = image_to_text.canvas(tiny_parts).expand(3, -1), tiny_parts.tokenizer
    expected = {}
    with torch.inference_mode():
        for order in mask_diffusion.ORDERS:
            config = mask_diffusion.SampleConfig(6, order=order, end_id=tokenizer.end_id,
                                               pad_id=tokenizer.pad_id)
            generators = [torch.Generator().manual_seed(3) for _ in range(3)]
            expected[order] = mask_diffusion.sample_at(
                image_to_text.Reader(tiny_parts, NOISE[:3]), ids, tokenizer.mask_id, config,
                generators)
    assert len({tuple(filled.flatten().tolist()) for filled in expected.values()}) > 2
    for argument, order in [(None, "threshold"), *((order, order) for order in expected)]:
        settings = ReadConfig(6, 1.0, argument, image_cache="off")
        filled = image_to_text.fill(tiny_parts, NOISE[:3], ids, settings, [3] * 3)
        assert torch.equal(filled, expected[order]), argument
    assert (ids == tokenizer.mask_id).all()                      # the input stays as it was


@pytest.mark.parametrize("order, image_cache",
                         [("random", "off"), ("threshold", "once"), ("eb", "off")])
def test_a_text_does_not_depend_on_its_batch(tiny_parts, order, image_cache):
    questions = [KIND, "Which style is it drawn in?", "Is this clothing?"] * 3
    config = ReadConfig(order=order, image_cache=image_cache, temperature=3.0, steps=12)
    ids = torch.stack([image_to_text.canvas(tiny_parts, question) for question in questions[:8]])
    seeds = [5, 6, 7, 5, 6, 7, 5, 6]
    fill = lambda latents, ids, seeds: image_to_text.fill(tiny_parts, latents, ids, config, seeds)
    batch = fill(NOISE, ids, seeds)
    for i in range(8):
        assert torch.equal(batch[i:i + 1], fill(NOISE[i:i + 1], ids[i:i + 1], seeds[i:i + 1]))
    assert torch.equal(batch, fill(NOISE.flip(0), ids.flip(0), seeds[::-1]).flip(0))
    assert not torch.equal(batch, fill(NOISE, ids, [seed + 9 for seed in seeds]))


@pytest.mark.parametrize("image_cache", ["off", "once"])
def test_a_cached_image_is_computed_once(tiny_parts, image_cache, monkeypatch):
    """Count the calls of the image stream and of the time embedding."""
    calls = dict(image=0, time=0)

    def count(owner, name, key):
        original = getattr(owner, name)

        def counted(*args):
            calls[key] += 1
            return original(*args)
        monkeypatch.setattr(owner, name, counted)
    blocks = tiny_parts.mmdit.blocks
    count(type(blocks[0].img), "finish", "image")
    count(type(tiny_parts.mmdit.time_in), "forward", "time")
    states = []
    config = ReadConfig(4, order="confidence", image_cache=image_cache)
    image_to_text.write(tiny_parts, NOISE, [None] * 8, config, states=states)
    evaluations = len(states) - 1
    passes = evaluations if image_cache == "off" else 1
    assert evaluations == 4 and calls["time"] == passes
    # The text stream finishes every block, the image stream all but the last.
    assert calls["image"] == evaluations * len(blocks) + passes * (len(blocks) - 1)


def test_caching_the_image_keeps_captions_correct(parts, training_images):
    captions, images = training_images
    correct = {}
    for image_cache in ("off", "once"):
        config = ReadConfig(12, order="confidence", image_cache=image_cache)
        texts = image_to_text.write(parts, images, [None] * 12, config)
        correct[image_cache] = count_correct(texts, captions)
    assert correct["once"] >= correct["off"] - 1 > 6             # of 12


def test_an_evaluation_sets_the_text_length(parts, training_images):
    captions, images = training_images
    masks_left = {}
    for length_at in (None, 0.95):
        states = []
        config = ReadConfig(16, order="random", length_at=length_at)
        texts = image_to_text.write(parts, images, [None] * 12, config, states=states)
        masks_left[length_at] = int((states[1][1] == parts.tokenizer.mask_id).sum())
        assert count_correct(texts, captions) > 6                # of 12
    assert masks_left[0.95] < 0.7 * masks_left[None]             # most captions are short


def test_a_long_text_goes_on_in_blocks(parts, emoji_images, monkeypatch):
    latents, tokenizer = emoji_images[1][:1], parts.tokenizer
    blocks = []

    def count_up(parts, latents, ids, *settings):
        """Continue the text with ids 300, 301, ..."""
        row = ids[0].tolist()
        blocks.append(list(row))
        for at in (ids[0] == tokenizer.mask_id).nonzero()[:, 0].tolist():
            row[at] = row[at - 1] + 1 if at else 300
        return torch.tensor([row])
    monkeypatch.setattr(image_to_text, "fill", count_up)
    monkeypatch.setattr(tokenizer, "decode", list)
    config = ReadConfig(max_tokens=60)
    text, = image_to_text.write(parts, latents, [None], config)
    assert text[:60] == list(range(300, 360))
    assert len(blocks) > 2 and all(len(row) == parts.length for row in blocks)
    blocks.clear()
    image_to_text.write(parts, latents, [KIND], config)
    question = image_to_text.prompt_ids(parts, KIND)
    assert len(blocks) > 2 and all(row[:len(question)] == question for row in blocks)


def test_guidance_away_from_no_image_changes_the_text(tiny_parts):
    ids = image_to_text.canvas(tiny_parts).expand(4, -1)
    fill = lambda scale: image_to_text.fill(
        tiny_parts, NOISE[:4], ids, ReadConfig(6, order="confidence", text_guidance=scale))
    plain = fill(1.0)
    assert torch.equal(plain, fill(1.0 + 1e-9)) and not torch.equal(plain, fill(3.0))


def test_guidance_embeds_the_text_once(tiny_parts, monkeypatch):
    states, calls, forward = [], [], tiny_parts.text.forward
    monkeypatch.setattr(tiny_parts.text, "forward", lambda ids: calls.append(ids) or forward(ids))
    config = ReadConfig(6, order="confidence", text_guidance=2.0)
    image_to_text.fill(tiny_parts, NOISE[:4], image_to_text.canvas(tiny_parts).expand(4, -1),
                       config, states=states)
    assert len(calls) == len(states) - 1 == 6                    # one for both halves


@pytest.mark.parametrize("reverse", [False, True])
def test_infill_keeps_the_likeliest_cut(parts, apple, fast_score, monkeypatch, reverse):
    """In "[MASK] apple" one token replaces the mask, in whichever order the cuts are tried."""
    image = to_tensor(fit_image(read_image(apple), parts.height, parts.width))
    rows, widths = image_to_text.cuts(parts, "[MASK] apple, noto style")
    if reverse:
        rows, widths = rows.flip(0), widths[::-1]
    monkeypatch.setattr(image_to_text, "cuts", lambda parts, text: (rows, widths))
    assert image_to_text.infill(parts, image[None], "[MASK] apple, noto style") == APPLE


@pytest.mark.parametrize("question", [KIND, None])
def test_ranking_scores_only_the_answer(tiny_parts, question):
    """Each answer's score is the likelihood of its tokens, given the prompt's tokens."""
    tokenizer, latents = tiny_parts.tokenizer, NOISE[:1]
    prompt = image_to_text.prompt_ids(tiny_parts, question)
    expected = {}
    for answer in ("yes", "no"):
        ids = tokenizer.fit(prompt + tokenizer.pieces(answer), tiny_parts.length)
        frozen = torch.tensor([i < len(prompt) for i in range(len(ids))])
        function = image_to_text.Reader(tiny_parts, latents.expand(64, -1, -1, -1))
        with torch.no_grad():
            expected[answer] = mask_diffusion.likelihood(
                function, ids, tokenizer.mask_id, frozen, 64, torch.Generator().manual_seed(0))
    rows = image_to_text.rank(tiny_parts, latents, ["yes", "no"], question)
    assert {answer: (nats, error) for answer, _, nats, error in rows} == expected
    assert rows[0][2] <= rows[1][2] and rows[0][1] + rows[1][1] == pytest.approx(1)


# ---------------------------------------------------------------------------------- the command

@pytest.fixture
def run_sample(parts, capsys, monkeypatch):
    """Run sample.py with the shipped weights, and return the lines that it prints."""
    monkeypatch.setattr(sample, "open_parts", lambda config: parts)

    def run(*flags):
        sample.main(list(map(str, flags)))
        return capsys.readouterr().out.splitlines()
    return run


@pytest.fixture
def other(emoji_images, tmp_path):
    """Write a second image, and return its path."""
    to_image(emoji_images[1][0]).save(tmp_path / "other.png")
    return tmp_path / "other.png"


def test_each_line_of_several_images_names_its_file(run_sample, apple, other):
    first, second = run_sample("--image", apple, other)
    assert first == f"{apple}\t{APPLE}" and second.startswith(f"{other}\t")


def test_every_question_is_asked_about_every_image(run_sample, apple, other, tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text("Is this clothing?\n\nWhich style is it drawn in?\n")
    lines = run_sample("--image", apple, other, "--questions", file)
    assert lines[:2] == [f"{apple}\tIs this clothing?\tno",
                         f"{apple}\tWhich style is it drawn in?\tnoto"]
    assert len(lines) == 4 and lines[2].startswith(f"{other}\tIs this clothing?\t")


def test_choices_come_likeliest_first(run_sample, apple, fast_score):
    lines = run_sample("--image", apple, "--question", "Is this clothing?", "--choices", "yes",
                       "no")
    assert [line.split(":")[0] for line in lines] == ["no", "yes"] and "nats" in lines[1]


def test_a_true_caption_scores_fewer_nats(run_sample, apple, fast_score):
    def nats(text):
        line, = run_sample("--image", apple, "--score", text)
        assert "bits a byte" in line
        return float(line.split(": ")[1].split(" +- ")[0])
    assert nats(APPLE) < 2 < 8 < nats("dog face, noto style")


def test_scores_name_their_image_and_agree_in_all_units(run_sample, parts, apple, other, fast_score):
    lines = run_sample("--image", apple, other, "--score", APPLE)
    assert [line.split("\t")[0] for line in lines] == [str(apple), str(other)]
    for line in lines:
        numbers = re.findall(r"[\d.]+", line.split(f"{APPLE}: ")[1])
        nats, _, nats_a_token, bits_a_byte = map(float, numbers)
        tokens = len(parts.tokenizer.pieces(APPLE)) + 1          # with the end token
        assert nats_a_token == pytest.approx(nats / tokens, abs=0.005)           # printed digits
        assert bits_a_byte == pytest.approx(nats / math.log(2) / len(APPLE), abs=0.005)


def test_best_sorts_images_by_the_prompts_score(run_sample, parts, fast_score, tmp_path):
    out = tmp_path / "out.png"
    prompt = "purple apple, noto style"
    pipeline = Pipeline.of(parts)
    drawn = pipeline.draw([prompt] * 3, seed=1, steps=6)
    nats = [sample.score_images(pipeline, [to_tensor(image)], prompt)[0] for image in drawn]
    order = [1, 0, 2]
    assert nats[1] < nats[0] < nats[2]
    seeds, scores, written = run_sample("--prompt", prompt, "--n", 3, "--seed", 1, "--best",
                                        "--steps", 6, "--out", out)
    assert seeds == "seeds: 2 1 3"
    printed = [float(x) for x in scores.removeprefix("nats of the prompt: ").split()]
    assert printed == pytest.approx(sorted(nats), abs=0.05)      # of images rounded to 8 bits
    assert written.startswith(f"{out}: 12 ")                     # 6 steps of two evaluations
    expected = grids.grid([to_tensor(drawn[i]) for i in order])
    difference = np.array(Image.open(out), int) - np.array(expected, int)
    assert abs(difference).max() <= 1                            # 8 bits


def test_text_ended_beforehand_reads_the_same_caption(run_sample, apple):
    assert run_sample("--image", apple, "--length-at", "0.95", "--order", "random") == [APPLE]


def test_text_ended_at_once_has_a_trajectory(run_sample, apple, tmp_path):
    out = tmp_path / "reading.gif"
    caption, path = run_sample("--image", apple, "--length-at", "0", "--trajectory", out)
    assert caption == "" and path == str(out) and out.exists()


def test_chat_answers_until_an_empty_line(run_sample, apple, monkeypatch):
    questions = iter(["Is this clothing?", "why " * 40, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(questions))
    answer, refusal = run_sample("--image", apple, "--chat")
    assert answer == "no" and "leaves no room" in refusal


def test_text_without_an_image_warns(parts, fast_score, monkeypatch, capsys):
    monkeypatch.setattr(sample, "open_parts", lambda config: parts)
    sample.main(["--text", "red [MASK], noto style"])
    warning, = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and "text without" in warning
