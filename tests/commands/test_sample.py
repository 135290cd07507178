"""sample.py with the shipped weights, called as a user would, and with broken checkpoints."""

import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageStat
from safetensors.torch import load_file, save_file

import checkpoint
import flow
import sample
from common import progress
from common.cli import UserError
from dataset.images import to_tensor
from helpers import ROOT, Forked
from inference import image_to_text, text_to_image
from inference.parts import EMOJI, Parts
from inference.text_to_image import DrawConfig, Trace
from metrics import emojis
from viz import grids

PROMPT = "red apple, noto style"


def draw_file(path, *flags):
    """Run sample.py --prompt in this process and return the image that it writes."""
    sample.main(["--prompt", PROMPT, "--out", str(path), *map(str, flags)])
    return Image.open(path)


def test_the_default_settings_draw_a_red_apple(tmp_path, capsys):
    image = draw_file(tmp_path / "a.png")
    assert image.size == (256, 256)
    red, green, blue = ImageStat.Stat(image).mean
    assert red > green and red > blue
    assert "56 evaluations" in capsys.readouterr().out       # 28 steps, with guidance


def test_the_same_seed_draws_the_same_image(tmp_path):
    process = Forked(1, "--prompt", PROMPT, "--steps", 4, "--out", tmp_path / "forked.png",
                     program="sample")
    default = draw_file(tmp_path / "a.png", "--steps", 4, "--seed", 0)
    other = draw_file(tmp_path / "b.png", "--steps", 4, "--seed", 1)
    process.communicate()
    assert process.returncode == 0
    assert Image.open(tmp_path / "forked.png").tobytes() == default.tobytes()
    assert other.tobytes() != default.tobytes()


def test_several_samples_form_a_grid_with_gaps(tmp_path):
    assert draw_file(tmp_path / "a.png", "--n", 3, "--steps", 1).size == (520, 520)


def test_a_trajectory_without_out_writes_no_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample.main(["--prompt", PROMPT, "--steps", "1", "--trajectory", "a.gif"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


def test_several_captions_are_scored_at_once(read_apple, monkeypatch):
    few_copies = functools.partial(image_to_text.score, copies=8)
    monkeypatch.setattr(image_to_text, "score", few_copies)
    first, second = read_apple("--score", "dog face, noto style", PROMPT).splitlines()
    assert first.startswith(f"{PROMPT}: ") and second.startswith("dog face, noto style: ")


def test_the_black_half_of_a_mask_is_kept(apple, tmp_path):
    before = Image.open(apple).convert("RGB")
    mask = Image.new("RGB", before.size, "black")
    mask.paste("white", (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    drawn = draw_file(tmp_path / "a.png", "--image", apple, "--mask", tmp_path / "mask.png",
                      "--steps", 2)
    original = grids.grid([to_tensor(before)])                   # enlarged like the drawing
    difference = abs(np.array(drawn, int) - np.array(original, int))             # (256, 256, 3)
    kept = difference[:, :120]                                   # enlarging mixes the next two pixels
    assert kept.max() <= 1 and difference[:, 128:].max() > 20


def test_a_gif_shows_each_step_beside_its_prediction(tmp_path):
    draw_file(tmp_path / "a.png", "--steps", 3, "--trajectory", tmp_path / "a.gif")
    gif = Image.open(tmp_path / "a.gif")
    assert gif.n_frames >= 3 and gif.size == (256 + 8 + 256, 256)


@pytest.fixture
def read_apple(apple, capsys):
    """Return a function that runs sample.py on the image of an apple and returns its output."""
    def read(*flags):
        sample.main(["--image", str(apple), *map(str, flags)])
        return capsys.readouterr().out
    return read


@pytest.mark.parametrize("flags, output", [([], PROMPT), (["--max-tokens", 1], "red")])
def test_an_image_is_captioned(flags, output, read_apple):
    assert read_apple(*flags) == f"{output}\n"


def test_a_text_is_completed_and_keeps_its_capitals(read_apple, monkeypatch):
    # 8 levels instead of 64 rank the nine ways to split two masks into tokens: 1 s instead of 3
    few_copies = functools.partial(image_to_text.score, copies=8)
    monkeypatch.setattr(image_to_text, "score", few_copies)
    assert read_apple("--text", "Red [MASK], [MASK] Style") == "Red apple, noto Style\n"


def test_a_text_with_a_line_break_is_shown_as_a_gif(read_apple, tmp_path):
    read_apple("--text", "red\n[MASK]\t[MASK]", "--trajectory", tmp_path / "t.gif")
    assert Image.open(tmp_path / "t.gif").n_frames > 1


def test_a_chat_goes_on_after_a_line_that_is_no_text(apple):
    process = subprocess.run([sys.executable, "sample.py", "--image", str(apple), "--chat"],
                             cwd=ROOT, input=b"caf\xe9?\nIs it food?\n\n", capture_output=True)
    first, second, _ = process.stdout.decode().split("> ")[1:]
    assert "UTF-8" in first and second.strip() in ("yes", "no") and process.returncode == 0


def test_an_answer_is_shown_as_a_gif(read_apple, tmp_path):
    gif = tmp_path / "q.gif"
    output = read_apple("--question", "Which style is it drawn in?", "--trajectory", gif)
    assert output == f"noto\n{gif}\n" and Image.open(gif).n_frames >= 2


def test_a_terminal_without_accents_reads_a_file_with_accents(apple, tmp_path):
    file = tmp_path / "pomme à l'été.webp"
    file.write_bytes(apple.read_bytes())
    process = subprocess.run([sys.executable, "sample.py", "--image", file], cwd=ROOT, text=True,
                             capture_output=True, env=os.environ | dict(LC_ALL="C", PYTHONUTF8="0"))
    assert (process.returncode, process.stdout) == (0, f"{PROMPT}\n"), process.stderr


def test_a_closed_pipe_is_left_to_the_command_line(apple, monkeypatch):
    """sample.py flushes each line, so that cli.run can end it silently if the pipe is closed."""
    reader, writer = os.pipe()
    os.close(reader)                                         # as `| head -0` does
    pipe = io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True)
    monkeypatch.setattr(sys, "stdout", pipe)
    with pytest.raises(BrokenPipeError):
        sample.main(["--image", str(apple), "--max-tokens", "1"])


def test_shipped_weights_read_and_draw_what_they_were_trained_on(parts, emoji_all):
    """Check roughly that the right weights are shipped; the README has the exact figures."""
    records, images = emoji_all
    shown = [i for i, record in enumerate(records) if record["split"] == "train"][:16]
    captions = [records[i]["caption"] for i in shown]
    texts = image_to_text.write(parts, images[shown], [None] * 16)
    assert sum(text == caption for text, caption in zip(texts, captions)) >= 15
    drawn = text_to_image.draw(parts, captions[:8], steps=12)
    nearest = emojis.nearest(drawn, images)
    right = [records[near]["emoji"] == records[i]["emoji"] for near, i in zip(nearest, shown)]
    assert sum(right) >= 7


@torch.inference_mode()
def euler(parts, noise, steps, prompt=PROMPT, shift=None):
    """Draw from noise with Euler steps and the text's velocity, without text_to_image.draw."""
    text = parts.text(parts.tokenizer.encode(prompt, parts.length)[None])
    levels = text_to_image.noise_levels(parts, DrawConfig(steps, shift=shift))
    return flow.euler(lambda x, t: parts.mmdit(x, text, t)[0], noise, levels)


def noise_of(parts, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, parts.height, parts.width, generator=generator)


@pytest.mark.parametrize("shift", [None, 4.0])
def test_guidance_1_is_the_texts_velocity_at_the_given_shift(shift, parts):
    expected = euler(parts, noise_of(parts, 5), 3, shift=shift).clamp(-1, 1)
    drawn = text_to_image.draw(parts, [PROMPT], steps=3, seed=5, guidance=1, shift=shift)
    assert torch.allclose(drawn, expected, atol=1e-4)        # float32 sums in another order


def test_a_negative_prompt_changes_the_image(parts):
    plain = text_to_image.draw(parts, [PROMPT], steps=2, negative_prompt="")
    pushed = text_to_image.draw(parts, [PROMPT], steps=2, negative_prompt="flag of Brazil")
    assert (plain - pushed).abs().max() > 0.01


def test_images_of_any_batch_equal_those_drawn_singly(parts):
    """18 images of two prompts are drawn in batches of 16 and 2; each has the next seed."""
    noise = torch.cat([noise_of(parts, 7 + i) for i in range(18)])
    prompts = [PROMPT, "snowman, noto style"] * 9
    trace = Trace(steps=[])
    drawn = text_to_image.draw(parts, prompts, seed=7, trace=trace, steps=2, guidance=1)
    assert drawn.shape == noise.shape and trace.evaluations == 36
    levels = text_to_image.noise_levels(parts, DrawConfig(2)).tolist()
    assert [step.t for step in trace.steps] == levels
    assert all(len(step.x) == len(step.clean) == 18 for step in trace.steps)
    assert torch.equal(torch.stack(trace.steps[0].x), noise)
    for i in (0, 15, 16, 17):
        single = euler(parts, noise[i:i + 1], 2, prompts[i])[0]
        # float32 sums in another order
        assert torch.allclose(drawn[i], single.clamp(-1, 1), atol=1e-4)
        assert torch.allclose(trace.steps[-1].clean[i], single, atol=1e-4)


def test_a_long_sampling_run_prints_its_progress(parts, monkeypatch, capsys):
    clock = iter(range(100))                                 # each call of the clock adds a second
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(parts, "silent", False)
    text_to_image.draw(parts, [PROMPT], steps=6)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2                                   # one every 2 seconds at most
    for line, parts_of_line in zip(lines, [("3/6", "1.0/s", "3 s left"), ("6/6", "0 s left")]):
        assert line.startswith("drawing") and all(part in line for part in parts_of_line)


def test_a_size_the_weights_were_not_trained_on_gets_a_warning(tmp_path, capsys):
    draw_file(tmp_path / "a.png", "--steps", 1, "--height", 64, "--width", 64)
    assert capsys.readouterr().err == ""
    draw_file(tmp_path / "a.png", "--steps", 1, "--height", 128)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1
    assert "128" in warning and "64 by 64" in warning


def draw_prompt(tmp_path, capsys, *prompt):
    """Draw PROMPT with these flags; return the bytes of the image, and the text on stderr."""
    sample.main([*prompt, "--steps", "1", "--out", str(tmp_path / "a.png")])
    return (tmp_path / "a.png").read_bytes(), capsys.readouterr().err


def test_a_prompt_is_lowered_as_the_captions_of_training_were(tmp_path, capsys):
    lower, no_note = draw_prompt(tmp_path, capsys, "--prompt", PROMPT)
    mixed, note = draw_prompt(tmp_path, capsys, "--prompt", "Red Apple, NOTO style")
    assert mixed == lower and no_note == ""
    assert note.count("\n") == 1 and "prompt" in note and f"'{PROMPT}'" in note


def test_a_word_that_is_not_in_the_training_set_gets_a_warning(tmp_path, capsys):
    flags = ["--prompt", "a quasar, quasar", "--negative-prompt", "zoo"]
    second, first = draw_prompt(tmp_path, capsys, *flags)[1].splitlines()
    assert first.startswith("warning: prompt: ") and first.count("quasar") == 1
    assert second.startswith("warning: negative prompt: ") and second.endswith("zoo")


def test_a_question_that_begins_with_a_capital_gets_no_note(apple, capsys):
    question = "Which style is it drawn in?"
    sample.main(["--image", str(apple), "--question", question, "--max-tokens", "1"])
    assert capsys.readouterr().err == ""


def test_bfloat16_stays_close_to_float32(parts):
    half = Parts(dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, parts.height, parts.width, generator=generator)
    ids = torch.randint(0, 1000, (2, parts.length), generator=generator)
    with torch.inference_mode():
        full = parts.mmdit(x, parts.text(ids), torch.tensor([0.5]))
        low = half.mmdit(x.bfloat16(), half.text(ids), torch.tensor([0.5]))
    for a, b in zip(full, low):
        assert float((a - b.float()).norm() / a.norm()) < 5e-2      # each rounding is off by 0.4 %


ONE_IMAGE = ["--image", "APPLE"]
EDIT = ["--prompt", "a", "--image", "APPLE"]


@pytest.mark.parametrize("flags, status, message", [
    # drawing
    (["--prompt", " "], 2, "--prompt is empty"),
    (["--prompt", "apple " * 200], 1, "prompt .*201 .*27"),
    (["--prompt", "a", "--steps", "0"], 2, "--steps: .*'0'"),
    (["--prompt", "a", "--n", "0"], 2, "--n: .*'0'"),
    (["--prompt", "a", "--n", "1000000000000"], 2, "--n: .*'1000000000000'"),
    (["--prompt", "a", "--steps", "1000000000000"], 2, "--steps: .*'1000000000000'"),
    (["--prompt", "a", "--guidance", "1e38"], 2, "--guidance: .*'1e38'"),
    (["--prompt", "a", "--dtype", "float8"], 2, "--dtype: .*'float8'"),
    (["--prompt", "a", "--promt", "b"], 2, "--promt; .*--prompt"),
    (["--prompt", "a", "--solver", "sideways"], 2, "--solver: .*'sideways'.*'euler', 'heun'"),
    (["--prompt", "a", "--guidance-interval", "0.9", "0.2"], 1, "guidance interval 0.9 0.2"),
    (["--prompt", "a", "--guidance-interval", "0", "2"], 2, "--guidance-interval: .*'2'"),
    (["--prompt", "a", "--best"], 2, "--best .*--n"),
    (["--prompt", "a", "--n", "2", "--best", "--trajectory", "a.gif"], 2, "--trajectory .*--best"),
    (["--prompt", "a", "--guidance", "1", "--negative-prompt", "b"], 1, "guidance 1 .*negative"),
    (["--prompt", "a", "--length", "auto"], 2, "--length: .*'auto'"),
    (["--prompt", "a", "b"], 2, "argument b; .*quotes"),
    (["--prompt", "a", "--question", "b"], 2, "--question .*--image"),
    (["--prompt", "a", "--checkpoint", "nowhere"], 1, "nowhere: .*nothing"),
    # files of drawing
    (["--prompt", "a", "--out", "nowhere/a.png"], 2, "--out .*folder nowhere does not exist"),
    (["--prompt", "a", "--out", "a.xyz"], 2, "--out a.xyz"),
    (["--prompt", "a", "--out", ""], 2, "--out"),
    (["--prompt", "a", "--out", "a.gif", "--trajectory", "a.gif"], 2,
     "--out .*--trajectory .*a.gif"),
    (["--prompt", "a", "--n", "2", "--trajectory", "a.html"], 2, "--trajectory .*--n"),
    # a file of prompts
    (["--prompts", "LICENSE", "--prompt", "a"], 2, "--prompt .*--prompts"),
    (["--prompts", "nowhere.txt"], 1, "nowhere.txt: .*No such file"),
    (["--prompts", "LICENSE", "--out", "README.md"], 2, "--out README.md: .*folder"),
    (["--prompts", os.devnull], 1, f"{os.devnull}: is empty"),
    (["--prompts", "README.md"], 1, "prompt .* tokens.*27"),
    # drawing over an image
    (EDIT, 2, "--prompt with --image .*--strength.*--mask"),
    (["--prompt", "a", "--strength", "0.5"], 2, "--strength .*--image"),
    ([*EDIT, "--strength", "1.5"], 2, "--strength: .*'1.5'"),
    ([*EDIT, "--strength", "1", "--question", "c"], 2, "--question changes nothing"),
    ([*EDIT, "--mask", "assets/readme.webp"], 1, "readme.webp: a mask"),
    ([*EDIT, "--mask", "README.md"], 1, "README.md: not an image"),
    (["--prompt", "a", "--image", "README.md", "--strength", "1"], 1, "README.md: not an image"),
    # reading an image
    ([], 2, "--prompt .*--image"),
    (["--image", "nowhere.png"], 1, "nowhere.png: "),
    (["--image", "README.md"], 1, "README.md: not an image"),
    ([*ONE_IMAGE, "--steps", "0"], 2, "--steps: .*'0'"),
    ([*ONE_IMAGE, "--order", "sideways"], 2, "--order: .*'sideways'.*'random', 'conf"),
    ([*ONE_IMAGE, "--steps", "3"], 1, "steps 3 .*order threshold.*random or confidence"),
    (["--text", "red [MASK]", "--order", "eb", "--steps", "3"], 1, "steps 3 .*order eb"),
    ([*ONE_IMAGE, "--image-cache", "4"], 2, "--image-cache: .*'4'.*'once', 'off'"),
    ([*ONE_IMAGE, "--order", "threshold", "--level", "1.5"], 1, "order threshold.*1.5"),
    ([*ONE_IMAGE, "--order", "random", "--level", "1"], 1, "order random.*level"),
    ([*ONE_IMAGE, "--level", "1.5"], 1, "order threshold.*1.5"),
    ([*ONE_IMAGE, "--t5", "assets/emoji"], 1, "--t5: .*embedding of its own"),
    ([*ONE_IMAGE, "--level", "0"], 2, "--level: .*'0'"),
    ([*ONE_IMAGE, "--temperature", "1e-310"], 1, "temperature .*1e-310"),
    ([*ONE_IMAGE, "--length", "long"], 2, "--length: .*whole .*2"),
    # filling, asking and scoring
    ([*ONE_IMAGE, "--text", "no gap"], 1, r"text 'no gap'.*\[MASK\]"),
    ([*ONE_IMAGE, "--text", "very " * 40 + "[MASK]"], 1, "text has .*27"),
    (["--image", "APPLE", "APPLE", "--text", "a [MASK]"], 2, "--image: .*one with --text, got 2"),
    ([*ONE_IMAGE, "--text", "a [MASK]", "--question", "b"], 2, "--question .*--text"),
    ([*ONE_IMAGE, "--question", "why " * 40], 1, "question.*no room"),
    ([*ONE_IMAGE, "--questions", "nowhere.txt"], 1, "nowhere.txt: .*No such file"),
    ([*ONE_IMAGE, "--choices", "yes", "no"], 2, "--choices .*--question"),
    ([*ONE_IMAGE, "--question", "a", "--choices", "yes", "yes"], 2, "--choices: .*twice"),
    (["--question", "a"], 2, "--image"),
    ([*ONE_IMAGE, "--score", " "], 2, "--score is empty"),
    (["--text", "a [MASK]", "--text-guidance", "2"], 2, "--text-guidance .*--image"),
    (["--image", "APPLE", "APPLE", "--trajectory", "a.gif"], 2, "--trajectory .*one --image"),
    ([*ONE_IMAGE, "--question", "a", "--choices", "very " * 40], 1, "'very very .*27"),
    ([*ONE_IMAGE, "--score", "a", "--order", "eb"], 2, "--order changes nothing"),
])
def test_mistakes_are_refused_in_one_line(flags, status, message, apple, run_program, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, error = run_program(sample.main, [apple if flag == "APPLE" else flag for flag in flags])
    assert code == status and re.search(message, error), error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("flags, status, name", [
    (["--prompt", "a", "--steps", "0"], 2, "--steps"),
    (["--image", "nowhere.png"], 1, "nowhere.png")])
def test_the_program_prints_a_mistake_without_a_traceback(flags, status, name):
    process = Forked(1, *flags, program="sample")
    _, error = process.communicate()
    assert process.returncode == status
    assert error.startswith("error: ") and name in error and len(error.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")
def test_a_gpu_that_is_not_there_is_refused(apple, run_program):
    status, error = run_program(sample.main, ["--image", apple, "--device", "cuda"])
    assert status == 1 and "--device cuda" in error and len(error.splitlines()) == 1


def change_tensors(change):
    """Return a function that changes the tensors of a checkpoint's folder."""
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return apply


def change_config(change):
    """Return a function that changes the configuration of a checkpoint's folder."""
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
    return apply


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])


@pytest.mark.parametrize("change, parts", [
    (lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors", "No such file"]),
    (cut, ["model.safetensors", "not a whole"]),
    (change_tensors(lambda t: t.pop("mmdit.img_in.weight")), ["mmdit.img_in.weight is missing"]),
    (change_tensors(lambda t: t.update({"mmdit.more": torch.zeros(1)})), ["mmdit.more is not"]),
    (change_tensors(lambda t: t["mmdit.img_in.bias"].fill_(float("nan"))),
     ["mmdit.img_in.bias", "NaN"]),
    (change_config(lambda c: c["mmdit"].update(patch=4)),
     ["mmdit.img_in.weight", "(192, 192)", "(192, 48)"]),
    (change_config(lambda c: c["mmdit"].update(width=190)), ["sizes"]),
    (change_config(lambda c: c["mmdit"].update(depht=3)), ["depht"]),
    (change_config(lambda c: c.update(format="other")), ["'other'"]),
    (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "JSON"]),
    (lambda folder: (folder / "tokenizer.json").write_text('{"tokenizer": "bert"}'), ["'bert'"]),
])
def test_a_broken_checkpoint_is_refused_by_name(change, parts, tmp_path):
    folder = Path(shutil.copytree(EMOJI, tmp_path / "checkpoint"))
    change(folder)
    with pytest.raises(UserError) as error:
        Parts(folder)
    message = str(error.value)
    assert str(folder) in message and "\n" not in message
    for part in parts:
        assert part in message


def test_a_saved_checkpoint_loads_bit_for_bit(parts, tmp_path):
    tensors = {f"mmdit.{name}": value for name, value in parts.mmdit.named_parameters()}
    tensors |= {f"embedding.{name}": value for name, value in parts.text.named_parameters()}
    checkpoint.save(tmp_path, tensors, parts.mmdit.config, parts.tokenizer, pixels=32)
    loaded = Parts(tmp_path, dtype=torch.float32)
    for module in ("mmdit", "text"):
        saved = getattr(parts, module).state_dict()
        again = getattr(loaded, module).state_dict()
        assert saved.keys() == again.keys()
        for name, value in saved.items():
            assert torch.equal(value, again[name]), name


def test_the_shipped_weights_have_at_most_24_mib():
    assert (EMOJI / "model.safetensors").stat().st_size <= 24 * 2**20
