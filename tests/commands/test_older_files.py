"""Files written before the modules moved into folders still load.

tests/fixtures/older was made at commit df3aa65, when all modules were in the root folder.
checkpoint/ holds random weights.  run/ was trained with FLAGS below and killed after it saved step
4.  expected.json holds the log of the same run without a kill, every 64th number of a sampled image
with its caption, and the SHA-256 of every file of `checkpoint.py export tests/fixtures/release`.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import checkpoint
import train
from helpers import rows
from inference import image_to_text, text_to_image
from inference.parts import Parts

FIXTURES = Path(__file__).parents[1] / "fixtures"
OLDER = FIXTURES / "older"
EXPECTED = json.loads((OLDER / "expected.json").read_text())
FLAGS = """--init checkpoint --image-data data.tar --image-batch 4 --text-batch 2 --dtype float32
    --warmup 2 --log-every 1 --save-every 2 --sample-every 0 --eval-every 0 --device cpu --steps 6
    --out run"""


@pytest.mark.parametrize("folder", ["checkpoint", "run"])
def test_an_older_checkpoint_gives_the_same_image_and_caption(folder):
    parts = Parts(OLDER / folder, dtype=torch.float32)
    image = text_to_image.draw(parts, ["red apple, noto style"], steps=4)
    expected = EXPECTED["drawn"][folder]
    # 1e-4: float32 sums in another order on another processor
    assert image.flatten()[::64].tolist() == pytest.approx(expected["pixels"], abs=1e-4)
    assert image_to_text.write(parts, image_to_text.encode(parts, image), [None]) == [expected["caption"]]


def test_an_older_killed_run_resumes_to_the_same_losses(tmp_path, monkeypatch):
    shutil.copytree(OLDER, tmp_path / "older")
    monkeypatch.chdir(tmp_path / "older")
    train.main(FLAGS.split())
    log = rows(Path("run"))
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    for row, expected in zip(log, EXPECTED["log"], strict=True):
        # float32 sums in another order on another processor
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("layout", ["release", "sd3"])
def test_an_export_keeps_its_bytes(layout, tmp_path):
    checkpoint.export(FIXTURES / "release", tmp_path, layout)
    digests = {}
    for file in tmp_path.rglob("*"):
        if file.is_file():
            name = str(file.relative_to(tmp_path))
            digests[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digests == EXPECTED["exported"][layout]
