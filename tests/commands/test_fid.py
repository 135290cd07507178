"""metrics/fid.py and inception.py: closed forms, definitions written out, and what is wrong in a line."""

import copy
import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.cli import UserError
from metrics import fid, inception
from metrics.fid import Statistics, frechet, kid, statistics

LOOKS = ["red", "lime", "noise", "stripes"]


def toy(x):
    """(B, 3, 299, 299) -> (B, 48): a coarse picture, in place of a network."""
    return F.adaptive_avg_pool2d(x, 4).flatten(1)


def rotation(D, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((D, D)))[0]


def normal(n, D=16, shift=0.0, seed=0):
    return (np.random.default_rng(seed).standard_normal((n, D)) + shift).astype(np.float32)


def picture(look):
    if look == "noise":
        return Image.fromarray(np.random.RandomState(0).randint(0, 256, (50, 70, 3), np.uint8))
    if look == "stripes":
        return Image.fromarray(np.tile(np.arange(72, dtype=np.uint8)[None, :, None] % 8 * 32, (50, 1, 3)))
    return Image.new("RGB", (70, 50), look)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set/b").mkdir(parents=True)
    for name, look in zip(["a.png", "b/c.PNG", "b/d.webp", "e.jpg"], LOOKS):
        picture(look).save(tmp_path / "set" / name)
    (tmp_path / "set/.hidden.png").write_bytes(b"left out")
    (tmp_path / "set/a.txt").write_text("a caption")
    return tmp_path / "set"


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def network():
    return inception.untrained()


def test_frechet_is_the_closed_form_where_covariances_commute():
    """With the same eigenvectors it is |mu_a - mu_b|^2 + sum (sqrt p - sqrt q)^2; ranks 40, 25, 0 of 40."""
    draw, turn = np.random.default_rng(1), rotation(40)
    mu = draw.standard_normal((2, 40))
    for zeros in ((0, 0), (15, 0), (15, 15), (0, 40), (40, 40)):
        spectra = draw.uniform(0.1, 3, (2, 40)) * (np.arange(40) >= np.array(zeros)[:, None])
        a, b = (Statistics(m, turn * s @ turn.T) for m, s in zip(mu, spectra))
        true = ((mu[0] - mu[1]) ** 2).sum() + ((np.sqrt(spectra[0]) - np.sqrt(spectra[1])) ** 2).sum()
        assert frechet(a, b) == pytest.approx(true, rel=1e-12)
        assert frechet(b, a) == pytest.approx(true, rel=1e-12)
        assert frechet(a, a) < 1e-12


def test_frechet_is_what_the_eigenvalues_of_the_product_say():
    a, b = (statistics(normal(200, 12, shift, seed) @ rotation(12, seed).astype(np.float32) * (1 + seed))
            for shift, seed in ((0, 1), (0.3, 2)))
    product = np.linalg.eigvals(a.sigma @ b.sigma)
    true = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma) - 2 * np.sqrt(product.real).sum()
    assert abs(product.imag).max() < 1e-9 and frechet(a, b) == pytest.approx(true, rel=1e-10)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-12)


def test_frechet_of_few_pictures_is_what_their_features_say():
    """tr (S_a S_b)^(1/2) is the nuclear norm of the product of the centred features: without covariances."""
    x, y = normal(9, 60, 0, 1).astype(np.float64), normal(14, 60, 0.2, 2).astype(np.float64)
    centred = [z - z.mean(0) for z in (x, y)]
    shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum() / np.sqrt(8 * 13)
    spread = (centred[0] ** 2).sum() / 8 + (centred[1] ** 2).sum() / 13
    true = ((x.mean(0) - y.mean(0)) ** 2).sum() + spread - 2 * shared
    assert frechet(statistics(x), statistics(y)) == pytest.approx(true, rel=1e-12)
    with pytest.raises(UserError, match="statistics of 60 and of 16 features, expected the same network's"):
        frechet(statistics(x), statistics(normal(9)))


def test_kid_is_its_definition():
    x, y = normal(7, 5, 0, 1).astype(np.float64), normal(9, 5, 0.5, 2).astype(np.float64)
    k = lambda a, b: (sum(p * q for p, q in zip(a, b)) / 5 + 1) ** 3
    within = [sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j)
              / (len(z) * (len(z) - 1)) for z in (x, y)]
    true = within[0] + within[1] - 2 * sum(k(a, b) for a in x for b in y) / 63
    assert kid(x, y) == (pytest.approx(true, rel=1e-12), None)


def test_kid_of_equal_distributions_is_about_zero_and_as_often_below_it():
    """Of 40 pairs each side has 20 or so: fewer than 8 has odds of 1 in 20,000."""
    found = np.array([kid(normal(60, 8, 0, 2 * n), normal(60, 8, 0, 2 * n + 1))[0] for n in range(40)])
    assert abs(found.mean()) < 4 * found.std() / np.sqrt(40) and 8 <= (found < 0).sum() <= 32
    assert kid(normal(60, 8, 0, 1), normal(60, 8, 1.0, 2))[0] > 10 * found.std()


def test_kid_of_subsets_is_near_that_of_all_and_the_same_again():
    x, y = normal(400, 8, 0, 1), normal(300, 8, 0.5, 2)
    exact, none = kid(x, y, size=400)
    mean, spread = kid(x, y, subsets=50, size=100)
    assert none is None and 0 < spread < exact and abs(mean - exact) < 4 * spread / np.sqrt(50)
    assert kid(x, y, subsets=50, size=100) == (mean, spread)
    assert kid(x, y, subsets=2, size=1000)[1] is None and kid(x, y, subsets=2, size=350)[1] > 0
    almost = kid(x[:301], y, subsets=3, size=300)[0]             # all but one, as nothing is drawn twice
    assert almost == pytest.approx(kid(x[:301], y)[0], rel=0.02)


def test_statistics_are_numpys_and_the_same_when_loaded(tmp_path):
    x = normal(30) * 3 + 5
    made = statistics(x)
    assert np.allclose(made.sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-12, atol=1e-14)
    assert made.mu.dtype == made.sigma.dtype == np.float64 and made.count == 30
    fid.save(tmp_path / "a.npz", made)
    fid.save(tmp_path / "b.npz", made, features=True)
    np.savez_compressed(tmp_path / "c.npz", mu=made.mu, sigma=made.sigma)          # as pytorch-fid writes it
    for name, count, kept in (("a", 30, None), ("b", 30, x), ("c", None, None)):
        found = fid.load(tmp_path / f"{name}.npz")
        assert np.array_equal(found.mu, made.mu) and np.array_equal(found.sigma, made.sigma)
        assert found.count == count and np.array_equal(found.features, kept)
        assert frechet(found, made) < 1e-10
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(UserError, match="d.pth: expected a name that ends in .npz"):
        fid.save(tmp_path / "d.pth", made)


@pytest.mark.parametrize("change, message", [
    (dict(mu=None), "not a whole .npz of statistics .*mu is not a file in the archive"),
    (dict(sigma=np.eye(15)), r"sigma is float64 \(15, 15\), expected finite numbers \(16, 16\)"),
    (dict(mu=np.zeros((4, 4))), r"mu is float64 \(4, 4\), expected finite numbers \(16,\)"),
    (dict(mu=np.array(["a"] * 16)), r"mu is <U1 \(16,\), expected finite numbers \(16,\)"),
    (dict(sigma=np.full((16, 16), np.nan)), "sigma is float64 .*, expected finite numbers"),
    (dict(features=normal(29)), r"features is float32 \(29, 16\), expected finite numbers \(30, 16\)"),
    (dict(mu=np.array([dict()] * 16)), "not a whole .npz of statistics .Object arrays cannot be loaded")])
def test_statistics_that_are_none_are_refused_in_a_line(change, message, tmp_path):
    held = dict(mu=np.zeros(16), sigma=np.eye(16), count=30) | change
    np.savez(tmp_path / "a.npz", **{name: value for name, value in held.items() if value is not None})
    with pytest.raises(UserError, match=message) as error:
        fid.load(tmp_path / "a.npz")
    assert str(error.value).startswith(f"{tmp_path / 'a.npz'}: ") and len(str(error.value).splitlines()) == 1


def test_a_damaged_npz_is_the_whole_one_or_refused_in_a_line(tmp_path):
    """Cut, or a bit flipped, anywhere: a zip has checksums, but not of every field of its headers."""
    chance, made, file = np.random.default_rng(0), statistics(normal(30)), tmp_path / "a.npz"
    fid.save(file, made)
    whole, counts = file.read_bytes(), dict(whole=0, refused=0)
    for n in range(60):
        at = int(chance.integers(len(whole)))
        file.write_bytes(whole[:at] if n % 2 else whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        try:
            found = fid.load(file)
            assert np.array_equal(found.sigma, made.sigma) and np.array_equal(found.mu, made.mu)
            counts["whole"] += 1
        except UserError as error:
            assert str(error).startswith(f"{file}: ") and len(str(error).splitlines()) == 1
            counts["refused"] += 1
    assert counts["refused"] > 45
    with pytest.raises(UserError, match="b.npz: not a whole .npz of statistics .*No such file"):
        fid.measure(str(tmp_path / "b.npz"), toy)


def test_a_folder_and_a_tar_of_the_same_pictures_have_equal_features(folder, tmp_path):
    names = ["a.png", "b/c.PNG", "b/d.webp", "e.jpg"]
    tar = write_tar(tmp_path / "set.tar", {name: (folder / name).read_bytes() for name in names})
    listings = [fid.pictures(source) for source in (folder, tar)]
    assert [[name.lower() for name, _ in listing] for listing in listings] == [
        [name.lower() for name in names]] * 2
    found = [fid.features(toy, listing, batch=3)[0] for listing in listings]
    assert found[0].shape == (4, 48) and found[0].dtype == np.float32 and np.array_equal(*found)
    assert len(set(map(bytes, found[0]))) == 4
    assert np.allclose(fid.features(toy, listings[0], batch=1)[0], found[0], atol=1e-6)
    part = fid.features(toy, fid.pictures(folder / "b"))[0]
    assert np.array_equal(found[0][1:3], part)
    assert frechet(fid.measure(str(folder), toy)[0], fid.measure(str(tar), toy)[0]) < 1e-10


def test_what_is_no_picture_is_named_and_the_rest_measured(folder, tmp_path):
    whole = fid.measure(str(folder), toy)[0]
    files = {f"{i}.png": path.read_bytes() for i, path in enumerate(sorted(folder.glob("**/[a-z].*[!t]")))}
    tar = write_tar(tmp_path / "a.tar", files | {"8.webp": b"RIFF", "9.txt": b"a caption"})
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:90])
    found, bad = fid.measure(str(folder), toy)
    assert found.count == 4 and np.allclose(found.features, whole.features, atol=1e-6)
    assert len(bad) == 1 and bad[0].startswith(f"{folder / 'broken.png'}: not a picture that can be read")
    found, bad = fid.measure(str(tar), toy)
    assert found.count == 4 and bad[0].startswith(f"{tar}: 8.webp: not a picture that can be read")
    assert bad[1:] == [f"{tar}: 9: no picture in this sample"]


@pytest.mark.parametrize("where, message", [
    ("set/b", r"set/b: 1 pictures that can be read, expected 2 or more; .*c.PNG: not a picture"),
    ("empty", r"empty: no pictures in it, expected .jpg, .jpeg, .png, .webp"),
    ("none", "none: expected a folder of pictures, or a tar or an .npz"),
    ("none.tar", "none.tar: no such tar file"),
    ("set/a.txt", "a.txt: expected a folder of pictures, or a tar or an .npz")])
def test_a_source_without_two_pictures_is_refused_in_a_line(where, message, folder, tmp_path):
    (folder / "b/c.PNG").write_bytes(b"cut")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        fid.measure(str(tmp_path / where), toy)


def test_features_that_are_not_finite_are_refused(folder):
    with pytest.raises(UserError, match="not finite; are these the network's weights"):
        fid.measure(str(folder), lambda x: toy(x) / 0)


def test_the_networks_tensors_are_the_published_ones(network):
    """The digest is of torchvision 0.28's inception_v3(aux_logits=False), without fc, for which pytorch-fid's
    file is made."""
    held = {name: tuple(x.shape) for name, x in network.state_dict().items()}
    assert sum(name.endswith("conv.weight") for name in held) == 94 and len(held) == 5 * 94
    assert sum(x.numel() for x in network.parameters()) + 1008 * 2049 == 23_850_960
    rows = "\n".join(sorted(f"{name} {shape}" for name, shape in held.items()))
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == "e22ffc91a09f7caa"


@pytest.mark.parametrize("name, corner, edge", [
    *[(name, 3.0, 3.5) for name in inception.BLOCKS if name not in inception.POOL_OF],
    ("Mixed_7c", 5.0, 6.0)])
def test_averages_leave_out_the_padding_and_the_last_block_takes_the_maximum(name, corner, edge, network):
    """Of 1 to 9 in rows: (1 + 2 + 4 + 5) / 4 in a corner, where padding would give 12 / 9.  The norm divides
    by sqrt(1 + 1e-3), of variance 1."""
    block = copy.deepcopy(getattr(network, name))
    for x in (m.conv.weight for m in block.modules() if isinstance(m, inception.Conv)):
        x.zero_()
    block.branch_pool.conv.weight[-1, 0] = 1
    x = torch.arange(1.0, 10).view(1, 1, 3, 3).expand(1, block.branch_pool.conv.in_channels, 3, 3)
    found = block(x)
    assert found[:, :-1].abs().max() == 0
    found = found[0, -1] * np.sqrt(1.001)
    assert [*found[0, :2].tolist(), found[1, 1].item()] == pytest.approx(
        [corner, edge, 9 if name == "Mixed_7c" else 5])


def test_a_halving_block_passes_the_maximum_on_behind_its_branches(network):
    for name, width in (("Mixed_6a", 288), ("Mixed_7a", 768)):
        x = torch.randn(1, width, 5, 5)
        found = getattr(network, name)(x)
        assert found.shape == (1, width + 480 if width == 288 else 1280, 2, 2)
        assert torch.equal(found[0, -width:, 0, 1], x[0, :, :3, 2:].amax((1, 2)))


def test_a_picture_is_resized_without_antialiasing_to_minus_one_to_one():
    """A pixel of 2 x 1 is at 1/4 and 3/4 of the width: from a quarter to three it rises in a line."""
    two = Image.fromarray(np.array([[[0, 51, 255], [255, 51, 0]]], np.uint8))
    found = inception.prepare(two)
    at = (np.arange(299) + 0.5) / 299
    true = np.clip((at - 0.25) * 2, 0, 1) * 2 - 1
    assert found.shape == (3, 299, 299) and np.allclose(found[0, 7], true, atol=1e-5)
    assert np.allclose(found[2, 200], -true, atol=1e-5) and torch.allclose(found[1], torch.tensor(-0.6))
    fine = np.zeros((1, 598 * 2, 3), np.uint8)
    fine[:, 1::4] = fine[:, 2::4] = 255                          # at 299 only the middle two of four are seen
    assert (inception.prepare(Image.fromarray(fine)) > 1 - 1e-5).all()


def test_the_network_tells_pictures_apart_and_batches_make_no_difference(network, folder, tmp_path):
    listing = fid.pictures(folder)[1:]
    one, all = (fid.features(network, listing, batch=batch)[0] for batch in (1, 3))
    assert one.shape == (3, 2048) and one.dtype == np.float32 and 0.01 < one.std() < 10
    away = np.linalg.norm(one[:, None] - one, axis=-1) + np.eye(3) * 1e9
    assert away.min() > 0.01 * np.linalg.norm(one) and np.abs(one - all).max() < 1e-4 * one.max()
    more = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008),
            "AuxLogits.fc.bias": torch.zeros(9), "Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0)}
    torch.save(network.state_dict() | more, tmp_path / "a.pth")
    read = inception.load(tmp_path / "a.pth")
    assert not read.training and not any(x.requires_grad for x in read.parameters())
    assert np.array_equal(fid.features(read, listing[:1])[0], one[:1])
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:10**6])
    with pytest.raises(UserError, match="a.pth: not a whole .pth, or one of more than tensors"):
        inception.load(tmp_path / "a.pth")


def test_what_is_wrong_with_the_weights_is_named_in_one_message(network, tmp_path):
    state = dict(network.state_dict())
    name, bad = "Mixed_6b.branch7x7_2", state["Conv2d_1a_3x3.bn.bias"].clone()
    bad[3] = float("inf")
    state |= {f"{name}.conv.weight": torch.zeros(2, 3), "fc.weight": torch.zeros(1000, 2048),
              "Conv2d_1a_3x3.bn.bias": bad}
    del state[f"{name}.bn.weight"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError) as error:
        inception.load(tmp_path / "a.pth")
    assert str(error.value) == (
        f"{tmp_path / 'a.pth'}: not the weights of FID's Inception, pt_inception-2015-12-05-6726825d.pth; "
        f"Conv2d_1a_3x3.bn.bias is not finite; {name}.conv.weight is [2, 3], expected [128, 128, 1, 7]; "
        f"{name}.bn.weight is missing, expected [128]; fc.weight is [1000, 2048], expected [1008, 2048]")


class Harmless:
    """Of a class that is not torch's, which is all that it takes to be refused."""


@pytest.mark.parametrize("content, message", [
    ({"Conv2d_1a_3x3.conv.weight": Harmless()}, "not a whole .pth, or one of more than tensors, which could"),
    ([torch.zeros(3)], "found list, expected tensors by name"),
    ({"a": torch.zeros(3)}, "Conv2d_1a_3x3.conv.weight is missing, expected .32, 3, 3, 3."),
    (None, "no such file; it is pt_inception-2015-12-05-6726825d.pth of github.com/mseitzer/pytorch-fid")])
def test_a_file_of_other_things_is_refused_in_a_line(content, message, tmp_path):
    if content is not None:
        torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message) as error:
        inception.load(tmp_path / "a.pth")
    assert str(error.value).startswith(f"{tmp_path / 'a.pth'}: ") and len(str(error.value).splitlines()) == 1
