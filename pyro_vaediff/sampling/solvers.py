r"""Samplers of a diffusion prior that only read :math:`E[z_0 | z_t]` off its denoiser.

Without noise, they solve the differential equation of the probability flow, whose exact solution
takes :math:`z_T \sim \mathcal{N}(0, I)` to a sample. In the log-SNR :math:`\lambda`, with
:math:`\alpha^2 = \bar\alpha = \mathrm{sigmoid}(\lambda)` and :math:`\sigma^2 = 1 - \bar\alpha`, it
is linear but for the denoiser,

.. math:: \frac{d}{d \lambda} \frac{z}{\sigma} = \frac{1}{2} \frac{\alpha}{\sigma}
    \hat z_0(z, \lambda), \qquad \hat z_0(z_t, \lambda_t) = E[z_0 | z_t] .

A step goes from a time to an earlier one, :math:`t \to s`, on the grid of the prior or another one,
see :mod:`~pyro_vaediff.sampling.grids`. It evaluates the network once, but twice for :func:`heun`.
Where the log-SNR is infinite at :math:`t = 0`, the last step ends at clean latents: nothing is left
of their noise, while the program's last step adds its own. Where the chain starts at a finite
log-SNR, the last step is like the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_choice, check_whole
from ..priors import DiffusionPrior, Prior
from .grids import GRIDS

__all__ = ["ddim", "dpm_solver", "heun"]


@torch.no_grad()
def ddim(
    prior: DiffusionPrior,
    num_samples: int,
    num_steps: int | None = 50,
    eta: float = 0.0,
    c: Tensor | None = None,
    grid: str = "time",
) -> Tensor:
    r"""Returns samples of :math:`z_0` by a method of first order, with or without noise (DDIM).

    .. math:: z_s = \sqrt{\bar\alpha_s} \, \hat z_0 + \sqrt{1 - \bar\alpha_s - \varsigma^2} \,
        \hat\epsilon + \varsigma \, \xi, \qquad \varsigma^2 = \eta^2 \,
        \frac{1 - \bar\alpha_s}{1 - \bar\alpha_t} \left(1 - \frac{\bar\alpha_t}{\bar\alpha_s}\right)

    Arguments:
        prior: The prior.
        num_samples: The number of samples :math:`N`.
        num_steps: The number of steps, or ``None`` for those of the prior's own grid.
        eta: The stochasticity :math:`\eta`: 0 is deterministic given :math:`z_T`, and 1 is the
            ancestral sampler with variances :math:`\tilde\beta`.
        c: The context, with shape :math:`(N, *)`.
        grid: Where the steps are, one of :data:`~pyro_vaediff.sampling.grids.GRIDS`.

    Returns:
        The latents, with shape :math:`(N, *\mathrm{event})`.

    References:
        | Denoising Diffusion Implicit Models (Song et al., 2021), equation (12)
        | https://arxiv.org/abs/2010.02502
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    prior, z, log_snr = begin(prior, num_samples, num_steps, grid)
    signal, noise = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
    variance = eta**2 * noise[:-1] / noise[1:] * (1 - signal[1:] / signal[:-1])
    rest = (noise[:-1] - variance).clamp(min=0)
    alpha, sigma, rest, fresh = (x.sqrt().to(z) for x in (signal, noise, rest, variance))
    for t in range(prior.num_timesteps, 0, -1):
        s, z_0 = t - 1, prior.denoise(z, t, c)
        eps = (z - alpha[t] * z_0) / sigma[t]
        z = alpha[s] * z_0 + rest[s] * eps
        if eta > 0:
            z = z + fresh[s] * torch.randn_like(z)
    return z


@torch.no_grad()
def heun(
    prior: DiffusionPrior,
    num_samples: int,
    num_steps: int | None = 25,
    c: Tensor | None = None,
    grid: str = "time",
) -> Tensor:
    r"""Returns samples of :math:`z_0` by Heun's method, the explicit trapezoidal rule.

    In the time :math:`u = \operatorname{arsinh}(\sigma / \alpha)` the flow has the velocity

    .. math:: v(z, t) = \frac{dz}{du} = \frac{\alpha_t}{\sigma_t} \left( \alpha_t z -
        \hat z_0(z, t) \right),

    which is zero for a prior :math:`\mathcal{N}(0, I)`, and a step is

    .. math:: z_s = z_t + h \, \frac{v(z_t, t) + v(\tilde z_s, s)}{2}, \qquad \tilde z_s =
        z_t + h \, v(z_t, t), \qquad h = u_s - u_t .

    The last one, to clean latents, is :math:`\tilde z_0`. With :math:`n` steps there are :math:`2 n
    - 1` evaluations of the network, and :math:`2 n` if the chain starts at a finite log-SNR.

    Arguments:
        prior: The prior.
        num_samples: The number of samples :math:`N`.
        num_steps: The number of steps, or ``None`` for those of the prior's own grid.
        c: The context, with shape :math:`(N, *)`.
        grid: Where the steps are, one of :data:`~pyro_vaediff.sampling.grids.GRIDS`.

    Returns:
        The latents, with shape :math:`(N, *\mathrm{event})`.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
          algorithm 1, in another time
        | https://arxiv.org/abs/2206.00364
    """
    prior, z, log_snr = begin(prior, num_samples, num_steps, grid)
    alpha, ratio = torch.sigmoid(log_snr).sqrt(), torch.exp(-log_snr / 2)
    first, last = prior.schedule.start, int(log_snr[0].isinf().all())
    alpha, ratio, h = (x.to(z) for x in (alpha, ratio, -ratio.asinh().diff(dim=0)))

    def velocity(z: Tensor, t: int) -> Tensor:
        # A chain that starts on the path has no step to its start, but a time there.
        return (alpha[t] * z - prior.denoise(z, t or first, c)) / ratio[t]

    for t in range(prior.num_timesteps, 0, -1):
        s, v = t - 1, velocity(z, t)
        z_s = z + h[s] * v
        if s >= last:
            z_s = z + h[s] * (v + velocity(z_s, s)) / 2
        z = z_s
    return z


@torch.no_grad()
def dpm_solver(
    prior: DiffusionPrior,
    num_samples: int,
    num_steps: int | None = 25,
    c: Tensor | None = None,
    grid: str = "time",
) -> Tensor:
    r"""Returns samples of :math:`z_0` by the multistep method of second order DPM-Solver++(2M).

    .. math:: z_s = \frac{\sigma_s}{\sigma_t} z_t - \alpha_s \left( e^{-h} - 1 \right) \left(
        \hat z_0(z_t, t) + \frac{h}{2 h'} \left( \hat z_0(z_t, t) - \hat z_0(z_{t'}, t') \right)
        \right), \qquad h = \frac{\lambda_s - \lambda_t}{2},

    where :math:`t'` and :math:`h'` are those of the step before. The first step and the last one to
    clean latents, :math:`z_0 = \hat z_0(z_t, t)`, are of first order.

    Arguments:
        prior: The prior.
        num_samples: The number of samples :math:`N`.
        num_steps: The number of steps, or ``None`` for those of the prior's own grid.
        c: The context, with shape :math:`(N, *)`.
        grid: Where the steps are, one of :data:`~pyro_vaediff.sampling.grids.GRIDS`.

    Returns:
        The latents, with shape :math:`(N, *\mathrm{event})`.

    References:
        | DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models
          (Lu et al., 2022), algorithm 2
        | https://arxiv.org/abs/2211.01095
    """
    prior, z, log_snr = begin(prior, num_samples, num_steps, grid)
    alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    h = -log_snr.diff(dim=0) / 2
    shrink, gain = sigma[:-1] / sigma[1:], -alpha[:-1] * torch.expm1(-h)
    ahead = (h[:-1] / (2 * h[1:])).nan_to_num(posinf=0.0)  # not of a step to clean latents
    shrink, gain, ahead = (x.to(z) for x in (shrink, gain, ahead))
    previous = None
    for t in range(prior.num_timesteps, 0, -1):
        s, z_0 = t - 1, prior.denoise(z, t, c)
        estimate = z_0 if previous is None else z_0 + ahead[s] * (z_0 - previous)
        z = shrink[s] * z + gain[s] * estimate
        previous = z_0
    return z


def begin(
    prior: Prior, num_samples: int, num_steps: int | None, grid: str
) -> tuple[DiffusionPrior, Tensor, Tensor]:
    r"""Returns the prior on a grid, samples of :math:`z_T`, and the log-SNR in float64."""
    check_whole("num_samples", num_samples)
    prior = on_grid(prior, num_steps, grid)
    z_T = prior.standard_normal().expand([num_samples]).sample()
    return prior, z_T, prior.schedule.original("log_snr")


def on_grid(prior: Prior, num_steps: int | None, grid: str) -> DiffusionPrior:
    r"""Returns the prior with other steps, or as it is for ``None``."""
    prior = check_diffusion(prior)
    check_choice("grid", grid, GRIDS)
    return prior if num_steps is None else prior.with_steps(GRIDS[grid](prior, num_steps))


def check_diffusion(prior: Prior) -> DiffusionPrior:
    if not isinstance(prior, DiffusionPrior):
        raise ValueError(
            f"prior must be a DiffusionPrior, got {type(prior).__name__}: use sample without "
            "options and log_prob"
        )
    return prior
