"""dataset/precompute.py: latents and tokens that are computed once, and training on them."""

import gzip
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
from dataset.images import to_image
from helpers import Forked, equal_runs, rows, to_the_end
from inference.parts import Parts
from model import MMDiT, MMDiTConfig, TokenEmbedding
from pretrained.tokenizer import gpt2_subset, gpt2_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
RELEASE, VAE = FIXTURES / "release", FIXTURES / "sd3.safetensors"
SENTENCE = "A red fox runs through the snow.\n"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Write twelve noise images with two captions each."""
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        image = torch.rand(3, 40 + i, 50, generator=generator) * 2 - 1
        to_image(image).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a picture of noise, {i}\nnoise {i}\n")
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    """Store five samples per shard instead of 512: the photos fill three shards."""
    monkeypatch.setattr(precompute, "SHARD", 5)


def encode(photos, out, *flags, pixels=16, vae=VAE):
    data.main(list(map(str, ["latents", photos, out, "--vae", vae, "--pixels", pixels, *flags])))
    return out


def settings(init, *flags):
    return ["--init", init, "--image-batch", 4, "--text-batch", 4, "--log-every", 1,
            "--device", "cpu", *flags]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------ latents

def test_stored_latents_are_those_of_the_images(photos, tmp_path, small_shards):
    out = encode(photos, tmp_path / "out", "--dtype", "float32", "--batch", 2)
    stored = data.open_source(str(out), 16)
    mix, vae = data.Mix([str(photos)], 16), checkpoint.load_vae(VAE)
    assert len(stored) == len(mix) == 12
    assert len(stored.files) == 3
    again = checkpoint.load_vae(VAE)
    assert stored.stamp["vae"] == checkpoint.digest(vae) == checkpoint.digest(again)
    for i in (0, 4, 5, 11):
        sample = mix.prepare(mix.sources[0][i])
        with torch.inference_mode():
            latents = vae.encode(sources.latents_of([sample]))[0]
        assert latents.shape == (16, 8, 8)
        assert torch.allclose(stored[i]["latents"], latents, atol=1e-6)  # float32, batches differ
        assert stored[i]["key"] == sample["key"]
        assert stored[i]["captions"] == sample["captions"]


def test_stored_states_are_those_of_t5(photos, tmp_path):
    flags = ["--t5", RELEASE, "--text-length", 9, "--dtype", "float32"]
    stored = data.open_source(str(encode(photos, tmp_path / "out", *flags)), 16)
    t5, tokenizer = checkpoint.load_t5(RELEASE, torch.bfloat16), checkpoint.load_tokenizer(RELEASE)
    for sample in (stored[3], stored[7]):
        assert sample["stated"] in sample["captions"]
        with torch.inference_mode():
            states = t5(tokenizer.encode(sample["stated"], 9)[None])[0].float()
        difference = (states - sample["states"]).abs().max()
        assert difference < 0.02 * states.abs().max()                    # bfloat16, in a batch
    assert {stored[i]["stated"][:5] for i in range(12)} == {"a pic", "noise"}


def test_parts_make_the_same_shards_as_one_command(photos, tmp_path, small_shards):
    whole = encode(photos, tmp_path / "whole")
    parts = encode(photos, tmp_path / "parts", "--part", "0/2")
    with pytest.raises(UserError, match="parts: 2 of 3 "):
        data.open_source(str(parts), 16)
    encode(photos, parts, "--part", "1/2", "--workers", 1)
    assert contents(parts) == contents(whole)


def test_a_stopped_command_goes_on_with_the_missing_shard(photos, tmp_path, small_shards, capsys):
    out = encode(photos, tmp_path / "out")
    before = contents(out)
    (out / "latents-00001.safetensors").unlink()
    capsys.readouterr()
    encode(photos, out)
    assert contents(out) == before
    assert "1 of 3 shards written, 5 samples" in capsys.readouterr().out
    with pytest.raises(UserError, match="latents-00000.*'16'.*'24'"):
        encode(photos, out, pixels=24)


@pytest.mark.parametrize("flags, code, names", [
    (["--pixels", 17], 1, ["--pixels 17"]),
    (["--piels", 3], 2, ["--piels", "--pixels"]),
    (["--text-length", 256], 1, ["--text-length", "--t5"]),
    (["--recaption", 1], 1, ["--recaption", "--t5"]),
    (["--tokenizer", RELEASE], 1, ["--tokenizer", "--t5"]),
])
def test_unusable_flags_are_named(flags, code, names, photos, tmp_path, run_program):
    status, error = run_program(data.main, ["latents", photos, tmp_path / "out", "--vae", VAE, *flags])
    assert status == code
    assert all(name in error for name in names)


def test_a_full_disk_leaves_whole_shards_to_go_on_from(photos, small_disk, small_shards, run_program):
    whole = encode(photos, small_disk / "whole")
    (small_disk / "a.txt").write_text(SENTENCE * 1000)
    out, filler = small_disk / "out", small_disk / "filler"
    with open(filler, "wb") as file:                             # leave room for one shard of 11 KB
        file.write(bytes(max(0, shutil.disk_usage(small_disk).free - 2**14)))
    flags = ["latents", photos, out, "--vae", VAE, "--pixels", 16]
    code, error = run_program(data.main, flags)
    assert code == 1
    assert "latents-00001.safetensors" in error
    assert contents(out).keys() == {"latents-00000.safetensors"}
    with pytest.raises(OSError) as full:                         # cli.run prints it in one line
        pack(small_disk / "t.safetensors", small_disk / "a.txt")
    assert full.value.filename == str(small_disk / "t.safetensors")
    assert sorted(path.name for path in small_disk.iterdir()) == ["a.txt", "filler", "out", "whole"]
    filler.unlink()
    assert run_program(data.main, flags) == (0, "")
    assert contents(out) == contents(whole)


def test_unreadable_images_are_left_out_and_named(photos, tmp_path, small_shards, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    images = sorted(tmp_path.glob("photos/*.png"))
    images[1].write_bytes(b"not an image")
    stored = data.open_source(str(encode(tmp_path / "photos", tmp_path / "out")), 16)
    assert len(stored) == 11
    assert stored[1]["key"] == str(images[2])
    assert str(images[1]) in capsys.readouterr().err
    for image in images:
        image.write_bytes(b"not an image")
    with pytest.raises(UserError, match="photos: all "):
        encode(tmp_path / "photos", tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())


def test_a_shard_without_a_usable_image_is_empty(photos, tmp_path, small_shards):
    folder = shutil.copytree(photos, tmp_path / "photos")
    for image in sorted(folder.glob("*.png"))[5:10]:             # the second shard
        image.write_bytes(b"not an image")
    out = encode(folder, tmp_path / "out")
    assert [len(load_file(file)["latents"]) for file in sorted(out.iterdir())] == [5, 0, 2]
    stored = data.open_source(str(out), 16)
    assert [row["key"] for row in map(stored.__getitem__, range(7))][5] == str(folder / "8.png")
    before = contents(out)
    encode(folder, out)
    assert contents(out) == before
    with pytest.raises(UserError, match="latents-00000.*filtered"):
        encode(folder, out, "--filtered")


def test_filtered_leaves_out_images_below_256_pixels(photos, tmp_path, train_stderr):
    with pytest.raises(UserError, match=f"{photos}: all "):
        encode(photos, tmp_path / "none", "--filtered")
    assert "at least 256" in train_stderr("--image-data", photos, "--vae", VAE, "--filtered")


def test_shards_of_other_settings_are_refused(photos, tmp_path, small_shards):
    out = encode(photos, tmp_path / "out")
    other = encode(photos, tmp_path / "other", "--dtype", "float32")
    shutil.copy(other / "latents-00001.safetensors", out)
    sources.mapped.cache_clear()
    with pytest.raises(UserError, match="latents-00001.*settings.*latents-00000"):
        data.open_source(str(out), 16)


def test_damaged_and_foreign_shards_are_refused(photos, tmp_path, small_shards):
    out = encode(photos, tmp_path / "out")
    file = out / "latents-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    sources.mapped.cache_clear()
    with pytest.raises(UserError, match="latents-00002.safetensors: .*whole"):
        data.open_source(str(out), 16)
    save_file({"latents": torch.zeros(1)}, tmp_path / "latents-00000.safetensors")
    with pytest.raises(UserError, match="latents-00000.safetensors: .*data.py latents"):
        data.open_source(str(tmp_path), 16)


def test_training_on_stored_pixels_equals_training_on_images(photos, tiny, tmp_path):
    stored = encode(photos, tmp_path / "stored", "--dtype", "float32", vae=tiny)
    for path, out, sample_every in ((photos, "images", 0), (stored, "latents", 2)):
        train.main(list(map(str, settings(
            tiny, "--image-data", path, "--out", tmp_path / out, "--steps", 2, "--dtype", "float32",
            "--sample-every", sample_every))))
    for one, other in zip(rows(tmp_path / "images"), rows(tmp_path / "latents"), strict=True):
        for name in ("image_loss", "text_loss", "grad_norm"):
            assert one[name] == other[name]
    assert (tmp_path / "latents" / "samples_2.png").exists()


# ------------------------------------------------------------------------------ training on latents

@pytest.fixture(scope="module")
def init(tmp_path_factory):
    """Write a checkpoint of one block that works on an autoencoder's latents."""
    keep = gpt2_subset([SENTENCE, "a picture of noise"])
    vocabulary = len(keep) + 2
    sizes = MMDiTConfig(depth=1, heads=1, width=16, text_width=8, vocab_size=vocabulary,
                        text_length=12)
    parts = nn.ModuleDict(dict(mmdit=MMDiT(sizes), embedding=TokenEmbedding(vocabulary, 12, 8)))
    folder = tmp_path_factory.mktemp("init")
    checkpoint.save(folder, dict(parts.named_parameters()), sizes, gpt2_tokenizer(keep), pixels=16,
                    latents=checkpoint.digest(checkpoint.load_vae(VAE)))
    return folder


@pytest.fixture(scope="module")
def stored(photos, tmp_path_factory):
    return encode(photos, tmp_path_factory.mktemp("latents") / "stored")


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory):
    """Write an autoencoder with other weights."""
    weights = {name: weight.float() for name, weight in load_file(VAE).items()
               if name.startswith("first_stage")}
    weights["first_stage_model.decoder.conv_in.bias"] += 1
    path = tmp_path_factory.mktemp("vae") / "other.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def tokens(init, tmp_path_factory):
    """Pack text with the tokenizer of `init`."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "a.txt").write_text(SENTENCE * 40)
    return pack(folder / "t.safetensors", folder / "a.txt", tokenizer=init)


@pytest.fixture(scope="module")
def finished_run(init, stored, tmp_path_factory):
    """Train two steps on stored latents; tests that change the folder copy it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.main(list(map(str, settings(init, "--image-data", stored, "--out", out, "--steps", 2))))
    return out


@pytest.fixture
def train_stderr(init, tmp_path, run_program):
    """Return what train.py prints on stderr with these flags: nothing if it succeeds."""
    def run_training(*flags):
        flags = settings(init, "--out", tmp_path / "run", "--steps", 2, *flags)
        return run_program(train.main, flags)[1]
    return run_training


def test_a_run_on_latents_records_their_autoencoder(finished_run):
    digest = checkpoint.digest(checkpoint.load_vae(VAE))
    assert checkpoint.read_config(finished_run)["latents"] == digest
    assert len(rows(finished_run)) == 2
    assert Parts(finished_run, vae=VAE).vae.channels == 16


def test_a_run_on_latents_draws_samples_with_its_autoencoder(init, stored, tmp_path):
    flags = settings(init, "--image-data", stored, "--vae", VAE, "--out", tmp_path / "run", "--steps", 1,
                     "--sample-every", 1)
    train.main(list(map(str, flags)))
    assert (tmp_path / "run" / "samples_1.png").exists()


def test_sampling_refuses_another_autoencoder(finished_run, other_vae):
    digest = checkpoint.read_config(finished_run)["latents"]
    with pytest.raises(UserError, match=f"other.safetensors: .*{digest}"):
        Parts(finished_run, vae=other_vae)


def test_training_refuses_latents_of_another_autoencoder(photos, other_vae, train_stderr, init,
                                                         tmp_path):
    other = encode(photos, tmp_path / "other", vae=other_vae)
    error = train_stderr("--image-data", other)
    assert "--image-data" in error
    assert checkpoint.read_config(init)["latents"] in error
    assert data.open_source(str(other), 16).stamp["vae"] in error


def test_both_losses_and_vae_need_one_autoencoder(photos, stored, other_vae, train_stderr, tmp_path):
    other = encode(photos, tmp_path / "other", vae=other_vae)
    digests = [data.open_source(str(folder), 16).stamp["vae"] for folder in (stored, other)]
    for flags in (["--text-data", other], ["--vae", other_vae]):
        error = train_stderr("--image-data", stored, *flags)
        assert all(digest in error for digest in digests)


def test_training_refuses_latents_of_another_size(photos, train_stderr, tmp_path):
    error = train_stderr("--image-data", encode(photos, tmp_path / "large", pixels=32))
    assert "--image-data" in error and "--pixels 32" in error


def test_training_a_latent_model_on_images_needs_a_vae(photos, train_stderr):
    error = train_stderr("--image-data", photos)
    assert "--image-data: 3 channels" in error and "--vae" in error


def test_images_and_latents_are_not_mixed(photos, stored):
    with pytest.raises(UserError, match=f"^{stored}: "):
        data.Mix([str(photos), str(stored)], 16)


def test_pixels_need_only_divide_by_the_factor_of_the_latents(photos, train_stderr, tmp_path):
    twelve = encode(photos, tmp_path / "twelve", pixels=12)      # a multiple of 2 pixels, not of 8
    assert data.latent_factor([str(photos), str(twelve)]) == checkpoint.load_vae(VAE).factor == 2
    assert train_stderr("--image-data", twelve, "--pixels", 12, "--steps", 1) == ""


def test_a_run_resumes_on_the_same_latents_only(photos, other_vae, finished_run, train_stderr,
                                                tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    latents = encode(photos, tmp_path / "stored")
    assert train_stderr("--image-data", latents, "--steps", 3) == ""
    shutil.rmtree(latents)
    encode(photos, latents, vae=other_vae)
    sources.mapped.cache_clear()
    assert f"--image-data {latents}" in train_stderr("--image-data", latents, "--steps", 4)


# --------------------------------------------------------------------------------------------- text

def pack(out, *files, tokenizer="gpt2"):
    data.main(list(map(str, ["pack", *files, out, "--tokenizer", tokenizer])))
    return out


def test_text_is_packed_with_the_padding_of_training(tmp_path):
    """T5's own tokenizer pads with <pad>; the trainer pads with the end token, as published."""
    folder = tmp_path / "t5"
    folder.mkdir()
    shutil.copy(RELEASE / "tokenizer" / "tokenizer.json", folder)
    (tmp_path / "a.txt").write_text("a red cat " * 20)
    out = pack(tmp_path / "t.safetensors", tmp_path / "a.txt", tokenizer=folder)
    tokenizer = checkpoint.training_tokenizer(folder)
    assert tokenizer.digest() != checkpoint.load_tokenizer(folder).digest()
    data.check_tokens(data.Mix([str(out)], 16, length=12), tokenizer, str(folder))


@pytest.mark.parametrize("piece_length", [2**16, 100, 1])
def test_a_packed_text_is_its_tokens_end_to_end(piece_length, tmp_path, monkeypatch):
    """A long text is cut only where this does not change its tokens, in any layout."""
    text = "One line.\nAnother one,\n\n\n  and a third\r\n\tend: «naïve» 数字\n" * 60
    text += "A paragraph.\n\n" * 30 + "Windows.\r\n" * 30 + "  indented\n" * 30 + "\n\x1cseparated\n" * 30 + "\n \n \n" * 9
    (tmp_path / "a.txt").write_bytes(text.encode())
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "second"}\n\n"third <|endoftext|>"\n')
    monkeypatch.setattr(precompute, "DOCUMENT", piece_length)
    pieces = list(precompute.documents(str(tmp_path / "a.txt")))
    assert len(pieces) == 1 if piece_length == 2**16 else len(pieces) > 20
    assert max(len(piece) for piece, _ in pieces) < piece_length + 120
    gpt2, expected = gpt2_tokenizer(), []
    for document in (text, "second", "third <|endoftext|>"):
        expected += [*gpt2.pieces(document), gpt2.end_id]
    out = pack(tmp_path / "t.safetensors", tmp_path / "a.txt", tmp_path / "b.jsonl.gz")
    packed = load_file(out)["tokens"]
    assert packed.tolist() == expected
    assert packed.dtype == torch.uint16
    source = data.open_source(str(out), 16, 7)
    assert len(source) == len(expected) // 7
    assert source[3]["ids"].tolist() == expected[21:28]
    with safe_open(out, "np") as file:
        assert file.metadata() == dict(tokenizer=gpt2.digest(), documents="3")


def test_a_pattern_without_a_file_is_refused(tmp_path, run_program):
    (tmp_path / "a.txt").write_text(SENTENCE)
    flags = ["pack", tmp_path / "*.txt", tmp_path / "typo*.txt", tmp_path / "t.safetensors"]
    code, error = run_program(data.main, flags)
    assert code == 1 and "typo*.txt" in error
    assert not (tmp_path / "t.safetensors").exists()


def test_a_vocabulary_over_65536_is_packed_in_uint32(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a red fox")
    large = gpt2_tokenizer()
    large.vocab_size = 70_000
    monkeypatch.setattr(checkpoint, "load_tokenizer", lambda path: large)
    packed = load_file(pack(tmp_path / "t.safetensors", tmp_path / "a.txt"))["tokens"]
    assert packed.dtype == torch.uint32
    assert packed.tolist() == [*large.pieces("a red fox"), large.end_id]


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"", "a.txt: no text"),
    ("a.txt", b"fine\n\xff\xfe", "a.txt:2: .*UTF-8"),
    ("a.jsonl", b'{"text": "x"}\n{"words": 1}', 'a.jsonl:2: "text" is null'),
    ("a.jsonl", b'{"text": null}', 'a.jsonl:1: "text" is null'),
    ("a.jsonl", b'[1]', r'a.jsonl:1: "text" is \[1\]'),
    ("a.jsonl", b'"\\ud800"', r'a.jsonl:1: "text" is .*\\ud800'),
    ("a.jsonl", b"{", "a.jsonl:1: .*JSON"),
    ("a.jsonl", b'{"text": "\xff"}', "a.jsonl:1: .*UTF-8"),
    ("a.txt.gz", b"plain", "a.txt.gz: "),
    ("a.txt.gz", gzip.compress(b"word " * 9999)[:-20], "a.txt.gz: "),
    ("a.md", b"words", "a.md: .*.jsonl"),
])
def test_unusable_text_is_refused_and_leaves_no_file(name, content, message, tmp_path, init):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        pack(tmp_path / "t.safetensors", tmp_path / name, tokenizer=init)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_plain_text_trains_the_null_image(stored, tokens, train_stderr, init, tmp_path):
    flags = ["--image-data", stored, "--text-data", tokens, "--lr", 1e-3, "--warmup", 0]
    assert train_stderr(*flags) == ""
    before, after = (load_file(folder / "model.safetensors")["mmdit.null_image"].float()
                     for folder in (init, tmp_path / "run"))
    assert not torch.allclose(before, after, atol=1e-4)          # two steps of 1e-3


def test_plain_text_is_refused_as_images(stored, tokens, train_stderr):
    assert "--image-data" in train_stderr("--image-data", tokens)
    assert f"{stored}: " in train_stderr("--image-data", stored, "--text-data", tokens, stored)


def test_text_that_is_not_packed_is_refused(train_stderr, init, tmp_path):
    (tmp_path / "a.txt").write_text(SENTENCE)
    error = train_stderr("--image-data", tmp_path / "a.txt")
    assert str(tmp_path / "a.txt") in error and "data.py pack" in error
    error = train_stderr("--image-data", init / "model.safetensors")
    assert f"{init / 'model.safetensors'}: " in error and "data.py pack" in error


def test_tokens_of_another_tokenizer_are_refused(stored, train_stderr, init, tmp_path):
    (tmp_path / "a.txt").write_text(SENTENCE * 40)
    other = pack(tmp_path / "other.safetensors", tmp_path / "a.txt", tokenizer=RELEASE)
    error = train_stderr("--image-data", stored, "--text-data", other)
    assert f"{other}: " in error and f"--tokenizer {init}" in error


def test_tokens_shorter_than_one_text_are_refused(stored, train_stderr, init, tmp_path):
    (tmp_path / "a.txt").write_text("A red fox")
    short = pack(tmp_path / "short.safetensors", tmp_path / "a.txt", tokenizer=init)
    error = train_stderr("--image-data", stored, "--text-data", short)
    assert f"{short}: 4 tokens" in error and "12" in error


def test_two_processes_train_on_latents_and_text_as_one(stored, tokens, init, tmp_path):
    flags = settings(init, "--image-data", stored, "--text-data", tokens, "--steps", 3,
                     "--dtype", "float32", "--optimizer", "adamw", "--lr", 2e-4)
    train.main(list(map(str, [*flags, "--out", tmp_path / "1"])))
    to_the_end(Forked(2, *flags, "--workers", 1, "--out", tmp_path / "2"))
    equal_runs(tmp_path / "1", tmp_path / "2")


def test_a_page_shows_latents(stored, init, tmp_path):
    data.main(["show", str(stored), "--out", str(tmp_path / "page.png"), "--pixels", "16",
               "--tokenizer", str(init)])
    page = Image.open(tmp_path / "page.png")
    assert page.size == (1000, 6 * 104)                                  # two columns of six rows
    expected = to_image(data.open_source(str(stored), 16)[0]["latents"][:3]).resize((96, 96))
    tiles = [page.crop((500 * i + 4, 104 * j + 4, 500 * i + 100, 104 * j + 100))
             for i in range(2) for j in range(6)]
    assert expected.tobytes() in {tile.tobytes() for tile in tiles}


def test_a_page_shows_texts_and_counts_them(tokens, init, tmp_path, capsys):
    data.main(["show", str(tokens), "--out", str(tmp_path / "page.png"), "--text-length", "30",
               "--tokenizer", str(init)])
    output = capsys.readouterr().out
    assert f"{tokens}: Tokens, 12 samples, 100.0%" in output
    assert "12 samples, 0 " in output
    page = Image.open(tmp_path / "page.png")
    assert page.size == (1000, 6 * 104)
    assert np.asarray(page).min() < 100                                  # black letters on white
