"""Compare FID by metrics/fid.py with the package pytorch-fid, on the same images and weights.

    python3.11 -m venv peers            # a scratch environment; the project does not need these
    peers/bin/pip install torch==2.13.0 numpy safetensors tokenizers pillow scipy==1.17.1
    peers/bin/pip install --no-deps pytorch-fid==0.3.0 torchvision==0.28.0
    peers/bin/python -m experiments.compare_fid                       # ten minutes of two cores
    peers/bin/python -m experiments.compare_fid --weights pt_inception-2015-12-05-6726825d.pth

The images are 500 emoji in Google's style and 500 in Twitter's.  Weights are random, including the
norms', unless --weights gives the published ones.  "reference" uses the singular values of the
centred features, in float64, without a covariance.  The last line uses only the 64 features that
vary most: 500 images give them a covariance of full rank.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dataset import emoji
from dataset.images import to_image
from metrics import fid, inception

# torchvision's CUDA wheel can't be imported on a CPU without these operators, which are not used
OPERATORS = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    OPERATORS.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import pytorch_fid.fid_score as theirs
import pytorch_fid.inception as their_network


def write_images(folder: Path, count: int) -> list[Path]:
    """Write `count` images of each style, and return the styles' folders."""
    folders = [folder / style for style in emoji.STYLES]
    records, images = emoji.load()
    for n, path in enumerate(folders):
        path.mkdir()
        chosen = [i for i, record in enumerate(records) if record["style"] == path.name]
        for i, row in enumerate(chosen[n::len(chosen) // count][:count]):
            to_image(images[row] / 127.5 - 1).save(path / f"{i:03}.png")
    return folders


def write_weights(path: Path) -> Path:
    """Write random weights in the published layout."""
    state, draw = inception.untrained().state_dict(), torch.Generator().manual_seed(1)
    for name, x in state.items():
        if ".bn." in name:
            x.copy_(0.8 + 0.4 * torch.rand(x.shape, generator=draw) if name.endswith(("weight", "var")) else
                    0.1 * torch.randn(x.shape, generator=draw))
    torch.save(state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path


def reference(x: np.ndarray, y: np.ndarray) -> float:
    """Return FID from features x (m, D) and y (n, D).  The nuclear norm of the product of the
    centred features is tr (S_x S_y)^(1/2)."""
    centred = [(z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y)]
    shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + sum((z ** 2).sum() for z in centred) - 2 * shared


def by_theirs(x: np.ndarray, y: np.ndarray) -> float:
    return float(theirs.calculate_frechet_distance(*(f(z) for z in (x, y) for f in (
        lambda z: z.mean(0), lambda z: np.cov(z, rowvar=False)))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--weights", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        folders = write_images(Path(folder), args.count)
        weights = args.weights or write_weights(Path(folder) / inception.FILE)
        their_network.load_state_dict_from_url = lambda *_, **more: torch.load(weights, weights_only=True)
        ours, peer = inception.load(weights), their_network.InceptionV3([3])
        started = time.time()
        x = [fid.features(ours, fid.file_images(path))[0] for path in folders]
        between = time.time()
        y = [theirs.get_activations(sorted(path.glob("*.png")), peer, num_workers=0) for path in folders]
        print(f"features of {2 * args.count} images: ours {between - started:.0f} s, theirs "
              f"{time.time() - between:.0f} s", flush=True)
    away = max(np.abs(a - b).max() for a, b in zip(x, y)) / max(np.abs(b).max() for b in y)
    print(f"features: largest {np.abs(y[0]).max():.3g}, differ by {away:.1e} of it at most")
    worst = 0.0
    for D, cut in ((2048, slice(None)), (64, np.argsort(x[0].std(0))[-64:])):
        pairs = [[z[:, cut].astype(np.float64) for z in pair] for pair in (x, y)]
        rank = [np.linalg.matrix_rank(np.cov(z, rowvar=False)) for z in pairs[0]]
        started = time.time()
        found = dict(ours=fid.frechet(*map(fid.statistics, pairs[0])))
        between = time.time()
        found |= dict(theirs=by_theirs(*pairs[1]))
        print(f"{D} features, ranks {rank[0]} and {rank[1]}: ours {between - started:.1f} s, theirs "
              f"{time.time() - between:.1f} s")
        found |= {"reference of our features": reference(*pairs[0]), "of theirs": reference(*pairs[1]),
                  "ours on their features": fid.frechet(*map(fid.statistics, pairs[1])),
                  "ours / theirs - 1": found["ours"] / found["theirs"] - 1}
        worst = max(worst, abs(found["ours / theirs - 1"]))
        print(json.dumps({"features": D} | found), flush=True)
    assert worst < 1e-3, worst
    print(f"relative difference {worst:.1e} at most, expected below 1e-3")


if __name__ == "__main__":
    main()
