r"""The Gaussian algebra of the forward diffusion; each function returns a distribution.

The forward chain adds noise to :math:`z_0`,

.. math:: q(z_t | z_{t-1}) = \mathcal{N}(\sqrt{1 - \beta_t} \, z_{t-1}, \beta_t I),

and starts either at a known point :math:`z_0` or at a Gaussian :math:`q(z_0 | x) =
\mathcal{N}(m, s^2)`, such as an encoder returns. A point is a Gaussian with :math:`s = 0`, so that
one formula serves both. With :math:`m_t = \sqrt{\bar\alpha_t} \, m` and :math:`v_t =
\bar\alpha_t s^2 + 1 - \bar\alpha_t`,

.. math::
    q(z_t | \cdot) & = \mathcal{N}(m_t, v_t) \\
    q(z_{t-1} | z_t, \cdot) & = \mathcal{N}\left( m_{t-1} + \sqrt{\alpha_t}
        \frac{v_{t-1}}{v_t} (z_t - m_t), \; \frac{v_{t-1}}{v_t} \beta_t \right)

where the dot stands for :math:`z_0` or for :math:`x`.

A time is an index of the schedule's grid or a floating-point number in :math:`[0, 1]`, with the
batch shape of the latents, see :mod:`~pyro_vaediff.schedules`. From one time to *any* other,
:math:`s < t`, the same formulas hold with :math:`\beta_{t|s} = 1 - \bar\alpha_t / \bar\alpha_s`.
Latents have shape :math:`(*, \dots)`, where ``event_dim`` counts the dimensions of a single one.
"""

from __future__ import annotations

from typing import TypeAlias

import pyro.distributions as dist
import torch
from torch import Tensor

from .schedules import Schedule, Times

__all__ = [
    "base_normal",
    "gaussian_moments",
    "kl_normal",
    "normal",
    "q_marginal",
    "q_noise",
    "q_reverse",
    "q_reverse_moments",
    "q_step",
]

Start: TypeAlias = "Tensor | dist.TorchDistribution"


def normal(loc: Tensor, scale: Tensor, event_dim: int = 1) -> dist.Independent:
    r"""Returns :math:`\mathcal{N}(m, \mathrm{diag}(s^2))` over latents.

    Arguments:
        loc: The mean :math:`m`, with shape :math:`(*, \dots)`.
        scale: The standard deviation :math:`s`, which broadcasts with the mean.
        event_dim: The number of dimensions of a latent.
    """
    return dist.Normal(loc, scale).to_event(event_dim)


def gaussian_moments(start: Start) -> tuple[Tensor, Tensor]:
    r"""Returns the mean :math:`m` and variance :math:`s^2` at which the forward chain starts.

    Arguments:
        start: A point :math:`z_0`, with shape :math:`(*, D)`, or a distribution
            :math:`\mathcal{N}(m, s^2)` with diagonal covariance over such points.

    Raises:
        ValueError: If the distribution is not Gaussian.
    """
    if isinstance(start, Tensor):
        return start, start.new_zeros(())
    base = base_normal(start)
    if base is None:
        raise ValueError(
            f"q(z_t | x) is only known in closed form for a diagonal Gaussian encoder, got "
            f"{type(unwrap(start)).__name__}: use conditioning='z_0', or order='forward' or "
            "'posterior'"
        )
    return base.loc, base.scale.square()


def base_normal(fn: torch.distributions.Distribution) -> torch.distributions.Normal | None:
    r"""Returns the univariate normals that a diagonal Gaussian consists of.

    Arguments:
        fn: A distribution, such as ``Normal(loc, scale).to_event(1)``.

    Returns:
        The normals, whose parameters broadcast with the values of ``fn``, or ``None`` if ``fn`` is
        no diagonal Gaussian.
    """
    base = unwrap(fn)
    return base if isinstance(base, torch.distributions.Normal) else None


def kl_normal(q: torch.distributions.Normal, p: torch.distributions.Normal) -> Tensor:
    r"""Returns :math:`\mathrm{KL}(q \,\|\, p)` of univariate normals.

    .. math:: \frac{1}{2} \left( \frac{m_q - m_p}{s_p} \right)^2 + \frac{(r - 1)^2}{2} + (r - 1) -
        \log r, \qquad r = \frac{s_q}{s_p}

    The variances of a diffusion chain differ little. Here the rounding of :math:`r` has an effect
    of second order, while in :math:`r^2 - 1 - \log r^2` it would be all that is left in float32.

    Arguments:
        q: The first normals.
        p: The second ones, whose parameters broadcast with theirs.
    """
    r = q.scale / p.scale
    excess = r - 1
    difference = (q.loc - p.loc) / p.scale
    # What depends on the scales alone is often smaller than a latent, and is added in one pass.
    of_scales = excess.square() / 2 + (excess - r.log())
    return torch.addcmul(of_scales, difference, difference, value=0.5)


def unwrap(fn: torch.distributions.Distribution) -> torch.distributions.Distribution:
    while isinstance(fn, torch.distributions.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


def q_step(
    schedule: Schedule, z: Tensor, t: Times, s: Times | None = None, event_dim: int = 1
) -> dist.Independent:
    r"""Returns :math:`q(z_t | z_s)`, equation (9) of the paper for :math:`s = t - 1`.

    Arguments:
        schedule: The schedule.
        z: The latents :math:`z_s`.
        t: The time(s).
        s: The earlier time(s); by default, the step before an index.
        event_dim: The number of dimensions of a latent.
    """
    beta = schedule.beta(t, s, event_dim)
    return normal((1 - beta).sqrt() * z, beta.sqrt(), event_dim)


def q_marginal(schedule: Schedule, start: Start, t: Times, event_dim: int = 1) -> dist.Independent:
    r"""Returns :math:`q(z_t | z_0)` or :math:`q(z_t | x) = \mathcal{N}(m_t, v_t)`.

    Arguments:
        schedule: The schedule.
        start: The point :math:`z_0` or the Gaussian :math:`q(z_0 | x)`.
        t: The time(s).
        event_dim: The number of dimensions of a latent.

    Example:
        >>> schedule = Schedule(torch.tensor([0.36]))
        >>> q = q_marginal(schedule, torch.tensor([10.0]), t=1)
        >>> q.mean, q.stddev
        (tensor([8.]), tensor([0.6000]))
    """
    m, s2 = gaussian_moments(start)
    alpha_bar, one_minus = schedule.signal(t, event_dim)
    return normal(alpha_bar.sqrt() * m, (alpha_bar * s2 + one_minus).sqrt(), event_dim)


def q_reverse(
    schedule: Schedule,
    start: Start,
    z: Tensor,
    t: Times,
    s: Times | None = None,
    event_dim: int = 1,
) -> dist.Independent:
    r"""Returns :math:`q(z_s | z_t, z_0)` or :math:`q(z_s | z_t, x)`, with :math:`s = t - 1`.

    Given :math:`z_0` its variance is :math:`\tilde\beta_t`, and it is a point at :math:`s = 0`,
    where no density exists.

    Arguments:
        schedule: The schedule.
        start: The point :math:`z_0` or the Gaussian :math:`q(z_0 | x)`.
        z: The latents :math:`z_t`.
        t: The time(s).
        s: The earlier time(s), positive given a point; by default, the step before an index.
        event_dim: The number of dimensions of a latent.
    """
    loc, variance = q_reverse_moments(schedule, start, z, t, s, event_dim)
    return normal(loc, variance.sqrt(), event_dim)


def q_reverse_moments(
    schedule: Schedule,
    start: Start,
    z: Tensor,
    t: Times,
    s: Times | None = None,
    event_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""Returns the mean and the variance of :func:`q_reverse`."""
    m, s2 = gaussian_moments(start)
    beta = schedule.beta(t, s, event_dim)
    alpha_bar_t, one_minus_t = schedule.signal(t, event_dim)
    alpha_bar_s, one_minus_s = schedule.signal(t - 1 if s is None else s, event_dim)
    ratio = (alpha_bar_s * s2 + one_minus_s) / (alpha_bar_t * s2 + one_minus_t)
    gain = (1 - beta).sqrt() * ratio
    return alpha_bar_s.sqrt() * m + gain * (z - alpha_bar_t.sqrt() * m), ratio * beta


def q_noise(schedule: Schedule, start: Start, z: Tensor, t: Times, event_dim: int = 1) -> Tensor:
    r"""Returns the noise of latents, :math:`-\sqrt{1 - \bar\alpha_t}` times their score.

    .. math:: \epsilon_q = -\sqrt{1 - \bar\alpha_t} \, \nabla \log q(z_t | \cdot) =
        \sqrt{1 - \bar\alpha_t} \, \frac{z_t - m_t}{v_t}

    Given clean :math:`z_0` it is what was added, :math:`z_t = \sqrt{\bar\alpha_t} \, z_0 + \sqrt{1
    - \bar\alpha_t} \, \epsilon`, and given :math:`x` its mean, :math:`E[\epsilon | z_t, x]`. A step
    of length :math:`dt` has, to first order,

    .. math:: \mathrm{KL}(q(z_{t - dt} | z_t, \cdot) \,\|\, p(z_{t - dt} | z_t)) = -\tfrac{1}{2}
        \lambda'(t) \, \| \epsilon_q - \hat\epsilon(z_t) \|^2 \, dt .

    Arguments:
        schedule: The schedule.
        start: The point :math:`z_0` or the Gaussian :math:`q(z_0 | x)`.
        z: The latents :math:`z_t`.
        t: The time(s), positive.
        event_dim: The number of dimensions of a latent.

    References:
        | Variational Diffusion Models (Kingma et al., 2021), equation (17)
        | https://arxiv.org/abs/2107.00630
    """
    m, s2 = gaussian_moments(start)
    alpha_bar, one_minus = schedule.signal(t, event_dim)
    noise = schedule.ready(torch.sigmoid(-schedule.log_snr_at(t)), event_dim).to(one_minus)
    return noise.sqrt() * (z - alpha_bar.sqrt() * m) / (alpha_bar * s2 + one_minus)
