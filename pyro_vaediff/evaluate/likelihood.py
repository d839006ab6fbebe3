r"""Likelihoods: nats, bits per dimension, and importance-weighted bounds where they are bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

__all__ = ["bits_per_dim", "importance_weighted_bound"]


def bits_per_dim(nats: float, image_shape: Sequence[int], log_bin_width: float = 0.0) -> float:
    r"""Converts a negative log-likelihood from nats per datum to bits per dimension.

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


@torch.no_grad()
def importance_weighted_bound(
    model: Callable, guide: Callable, *args, elbo: ELBO | None = None, **kwargs
) -> Tensor:
    r"""Returns the importance-weighted lower bound on :math:`\log p(x)` of each datum, in nats.

    .. math:: E\left[ \log \frac{1}{K} \sum_{k=1}^K \frac{p(x, z^k)}{q(z^k | x)} \right]
        \leq \log p(x)

    It is a bound because the expectation of each weight is :math:`p(x)`. The exponential of an
    *estimate* of :math:`\log p(x, z) - \log q(z | x)`, such as :class:`Timestep_ELBO` makes from
    some timesteps or any estimator makes with closed-form KL divergences, has another expectation:
    its log-mean-exp can exceed :math:`\log p(x)`.

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

    total = None
    for _ in range(elbo.num_particles):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
            *args, **kwargs
        )
        log_weight = log_joint(model_trace) - log_joint(guide_trace)
        total = log_weight if total is None else torch.logaddexp(total, log_weight)
    return total - math.log(elbo.num_particles)


def log_joint(trace: poutine.Trace) -> Tensor:
    r"""Returns the log-density of all sites of a trace, one value per datum."""
    trace = prune_subsample_sites(trace)
    trace.compute_log_prob()
    total = 0.0
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            if site["log_prob"].ndim != 1:
                raise ValueError(
                    f"site {name!r} has log-densities of shape {tuple(site['log_prob'].shape)}: "
                    f"every site must be inside exactly one plate, the one of the data"
                )
            total = total + site["log_prob"]
    return total
