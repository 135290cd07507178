"""Captioning against a loop in the manner of the published one, in turns: how much of its time ours takes.

    python tests/compare_captioning.py            # mid size, random weights, some minutes of two cores

Theirs: batch 1; at each of 128 steps T5, the whole transformer with both heads, and logits of all 128
positions, whether the step reveals a token or not. Ours: `reading.fill`. Depth 8, width 512, 256 image
tokens, T5 of six blocks. Random weights are sure of nothing, so that `threshold` is stood for by five
tokens a step, the share of evaluations that it needs on the shipped weights. Not part of the test run.
"""

import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import mask_diffusion  # noqa: E402
import reading  # noqa: E402
from model import MMDiT, MMDiTConfig  # noqa: E402
from t5 import T5Config, T5Encoder  # noqa: E402

LENGTH, STEPS, MASK = 128, 128, 32099
WAYS = {
    "the same walk": dict(refresh=1, order="random"),
    "the picture looked at once": dict(refresh=0, order="random"),
    "the same, five tokens a step": dict(refresh=0, order="confidence", per_step=5),
}


@torch.inference_mode()
def theirs(parts, latents: torch.Tensor) -> torch.Tensor:
    """MDLM's ancestral sampler as it is written: q(s | t) for all positions at each step, Gumbel's trick."""
    ids, clean = torch.full((1, LENGTH), MASK), torch.zeros(1)
    for step in range(STEPS):
        t, s = 1 - step / STEPS, 1 - (step + 1) / STEPS
        logits = mask_diffusion.forbid(parts.mmdit(latents, parts.text(ids), clean, need="both")[1], MASK)
        p = logits.double().softmax(-1) * (t - s) / t
        p[..., MASK] = s / t
        gumbel = 1e-10 - (torch.rand_like(p) + 1e-10).log()
        ids = torch.where(ids == MASK, (p / gumbel).argmax(-1), ids)
    return ids


def main(rounds: int = 5) -> None:
    torch.manual_seed(0)
    mmdit = MMDiT(MMDiTConfig(depth=8, heads=8, width=512, text_width=512)).eval().requires_grad_(False)
    t5 = T5Encoder(T5Config(depth=6, heads=8, width=512, hidden=1024)).eval().requires_grad_(False)
    tokenizer = SimpleNamespace(mask_id=MASK, end_id=1, pad_id=1)
    parts = SimpleNamespace(mmdit=mmdit, text=t5, device=torch.device("cpu"), tokenizer=tokenizer,
                            silent=True, defaults=dict(temperature=1.0, order="random", refresh=1))
    latents, found = torch.randn(1, 16, 32, 32), {name: [] for name in WAYS}
    for _ in range(rounds):
        begun = time.perf_counter()
        assert (theirs(parts, latents) != MASK).all()
        plain = time.perf_counter() - begun
        for name, how in WAYS.items():
            begun = time.perf_counter()
            reading.fill(parts, latents, torch.full((1, LENGTH), MASK), STEPS, **how)
            found[name].append((time.perf_counter() - begun) / plain)
    for name, ratios in found.items():
        print(f"{name}: {statistics.median(ratios):.2f} of its time ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
