r"""Gaussian variables as affine functions of noise, and expectations of their squares.

Everything that the oracle knows follows from two rules: :math:`E \| \mu + C \xi \|^2 = \| \mu
\|^2 + \| C \|^2` for standard normal noise :math:`\xi`, and the conditioning of a Gaussian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Affine",
    "condition",
    "covariance",
    "cross_entropy",
    "entropy",
    "expected_kl",
    "stack",
    "white_noise",
]


@dataclass
class Affine:
    r"""A random vector :math:`\mu + C \xi` with :math:`\xi \sim \mathcal{N}(0, I)`, per datum.

    Vectors of the same noise can be added and subtracted; ``y * number`` scales, ``y + tensor``
    shifts, and ``matrix @ y`` multiplies from the left.

    Arguments:
        mean: The means :math:`\mu`, with shape :math:`(B, D)`.
        coef: The coefficients :math:`C`, with shape :math:`(D, N)` for :math:`N` noises. All data
            share them.

    Example:
        >>> z_0, noise = white_noise([1, 1], like=torch.zeros(1, 1))
        >>> z_1 = z_0 * 0.8 + noise * 0.6
        >>> z_1.mean_square
        tensor([[1.]])
    """

    mean: Tensor
    coef: Tensor

    def __add__(self, other: Affine | Tensor) -> Affine:
        if isinstance(other, Tensor):
            return Affine(self.mean + other, self.coef)
        return Affine(self.mean + other.mean, self.coef + other.coef)

    def __mul__(self, number: Tensor | float) -> Affine:
        return Affine(self.mean * number, self.coef * number)

    def __sub__(self, other: Affine) -> Affine:
        return self + other * -1.0

    def __rmatmul__(self, matrix: Tensor) -> Affine:
        return Affine(self.mean @ matrix.mT, matrix @ self.coef)

    @property
    def mean_square(self) -> Tensor:
        r"""The expectation of the squares, with shape :math:`(B, D)`."""
        return self.mean.square() + self.coef.square().sum(-1)


def white_noise(sizes: list[int], like: Tensor) -> list[Affine]:
    r"""Returns independent standard normal vectors, whose noise is all there is.

    Arguments:
        sizes: The numbers of dimensions of the vectors.
        like: A tensor with one row per datum, and with the dtype and the device of the vectors.

    Returns:
        The vectors, with :math:`N` noises in all, the sum of the sizes.
    """
    identity = torch.eye(sum(sizes), dtype=like.dtype, device=like.device)
    return [Affine(like.new_zeros(len(like), len(C)), C) for C in identity.split(sizes)]


def covariance(a: Affine, b: Affine) -> Tensor:
    r"""Returns the covariance of two vectors, :math:`C_a C_b^\top`.

    Arguments:
        a: A vector with :math:`D_a` dimensions.
        b: A vector with :math:`D_b` dimensions, of the same noise.

    Returns:
        The covariance of every datum, with shape :math:`(D_a, D_b)`.
    """
    return a.coef @ b.coef.mT


def stack(variables: list[Affine]) -> Affine:
    r"""Returns one vector with the dimensions of all vectors, in that order.

    Arguments:
        variables: The vectors, one or more, of the same noise.
    """
    return Affine(
        torch.cat([v.mean for v in variables], -1), torch.cat([v.coef for v in variables])
    )


def condition(y: Affine, given: list[Affine]) -> tuple[Affine, Tensor]:
    r"""Returns the mean of :math:`y` given other variables, affine in these, and its covariance.

    .. math::
        E[y | g] & = \mu_y + S_{yg} S_{gg}^{-1} (g - \mu_g) \\
        \mathrm{Cov}[y | g] & = S_{yy} - S_{yg} S_{gg}^{-1} S_{gy}

    Arguments:
        y: The vector, with :math:`D` dimensions.
        given: The vectors that are known, of the same noise. Their covariance :math:`S_{gg}` must
            have an inverse. Without any, the mean and the covariance are those of :math:`y`.

    Returns:
        The mean, random as what is given is, and the covariance, with shape :math:`(D, D)`.

    Example:
        >>> z_0, noise = white_noise([1, 1], like=torch.zeros(1, 1))
        >>> z_1 = z_0 * 0.8 + noise * 0.6
        >>> mean, variance = condition(z_0, [z_1])
        >>> variance
        tensor([[0.3600]])
    """
    if not given:
        return Affine(y.mean, torch.zeros_like(y.coef)), covariance(y, y)
    g = stack(given)
    gain = torch.linalg.solve(covariance(g, g), covariance(g, y)).mT
    return Affine(y.mean, gain @ g.coef), covariance(y, y) - gain @ covariance(g, y)


def cross_entropy(y: Affine, mean: Affine, sigma: Tensor) -> Tensor:
    r"""Returns :math:`E[-\log \mathcal{N}(y; m, \mathrm{diag}(\sigma^2))]` for a random mean.

    Arguments:
        y: The vector :math:`y`, with :math:`D` dimensions.
        mean: The mean :math:`m`, a vector of the same noise.
        sigma: The standard deviations :math:`\sigma`, with shape :math:`(D,)`.

    Returns:
        The expectation in nats, with shape :math:`(B,)`.
    """
    squares = (y - mean).mean_square / sigma.square()
    return (squares + (2 * math.pi * sigma.square()).log()).sum(-1) / 2


def entropy(cov: Tensor) -> Tensor:
    r"""Returns the entropy of a Gaussian, :math:`\frac{1}{2} \log \det(2 \pi e S)`, in nats.

    Arguments:
        cov: The covariance :math:`S`, with shape :math:`(D, D)`.
    """
    return torch.logdet(2 * math.pi * math.e * cov) / 2


def expected_kl(mean_q: Affine, cov_q: Tensor, mean_p: Affine, sigma: Tensor) -> Tensor:
    r"""Returns :math:`E[\mathrm{KL}(\mathcal{N}(m_q, S_q) \,\|\, \mathcal{N}(m_p,
    \mathrm{diag}(\sigma^2)))]` for random means.

    Arguments:
        mean_q: The mean :math:`m_q`, with :math:`D` dimensions.
        cov_q: The covariance :math:`S_q`, with shape :math:`(D, D)`.
        mean_p: The mean :math:`m_p`, a vector of the same noise.
        sigma: The standard deviations :math:`\sigma`, with shape :math:`(D,)`.

    Returns:
        The expectation in nats, with shape :math:`(B,)`.
    """
    trace = (cov_q.diagonal() / sigma.square()).sum() / 2
    return cross_entropy(mean_q, mean_p, sigma) + trace - entropy(cov_q)
