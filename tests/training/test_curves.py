"""viz/curves.py: the curves and the page."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

import train
from common.cli import UserError
from viz import curves


def log(scale=1.0, steps=range(10, 60, 10)):
    measured = lambda s: dict(val_image=scale / s, val_nats=2 * scale / s, val_image_t=[1.0] * 10,
                              val_text_t=[2.0] * 10)
    return [dict(step=s, seconds=float(s), image_loss=scale / s, text_loss=9 * scale / s, lr=1e-3,
                 grad_norm=1.0, **(measured(s) if s % 20 == 0 else {})) for s in steps]


def test_the_curves_are_drawn_of_whatever_rows_there_are(tmp_path):
    curves.curves(log(), tmp_path / "a.png", [log(2.0)])
    curves.curves([row for row in log() if "val_image" not in row], tmp_path / "b.png")
    curves.curves([dict(step=1, seconds=0.1, text_loss=1.0, lr=0.0, grad_norm=0.0)], tmp_path / "c.png")
    pictures = [Image.open(tmp_path / f"{name}.png").convert("RGB") for name in "abc"]
    assert {picture.size for picture in pictures} == {(1080, 560)}
    colours = [{colour for _, colour in picture.getcolors(2**20)} for picture in pictures]
    assert curves.BLUE in colours[0] and curves.GREY in colours[0] and curves.RED in colours[0]
    assert curves.BLUE not in colours[1]


class Page(HTMLParser):
    """The addresses that a page fetches from, and its cells."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.cells = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, text):
        self.cells.append(text)


def test_a_run_leaves_a_page_that_fetches_nothing_and_shows_others_in_grey(tiny, small_tar, tmp_path):
    flags = list(map(str, ["--init", tiny, "--image-data", small_tar, "--image-batch", 4, "--text-batch", 4,
                           "--dtype", "float32", "--device", "cpu", "--eval-every", 2,
                           "--sample-every", 2, "--steps", 4]))
    train.main([*flags, "--out", str(tmp_path / "one <b>")])
    other = tmp_path / "one <b>" / "log.jsonl"
    train.main([*flags, "--out", str(tmp_path / "two"), "--compare", str(other)])
    sheet = Image.open(tmp_path / "two" / "loss.png").convert("RGB")
    assert curves.GREY in {colour for _, colour in sheet.getcolors(2**20)}      # the other run's
    text = (tmp_path / "one <b>" / "run.html").read_text()
    page = Page(text)
    assert len(page.addresses) == 3 and all(a.startswith("data:image/png;base64,") for a in page.addresses)
    samples = base64.b64decode(page.addresses[-1].partition(",")[2])
    assert samples == (tmp_path / "one <b>" / "samples_4.png").read_bytes()
    assert "http" not in re.sub(r'src="[^"]*"', "", text) and "one <b>" in "".join(page.cells)
    assert page.cells[page.cells.index("eval_every") + 1] == "2" and "step 2" in page.cells
    rows = [json.loads(line) for line in other.open()]
    assert torch.tensor([row["val_nats"] for row in rows if "val_nats" in row]).isfinite().all()
    for row in rows:                                             # 4 + 4 samples a step of 4 + 28 tokens
        assert row["tokens_per_s"] / row["samples_per_s"] == pytest.approx(4 + 28, rel=0.01)
        assert 0.1 < row["gib"] < 8 and row["tflop_per_s"] > 0 and "mfu" not in row
    (tmp_path / "none.jsonl").write_text('{"step": 1, "seconds": 0.5}\n')
    for name in ("none.jsonl", "nothing.jsonl"):
        with pytest.raises(UserError, match=f"--compare .*{name}: expected a log.jsonl with validations"):
            train.main([*flags, "--out", str(tmp_path / "two"), "--fresh", "--compare", str(tmp_path / name)])
    assert (tmp_path / "two" / "step_4").exists()                # which --fresh would have deleted
