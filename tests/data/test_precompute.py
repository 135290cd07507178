"""dataset/precompute.py: latents and tokens that are computed once, and training from them."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
import data
import train
from common.cli import UserError
from dataset import precompute, sources
from dataset.images import to_picture
from helpers import Forked, equal_runs, to_the_end
from inference.parts import Parts
from model import MMDiT, MMDiTConfig, TokenEmbedding
from pretrained.tokenizer import gpt2_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
RELEASE, VAE = FIXTURES / "release", FIXTURES / "sd3.safetensors"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve pictures of noise, with two captions each."""
    folder, generator = tmp_path_factory.mktemp("photos"), torch.Generator().manual_seed(0)
    for i in range(12):
        picture = torch.rand(3, 40 + i, 50, generator=generator) * 2 - 1
        to_picture(picture).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a picture of noise, {i}\nnoise {i}\n")
    return folder


@pytest.fixture
def small(monkeypatch):
    """Shards of five samples instead of 512."""
    monkeypatch.setattr(precompute, "SHARD", 5)


def encode(photos, out, *flags, pixels=16, vae=VAE):
    data.main(list(map(str, ["latents", photos, out, "--vae", vae, "--pixels", pixels, *flags])))
    return out


def rows(out):
    return [{name: row[name] for name in ("image_loss", "text_loss", "grad_norm")}
            for row in map(json.loads, (out / "log.jsonl").read_text().splitlines())]


# ---------------------------------------------------------------------------------------------------- latents

def test_stored_latents_are_those_of_the_pictures_and_keep_their_texts(photos, tmp_path, small):
    stored = sources.of_path(str(encode(photos, tmp_path / "out", "--dtype", "float32", "--batch", 2)))
    mix, vae = data.Mix([str(photos)], 16), checkpoint.load_vae(VAE)
    assert len(stored) == len(mix) == 12 and len(stored.files) == 3
    assert stored.stamp["vae"] == checkpoint.digest(vae) == checkpoint.digest(checkpoint.load_vae(VAE))
    for i in (0, 4, 5, 11):
        sample = mix.cut(mix.sources[0][i])
        with torch.inference_mode():
            latents = vae.encode(sources.latents_of([sample]))[0]
        assert torch.allclose(stored[i]["latents"], latents, atol=1e-6) and latents.shape == (16, 8, 8)
        assert stored[i]["key"] == sample["key"] and stored[i]["captions"] == sample["captions"]


def test_states_of_a_clean_caption_are_those_that_t5_gives(photos, tmp_path):
    flags = ["--t5", RELEASE, "--text-length", 9, "--dtype", "float32"]
    stored = sources.of_path(str(encode(photos, tmp_path / "out", *flags)))
    t5, tokenizer = checkpoint.load_t5(RELEASE, torch.bfloat16), checkpoint.load_tokenizer(RELEASE)
    for sample in (stored[3], stored[7]):
        assert sample["stated"] in sample["captions"]
        with torch.inference_mode():
            states = t5(tokenizer.encode(sample["stated"], 9)[None])[0].float()
        assert (states - sample["states"]).abs().max() < 0.02 * states.abs().max()   # bfloat16, in a batch
    assert {sample["stated"][:5] for sample in map(stored.__getitem__, range(12))} == {"a pic", "noise"}


def test_a_stopped_command_goes_on_and_parts_make_a_whole(photos, tmp_path, small, capsys, mistake):
    whole = encode(photos, tmp_path / "whole")
    for first in (0, 1):
        if first:
            with pytest.raises(UserError, match="2 of 3 shards; the same python data.py latents makes the"):
                sources.of_path(str(tmp_path / "parts"))
        encode(photos, tmp_path / "parts", "--part", f"{first}/2", "--workers", first)
    assert [path.read_bytes() for path in sorted((tmp_path / "parts").iterdir())] == [
        path.read_bytes() for path in sorted(whole.iterdir())]
    gone = whole / "latents-00001.safetensors"
    gone.unlink()
    capsys.readouterr()
    assert gone in encode(photos, whole).iterdir()
    assert "3 shards, 5 samples encoded now, 0 left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="latents-00000.* made with other settings, .*'16'.*, not .*'24'"):
        encode(photos, whole, pixels=24)
    with pytest.raises(UserError, match="--pixels 17: expected a multiple of 2"):
        encode(photos, whole, pixels=17)
    code, said = mistake(data.main, ["latents", photos, whole, "--vae", VAE, "--piels", 3])
    assert code == 2 and said == "error: unknown argument --piels; did you mean --pixels?\n"
    for flag, value in (("--text-length", 256), ("--recaption", 1), ("--tokenizer", RELEASE)):
        code, said = mistake(data.main, ["latents", photos, whole, "--vae", VAE, flag, value])
        assert code == 1 and f"{flag} needs --t5" in said


def test_a_full_disk_leaves_whole_shards_and_the_same_command_goes_on(photos, small_disk, small, mistake):
    encode(photos, small_disk / "whole")
    (small_disk / "a.txt").write_text("A red fox runs through the snow.\n" * 1000)
    out, filler = small_disk / "out", small_disk / "filler"
    with open(filler, "wb") as file:                             # room for one shard of 11 KB
        file.write(bytes(max(0, shutil.disk_usage(small_disk).free - 2**14)))
    flags = ["latents", photos, out, "--vae", VAE, "--pixels", 16]
    code, said = mistake(data.main, flags)
    assert code == 1 and "latents-00001.safetensors: can't be written (" in said
    assert [path.name for path in out.iterdir()] == ["latents-00000.safetensors"]
    with pytest.raises(OSError) as error:                        # cli.run says so in one line
        pack(small_disk / "t.safetensors", small_disk / "a.txt")
    assert error.value.filename == str(small_disk / "t.safetensors")
    assert sorted(path.name for path in small_disk.iterdir()) == ["a.txt", "filler", "out", "whole"]
    filler.unlink()
    assert mistake(data.main, flags) == (0, "")
    assert [path.read_bytes() for path in sorted(out.iterdir())] == [
        path.read_bytes() for path in sorted((small_disk / "whole").iterdir())]


def test_pictures_of_no_use_are_left_out_and_named(photos, tmp_path, small, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    names = sorted(tmp_path.glob("photos/*.png"))
    names[1].write_bytes(b"no picture")
    stored = sources.of_path(str(encode(tmp_path / "photos", tmp_path / "out")))
    assert len(stored) == 11 and stored[1]["key"] == str(names[2])
    assert f"left out: {names[1]}: not a picture" in capsys.readouterr().err
    for name in names:
        name.write_bytes(b"no picture")
    with pytest.raises(UserError, match="latents-00000.safetensors: all of its samples are of no use"):
        encode(tmp_path / "photos", tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())


def test_shards_that_do_not_belong_together_or_are_damaged_are_refused(photos, tmp_path, small):
    out = encode(photos, tmp_path / "out")
    other = encode(photos, tmp_path / "other", "--dtype", "float32")
    shutil.copy(other / "latents-00001.safetensors", out)
    sources.mapped.cache_clear()
    with pytest.raises(UserError, match="00001.safetensors: made with other settings than .*latents-00000"):
        sources.of_path(str(out))
    file = other / "latents-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    sources.mapped.cache_clear()
    with pytest.raises(UserError, match="00002.safetensors: not a whole safetensors file"):
        sources.of_path(str(other))
    save_file({"latents": torch.zeros(1)}, tmp_path / "latents-00000.safetensors")
    with pytest.raises(UserError, match="not what python data.py latents writes"):
        sources.of_path(str(tmp_path))


def test_training_from_stored_pixels_is_training_from_the_pictures(photos, tiny, tmp_path):
    stored = encode(photos, tmp_path / "stored", "--dtype", "float32", vae=tiny)
    go = lambda path, out: train.main(list(map(str, [
        "--init", tiny, "--image-data", path, "--out", tmp_path / out, "--steps", 3, "--image-batch", 4,
        "--text-batch", 4, "--dtype", "float32", "--log-every", 1, "--sample-every", 3, "--device", "cpu"])))
    go(photos, "pictures")
    go(stored, "latents")
    assert rows(tmp_path / "pictures") == rows(tmp_path / "latents")
    assert (tmp_path / "latents" / "samples_3.png").exists()


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """An end-to-end checkpoint of one block on an autoencoder's latents, with all of GPT-2's tokens."""
    sizes = MMDiTConfig(depth=1, heads=1, width=16, text_width=8, vocab_size=50258, text_length=12)
    parts = nn.ModuleDict(dict(mmdit=MMDiT(sizes), embedding=TokenEmbedding(50258, 12, 8)))
    folder = tmp_path_factory.mktemp("wide")
    checkpoint.save(folder, dict(parts.named_parameters()), sizes, gpt2_tokenizer(), pixels=16,
                    latents=checkpoint.digest(checkpoint.load_vae(VAE)))
    return folder


@pytest.fixture
def go(wide, tmp_path, mistake):
    """Train from `wide` with these flags; returns a mistake of the person's."""
    return lambda *flags: mistake(train.main, [
        "--init", wide, "--out", tmp_path / "run", "--steps", 2, "--image-batch", 4, "--text-batch", 4,
        "--log-every", 1, "--device", "cpu", *flags])[1]


def test_a_run_on_latents_says_whose_they_are_and_refuses_those_of_others(photos, go, tmp_path, capsys):
    stored = encode(photos, tmp_path / "stored")
    assert go("--image-data", stored) == ""
    config, run = checkpoint.read_config(tmp_path / "run"), tmp_path / "run"
    assert config["latents"] == checkpoint.digest(checkpoint.load_vae(VAE)) and len(rows(run)) == 2
    assert Parts(run, vae=VAE).vae.channels == 16
    twelve = encode(photos, tmp_path / "twelve", pixels=12)      # a multiple of 2 pixels a latent, not of 8
    assert data.latent_factor([str(photos), str(twelve)]) == checkpoint.load_vae(VAE).factor == 2
    assert go("--image-data", twelve, "--pixels", 12, "--steps", 1, "--out", tmp_path / "small") == ""
    changed = {name: x.float() for name, x in load_file(VAE).items() if name.startswith("first_stage")}
    changed["first_stage_model.decoder.conv_in.bias"] += 1
    save_file(changed, tmp_path / "changed.safetensors")
    with pytest.raises(UserError, match="changed.safetensors: is the autoencoder .*, this transformer "):
        Parts(run, vae=tmp_path / "changed.safetensors")
    again = lambda path: go("--image-data", path, "--out", tmp_path / "next")
    said = again(encode(photos, tmp_path / "other", vae=tmp_path / "changed.safetensors"))
    assert f"the model has learnt those of {config['latents']}" in said
    assert "latents of pictures of 32 pixels, this run's have 16; give --pixels 32" in again(
        encode(photos, tmp_path / "large", pixels=32))
    assert "3 channels, this model's latents have 16: expected an autoencoder, --vae, or its" in again(photos)
    with pytest.raises(UserError, match="one batch can't have both"):
        data.Mix([str(photos), str(stored)], 16)
    assert go("--image-data", stored, "--steps", 3) == ""
    shutil.rmtree(stored)
    shutil.copytree(tmp_path / "other", stored)
    assert "with other contents" in go("--image-data", stored, "--steps", 4)


# ------------------------------------------------------------------------------------------------------- text

def pack(out, *files, tokenizer="gpt2"):
    data.main(list(map(str, ["pack", *files, out, "--tokenizer", tokenizer])))
    return out


def test_a_packed_text_is_its_tokens_end_to_end(tmp_path, monkeypatch):
    """A long text is cut up for the tokenizer where its tokens are the same: never in a run of spaces."""
    text = "One line.\nAnother one,\n\n\n  and a third\r\n\tend: «naïve» 数字\n" * 60
    (tmp_path / "a.txt").write_bytes(text.encode())
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "second"}\n\n"third <|endoftext|>"\n')
    gpt2, made = gpt2_tokenizer(), []
    for size in (2**16, 100, 1):
        monkeypatch.setattr(precompute, "DOCUMENT", size)
        assert size == 2**16 or len(list(precompute.documents(str(tmp_path / "a.txt"), lambda at: None))) > 20
        out = pack(tmp_path / "t.safetensors", tmp_path / "a.txt", tmp_path / "b.jsonl.gz")
        made.append(load_file(out)["tokens"])
    expected = [i for document in (text, "second", "third <|endoftext|>")
                for i in [*gpt2.pieces(document), gpt2.end_id]]
    assert all(tokens.tolist() == expected for tokens in made) and made[0].dtype == torch.uint16
    sources.mapped.cache_clear()
    source = sources.of_path(str(out), 7)
    assert len(source) == len(expected) // 7 and source[3]["ids"].tolist() == expected[21:28]
    with safe_open(out, "np") as file:
        assert file.metadata() == dict(tokenizer=gpt2.digest(), documents="3")


def test_a_vocabulary_over_65536_is_packed_in_uint32(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a red fox")
    large = gpt2_tokenizer()
    large.vocab_size = 70_000
    monkeypatch.setattr(checkpoint, "load_tokenizer", lambda path: large)
    tokens = load_file(pack(tmp_path / "t.safetensors", tmp_path / "a.txt"))["tokens"]
    assert tokens.dtype == torch.uint32 and tokens.tolist() == [*large.pieces("a red fox"), large.end_id]


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"", "no text in it"),
    ("a.txt", b"fine\n\xff\xfe", "a.txt:2: not UTF-8 text"),
    ("a.jsonl", b'{"text": "x"}\n{"words": 1}', "a.jsonl:2: \"text\" is null, expected a text"),
    ("a.jsonl", b'{"text": null}', "a.jsonl:1: \"text\" is null, expected a text"),
    ("a.jsonl", b'[1]', r"a.jsonl:1: \"text\" is \[1\], expected a text"),
    ("a.jsonl", b'"\\ud800"', r"a.jsonl:1: \"text\" is '\\ud800', expected a text"),
    ("a.jsonl", b"{", "a.jsonl:1: not readable as JSON"),
    ("a.jsonl", b'{"text": "\xff"}', "a.jsonl:1: not readable as JSON .*utf-8"),
    ("a.txt.gz", b"plain", "a.txt.gz: can't be read"),
    ("a.txt.gz", gzip.compress(b"word " * 9999)[:-20], "a.txt.gz: can't be read"),
    ("a.md", b"words", "a.md: expected .txt, .jsonl"),
])
def test_text_that_cannot_be_packed_gets_one_line_and_leaves_nothing(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        pack(tmp_path / "t.safetensors", tmp_path / name)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == [name]


def test_plain_text_is_learnt_without_a_picture_and_teaches_the_null_image(photos, go, wide, tmp_path):
    (tmp_path / "a.txt").write_text("A red fox runs through the snow.\n" * 40)
    text = pack(tmp_path / "t.safetensors", tmp_path / "a.txt")
    stored = encode(photos, tmp_path / "stored")
    assert go("--image-data", stored, "--text-data", text, "--lr", 1e-3, "--warmup", 0) == ""
    before, after = (load_file(folder / "model.safetensors")["mmdit.null_image"].float() for folder in (
        wide, tmp_path / "run"))
    assert not torch.allclose(before, after, atol=1e-4)
    again = lambda *flags: go("--out", tmp_path / "next", *flags)
    assert "--image-data is plain text, which has no pictures" in again("--image-data", text)
    assert "plain text is made tokens first: python data.py pack" in again("--image-data", tmp_path / "a.txt")
    assert "one batch can't have both" in again("--image-data", stored, "--text-data", text, stored)
    other = pack(tmp_path / "o.safetensors", tmp_path / "a.txt", tokenizer=FIXTURES / "release")
    said = again("--image-data", stored, "--text-data", other)
    assert f"o.safetensors: tokens of another tokenizer than that of {wide}; pack its text again" in said
    short = tmp_path / "s.txt"
    short.write_text("A red fox")
    assert "4 tokens, one text takes 12" in again(
        "--image-data", stored, "--text-data", pack(tmp_path / "s.safetensors", short))
    assert "not what python data.py pack writes" in again("--image-data", wide / "model.safetensors")


def test_two_processes_learn_from_latents_and_plain_text_as_one_does(photos, wide, tmp_path):
    (tmp_path / "a.txt").write_text("A red fox runs through the snow.\n" * 40)
    flags = ["--init", wide, "--image-data", encode(photos, tmp_path / "stored"), "--text-data",
             pack(tmp_path / "t.safetensors", tmp_path / "a.txt"), "--steps", 6, "--image-batch", 4,
             "--text-batch", 4, "--log-every", 1, "--dtype", "float32", "--optimizer", "adamw", "--lr", 2e-4,
             "--device", "cpu", "--workers", 1]
    train.main(list(map(str, [*flags, "--out", tmp_path / "1"])))
    to_the_end(Forked(2, *flags, "--out", tmp_path / "2"))
    equal_runs(tmp_path / "1", tmp_path / "2")


def test_the_page_shows_latents_and_texts(photos, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("A red fox runs through the snow.\n" * 40)
    text = pack(tmp_path / "t.safetensors", tmp_path / "a.txt")
    for path, flags in ((encode(photos, tmp_path / "stored"), ["--pixels", "16"]),
                        (text, ["--text-length", "30"])):
        data.main(["show", str(path), "--out", str(tmp_path / "page.png"), *flags])
        assert Image.open(tmp_path / "page.png").size == (1000, 6 * 104)
        said = capsys.readouterr().out
    assert f"{text}: Tokens, 12 samples, 100.0% of the mix" in said and "12 samples, 0 of no use" in said
    assert np.asarray(Image.open(tmp_path / "page.png")).min() < 100
