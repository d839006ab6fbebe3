r"""ELBO surgery: what the KL term of the ELBO consists of, and how many latents are in use.

Averaged over the images :math:`x_1, \dots, x_N`, the KL term splits into what the latents say about
which image it is, and how far their aggregate is from the prior,

.. math:: \frac{1}{N} \sum_{n=1}^N \mathrm{KL}(q(z_0 | x_n) \,\|\, p(z_0)) = I_q(n; z_0) +
    \mathrm{KL}(q(z_0) \,\|\, p(z_0)), \qquad q(z_0) = \frac{1}{N} \sum_{n=1}^N q(z_0 | x_n).

Only the second part, the marginal KL, depends on the prior: it is what a better prior can remove.

References:
    | ELBO surgery: yet another way to carve up the variational evidence lower bound (Hoffman &
      Johnson, 2016)
    | http://approximateinference.org/accepted/HoffmanJohnson2016.pdf

    | Importance Weighted Autoencoders (Burda et al., 2016), for the active units
    | https://arxiv.org/abs/1509.00519
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..arguments import check_choice, check_whole
from ..diffusion import base_normal
from ..infer import TermsELBO, Timestep_ELBO, elbo_terms
from ..priors import Prior
from ..vae import VAE, posterior
from .aggregate import aggregate_log_prob, check_density, posterior_means
from .densities import LOG_PRIORS, prior_log_prob
from .elbo import Data, check_bound, evaluating, in_batches, value_elbo

__all__ = ["Estimate", "Surgery", "chain_log_prob", "elbo_surgery"]

ACTIVE = 0.01  # the threshold of Burda et al.


class Estimate(NamedTuple):
    r"""A Monte Carlo estimate in nats, and its standard error given the data."""

    mean: float
    se: float


@dataclass(frozen=True)
class Surgery:
    r"""The parts of the KL term over :math:`N` data, in nats per datum."""

    #: :math:`I_q(n; z_0)`, the mutual information of the latents and the index of their datum.
    mutual_information: Estimate
    #: :math:`\mathrm{KL}(q(z_0) \,\|\, p(z_0))`, or an upper bound on it.
    marginal_kl: Estimate
    #: The sum of these two, the KL term of the ELBO.
    total_kl: Estimate
    #: :math:`\log N`, which :math:`I_q` cannot exceed: close to it, it says little about the model.
    max_mutual_information: float
    #: The number of latent elements whose posterior mean has a variance above 0.01.
    active_units: int
    #: The variances of :math:`E_q[z_0 | x_n]` over the data, with the event shape of the latents.
    mean_variances: Tensor
    #: Whether the KLs are upper bounds, as :math:`\log p(z_0)` is that of a chain.
    is_bound: bool


@torch.no_grad()
def elbo_surgery(
    vae: VAE,
    data: Data,
    *,
    c: Tensor | None = None,
    log_prior: str = "chain",
    num_samples: int = 2,
    elbo: Timestep_ELBO | None = None,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = False,
    **flow_options: Any,
) -> Surgery:
    r"""Estimates the mutual information and the marginal KL that the KL term consists of.

    The latents are samples of each :math:`q(z_0 | x_n)`, and :math:`\log q(z_0)` is exact. If the
    entropy of :math:`q(z_0 | x_n)` is known, :math:`\log q(z_0 | x_n) + \mathrm{H}[q(z_0 | x_n)]`
    has mean zero. The estimates subtract as much of it as lowers their variance most: all of it
    where posteriors overlap, and none where they do not and the mutual information is :math:`\log
    N` without any noise.

    Arguments:
        vae: The VAE. It is evaluated in eval mode, on the device of its parameters.
        data: The data, see :func:`~pyro_vaediff.evaluate.in_batches`. All quantities are those of
            this set.
        c: The context, with shape :math:`(N, *)`. The KLs are then those to :math:`p(z_0 | c_n)`.
        log_prior: What :math:`\log p(z_0)` is for a diffusion prior: ``"chain"`` for the lower
            bound of :func:`chain_log_prob`, which makes the marginal and the total KL *upper
            bounds* (the total is the KL term of the ELBO as it is trained), or ``"flow"`` for the
            exact density of another model, that of the
            :class:`~pyro_vaediff.sampling.ProbabilityFlow`. Other priors have an exact
            density, and no use for this.
        num_samples: The number of latents of each datum, at least 2 for standard errors.
        elbo: The estimator of the chain's bound. By default, from 32 timesteps per latent.
        batch_size: The number of data that are evaluated at once.
        seed: The seed of dequantization and latents. The global generators are restored.
        progress: Whether to show a progress bar.
        flow_options: The options of the probability flow.

    Returns:
        The parts, with standard errors of the sampling of latents for the given data.

    Raises:
        ValueError: If an argument is out of range, or the posteriors are inverse autoregressive
            flows, which take too long to score others' samples.
    """
    check_choice("log_prior", log_prior, LOG_PRIORS)
    check_whole("num_samples", num_samples, least=2, why=" for standard errors")
    elbo = value_elbo() if elbo is None else elbo
    posteriors, columns, means, is_bound = [], [], [], False
    with evaluating(vae, seed):
        for x, c_x in in_batches(vae, data, c, batch_size, progress and "ELBO surgery"):
            q_z0 = posterior(vae, x, c_x)
            check_density(q_z0)
            z_0 = q_z0.sample((num_samples,))
            try:
                log_p = vae.prior.log_prob(z_0, c_x)
            except NotImplementedError:
                is_bound = log_prior == "chain"
                log_p = (
                    chain_log_prob(vae.prior, z_0, elbo, c_x)
                    if is_bound
                    else prior_log_prob(vae.prior, z_0, c_x, **flow_options)
                )
            q_z0, z_0 = in_float64(q_z0, z_0)
            posteriors.append(q_z0)
            log_q_x = q_z0.log_prob(z_0)
            parts = z_0, log_q_x, log_p, control(q_z0, log_q_x)
            # Data come first, so that batches can be joined.
            columns.append([part.transpose(0, 1) for part in parts])
            means.append(posterior_means(q_z0))
    z_0, log_q_x, log_p, noise = (torch.cat(parts) for parts in zip(*columns, strict=True))
    log_q = aggregate_log_prob(z_0.flatten(0, 1), posteriors).unflatten(0, log_p.shape)
    mean, error = (torch.cat(parts) for parts in zip(*means, strict=True))
    variances = mean.var(0, correction=0) - error.mean(0)
    return Surgery(
        mutual_information=estimate(log_q_x - log_q, noise),
        marginal_kl=estimate(log_q - log_p, noise),
        total_kl=estimate(log_q_x - log_p, noise),
        max_mutual_information=math.log(len(z_0)),
        active_units=int((variances > ACTIVE).sum()),
        mean_variances=variances.cpu(),
        is_bound=is_bound,
    )


def chain_log_prob(prior: Prior, z_0: Tensor, elbo: TermsELBO, c: Tensor | None = None) -> Tensor:
    r"""Returns estimates of a lower bound on :math:`\log p(z_0)` of a diffusion prior, in nats.

    .. math:: \log p(z_0) \geq E_{q(z_{1:T} | z_0)}\left[ \log \frac{p(z_{0:T})}{q(z_{1:T} | z_0)}
        \right]

    Arguments:
        prior: The prior.
        z_0: The latents, with shape :math:`(*, *\mathrm{event})`.
        elbo: The estimator, given :math:`z_0`. It is unbiased for the bound of each latent.
        c: The context, with shape :math:`(B, *)`, for the last dimension of the batch.

    Returns:
        The estimates, with shape :math:`(*)`.
    """
    check_bound(elbo)
    batch = z_0.shape[: z_0.ndim - prior.event_dim]
    flat = z_0.reshape(-1, *prior.event_shape)
    c = None if c is None else c.expand(batch + c.shape[1:]).flatten(0, len(batch) - 1)

    return estimates(elbo, *chain_programs(prior, flat, c)).reshape(batch)


def estimates(elbo: TermsELBO, model: Callable, guide: Callable) -> Tensor:
    r"""Returns an estimate of the bound of each datum, or of another objective."""
    terms = elbo_terms(model, guide, elbo=elbo).values()
    return -torch.stack([term.sum(0) if term.ndim > 1 else term for term in terms]).sum(0)


def chain_programs(
    prior: Prior, z_0: Tensor, c: Tensor | None = None
) -> tuple[Callable[[], None], Callable[[], None]]:
    r"""Returns a model and a guide of known latents, with shape :math:`(N, *\mathrm{event})`."""

    def model() -> None:
        with pyro.plate("data", len(z_0), dim=-1):
            prior.model(c)

    def guide() -> None:
        # A point mass: its log-density is zero, so it drops out of the bound.
        with pyro.plate("data", len(z_0), dim=-1):
            prior.guide(dist.Delta(z_0, event_dim=prior.event_dim), c)

    return model, guide


def in_float64(q: dist.TorchDistribution, z: Tensor) -> tuple[dist.TorchDistribution, Tensor]:
    r"""Returns a diagonal Gaussian and its values in float64, and any other one as they are."""
    normals = base_normal(q)
    if normals is None:
        return q, z
    shape = q.batch_shape + q.event_shape
    loc, scale = (x.expand(shape).double() for x in (normals.loc, normals.scale))
    return dist.Normal(loc, scale).to_event(len(q.event_shape)), z.double()


def control(q: dist.TorchDistribution, log_prob: Tensor) -> Tensor:
    r"""Returns a control variate: log-densities less their mean, or zero if it is not known."""
    try:
        return log_prob + q.entropy()
    except NotImplementedError:
        return torch.zeros_like(log_prob)


def estimate(values: Tensor, noise: Tensor) -> Estimate:
    r"""Returns the mean of values, less some of a control variate, and its standard error.

    Arguments:
        values: The values, with shape :math:`(N, S)`, of which only the samples are random.
        noise: The control variate of mean zero, with the same shape.
    """
    # Data are given, samples are not: only deviations within a datum are noise. Slopes are linear
    # in the values, so that the estimate of a sum is the sum of the estimates.
    values, noise = values.double(), noise.double()
    deviations = noise - noise.mean(1, keepdim=True)
    products, squares = (values * deviations).sum(1), deviations.square().sum(1)
    # A slope hides the noise of the values that it is fitted to. Hence the standard error is that
    # of slopes which are fitted to the other data.
    of_others = slope(products.sum() - products, squares.sum() - squares).unsqueeze(1)
    se = ((values - of_others * noise).var(1).mean() / values.numel()).sqrt()
    return Estimate(
        float((values - slope(products.sum(), squares.sum()) * noise).mean()), float(se)
    )


def slope(product: Tensor, square: Tensor) -> Tensor:
    return torch.where(square > 0, product / square, 0.0)
