r"""Synthetic counts from a known generator, such as of genes in cells that come in batches."""

from __future__ import annotations

import math
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from ..arguments import check_seed, check_whole

__all__ = ["Counts", "synthetic_counts"]


class Counts(NamedTuple):
    r"""Counts, and what they were drawn from."""

    #: The counts, whole numbers, with shape :math:`(N, G)`.
    x: Tensor
    #: The batch of each datum, one-hot, and the logarithm of its library size, with shape
    #: :math:`(N, B + 1)`.
    c: Tensor
    #: The type of each datum, with shape :math:`(N,)`.
    types: Tensor
    #: The means :math:`\mu`, with shape :math:`(N, G)`.
    means: Tensor
    #: The inverse dispersions :math:`\theta`, with shape :math:`(G,)`.
    inverse_dispersions: Tensor


def synthetic_counts(
    num_data: int,
    num_features: int = 60,
    num_types: int = 6,
    num_batches: int = 3,
    library_size: float = 200.0,
    seed: int = 0,
) -> Counts:
    r"""Returns counts of data that are of a few types, each of which is a curve.

    A datum :math:`n` of type :math:`k` and batch :math:`b`, both uniform, at the position :math:`s
    \sim \mathcal{U}(-1, 1)` of its curve has

    .. math::
        \rho_n & = \mathrm{softmax}(a + u_k + s v_k + w_b), & \qquad l_n & \sim
        \mathrm{LogNormal}(\log l, 0.3^2) \\
        \mu_n & = l_n \rho_n, & x_{ng} & \sim \mathrm{NegativeBinomial}(\mu_{ng}, \theta_g),

    with the variance :math:`\mu + \mu^2 / \theta`. That is what a model in the manner of scVI
    assumes, but for the latents: they are neither Gaussian nor connected.

    Arguments:
        num_data: The number of data :math:`N`.
        num_features: The number of features :math:`G`, such as genes.
        num_types: The number of types.
        num_batches: The number of batches :math:`B`.
        library_size: The median :math:`l` of the sums of the means.
        seed: The seed of everything; the global generators are left as they are.

    References:
        | Deep generative modeling for single-cell transcriptomics (Lopez et al., 2018)
        | https://doi.org/10.1038/s41592-018-0229-2

    Example:
        >>> counts = synthetic_counts(5)
        >>> counts.x.shape, counts.c.shape
        (torch.Size([5, 60]), torch.Size([5, 4]))
    """
    for name, value in (("num_data", num_data), ("num_features", num_features)):
        check_whole(name, value)
    for name, value in (("num_types", num_types), ("num_batches", num_batches)):
        check_whole(name, value)
    check_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        G = num_features
        base, start, slope, shift = (
            scale * torch.randn(count, G)
            for scale, count in ((1.0, 1), (1.0, num_types), (0.7, num_types), (0.3, num_batches))
        )
        theta = torch.distributions.Gamma(4.0, 1.0).sample((G,)) + 1
        types = torch.randint(num_types, (num_data,))
        batch = torch.randint(num_batches, (num_data,))
        s = 2 * torch.rand(num_data, 1) - 1
        rho = (base + start[types] + s * slope[types] + shift[batch]).softmax(-1)
        log_size = math.log(library_size) + 0.3 * torch.randn(num_data, 1)
        means = log_size.exp() * rho
        x = dist.NegativeBinomial(theta, logits=(means / theta).log()).sample()
    one_hot = torch.nn.functional.one_hot(batch, num_batches).float()
    return Counts(x, torch.cat([one_hot, log_size], -1), types, means, theta)
