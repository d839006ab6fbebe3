r"""The variational autoencoder, as a pair of Pyro programs.

.. math::
    \text{model:} \quad & z_0 \sim p(z_0), \quad x \sim p_\theta(x | z_0) & \quad (1) \\
    \text{guide:} \quad & z_0 \sim q_\psi(z_0 | x)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from .arguments import check_whole
from .priors import HierarchicalPrior, Prior
from .priors.base import call
from .register import register

if TYPE_CHECKING:
    from .likelihoods import PixelSpace

__all__ = ["VAE"]


class Program(nn.Module):
    r"""A program of a VAE as a module, whose parameters are those of the VAE.

    So ``elbo(vae.model, vae.guide).parameters()`` is complete, as Pyro documents it.
    """

    def __init__(self, function: Callable, vae: VAE):
        super().__init__()
        self.function, self.vae = function, vae

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(self.vae, *args, **kwargs)


class program:
    r"""A method that is a :class:`Program` of its VAE."""

    def __init__(self, function: Callable):
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, vae: VAE | None, owner: type) -> Any:
        return self.function if vae is None else Program(self.function, vae)


class VAE(nn.Module):
    r"""A variational autoencoder with any prior.

    Arguments:
        encoder: The network of :math:`q_\psi(z_0 | x)`. It maps data of shape :math:`(B, \dots)` to
            a distribution with batch shape :math:`(B,)` and the prior's event shape. It is called
            as ``encoder(x)``, or ``encoder(x, c)`` if there is a context.
        decoder: The network of :math:`p_\theta(x | z_0)`. It maps latents of shape :math:`(*,
            \dots)` to a distribution with batch shape :math:`(*)` and the data's event shape. It is
            called as ``decoder(z_0)``, or ``decoder(z_0, c)``.
        prior: The prior :math:`p(z_0)`.
        space: The pixel space, which converts 8-bit images to the :math:`x` of the programs and
            back; ``None`` if data come as :math:`x` already.

    References:
        | Diffusion Priors in Variational Autoencoders (Wehenkel & Louppe, 2021)
        | https://arxiv.org/abs/2106.15671
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        prior: Prior,
        space: PixelSpace | None = None,
    ):
        super().__init__()
        if not isinstance(prior, Prior):
            raise ValueError(f"prior must be a Prior, got {type(prior).__name__}")
        self.encoder = encoder
        self.decoder = decoder
        self.prior = prior
        self.space = space

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("encoder", "prior") and hasattr(self, "encoder") and hasattr(self, "prior"):
            self.prior.bind(self.encoder)

    @program
    def model(
        self, x: Tensor | None = None, c: Tensor | None = None, num_samples: int = 1
    ) -> Tensor:
        r"""The generative program :math:`z_T \to \dots \to z_0 \to x`.

        Arguments:
            x: The observed data, with shape :math:`(B, \dots)`, or ``None`` to sample them.
            c: The context, such as labels, with one row per datum.
            num_samples: The number of data to sample, without a context.

        Returns:
            The data, with shape :math:`(B, \dots)`.
        """
        register("decoder", self.decoder)
        with pyro.plate("data", count(x, c, num_samples), dim=-1):
            z_0 = call(self.prior.model, c)
            p_x = checked("decoder", call(self.decoder, z_0, c))
            return pyro.sample("x", p_x, obs=check_shape(x, p_x))

    @program
    def guide(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        r"""The inference program: encoder posterior, then the prior's own guide.

        Arguments:
            x: The data, with shape :math:`(B, \dots)`.
            c: The context, with one row per datum.

        Returns:
            The latents :math:`z_0`, with shape :math:`(B, \dots)`.
        """
        register("encoder", self.encoder)
        with pyro.plate("data", count(x, c), dim=-1):
            return call(self.prior.guide, call(self.encoder, x, c), c)

    @program
    def prior_model(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        r"""The part of :attr:`model` that a prior is trained on alone: :math:`z_0 \sim p(z_0)`.

        With :attr:`prior_guide`, its negative ELBO is :math:`\mathrm{KL}(q(z_0|x) \,\|\, p(z_0))`,
        or the bound on it that the chain of a diffusion prior makes.

        Arguments:
            x: The data, with shape :math:`(B, \dots)`.
            c: The context, with one row per datum.
        """
        with pyro.plate("data", count(x, c), dim=-1):
            return call(self.prior.model, c)

    @program
    def prior_guide(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        r"""The guide of :attr:`prior_model`: that of the VAE, with a fixed encoder.

        Arguments:
            x: The data, with shape :math:`(B, \dots)`.
            c: The context, with one row per datum.
        """
        with torch.no_grad():
            q_z0 = call(self.encoder, x, c)
        with pyro.plate("data", count(x, c), dim=-1):
            return call(self.prior.guide, q_z0, c)


def posterior(vae: VAE, x: Tensor, c: Tensor | None = None) -> Any:
    r"""Returns :math:`q(z_0 | x)`, which a hierarchy has not: only that of each group, in turn."""
    if isinstance(vae.prior, HierarchicalPrior):
        raise ValueError(
            "a HierarchicalPrior has no single q(z_0 | x): use evaluate for the bound, "
            "importance_weighted_bound for log p(x) and reconstruct for images"
        )
    return call(vae.encoder, x, c)


def checked(name: str, fn: Any) -> dist.TorchDistribution:
    r"""Returns the output of a network, if it is a distribution of Pyro's."""
    if isinstance(fn, dist.torch_distribution.TorchDistributionMixin):
        return fn
    raise ValueError(
        f"vae.{name} must return a distribution of pyro.distributions over one datum, such as "
        f"Normal(loc, scale).to_event(3) for images, got a {type(fn).__name__}"
    )


def count(x: Tensor | None, c: Tensor | None = None, num_samples: int = 1) -> int:
    r"""Returns the number of data, after a look at whether they are data."""
    if x is None:
        check_whole("num_samples", num_samples)
        return num_samples if c is None else len(c)
    if x.ndim < 2 or len(x) == 0 or not x.is_floating_point():
        raise ValueError(
            f"x must be a non-empty batch of floating-point images, got {x.dtype} of shape "
            f"{tuple(x.shape)}: vae.space.preprocess converts uint8 images"
        )
    # Reading the values waits for the device: like Pyro's own checks, only under validation.
    if is_validation_enabled() and not torch.isfinite(x).all():
        raise ValueError("x holds NaN or infinite pixels: remove or repair these images")
    return len(x)


def check_shape(x: Tensor | None, p_x: dist.TorchDistribution) -> Tensor | None:
    r"""Returns the data, if they have the shape of those that the decoder makes."""
    event_shape = p_x.event_shape
    if x is not None and not p_x.batch_shape:
        raise ValueError(
            "vae.decoder must return a distribution per latent, with batch shape (*, B), got none "
            f"of event shape {tuple(event_shape)}: does it mix the data?"
        )
    if x is not None and not event_shape:
        raise ValueError(
            "vae.decoder must return a distribution over data, not over their single numbers: add "
            f".to_event({x.ndim - 1})"
        )
    if x is not None and x.shape[1:] != event_shape:
        raise ValueError(
            f"x must have shape (B, {', '.join(map(str, event_shape))}) as the decoder's images "
            f"do, got {tuple(x.shape)}"
        )
    return x
