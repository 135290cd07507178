"""pretrained/layouts.py: names and shapes of the published files at full size; config.json."""

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
from helpers import edit_json
from inference.parts import Parts
from model import MMDiT
from pretrained import layouts
from pretrained.t5 import T5Encoder
from pretrained.vae import AutoencoderKL, VAEConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"
RELEASE, SD3_FOLDER = FIXTURES / "release", FIXTURES / "sd3_folder"
# name and shape of each tensor in the published files
FULL_SIZE = json.loads(gzip.decompress((FIXTURES / "full_size_keys.json.gz").read_bytes()))


def write_hollow(path, shapes):
    """Write a safetensors file of float16 zeros at full size; it is sparse and takes no space."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = dict(dtype="F16", shape=shape, data_offsets=[at, end])
        at = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return path


def build(name, part):
    """Return a part's module on the meta device, and the file entry of each of its parameters."""
    if name == "vae":
        vae = AutoencoderKL(layouts.vae_config(part))
        return vae, layouts.vae_entries(vae, part.layout)
    if name == "t5":
        t5 = T5Encoder(layouts.t5_config(part))
        return t5, layouts.t5_entries(t5, "shared.weight")
    mmdit = MMDiT(layouts.mmdit_config(part))
    return mmdit, layouts.mmdit_entries(mmdit, part.layout)


# other tensors that a file of the part may have
IGNORED = dict(transformer=layouts.POOLED, vae=(),
               t5=("decoder.", "lm_head.", "logit_scale", layouts.T5_TABLES[1]))
PARAMETERS = dict(transformer=2_102_856_100, vae=83_819_683, t5=4_762_310_656)


@pytest.mark.parametrize("entry, part", [
    ("sd3_medium_single_file", "transformer"), ("sd3_medium_single_file", "vae"),
    ("sd3_medium_single_file", "t5"),
    ("sd3_medium_diffusers.transformer", "transformer"), ("sd3_diffusers.vae", "vae"),
    ("t5_xxl.text_encoder", "t5"), ("dual_diff_release.transformer", "transformer")])
def test_full_size_files_have_exactly_our_parameters(entry, part, tmp_path):
    path = write_hollow(tmp_path / "hollow.safetensors", FULL_SIZE[entry])
    stored = find(path, part)
    tensors = stored.tensors
    with torch.device("meta"), checkpoint.Uninitialized():
        module, entries = build(part, stored)
    expected = {}
    for place in entries.values():
        expected |= dict.fromkeys(place.keys, place.shape)
    shapes = {key: tensors.shape[key] for key in tensors.file if not key.startswith(IGNORED[part])}
    assert shapes == expected
    names = {name for name, _ in module.named_parameters()}
    if part == "transformer":
        names.add("positions")
    assert set(entries) == names
    assert sum(p.numel() for p in module.parameters()) == PARAMETERS[part]


LOAD = dict(transformer=checkpoint.load_mmdit, text_encoder=checkpoint.load_t5,
            vae=checkpoint.load_vae)


def copy_part(part, target):
    """Copy a part of the release, or SD3's autoencoder; return the new folder."""
    source = SD3_FOLDER if part == "vae" else RELEASE
    return shutil.copytree(source / part, target / part)


@pytest.mark.parametrize("part, key, value, message", [
    ("transformer", "num_layers", 10**6, "1000000.* 2"),
    ("transformer", "num_attention_heads", 10**6, "1000000.* 2"),
    ("transformer", "num_attention_heads", "2", "'2'.*whole"),
    ("transformer", "attention_head_dim", 0, "0.*whole"),
    ("transformer", "attention_head_dim", 1.0, "1.0.*whole"),
    ("transformer", "sample_size", None, "null.*whole"),
    ("transformer", "qk_norm", "no", "'no'.*null"), ("transformer", "qk_norm", True, "True.*null"),
    ("vae", "scaling_factor", "1.5", "'1.5'.*above 0"), ("vae", "scaling_factor", 0, "0.*above 0"),
    ("vae", "shift_factor", "0", "'0'.*number"), ("vae", "latents_mean", [0.0], ".*null"),
    ("text_encoder", "num_heads", 3, "3"), ("text_encoder", "d_kv", 8, "8.* 16"),
    ("text_encoder", "d_kv", True, "True.*whole"),
    ("text_encoder", "layer_norm_epsilon", "1e-6", "'1e-6'.*above 0"),
    ("text_encoder", "layer_norm_epsilon", float("nan"), "nan.*number"),
    ("text_encoder", "feed_forward_proj", "relu", "'relu'.*'gated-gelu'")])
def test_config_that_contradicts_the_tensors_is_refused(part, key, value, message, tmp_path):
    folder = copy_part(part, tmp_path)
    edit_json(folder / "config.json", **{key: value})
    with pytest.raises(UserError, match=f'^{folder}/config.json: .*{key}.*{message}') as error:
        LOAD[part](tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings, shift", [
    ({}, VAEConfig.shift), (dict(shift_factor=None), 0.0), (dict(shift_factor=0.25), 0.25)])
def test_null_shift_factor_means_no_shift(settings, shift, tmp_path):
    """A shift of null means no shift; without the key, SD3's shift is used."""
    folder = copy_part("vae", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["shift_factor"]
    (folder / "config.json").write_text(json.dumps(config | settings))
    assert checkpoint.load_vae(tmp_path).config.shift == shift


@pytest.mark.parametrize("part, keys", [
    ("transformer", ["patch_size", "pos_embed_max_size", "in_channels", "vocab_size",
                     "joint_attention_dim"]),
    ("vae", ["block_out_channels", "layers_per_block", "latent_channels"]),
    ("text_encoder", ["vocab_size", "d_model", "d_ff", "relative_attention_num_buckets"])])
def test_sizes_that_shapes_show_are_not_read_from_a_config(part, keys, tmp_path):
    folder = copy_part(part, tmp_path)
    sizes = LOAD[part](tmp_path).config
    assert json.loads((folder / "config.json").read_text()).keys() >= set(keys)
    edit_json(folder / "config.json", **dict.fromkeys(keys, "wrong"))
    assert LOAD[part](tmp_path).config == sizes


@pytest.mark.parametrize("key, value, message", [
    ("depth", 10**6, "1000000.* 2 blocks"), ("patch", 0, "0.*at least 1"),
    ("position_size", 8, "8.*position_base.* 16"), ("position_size", 10**6, "1000000.*4 GiB"),
    ("qk_norm", "no", "'no'.*bool"), ("qk_norm", 1, "1.*bool"), ("heads", 2.0, "2.0.*int"),
    ("width", "64", "'64'.*int"), ("depth", None, "null.*int"), ("channels", True, "True.*int"),
    ("text_length", -1, "-1.*at least 0"), ("pixels", "32", "'32'.*int"), ("latents", 5, "5.*str"),
    ("vae", ["a"], ".*str"), ("guidance", 0.0, "0.0.*more than 0"), ("shift", math.inf, "inf.*more than 0")])
def test_wrong_config_of_ours_is_refused_at_once(key, value, message, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "ours")
    config = json.loads((folder / "config.json").read_text())
    (config["mmdit"] if key in config["mmdit"] else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"^{folder}/config.json: .*{key}.*{message}"):
        Parts(folder)


PATCH = "pos_embed.proj.weight"


@pytest.mark.parametrize("name, convert, message", [
    ("transformer_blocks.0.attn.to_q.scale_weight", None, "not a part"),         # scaled float8
    ("scaled_fp8", None, "not a part"),
    ("transformer_blocks.0.attn2.to_q.weight", None, "not a part"),              # SD3.5-medium
    (PATCH, torch.Tensor.char, "I8"), (PATCH, torch.Tensor.bool, "BOOL")])
def test_quantised_and_foreign_tensors_are_refused_by_name(name, convert, message, tmp_path):
    tensors = {}
    for file in (RELEASE / "transformer").glob("*.safetensors"):
        tensors |= load_file(file)
    tensors[name] = convert(tensors[name]) if convert else torch.ones(1)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"^{tmp_path}/a.safetensors: .*{name}.*{message}"):
        checkpoint.load_mmdit(tmp_path / "a.safetensors")
