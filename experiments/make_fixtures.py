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
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from common import cli

HERE = Path(__file__).parents[1] / "tests" / "fixtures"
COPIED = ("ddit.", "t2i.", "t5.", "euler.")


def linear(name: str, rows: int, *columns: int) -> dict[str, torch.Tensor]:
    fan = torch.tensor(columns).prod().item()
    return {f"{name}.weight": torch.randn(rows, *columns) / fan**0.5, f"{name}.bias": 0.1 * torch.randn(rows)}


def norm(name: str, width: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": 1 + 0.1 * torch.randn(width), f"{name}.bias": 0.1 * torch.randn(width)}


def sd3(depth: int = 3, D: int = 64, text: int = 64, size: int = 12, pooled: int = 32) -> dict[str,
                                                                                               torch.Tensor]:
    held = {"pos_embed": torch.randn(1, size * size, D)} | linear("x_embedder.proj", D, 16, 2, 2)
    for name, width in (("t_embedder", 256), ("y_embedder", pooled)):
        held |= linear(f"{name}.mlp.0", D, width) | linear(f"{name}.mlp.2", D, D)
    held |= linear("context_embedder", D, text)
    for i in range(depth):
        for stream in ("context_block", "x_block"):
            at = f"joint_blocks.{i}.{stream}"
            last = i == depth - 1 and stream == "context_block"
            held |= linear(f"{at}.attn.qkv", 3 * D, D) | linear(f"{at}.adaLN_modulation.1",
                                                                (2 if last else 6) * D, D)
            if not last:
                held |= linear(f"{at}.attn.proj", D, D) | linear(f"{at}.mlp.fc1", 4 * D,
                                                                 D) | linear(f"{at}.mlp.fc2", D, 4 * D)
    return held | linear("final_layer.linear", 64, D) | linear("final_layer.adaLN_modulation.1", 2 * D, D)


def autoencoder(widths=(32, 64), blocks: int = 1, latent: int = 16) -> dict[str, torch.Tensor]:
    def block(at, inner, outer):
        held = norm(f"{at}.norm1", inner) | linear(f"{at}.conv1", outer, inner, 3, 3)
        held |= norm(f"{at}.norm2", outer) | linear(f"{at}.conv2", outer, outer, 3, 3)
        return held | (linear(f"{at}.nin_shortcut", outer, inner, 1, 1) if inner != outer else {})

    def middle(at, width):
        held = block(f"{at}.block_1", width, width) | block(f"{at}.block_2", width,
                                                            width) | norm(f"{at}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            held |= linear(f"{at}.attn_1.{part}", width, width, 1, 1)
        return held
    top = widths[-1]
    held = linear("encoder.conv_in", widths[0], 3, 3, 3) | middle("encoder.mid",
                                                                  top) | norm("encoder.norm_out", top)
    held |= linear("encoder.conv_out", 2 * latent, top, 3, 3) | linear("decoder.conv_in", top, latent, 3, 3)
    held |= middle("decoder.mid", top) | norm("decoder.norm_out", widths[0]) | linear("decoder.conv_out", 3,
                                                                                      widths[0], 3, 3)
    for i, width in enumerate(widths):
        for j in range(blocks):
            held |= block(f"encoder.down.{i}.block.{j}", widths[max(i - 1, 0)] if j == 0 else width, width)
        above = widths[min(i + 1, len(widths) - 1)]
        for j in range(blocks + 1):
            held |= block(f"decoder.up.{i}.block.{j}", above if j == 0 else width, width)
        if i < len(widths) - 1:
            held |= linear(f"encoder.down.{i}.downsample.conv", width, width, 3, 3)
        if i > 0:
            held |= linear(f"decoder.up.{i}.upsample.conv", width, width, 3, 3)
    return held


def small(tensors: dict) -> dict:
    """Return the tensors as float8, half the size of float16.  Expected outputs use these rounded
    values."""
    return {name: tensor.to(torch.float8_e4m3fn).contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("reference", type=Path)
    reference = parser.parse_args().reference
    for folder in ("release", "sd3_folder"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    for part in ("transformer", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(reference / "dual_diff_release" / part, HERE / "release" / part)
    keys = json.dumps(json.loads((reference / "full_size_keys.json").read_text()), separators=(",", ":"))
    (HERE / "full_size_keys.json.gz").write_bytes(gzip.compress(keys.encode(), mtime=0))
    expected = {k: v for k, v in load_file(reference / "expected.safetensors").items()
                if k.startswith(COPIED)}

    torch.manual_seed(0)
    transformer, vae = small(sd3()), small(autoencoder())
    clip = {"text_encoders.clip_l.transformer.text_model.final_layer_norm.weight":
            torch.ones(8, dtype=torch.float16)}
    save_file(clip | {f"model.diffusion_model.{k}": v for k, v in transformer.items()}
              | {f"first_stage_model.{k}": v for k, v in vae.items()}, HERE / "sd3.safetensors")

    folder = HERE / "sd3_folder"
    config = dict(sample_size=8, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=64,
                  num_attention_heads=1,
                  joint_attention_dim=64, caption_projection_dim=64, pooled_projection_dim=32,
                  out_channels=16,
                  pos_embed_max_size=12)
    model = SD3Transformer2DModel(**config).eval()
    named = convert_sd3_transformer_checkpoint_to_diffusers({k: v.float() for k, v in transformer.items()})
    model.load_state_dict(named, strict=True)
    x, text, t = expected["ddit.latents"], expected["ddit.context"], expected["ddit.t"]
    x = x[:, :, :12, :16].contiguous()
    expected["sd3.latents"] = x
    # diffusers adds the pooled branch's biases to the time; "pooled embedding zero" needs all zero
    for parameter in model.time_text_embed.text_embedder.linear_2.parameters():
        parameter.zero_()
    expected["sd3.velocity"] = model(x, text, torch.zeros(2, 32), 1000 * t).sample
    (folder / "transformer").mkdir(parents=True)
    save_file(small(named), folder / "transformer" / "diffusion_pytorch_model.safetensors",
              metadata={"format": "pt"})
    (folder / "transformer" / "config.json").write_text(json.dumps(dict(_class_name="SD3Transformer2DModel",
                                                                        **config), indent=1))

    config = dict(in_channels=3, out_channels=3, block_out_channels=[32, 64], layers_per_block=1,
                  latent_channels=16,
                  norm_num_groups=32, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                  use_post_quant_conv=False, down_block_types=["DownEncoderBlock2D"] * 2,
                  up_block_types=["UpDecoderBlock2D"] * 2)
    model = AutoencoderKL(**config).eval()
    named = convert_ldm_vae_checkpoint({k: v.float() for k, v in vae.items()}, config)
    model.load_state_dict(named, strict=True)
    image, z = torch.rand(1, 3, 24, 32) * 2 - 1, torch.randn(1, 16, 12, 16)
    posterior = model.encode(image).latent_dist
    expected |= {"vae.image": image, "vae.z": z, "vae.mean": posterior.mean, "vae.logvar": posterior.logvar,
                 "vae.latent": (posterior.mean - 0.0609) * 1.5305,
                 "vae.decoded": model.decode(z / 1.5305 + 0.0609).sample}
    (folder / "vae").mkdir()
    save_file(small(named), folder / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (folder / "vae" / "config.json").write_text(json.dumps(dict(_class_name="AutoencoderKL", **config),
                                                           indent=1))
    save_file({k: v.contiguous() for k, v in expected.items()}, HERE / "expected.safetensors")


if __name__ == "__main__":
    cli.run(main)
