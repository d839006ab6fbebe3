r"""The aggregate posterior of data: its density, and what it is as a prior.

.. math:: q(z_0) = \frac{1}{N} \sum_{n=1}^N q(z_0 | x_n)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor

from ..diffusion import base_normal
from ..nn import FlowDistribution
from ..priors import AggregatePrior
from ..vae import VAE, posterior
from .elbo import Data, evaluating, in_batches

__all__ = ["aggregate_log_prob", "aggregate_prior", "posterior_means"]

CHUNK = 2**22  # pairs of a latent and a component that are evaluated at once: 32 MiB in float64
NETWORK_CHUNK = 2**16  # the same where each pair goes through a network


@torch.no_grad()
def aggregate_prior(
    vae: VAE,
    data: Data,
    *,
    c: Tensor | None = None,
    batch_size: int = 500,
    seed: int = 0,
    progress: bool = False,
) -> AggregatePrior:
    r"""Returns the aggregate posterior of data, such as all training images, as a prior.

    It is the natural ceiling of learned priors: of all priors for this encoder it has the highest
    ELBO on these data, and no parameter of it was fitted. The mixture is a density that does not
    depend on what is evaluated, so that the ELBO of *other* data with it is a bound on their
    :math:`\log p(x)`::

        ceiling = VAE(vae.encoder, vae.decoder, aggregate_prior(vae, data.train), vae.space)
        sum(evaluate(ceiling, data.test).values())

    On the data themselves, each of which has a component of its own, it says nothing about a model.

    Arguments:
        vae: The VAE. It is evaluated in eval mode, on the device of its parameters.
        data: The data, see :func:`~pyro_vaediff.evaluate.in_batches`.
        c: The context of a tensor of data, with shape :math:`(N, *)`.
        batch_size: The number of data that are encoded at once.
        seed: The seed of dequantization. The global generators are restored.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the posteriors are not Gaussian.

    References:
        | ELBO surgery: yet another way to carve up the variational evidence lower bound (Hoffman &
          Johnson, 2016)
        | http://approximateinference.org/accepted/HoffmanJohnson2016.pdf

        | VAE with a VampPrior (Tomczak & Welling, 2018), equation (9)
        | https://arxiv.org/abs/1705.07120
    """
    moments = []
    with evaluating(vae, seed):
        for x, c_x in in_batches(vae, data, c, batch_size, progress and "aggregate posterior"):
            q = posterior(vae, x, c_x)
            if (normals := base_normal(q)) is None:
                raise ValueError(
                    "vae.encoder must be Gaussian for an aggregate_prior, got a "
                    f"{type(q).__name__}: a density of each of N flows would take too long"
                )
            shape = q.batch_shape + q.event_shape
            moments.append((normals.loc.expand(shape), normals.scale.expand(shape)))
    return AggregatePrior(*(torch.cat(parts) for parts in zip(*moments, strict=True)))


def aggregate_log_prob(z_0: Tensor, posteriors: Sequence[dist.TorchDistribution]) -> Tensor:
    r"""Returns the log-density of an equal mixture of distributions.

    Arguments:
        z_0: The points, with shape :math:`(M, *\mathrm{event})`, preferably in float64.
        posteriors: Batches of components, :math:`N` in all.

    Returns:
        The log-densities in nats, with shape :math:`(M,)`. For diagonal Gaussians, the memory does
        not depend on :math:`M`.

    Raises:
        ValueError: If they are inverse autoregressive flows.

    Example:
        >>> posterior = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)
        >>> aggregate_log_prob(torch.zeros(1, 2), [posterior])
        tensor([-1.8379])
    """
    number = sum(q.batch_shape.numel() for q in posteriors)
    densities = [component_log_probs(q) for q in posteriors]
    return torch.cat(
        [
            torch.cat([density(z) for density in densities], -1).logsumexp(-1) - math.log(number)
            for z in z_0.split(max(1, CHUNK // number))
        ]
    )


def component_log_probs(q: dist.TorchDistribution) -> Callable[[Tensor], Tensor]:
    r"""Returns a function of points, with shape (M, *event), to their log-densities under each of
    the components, with shape (M, B)."""
    check_density(q)
    normals = base_normal(q)
    if normals is None:
        some = max(1, NETWORK_CHUNK // q.batch_shape.numel())
        return lambda z: torch.cat([q.log_prob(part.unsqueeze(1)) for part in z.split(some)])
    # The square of (z - m) / s as products of matrices, about the center for the sake of digits.
    shape, first = q.batch_shape + q.event_shape, len(q.batch_shape)
    loc, scale = (x.expand(shape).flatten(first) for x in (normals.loc, normals.scale))
    center = loc.mean(0)
    loc, precision = loc - center, scale.square().reciprocal()
    constant = (loc.square() * precision / 2 + scale.log() + math.log(2 * math.pi) / 2).sum(-1)
    linear = (loc * precision).mT

    def log_probs(z: Tensor) -> Tensor:
        z = z.flatten(1) - center
        return z @ linear - z.square() @ (precision.mT / 2) - constant

    return log_probs


def check_density(q: dist.TorchDistribution) -> None:
    r"""Raises a ``ValueError`` unless the density at others' samples takes one pass."""
    if isinstance(q, FlowDistribution) and q.is_inverse_autoregressive:
        raise ValueError(
            "the aggregate posterior needs each q(z_0 | x) at the latents of all data, which takes "
            "an inverse autoregressive flow D passes each: use a Gaussian or a coupling posterior, "
            "or evaluate for the KL alone"
        )


def posterior_means(q: dist.TorchDistribution, num_samples: int = 64) -> tuple[Tensor, Tensor]:
    r"""Returns the means of posteriors and the variances of these numbers.

    Arguments:
        q: The posteriors.
        num_samples: The number of draws that a mean is estimated from if it is not known.

    Returns:
        The means and their variances, which are zero if the means are exact, in float64 and with
        the shape of a draw.
    """
    try:
        mean = q.mean.double()
        return mean, torch.zeros_like(mean)
    except NotImplementedError:
        z = q.sample(torch.Size([num_samples])).double()
        return z.mean(0), z.var(0) / num_samples
