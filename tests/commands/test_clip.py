"""metrics/clip.py: towers and tokenizer against transformers' (tests/compare_clip.py made the fixture), the
score against float64."""

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
    """A checkpoint's folder, with the fixture's config.json, where each tower's section has `config` too."""
    path.mkdir()
    known = json.loads((FIXTURE / "config.json").read_text())
    for section in ("text_config", "vision_config"):
        known[section] |= config
    (path / "config.json").write_text(json.dumps(known))
    save_file(tensors, path / "model.safetensors")
    return path


@torch.no_grad()
def difference(model, expected, suffix=""):
    """The largest, of both towers' features."""
    text, image = model.text(expected["ids"]), model.image(expected["pixels"])
    return max(float((text - expected["text" + suffix]).abs().max()),
               float((image - expected["image" + suffix]).abs().max()))


def test_both_towers_have_transformers_features(tiny, expected):
    assert difference(tiny, expected) < 1e-4                     # of values up to 4; float32 leaves 1e-6
    assert (tiny.size, len(tiny.txt.positions), len(tiny.img.positions)) == (32, 77, 17)
    assert {p.dtype for p in tiny.parameters()} == {torch.float32} and not tiny.training


def test_half_precision_is_read_into_float32(weights, expected, tmp_path):
    half = {key: tensor.half() if tensor.is_floating_point() else tensor
            for key, tensor in weights.items()}
    model = clip.load(folder_of(tmp_path / "half", half))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 1e-5 < difference(model, expected) < 0.03             # weights are off by 1/2048 at most


def test_gelu_is_read_from_the_config_and_older_files_position_ids_left_alone(weights, expected, tmp_path):
    ids = {f"{tower}_model.embeddings.position_ids": torch.arange(n)[None]
           for tower, n in (("text", 77), ("vision", 17))}
    model = clip.load(folder_of(tmp_path / "gelu", weights | ids, hidden_act="gelu"))
    assert difference(model, expected, "_gelu") < 1e-4
    assert difference(model, expected) > 0.01


@torch.no_grad()
def test_what_stands_behind_the_first_end_token_changes_nothing(tiny, bpe):
    end = bpe.token_to_id(clip.END)
    ids = torch.tensor([bpe.encode("a photo of a cat").ids])
    longer = torch.cat([ids, torch.tensor([[5, 7, end, 9, end]])], 1)
    assert torch.allclose(tiny.text(ids), tiny.text(longer), atol=1e-6)
    changed = longer.clone()
    changed[0, 2] += 1                                           # before it, everything counts
    assert float((tiny.text(changed) - tiny.text(longer)).abs().max()) > 0.01


def test_fifty_odd_texts_have_transformers_ids():
    known, bpe = json.loads((FIXTURE / "ids.json").read_text()), clip.load_tokenizer(FIXTURE)
    bpe.no_padding()
    assert len(known) == 50 and bpe.get_vocab_size() == 2 * 256 + 600 + 2
    for text, ids in known:
        assert bpe.encode(text).ids == ids, ascii(text)


def test_a_text_of_over_77_tokens_keeps_its_end_and_shorter_ones_are_filled_up(bpe):
    start, end = bpe.token_to_id(clip.START), bpe.token_to_id(clip.END)
    long, short = (found.ids for found in bpe.encode_batch(["7 " * 100, "a cat"]))
    seven = bpe.encode("7").ids[1]
    assert long == [start] + 75 * [seven] + [end]
    first = bpe.encode("a cat").ids
    assert first[0] == start and first[-1] == end and short == first + (77 - len(first)) * [end]


def test_a_picture_is_prepared_as_by_resizing_all_of_it_and_cutting_out_the_middle():
    draw = np.random.default_rng(0)
    for width, height in ((32, 32), (75, 50), (33, 100), (65, 64), (20, 31)):
        picture = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        short = min(width, height)
        whole = picture.resize((int(32 * width / short), int(32 * height / short)), Image.Resampling.BICUBIC)
        left, top = round((whole.width - 32) / 2), round((whole.height - 32) / 2)
        cut = np.asarray(whole.crop((left, top, left + 32, top + 32)), np.float64).transpose(2, 0, 1) / 255
        mean = np.array([0.48145466, 0.4578275, 0.40821073])
        std = np.array([0.26862954, 0.26130258, 0.27577711])
        known = (cut - mean[:, None, None]) / std[:, None, None]
        found = clip.prepare(picture, 32).numpy()
        assert found.shape == (3, 32, 32) and np.abs(found - known).max() < 1.01 / 255 / 0.26    # a level
        assert np.abs(found - known).mean() < 1e-5               # and that of few pixels
    assert clip.prepare(Image.new("RGB", (100_000, 1)), 224).shape == (3, 224, 224)


def test_a_hand_made_picture_is_cut_in_the_middle_and_normalised():
    """Red, then white, then blue, 4 x 4 each: only the white is left, and its numbers are known."""
    picture = Image.new("RGB", (12, 4), "white")
    picture.paste((255, 0, 0), (0, 0, 4, 4))
    picture.paste((0, 0, 255), (8, 0, 12, 4))
    x = clip.prepare(picture, 4)
    white = [(1 - mean) / std for mean, std in zip(clip.MEAN, clip.STD)]
    assert torch.allclose(x, torch.tensor(white).view(3, 1, 1).expand(3, 4, 4), atol=1e-6)


def drawn(folder):
    """Five pictures of noise: captions in a text field, a file, and nowhere; the last is cut off."""
    draw = np.random.default_rng(1)
    for n, name in enumerate(["a.png", "b.png", "c.webp", "d.jpg", "e.png"]):
        picture = Image.fromarray(draw.integers(0, 256, (40, 32 + n, 3), dtype=np.uint8))
        if name in ("a.png", "e.png"):
            write_png(folder / name, picture, {"prompt": f"a photo of {name}"})
        else:
            picture.save(folder / name)
    (folder / "a.txt").write_text("a text field counts first\n")
    (folder / "b.txt").write_text(" the first line \nand another\n")
    (folder / "c.txt").write_text("two cats")
    (folder / "e.png").write_bytes((folder / "e.png").read_bytes()[:-300])
    return folder


def test_captions_come_from_the_text_field_and_the_file_beside(tmp_path):
    found = {name: caption for name, _, caption in clip.read_pairs(drawn(tmp_path))}
    assert found == {"a.png": "a photo of a.png", "b.png": "the first line", "c.webp": "two cats",
                     "d.jpg": None, "e.png": None}
    (tmp_path / "none").mkdir()
    for folder, message in ((tmp_path / "none", "no pictures in it"),
                            (tmp_path / "no", "expected a folder of pictures")):
        with pytest.raises(UserError, match=message):
            clip.read_pairs(folder)


@torch.no_grad()
def test_the_score_is_the_mean_of_float64_cosines_with_its_standard_error(tiny, bpe, tmp_path):
    pairs, known = clip.read_pairs(drawn(tmp_path)), []
    for n, word in enumerate(["cat", "dog", "the", "", " \n", None]):
        file = tmp_path / f"plain {n}.png"
        Image.new("RGB", (50, 40 + n), (40 * n, 200, 10 * n)).save(file)
        pairs.append((file.name, file, word))
    cosines, bad = clip.score(pairs, tiny, bpe, "cpu", batch=4)
    for name, file, word in pairs:
        if name in ("d.jpg", "e.png") or not (word or "").strip():
            continue
        a = tiny.image(clip.prepare(Image.open(file).convert("RGB"), 32)[None])[0].double().numpy()
        b = tiny.text(torch.tensor([bpe.encode(word).ids]))[0].double().numpy()
        known.append(100 * (a @ b) / math.sqrt((a @ a) * (b @ b)))
    values = np.array(known)
    assert len(cosines) == len(values) == 6
    assert np.allclose(cosines, values, atol=1e-3) and values.min() < 0
    scores = clip.summarize(cosines)
    assert scores["CLIP"] == pytest.approx(values.mean(), abs=1e-3)
    assert scores["its standard error"] == pytest.approx(
        math.sqrt(((values - values.mean()) ** 2).sum() / 5 / 6), abs=1e-3)
    assert len(bad) == 5 and bad[0] == "d.jpg: has no caption"
    assert bad[1].startswith(f"{tmp_path / 'e.png'}: not a picture that can be read")
    assert [line.split(":")[0] for line in bad[2:]] == ["plain 3.png", "plain 4.png", "plain 5.png"]


def test_one_pair_has_no_error_and_none_is_refused(tiny, bpe, tmp_path):
    pairs = clip.read_pairs(drawn(tmp_path))
    cosines, bad = clip.score(pairs[:1], tiny, bpe, "cpu")
    assert clip.summarize(cosines) == {"CLIP": cosines[0]} and not bad
    with pytest.raises(UserError, match="^none of 2 pairs can be scored; d.jpg: has no caption$"):
        clip.score(pairs[3:], tiny, bpe, "cpu")


@pytest.mark.parametrize("change, message", [
    (lambda t, key: t.pop(key), "{key} is missing"),
    (lambda t, key: t.update(extra=torch.ones(2)), "extra is not a part of this model"),
    (lambda t, key: t.update({key: t[key][1:]}), r"{key} is \(.*\), this model's sizes ask for \(.*\)"),
    (lambda t, key: t[key].view(-1)[3:4].fill_(math.nan), "{key} holds NaN or infinity"),
    (lambda t, key: t.update({key: t[key].int()}), "{key} has numbers of type I32, expected floats")])
def test_broken_tensors_are_named_in_one_line(change, message, weights, tmp_path):
    tensors = {key: tensor.clone() for key, tensor in weights.items()}
    key = "vision_model.encoder.layers.1.self_attn.out_proj.weight"
    change(tensors, key)
    folder = folder_of(tmp_path / "broken", tensors)
    message = f"^{folder}/model.safetensors: {message.format(key=re.escape(key))}$"
    with pytest.raises(UserError, match=message):
        clip.load(folder)


def test_several_broken_tensors_are_in_the_same_line(weights, tmp_path):
    tensors = weights | dict(extra=torch.ones(2))
    del tensors["text_model.final_layer_norm.bias"]
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"].T.contiguous()
    with pytest.raises(UserError) as error:
        clip.load(folder_of(tmp_path / "broken", tensors))
    assert "\n" not in str(error.value)
    for part in ("extra is not a part", "text_model.final_layer_norm.bias is missing",
                 "visual_projection.weight is (32, 16)"):
        assert part in str(error.value)


@pytest.mark.parametrize("part, value, message", [
    ("num_attention_heads", 5, "a width of 24 does not divide by 5 heads"),
    ("num_attention_heads", "3", "'3', expected a whole number"),
    ("hidden_act", "relu", "'relu', expected 'quick_gelu' or 'gelu'"),
    ("layer_norm_eps", 0, "0, expected a number above 0")])
def test_a_config_that_is_not_of_these_weights_is_refused(part, value, message, weights, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        clip.load(folder_of(tmp_path / "odd", weights, **{part: value}))
    assert "\n" not in str(error.value)


def test_files_that_are_no_clip_are_told_in_one_line(weights, tmp_path):
    folder = folder_of(tmp_path / "cut", weights)
    whole = folder / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-100])
    openai = folder_of(tmp_path / "openai", {"visual.conv1.weight": torch.ones(1)})
    section, bare = folder_of(tmp_path / "section", weights), folder_of(tmp_path / "bare", weights)
    (section / "config.json").write_text('{"text_config": "large"}')
    (bare / "config.json").unlink()
    (tmp_path / "empty").mkdir()
    for path, message in ((folder, "not a whole safetensors file"), (bare, "config.json: no such file"),
                          (openai, "text_model.embeddings.token_embedding.weight is missing"),
                          (RELEASE / "transformer", "text_model.embeddings.token_embedding.weight is missing"),
                          (tmp_path / "empty", "expected .safetensors files, found nothing"),
                          (section, "config.json: text_config is large, expected an object")):
        with pytest.raises(UserError, match=message) as error:
            clip.load(path)
        assert "\n" not in str(error.value)


def test_vocabularies_that_are_none_are_told_in_one_line(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text('{"model": 1}')
    for path, message in ((tmp_path, "tokenizer.json: not a vocabulary that can be read .No such file"),
                          (tmp_path / "broken", "not a vocabulary that can be read"),
                          (RELEASE / "tokenizer", "puts no <.startoftext.> and ")):
        with pytest.raises(UserError, match=message) as error:
            clip.load_tokenizer(path)
        assert "\n" not in str(error.value)
