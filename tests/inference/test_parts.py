"""inference/parts.py: the models of one checkpoint, held when they are needed, that fit together."""

from pathlib import Path

import pytest
import torch

import checkpoint
import data
import sample
from common.cli import UserError, require
from inference import image_to_text, parts as parts_module, text_to_image
from inference.parts import Parts

FIXTURES = Path(__file__).parents[1] / "fixtures"
RELEASE, SD3_FILE = FIXTURES / "release", FIXTURES / "sd3.safetensors"


def test_the_first_condition_that_does_not_hold_is_said():
    require((True, "a"), (1 == 1, "b"))
    with pytest.raises(UserError, match="^b$"):
        require((True, "a"), (False, "b"), (False, "c"))


def test_parts_are_freed_when_they_are_not_needed():
    parts = Parts(RELEASE, vae=SD3_FILE, height=32, width=32, length=16, keep=False)
    held, names = [], ("text", "mmdit", "vae")
    for name in names:
        def watched(name=name, load=getattr(parts, f"load_{name}")):
            held.append((name, [other for other in names if other in vars(parts)]))
            return load()
        setattr(parts, f"load_{name}", watched)
    text_to_image.draw(parts, ["a red cat"], steps=2)
    assert held == [("text", []), ("mmdit", []), ("vae", [])]


@pytest.mark.parametrize("free, loads", [(10**12, 1), (1000, 4)])
def test_parts_stay_between_calls_where_there_is_room_for_them(free, loads, monkeypatch):
    monkeypatch.setattr(parts_module, "available", lambda device: free)
    parts = Parts(RELEASE, vae=SD3_FILE, height=32, width=32, length=16)
    counts = dict(text=0, mmdit=0, vae=0)
    for name in counts:
        def counted(name=name, load=getattr(parts, f"load_{name}")):
            counts[name] += 1
            return load()
        setattr(parts, f"load_{name}", counted)
    for _ in range(4):
        sample.write(parts, image_to_text.encode(parts, torch.zeros(1, 3, 32, 32)), steps=1)
    assert counts == dict(text=loads, mmdit=loads, vae=loads)
    text_to_image.likeliest(parts, [torch.zeros(3, 32, 32)] * 3, "a cat")
    assert counts == dict.fromkeys(counts, loads + (loads > 1))           # not for each picture


def test_what_all_parts_weigh_is_what_they_take_up():
    parts = Parts(RELEASE, vae=SD3_FILE, height=32, width=32, length=16, keep=True)
    parts.hold("text", "mmdit", "vae")
    held = sum(p.nbytes for part in (parts.text, parts.mmdit, parts.vae) for p in part.parameters())
    assert held <= parts.weight() < 1.2 * held                  # and the position table
    assert 2**20 < parts_module.available(torch.device("cpu")) < 2**50


def test_pictures_have_the_size_that_is_asked_for_whatever_the_autoencoder_halves():
    parts = Parts(RELEASE, vae=SD3_FILE, height=48, width=32, length=12)
    assert parts.factor == parts.load_vae().factor != 8
    assert text_to_image.draw(parts, ["a red cat"], steps=1).shape == (1, 3, 48, 32)


def test_the_posteriors_mean_is_encoded():
    parts = Parts(RELEASE, vae=SD3_FILE, height=32, width=32, length=16, keep=True)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        mean = parts.vae.encode(image)
        drawn = parts.vae.encode(image, torch.Generator().manual_seed(7))
    found = image_to_text.encode(parts, image, dtype=torch.float32)
    assert torch.equal(found, mean) and not torch.equal(found, drawn)


def test_a_tokenizer_of_more_ids_than_t5_has_rows_is_refused():
    """SD3 alone has no text head that would not fit; the lookup would be out of range."""
    with pytest.raises(UserError, match="T5's table has 120 rows, the tokenizer 50258 tokens; .*--tokenizer"):
        Parts(SD3_FILE, t5=RELEASE, tokenizer="gpt2", height=32, width=32, length=16)
    with pytest.raises(UserError, match="T5's table has 120 rows"):
        data.main(list(map(str, ["latents", RELEASE, "out", "--vae", SD3_FILE, "--t5", RELEASE,
                                    "--tokenizer", "gpt2"])))


def test_parts_of_other_sizes_are_refused_before_they_are_loaded(monkeypatch):
    for change, message in ((dict(vocab_size=90), "the tokenizer has 110 tokens, the model's text head 90"),
                            (dict(position_size=1),
                             "a picture's height of 32, expected a multiple of 4 up to 4")):
        with monkeypatch.context() as patch:
            family, sizes = checkpoint.read_sizes(RELEASE)
            for name, value in change.items():
                setattr(sizes, name, value)
            patch.setattr(checkpoint, "read_sizes", lambda path: (family, sizes))
            with pytest.raises(UserError, match=message):
                Parts(RELEASE, vae=SD3_FILE, height=32, width=32, length=16)
