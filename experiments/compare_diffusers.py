"""Compare the forward time of our MMDiT with diffusers' SD3Transformer2DModel, in turns in one
process.

    python -m venv peers && peers/bin/pip install diffusers==0.42.1 transformers==5.23.0 torch safetensors
    peers/bin/python -m experiments.compare_diffusers

Both have 12 blocks of SD3-medium's width, and read 256 image and 128 text tokens, batch 2, on two
threads. diffusers' class is SD3, so we also skip what D-DiT adds, the last block's text stream and
the text head (need="velocity").  This is not part of the test run, since it needs packages that the
project does not need.
"""

import statistics

import torch
from diffusers import SD3Transformer2DModel

from common import cli
from experiments.turns import compare, time_in_turns
from model import MMDiT, MMDiTConfig


@torch.inference_mode()
def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(2)
    torch.manual_seed(0)
    theirs = SD3Transformer2DModel(sample_size=128, patch_size=2, in_channels=16, num_layers=12,
                                   attention_head_dim=64,
                                   num_attention_heads=24, joint_attention_dim=4096,
                                   caption_projection_dim=1536,
                                   pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=192).eval()
    ours = MMDiT(MMDiTConfig(depth=12)).eval()
    for dtype in (torch.float32, torch.bfloat16):
        theirs, ours = theirs.to(dtype), ours.to(dtype)
        x, text = torch.randn(2, 16, 32, 32, dtype=dtype), torch.randn(2, 128, 4096, dtype=dtype)
        pooled, t = torch.zeros(2, 2048, dtype=dtype), torch.full((2,), 0.5)
        jobs = dict(diffusers=lambda: theirs(x, text, pooled, 1000 * t),
                    velocity=lambda: ours(x, text, t, need="velocity"),
                    both=lambda: ours(x, text, t))
        time_in_turns(jobs, 1)                               # to warm up
        times = time_in_turns(jobs, repeats)
        for name in ("velocity", "both"):
            print(f"{dtype}: ours ({name}) / diffusers {compare(times[name], times['diffusers'])}, "
                  f"{repeats} rounds; ours {statistics.median(times[name]):.2f} s")


if __name__ == "__main__":
    cli.run(main)
