"""The stages, from a tiny SD3, T5 and autoencoder: each trains, goes on, draws, reads; what learns where."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import checkpoint
import data
import mask_diffusion
import sample
import train
from helpers import Forked, rows, to_the_end
from inference import text_to_image
from inference.parts import Parts
from model import PRESETS, MMDiTConfig
from pretrained.t5 import MaskEmbedding
from training import config as training_config
from training.models import Models

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
RELEASE, SD3 = FIXTURES / "release", FIXTURES / "sd3.safetensors"
EXPECTED = load_file(FIXTURES / "expected.safetensors")
FROM_SD3 = ["--init", SD3, "--t5", RELEASE, "--tokenizer", RELEASE]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 24 pictures with captions in the words that the tiny tokenizer has."""
    folder, generator = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for i in range(24):
        noise = torch.randint(0, 256, (6, 8 if i % 3 else 4, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).resize((48 if i % 3 else 24, 36)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {('red', 'green')[i % 2]} cat {i}")
    return folder


def flags(stage, out, pictures, *more):
    return list(map(str, ["--stage", stage, "--out", out, "--image-data", pictures, "--image-batch", 4,
                          "--text-batch", 4, "--text-length", 12, "--dtype", "float32", "--device", "cpu",
                          "--log-every", 1, "--sample-every", 0, "--eval-every", 0, "--lr", 1e-3,
                          "--warmup", 1,
                          *(["--question-share", 0] if stage == "instruct" else []), *more]))


@pytest.fixture(scope="module")
def chain(pictures, tmp_path_factory):
    """All four stages from SD3, three steps and three more of each; the folder that holds their runs."""
    out, init = tmp_path_factory.mktemp("chain"), FROM_SD3
    for stage, pixels in (("pretrain", 16), ("mask-emb", 16), ("high-res", 24), ("instruct", 24)):
        for steps in (3, 6):
            train.main(flags(stage, out / stage, pictures, *init, "--pixels", pixels, "--steps", steps,
                             "--save-every", 3))
        init = ["--init", out / stage]
    return out


def test_every_stage_trains_goes_on_draws_and_captions(chain, tmp_path, capsys):
    for stage in ("pretrain", "mask-emb", "high-res", "instruct"):
        assert [row["step"] for row in rows(chain / stage)] == [1, 2, 3, 4, 5, 6]
        found = ["--checkpoint", str(chain / stage), "--steps", "2"]
        sample.main([*found, "--prompt", "a red cat", "--out", str(tmp_path / "drawn.png")])
        assert Parts(chain / stage).height == (24 if stage in ("high-res", "instruct") else 16)
        sample.main([*found, "--image", str(tmp_path / "drawn.png"), "--dtype", "float32"])
        assert len(capsys.readouterr().out.splitlines()) == 2
    config = checkpoint.read_config(chain / "instruct")
    assert (config["stage"], config["pixels"], config["text_length"]) == ("instruct", 24, 12)
    assert config["latents"] == checkpoint.digest(checkpoint.load_vae(SD3))


@pytest.mark.parametrize("stage", ["pretrain", "mask-emb", "high-res", "instruct"])
def test_every_stages_average_is_exported_and_says_the_same(stage, chain, tmp_path):
    checkpoint.export(chain / stage, tmp_path / "release")
    checkpoint.export(chain / stage, tmp_path / "sd3", "sd3")
    ours = checkpoint.load_mmdit(chain / stage)
    release = checkpoint.load_mmdit(tmp_path / "release")
    for a, b in zip(ours.state_dict().values(), release.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    x, text, t = EXPECTED["sd3.latents"], EXPECTED["ddit.context"], EXPECTED["ddit.t"]
    sd3 = checkpoint.load_mmdit(tmp_path / "sd3", vocab_size=110)
    with torch.no_grad():
        assert torch.equal(ours(x, text, t, need="velocity")[0], sd3(x, text, t, need="velocity")[0])
    same = checkpoint.load_tokenizer(tmp_path / "sd3").digest() == checkpoint.load_tokenizer(RELEASE).digest()
    assert same and checkpoint.load_tokenizer(tmp_path / "release").pad_id == 1
    sides = dict(vae=SD3, t5=RELEASE, height=16, width=16, length=12)
    drawn = [text_to_image.draw(Parts(path, **sides), ["a [MASK] cat"], steps=2)
             for path in (chain / stage, tmp_path / "release")]
    assert torch.equal(*drawn)                                   # with the [MASK] embedding that came along


def test_what_learns_in_which_stage(chain):
    """The [MASK] embedding in `mask-emb` and, of what is measured with pictures, the null image nowhere."""
    fresh = checkpoint.load_mmdit(SD3, vocab_size=110).null_image
    row = checkpoint.load_t5(RELEASE).embed.weight[109]
    weights = {stage: load_file(chain / stage / "weights.safetensors") for stage in (
        "pretrain", "mask-emb", "high-res", "instruct")}
    for stage, tensors in weights.items():
        assert torch.equal(tensors["mmdit.null_image"], fresh), stage
        assert not torch.equal(tensors["mmdit.txt_out.bias"], torch.zeros(110))
    assert torch.equal(weights["pretrain"]["mask.vector"], row)
    assert not torch.equal(weights["mask-emb"]["mask.vector"], row)
    for later in ("high-res", "instruct"):                       # with what was learnt, not its average
        assert torch.equal(weights[later]["mask.vector"], weights["mask-emb"]["mask.vector"])
    average = load_file(chain / "mask-emb" / checkpoint.MASK_EMBEDDING)["vector"]
    assert 0 < (average - weights["mask-emb"]["mask.vector"]).abs().max() < (row - average).abs().max()


def test_nothing_of_t5_but_the_mask_embedding_moves(pictures, tmp_path):
    config = train.parse(flags("mask-emb", tmp_path / "run", pictures, *FROM_SD3, "--pixels", 16,
                               "--steps", 2, "--checkpoint-activations"))
    config, held, models, run = train.set_up(config)
    train.train(config, held, models, run, [])
    run.close()
    before = checkpoint.load_t5(RELEASE).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in models.t5.state_dict().items())
    assert all(p.grad is None for p in models.t5.parameters())
    assert not torch.equal(models.learns["mask"].vector, before["embed.weight"][109])


def test_the_mask_embeddings_gradient_is_that_of_finite_differences():
    t5, generator = checkpoint.load_t5(RELEASE).requires_grad_(False), torch.Generator().manual_seed(0)
    mask = MaskEmbedding(t5.embed.weight[109], 109)
    models = Models(torch.nn.ModuleDict(dict(mask=mask)), None, t5, None)
    ids = torch.randint(2, 100, (2, 9), generator=generator)
    ids[:, [1, 4, 5]] = 109
    weights, vector = torch.randn(2, 9, 64, generator=generator), mask.vector.detach().clone()
    value = lambda: (models.text(ids).double() * weights).sum()
    value().backward()

    def slope(step):
        with torch.no_grad():
            sides = [float((mask.vector.copy_(vector + h * direction), value())[1]) for h in (step, -step)]
        return (sides[0] - sides[1]) / (2 * step)
    for _ in range(4):
        direction = torch.randn(64, generator=generator)
        found = (4 * slope(5e-3) - slope(1e-2)) / 3      # the error of h^2 removed; float32's rounding: 0.01
        assert found == pytest.approx(float(mask.vector.grad @ direction), rel=1e-3, abs=0.03)


def test_text_alone_teaches_the_null_image_and_nothing_that_makes_a_velocity(tiny, small_tar, tmp_path):
    (tmp_path / "a.txt").write_text("a red cat and a green one sit on the mat. " * 60)
    data.main(["pack", str(tmp_path / "a.txt"), str(tmp_path / "t.safetensors"), "--tokenizer", str(tiny)])
    given = ["--stage", "text", "--text-data", tmp_path / "t.safetensors", "--text-batch", 4, "--init", tiny,
             "--log-every", 1, "--save-every", 2, "--device", "cpu", "--out", tmp_path / "text", "--lr", 1e-3]
    for steps in (2, 4):
        train.main(list(map(str, [*given, "--steps", steps])))
    logged, before = rows(tmp_path / "text"), load_file(tiny / "model.safetensors")
    assert [row["step"] for row in logged] == [1, 2, 3, 4] and "image_loss" not in logged[0]
    after = load_file(tmp_path / "text" / "weights.safetensors")
    still = {name for name in before if torch.equal(before[name], after[name])}
    last = [f"blocks.1.img.{part}" for part in ("out", "fc1", "fc2")]
    made = tuple(f"mmdit.{part}." for part in ("img_in", "img_out", "img_modulation", *last))
    assert "mmdit.null_image" not in still and {name for name in before if name.startswith(made)} <= still
    assert "mmdit.blocks.0.img.qkv.weight" not in still
    train.main(["--init", str(tmp_path / "text"), "--image-data", small_tar, "--image-batch", "4",
                "--text-batch", "4", "--steps", "1", "--sample-every", "0", "--out", str(tmp_path / "run")])
    again = load_file(tmp_path / "run" / "weights.safetensors")
    assert torch.equal(again["mmdit.null_image"], after["mmdit.null_image"])
    assert Parts(tmp_path / "text").null_learnt and Parts(tmp_path / "run").null_learnt
    assert not Parts(tiny).null_learnt


def test_states_that_are_stored_stand_for_t5s(pictures, chain, tmp_path, mistake):
    stored = tmp_path / "stored"
    given = ["latents", pictures, stored, "--vae", SD3, "--t5", RELEASE, "--tokenizer", RELEASE, "--pixels",
             16, "--text-length", 12, "--dtype", "float32", "--device", "cpu"]
    data.main(list(map(str, given)))
    base = ["--init", chain / "pretrain", "--pixels", 16, "--steps", 1]
    for name, source in (("one", pictures), ("other", stored)):
        train.main(flags("pretrain", tmp_path / name, source, *base))
    one, other = rows(tmp_path / "one")[0], rows(tmp_path / "other")[0]
    assert one["text_loss"] == pytest.approx(other["text_loss"], rel=1e-5)
    assert one["image_loss"] == pytest.approx(other["image_loss"], rel=1e-3)         # T5 was in bfloat16
    assert one["image_loss"] != other["image_loss"]
    train.main(flags("pretrain", tmp_path / "aligned", stored, *base, "--init", chain / "mask-emb", "--dtype",
                     "bfloat16"))                                # of the same T5, but for its [MASK]
    for other in (["--text-length", 10], ["--recaption", 0.5]):  # the states are of one choice of captions
        code, said = mistake(train.main, flags("pretrain", tmp_path / "x", stored, *base, *other))
        assert code == 1 and "stored states of" in said and "make them again, or without --t5" in said


def losses_of(path, latents, context):
    """(models of a published transformer whose T5 says `context`, a batch of each loss)."""
    mmdit, generator = checkpoint.load_mmdit(path, vocab_size=110), torch.Generator().manual_seed(0)
    learns = torch.nn.ModuleDict(dict(mmdit=mmdit))
    models = Models(learns, None, lambda ids, mask: context, None, context[:1])
    t, noise = EXPECTED["ddit.t"], torch.randn(latents.shape, generator=generator)
    tt = t.view(-1, 1, 1, 1)
    image = dict(images=(latents - tt * noise) / (1 - tt), ids=torch.zeros(2, 9), t=t, noise=noise,
                 dropped=torch.tensor([False, False]), states=context)
    ids = torch.randint(2, 100, (2, 9), generator=generator)
    t, uniform = mask_diffusion.draw((2, 9), generator)
    none = torch.zeros(2, 9, dtype=torch.bool)
    text = dict(images=latents, ids=ids, frozen=none, t=t, uniform=uniform,
                mask_id=109, weight="1/t")
    return models, image, text


@pytest.mark.parametrize("path, latents, velocity", [
    (SD3, "sd3.latents", "sd3.velocity"), (RELEASE, "ddit.latents", "ddit.velocity")])
def test_losses_from_published_weights_are_those_of_the_published_outputs(path, latents, velocity):
    """Of the published models' velocity and logits, in a plain loop over rows and tokens."""
    models, image, text = losses_of(path, EXPECTED[latents], EXPECTED["ddit.context"])
    with torch.no_grad():
        found = train.image_errors(models, image)
    for row in range(2):
        target = image["noise"][row] - image["images"][row]
        error = ((EXPECTED[velocity][row] - target) ** 2).mean()
        assert float(found[row]) == pytest.approx(float(error), rel=1e-4)
    if path == RELEASE:
        with torch.no_grad():
            found, logits = train.text_errors(models, text), EXPECTED["ddit.logits_t0"].double()
        for row in range(2):
            bits = 0.0
            for at in range(9):
                if text["uniform"][row, at] < text["t"][row]:
                    others = logits[row, at, :109]               # never [MASK] itself, the last
                    bits += float(torch.logsumexp(others, 0) - logits[row, at, text["ids"][row, at]])
            assert float(found[row]) == pytest.approx(bits / float(text["t"][row]), rel=1e-4)


def test_one_and_two_processes_and_any_micro_batch_make_the_same_update(chain, pictures, tmp_path):
    """With the norm clipped, bucketed sizes; over two T5 sharded, and activations computed again."""
    base = ["--init", chain / "pretrain", "--pixels", 24, "--buckets", "--steps", 3, "--clip", 0.5,
            "--lr", 1e-4]
    train.main(flags("mask-emb", tmp_path / "one", pictures, *base))
    train.main(flags("mask-emb", tmp_path / "micro", pictures, *base, "--micro-batch", 2))
    to_the_end(Forked(2, *flags("mask-emb", tmp_path / "two", pictures, *base, "--micro-batch", 1,
                                "--shard-t5", "--shard", "zero3", "--checkpoint-activations")))
    one = rows(tmp_path / "one")
    assert min(row["grad_norm"] for row in one) > 0.5
    weights = load_file(tmp_path / "one" / "weights.safetensors")
    for other in ("micro", "two"):
        for a, b in zip(one, rows(tmp_path / other), strict=True):
            for name in ("image_loss", "text_loss", "grad_norm"):
                assert a[name] == pytest.approx(b[name], rel=1e-5)
        found = load_file(tmp_path / other / "weights.safetensors")
        assert max(float((weights[name] - found[name]).abs().max()) for name in weights) < 1e-5


def test_dropped_captions_cost_no_t5_and_have_the_empty_prompts_states():
    t5 = checkpoint.load_t5(RELEASE).requires_grad_(False)
    tokenizer, seen = checkpoint.load_tokenizer(RELEASE), []
    texts = ["a red cat", "", "a green cat", ""]
    ids = torch.stack([tokenizer.encode(text, 12) for text in texts])
    with torch.no_grad():
        whole, empty = t5(ids), t5(tokenizer.encode("", 12)[None])
    watched = lambda ids, mask=None: seen.append(len(ids)) or t5(ids)
    models = Models(torch.nn.ModuleDict(), tokenizer, watched, None, empty)
    dropped = torch.tensor([False, True, False, True])
    assert torch.allclose(models.captions(ids, dropped), whole, atol=1e-5) and seen == [2]
    assert torch.allclose(models.captions(ids, dropped, whole), whole, atol=1e-5) and seen == [2]


@pytest.mark.parametrize("stored", [False, True])
def test_however_a_batch_is_cut_up_the_same_captions_are_dropped(stored):
    """The states of a dropped caption are the empty prompt's, whatever its ids and its stored states say."""
    length, width = 3, 4
    ids = torch.arange(1, 9)[:, None].expand(8, length)
    t5 = lambda ids, mask=None: ids[..., None].expand(-1, -1, width).float()
    models = Models(torch.nn.ModuleDict(), None, t5, None, torch.zeros(1, length, width))
    dropped = torch.tensor([True, True, False, True, False, False, True, True])
    states = t5(10 * ids) if stored else None
    expected = t5((10 if stored else 1) * ids * ~dropped[:, None])
    for micro in (1, 2, 4, 8):
        parts = [slice(at, at + micro) for at in range(0, 8, micro)]
        found = [models.captions(ids[part], dropped[part], states if states is None else states[part])
                 for part in parts]
        assert torch.equal(torch.cat(found), expected), micro


def test_all_training_with_t5_pads_with_its_end(pictures, tmp_path):
    """Also where the tokenizer's folder names <pad>, as SD3's does; that folder is read as it was."""
    folder = shutil.copytree(RELEASE / "tokenizer", tmp_path / "tokenizer_3")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps(dict(pad_token="<pad>")))
    assert checkpoint.load_tokenizer(folder).pad_id == 0
    config = train.parse(flags("pretrain", tmp_path / "run", pictures, *FROM_SD3[:4], "--tokenizer", folder,
                               "--pixels", 16, "--steps", 1))
    assert config.tokenizer == str(folder)
    _, held, _, run = train.set_up(config)
    run.close()
    assert held.tokenizer.pad_id == held.tokenizer.end_id == 1
    made = held.batches(config, 0)
    assert not (made["image"]["ids"] == 0).any() and not (made["text"]["ids"] == 0).any()


def test_the_defaults_that_are_the_published_ones():
    defaults = lambda *flags: train.parse([*flags, "--print-plan", "8"])
    assert defaults("--preset", "sd3-medium").recaption == 1.0
    assert defaults("--preset", "sd3-medium", "--stage", "instruct").recaption == 0.9
    own = defaults("--preset", "e2e-1.1b")
    assert own.steps == 400_000 and 940e6 < own.steps * own.image_batch < 1.3e9      # an epoch of DataComp
    assert own.text_batch == own.image_batch and own.image_batch % 64 == 0


def test_intervals_are_shares_of_the_steps_unless_they_are_given():
    intervals = lambda *flags: [getattr(train.parse(list(map(str, flags))), f"{name}_every")
                                for name in ("eval", "save", "sample")]
    assert intervals("--steps", 500) == [25, 50, 50]
    assert intervals("--steps", 3) == [1, 1, 1]
    assert intervals("--steps", 200_000) == [1000, 1000, 5000]
    assert intervals("--steps", 500, "--eval-every", 0, "--save-every", 7, "--sample-every", 0) == [0, 7, 0]


@pytest.fixture
def changed_program(tmp_path):
    """A copy of the program whose sources a test changes; returns a function that runs a file of it."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("viz/*.html")]:
        (tmp_path / file.parent.relative_to(ROOT)).mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / file.relative_to(ROOT))
    (tmp_path / "assets").symlink_to(ROOT / "assets")

    def change(file, line, more):
        source = (tmp_path / file).read_text()
        assert source.count(line) == 1
        (tmp_path / file).write_text(source.replace(line, line + more))

    def call(*command):
        return subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    return change, call


def test_a_new_field_of_either_config_is_trained_saved_and_sampled(changed_program, tiny, small_tar, tmp_path):
    change, call = changed_program
    change("model.py", "    qk_norm: bool = False", "\n    registers: int = 0\n    scale: float = 1\n    only: bool = False")
    change("training/config.py", "class TrainConfig:\n", "    colours: int = 0\n    hue: float = 0.5\n    shade: str = ''\n")
    flags = ["--init", tiny, "--image-data", small_tar, "--out", "run", "--steps", 2, "--image-batch", 4, "--text-batch", 4,
             "--eval-every", 0, "--sample-every", 0, "--device", "cpu", "--colours", 3]
    trained = call("train.py", *flags)
    assert trained.returncode == 0, trained.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mmdit"]["registers"] == 0
    assert json.loads((tmp_path / "run" / "train.json").read_text())["colours"] == 3
    drawn = call("sample.py", "--checkpoint", "run", "--prompt", "red apple", "--steps", 1, "--out", "a.png")
    assert drawn.returncode == 0 and (tmp_path / "a.png").exists(), drawn.stderr


def test_a_config_that_could_not_be_read_back_stops_the_run_before_its_first_step(changed_program, tiny, small_tar,
                                                                                  tmp_path):
    change, call = changed_program
    change("model.py", "    qk_norm: bool = False", "\n    registers: tuple = (1, 2)")
    refused = call("train.py", "--init", tiny, "--image-data", small_tar, "--out", "run", "--steps", 2)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "registers" in refused.stderr and not (tmp_path / "run").exists()


def test_the_scripts_run_each_stage_once_with_flags_that_there_are(tmp_path, monkeypatch):
    """With stand-ins for python and torchrun, which note how they were called and end the stage."""
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    (tmp_path / "python").write_text('''#!/bin/bash
        [ "$1" != -c ] || { echo 2.5; exit; }
        printf '%s\\t' "$@" >>called; echo >>called; steps=0; out=
        while [ $# -gt 0 ]; do
            case $1 in --stage) out=${out:-out/$2};; --out) out=$2;; --steps) steps=$2;; esac; shift
        done
        [ $steps = 0 ] || { mkdir -p $out; echo ' "step": '$steps, >$out/config.json; }''')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "torchrun").symlink_to("python")
    known = os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", SD3="sd3", TOKENIZER="t", VAE="v")
    call = lambda *command: subprocess.run(["bash", *command], cwd=tmp_path, env=known, check=True)
    for _ in range(2):                                           # the second time all stages are done
        call("runs/paper.sh")
        call("runs/end_to_end.sh")
    call("runs/own.sh", "folder", "a prompt", "--steps", "7")
    call("runs/own.sh", "runs", "a prompt")                      # a folder that is there: by its whole path
    calls = [line.split("\t")[:-1] for line in (tmp_path / "called").read_text().splitlines()]
    trained = [words[words.index("train.py") + 1:] for words in calls if "train.py" in words]
    monkeypatch.setattr(training_config, "start", lambda init, preset: ("", MMDiTConfig(**PRESETS["sd3-medium"]), {}))
    configs = [train.parse(words) for words in trained]
    assert [config.stage for config in configs] == [
        "pretrain", "mask-emb", "high-res", "instruct", "text", "pretrain", "pretrain", "instruct", "pretrain",
        "pretrain"]
    assert all(config.filtered for config in configs[:4])
    for config in configs[:4]:                                   # the paper's table, whatever the script says
        assert config.steps == training_config.STAGES[config.stage].steps and config.init
    prepared = [words[1:] for words in calls if words[0] == "data.py"]
    assert [words[0] for words in prepared] == ["pack", "latents", "pack", "latents", "show", "show"]
    assert configs[-2].steps == 7                                # own.sh passes further flags on
    assert [config.image_data[0] for config in configs[-2:]] == ["folder:2.5", f"{tmp_path}/runs:2.5"]
    refused = subprocess.run(["bash", "runs/own.sh", "folder"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "bash runs/own.sh FOLDER PROMPT" in refused.stderr


@pytest.mark.parametrize("more, status, message", [
    (["--stage", "text", *FROM_SD3], 1, "--stage text: is the end-to-end variant's, --init"),
    (["--stage", "mask-emb"], 1, "--stage mask-emb: teaches T5's [MASK], --preset emoji has a token"),
    (["--init", SD3, "--tokenizer", RELEASE], 1, "no T5 encoder in it"),
    (["--init", SD3, "--t5", RELEASE], 1, "has no tokenizer; name a folder or a tokenizer.json"),
    (["--init", RELEASE], 1, "expected an autoencoder, --vae, or its latents"),
    (["--init", RELEASE, "--vae", RELEASE], 1, "name the right one with --vae"),
    ([*FROM_SD3, "--pixels", 17], 1, "--pixels 17: expected a multiple of the patch, 4, up to 48"),
    ([*FROM_SD3, "--micro-batch", 3], 1, "--micro-batch 3 does not divide --text-batch 4 over 1 process"),
    ([*FROM_SD3, "--mask-embedding", "nowhere.pth"], 1, "nowhere.pth: not a file of one tensor"),
    (["--preset", "sd3-medium"], 1, "expected an autoencoder, --vae"),
    (["--preset", "sd3-medium", "--vae", SD3, "--pixels", 64], 1, "name its tokenizer with --tokenizer"),
    (["--stage", "text", "--image-batch", 3], 2, "--image-batch changes nothing without pictures"),
    (["--stage", "text"], 1, "--stage text: name its data with --text-data"),
    (["--preset", "e2e-1.1b"], 1, "--stage pretrain: name its data with --image-data"),
])
def test_mistakes_get_one_line_and_a_status(more, status, message, pictures, tmp_path, mistake):
    given = ["--out", tmp_path / "x", "--text-batch", 4, *more]
    if "text" not in more and "e2e-1.1b" not in more:
        given += ["--image-data", pictures, "--image-batch", 4]
        given += [] if "--pixels" in more else ["--pixels", 16]
    code, said = mistake(train.main, given)
    assert code == status and message in said.splitlines()[-1] and len(said.splitlines()) == 1


def test_instruct_from_sd3_is_warned_about_and_what_is_carried_over_said(pictures, tmp_path, capsys):
    train.main(flags("instruct", tmp_path / "run", pictures, *FROM_SD3, "--pixels", 16, "--steps", 1))
    said = capsys.readouterr().err
    assert "warning: --stage instruct from SD3, which has no text head" in said
    model = checkpoint.load_mmdit(SD3, vocab_size=110)
    kept = sum(p.numel() for p in model.parameters()) + model.positions.numel()
    head, text = 110 * 65, 64 * 65 + 64 * 257 + 256 * 65 + 4 * 64 * 65      # of which the gates, four of six
    fresh = head + 8 * 64 + text
    assert f"from SD3: {kept - fresh:,} values carried over; fresh: " in said and "text head 7,150" in said
