r"""Densities along a chain of one-dimensional latents, on a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor

from ..diffusion import normal, q_marginal
from ..schedules import Schedule

__all__ = ["guide_marginals", "model_marginals"]


def guide_marginals(
    schedule: Schedule, q_z0: torch.distributions.MixtureSameFamily, z: Tensor
) -> Tensor:
    r"""Returns the densities :math:`q(z_t)` of a diffused mixture of Gaussians, which are exact.

    .. math:: q(z_t) = \sum_k w_k \, \mathcal{N}(z_t; \sqrt{\bar\alpha_t} \, m_k, \bar\alpha_t s_k^2
        + 1 - \bar\alpha_t)

    Arguments:
        schedule: The schedule.
        q_z0: The mixture :math:`\sum_k w_k \, \mathcal{N}(m_k, s_k^2)`, a ``MixtureSameFamily`` of
            ``Normal``.
        z: The points of the grid, with shape :math:`(n,)`.

    Returns:
        The densities for :math:`t = 0, \dots, T`, with shape :math:`(T + 1, n)`.

    Raises:
        ValueError: If it is another distribution.

    Example:
        >>> from torch.distributions import Categorical, MixtureSameFamily, Normal
        >>> weights = Categorical(torch.ones(2))
        >>> q_z0 = MixtureSameFamily(weights, Normal(torch.tensor([-1.0, 1.0]), 0.1))
        >>> guide_marginals(Schedule([0.5, 0.5]), q_z0, torch.linspace(-3, 3, 5)).shape
        torch.Size([3, 5])
    """
    parts = getattr(q_z0, "component_distribution", None)
    if not isinstance(parts, torch.distributions.Normal) or len(parts.batch_shape) != 1:
        raise ValueError(
            "q_z0 must be a MixtureSameFamily of Normal with K components, got a "
            f"{type(q_z0).__name__}"
        )
    start, log_weights = dist.Normal(parts.loc, parts.scale), q_z0.mixture_distribution.logits
    log_probs = [
        q_marginal(schedule, start, t, event_dim=0).log_prob(z.unsqueeze(-1)) + log_weights
        for t in range(schedule.num_timesteps + 1)
    ]
    return torch.stack(log_probs).logsumexp(-1).exp()


def model_marginals(
    kernels: Sequence[Callable[[Tensor], torch.distributions.Distribution]], z: Tensor
) -> Tensor:
    r"""Returns the densities :math:`p(z_t)` of a chain that starts at :math:`\mathcal{N}(0, 1)`.

    .. math:: p(z_{t-1}) = \int p(z_{t-1} | z_t) \, p(z_t) \, dz_t

    Each integral is a sum over the grid. It is exact to many digits if no kernel is narrower than
    the distance of two points, since the densities are smooth and vanish at both ends.

    Arguments:
        kernels: For :math:`t = T, \dots, 1`, the function from :math:`z_t` of shape :math:`(n, 1)`
            to :math:`p(z_{t-1} | z_t)`, with event shape :math:`(1,)`. Those of a diffusion prior
            are ``partial(prior.reverse, t=t)``.
        z: The points of the grid, evenly spaced, with shape :math:`(n,)`.

    Returns:
        The densities for :math:`t = 0, \dots, T`, with shape :math:`(T + 1, n)`.

    Raises:
        ValueError: If the grid is too narrow or too coarse: probability is lost or made.

    Example:
        >>> halve = lambda z: normal(z / 2, torch.tensor(0.75).sqrt())
        >>> z = torch.linspace(-6, 6, 121)
        >>> p = model_marginals([halve], z)  # N(0, 1) again
        >>> bool(torch.allclose(p[0], p[1], atol=1e-6))
        True
    """
    width = z[1] - z[0]
    one = torch.ones_like(z[:1])
    found = [normal(0 * one, one).log_prob(z.unsqueeze(-1)).exp()]
    for kernel in kernels:
        p = kernel(z.unsqueeze(-1)).log_prob(z.reshape(-1, 1, 1)).exp()  # z_{t-1} by z_t
        found.append(p @ found[-1] * width)
    masses = torch.stack(found).sum(-1) * width
    if not bool(((masses - 1).abs() < 0.01).all()):
        worst = masses[(masses - 1).abs().argmax()].item()
        raise ValueError(
            f"z must be a grid on which each density sums to 1, got {len(z)} points from "
            f"{z[0].item():g} to {z[-1].item():g} and a sum of {worst:.3g}: take more points, or a "
            "wider grid"
        )
    return torch.stack(found[::-1])
