"""training/plan.py: a run's parameters, FLOPs and memory, computed before it starts."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from helpers import assert_lines
from model import PRESETS, MMDiT, MMDiTConfig
from pretrained.t5 import T5Block, T5Config
from pretrained.vae import VAEConfig
from training import plan
from training.muon import Muon
from training.optimizers import make_optimizers

SMALL = MMDiTConfig(depth=3, heads=4, width=64, text_width=32, vocab_size=500)


def small_memory(*flags, depth=8, gpu=True):
    """Return the memory of a small model on eight devices, by part."""
    config = train.parse(["--preset", "sd3-medium", "--text-length", "64", *flags,
                          "--print-plan", "8"])
    return plan.memory(config, replace(SMALL, depth=depth), None, None, 256, 8, gpu)


# --------------------------------------------------------------------------------------- arithmetic

@pytest.mark.parametrize("need, N", [("velocity", 16), ("logits", 16), ("logits", 0)])
def test_flops_of_a_sample_are_three_forward_passes(need, N):
    latents = torch.zeros(1, 16, 8, 8) if N == 16 else None
    masked = torch.arange(10) if need == "logits" else None  # half of the tokens, as in training
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        MMDiT(SMALL).requires_grad_(False)(
            latents, torch.zeros(1, 20, 32), torch.zeros(1), need=need, at=masked)
    assert plan.sample_flops(SMALL, N, 20, need) == 3 * counter.get_total_flops()


def test_packed_text_counts_the_null_image():
    flags = ["--preset", "e2e-1.1b", "--image-batch", "3", "--text-batch", "5", "--text-length", "20",
             "--image-data", "latents"]
    sizes = MMDiTConfig(**PRESETS["e2e-1.1b"])
    update = plan.work(train.parse(flags), sizes, 8, no_images=True)
    N = (256 // 16) ** 2
    flops = 3 * plan.sample_flops(sizes, N, 20, "velocity") + 5 * plan.sample_flops(sizes, 0, 20, "logits")
    assert update["tflop"] == pytest.approx(flops / 1e12)
    assert update["tokens"] == 3 * (N + 20) + 5 * (8 + 20) and update["samples"] == 8


def frozen_flops(stage, t5, vae):
    """Return the FLOPs for 8 images of 16 x 16 and 4 texts of 10 tokens; a quarter of the captions
    are dropped."""
    config = train.parse(["--preset", "sd3-medium", "--stage", stage, "--image-batch", "8",
                          "--text-batch", "4", "--text-dropout", "0.25", "--text-length", "10",
                          "--pixels", "16", "--print-plan", "8"])
    return plan.frozen_flops(config, t5, vae)


# 6 captions that are not dropped, and 4 texts of the text loss; mask-emb has a backward pass too
@pytest.mark.parametrize("stage, texts", [("pretrain", 6 + 4), ("mask-emb", 6 + 4 + 4)])
def test_flops_of_t5_are_those_worked_out_by_hand(stage, texts):
    L, width, inner, hidden = 10, 8, 2 * 6, 16
    linears = 4 * width * inner + 3 * width * hidden             # q, k, v, o; two gates, one output
    block = 2 * L * linears + 2 * 2 * L * L * inner              # scores, and sums of values
    t5 = T5Config(width=width, depth=3, heads=2, head=6, hidden=hidden)
    assert frozen_flops(stage, t5, None) == texts * 3 * block


def test_flops_of_the_autoencoder_are_those_worked_out_by_hand():
    large, small = 16 * 16, 8 * 8                                # positions of the two levels

    def convolution(inner, outer, positions, side=3):
        return 2 * side * side * inner * outer * positions
    image = convolution(3, 8, large)
    image += 2 * convolution(8, 8, large) + convolution(8, 8, small)         # level 1, halved
    image += convolution(8, 16, small) + convolution(16, 16, small)          # level 2
    image += convolution(8, 16, small, side=1)                               # its shortcut
    image += 4 * convolution(16, 16, small)  # two blocks in the middle
    image += 4 * convolution(16, 16, small, side=1) + 2 * 2 * small * small * 16     # attention
    image += convolution(16, 2 * 4, small)                                   # mean and variance
    vae = VAEConfig(widths=(8, 16), blocks=1, latent=4, groups=4)
    assert frozen_flops("pretrain", None, vae) == (8 + 4) * image


# ------------------------------------------------------------------------------------------- memory

def kept_bytes(module, *inputs):
    """Return the bytes that autograd keeps for the backward pass, without weights and inputs."""
    excluded = {x.untyped_storage().data_ptr() for x in (*module.parameters(), *inputs)}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage.nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = module(*inputs)  # kept alive, so that its memory isn't reused
    del result
    return sum(kept.values())


def test_block_activations_are_what_autograd_keeps():
    """Four blocks minus one block: the memory of the layers before and after them cancels."""
    x, text, t = torch.randn(2, 16, 8, 8), torch.randn(2, 20, 32), torch.rand(2)
    one, four = (kept_bytes(MMDiT(replace(SMALL, depth=depth)).train(), x, text, t)
                 for depth in (1, 4))
    block = plan.block_activations(SMALL, 36, torch.float32, False)
    assert 3 * 2 * block == pytest.approx(four - one, rel=0.05)  # the last block keeps less


class T5Blocks(nn.ModuleList):
    def forward(self, x, bias):
        for block in self:
            x = block(x, bias)
        return x


def test_t5_activations_are_what_autograd_keeps():
    """Four blocks minus one.  The plan may count the position bias, which they share, in each."""
    t5 = T5Config(width=64, heads=4, head=16, hidden=128)
    L = 40
    x, bias = torch.randn(1, L, t5.width, requires_grad=True), torch.zeros(1, t5.heads, L, L)
    one = T5Blocks([T5Block(t5)]).requires_grad_(False)
    four = T5Blocks(T5Block(t5) for _ in range(4)).requires_grad_(False)
    kept = (kept_bytes(four, x, bias) - kept_bytes(one, x, bias)) / 3
    block = plan.t5_activations(t5, L, torch.float32)
    assert 0.99 * kept < block < 1.01 * (kept + bias.nbytes)     # a parabola through three sizes


def test_sharding_micro_batches_and_recomputing_save_memory():
    def total(*flags):
        return sum(small_memory(*flags).values())
    micro = ["--micro-batch", "4"]
    recompute = ["--checkpoint-activations"]
    assert total(*micro, *recompute, "--shard", "zero3") < total(*micro, *recompute)
    assert total(*micro, *recompute) < total(*micro) < total()
    assert total("--shard", "none", *micro) > total(*micro)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_memory_is_two_moments_or_muons_one(optimizer):
    flags = ["--optimizer", optimizer, "--dtype", "float32", "--shard", "none"]
    model = nn.ModuleDict(dict(mmdit=MMDiT(SMALL)))
    moments = 0
    for part in make_optimizers(model, train.parse(flags)):
        each = 1 if isinstance(part, Muon) else 2
        moments += each * sum(p.numel() for p in part.param_groups[0]["params"])
    planned = small_memory(*flags, depth=SMALL.depth, gpu=False)["optimizer, float32"]
    # the plan counts one moment also for the blocks' biases, 2 % of their parameters
    assert planned == pytest.approx(4 * moments, rel=0.02)


# ---------------------------------------------------------------------------------------- the page

@pytest.fixture
def show_plan(monkeypatch, capsys):
    """Return a plan's printed page, with a made-up size of activations (measured above)."""
    monkeypatch.setattr(plan, "block_activations", lambda *args: 1e6)
    monkeypatch.setattr(plan, "t5_activations", lambda *args: 1e6)

    def show(*flags):
        train.main(list(flags))
        return capsys.readouterr().out
    return show


@pytest.mark.parametrize("preset, stage, present, absent", [
    ("sd3-medium", "pretrain",
     ["6,949.0 M", "2,102.8 M", "60,000 steps", "61.4 M samples", "TFLOP/s", "T5   ",
      "autoencoder  "], ["[MASK]", "T5's activations"]),
    ("sd3-medium", "mask-emb", ["[MASK] of 4096", "T5's activations"], []),
    ("e2e-1.1b", "text",
     ["1,071.4 M of them trained", "0 images", "2048 texts of 8 + 256 tokens", "540,672 tokens", "4 at once"],
     ["autoencoder  "]),
    ("e2e-1.1b", "instruct", ["autoencoder  "], ["T5   "]),
])
def test_plan_has_the_numbers_and_parts_of_its_stage(preset, stage, present, absent, show_plan):
    page = show_plan("--preset", preset, "--stage", stage, "--print-plan", "64",
                     "--micro-batch", "4")
    for text in present:
        assert text in page
    for text in absent:
        assert text not in page


def test_days_are_proportional_to_the_steps(show_plan):
    flags = ["--preset", "e2e-1.1b", "--image-batch", "8", "--text-batch", "8", "--print-plan", "8"]
    days = []
    for steps in ("1000000", "2000000"):
        page = show_plan(*flags, "--steps", steps)
        days.append(float(re.search(r"([\d.]+) days at 40% of 8 x 989 TFLOP/s", page)[1]))
    assert days[1] == pytest.approx(2 * days[0], rel=0.01)       # two decimals


def test_hsdp_shards_over_a_machine_or_over_half_of_a_single_one():
    def weights(gpus):
        config = train.parse(["--preset", "sd3-medium", "--shard", "hsdp", "--print-plan", str(gpus)])
        return plan.weight_memory(config, SMALL, gpus)["averaged weights, float32"]
    assert weights(1) == 4 * weights(8) == 8 * weights(16) == 8 * weights(64)


def test_a_stage_without_images_has_no_size_of_images(monkeypatch):
    """--init may be a run on larger images than the model's position table has patches of pixels."""
    monkeypatch.setattr(plan, "block_activations", lambda *args: 1e6)
    config = train.parse(["--preset", "e2e-1.1b", "--stage", "text", "--print-plan", "8"])
    assert "stage text" in plan.show(replace(config, pixels=512))


def test_plan_without_a_number_is_for_one_gpu(show_plan):
    assert "emoji, 1 GPU(s)" in show_plan("--print-plan")


@pytest.mark.parametrize("flags, status, names", [
    (["--print-plan", "0"], 2, ["--print-plan", "'0'"]),
    (["--stage", "mask-emb", "--print-plan", "8"], 1, ["--stage mask-emb", "--preset emoji"]),
    (["--preset", "sd3-medium", "--pixels", "250", "--print-plan", "8"], 1, ["--pixels 250", "16"]),
])
def test_mistakes_get_one_line_and_a_status(flags, status, names, run_program):
    code, error = run_program(train.main, flags)
    assert code == status
    assert_lines(error.splitlines(), names)
