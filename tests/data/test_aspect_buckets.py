"""dataset/aspect_buckets.py: sizes of about one area, and pictures in batches of about their shape."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import data
from dataset.aspect_buckets import WINDOW, sizes
from dataset.images import read_picture
from train import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """100 pictures: tall, one in ten stored turned, square and wide; one is no picture."""
    folder = tmp_path_factory.mktemp("shapes")
    wide = [(60, 45), (60, 40), (60, 30), (60, 50), (60, 40)]
    for i in range(100):
        size = [(40, 60), (40, 60), (30, 60), *wide, (50, 50), (50, 50)][i % 10]
        picture, exif = Image.new("RGB", size, (2 * i, 0, 0)), Image.Exif()
        exif[0x0112] = 6 if i % 10 == 3 else 1                   # a quarter turn: 60x45 is shown as 45x60
        picture.save(folder / f"{i:02d}.jpg", exif=exif)
        (folder / f"{i:02d}.txt").write_text(f"{i}")
    (folder / "99.jpg").write_text("no picture")
    return str(folder)


@pytest.mark.parametrize("pixels, unit", [(512, 16), (1024, 16), (256, 16), (24, 4), (128, 8)])
def test_sizes_have_about_one_area_and_sides_that_the_patch_divides(pixels, unit):
    found = sizes(pixels, unit)
    assert (pixels, pixels) in found and len(set(found)) == len(found) >= 3
    assert found == sorted(found, key=lambda size: size[1] / size[0])
    for height, width in found:
        assert height % unit == width % unit == 0 and (width, height) in found
        assert abs(height * width / pixels ** 2 - 1) < 0.13 and max(height, width) <= 2 * min(height, width)
        assert pixels != 512 or height % 64 == width % 64 == 0


def test_each_picture_is_seen_once_in_a_batch_of_about_its_shape(folder):
    mix, count = data.Mix([folder], 64, "key"), 5
    buckets, seen, apart = mix.buckets("image", 8), [], []
    for step in range(5 * WINDOW):
        positions, (height, width) = buckets.rows(step, count, range(count))
        assert (height, width) in sizes(64, 8)
        assert {position // (WINDOW * count) for position in positions} == {step // WINDOW}
        samples = mix.take(positions, "image", (height, width))
        assert all(sample["picture"].shape == (3, height, width) for sample in samples)
        shown = [read_picture(Path(sample["key"])).size for sample in samples]
        apart += [abs(torch.log(torch.tensor(w / h * height / width))) for w, h in shown]
        seen += positions
    assert sorted(seen) == list(range(5 * WINDOW * count))
    assert torch.stack(apart).median() < 0.2                     # a square against them: 0.405


def test_a_row_does_not_depend_on_the_others(folder):
    """So that any number of processes, each with its rows, sees the same samples."""
    whole = data.Mix([folder], 64, "key").buckets("text", 8)
    for step in (0, 3, 9, 17):
        positions, size = whole.rows(step, 8, range(8))
        for world in (2, 4):
            for rank in range(world):
                own = data.Mix([folder], 64, "key").buckets("text", 8)
                assert own.rows(step, 8, range(rank, 8, world)) == (positions[rank::world], size)


def test_what_has_one_size_is_refused(mistake, tmp_path, folder):
    (tmp_path / "a.txt").write_text("some plain text about nothing. " * 99)
    data.main(["pack", str(tmp_path / "a.txt"), str(tmp_path / "t.safetensors")])
    code, said = mistake(main, ["--image-data", folder, "--text-data", tmp_path / "t.safetensors",
                                "--buckets", "--out", tmp_path / "run"])
    assert code == 1 and "t.safetensors has no pictures to cut, but plain text" in said
