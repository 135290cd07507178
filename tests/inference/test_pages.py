"""viz/pages.py: attention is what it says, the network stays as it was, and a page fetches nothing."""

import base64
import json
import re

import pytest
import torch

from model import MMDiT, MMDiTConfig
from viz import attention, pages

N, L, K, H, D = 6, 5, 2, 2, 32
random = lambda seed, *shape: torch.randn(shape, generator=torch.Generator().manual_seed(seed))
Z, TEXT, T = random(1, 2, 3, 4, 6), random(2, 2, L, 16), torch.tensor([0.3])


@pytest.fixture(scope="module")
def mmdit():
    """Every weight random, so that nothing is hidden behind adaLN-zero."""
    model = MMDiT(MMDiTConfig(depth=K, heads=H, width=D, patch=2, channels=3, position_size=8,
                              position_base=8, text_width=16, vocab_size=50, qk_norm=True))
    for i, p in enumerate(model.requires_grad_(False).eval().parameters()):
        p.copy_(random(i, *p.shape) * 0.3)
    return model


def by_hand(block, img, txt, vec):
    """The whole joint attention (N + L, N + L) of the first row, mean over heads, head by head in float64."""
    vec, q, k = torch.nn.functional.silu(vec), [], []
    for stream, x in ((block.img, img), (block.txt, txt)):
        shift, scale = stream.modulation(vec).chunk(6, dim=-1)[:2]
        queries, keys, _ = stream.attention_input(x, shift, scale)
        q.append(queries[0].double()), k.append(keys[0].double())
    q, k = torch.cat(q), torch.cat(k)                                             # (N + L, H, d)
    powers = [(q[:, h] @ k[:, h].T / (D / H) ** 0.5).exp() for h in range(H)]
    return sum(power / power.sum(1, keepdim=True) for power in powers) / H


@pytest.mark.parametrize("need", ["both", "velocity", "logits"])
def test_what_is_kept_is_the_softmax_written_out_and_the_result_is_the_same_bit_for_bit(mmdit, need):
    inputs, listen = [], lambda _, args: inputs.append(args[:3])
    hooks = [block.register_forward_pre_hook(listen) for block in mmdit.blocks]
    plain = mmdit(Z, TEXT, T, need=need)
    [hook.remove() for hook in hooks]
    true = torch.stack([by_hand(block, *given) for block, given in zip(mmdit.blocks, inputs)])
    kept = dict(words=[], patches=[])
    for reads in kept:
        with attention.watching(mmdit, reads) as kept[reads]:
            watched = mmdit(Z, TEXT, T, need=need)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(plain, watched))
    words, patches = kept.values()
    assert (len(words), len(patches)) == (need != "logits", need != "velocity")
    for found, kept in [(x, true[:, :N, N:]) for x in words] + [(x, true[:, N:, :N]) for x in patches]:
        torch.testing.assert_close(found.double(), kept, atol=1e-3, rtol=0)      # float16 has 2^-11 of 1
        assert (found.float().sum(2) <= 1 + 1e-3).all()          # the rest of 1 goes to a token's own kind


def test_reading_beside_kept_keys_is_kept_too_and_evaluations_without_a_picture_are_not(mmdit):
    kept, plain = [], []
    mmdit(Z, TEXT, T, need="logits", kept=plain)
    expected = mmdit(Z, TEXT.flip(1), T, need="logits", kept=plain)[1]
    with attention.watching(mmdit, "patches") as found:
        mmdit(Z, TEXT, T, need="logits", kept=kept)
        mmdit(None, TEXT, T, need="logits")
        assert torch.equal(mmdit(Z, TEXT.flip(1), T, need="logits", kept=kept)[1], expected)
        mmdit(Z, TEXT.flip(1), T, need="logits", kept=kept)
    first, second, third = (maps[1:] for maps in found)         # of the second block
    assert first.shape == (1, L, N) and first.dtype == torch.float16 and first.device.type == "cpu"
    assert torch.equal(second, third) and not torch.equal(first, second)
    txt = mmdit.blocks[0].read(mmdit.txt_in(TEXT.flip(1)), *kept[0])
    q, k, _ = mmdit.blocks[1].txt.attention_input(txt, *kept[1][2].chunk(6, dim=-1)[:2])
    k = torch.cat([kept[1][0][0], k[0].transpose(0, 1)], 1)                             # (H, N + L, d)
    true = (q[0].transpose(0, 1) @ k.mT / (D / H) ** 0.5).softmax(-1).mean(0)[:, :N]
    torch.testing.assert_close(second[0].float(), true, atol=1e-3, rtol=0)


def test_an_exception_leaves_the_blocks_as_they_were(mmdit, monkeypatch):
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        with attention.watching(mmdit, "words"):
            mmdit(Z[..., 1:], TEXT, T)
    assert not any("attention" in vars(block) for block in mmdit.blocks)
    assert not mmdit._forward_hooks and not mmdit._forward_pre_hooks
    monkeypatch.setattr(attention, "NUMBERS", K * N * L - 1)          # as if these were millions: the mean alone
    with attention.watching(mmdit, "words") as found:
        mmdit(torch.cat([Z, Z]), torch.cat([TEXT, TEXT]), T)     # as under guidance
    assert found[0].shape == (1, N, L)


def data(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def drawn(side=64, grid=(8, 8), L=28, blocks=6, steps=28, **changes):
    noise = random(0, 2, 3, side, side)
    walk = [(1 - i / steps, *noise) for i in range(steps)] + [(0.0, noise[0], noise[0])]
    maps = [torch.rand(blocks, grid[0] * grid[1], L).half() / L for _ in range(steps)]
    return pages.drawing(**dict(prompt="a cat", words=[" a"] * L, steps=walk, attention=maps, grid=grid,
                               about=dict(seed=0)) | changes)


def test_a_drawing_is_small_fetches_nothing_shows_any_text_as_itself_and_has_every_step():
    evil = "</script><b>&amp; @data@ @script@"
    text = drawn(prompt=evil, words=[evil] + [" a"] * 26 + [""], about={"<i>": evil})
    assert len(text) < 2_000_000 and text.count("<button><img") == 29
    assert "http:" not in text and "https:" not in text and "default-src 'none'" in text
    assert set(re.findall(r'(?:src|href)="([^,"]*)', text)) == {"data:image/png;base64"}
    assert "<b>" not in text and "<i>" not in text and text.count("</script>") == 2
    assert "<h1>&lt;/script&gt;&lt;b&gt;&amp;amp; @data@ @script@</h1>" in text
    found = data(text)
    assert found["words"][0] == evil and len(found["words"]) == 27 and len(found["labels"]) == 29
    assert {len(base64.b64decode(map["bytes"])) for map in found["maps"]} == {6 * 27 * 64}
    assert "reduced" not in text and data(drawn(8, words=[""] * 28))["maps"] == []


def test_bytes_on_the_page_are_the_attention_and_pooling_keeps_its_mean_or_its_sum(monkeypatch):
    maps = [torch.rand(3, 4, 20 * 32).softmax(-1) ** 2, None]
    read = lambda map, K, N: (torch.tensor(list(base64.b64decode(map["bytes"]))).view(K, 4, N) / 255) ** 2 * (
        torch.tensor(map["scales"]).view(K, 1, 1))
    (found, none), grid, note = pages.packed(maps, (20, 32), "step")
    assert none is None and grid == (20, 32) and "reduced" not in note
    torch.testing.assert_close(read(found, 3, 640), maps[0], rtol=0, atol=float(maps[0].max()) / 250)
    monkeypatch.setattr(pages, "MOST", 3000)
    for per, total in (("step", "mean"), ("word", "sum")):
        (found, none), grid, note = pages.packed(maps, (20, 32), per)
        assert grid == (10, 16) and "the mean of the blocks, pooled from 20 x 32 to 10 x 16 patches" in note
        one, all = read(found, 1, 160), maps[0].mean(0, True)
        assert torch.allclose(getattr(one, total)(2), getattr(all, total)(2), rtol=0.02)
    large = drawn(300, (32, 32), L=256, blocks=1, steps=4)
    assert "reduced" in large and "data:image/webp" in large


def test_a_text_is_unmasked_in_the_order_in_which_it_was_written():
    maps = [None, torch.rand(2, 6), None, None]
    given = dict(picture=Z[0], pieces=["Q:", " a", " <b>", ""], revealed=[0, 3, 1, 1], grid=(2, 3), about={},
                 probability=[None, 0.5, 0.25, 1.0], attention=maps)
    found = data(text := pages.writing(**given))
    assert found["states"] == [[None] + ["[MASK]"] * 3, [None, "[MASK]", None, None], [None] * 4]
    assert found["labels"] == ["step 0 of 3, 3 masked", "step 1 of 3, 1 masked", "step 3 of 3, 0 masked"]
    assert found["known"][:2] == ["given", "step 3, probability 0.500"] and found["tints"][0] == ""
    assert found["words"] == ["Q:", "a", "<b>", ""] and "<b>" not in text
    assert [map is None for map in found["maps"]] == [True, False, True, True]
    assert "<img" not in pages.writing(**given | dict(picture=None, attention=[None] * 4))
