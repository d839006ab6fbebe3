r"""What the paper's public code of 2021 optimizes in place of the ELBO, one departure at a time.

**None of these is a bound.** They are here to measure what each of them costs, and to be shown next
to the estimator that they depart from. Two departures more need no class of their own, as they are
options of the networks: the likelihood ``"gaussian-fixed"`` and the encoder's ``norm="batch"``.

A training objective of diffusion priors combines several of them,

    >>> objective = Reweighted(PriorTermGivenX(), all_of(unweighted, without_first_step))

with the timesteps ``NeverLast(UniformTimesteps())`` and the prior :class:`ShiftedLabels`.

References:
    | Diffusion Priors in Variational Autoencoders (Wehenkel & Louppe, 2021)
    | https://arxiv.org/abs/2106.15671 and https://github.com/AWehenkel/LatentDiffusion
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Normal

from pyro_vaediff.diffusion import base_normal, kl_normal, normal, q_marginal
from pyro_vaediff.infer import Proposal, Reweighted, Term, Timestep_ELBO
from pyro_vaediff.infer.reweighted import fixed_variance
from pyro_vaediff.infer.trace_kl_elbo import closed_form_kl, sites
from pyro_vaediff.priors import DiffusionPrior
from pyro_vaediff.schedules import at_time

__all__ = [
    "NeverLast",
    "PriorTermGivenX",
    "Reweighted",
    "ShiftedLabels",
    "all_of",
    "constant_errors",
    "log_variance_as_log_scale",
    "unweighted",
    "without_first_step",
]

Reweighting = Callable[[Term], Tensor | None]


def all_of(*reweightings: Reweighting) -> Reweighting:
    r"""Returns a reweighting that applies the given ones in turn."""

    def combined(term: Term) -> Tensor | None:
        for reweighting in reweightings:
            value = reweighting(term)
            if value is None:
                return None
            term = term._replace(value=value)
        return term.value

    return combined


def unweighted(term: Term) -> Tensor | None:
    r"""Returns the reverse KLs without their weights.

    .. math:: \sum_{t=2}^T \|\tilde\mu_t - \mu_\phi\|^2 \quad \text{in place of} \quad
        \sum_{t=2}^T \frac{\|\tilde\mu_t - \mu_\phi\|^2}{2 \sigma_t^2}

    and nothing for the part of the KLs that is due to the variances.
    """
    if term.role == "constant":
        return None
    if term.role not in ("steps", "first"):
        return term.value
    prior, t = fixed_variance(term)
    if term.role == "first":
        return term.value
    return 2 * at_time(prior.denoiser.kernel.sigmas, t, 0).square() * term.value


def without_first_step(term: Term) -> Tensor | None:
    r"""Returns the terms of a diffusion prior but :math:`-\log p(z_0 | z_1)`."""
    return None if term.role == "first" else term.value


def log_variance_as_log_scale(term: Term) -> Tensor:
    r"""Returns the terms of the Gaussian baseline, whose encoder head :math:`h` is read twice.

    The latents are drawn with the standard deviations :math:`s = e^h`, and their KL divergence is
    that of the variances :math:`e^h`: of :math:`\mathcal{N}(m, s)` in place of
    :math:`\mathcal{N}(m, s^2)`. For the prior :math:`\mathcal{N}(0, I)`, and with :math:`s < 1`, it
    is the smaller one,

    .. math:: \frac{1}{2} \sum_{d=1}^D \left( m_d^2 + s_d - 1 - \log s_d \right) .
    """
    if term.role != "latent":
        return term.value
    fn, site = term.site["fn"], term.site
    q = base_normal(fn)
    assert q is not None  # of the Gaussian baseline
    read = Normal(q.loc, q.scale.sqrt())
    kl = kl_normal(read, Normal(torch.zeros_like(q.loc), torch.ones_like(q.scale)))
    return scale_and_mask(sum_rightmost(kl, len(fn.event_shape)), site["scale"], site["mask"])


class PriorTermGivenX(Timestep_ELBO):
    r"""The ELBO with :math:`\mathrm{KL}(q(z_T | x) \,\|\, p(z_T))`, while all other terms are given
    :math:`z_0`.

    Each of the two conditionings is consistent by itself. Their mixture lacks the information that
    :math:`z_T` has about :math:`z_0`,

    .. math:: I(z_0; z_T | x) = \frac{1}{2} \sum_{d=1}^D \log\left(1 + \frac{\bar\alpha_T}{1 -
        \bar\alpha_T} s_d^2 \right),

    for an encoder with the standard deviations :math:`s_d`.
    """

    def site_terms(self, model_trace: Trace, guide_trace: Trace) -> Iterator[Term]:
        for term in super().site_terms(model_trace, guide_trace):
            if term.role == "last":
                start, z_T = sites(guide_trace)["z_0"], sites(model_trace)[term.name]
                prior, T = start["infer"]["prior"], int(term.name.removeprefix("z_"))
                q_T = q_marginal(prior.schedule, start["fn"], T, prior.event_dim)
                kl = closed_form_kl(q_T, z_T["fn"])
                value = scale_and_mask(kl, term.site["scale"], term.site["mask"])
                term = term._replace(value=value)
            yield term


class NeverLast(Proposal):
    r"""A proposal that never draws :math:`t = T`: the KL of that step is missing, and not trained.

    Arguments:
        proposal: The proposal of the other timesteps, of which there must be some: :math:`T > 2`.
    """

    def __init__(self, proposal: Proposal):
        super().__init__()
        self.proposal = proposal

    def forward(self, prior: DiffusionPrior, conditioning: str) -> Tensor:
        probs = self.proposal(prior, conditioning)
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
        super().__init__(prior.event_shape, denoiser=prior.denoiser, order=prior.order)

    def reverse(self, z: Tensor, t: int | Tensor, c: Tensor | None = None) -> dist.Independent:
        label = max(t - 1, 1) if isinstance(t, int) else (t - 1).clamp(min=1)
        sigma = at_time(self.denoiser.kernel.sigmas, t, self.event_dim)
        return normal(super().reverse(z, label, c).mean, sigma, self.event_dim)


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
