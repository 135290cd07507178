"""Images as a viewer shows them: files read, cut to a size, and turned into tensors and back.

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
    """Make Pillow's warning of too many pixels an error, and drop its others about odd files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def picture_size(content: bytes) -> tuple[int, int]:
    """(width, height) the right way up, from a file's header.  Raises what Pillow raises."""
    with decided():
        picture = Image.open(io.BytesIO(content))
        if picture.format == "TIFF":             # which Pillow turns itself, sooner or later
            return decode(content).size
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return picture.size[::-1] if turned else picture.size


def read_picture(source: Path | bytes, name: str = "a picture") -> Image.Image:
    """Read any image file as RGB, as the camera was held, grey of 16 bits and floats too,
    transparent parts on white; of an animation the first frame.

    Raises UserError where it is not whole, as far as its format can tell (a PNG has checksums, a
    JPEG has none), or has more pixels than Pillow takes."""
    if isinstance(source, Path):
        require((source.exists(), f"{source}: no such picture file"))
        name, source = str(source), read_bytes(source)
    try:
        with decided():
            return flat(decode(source))
    except UnidentifiedImageError:
        reason = "of no known format"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        reason = f"over {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels; make it smaller first"
    except Exception as error:      # a decoder raises whatever the damage led to
        reason = (str(error) or type(error).__name__).splitlines()[0]
    raise UserError(f"{name}: not a picture that can be read ({reason})")


def decode(content: bytes) -> Image.Image:
    """A file's first picture, the right way up, in the mode that it has."""
    picture = Image.open(io.BytesIO(content))
    if picture.format == "EPS":
        raise ValueError("PostScript is a program, and would be run")
    if picture.format == "PNG":                          # whose decoder leaves the checksums alone
        picture.verify()
        picture = Image.open(io.BytesIO(content))
        bits = content[24]
        clear = picture.info.get("transparency")         # in the file's bits, not in eight
        if picture.mode == "L" and clear is not None:
            picture.info["transparency"] = clear * {2: 85, 4: 17}.get(bits, 1)
        elif picture.mode == "RGB" and clear and bits == 16:
            picture.info["transparency"] = tuple(value >> 8 for value in clear)
    picture.load()
    return ImageOps.exif_transpose(picture)


def flat(picture: Image.Image) -> Image.Image:
    """In any mode -> RGB.  Integers of more than 8 bits go from 0 to 65535, floats from 0 to 1."""
    clear = picture.info.get("transparency")                     # a colour, or a palette's alphas
    if picture.mode[0] in "IF":
        values, most = np.asarray(picture).astype(np.float64), 1 if picture.mode == "F" else 65535
        if not 0 <= values.min() <= values.max() <= most:
            raise ValueError(
                f"grey from {values.min():g} to {values.max():g}, expected 0 to {most}")
        picture = Image.fromarray((values * (255 / most)).round().astype(np.uint8))
        if isinstance(clear, int):
            picture.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if clear is None and picture.mode not in ("LA", "PA", "RGBA", "RGBa"):
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def fit_picture(picture: Image.Image, height: int, width: int | None = None,
                filter: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """Return the largest middle part of the shape of height x width (a square without a width),
    resized.

    It is cut before it is resized: of a picture of 100,000 x 1 the other order would make
    gigabytes."""
    return ImageOps.fit(picture, (width or height, height), filter)


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> (3, P, P) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


def to_picture(image: Tensor) -> Image.Image:
    """(3, P, P) in [-1, 1], clipped -> RGB picture."""
    array = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def read_mask(path: Path, like: Image.Image, height: int, width: int, factor: int) -> Tensor:
    """Return where a mask file, of the size of its picture, is white, (1, 1, h, w) bool.

    It is cut as the picture is, and a latent is masked where any of its pixels is.  Raises
    UserError."""
    mask = read_picture(path)
    require((mask.size == like.size,
             f"{path}: a mask of {mask.size} pixels, expected the picture's {like.size}"))
    light = mask.convert("L").point(lambda value: 255 * (value > 127))
    require((light.getbbox(), f"{path}: is black everywhere; paint white what is to be drawn anew"))
    fitted = torch.from_numpy(np.array(fit_picture(light, height, width, Image.Resampling.BOX)))
    return F.max_pool2d((fitted > 0)[None, None].float(), factor) > 0


def write_png(path: Path, picture: Image.Image, fields: dict[str, str]) -> None:
    """A PNG with text fields, there whole or not at all.  Raises UserError."""
    info = PngImagePlugin.PngInfo()
    for name, value in fields.items():
        info.add_itxt(name, value)
    try:
        with replacing(path) as temporary:
            picture.save(temporary, "PNG", pnginfo=info)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error})")


def text_fields(path: Path) -> dict[str, str]:
    """Those of a PNG; none of another picture.  Raises UserError."""
    read_picture(path)                                           # whole, or refused by name
    with Image.open(path) as picture:
        return {name: str(value) for name, value in getattr(picture, "text", {}).items()}
