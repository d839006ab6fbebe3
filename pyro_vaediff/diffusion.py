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

Everywhere, a timestep ``t`` is either an integer or an integer tensor with the batch shape of the
latents, and latents have shape :math:`(*, D)`.
"""

from __future__ import annotations

from typing import TypeAlias

import pyro.distributions as dist
import torch
from torch import Tensor

from .schedules import Schedule

__all__ = [
    "at_time",
    "base_normal",
    "gaussian_moments",
    "kl_normal",
    "q_marginal",
    "q_reverse",
    "q_step",
]

Start: TypeAlias = "Tensor | dist.TorchDistribution"


def at_time(table: Tensor, t: int | Tensor) -> Tensor:
    r"""Reads a table at time :math:`t`, ready to multiply latents of shape :math:`(*, D)`.

    Arguments:
        table: A table, with shape :math:`(T + 1,)`.
        t: The timestep(s), an integer or an integer tensor with shape :math:`(*)`.

    Returns:
        The entries, with shape :math:`(*, 1)`.

    Raises:
        ValueError: If an integer is not in the table. The entries of a tensor are not looked at
            on a GPU, which would have to be waited for.
    """
    if isinstance(t, int) and not 0 <= t < len(table):
        raise ValueError(f"t must be from 0 to T = {len(table) - 1}, got {t}")
    return table[t].unsqueeze(-1)


def normal(loc: Tensor, scale: Tensor) -> dist.Independent:
    return dist.Normal(loc, scale).to_event(1)


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
            f"{type(unwrap(start)).__name__}: condition on z_0 (order 'forward' or 'posterior')"
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
    squares = ((q.loc - p.loc) / p.scale).square() + excess.square()
    return squares / 2 + (excess - r.log())


def unwrap(fn: torch.distributions.Distribution) -> torch.distributions.Distribution:
    while isinstance(fn, torch.distributions.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


def q_step(schedule: Schedule, z: Tensor, t: int | Tensor) -> dist.Independent:
    r"""Returns :math:`q(z_t | z_{t-1})`, equation (9) of the paper.

    Arguments:
        schedule: The variance schedule.
        z: The latents :math:`z_{t-1}`, with shape :math:`(*, D)`.
        t: The timestep(s) :math:`t \geq 1`.
    """
    return normal(at_time(schedule.alphas, t).sqrt() * z, at_time(schedule.betas, t).sqrt())


def q_marginal(schedule: Schedule, start: Start, t: int | Tensor) -> dist.Independent:
    r"""Returns :math:`q(z_t | z_0)` or :math:`q(z_t | x) = \mathcal{N}(m_t, v_t)`.

    Arguments:
        schedule: The variance schedule.
        start: The point :math:`z_0` or the Gaussian :math:`q(z_0 | x)`.
        t: The timestep(s) :math:`t \geq 1`.

    Example:
        >>> schedule = Schedule(torch.tensor([0.36]))
        >>> q = q_marginal(schedule, torch.tensor([10.0]), t=1)
        >>> q.mean, q.stddev
        (tensor([8.]), tensor([0.6000]))
    """
    m, s2 = gaussian_moments(start)
    alpha_bar = at_time(schedule.alphas_cumprod, t)
    v = alpha_bar * s2 + at_time(schedule.one_minus_alphas_cumprod, t)
    return normal(alpha_bar.sqrt() * m, v.sqrt())


def q_reverse(schedule: Schedule, start: Start, z: Tensor, t: int | Tensor) -> dist.Independent:
    r"""Returns :math:`q(z_{t-1} | z_t, z_0)` or :math:`q(z_{t-1} | z_t, x)`.

    Given :math:`z_0` its variance is :math:`\tilde\beta_t`, and it is a point at :math:`t = 1`,
    where no density exists.

    Arguments:
        schedule: The variance schedule.
        start: The point :math:`z_0` or the Gaussian :math:`q(z_0 | x)`.
        z: The latents :math:`z_t`, with shape :math:`(*, D)`.
        t: The timestep(s), :math:`t \geq 2` given a point and :math:`t \geq 1` given a Gaussian.
    """
    loc, variance = q_reverse_moments(schedule, start, z, t)
    return normal(loc, variance.sqrt())


def q_reverse_moments(
    schedule: Schedule, start: Start, z: Tensor, t: int | Tensor
) -> tuple[Tensor, Tensor]:
    r"""Returns the mean and the variance of :func:`q_reverse`."""
    m, s2 = gaussian_moments(start)
    alpha_bar, previous = (at_time(schedule.alphas_cumprod, u) for u in (t, t - 1))
    one_minus, one_minus_previous = (
        at_time(schedule.one_minus_alphas_cumprod, u) for u in (t, t - 1)
    )
    ratio = (previous * s2 + one_minus_previous) / (alpha_bar * s2 + one_minus)
    gain = at_time(schedule.alphas, t).sqrt() * ratio
    loc = previous.sqrt() * m + gain * (z - alpha_bar.sqrt() * m)
    return loc, ratio * at_time(schedule.betas, t)
