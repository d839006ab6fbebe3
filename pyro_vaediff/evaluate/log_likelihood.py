r"""The likelihood :math:`\log p(x)` of images, by importance sampling of :math:`z_0` alone."""

from __future__ import annotations

import math

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ..arguments import check_whole
from ..priors import DiffusionPrior, Prior
from ..sampling.probability_flow import ProbabilityFlow
from ..vae import VAE
from .elbo import evaluating, in_batches

__all__ = ["importance_log_likelihood", "log_likelihood", "prior_log_prob"]


@torch.no_grad()
def prior_log_prob(prior: Prior, z_0: Tensor, **flow_options) -> Tensor:
    r"""Returns the exact log-density :math:`\log p(z_0)` of a prior, in nats.

    It is that of the site ``"z_0"`` if this is the prior's only one. A diffusion prior has it in
    its probability flow: see :class:`~pyro_vaediff.sampling.ProbabilityFlow`, a model of
    its own with the same denoiser.

    Arguments:
        prior: The prior.
        z_0: The latents, with shape :math:`(*, D)`.
        flow_options: The options of the probability flow, such as ``num_steps``. Priors other than
            diffusion priors have no use for them.

    Returns:
        The log-densities, with shape :math:`(*)`.

    Raises:
        ValueError: If the latents have another dimension, or the prior has other latent sites.

    Example:
        >>> from pyro_vaediff import GaussianPrior
        >>> prior_log_prob(GaussianPrior(2), torch.zeros(3, 2))
        tensor([-1.8379, -1.8379, -1.8379])
    """
    if z_0.shape[-1:] != (prior.latent_dim,):
        raise ValueError(
            f"z_0 must have shape (*, {prior.latent_dim}), as the prior has "
            f"latent_dim={prior.latent_dim}, got {tuple(z_0.shape)}"
        )
    if isinstance(prior, DiffusionPrior):
        return ProbabilityFlow(prior, **flow_options).log_prob(z_0)
    flat = z_0.reshape(-1, prior.latent_dim)
    model = poutine.condition(prior.model, data={"z_0": flat})
    # In a parameter store of its own: evaluation leaves nothing behind in the global one.
    with pyro.get_param_store().scope(), pyro.plate("data", len(flat), dim=-1):
        trace = poutine.trace(model).get_trace()
    others = ", ".join(trace.stochastic_nodes)
    if others or trace.observation_nodes != ["z_0"]:
        raise ValueError(
            f"prior must have 'z_0' as its only site for log p(z_0) to be known, but the model of "
            f"{type(prior).__name__} also samples {others or 'others'}: use the ELBO instead"
        )
    trace.compute_log_prob()
    return trace.nodes["z_0"]["log_prob"].reshape(z_0.shape[:-1])


@torch.no_grad()
def importance_log_likelihood(vae: VAE, x: Tensor, num_samples: int = 64, **flow_options) -> Tensor:
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
        x: The images as the likelihood sees them, with shape :math:`(B, C, H, W)`.
        num_samples: The number of samples :math:`K`.
        flow_options: The options of :func:`prior_log_prob`.

    Returns:
        The estimates, with shape :math:`(B,)`.

    References:
        | Importance Weighted Autoencoders (Burda et al., 2016)
        | https://arxiv.org/abs/1509.00519
    """
    check_whole("num_samples", num_samples)
    q_z0, total = vae.encode(x), None
    for _ in range(num_samples):
        z_0 = q_z0()  # as a sample site draws it
        log_weight = vae.decode(z_0).log_prob(x) - q_z0.log_prob(z_0)
        log_weight = log_weight + prior_log_prob(vae.prior, z_0, **flow_options)
        total = log_weight if total is None else torch.logaddexp(total, log_weight)
    return total - math.log(num_samples)


@torch.no_grad()
def log_likelihood(
    vae: VAE,
    images: Tensor,
    levels: int,
    num_samples: int = 64,
    *,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = False,
    **flow_options,
) -> Tensor:
    r"""Returns importance-weighted estimates of :math:`\log p(x)` of images, in nats per datum.

    See :func:`importance_log_likelihood`, also for what it means with a diffusion prior. If the
    likelihood is a density, so is :math:`p(x)`, at images that are dequantized as
    :func:`~pyro_vaediff.evaluate.evaluate` does it: from the same seed, and for its first batch
    with the same noise.

    Arguments:
        vae: The VAE. It is evaluated in eval mode, on the device of its parameters.
        images: The images, uint8 with shape :math:`(N, C, H, W)`.
        levels: The number of values of a pixel.
        num_samples: The number of samples :math:`K` of each image, one at a time.
        batch_size: The number of images that are evaluated at once. With ``chunk_size`` of the
            probability flow, it bounds the memory.
        seed: The seed of dequantization and latents. The global generators are restored.
        progress: Whether to show a progress bar.
        flow_options: The options of :func:`prior_log_prob`.

    Returns:
        The estimates, with shape :math:`(N,)`.
    """
    with evaluating(vae, seed) as device:
        progress = progress and "log-likelihood"
        return torch.cat(
            [
                importance_log_likelihood(vae, x, num_samples, **flow_options)
                for x in in_batches(vae, images, levels, batch_size, device, progress)
            ]
        )
