"""Compare metrics/fid.py and inception.py with closed forms and definitions; one-line errors."""

import copy
import functools
import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.cli import UserError
from helpers import write_tar
from metrics import fid, inception
from metrics.fid import Statistics, frechet, kid, statistics

NAMES = ["a.png", "b/c.PNG", "b/d.webp", "e.jpg"]
LOOKS = ["red", "lime", "noise", "stripes"]


def toy(x):
    """Map (B, 3, 299, 299) to (B, 48), the means of a 4 x 4 grid, in place of a network."""
    return F.adaptive_avg_pool2d(x, 4).flatten(1)


def rotation(D, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((D, D)))[0]


def normal(n, D=16, shift=0.0, seed=0):
    return (np.random.default_rng(seed).standard_normal((n, D)) + shift).astype(np.float32)


def image_of(look):
    """Return an image of noise, of stripes or of one colour."""
    if look == "noise":
        return Image.fromarray(np.random.RandomState(0).randint(0, 256, (50, 70, 3), np.uint8))
    if look == "stripes":
        columns = np.arange(72, dtype=np.uint8) % 8 * 32
        return Image.fromarray(np.tile(columns[None, :, None], (50, 1, 3)))
    return Image.new("RGB", (70, 50), look)


def assert_one_line(error, path):
    """Check that an error is one line that begins with the file."""
    assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set/b").mkdir(parents=True)
    for name, look in zip(NAMES, LOOKS):
        image_of(look).save(tmp_path / "set" / name)
    (tmp_path / "set/.hidden.png").write_bytes(b"left out")
    (tmp_path / "set/a.txt").write_text("a caption")
    return tmp_path / "set"


@pytest.fixture(scope="module")
def network():
    return inception.untrained()


def test_frechet_is_the_closed_form_where_covariances_commute():
    """With equal eigenvectors FID is |mu_a - mu_b|^2 + sum (sqrt p - sqrt q)^2, at any rank."""
    draw = np.random.default_rng(1)
    basis = rotation(40)
    mu = draw.standard_normal((2, 40))
    for zeros in ((0, 0), (15, 0), (15, 15), (0, 40), (40, 40)):
        p, q = draw.uniform(0.1, 3, (2, 40)) * (np.arange(40) >= np.array(zeros)[:, None])
        a = Statistics(mu[0], basis * p @ basis.T)
        b = Statistics(mu[1], basis * q @ basis.T)
        true = ((mu[0] - mu[1]) ** 2).sum() + ((np.sqrt(p) - np.sqrt(q)) ** 2).sum()
        assert frechet(a, b) == pytest.approx(true, rel=1e-12)      # float64
        assert frechet(b, a) == pytest.approx(true, rel=1e-12)
        assert frechet(a, a) < 1e-12


def test_frechet_agrees_with_the_eigenvalues_of_the_product():
    x = normal(200, 12, 0, 1) @ rotation(12, 1).astype(np.float32) * 2
    y = normal(200, 12, 0.3, 2) @ rotation(12, 2).astype(np.float32) * 3
    a = statistics(x)
    b = statistics(y)
    product = np.linalg.eigvals(a.sigma @ b.sigma)
    assert abs(product.imag).max() < 1e-9                           # float64: they are real
    shared = np.sqrt(product.real).sum()
    true = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma) - 2 * shared
    assert frechet(a, b) == pytest.approx(true, rel=1e-10)          # eigvals without symmetry
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-12)


def test_frechet_of_fewer_images_than_features_needs_no_covariances():
    """Here tr (S_a S_b)^(1/2) is the nuclear norm of the product of the centred features."""
    x = normal(9, 60, 0, 1).astype(np.float64)
    y = normal(14, 60, 0.2, 2).astype(np.float64)
    x_centred = x - x.mean(0)
    y_centred = y - y.mean(0)
    shared = np.linalg.svd(x_centred @ y_centred.T, compute_uv=False).sum() / np.sqrt(8 * 13)
    spread = (x_centred ** 2).sum() / 8 + (y_centred ** 2).sum() / 13
    true = ((x.mean(0) - y.mean(0)) ** 2).sum() + spread - 2 * shared
    assert frechet(statistics(x), statistics(y)) == pytest.approx(true, rel=1e-12)    # float64


def test_frechet_refuses_features_of_two_networks():
    with pytest.raises(UserError, match="60 .*16"):
        frechet(statistics(normal(9, 60)), statistics(normal(9, 16)))


def test_kid_equals_its_definition():
    x = normal(7, 5, 0, 1).astype(np.float64)
    y = normal(9, 5, 0.5, 2).astype(np.float64)

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b)) / 5 + 1) ** 3

    def mean_of_pairs(z):
        return np.mean([kernel(a, b) for a, b in itertools.permutations(z, 2)])
    between = np.mean([kernel(a, b) for a, b in itertools.product(x, y)])
    true = mean_of_pairs(x) + mean_of_pairs(y) - 2 * between
    assert kid(x, y) == (pytest.approx(true, rel=1e-12), None)      # float64


def test_kid_of_equal_distributions_scatters_around_zero():
    pairs = [(normal(60, 8, 0, 2 * n), normal(60, 8, 0, 2 * n + 1)) for n in range(40)]
    estimates = np.array([kid(x, y)[0] for x, y in pairs])
    assert abs(estimates.mean()) < 4 * estimates.std() / np.sqrt(40)    # 4 standard errors
    # about 20 of 40 are negative; fewer than 8 or more than 32 has a probability of 1 in 20,000
    assert 8 <= (estimates < 0).sum() <= 32
    assert kid(normal(60, 8, 0, 1), normal(60, 8, 1.0, 2))[0] > 10 * estimates.std()


def test_kid_of_subsets_is_near_kid_of_all_and_repeats():
    x = normal(400, 8, 0, 1)
    y = normal(300, 8, 0.5, 2)
    exact, no_spread = kid(x, y, size=400)
    mean, spread = kid(x, y, subsets=50, size=100)
    assert no_spread is None and 0 < spread < exact
    assert abs(mean - exact) < 4 * spread / np.sqrt(50)         # 4 standard errors of 50 subsets
    assert kid(x, y, subsets=50, size=100) == (mean, spread)


def test_kid_draws_subsets_only_of_sets_above_the_size():
    x = normal(400, 8, 0, 1)
    y = normal(300, 8, 0.5, 2)
    assert kid(x, y, subsets=2, size=1000)[1] is None
    assert kid(x, y, subsets=2, size=350)[1] > 0
    # 300 of 301 images without replacement: each estimate leaves out one image
    almost_all = kid(x[:301], y, subsets=3, size=300)[0]
    assert almost_all == pytest.approx(kid(x[:301], y)[0], rel=0.02)


def test_statistics_are_numpys_mean_and_covariance():
    x = normal(30) * 3 + 5
    result = statistics(x)
    doubles = x.astype(np.float64)
    assert np.allclose(result.mu, doubles.mean(0), rtol=1e-12)      # float64
    assert np.allclose(result.sigma, np.cov(doubles, rowvar=False), rtol=1e-12, atol=1e-14)
    assert result.mu.dtype == result.sigma.dtype == np.float64 and result.count == 30


def test_statistics_survive_a_round_trip(tmp_path):
    x = normal(30) * 3 + 5
    saved = statistics(x)
    fid.save(tmp_path / "a.npz", saved)
    fid.save(tmp_path / "b.npz", saved, features=True)
    np.savez_compressed(tmp_path / "c.npz", mu=saved.mu, sigma=saved.sigma)    # pytorch-fid's form
    for name, count, kept in (("a", 30, None), ("b", 30, x), ("c", None, None)):
        loaded = fid.load(tmp_path / f"{name}.npz")
        assert np.array_equal(loaded.mu, saved.mu) and np.array_equal(loaded.sigma, saved.sigma)
        assert loaded.count == count and np.array_equal(loaded.features, kept)
    assert len(list(tmp_path.iterdir())) == 3                       # no temporary file is left


@pytest.mark.parametrize("change, message", [
    (dict(mu=None), "mu is not a file"),
    (dict(sigma=np.eye(15)), r"sigma .*\(15, 15\).*\(16, 16\)"),
    (dict(mu=np.zeros((4, 4))), r"mu .*\(4, 4\).*\(16,\)"),
    (dict(mu=np.array(["a"] * 16)), r"mu is <U1 \(16,\)"),
    (dict(sigma=np.full((16, 16), np.nan)), "sigma .*finite"),
    (dict(features=normal(29)), r"features .*\(29, 16\).*\(30, 16\)"),
    (dict(mu=np.array([dict()] * 16)), "Object arrays cannot be loaded")])
def test_malformed_statistics_are_refused_in_one_line(change, message, tmp_path):
    arrays = dict(mu=np.zeros(16), sigma=np.eye(16), count=30) | change
    arrays = {name: value for name, value in arrays.items() if value is not None}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message) as error:
        fid.load(tmp_path / "a.npz")
    assert_one_line(error.value, tmp_path / "a.npz")


def test_a_damaged_npz_loads_whole_or_is_refused_in_one_line(tmp_path):
    """Cut a file or flip a bit, anywhere.  A zip's checksums don't cover all of its headers."""
    draw = np.random.default_rng(0)
    saved = statistics(normal(30))
    file = tmp_path / "a.npz"
    fid.save(file, saved)
    content = file.read_bytes()
    refused = 0
    for n in range(60):
        at = int(draw.integers(len(content)))
        if n % 2:
            file.write_bytes(content[:at])
        else:
            file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1:])
        try:
            loaded = fid.load(file)
            assert np.array_equal(loaded.sigma, saved.sigma) and np.array_equal(loaded.mu, saved.mu)
        except UserError as error:
            assert_one_line(error, file)
            refused += 1
    assert refused > 45


def test_a_folder_and_a_tar_of_the_same_images_have_equal_features(folder, tmp_path):
    tar = Path(write_tar(tmp_path / "set.tar", [(n, (folder / n).read_bytes()) for n in NAMES]))
    features = []
    for source in (folder, tar):
        features.append(fid.features(toy, fid.file_images(source), batch=3)[0])
    assert features[0].shape == (4, 48) and features[0].dtype == np.float32
    assert np.array_equal(*features)
    assert len(set(map(bytes, features[0]))) == 4
    measured = [fid.measure(str(source), toy)[0] for source in (folder, tar)]
    assert frechet(*measured) < 1e-10                               # float64


def test_statistics_of_another_network_are_refused(folder, tmp_path):
    measured, _ = fid.measure(str(folder), toy, digest="one network")
    file = tmp_path / "a.npz"
    fid.save(file, measured)
    assert fid.measure(str(file), toy, digest="one network")[0].network == "one network"
    with pytest.raises(UserError, match="a.npz: .*one network.*another"):
        fid.measure(str(file), toy, digest="another")


def test_features_depend_on_neither_batch_nor_company(folder):
    features = fid.features(toy, fid.file_images(folder), batch=3)[0]
    singly = fid.features(toy, fid.file_images(folder), batch=1)[0]
    assert np.allclose(singly, features, atol=1e-6)                 # float32 sums in another order
    assert np.array_equal(features[1:3], fid.features(toy, fid.file_images(folder / "b"))[0])


def test_unreadable_images_of_a_folder_are_named_and_left_out(folder):
    expected = fid.measure(str(folder), toy)[0]
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:90])
    measured, bad = fid.measure(str(folder), toy)
    assert measured.count == 4
    assert np.allclose(measured.features, expected.features, atol=1e-6)    # float32, other batches
    assert len(bad) == 1 and bad[0].startswith(f"{folder / 'broken.png'}: ")


def test_unreadable_samples_of_a_tar_are_named_and_left_out(folder, tmp_path):
    files = [(f"{i}.png", (folder / name).read_bytes()) for i, name in enumerate(NAMES)]
    tar = write_tar(tmp_path / "a.tar", [*files, ("8.webp", b"RIFF"), ("9.txt", b"a caption")])
    measured, bad = fid.measure(tar, toy)
    assert measured.count == 4 and len(bad) == 2
    assert bad[0].startswith(f"{tar}: 8.webp: ") and bad[1].startswith(f"{tar}: 9: ")


@pytest.mark.parametrize("where, message", [
    ("set/b", "set/b: 1 .*2 or more.*c.PNG"), ("empty", "empty: .*.jpg, .jpeg, .png, .webp"),
    ("none", "none: .*npz"), ("none.tar", "none.tar: .*tar file"), ("set/a.txt", "a.txt: .*npz"),
    ("none.npz", "none.npz: .*No such file")])
def test_a_source_without_two_images_is_refused_by_name(where, message, folder, tmp_path):
    (folder / "b/c.PNG").write_bytes(b"cut")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        fid.measure(str(tmp_path / where), toy)


def test_features_that_are_not_finite_are_refused(folder):
    with pytest.raises(UserError, match="finite"):
        fid.measure(str(folder), lambda x: toy(x) / 0)


def test_the_networks_tensors_have_the_published_names_and_shapes(network):
    """The digest is that of torchvision 0.28's inception_v3(aux_logits=False) without fc."""
    shapes = {name: tuple(x.shape) for name, x in network.state_dict().items() if x.dim()}
    assert sum(name.endswith("conv.weight") for name in shapes) == 94 and len(shapes) == 5 * 94
    assert sum(x.numel() for x in network.parameters()) + 1008 * 2049 == 23_850_960
    rows = "\n".join(sorted(f"{name} {shape}" for name, shape in shapes.items()))
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == "e22ffc91a09f7caa"


@pytest.mark.parametrize("name, corner, edge, middle", [
    *[(name, 3.0, 3.5, 5.0) for name in inception.BLOCKS if name not in inception.POOL_OF],
    ("Mixed_7c", 5.0, 6.0, 9.0)])
def test_pools_average_without_padding_and_the_last_block_takes_the_maximum(
        name, corner, edge, middle, network):
    """Pool 1 to 9: a corner gives (1 + 2 + 4 + 5) / 4; with padding it would be 12 / 9."""
    block = copy.deepcopy(getattr(network, name))
    for module in block.modules():
        if isinstance(module, inception.Conv):
            module.conv.weight.zero_()
    block.branch_pool.conv.weight[-1, 0] = 1
    width = block.branch_pool.conv.in_channels
    output = block(torch.arange(1.0, 10).view(1, 1, 3, 3).expand(1, width, 3, 3))
    assert output[:, :-1].abs().max() == 0
    pooled = output[0, -1] * np.sqrt(1.001)           # the norm divides by sqrt(variance 1 + 1e-3)
    # approx: float32
    assert [*pooled[0, :2].tolist(), pooled[1, 1].item()] == pytest.approx([corner, edge, middle])


@pytest.mark.parametrize("name, width, out", [("Mixed_6a", 288, 768), ("Mixed_7a", 768, 1280)])
def test_a_halving_block_appends_the_maximum_to_its_branches(name, width, out, network):
    x = torch.randn(1, width, 5, 5)
    output = getattr(network, name)(x)
    assert output.shape == (1, out, 2, 2)
    assert torch.equal(output[0, -width:, 0, 1], x[0, :, :3, 2:].amax((1, 2)))


def test_prepare_interpolates_linearly_to_minus_one_to_one():
    """The two pixels' centres are at 1/4 and 3/4 of the width; values between them are linear."""
    two = Image.fromarray(np.array([[[0, 51, 255], [255, 51, 0]]], np.uint8))
    x = inception.prepare(two)
    at = (np.arange(299) + 0.5) / 299
    true = np.clip((at - 0.25) * 2, 0, 1) * 2 - 1
    assert x.shape == (3, 299, 299)
    assert np.allclose(x[0, 7], true, atol=1e-5)                    # float32
    assert np.allclose(x[2, 200], -true, atol=1e-5)
    assert torch.allclose(x[1], torch.tensor(-0.6))


def test_prepare_does_not_antialias():
    fine = np.zeros((1, 299 * 4, 3), np.uint8)
    fine[:, 1::4] = 255                                # at 299 only the middle two of four count
    fine[:, 2::4] = 255
    assert (inception.prepare(Image.fromarray(fine)) > 1 - 1e-5).all()    # float32


@pytest.fixture(scope="module")
def listing():
    """Return functions that read two images."""
    return [functools.partial(image_of, look) for look in ("noise", "stripes")]


@pytest.fixture(scope="module")
def features_singly(network, listing):
    return fid.features(network, listing, batch=1)[0]


def test_the_network_tells_images_apart(features_singly):
    assert features_singly.shape == (2, 2048) and features_singly.dtype == np.float32
    assert 0.01 < features_singly.std() < 10
    difference = np.linalg.norm(features_singly[0] - features_singly[1])
    assert difference > 0.01 * np.linalg.norm(features_singly)


def test_the_networks_features_do_not_depend_on_the_batch(network, listing, features_singly):
    together = fid.features(network, listing, batch=2)[0]
    # float32 sums in another order, in 94 layers
    assert np.abs(together - features_singly).max() < 1e-4 * features_singly.max()


def test_published_weights_load_without_their_classifier(network, listing, features_singly,
                                                         tmp_path):
    more = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008),
            "AuxLogits.fc.bias": torch.zeros(9),
            "Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0)}
    torch.save(network.state_dict() | more, tmp_path / "a.pth")
    loaded = inception.load(tmp_path / "a.pth")
    assert not loaded.training and not any(x.requires_grad for x in loaded.parameters())
    assert np.array_equal(fid.features(loaded, listing[:1])[0], features_singly[:1])
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:10**6])
    with pytest.raises(UserError, match="a.pth: not a whole"):
        inception.load(tmp_path / "a.pth")


def test_wrong_weights_are_named_in_one_message(network, tmp_path):
    state = dict(network.state_dict())
    name = "Mixed_6b.branch7x7_2"
    bias = state["Conv2d_1a_3x3.bn.bias"].clone()
    bias[3] = float("inf")
    state |= {f"{name}.conv.weight": torch.zeros(2, 3), "fc.weight": torch.zeros(1000, 2048),
              "Conv2d_1a_3x3.bn.bias": bias}
    del state[f"{name}.bn.weight"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError) as error:
        inception.load(tmp_path / "a.pth")
    assert_one_line(error.value, tmp_path / "a.pth")
    for part in ("Conv2d_1a_3x3.bn.bias is not finite",
                 f"{name}.conv.weight is [2, 3], expected [128, 128, 1, 7]",
                 f"{name}.bn.weight is missing",
                 "fc.weight is [1000, 2048], expected [1008, 2048]"):
        assert part in str(error.value)
    message = str(error.value)
    assert message.count(".weight") + message.count(".bias") == 4   # nothing else is wrong


class Harmless:
    """An object that is not a tensor, so that torch refuses to unpickle it."""


@pytest.mark.parametrize("content, message", [
    ({"Conv2d_1a_3x3.conv.weight": Harmless()}, "code"),
    ([torch.zeros(3)], "list"),
    ({"a": torch.zeros(3)}, "Conv2d_1a_3x3.conv.weight is missing, expected .32, 3, 3, 3."),
    (None, "pt_inception-2015-12-05-6726825d.pth.*No such file")])
def test_a_file_that_holds_no_weights_is_refused_in_one_line(content, message, tmp_path):
    if content is not None:
        torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message) as error:
        inception.load(tmp_path / "a.pth")
    assert_one_line(error.value, tmp_path / "a.pth")
