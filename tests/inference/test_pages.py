"""viz/attention.py and viz/pages.py: stored attention is exact, and pages fetch nothing."""

import base64
import json
import re

import pytest
import torch

from model import MMDiT, MMDiTConfig
from viz import attention, pages

# N image tokens (2 x 3 patches), L text tokens, K blocks, H heads, D width
N, L, K, H, D = 6, 5, 2, 2, 32


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LATENTS = random(1, 2, 3, 4, 6)
TEXT = random(2, 2, L, 16)
T = torch.tensor([0.3])


@pytest.fixture(scope="module")
def mmdit():
    """Return a network with random weights, since adaLN-zero would hide the attention."""
    model = MMDiT(MMDiTConfig(depth=K, heads=H, width=D, patch=2, channels=3, position_size=8,
                              position_base=8, text_width=16, vocab_size=50, qk_norm=True))
    for i, p in enumerate(model.requires_grad_(False).eval().parameters()):
        p.copy_(random(i, *p.shape) * 0.3)
    return model


def attention_by_hand(block, img, txt, vec):
    """Return the joint attention (N + L, N + L) of the first row, the mean of its heads."""
    vec = torch.nn.functional.silu(vec)
    queries, keys = [], []
    for stream, x in ((block.img, img), (block.txt, txt)):
        q, k, _ = stream.attention_input(x, stream.modulations(vec))
        queries.append(q[0].double())
        keys.append(k[0].double())
    q, k = torch.cat(queries, 1), torch.cat(keys, 1)                              # (H, N + L, d)
    total = torch.zeros(N + L, N + L, dtype=torch.float64)
    for h in range(H):
        power = (q[h] @ k[h].T / (D / H) ** 0.5).exp()
        total += power / power.sum(1, keepdim=True)
    return total / H


@pytest.mark.parametrize("need, read, image_rows", [
    ("both", attention.patches_to_words, True), ("velocity", attention.patches_to_words, True),
    ("both", attention.words_to_patches, False), ("logits", attention.words_to_patches, False)])
def test_stored_attention_is_the_softmax_by_hand(mmdit, need, read, image_rows):
    """The mean over heads is stored, and the network's result stays the same bit for bit."""
    inputs, hooks = [], []
    for block in mmdit.blocks:
        hooks.append(block.register_forward_pre_hook(lambda _, args: inputs.append(args[:3])))
    plain = mmdit(LATENTS, TEXT, T, need=need)
    for hook in hooks:
        hook.remove()
    expected = torch.stack([attention_by_hand(block, *args)
                            for block, args in zip(mmdit.blocks, inputs)])
    expected = expected[:, :N, N:] if image_rows else expected[:, N:, :N]
    with attention.storing_attention(mmdit):
        watched = mmdit(LATENTS, TEXT, T, need=need)
        maps = read(mmdit)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(plain, watched))
    assert maps.dtype == torch.float16 and maps.device.type == "cpu"
    # float16 has 2^-11 of 1
    torch.testing.assert_close(maps.double(), expected, atol=1e-3, rtol=0)
    assert (maps.float().sum(2) <= 1 + 1e-3).all()       # the rest is attention within a stream


def test_attention_to_cached_keys_is_stored(mmdit):
    _, plain_cache = mmdit.read_and_cache(LATENTS, TEXT, T)
    expected = mmdit.read_cached(TEXT.flip(1), plain_cache)
    with attention.storing_attention(mmdit):
        _, cache = mmdit.read_and_cache(LATENTS, TEXT, T)
        first = attention.words_to_patches(mmdit)
        logits = mmdit.read_cached(TEXT.flip(1), cache)
        second = attention.words_to_patches(mmdit)
    assert torch.equal(logits, expected)
    assert first.shape == second.shape == (K, L, N) and not torch.equal(first, second)
    txt = mmdit.blocks[0].read(mmdit.txt_in(TEXT.flip(1)), cache[0])
    keys, _, modulation = cache[1]
    q, k, _ = mmdit.blocks[1].txt.attention_input(txt, modulation)
    k = torch.cat([keys[0], k[0]], 1)                                             # (H, N + L, d)
    weights = (q[0] @ k.mT / (D / H) ** 0.5).softmax(-1).mean(0)
    # float16 has 2^-11 of 1
    torch.testing.assert_close(second[1].float(), weights[:, :N], atol=1e-3, rtol=0)


def test_an_exception_ends_the_storing(mmdit):
    with pytest.raises(ValueError, match="multiple of the patch"):
        with attention.storing_attention(mmdit):
            mmdit(LATENTS[..., 1:], TEXT, T)
    assert not any(block.stores_attention for block in mmdit.blocks)
    assert all(block.stored_attention is None for block in mmdit.blocks)


def test_a_block_with_an_extra_image_token_stores_it_too(mmdit, monkeypatch):
    """Simulate a register token that is added after the patches and dropped before the head."""
    embed, head = mmdit.embed, mmdit.velocity_head

    def embed_with_register(latents, text, t):
        img, txt, vec = embed(latents, text, t)
        return torch.cat([img, torch.ones_like(img[:, :1])], 1), txt, vec
    monkeypatch.setattr(mmdit, "embed", embed_with_register)
    monkeypatch.setattr(mmdit, "velocity_head", lambda img, *more: head(img[:, :N], *more))
    with attention.storing_attention(mmdit):
        mmdit(LATENTS, TEXT, T)
        assert attention.patches_to_words(mmdit).shape == (K, N + 1, L)
        assert attention.words_to_patches(mmdit).shape == (K, L, N + 1)


# -------------------------------------------------------------------------------------- the pages

def page_data(text):
    """Return the JSON that a page holds."""
    return json.loads(re.search(
        r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def drawing_page(side=64, grid=(8, 8), tokens=28, blocks=6, steps=28, **changes):
    noise = random(0, 2, 3, side, side)
    states = [(1 - i / steps, *noise) for i in range(steps)] + [(0.0, noise[0], noise[0])]
    maps = [torch.rand(blocks, grid[0] * grid[1], tokens).half() / tokens for _ in range(steps)]
    arguments = dict(prompt="a cat", words=[" a"] * tokens, steps=states, attention=maps, grid=grid,
                     about=dict(seed=0))
    return pages.drawing(**arguments | changes)


def test_a_drawings_page_is_small_and_has_every_step():
    text = drawing_page(words=[" a"] * 27 + [""])                # the end token is not shown
    assert len(text) < 2_000_000 and text.count("<button><img") == 29
    data = page_data(text)
    assert len(data["words"]) == 27 and len(data["labels"]) == 29
    assert {len(base64.b64decode(entry["bytes"])) for entry in data["maps"]} == {6 * 27 * 64}
    assert "reduced" not in text and page_data(drawing_page(8, words=[""] * 28))["maps"] == []


def test_a_page_fetches_nothing_and_escapes_every_text():
    evil = "</script><b>&amp; @data@ @script@"
    text = drawing_page(8, (2, 2), steps=2, prompt=evil, words=[evil] + [" a"] * 27,
                        about={"<i>": evil})
    assert "http:" not in text and "https:" not in text and "default-src 'none'" in text
    assert set(re.findall(r'(?:src|href)="([^,"]*)', text)) == {"data:image/png;base64"}
    assert "<b>" not in text and "<i>" not in text and text.count("</script>") == 2
    assert "<h1>&lt;/script&gt;&lt;b&gt;&amp;amp; @data@ @script@</h1>" in text
    assert page_data(text)["words"][0] == evil


def unpack(entry, blocks, patches):
    """Decode a page's bytes to attention (blocks, 4, patches)."""
    values = torch.tensor(list(base64.b64decode(entry["bytes"]))).view(blocks, 4, patches)
    return (values / 255) ** 2 * torch.tensor(entry["scales"]).view(blocks, 1, 1)


@pytest.fixture
def maps():
    """Return random attention of three blocks and four words to 20 x 32 patches."""
    return torch.rand(3, 4, 20 * 32, generator=torch.Generator().manual_seed(0)).softmax(-1) ** 2


def test_a_pages_bytes_are_the_attention(maps):
    (entry, none), grid, note = pages.packed([maps, None], (20, 32), "step")
    assert none is None and grid == (20, 32) and "reduced" not in note
    # A byte is off by 1/510, and its square by up to 1/255 of the greatest.
    torch.testing.assert_close(unpack(entry, 3, 640), maps, rtol=0, atol=float(maps.max()) / 250)


@pytest.mark.parametrize("per, reduce", [("step", torch.mean), ("word", torch.sum)])
def test_pooling_keeps_a_steps_mean_and_a_words_sum(maps, monkeypatch, per, reduce):
    monkeypatch.setattr(pages, "MOST", 3000)
    (entry, _), grid, note = pages.packed([maps, None], (20, 32), per)
    assert grid == (10, 16) and "reduced" in note and "20 x 32" in note and "10 x 16" in note
    pooled = unpack(entry, 1, 160)
    # 160 patches average most of the bytes' rounding
    assert torch.allclose(reduce(pooled, 2), reduce(maps.mean(0, True), 2), rtol=0.02)


def test_a_large_drawing_is_reduced():
    large = drawing_page(300, (32, 32), tokens=256, blocks=1, steps=2)
    assert "reduced" in large and "data:image/webp" in large


def test_a_texts_page_unmasks_tokens_in_the_order_of_writing():
    arguments = dict(image=LATENTS[0], pieces=["Q:", " a", " <b>", ""], revealed=[0, 3, 1, 1],
                     grid=(2, 3), about={}, probability=[None, 0.5, 0.25, 1.0],
                     attention=[None, torch.rand(2, 6), None, None])
    text = pages.writing(**arguments)
    data = page_data(text)
    assert data["states"] == [[None] + ["[MASK]"] * 3, [None, "[MASK]", None, None], [None] * 4]
    for label, step, masked in zip(data["labels"], (0, 1, 3), (3, 1, 0), strict=True):
        assert f"step {step} of 3" in label and f"{masked} masked" in label
    assert data["tooltips"][:2] == ["given", "step 3, probability 0.500"] and data["tints"][0] == ""
    assert data["words"] == ["Q:", "a", "<b>", ""] and "<b>" not in text
    assert [entry is None for entry in data["maps"]] == [True, False, True, True]
    assert "<img" not in pages.writing(**arguments | dict(image=None, attention=[None] * 4))
