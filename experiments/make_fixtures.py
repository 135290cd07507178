"""Make tests/fixtures: tiny random checkpoints in the published layouts, and the outputs of the
published implementations.  It is not part of the test run, and needs packages that the project does
not need:

    python -m venv peers && peers/bin/pip install diffusers==0.42.1 transformers==5.23.0 torch safetensors
    peers/bin/python -m experiments.make_fixtures REFERENCE

REFERENCE is a folder with three entries, which are copied: `dual_diff_release/`, a tiny D-DiT
release (width 128, depth 2); `expected.safetensors`, the outputs of D-DiT's published model class
and of transformers' T5; and `full_size_keys.json`, the name and shape of every tensor in the
published files.  SD3 and its autoencoder are made here, even smaller (width 64, depth 3; widths 32
and 64), with the single file's names.  diffusers' own converters turn them into the folder layout,
and diffusers computes the expected outputs of both.
"""

import gzip
import json
import math
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from common import cli
from common.cli import ROOT

FIXTURES = ROOT / "tests" / "fixtures"
COPIED = ("ddit.", "t2i.", "t5.", "euler.")         # outputs that REFERENCE brings
DEPTH, WIDTH, POSITIONS, POOLED = 3, 64, 12, 32     # of SD3
WIDTHS, BLOCKS, LATENT = [32, 64], 1, 16            # of the autoencoder: levels, blocks, channels
SCALE, SHIFT = 1.5305, 0.0609                       # of latents, as published
SD3_CONFIG = dict(sample_size=8, patch_size=2, in_channels=LATENT, num_layers=DEPTH,
                  attention_head_dim=64, num_attention_heads=1, joint_attention_dim=WIDTH,
                  caption_projection_dim=WIDTH, pooled_projection_dim=POOLED, out_channels=LATENT,
                  pos_embed_max_size=POSITIONS)
VAE_CONFIG = dict(in_channels=3, out_channels=3, block_out_channels=WIDTHS,
                  layers_per_block=BLOCKS, latent_channels=LATENT, norm_num_groups=32,
                  scaling_factor=SCALE, shift_factor=SHIFT, use_quant_conv=False,
                  use_post_quant_conv=False, down_block_types=["DownEncoderBlock2D"] * 2,
                  up_block_types=["UpDecoderBlock2D"] * 2)


# --------------------------------------------------------------------------------- random weights

class Weights(dict):
    """Random tensors by name, drawn from torch's global generator in the order of the calls."""

    def linear(self, name: str, rows: int, *columns: int) -> None:
        """Add a linear layer or a convolution: weight (rows, *columns), bias (rows,)."""
        fan_in = math.prod(columns)
        self[f"{name}.weight"] = torch.randn(rows, *columns) / fan_in ** 0.5
        self[f"{name}.bias"] = 0.1 * torch.randn(rows)

    def norm(self, name: str, width: int) -> None:
        self[f"{name}.weight"] = 1 + 0.1 * torch.randn(width)
        self[f"{name}.bias"] = 0.1 * torch.randn(width)


def sd3_stream(weights: Weights, name: str, is_last_text: bool) -> None:
    """Add one stream of a block; the last block's text stream has only queries, keys and values."""
    weights.linear(f"{name}.attn.qkv", 3 * WIDTH, WIDTH)
    modulations = 2 if is_last_text else 6
    weights.linear(f"{name}.adaLN_modulation.1", modulations * WIDTH, WIDTH)
    if not is_last_text:
        weights.linear(f"{name}.attn.proj", WIDTH, WIDTH)
        weights.linear(f"{name}.mlp.fc1", 4 * WIDTH, WIDTH)
        weights.linear(f"{name}.mlp.fc2", WIDTH, 4 * WIDTH)


def sd3() -> Weights:
    """Return SD3's transformer, with the names of the single file."""
    weights = Weights(pos_embed=torch.randn(1, POSITIONS ** 2, WIDTH))
    weights.linear("x_embedder.proj", WIDTH, LATENT, 2, 2)
    for name, width in (("t_embedder", 256), ("y_embedder", POOLED)):
        weights.linear(f"{name}.mlp.0", WIDTH, width)
        weights.linear(f"{name}.mlp.2", WIDTH, WIDTH)
    weights.linear("context_embedder", WIDTH, WIDTH)
    for i in range(DEPTH):
        sd3_stream(weights, f"joint_blocks.{i}.context_block", is_last_text=i == DEPTH - 1)
        sd3_stream(weights, f"joint_blocks.{i}.x_block", is_last_text=False)
    weights.linear("final_layer.linear", 4 * LATENT, WIDTH)
    weights.linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    return weights


def vae_block(weights: Weights, name: str, inner: int, outer: int) -> None:
    """Add a residual block from `inner` to `outer` channels."""
    weights.norm(f"{name}.norm1", inner)
    weights.linear(f"{name}.conv1", outer, inner, 3, 3)
    weights.norm(f"{name}.norm2", outer)
    weights.linear(f"{name}.conv2", outer, outer, 3, 3)
    if inner != outer:
        weights.linear(f"{name}.nin_shortcut", outer, inner, 1, 1)


def vae_middle(weights: Weights, name: str, width: int) -> None:
    vae_block(weights, f"{name}.block_1", width, width)
    vae_block(weights, f"{name}.block_2", width, width)
    weights.norm(f"{name}.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        weights.linear(f"{name}.attn_1.{part}", width, width, 1, 1)


def autoencoder() -> Weights:
    """Return SD3's autoencoder, with the names of the single file."""
    weights = Weights()
    bottom, top = WIDTHS[0], WIDTHS[-1]
    weights.linear("encoder.conv_in", bottom, 3, 3, 3)
    vae_middle(weights, "encoder.mid", top)
    weights.norm("encoder.norm_out", top)
    weights.linear("encoder.conv_out", 2 * LATENT, top, 3, 3)
    weights.linear("decoder.conv_in", top, LATENT, 3, 3)
    vae_middle(weights, "decoder.mid", top)
    weights.norm("decoder.norm_out", bottom)
    weights.linear("decoder.conv_out", 3, bottom, 3, 3)
    last = len(WIDTHS) - 1
    for level, width in enumerate(WIDTHS):
        inner = WIDTHS[max(level - 1, 0)]
        for j in range(BLOCKS):
            vae_block(weights, f"encoder.down.{level}.block.{j}", inner, width)
            inner = width
        inner = WIDTHS[min(level + 1, last)]
        for j in range(BLOCKS + 1):
            vae_block(weights, f"decoder.up.{level}.block.{j}", inner, width)
            inner = width
        if level < last:
            weights.linear(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
        if level > 0:
            weights.linear(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    return weights


# ------------------------------------------------------------------------------------------ files

def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as float8, half the size of float16.  Expected outputs use these rounded
    values."""
    return {name: x.to(torch.float8_e4m3fn).contiguous() for name, x in tensors.items()}


def in_float32(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.float() for name, x in tensors.items()}


def copy_reference(reference: Path) -> None:
    """Copy the release, and the names and shapes of the published files."""
    for folder in ("release", "sd3_folder"):
        shutil.rmtree(FIXTURES / folder, ignore_errors=True)
    for part in ("transformer", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(reference / "dual_diff_release" / part, FIXTURES / "release" / part)
    keys = json.loads((reference / "full_size_keys.json").read_text())
    compact = json.dumps(keys, separators=(",", ":")).encode()
    (FIXTURES / "full_size_keys.json.gz").write_bytes(gzip.compress(compact, mtime=0))


def write_single_file(transformer: dict[str, Tensor], vae: dict[str, Tensor]) -> None:
    """Write SD3's single file, with a tensor of CLIP, which the project leaves out."""
    clip = "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight"
    tensors = {clip: torch.ones(8, dtype=torch.float16)}
    tensors |= {f"model.diffusion_model.{name}": x for name, x in transformer.items()}
    tensors |= {f"first_stage_model.{name}": x for name, x in vae.items()}
    save_file(tensors, FIXTURES / "sd3.safetensors")


def write_part(part: str, tensors: dict[str, Tensor], kind: str, config: dict) -> None:
    """Write a part of SD3's folder, as diffusers does."""
    folder = FIXTURES / "sd3_folder" / part
    folder.mkdir(parents=True)
    save_file(rounded(tensors), folder / "diffusion_pytorch_model.safetensors",
              metadata={"format": "pt"})
    text = json.dumps(dict(_class_name=kind, **config), indent=1)
    (folder / "config.json").write_text(text)


def compute_sd3(transformer: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Write the folder's transformer, and add diffusers' velocity to `expected`."""
    model = SD3Transformer2DModel(**SD3_CONFIG).eval()
    named = convert_sd3_transformer_checkpoint_to_diffusers(in_float32(transformer))
    model.load_state_dict(named, strict=True)
    # diffusers adds the pooled branch's biases to the time; "pooled embedding zero" needs all zero
    for parameter in model.time_text_embed.text_embedder.linear_2.parameters():
        parameter.zero_()
    x = expected["ddit.latents"][:, :, :12, :16].contiguous()
    no_pooled = torch.zeros(2, POOLED)
    expected["sd3.latents"] = x
    expected["sd3.velocity"] = model(x, expected["ddit.context"], no_pooled,
                                     1000 * expected["ddit.t"]).sample
    write_part("transformer", named, "SD3Transformer2DModel", SD3_CONFIG)


def compute_vae(vae: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Write the folder's autoencoder, and add diffusers' latents and image to `expected`."""
    model = AutoencoderKL(**VAE_CONFIG).eval()
    named = convert_ldm_vae_checkpoint(in_float32(vae), VAE_CONFIG)
    model.load_state_dict(named, strict=True)
    image = torch.rand(1, 3, 24, 32) * 2 - 1
    z = torch.randn(1, LATENT, 12, 16)
    posterior = model.encode(image).latent_dist
    expected["vae.image"] = image
    expected["vae.z"] = z
    expected["vae.mean"] = posterior.mean
    expected["vae.logvar"] = posterior.logvar
    expected["vae.latent"] = (posterior.mean - SHIFT) * SCALE
    expected["vae.decoded"] = model.decode(z / SCALE + SHIFT).sample
    write_part("vae", named, "AutoencoderKL", VAE_CONFIG)


@torch.no_grad()
def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("reference", type=Path)
    reference = parser.parse_args().reference
    copy_reference(reference)
    expected = {name: x for name, x in load_file(reference / "expected.safetensors").items()
                if name.startswith(COPIED)}
    torch.manual_seed(0)
    transformer, vae = rounded(sd3()), rounded(autoencoder())
    write_single_file(transformer, vae)
    compute_sd3(transformer, expected)
    compute_vae(vae, expected)
    contiguous = {name: x.contiguous() for name, x in expected.items()}
    save_file(contiguous, FIXTURES / "expected.safetensors")


if __name__ == "__main__":
    cli.run(main)
