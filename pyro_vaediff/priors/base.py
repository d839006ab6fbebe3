r"""The contract of a prior: a pair of Pyro programs which agree on their latent sites."""

from __future__ import annotations

from abc import ABC, abstractmethod

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..arguments import check_whole

__all__ = ["Prior"]


class Prior(nn.Module, ABC):
    r"""A prior :math:`p(z_0)`, as a pair of Pyro programs.

    :meth:`model` samples :math:`z_0`, possibly through other latent sites. :meth:`guide` samples
    the same sites from the posterior, given the encoder's distribution :math:`q(z_0 | x)`. A prior
    opens no plate for its data: it is called inside the plate of the program that uses it.

    Arguments:
        latent_dim: The number of latent dimensions :math:`D`.
    """

    origin: Tensor

    def __init__(self, latent_dim: int):
        super().__init__()
        check_whole("latent_dim", latent_dim)
        self.latent_dim = latent_dim
        self.register_buffer("origin", torch.zeros(latent_dim), persistent=False)

    @abstractmethod
    def model(self) -> Tensor:
        r"""Samples :math:`z_0 \sim p(z_0)`, of shape :math:`(D,)`, or :math:`(*, D)` in plates."""

    def guide(self, q_z0: dist.TorchDistribution) -> Tensor:
        r"""Samples :math:`z_0 \sim q(z_0 | x)`.

        Arguments:
            q_z0: The encoder's distribution :math:`q(z_0 | x)`, with event shape :math:`(D,)`.

        Returns:
            The latents :math:`z_0`, with shape :math:`(*, D)`.
        """
        self.check_posterior(q_z0)
        # The model's z_0 has no parents, hence KL(q(z_0|x) || p(z_0)) is legal in closed form.
        return pyro.sample("z_0", q_z0, infer={"closed_form_kl": True})

    def check_posterior(self, q_z0: dist.TorchDistribution) -> None:
        r"""Raises a ``ValueError`` unless ``q_z0`` is a distribution over :math:`z_0`."""
        if tuple(q_z0.event_shape) != (self.latent_dim,):
            raise ValueError(
                f"q(z_0 | x) must have event shape ({self.latent_dim},), as the prior has "
                f"latent_dim={self.latent_dim}, got {tuple(q_z0.event_shape)}"
            )

    def standard_normal(self) -> dist.Independent:
        r"""Returns :math:`\mathcal{N}(0, I)`."""
        return dist.Normal(self.origin, torch.ones_like(self.origin)).to_event(1)
