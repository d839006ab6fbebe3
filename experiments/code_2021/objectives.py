r"""What the paper's public code of 2021 optimises in place of the ELBO, one departure at a time.

**None of these is a bound.** They are here to measure what each of them costs, and to be shown next
to the estimator that they depart from. Two departures more need no class of their own, as they are
options of the networks: the likelihood ``"gaussian-fixed"`` and the encoder's ``norm="batch"``.

A training objective of diffusion priors combines several of them,

    >>> class Objective(UnweightedKL, WithoutFirstStep, PriorTermGivenX):
    ...     pass

with the timesteps ``NeverLast(Uniform())`` and the prior :class:`ShiftedLabels`.

References:
    | Diffusion Priors in Variational Autoencoders (Wehenkel & Louppe, 2021)
    | https://arxiv.org/abs/2106.15671 and https://github.com/AWehenkel/LatentDiffusion
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from torch import Tensor

from ..diffusion import at_time, base_normal, normal, q_marginal
from ..priors import DiffusionPrior
from ..schedules import Schedule
from .proposals import Proposal
from .timestep_elbo import Timestep_ELBO
from .trace_kl_elbo import TraceKL_ELBO
from .weightings import Weighting

__all__ = [
    "LogVarianceAsLogScale",
    "NeverLast",
    "PriorTermGivenX",
    "ShiftedLabels",
    "UnweightedKL",
    "WithoutFirstStep",
    "constant_errors",
]


class Unweighted(Weighting):
    r"""All timesteps at the common scale :math:`c = 1 / \sqrt 2`, where :math:`2 c^2 = 1`."""

    def common_scales(self, prior: DiffusionPrior, conditioning: str) -> Tensor:
        return torch.full_like(prior.kernel.sigmas, math.sqrt(0.5))


class UnweightedKL(Timestep_ELBO):
    r"""The reverse KLs without their weights.

    .. math:: \sum_{t=2}^T \|\tilde\mu_t - \mu_\phi\|^2 \quad \text{in place of} \quad
        \sum_{t=2}^T \frac{\|\tilde\mu_t - \mu_\phi\|^2}{2 \sigma_t^2}

    and nothing for the part of the KLs that is due to the variances.

    Arguments:
        args: The arguments of :class:`~pyro_vaediff.infer.Timestep_ELBO`.
        kwargs: The keyword arguments of that class, without a weighting.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weighting = self.collapse.weighting = Unweighted(
            "unweighted", "", first=2, average=False, keep_z_T=True, keep_z_0=True
        )


class WithoutFirstStep(Timestep_ELBO):
    r"""The ELBO of a diffusion prior without :math:`-\log p(z_0 | z_1)`."""

    def site_terms(self, model_trace: Trace, guide_trace: Trace) -> Iterator[tuple[str, Tensor]]:
        for name, term in super().site_terms(model_trace, guide_trace):
            if name != "z_0":
                yield name, term


class PriorTermGivenX(Timestep_ELBO):
    r"""The ELBO with :math:`\mathrm{KL}(q(z_T | x) \,\|\, p(z_T))`, while all other terms are given
    :math:`z_0`.

    Each of the two conditionings is consistent by itself. Their mixture lacks the information that
    :math:`z_T` has about :math:`z_0`,

    .. math:: I(z_0; z_T | x) = \frac{1}{2} \sum_{d=1}^D \log\left(1 + \frac{\bar\alpha_T}{1 -
        \bar\alpha_T} s_d^2 \right),

    for an encoder with the standard deviations :math:`s_d`.

    Arguments:
        schedule: The variance schedule of the prior.
        args: The arguments of :class:`~pyro_vaediff.infer.Timestep_ELBO`.
        kwargs: The keyword arguments of that class.
    """

    def __init__(self, schedule: Schedule, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.schedule = schedule

    def site_terms(self, model_trace: Trace, guide_trace: Trace) -> Iterator[tuple[str, Tensor]]:
        T, q_z0 = self.schedule.num_timesteps, guide_trace.nodes["z_0"]["fn"]
        guide_trace.nodes[f"z_{T}"]["fn"] = q_marginal(self.schedule, q_z0, T)
        yield from super().site_terms(model_trace, guide_trace)


class LogVarianceAsLogScale(TraceKL_ELBO):
    r"""The ELBO of the Gaussian baseline, whose encoder head :math:`h` is read in two ways.

    The latents are drawn with the standard deviations :math:`s = e^h`, and their KL divergence is
    that of the variances :math:`e^h`: of :math:`\mathcal{N}(m, s)` in place of
    :math:`\mathcal{N}(m, s^2)`. For the prior :math:`\mathcal{N}(0, I)`, and with :math:`s < 1`, it
    is the smaller one,

    .. math:: \frac{1}{2} \sum_{d=1}^D \left( m_d^2 + s_d - 1 - \log s_d \right) .
    """

    def site_terms(self, model_trace: Trace, guide_trace: Trace) -> Iterator[tuple[str, Tensor]]:
        q = base_normal(guide_trace.nodes["z_0"]["fn"])
        guide_trace.nodes["z_0"]["fn"] = dist.Normal(q.loc, q.scale.sqrt()).to_event(1)
        yield from super().site_terms(model_trace, guide_trace)


class NeverLast(Proposal):
    r"""A proposal that never draws :math:`t = T`: the KL of that step is missing, and not trained.

    Arguments:
        proposal: The proposal of the other timesteps, of which there must be some: :math:`T > 2`.
    """

    def __init__(self, proposal: Proposal):
        super().__init__()
        self.proposal = proposal

    def forward(self, prior: DiffusionPrior, conditioning: str, first: int) -> Tensor:
        probs = self.proposal(prior, conditioning, first)
        probs = torch.cat([probs[:-1], torch.zeros_like(probs[-1:])])
        return probs / probs.sum()


class ShiftedLabels(DiffusionPrior):
    r"""A prior whose network is told :math:`t - 1` when it is given :math:`z_t`.

    It is trained in place of the given prior, whose network it has, and which is sampled from with
    :math:`t`. At :math:`t = 1` it says 1.

    Arguments:
        prior: The prior, with a fixed reverse variance.
    """

    def __init__(self, prior: DiffusionPrior):
        super().__init__(
            prior.latent_dim,
            prior.num_timesteps,
            prior.schedule,
            prior.denoiser,
            prior.parameterization,
            prior.reverse_variance,
            prior.order,
        )

    def reverse(self, z: Tensor, t: int | Tensor) -> dist.Independent:
        label = max(t - 1, 1) if isinstance(t, int) else (t - 1).clamp(min=1)
        return normal(super().reverse(z, label).mean, at_time(self.kernel.sigmas, t))


def constant_errors(latent_dim: int, num_pixels: int) -> dict[str, float]:
    r"""Returns by how much the constants of that code are too large, in nats per datum.

    They change no gradient. The negative entropy of the posterior has :math:`-\log(2 \sqrt{\pi e})`
    once, in place of :math:`-\frac{1}{2} \log(2 \pi e)` for each of the :math:`D` latent
    dimensions. The KL at :math:`t = T` lacks :math:`-\frac{1}{2}` for each, and the likelihood
    :math:`\mathcal{N}(x | \cdot, \frac{1}{2})` its :math:`\frac{1}{2} \log \pi` for each pixel.

    Arguments:
        latent_dim: The number of latent dimensions :math:`D`.
        num_pixels: The number of dimensions :math:`C H W` of an image.

    Returns:
        The errors, by the names of the terms of :func:`~pyro_vaediff.infer.elbo_terms`.

    Example:
        >>> [round(constant_errors(D, 3072)["-H[z_0]"]) for D in (40, 100, 200)]
        [55, 140, 282]
    """
    once = math.log(2 * math.sqrt(math.pi * math.e))
    return {
        "-H[z_0]": latent_dim / 2 * math.log(2 * math.pi * math.e) - once,
        "z_T": latent_dim / 2,
        "x": -num_pixels / 2 * math.log(math.pi),
    }
