r"""Objectives that are no bounds: the terms of a bound with other weights, for training only.

Every weighting here compares the means of :math:`q(z_{t-1} | z_t, z_0)` and :math:`p(z_{t-1} |
z_t)` at a scale :math:`c_t` of its own, where the KL divergence has :math:`\sigma_t`:

.. math:: \frac{\|\tilde\mu_t - \mu_\phi\|^2}{2 c_t^2} = \frac{\sigma_t^2}{c_t^2}
    \frac{\|\tilde\mu_t - \mu_\phi\|^2}{2 \sigma_t^2} .

- ``"simple"``: :math:`L_\mathrm{simple} = E_{t \sim \mathcal{U}\{1, \dots, T\}} \|\epsilon -
  \hat\epsilon\|^2` of Ho et al. takes the place of all steps, :math:`-\log p(z_0 | z_1)` included.
- ``"paper"``: equations (12) and (20) as printed (sign corrected): the mean over :math:`t = 2,
  \dots, T` in place of the sum, neither :math:`\mathrm{KL}(q(z_T | z_0) \,\|\, p(z_T))` nor
  :math:`-\log p(z_0 | z_1)`.

References:
    | Denoising Diffusion Probabilistic Models (Ho et al., 2020), equation (14)
    | https://arxiv.org/abs/2006.11239
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pyro.distributions.util import scale_and_mask
from torch import Tensor

from ..arguments import check_choice
from ..priors import DiffusionPrior
from ..schedules import at_time
from .trace_kl_elbo import Term, TermsELBO

__all__ = ["REWEIGHTINGS", "Reweighted", "paper", "simple"]

#: A function from a term to what takes its place, or ``None`` if nothing does.
Reweighting = Callable[[Term], Tensor | None]


def simple(term: Term) -> Tensor | None:
    r"""Returns a term of :math:`L_\mathrm{simple}` of Ho et al."""
    if term.role == "constant":
        return None
    if term.role not in ("steps", "first"):
        return term.value
    prior, t = fixed_variance(term)
    schedule, sigma = prior.schedule, at_time(prior.denoiser.kernel.sigmas, t, 0)
    beta, one_minus = schedule.beta(t, event_dim=0), schedule.signal(t, 0)[1]
    value = term.value
    if term.role == "first":  # the square in -log p(z_0 | z_1)
        log_scale = prior.latent_dim * (sigma.log() + math.log(2 * math.pi) / 2)
        constant = log_scale.expand_as(value)
        value = value - scale_and_mask(constant, term.site["scale"], term.site["mask"])
    # |mu_tilde - mu| = beta / sqrt(alpha (1 - alpha_bar)) |eps - eps_hat|
    weight = 2 * sigma.square() * (1 - beta) * one_minus / beta.square()
    return value * weight / prior.num_timesteps


def paper(term: Term) -> Tensor | None:
    r"""Returns a term of the paper's equation (20)."""
    if term.role in ("constant", "last"):
        return None
    if term.role not in ("steps", "first"):
        return term.value
    prior, _ = fixed_variance(term)
    return None if term.role == "first" else term.value / (prior.num_timesteps - 1)


def fixed_variance(term: Term) -> tuple[DiffusionPrior, int | Tensor]:
    r"""Returns the prior and the times of a step that is a square of means."""
    prior, t = term.site["infer"]["prior"], term.site["infer"]["t"]
    if prior.continuous:
        raise ValueError(
            "the weightings 'simple' and 'paper' are defined for a number of steps, got a prior in "
            "continuous time: train prior.with_steps(n)"
        )
    given_x = term.role == "first" and term.site["infer"].get("closed_form_kl", False)
    if not prior.denoiser.variance.fixed or given_x:
        raise ValueError(
            "the weightings 'simple' and 'paper' are defined for conditioning='z_0' and a fixed "
            f"reverse variance, got {'x' if given_x else type(prior.denoiser.variance).__name__}"
        )
    return prior, t


REWEIGHTINGS: dict[str, Reweighting] = {"simple": simple, "paper": paper}


class Reweighted(TermsELBO):
    r"""The terms of a bound with other weights. **It is no bound**, and for training only.

    Arguments:
        elbo: The estimator of the bound.
        weights: ``"simple"``, ``"paper"``, a function from a :class:`Term` to what takes its place
            (or ``None``), or the weights of some roles, such as ``{"steps": 0.5, "last": 0.5}``.

    Example:
        >>> from pyro_vaediff.infer import Timestep_ELBO
        >>> objective = Reweighted(Timestep_ELBO(k=1), "simple")
    """

    def __init__(self, elbo: TermsELBO, weights: str | Reweighting | Mapping[str, float]):
        super().__init__(
            num_particles=elbo.num_particles,
            max_plate_nesting=elbo.max_plate_nesting,
            vectorize_particles=elbo.vectorize_particles,
            retain_graph=elbo.retain_graph,
        )
        #: What is reweighted, a bound or an objective.
        self.elbo = elbo
        if isinstance(weights, str):
            check_choice("weighting", weights, REWEIGHTINGS)
        #: The name of the weighting.
        self.name = weights if isinstance(weights, str) else getattr(weights, "__name__", "roles")
        if isinstance(weights, str):
            weights = REWEIGHTINGS[weights]
        if isinstance(weights, Mapping):
            by_role = dict(weights)
            weights = lambda term: by_role.get(term.role, 1.0) * term.value  # noqa: E731
        self.weights: Reweighting = weights

    @property
    def bound(self) -> TermsELBO:
        r"""The estimator of the bound, which everything that reports must take."""
        return self.elbo.bound if isinstance(self.elbo, Reweighted) else self.elbo

    def particles(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> list[list[Term]]:
        particles = self.elbo.particles(model, guide, *args, **kwargs)
        return [self.reweight(terms) for terms in particles]

    def reweight(self, terms: list[Term]) -> list[Term]:
        r"""Returns the terms that take the place of those of a particle."""
        pairs = [(term, self.weights(term)) for term in terms]
        return [term._replace(value=value) for term, value in pairs if value is not None]

    def state_dict(self) -> dict[str, Tensor]:
        return self.elbo.state_dict()

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self.elbo.load_state_dict(state_dict)
