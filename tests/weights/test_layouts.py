"""pretrained/layouts.py: names and shapes of the published files at full size, without their weights; config.json."""

import gzip
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import find
from common.cli import UserError
from inference.parts import Parts
from model import MMDiT
from pretrained import layouts
from pretrained.t5 import T5Encoder
from pretrained.vae import AutoencoderKL

KEYS = Path(__file__).parents[1] / "fixtures" / "full_size_keys.json.gz"
RELEASE, IN = Path(__file__).parents[1] / "fixtures" / "release", "pos_embed.proj.weight"
FULL = json.loads(gzip.decompress(KEYS.read_bytes()))


def hollow(path, shapes):
    """A safetensors file of float16 zeros with these tensors, at full size, sparse: it takes no room."""
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = dict(dtype="F16", shape=shape, data_offsets=[at, at + 2 * math.prod(shape)])
        at += 2 * math.prod(shape)
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return path


def sizes_and_entries(part, tensors, config, naming):
    sizes, make = dict(vae=(layouts.vae_config, AutoencoderKL), t5=(layouts.t5_config, T5Encoder),
                       transformer=(layouts.mmdit_config, MMDiT))[part]
    found = sizes(tensors, config, naming)
    with torch.device("meta"):
        module = make(found)
    if part == "vae":
        return module, layouts.vae_entries(module, naming)
    if part == "t5":
        return module, layouts.t5_entries(module, "shared.weight")
    return module, layouts.mmdit_entries(module, layouts.family(tensors), naming)


@pytest.mark.parametrize("entry, part", [
    ("sd3_medium_single_file", "transformer"), ("sd3_medium_single_file", "vae"),
    ("sd3_medium_single_file", "t5"),
    ("sd3_medium_diffusers.transformer", "transformer"), ("sd3_diffusers.vae", "vae"),
    ("t5_xxl.text_encoder", "t5"),
    ("dual_diff_release.transformer", "transformer")])
def test_full_size_files_have_exactly_our_parameters_after_renaming(entry, part, tmp_path):
    if not any(layouts.SIGNS[part][naming] in key for key in FULL[entry] for naming in layouts.SIGNS[part]):
        pytest.skip("this file has no such part")
    path = hollow(tmp_path / "hollow.safetensors", FULL[entry])
    tensors, config, naming = find(path, part)
    module, entries = sizes_and_entries(part, tensors, config, naming)
    ignored = layouts.POOLED + layouts.BESIDE_T5[:3] + layouts.T5_TABLES[1:] * (part == "t5")
    if part == "vae":
        ignored = ()
    found = {key: shape for key, shape in tensors.shape.items() if not key.startswith(ignored)}
    assert found == {key: e.shape for e in entries.values() for key in e.keys}
    assert set(entries) == {name for name, _ in module.named_parameters()} | ({"positions"}
                                                                              if part == "transformer"
                                                                              else set())
    count = sum(p.numel() for p in module.parameters())
    assert count == dict(transformer=2_102_856_100, vae=83_819_683, t5=4_762_310_656)[part]


LOAD = dict(transformer=checkpoint.load_mmdit, text_encoder=checkpoint.load_t5, vae=checkpoint.load_vae)


@pytest.mark.parametrize("part, key, value, message", [
    ("transformer", "num_layers", 10**6, "1000000, expected 2, which its tensors have"),
    ("transformer", "num_attention_heads", 10**6, "1000000, expected 2, which its tensors have"),
    ("transformer", "num_attention_heads", "2", "'2', expected a whole number"),
    ("transformer", "attention_head_dim", 0, "0, expected a whole number"),
    ("transformer", "sample_size", None, "null, expected a whole number"),
    ("transformer", "qk_norm", "no", "'no', expected null"),
    ("transformer", "qk_norm", True, "True, expected null"),
    ("transformer", "attention_head_dim", 1.0, "1.0, expected a whole number"),
    ("vae", "scaling_factor", "1.5", "'1.5', expected a number above 0"),
    ("vae", "scaling_factor", 0, "0, expected a number above 0"),
    ("vae", "latents_mean", [0.0], ".*, expected null"),
    ("text_encoder", "num_heads", 3, "3, expected "),
    ("text_encoder", "d_kv", 8, "8, expected 16, which its tensors have"),
    ("text_encoder", "d_kv", True, "True, expected a whole number"),
    ("text_encoder", "layer_norm_epsilon", "1e-6", "'1e-6', expected a number above 0"),
    ("text_encoder", "layer_norm_epsilon", float("nan"), "nan, expected a number"),
    ("text_encoder", "feed_forward_proj", "relu", "'relu', expected 'gated-gelu'")])
def test_a_config_that_contradicts_the_tensors_is_refused(part, key, value, message, tmp_path):
    shutil.copytree(RELEASE, tmp_path / "release")
    shutil.copytree(RELEASE.with_name("sd3_folder") / "vae", tmp_path / "release" / "vae")
    folder = tmp_path / "release" / part
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=f'^{folder}/config.json: "{key}" is {message}') as error:
        LOAD[part](tmp_path / "release")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part, keys", [
    ("transformer", ["patch_size", "pos_embed_max_size", "in_channels", "vocab_size", "joint_attention_dim"]),
    ("vae", ["block_out_channels", "layers_per_block", "latent_channels"]),
    ("text_encoder", ["vocab_size", "d_model", "d_ff", "relative_attention_num_buckets"])])
def test_sizes_that_the_shapes_show_are_not_read_from_a_config(part, keys, tmp_path):
    source = RELEASE.with_name("sd3_folder") if part == "vae" else RELEASE
    shutil.copytree(source / part, tmp_path / "checkpoint" / part)
    file = tmp_path / "checkpoint" / part / "config.json"
    config = json.loads(file.read_text())
    assert config.keys() >= set(keys)
    file.write_text(json.dumps(config | dict.fromkeys(keys, "wrong")))
    assert LOAD[part](tmp_path / "checkpoint").config == LOAD[part](source).config


@pytest.mark.parametrize("key, value, message", [
    ("depth", 10**6, "1000000, model.safetensors has 2 blocks"),
    ("patch", 0, "0, expected int of at least 1"),
    ("position_size", 8, '8, expected at least "position_base", 16'),
    ("position_size", 10**6, "1000000, expected a table of less than 4 GiB"),
    ("qk_norm", "no", "'no', expected bool"), ("qk_norm", 1, "1, expected bool"),
    ("heads", 2.0, "2.0, expected int"), ("width", "64", "'64', expected int"),
    ("depth", None, "null, expected int"), ("channels", True, "True, expected int"),
    ("text_length", -1, "-1, expected int of at least 0"),
    ("pixels", "32", "'32', expected int"), ("latents", 5, "5, expected str"),
    ("vae", ["a"], ".*, expected str")])
def test_a_config_of_ours_is_checked_too(key, value, message, tiny, tmp_path):
    """None hangs, and none loads."""
    folder = shutil.copytree(tiny, tmp_path / "ours")
    config = json.loads((folder / "config.json").read_text())
    (config["mmdit"] if key in config["mmdit"] else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f'^{folder}/config.json: "{key}" is {message}'):
        Parts(folder)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.update({"transformer_blocks.0.attn.to_q.scale_weight": torch.ones(1)}),
     "to_q.scale_weight is not a part of this model"),
    (lambda t: t.update(scaled_fp8=torch.ones(1)), "scaled_fp8 is not a part of this model"),
    (lambda t: t.update({"transformer_blocks.0.attn2.to_q.weight": torch.ones(2, 2)}),
     "attn2.to_q.weight is not a part of this model"),
    (lambda t: t.update({IN: t[IN].to(torch.int8)}), "has numbers of type I8, expected floats"),
    (lambda t: t.update({IN: t[IN] > 0}), "has numbers of type BOOL, expected floats")])
def test_weights_that_are_not_as_this_model_has_them_are_named_as_what_they_are(change, message, tmp_path):
    tensors = {}
    for file in (RELEASE / "transformer").glob("*.safetensors"):
        tensors |= load_file(file)
    change(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"^{tmp_path}/a.safetensors: .*{message}"):
        checkpoint.load_mmdit(tmp_path / "a.safetensors")
