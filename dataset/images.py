"""Read images as a viewer shows them, crop and resize them, and convert them to tensors and back.

Shapes: P pixels a side.
"""

import functools
import io
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import (ExifTags, Image, ImageChops, ImageCms, ImageOps, PngImagePlugin,
                 TiffImagePlugin, UnidentifiedImageError)
from PIL.Image import Transpose
from torch import Tensor

from common.cli import UserError, require, warn
from common.files import read_bytes, replacing

WHITE_IS_ZERO = 0       # as opposed to 1, of a TIFF's photometric interpretation
warn_once = functools.cache(warn)
# names of PNG texts in which Pillow looks for an EXIF orientation
ORIENTATION_TEXTS = (b"Raw profile type exif", b"Raw profile type APP1", b"XML:com.adobe.xmp")
# EXIF orientation -> how to turn the stored image
TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
         5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
         8: Transpose.ROTATE_90}


@contextmanager
def decided() -> Iterator[None]:
    """Turn Pillow's warning of too many pixels into an error, and ignore its other warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def image_size(content: bytes) -> tuple[int, int]:
    """Return (width, height) of an image file as `read_image` would show it, from its header.

    Raises Pillow's errors."""
    with decided():
        image = Image.open(io.BytesIO(without_texts(content)))
        if image.format == "TIFF":               # Pillow itself rotates these while decoding
            return decode(content).size
        width, height = image.size
        return (height, width) if orientation(image) >= 5 else (width, height)


def read_image(source: Path | bytes, name: str = "an image") -> Image.Image:
    """Read any image file as RGB.

    The EXIF orientation is applied; colours of an embedded profile become those of sRGB; 16-bit and
    float grey values are scaled to 8 bits; transparent parts become white; an animation gives its
    first frame.  Raises UserError for a file that is not an image, is damaged as far as its format
    can tell (a PNG has checksums, a JPEG has none), or has more pixels than Pillow accepts."""
    if isinstance(source, Path):
        name = str(source)
        source = read_bytes(source)
    try:
        with decided():
            return to_rgb(decode(source))
    except UnidentifiedImageError:
        reason = "of no known format"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        reason = f"over {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels; make it smaller first"
    except Exception as error:      # a decoder raises whatever the damage led to
        reason = (str(error) or type(error).__name__).splitlines()[0]
    raise UserError(f"{name}: not an image that can be read ({reason})")


def decode(content: bytes) -> Image.Image:
    """Decode a file's first image in its own mode, with its EXIF orientation applied."""
    content = without_texts(content)
    image = Image.open(io.BytesIO(content))
    if image.format == "EPS":
        raise ValueError("PostScript is a program, and would be run")
    if image.format == "PNG":
        image.verify()                                   # Pillow's decoder skips the checksums
        image = Image.open(io.BytesIO(content))
        bits = content[24]
        clear = image.info.get("transparency")           # in the file's bit depth, not in 8 bits
        if image.mode == "L" and clear is not None:
            image.info["transparency"] = clear * {2: 85, 4: 17}.get(bits, 1)
        elif image.mode == "RGB" and clear and bits == 16:
            image.info["transparency"] = tuple(value >> 8 for value in clear)
    image.load()
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none that can be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:               # Pillow raises whatever the damage led to
        return 1
    return value if value in TURNS else 1


def without_texts(content: bytes) -> bytes:
    """Drop the texts of a PNG, and its colour profile if that is too large: Pillow refuses an image
    in which one of them unpacks to over 1 MiB.  Texts that may hold the orientation stay."""
    start = 8
    if content[:start] != b"\x89PNG\r\n\x1a\n":
        return content
    kept = [content[:start]]
    while start < len(content):
        kind = content[start + 4:start + 8]
        end = start + 12 + int.from_bytes(content[start:start + 4])
        name, _, value = content[start + 8:end - 4].partition(b"\0")
        is_text = kind in (b"tEXt", b"zTXt", b"iTXt")
        needed = not is_text or name in ORIENTATION_TEXTS
        if needed and not ((is_text or kind == b"iCCP") and is_too_large(kind, value)):
            kept.append(content[start:end])
        start = end
    return b"".join(kept)


def is_too_large(kind: bytes, value: bytes) -> bool:
    """Return True if a PNG's text or colour profile unpacks to over 1 MiB."""
    packed = value[1:]
    if kind == b"iTXt":             # flag, method, language, translated name
        packed = value[2:].split(b"\0", 2)[-1]
    if kind == b"tEXt" or kind == b"iTXt" and value[:1] == b"\0":
        return len(value) >= PngImagePlugin.MAX_TEXT_CHUNK
    try:
        unpacked = zlib.decompressobj().decompress(packed, PngImagePlugin.MAX_TEXT_CHUNK)
    except zlib.error:
        return False
    too_large = len(unpacked) == PngImagePlugin.MAX_TEXT_CHUNK
    if too_large and kind == b"iCCP":
        warn_once("a colour profile of over 1 MiB is ignored, in one image or more")
    return too_large


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; transparent parts become white."""
    clear = image.info.get("transparency")                       # a colour, or a palette's alphas
    profile = image.info.get("icc_profile")
    if image.mode[0] in "IF":
        image = to_eight_bits(image, clear)
    rgb = to_srgb(image, profile)
    if clear is None and image.mode not in ("LA", "PA", "RGBA"):
        return rgb
    rgb.putalpha(image.convert("RGBA").getchannel("A"))
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, rgb).convert("RGB")


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image of 8 bits to RGB, without its alpha.  A profile that is damaged, or for
    another kind of image, is ignored, as viewers do."""
    kind = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    transform = colour_transform(profile, kind) if profile else None
    if transform is None:
        return image.convert("RGB")
    return transform.apply(image.convert(kind))


@functools.lru_cache(maxsize=16)
def colour_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB; None if it can't be made, or changes nothing."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except ImportError:
        warn_once("this Pillow has no ImageCms; colour profiles of images are ignored")
        return None
    except (ImageCms.PyCMSError, OSError):
        return None
    levels = np.arange(256, dtype=np.uint8)
    probe = Image.fromarray(np.stack([levels, levels[::-1], np.roll(levels, 85)], -1)[None])
    probe = probe.convert(mode)
    change = ImageChops.difference(transform.apply(probe), probe.convert("RGB"))
    # rounding changes colours of an sRGB profile by a level, for nothing
    return None if max(high for _, high in change.getextrema()) <= 1 else transform


def to_eight_bits(image: Image.Image, clear: int | None) -> Image.Image:
    """Scale grey integers from 0 to 65535, or floats from 0 to 1, to 8 bits.

    clear: the transparent value.  Raises ValueError for values outside the range."""
    values = np.asarray(image).astype(np.float64)
    most = 1 if image.mode == "F" else 65535
    if not 0 <= values.min() <= values.max() <= most:
        raise ValueError(f"grey from {values.min():g} to {values.max():g}, expected 0 to {most}")
    scaled = (values * (255 / most)).round()
    tags = getattr(image, "tag_v2", {})                          # of a TIFF
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
        scaled = 255 - scaled                    # Pillow itself does this for up to 8 bits
    grey = Image.fromarray(scaled.astype(np.uint8))
    if isinstance(clear, int):
        opaque = np.uint8(255) * (values != clear)
        grey.putalpha(Image.fromarray(opaque))
    return grey


def fit_image(image: Image.Image, height: int, width: int | None = None,
                filter: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """Crop the largest central part with the shape of height x width, and resize it to that size.

    width: by default the height.  Resizing first would take gigabytes for an image of 100,000 x 1
    pixels."""
    return ImageOps.fit(image, (width or height, height), filter)


def image_pixels(image: Image.Image) -> Tensor:
    """Return the values of an RGB image, (3, P, P) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to (3, P, P) float32 in [-1, 1]."""
    return image_pixels(image) / 127.5 - 1


def to_pixels(tensor: Tensor) -> Tensor:
    """Clip a tensor of any shape to [-1, 1] and convert it to uint8."""
    values = (tensor.float().clamp(-1, 1) + 1) * 127.5
    return values.round().to(torch.uint8)


def to_image(tensor: Tensor) -> Image.Image:
    """Clip (3, P, P) to [-1, 1] and convert it to an RGB image."""
    values = to_pixels(tensor).permute(1, 2, 0)                  # (P, P, 3)
    return Image.fromarray(values.cpu().numpy())


def read_mask(path: Path, like: Image.Image, height: int, width: int, factor: int) -> Tensor:
    """Read a mask file as (1, 1, h, w) bool, True where it is white.

    The mask must have the size of the image `like`, and is cropped in the same way.  A latent, of
    factor x factor pixels, is masked if any of its pixels is.  Raises UserError."""
    mask = read_image(path)
    require((mask.size == like.size,
             f"{path}: a mask of {mask.size} pixels, expected the image's {like.size}"))
    white = mask.convert("L").point(lambda value: 255 * (value > 127))
    fitted = np.array(fit_image(white, height, width, Image.Resampling.BOX))
    require((fitted.any(), f"{path}: is black in the part of the image that is kept, its largest "
             f"central {width}:{height}; paint white what is to be drawn anew"))
    masked = torch.from_numpy(fitted)[None, None] > 0                            # (1, 1, H, W)
    return F.max_pool2d(masked.float(), factor) > 0


def write_png(path: Path, image: Image.Image, fields: dict[str, str]) -> None:
    """Write a PNG with text fields, atomically.  Raises UserError."""
    info = PngImagePlugin.PngInfo()
    for name, value in fields.items():
        info.add_itxt(name, value)
    try:
        with replacing(path) as temporary:
            image.save(temporary, "PNG", pnginfo=info)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error})")


def text_fields(path: Path) -> dict[str, str]:
    """Return the text fields of a PNG; {} for other images, and if a field is over 1 MiB.

    Raises UserError for a damaged image."""
    read_image(path)
    try:
        with Image.open(path) as image:
            fields = getattr(image, "text", {})                  # only PNGs have this attribute
            return {name: str(value) for name, value in fields.items()}
    except Exception:               # `write_png` has not written this one
        return {}
