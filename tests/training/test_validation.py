"""training/validation.py and gradient_meter.py: what is measured is always the same, and is what the formulas say."""

import itertools
import json
import math
from functools import partial

import pytest
import torch
from torch import nn

import mask_diffusion
import train
from helpers import Forked, rows, to_the_end
from training import gradient_meter
from training.validation import BINS, Validation, spread

FLAGS = ["--image-batch", 4, "--text-batch", 4, "--dtype", "float32", "--log-every", 1, "--sample-every", 0,
         "--warmup", 2, "--device", "cpu", "--optimizer", "adamw", "--lr", 2e-4, "--eval-every", 2,
         "--meter-every", 2, "--steps", 4]


def measured(out):
    return [row for row in rows(out) if "val_nats" in row]


@pytest.fixture(scope="module")
def alone(tiny, small_tar, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    train.main(list(map(str, ["--init", tiny, "--image-data", small_tar, *FLAGS, "--out", out])))
    return out


def test_times_are_spread_evenly_over_ten_bins():
    for size in (10, 24, 160):
        t = spread(list(range(size)), size)
        assert torch.equal((t * BINS).long(), torch.arange(size) % BINS) and 0 < t.min() and t.max() < 1
        assert len(t.unique()) == size
    assert abs(float(spread(list(range(1000)), 1000).mean()) - 0.5) < 1e-6


def test_a_validation_is_the_formulas_on_a_model_that_is_known():
    """Every token of the vocabulary of 4 is equally likely: log 4 nats at each masked position."""
    class Words:
        end_id = 3

        pad_id = 3

        class bpe:
            def decode(ids):
                return "ab" * len(ids)

    class Samples:
        def shown(self, count, held, captioned):
            return [dict(number=i) for i in range(min(count, 7))]

    def make(samples, generators, times):
        uniform = torch.stack([torch.rand(6, generator=generator) for generator in generators])
        ids = torch.tensor([[sample["number"] % 3, 1, 2, 3, 3, 3] for sample in samples])
        at = torch.arange(6).expand(len(samples), 6)
        return dict(ids=ids, frozen=at < 1, t=times, uniform=uniform)

    def errors(batch):
        masked = (batch["uniform"] < batch["t"][:, None]) & ~batch["frozen"]
        assert torch.equal(masked.sum(1), (batch["t"] * 5).round())      # exactly so many of five
        return math.log(4) * masked.sum(1) / batch["t"]
    validation = Validation(dict(image=Samples(), text=Samples()), dict(image=make, text=make), Words(), 40)
    found = validation.measure(dict(image=lambda batch: batch["t"], text=errors), 0, 1)
    assert found["val_text_t"] == pytest.approx([math.log(4)] * BINS, abs=1e-5)
    assert found["val_image_t"] == pytest.approx([(b + 0.5) / BINS for b in range(BINS)], abs=1e-5)
    assert found["val_image"] == pytest.approx(0.5, abs=1e-5)
    # five tokens are not frozen, two of them words, of four bytes: no chance is left in the bound
    assert found["val_nats"] == pytest.approx(math.log(4), abs=1e-5)
    assert found["val_bits"] == pytest.approx(5 * 2 / 4, abs=1e-5)
    part = partial(validation.measure, dict(image=lambda batch: batch["t"], text=errors))
    parts = [part(rank, 3) for rank in range(3)]                 # each times three, for want of the others
    assert sum(part["val_image"] for part in parts) / 3 == pytest.approx(found["val_image"], abs=1e-5)


def test_a_perfect_models_value_is_the_entropy():
    """Texts "a ... a", of 0 to 3 a's as likely, in four positions, the rest the end and padding, one token.

    A perfect model knows which lengths fit what is seen.  Enumerated over lengths, levels and masks the bound
    is log 4 nats a text; its padding left out it would be less."""
    L, A, END = 4, 0, 1
    texts = torch.tensor([[A] * k + [END] * (L - k) for k in range(L)])

    def perfect(ids, at):
        """log p of each token at the positions `at` out of B x L; the mask is token 2."""
        found = []
        for place in at.tolist():
            row, i = divmod(place, L)
            fits = torch.stack([(ids[row] == 2) | (ids[row] == text) for text in texts]).all(1)
            share = (texts[fits, i] == A).double().mean()
            found.append(torch.stack([share, 1 - share, torch.tensor(0.0)]).log())
        return torch.stack(found)

    class Words:
        end_id = pad_id = END

        class bpe:
            def decode(ids):
                return "a" * len(ids)

    class Samples:
        def shown(self, count, held, captioned):
            return [dict(number=i) for i in range(count)]

    orders = list(itertools.permutations(range(L)))              # the first l of an order are masked
    count = L * len(orders) * L                                  # texts x orders x levels, each once

    def make(samples, generators, times):
        cases = [divmod(sample["number"], L * len(orders)) for sample in samples]
        ids = torch.stack([texts[k] for k, _ in cases])
        uniform = torch.tensor([[orders[rest // L].index(i) / L for i in range(L)] for _, rest in cases])
        t = torch.tensor([(rest % L + 1) / L - 1e-6 for _, rest in cases])        # l = 1 .. 4
        return dict(ids=ids, frozen=torch.zeros_like(ids, dtype=torch.bool), t=t, uniform=uniform)

    def errors(batch):
        return mask_diffusion.errors(perfect, batch["ids"], 2, t=batch["t"], uniform=batch["uniform"],
                                     picks=True)
    validation = Validation(dict(text=Samples()), dict(text=make), Words(), count)
    found = validation.measure(dict(text=errors), 0, 1)
    assert L * found["val_nats"] == pytest.approx(math.log(4), abs=1e-4)


def test_the_same_weights_measure_the_same_and_a_run_goes_on_with_its_curve(alone, tiny, small_tar, tmp_path):
    assert [row["step"] for row in measured(alone)] == [2, 4]
    first, last = measured(alone)
    assert first["val_image"] != last["val_image"]
    assert len(last["val_image_t"]) == len(last["val_text_t"]) == BINS
    flags = list(map(str, ["--init", tiny, "--image-data", small_tar, *FLAGS, "--ema", 1, "--lr", 1e-12]))
    train.main([*flags, "--out", str(tmp_path / "still")])
    one, two = measured(tmp_path / "still")
    assert {name: one[name] for name in one if name.startswith("val")} == {
        name: two[name] for name in two if name.startswith("val")}


def test_two_processes_measure_what_one_does(alone, tiny, small_tar, tmp_path):
    to_the_end(Forked(2, "--init", tiny, "--image-data", small_tar, *FLAGS, "--out", tmp_path / "run"))
    found = measured(tmp_path / "run")
    for a, b in zip(found, measured(alone), strict=True):
        names = [name for name in a if name.startswith(("val_", "meter_"))]
        assert len(names) == 9 and a.keys() == b.keys()
        for name in names:
            assert torch.allclose(torch.tensor(a[name]), torch.tensor(b[name]), rtol=1e-4, atol=1e-5), name


def test_the_meter_is_norms_and_cosines_of_two_gradients():
    model = nn.ModuleDict(dict(mmdit=nn.Module(), embedding=nn.Linear(2, 1, bias=False)))
    model["mmdit"].blocks = nn.ModuleList([nn.Linear(2, 1, bias=False) for _ in range(2)])
    for p in model.parameters():
        nn.init.ones_(p)
    first, second, other = (*model["mmdit"].blocks, model["embedding"])
    image = lambda: first(torch.tensor([3.0, 4.0])) + second(torch.tensor([1.0, 0.0]))
    text = lambda: first(torch.tensor([-8.0, 6.0])) + second(torch.tensor([2.0, 0.0])) + other(torch.ones(2))
    image().backward()
    before = gradient_meter.gradients(model)
    text().backward()
    found = gradient_meter.compare(model, before)
    assert found["meter_blocks"] == [[5.0, 10.0, 0.0], [1.0, 2.0, 1.0]]
    assert found["meter_image"] == pytest.approx(math.sqrt(26), abs=1e-5)
    assert found["meter_text"] == pytest.approx(math.sqrt(106), abs=1e-5)
    assert found["meter_cosine"] == pytest.approx(2 / math.sqrt(26 * 106), abs=1e-5)
    model.zero_grad()
    (image() / 2).backward()
    before = gradient_meter.gradients(model)
    (image() / 2).backward()                                     # the same loss twice
    assert gradient_meter.compare(model, before)["meter_cosine"] == pytest.approx(1, abs=1e-6)


def test_a_look_at_the_gradients_changes_no_step(alone, tiny, small_tar, tmp_path):
    flags = ["--init", tiny, "--image-data", small_tar, *FLAGS, "--meter-every", 0, "--eval-every", 0]
    train.main([*map(str, flags), "--out", str(tmp_path / "run")])
    assert [(row["image_loss"], row["text_loss"], row["grad_norm"]) for row in rows(alone)] == [
        (row["image_loss"], row["text_loss"], row["grad_norm"]) for row in rows(tmp_path / "run")]
    both = rows(alone)[1]
    a, b, cosine, norm = (both[name] for name in ("meter_image", "meter_text", "meter_cosine", "grad_norm"))
    assert norm ** 2 == pytest.approx(a * a + b * b + 2 * a * b * cosine, rel=1e-4)
    assert len(both["meter_blocks"]) == 2 and json.dumps(both)
