"""inference/image_folder.py: the same files in any batch; and drawing over an image."""

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from common.cli import UserError
from dataset.images import (fit_image, read_mask, read_image, text_fields, to_image,
                            to_tensor)
from inference import compiled, image_folder, image_to_text, text_to_image
from inference.parts import EMOJI, Parts
from inference.text_to_image import DrawConfig, Edit, Trace

PROMPTS = ["red apple, noto style", "snowman, noto style", "flag of Chad, twemoji style"]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def either(request, parts):
    """Return the shipped weights in each of both dtypes."""
    return parts if request.param == torch.float32 else Parts(dtype=request.param)


@pytest.fixture
def apple_image(parts, apple):
    return fit_image(read_image(apple), parts.height, parts.width)


@pytest.fixture
def apple_latents(either, apple_image):
    return image_to_text.encode(either, to_tensor(apple_image)[None], dtype=torch.float32)


def pixels(image):
    return np.array(to_image(image))


def levels(content):
    """Return the pixels of an image file's bytes, 0 to 255, as floats."""
    return np.array(read_image(content)).astype(float)


def test_an_interval_from_the_command_line_equals_the_default():
    assert DrawConfig(guidance_interval=[0.0, 1.0]) == DrawConfig()


def test_a_file_does_not_depend_on_its_batch_or_place(either, tmp_path):
    jobs = [(prompt, seed) for prompt in PROMPTS for seed in (0, 5)]
    image_folder.draw_missing(either, jobs, tmp_path / "single", DrawConfig(steps=3, batch=1))
    image_folder.draw_missing(either, jobs[::-1], tmp_path / "batch", DrawConfig(steps=3, batch=64))
    single = [path.read_bytes() for path in sorted((tmp_path / "single").iterdir())]
    batch = [path.read_bytes() for path in sorted((tmp_path / "batch").iterdir(), reverse=True)]
    assert len(set(single)) == 6
    if either.dtype == torch.float32:
        assert single == batch
    for one, other in zip(single, batch, strict=True):
        difference = levels(one) - levels(other)
        # bfloat16 products of an AMX CPU round differently in another batch: by 0.4 levels on
        # average and 8 at most.  After 3 steps, other seeds differ by 1.1 or more on average.
        assert np.abs(difference).mean() < 0.8 and np.abs(difference).max() <= 16


def test_filling_up_the_last_batch_changes_no_image(parts, monkeypatch):
    """A compiled network always sees the same shape."""
    shapes, forward = set(), parts.mmdit.forward

    def recorded(x, *args, **how):
        shapes.add(x.shape)
        return forward(x, *args, **how)
    monkeypatch.setattr(compiled, "compile_blocks", lambda mmdit: None)
    monkeypatch.setattr(parts.mmdit, "forward", recorded)
    trace, prompts = Trace(steps=[]), PROMPTS
    fast = text_to_image.draw(parts, prompts, steps=3, trace=trace, batch=2, compile=True)
    assert shapes == {(4, 3, parts.height, parts.width)}         # 2 images, with and without prompt
    assert trace.evaluations == 3 * 6 and len(trace.steps[0].x) == len(fast)
    assert torch.equal(fast, text_to_image.draw(parts, prompts, steps=3, batch=2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only with a GPU")
def test_a_replayed_cuda_graph_gives_the_same_image(monkeypatch):
    parts = Parts(EMOJI, "cuda", torch.bfloat16)
    monkeypatch.setattr(compiled, "compile_blocks", lambda mmdit: None)
    graphed = text_to_image.draw(parts, PROMPTS, steps=3, compile=True)
    assert torch.equal(graphed, text_to_image.draw(parts, PROMPTS, steps=3))


@pytest.mark.parametrize("keep, loads", [(True, 1), (False, 2)])
def test_a_network_is_compiled_each_time_it_is_loaded(tiny, keep, loads, monkeypatch):
    """If the parts don't fit in memory together, 16 of 17 batches are drawn before decoding."""
    parts, networks = Parts(tiny, dtype=torch.float32, keep=keep), []
    monkeypatch.setattr(compiled, "compile_blocks", networks.append)
    text_to_image.draw(parts, PROMPTS[:1] * 17, steps=1, batch=1, compile=True)
    assert len(networks) == len(set(map(id, networks))) == loads


@pytest.fixture
def filled(tiny_parts, tmp_path):
    """Draw three images; return (jobs, folder)."""
    jobs, folder = [(prompt, 3) for prompt in PROMPTS], tmp_path / "drawn"
    assert image_folder.draw_missing(tiny_parts, jobs, folder, DrawConfig(steps=2)) == 0
    return jobs, folder


def test_a_file_records_what_made_it(tiny_parts, filled):
    assert text_fields(filled[1] / "00001.png") == dict(
        prompt=PROMPTS[1], seed="3", steps="2", solver="euler", interval="(0.0, 1.0)", negative="",
        guidance="1.5", shift="1.0", size="16x16", dtype="float32", checkpoint=tiny_parts.digest())


def test_existing_files_are_skipped(tiny_parts, filled):
    jobs, folder = filled
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    (folder / "00001.png").unlink()
    assert image_folder.draw_missing(tiny_parts, jobs, folder, DrawConfig(steps=2)) == 2
    for path, (content, modified) in before.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == modified) == (path.name != "00001.png")


def test_a_folder_of_other_images_is_refused(tiny_parts, filled, tmp_path):
    jobs, folder = filled
    with pytest.raises(UserError, match="00000.png.* steps '2'.*'4'"):
        image_folder.draw_missing(tiny_parts, jobs, folder, DrawConfig(steps=4))
    damaged = folder / "00002.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(UserError, match="00002.png: .*read"):
        image_folder.draw_missing(tiny_parts, jobs, folder, DrawConfig(steps=2))
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"):           # cli.run prints it in one line
        image_folder.draw_missing(tiny_parts, jobs, tmp_path / "file", DrawConfig())


def test_an_interrupted_run_leaves_whole_files_and_resumes(tiny_parts, tmp_path, monkeypatch):
    jobs, drawings = [(prompt, 0) for prompt in PROMPTS], image_folder.drawings

    def interrupted(*args, **how):
        yield next(drawings(*args, **how))
        raise KeyboardInterrupt
    fill = lambda name: image_folder.draw_missing(tiny_parts, jobs, tmp_path / name, DrawConfig(steps=2, batch=1))
    monkeypatch.setattr(image_folder, "drawings", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill("resumed")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "resumed").iterdir()] == ["00000.png"]
    assert fill("resumed") == 1 and fill("whole") == 0
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes()


def test_the_command_fills_a_folder(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]) + "\n\n", encoding="utf-8")
    (tmp_path / "one.txt").write_text(PROMPTS[1], encoding="utf-8")

    def run_sample(prompts, out, *flags):
        sample.main(list(map(str, ["--prompts", tmp_path / prompts, "--steps", 1, "--out",
                                   tmp_path / out, "--dtype", "float32", *flags])))
        return capsys.readouterr().out
    output = run_sample("prompts.txt", "drawn", "--n", 2)
    assert output.startswith(f"{tmp_path / 'drawn'}: 4 ") and " 0 " in output
    fields = [text_fields(path) for path in sorted((tmp_path / "drawn").iterdir())]
    assert [(f["prompt"], f["seed"]) for f in fields] == [(p, s) for p in PROMPTS[:2] for s in "01"]
    run_sample("one.txt", "one", "--seed", 1)
    fourth = (tmp_path / "drawn/00003.png").read_bytes()
    assert (tmp_path / "one/00000.png").read_bytes() == fourth


# --------------------------------------------------------------------- drawing over an image

def test_strength_goes_from_the_image_to_a_new_one(either, apple_image, apple_latents):
    def draw(strength):
        edit = Edit(apple_latents, strength)
        return text_to_image.draw(either, PROMPTS[1:2], steps=4, seed=2, edit=edit)[0]
    drawn = {strength: draw(strength) for strength in (0.0, 0.3, 0.6, 1.0)}
    assert np.array_equal(pixels(drawn[0.0]), np.array(apple_image))
    new = text_to_image.draw(either, PROMPTS[1:2], steps=4, seed=2)[0]
    assert torch.equal(drawn[1.0], new)
    distances = [float((image - apple_latents[0].cpu()).norm()) for image in drawn.values()]
    assert distances == sorted(distances) and len(set(distances)) == 4


def test_strength_half_takes_half_of_the_steps(tiny_parts):
    trace, edit = Trace(steps=[]), Edit(torch.zeros(1, 3, 16, 16), 0.5)
    text_to_image.draw(tiny_parts, PROMPTS[:1], 0, edit, trace, steps=10, guidance=1)
    assert trace.steps[0].t == 0.5
    assert trace.evaluations == len(trace.steps) - 1 == 6  # from 0.5, and the five levels below it


def test_pixels_outside_the_mask_stay_the_same(either, apple_image, apple_latents):
    side = either.height
    mask = torch.zeros(1, 1, side, side, dtype=torch.bool)
    mask[..., :side // 2 + 1, 5:] = True
    drawn = text_to_image.draw(either, PROMPTS[:2], steps=4, edit=Edit(apple_latents, 1.0, mask))
    inside = mask[0, 0].numpy()
    for image in drawn:
        same = (pixels(image) == np.array(apple_image)).all(2)
        assert same[~inside].all() and same[inside].mean() < 0.5


def test_a_mask_is_cropped_like_its_image(tmp_path):
    """One white pixel is enough for its latent to be drawn anew."""
    image, mask = Image.new("RGB", (96, 64)), Image.new("L", (96, 64))
    mask.putpixel((16, 0), 255)                                  # the first column that is kept
    mask.putpixel((16 + 8 * 5 + 7, 8 * 3), 128)
    mask.putpixel((70, 40), 127)                                 # counts as black
    mask.putpixel((3, 3), 255)                                   # is cropped away
    mask.save(tmp_path / "mask.png")
    latent_mask = read_mask(tmp_path / "mask.png", image, 64, 64, 8)
    assert latent_mask.shape == (1, 1, 8, 8)
    assert latent_mask.nonzero()[:, 2:].tolist() == [[0, 0], [3, 5]]
    black = Image.new("L", (96, 64))
    black.putpixel((3, 3), 255)                                  # is cropped away
    black.save(tmp_path / "black.png")
    with pytest.raises(UserError, match="black.png: .*black"):
        read_mask(tmp_path / "black.png", image, 64, 64, 8)


def test_the_command_draws_over_an_image(apple, tmp_path, capsys):
    out = tmp_path / "a.png"
    sample.main(["--image", str(apple), "--prompt", PROMPTS[0], "--strength", "0.4", "--steps", "4",
                 "--out", str(out)])
    assert capsys.readouterr().out.startswith(f"{out}: 6 ")      # of 4 steps, 3 are left, guided


def test_a_digest_does_not_depend_on_the_type(parts):
    digest = parts.digest()
    assert digest == Parts(EMOJI, dtype=torch.bfloat16).digest() and len(digest) == 16
