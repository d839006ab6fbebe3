r"""The standard Gaussian prior."""

from __future__ import annotations

import pyro
from torch import Tensor

from .base import Prior

__all__ = ["GaussianPrior"]


class GaussianPrior(Prior):
    r"""The prior of the original VAE, :math:`p(z_0) = \mathcal{N}(0, I)`.

    Arguments:
        latent_dim: The number of latent dimensions :math:`D`.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2014)
        | https://arxiv.org/abs/1312.6114
    """

    def model(self) -> Tensor:
        return pyro.sample("z_0", self.standard_normal())
