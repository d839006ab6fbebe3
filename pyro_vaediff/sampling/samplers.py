r"""Samples of priors and of VAEs."""

from __future__ import annotations

import itertools

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ..arguments import check_whole
from ..priors import DiffusionPrior, Prior
from ..schedules import at_time
from ..vae import VAE

__all__ = ["ddim", "interpolate", "reconstruct", "sample", "trajectory"]


@torch.no_grad()
def sample(prior: Prior, num_samples: int) -> Tensor:
    r"""Samples :math:`z_0 \sim p(z_0)` by running the prior's program (ancestral sampling).

    Arguments:
        prior: The prior.
        num_samples: The number of samples :math:`N`.

    Returns:
        The latents, with shape :math:`(N, D)`.
    """
    check_num_samples(num_samples)
    # In a parameter store of its own: sampling leaves nothing behind in the global one.
    with pyro.get_param_store().scope(), pyro.plate("samples", num_samples):
        return prior.model()


@torch.no_grad()
def trajectory(
    prior: DiffusionPrior, num_samples: int, num_frames: int = 9
) -> tuple[Tensor, Tensor]:
    r"""Samples a chain :math:`z_T \to \dots \to z_0` and returns frames of it.

    Arguments:
        prior: The prior.
        num_samples: The number of chains :math:`N`.
        num_frames: The number of frames :math:`F` from :math:`T` to 0, ends included.

    Returns:
        The times of the frames, with shape :math:`(F,)`, and the latents, with shape
        :math:`(F, N, D)`. There are fewer frames if the chain is shorter.
    """
    check_diffusion(prior)
    check_num_samples(num_samples)
    check_num_frames(num_frames)
    with pyro.get_param_store().scope(), pyro.plate("samples", num_samples):
        trace = poutine.trace(prior.model).get_trace()
    T = prior.num_timesteps
    times = torch.linspace(T, 0, min(num_frames, T + 1)).round().long()
    return times, torch.stack([trace.nodes[f"z_{t}"]["value"] for t in times.tolist()])


@torch.no_grad()
def ddim(prior: DiffusionPrior, num_samples: int, num_steps: int = 50, eta: float = 0.0) -> Tensor:
    r"""Samples :math:`z_0` in fewer steps than the chain has (DDIM).

    .. math:: z_s = \sqrt{\bar\alpha_s} \, \hat z_0 + \sqrt{1 - \bar\alpha_s - \varsigma^2} \,
        \hat\epsilon + \varsigma \, \xi, \qquad \varsigma^2 = \eta^2 \,
        \frac{1 - \bar\alpha_s}{1 - \bar\alpha_t} \left(1 - \frac{\bar\alpha_t}{\bar\alpha_s}\right)

    Arguments:
        prior: The prior.
        num_samples: The number of samples :math:`N`.
        num_steps: The number of steps, at most :math:`T`.
        eta: The stochasticity :math:`\eta`: 0 is deterministic given :math:`z_T`, and 1 with all
            :math:`T` steps is the ancestral sampler with variances :math:`\tilde\beta_t`.

    Returns:
        The latents, with shape :math:`(N, D)`.

    References:
        | Denoising Diffusion Implicit Models (Song et al., 2021), equation (12)
        | https://arxiv.org/abs/2010.02502
    """
    check_diffusion(prior)
    check_num_samples(num_samples)
    T = prior.num_timesteps
    if num_steps not in range(1, T + 1):
        raise ValueError(f"num_steps must be between 1 and T = {T}, got {num_steps}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")

    z = prior.standard_normal().expand([num_samples]).sample()
    times = torch.linspace(T, 0, num_steps + 1).round().long().tolist()
    schedule = prior.schedule
    for t, s in itertools.pairwise(times):
        z_0 = prior.denoise(z, t)
        alpha_bar_t, alpha_bar_s = (at_time(schedule.alphas_cumprod, u) for u in (t, s))
        one_minus_t, one_minus_s = (at_time(schedule.one_minus_alphas_cumprod, u) for u in (t, s))
        eps = (z - alpha_bar_t.sqrt() * z_0) / one_minus_t.sqrt()
        variance = eta**2 * one_minus_s / one_minus_t * (1 - alpha_bar_t / alpha_bar_s)
        noise = variance.sqrt() * torch.randn_like(z) if eta > 0 else 0.0
        z = alpha_bar_s.sqrt() * z_0 + (one_minus_s - variance).clamp(min=0).sqrt() * eps + noise
    return z


@torch.no_grad()
def reconstruct(vae: VAE, x: Tensor) -> Tensor:
    r"""Returns the expected images at the mean of :math:`q(z_0 | x)`.

    Arguments:
        vae: The VAE.
        x: The images, with shape :math:`(B, C, H, W)`.

    Returns:
        The reconstructions, with the same shape.
    """
    return vae.decode(vae.encode(x).mean).mean


@torch.no_grad()
def interpolate(vae: VAE, x: Tensor, y: Tensor, num_frames: int = 8) -> Tensor:
    r"""Decodes the line between the posterior means of two batches of images.

    Arguments:
        vae: The VAE.
        x: The images at one end, with shape :math:`(B, C, H, W)`.
        y: The images at the other end, with the same shape.
        num_frames: The number of frames :math:`F`, ends included.

    Returns:
        The images, with shape :math:`(F, B, C, H, W)`.
    """
    check_num_frames(num_frames)
    if x.shape != y.shape:
        raise ValueError(f"y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    start, end = vae.encode(x).mean, vae.encode(y).mean
    weights = torch.linspace(0, 1, num_frames, dtype=start.dtype, device=start.device)
    return vae.decode(torch.lerp(start, end, weights[:, None, None])).mean


def check_diffusion(prior: Prior) -> None:
    if not isinstance(prior, DiffusionPrior):
        raise ValueError(f"prior must be a DiffusionPrior, got {type(prior).__name__}: use sample")


def check_num_samples(num_samples: int) -> None:
    check_whole("num_samples", num_samples)


def check_num_frames(num_frames: int) -> None:
    check_whole("num_frames", num_frames, least=2)
