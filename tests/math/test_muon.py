"""training/muon.py against a singular value decomposition and torch's own Muon."""

import pytest
import torch

from training.muon import COEFFICIENTS, Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 40, 16), (2, 16, 40)])
def test_the_iteration_acts_on_the_singular_values_alone(shape):
    matrices = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    a, b, c = COEFFICIENTS
    s = S / S.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = a * s + b * s ** 3 + c * s ** 5
    expected = U @ torch.diag_embed(s) @ Vh
    assert torch.allclose(orthogonalize(matrices, torch.float64), expected, atol=1e-10)
    near_one = S > 0.01 * S[:, :1]
    assert s[near_one].min() > 0.6 and s[near_one].max() < 1.3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_dtype_is_that_of_the_products(dtype, tolerance):
    matrices = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0))
    found, exact = orthogonalize(matrices, dtype), orthogonalize(matrices, torch.float64)
    assert found.dtype == dtype and (found.double() - exact).abs().max() < tolerance


@pytest.mark.parametrize("rate", [float, torch.tensor])
def test_in_bfloat16_it_is_torchs_muon(rate):
    """Matrices of several shapes, gradients of full and of low rank, the learning rate a number or a tensor."""
    start = [torch.randn(shape) for shape in ((96, 96), (96, 64), (64, 96), (96, 96), (64, 96))]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    muon = Muon(ours, rate(0.01), weight_decay=0.1, dtype=torch.bfloat16)
    torchs = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step, rank in enumerate((8, 64, 64)):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(len(p), rank) @ torch.randn(rank, p.shape[1]) * 10 ** -step
            q.grad = p.grad.clone()
        muon.step()
        torchs.step()
    for p, q in zip(ours, theirs):
        assert torch.allclose(p, q, rtol=0, atol=1e-5)
        momenta = muon.state[p]["momentum_buffer"], torchs.state[q]["momentum_buffer"]
        assert torch.allclose(*momenta, atol=1e-6)


def test_an_update_is_as_large_as_adamws():
    """About 0.2 times the learning rate in each entry, whatever the shape and the size of the gradient."""
    for shape in ((32, 128), (128, 32), (64, 64)):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape) * 1e-4
        Muon([p], lr=1.0, weight_decay=0.0, dtype=torch.float32).step()
        assert float(p.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.25)
