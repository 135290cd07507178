"""Compare metrics/clip.py's towers and tokenizer with transformers', and its score with float64.

experiments/compare_clip.py made the fixture."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from common.cli import UserError
from dataset.images import write_png
from metrics import clip

FIXTURE = Path(__file__).parents[1] / "fixtures" / "clip"
RELEASE = Path(__file__).parents[1] / "fixtures" / "release"


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURE / "expected.safetensors")


@pytest.fixture(scope="module")
def weights():
    return load_file(FIXTURE / "model.safetensors")


@pytest.fixture(scope="module")
def tiny():
    return clip.load(FIXTURE)


@pytest.fixture(scope="module")
def bpe():
    return clip.load_tokenizer(FIXTURE)


def folder_of(path, tensors, **config):
    """Write a checkpoint with the fixture's config.json, after changes to both of its sections."""
    path.mkdir()
    changed = json.loads((FIXTURE / "config.json").read_text())
    for section in ("text_config", "vision_config"):
        changed[section] |= config
    (path / "config.json").write_text(json.dumps(changed))
    save_file(tensors, path / "model.safetensors")
    return path


@torch.no_grad()
def difference(model, expected, suffix=""):
    """Return the largest difference between both towers' features and the expected ones."""
    text = (model.text(expected["ids"]) - expected["text" + suffix]).abs().max()
    image = (model.image(expected["pixels"]) - expected["image" + suffix]).abs().max()
    return max(float(text), float(image))


def test_both_towers_equal_transformers(tiny, expected):
    assert difference(tiny, expected) < 1e-4         # of values up to 4; float32 leaves 1e-6
    assert (tiny.size, len(tiny.txt.positions), len(tiny.img.positions)) == (32, 77, 17)
    assert {p.dtype for p in tiny.parameters()} == {torch.float32} and not tiny.training


def test_half_precision_is_read_into_float32(weights, expected, tmp_path):
    half = {key: tensor.half() if tensor.is_floating_point() else tensor
            for key, tensor in weights.items()}
    model = clip.load(folder_of(tmp_path / "half", half))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 1e-5 < difference(model, expected) < 0.03      # weights are off by 1/2048 at most


def test_the_activation_is_read_from_the_config(weights, expected, tmp_path):
    model = clip.load(folder_of(tmp_path / "gelu", weights, hidden_act="gelu"))
    assert difference(model, expected, "_gelu") < 1e-4    # of values up to 4, as above
    assert difference(model, expected) > 0.01


def test_position_ids_of_older_files_are_ignored(weights, expected, tmp_path):
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None],
           "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    model = clip.load(folder_of(tmp_path / "older", weights | ids))
    assert difference(model, expected) < 1e-4


@torch.no_grad()
def test_tokens_after_the_first_end_token_change_nothing(tiny, bpe):
    end = bpe.token_to_id(clip.END)
    ids = torch.tensor([bpe.encode("a photo of a cat").ids])
    longer = torch.cat([ids, torch.tensor([[5, 7, end, 9, end]])], 1)
    # float32 sums over different lengths
    assert torch.allclose(tiny.text(ids), tiny.text(longer), atol=1e-6)
    changed = longer.clone()
    changed[0, 2] += 1                                    # a token before it changes the result
    assert float((tiny.text(changed) - tiny.text(longer)).abs().max()) > 0.01


def test_texts_have_transformers_ids():
    expected = json.loads((FIXTURE / "ids.json").read_text())
    bpe = clip.load_tokenizer(FIXTURE)
    bpe.no_padding()
    assert len(expected) == 50 and bpe.get_vocab_size() == 2 * 256 + 600 + 2
    for text, ids in expected:
        assert bpe.encode(text).ids == ids, ascii(text)


def test_long_texts_keep_their_end_token_and_short_ones_are_padded_with_it(bpe):
    start = bpe.token_to_id(clip.START)
    end = bpe.token_to_id(clip.END)
    long, short = bpe.encode_batch(["7 " * 100, "a cat"])
    seven = bpe.encode("7").ids[1]
    assert long.ids == [start] + 75 * [seven] + [end]
    ids = bpe.encode("a cat").ids
    assert ids[0] == start and ids[-1] == end
    assert short.ids == ids + (77 - len(ids)) * [end]


def resize_then_crop(image, side):
    """Resize the whole image, and return its centre (3, side, side) in [0, 1]."""
    short = min(image.size)
    size = (int(side * image.width / short), int(side * image.height / short))
    whole = image.resize(size, Image.Resampling.BICUBIC)
    left = round((whole.width - side) / 2)
    top = round((whole.height - side) / 2)
    middle = whole.crop((left, top, left + side, top + side))
    return np.asarray(middle, np.float64).transpose(2, 0, 1) / 255


@pytest.mark.parametrize("width, height", [(32, 32), (75, 50), (33, 100), (65, 64), (20, 31)])
def test_prepare_equals_resizing_the_whole_image_and_cropping(width, height):
    draw = np.random.default_rng(width)
    image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    expected = (resize_then_crop(image, 32) - mean[:, None, None]) / std[:, None, None]
    error = np.abs(clip.prepare(image, 32).numpy() - expected)
    assert error.shape == (3, 32, 32)
    assert error.max() < 1.01 / 255 / 0.26                # one level of 255,
    assert error.mean() < 1e-5                            # in few pixels


def test_prepare_does_not_enlarge_all_of_a_long_image():
    assert clip.prepare(Image.new("RGB", (100_000, 1)), 224).shape == (3, 224, 224)


def test_prepare_keeps_the_middle_and_normalises_it():
    """Crop red, white and blue squares side by side: only the white one is left."""
    image = Image.new("RGB", (12, 4), "white")
    image.paste((255, 0, 0), (0, 0, 4, 4))
    image.paste((0, 0, 255), (8, 0, 12, 4))
    x = clip.prepare(image, 4)
    white = [(1 - mean) / std for mean, std in zip(clip.MEAN, clip.STD)]
    expected = torch.tensor(white).view(3, 1, 1).expand(3, 4, 4)
    assert torch.allclose(x, expected, atol=1e-6)         # float32


@pytest.fixture
def images(tmp_path):
    """Write images with a caption in a field, in a file, and without one; the last is cut off."""
    draw = np.random.default_rng(1)
    folder = tmp_path / "images"
    folder.mkdir()
    for n, name in enumerate(["a.png", "b.png", "c.webp", "d.jpg", "e.png"]):
        image = Image.fromarray(draw.integers(0, 256, (40, 32 + n, 3), dtype=np.uint8))
        if name in ("a.png", "e.png"):
            fields = dict(prompt=f"a photo of {name}", seed="0", checkpoint="a digest")
            write_png(folder / name, image, fields)
        elif name == "b.png":
            write_png(folder / name, image, dict(prompt="of another program"))
        else:
            image.save(folder / name)
    (folder / "a.txt").write_text("a text field counts first\n")
    (folder / "b.txt").write_text(" the first line \nand another\n")
    (folder / "c.txt").write_text("two cats")
    (folder / "e.png").write_bytes((folder / "e.png").read_bytes()[:-300])
    return folder


def test_captions_come_from_the_text_field_or_the_text_file(images):
    captions = {name: caption for name, _, caption in clip.read_pairs(images)}
    assert captions == {"a.png": "a photo of a.png", "b.png": "the first line",
                        "c.webp": "two cats", "d.jpg": None, "e.png": None}


@pytest.mark.parametrize("name, message", [("empty", "empty: .*.jpg"), ("none", "none: .*folder")])
def test_a_folder_without_images_is_refused(name, message, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        clip.read_pairs(tmp_path / name)


@torch.no_grad()
def cosine(model, bpe, file, caption):
    """Return 100 times the cosine of an image and its caption, in float64."""
    x = clip.prepare(Image.open(file).convert("RGB"), 32)
    a = model.image(x[None])[0].double().numpy()
    b = model.text(torch.tensor([bpe.encode(caption).ids]))[0].double().numpy()
    return 100 * (a @ b) / math.sqrt((a @ a) * (b @ b))


def test_the_score_equals_float64_cosines_and_names_what_is_left_out(tiny, bpe, images):
    pairs = clip.read_pairs(images)
    for n, word in enumerate(["cat", "dog", "the", "", " \n", None]):
        file = images / f"plain {n}.png"
        Image.new("RGB", (50, 40 + n), (40 * n, 200, 10 * n)).save(file)
        pairs.append((file.name, file, word))
    cosines, bad = clip.score(pairs, tiny, bpe, "cpu", batch=4)
    complete = [*pairs[:3], *pairs[5:8]]
    values = [cosine(tiny, bpe, file, caption) for _, file, caption in complete]
    assert len(cosines) == 6
    assert np.allclose(cosines, values, atol=1e-3)        # 100 times float32's error
    assert min(values) < 0
    for line, name in zip(bad, ["d.jpg", str(images / "e.png"), "plain 3.png", "plain 4.png",
                                "plain 5.png"], strict=True):
        assert line.startswith(f"{name}: ")


def test_the_summary_is_the_mean_and_its_standard_error():
    scores = clip.summarize([1.0, 2.0, 6.0])
    assert scores == pytest.approx({"CLIP": 3, "its standard error": math.sqrt(14 / 2 / 3)})


def test_a_single_pair_has_no_standard_error(tiny, bpe, images):
    cosines, bad = clip.score(clip.read_pairs(images)[:1], tiny, bpe, "cpu")
    assert clip.summarize(cosines) == {"CLIP": cosines[0]} and not bad


def test_a_score_without_any_pair_is_refused(tiny, bpe, images):
    with pytest.raises(UserError, match="2 pairs.*d.jpg"):
        clip.score(clip.read_pairs(images)[3:], tiny, bpe, "cpu")


@pytest.mark.parametrize("change, message", [
    (lambda t, key: t.pop(key), "{key} is missing"),
    (lambda t, key: t.update(extra=torch.ones(2)), "extra is not"),
    (lambda t, key: t.update({key: t[key][1:]}), r"{key} is \(.*\(.*\)"),
    (lambda t, key: t[key].view(-1)[3:4].fill_(math.nan), "{key} .*NaN"),
    (lambda t, key: t.update({key: t[key].int()}), "{key} .*I32")])
def test_a_broken_tensor_is_named_in_one_line(change, message, weights, tmp_path):
    tensors = {key: tensor.clone() for key, tensor in weights.items()}
    key = "vision_model.encoder.layers.1.self_attn.out_proj.weight"
    change(tensors, key)
    folder = folder_of(tmp_path / "broken", tensors)
    message = f"^{folder}/model.safetensors: {message.format(key=re.escape(key))}[^;\n]*$"
    with pytest.raises(UserError, match=message):
        clip.load(folder)


def test_several_broken_tensors_are_named_in_the_same_line(weights, tmp_path):
    tensors = weights | dict(extra=torch.ones(2))
    del tensors["text_model.final_layer_norm.bias"]
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"].T.contiguous()
    with pytest.raises(UserError) as error:
        clip.load(folder_of(tmp_path / "broken", tensors))
    assert "\n" not in str(error.value)
    for part in ("extra is not", "text_model.final_layer_norm.bias is missing",
                 "visual_projection.weight is (32, 16)"):
        assert part in str(error.value)


@pytest.mark.parametrize("part, value, message", [
    ("num_attention_heads", 5, "24 .*5 heads"), ("num_attention_heads", "3", "'3'.*whole"),
    ("hidden_act", "relu", "'relu'.*'quick_gelu'.*'gelu'"), ("layer_norm_eps", 0, " 0, .*above 0")])
def test_a_config_that_does_not_fit_the_weights_is_refused(part, value, message, weights, tmp_path):
    refused(folder_of(tmp_path / "odd", weights, **{part: value}), f"config.json: .*{message}")


def refused(path, message, load=clip.load):
    """Check that loading a folder fails with one line."""
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_a_cut_file_is_refused(weights, tmp_path):
    folder = folder_of(tmp_path / "cut", weights)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "model.safetensors: .*whole")


def test_weights_of_another_model_are_refused(tmp_path):
    openai = folder_of(tmp_path / "openai", {"visual.conv1.weight": torch.ones(1)})
    for path in (openai, RELEASE / "transformer"):
        refused(path, "text_model.embeddings.token_embedding.weight is missing")


@pytest.mark.parametrize("content, message", [
    (None, "config.json: no such file"),
    ('{"text_config": "large"}', "config.json: text_config .*large")])
def test_a_missing_or_malformed_config_is_refused(content, message, weights, tmp_path):
    folder = folder_of(tmp_path / "odd", weights)
    (folder / "config.json").unlink()
    if content:
        (folder / "config.json").write_text(content)
    refused(folder, message)


def test_an_empty_folder_is_refused(tmp_path):
    refused(tmp_path, f"{tmp_path}: .*.safetensors")


def test_a_file_that_is_no_clip_vocabulary_is_refused(tmp_path):
    refused(tmp_path, "tokenizer.json: .*No such file", clip.load_tokenizer)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    refused(tmp_path, "tokenizer.json: not a vocabulary", clip.load_tokenizer)
    refused(RELEASE / "tokenizer", "tokenizer.json: .*<.startoftext.>", clip.load_tokenizer)
