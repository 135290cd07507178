"""dataset/aspect_buckets.py: image sizes of equal area, and batches of images of similar shape."""

import math
from pathlib import Path

import pytest
from PIL import ExifTags, Image

import data
from dataset.aspect_buckets import WINDOW, sizes
from dataset.images import read_image
from train import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write 100 tall, wide and square images; a tenth has an EXIF rotation; the last is damaged."""
    folder = tmp_path_factory.mktemp("shapes")
    tall = [(40, 60), (40, 60), (30, 60)]
    wide = [(60, 45), (60, 40), (60, 30), (60, 50), (60, 40)]
    square = [(50, 50), (50, 50)]
    for i in range(100):
        image = Image.new("RGB", [*tall, *wide, *square][i % 10], (2 * i, 0, 0))
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6 if i % 10 == 3 else 1    # 60x45 is shown as 45x60
        image.save(folder / f"{i:02d}.jpg", exif=exif)
        (folder / f"{i:02d}.txt").write_text(f"{i}")
    (folder / "99.jpg").write_text("not an image")
    return str(folder)


@pytest.mark.parametrize("pixels, unit", [(512, 16), (1024, 16), (256, 16), (24, 4), (128, 8)])
def test_sizes_have_about_one_area_and_divisible_sides(pixels, unit):
    table = sizes(pixels, unit)
    assert (pixels, pixels) in table
    assert len(set(table)) == len(table) >= 3
    assert table == sorted(table, key=lambda size: size[1] / size[0])
    for height, width in table:
        assert (width, height) in table
        assert height % unit == width % unit == 0
        assert max(height, width) <= 2 * min(height, width)
        assert abs(height * width / pixels ** 2 - 1) < 0.04     # rounded sides: 3.1 % at most


def test_sizes_at_512_pixels_are_multiples_of_64():
    assert all(height % 64 == width % 64 == 0 for height, width in sizes(512, 16))


def test_each_image_is_seen_once_in_a_batch_of_about_its_shape(folder):
    mix = data.Mix([folder], 64, "key")
    buckets = mix.buckets("image", 8)
    count = 5
    seen, distances = [], []
    for step in range(5 * WINDOW):
        positions, (height, width) = buckets.rows(step, count, range(count))
        assert (height, width) in sizes(64, 8)
        assert {position // (WINDOW * count) for position in positions} == {step // WINDOW}
        for sample in mix.take(positions, "image", (height, width)):
            assert sample["image"].shape == (3, height, width)
            shown_width, shown_height = read_image(Path(sample["key"])).size
            distances.append(abs(math.log(shown_width / shown_height * height / width)))
        seen += positions
    assert sorted(seen) == list(range(5 * WINDOW * count))
    assert sorted(distances)[len(distances) // 2] < 0.2         # if all are cut to squares: 0.405


def test_the_order_of_sizes_differs_between_windows(folder):
    buckets = data.Mix([folder], 64, "key").buckets("image", 8)
    orders = []
    for window in range(5):
        steps = range(window * WINDOW, (window + 1) * WINDOW)
        orders.append([buckets.rows(step, 5, range(0))[1] for step in steps])
    assert all(sorted(order) == sorted(buckets.sizes) for order in orders)
    assert len(set(map(tuple, orders))) == 5


def test_rows_do_not_depend_on_the_number_of_processes(folder):
    whole = data.Mix([folder], 64, "key").buckets("text", 8)
    for world_size in (2, 4):
        for rank in range(world_size):
            buckets = data.Mix([folder], 64, "key").buckets("text", 8)
            for step in (0, 3, 9, 17):
                positions, size = whole.rows(step, 8, range(8))
                rows = buckets.rows(step, 8, range(rank, 8, world_size))
                assert rows == (positions[rank::world_size], size)


def test_pixels_beside_files_are_cut_to_the_size_of_the_batch(folder):
    mix = data.Mix([folder, "shapes"], 24, "key")
    sample = mix.sample(data.Place(1, 0, 0), True, (16, 32))
    assert sample["image"].shape == (3, 16, 32)


def test_buckets_beyond_the_position_table_are_refused(folder, tmp_path, run_program):
    code, error = run_program(main, ["--preset", "shapes", "--image-data", folder, "--buckets",
                                 "--out", tmp_path / "run"])
    assert code == 1 and "--pixels 24 (--buckets has sides of 28)" in error


def test_buckets_refuse_plain_text(run_program, tmp_path, folder):
    (tmp_path / "a.txt").write_text("some plain text about nothing. " * 99)
    data.main(["pack", str(tmp_path / "a.txt"), str(tmp_path / "t.safetensors")])
    code, error = run_program(main, ["--image-data", folder, "--text-data", tmp_path / "t.safetensors",
                                 "--buckets", "--out", tmp_path / "run"])
    assert code == 1
    assert "--buckets" in error and "t.safetensors" in error
