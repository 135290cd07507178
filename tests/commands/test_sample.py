"""sample.py and checkpoint.py, with the shipped weights and as a person would call them."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint
import flow
import sample
from common import progress
from common.cli import UserError
from inference import image_to_text, text_to_image
from inference.parts import EMOJI, Parts
from metrics import emojis

ROOT = Path(__file__).parents[2]


def run(*flags, expect=0, **environment):
    done = subprocess.run([sys.executable, "sample.py", *map(str, flags)], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | environment)
    assert done.returncode == expect, done.stderr
    return done


def test_one_command_draws_a_picture_and_the_same_seed_draws_it_again(tmp_path):
    started = time.time()
    run("--prompt", "red apple, noto style", "--out", tmp_path / "a.png", "--trajectory", tmp_path / "a.gif")
    assert time.time() - started < 15 * 2  # the promise is 15 s; a shared machine gets twice that
    again = ["--prompt", "red apple, noto style", "--out"]
    sample.main([*again, str(tmp_path / "b.png"), "--seed", "0"])
    sample.main([*again, str(tmp_path / "c.png"), "--seed", "1", "--n", "3", "--steps", "4"])
    a, b, c = (Image.open(tmp_path / f"{name}.png") for name in "abc")
    assert a.size == (256, 256) and a.tobytes() == b.tobytes()
    assert c.size == (520, 520)                              # two by two, with a gap
    motion = Image.open(tmp_path / "a.gif")
    assert motion.n_frames > 10 and motion.size == (256 + 8 + 256, 256)           # x_t beside the prediction
    r, g, b = [sum(band.histogram()[i] * i for i in range(256)) / 256**2 for band in a.split()]
    assert r > g and r > b                                   # an apple that is red


def test_a_picture_is_captioned_and_answered_and_completed(apple, tmp_path, capsys):
    def said(*flags):
        sample.main(["--image", str(apple), *map(str, flags)])
        return capsys.readouterr().out
    assert said() == "red apple, noto style\n"
    answer = said("--question", "Which style is it drawn in?", "--trajectory", tmp_path / "q.gif")
    assert answer == f"noto\n{tmp_path / 'q.gif'}\n" and Image.open(tmp_path / "q.gif").n_frames >= 2
    assert said("--text", "red [MASK], [MASK] style") == "red apple, noto style\n"
    assert said("--max-tokens", 1) == "red\n"


def test_a_terminal_without_accents_and_a_reader_that_left_change_nothing(apple, tmp_path):
    named = tmp_path / "pomme à l'été.webp"
    named.write_bytes(apple.read_bytes())
    assert run("--image", named, LC_ALL="C", PYTHONUTF8="0").stdout == "red apple, noto style\n"
    left = subprocess.Popen([sys.executable, "sample.py", "--image", named], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)
    left.stdout.close()                                          # as `| head -0` does
    assert left.stderr.read() == "" and left.wait() == 1


def test_shipped_weights_read_and_draw_what_they_were_trained_on(parts, emoji_all):
    """A coarse guard that the right weights are shipped; README has the figures."""
    records, pictures = emoji_all
    shown = [i for i, r in enumerate(records) if r["split"] == "train"][:32]
    said = sample.write(parts, pictures[shown])
    assert sum(text == records[i]["caption"] for text, i in zip(said, shown)) >= 31
    drawn = text_to_image.draw(parts, [records[i]["caption"] for i in shown[:16]], steps=12)
    found = emojis.nearest(drawn, pictures)
    assert sum(records[f]["emoji"] == records[i]["emoji"] for f, i in zip(found, shown)) >= 15


def test_guidance_one_is_the_text_velocity_alone_and_a_negative_prompt_changes_the_drawing(parts):
    noise = torch.randn(1, 3, parts.height, parts.width, generator=torch.Generator().manual_seed(0))
    text = parts.text(parts.tokenizer.encode("red apple, noto style", parts.length)[None])
    with torch.inference_mode():
        alone = flow.euler(lambda x, t: parts.mmdit(x, text, t)[0], noise, text_to_image.levels(parts, 4))
    how = dict(steps=4, seed=0)
    drawn = text_to_image.draw(parts, ["red apple, noto style"], guidance=1, **how)
    assert torch.allclose(drawn, alone.clamp(-1, 1), atol=1e-4)
    plain, pushed = (text_to_image.draw(parts, ["red apple, noto style"], negative=n, **how)
                     for n in ("", "flag of Brazil"))
    assert (plain - pushed).abs().max() > 0.01


def test_many_are_drawn_in_batches_as_if_each_were_drawn_alone(parts):
    """18 pictures, in batches of 16 and 2, of two prompts; each has the next seed."""
    shape = 1, 3, parts.height, parts.width
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(7 + i)) for i in range(18)])
    prompts, seen = ["red apple, noto style", "snowman, noto style"] * 9, text_to_image.Seen()
    drawn = text_to_image.draw(parts, prompts, steps=2, seed=7, guidance=1, seen=seen)
    assert drawn.shape == (18, *shape[1:]) and seen.rows == 36
    assert [t for t, _, _ in seen.states] == text_to_image.levels(parts, 2).tolist()
    assert all(x.shape == clean.shape == drawn.shape for _, x, clean in seen.states)
    assert torch.equal(seen.states[0][1], noise)
    for i in (0, 15, 16, 17):
        text = parts.text(parts.tokenizer.encode(prompts[i], parts.length)[None])
        with torch.inference_mode():
            velocity = lambda x, t: parts.mmdit(x, text, t)[0]
            alone = flow.euler(velocity, noise[i:i + 1], text_to_image.levels(parts, 2))
        assert torch.allclose(drawn[i], alone[0].clamp(-1, 1), atol=1e-4)
        assert torch.allclose(seen.states[-1][2][i], alone[0], atol=1e-4)


def test_a_walk_that_takes_long_says_how_far_it_is(parts, monkeypatch, capsys):
    clock = iter(range(100))                                     # a second passes between any two looks at it
    monkeypatch.setattr(progress.time, "time", lambda: next(clock))
    function = image_to_text.watched(parts, lambda x: x + 1, 6, "drawing")
    assert [function(i) for i in range(6)] == list(range(1, 7))
    said = capsys.readouterr().err.splitlines()
    assert said == [f"drawing, evaluations: {n}/6, 1.0/s, {left} s left" for n, left in ((3, 3), (6, 0))]


def test_a_size_that_was_not_learnt_gets_a_warning(tmp_path, capsys):
    draw = ["--prompt", "snowman, noto style", "--steps", "1", "--out", str(tmp_path / "a.png")]
    sample.main([*draw, "--height", "64", "--width", "64"])
    assert capsys.readouterr().err == ""
    sample.main([*draw, "--height", "128"])
    assert capsys.readouterr().err.startswith("warning: a height of 128 and a width of 64; these weights "
                                              "have learnt pictures of 64 by 64, and may show tiles")


def test_the_shift_of_the_noise_levels_is_used(parts):
    noise = torch.randn(1, 3, parts.height, parts.width, generator=torch.Generator().manual_seed(5))
    text = parts.text(parts.tokenizer.encode("red apple, noto style", parts.length)[None])
    with torch.inference_mode():
        velocity = lambda x, t: parts.mmdit(x, text, t)[0]
        true = flow.euler(velocity, noise, text_to_image.levels(parts, 3, 4.0)).clamp(-1, 1)
    drawn = text_to_image.draw(parts, ["red apple, noto style"], steps=3, seed=5, guidance=1, shift=4.0)
    assert torch.allclose(drawn, true, atol=1e-4)


def test_a_prompt_is_read_as_captions_are_written_and_words_never_met_are_named(apple, tmp_path, capsys):
    for given in ("red apple, noto style", "Red Apple, NOTO style"):
        sample.main(["--prompt", given, "--steps", "2", "--out", str(tmp_path / f"{given[0]}.png")])
        said = capsys.readouterr().err
        assert said == "" if given[0] == "r" else said == (
            "note: --prompt is read as 'red apple, noto style', as captions were written in training\n")
    assert (tmp_path / "r.png").read_bytes() == (tmp_path / "R.png").read_bytes()
    sample.main(["--prompt", "a quasar, quasar", "--negative-prompt", "zoo", "--steps", "1", "--out",
                 str(tmp_path / "a.png")])
    assert capsys.readouterr().err == ("warning: --prompt: no text in training had quasar\n"
                                       "warning: --negative-prompt: no text in training had zoo\n")
    sample.main(["--image", str(apple), "--text", "Red [MASK], [MASK] Style"])
    assert capsys.readouterr().out == "Red apple, noto Style\n"
    sample.main(["--image", str(apple), "--question", "Which style is it drawn in?", "--steps", "1"])
    assert capsys.readouterr().err == ""


def test_bfloat16_stays_close_to_float32(parts):
    half = Parts(dtype=torch.bfloat16)
    x = torch.randn(2, 3, parts.height, parts.width)
    ids = torch.randint(0, 1000, (2, parts.length))
    with torch.inference_mode():
        full = parts.mmdit(x, parts.text(ids), torch.tensor([0.5]))
        low = half.mmdit(x.bfloat16(), half.text(ids), torch.tensor([0.5]))
    for a, b in zip(full, low):
        assert float((a - b.float()).norm() / a.norm()) < 5e-2      # bf16 has 8 bits: 0.4 % a rounding


@pytest.mark.parametrize("flags, status, message", [
    ([], 2, "give --prompt TEXT to draw, or --image FILE to read a picture"),
    (["--prompt", "a", "--image", "APPLE"], 2, "say from which noise level, --strength 0.7, or where"),
    (["--prompt", "a", "--strength", "0.5"], 2, "--strength is about drawing over a picture: give --image"),
    (["--prompt", "a", "--image", "APPLE", "--strength", "1.5"], 2, "a number from 0 to 1, got '1.5'"),
    (["--prompt", "a", "--image", "APPLE", "--mask", "assets/readme.webp"], 1, "readme.webp: a mask of"),
    (["--prompt", "a", "--image", "APPLE", "--mask", "README.md"], 1, "README.md: not a picture that can be"),
    (["--prompt", "a", "--image", "README.md", "--strength", "1"], 1, "README.md: not a picture that can be"),
    (["--prompt", "a", "--guidance-interval", "0.9", "0.2"], 2, "0.9 0.2: expected the lower"),
    (["--prompt", "a", "--guidance-interval", "0", "2"], 2, "expected a number from 0 to 1, got '2'"),
    (["--prompt", "a", "--solver", "ab2"], 2, "invalid choice: 'ab2' (choose from 'euler', 'heun')"),
    (["--image", "APPLE", "--prompt", "b", "--strength", "1", "--question", "c"], 2, "--question changes nothing"),
    (["--prompts", "LICENSE", "--prompt", "a"], 2, "give --prompt or --prompts, not both"),
    (["--prompts", "nowhere.txt"], 1, "nowhere.txt: can't be read (No such file"),
    (["--prompts", os.devnull], 1, "holds no prompt; write one a line"),
    (["--prompts", "README.md"], 1, " tokens, expected at most 27; cut it"),
    (["--prompt", "a", "--out", "a.gif", "--trajectory", "a.gif"], 2, "--trajectory are both a.gif"),
    (["--prompt", "a", "--compile", "--trajectory", "a.html"], 2, "blocks that are not compiled; leave out"),
    (["--prompt", "a", "--n", "2", "--trajectory", "a.html"], 2, "FILE.html is about one picture"),
    (["--prompt", " "], 2, "--prompt is empty"),
    (["--prompt", "apple " * 200], 1, "--prompt has 201 tokens, expected at most 27; cut it"),
    (["--prompt", "a", "--steps", "0"], 2, "--steps: expected a whole number, at least 1, got '0'"),
    (["--prompt", "a", "--n", "0"], 2, "--n: expected a whole number, at least 1, got '0'"),
    (["--prompt", "a", "--dtype", "float8"], 2, "invalid choice: 'float8'"),
    (["--prompt", "a", "--promt", "b"], 2, "unknown argument --promt; did you mean --prompt?"),
    (["--prompt", "a", "--out", "nowhere/a.png"], 2, "the folder nowhere does not exist"),
    (["--prompt", "a", "--out", "a.xyz"], 2, "expected a picture's name"),
    (["--prompt", "a", "--checkpoint", "nowhere"], 1,
     "nowhere: expected a checkpoint, a folder or a .safetensors file, found nothing"),
    (["--prompt", "a", "--question", "b"], 2, "--question changes nothing without --image"),
    (["--image", "nowhere.png"], 1, "nowhere.png: no such picture file"),
    (["--image", "README.md"], 1, "README.md: not a picture that can be read"),
    (["--image", "APPLE", "--text", "no gap"], 2, "--text holds no [MASK]"),
    (["--image", "APPLE", "--text", "very " * 40 + "[MASK]"], 1, "expected at most 27"),
    (["--image", "APPLE", "--question", "why " * 40], 1, "leaves no room for an answer"),
    (["--image", "APPLE", "--order", "remask"], 2, "invalid choice: 'remask' (choose from 'random', 'conf"),
    (["--image", "APPLE", "--image-cache", "4"], 2, "invalid choice: '4' (choose from 'once', 'off')"),
    (["--image", "APPLE", "--order", "threshold", "--level", "1.5"], 1, "above 0 and at most 1, got 1.5"),
    (["--image", "APPLE", "--level", "0"], 2, "--level: expected a number, at least 1e-09, got '0'"),
    (["--image", "APPLE", "--order", "random", "--level", "1"], 1, "order random has no level"),
    (["--image", "APPLE", "--steps", "0"], 2, "--steps: expected a whole number, at least 1, got '0'"),
    (["--image", "APPLE", "--choices", "yes", "no"], 2, "--choices changes nothing without --question"),
    (["--image", "APPLE", "--question", "a", "--choices", "very " * 40], 1, "tokens with the question, exp"),
    (["--image", "APPLE", "--questions", "nowhere.txt"], 1, "nowhere.txt: can't be read (No such file"),
    (["--image", "APPLE", "APPLE", "--text", "a [MASK]"], 2, "--text is about one picture"),
    (["--image", "APPLE", "--text", "a [MASK]", "--question", "b"], 2, "give --text or --question, not both"),
    (["--image", "APPLE", "--score", "a", "--order", "eb"], 2, "--order changes nothing where no text is"),
    (["--prompt", "a", "--best"], 2, "--best changes nothing without --n"),
    (["--image", "APPLE", "--length", "long"], 2, "--length: expected a whole number, at least 2"),
])
def test_mistakes_get_one_line_and_a_status(flags, status, message, apple, mistake, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, said = mistake(sample.main, [apple if flag == "APPLE" else flag for flag in flags])
    assert code == status and message in said and len(said.splitlines()) == 1


def test_the_program_prints_a_mistake_and_no_traceback(apple):
    for flags, status in ((["--prompt", "a", "--steps", "0"], 2), (["--image", "nowhere.png"], 1)):
        done = run(*flags, expect=status)
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")
def test_asking_for_a_gpu_that_is_not_there(apple):
    assert "--device cuda: torch has none" in run("--image", apple, "--device", "cuda", expect=1).stderr


def broken(tmp_path, change):
    """A copy of the shipped checkpoint, spoilt by change(folder, tensors, config)."""
    folder = Path(shutil.copytree(EMOJI, tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if change(folder, tensors, config) is None:
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("change, message", [
    (lambda f, t, c: (f / "model.safetensors").unlink() or True, "No such file"),
    (lambda f, t, c: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:100_000]),
     "not a whole safetensors file"),
    (lambda f, t, c: t.__delitem__("mmdit.img_in.weight"), "mmdit.img_in.weight is missing"),
    (lambda f, t, c: t.update({"mmdit.more": torch.zeros(1)}), "mmdit.more is not a part of this model"),
    (lambda f, t, c: c["mmdit"].update(patch=4),
     "mmdit.img_in.weight is (192, 192), this model's sizes ask for (192, 48)"),
    (lambda f, t, c: c["mmdit"].update(width=190), "no model has these sizes"),
    (lambda f, t, c: c["mmdit"].update(depht=3), "unknown sizes depht"),
    (lambda f, t, c: c.update(format="other"), "found 'other'"),
    (lambda f, t, c: t["mmdit.img_in.bias"].fill_(float("nan")) is None or None,
     "mmdit.img_in.bias holds NaN or infinity"),
    (lambda f, t, c: (f / "config.json").write_text("{") and True, "not readable as JSON"),
    (lambda f, t, c: (f / "tokenizer.json").write_text('{"tokenizer": "bert"}') and True, "found 'bert'"),
])
def test_broken_checkpoints_are_refused_by_name(change, message, tmp_path):
    folder = broken(tmp_path, change)
    with pytest.raises(UserError) as error:
        Parts(folder)
    assert message in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_saved_checkpoint_loads_bit_for_bit(parts, tmp_path):
    tensors = {f"mmdit.{k}": v for k, v in parts.mmdit.named_parameters()}
    tensors |= {f"embedding.{k}": v for k, v in parts.text.named_parameters()}
    checkpoint.save(tmp_path, tensors, parts.mmdit.config, parts.tokenizer, pixels=32)
    again = Parts(tmp_path, dtype=torch.float32)
    for a, b in zip(parts.mmdit.state_dict().items(), again.mmdit.state_dict().items()):
        assert a[0] == b[0] and torch.equal(a[1], b[1])
    assert (EMOJI / "model.safetensors").stat().st_size <= 24 * 2**20
