r"""Which class a likelihood belongs to: a bound, an exact density, or neither, and of which model.

A number may be reported as :math:`-\log p(x)` if it is that, or at least that in expectation:

.. math::
    -\log p(x) & \leq E_q[\log q(z | x) - \log p(x, z)] & \text{the negative ELBO} \\
    -\log p(x) & \leq E_q\Big[-\log \frac{1}{K} \sum_{k=1}^K \frac{p(x, z^k)}{q(z^k | x)}\Big]
        & \text{importance-weighted}

The first holds for the sum of its terms, each with weight one; the second because the mean of a
weight is :math:`p(x)`. Other weights, a grid in place of an integral, and noise or scales within
the exponents break them, and the results can be below :math:`-\log p(x)`:
:func:`~pyro_vaediff.evaluate.demonstrate` shows by how much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO
from torch import nn

from ..arguments import check_choice
from ..infer import IWAE_ELBO, Reweighted, Timestep_ELBO, TraceKL_ELBO
from ..priors import DiffusionPrior, HierarchicalPrior, Prior
from ..sampling.probability_flow import ProbabilityFlow
from ..vae import VAE
from .densities import prior_log_prob
from .elbo import evaluate
from .likelihood import (
    importance_log_likelihood,
    importance_weighted_bound,
    log_likelihood,
)
from .surgery import chain_log_prob

__all__ = ["BOUNDS", "NO_BOUNDS", "Audit", "audit"]

#: The classes of numbers that may be reported as :math:`-\log p(x)`, and what they are.
BOUNDS = {
    "ELBO": "a bound by {of}",
    "continuous-time bound": "a bound by {of}",
    "exact density": "the exact density of {of}",
    "importance-weighted bound": "an importance-weighted bound by {of}",
}

#: The classes of numbers that may not, and why.
NO_BOUNDS = {
    "quadrature": "the weights of continuous time, summed over a coarse grid: neither their "
    "integral nor the bound by the chain of the grid",
    "log-mean-exp of noisy bounds": "the log-mean-exp of estimates of log p(x, z) - log q(z | x), "
    "whose exponentials have another mean than p(x)",
    "stochastic trace": "the log-mean-exp of log-densities with a random trace, whose exponentials "
    "have another mean than the densities",
    "scaled weights": "the log-mean-exp of log-weights with scaled terms, whose exponentials have "
    "another mean than p(x)",
    "reweighted terms": "an objective for training, whose terms have other weights than those of "
    "the bound",
}


@dataclass(frozen=True)
class Audit:
    r"""What a number that is given for :math:`-\log p(x)` is."""

    #: Its class, a key of :data:`BOUNDS` or :data:`NO_BOUNDS`.
    kind: str
    #: Whether it is :math:`-\log p(x)`, or at least that in expectation, by construction.
    is_bound: bool
    #: The model whose :math:`p(x)` is meant.
    of: str
    #: All of this in one line.
    text: str

    def __str__(self) -> str:
        return self.text

    def against(self, other: Audit) -> str:
        r"""Returns a line that says which quantities the difference of two numbers compares.

        Arguments:
            other: What the other number is.
        """
        if not (self.is_bound and other.is_bound):
            return "no comparison, as one of the numbers is no bound"
        if self.of == other.of:
            return "two numbers of the same model"
        return f"numbers of two models, {self.of} and {other.of}: either may be the larger one"


def audit(how: Any, model: VAE | Prior | None = None, **options: Any) -> Audit:
    r"""Returns the class of a likelihood, from how it was estimated and of which model.

    Arguments:
        how: What made the number:

            - an estimator of the ELBO, or a :class:`~pyro_vaediff.infer.Reweighted` one;
            - a function: :func:`~pyro_vaediff.evaluate.evaluate`,
              :func:`~pyro_vaediff.evaluate.log_likelihood`,
              :func:`~pyro_vaediff.evaluate.importance_log_likelihood`,
              :func:`~pyro_vaediff.evaluate.importance_weighted_bound`,
              :func:`~pyro_vaediff.evaluate.prior_log_prob` or
              :func:`~pyro_vaediff.evaluate.chain_log_prob`;
            - a :class:`~pyro_vaediff.sampling.ProbabilityFlow`, for its density;
            - or, if it was made elsewhere, the class by its name, a key of :data:`BOUNDS` or
              :data:`NO_BOUNDS`.
        model: The VAE, or the prior alone. By default, the model has no name.
        options: The options of the function that make a difference: ``elbo``, ``num_samples``, and
            ``num_steps`` of the probability flow.

    Returns:
        The class, the model, and a line for below the number.

    Raises:
        ValueError: If ``how`` is none of these. Nor is Pyro's ``TraceMeanField_ELBO``: whether it
            is a bound depends on the programs, see :func:`~pyro_vaediff.infer.check_mean_field`.

    References:
        | Importance Weighted Autoencoders (Burda et al., 2016)
        | https://arxiv.org/abs/1509.00519

        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al.,
          2021)
        | https://arxiv.org/abs/2011.13456

        | Variational Diffusion Models (Kingma et al., 2021)
        | https://arxiv.org/abs/2107.00630

    Example:
        >>> prior = DiffusionPrior(2, num_timesteps=1000)
        >>> print(audit(Timestep_ELBO(k=64), prior))
        a bound by the chain of T = 1000 steps, estimated from 64 timesteps per datum
        >>> found = audit(importance_weighted_bound, prior, elbo=Timestep_ELBO(k=64))
        >>> found.kind, found.is_bound
        ('log-mean-exp of noisy bounds', False)
    """
    prior = model.prior if isinstance(model, VAE) else model
    if isinstance(how, str):
        check_choice("how", how, (*BOUNDS, *NO_BOUNDS))
        return entry(how, CONTINUOUS if how == "continuous-time bound" else described(prior))
    if isinstance(how, ProbabilityFlow):
        return entry("exact density", *of_flow(how))
    if isinstance(how, ELBO):
        return of_elbo(prior, how)
    if callable(how) and how in FUNCTIONS:
        return FUNCTIONS[how](prior, **options)
    raise ValueError(
        "how must be an estimator of the ELBO, one of the functions that audit knows, a "
        f"ProbabilityFlow or one of {', '.join((*BOUNDS, *NO_BOUNDS))}, got {how!r:.80}"
    )


def entry(kind: str, of: str, *details: str) -> Audit:
    r"""Returns the verdict on a number of a class, with some details."""
    is_bound = kind in BOUNDS
    what = BOUNDS[kind].format(of=of) if is_bound else f"no bound: {NO_BOUNDS[kind]}"
    return Audit(kind, is_bound, of, ", ".join([what, *details]))


#: The model that a prior in continuous time is.
CONTINUOUS = "the diffusion in continuous time"


def of_elbo(prior: Prior | None, elbo: ELBO | None = None) -> Audit:
    r"""Returns the verdict on the loss of an estimator, by default that of :func:`evaluate`."""
    elbo, of = Timestep_ELBO("all") if elbo is None else elbo, described(prior)
    has_chain = prior is None or any(isinstance(m, DiffusionPrior) for m in prior.modules())
    if isinstance(elbo, Reweighted):
        return entry("reweighted terms", of, f"reweighted by {elbo.name}")
    kind = "continuous-time bound" if of == CONTINUOUS else "ELBO"
    if isinstance(elbo, Timestep_ELBO) and has_chain:
        some = f"estimated from {count(elbo.collapse.k, 'timestep')} per datum"
        return entry(kind, of, "from all timesteps" if elbo.proposal is None else some)
    if isinstance(elbo, TraceKL_ELBO):
        return entry("ELBO", of, "with KLs in closed form where they are legal")
    if isinstance(elbo, IWAE_ELBO):
        return of_samples(of, num_samples=elbo.num_particles)
    if type(elbo) in SAMPLED:
        return entry("ELBO", of, f"from {count(elbo.num_particles, 'draw')} of all sites per datum")
    raise ValueError(
        f"how must be an estimator whose loss is a bound for all programs, got a "
        f"{type(elbo).__name__}: check_mean_field tells when TraceMeanField_ELBO is one"
    )


def of_weights(prior: Prior | None, elbo: ELBO | None = None) -> Audit:
    r"""Returns what the log-mean-exp of an estimator's particles is, by default that of
    :func:`importance_weighted_bound`."""
    elbo, of = Trace_ELBO(num_particles=64) if elbo is None else elbo, described(prior)
    if type(elbo) in SAMPLED:
        return of_samples(of, num_samples=elbo.num_particles)
    scaled = isinstance(elbo, Reweighted)
    return entry("scaled weights" if scaled else "log-mean-exp of noisy bounds", of)


def of_likelihood(
    prior: Prior | None,
    num_samples: int = 64,
    *,
    log_prior: str = "flow",
    batch_size: int = 100,
    **options: Any,
) -> Audit:
    r"""Returns the verdict on :func:`log_likelihood`."""
    if log_prior == "chain" and isinstance(prior, DiffusionPrior):
        steps = options.get("num_steps")
        chain = prior.chain if steps is None else prior.with_steps(steps)
        return of_samples(described(chain), num_samples=num_samples)
    return of_samples(*of_density(prior, **options), num_samples=num_samples)


def of_samples(of: str, *others: str, num_samples: int) -> Audit:
    samples = f"from {count(num_samples, 'sample')} per datum"
    return entry("importance-weighted bound", of, *others, samples)


def of_density(prior: Prior | None, **flow_options: Any) -> list[str]:
    r"""Returns the model whose density :func:`prior_log_prob` is, and which one it is not."""
    unknown = Prior.distribution, Prior.log_prob
    if prior is None or (type(prior).distribution, type(prior).log_prob) != unknown:
        return [described(prior)]
    return of_flow(ProbabilityFlow(prior, **flow_options))


def of_flow(flow: ProbabilityFlow) -> list[str]:
    r"""Returns a description of a probability flow as a model, and of the one that it is not."""
    steps = count(len(flow.times) - 1, "step")
    return [f"the probability flow with {steps}", f"another model than {described(flow.prior)}"]


def described(prior: nn.Module | None) -> str:
    r"""Returns a description of the programs of a prior as a model."""
    if prior is None:
        return "the model"
    if isinstance(prior, DiffusionPrior) and prior.continuous:
        return CONTINUOUS
    if isinstance(prior, DiffusionPrior):
        return f"the chain of T = {count(prior.num_timesteps, 'step')}"
    if isinstance(prior, HierarchicalPrior):
        groups = [described(group).removeprefix("the model with ") for group in prior.groups]
        return f"the hierarchy of {' and '.join(groups)}"
    name = type(prior).__name__
    return f"the model with {'an' if name[0] in 'AEIOU' else 'a'} {name}"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


#: The estimators whose particles are log p(x, z) - log q(z | x) of one draw of all sites.
SAMPLED = (Trace_ELBO, TraceGraph_ELBO)
FUNCTIONS: dict[Callable, Callable[..., Audit]] = {
    evaluate: of_elbo,
    chain_log_prob: of_elbo,
    importance_weighted_bound: of_weights,
    importance_log_likelihood: of_likelihood,
    log_likelihood: of_likelihood,
    prior_log_prob: lambda prior, **options: entry("exact density", *of_density(prior, **options)),
}
