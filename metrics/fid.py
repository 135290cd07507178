"""How far apart two sets of pictures are: FID (arXiv 1706.08500) and KID (arXiv 1801.01401).

    network = inception.load("pt_inception-2015-12-05-6726825d.pth")
    drawn, bad = measure(Path("drawn"), network)
    real, _ = measure(Path("shards/real.tar"), network)
    frechet(drawn, real), kid(drawn.features, real.features)

FID falls with the number of pictures: compare it at one number only (the field's are 50,000, and 30,000 of
COCO).  KID does not, and its spread is known; it is the one for some hundred pictures.

Shapes: n pictures, D features of each, which are Inception's 2048.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cli import UserError, require
from files import replacing
from metrics.inception import prepare
from pictures import read_picture
from sources import PICTURES
from tars import KINDS, Tar

Listing = list[tuple[str, Callable[[], Image.Image]]]           # (name, what reads it or raises UserError)


@dataclass
class Statistics:
    mu: np.ndarray                      # (D,) float64
    sigma: np.ndarray                   # (D, D) float64, of n - 1
    count: int | None = None            # n; pytorch-fid's files don't say
    features: np.ndarray | None = None  # (n, D) float32, which KID takes


def pictures(source: Path, where: str = "*") -> Listing:
    """The pictures in a folder and below it, sorted, without hidden ones; or the samples of a tar, in its
    order, where one without a picture can't be read.

    where: a pattern of names inside the source, "cats/*" or "*-noto.webp"; * stands for any text, / too.
    Raises UserError for a source that is missing or has no such pictures."""
    if source.name.endswith(KINDS):
        tar = Tar(str(source))
        found = [(name, lambda i=i: read_sample(tar, i)) for i in range(len(tar))
                 if fnmatchcase(name := sample(tar, i)[0], where)]
    else:
        require((source.is_dir(), f"{source}: expected a folder of pictures, a tar or an .npz, found "
                 f"{'another file' if source.exists() else 'nothing'}"))
        names = sorted(path.relative_to(source) for path in source.rglob("*")
                       if path.suffix.lower() in PICTURES and path.is_file())
        found = [(str(name), lambda name=name: read_picture(source / name)) for name in names
                 if fnmatchcase(name.as_posix(), where) and not any(p.startswith(".") for p in name.parts)]
    named = f" with names like {where}" * (where != "*")
    require((found, f"{source}: no pictures in it{named}, expected {', '.join(PICTURES)}"))
    return found


def sample(tar: Tar, i: int) -> tuple[str, bytes | None]:
    """(name inside the tar, its picture's file if it has one)."""
    key, files = tar[i]
    kind = next((kind for kind in PICTURES if kind[1:] in files), "")
    return key + kind, files.get(kind[1:])


def read_sample(tar: Tar, i: int) -> Image.Image:
    name, content = sample(tar, i)
    require((content is not None, f"{tar.path}: {name}: no picture in this sample"))
    return read_picture(content, f"{tar.path}: {name}")


@torch.inference_mode()
def features(network: Callable[[Tensor], Tensor], listing: Listing, batch: int = 32, device: str = "cpu",
             say: Callable[[int, int], None] | None = None) -> tuple[np.ndarray, list[str]]:
    """((n, D) float32 of those that can be read, a line about each of the others); a batch is in memory at a
    time.  network: (B, 3, 299, 299) -> (B, D), on `device`.  say: is told (done, of how many) at each."""
    found, bad, ready = [], [], []
    for done, (_, read) in enumerate(listing, 1):
        try:
            ready.append(prepare(read()))
        except UserError as error:
            bad.append(str(error))
        if ready and (len(ready) == batch or done == len(listing)):
            found.append(network(torch.stack(ready).to(device)).float().cpu())
            ready = []
        if say:
            say(done, len(listing))
    return (torch.cat(found).numpy() if found else np.empty((0, 0), np.float32)), bad


def statistics(features: np.ndarray) -> Statistics:
    """Of (n, D), which are kept.  Raises UserError for fewer than 2, or for what is not finite."""
    n = len(features)
    require((n >= 2, f"the features of {n} pictures, expected 2 or more"),
            (np.isfinite(features).all(), "features that are not finite; are these the network's weights?"))
    mu = features.mean(0, dtype=np.float64)
    away = features - mu                                         # (n, D) float64, once: 0.8 GB of 50,000
    return Statistics(mu, away.T @ away / (n - 1), n, np.asarray(features, np.float32))


def save(path: Path, found: Statistics, features: bool = False) -> None:
    """An .npz, which pytorch-fid reads too; with the features, 8 kB a picture, if asked.  UserError."""
    require((path.suffix == ".npz", f"{path}: expected a name that ends in .npz"),
            (not features or found.features is not None, f"{path}: these statistics came without features"))
    held = {name: value for name, value in vars(found).items()
            if value is not None and (features or name != "features")}
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **held)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error})")


def load(path: Path) -> Statistics:
    """What `save` has written, or pytorch-fid's --save-stats.  Raises UserError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in ("mu", "sigma", "count", "features") if name in file}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file")
    except Exception as error:      # numpy and zipfile raise whatever the damage led to
        raise UserError(f"{path}: not a whole .npz of statistics ({str(error).split(chr(10))[0]}); measure "
                        f"the pictures again")
    require(({"mu", "sigma"} <= held.keys(), f"{path}: expected mu and sigma in it, found "
             f"{', '.join(held) or 'neither'}"))
    D, count = held["mu"].size, held["count"].item() if "count" in held and held["count"].ndim == 0 else None
    wanted = dict(mu=(D,), sigma=(D, D), count=(), features=(count, D))
    for name, value in held.items():
        good = value.shape == wanted[name] and value.dtype.kind in "iuf" and np.isfinite(value).all()
        require((good, f"{path}: {name} is {value.dtype} {value.shape}, expected finite numbers "
                 f"{wanted[name]}; measure the pictures again"))
    mu, sigma = (held[name].astype(np.float64) for name in ("mu", "sigma"))
    require((np.allclose(sigma, sigma.T) and (sigma.diagonal() >= 0).all(),
             f"{path}: sigma is not a covariance; measure the pictures again"))
    return Statistics(mu, sigma, count, held["features"].astype(np.float32) if "features" in held else None)


def measure(source: Path | Listing, network: Callable[[Tensor], Tensor] | None = None, where: str = "*",
            **how) -> tuple[Statistics, list[str]]:
    """(statistics, a line about each picture that can't be read) of an .npz, which takes no network, of
    `pictures`, or of a listing.  how: batch, device and say of `features`.  Raises UserError for fewer than 2
    that can."""
    if isinstance(source, Path) and source.suffix == ".npz":
        return load(source), []
    found, bad = features(network, pictures(source, where) if isinstance(source, Path) else source, **how)
    name = source if isinstance(source, Path) else "the set"
    require((len(found) >= 2, f"{name}: {len(found)} pictures that can be read, expected 2 or more"
             + "; ".join(["", *bad[:1]])))
    return statistics(found), bad


def root(sigma: np.ndarray) -> np.ndarray:
    """(D, r) of rank r with root @ root.T = sigma: what is rounding of zero in its spectrum is left out."""
    found, vectors = np.linalg.eigh(sigma)
    kept = found > max(found[-1], 0) * len(found) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(found[kept])


def frechet(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the squared distance of two normal distributions.

    The last trace is the sum of the singular values of R_a^T R_b, where S = R R^T: exact for covariances of
    fewer pictures than features too, where a root of their product has only half the digits.  Raises
    UserError for features of different lengths."""
    require((a.mu.shape == b.mu.shape, f"statistics of {len(a.mu)} and of {len(b.mu)} features, expected the "
             f"same network's"))
    shared = np.linalg.svd(root(a.sigma).T @ root(b.sigma), compute_uv=False).sum()
    found = ((a.mu - b.mu) ** 2).sum() + a.sigma.trace() + b.sigma.trace() - 2 * shared
    return max(float(found), 0.0)


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(m, D), (n, D) -> (m, n): (x.y / D + 1)^3, the paper's."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def unbiased(x: np.ndarray, y: np.ndarray) -> float:
    """The squared maximum mean discrepancy of (m, D) and (n, D): no picture is compared with itself."""
    within = lambda k: (k.sum() - k.trace()) / (len(k) * (len(k) - 1))
    return float(within(kernel(x, x)) + within(kernel(y, y)) - 2 * kernel(x, y).mean())


def kid(x: np.ndarray, y: np.ndarray, subsets: int = 100, size: int = 1000,
        seed: int = 0) -> tuple[float, float | None]:
    """(estimate, spread) from features (m, D) and (n, D): about 0, and as often below it, for equal ones.

    One estimate of all where neither has more than `size`, and no spread, None.  Else the mean and standard
    deviation over random subsets of `size` (of all, where one has fewer), as clean-fid and torch-fidelity
    report it.  Raises UserError for fewer than 2 of either."""
    require((min(len(x), len(y)) >= 2, f"the features of {len(x)} and {len(y)} pictures, expected 2 or more"),
            (x.shape[1:] == y.shape[1:], f"features {x.shape} and {y.shape}, expected the same network's"))
    if max(len(x), len(y)) <= size:
        return unbiased(x.astype(np.float64), y.astype(np.float64)), None
    draw, size, found = np.random.default_rng(seed), min(size, len(x), len(y)), []
    for _ in range(subsets):
        found.append(unbiased(*(z[draw.choice(len(z), size, replace=False)].astype(np.float64)
                                for z in (x, y))))
    return float(np.mean(found)), float(np.std(found))
