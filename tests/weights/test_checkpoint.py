"""Compare checkpoint.py, pretrained/vae.py and pretrained/t5.py with published implementations.

experiments/make_fixtures.py wrote those outputs and tiny weights into tests/fixtures.  The second
half tests that the error for a wrong file names it.
"""

import json
import re
import runpy
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
import flow
import sample
from checkpoint import load_mask_embedding, load_mmdit, load_t5, load_tokenizer, load_vae
from common.cli import UserError
from helpers import ROOT
from inference.parts import EMOJI, Parts
from pretrained.t5 import T5Config, T5Encoder, buckets
from pretrained.tokenizer import gpt2_tokenizer
from pretrained.vae import Pixels

FIXTURES = ROOT / "tests" / "fixtures"
RELEASE = FIXTURES / "release"
SD3_FILE, SD3_FOLDER = FIXTURES / "sd3.safetensors", FIXTURES / "sd3_folder"


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURES / "expected.safetensors")


@pytest.fixture(scope="module")
def release():
    return load_mmdit(RELEASE)


def load_folder(folder):
    """Return all tensors of a folder's safetensors files."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_equal_states(a, b):
    """Check that two models have the same state, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def close(ours, theirs, atol=1e-4):
    """Return True if a published output is equal up to float32 sums in another order."""
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=atol, rtol=0)


# --------------------------------------------------------------------------------- the same outputs

@torch.inference_mode()
def test_release_computes_what_its_published_class_does(release, expected):
    latents, text, t = (expected[f"ddit.{name}"] for name in ("latents", "context", "t"))
    velocity, logits = release(latents, text, t)
    assert close(velocity, expected["ddit.velocity"]) and close(logits, expected["ddit.logits"])
    assert close(release(latents, text, torch.zeros(1))[1], expected["ddit.logits_t0"])
    assert close(release(None, text, torch.zeros(1))[1], expected["ddit.logits_text_only"])


@torch.inference_mode()
def test_release_samples_what_its_published_pipeline_does(release, expected):
    text_and_null = torch.cat([expected["ddit.context"], expected["t2i.negative_context"]])
    velocity = flow.guide(lambda x, t: release(x, text_and_null, t, need="velocity")[0], 5.0)
    latents = flow.euler(velocity, expected["t2i.noise"], flow.sigmas(6, 3.0))
    assert close(latents, expected["t2i.latents_6steps_cfg5_shift3"])
    for steps in (4, 28):
        sigmas = expected[f"euler.sigmas_{steps}_shift3"]
        assert close(flow.sigmas(steps, 3.0), sigmas, 1e-6)      # one rounding of float32


@pytest.mark.parametrize("path", [SD3_FILE, SD3_FOLDER])
@torch.inference_mode()
def test_sd3_computes_its_velocity_from_either_layout(path, expected):
    model = load_mmdit(path, vocab_size=110)
    velocity, logits = model(expected["sd3.latents"], expected["ddit.context"], expected["ddit.t"])
    assert close(velocity, expected["sd3.velocity"]) and logits.shape == (2, 9, 110)
    assert model.config.depth == 3 and model.config.heads == 1
    gates = model.blocks[-1].txt.modulation.weight[2 * 64:]
    assert not gates.any()  # the last text block starts as the identity


@pytest.mark.parametrize("path", [SD3_FILE, SD3_FOLDER])
@torch.inference_mode()
def test_autoencoder_encodes_and_decodes_from_either_layout(path, expected):
    vae = load_vae(path)
    mean, logvar = vae.posterior(expected["vae.image"])
    assert close(mean, expected["vae.mean"]) and close(logvar, expected["vae.logvar"])
    assert close(vae.encode(expected["vae.image"]), expected["vae.latent"])
    assert close(vae.decode(expected["vae.z"]), expected["vae.decoded"])
    batch = torch.cat([expected["vae.z"], expected["vae.z"].flip(3)])
    assert close(vae.decode(batch)[:1], expected["vae.decoded"])
    with pytest.raises(ValueError, match="25.*32"):
        vae.encode(torch.zeros(1, 3, 25, 32))


def test_a_file_is_read_with_the_config_beside_it(tmp_path):
    folder = shutil.copytree(SD3_FOLDER / "vae", tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(scaling_factor=0.25)))
    [file] = folder.glob("*.safetensors")
    vae = load_vae(file)
    assert vae.config.scale == load_vae(folder).config.scale == 0.25
    assert checkpoint.digest(vae) != checkpoint.digest(load_vae(SD3_FOLDER))
    (folder / "config.json").write_text('{"scaling_factor": 0.5}')         # names no class
    assert load_vae(file).config.scale == checkpoint.vae_sizes(folder).scale == 0.5


@torch.inference_mode()
def test_draw_from_the_posterior_has_its_mean_and_deviation(expected):
    vae, n = load_vae(SD3_FILE), 1000
    vae.posterior = lambda images: (expected["vae.mean"].expand(n, -1, -1, -1),
                                    expected["vae.logvar"].expand(n, -1, -1, -1))
    drawn = vae.encode(expected["vae.image"], torch.Generator().manual_seed(0))
    drawn = drawn / vae.config.scale + vae.config.shift
    deviation = (0.5 * expected["vae.logvar"][0]).exp()
    # 6 standard errors of n draws; the largest of 3072 errors is usually 4
    assert ((drawn.mean(0) - expected["vae.mean"][0]) / deviation).abs().max() < 6 / n ** 0.5
    assert (drawn.std(0) / deviation - 1).abs().max() < 6 / (2 * n) ** 0.5


@torch.inference_mode()
def test_t5_computes_what_transformers_does(expected):
    assert close(load_t5(RELEASE)(expected["t5.ids"]), expected["t5.hidden"])


def test_t5_takes_a_new_embedding_of_one_token():
    t5 = load_t5(RELEASE)
    t5.set_embedding(109, torch.arange(64.0))
    assert torch.equal(t5.embed.weight[109], torch.arange(64.0))


@torch.inference_mode()
def test_t5_survives_what_overflows_in_half_precision():
    torch.manual_seed(0)
    t5 = T5Encoder(T5Config(vocab_size=20, width=64, depth=2, heads=4, head=16, hidden=128))
    for block in t5.blocks:
        block.wi_1.weight *= 400                             # the MLP's product goes far over 65504
    ids = torch.arange(20)[None]
    full, half = t5(ids), t5.half()(ids)
    assert half.dtype == torch.float16 and half.isfinite().all()
    assert (half.float() - full).norm() / full.norm() < 2e-2     # float16 keeps 11 bits


TABLE, TWIN = "shared.weight", "encoder.embed_tokens.weight"


@pytest.mark.parametrize("prefix, names", [("", [TABLE]), ("", [TWIN]), ("", [TABLE, TWIN]),
                                           ("text_encoders.t5xxl.transformer.", [TABLE])])
@torch.inference_mode()
def test_float8_t5_loads_under_every_name_of_its_table(prefix, names, tmp_path, expected):
    tensors = load_file(RELEASE / "text_encoder" / "model.safetensors")
    table = tensors[TABLE] if TABLE in tensors else tensors[TWIN]
    for name in (TABLE, TWIN):
        tensors.pop(name, None)
    tensors |= {name: table.clone() for name in names}
    stored = {prefix + name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    if prefix:
        stored |= {"decoder.block.0.x": torch.zeros(1), "other": torch.zeros(1)}
    save_file(stored, tmp_path / "t5.safetensors")
    t5 = load_t5(tmp_path / "t5.safetensors", torch.bfloat16)
    assert t5.config == load_t5(RELEASE).config and t5.embed.weight.dtype == torch.bfloat16
    assert torch.equal(t5.embed.weight, table.to(torch.float8_e4m3fn).to(torch.bfloat16))
    # float8 keeps 4 bits of a number; other weights would be off by more than 1
    error = t5(expected["t5.ids"]).float() - expected["t5.hidden"]
    assert error.norm() / expected["t5.hidden"].norm() < 0.2


def test_t5_buckets_are_exact_nearby_and_logarithmic_beyond():
    b = buckets(300, 32, 128)
    assert b[0, :8].tolist() == [0] + [16 + i for i in range(1, 8)]          # keys after the query
    assert b[:9, 0].tolist() == list(range(9))                               # keys before it
    assert b[0, 299] == 31 and b[299, 0] == 15 and b[0, 127] == 31  # far keys share the last
    assert (b[0, 1:].diff() >= 0).all()


@torch.inference_mode()
def test_bfloat16_stays_close_to_float32(release, expected):
    model = load_mmdit(RELEASE, torch.bfloat16)
    latents, text, t = (expected[f"ddit.{name}"] for name in ("latents", "context", "t"))
    outputs = model(latents.bfloat16(), text.bfloat16(), t)
    for full, half in zip(release(latents, text, t), outputs):
        assert (half.float() - full).norm() / full.norm() < 2e-2             # bfloat16 keeps 8 bits


# -------------------------------------------------------------------------------------- round trips

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "out"
    checkpoint.export(RELEASE, folder)
    return folder


def test_exported_release_loads_bit_for_bit(release, exported):
    assert load_tokenizer(exported).mask_id == 109
    assert_equal_states(load_mmdit(exported), release)


def test_exported_release_has_the_original_tensors_and_sizes(exported):
    original, written = load_folder(RELEASE / "transformer"), load_folder(exported / "transformer")
    assert original.keys() == written.keys()
    assert all(torch.equal(original[name], written[name]) for name in original)
    original = json.loads((RELEASE / "transformer" / "config.json").read_text())
    written = json.loads((exported / "transformer" / "config.json").read_text())
    del written["pooled_projection_dim"]                         # SD3's, not the tiny fixture's
    for key in original.keys() & written.keys():
        assert written[key] == original[key], key
    assert len(original.keys() & written.keys()) > 8


def test_export_keeps_a_folder_that_has_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=str(tmp_path)):
        checkpoint.export(RELEASE, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def run_checkpoint(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", *map(str, flags)])
    runpy.run_path(str(ROOT / "checkpoint.py"), run_name="__main__")


@torch.inference_mode()
def test_export_command_writes_the_given_layout(release, expected, tmp_path, monkeypatch):
    run_checkpoint(monkeypatch, "export", RELEASE, tmp_path / "sd3", "--layout", "sd3")
    exported = checkpoint.find(tmp_path / "sd3", "transformer")
    assert exported.family == "SD3" and not any("null_image" in name for name in exported.tensors.dtype)
    latents, text, t = (expected[f"ddit.{name}"] for name in ("latents", "context", "t"))
    velocity, _ = load_mmdit(tmp_path / "sd3", vocab_size=110)(latents, text, t)
    assert close(velocity, expected["ddit.velocity"])


def save_run(folder, model, config, **settings):
    """Write a checkpoint in our layout with a published transformer's weights."""
    tensors = {f"mmdit.{name}": p for name, p in model.named_parameters()}
    tensors["mmdit.positions"] = model.positions
    checkpoint.save(folder, tensors, config, gpt2_tokenizer(), **settings)
    return folder


def test_run_from_published_weights_keeps_its_position_table(release, tmp_path):
    run = save_run(tmp_path / "run", release, release.config, latents="vae")
    assert torch.equal(load_mmdit(run).positions, release.positions)
    checkpoint.export(run, tmp_path / "out", tokenizer=RELEASE / "tokenizer")
    assert_equal_states(load_mmdit(tmp_path / "out"), release)


def test_export_needs_a_tokenizer_that_exists(tmp_path):
    with pytest.raises(UserError, match="typo: expected a folder with T5's"):
        checkpoint.export(RELEASE, tmp_path / "out", tokenizer=tmp_path / "typo")
    file = RELEASE / "tokenizer" / "tokenizer.json"
    with pytest.raises(UserError, match="expected a folder with T5's"):
        checkpoint.export(RELEASE, tmp_path / "out", tokenizer=file)
    with pytest.raises(UserError, match="has 4441 tokens, the model's text head"):
        checkpoint.export(RELEASE, tmp_path / "out", tokenizer=EMOJI)
    for name, path in dict(folder=file.parent, release=RELEASE).items():
        checkpoint.export(RELEASE, tmp_path / name, tokenizer=path)
        assert (tmp_path / name / "tokenizer" / "tokenizer.json").read_bytes() == file.read_bytes()


def test_data_prediction_is_saved_and_not_exported(release, tmp_path):
    run = save_run(tmp_path / "run", release, replace(release.config, predicts="data"))
    assert load_mmdit(run).config.predicts == "data"
    assert "predicts data" in checkpoint.inspect(run)
    with pytest.raises(UserError, match="predicts data"):
        checkpoint.export(run, tmp_path / "out")
    own_text = save_run(tmp_path / "own", release, replace(release.config, text_length=8))
    with pytest.raises(UserError, match="token embedding"):
        checkpoint.export(own_text, tmp_path / "out")
    config = json.loads((run / "config.json").read_text())
    config["mmdit"]["predicts"] = "noise"
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json: .*predicts.*noise"):
        load_mmdit(run)
    del config["mmdit"]["predicts"]                              # as in older files
    (run / "config.json").write_text(json.dumps(config))
    assert load_mmdit(run).config.predicts == "velocity"


def test_weights_load_in_the_given_dtype():
    for dtype in (torch.float16, torch.bfloat16):                # the stored one, and another
        assert {p.dtype for p in load_mmdit(RELEASE, dtype).parameters()} == {dtype}
    with safe_open(SD3_FILE, "pt") as file:                      # the SD3 tests read float8
        assert file.get_tensor("model.diffusion_model.pos_embed").dtype == torch.float8_e4m3fn


def test_digest_depends_on_names_values_dtypes_and_shapes():
    a, b = torch.ones(4), torch.zeros(4)

    def digest(**tensors):
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return checkpoint.digest(module)
    same = digest(x=a, y=b)
    assert same == digest(x=a.clone(), y=b) == digest(y=b, x=a)
    others = [digest(x=a, z=b), digest(y=a, x=b), digest(x=a, y=b + 1), digest(x=a, y=b.view(2, 2)),
              digest(x=a, y=b.int()), "pixels"]
    assert len({same, *others}) == 7
    assert checkpoint.digest(Pixels()) == "pixels"


def test_inspect_shows_layout_parts_and_sizes(capsys, monkeypatch):
    run_checkpoint(monkeypatch, "inspect", RELEASE)
    output = capsys.readouterr().out
    assert "D-DiT transformer: 72 tensors, 1.4 M values, F16, 2 file(s)" in output
    assert "vocab_size 110" in output and "T5 encoder: 30 tensors" in output
    output = checkpoint.inspect(SD3_FILE)
    assert "SD3 transformer" in output and "widths (32, 64)" in output and "F8_E4M3" in output
    assert "depth 6" in checkpoint.inspect(ROOT / "assets" / "emoji")


# ------------------------------------------------------------------------------------ the tokenizer

def test_t5_text_ends_and_pads_with_the_folders_tokens(tmp_path):
    tokenizer = load_tokenizer(RELEASE)
    special = tokenizer.end_id, tokenizer.pad_id, tokenizer.mask_id, tokenizer.vocab_size
    assert special == (1, 1, 109, 110)
    ids = tokenizer.encode("a red cat", 8)
    assert ids[3:].tolist() == [1] * 5 and tokenizer.decode(ids) == "a red cat"
    folder = shutil.copytree(RELEASE / "tokenizer", tmp_path / "tokenizer")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    assert load_tokenizer(folder).encode("a red cat", 8)[3:].tolist() == [1] + [0] * 4


def test_t5_special_tokens_are_not_read_out_of_text():
    tokenizer = load_tokenizer(RELEASE)
    assert 1 not in tokenizer.pieces("cat </s> dog")
    assert 109 not in tokenizer.pieces("<extra_id_0>")


def test_too_long_text_is_cut_with_a_warning(capsys):
    ids = load_tokenizer(RELEASE).encode("a red cat and a blue dog", 5)
    assert len(ids) == 5 and ids[-1] == 1
    assert "blue dog" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- sample.py

SMALL = ["--height", "48", "--width", "32", "--length", "24", "--steps", "3"]
PARTS = ["--tokenizer", RELEASE, "--t5", RELEASE]


@pytest.mark.parametrize("path, parts, height, width", [
    (RELEASE, ["--vae", SD3_FILE], 48, 32), (SD3_FILE, PARTS, 32, 16), (SD3_FOLDER, PARTS, 32, 16)])
def test_every_layout_draws_the_same_image_twice(path, parts, height, width, tmp_path):
    flags = ["--checkpoint", path, *parts, "--prompt", "a red cat", *SMALL, "--height", height,
             "--width", width]
    images = []
    for more in ([], ["--seed", "0", "--dtype", "bfloat16"]):    # the defaults
        sample.main([*map(str, [*flags, *more]), "--out", str(tmp_path / "a.png")])
        images.append(Image.open(tmp_path / "a.png").copy())
    a, b = images
    assert a.width / a.height == width / height and a.tobytes() == b.tobytes()


@pytest.fixture
def read_image(tmp_path, capsys):
    """Return a function: flags of sample.py -> its output for a red image."""
    Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "red.png")

    def read(*flags):
        parts = ["--checkpoint", RELEASE, "--vae", SD3_FILE]
        sample.main(list(map(str, [*parts, "--image", tmp_path / "red.png", *SMALL, *flags])))
        return capsys.readouterr()
    return read


def test_release_captions_by_seed_and_mask_embedding(read_image, tmp_path):
    caption = read_image().out
    assert read_image("--seed", "0").out == caption != read_image("--seed", "1").out
    torch.save(torch.zeros(64), tmp_path / "mask.pth")
    assert read_image("--mask-embedding", tmp_path / "mask.pth").out != caption


def test_release_fills_in_text_and_keeps_the_rest_to_the_letter(read_image):
    odd = "The {[MASK]},\n\n <b>  </s>\t<pad> [MASK] caf\u00e9\u2026"
    for text in ("a [MASK], red cat.", odd):
        pattern = re.escape(text).replace(r"\[MASK\]", ".*") + "\n"
        output = read_image("--text", text, "--length", 48).out
        assert re.fullmatch(pattern, output, re.DOTALL)


def test_text_without_a_piece_is_warned_of(read_image):
    lines = read_image("--text", "a {[MASK]}").err.splitlines()
    [warning] = [line for line in lines if line.startswith("warning")]            # besides notes
    assert "text" in warning and warning.endswith("{ }")


# -------------------------------------------------------------------------------------- wrong files

BLOCK = "transformer_blocks.1.attn.to_q.weight"


@pytest.mark.parametrize("change, words", [
    (lambda tensors: tensors.pop(BLOCK), [BLOCK, "missing"]),
    (lambda tensors: tensors.update(more=torch.zeros(1)), ["more", "not a part"]),
    (lambda tensors: tensors.update({BLOCK: torch.zeros(128, 129)}),
     [BLOCK, "(128, 129)", "(128, 128)"]),
    (lambda tensors: tensors[BLOCK].view(-1)[7:8].fill_(float("nan")), [BLOCK, "NaN"]),
    (lambda tensors: tensors.update(null_image_embd=torch.full((1, 8, 128), float("inf"))),
     ["null_image_embd", "NaN"]),
])
def test_wrong_tensor_is_named_with_its_file(change, words, tmp_path):
    tensors = load_folder(RELEASE / "transformer")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_mmdit(tmp_path)
    message = str(error.value)
    assert all(word in message for word in ["model.safetensors", *words]) and "\n" not in message


def test_folder_without_weights_is_refused_by_its_contents(tmp_path):
    shutil.copytree(RELEASE, tmp_path, dirs_exist_ok=True,
                    ignore=lambda folder, names: [name for name in names if ".safetensors" in name])
    with pytest.raises(UserError, match="transformer: .*found config.json"):
        load_mmdit(tmp_path)


def test_truncated_and_missing_shards_are_named(tmp_path):
    folder = shutil.copytree(RELEASE, tmp_path / "release")
    shard = folder / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UserError, match="00002-of-00002.safetensors: not a whole"):
        load_mmdit(folder)
    shard.unlink()
    with pytest.raises(UserError, match="index.json .*-00002-of-00002.safetensors.* missing"):
        load_mmdit(folder)


def test_several_files_need_an_index(tmp_path):
    folder = shutil.copytree(RELEASE / "transformer", tmp_path / "transformer")
    [index] = folder.glob("*.index.json")
    index.unlink()
    with pytest.raises(UserError, match="transformer: 2 .*index"):
        load_mmdit(folder)


def test_two_files_of_the_usual_names_are_ambiguous(tmp_path):
    tensors = load_folder(RELEASE / "transformer")
    for name in ("model", "diffusion_pytorch_model"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=f"{tmp_path}: 2 .*index"):
        load_mmdit(tmp_path)


def test_a_folder_named_gpt2_has_its_own_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer("gpt2").vocab_size == 50258
    shutil.copytree(EMOJI, tmp_path / "gpt2", ignore=shutil.ignore_patterns("*.safetensors"))
    assert load_tokenizer("gpt2").digest() == load_tokenizer(EMOJI).digest()


def test_an_autoencoder_without_an_encoder_is_named(tmp_path):
    tensors = {name: tensor for name, tensor in load_folder(SD3_FOLDER / "vae").items()
               if not name.startswith("encoder.")}
    save_file(tensors, tmp_path / "decoder.safetensors")
    with pytest.raises(UserError, match="decoder.safetensors: .*encoder"):
        load_vae(tmp_path / "decoder.safetensors")


def test_file_of_a_run_names_the_runs_folder():
    with pytest.raises(UserError, match=f"model.safetensors: .*{EMOJI}"):
        load_mmdit(EMOJI / "model.safetensors")


def test_parts_of_other_sizes_are_refused():
    with pytest.raises(UserError, match="T5 .*64.* 65"):
        checkpoint.check_text_encoder(RELEASE, load_tokenizer(RELEASE), 65)
    channels = load_vae(SD3_FILE).channels
    with pytest.raises(UserError, match=f"{channels} channels.* {channels + 1}"):
        checkpoint.load_autoencoder(SD3_FILE, channels + 1)


def test_index_with_all_its_files_is_read(release, tmp_path):
    """SD3's text_encoder_3 has two indices; users often fetch only the half-precision files."""
    folder = shutil.copytree(RELEASE, tmp_path / "release") / "transformer"
    (index,) = folder.glob("*.index.json")
    half = {}
    for name, file in json.loads(index.read_text())["weight_map"].items():
        half[name] = file.replace(".safetensors", ".fp16.safetensors")
    half_index = index.with_name(index.name.replace(".json", ".fp16.json"))
    half_index.write_text(json.dumps(dict(weight_map=half)))
    for file in set(half.values()):
        (folder / file.replace(".fp16", "")).rename(folder / file)
    assert_equal_states(load_mmdit(tmp_path / "release"), release)


@pytest.mark.parametrize("load", [load_mmdit, load_vae, load_t5])
@pytest.mark.parametrize("keys, prefix", [
    (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.x"],
     "model.diffusion_model"),
    (["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"], "model.layers")],
    ids=["SD1.5", "LLM"])
def test_other_models_are_refused_with_their_tensors_prefix(keys, prefix, load, tmp_path):
    save_file({key: torch.zeros(2) for key in keys}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=f"other.safetensors: .*{prefix}"):
        load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["model.ckpt", "model.pth", "model.bin"])
def test_pickles_are_refused_unread(name, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match=f"{name}: .*pickle"):
        load_mmdit(tmp_path / name)
    with pytest.raises(UserError, match=name):
        load_mask_embedding(tmp_path / name)


@pytest.mark.parametrize("content, message", [
    (torch.zeros(65), "65 .*64"), (torch.zeros(2, 64), "one vector"),
    ({"a": torch.zeros(64), "b": torch.zeros(64)}, "one vector"),
    (torch.full((64,), float("nan")), "NaN"), ("text", "one vector"),
    (torch.zeros(64, dtype=torch.int64), "int64"),
])
def test_wrong_mask_embedding_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "mask.pth")
    with pytest.raises(UserError, match=f"mask.pth: .*{message}"):
        Parts(RELEASE, vae=SD3_FILE, mask_embedding=tmp_path / "mask.pth")


def test_mask_embedding_of_any_usual_shape_is_read(tmp_path):
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))
    for content in (vector, vector[None], {"weight": vector}, nn.Parameter(vector)):
        torch.save(content, tmp_path / "mask.pth")
        assert torch.equal(load_mask_embedding(tmp_path / "mask.pth"), vector)
    save_file({"x": vector}, tmp_path / "mask.safetensors")
    assert torch.equal(load_mask_embedding(tmp_path / "mask.safetensors"), vector)


def test_folder_without_a_tokenizer_is_refused_by_its_contents(tmp_path):
    folder = shutil.copytree(RELEASE / "tokenizer", tmp_path / "tokenizer")
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(b"x")
    with pytest.raises(UserError, match="tokenizer: .*tokenizer.json.*spiece.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("flags, words", [
    (["--height", "500"], ["--height 500", "96"]),
    (["--prompt", "cat " * 400], ["prompt", "401", "255"]),
    (["--vae", "nowhere"], ["nowhere"]),
    (["--vae", RELEASE / "text_encoder"], ["text_encoder", "no SD3 autoencoder", "--vae"]),
    (["--t5", SD3_FILE], ["sd3.safetensors", "no T5 encoder", "--t5"]),
    (["--checkpoint", SD3_FILE], ["sd3.safetensors", "no tokenizer", "--tokenizer"]),
    (["--checkpoint", ROOT / "assets"], ["assets", ".safetensors"]),
])
def test_sampling_mistakes_end_in_one_line_and_status_1(flags, words, run_program):
    defaults = ["--checkpoint", RELEASE, "--vae", SD3_FILE, "--prompt", "a cat", "--height", "32",
                "--width", "32"]
    status, message = run_program(sample.main, [*defaults, *flags])
    assert status == 1 and message.count("\n") == 1
    assert all(word in message for word in words)
