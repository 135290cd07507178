"""inference/image_folder.py and drawing over a picture: the same bytes however it is done, and what is to stay stays."""

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from common.cli import UserError
from dataset.images import fit_picture, read_mask, read_picture, text_fields, to_picture, to_tensor
from inference import image_folder, text_to_image
from inference.parts import EMOJI, Parts

PROMPTS = ["red apple, noto style", "snowman, noto style", "flag of Chad, twemoji style"]


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def either(request, parts):
    return parts if request.param == torch.float32 else Parts(dtype=request.param)


def test_a_prompt_and_a_seed_give_the_same_file_in_any_batch_and_at_any_place(either, tmp_path):
    jobs = [(prompt, seed) for prompt in PROMPTS for seed in (0, 5)]
    image_folder.fill(either, jobs, tmp_path / "one", steps=3, batch=1)
    image_folder.fill(either, jobs[::-1], tmp_path / "all", steps=3, batch=64)
    files = [[path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("one", "all")]
    assert files[0] == files[1][::-1] and len(set(files[0])) == 6


def test_a_batch_that_is_filled_up_for_its_shape_gives_the_same_pictures(parts, monkeypatch):
    shapes, forward = set(), parts.mmdit.forward
    monkeypatch.setattr(text_to_image, "compiled", lambda parts: None)
    monkeypatch.setattr(parts.mmdit, "forward", lambda x, *args, **how: shapes.add(x.shape) or forward(
        x, *args, **how))
    seen, prompts = text_to_image.Seen(), PROMPTS + PROMPTS[:2]
    fast = text_to_image.draw(parts, prompts, steps=3, batch=2, fast=True, seen=seen)
    assert shapes == {(4, 3, parts.height, parts.width)} and seen.rows == 5 * 6
    assert seen.states[0][1].shape == fast.shape
    assert torch.equal(fast, text_to_image.draw(parts, prompts, steps=3, batch=2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only with a GPU")
def test_an_evaluation_replayed_as_a_cuda_graph_is_the_evaluation(monkeypatch):
    parts = Parts(EMOJI, "cuda", torch.bfloat16)
    monkeypatch.setattr(text_to_image, "compiled", lambda parts: None)
    fast, plain = (text_to_image.draw(parts, PROMPTS, steps=3, fast=fast) for fast in (True, False))
    assert torch.equal(fast, plain)


@pytest.mark.parametrize("keep, loads", [(True, 1), (False, 2)])
def test_a_network_is_made_ready_once_each_time_it_is_loaded(tiny, keep, loads, monkeypatch):
    """17 batches, of which a machine that can't hold all parts draws 16 before it decodes them."""
    parts, ready = Parts(tiny, dtype=torch.float32, keep=keep), []
    monkeypatch.setattr(text_to_image, "compiled", lambda parts: ready.append(parts.mmdit))
    text_to_image.draw(parts, PROMPTS[:1] * 17, steps=1, batch=1, fast=True)
    assert len(ready) == len(set(map(id, ready))) == loads


def test_what_is_drawn_over_a_picture_is_refused_as_that_of_another(parts, tmp_path):
    P = parts.height
    edit = lambda strength, value, mask=None: text_to_image.Edit(torch.full((1, 3, P, P), value), strength, mask)
    fill = lambda edit: image_folder.fill(parts, [(PROMPTS[0], 0)], tmp_path / "over", steps=2, edit=edit)
    assert (fill(edit(0.5, 0.1)), fill(edit(0.5, 0.1))) == (0, 1)
    for other, name in ((edit(0.6, 0.1), "strength"), (edit(0.5, 0.2), "over"), (None, "strength"),
                        (edit(0.5, 0.1, torch.ones(1, 1, P, P, dtype=torch.bool)), "over")):
        with pytest.raises(UserError, match=f"was drawn with {name} "):
            fill(other)


def test_what_is_there_is_skipped_and_what_was_made_otherwise_is_refused(parts, tmp_path):
    jobs, folder = [(prompt, 3) for prompt in PROMPTS], tmp_path / "drawn"
    assert image_folder.fill(parts, jobs, folder, steps=2) == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    fields = text_fields(folder / "00001.png")
    assert fields == dict(
        prompt=PROMPTS[1], seed="3", steps="2", solver="euler", interval="(0.0, 1.0)", negative="",
        guidance="1.5", shift="1.0", size="64x64", dtype="float32", checkpoint=parts.digest())
    (folder / "00001.png").unlink()
    assert image_folder.fill(parts, jobs, folder, steps=2) == 2
    for path, (content, when) in before.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == when) == (path.name != "00001.png")
    with pytest.raises(UserError, match="00000.png: was drawn with steps '2', asked for is '4'; name"):
        image_folder.fill(parts, jobs, folder, steps=4)
    (folder / "00002.png").write_bytes(before[folder / "00002.png"][0][:200])
    with pytest.raises(UserError, match="00002.png: not a picture that can be read"):
        image_folder.fill(parts, jobs, folder, steps=2)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"):                   # cli.run says so in one line
        image_folder.fill(parts, jobs, tmp_path / "file")


def test_a_walk_that_is_stopped_leaves_whole_files_and_goes_on(parts, tmp_path, monkeypatch):
    jobs, whole = [(prompt, 0) for prompt in PROMPTS], text_to_image.drawings

    def stopped(*args, **how):
        drawn = whole(*args, **how)
        yield next(drawn)
        raise KeyboardInterrupt
    monkeypatch.setattr(image_folder.text_to_image, "drawings", stopped)
    with pytest.raises(KeyboardInterrupt):
        image_folder.fill(parts, jobs, tmp_path / "a", steps=2, batch=1)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["00000.png"]
    assert image_folder.fill(parts, jobs, tmp_path / "a", steps=2, batch=1) == 1
    image_folder.fill(parts, jobs, tmp_path / "b", steps=2)
    for i in range(3):
        assert (tmp_path / f"a/0000{i}.png").read_bytes() == (tmp_path / f"b/0000{i}.png").read_bytes()


def test_the_command_fills_a_folder(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]) + "\n\n", encoding="utf-8")
    flags = ["--prompts", tmp_path / "prompts.txt", "--n", 2, "--steps", 1, "--out", tmp_path / "drawn"]
    sample.main(list(map(str, flags)))
    assert capsys.readouterr().out == f"{tmp_path / 'drawn'}: 4 pictures, 0 of which were there\n"
    found = [text_fields(path) for path in sorted((tmp_path / "drawn").iterdir())]
    assert [(f["prompt"], f["seed"]) for f in found] == [(p, s) for p in PROMPTS[:2] for s in "01"]
    (tmp_path / "one.txt").write_text(PROMPTS[1], encoding="utf-8")
    sample.main(["--prompts", str(tmp_path / "one.txt"), "--seed", "1", "--steps", "1", "--out",
                 str(tmp_path / "one")])
    assert (tmp_path / "one/00000.png").read_bytes() == (tmp_path / "drawn/00003.png").read_bytes()


def test_a_strength_of_zero_gives_the_picture_back_and_of_one_draws_anew(either, apple):
    picture = fit_picture(read_picture(apple), either.height, either.width)
    latents = text_to_image.encode(either, to_tensor(picture)[None], dtype=torch.float32)
    draw = lambda strength: text_to_image.draw(either, PROMPTS[1:2], steps=4, seed=2,
                                         edit=text_to_image.Edit(latents, strength))[0]
    assert np.array_equal(np.array(to_picture(draw(0.0))), np.array(picture))
    fresh = text_to_image.draw(either, PROMPTS[1:2], steps=4, seed=2)[0]
    assert torch.equal(draw(1.0), fresh)
    far = [float((draw(strength) - latents[0].cpu()).norm()) for strength in (0.0, 0.3, 0.6, 1.0)]
    assert far[0] < far[1] < far[2] < far[3]
    seen = text_to_image.Seen()
    text_to_image.draw(either, PROMPTS[1:2], steps=10, edit=text_to_image.Edit(latents, 0.5), guidance=1, seen=seen)
    assert [t for t, _, _ in seen.states][0] == 0.5 and seen.rows == len(seen.states) - 1 == 6


def test_what_the_mask_leaves_black_is_the_same_to_the_bit(either, apple):
    P = either.height
    picture, mask = fit_picture(read_picture(apple), P, P), torch.zeros(1, 1, P, P, dtype=torch.bool)
    mask[..., :P // 2 + 1, 5:] = True
    latents = text_to_image.encode(either, to_tensor(picture)[None], dtype=torch.float32)
    drawn = text_to_image.draw(either, PROMPTS[:2], steps=4, edit=text_to_image.Edit(latents, 1.0, mask))
    for one in drawn:
        same = (np.array(to_picture(one)) == np.array(picture)).all(2)
        assert same[~mask[0, 0].numpy()].all() and same[mask[0, 0].numpy()].mean() < 0.5


def test_a_mask_is_cut_as_its_picture_is_and_a_latent_of_one_white_pixel_is_drawn(tmp_path):
    picture, mask = Image.new("RGB", (96, 64)), Image.new("L", (96, 64))
    mask.putpixel((16, 0), 255)                                  # the first that is not cut off
    mask.putpixel((16 + 8 * 5 + 7, 8 * 3), 128)
    mask.putpixel((70, 40), 127)                                 # nearer to black
    mask.putpixel((3, 3), 255)                                   # cut off
    mask.save(tmp_path / "mask.png")
    found = read_mask(tmp_path / "mask.png", picture, 64, 64, 8)
    assert found.shape == (1, 1, 8, 8) and found.nonzero()[:, 2:].tolist() == [[0, 0], [3, 5]]
    Image.new("L", (96, 64)).save(tmp_path / "black.png")
    with pytest.raises(UserError, match="black everywhere"):
        read_mask(tmp_path / "black.png", picture, 64, 64, 8)


def test_a_picture_is_varied_by_its_own_caption(apple, tmp_path, capsys):
    sample.main(["--image", str(apple)])
    caption = capsys.readouterr().out.strip()
    assert caption == "red apple, noto style"
    sample.main(["--image", str(apple), "--prompt", caption, "--strength", "0.4", "--steps", "4", "--out",
                 str(tmp_path / "a.png")])
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}: 6 evaluations a picture\n"


def test_a_folder_is_of_one_checkpoint(parts):
    assert parts.digest() == Parts(EMOJI, dtype=torch.bfloat16).digest() and len(parts.digest()) == 16
