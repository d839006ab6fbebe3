r"""Tests of the Fréchet distance, against closed forms, scipy and pytorch-fid."""

import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

from pyro_vaediff.evaluate import FeatureStatistics, frechet_distance


def random_covariance(dim: int, rank: int | None = None) -> torch.Tensor:
    factor = torch.randn(dim, rank or 2 * dim, dtype=torch.float64)
    return factor @ factor.T / factor.shape[1]


def random_rotation(dim: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q


def test_commuting_covariances(device):
    # Covariances with the same eigenvectors: Σ (√a - √b)² over the eigenvalues.
    torch.manual_seed(0)
    rotation = random_rotation(6)
    a, b = torch.rand(2, 6, dtype=torch.float64) * 10
    mean1, mean2 = torch.randn(2, 6, dtype=torch.float64)
    cov1, cov2 = rotation * a @ rotation.T, rotation * b @ rotation.T
    exact = (mean1 - mean2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    moments = (moment.to(device) for moment in (mean1, cov1, mean2, cov2))
    assert frechet_distance(*moments) == pytest.approx(exact.item(), abs=1e-10)


def test_two_dimensions():
    # In two dimensions, Tr √M = √(Tr M + 2 √det M), whether or not the covariances commute.
    torch.manual_seed(0)
    cov1, cov2 = random_covariance(2), random_covariance(2)
    product = cov1 @ cov2
    trace_sqrt = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    exact = (cov1.trace() + cov2.trace()).item() - 2 * trace_sqrt
    assert exact > 0.1  # else the test would say little
    assert not torch.allclose(product, product.T)
    assert frechet_distance(torch.zeros(2), cov1, torch.zeros(2), cov2) == pytest.approx(
        exact, abs=1e-10
    )


@pytest.mark.parametrize("rank", [None, 5])
def test_same_covariance_leaves_the_shift(rank):
    torch.manual_seed(1)
    mean, shift = torch.randn(2, 64, dtype=torch.float64)
    cov = random_covariance(64, rank)
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(mean, cov, mean + shift, cov) == pytest.approx(
        shift.square().sum().item(), abs=1e-10
    )


def test_agrees_with_scipy_and_pytorch_fid():
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    torch.manual_seed(2)
    mean1, mean2 = torch.randn(2, 40, dtype=torch.float64)
    cov1, cov2 = random_covariance(40), random_covariance(40)
    ours = frechet_distance(mean1, cov1, mean2, cov2)
    sqrt = scipy.linalg.sqrtm((cov1 @ cov2).numpy())
    scipys = (mean1 - mean2).square().sum() + (cov1 + cov2).trace() - 2 * np.trace(sqrt).real
    assert ours == pytest.approx(scipys.item(), abs=1e-10)
    # pytorch-fid calls scipy in a way that is deprecated, and that scipy 1.18 refuses.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            theirs = fid_score.calculate_frechet_distance(
                mean1.numpy(), cov1.numpy(), mean2.numpy(), cov2.numpy()
            )
        except (TypeError, ValueError) as error:
            pytest.skip(f"pytorch-fid does not work with scipy {scipy.__version__}: {error}")
    assert ours == pytest.approx(theirs, abs=1e-10)


def test_fewer_images_than_dimensions():
    # The features of the two sets span orthogonal subspaces, so that C₁ C₂ = 0.
    torch.manual_seed(3)
    rotation = random_rotation(50)
    features1 = torch.randn(4, 10, dtype=torch.float64) @ rotation[:10]
    features2 = torch.randn(5, 10, dtype=torch.float64) @ rotation[10:20]
    a, b = map(FeatureStatistics.from_features, (features1, features2))
    exact = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()
    # The square root of an eigenvalue that should be zero is off by about 1e-8.
    assert torch.linalg.matrix_rank(a.cov) == 3
    assert a.distance(b) == pytest.approx(exact.item(), abs=1e-6)


def test_statistics_are_those_of_numpy(device):
    torch.manual_seed(5)
    features = torch.randn(30, 7, device=device) * 3 + 100
    statistics = FeatureStatistics.from_features(features)
    mean, cov = statistics.mean, statistics.cov
    array = features.cpu().double().numpy()
    assert mean.dtype == cov.dtype == torch.float64
    np.testing.assert_allclose(mean, array.mean(axis=0), rtol=0, atol=1e-10)
    np.testing.assert_allclose(cov, np.cov(array, rowvar=False), rtol=0, atol=1e-10)


def test_sums_are_the_statistics_of_the_union():
    torch.manual_seed(6)
    features = torch.randn(57, 9, dtype=torch.float64) + 1e4 * torch.rand(9, dtype=torch.float64)
    joint = FeatureStatistics.from_features(features)
    # Batches of several sizes, among them a single image.
    first, *rest = map(FeatureStatistics.from_features, features.split([20, 1, 16, 20]))
    streamed = sum(rest, start=first)
    merged = (first + rest[0]) + (rest[1] + rest[2])
    for statistics in (streamed, merged):
        assert statistics.count == joint.count == 57
        torch.testing.assert_close(statistics.mean, joint.mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(statistics.cov, joint.cov, rtol=0, atol=1e-10)


def test_large_mean_does_not_swamp_the_spread():
    # In float64, E[f²] - E[f]² would keep no digit of a variance of 1 at a mean of 1e9.
    torch.manual_seed(7)
    features = torch.randn(1000, 1, dtype=torch.float64)
    batches = map(FeatureStatistics.from_features, (features + 1e9).split(100))
    statistics = sum(batches, start=next(batches))
    assert statistics.cov.item() == pytest.approx(features.var().item(), rel=1e-6)


def test_saved_statistics_come_back(tmp_path):
    torch.manual_seed(8)
    statistics = FeatureStatistics.from_features(torch.randn(10, 4))
    statistics.save(tmp_path / "statistics.npz")
    loaded = FeatureStatistics.load(tmp_path / "statistics.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.npz"]
    assert loaded.count == 10
    torch.testing.assert_close(loaded.mean, statistics.mean, rtol=0, atol=0)
    torch.testing.assert_close(loaded.scatter, statistics.scatter, rtol=0, atol=1e-14)


def test_pytorch_fid_reads_saved_statistics(tmp_path):
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    statistics = FeatureStatistics.from_features(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
    statistics.save(tmp_path / "statistics.npz")
    mean, cov = fid_score.compute_statistics_of_path(
        str(tmp_path / "statistics.npz"), model=None, batch_size=1, dims=2, device="cpu"
    )
    np.testing.assert_array_equal(mean, [1, 3])
    np.testing.assert_array_equal(cov, [[2, 4], [4, 8]])


def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "statistics.npz"
    FeatureStatistics.from_features(torch.ones(3, 2)).save(path)
    before = path.read_bytes()

    def interrupted(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        FeatureStatistics.from_features(torch.zeros(5, 2)).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def write_truncated(path):
    FeatureStatistics.from_features(torch.rand(3, 2)).save(path)
    path.write_bytes(path.read_bytes()[:-100])


def write_damaged(path):
    FeatureStatistics.from_features(torch.rand(9, 9)).save(path)
    data = bytearray(path.read_bytes())
    data[200:210] = b"\xff" * 10
    path.write_bytes(data)


def write_array(path):
    with open(path, "wb") as file:
        np.save(file, np.eye(2))


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not an archive"),
    "truncated": write_truncated,
    "damaged": write_damaged,
    "pickled": lambda path: np.savez(path, mu=np.array([None]), sigma=np.eye(1), count=3),
    "without count": lambda path: np.savez(path, mu=np.zeros(2), sigma=np.eye(2)),
    "wrong shapes": lambda path: np.savez(path, mu=np.zeros(3), sigma=np.eye(2), count=3),
    "not finite": lambda path: np.savez(path, mu=np.full(2, np.nan), sigma=np.eye(2), count=3),
    "too few": lambda path: np.savez(path, mu=np.zeros(2), sigma=np.eye(2), count=1),
    "an array": write_array,
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_files_are_refused(tmp_path, broken):
    BROKEN[broken](tmp_path / "statistics.npz")
    with pytest.raises(ValueError, match=r"statistics\.npz does not hold feature statistics"):
        FeatureStatistics.load(tmp_path / "statistics.npz")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        FeatureStatistics.load(tmp_path / "missing.npz")


def test_errors():
    eye = torch.eye(2)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        FeatureStatistics.from_features(torch.zeros(1, 3)).cov  # noqa: B018
    with pytest.raises(ValueError, match="features must have shape"):
        FeatureStatistics.from_features(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="features must have shape"):
        FeatureStatistics.from_features(torch.zeros(2, 3, 1, 1))
    with pytest.raises(ValueError, match="features must be finite"):
        FeatureStatistics.from_features(torch.tensor([[0.0], [math.inf]]))
    with pytest.raises(ValueError, match="dimensions are 2 and 3"):
        FeatureStatistics.from_features(torch.zeros(4, 2)) + FeatureStatistics.from_features(
            torch.zeros(4, 3)
        )
    with pytest.raises(ValueError, match="differ in dimension: 2 against 3"):
        frechet_distance(torch.zeros(2), eye, torch.zeros(3), torch.eye(3))
    with pytest.raises(ValueError, match="shapes"):
        frechet_distance(torch.zeros(2), torch.ones(2), torch.zeros(2), eye)
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(torch.zeros(2), eye, torch.zeros(2), eye * math.nan)
