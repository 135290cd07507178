"""Compare training/muon.py with a singular value decomposition and with torch's Muon."""

import pytest
import torch
from torch import nn

from helpers import seeded
from model import MMDiT, MMDiTConfig, TokenEmbedding
from training.config import TrainConfig
from training.muon import COEFFICIENTS, Muon, orthogonalize
from training.optimizers import make_optimizers


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 40, 16), (2, 16, 40)])
def test_iteration_changes_only_the_singular_values(shape):
    matrices = torch.randn(shape, dtype=torch.float64, generator=seeded(0))
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    a, b, c = COEFFICIENTS
    s = S / S.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = a * s + b * s ** 3 + c * s ** 5
    expected = U @ torch.diag_embed(s) @ Vh
    assert torch.allclose(orthogonalize(matrices, torch.float64), expected, atol=1e-10)  # float64
    large = S > 0.01 * S[:, :1]
    assert s[large].min() > 0.6 and s[large].max() < 1.3  # near 1; five steps leave 0.7 to 1.2


# the rounding of one product, amplified by five steps
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_products_are_in_the_given_dtype(dtype, tolerance):
    matrices = torch.randn(2, 48, 32, generator=seeded(0))
    output, exact = orthogonalize(matrices, dtype), orthogonalize(matrices, torch.float64)
    assert output.dtype == dtype and (output.double() - exact).abs().max() < tolerance


@pytest.mark.parametrize("number", [float, torch.tensor])
def test_bfloat16_steps_equal_torchs_muon(number):
    """Test gradients of low and full rank, and a learning rate as a number or a tensor."""
    generator = seeded(0)
    shapes = [(96, 96), (96, 64), (64, 96), (96, 96), (64, 96)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours = [nn.Parameter(x.clone()) for x in start]
    theirs = [nn.Parameter(x.clone()) for x in start]
    muon = Muon(ours, number(0.01), weight_decay=0.1, dtype=torch.bfloat16)
    torchs = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step, rank in enumerate((8, 64, 64)):
        for p, q in zip(ours, theirs):
            left = torch.randn(len(p), rank, generator=generator)
            right = torch.randn(rank, p.shape[1], generator=generator)
            p.grad = left @ right * 10 ** -step
            q.grad = p.grad.clone()
        muon.step()
        torchs.step()
    for p, q in zip(ours, theirs):
        # float32; weight decay alone moves an entry of 1 by 3e-3
        assert torch.allclose(p, q, rtol=0, atol=1e-5)
        momentum = muon.state[p]["momentum_buffer"]
        assert torch.allclose(momentum, torchs.state[q]["momentum_buffer"], atol=1e-6)


@pytest.mark.parametrize("shape", [(32, 128), (128, 32), (64, 64)])
def test_update_is_as_large_as_adamws(shape):
    """The update is about 0.2 times the learning rate in each entry, for any gradient size."""
    p = nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape, generator=seeded(0)) * 1e-4
    Muon([p], lr=1.0, weight_decay=0.0, dtype=torch.float32).step()
    size = float(p.detach().square().mean().sqrt())
    assert size == pytest.approx(0.2, rel=0.25)                  # singular values of 0.7 to 1.2


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_only_the_blocks_matrices_go_to_muon(optimizer):
    sizes = MMDiTConfig(depth=1, heads=1, width=8, patch=1, channels=1, position_size=2,
                        position_base=2, text_width=8, vocab_size=5, qk_norm=True, text_length=3)
    model = nn.ModuleDict(dict(mmdit=MMDiT(sizes), embedding=TokenEmbedding(5, 3, 8)))
    model["mmdit"].null_image.requires_grad_(False)
    config = TrainConfig(stage="pretrain", optimizer=optimizer, dtype="float32", weight_decay=0.03)
    expected = dict(AdamW=set(), Muon=set())
    for name, p in model.named_parameters():
        is_muons = optimizer == "muon" and name.startswith("mmdit.blocks.") and p.ndim == 2
        if p.requires_grad:
            expected["Muon" if is_muons else "AdamW"].add(name)
    names = {p: name for name, p in model.named_parameters()}
    held = dict(AdamW=set(), Muon=set())
    for instance in make_optimizers(model, config):
        [group] = instance.param_groups
        held[type(instance).__name__] = {names[p] for p in group["params"]}
        assert group["weight_decay"] == 0.03
    assert held == expected
