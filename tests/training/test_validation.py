"""training/validation.py and gradient_meter.py: repeatable results that equal their formulas."""

import itertools
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import checkpoint
import mask_diffusion
import train
from common import seeding
from helpers import Forked, rows, to_the_end
from training import gradient_meter
from training import reports
from training.batches import BatchMaker, TextBatch
from training.validation import BINS, SAMPLES, Validation, mean_by_bin, spread

BATCHES = ["--image-batch", 4, "--text-batch", 4, "--dtype", "float32", "--device", "cpu"]
FLAGS = [*BATCHES, "--log-every", 1, "--sample-every", 0, "--warmup", 2, "--optimizer", "adamw",
         "--lr", 2e-4, "--steps", 3, "--save-every", 3]
MEASURE = ["--eval-every", 2, "--meter-every", 2]


def validated_rows(out):
    return [row for row in rows(out) if "val_nats" in row]


@pytest.fixture(scope="module")
def single_run(tiny, small_tar, tmp_path_factory):
    """Train in one process, with validations after steps 2 and 3 and the meter at step 2."""
    out = tmp_path_factory.mktemp("single") / "run"
    flags = ["--init", tiny, "--image-data", small_tar, *FLAGS, *MEASURE, "--out", out]
    train.main(list(map(str, flags)))
    return out


# ------------------------------------------------------------------------------------ the formulas

class NumberedSamples:
    """A mixture of at most `most` samples, which are numbers."""

    def __init__(self, most):
        self.most = most

    def shown(self, count, held, captioned):
        return [dict(number=i) for i in range(min(count, self.most))]


def stub_tokenizer(end_id, token):
    """Return a tokenizer with an end token; all other tokens decode to the same text."""
    bpe = SimpleNamespace(decode=lambda ids: token * len(ids))
    return SimpleNamespace(end_id=end_id, pad_id=end_id, bpe=bpe)


def test_a_text_without_tokens_of_its_own_does_not_count():
    values = torch.arange(20.0)
    values[3] = math.nan                                         # 0 nats of 0 tokens
    assert mean_by_bin(values) == [5, 6, 7, 13, *range(9, 15)]


def test_times_are_spread_evenly_over_ten_bins():
    for size in (10, 24, 160):
        t = spread(list(range(size)), size)
        assert torch.equal((t * BINS).long(), torch.arange(size) % BINS)
        assert 0 < t.min() and t.max() < 1
        assert len(t.unique()) == size
    mean = float(spread(list(range(1000)), 1000).mean())
    assert mean == pytest.approx(0.5, abs=1e-6)                  # float32


def uniform_model_batch(samples, generators, times):
    """Return texts of six tokens: the first is frozen, the last three are end tokens."""
    uniform = torch.stack([torch.rand(6, generator=generator) for generator in generators])
    ids = torch.tensor([[sample["number"] % 3, 1, 2, 3, 3, 3] for sample in samples])
    frozen = (torch.arange(6) < 1).expand(len(samples), 6)
    return TextBatch(None, ids, times, uniform, frozen)


def uniform_model_errors(batch):
    """Four tokens are equally likely: log 4 nats at each masked position, with weight 1/t."""
    masked = (batch.uniform < batch.t[:, None]) & ~batch.frozen
    assert torch.equal(masked.sum(1), (batch.t * 5).round())     # exactly 5 t of five tokens
    return math.log(4) * masked.sum(1) / batch.t


def test_validation_of_a_uniform_model_is_log_4():
    samples = NumberedSamples(7)
    maker = SimpleNamespace(mixes=dict(image=samples, text=samples),
                            image_batch=uniform_model_batch, text_batch=uniform_model_batch,
                            tokenizer=stub_tokenizer(3, "ab"))
    errors = dict(image=lambda batch: batch.t, text=uniform_model_errors)
    validation = Validation(maker, lambda name, batch: errors[name](batch), 40)
    result = validation.measure(0, 1)
    exact = partial(pytest.approx, abs=1e-5)                     # float32, rounded to 6 places
    assert result["val_text_t"] == exact([math.log(4)] * BINS)
    assert result["val_image_t"] == exact([(b + 0.5) / BINS for b in range(BINS)])
    assert result["val_image"] == exact(0.5)
    # five tokens are not frozen, two of them are words of four bytes: the bound is not random
    assert result["val_nats"] == exact(math.log(4))
    assert result["val_bits"] == exact(5 * 2 / 4)
    shares = [validation.measure(rank, 3)["val_image"] for rank in range(3)]
    assert sum(shares) / 3 == exact(0.5)  # each times three, as none sums them


def test_validation_of_a_perfect_model_is_the_entropy():
    """Texts have 0 to 3 a's, equally likely, in four positions; the rest is padding.

    A perfect model knows which lengths fit the visible tokens.  Enumerated over lengths, levels and
    masks, the bound is log 4 nats per text; without the padding it would be smaller."""
    L, A, END, MASK = 4, 0, 1, 2
    texts = torch.tensor([[A] * k + [END] * (L - k) for k in range(L)])
    orders = list(itertools.permutations(range(L)))  # the first l of an order are masked
    count = L * len(orders) * L  # texts x orders x levels, each once

    def perfect_logits(ids, at):
        """log p of each token at the positions `at`, counted over B x L."""
        logits = []
        for place in at.tolist():
            row, i = divmod(place, L)
            fits = ((ids[row] == MASK) | (ids[row] == texts)).all(1)
            share = (texts[fits, i] == A).double().mean()
            logits.append(torch.stack([share, 1 - share, torch.tensor(0.0)]).log())
        return torch.stack(logits)

    def make(samples, generators, times):
        ids, uniform, t = [], [], []
        for sample in samples:
            text, rest = divmod(sample["number"], L * len(orders))
            order, level = divmod(rest, L)
            ids.append(texts[text])
            uniform.append([orders[order].index(i) / L for i in range(L)])
            t.append((level + 1) / L - 1e-6)                     # masks level + 1 tokens
        ids = torch.stack(ids)
        frozen = torch.zeros_like(ids, dtype=torch.bool)
        return TextBatch(None, ids, torch.tensor(t), torch.tensor(uniform), frozen)

    def errors(name, batch):
        return mask_diffusion.errors(perfect_logits, batch.ids, MASK, batch.t, batch.uniform)
    maker = SimpleNamespace(mixes=dict(text=NumberedSamples(count)), text_batch=make,
                            tokenizer=stub_tokenizer(END, "a"))
    result = Validation(maker, errors, count).measure(0, 1)
    assert L * result["val_nats"] == pytest.approx(math.log(4), abs=1e-4)    # times are 1e-6 off


@pytest.mark.parametrize("floor, expected", [("0", 0.05), ("0.01", 0.05), ("0.3", 0.3)])
def test_validation_has_a_floor_at_least(floor, expected):
    config = train.parse(["--time-floor", floor])
    maker = BatchMaker(config, None, {}, "", 0, 1, 3, 1)
    assert maker.for_validation().config.time_floor == expected


def test_validation_uses_averaged_weights_captions_and_its_own_floor(tiny, small_tar, tmp_path):
    """The run drops all captions, and has uniform times and no floor.  Its averaged weights are half
    of its weights."""
    flags = ["--init", tiny, "--image-data", small_tar, *BATCHES, "--text-dropout", 1,
             "--times", "uniform", "--time-floor", 0, "--out", tmp_path]
    job = train.set_up(train.parse(list(map(str, flags))))
    maker = job.maker
    for average in job.run.ema.values():
        average.mul_(0.5)
    errors = dict(image=train.image_errors, text=train.text_errors)
    result = reports.validate(job, reports.make_validation(job, errors))
    job.run.close()

    model = nn.ModuleDict(dict(mmdit=checkpoint.load_mmdit(tiny),
                               embedding=checkpoint.load_embedding(tiny)))
    assert model["mmdit"].config.predicts == "data"
    samples = maker.mixes["image"].shown(SAMPLES, True)
    images, noises, ids = [], [], []
    for row in range(SAMPLES):
        sample = samples[row % len(samples)]
        generator = seeding.seeded("validation", "image", row)
        torch.randn(1, generator=generator)                      # the time, which `spread` replaces
        noises.append(torch.randn(1, 3, 16, 16, generator=generator)[0])
        chance = float(torch.rand(2, generator=generator)[1])
        caption = sample["captions"][int(chance * len(sample["captions"]))]
        ids.append(maker.tokenizer.encode(caption, 28))
        images.append(sample["image"].float() / 127.5 - 1)
    x, noise = torch.stack(images), torch.stack(noises)
    t = spread(list(range(SAMPLES)), SAMPLES)
    level = t.view(-1, 1, 1, 1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
        text = model["embedding"](torch.stack(ids))
        v = model["mmdit"]((1 - level) * x + level * noise, text, t, need="velocity")[0]
    weight = (level / 0.05).clamp(max=1) ** 2
    expected = float((weight * (v - (noise - x)) ** 2).mean())
    assert result["val_image"] == pytest.approx(expected, rel=1e-5)      # float32 in other batches


# ----------------------------------------------------------------------------------------- in a run

def test_validations_are_logged_with_ten_bins(single_run):
    first, last = validated_rows(single_run)
    assert [first["step"], last["step"]] == [2, 3]
    assert first["val_image"] != last["val_image"]
    assert len(last["val_image_t"]) == len(last["val_text_t"]) == BINS


def test_same_weights_measure_the_same(tiny, small_tar, tmp_path):
    flags = ["--init", tiny, "--image-data", small_tar, *FLAGS, *MEASURE, "--ema", 1, "--lr", 1e-12,
             "--out", tmp_path]
    train.main(list(map(str, flags)))
    first, last = validated_rows(tmp_path)
    names = [name for name in first if name.startswith("val")]
    assert len(names) == 5
    assert all(first[name] == last[name] for name in names)


def test_two_processes_measure_what_one_does(single_run, tiny, small_tar, tmp_path):
    to_the_end(Forked(2, "--init", tiny, "--image-data", small_tar, *FLAGS, *MEASURE, "--out",
                      tmp_path / "run"))
    pairs = zip(validated_rows(tmp_path / "run"), validated_rows(single_run), strict=True)
    for (a, b), count in zip(pairs, (9, 5), strict=True):        # the meter looks at step 2 only
        names = [name for name in a if name.startswith(("val_", "meter_"))]
        assert len(names) == count and a.keys() == b.keys()
        for name in names:                                       # float32 sums in another order
            one, other = torch.tensor(a[name]), torch.tensor(b[name])
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5), name


# ---------------------------------------------------------------------------------------- the meter

def test_meter_gives_norms_and_cosines_of_two_gradients():
    model = nn.ModuleDict(dict(mmdit=nn.Module(), embedding=nn.Linear(2, 1, bias=False)))
    model["mmdit"].blocks = nn.ModuleList([nn.Linear(2, 1, bias=False) for _ in range(2)])
    for p in model.parameters():
        nn.init.ones_(p)
    first, second = model["mmdit"].blocks

    def image_loss():
        return first(torch.tensor([3.0, 4.0])) + second(torch.tensor([1.0, 0.0]))

    def text_loss():
        return (first(torch.tensor([-8.0, 6.0])) + second(torch.tensor([2.0, 0.0]))
                + model["embedding"](torch.ones(2)))
    image_loss().backward()
    before = gradient_meter.gradients(model)
    text_loss().backward()
    result = gradient_meter.compare(model, before)
    exact = partial(pytest.approx, abs=1e-5)                     # rounded to 6 places
    assert result["meter_blocks"] == [[5.0, 10.0, 0.0], [1.0, 2.0, 1.0]]
    assert result["meter_image"] == exact(math.sqrt(26))
    assert result["meter_text"] == exact(math.sqrt(106))
    assert result["meter_cosine"] == exact(2 / math.sqrt(26 * 106))


def test_meter_of_the_same_loss_twice_has_cosine_1():
    no_blocks = nn.ModuleDict(dict(blocks=nn.ModuleList()))
    model = nn.ModuleDict(dict(mmdit=no_blocks, embedding=nn.Linear(2, 1, bias=False)))
    (model["embedding"](torch.tensor([3.0, 4.0]))).backward()
    before = gradient_meter.gradients(model)
    (model["embedding"](torch.tensor([3.0, 4.0]))).backward()
    cosine = gradient_meter.compare(model, before)["meter_cosine"]
    assert cosine == pytest.approx(1, abs=1e-6)                  # rounded to 6 places


def test_meter_and_validation_change_no_step(single_run, tiny, small_tar, tmp_path):
    flags = ["--init", tiny, "--image-data", small_tar, *FLAGS, "--eval-every", 0,
             "--out", tmp_path]
    train.main(list(map(str, flags)))
    for measured, plain in zip(rows(single_run), rows(tmp_path), strict=True):
        for name in ("image_loss", "text_loss", "grad_norm"):
            assert measured[name] == plain[name]


def test_meter_agrees_with_the_gradient_norm_of_the_step(single_run):
    row = rows(single_run)[1]
    a, b = row["meter_image"], row["meter_text"]
    squared = a * a + b * b + 2 * a * b * row["meter_cosine"]
    assert row["grad_norm"] ** 2 == pytest.approx(squared, rel=1e-4)     # rounded to 6 places
    assert len(row["meter_blocks"]) == 2
