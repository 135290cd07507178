"""model.py: sizes, independence, gradients, and that it can learn."""

import time

import pytest
import torch
import torch.nn.functional as F

import flow
import mask_diffusion
from dataset import emoji
from dataset.images import fit_picture, read_picture, to_tensor
from dataset.webdataset import Tar
from model import (PRESETS, MMDiT, MMDiTConfig, TokenEmbedding, attention, position_table, timestep_embedding,
                   velocity_to)

TINY = MMDiTConfig(depth=2, heads=2, width=32, patch=2, channels=3, position_size=8, position_base=8,
                   text_width=16,
                   vocab_size=50, qk_norm=True, text_length=6)


def tiny(seed=0, **changes):
    """A tiny model with every weight random: as initialised, adaLN-zero would hide most of it."""
    torch.manual_seed(seed)
    model = MMDiT(MMDiTConfig(**(vars(TINY) | changes)))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def inputs(B=3, h=8, w=4, L=5):
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, h, w, generator=g), torch.randn(B, L, 16, generator=g), torch.rand(B,
                                                                                                generator=g)


def count(preset):
    with torch.device("meta"):
        config = MMDiTConfig(**PRESETS[preset])
        model = MMDiT(config)
        parts = [model] + [TokenEmbedding(config.vocab_size, config.text_length, config.text_width)] * bool(
            config.text_length)
    return sum(p.numel() for part in parts for p in part.parameters()), model.positions.numel()


def test_presets_have_their_published_sizes():
    assert count("sd3-medium") == (2_102_856_100, 192 * 192 * 1536)
    assert sum(count("sd3-medium")) == pytest.approx(2.16e9, rel=0.01)
    assert count("e2e-1.1b")[0] == pytest.approx(1.1e9, rel=0.02)
    assert MMDiTConfig(**PRESETS["e2e-1.1b"]).vocab_size == 50257 + 1
    assert count("emoji")[0] > 8e6


@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours():
    model, (x, text, t) = tiny(), inputs()
    velocity, logits = model(x, text, t)
    assert velocity.shape == x.shape and logits.shape == (3, 5, 50)
    for i in range(3):
        v, l = model(x[i:i + 1], text[i:i + 1], t[i:i + 1])
        assert torch.allclose(v[0], velocity[i], atol=1e-5) and torch.allclose(l[0], logits[i], atol=1e-5)
    flipped = model(x.flip(0), text.flip(0), t.flip(0))
    assert torch.allclose(flipped[0].flip(0), velocity, atol=1e-5)


@torch.no_grad()
def test_text_positions_are_told_apart_by_the_embedding_alone():
    """Attention has no order of its own: permuted text gives permuted logits and the same velocity."""
    model, (x, text, t) = tiny(), inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    velocity, logits = model(x, text, t)
    v, l = model(x, text[:, order], t)
    assert torch.allclose(l, logits[:, order], atol=1e-5) and torch.allclose(v, velocity, atol=1e-5)


@torch.no_grad()
def test_one_time_for_the_batch_equals_that_time_in_every_row():
    model, (x, text, _) = tiny(), inputs()
    shared, each = model(x, text, torch.tensor([0.3])), model(x, text, torch.full((3,), 0.3))
    assert torch.allclose(shared[0], each[0], atol=1e-6) and torch.allclose(shared[1], each[1], atol=1e-6)
    assert not torch.allclose(shared[0], model(x, text, torch.tensor([0.4]))[0], atol=1e-3)


@torch.no_grad()
def test_the_text_head_is_computed_in_float32_under_autocast():
    """Rounded to bf16, logits of 22 are off by up to 0.06 nats a token."""
    model, (x, text, t), hidden = tiny(), inputs(), []
    model.txt_out.register_forward_pre_hook(lambda module, given: hidden.append(given[0]))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x, text, t)[1]
    true = torch.nn.functional.linear(hidden[0].float(), model.txt_out.weight, model.txt_out.bias)
    assert logits.dtype == torch.float32 and torch.equal(logits, true)


@torch.no_grad()
def test_without_latents_there_are_logits_and_no_velocity():
    model, (x, text, _) = tiny(), inputs()
    velocity, logits = model(None, text, torch.zeros(1))
    assert velocity is None and logits.shape == (3, 5, 50)
    assert not torch.allclose(logits, model(x, text, torch.zeros(1))[1], atol=1e-3)


@torch.no_grad()
def test_asking_for_one_head_gives_the_same_numbers():
    model, (x, text, t) = tiny(), inputs()
    velocity, logits = model(x, text, t)
    v, none = model(x, text, t, need="velocity")
    assert none is None and torch.equal(v, velocity)
    none, l = model(x, text, t, need="logits")
    assert none is None and torch.equal(l, logits)


def test_logits_of_some_tokens_alone():
    model, (x, text, t), at = tiny(), inputs(), torch.tensor([0, 4, 5, 13])
    velocity, some = model(x, text, t, at=at)
    whole = model(x, text, t)
    assert torch.equal(velocity, whole[0])
    assert torch.allclose(some, whole[1].flatten(0, 1)[at], atol=1e-6)


def test_attention_written_out_is_torchs():
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found, kernels = attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert type(found.grad_fn) is not type(kernels.grad_fn) and torch.allclose(found, kernels, atol=1e-6)
    assert torch.equal(attention(*(x.detach() for x in (q, k, v))), kernels)


def test_gradients_reach_every_parameter_of_the_joint_loss():
    """All but null_image, which only text without an image uses; a key's bias has a zero gradient by
    softmax's shift invariance when q and k are not normalised, so present and finite is all that is asked."""
    model, embedding = tiny(), TokenEmbedding(50, 6, 16)
    x, _, _ = inputs()
    ids = torch.randint(0, 48, (3, 5), generator=torch.Generator().manual_seed(0))
    image = flow.loss(lambda x, t: model(x, embedding(ids), t)[0], x, torch.Generator().manual_seed(0))
    text = mask_diffusion.loss(lambda i: model(x, embedding(i), torch.zeros(1))[1], ids, 49,
                               generator=torch.Generator().manual_seed(0))
    (image + 0.2 * text).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == ["null_image"]
    assert embedding.token.weight.grad.abs().max() > 0 and embedding.position.weight.grad.abs().max() > 0
    mask_diffusion.loss(lambda i: model(None, embedding(i), torch.zeros(1))[1], ids, 49).backward()
    assert model.null_image.grad.abs().max() > 0


@torch.no_grad()
def test_positions_are_the_centre_of_the_table():
    model = tiny()
    table = position_table(32, 8, 8)
    assert torch.equal(model.crop_positions(4, 2), table[2:6, 3:5].reshape(8, 32))
    assert torch.equal(table[3, :, 16:], table[3, :1, 16:].expand(8, -1))  # a row's half is the row's alone
    assert torch.equal(table[:, 3, :16], table[:1, 3, :16].expand(8, -1))     # and a column's the column's
    with pytest.raises(ValueError, match="position table"):
        model(torch.zeros(1, 3, 18, 4), torch.zeros(1, 5, 16), torch.zeros(1))
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        model(torch.zeros(1, 3, 7, 4), torch.zeros(1, 5, 16), torch.zeros(1))


def test_time_is_embedded_in_float32_cosine_first():
    emb = timestep_embedding(torch.tensor([0.0, 0.501], dtype=torch.float64))
    assert emb.dtype == torch.float32 and emb[0].tolist() == [1.0] * 128 + [0.0] * 128
    angle = torch.tensor(501.0, dtype=torch.float64)
    assert float(emb[1, 0]) == pytest.approx(float(angle.cos()), abs=1e-4)
    assert float(emb[1, 128]) == pytest.approx(float(angle.sin()), abs=1e-4)


@torch.no_grad()
def test_a_new_model_starts_at_velocity_zero_and_qk_norm_changes_it():
    model, (x, text, t) = MMDiT(TINY), inputs()
    assert model(x, text, t)[0].abs().max() == 0
    plain = tiny(qk_norm=False)
    assert not any("_norm" in name for name, _ in plain.named_parameters())
    normed = tiny(qk_norm=True)
    normed.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(plain(x, text, t)[0], normed(x, text, t)[0], atol=1e-3)


def test_predicted_data_gives_the_velocity_that_leads_to_it():
    g = torch.Generator().manual_seed(0)
    x, noise = torch.rand(1000, 3, 4, 4, generator=g) * 2 - 1, torch.randn(1000, 3, 4, 4, generator=g)
    t = torch.rand(1000, generator=g) * 0.95 + 0.05
    x_t = lambda t: (1 - t.view(-1, 1, 1, 1)) * x + t.view(-1, 1, 1, 1) * noise
    # 2^-24 * 4 / 0.05 = 5e-6
    assert torch.allclose(velocity_to(x, x_t(t), t, 0.05), noise - x, atol=1e-5, rtol=0)
    assert flow.loss(lambda x_t, t: velocity_to(x, x_t, t, 0.05), x, t=t, noise=noise) < 1e-10
    low = torch.tensor([0.02])                                # under the floor the same direction, shorter
    assert torch.allclose(velocity_to(x, x_t(low), low, 0.05), 0.4 * (noise - x), atol=1e-5)
    assert velocity_to(x, x_t(low).bfloat16(), low.bfloat16(), 0.05).dtype == torch.float32


@torch.no_grad()
def test_a_model_that_predicts_data_differs_in_the_last_line_alone():
    (x, text, t), model, other = inputs(), tiny(), tiny(predicts="data")
    t[0] = 0.02
    data, logits = model(x, text, t)
    assert torch.equal(other.train()(x, text, t)[0], velocity_to(data, x, t, 0.05))
    assert torch.equal(other.eval()(x, text, t)[0], velocity_to(data, x, t, 0.001))
    assert torch.equal(other(x, text, t)[1], logits)
    shared, each = other(x, text, torch.tensor([0.3])), other(x, text, torch.full((3,), 0.3))
    assert torch.allclose(shared[0], each[0], atol=1e-5)
    half = other.bfloat16()(x, text.bfloat16(), t)[0]         # latents stay float32: only x itself is rounded
    exact = tiny(predicts="data").eval()(x, text, t)[0]
    assert half.dtype == torch.float32 and (half - exact).norm() < 0.02 * exact.norm()
    with pytest.raises(ValueError, match='predicts is \'noise\', expected "velocity" or "data"'):
        tiny(predicts="noise")


def eight_emoji():
    """The first eight pictures of the emoji set: (8, 3, 16, 16) in [-1, 1]."""
    return torch.stack([to_tensor(fit_picture(read_picture(files["webp"]), 16))
                        for _, (_, files) in zip(range(8), Tar(str(emoji.TAR)))])


# a velocity at 8x8 pixels; as in the emoji preset the clean picture
@pytest.mark.parametrize("make, changes, shift, rate, steps", [
    (lambda: torch.randn(8, 3, 8, 8).sign(), dict(width=64), 1.0, 4e-3, 320),
    (eight_emoji, dict(width=128, patch=4, predicts="data"), 2.0, 2e-3, 350)], ids=["velocity", "data"])
def test_a_tiny_model_learns_eight_pictures_and_captions_by_heart(make, changes, shift, rate, steps):
    started = time.time()
    torch.manual_seed(0)
    config = MMDiTConfig(**(vars(TINY) | dict(depth=2, heads=4, text_width=64, vocab_size=20) | changes))
    model, embedding = MMDiT(config), TokenEmbedding(20, 6, 64)
    x, ids = make(), torch.randint(0, 18, (8, 6))
    optimizer = torch.optim.AdamW([*model.parameters(), *embedding.parameters()], lr=rate, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        t, noise = flow.draw(tuple(x.shape), shift=shift)
        velocity = lambda x, t: model(x, embedding(ids), t, need="velocity")[0]
        image = flow.loss(velocity, x, t=t, noise=noise)
        text = mask_diffusion.loss(lambda i: model(x, embedding(i), torch.zeros(1), need="logits")[1], ids,
                                   19)
        (image + text).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model.eval()
        logits = lambda i: model(x, embedding(i), torch.zeros(1))[1]
        written = mask_diffusion.sample(logits, torch.full((8, 6), 19), 19, 6,
                                        torch.Generator().manual_seed(0), 0.0)
        assert (written == ids).float().mean() > 0.95
        drawn = flow.euler(lambda x, t: model(x, embedding(ids), t)[0], torch.randn_like(x),
                           flow.sigmas(20, shift))
        distances = torch.cdist(drawn.flatten(1), x.flatten(1))
        assert distances.argmin(1).tolist() == list(range(8))
        assert distances.diag().mean() < 0.5 * torch.pdist(x.flatten(1)).mean()     # no mixture of several
    assert time.time() - started < 60
