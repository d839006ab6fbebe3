r"""Losses that are mistaken for estimators of a bound, and by how much they are off."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from pyro_vaediff.diffusion import gaussian_moments
from pyro_vaediff.infer import Timestep_ELBO
from pyro_vaediff.priors import DiffusionPrior
from pyro_vaediff.schedules import at_time
from pyro_vaediff.vae import VAE

__all__ = ["NoisyIWAE", "log_mean_exp_bias", "mean_field_bias"]


class NoisyIWAE(Timestep_ELBO):
    r"""The log-mean-exp of noisy estimates of :math:`\log p(x, z) - \log q(z | x)`.

    .. math:: -\log \frac{1}{K} \sum_{k=1}^K \exp \hat{w}_k, \qquad E[\hat{w}_k] = \mathrm{ELBO}

    It looks like the loss of an importance-weighted autoencoder. But only the exponential of the
    log-weight itself has the expectation :math:`p(x)`. That of an estimate of it may have a larger
    one, and the noisier the estimate, the larger: it is **no bound** on :math:`\log p(x)`. The
    number of particles is :math:`K`.
    """

    def terms(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        r"""Returns the loss, whose logarithm has no terms, summed over the data."""
        log_weights = torch.stack(self.log_weights(model, guide, *args, **kwargs))
        bounds = torch.logsumexp(log_weights, dim=0) - math.log(self.num_particles)
        return {"-log-mean-exp": -bounds.sum()}

    def log_weights(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> list[Tensor]:
        r"""Returns the estimates :math:`\hat w_k`, each with shape :math:`(B,)`."""
        return [
            -reduce(add, (v.flatten(0, -2).sum(0) if v.ndim > 1 else v for _, v, *_ in terms))
            for terms in self.particles(model, guide, *args, **kwargs)
        ]


@torch.no_grad()
def log_mean_exp_bias(
    elbo: NoisyIWAE, vae: VAE, x: Tensor, draws: int, repeats: int = 200
) -> float:
    r"""Predicts the loss of :class:`NoisyIWAE` from the distribution of its single estimates.

    The log-mean-exp of :math:`K` estimates drawn from an empirical distribution per datum, minus
    their mean: in nats per datum, negative if the loss is below the negative ELBO.

    Arguments:
        elbo: The estimator.
        vae: The VAE.
        x: The data, with shape :math:`(B, *)`.
        draws: The number of times that the estimator draws its :math:`K` estimates.
        repeats: The number of times that :math:`K` of all these are drawn with replacement.
    """
    pool = torch.stack([w for _ in range(draws) for w in elbo.log_weights(vae.model, vae.guide, x)])
    index = torch.randint(len(pool), (repeats, elbo.num_particles, len(x)), device=pool.device)
    means = pool.gather(0, index.flatten(0, 1)).unflatten(0, index.shape[:2])
    bounds = torch.logsumexp(means, dim=1) - math.log(elbo.num_particles)
    return (pool.mean() - bounds.mean()).item()


@torch.no_grad()
def mean_field_bias(
    vae: VAE, x: Tensor, order: str, draws: int = 1, chunk_size: int = 64
) -> Tensor:
    r"""Predicts what ``TraceMeanField_ELBO`` adds to the loss at the sites where it is illegal.

    It averages :math:`\|z_{t-1} - \mu_\phi(z_t, t)\|^2 / 2 \sigma_t^2` as if both were independent
    given the guide's parents of :math:`z_{t-1}`, and thereby loses

    .. math:: \sum_t E\left[ \mathrm{Cov}(z_{t-1}, \mu_\phi(z_t, t)) \right] / \sigma_t^2

    where the sum is over :math:`t = 1, \dots, T` in the ``forward`` order, over :math:`t = 1` in
    the ``posterior`` order, and empty in the ``reversed`` one.

    Arguments:
        vae: A VAE with a diffusion prior of fixed variance and a Gaussian encoder.
        x: The data, with shape :math:`(B, *)`.
        order: The order of the guide.
        draws: The number of Monte-Carlo draws.
        chunk_size: The number of timesteps that are evaluated at once.

    Returns:
        The bias of the loss in nats per datum, one value per draw.

    Raises:
        ValueError: If the reverse variance is learned, or the prior is a hierarchy.
    """
    prior = vae.prior
    if not isinstance(prior, DiffusionPrior) or prior.schedule.learned:
        raise ValueError(
            "the bias is predicted for a single diffusion prior with a fixed schedule, got a "
            f"{type(prior).__name__}"
        )
    if not prior.denoiser.variance.fixed:
        raise ValueError("the bias is known for a fixed reverse variance, got a learned one")
    schedule, kernel, n = prior.schedule, prior.denoiser.kernel, prior.event_dim
    m, s2 = gaussian_moments(vae.encoder(x))
    last = {"forward": prior.num_timesteps, "posterior": 1, "reversed": 0}[order]

    betas, alphas_cumprod = schedule.betas, schedule.alphas_cumprod
    one_minus, alphas = schedule.one_minus_alphas_cumprod, schedule.alphas

    def noise(variance: Tensor, count: int = 1) -> Tensor:
        shape = (count, *m.shape)
        return variance.sqrt() * torch.randn(shape, dtype=m.dtype, device=m.device)

    def covariance(mean: Tensor, deviation: Tensor, t: Tensor) -> float:
        # What mu has in common for both signs of the deviation is noise without it.
        step = noise(at_time(betas, t, n), len(t))
        up, down = (
            prior.reverse(at_time(alphas, t, n).sqrt() * (mean + z) + step, t).mean
            for z in (deviation, -deviation)
        )
        products = deviation * (up - down) / (2 * at_time(kernel.sigmas, t, n).square())
        return products.sum().item() / len(x)

    def draw() -> float:
        if last == 0:
            return 0.0
        total = covariance(m, noise(s2), torch.ones(1, 1, dtype=torch.long, device=x.device))
        for t in torch.arange(2, last + 1, device=x.device).split(chunk_size):
            t = t.unsqueeze(-1)
            # To z_{t-2}, which is z_0 at t = 2, and from there to the mean of z_{t-1}.
            z = at_time(alphas_cumprod, t - 2, n).sqrt() * (m + noise(s2, len(t)))
            z = z + noise(at_time(one_minus, t - 2, n), len(t))
            mean = at_time(alphas, t - 1, n).sqrt() * z
            total += covariance(mean, noise(at_time(betas, t - 1, n), len(t)), t)
        return total

    return torch.tensor([draw() for _ in range(draws)])
