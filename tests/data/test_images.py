"""dataset/images.py: files read as a viewer shows them, damaged files, and the crop to a size."""

import io
import random
import struct
import warnings
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from common.cli import UserError
from dataset import images
from dataset.images import (fit_image, image_size, read_image, text_fields, to_image, to_tensor,
                            write_png)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width, height, bits, colours, rows, *chunks):
    """Return a PNG of raw rows, since Pillow can't write all kinds.  chunks: (name, content)."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    data = zlib.compress(rows, 9)
    for name, content in [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        file += struct.pack(">I", len(content)) + name + content + checksum
    return file


def transparent(*values):
    """Return the chunk that makes one colour transparent."""
    return b"tRNS", struct.pack(f">{len(values)}H", *values)


RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
DISC = Image.new("RGB", (40, 40), "black")
DISC.paste("yellow", (10, 10, 30, 30))


def test_transparent_parts_are_white(tmp_path):
    image = Image.new("RGBA", (60, 40), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 30, 40))
    image.save(tmp_path / "a.png")
    rgb = read_image(tmp_path / "a.png")
    assert rgb.getpixel((5, 5)) == (0, 0, 255)
    assert rgb.getpixel((55, 5)) == (255, 255, 255)


def test_the_middle_of_an_image_is_kept():
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    square = fit_image(image, 20)
    assert square.size == (20, 20)
    assert square.getpixel((2, 10)) == square.getpixel((17, 10)) == (0, 0, 255)


def test_a_palette_image_becomes_a_square_tensor(tmp_path):
    Image.new("P", (9, 70)).save(tmp_path / "b.gif")
    assert to_tensor(fit_image(read_image(tmp_path / "b.gif"), 8)).shape == (3, 8, 8)


def test_tensors_survive_the_way_to_an_image_and_back():
    tensor = torch.rand(3, 8, 8) * 2 - 1
    difference = (to_tensor(to_image(tensor)) - tensor).abs().max()
    assert difference < 1 / 254                                          # half of one of 255 steps


@pytest.mark.parametrize("tag, turn", [
    (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90),
    (8, Image.Transpose.ROTATE_270), (2, Image.Transpose.FLIP_LEFT_RIGHT)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_as_exif_says(tag, turn, kind):
    image = Image.new("RGB", (60, 40), "red")
    image.paste("blue", (0, 0, 30, 20))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = tag
    content = encoded(image.transpose(turn), kind, exif=exif)
    shown = read_image(content)
    assert shown.size == (60, 40) == image_size(content)
    blue, *red = [shown.getpixel(place) for place in ((5, 5), (55, 5), (5, 35), (55, 35))]
    assert blue[2] > 200 and all(pixel[0] > 200 for pixel in red)    # JPEG and WEBP lose a little


@pytest.mark.parametrize("content", [
    encoded(Image.fromarray(RAMP), "PNG"), encoded(Image.fromarray(RAMP), "TIFF"),
    encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    encoded(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"),
    b"P5 64 64 65535\n" + RAMP.astype(">u2").tobytes()])
def test_grey_of_more_than_eight_bits_keeps_its_range(content):
    pixels = np.asarray(read_image(content))
    assert (pixels == (RAMP / 257).round()[..., None]).all()             # 65535 is 255 x 257


@pytest.mark.parametrize("values", [
    np.full((4, 4), -1, np.int32), np.full((4, 4), 2.5, np.float32),
    np.full((4, 4), np.nan, np.float32), np.full((4, 4), 10**6, np.int32)])
def test_grey_outside_the_known_range_is_refused(values):
    with pytest.raises(UserError, match=r"^a.tif: .*grey from"):
        read_image(encoded(Image.fromarray(values), "TIFF"), "a.tif")


@pytest.mark.parametrize("content", [
    encoded(DISC, "PNG", transparency=(0, 0, 0)), encoded(DISC.convert("L"), "PNG", transparency=0),
    encoded(DISC.quantize(4), "PNG", transparency=DISC.quantize(4).getpixel((0, 0))),
    encoded(DISC.quantize(4), "GIF", transparency=DISC.quantize(4).getpixel((0, 0)))])
def test_a_transparent_colour_is_white_and_others_stay(content):
    pixels = np.asarray(read_image(content))
    assert (pixels[5, 5] == 255).all()
    assert (pixels[20, 20] < 255).any()


@pytest.mark.parametrize("content, row", [
    (encoded(Image.new("LA", (2, 1), (0, 0)), "PNG"), [255, 255]),
    (png(4, 1, 1, 0, b"\0\x20", transparent(1)), [0, 0, 255, 0]),
    (png(4, 1, 2, 0, b"\0\x54", transparent(1)), [255, 255, 255, 0]),
    (png(2, 1, 4, 0, b"\0\x50", transparent(5)), [255, 0]),
    (png(2, 1, 16, 0, b"\0\x12\x34\x12\x35", transparent(0x1234)), [255, 18]),
    (png(2, 1, 16, 2, b"\0" + b"\x80\0" * 3 + bytes(6), transparent(*[0x8000] * 3)), [255, 0])],
    ids="grey-alpha 1-bit 2-bit 4-bit 16-bit 16-bit-rgb".split())
def test_a_transparent_colour_has_the_bit_depth_of_its_file(content, row):
    assert np.asarray(read_image(content))[0, :, 0].tolist() == row


def test_other_colour_spaces_become_rgb():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert read_image(encoded(red, "JPEG", quality=95)).getpixel((4, 4)) == (255, 0, 0)
    lab = Image.new("LAB", (8, 8), (128, 128, 128))
    assert read_image(encoded(lab, "TIFF")).mode == "RGB"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(kind):
    red, green = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "lime")
    first = read_image(encoded(red, kind, save_all=True, append_images=[green]))
    assert first.getpixel((4, 4))[0] > 250                               # WEBP loses a little


def test_a_long_image_is_cropped_before_it_is_resized(monkeypatch):
    """In the other order 100,000 x 1 pixels would become 3.2 million x 32: 300 MB and slow."""
    resized, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *args, **options: (
        resized.append(tuple(size)) or resize(image, size, *args, **options)))
    row = np.arange(100_000) // 391                                      # 1 more each 391 pixels
    content = encoded(Image.fromarray(row.astype(np.uint8)[None]), "PNG")
    pixels = np.asarray(fit_image(read_image(content), 32))
    assert resized == [(32, 32)]
    assert pixels.shape == (32, 32, 3)
    assert (pixels == 50_000 // 391).all()


def test_fitting_is_a_crop_of_the_middle_and_a_bicubic_resize():
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (30, 50, 3), np.uint8))
    expected = image.crop((10, 0, 40, 30)).resize((15, 15), Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(fit_image(image, 15)).astype(int) - expected)
    assert difference[:, 2:-2].max() <= 1    # rounding; at the edges the filter reads outside
    assert np.array_equal(fit_image(image, 30, 50), image)


@pytest.mark.parametrize("content, word", [
    (png(10000, 9500, 1, 0, (b"\0" + bytes(1250)) * 9500), "89 million"),
    (png(20000, 20000, 1, 0, b"\0"), "89 million"),
    (b"", "format"),
    (b"hello", "format"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "PostScript")],
    ids="large huge empty text eps".split())
def test_unusable_images_are_refused_without_a_warning(content, word, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    with warnings.catch_warnings(), pytest.raises(UserError, match=f"^{tmp_path}/a.png: .*{word}"):
        warnings.simplefilter("error")
        read_image(tmp_path / "a.png")


def test_a_missing_image_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="b.png: .*No such"):
        read_image(tmp_path / "b.png")
    with pytest.raises(UserError, match=f"{tmp_path}.*directory"):
        read_image(tmp_path)


def damage_at_random(content, count, generator):
    """Yield (damaged content, is_flipped): half of them are cut, the others have a flipped bit."""
    for n in range(count):
        at = generator.randrange(1, len(content))
        if n < count // 2:
            yield content[:at], False
        else:
            flipped = bytes([content[at] ^ 1 << generator.randrange(8)])
            yield content[:at] + flipped + content[at + 1:], True


def test_damaged_images_are_read_whole_or_refused_in_one_line():
    """Only a PNG has checksums: in other formats a flipped bit may give another image."""
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (20, 24, 3), np.uint8))
    formats = "PNG JPEG GIF BMP TIFF WEBP PPM TGA PCX JPEG2000 ICO".split()
    files = {kind: encoded(noise.resize((48, 40)), kind) for kind in formats}
    files["progressive"] = encoded(noise, "JPEG", progressive=True)
    files["PNG16"] = encoded(Image.fromarray(RAMP), "PNG")
    generator, counts = random.Random(0), Counter()
    for kind, content in files.items():
        whole = read_image(content).tobytes()
        for damaged, is_flipped in damage_at_random(content, 60, generator):
            try:
                same = read_image(damaged, f"x.{kind}").tobytes() == whole
            except UserError as error:
                assert str(error).startswith(f"x.{kind}: ") and "\n" not in str(error)
                counts["refused"] += 1
            else:
                assert same or is_flipped and not kind.startswith("PNG"), kind
                counts["whole" if same else "other"] += 1
    assert counts.total() == 780
    assert counts["refused"] > 400 and counts["whole"] > 10  # damage is mostly, not always noticed


# ----------------------------------------------------------------------- what a viewer shows

def profile(space, gamma, **points):
    """Return an ICC profile of one curve.  points: the XYZ of red, green and blue, if any."""
    def number(x):
        return struct.pack(">i", round(x * 65536))

    def xyz(values):
        return b"XYZ " + bytes(4) + b"".join(map(number, values))

    curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": xyz((0.9642, 1, 0.8249))}
    for name, values in points.items():
        tags[f"{name[0]}XYZ".encode()] = xyz(values)
        tags[f"{name[0]}TRC".encode()] = curve
    if not points:
        tags[b"kTRC"] = curve
    table, content = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        start = 132 + 12 * len(tags) + len(content)
        table += name + struct.pack(">II", start, len(tag))
        content += tag
    header = struct.pack(">I4sI4s4s4s", 128 + len(table + content), b"", 0x02200000, b"mntr", space,
                         b"XYZ ")
    white = b"".join(map(number, (0.9642, 1, 0.8249)))
    return header + bytes(12) + b"acsp" + bytes(28) + white + bytes(48) + table + content


DISPLAY_P3 = profile(b"RGB ", 2.2, red=(0.51512, 0.24120, -0.00105), green=(0.29198, 0.69225, 0.04189),
                     blue=(0.15710, 0.06657, 0.78407))
GREY = profile(b"GRAY", 1.0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("kind, options", [
    ("PNG", {}), ("JPEG", dict(quality=95)), ("WEBP", dict(lossless=True)), ("TIFF", {})])
def test_wide_colours_are_converted_to_srgb(kind, options):
    image = Image.new("RGB", (16, 16), (200, 100, 90))
    content = encoded(image, kind, icc_profile=DISPLAY_P3, **options)
    # Display P3's red is stronger: by its matrix, (200, 100, 90) is (217, 95, 84) in sRGB
    assert read_image(content).getpixel((8, 8)) == pytest.approx((217, 95, 84), abs=4)


def test_an_srgb_profile_changes_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    content = encoded(Image.fromarray(noise), "PNG", icc_profile=SRGB)
    assert np.array_equal(read_image(content), noise)


def test_linear_grey_is_converted_with_its_transparent_parts():
    image = Image.new("LA", (4, 1), (55, 255))
    image.putpixel((0, 0), (55, 0))
    rgb = read_image(encoded(image, "PNG", icc_profile=GREY))
    assert rgb.getpixel((0, 0)) == (255, 255, 255)
    assert rgb.getpixel((2, 0)) == pytest.approx((128, 128, 128), abs=2)    # 0.2158, as in sRGB
    deep = Image.fromarray(np.full((4, 4), 55 * 257, np.uint16))
    rgb = read_image(encoded(deep, "TIFF", icc_profile=GREY))
    assert rgb.getpixel((2, 2)) == pytest.approx((128, 128, 128), abs=2)


@pytest.mark.parametrize("unfit", [b"no profile", DISPLAY_P3[:200], GREY])
def test_a_profile_that_does_not_fit_is_ignored(unfit):
    image = Image.new("RGB", (4, 4), (200, 100, 90))
    assert read_image(encoded(image, "PNG", icc_profile=unfit)).getpixel((0, 0)) == (200, 100, 90)


def test_without_colour_management_one_line_says_so(monkeypatch, capsys):
    def missing(*_):
        raise ImportError("no _imagingcms")
    monkeypatch.setattr(ImageCms, "ImageCmsProfile", missing)
    images.colour_transform.cache_clear()
    images.warn_once.cache_clear()
    image = Image.new("RGB", (4, 4), (200, 100, 90))
    for kind in ("PNG", "TIFF"):
        content = encoded(image, kind, icc_profile=DISPLAY_P3)
        assert read_image(content).getpixel((0, 0)) == (200, 100, 90)
    warning = capsys.readouterr().err
    assert "ImageCms" in warning and warning.count("\n") == 1
    images.colour_transform.cache_clear()


ROW = b"\0\xff\0\0"         # one red pixel
LARGE = zlib.compress(bytes(3_000_000))


@pytest.mark.parametrize("chunk", [
    (b"zTXt", b"workflow\0\0" + LARGE), (b"tEXt", b"a\0" + b"x" * 2_000_000),
    (b"iTXt", b"a\0\1\0\0\0" + LARGE), (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE),
    (b"tEXt", b"XML:com.adobe.xmp\0" + b"x" * 2_000_000), (b"iCCP", b"a\0\0" + LARGE), (b"iCCP", b"a\0\0garbage"),
    (b"eXIf", b"II*\0garbage"), (b"eXIf", b""), (b"tEXt", b"")])
def test_what_comes_with_an_image_never_makes_it_unreadable(chunk, capsys, tmp_path):
    images.warn_once.cache_clear()
    content = png(1, 1, 8, 2, ROW, chunk)
    assert read_image(content).getpixel((0, 0)) == (255, 0, 0) and image_size(content) == (1, 1)
    assert capsys.readouterr().err.count("\n") == (chunk[0] == b"iCCP" and len(chunk[1]) > 1000)
    (tmp_path / "a.png").write_bytes(content)
    assert text_fields(tmp_path / "a.png").keys() <= {"a", "", "XML:com.adobe.xmp"}


def test_a_png_is_turned_by_a_text_too():
    xmp = b'<x:xmpmeta tiff:Orientation="6"/>'
    for value in (b"\0\0\0\0" + xmp, b"\1\0\0\0" + zlib.compress(xmp)):
        content = png(2, 1, 8, 2, b"\0" + b"\xff\0\0" * 2, (b"iTXt", b"XML:com.adobe.xmp\0" + value))
        assert read_image(content).size == image_size(content) == (1, 2)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_damaged_exif_leaves_an_image_unturned(kind):
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0" + b"\xff" * 40):
        content = encoded(Image.new("RGB", (6, 4), "red"), kind, exif=exif)
        assert read_image(content).size == image_size(content) == (6, 4)


def test_a_damaged_png_is_refused_also_behind_its_texts():
    whole = png(1, 1, 8, 2, ROW, (b"tEXt", b"a\0b"))
    place = whole.index(b"IDAT") + 6
    for content in (whole[:place] + b"?" + whole[place + 1:], whole[:place], whole[:20]):
        with pytest.raises(UserError):
            read_image(content)


@pytest.mark.parametrize("dtype, level, kind", [("<u2", 0x4000, 1), ("<f4", 0.25, 3)])
def test_zero_may_be_white(dtype, level, kind):
    data = np.full(64, level, dtype).tobytes()
    bits = 8 * np.dtype(dtype).itemsize
    tags = [(256, 8), (257, 8), (258, bits), (259, 1), (262, 0), (273, 8), (277, 1), (278, 8),
            (279, len(data)), (339, kind)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    content = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    content += struct.pack("<H", len(tags)) + entries + bytes(4)
    assert read_image(content).getpixel((0, 0)) == pytest.approx((191,) * 3, abs=1)


def test_text_fields_are_read_again(tmp_path):
    fields = dict(prompt="a \u2028 b", seed="3")
    write_png(tmp_path / "a.png", Image.new("RGB", (4, 4)), fields)
    assert text_fields(tmp_path / "a.png") == fields
