r"""The variational autoencoder, as a pair of Pyro programs.

.. math::
    \text{model:} \quad & z_0 \sim p(z_0), \quad x \sim p_\theta(x | z_0) & \quad (15) \\
    \text{guide:} \quad & z_0 \sim q_\psi(z_0 | x)
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from .arguments import check_whole
from .priors import Prior
from .register import register

__all__ = ["VAE"]


class VAE(nn.Module):
    r"""A variational autoencoder with any prior.

    Arguments:
        encoder: The network of :math:`q_\psi(z_0 | x)`. It maps images of shape :math:`(B, C, H,
            W)` to a distribution with batch shape :math:`(B,)` and event shape :math:`(D,)`.
        decoder: The network of :math:`p_\theta(x | z_0)`. It maps latents of shape :math:`(*, D)`
            to a distribution with batch shape :math:`(*)` and the images' event shape.
        prior: The prior :math:`p(z_0)`.

    References:
        | Diffusion Priors in Variational Autoencoders (Wehenkel & Louppe, 2021)
        | https://arxiv.org/abs/2106.15671
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: Prior):
        super().__init__()
        if not isinstance(prior, Prior):
            raise ValueError(f"prior must be a Prior, got {type(prior).__name__}")
        self.encoder = encoder
        self.decoder = decoder
        self.prior = prior

    def model(self, x: Tensor | None = None, num_samples: int = 1) -> Tensor:
        r"""The generative program :math:`z_T \to \dots \to z_0 \to x`.

        Arguments:
            x: The observed images, with shape :math:`(B, C, H, W)`, or ``None`` to sample them.
            num_samples: The number of images :math:`B` to sample, if ``x`` is not given.

        Returns:
            The images, with shape :math:`(B, C, H, W)`.
        """
        register("decoder", self.decoder)
        with pyro.plate("data", count(x, num_samples), dim=-1):
            p_x = self.decoder(self.prior.model())
            return pyro.sample("x", p_x, obs=check_shape(x, p_x.event_shape))

    def guide(self, x: Tensor) -> Tensor:
        r"""The inference program: encoder posterior, then the prior's own guide.

        Arguments:
            x: The images, with shape :math:`(B, C, H, W)`.

        Returns:
            The latents :math:`z_0`, with shape :math:`(B, D)`.
        """
        register("encoder", self.encoder)
        with pyro.plate("data", count(x), dim=-1):
            return self.prior.guide(self.encoder(x))

    def prior_model(self, x: Tensor) -> Tensor:
        r"""The part of :meth:`model` that a prior is trained on alone: :math:`z_0 \sim p(z_0)`.

        With :meth:`prior_guide`, its negative ELBO is :math:`\mathrm{KL}(q(z_0|x) \,\|\, p(z_0))`,
        or the bound on it that the chain of a diffusion prior makes.

        Arguments:
            x: The images, with shape :math:`(B, C, H, W)`.
        """
        with pyro.plate("data", count(x), dim=-1):
            return self.prior.model()

    def prior_guide(self, x: Tensor) -> Tensor:
        r"""The guide of :meth:`prior_model`: that of the VAE, with a fixed encoder.

        Arguments:
            x: The images, with shape :math:`(B, C, H, W)`.
        """
        with torch.no_grad():
            q_z0 = self.encoder(x)
        with pyro.plate("data", count(x), dim=-1):
            return self.prior.guide(q_z0)

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        r"""Returns :math:`q_\psi(z_0 | x)`."""
        return self.encoder(x)

    def decode(self, z_0: Tensor) -> dist.TorchDistribution:
        r"""Returns :math:`p_\theta(x | z_0)`."""
        return self.decoder(z_0)


def count(x: Tensor | None, num_samples: int = 1) -> int:
    r"""Returns the number of images, after a look at whether they are images."""
    if x is None:
        check_whole("num_samples", num_samples)
        return num_samples
    if x.ndim < 2 or len(x) == 0 or not x.is_floating_point():
        raise ValueError(
            f"x must be a non-empty batch of floating-point images, got {x.dtype} of shape "
            f"{tuple(x.shape)}: likelihood.preprocess converts uint8 images"
        )
    # Reading the values waits for the device: like Pyro's own checks, only under validation.
    if is_validation_enabled() and not torch.isfinite(x).all():
        raise ValueError("x holds NaN or infinite pixels: remove or repair these images")
    return len(x)


def check_shape(x: Tensor | None, event_shape: torch.Size) -> Tensor | None:
    r"""Returns the images, if they have the shape of those that the decoder makes."""
    if x is not None and x.shape[1:] != event_shape:
        raise ValueError(
            f"x must have shape (B, {', '.join(map(str, event_shape))}) as the decoder's images "
            f"do, got {tuple(x.shape)}"
        )
    return x
