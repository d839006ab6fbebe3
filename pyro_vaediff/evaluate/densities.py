r"""Densities of priors: the exact one, and for the chain of a diffusion prior an estimate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..diffusion import q_step
from ..priors import Prior
from ..sampling.probability_flow import ProbabilityFlow
from ..sampling.solvers import check_diffusion

__all__ = ["chain_log_weight", "prior_log_prob"]

LOG_PRIORS = ("chain", "flow")  # of a diffusion prior


def prior_log_prob(
    prior: Prior, z_0: Tensor, c: Tensor | None = None, **flow_options: Any
) -> Tensor:
    r"""Returns the exact log-density :math:`\log p(z_0)` of any prior, in nats.

    It is ``prior.log_prob`` if the prior has it. A diffusion prior has it in its probability flow:
    see :class:`~pyro_vaediff.sampling.ProbabilityFlow`, a model of its own with the same denoiser.

    Arguments:
        prior: The prior.
        z_0: The latents, with shape :math:`(*, *\mathrm{event})`.
        c: The context, with shape :math:`(B, *)`.
        flow_options: The options of the probability flow, such as ``num_steps``. Priors other than
            diffusion priors have no use for them.

    Returns:
        The log-densities, with shape :math:`(*)`.

    Raises:
        ValueError: If the prior has neither.

    Example:
        >>> import torch
        >>> from pyro_vaediff import GaussianPrior
        >>> prior_log_prob(GaussianPrior(2), torch.zeros(3, 2))
        tensor([-1.8379, -1.8379, -1.8379])
    """
    try:
        return prior.log_prob(z_0, c)
    except NotImplementedError:
        return ProbabilityFlow(prior, c=c, **flow_options).log_prob(z_0)


def chain_log_weight(
    prior: Prior, z_0: Tensor, c: Tensor | None = None, num_steps: int | None = None
) -> Tensor:
    r"""Returns the logarithm of an unbiased estimate of the :math:`p(z_0)` of a diffusion prior's
    chain, in nats.

    .. math:: \log \frac{p(z_{0:T})}{q(z_{1:T} | z_0)}, \qquad z_{1:T} \sim q(z_{1:T} | z_0)

    Its expectation is the bound of :func:`~pyro_vaediff.evaluate.chain_log_prob`. In an importance
    weight it stands for :math:`\log p(z_0)`, as all latents are one draw: the result is a bound.

    Arguments:
        prior: The prior.
        z_0: The latents, with shape :math:`(*, *\mathrm{event})`.
        c: The context, with shape :math:`(B, *)`.
        num_steps: The number of steps of the chain, by default all :math:`T`. A chain with other
            steps is another model, see :meth:`~pyro_vaediff.priors.DiffusionPrior.with_steps`.

    Returns:
        The values, with shape :math:`(*)`.

    Raises:
        ValueError: If the prior is not a diffusion prior, or there is no chain of so many steps.

    Example:
        >>> import torch
        >>> from pyro_vaediff import DiffusionPrior
        >>> chain_log_weight(DiffusionPrior(2), torch.zeros(3, 2), num_steps=25).shape
        torch.Size([3])
    """
    prior = check_diffusion(prior)
    if num_steps is not None:
        prior = prior.with_steps(num_steps)
    z, total = z_0, z_0.new_zeros(())
    for t in range(1, prior.num_timesteps + 1):
        q_t = q_step(prior.schedule, z, t, event_dim=prior.event_dim)
        z_t = q_t()
        total = total + prior.reverse(z_t, t, c).log_prob(z) - q_t.log_prob(z_t)
        z = z_t
    return total + prior.standard_normal().log_prob(z)
