"""Measure how far apart two sets of images are: FID (arXiv 1706.08500) and KID (arXiv 1801.01401).

    network = inception.load(Path("pt_inception-2015-12-05-6726825d.pth"))
    drawn, left_out = measure("drawn", network)
    real, _ = measure("shards/real.tar", network)
    frechet(drawn, real), kid(drawn.features, real.features)

FID falls as the number of images grows: compare FIDs of equal numbers only (50,000 is usual, 30,000
for COCO).  The expected value of KID does not depend on the number: use it for a few hundred
images.

Shapes: n images, D features of each, 2048 for Inception.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.cli import UserError, require
from common.files import replacing
from common.progress import batches
from dataset import emoji
from dataset.images import read_image, to_image
from dataset.sources import IMAGE_SUFFIXES, image_in, list_images
from dataset.webdataset import SUFFIXES, Tar
from metrics.inception import prepare

# functions that each read an image or raise UserError
Listing = list[Callable[[], Image.Image]]


@dataclass
class Statistics:
    mu: np.ndarray                      # (D,) float64
    sigma: np.ndarray                   # (D, D) float64, covariance with divisor n - 1
    count: int | None = None            # n; None for a file of pytorch-fid
    features: np.ndarray | None = None  # (n, D) float32, for KID
    network: str = ""                   # digest of its weights; "" for a file of pytorch-fid


def image_files(folder: Path) -> list[Path]:
    """List the image files in and below a folder, sorted, without hidden ones.

    Raises UserError if there is none."""
    require((folder.is_dir(),
             f"{folder}: expected a folder of images, or a tar or an .npz for FID"))
    files, _ = list_images(folder)
    require((files, f"{folder}: no images in it, expected {', '.join(IMAGE_SUFFIXES)}"))
    return files


def file_images(source: Path) -> Listing:
    """List the images of a folder, or the samples of a tar in its order.

    Raises UserError for any other source.  A tar's sample without an image raises it when read."""
    if source.name.endswith(SUFFIXES):
        tar = Tar(str(source))
        return [functools.partial(read_sample, tar, i) for i in range(len(tar))]
    return [functools.partial(read_image, file) for file in image_files(source)]


def read_sample(tar: Tar, i: int) -> Image.Image:
    """Return the image of a tar's sample.  Raises UserError."""
    key, files = tar[i]
    where = f"{tar.path}: {key}"
    suffix, content = image_in(files, where)
    return read_image(content, where + suffix)


def emoji_images(source: str) -> Listing:
    """List the images of a source "emoji:SPLIT".  Raises UserError for an unknown split."""
    split = emoji.split_named(source)
    records, pixels = emoji.load()
    return [functools.partial(to_image, pixels[i] / 127.5 - 1)
            for i in emoji.of_split(records, split)]


@torch.inference_mode()
def features(network: Callable[[Tensor], Tensor], listing: Listing, device: str = "cpu",
             title: str = "images", batch: int = 32) -> tuple[np.ndarray, list[str]]:
    """Return the features (n, D) float32 of the readable images, and a line for each other image.

    network: (B, 3, 299, 299) -> (B, D), on `device`.  title: for the progress messages."""
    results, left_out = [], []
    for part in batches(title, listing, batch):
        images = []
        for read in part:
            try:
                images.append(prepare(read()))
            except UserError as error:
                left_out.append(str(error))
        if images:
            x = torch.stack(images).to(device)                           # (B, 3, 299, 299)
            results.append(network(x).float().cpu().numpy())             # (B, D)
    return np.concatenate(results) if results else np.empty((0, 0), np.float32), left_out


def statistics(features: np.ndarray) -> Statistics:
    """Compute the statistics of features (n, D), n >= 2; they keep the features.

    Raises UserError for features that are not finite."""
    require((np.isfinite(features).all(),
             "features that are not finite; are these the network's weights?"))
    n = len(features)
    mu = features.mean(0, dtype=np.float64)
    centred = features - mu                                 # (n, D) float64, once: 0.8 GB of 50,000
    sigma = centred.T @ centred / (n - 1)                   # (D, D)
    return Statistics(mu, sigma, n, features)


def save(path: Path, statistics: Statistics, features: bool = False) -> None:
    """Write an .npz, which pytorch-fid can read, too.

    features: write them as well, 8 kB per image."""
    arrays = {name: value for name, value in vars(statistics).items() if value is not None}
    if not features:
        arrays.pop("features", None)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def is_statistics(source: str) -> bool:
    """Return True for a file that `load` reads, by its name."""
    return source.lower().endswith(".npz")


def load(path: Path) -> Statistics:
    """Read a file that `save` or pytorch-fid's --save-stats has written.  Raises UserError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            # naming mu and sigma raises an error if one is missing
            arrays = {name: file[name] for name in ["mu", "sigma", *file]}
        D = arrays["mu"].size
        count = arrays.get("count", np.array(0)).item()
        network = str(arrays.pop("network", ""))
    except Exception as error:      # numpy and zipfile raise whatever the damage led to
        raise UserError(f"{path}: not a whole .npz of statistics ({str(error).splitlines()[0]})")
    shapes = dict(mu=(D,), sigma=(D, D), count=(), features=(count, D))
    for name, value in arrays.items():
        shape = shapes.get(name)
        is_number = value.dtype.kind in "iuf"
        good = is_number and value.shape == shape and np.isfinite(value).all()
        require((good, f"{path}: {name} is {value.dtype} {value.shape}, expected finite numbers "
                 f"{shape}"))
    for name in ("mu", "sigma"):
        arrays[name] = arrays[name].astype(np.float64)
    return Statistics(**arrays, network=network)


def measure(source: str, network: Callable[[Tensor], Tensor], device: str = "cpu",
            digest: str = "") -> tuple[Statistics, list[str]]:
    """Return the statistics of a folder, a tar, emoji:SPLIT or an .npz, and a line for each
    unreadable image.

    digest: of the network's weights.  Raises UserError for fewer than two readable images, and for
    an .npz of another network."""
    path = Path(source)
    if is_statistics(source):
        stored = load(path)
        require((stored.network in ("", digest), f"{source}: statistics of the network "
                 f"{stored.network}, --inception is {digest}; make them again"))
        return stored, []
    if source.startswith("emoji:") and not path.exists():
        listing = emoji_images(source)
    else:
        listing = file_images(path)
    values, left_out = features(network, listing, device, f"{source}, images")
    count = len(values)
    require((count >= 2, f"{source}: {count} images that can be read, expected 2 or more; "
             f"{''.join(left_out[:1])}"))
    measured = statistics(values)
    measured.network = digest
    return measured, left_out


def root(sigma: np.ndarray) -> np.ndarray:
    """Return R (D, r) of rank r with R R^T = sigma (D, D), without the eigenvalues that are zero up
    to rounding."""
    values, vectors = np.linalg.eigh(sigma)
    kept = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def frechet(a: Statistics, b: Statistics) -> float:
    """Return the squared distance of two normal distributions:

        |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    tr (S_a S_b)^(1/2) is the sum of the singular values of R_a^T R_b, where S = R R^T.  This is
    exact also for fewer images than features, where a root of the product S_a S_b has only half
    the digits.  Raises UserError for features of different lengths."""
    require((a.mu.shape == b.mu.shape,
             f"statistics of {len(a.mu)} and of {len(b.mu)} features, expected the "
             f"same network's"))
    shared = np.linalg.svd(root(a.sigma).T @ root(b.sigma), compute_uv=False).sum()
    distance = ((a.mu - b.mu) ** 2).sum() + a.sigma.trace() + b.sigma.trace() - 2 * shared
    return max(float(distance), 0.0)


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return KID's kernel (x.y / D + 1)^3 of all rows of x (m, D) and of y (n, D), as (m, n)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mean_of_others(k: np.ndarray) -> float:
    """Return the mean of k (n, n) without its diagonal."""
    return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))


def unbiased(x: np.ndarray, y: np.ndarray) -> float:
    """Return the squared maximum mean discrepancy of x (m, D) and y (n, D), without comparisons of
    an image with itself:

        mean k(x, x') + mean k(y, y') - 2 mean k(x, y)"""
    x = x.astype(np.float64)
    y = y.astype(np.float64)
    within = mean_of_others(kernel(x, x)) + mean_of_others(kernel(y, y))
    return float(within - 2 * kernel(x, y).mean())


def kid(x: np.ndarray, y: np.ndarray, subsets: int = 100, size: int = 1000
        ) -> tuple[float, float | None]:
    """Return an estimate of KID from features (m, D) and (n, D), and its spread.  For equal
    distributions the estimate is about 0, and often negative.

    If neither side has more than `size` images, all of them give one estimate, and the spread is
    None.  Otherwise the results are the mean and standard deviation over random subsets of `size`
    images (or of all images of the smaller side), as in clean-fid and torch-fidelity."""
    if max(len(x), len(y)) <= size:
        return unbiased(x, y), None
    random = np.random.default_rng(0)
    size = min(size, len(x), len(y))
    estimates = []
    for _ in range(subsets):
        x_rows = random.choice(len(x), size, replace=False)
        y_rows = random.choice(len(y), size, replace=False)
        estimates.append(unbiased(x[x_rows], y[y_rows]))
    return float(np.mean(estimates)), float(np.std(estimates))
