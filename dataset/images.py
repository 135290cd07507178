"""Read images as a viewer shows them, crop and resize them, and convert them to tensors and back.

Shapes: P pixels a side.
"""

import io
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from common.cli import UserError, require
from common.files import read_bytes, replacing


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
        image = Image.open(io.BytesIO(content))
        if image.format == "TIFF":               # Pillow itself rotates these while decoding
            return decode(content).size
        width, height = image.size
        if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
            return height, width
        return width, height


def read_image(source: Path | bytes, name: str = "an image") -> Image.Image:
    """Read any image file as RGB.

    The EXIF orientation is applied; 16-bit and float grey values are scaled to 8 bits; transparent
    parts become white; an animation gives its first frame.  Raises UserError for a file that is not
    an image, is damaged as far as its format can tell (a PNG has checksums, a JPEG has none), or
    has more pixels than Pillow accepts."""
    if isinstance(source, Path):
        require((source.exists(), f"{source}: no such image file"))
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
    return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; transparent parts become white."""
    clear = image.info.get("transparency")                       # a colour, or a palette's alphas
    if image.mode[0] in "IF":
        image = to_eight_bits(image, clear)
    if clear is None and image.mode not in ("LA", "PA", "RGBA", "RGBa"):
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def to_eight_bits(image: Image.Image, clear: int | None) -> Image.Image:
    """Scale grey integers from 0 to 65535, or floats from 0 to 1, to 8 bits.

    clear: the transparent value.  Raises ValueError for values outside the range."""
    values = np.asarray(image).astype(np.float64)
    most = 1 if image.mode == "F" else 65535
    if not 0 <= values.min() <= values.max() <= most:
        raise ValueError(f"grey from {values.min():g} to {values.max():g}, expected 0 to {most}")
    grey = Image.fromarray((values * (255 / most)).round().astype(np.uint8))
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


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to (3, P, P) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def to_image(tensor: Tensor) -> Image.Image:
    """Clip (3, P, P) to [-1, 1] and convert it to an RGB image."""
    values = (tensor.float().clamp(-1, 1) + 1) * 127.5
    values = values.round().to(torch.uint8).permute(1, 2, 0)     # (P, P, 3)
    return Image.fromarray(values.cpu().numpy())


def read_mask(path: Path, like: Image.Image, height: int, width: int, factor: int) -> Tensor:
    """Read a mask file as (1, 1, h, w) bool, True where it is white.

    The mask must have the size of the image `like`, and is cropped in the same way.  A latent, of
    factor x factor pixels, is masked if any of its pixels is.  Raises UserError."""
    mask = read_image(path)
    require((mask.size == like.size,
             f"{path}: a mask of {mask.size} pixels, expected the image's {like.size}"))
    white = mask.convert("L").point(lambda value: 255 * (value > 127))
    require((white.getbbox(), f"{path}: is black everywhere; paint white what is to be drawn anew"))
    fitted = np.array(fit_image(white, height, width, Image.Resampling.BOX))
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
    """Return the text fields of a PNG; {} for other images.  Raises UserError."""
    read_image(path)                                           # raises UserError if damaged
    with Image.open(path) as image:
        fields = getattr(image, "text", {})                      # only PNGs have this attribute
        return {name: str(value) for name, value in fields.items()}
