r"""Likelihoods: nats, bits per dimension, and importance-weighted bounds where they are bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from ..arguments import check_whole
from ..priors import Prior
from ..sampling.probability_flow import ProbabilityFlow
from ..vae import VAE, call, posterior
from .elbo import Data, evaluating, in_batches

__all__ = [
    "bits_per_dim",
    "importance_log_likelihood",
    "importance_weighted_bound",
    "log_likelihood",
    "prior_log_prob",
]


def bits_per_dim(nats: float, image_shape: Sequence[int], log_bin_width: float = 0.0) -> float:
    r"""Returns a negative log-likelihood in bits per dimension, from nats per datum.

    A density of uniformly dequantized data bounds the probability of the discrete data,
    :math:`\log P(u) \geq E[\log p(x)] + d \log \Delta`, where :math:`\Delta` is the width of a bin.

    Arguments:
        nats: The negative log-likelihood, or a bound on it, in nats per datum.
        image_shape: The shape of a datum, with :math:`d` dimensions in all.
        log_bin_width: The logarithm of :math:`\Delta`, 0 for a discrete likelihood.

    Example:
        >>> bits_per_dim(64 * math.log(256), image_shape=(1, 8, 8))
        8.0
    """
    num_dims = math.prod(image_shape)
    return (nats / num_dims - log_bin_width) / math.log(2)


def log_mean_exp(log_weight: Callable[[], Tensor], num_samples: int) -> Tensor:
    r"""Returns the logarithm of the mean of random weights, drawn one after the other."""
    total = log_weight()
    for _ in range(num_samples - 1):
        total = torch.logaddexp(total, log_weight())
    return total - math.log(num_samples)


@torch.no_grad()
def importance_weighted_bound(
    model: Callable, guide: Callable, *args: Any, elbo: ELBO | None = None, **kwargs: Any
) -> Tensor:
    r"""Returns the importance-weighted lower bound on :math:`\log p(x)` of each datum, in nats.

    .. math:: E\left[ \log \frac{1}{K} \sum_{k=1}^K \frac{p(x, z^k)}{q(z^k | x)} \right]
        \leq \log p(x)

    It is a bound because the expectation of each weight is :math:`p(x)`. The exponential of an
    *estimate* of :math:`\log p(x, z) - \log q(z | x)`, such as :class:`Timestep_ELBO` makes from
    some timesteps or any estimator makes with closed-form KL divergences, has another expectation:
    its log-mean-exp can exceed :math:`\log p(x)`. So has a power of a weight: the scales of the
    programs (those of a subsampled plate, a weight of the KL, one over the number of data) are not
    part of the density and are left out. Masks are part of it.

    Arguments:
        model: The model, all of whose sites are inside a plate at dimension -1.
        guide: The guide.
        args: The arguments of the model and the guide.
        elbo: The estimator which makes the weights and says how many, ``Trace_ELBO`` or
            ``TraceGraph_ELBO``. By default ``Trace_ELBO(num_particles=64)``.
        kwargs: The keyword arguments of the model and the guide.

    Returns:
        The bounds, with shape :math:`(B,)`.

    Raises:
        ValueError: If the estimator's log-mean-exp is not a bound.

    References:
        | Importance Weighted Autoencoders (Burda et al., 2016)
        | https://arxiv.org/abs/1509.00519
    """
    elbo = Trace_ELBO(num_particles=64) if elbo is None else elbo
    if type(elbo) not in (Trace_ELBO, TraceGraph_ELBO):
        raise ValueError(
            f"the log-mean-exp of {type(elbo).__name__} is not a bound on log p(x), as its "
            f"particles are not log p(x, z) - log q(z | x) of one draw of all sites: use Trace_ELBO"
        )
    if elbo.vectorize_particles:
        raise ValueError("elbo must not vectorize its particles, which are accumulated one by one")

    def log_weight() -> Tensor:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        return log_joint(model_trace) - log_joint(guide_trace)

    return log_mean_exp(log_weight, elbo.num_particles)


def log_joint(trace: poutine.Trace) -> Tensor:
    r"""Returns the log-density of all sites of a trace, without scales, one value per datum."""
    trace = prune_subsample_sites(trace)
    for site in trace.nodes.values():
        site["scale"] = 1.0
    trace.compute_log_prob()
    total = torch.zeros(())
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            if site["log_prob"].ndim != 1:
                raise ValueError(
                    f"site {name!r} has log-densities of shape {tuple(site['log_prob'].shape)}: "
                    f"every site must be inside exactly one plate, the one of the data"
                )
            total = total + site["log_prob"]
    return total


def prior_log_prob(
    prior: Prior, z_0: Tensor, c: Tensor | None = None, **flow_options: Any
) -> Tensor:
    r"""Returns the exact log-density :math:`\log p(z_0)` of any prior, in nats.

    It is ``prior.log_prob`` if the prior has it. A diffusion prior has it in its probability flow:
    see :class:`~pyro_vaediff.sampling.ProbabilityFlow`, a model of its own with the same denoiser.

    Arguments:
        prior: The prior.
        z_0: The latents, with shape :math:`(*, *\mathrm{event})`.
        c: The context, with shape :math:`(B, *)`.
        flow_options: The options of the probability flow, such as ``num_steps``. Priors other than
            diffusion priors have no use for them.

    Returns:
        The log-densities, with shape :math:`(*)`.

    Raises:
        ValueError: If the prior has neither.

    Example:
        >>> from pyro_vaediff import GaussianPrior
        >>> prior_log_prob(GaussianPrior(2), torch.zeros(3, 2))
        tensor([-1.8379, -1.8379, -1.8379])
    """
    try:
        return prior.log_prob(z_0, c)
    except NotImplementedError:
        return ProbabilityFlow(prior, c=c, **flow_options).log_prob(z_0)


@torch.no_grad()
def importance_log_likelihood(
    vae: VAE, x: Tensor, num_samples: int = 64, c: Tensor | None = None, **flow_options: Any
) -> Tensor:
    r"""Returns an importance-weighted estimate of :math:`\log p(x)` of each datum, in nats.

    .. math:: \log \frac{1}{K} \sum_{k=1}^K \frac{p_\theta(x | z_0^k) \, p(z_0^k)}{q_\psi(z_0^k |
        x)}, \qquad z_0^k \sim q_\psi(z_0 | x)

    Its expectation is a lower bound on :math:`\log p(x)` that rises with :math:`K`. The estimate is
    that of :func:`~pyro_vaediff.evaluate.importance_weighted_bound` for priors whose only site is
    ``"z_0"``. A diffusion prior's :math:`p(z_0)` is here that of its probability flow: the result
    is a likelihood of *this* model, which is another one than the chain :math:`z_T \to \dots \to
    z_0` that the ELBO bounds. Either is a likelihood, so that neither need be the larger one.

    Arguments:
        vae: The VAE.
        x: The data in x-space, with shape :math:`(B, *)`.
        num_samples: The number of samples :math:`K`.
        c: The context, with shape :math:`(B, *)`.
        flow_options: The options of :func:`prior_log_prob`.

    Returns:
        The estimates, with shape :math:`(B,)`.

    References:
        | Importance Weighted Autoencoders (Burda et al., 2016)
        | https://arxiv.org/abs/1509.00519
    """
    check_whole("num_samples", num_samples)
    q_z0 = posterior(vae, x, c)

    def log_weight() -> Tensor:
        z_0 = q_z0()  # as a sample site draws it
        log_p_x = call(vae.decoder, z_0, c).log_prob(x)
        log_p_z = prior_log_prob(vae.prior, z_0, c, **flow_options)
        return log_p_x - q_z0.log_prob(z_0) + log_p_z

    return log_mean_exp(log_weight, num_samples)


@torch.no_grad()
def log_likelihood(
    vae: VAE,
    data: Data,
    num_samples: int = 64,
    *,
    c: Tensor | None = None,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = False,
    **flow_options: Any,
) -> Tensor:
    r"""Returns importance-weighted estimates of :math:`\log p(x)` of data, in nats per datum.

    See :func:`importance_log_likelihood`, also for what it means with a diffusion prior. If the
    likelihood is a density, so is :math:`p(x)`, at images that are dequantized as
    :func:`~pyro_vaediff.evaluate.evaluate` does it: from the same seed, and for its first batch
    with the same noise.

    Arguments:
        vae: The VAE. It is evaluated in eval mode, on the device of its parameters.
        data: The data, see :func:`~pyro_vaediff.evaluate.in_batches`.
        num_samples: The number of samples :math:`K` of each datum, one at a time.
        c: The context, with shape :math:`(N, *)`.
        batch_size: The number of data that are evaluated at once. With ``chunk_size`` of the
            probability flow, it bounds the memory.
        seed: The seed of dequantization and latents. The global generators are restored.
        progress: Whether to show a progress bar.
        flow_options: The options of :func:`prior_log_prob`.

    Returns:
        The estimates, with shape :math:`(N,)`.
    """
    with evaluating(vae, seed):
        batches = in_batches(vae, data, c, batch_size, progress and "log-likelihood")
        return torch.cat(
            [
                importance_log_likelihood(vae, x, num_samples, c_x, **flow_options)
                for x, c_x in batches
            ]
        )
