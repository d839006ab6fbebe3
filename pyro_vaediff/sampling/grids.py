r"""Grids: where in time the steps of a sampler are.

A grid has the times :math:`0 = \tau_0 < \dots < \tau_n = 1`, as
:meth:`~pyro_vaediff.priors.DiffusionPrior.with_steps` takes them. Its steps are of equal length in
some coordinate that grows with the time. If the log-SNR is infinite at :math:`\tau_0`, and the
coordinate depends on it, all but the first step are: that one ends at clean latents, and starts
where the first step of the prior's own grid does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import check_whole
from ..priors import DiffusionPrior

__all__ = ["GRIDS", "karras_grid", "log_snr_grid", "time_grid"]


def time_grid(prior: DiffusionPrior, num_steps: int) -> Tensor:
    r"""Returns times of equal distance.

    Arguments:
        prior: The prior.
        num_steps: The number of steps :math:`n`.

    Returns:
        The times, in float64 with shape :math:`(n + 1,)`.
    """
    check_whole("num_steps", num_steps)
    return torch.linspace(prior.schedule.start, 1, num_steps + 1, dtype=torch.float64)


def log_snr_grid(prior: DiffusionPrior, num_steps: int) -> Tensor:
    r"""Returns times whose log-SNRs :math:`\lambda` are of equal distance.

    Arguments:
        prior: The prior.
        num_steps: The number of steps :math:`n`.

    Returns:
        The times, in float64 with shape :math:`(n + 1,)`.

    Example:
        >>> from pyro_vaediff import DiffusionPrior
        >>> prior = DiffusionPrior(2, num_timesteps=1000)
        >>> prior.with_steps(log_snr_grid(prior, 5)).schedule.log_snr
        tensor([    inf,   9.2102,   4.3783,  -0.4537,  -5.2857, -10.1177])
    """
    return equal_steps(prior, num_steps, lambda log_snr: -log_snr)


def karras_grid(prior: DiffusionPrior, num_steps: int, rho: float = 7.0) -> Tensor:
    r"""Returns times whose ratios of noise to signal are of equal distance at a power.

    .. math:: \sigma_t^{1 / \rho}, \qquad \sigma_t = e^{-\lambda_t / 2}

    Arguments:
        prior: The prior.
        num_steps: The number of steps :math:`n`.
        rho: The power :math:`\rho`: the larger, the more steps have little noise.

    Returns:
        The times, in float64 with shape :math:`(n + 1,)`.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
          equation (5)
        | https://arxiv.org/abs/2206.00364
    """
    return equal_steps(prior, num_steps, lambda log_snr: torch.exp(-log_snr / (2 * rho)))


def equal_steps(
    prior: DiffusionPrior, num_steps: int, coordinate: Callable[[Tensor], Tensor]
) -> Tensor:
    r"""Returns times of equal distance in a function of the log-SNR that grows with the time."""
    check_whole("num_steps", num_steps)
    schedule = prior.schedule
    times, log_snr = schedule.original("times"), mean(schedule.original("log_snr"))
    clean = int(log_snr[0].isinf())
    first, last = coordinate(log_snr[[clean, -1]]).tolist()
    inner = torch.linspace(first, last, num_steps + 1 - clean, dtype=torch.float64)[1:-1]
    low, high = torch.full_like(inner, schedule.start), torch.ones_like(inner)
    for _ in range(60):  # halves the intervals
        middle = (low + high) / 2
        early = coordinate(mean(schedule.log_snr_at(middle))) < inner
        low, high = torch.where(early, middle, low), torch.where(early, high, middle)
    return torch.cat([times[: min(clean + 1, num_steps)], high, times[-1:]])


def mean(log_snr: Tensor) -> Tensor:
    r"""Returns the log-SNR at each time: the mean, if dimensions have paths of their own."""
    return log_snr.flatten(1).mean(1) if log_snr.ndim > 1 else log_snr


#: The grids by name.
GRIDS: dict[str, Callable[[DiffusionPrior, int], Tensor]] = {
    "time": time_grid,
    "log-snr": log_snr_grid,
    "karras": karras_grid,
}
