"""Fill in the .html files of this folder."""

import re
from pathlib import Path


def fill_template(file: str, **texts: str) -> str:
    """Return viz/FILE with each @name@ replaced by its text.

    One pass replaces all of them, so a text that itself holds "@name@" stays as it is."""
    template = (Path(__file__).parent / file).read_text(encoding="utf-8")
    return re.sub("@([a-z]+)@", lambda place: texts[place[1]], template)
