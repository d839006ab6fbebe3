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

from ..arguments import check_choice, check_whole
from ..priors import DiffusionPrior
from ..vae import VAE, call, posterior
from .densities import LOG_PRIORS, chain_log_weight, prior_log_prob
from .elbo import Data, evaluating, in_batches

__all__ = [
    "bits_per_dim",
    "importance_log_likelihood",
    "importance_weighted_bound",
    "log_likelihood",
    "log_likelihood_by_samples",
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


def by_samples(log_weights: Tensor) -> dict[int, Tensor]:
    r"""Returns the log-mean-exp of :math:`1, 2, 4, \dots` and all :math:`K` weights.

    For a smaller number, there is one value for each group of that many weights, and the result is
    their mean. It has the same expectation as one of them, and less noise.

    Arguments:
        log_weights: The logarithms of the weights, with shape :math:`(K, B)`.

    Returns:
        The values by number of weights, with shape :math:`(B,)`.
    """
    K = len(log_weights)
    numbers = [2**i for i in range(K.bit_length()) if 2**i < K] + [K]
    groups = {k: log_weights[: K // k * k].unflatten(0, (-1, k)) for k in numbers}
    return {k: (group.logsumexp(1) - math.log(k)).mean(0) for k, group in groups.items()}


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

    log_weights = torch.stack([log_weight() for _ in range(elbo.num_particles)])
    return by_samples(log_weights)[elbo.num_particles]


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


def log_weights(
    vae: VAE,
    x: Tensor,
    num_samples: int,
    c: Tensor | None = None,
    log_prior: str = "flow",
    batch_size: int = 100,
    **options: Any,
) -> Tensor:
    r"""Returns :math:`\log p(x, z_0) - \log q(z_0 | x)` of samples, with shape :math:`(K, B)`."""
    check_whole("num_samples", num_samples)
    check_whole("batch_size", batch_size)
    check_choice("log_prior", log_prior, LOG_PRIORS)
    is_chain = log_prior == "chain" and isinstance(vae.prior, DiffusionPrior)
    log_prob: Callable[..., Tensor] = chain_log_weight if is_chain else prior_log_prob
    q_z0, B, n = posterior(vae, x, c), len(x), min(num_samples, max(1, batch_size // len(x)))
    copies = [None if v is None else v.expand(n, *v.shape).flatten(0, 1) for v in (x, c)]

    def some(n: int) -> Tensor:
        # Each as a sample site draws it, and scored at once: a flow does so at no cost.
        draws = [(z := q_z0(), q_z0.log_prob(z)) for _ in range(n)]
        z_0, log_q = (torch.stack(parts) for parts in zip(*draws, strict=True))
        x_n, c_n = (None if v is None else v[: n * B] for v in copies)
        log_p_x = call(vae.decoder, z_0.flatten(0, 1), c_n).log_prob(x_n).reshape(n, B)
        return log_p_x - log_q + log_prob(vae.prior, z_0, c, **options)

    return torch.cat([some(min(n, num_samples - k)) for k in range(0, num_samples, n)])


@torch.no_grad()
def importance_log_likelihood(
    vae: VAE, x: Tensor, num_samples: int = 64, c: Tensor | None = None, **options: Any
) -> Tensor:
    r"""Returns an importance-weighted estimate of :math:`\log p(x)` of each datum, in nats.

    .. math:: \log \frac{1}{K} \sum_{k=1}^K \frac{p_\theta(x | z_0^k) \, p(z_0^k)}{q_\psi(z_0^k |
        x)}, \qquad z_0^k \sim q_\psi(z_0 | x)

    Its expectation is a lower bound on :math:`\log p(x)` that rises with :math:`K`. It is that of
    :func:`~pyro_vaediff.evaluate.importance_weighted_bound`, with several samples at once and
    without traces. A diffusion prior has two densities, those of two models with one denoiser. Each
    is a likelihood, for any number of steps, and neither need be the larger one:

    - ``log_prior="flow"``, the density of its :class:`~pyro_vaediff.sampling.ProbabilityFlow`;
    - ``log_prior="chain"``, that of :math:`z_T \to \dots \to z_0`, which the ELBO bounds. A weight
      has a draw of the whole chain (:func:`chain_log_weight`), which makes it noisier but costs
      fewer operations, in particular with few steps.

    Arguments:
        vae: The VAE.
        x: The data in x-space, with shape :math:`(B, *)`.
        num_samples: The number of samples :math:`K`.
        c: The context, with shape :math:`(B, *)`.
        options: ``log_prior``, by default ``"flow"``; ``batch_size``, the number of latents that
            are evaluated at once, but one of each datum at least, by default 100; and the options
            of a diffusion prior's density, such as ``num_steps``.

    Returns:
        The estimates, with shape :math:`(B,)`.

    References:
        | Importance Weighted Autoencoders (Burda et al., 2016)
        | https://arxiv.org/abs/1509.00519
    """
    return by_samples(log_weights(vae, x, num_samples, c, **options))[num_samples]


@torch.no_grad()
def log_likelihood_by_samples(
    vae: VAE,
    data: Data,
    num_samples: int = 64,
    *,
    c: Tensor | None = None,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> dict[int, Tensor]:
    r"""Returns importance-weighted estimates of :math:`\log p(x)` of data, in nats per datum, by
    the number of samples :math:`1, 2, 4, \dots, K`.

    They rise to :math:`\log p(x)`, and whether they still do at :math:`K` tells how far below it
    they are. All are made of the same :math:`K` samples. See
    :func:`~pyro_vaediff.evaluate.importance_log_likelihood`, also for what it means with a
    diffusion prior. If the likelihood is a density, so is :math:`p(x)`, at images that are
    dequantized as :func:`~pyro_vaediff.evaluate.evaluate` does it: from the same seed, and for its
    first batch with the same noise.

    Arguments:
        vae: The VAE. It is evaluated in eval mode, on the device of its parameters.
        data: The data, see :func:`~pyro_vaediff.evaluate.in_batches`.
        num_samples: The number of samples :math:`K` of each datum.
        c: The context, with shape :math:`(N, *)`.
        batch_size: The number of latents that are evaluated at once. With ``chunk_size`` of the
            probability flow, it bounds the memory.
        seed: The seed of dequantization and latents. The global generators are restored.
        progress: Whether to show a progress bar.
        options: The options of :func:`~pyro_vaediff.evaluate.importance_log_likelihood`.

    Returns:
        The estimates by number of samples, with shape :math:`(N,)`.
    """
    parts = []
    with evaluating(vae, seed):
        for x, c_x in in_batches(vae, data, c, batch_size, progress and "log-likelihood"):
            weights = log_weights(vae, x, num_samples, c_x, batch_size=batch_size, **options)
            parts.append(by_samples(weights))
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}


def log_likelihood(vae: VAE, data: Data, num_samples: int = 64, **options: Any) -> Tensor:
    r"""Returns importance-weighted estimates of :math:`\log p(x)` of data, in nats per datum.

    Arguments:
        vae: The VAE.
        data: The data.
        num_samples: The number of samples :math:`K` of each datum.
        options: The options of :func:`log_likelihood_by_samples`, which has the estimates of fewer
            samples as well.

    Returns:
        The estimates, with shape :math:`(N,)`.
    """
    return log_likelihood_by_samples(vae, data, num_samples, **options)[num_samples]
