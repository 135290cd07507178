"""checkpoint.py, pretrained/vae.py and pretrained/t5.py against the published implementations' outputs (tests/fixtures, made by
make_fixtures.py), and every way in which a file can be wrong."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoint
import flow
import sample
from checkpoint import load_mask_embedding, load_mmdit, load_t5, load_tokenizer, load_vae
from common.cli import UserError
from inference.parts import Parts
from pretrained.t5 import T5Config, T5Encoder, buckets
from pretrained.tokenizer import gpt2_tokenizer

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parents[1] / "fixtures"
RELEASE, SD3_FILE, SD3_FOLDER = FIXTURES / "release", FIXTURES / "sd3.safetensors", FIXTURES / "sd3_folder"


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURES / "expected.safetensors")


@pytest.fixture(scope="module")
def release():
    return load_mmdit(RELEASE)


def close(ours, theirs, atol=1e-4):
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=atol, rtol=0)


# ----------------------------------------------------------------------------------------------- same outputs

@torch.inference_mode()
def test_the_release_computes_what_its_published_class_does(release, expected):
    x, text, t = (expected[f"ddit.{name}"] for name in ("latents", "context", "t"))
    velocity, logits = release(x, text, t)
    assert close(velocity, expected["ddit.velocity"]) and close(logits, expected["ddit.logits"])
    assert close(release(x, text, torch.zeros(1))[1], expected["ddit.logits_t0"])
    assert close(release(None, text, torch.zeros(1))[1], expected["ddit.logits_text_only"])
    both = torch.cat([text, expected["t2i.negative_context"]])
    velocity = flow.guide(lambda x, t: release(x, both, t, need="velocity")[0], 5.0)
    drawn = flow.euler(velocity, expected["t2i.noise"], flow.sigmas(6, 3.0))
    assert close(drawn, expected["t2i.latents_6steps_cfg5_shift3"])
    for steps in (4, 28):
        assert close(flow.sigmas(steps, 3.0), expected[f"euler.sigmas_{steps}_shift3"], 1e-6)


@pytest.mark.parametrize("path", [SD3_FILE, SD3_FOLDER])
@torch.inference_mode()
def test_sd3_computes_its_velocity_from_either_layout(path, expected):
    model = load_mmdit(path, vocab_size=110)
    velocity, logits = model(expected["sd3.latents"], expected["ddit.context"], expected["ddit.t"])
    assert close(velocity, expected["sd3.velocity"]) and logits.shape == (2, 9, 110)
    assert model.config.depth == 3 and model.config.heads == 1
    gates = model.blocks[-1].txt.modulation.weight[2 * 64:]
    assert not gates.any()                                   # the last text block starts as the identity


@pytest.mark.parametrize("path", [SD3_FILE, SD3_FOLDER])
@torch.inference_mode()
def test_the_autoencoder_encodes_and_decodes_from_either_layout(path, expected):
    vae = load_vae(path)
    mean, logvar = vae.posterior(expected["vae.image"])
    assert close(mean, expected["vae.mean"]) and close(logvar, expected["vae.logvar"])
    assert close(vae.encode(expected["vae.image"]), expected["vae.latent"])
    assert close(vae.decode(expected["vae.z"]), expected["vae.decoded"])
    two = torch.cat([expected["vae.z"], expected["vae.z"].flip(3)])
    assert close(vae.decode(two)[:1], expected["vae.decoded"])
    with pytest.raises(ValueError, match="not a multiple"):
        vae.encode(torch.zeros(1, 3, 25, 32))


@torch.inference_mode()
def test_a_draw_from_the_posterior_has_its_mean_and_deviation(expected):
    vae, image = load_vae(SD3_FILE), expected["vae.image"]
    vae.posterior = lambda images: (expected["vae.mean"].expand(4000, -1, -1, -1),
                                    expected["vae.logvar"].expand(4000, -1, -1, -1))
    drawn = vae.encode(image, torch.Generator().manual_seed(0)) / vae.config.scale + vae.config.shift
    deviation = (0.5 * expected["vae.logvar"][0]).exp()
    # 3072 means of 4000 draws: the largest of them is about 4 standard errors off
    assert ((drawn.mean(0) - expected["vae.mean"][0]) / deviation).abs().max() < 6 / 4000**0.5
    assert (drawn.std(0) / deviation - 1).abs().max() < 6 / 8000**0.5


@torch.inference_mode()
def test_t5_computes_what_transformers_does(expected):
    t5 = load_t5(RELEASE)
    assert close(t5(expected["t5.ids"]), expected["t5.hidden"])
    vector = torch.arange(64.0)
    t5.set_embedding(109, vector)
    assert torch.equal(t5.embed.weight[109], vector)


@torch.inference_mode()
def test_t5_survives_what_overflows_in_half_precision():
    torch.manual_seed(0)
    t5 = T5Encoder(T5Config(vocab_size=20, width=64, depth=2, heads=4, head=16, hidden=128))
    for block in t5.blocks:
        block.wi_1.weight *= 400                             # the MLP's product goes far over 65504
    ids = torch.arange(20)[None]
    full, low = t5(ids), t5.half()(ids)
    assert low.dtype == torch.float16 and low.isfinite().all()
    assert (low.float() - full).norm() / full.norm() < 2e-2


TABLE, TWIN = "shared.weight", "encoder.embed_tokens.weight"


@pytest.mark.parametrize("prefix, names", [("", [TABLE]), ("", [TWIN]), ("", [TABLE, TWIN]),
                                           ("text_encoders.t5xxl.transformer.", [TABLE])])
@torch.inference_mode()
def test_t5_files_in_float8_under_every_name_of_their_table(prefix, names, tmp_path, expected):
    stored = load_file(RELEASE / "text_encoder" / "model.safetensors")
    table = stored.pop(TABLE, None) if TABLE in stored else stored[TWIN]
    stored.pop(TWIN, None)
    stored |= {name: table.clone() for name in names}
    small = {prefix + name: tensor.to(torch.float8_e4m3fn) for name, tensor in stored.items()}
    save_file(small | {"decoder.block.0.x": torch.zeros(1), "other": torch.zeros(1)} if prefix else small,
              tmp_path / "t5.safetensors")
    t5 = load_t5(tmp_path / "t5.safetensors", torch.bfloat16)
    assert t5.config == load_t5(RELEASE).config and t5.embed.weight.dtype == torch.bfloat16
    assert torch.equal(t5.embed.weight, table.to(torch.float8_e4m3fn).to(torch.bfloat16))
    # float8 keeps 4 bits of a number: the states stay near, and far from those of any other weights
    states = t5(expected["t5.ids"]).float()
    assert (states - expected["t5.hidden"]).norm() / expected["t5.hidden"].norm() < 0.2


def test_t5_buckets_are_exact_nearby_and_logarithmic_beyond():
    b = buckets(300, 32, 128)
    assert b[0, :8].tolist() == [0] + [16 + i for i in range(1, 8)]          # keys behind the query
    assert b[:9, 0].tolist() == list(range(9))                               # keys before it
    assert b[0, 299] == 31 and b[299, 0] == 15 and b[0, 127] == 31           # all far keys share the last
    assert (b[0, 1:].diff() >= 0).all()


@torch.inference_mode()
def test_bfloat16_stays_close_to_float32(release, expected):
    low = load_mmdit(RELEASE, torch.bfloat16)
    x, text, t = (expected[f"ddit.{name}"] for name in ("latents", "context", "t"))
    for full, half in zip(release(x, text, t), low(x.bfloat16(), text.bfloat16(), t)):
        assert (half.float() - full).norm() / full.norm() < 2e-2


# ----------------------------------------------------------------------------------------- sizes, round trips

def test_an_exported_release_loads_bit_for_bit(release, tmp_path):
    checkpoint.export(RELEASE, tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").mask_id == 109
    for (name, a), (_, b) in zip(release.state_dict().items(),
                                 load_mmdit(tmp_path / "out").state_dict().items()):
        assert torch.equal(a, b), name
    stored = {}
    for file in (RELEASE / "transformer").glob("*.safetensors"):
        stored |= load_file(file)
    written = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == written.keys() and all(torch.equal(stored[k], written[k]) for k in stored)
    sizes = json.loads((RELEASE / "transformer" / "config.json").read_text())
    ours = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert {k: v for k, v in ours.items() if k != "pooled_projection_dim"} == {
        k: v for k, v in sizes.items() if k in ours and k != "pooled_projection_dim"}


def test_a_run_of_ours_from_published_weights_keeps_its_position_table(release, tmp_path):
    tensors = {f"mmdit.{k}": v for k, v in release.named_parameters()}
    tensors["mmdit.positions"] = release.positions
    checkpoint.save(tmp_path / "run", tensors, release.config, gpt2_tokenizer(), latents="vae")
    again = load_mmdit(tmp_path / "run")
    assert torch.equal(again.positions, release.positions)
    checkpoint.export(tmp_path / "run", tmp_path / "out", tokenizer=RELEASE / "tokenizer")
    for a, b in zip(release.state_dict().values(), load_mmdit(tmp_path / "out").state_dict().values()):
        assert torch.equal(a, b)


def test_a_model_that_predicts_data_is_saved_shown_and_not_exported(release, tmp_path):
    config = replace(release.config, predicts="data")
    checkpoint.save(tmp_path / "run", {f"mmdit.{k}": v for k, v in release.named_parameters()}, config,
                    gpt2_tokenizer())
    assert load_mmdit(tmp_path / "run").config.predicts == "data"
    assert "predicts data" in checkpoint.inspect(tmp_path / "run")
    with pytest.raises(UserError, match="its image head predicts data, the published layouts' a velocity"):
        checkpoint.export(tmp_path / "run", tmp_path / "out")
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    written["mmdit"]["predicts"] = "noise"
    (tmp_path / "run" / "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError,
                       match="config.json: .*predicts is 'noise', expected \"velocity\" or \"data\""):
        load_mmdit(tmp_path / "run")
    del written["mmdit"]["predicts"]                             # as from before there was a choice
    (tmp_path / "run" / "config.json").write_text(json.dumps(written))
    assert load_mmdit(tmp_path / "run").config.predicts == "velocity"


def test_stored_dtype_is_mapped_and_others_are_converted():
    same, other = load_mmdit(RELEASE, torch.float16), load_mmdit(RELEASE, torch.bfloat16)
    assert {p.dtype for p in same.parameters()} == {torch.float16}
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    with safe_open(SD3_FILE, "pt") as file:
        assert file.get_tensor("model.diffusion_model.pos_embed").dtype == torch.float8_e4m3fn


def test_inspect_names_layout_parts_and_sizes():
    said = run("checkpoint.py", "inspect", RELEASE).stdout
    assert "D-DiT transformer: 72 tensors, 1.4 M values, F16, 2 file(s)" in said
    assert "vocab_size 110" in said and "T5 encoder: 30 tensors" in said
    said = checkpoint.inspect(SD3_FILE)
    assert "SD3 transformer" in said and "widths (32, 64)" in said and "F8_E4M3" in said
    assert "depth 6" in checkpoint.inspect(ROOT / "assets" / "emoji")


# ---------------------------------------------------------------------------------------------- the tokenizer

def test_t5_text_ends_and_pads_with_the_token_that_the_folder_names(tmp_path):
    tokenizer = load_tokenizer(RELEASE)
    assert (tokenizer.end_id, tokenizer.pad_id, tokenizer.mask_id, tokenizer.vocab_size) == (1, 1, 109, 110)
    ids = tokenizer.encode("a red cat", 8)
    assert ids[3:].tolist() == [1] * 5 and tokenizer.decode(ids) == "a red cat"
    plain = shutil.copytree(RELEASE / "tokenizer", tmp_path / "tokenizer")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (plain / name).write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    assert load_tokenizer(plain).encode("a red cat", 8)[3:].tolist() == [1] + [0] * 4
    assert "</s>" not in tokenizer.decode(tokenizer.encode("cat </s> dog", 20)[:3])
    assert 1 not in tokenizer.pieces("cat </s> dog") and 109 not in tokenizer.pieces("<extra_id_0>")


def test_too_long_a_text_is_cut_with_a_warning_that_shows_the_part_cut_off(capsys):
    ids = load_tokenizer(RELEASE).encode("a red cat and a blue dog", 5)
    assert len(ids) == 5 and ids[-1] == 1
    assert "blue dog" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- sample.py

SMALL = ["--height", "48", "--width", "32", "--length", "24", "--steps", "3"]
PARTS = ["--tokenizer", RELEASE, "--t5", RELEASE]


def run(*flags, expect=0):
    done = subprocess.run([sys.executable, *map(str, flags)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done


@pytest.mark.parametrize("path, parts",
                         [(RELEASE, ["--vae", SD3_FILE]), (SD3_FILE, PARTS), (SD3_FOLDER, PARTS)])
def test_every_layout_draws(path, parts, tmp_path):
    side = ["--height", "32", "--width", "16"] if path != RELEASE else ["--height", "48", "--width", "32"]
    flags = ["--checkpoint", path, *parts, "--prompt", "a red cat", *SMALL, *side]
    sample.main([*map(str, flags), "--out", str(tmp_path / "a.png")])
    sample.main([*map(str, flags), "--out", str(tmp_path / "b.png"), "--seed", "0", "--dtype", "bfloat16"])
    a, b = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png")
    assert a.width / a.height == int(side[3]) / int(side[1]) and a.tobytes() == b.tobytes()


def test_the_release_captions_answers_and_fills_in(tmp_path, capsys, monkeypatch):
    Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "red.png")
    flags = ["--checkpoint", RELEASE, "--vae", SD3_FILE, "--image", tmp_path / "red.png", *SMALL]

    def said(*more):
        sample.main(list(map(str, [*flags, *more])))
        return capsys.readouterr().out
    first, again = run("sample.py", *flags).stdout, said("--seed", "0")
    assert first == again != said("--seed", "1")
    torch.save(torch.zeros(64), tmp_path / "mask.pth")
    assert said("--mask-embedding", tmp_path / "mask.pth") != first
    filled = said("--text", "a [MASK], red cat.")
    assert filled.startswith("a ") and filled.endswith(", red cat.\n")
    odd = "The {[MASK]},\n\n <b>  </s>\t<pad> [MASK] caf\u00e9\u2026"       # all of it stays, to the letter
    assert re.fullmatch(re.escape(odd).replace(r"\[MASK\]", ".*") + "\n",
                        said("--text", odd, "--length", 48), re.DOTALL)
    capsys.readouterr()
    sample.main(list(map(str, [*flags, "--text", "a {[MASK]}"])))
    assert capsys.readouterr().err == "warning: --text: the tokenizer has no piece for { }\n"


# ------------------------------------------------------------------------------------------ what can be wrong

def spoilt(tmp_path, change):
    """A copy of the release's transformer in one file, changed: (folder, tensors) -> None."""
    folder = tmp_path / "bad"
    shutil.copytree(RELEASE, folder)
    tensors = {}
    for file in sorted((folder / "transformer").glob("*.safetensors*")):
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        file.unlink()
    change(folder, tensors)
    if tensors:
        save_file(tensors, folder / "transformer" / "model.safetensors")
    return folder


BLOCK = "transformer_blocks.1.attn.to_q.weight"


@pytest.mark.parametrize("change, message", [
    (lambda f, t: t.pop(BLOCK), f"model.safetensors: {BLOCK} is missing"),
    (lambda f, t: t.update(more=torch.zeros(1)), "more is not a part of this model"),
    (lambda f, t: t.update({BLOCK: torch.zeros(128, 129)}),
     f"{BLOCK} is (128, 129), this model's sizes ask for (128, 128)"),
    (lambda f, t: t[BLOCK].view(-1)[7:8].fill_(float("nan")), f"{BLOCK} holds NaN or infinity"),
    (lambda f, t: t.update({"null_image_embd": torch.full((1, 8, 128), float("inf"))}),
     "null_image_embd holds NaN"),
    (lambda f, t: t.clear(), "expected .safetensors files, found config.json"),
])
def test_a_wrong_tensor_is_named_with_its_file(change, message, tmp_path):
    with pytest.raises(UserError) as error:
        load_mmdit(spoilt(tmp_path, change))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_truncated_and_missing_shards_are_named(tmp_path):
    folder = shutil.copytree(RELEASE, tmp_path / "release")
    shard = folder / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1000])
    with pytest.raises(UserError, match="00002-of-00002.safetensors: not a whole safetensors file"):
        load_mmdit(folder)
    shard.unlink()
    with pytest.raises(UserError, match="index.json names .*-00002-of-00002.safetensors, which is missing"):
        load_mmdit(folder)


def test_of_two_indices_the_one_whose_files_are_there_is_read(tmp_path):
    """As in SD3's text_encoder_3, of which people fetch the half-precision files alone."""
    folder = shutil.copytree(RELEASE, tmp_path / "release")
    (index,) = (folder / "transformer").glob("*.index.json")
    table = json.loads(index.read_text())
    half = {name: file.replace(".safetensors", ".fp16.safetensors") for name, file in table["weight_map"].items()}
    index.with_name(index.name.replace(".json", ".fp16.json")).write_text(json.dumps(dict(weight_map=half)))
    for file in set(half.values()):
        (folder / "transformer" / file.replace(".fp16", "")).rename(folder / "transformer" / file)
    a, b = load_mmdit(folder).state_dict(), load_mmdit(RELEASE).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("keys, message", [
    # SD1.5
    (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.x"],
     "begin with .*model.diffusion_model"),
    (["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"], "begin with .*model.layers"),  # an LLM
])
def test_other_models_are_refused_with_what_was_found(keys, message, tmp_path):
    save_file({key: torch.zeros(2) for key in keys}, tmp_path / "other.safetensors")
    for load in (load_mmdit, load_vae, load_t5):
        with pytest.raises(UserError, match=message):
            load(tmp_path / "other.safetensors")


def test_pickles_are_refused_unread(tmp_path):
    for name in ("model.ckpt", "model.pth", "model.bin"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        with pytest.raises(UserError, match="may be a pickle"):
            load_mmdit(tmp_path / name)
    with pytest.raises(UserError, match="not a file of one tensor"):
        load_mask_embedding(tmp_path / "model.pth")


@pytest.mark.parametrize("content, message", [
    (torch.zeros(65), "of 65 numbers, this T5 has 64"), (torch.zeros(2, 64), "expected one vector"),
    ({"a": torch.zeros(64), "b": torch.zeros(64)}, "expected one vector"),
    (torch.full((64,), float("nan")), "NaN"), ("text", "expected one vector"),
])
def test_a_wrong_mask_embedding_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "mask.pth")
    with pytest.raises(UserError, match=message):
        Parts(RELEASE, vae=SD3_FILE, mask_embedding=tmp_path / "mask.pth")


def test_a_mask_embedding_of_any_usual_shape_is_read(tmp_path):
    vector = torch.randn(64)
    for content in (vector, vector[None], {"weight": vector}, torch.nn.Parameter(vector)):
        torch.save(content, tmp_path / "mask.pth")
        assert torch.equal(load_mask_embedding(tmp_path / "mask.pth"), vector)
    save_file({"x": vector}, tmp_path / "mask.safetensors")
    assert torch.equal(load_mask_embedding(tmp_path / "mask.safetensors"), vector)


def test_a_folder_without_a_tokenizer_says_what_to_fetch(tmp_path):
    folder = shutil.copytree(RELEASE / "tokenizer", tmp_path / "tokenizer")
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(b"x")
    with pytest.raises(UserError, match="expected tokenizer.json, found .*spiece.model.*fetch that of T5"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("flags, status, message", [
    (["--height", "500"], 1, "a picture's height of 500, expected a multiple of 4 up to 96"),
    (["--prompt", "cat " * 400], 1, "--prompt has 401 tokens, expected at most 255"),
    (["--vae", "nowhere"], 1, "nowhere: expected a checkpoint"),
    (["--vae", RELEASE / "text_encoder"], 1, "no SD3 autoencoder in it"),
    (["--t5", SD3_FILE], 1, "no T5 encoder in it"),
    (["--checkpoint", SD3_FILE], 1, "a safetensors file has no tokenizer"),
    (["--checkpoint", ROOT / "assets"], 1, "expected .safetensors files, found"),
])
def test_mistakes_get_one_line_and_a_status(flags, status, message, mistake):
    defaults = ["--checkpoint", RELEASE, "--vae", SD3_FILE, "--prompt", "a cat", "--height", "32", "--width",
                "32"]
    code, said = mistake(sample.main, [*defaults, *flags])
    assert code == status and message in said and len(said.splitlines()) == 1
