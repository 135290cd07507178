"""Drawing against a loop in the manner of the published one, in turns: how much of its time ours takes.

    python tests/compare_drawing.py               # mid size, random weights, five minutes of two cores

Theirs: float32; at each of 28 steps both heads, 256 logits, a time and its modulation for each row. Ours:
`flow.euler` and `flow.guide` as in `drawing.drawings`. Depth 8, width 512, 256 image tokens, random states of
the prompt; compiled block by block before the clock starts. Not part of the test run.
"""

import copy
import statistics
import sys
import timeit
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import flow  # noqa: E402
from model import MMDiT, MMDiTConfig  # noqa: E402

STEPS, GUIDANCE, SHIFT = 28, 7.0, 3.0
SIZES = MMDiTConfig(depth=8, heads=8, width=512, text_width=512)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:      # theirs stays as it is
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def their_block(block, streams: list[Tensor], vec: Tensor) -> list[Tensor]:
    (B, N, D), sides, qkv = streams[0].shape, (block.img, block.txt), []
    mods = [side.modulation(F.silu(vec)).chunk(6, dim=-1) for side in sides]      # 2 of 6 of (B, D)
    for side, x, mod in zip(sides, streams, mods):
        x = modulate(F.layer_norm(x, (D,), eps=1e-6), *mod[:2])
        qkv.append(side.qkv(x).view(B, -1, 3, side.heads, D // side.heads).transpose(1, 3).unbind(2))
    y = F.scaled_dot_product_attention(*(torch.cat(pair, dim=2) for pair in zip(*qkv)))
    y, done = y.transpose(1, 2).flatten(2), []                                    # (B, N + L, D)
    for side, x, part, mod in zip(sides, streams, (y[:, :N], y[:, N:]), mods):
        x = x + mod[2].unsqueeze(1) * side.out(part)
        part = modulate(F.layer_norm(x, (D,), eps=1e-6), *mod[3:5])
        done.append(x + mod[5].unsqueeze(1) * side.fc2(F.gelu(side.fc1(part), approximate="tanh")))
    return done


def their_model(mmdit: MMDiT, latents: Tensor, text: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    (B, C, h, w), p, vec = latents.shape, SIZES.patch, mmdit.time_in(t)
    img = latents.view(B, C, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)
    streams = [mmdit.img_in(img) + mmdit.crop_positions(h // p, w // p), mmdit.txt_in(text)]
    for block in mmdit.blocks:
        streams = their_block(block, streams, vec)
    img, txt = (F.layer_norm(x, x.shape[-1:], eps=1e-6) for x in streams)
    img = mmdit.img_out(modulate(img, *mmdit.img_modulation(F.silu(vec)).chunk(2, dim=-1)))
    img = img.view(B, h // p, w // p, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, h, w)
    return img, mmdit.txt_out(txt)


@torch.no_grad()
def theirs(mmdit: MMDiT, noise: Tensor, states: Tensor) -> Tensor:
    x, levels = noise, flow.sigmas(STEPS, SHIFT)
    for t, s in zip(levels[:-1], levels[1:]):
        v_text, v_null = their_model(mmdit, torch.cat([x, x]), states, t.expand(2 * len(x)))[0].chunk(2)
        x = x + (s - t) * (v_null + GUIDANCE * (v_text - v_null))
    return x


@torch.no_grad()
def ours(mmdit: MMDiT, noise: Tensor, states: Tensor) -> Tensor:
    velocity = lambda x, t: mmdit(x, states, t, need="velocity")[0].float()
    return flow.euler(flow.guide(velocity, GUIDANCE), noise, flow.sigmas(STEPS, SHIFT))


def main(rounds: int = 3) -> None:
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64     # of one code: a graph per block, and one for the last
    plain = MMDiT(SIZES).eval().requires_grad_(False)
    for weight in plain.parameters():
        weight.any() or weight.normal_(std=0.02)  # zeros draw nothing
    clock = lambda draw, *args: timeit.timeit(lambda: draw(*args), number=1)      # s
    noise, states = torch.randn(1, 16, 32, 32), torch.randn(2, 256, SIZES.text_width)
    whole, ways = theirs(plain, noise, states), {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for how in ("", ", compiled"):
            mmdit, given = copy.deepcopy(plain).to(dtype), states.to(dtype)
            for block in mmdit.blocks if how else []:
                block.compile(dynamic=False)
            ways[name + how] = mmdit, given, []
            off = (ours(mmdit, noise, given) - whole).abs().max().item()          # and compiles
            assert off < (1e-3 if name == "float32" else 0.1), f"{name}{how}: latents are {off} off"
    for _ in range(rounds):
        plainly = clock(theirs, plain, noise, states)
        for mmdit, given, ratios in ways.values():
            ratios.append(clock(ours, mmdit, noise, given) / plainly)
    for name, (*_, found) in ways.items():
        print(f"{name}: {statistics.median(found):.2f} of its time ({min(found):.2f}-{max(found):.2f})")


if __name__ == "__main__":
    main()
