r"""The standard Gaussian prior."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import Tensor

from .base import Prior

__all__ = ["GaussianPrior"]


class GaussianPrior(Prior):
    r"""The prior of the original VAE, :math:`p(z_0) = \mathcal{N}(0, I)`.

    Arguments:
        event_shape: The shape of a latent; a number :math:`D` means :math:`(D,)`.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2014)
        | https://arxiv.org/abs/1312.6114
    """

    def distribution(self, c: Tensor | None = None) -> dist.TorchDistribution:
        return self.standard_normal()

    def model(self, c: Tensor | None = None) -> Tensor:
        return pyro.sample("z_0", self.distribution(c))
