r"""A proposal :math:`r(t | x)`: timesteps that suit the posterior of each datum.

The importance proposal assumes an aggregate posterior :math:`\mathcal{N}(0, I)`, and one scale of
the encoder for all data. But what a timestep contributes for one datum depends on how far its
latents are from the origin, and given :math:`x` on its posterior scale.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_vaediff.diffusion import Start, gaussian_moments
from pyro_vaediff.infer import CollapseChain, ImportanceTimesteps, Timestep_ELBO, Timesteps
from pyro_vaediff.infer.collapse import PLATE, nuisance
from pyro_vaediff.infer.step_kls import mean_over_dimensions
from pyro_vaediff.priors import DiffusionPrior
from pyro_vaediff.schedules import Tables

__all__ = ["PerDatum_ELBO", "TimestepsPerDatum", "posterior_kl"]


@torch.no_grad()
def posterior_kl(prior: DiffusionPrior, start: Start) -> Tensor:
    r"""Returns the expected KL of each step if the prior is :math:`\mathcal{N}(0, I)`, per datum.

    It is :func:`~pyro_vaediff.infer.typical_kl` with the mean square of the datum's mean :math:`m`
    and of its posterior scale :math:`s` over dimensions, in place of those that are assumed.

    Arguments:
        prior: The prior.
        start: The latents :math:`z_0`, or their posterior :math:`\mathcal{N}(m, s^2)`, with batch
            shape :math:`(*)`.

    Returns:
        The KLs per dimension in nats, for :math:`t = 2, \dots, T`, in float64 and with shape
        :math:`(*, T - 1)`; without their constant part where that is a term of its own.
    """
    m, s2 = torch.broadcast_tensors(*gaussian_moments(start))
    m2, s2 = (
        (sum_rightmost(x.double(), prior.event_dim) / prior.latent_dim).unsqueeze(-1)
        for x in (m.square(), s2)
    )

    def table(tables: Tables, name: str) -> Tensor:
        return mean_over_dimensions(tables.original_on(name, m.device))

    schedule, kernel = prior.schedule, prior.denoiser.kernel
    alpha_bar = table(schedule, "alphas_cumprod")
    alpha, beta = (table(schedule, name)[2:] for name in ("alphas", "betas"))
    skip, variance = table(kernel, "skips")[2:], table(kernel, "sigmas")[2:].square()
    v = alpha_bar * s2 + table(schedule, "one_minus_alphas_cumprod")
    ratio = v[..., 1:-1] / v[..., 2:]
    of_m = (alpha_bar[1:-1].sqrt() - skip * alpha_bar[2:].sqrt()).square()
    of_noise = (alpha.sqrt() * ratio - skip).square() * v[..., 2:]
    kl = (of_m * m2 + of_noise) / (2 * variance)
    if not (isinstance(start, Tensor) and prior.denoiser.variance.fixed):
        rho = ratio * beta / variance
        kl = kl + (rho - 1 - rho.log()) / 2
    return kl


class TimestepsPerDatum(Timesteps):
    r"""Timesteps whose probabilities differ by datum.

    The arguments are those of :class:`~pyro_vaediff.infer.Timesteps`, but that ``probs`` have shape
    :math:`(*, n)`, where :math:`*` broadcasts with the batch shape.
    """

    def icdf(self, value: Tensor) -> Tensor:
        cdf = self.probs.double().cumsum(-1)
        cdf = (cdf / cdf[..., -1:]).expand(*value.shape, -1).contiguous()
        index = torch.searchsorted(cdf, value.unsqueeze(-1), right=True).squeeze(-1)
        return self.first + index.clamp(max=cdf.shape[-1] - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        index = (value - self.first).unsqueeze(-1)
        return self.probs.expand(*value.shape, -1).gather(-1, index).squeeze(-1).log()


class ChainPerDatum(CollapseChain):
    r"""The few steps of a chain, chosen by :math:`r(t | z_0)` or :math:`r(t | x)`."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._laws: weakref.WeakKeyDictionary[DiffusionPrior, TimestepsPerDatum]
        self._laws = weakref.WeakKeyDictionary()

    def timesteps(
        self, prior: DiffusionPrior, start: Start | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        if prior.continuous:
            raise ValueError("a PerDatum_ELBO needs timesteps, got a prior in continuous time")
        if prior.num_timesteps == 1:
            return
        if start is not None:
            self._laws[prior] = self.law(prior, start)
        # The model runs after the guide, whose timesteps it gets.
        law = self._laws[prior]
        with pyro.plate(PLATE, self.k):
            t = nuisance("t", law)
            with poutine.scale(scale=1 / (self.k * law.log_prob(t).exp())):
                yield "", t

    def law(self, prior: DiffusionPrior, start: Start) -> TimestepsPerDatum:
        r"""Returns :math:`r(t | z_0)` or :math:`r(t | x)`."""
        assert self.propose is not None  # a PerDatum_ELBO has checked it
        proposal = self.propose(prior)
        assert isinstance(proposal, ImportanceTimesteps)
        kl = posterior_kl(prior, start)
        # Of a chain that does next to nothing, rounding is left.
        kl = kl.clamp(min=0) + torch.finfo(kl.dtype).tiny
        share = proposal.uniform
        probs = (1 - share) * kl / kl.sum(-1, keepdim=True) + share / kl.shape[-1]
        like = prior.schedule.betas
        return TimestepsPerDatum(probs.to(like.dtype), 2, self.low_discrepancy)


class PerDatum_ELBO(Timestep_ELBO):
    r"""A :class:`Timestep_ELBO` whose timesteps are chosen for each datum.

    They are in proportion to the terms that a standard Gaussian prior would have for the posterior
    of the datum, :func:`posterior_kl`; given :math:`z_0`, for these latents. The probabilities are
    numbers without a gradient, by which the terms are divided: there is no bias.

    Arguments:
        timesteps: An :class:`~pyro_vaediff.infer.ImportanceTimesteps`, whose uniform share is mixed
            in, or its name ``"importance"``.
        args: Further arguments of :class:`Timestep_ELBO`.
        kwargs: Its keyword arguments.

    Raises:
        ValueError: If the proposal is another one. The loss raises it in continuous time.
    """

    def __init__(
        self, timesteps: str | ImportanceTimesteps = "importance", *args: Any, **kwargs: Any
    ):
        super().__init__(timesteps, *args, **kwargs)
        if not isinstance(self.proposal, ImportanceTimesteps):
            raise ValueError(
                f"timesteps of a PerDatum_ELBO must be 'importance', got {timesteps!r}"
            )
        old = self.collapse
        options = old.propose, old.k, old.conditioning, old.low_discrepancy, old.chunk_size
        self.collapse = ChainPerDatum(*options)
