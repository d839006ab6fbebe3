r"""Fréchet distance between two sets of images, as a function of their features.

Each set is summarized by the mean and the covariance of its features, that is by a Gaussian, and
the distance is the squared 2-Wasserstein distance between the two Gaussians,

.. math:: d^2 = \lVert \mu_1 - \mu_2 \rVert^2
    + \operatorname{Tr}\left( C_1 + C_2 - 2 (C_1 C_2)^{1/2} \right)

With the pool3 features of Inception-v3 it is called the Fréchet inception distance (FID). The
estimate is biased upwards by an amount that depends on the numbers of images, so two distances
are comparable only if these numbers are the same: :class:`FeatureStatistics` carries its own.

References:
    | GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium
      (Heusel et al., 2017)
    | https://arxiv.org/abs/1706.08500

    | The Fréchet distance between multivariate normal distributions (Dowson and Landau, 1982)
    | https://doi.org/10.1016/0047-259X(82)90077-X

    | Effectively Unbiased FID and Inception Score and where to find them
      (Chong and Forsyth, 2020)
    | https://arxiv.org/abs/1911.07023
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import write_atomically

__all__ = ["FeatureStatistics", "frechet_distance"]

# What numpy raises on a file which is truncated, or is not the archive it should be.
_UNREADABLE = (
    EOFError,
    IndexError,
    KeyError,
    OSError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
)


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    r"""Number, mean and scatter of a set of feature vectors, in float64 on the CPU.

    Statistics add up: ``a + b`` are the statistics of the union of the two sets, exactly. A large
    set is therefore read in batches, or by several processes whose results are summed.

    .. math:: S = \sum_{i=1}^N (f_i - \mu)(f_i - \mu)^\top

    Arguments:
        count: The number :math:`N` of images.
        mean: The mean :math:`\mu` of the features, with shape :math:`(D)`.
        scatter: The scatter matrix :math:`S`, with shape :math:`(D, D)`.

    References:
        | Updating Formulae and a Pairwise Algorithm for Computing Sample Variances
          (Chan, Golub and LeVeque, 1979)
        | http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf

    Example:
        >>> features = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> batches = [FeatureStatistics.from_features(f) for f in features.split(30)]
        >>> statistics = sum(batches[1:], start=batches[0])
        >>> statistics.count
        100
        >>> torch.allclose(statistics.cov, features.double().T.cov())
        True
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def from_features(cls, features: Tensor) -> FeatureStatistics:
        r"""Returns the statistics of one batch of features.

        Arguments:
            features: The features of the images, with shape :math:`(N, D)`.

        Raises:
            ValueError: If ``features`` is not a non-empty matrix, or is not finite.
        """
        if features.ndim != 2 or features.numel() == 0:
            raise ValueError(
                f"features must have shape (N, D) with N, D > 0, got {tuple(features.shape)}"
            )
        features = features.detach().to("cpu", torch.float64)
        if not features.isfinite().all():
            raise ValueError("features must be finite, got NaN or infinity: check the images")
        mean = features.mean(dim=0)
        centered = features - mean
        return cls(len(features), mean, centered.T @ centered)

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                "statistics of different features cannot be added: their dimensions are "
                f"{len(self.mean)} and {len(other.mean)}"
            )
        # Sums of squares would lose digits wherever the mean is large against the spread. This
        # form only ever adds positive semi-definite matrices.
        count = self.count + other.count
        delta = other.mean - self.mean
        between = (self.count * other.count / count) * torch.outer(delta, delta)
        return FeatureStatistics(
            count,
            self.mean + (other.count / count) * delta,
            self.scatter + other.scatter + between,
        )

    @property
    def cov(self) -> Tensor:
        r"""The unbiased covariance :math:`S / (N - 1)`, with shape :math:`(D, D)`."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)

    def distance(self, other: FeatureStatistics) -> float:
        r"""Returns the Fréchet distance to another set, see :func:`frechet_distance`."""
        return frechet_distance(self.mean, self.cov, other.mean, other.cov)

    def save(self, path: str | Path) -> None:
        r"""Writes the statistics atomically to a ``.npz`` file that pytorch-fid reads as well.

        Arguments:
            path: The file to write.
        """
        mean, cov = self.mean.numpy(), self.cov.numpy()
        write_atomically(path, lambda file: np.savez(file, mu=mean, sigma=cov, count=self.count))

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        r"""Reads the statistics that :meth:`save` has written.

        Arguments:
            path: The file to read.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is truncated, or is not one of ours.
        """
        try:
            with open(path, "rb") as file:
                archive = np.load(file, allow_pickle=False)
                count = int(archive["count"])
                mean = torch.from_numpy(archive["mu"].astype(np.float64))
                cov = torch.from_numpy(archive["sigma"].astype(np.float64))
            _check_moments(mean, cov)
            if count < 2:
                raise ValueError(f"a covariance needs at least 2 images, got {count}")
        except FileNotFoundError:
            raise
        except _UNREADABLE as error:
            raise ValueError(f"{path} does not hold feature statistics: {error}") from error
        return cls(count, mean, cov * (count - 1))


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    r"""Returns the Fréchet distance between two Gaussians.

    .. math:: d^2 = \lVert \mu_1 - \mu_2 \rVert^2
        + \operatorname{Tr}\left( C_1 + C_2 - 2 (C_1 C_2)^{1/2} \right)

    Arguments:
        mean1: The first mean :math:`\mu_1`, with shape :math:`(D)`.
        cov1: The first covariance :math:`C_1`, with shape :math:`(D, D)`. It may be singular.
        mean2: The second mean :math:`\mu_2`, with shape :math:`(D)`.
        cov2: The second covariance :math:`C_2`, with shape :math:`(D, D)`. It may be singular.

    Returns:
        The distance :math:`d^2`, in squared units of the features. By convention it is not
        square-rooted.

    Raises:
        ValueError: If the shapes do not match, or if anything is not finite.

    Example:
        >>> frechet_distance(torch.zeros(2), torch.eye(2), 3 * torch.ones(2), 4 * torch.eye(2))
        20.0
    """
    mean1, cov1, mean2, cov2 = (
        torch.as_tensor(moment).detach().to("cpu", torch.float64)
        for moment in (mean1, cov1, mean2, cov2)
    )
    _check_moments(mean1, cov1)
    _check_moments(mean2, cov2)
    if mean1.shape != mean2.shape:
        raise ValueError(f"features differ in dimension: {len(mean1)} against {len(mean2)}")
    # With C = F Fᵀ, the eigenvalues of C₁ C₂ are the squared singular values of F₁ᵀ F₂. Compared
    # with the square root of the product, which need not be symmetric, this cannot turn complex
    # when a covariance is singular, and it is exact when the two are the same.
    trace_sqrt = torch.linalg.svdvals(_factor(cov1).T @ _factor(cov2)).sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_sqrt
    # Below zero there is only rounding.
    return distance.clamp(min=0).item()


def _factor(cov: Tensor) -> Tensor:
    eigenvalues, eigenvectors = torch.linalg.eigh(cov)
    return eigenvectors * eigenvalues.clamp(min=0).sqrt()


def _check_moments(mean: Tensor, cov: Tensor) -> None:
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise ValueError(
            "a mean and its covariance must have shapes (D) and (D, D), "
            f"got {tuple(mean.shape)} and {tuple(cov.shape)}"
        )
    if not (mean.isfinite().all() and cov.isfinite().all()):
        raise ValueError("the mean and the covariance must be finite, got NaN or infinity")
