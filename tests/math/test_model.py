"""model.py: sizes, independence of samples, gradients, and a test that it learns."""

import math

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import flow
import mask_diffusion
from dataset import emoji
from dataset.images import fit_image, read_image, to_tensor
from dataset.webdataset import Tar
from helpers import seeded
from model import (PRESETS, MMDiT, MMDiTConfig, TokenEmbedding, attention, position_table,
                   timestep_embedding, velocity_to)

TINY = MMDiTConfig(depth=2, heads=2, width=32, patch=2, channels=3, position_size=8,
                   position_base=8, text_width=16, vocab_size=50, qk_norm=True, text_length=6)
CLEAN = torch.zeros(1)                                           # the time of a clean image


def tiny_model(seed=0, **changes):
    """Return a tiny model with random weights everywhere: adaLN-zero would hide most of it."""
    torch.manual_seed(seed)
    model = MMDiT(MMDiTConfig(**(vars(TINY) | changes)))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def inputs(B=3, h=8, w=4, L=5):
    generator = seeded(1)
    latents = torch.randn(B, 3, h, w, generator=generator)
    text = torch.randn(B, L, 16, generator=generator)
    return latents, text, torch.rand(B, generator=generator)


# --------------------------------------------------------------------------------- sizes and inputs

def parameter_count(preset):
    """Return the number of a preset's parameters, and of values in its position table."""
    config = MMDiTConfig(**PRESETS[preset])
    with torch.device("meta"), checkpoint.Uninitialized():
        modules = [MMDiT(config)]
        if config.text_length:
            modules.append(TokenEmbedding(config.vocab_size, config.text_length, config.text_width))
    parameters = sum(p.numel() for module in modules for p in module.parameters())
    return parameters, modules[0].positions.numel()


def test_presets_have_their_published_sizes():
    parameters, positions = parameter_count("sd3-medium")
    assert (parameters, positions) == (2_102_856_100, 192 * 192 * 1536)
    assert parameters + positions == pytest.approx(2.16e9, rel=0.01)  # published as 2.16 B
    assert parameter_count("e2e-1.1b")[0] == pytest.approx(1.1e9, rel=0.02)  # published as 1.1 B
    assert MMDiTConfig(**PRESETS["e2e-1.1b"]).vocab_size == 50257 + 1
    assert parameter_count("emoji")[0] > 8e6


@torch.no_grad()
def test_positions_are_the_centre_of_the_table():
    table = position_table(32, 8, 8)
    assert torch.equal(tiny_model().crop_positions(4, 2), table[2:6, 3:5].reshape(8, 32))
    # 12 positions span 4 unit steps: position 7 lies at 7/3; the lowest frequency is 1
    scaled = position_table(32, 12, 4)
    assert float(scaled[5, 7, 0]) == pytest.approx(math.sin(7 / 3))
    assert float(scaled[5, 7, 16]) == pytest.approx(math.sin(5 / 3))
    # one half depends on the row only, the other on the column
    assert torch.equal(table[3, :, 16:], table[3, :1, 16:].expand(8, -1))
    assert torch.equal(table[:, 3, :16], table[:1, 3, :16].expand(8, -1))


@pytest.mark.parametrize("height, message", [(18, "9x2.*position"), (7, "7x4.*patch")])
def test_latents_of_a_wrong_size_are_refused(height, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(torch.zeros(1, 3, height, 4), torch.zeros(1, 5, 16), CLEAN)


def test_time_is_embedded_in_float32_cosine_first():
    embedding = timestep_embedding(torch.tensor([0.0, 0.501], dtype=torch.float64))
    assert embedding.dtype == torch.float32
    assert embedding[0].tolist() == [1.0] * 128 + [0.0] * 128
    angle = torch.tensor(501.0, dtype=torch.float64)
    # float32 holds an angle of 501 to 3e-5
    assert float(embedding[1, 0]) == pytest.approx(float(angle.cos()), abs=1e-4)
    assert float(embedding[1, 128]) == pytest.approx(float(angle.sin()), abs=1e-4)


# ------------------------------------------------- one forward pass; atol: float32 in another order

@torch.no_grad()
def test_row_does_not_depend_on_its_neighbours():
    model, (latents, text, t) = tiny_model(), inputs()
    velocity, logits = model(latents, text, t)
    assert velocity.shape == latents.shape and logits.shape == (3, 5, 50)
    for i in range(3):
        one_velocity, one_logits = model(latents[i:i + 1], text[i:i + 1], t[i:i + 1])
        assert torch.allclose(one_velocity[0], velocity[i], atol=1e-5)
        assert torch.allclose(one_logits[0], logits[i], atol=1e-5)


@torch.no_grad()
def test_permuted_text_gives_permuted_logits_and_the_same_velocity():
    """Attention does not depend on the order of tokens: only the embedding has positions."""
    model, (latents, text, t) = tiny_model(), inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    velocity, logits = model(latents, text, t)
    permuted_velocity, permuted_logits = model(latents, text[:, order], t)
    assert torch.allclose(permuted_logits, logits[:, order], atol=1e-5)
    assert torch.allclose(permuted_velocity, velocity, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("predicts", ["velocity", "data"])
def test_one_time_for_the_batch_equals_that_time_in_every_row(predicts):
    model, (latents, text, _) = tiny_model(predicts=predicts), inputs()
    shared = model(latents, text, torch.tensor([0.3]))
    for one, each in zip(shared, model(latents, text, torch.full((3,), 0.3))):
        assert torch.allclose(one, each, atol=1e-5 if predicts == "data" else 1e-6)
    other_velocity, _ = model(latents, text, torch.tensor([0.4]))
    assert not torch.allclose(shared[0], other_velocity, atol=1e-3)


@torch.no_grad()
def test_text_head_is_computed_in_float32_under_autocast():
    """Rounding logits of 22 to bfloat16 would change the loss by up to 0.06 nats per token."""
    model, (latents, text, t) = tiny_model(), inputs()
    hidden = []
    model.txt_out.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(latents, text, t)[1]
    expected = F.linear(hidden[0].float(), model.txt_out.weight, model.txt_out.bias)
    assert logits.dtype == torch.float32 and torch.equal(logits, expected)


@torch.no_grad()
def test_text_without_an_image_has_logits_and_no_velocity():
    model, (latents, text, _) = tiny_model(), inputs()
    velocity, logits = model(None, text, CLEAN)
    assert velocity is None and logits.shape == (3, 5, 50)
    assert not torch.allclose(logits, model(latents, text, CLEAN)[1], atol=1e-3)


@torch.no_grad()
def test_one_head_gives_the_same_numbers_as_both():
    model, args = tiny_model(), inputs()
    velocity, logits = model(*args)
    only_velocity, no_logits = model(*args, need="velocity")
    assert no_logits is None and torch.equal(only_velocity, velocity)
    no_velocity, only_logits = model(*args, need="logits")
    assert no_velocity is None and torch.equal(only_logits, logits)


@torch.no_grad()
def test_logits_of_some_tokens_are_those_of_the_whole():
    model, args = tiny_model(), inputs()
    at = torch.tensor([0, 4, 5, 13])
    velocity, logits = model(*args)
    same_velocity, some_logits = model(*args, at=at)
    assert torch.equal(same_velocity, velocity)
    assert torch.allclose(some_logits, logits.flatten(0, 1)[at], atol=1e-6)


@torch.no_grad()
def test_cached_image_stream_gives_the_same_logits():
    model, (latents, text, _) = tiny_model(), inputs()
    _, expected = model(latents, text, CLEAN, need="logits")
    logits, cache = model.read_and_cache(latents, text, CLEAN)
    assert torch.equal(logits, expected)
    assert torch.allclose(model.read_cached(text, cache), logits, atol=1e-5)      # float32


def test_attention_written_out_equals_torchs():
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=seeded(0)).requires_grad_()
    written_out, kernel = attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert type(written_out.grad_fn) is not type(kernel.grad_fn)
    assert torch.allclose(written_out, kernel, atol=1e-6)
    assert torch.equal(attention(q.detach(), k.detach(), v.detach()), kernel)


@torch.no_grad()
def test_new_model_predicts_zero_velocity():
    assert MMDiT(TINY)(*inputs())[0].abs().max() == 0


@torch.no_grad()
def test_new_blocks_are_the_identity():
    img, txt, vec = torch.randn(3, 2, 8, 32, generator=seeded(0))
    for block in MMDiT(TINY).blocks:
        new_img, new_txt = block(img, txt, vec[:, 0])
        assert torch.equal(new_img, img) and torch.equal(new_txt, txt)


@torch.no_grad()
def test_qk_norm_adds_parameters_and_changes_the_velocity():
    plain, normed = tiny_model(qk_norm=False), tiny_model(qk_norm=True)
    assert not any("_norm" in name for name, _ in plain.named_parameters())
    normed.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(plain(*inputs())[0], normed(*inputs())[0], atol=1e-3)


# ----------------------------------------------------------------------- a model that predicts data

def test_predicted_data_gives_the_velocity_that_leads_to_it():
    generator = seeded(0)
    x = torch.rand(1000, 3, 4, 4, generator=generator) * 2 - 1
    noise = torch.randn(1000, 3, 4, 4, generator=generator)
    t = torch.rand(1000, generator=generator) * 0.95 + 0.05

    def noised(t):
        t = t.view(-1, 1, 1, 1)
        return (1 - t) * x + t * noise
    # float32: 2^-24 * 4 / 0.05 = 5e-6
    assert torch.allclose(velocity_to(x, noised(t), t), noise - x, atol=1e-5, rtol=0)
    low = torch.tensor([4e-4])                                   # counts as 0.001
    velocity = velocity_to(x, noised(low), low)
    assert torch.allclose(velocity, 0.4 * (noise - x), atol=5e-4)
    assert velocity_to(x, noised(low).bfloat16(), low.bfloat16()).dtype == torch.float32


@torch.no_grad()
def test_data_model_differs_in_the_last_line_only():
    latents, text, t = inputs()
    t[0] = 4e-4                                                  # below the least divisor
    data, logits = tiny_model()(latents, text, t)
    model = tiny_model(predicts="data")
    for module in (model.train(), model.eval()):
        velocity, same_logits = module(latents, text, t)
        assert torch.equal(velocity, velocity_to(data, latents, t))
        assert torch.equal(same_logits, logits)


@torch.no_grad()
def test_bfloat16_data_model_keeps_latents_in_float32():
    latents, text, t = inputs()
    t[0] = 0.02
    exact, _ = tiny_model(predicts="data").eval()(latents, text, t)
    model = tiny_model(predicts="data").eval().bfloat16()
    velocity, _ = model(latents, text.bfloat16(), t)
    assert velocity.dtype == torch.float32
    assert (velocity - exact).norm() < 0.02 * exact.norm()       # bfloat16 holds the data to 2^-9


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="predicts.*noise"):
        tiny_model(predicts="noise")


# ----------------------------------------------------------------------------------------- training

def test_joint_loss_reaches_every_parameter_but_the_null_image():
    """Only text without an image uses null_image."""
    model, embedding = tiny_model(), TokenEmbedding(50, 6, 16)
    x, _, _ = inputs()
    ids = torch.randint(0, 48, (3, 5), generator=seeded(0))
    image_loss = flow.loss(lambda x, t: model(x, embedding(ids), t)[0], x, seeded(0))
    text_loss = mask_diffusion.loss(lambda ids: model(x, embedding(ids), CLEAN)[1], ids, 49,
                                    generator=seeded(0))
    (image_loss + 0.2 * text_loss).backward()
    has_gradient = lambda p: p.grad is not None and p.grad.abs().max() > 0
    silent = [name for name, p in model.named_parameters() if not has_gradient(p)]
    assert silent == ["null_image"]
    assert embedding.token.weight.grad.abs().max() > 0
    assert embedding.position.weight.grad.abs().max() > 0
    mask_diffusion.loss(lambda ids: model(None, embedding(ids), CLEAN)[1], ids, 49).backward()
    assert model.null_image.grad.abs().max() > 0


def random_signs():
    return torch.randn(8, 3, 8, 8).sign()


def eight_emoji():
    """Return the first eight images of the emoji set: (8, 3, 8, 8) in [-1, 1]."""
    images = []
    for _, files in Tar(str(emoji.TAR)):
        images.append(to_tensor(fit_image(read_image(files["webp"]), 8)))
        if len(images) == 8:
            return torch.stack(images)


@pytest.mark.parametrize("make_images, predicts, shift", [
    (random_signs, "velocity", 1.0), (eight_emoji, "data", 2.0)], ids=["velocity", "data"])
def test_tiny_model_memorises_eight_images_and_captions(make_images, predicts, shift):
    torch.manual_seed(0)
    sizes = dict(heads=4, width=64, patch=4, text_width=32, vocab_size=20, predicts=predicts)
    model = MMDiT(MMDiTConfig(**(vars(TINY) | sizes)))
    embedding = TokenEmbedding(20, 6, 32)
    images, ids = make_images(), torch.randint(0, 18, (8, 6))
    optimizer = torch.optim.AdamW([*model.parameters(), *embedding.parameters()], betas=(0.9, 0.99),
                                  fused=True)
    logits_fn = lambda ids: model(images, embedding(ids), CLEAN, need="logits")[1]
    copies = images.repeat(4, 1, 1, 1)  # four noise levels per image and step
    copied_ids = ids.repeat(4, 1)
    steps = 200
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 6e-3 * (1 - step / steps)
        t = flow.draw_times(len(copies), shift=shift)
        velocity = lambda x, t: model(x, embedding(copied_ids), t, need="velocity")[0]
        image_loss = flow.errors(velocity, copies, t, torch.randn_like(copies)).mean()
        (image_loss + mask_diffusion.loss(logits_fn, ids, 19)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        masked = torch.full((8, 6), 19)
        written = mask_diffusion.sample(logits_fn, masked, 19, 6, seeded(0), temperature=0.0)
        velocity = lambda x, t: model(x, embedding(ids), t, need="velocity")[0]
        drawn = flow.euler(velocity, torch.randn_like(images), flow.sigmas(20, shift))
    assert (written == ids).float().mean() > 0.95                # chance: 0.06
    distances = torch.cdist(drawn.flatten(1), images.flatten(1))
    assert distances.argmin(1).tolist() == list(range(8))
    between = torch.pdist(images.flatten(1)).mean()
    assert distances.diag().mean() < 0.5 * between  # usually 0.2; 0.9 for blends of several images
