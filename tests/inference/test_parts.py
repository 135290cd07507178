"""inference/parts.py: a checkpoint's models are checked to fit, and loaded when needed."""

import weakref
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import sample
from common.cli import UserError, require
from inference import image_to_text, parts as parts_module, text_to_image
from inference.image_to_text import ReadConfig
from inference.parts import Parts
from inference.pipeline import Pipeline
from inference.text_to_image import DrawConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"
RELEASE, SD3_FILE = FIXTURES / "release", FIXTURES / "sd3.safetensors"


def release_parts(**changes):
    """Open the tiny published checkpoint with SD3's tiny autoencoder."""
    settings = dict(vae=SD3_FILE, height=32, width=32, length=16)
    return Parts(RELEASE, **settings | changes)


def watch_loads(parts, before_load):
    """Call before_load("text"), ("mmdit") or ("vae") whenever that part is loaded."""
    def watched(name, load):
        def call():
            before_load(name)
            return load()
        return call
    for name in ("text", "mmdit", "vae"):
        setattr(parts, f"load_{name}", watched(name, getattr(parts, f"load_{name}")))


def test_require_raises_the_first_failing_condition():
    require((True, "a"), (1 == 1, "b"))
    with pytest.raises(UserError, match="^b$"):
        require((True, "a"), (False, "b"), (False, "c"))


def test_published_weights_have_the_published_defaults():
    parts = release_parts(length=None)
    assert parts.defaults == dict(guidance=7.0, shift=3.0, batch=4, temperature=1.0,
                                  order="random", image_cache="off")
    assert len(image_to_text.canvas(parts)) == parts.length == 256
    assert len(image_to_text.canvas(parts, "a cat")) == parts.answer_length == 128


def test_published_weights_read_the_image_at_each_evaluation():
    parts, reads, states = release_parts(), [], []
    parts.hold("text", "mmdit", "vae")
    parts.mmdit.img_in.register_forward_hook(lambda *_: reads.append(1))
    latents = image_to_text.encode(parts, torch.zeros(1, 3, 32, 32))
    image_to_text.write(parts, latents, [None], ReadConfig(steps=3), states=states)
    assert len(reads) == len(states) - 1 > 1


def test_own_weights_have_their_own_defaults(tiny_parts):
    assert tiny_parts.defaults == dict(guidance=1.5, shift=1.0, batch=16, temperature=0.0,
                                       order="threshold", image_cache="once")


def test_noise_levels_end_at_the_training_floor(parts):
    """A network that predicts clean data is not evaluated below t = 0.05, its training's floor."""
    assert parts.sizes.predicts == "data"
    assert text_to_image.noise_levels(parts, DrawConfig())[-2:].tolist() == pytest.approx([0.05, 0])


def test_published_noise_levels_end_at_a_thousandth():
    levels = text_to_image.noise_levels(release_parts(), DrawConfig(shift=1.0))
    assert levels[-2:].tolist() == pytest.approx([1e-3, 0])


def test_parts_are_freed_when_they_are_not_needed():
    parts, in_memory = release_parts(keep=False), {}

    def note_others(name):
        in_memory[name] = {"text", "mmdit", "vae"} & set(vars(parts))
    watch_loads(parts, note_others)
    text_to_image.draw(parts, ["a red cat"], steps=2)
    assert list(in_memory.items()) == [("text", set()), ("mmdit", set()), ("vae", set())]


def test_one_network_is_in_memory_at_a_time():
    """17 images of batch 1 are two chunks: the network is loaded again after the decoder was."""
    parts, networks, alive = release_parts(keep=False), [], []

    def note_network(name):
        if "mmdit" in vars(parts):
            networks.append(weakref.ref(parts.mmdit))
        alive.append((name, sum(network() is not None for network in networks)))
    watch_loads(parts, note_network)
    hold = parts.hold

    def hold_and_collect(*names):
        if "mmdit" in vars(parts):
            networks.append(weakref.ref(parts.mmdit))
        hold(*names)
    parts.hold = hold_and_collect
    text_to_image.draw(parts, ["a red cat"] * 17, steps=1, batch=1)
    assert [name for name, _ in alive] == ["text", "mmdit", "vae"] * 2
    assert not any(count for _, count in alive)


@pytest.mark.parametrize("free, loads", [(10**12, 1), (1000, 4)])
def test_parts_stay_in_memory_where_there_is_room(free, loads, monkeypatch):
    monkeypatch.setattr(parts_module, "available", lambda device: free)
    parts, names = release_parts(), []
    watch_loads(parts, names.append)
    counts = lambda: {names.count(name) for name in ("text", "mmdit", "vae")}
    for _ in range(4):
        latents = image_to_text.encode(parts, torch.zeros(1, 3, 32, 32))
        image_to_text.write(parts, latents, [None], ReadConfig(steps=1))
    assert counts() == {loads}
    sample.score_images(Pipeline.of(parts), [torch.zeros(3, 32, 32)] * 3, "a cat")
    assert counts() == {1 if loads == 1 else 5}                  # once, not for each image


def test_the_weight_is_that_of_all_parts():
    parts = release_parts(keep=True)
    parts.hold("text", "mmdit", "vae")
    held = 0
    for part in (parts.text, parts.mmdit, parts.vae):
        held += sum(parameter.nbytes for parameter in part.parameters())
    assert held <= parts.memory_bytes() < 1.2 * held                   # includes the position table
    assert 2**20 < parts_module.available(torch.device("cpu")) < 2**50


def test_images_have_the_requested_size_at_any_autoencoder_factor():
    parts = release_parts(height=48, width=32)
    assert parts.factor == parts.load_vae().factor != 8
    assert text_to_image.draw(parts, ["a red cat"], steps=1).shape == (1, 3, 48, 32)


def test_encode_gives_the_posteriors_mean():
    parts = release_parts(keep=True)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = image_to_text.encode(parts, images, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(latents, parts.vae.encode(images))
        assert not torch.equal(latents, parts.vae.encode(images, torch.Generator().manual_seed(7)))


def test_a_tokenizer_larger_than_t5s_table_is_refused():
    """SD3's weights have no text head to compare with, and T5's table would be indexed too far."""
    with pytest.raises(UserError, match="120 .*50258 .*--tokenizer"):
        Parts(SD3_FILE, t5=RELEASE, tokenizer="gpt2", height=32, width=32, length=16)
    flags = ["latents", RELEASE, "out", "--vae", SD3_FILE, "--t5", RELEASE, "--tokenizer", "gpt2"]
    with pytest.raises(UserError, match="120 .*50258 "):
        data.main(list(map(str, flags)))


@pytest.mark.parametrize("change, message", [(dict(vocab_size=90), "110 tokens.* 90"),
                                             (dict(position_size=1), "--height 32.* up to 4")])
def test_parts_that_do_not_fit_are_refused_before_loading(change, message, monkeypatch):
    family, sizes = checkpoint.read_sizes(RELEASE)
    for name, value in change.items():
        setattr(sizes, name, value)
    monkeypatch.setattr(checkpoint, "read_sizes", lambda path: (family, sizes))
    with pytest.raises(UserError, match=message):
        release_parts()
