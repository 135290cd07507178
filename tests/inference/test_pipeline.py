"""inference/pipeline.py takes and returns PIL images and strings, with the commands' results."""

import pytest
import torch
from PIL import Image

from common.cli import UserError
from dataset.images import to_image
from inference import image_to_text, text_to_image
from inference.pipeline import Pipeline

PROMPT = "red apple, noto style"


@pytest.fixture(scope="module")
def pipeline():
    """Return a pipeline of the shipped weights."""
    return Pipeline(dtype=torch.float32)


@pytest.fixture(scope="module")
def image(pipeline):
    image, = pipeline.draw(PROMPT, steps=8)
    assert isinstance(image, Image.Image)
    return image


def test_draw_gives_the_image_of_the_command(pipeline):
    single, = pipeline.draw(PROMPT, seed=3, steps=4)
    expected = text_to_image.draw(pipeline.parts, [PROMPT], steps=4, seed=3)
    assert single.tobytes() == to_image(expected[0]).tobytes()
    first, second = pipeline.draw([PROMPT, PROMPT], seed=3, steps=4)
    assert first.tobytes() == single.tobytes() != second.tobytes()


def test_one_string_is_one_prompt(pipeline):
    assert len(pipeline.draw(PROMPT, steps=1)) == 1              # not one per character


def test_a_drawn_image_is_read_back(pipeline, image):
    assert pipeline.caption(image) == [PROMPT]
    wide = image.resize((200, 100))                              # its middle is used
    assert len(pipeline.caption([image, wide])) == 2
    assert pipeline.answer([image], "Which style is it drawn in?") == ["noto"]


def test_transparent_parts_are_read_as_white(pipeline, image):
    paper = Image.new("RGB", image.size, "white")
    half = Image.new("L", image.size, 255)
    half.paste(0, (0, 0, 32, 64))
    clear = image.copy()
    clear.putalpha(half)
    paper.paste(image, mask=half)
    assert torch.equal(pipeline.fit(clear), pipeline.fit(paper))


def test_rank_takes_one_text_and_each_text_once(pipeline, image):
    [[row]] = pipeline.rank(image, "red apple")
    assert row.text == "red apple"
    [rows] = pipeline.rank(image, ["Red apple", "red apple", "red rose"])
    assert [row.text for row in rows] == ["red apple", "red rose"]


def test_edit_refuses_a_strength_that_is_no_noise_level(pipeline, image):
    for strength in (-0.1, 1.5):
        with pytest.raises(UserError, match=f"{strength}: expected 0 to 1"):
            pipeline.edit(image, PROMPT, strength=strength)


def test_edit_begins_with_the_image(pipeline, image):
    same, = pipeline.edit(image, "green apple, noto style", strength=0.0)
    assert same.tobytes() == image.tobytes()
    mask = torch.zeros(1, 1, pipeline.parts.height, pipeline.parts.width, dtype=torch.bool)
    mask[..., :8] = True
    edited, = pipeline.edit(image, "green apple, noto style", mask=mask, steps=2)
    right = (8, 0, pipeline.parts.width, pipeline.parts.height)
    assert edited.crop(right).tobytes() == image.crop(right).tobytes()
    assert edited.tobytes() != image.tobytes()


def test_no_prompts_draw_no_images(pipeline):
    assert pipeline.draw([]) == []


def test_fill_replaces_the_mask(pipeline, image, fast_score):
    assert pipeline.fill(image, "red [MASK], noto style") == PROMPT


def test_score_is_that_of_the_command(pipeline, image, fast_score):
    latents = pipeline.encode(image)
    ids = pipeline.parts.tokenizer.encode(PROMPT, pipeline.parts.length)
    score = pipeline.score(image, PROMPT)
    assert score == image_to_text.score(pipeline.parts, latents, ids)[0]
    assert score < 2 < pipeline.score(image, "dog face, noto style")


def test_unusable_texts_are_refused(pipeline):
    with pytest.raises(UserError, match="201 .* 27"):            # tokens, and the most that fit
        pipeline.draw("apple " * 200)
    with pytest.raises(UserError, match=r"'red apple'.*\[MASK\]"):
        pipeline.fill(Image.new("RGB", (64, 64)), "red apple")


@pytest.mark.parametrize("prompt, negative, warning", [
    ("Red Apple, noto style", "", "'red apple, noto style'"),    # lower-cased
    (PROMPT, "Dog Face, noto style", "'dog face, noto style'"),
    ("zeppelin, noto style", "", "zeppelin")])                   # not in the training texts
def test_changed_and_unknown_words_trigger_a_warning(pipeline, capsys, prompt, negative, warning):
    pipeline.draw(prompt, negative_prompt=negative, steps=1)
    assert warning in capsys.readouterr().err
