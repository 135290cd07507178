"""The stages of training, from a tiny SD3, T5 and autoencoder: settings, runs and losses."""

import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import checkpoint
import data
import mask_diffusion
import sample
import train
from helpers import ROOT, Forked, assert_lines, equal_runs, rows, run_fresh, to_the_end
from inference import text_to_image
from inference.parts import Parts
from model import PRESETS, MMDiTConfig
from pretrained.t5 import MaskEmbedding
from training import config as training_config
from training.batches import ImageBatch, TextBatch
from training.models import Models

FIXTURES = ROOT / "tests" / "fixtures"
RELEASE = FIXTURES / "release"
SD3 = FIXTURES / "sd3.safetensors"
EXPECTED = load_file(FIXTURES / "expected.safetensors")
FROM_SD3 = ["--init", SD3, "--t5", RELEASE, "--tokenizer", RELEASE]
MASK_ID = 109
VOCABULARY = 110
STAGES_FROM_SD3 = ("pretrain", "mask-emb", "high-res", "instruct")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write a folder of 24 images, with captions in words that the tiny tokenizer has."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for i in range(24):
        narrow = i % 3 == 0
        shape = (6, 4 if narrow else 8, 3)
        noise = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        size = (24 if narrow else 48, 36)
        Image.fromarray(noise.numpy()).resize(size).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {('red', 'green')[i % 2]} cat {i}")
    return folder


def flags(stage, out, images, *more):
    given = ["--stage", stage, "--out", out, "--image-data", images, "--image-batch", 4,
             "--text-batch", 4, "--text-length", 12, "--dtype", "float32", "--device", "cpu",
             "--log-every", 1, "--sample-every", 0, "--eval-every", 0, "--save-every", 9,
             "--lr", 1e-3, "--warmup", 1]
    if stage == "instruct":
        given += ["--question-share", 0, "--shift", 2]
    return list(map(str, [*given, *more]))


@pytest.fixture(scope="module")
def chain(images, tmp_path_factory):
    """Return a folder with four runs: all stages from SD3, each resumed after two of four steps."""
    folder = tmp_path_factory.mktemp("chain")
    init = FROM_SD3
    for stage in STAGES_FROM_SD3:
        pixels = 16 if stage in ("pretrain", "mask-emb") else 24
        for steps in (2, 4):
            train.main(flags(stage, folder / stage, images, *init, "--pixels", pixels,
                             "--steps", steps, "--save-every", 2))
        init = ["--init", folder / stage]
    return folder


# ---------------------------------------------------------------------------------- the settings

# steps, batch, learning rate, warm-up, lambda: Table 1 of the supplement of arXiv 2501.00289
TABLE_1 = {
    "pretrain": (60_000, 512, 5e-5, 5000, 0.2),
    "mask-emb": (200_000, 512, 3e-5, 1000, 0.2),
    "high-res": (80_000, 768, 3e-5, 1000, 0.2),
    "instruct": (50_000, 512, 3e-5, 1000, 1.0),
}
# pixels of an image's side, tokens of a text: the published code
PUBLISHED_SIZES = {
    "pretrain": (256, 256), "mask-emb": (256, 256), "high-res": (512, 256), "instruct": (512, 128)}


def paper_config(*flags):
    return train.parse([*flags, "--print-plan", "8"])


@pytest.mark.parametrize("stage", TABLE_1)
def test_stage_has_the_settings_of_table_1(stage):
    config = paper_config("--preset", "sd3-medium", "--stage", stage)
    assert TABLE_1[stage] == (
        config.steps, config.text_batch, config.lr, config.warmup, config.text_weight)
    assert config.image_batch == config.text_batch
    assert (config.pixels, config.text_length) == PUBLISHED_SIZES[stage]
    assert (config.optimizer, config.weight_decay) == ("adamw", 1e-2)
    assert (config.clip, config.ema, config.text_dropout) == (2.0, 0.9999, 0.1)
    assert config.decay_steps == 0                               # constant after the warm-up
    assert (config.times, config.time_shift) == ("logit-normal", 1.0)
    assert (config.image_weight, config.text_loss, config.shard) == (1.0, "1/t", "zero2")


def test_captions_are_recaptions_as_often_as_published():
    assert paper_config("--preset", "sd3-medium").recaption == 1.0
    assert paper_config("--preset", "sd3-medium", "--stage", "instruct").recaption == 0.9


def test_end_to_end_variant_has_the_published_amounts_of_data():
    config = paper_config("--preset", "e2e-1.1b")
    assert config.steps == 400_000
    assert 940e6 < config.steps * config.image_batch < 1.3e9     # an epoch of DataComp
    assert config.text_batch == config.image_batch and config.image_batch % 64 == 0
    text = paper_config("--preset", "e2e-1.1b", "--stage", "text")
    tokens = text.steps * text.text_batch * text.text_length
    assert tokens == pytest.approx(350e9, rel=0.01)              # steps are a round number


def test_intervals_are_shares_of_the_steps_unless_given():
    def intervals(*flags):
        config = train.parse(list(map(str, flags)))
        return [config.eval_every, config.save_every, config.sample_every]
    assert intervals("--steps", 500) == [25, 50, 50]
    assert intervals("--steps", 3) == [1, 1, 1]
    assert intervals("--steps", 200_000) == [1000, 1000, 5000]
    given = ["--eval-every", 0, "--save-every", 7, "--sample-every", 0]
    assert intervals("--steps", 500, *given) == [0, 7, 0]


# ------------------------------------------------------------------------------------ the stages

def test_every_stage_trains_resumes_draws_and_captions(chain, tmp_path, capsys):
    for stage in STAGES_FROM_SD3:
        assert [row["step"] for row in rows(chain / stage)] == [1, 2, 3, 4]
        common = ["--checkpoint", str(chain / stage), "--steps", "2"]
        image = str(tmp_path / "drawn.png")
        sample.main([*common, "--prompt", "a red cat", "--out", image])
        parts = Parts(chain / stage)
        assert parts.height == (24 if stage in ("high-res", "instruct") else 16)
        assert parts.length == parts.answer_length == 12         # as trained
        sample.main([*common, "--image", image, "--dtype", "float32"])
        assert len(capsys.readouterr().out.splitlines()) == 2
    config = checkpoint.read_config(chain / "instruct")
    assert (config["stage"], config["pixels"], config["text_length"]) == ("instruct", 24, 12)
    assert config["latents"] == checkpoint.digest(checkpoint.load_vae(SD3))


@pytest.mark.parametrize("stage", STAGES_FROM_SD3)
def test_exported_average_computes_the_same(stage, chain, tmp_path):
    checkpoint.export(chain / stage, tmp_path / "release")
    checkpoint.export(chain / stage, tmp_path / "sd3", "sd3")
    scheduler = json.loads((tmp_path / "sd3" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["shift"] == (2.0 if stage == "instruct" else 3.0)
    ours = checkpoint.load_mmdit(chain / stage)
    release = checkpoint.load_mmdit(tmp_path / "release")
    for a, b in zip(ours.state_dict().values(), release.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    x, text, t = EXPECTED["sd3.latents"], EXPECTED["ddit.context"], EXPECTED["ddit.t"]
    sd3 = checkpoint.load_mmdit(tmp_path / "sd3", vocab_size=VOCABULARY)
    with torch.no_grad():
        velocities = [model(x, text, t, need="velocity")[0] for model in (ours, sd3)]
    assert torch.equal(*velocities)
    digest = checkpoint.load_tokenizer(RELEASE).digest()
    assert checkpoint.load_tokenizer(tmp_path / "sd3").digest() == digest
    assert checkpoint.load_tokenizer(tmp_path / "release").pad_id == 1
    images = []
    for path in (chain / stage, tmp_path / "release"):
        parts = Parts(path, vae=SD3, t5=RELEASE, height=16, width=16, length=12)
        images.append(text_to_image.draw(parts, ["a [MASK] cat"], steps=2, shift=3.0))
    assert torch.equal(*images)                                  # the [MASK] embedding is kept


def test_only_mask_emb_trains_the_mask_and_none_the_null_image(chain, images, tmp_path):
    null_image = checkpoint.load_mmdit(SD3, vocab_size=VOCABULARY).null_image
    t5_row = checkpoint.load_t5(RELEASE).embed.weight[MASK_ID]
    weights = {stage: load_file(chain / stage / "weights.safetensors") for stage in STAGES_FROM_SD3}
    for stage, tensors in weights.items():
        assert torch.equal(tensors["mmdit.null_image"], null_image), stage
        assert not torch.equal(tensors["mmdit.txt_out.bias"], torch.zeros(VOCABULARY))
    aligned = weights["mask-emb"]["mask.vector"]
    assert torch.equal(weights["pretrain"]["mask.vector"], t5_row)
    assert not torch.equal(aligned, t5_row)
    for later in ("high-res", "instruct"):  # a stage starts from the weights, not their average
        assert torch.equal(weights[later]["mask.vector"], aligned)
    train.main(flags("instruct", tmp_path / "half", images, "--init", chain / "mask-emb", "--pixels", 24,
                     "--steps", 1, "--dtype", "bfloat16"))
    half = load_file(tmp_path / "half" / "weights.safetensors")
    assert torch.equal(half["mask.vector"], aligned)             # not rounded to T5's dtype
    average = load_file(chain / "mask-emb" / checkpoint.MASK_EMBEDDING)["vector"]
    assert 0 < (average - aligned).abs().max() < (t5_row - average).abs().max()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_only_the_mask_embedding_of_t5_moves(images, tmp_path):
    config = train.parse(flags("mask-emb", tmp_path / "run", images, *FROM_SD3, "--pixels", 16,
                               "--steps", 2, "--checkpoint-activations"))
    job = train.set_up(config)
    train.train(job, [])
    job.run.close()
    models = job.models
    before = checkpoint.load_t5(RELEASE).state_dict()
    for name, tensor in models.t5.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in models.t5.parameters())
    assert not torch.equal(models.trainable["mask"].vector, before["embed.weight"][MASK_ID])


def test_mask_embedding_gradient_equals_finite_differences():
    t5 = checkpoint.load_t5(RELEASE).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    mask = MaskEmbedding(t5.embed.weight[MASK_ID], MASK_ID)
    models = Models(torch.nn.ModuleDict(dict(mask=mask)), None, t5, None)
    ids = torch.randint(2, 100, (2, 9), generator=generator)
    ids[:, [1, 4, 5]] = MASK_ID
    weights = torch.randn(2, 9, 64, generator=generator)
    vector = mask.vector.detach().clone()

    def value():
        return (models.text(ids).double() * weights).sum()
    value().backward()

    @torch.no_grad()
    def slope(direction, step):
        mask.vector.copy_(vector + step * direction)
        above = float(value())
        mask.vector.copy_(vector - step * direction)
        return (above - float(value())) / (2 * step)
    for _ in range(4):
        direction = torch.randn(64, generator=generator)
        # Richardson: without the error of h^2
        estimate = (4 * slope(direction, 5e-3) - slope(direction, 1e-2)) / 3
        exact = float(mask.vector.grad @ direction)
        assert estimate == pytest.approx(exact, rel=1e-3, abs=0.03)     # float32 rounding: 0.01


@pytest.fixture(scope="module")
def text_run(tiny, tmp_path_factory):
    """Train the stage `text`, resumed after two of its four steps."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("a red cat and a green one sit on the mat. " * 60)
    data.main(["pack", str(folder / "a.txt"), str(folder / "t.safetensors"),
               "--tokenizer", str(tiny)])
    for steps in (2, 4):
        train.main(list(map(str, [
            "--stage", "text", "--text-data", folder / "t.safetensors", "--text-batch", 4,
            "--init", tiny, "--log-every", 1, "--save-every", 2, "--device", "cpu", "--lr", 1e-3,
            "--out", folder / "run", "--steps", steps])))
    return folder / "run"


def test_text_stage_trains_the_null_image_and_no_velocity_parts(text_run, tiny):
    logged = rows(text_run)
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    assert "image_loss" not in logged[0]
    assert "val_nats" in logged[3] and "val_image" not in logged[3]
    before = load_file(tiny / "model.safetensors")
    after = load_file(text_run / "weights.safetensors")
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    velocity_parts = ["img_in", "img_out", "img_modulation"]
    velocity_parts += [f"blocks.1.img.{part}" for part in ("out", "fc1", "fc2")]
    prefixes = tuple(f"mmdit.{part}." for part in velocity_parts)
    assert {name for name in before if name.startswith(prefixes)} <= unchanged
    assert "mmdit.null_image" not in unchanged
    assert "mmdit.blocks.0.img.qkv.weight" not in unchanged


def test_trained_null_image_is_kept_by_later_stages(text_run, tiny, small_tar, tmp_path):
    out = tmp_path / "run"
    train.main(["--init", str(text_run), "--image-data", small_tar, "--image-batch", "4",
                "--text-batch", "4", "--steps", "1", "--sample-every", "0", "--eval-every", "0",
                "--out", str(out)])
    name = "mmdit.null_image"
    first = load_file(text_run / "weights.safetensors")[name]
    assert torch.equal(load_file(out / "weights.safetensors")[name], first)
    assert Parts(text_run).null_trained and Parts(out).null_trained
    assert not Parts(tiny).null_trained


# --------------------------------------------------------------------------------- T5 and captions

@pytest.fixture(scope="module")
def stored_states(images, tmp_path_factory):
    """Store latents of the images and T5's states of their captions."""
    folder = tmp_path_factory.mktemp("states") / "stored"
    data.main(list(map(str, [
        "latents", images, folder, "--vae", SD3, "--t5", RELEASE, "--tokenizer", RELEASE,
        "--pixels", 16, "--text-length", 12, "--dtype", "float32", "--device", "cpu"])))
    return folder


def test_stored_states_train_as_t5_does(images, chain, stored_states, tmp_path):
    base = ["--pixels", 16, "--steps", 1]
    first = {}
    for name, source in (("t5", images), ("stored", stored_states)):
        train.main(flags("pretrain", tmp_path / name, source, "--init", chain / "pretrain", *base))
        first[name] = rows(tmp_path / name)[0]
    a, b = first["t5"], first["stored"]
    assert a["text_loss"] == pytest.approx(b["text_loss"], rel=1e-5)   # float32 in another order
    assert a["image_loss"] == pytest.approx(b["image_loss"], rel=1e-3)  # T5 was in bfloat16
    assert a["image_loss"] != b["image_loss"]
    # the same T5, except for its [MASK] embedding
    train.main(flags("pretrain", tmp_path / "aligned", stored_states, "--init", chain / "mask-emb",
                     *base, "--dtype", "bfloat16"))


@pytest.mark.parametrize("other", [["--text-length", 10], ["--recaption", 0.5]])
def test_stored_states_of_other_captions_are_refused(
        other, chain, stored_states, tmp_path, run_program):
    given = flags("pretrain", tmp_path / "x", stored_states, "--init", chain / "pretrain",
                  "--pixels", 16, "--steps", 1, *other)
    code, error = run_program(train.main, given)
    assert code == 1 and "stored states" in error and "--t5" in error


def test_dropped_captions_skip_t5_and_have_the_empty_prompts_states():
    t5 = checkpoint.load_t5(RELEASE).requires_grad_(False)
    tokenizer = checkpoint.load_tokenizer(RELEASE)
    texts = ["a red cat", "", "a green cat", ""]
    ids = torch.stack([tokenizer.encode(text, 12) for text in texts])
    with torch.no_grad():
        expected = t5(ids)
        empty = t5(tokenizer.encode("", 12)[None])
    sizes = []

    def watched_t5(ids, mask=None):
        sizes.append(len(ids))
        return t5(ids)
    models = Models(torch.nn.ModuleDict(), tokenizer, watched_t5, None, empty)
    dropped = torch.tensor([False, True, False, True])
    for states in (None, expected):
        # float32 sums of 2 rows and of 4 differ
        assert torch.allclose(models.captions(ids, dropped, states), expected, atol=1e-5)
        assert sizes == [2]                                      # stored states need no T5


@pytest.mark.parametrize("stored", [False, True])
def test_micro_batches_drop_the_same_captions(stored):
    """A dropped caption gets the empty prompt's states in place of its own, stored or not."""
    length, width = 3, 4
    ids = torch.arange(1, 9)[:, None].expand(8, length)

    def t5(ids, mask=None):
        return ids[..., None].expand(-1, -1, width).float()
    models = Models(torch.nn.ModuleDict(), None, t5, None, torch.zeros(1, length, width))
    dropped = torch.tensor([True, True, False, True, False, False, True, True])
    states = t5(10 * ids) if stored else None
    expected = t5((10 if stored else 1) * ids * ~dropped[:, None])
    for micro in (1, 2, 4, 8):
        parts = []
        for at in range(0, 8, micro):
            part = slice(at, at + micro)
            stored_part = states[part] if stored else None
            parts.append(models.captions(ids[part], dropped[part], stored_part))
        assert torch.equal(torch.cat(parts), expected), micro


def test_training_with_t5_pads_with_its_end_token(images, tmp_path):
    """The end token is used also if the tokenizer's folder names <pad>, as SD3's does."""
    folder = shutil.copytree(RELEASE / "tokenizer", tmp_path / "tokenizer_3")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps(dict(pad_token="<pad>")))
    assert checkpoint.load_tokenizer(folder).pad_id == 0
    config = train.parse(flags("pretrain", tmp_path / "run", images, *FROM_SD3[:4],
                               "--tokenizer", folder, "--pixels", 16, "--steps", 1))
    assert config.tokenizer == str(folder)
    _, maker, _, run = train.set_up(config)
    run.close()
    assert maker.tokenizer.pad_id == maker.tokenizer.end_id == 1
    step = maker.make_batches(0)
    for batch in (step.image, step.text):
        assert not (batch.ids == 0).any()


# ------------------------------------------------------------------------------------- the losses

def published_models(path):
    """Load the models of a published transformer; T5 returns the fixture's states for any text."""
    mmdit = checkpoint.load_mmdit(path, vocab_size=VOCABULARY)
    context = EXPECTED["ddit.context"]
    return Models(torch.nn.ModuleDict(dict(mmdit=mmdit)), SimpleNamespace(mask_id=MASK_ID),
                  lambda ids, mask: context, None, context[:1])


@pytest.mark.parametrize("path, name", [(SD3, "sd3"), (RELEASE, "ddit")])
def test_image_loss_of_published_weights_is_that_of_their_velocity(path, name):
    latents, velocity = EXPECTED[f"{name}.latents"], EXPECTED[f"{name}.velocity"]
    t = EXPECTED["ddit.t"]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    level = t.view(-1, 1, 1, 1)
    clean = (latents - level * noise) / (1 - level)
    batch = ImageBatch(clean, torch.zeros(2, 9), t, noise, torch.tensor([False, False]),
                       EXPECTED["ddit.context"])
    with torch.no_grad():
        errors = train.image_errors(published_models(path), batch)
    for row in range(2):
        expected = ((velocity[row] - (noise[row] - clean[row])) ** 2).mean()
        # published in float32
        assert float(errors[row]) == pytest.approx(float(expected), rel=1e-4)


def test_text_loss_of_published_weights_is_that_of_their_logits():
    """The loss equals one from the published model's logits, in a loop over rows and tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 100, (2, 9), generator=generator)
    t = mask_diffusion.draw_times(2, generator)
    uniform = torch.rand(2, 9, generator=generator)
    batch = TextBatch(EXPECTED["ddit.latents"], ids, t, uniform,
                      torch.zeros(2, 9, dtype=torch.bool))
    with torch.no_grad():
        errors = train.text_errors(published_models(RELEASE), batch)
    logits = EXPECTED["ddit.logits_t0"].double()
    for row in range(2):
        nats = 0.0
        for at in range(9):
            if uniform[row, at] < t[row]:
                others = logits[row, at, :MASK_ID]               # without [MASK], the last id
                nats += float(torch.logsumexp(others, 0) - logits[row, at, ids[row, at]])
        # published in float32
        assert float(errors[row]) == pytest.approx(nats / float(t[row]), rel=1e-4)


def test_processes_and_micro_batches_make_the_same_update(chain, images, tmp_path):
    """With clipped gradients and buckets; two processes also shard T5 and recompute activations."""
    base = ["--init", chain / "pretrain", "--pixels", 24, "--buckets", "--steps", 2, "--clip", 0.5,
            "--lr", 1e-4]
    train.main(flags("mask-emb", tmp_path / "one", images, *base))
    train.main(flags("mask-emb", tmp_path / "micro", images, *base, "--micro-batch", 2))
    to_the_end(Forked(2, *flags("mask-emb", tmp_path / "two", images, *base, "--micro-batch", 1,
                                "--shard-t5", "--shard", "zero3", "--checkpoint-activations")))
    grad_norms = [row["grad_norm"] for row in rows(tmp_path / "one")]
    assert min(grad_norms) > 0.5                                 # the clip is reached
    for name in ("micro", "two"):
        equal_runs(tmp_path / "one", tmp_path / name)
        assert [row["grad_norm"] for row in rows(tmp_path / name)] == pytest.approx(grad_norms, rel=1e-5)


# --------------------------------------------------------------------------- changes to the program

@pytest.fixture
def program_copy(tmp_path):
    """Return a copy of the program that a test may change."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("viz/*.html")]:
        target = tmp_path / file.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    return tmp_path


def insert(file, line, more):
    """Insert text after a line that occurs once in a file."""
    source = file.read_text()
    assert source.count(line) == 1
    file.write_text(source.replace(line, line + more))


def test_new_config_fields_are_trained_saved_and_sampled(program_copy, tiny, small_tar):
    insert(program_copy / "model.py", "    qk_norm: bool = False",
           "\n    registers: int = 0\n    scale: float = 1\n    only: bool = False")
    insert(program_copy / "training" / "config.py", "class TrainConfig:\n",
           "    colours: int = 0\n    hue: float = 0.5\n    shade: str = ''\n")
    training = ["--init", tiny, "--image-data", small_tar, "--out", "run", "--steps", 2,
                "--image-batch", 4, "--text-batch", 4, "--eval-every", 0, "--sample-every", 0,
                "--device", "cpu", "--colours", 3]
    sampling = ["--checkpoint", "run", "--prompt", "red apple", "--steps", 1, "--out", "a.png"]
    code, errors = run_fresh(("train", training), ("sample", sampling),
                             folder=program_copy)
    assert code == 0, errors
    sizes = json.loads((program_copy / "run" / "config.json").read_text())["mmdit"]
    settings = json.loads((program_copy / "run" / "train.json").read_text())
    assert sizes["registers"] == 0 and settings["colours"] == 3
    assert (program_copy / "a.png").exists()


def test_unreadable_config_stops_the_run_before_its_first_step(program_copy, tiny, small_tar):
    """JSON would turn the tuple of a new field into a list."""
    insert(program_copy / "model.py", "    qk_norm: bool = False",
           "\n    registers: tuple = (1, 2)")
    training = ["--init", tiny, "--image-data", small_tar, "--out", "run", "--steps", 2]
    code, errors = run_fresh(("train", training), folder=program_copy)
    assert code == 1 and "registers" in errors and errors.count("\n") == 1
    assert not (program_copy / "run").exists()


# ------------------------------------------------------------------------------------ the scripts

PYTHON_STUB = '''#!/bin/bash
    [ "$1" != -c ] || { echo 2.5; exit; }
    printf '%s\\t' "$@" >>called; echo >>called; steps=0; out=
    while [ $# -gt 0 ]; do
        case $1 in --stage) out=${out:-out/$2};; --out) out=$2;; --steps) steps=$2;; esac; shift
    done
    [ $steps = 0 ] || { mkdir -p $out; echo ' "step": '$steps, >$out/config.json; }'''


def test_scripts_run_each_stage_once_with_valid_flags(tmp_path, monkeypatch):
    """Stand-ins for python and torchrun record their calls and write a finished stage."""
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    (tmp_path / "python").write_text(PYTHON_STUB)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "torchrun").symlink_to("python")
    environment = os.environ | dict(
        PATH=f"{tmp_path}:{os.environ['PATH']}", SD3="sd3", TOKENIZER="t", VAE="v")

    def call(*command):
        subprocess.run(["bash", *command], cwd=tmp_path, env=environment, check=True)
    for _ in range(2):  # the second time all stages are done
        call("runs/paper.sh", "--shard", "hsdp")
        call("runs/end_to_end.sh", "--shard", "hsdp")
    call("runs/own.sh", "folder", "a prompt", "--steps", "7")
    call("runs/own.sh", "runs", "a prompt")  # "runs" exists: its full path is used
    calls = [line.split("\t")[:-1] for line in (tmp_path / "called").read_text().splitlines()]

    sizes = MMDiTConfig(**PRESETS["sd3-medium"])
    monkeypatch.setattr(training_config, "read_base", lambda init, preset: ("", sizes, {}))
    trainings = [words for words in calls if "train.py" in words]
    configs = [train.parse(words[words.index("train.py") + 1:]) for words in trainings]
    assert [config.stage for config in configs] == [
        "pretrain", "mask-emb", "high-res", "instruct", "text", "pretrain", "pretrain", "instruct",
        "pretrain", "pretrain"]
    for config in configs[:4]:  # the settings must equal the paper's table
        assert config.filtered and config.init
        assert config.steps == TABLE_1[config.stage][0]
    # the scripts pass extra flags on
    assert all(config.shard == "hsdp" for config in configs[:8]) and configs[-2].steps == 7
    sources = [config.image_data[0] for config in configs[-2:]]
    assert sources == ["folder:2.5", f"{tmp_path}/runs:2.5"]
    preparations = [words[1] for words in calls if words[0] == "data.py"]
    assert preparations == ["pack", "latents", "pack", "latents", "show", "show"]


def test_own_sh_without_a_prompt_shows_its_usage():
    result = subprocess.run(["bash", "runs/own.sh", "folder"], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.returncode == 2 and "FOLDER PROMPT" in result.stderr


# -------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("more, status, names", [
    (["--stage", "text", *FROM_SD3], 1, ["--stage text", "end-to-end", str(SD3)]),
    (["--stage", "mask-emb"], 1, ["--stage mask-emb", "--preset emoji"]),
    (["--t5", RELEASE], 1, ["--t5", "--preset emoji", "embedding of its own"]),
    (["--tokenizer", RELEASE], 1, ["--tokenizer", "--preset emoji", "embedding of its own"]),
    (["--vae", RELEASE], 1, ["--vae", "--preset emoji", "pixels"]),
    (["--init", SD3, "--tokenizer", RELEASE], 1, [str(SD3), "--t5"]),
    (["--init", SD3, "--t5", RELEASE], 1, [str(SD3), "tokenizer.json", "--tokenizer"]),
    (["--init", RELEASE], 1, ["--image-data", "--vae", "16"]),
    (["--init", RELEASE, "--vae", RELEASE], 1, [str(RELEASE), "--vae", ".safetensors"]),
    ([*FROM_SD3, "--pixels", 17], 1, ["--pixels 17", "4", "48"]),
    ([*FROM_SD3, "--micro-batch", 3], 1, ["--micro-batch 3", "--text-batch 4"]),
    ([*FROM_SD3, "--mask-embedding", "nowhere.pth"], 1, ["nowhere.pth"]),
    (["--preset", "sd3-medium"], 1, ["--image-data", "--vae", "16"]),
    (["--preset", "sd3-medium", "--vae", SD3, "--pixels", 64], 1,
     ["--preset sd3-medium", "--tokenizer"]),
    (["--stage", "text", "--image-batch", 3], 2, ["--image-batch"]),
    (["--stage", "text"], 1, ["--stage text", "--text-data"]),
    (["--preset", "e2e-1.1b"], 1, ["--stage pretrain", "--image-data"]),
])
def test_mistakes_get_one_line_and_a_status(more, status, names, images, tmp_path, run_program):
    given = ["--out", tmp_path / "x", "--text-batch", 4, *more]
    if "text" not in more and "e2e-1.1b" not in more:
        given += ["--image-data", images, "--image-batch", 4]
        if "--pixels" not in more:
            given += ["--pixels", 16]
    code, error = run_program(train.main, given)
    assert code == status
    assert_lines(error.splitlines(), names)


def test_instruct_from_sd3_warns_and_reports_what_is_carried_over(images, tmp_path, capsys):
    train.main(flags("instruct", tmp_path / "run", images, *FROM_SD3, "--pixels", 16, "--steps", 1))
    errors = capsys.readouterr().err
    assert "warning" in errors and "--stage instruct" in errors
    model = checkpoint.load_mmdit(SD3, vocab_size=VOCABULARY)
    total = sum(p.numel() for p in model.parameters()) + model.positions.numel()
    head = VOCABULARY * 65                                       # width 64, and a bias
    null_image = 8 * 64
    # in the last block's text stream: output, MLP, and four of six parts of the modulation
    text_stream = 64 * 65 + (64 * 257 + 256 * 65) + 4 * 64 * 65
    assert f"{total - head - null_image - text_stream:,} values" in errors
    assert f"{head:,}" in errors
