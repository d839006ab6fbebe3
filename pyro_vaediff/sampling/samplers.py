r"""Samples of priors and of VAEs."""

from __future__ import annotations

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from ..arguments import check_whole
from ..priors import DiffusionPrior, HierarchicalPrior, Prior
from ..vae import VAE, call, posterior

__all__ = ["ddim", "interpolate", "point", "reconstruct", "sample", "trajectory"]


def point(p: dist.TorchDistribution) -> Tensor:
    r"""Returns the mean of a distribution, or else its mode, or else a sample.

    Arguments:
        p: The distribution.

    Example:
        >>> point(dist.Normal(1.0, 2.0))
        tensor(1.)
    """
    for name in ("mean", "mode"):
        try:
            return getattr(p, name)
        except NotImplementedError:
            pass
    return p.sample()


@torch.no_grad()
def sample(prior: Prior, num_samples: int, c: Tensor | None = None) -> Tensor:
    r"""Returns samples of :math:`p(z_0)` from the prior's program (ancestral sampling).

    Arguments:
        prior: The prior.
        num_samples: The number of samples :math:`N`.
        c: The context, with shape :math:`(N, *)`.

    Returns:
        The latents, with shape :math:`(N, *\mathrm{event})`.
    """
    check_whole("num_samples", num_samples)
    # In a parameter store of its own: sampling leaves nothing behind in the global one.
    with pyro.get_param_store().scope(), pyro.plate("samples", num_samples):
        return prior.model(c)


@torch.no_grad()
def trajectory(
    prior: DiffusionPrior, num_samples: int, num_frames: int = 9, c: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Returns frames of sampled chains :math:`z_T \to \dots \to z_0`.

    Arguments:
        prior: The prior.
        num_samples: The number of chains :math:`N`.
        num_frames: The number of frames :math:`F` from :math:`T` to 0, ends included.
        c: The context, with shape :math:`(N, *)`.

    Returns:
        The times of the frames, with shape :math:`(F,)`, and the latents, with shape
        :math:`(F, N, *\mathrm{event})`. There are fewer frames if the chain is shorter.
    """
    prior = check_diffusion(prior)
    check_whole("num_samples", num_samples)
    check_whole("num_frames", num_frames, least=2)
    with pyro.get_param_store().scope(), pyro.plate("samples", num_samples):
        trace = poutine.trace(prior.model).get_trace(c)
    T = prior.num_timesteps
    times = torch.linspace(T, 0, min(num_frames, T + 1)).round().long()
    frames: list[Any] = [trace.nodes[f"z_{t}"]["value"] for t in times.tolist()]
    return times, torch.stack(frames)


@torch.no_grad()
def ddim(
    prior: DiffusionPrior,
    num_samples: int,
    num_steps: int = 50,
    eta: float = 0.0,
    c: Tensor | None = None,
) -> Tensor:
    r"""Returns samples of :math:`z_0` in fewer steps than the chain has (DDIM).

    .. math:: z_s = \sqrt{\bar\alpha_s} \, \hat z_0 + \sqrt{1 - \bar\alpha_s - \varsigma^2} \,
        \hat\epsilon + \varsigma \, \xi, \qquad \varsigma^2 = \eta^2 \,
        \frac{1 - \bar\alpha_s}{1 - \bar\alpha_t} \left(1 - \frac{\bar\alpha_t}{\bar\alpha_s}\right)

    Arguments:
        prior: The prior.
        num_samples: The number of samples :math:`N`.
        num_steps: The number of steps, at most :math:`T`.
        eta: The stochasticity :math:`\eta`: 0 is deterministic given :math:`z_T`, and 1 with all
            :math:`T` steps is the ancestral sampler with variances :math:`\tilde\beta_t`.
        c: The context, with shape :math:`(N, *)`.

    Returns:
        The latents, with shape :math:`(N, *\mathrm{event})`.

    References:
        | Denoising Diffusion Implicit Models (Song et al., 2021), equation (12)
        | https://arxiv.org/abs/2010.02502
    """
    prior = check_diffusion(prior)
    check_whole("num_samples", num_samples)
    T = prior.num_timesteps
    if num_steps not in range(1, T + 1):
        raise ValueError(f"num_steps must be between 1 and T = {T}, got {num_steps}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    z = prior.standard_normal().expand([num_samples]).sample()
    times = torch.linspace(T, 0, num_steps + 1).round().long().tolist()
    log_snr = prior.schedule.log_snr
    signal, noise = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
    for t, s in itertools.pairwise(times):
        z_0 = prior.denoise(z, t, c)
        eps = (z - signal[t].sqrt() * z_0) / noise[t].sqrt()
        variance = eta**2 * noise[s] / noise[t] * (1 - signal[t] / signal[s])
        z = signal[s].sqrt() * z_0 + (noise[s] - variance).clamp(min=0).sqrt() * eps
        if eta > 0:
            z = z + variance.sqrt() * torch.randn_like(z)
    return z


@torch.no_grad()
def reconstruct(
    vae: VAE, x: Tensor, c: Tensor | None = None, num_groups: int | None = None
) -> Tensor:
    r"""Returns the :func:`point` of :math:`p(x | z_0)` at that of :math:`q(z_0 | x)`: the means.

    Arguments:
        vae: The VAE.
        x: The data, with shape :math:`(B, *)`.
        c: The context, with shape :math:`(B, *)`.
        num_groups: For a :class:`~pyro_vaediff.priors.HierarchicalPrior`, the number of groups from
            the top that are those of the data, where the others are drawn; all by default.

    Returns:
        The reconstructions, with the shape of ``x``.

    Raises:
        ValueError: If there are not so many groups.
    """
    q = call(vae.encoder, x, c)
    if num_groups is not None and not isinstance(vae.prior, HierarchicalPrior):
        raise ValueError(
            f"num_groups is for a HierarchicalPrior, got {num_groups} and a "
            f"{type(vae.prior).__name__}: leave it out"
        )
    if isinstance(vae.prior, HierarchicalPrior):
        with pyro.get_param_store().scope():
            z_0 = vae.prior.reconstruct(q, num_groups, c)
    else:
        z_0 = point(q)
    return point(call(vae.decoder, z_0, c))


@torch.no_grad()
def interpolate(
    vae: VAE, x: Tensor, y: Tensor, num_frames: int = 8, c: Tensor | None = None
) -> Tensor:
    r"""Returns what is decoded on the line between the posterior means of two batches of data.

    Arguments:
        vae: The VAE.
        x: The data at one end, with shape :math:`(B, *)`.
        y: The data at the other end, with the same shape.
        num_frames: The number of frames :math:`F`, ends included.
        c: The context of both ends, with shape :math:`(B, *)`.

    Returns:
        The frames, with shape :math:`(F, B, *)`.
    """
    check_whole("num_frames", num_frames, least=2)
    if x.shape != y.shape:
        raise ValueError(f"y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    start, end = (point(posterior(vae, v, c)) for v in (x, y))
    weights = torch.linspace(0, 1, num_frames, dtype=start.dtype, device=start.device)
    z_0 = torch.lerp(start, end, weights.reshape(-1, *[1] * start.ndim)).flatten(0, 1)
    c = None if c is None else c.repeat(num_frames, *[1] * (c.ndim - 1))
    return point(call(vae.decoder, z_0, c)).unflatten(0, (num_frames, len(x)))


def check_diffusion(prior: Prior) -> DiffusionPrior:
    r"""Returns the chain of a prior, if it is a diffusion prior."""
    if not isinstance(prior, DiffusionPrior):
        raise ValueError(
            f"prior must be a DiffusionPrior, got {type(prior).__name__}: use sample and log_prob"
        )
    return prior.chain
