"""viz/curves.py: the image of a run's curves, and the page about a run."""

import base64
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser

import pytest
from PIL import Image

import train
from common.cli import UserError
from helpers import rows
from viz import curves


def log_rows(scale=1.0):
    """Return a log with every tenth step up to 50, and a validation in every second row."""
    log = []
    for step in range(10, 60, 10):
        row = dict(step=step, seconds=float(step), lr=1e-3, grad_norm=1.0, image_loss=scale / step,
                   text_loss=9 * scale / step)
        if step % 20 == 0:
            row |= dict(val_image=scale / step, val_nats=2 * scale / step, val_image_t=[1.0] * 10,
                        val_text_t=[2.0] * 10)
        log.append(row)
    return log


def colours(path):
    """Count the pixels of each colour of an image of the right size."""
    image = Image.open(path).convert("RGB")
    assert image.size == (1080, 560)
    return Counter({colour: count for count, colour in image.getcolors(2**20)})


def test_curves_are_drawn_from_whatever_rows_exist(tmp_path):
    path = tmp_path / "curves.png"
    curves.curves(log_rows(), path)
    single = colours(path)
    curves.curves(log_rows(), path, [log_rows(2.0)])
    compared = colours(path)
    assert compared[curves.GREY] > single[curves.GREY] + 50       # letters have grey edges, too
    assert compared[curves.BLUE] and compared[curves.RED]
    curves.curves([row for row in log_rows() if "val_image" not in row], path)
    assert not colours(path)[curves.BLUE]
    curves.curves([dict(step=1, seconds=0.1, text_loss=1.0, lr=0.0, grad_norm=0.0)], path)
    assert colours(path)


class Page(HTMLParser):
    """Collect the addresses that a page fetches from, and its table cells."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.cells = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, text):
        self.cells.append(text)


@pytest.fixture(scope="module")
def run_flags(tiny, small_tar):
    return list(map(str, ["--init", tiny, "--image-data", small_tar, "--image-batch", 4,
                          "--text-batch", 4, "--dtype", "float32", "--device", "cpu",
                          "--eval-every", 1, "--save-every", 2, "--steps", 2]))


@pytest.fixture(scope="module")
def run(run_flags, tmp_path_factory):
    """Train a run with markup as its name, two validations and two sheets of samples."""
    out = tmp_path_factory.mktemp("runs") / "one <b>"
    train.main([*run_flags, "--sample-every", "1", "--out", str(out)])
    return out


def test_page_of_a_run_fetches_nothing(run):
    text = (run / "run.html").read_text()
    page = Page(text)
    assert len(page.addresses) == 3                              # curves, first and last samples
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    samples = base64.b64decode(page.addresses[-1].partition(",")[2])
    assert samples == (run / "samples_2.png").read_bytes()
    assert "://" not in re.sub(r'src="[^"]*"', "", text)
    assert "default-src 'none'" in text                          # the page's own policy
    assert "one <b>" in "".join(page.cells)
    assert page.cells[page.cells.index("save_every") + 1] == "2"
    assert "step 2" in page.cells


def test_page_leaves_out_samples_of_later_steps(run, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    curves.page(out, {}, 1)
    assert "step 2" not in (out / "run.html").read_text()


def test_log_has_the_pace_and_the_memory_of_a_run(run):
    for row in rows(run):
        # 4 + 4 samples a step of 4 + 28 tokens; four digits are kept
        assert row["tokens_per_s"] / row["samples_per_s"] == pytest.approx(4 + 28, rel=0.01)
        assert 0.1 < row["gib"] < 8 and row["tflop_per_s"] > 0
        assert "mfu" not in row


def test_compared_run_is_drawn_in_grey(run, run_flags, tmp_path):
    other = rows(run)
    for row in other:  # else its curves would be hidden under this run's
        row["val_image"] *= 1.5
        row["val_nats"] *= 1.5
    log = tmp_path / "other.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in other))
    train.main([*run_flags, "--sample-every", "0", "--out", str(tmp_path / "run"),
                "--compare", str(log)])
    compared, single = colours(tmp_path / "run" / "loss.png"), colours(run / "loss.png")
    assert compared[curves.GREY] > single[curves.GREY] + 50       # letters have grey edges, too


def test_log_without_validations_is_refused_before_a_fresh_start(run, run_flags, tmp_path):
    (tmp_path / "none.jsonl").write_text('{"step": 1, "seconds": 0.5}\n')
    for name in ("none.jsonl", "nothing.jsonl"):
        with pytest.raises(UserError, match=f"--compare .*{name}"):
            train.main([*run_flags, "--out", str(run), "--fresh",
                        "--compare", str(tmp_path / name)])
    assert (run / "step_2").exists()                             # --fresh would have deleted it
