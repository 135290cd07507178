"""Fill in the .html files of this folder."""

import base64
import re
from pathlib import Path


def fill_template(file: str, **texts: str) -> str:
    """Return viz/FILE with each @name@ replaced by its text.

    One pass replaces all of them, so a text that itself holds "@name@" stays as it is."""
    template = (Path(__file__).parent / file).read_text(encoding="utf-8")
    return re.sub("@([a-z]+)@", lambda match: texts[match[1]], template)


def image_address(kind: str, content: bytes) -> str:
    """Return an image file of this kind ("png" or "webp") as a data: address, which a page can
    show without another file."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
