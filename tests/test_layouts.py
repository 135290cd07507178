"""layouts.py: the names and shapes of the published files at full size, without their weights."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch

import layouts
from checkpoint import find
from model import MMDiT
from t5 import T5Encoder
from vae import AutoencoderKL

KEYS = Path(__file__).parent / "fixtures" / "full_size_keys.json.gz"
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
    with torch.device("meta"):
        if part == "vae":
            module = AutoencoderKL(layouts.vae_config(tensors, config, naming))
            return module, layouts.vae_entries(module, naming)
        if part == "t5":
            module = T5Encoder(layouts.t5_config(tensors, config, naming))
            return module, layouts.t5_entries(module, "shared.weight")
        module = MMDiT(layouts.mmdit_config(tensors, config, naming, 32100))
    from_sd3 = "text_proj_out.weight" not in tensors
    table = layouts.SD3_FILE if naming == "file" else layouts.SD3_FOLDER if from_sd3 else layouts.RELEASE
    return module, layouts.mmdit_entries(module, table, from_sd3)


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
    ignored = layouts.POOLED + layouts.DECODER + (layouts.T5_TWIN,) * (part == "t5")
    if part == "vae":
        ignored = ()
    found = {key: shape for key, shape in tensors.shape.items() if not key.startswith(ignored)}
    assert found == {key: e.shape for e in entries.values() for key in e.keys}
    assert set(entries) == {name for name, _ in module.named_parameters()} | ({"positions"}
                                                                              if part == "transformer"
                                                                              else set())
    count = sum(p.numel() for p in module.parameters())
    assert count == dict(transformer=2_102_856_100, vae=83_819_683, t5=4_762_310_656)[part]
