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
from dataclasses import dataclass
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..arguments import check_choice, check_whole
from ..diffusion import base_normal
from ..infer import Timestep_ELBO, elbo_terms
from ..priors import DiffusionPrior
from ..vae import VAE
from .elbo import evaluating, in_batches, value_elbo
from .log_likelihood import prior_log_prob

__all__ = ["Estimate", "Surgery", "aggregate_log_prob", "chain_log_prob", "elbo_surgery"]

LOG_PRIORS = ("chain", "flow")
ACTIVE = 0.01  # the threshold of Burda et al.
CHUNK = 2**22  # pairs of a latent and a component that are evaluated at once: 32 MiB in float64


class Estimate(NamedTuple):
    r"""A Monte Carlo estimate in nats, and its standard error given the images."""

    mean: float
    se: float


@dataclass(frozen=True)
class Surgery:
    r"""The parts of the KL term over :math:`N` images, in nats per datum."""

    #: :math:`I_q(n; z_0)`, the mutual information of the latents and the images' index.
    mutual_information: Estimate
    #: :math:`\mathrm{KL}(q(z_0) \,\|\, p(z_0))`, or an upper bound on it.
    marginal_kl: Estimate
    #: The sum of these two, the KL term of the ELBO.
    total_kl: Estimate
    #: :math:`\log N`, which :math:`I_q` cannot exceed: close to it, it says little about the model.
    max_mutual_information: float
    #: The number of latent dimensions whose posterior mean has a variance above 0.01.
    active_units: int
    #: The variances of :math:`E_q[z_0 | x_n]` over the images, with shape :math:`(D,)`.
    mean_variances: Tensor
    #: Whether the KLs are upper bounds, as :math:`\log p(z_0)` is that of a chain.
    is_bound: bool


@torch.no_grad()
def elbo_surgery(
    vae: VAE,
    images: Tensor,
    levels: int,
    *,
    log_prior: str = "chain",
    num_samples: int = 2,
    elbo: Timestep_ELBO | None = None,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = False,
    **flow_options,
) -> Surgery:
    r"""Estimates the mutual information and the marginal KL that the KL term consists of.

    The latents are samples of each :math:`q(z_0 | x_n)`, and :math:`\log q(z_0)` is exact. The
    entropy of :math:`q(z_0 | x_n)` is known, so that :math:`\log q(z_0 | x_n) + \mathrm{H}[q(z_0 |
    x_n)]` has mean zero. The estimates subtract as much of it as lowers their variance most: all
    of it where posteriors overlap, and none where they do not and the mutual information is
    :math:`\log N` without any noise.

    Arguments:
        vae: The VAE, with a diagonal Gaussian encoder. It is evaluated in eval mode, on the device
            of its parameters.
        images: The images, uint8 with shape :math:`(N, C, H, W)`. All quantities are those of this
            set.
        levels: The number of values of a pixel.
        log_prior: What :math:`\log p(z_0)` is for a diffusion prior: ``"chain"`` for the lower
            bound of :func:`chain_log_prob`, which makes the marginal and the total KL *upper
            bounds* (the total is the KL term of the ELBO as it is trained), or ``"flow"`` for the
            exact density of another model, that of the
            :class:`~pyro_vaediff.sampling.ProbabilityFlow`. Other priors have an exact
            density, and no use for this.
        num_samples: The number of latents of each image, at least 2 for standard errors.
        elbo: The estimator of the chain's bound. By default, from 32 timesteps per latent.
        batch_size: The number of images that are evaluated at once.
        seed: The seed of dequantization and latents. The global generators are restored.
        progress: Whether to show a progress bar.
        flow_options: The options of the probability flow.

    Returns:
        The parts, with standard errors of the sampling of latents for the given images.

    Raises:
        ValueError: If the encoder is not a diagonal Gaussian, or an argument is out of range.
    """
    check_choice("log_prior", log_prior, LOG_PRIORS)
    check_whole("num_samples", num_samples, least=2, why=" for standard errors")
    is_bound = isinstance(vae.prior, DiffusionPrior) and log_prior == "chain"
    elbo = value_elbo() if elbo is None else elbo
    columns: list[tuple[Tensor, ...]] = []
    with evaluating(vae, seed) as device:
        for x in in_batches(vae, images, levels, batch_size, device, progress and "ELBO surgery"):
            q_z0 = vae.encode(x)
            normals = base_normal(q_z0)
            if normals is None:
                raise ValueError(
                    f"vae.encoder must return a diagonal Gaussian, whose entropy is known, got "
                    f"{type(q_z0).__name__}: use Normal(loc, scale).to_event(1)"
                )
            z_0, shape = q_z0.sample((num_samples,)), q_z0.batch_shape + q_z0.event_shape
            flat = z_0.flatten(0, 1)
            log_p = (
                chain_log_prob(vae.prior, flat, elbo)
                if is_bound
                else prior_log_prob(vae.prior, flat, **flow_options)
            )
            # Images come first, so that batches can be joined.
            columns.append(
                (
                    normals.loc.expand(shape).double(),
                    normals.scale.expand(shape).double(),
                    z_0.transpose(0, 1).double(),
                    log_p.unflatten(0, (num_samples, len(x))).mT.double(),
                )
            )
    loc, scale, z_0, log_p = (torch.cat(parts) for parts in zip(*columns, strict=True))

    log_q = aggregate_log_prob(z_0.flatten(0, 1), loc, scale).unflatten(0, log_p.shape)
    posterior = dist.Normal(loc, scale).to_event(1)
    log_q_x = posterior.log_prob(z_0.transpose(0, 1)).mT
    control = log_q_x + posterior.entropy().unsqueeze(-1)
    variances = loc.var(0, correction=0)
    return Surgery(
        mutual_information=estimate(log_q_x - log_q, control),
        marginal_kl=estimate(log_q - log_p, control),
        total_kl=estimate(log_q_x - log_p, control),
        max_mutual_information=math.log(len(images)),
        active_units=int((variances > ACTIVE).sum()),
        mean_variances=variances.cpu(),
        is_bound=is_bound,
    )


def chain_log_prob(prior: DiffusionPrior, z_0: Tensor, elbo: Timestep_ELBO) -> Tensor:
    r"""Estimates a lower bound on :math:`\log p(z_0)` of the chain of a diffusion prior, in nats.

    .. math:: \log p(z_0) \geq E_{q(z_{1:T} | z_0)}\left[ \log \frac{p(z_{0:T})}{q(z_{1:T} | z_0)}
        \right]

    Arguments:
        prior: The prior.
        z_0: The latents, with shape :math:`(B, D)`.
        elbo: The estimator, given :math:`z_0`. It is unbiased for the bound of each latent.

    Returns:
        The estimates, with shape :math:`(B,)`.
    """

    def model() -> None:
        with pyro.plate("data", len(z_0), dim=-1):
            prior.model()

    def guide() -> None:
        # An encoder that is sure: its density is 1 by convention, and no part of the bound.
        with pyro.plate("data", len(z_0), dim=-1):
            prior.guide(dist.Delta(z_0, event_dim=1))

    terms = elbo_terms(model, guide, elbo=elbo)
    return -sum(term.sum(0) if term.ndim > 1 else term for term in terms.values())


def aggregate_log_prob(z_0: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    r"""Returns the log-density of an equal mixture of diagonal Gaussians.

    Arguments:
        z_0: The points, with shape :math:`(M, D)`, best in float64.
        loc: The means of the components, with shape :math:`(N, D)`.
        scale: Their standard deviations, with the same shape.

    Returns:
        The log-densities in nats, with shape :math:`(M,)`. The memory does not depend on :math:`M`.

    Example:
        >>> loc, scale = torch.zeros(3, 2), torch.ones(3, 2)
        >>> aggregate_log_prob(torch.zeros(1, 2), loc, scale)
        tensor([-1.8379])
    """
    # The square of (z - m) / s as products of matrices, about the centre for the sake of digits.
    centre = loc.mean(0)
    z_0, loc, precision = z_0 - centre, loc - centre, scale.square().reciprocal()
    constant = (loc.square() * precision / 2 + scale.log() + math.log(2 * math.pi) / 2).sum(-1)
    linear = (loc * precision).mT
    chunks = [
        torch.logsumexp(z @ linear - z.square() @ (precision.mT / 2) - constant, dim=-1)
        for z in z_0.split(max(1, CHUNK // len(loc)))
    ]
    return torch.cat(chunks) - math.log(len(loc))


def estimate(values: Tensor, control: Tensor) -> Estimate:
    r"""Returns the mean of values with shape (N, S), given a control variate of mean zero."""
    # Images are given, samples are not: only deviations within an image are noise. Slopes are
    # linear in the values, so that the estimate of a sum is the sum of the estimates.
    deviations = control - control.mean(1, keepdim=True)
    slope = (values * deviations).sum() / deviations.square().sum()
    values = values - slope * control
    se = (values.var(1).mean() / values.numel()).sqrt()
    return Estimate(float(values.mean()), float(se))
