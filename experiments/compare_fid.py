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

Shapes: n images in each of two styles, D features of each.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataset import emoji
from dataset.images import to_image
from metrics import fid, inception

# torchvision's CUDA wheel can't be imported on a CPU without these operators, which are not used
OPERATORS = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import pytorch_fid.fid_score
import pytorch_fid.inception


def write_images(folder: Path, count: int) -> list[Path]:
    """Write `count` images of each style, and return the styles' folders."""
    records, images = emoji.load()
    folders = []
    for n, style in enumerate(emoji.STYLES):
        path = folder / style
        path.mkdir()
        folders.append(path)
        indices = [i for i, record in enumerate(records) if record["style"] == style]
        step = len(indices) // count
        for i, index in enumerate(indices[n::step][:count]):
            to_image(images[index] / 127.5 - 1).save(path / f"{i:03}.png")
    return folders


def write_weights(path: Path) -> Path:
    """Write random weights in the published layout."""
    weights = inception.untrained().state_dict()
    draw = torch.Generator().manual_seed(1)
    for name, x in weights.items():
        if ".bn." not in name:
            continue
        if name.endswith(("weight", "var")):
            x.copy_(0.8 + 0.4 * torch.rand(x.shape, generator=draw))
        else:
            x.copy_(0.1 * torch.randn(x.shape, generator=draw))
    classifier = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(weights | classifier, path)
    return path


@dataclass
class Features:
    """The features of both styles' images, (n, D) each."""
    first: np.ndarray
    second: np.ndarray

    def columns(self, kept: np.ndarray) -> "Features":
        """Return some of the features, in float64."""
        return Features(self.first[:, kept].astype(np.float64),
                        self.second[:, kept].astype(np.float64))

    def largest(self) -> float:
        return max(np.abs(self.first).max(), np.abs(self.second).max())


def compute_features(folders: list[Path], weights: Path) -> tuple[Features, Features]:
    """Return our features, and pytorch-fid's."""
    pytorch_fid.inception.load_state_dict_from_url = (
        lambda *args, **settings: torch.load(weights, weights_only=True))
    network, peer = inception.load(weights), pytorch_fid.inception.InceptionV3([3])
    started = time.time()
    ours = Features(*(fid.features(network, fid.file_images(path))[0] for path in folders))
    between = time.time()
    theirs = []
    for path in folders:
        files = sorted(path.glob("*.png"))
        theirs.append(pytorch_fid.fid_score.get_activations(files, peer, num_workers=0))
    print(f"features of {len(ours.first) + len(ours.second)} images: ours "
          f"{between - started:.0f} s, theirs {time.time() - between:.0f} s", flush=True)
    return ours, Features(*theirs)


def our_fid(x: Features) -> float:
    return fid.frechet(fid.statistics(x.first), fid.statistics(x.second))


def their_fid(x: Features) -> float:
    moments = []
    for features in (x.first, x.second):
        moments += [features.mean(0), np.cov(features, rowvar=False)]
    return float(pytorch_fid.fid_score.calculate_frechet_distance(*moments))


def reference_fid(x: Features) -> float:
    """Return FID without a covariance.  The nuclear norm of the product of the centred features is
    tr (S_x S_y)^(1/2)."""
    centred = []
    for features in (x.first, x.second):
        centred.append((features - features.mean(0)) / np.sqrt(len(features) - 1))
    shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    between_means = ((x.first.mean(0) - x.second.mean(0)) ** 2).sum()
    return between_means + sum((z ** 2).sum() for z in centred) - 2 * shared


def compare_distances(ours: Features, theirs: Features) -> float:
    """Print FID by each program; return the relative difference of ours and theirs."""
    D = ours.first.shape[1]
    rank = [np.linalg.matrix_rank(np.cov(x, rowvar=False)) for x in (ours.first, ours.second)]
    started = time.time()
    our_distance = our_fid(ours)
    between = time.time()
    their_distance = their_fid(theirs)
    print(f"{D} features, ranks {rank[0]} and {rank[1]}: ours {between - started:.1f} s, theirs "
          f"{time.time() - between:.1f} s")
    difference = our_distance / their_distance - 1
    row = {"features": D, "ours": our_distance, "theirs": their_distance,
           "reference of our features": reference_fid(ours), "of theirs": reference_fid(theirs),
           "ours on their features": our_fid(theirs), "ours / theirs - 1": difference}
    print(json.dumps(row), flush=True)
    return abs(difference)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--weights", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        folders = write_images(Path(folder), args.count)
        weights = args.weights or write_weights(Path(folder) / inception.FILE)
        ours, theirs = compute_features(folders, weights)
    differences = Features(ours.first - theirs.first, ours.second - theirs.second)
    print(f"features: largest {theirs.largest():.3g}, differ by "
          f"{differences.largest() / theirs.largest():.1e} of it at most")
    everything = np.arange(ours.first.shape[1])
    most_varying = np.argsort(ours.first.std(0))[-64:]
    worst = 0.0
    for kept in (everything, most_varying):
        worst = max(worst, compare_distances(ours.columns(kept), theirs.columns(kept)))
    assert worst < 1e-3, worst
    print(f"relative difference {worst:.1e} at most, expected below 1e-3")


if __name__ == "__main__":
    main()
