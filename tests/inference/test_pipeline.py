"""inference/pipeline.py: PIL images and strings, with what the commands give."""

import pytest
import torch
from PIL import Image

from common.cli import UserError
from dataset.images import to_picture
from inference import image_to_text, text_to_image
from inference.pipeline import Pipeline

PROMPT = "red apple, noto style"


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline(dtype=torch.float32)


def test_one_string_is_one_prompt_and_the_image_is_the_commands(pipeline):
    drawn = pipeline.draw(PROMPT, seed=3, steps=4)
    plain = text_to_image.draw(pipeline.parts, [PROMPT], steps=4, seed=3)
    assert len(drawn) == 1 and drawn[0].tobytes() == to_picture(plain[0]).tobytes()
    assert len(text_to_image.draw(pipeline.parts, PROMPT, steps=1)) == 1         # not an image per character
    several = pipeline.draw([PROMPT, PROMPT], seed=3, steps=4)
    assert several[0].tobytes() == drawn[0].tobytes() != several[1].tobytes()


def test_what_is_drawn_is_captioned_answered_filled_and_scored(pipeline):
    image, = pipeline.draw(PROMPT, steps=8)
    large = image.resize((200, 100))                             # its middle is cut out
    assert isinstance(image, Image.Image) and pipeline.caption(image) == [PROMPT]
    assert len(pipeline.caption([image, large])) == 2
    assert pipeline.answer([image], "Which style is it drawn in?") == ["noto"]
    assert pipeline.fill(image, "red [MASK], [MASK] style") == PROMPT
    latents = pipeline.encode(image)
    ids = pipeline.parts.tokenizer.encode(PROMPT, pipeline.parts.length)
    assert pipeline.score(image, PROMPT) == image_to_text.score(pipeline.parts, latents, ids)[0]
    assert pipeline.score(image, PROMPT) < 2 < pipeline.score(image, "dog face, noto style")


def test_texts_are_read_as_the_commands_read_them(pipeline, capsys):
    with pytest.raises(UserError, match="has 201 tokens, expected at most 27"):
        pipeline.draw("apple " * 200)
    with pytest.raises(UserError, match=r"holds no \[MASK\]"):
        pipeline.fill(Image.new("RGB", (64, 64)), "red apple")
    pipeline.draw("Red Apple, noto style", steps=1)
    assert "is read as 'red apple, noto style'" in capsys.readouterr().err
    pipeline.draw(PROMPT, negative="Dog Face, noto style", steps=1)
    assert "is read as 'dog face, noto style'" in capsys.readouterr().err
    pipeline.draw("zeppelin, noto style", steps=1)
    assert "no text in training had zeppelin" in capsys.readouterr().err
