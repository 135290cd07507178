"""training/plan.py: parameters, arithmetic and memory of a run before it starts."""

import re
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from model import MMDiT, MMDiTConfig
from training import plan

SMALL = MMDiTConfig(depth=3, heads=4, width=64, text_width=32, vocab_size=500)


@pytest.mark.parametrize("need, N", [("velocity", 16), ("logits", 16), ("logits", 8)])
def test_the_arithmetic_is_what_a_forward_pass_counts(need, N):
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        latents = torch.zeros(1, 16, 8, 8) if N == 16 else None
        masked = torch.arange(10) if need == "logits" else None  # half of the tokens, as in training
        MMDiT(SMALL).requires_grad_(False)(latents, torch.zeros(1, 20, 32), torch.zeros(1), need=need, at=masked)
    assert plan.sample_flops(SMALL, N, 20, need) == 3 * counter.get_total_flops()


def test_the_activations_are_what_autograd_keeps_of_the_whole_model():
    """Of four blocks less those of one, so that what stands before and behind them drops out."""
    kept = []
    for depth in (1, 4):
        model, held = MMDiT(replace(SMALL, depth=depth)).train(), {}
        x, text = torch.randn(2, 16, 8, 8), torch.randn(2, 20, 32)
        pack = lambda x: held.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            found = model(x, text, torch.rand(2))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(sum(size for place, size in held.items() if place not in weights))
        del found
    block = plan.block_activations(SMALL, 36, torch.float32, False)
    assert 3 * 2 * block == pytest.approx(kept[1] - kept[0], rel=0.05)


def test_a_plan_for_every_stage_of_both_variants(capsys):
    told = {}
    for preset, stages in (("sd3-medium", ["pretrain", "mask-emb"]), ("e2e-1.1b", ["text", "instruct"])):
        for stage in stages:
            train.main(["--preset", preset, "--stage", stage, "--print-plan", "64", "--micro-batch", "4"])
            told[stage] = capsys.readouterr().out
    assert "6,949.0 M, of which 2,102.8 M learn" in told["pretrain"]
    assert "and a [MASK] of 4096" in told["mask-emb"] and "T5's activations" in told["mask-emb"]
    assert "0 pictures and 2048 texts of 8 + 256 tokens: 540,672 tokens, 4 at once" in told["text"]
    assert "60,000 steps, 61.4 M samples" in told["pretrain"] and "TFLOP/s" in told["pretrain"]
    assert "autoencoder  " not in told["text"] and "T5   " not in told["instruct"]


def test_more_processes_micro_batches_and_recomputing_take_less_memory():
    def total(*flags):
        config = train.parse(["--preset", "sd3-medium", "--text-length", "64", *flags, "--print-plan", "8"])
        return sum(plan.memory(config, replace(SMALL, depth=8), None, None, 256, 8, True).values())
    micro, again = ["--micro-batch", "4"], ["--checkpoint-activations"]
    assert total(*micro, *again, "--shard", "zero3") < total(*micro, *again) < total(*micro) < total()
    assert total("--shard", "none", *micro) > total(*micro)


def test_days_follow_from_the_arithmetic(capsys):
    flags = ["--preset", "e2e-1.1b", "--image-batch", "8", "--text-batch", "8", "--print-plan", "8"]
    days = []
    for steps in (10**6, 2 * 10**6):
        train.main([*flags, "--steps", str(steps)])
        days.append(float(re.search(r"([\d.]+) days at 40% of 8 x 989 TFLOP/s", capsys.readouterr().out)[1]))
    assert days[1] == pytest.approx(2 * days[0], rel=0.01)
    train.main(["--print-plan"])
    assert "emoji, 1 GPU(s)" in capsys.readouterr().out


@pytest.mark.parametrize("flags, status, message", [
    (["--print-plan", "0"], 2, "--print-plan: expected a whole number, at least 1, got '0'"),
    (["--stage", "mask-emb", "--print-plan", "8"], 1, "--stage mask-emb: teaches T5's [MASK]"),
    (["--preset", "sd3-medium", "--pixels", "250", "--print-plan", "8"], 1, "a multiple of the patch, 16"),
])
def test_mistakes_get_one_line_and_a_status(flags, status, message, mistake):
    code, said = mistake(train.main, flags)
    assert code == status and message in said and len(said.splitlines()) == 1
