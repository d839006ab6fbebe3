r"""The negative ELBO per datum and per term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from .timestep_elbo import Timestep_ELBO
from .trace_kl_elbo import TermsELBO, per_datum

__all__ = ["Estimator", "differentiable_terms", "elbo_terms"]


class Estimator(Protocol):
    r"""An estimator of the ELBO, with the methods that Pyro's ``ELBO`` itself does not declare."""

    num_particles: int

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        r"""Returns an estimate of the negative ELBO."""

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        r"""Returns an estimate of the negative ELBO, and adds its gradient to the parameters'."""


def elbo_terms(
    model: Callable, guide: Callable, *args: Any, elbo: TermsELBO | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    r"""Returns the terms of the negative ELBO, one value per datum, in nats.

    The terms of all data sum to the loss of the estimator, for the same random state. With a VAE
    and a diffusion prior, given :math:`z_0`, they are

    ============== ======================================================= ==============
    name           term                                                    shape
    ============== ======================================================= ==============
    ``"x"``        :math:`-\log p(x | z_0)`, the reconstruction            :math:`(B,)`
    ``"-H[z_0]"``  :math:`-\mathrm{H}[q(z_0 | x)]`, the negative entropy   :math:`(B,)`
    ``"z_T"``      :math:`\mathrm{KL}(q(z_T | z_0) \,\|\, p(z_T))`         :math:`(B,)`
    ``"z_s"``      the KLs of the steps, :math:`t = 2, \dots, T`           :math:`(T-1, B)`
    ``"constant"`` the part of these KLs that is a constant                :math:`(B,)`
    ``"z_0"``      :math:`-\log p(z_0 | z_1)`, the step :math:`t = 1`      :math:`(B,)`
    ============== ======================================================= ==============

    where the name ``"z_T"`` has the number :math:`T` in it. Given :math:`x`, ``"z_0"`` is a KL as
    well, and there is neither an entropy nor a constant.

    Arguments:
        model: The model.
        guide: The guide.
        args: The arguments of the model and the guide.
        elbo: The estimator. By default, ``Timestep_ELBO("all", entropy="exact")``.
        kwargs: The keyword arguments of the model and the guide.

    Returns:
        The terms, averaged over the estimator's particles.

    Raises:
        ValueError: If the estimator has vectorized particles, or no terms.
    """
    elbo = Timestep_ELBO("all", entropy="exact") if elbo is None else elbo
    if not isinstance(elbo, TermsELBO):
        raise ValueError(f"elbo must be a TraceKL_ELBO or Timestep_ELBO, got {type(elbo).__name__}")
    if elbo.vectorize_particles:
        raise ValueError("elbo must not vectorize its particles: their terms cannot be told apart")

    totals: dict[str, Tensor] = {}
    for particle in elbo.particles(model, guide, *args, **kwargs):
        for name, term in per_datum(particle).items():
            totals[name] = totals.get(name, 0.0) + term / elbo.num_particles
    return totals


def differentiable_terms(
    elbo: Estimator, model: Callable, guide: Callable, *args: Any, **kwargs: Any
) -> dict[str, Tensor]:
    r"""Returns the terms of a differentiable loss; for Pyro's own estimators, only their sum.

    Raises:
        ValueError: If the estimator has no such loss.
    """
    if isinstance(elbo, TermsELBO):
        return elbo.terms(model, guide, *args, **kwargs)
    loss = getattr(elbo, "differentiable_loss", None)
    if loss is None:
        raise ValueError(
            f"elbo must have a differentiable_loss, such as that of Trace_ELBO, which a "
            f"{type(elbo).__name__} lacks"
        )
    return {"-ELBO": loss(model, guide, *args, **kwargs)}
