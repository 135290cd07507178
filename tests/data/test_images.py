"""dataset/images.py: each kind of file as a viewer shows it, damaged ones, and the cut to a size."""

import io
import random
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import UserError
from dataset.images import fit_picture, picture_size, read_picture, to_picture, to_tensor


def stored(picture, kind, **how):
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return file.getvalue()


def png(width, height, bits, colours, rows, *chunks):
    """A PNG of raw rows; Pillow writes few of its kinds.  chunks: (name, content) before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts)


def clear(*values):
    """The chunk that makes one colour transparent."""
    return b"tRNS", struct.pack(f">{len(values)}H", *values)


RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
DISC = Image.new("RGB", (40, 40), "black")
DISC.paste("yellow", (10, 10, 30, 30))


def test_transparent_parts_are_white_and_what_is_cut_is_the_middle(tmp_path):
    picture = Image.new("RGBA", (60, 40), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (0, 0, 30, 40))
    picture.save(tmp_path / "a.png")
    rgb = read_picture(tmp_path / "a.png")
    assert rgb.getpixel((5, 5)) == (0, 0, 255) and rgb.getpixel((55, 5)) == (255, 255, 255)
    square = fit_picture(rgb, 20)
    assert square.size == (20, 20) and square.getpixel((2, 10)) == (0, 0, 255)
    Image.new("P", (9, 70)).save(tmp_path / "b.gif")
    assert to_tensor(fit_picture(read_picture(tmp_path / "b.gif"), 8)).shape == (3, 8, 8)
    image = torch.rand(3, 8, 8) * 2 - 1
    assert (to_tensor(to_picture(image)) - image).abs().max() < 1 / 127


@pytest.mark.parametrize("tag, turn", [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90),
                                       (8, Image.Transpose.ROTATE_270), (2, Image.Transpose.FLIP_LEFT_RIGHT)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_as_the_camera_was_held(tag, turn, kind):
    picture, exif = Image.new("RGB", (60, 40), "red"), Image.Exif()
    picture.paste("blue", (0, 0, 30, 20))
    exif[0x0112] = tag
    content = stored(picture.transpose(turn), kind, exif=exif)
    shown = read_picture(content)
    assert shown.size == (60, 40) == picture_size(content)
    assert shown.getpixel((5, 5))[2] > 200                       # blue, the others are red
    assert shown.getpixel((55, 5))[0] > 200 and shown.getpixel((5, 35))[0] > 200


@pytest.mark.parametrize("content", [
    stored(Image.fromarray(RAMP), "PNG"), stored(Image.fromarray(RAMP), "TIFF"),
    stored(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    stored(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"),
    b"P5 64 64 65535\n" + RAMP.astype(">u2").tobytes()])
def test_grey_of_more_than_eight_bits_keeps_its_range(content):
    found = np.asarray(read_picture(content))
    assert (found == (RAMP / 257).round().astype(np.uint8)[..., None]).all() and 127 < found.mean() < 128


@pytest.mark.parametrize("values", [np.full((4, 4), -1, np.int32), np.full((4, 4), 2.5, np.float32),
                                    np.full((4, 4), np.nan, np.float32), np.full((4, 4), 10**6, np.int32)])
def test_numbers_of_no_known_range_are_refused(values):
    with pytest.raises(UserError, match=r"^a.tif: not a picture .*\(grey from .* to .*, expected 0 to "):
        read_picture(stored(Image.fromarray(values), "TIFF"), "a.tif")


@pytest.mark.parametrize("content", [
    stored(DISC, "PNG", transparency=(0, 0, 0)), stored(DISC.convert("L"), "PNG", transparency=0),
    stored(DISC.quantize(4), "PNG", transparency=DISC.quantize(4).getpixel((0, 0))),
    stored(DISC.quantize(4), "GIF", transparency=DISC.quantize(4).getpixel((0, 0)))])
def test_a_transparent_colour_is_white_and_the_others_stay(content):
    found = np.asarray(read_picture(content))
    assert (found[5, 5] == 255).all() and (found[20, 20] < 255).any()


@pytest.mark.parametrize("content, row", [
    (stored(Image.new("LA", (2, 1), (0, 0)), "PNG"), [255, 255]),
    (png(4, 1, 1, 0, b"\0\x20", clear(1)), [0, 0, 255, 0]),
    (png(4, 1, 2, 0, b"\0\x54", clear(1)), [255, 255, 255, 0]),
    (png(2, 1, 4, 0, b"\0\x50", clear(5)), [255, 0]),
    (png(2, 1, 16, 0, b"\0\x12\x34\x12\x35", clear(0x1234)), [255, 18]),
    (png(2, 1, 16, 2, b"\0" + b"\x80\0" * 3 + bytes(6), clear(*[0x8000] * 3)), [255, 0])],
    ids="grey-alpha 1-bit 2-bit 4-bit 16-bit 16-bit-rgb".split())
def test_a_transparent_colour_is_one_of_the_files_own_depth(content, row):
    assert np.asarray(read_picture(content))[0, :, 0].tolist() == row


def test_other_colour_spaces_and_animations():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert read_picture(stored(red, "JPEG", quality=95)).getpixel((4, 4)) == (255, 0, 0)
    assert read_picture(stored(Image.new("LAB", (8, 8), (128, 128, 128)), "TIFF")).mode == "RGB"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    for kind in ("GIF", "WEBP", "PNG"):
        found = read_picture(stored(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert found.getpixel((4, 4))[0] > 250


def test_the_cut_comes_before_the_resize():
    """In the other order 100,000 x 1 would become 3.2 million x 32, 300 MB; and takes seconds."""
    row = np.arange(100_000) // 391                              # grey that rises by 1 each 391 pixels
    content = stored(Image.fromarray(row.astype(np.uint8)[None]), "PNG")
    started = time.process_time()
    found = np.asarray(fit_picture(read_picture(content), 32))
    assert time.process_time() - started < 0.5
    assert found.shape == (32, 32, 3) and (found == 50_000 // 391).all()
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (30, 50, 3), np.uint8))
    middle = picture.crop((10, 0, 40, 30)).resize((15, 15), Image.Resampling.BICUBIC)
    away = np.abs(np.asarray(fit_picture(picture, 15)).astype(int) - middle)[:, 2:-2]    # but for the edges
    assert away.max() <= 1
    assert np.array_equal(fit_picture(picture, 30, 50), picture)


@pytest.mark.parametrize("content, message", [
    (png(10000, 9500, 1, 0, (b"\0" + bytes(1250)) * 9500),
     "not a picture that can be read (over 89 million pixels; make it smaller"),
    (png(20000, 20000, 1, 0, b"\0"), "over 89 million pixels"),
    (b"", "not a picture that can be read (of no known format)"),
    (b"hello", "not a picture that can be read (of no known format)"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "PostScript is a program")])
def test_what_is_no_picture_of_a_size_gets_one_line_and_no_warning(content, message, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    with warnings.catch_warnings(), pytest.raises(UserError) as error:
        warnings.simplefilter("error")
        read_picture(tmp_path / "a.png")
    assert str(error.value).startswith(f"{tmp_path / 'a.png'}: ") and message in str(error.value)
    with pytest.raises(UserError, match="b.png: no such picture file"):
        read_picture(tmp_path / "b.png")
    with pytest.raises(UserError, match="can't be read .Is a directory"):
        read_picture(tmp_path)


def test_damaged_pictures_are_read_as_the_whole_ones_or_refused_in_one_line():
    """Cut anywhere, in eleven formats; of those only a PNG has checksums, so in it any bit may flip as well.
    A flip in another format may be another picture, and is never a traceback."""
    chance = random.Random(0)
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (20, 24, 3), np.uint8))
    kinds = "PNG JPEG GIF BMP TIFF WEBP PPM TGA PCX JPEG2000 ICO".split()
    kinds = {kind: stored(picture.resize((48, 40)), kind) for kind in kinds}
    kinds["progressive"] = stored(picture, "JPEG", progressive=True)
    kinds["PNG16"] = stored(Image.fromarray(RAMP), "PNG")
    counts = dict(whole=0, refused=0, other=0)
    for kind, content in kinds.items():
        whole = read_picture(content).tobytes()
        for n in range(60):
            at, flipped = chance.randrange(1, len(content)), n >= 30
            damaged = content[:at]
            if flipped:
                damaged += bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1:]
            try:
                same = read_picture(damaged, f"x.{kind}").tobytes() == whole
                assert same or flipped and not kind.startswith("PNG"), (kind, at, flipped)
                counts["whole" if same else "other"] += 1
            except UserError as error:
                assert str(error).startswith(f"x.{kind}: ") and len(str(error).splitlines()) == 1
                counts["refused"] += 1
    assert sum(counts.values()) == 780 and counts["refused"] > 400 and counts["whole"] > 10
