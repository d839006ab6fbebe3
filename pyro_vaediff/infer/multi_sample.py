r"""Bounds of many samples, and the gradients that they are trained with.

All of them are functions of the log-weights of :math:`K` draws of *all* latents of a datum,

.. math:: \log w_k = \log p(x, z^k) - \log q(z^k | x), \qquad z^k \sim q(z | x),

and a bound because :math:`E[w_k] = p(x)`. With its derivatives :math:`c_k = \partial L / \partial
\log w_k` and :math:`c'_k = \partial^2 L / \partial (\log w_k)^2`, the gradient of a bound :math:`L`
has three parts: that of the model, the *score* and the *path* of the guide,

.. math::
    \nabla L = \sum_k c_k \nabla_\theta \log p(x, z^k) - \sum_k s_k \nabla_\psi \log q(z^k | x)
        + \sum_k a_k \frac{\partial \log w_k}{\partial z^k} \nabla_\psi z^k .

An estimator is a bound together with the numbers :math:`s_k` and :math:`a_k`:

==================================================== ============ ===================
gradient                                             score        path
==================================================== ============ ===================
:class:`~pyro_vaediff.infer.Gradient`                :math:`c_k`  :math:`c_k`
:class:`~pyro_vaediff.infer.StickingTheLanding`      0            :math:`c_k`
:class:`~pyro_vaediff.infer.DoublyReparameterized`   0            :math:`c_k - c'_k`
==================================================== ============ ===================

References:
    | Importance Weighted Autoencoders (Burda et al., 2016)
    | https://arxiv.org/abs/1509.00519

    | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018)
    | https://arxiv.org/abs/1802.04537

    | Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al., 2018)
    | https://arxiv.org/abs/1810.04152
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.util import warn_if_nan
from torch import Tensor

from ..arguments import check_whole
from .log_weights import Cut, along_path, common_scale, drawn, log_densities, regenerated
from .score_and_path import (
    Bound,
    DoublyReparameterized,
    GeneralizedDoublyReparameterized,
    Gradient,
    StickingTheLanding,
    log_mean_exp,
)
from .traced import TracedELBO

__all__ = [
    "CIWAE_ELBO",
    "IWAE_ELBO",
    "MIWAE_ELBO",
    "PIWAE_ELBO",
    "STL_IWAE_ELBO",
    "DReG_ELBO",
    "GDReG_ELBO",
    "MultiSampleELBO",
]


class MultiSampleELBO(TracedELBO, ABC):
    r"""A bound that is a function of the log-weights of several particles.

    A subclass says which function: see the source of :class:`IWAE_ELBO`. Data are independent in
    the plates that all sites share; other plates are part of a datum. Masks are part of the
    densities. A scale that all sites share, such as that of a subsampled plate, multiplies the
    bounds of the data. What would be no bound is refused: a site with a scale of its own, such as
    :class:`~pyro_vaediff.infer.Timestep_ELBO` gives to its steps; sites without a density; programs
    without data. Particles are independent: no antithetic pairs.

    The gradient is that of the first order only.

    Arguments:
        num_particles: The number of particles. With one, every bound is the ELBO.
        gradient: The form of the gradient, by default that of the class.
        kwargs: Keyword arguments of :class:`pyro.infer.Trace_ELBO`.

    Raises:
        ValueError: If the number is out of range; and from programs whose weights do not make a
            bound, or whose guide is not reparameterized.

    Example:
        >>> from pyro_vaediff.testing import linear_gaussian_vae
        >>> vae, x = linear_gaussian_vae(seed=0), torch.zeros(5, 3, dtype=torch.float64)
        >>> loss = IWAE_ELBO(num_particles=16).loss(vae.model, vae.guide, x)
    """

    gradient: Gradient = Gradient()

    def __init__(self, num_particles: int = 8, *, gradient: Gradient | None = None, **kwargs: Any):
        check_whole("num_particles", num_particles)
        super().__init__(num_particles=num_particles, **kwargs)
        if gradient is not None:
            self.gradient = gradient

    @abstractmethod
    def model_bound(self, log_w: Tensor) -> Bound:
        r"""Returns the bound, with which the model is trained.

        Arguments:
            log_w: The logarithms of the weights, with shape :math:`(K, *)`.
        """

    def guide_bound(self, log_w: Tensor) -> Bound:
        r"""Returns the bound with which the guide is trained, by default the same."""
        return self.model_bound(log_w)

    def _get_trace(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[Trace, Trace]:
        return super()._get_trace(model, Cut()(guide), args, kwargs)

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        traces = list(self._get_traces(model, guide, args, kwargs))
        rows = zip(*(log_densities(*pair) for pair in traces), strict=True)
        vectorized = self.vectorize_particles and self.num_particles > 1
        log_x, log_z, log_q = (row[0] if vectorized else torch.stack(row) for row in rows)
        log_w = log_x + log_z - log_q
        scale = common_scale(traces, log_w.shape[1:])

        with torch.no_grad():
            bounds = self.model_bound(log_w), self.guide_bound(log_w)
            p, q = (Bound(*(scale * part for part in bound)) for bound in bounds)
        loss = -(scale * bounds[0].value).sum()
        warn_if_nan(loss, "loss")
        if not log_w.requires_grad:
            return loss

        surrogate = (p.first * log_x).sum() - (self.gradient.score(q) * log_q).sum()
        target = (self.gradient.path(q) * log_w).sum()
        for _, guide_trace in traces:
            surrogate = surrogate + along_path(target, drawn(guide_trace))
        if not self.gradient.generalized:
            surrogate = surrogate + (p.first * log_z).sum()
        else:
            target = (p.first * log_x - (p.first - p.second) * log_w).sum()
            for model_trace, _ in traces:
                surrogate = surrogate + along_path(target, regenerated(model_trace))
        return loss - (surrogate - surrogate.detach())  # the value of the one, the other's gradient


class IWAE_ELBO(MultiSampleELBO):
    r"""The bound of an importance-weighted autoencoder, the log-mean-exp of all weights."""

    def model_bound(self, log_w: Tensor) -> Bound:
        return log_mean_exp(log_w)


class STL_IWAE_ELBO(IWAE_ELBO):
    r"""An :class:`IWAE_ELBO` with the path derivative alone, which is **biased** for it."""

    gradient = StickingTheLanding()


class DReG_ELBO(IWAE_ELBO):
    r"""An :class:`IWAE_ELBO` with the doubly reparameterized gradient for the guide."""

    gradient = DoublyReparameterized()


class GDReG_ELBO(IWAE_ELBO):
    r"""An :class:`IWAE_ELBO` with doubly reparameterized gradients for the guide and the prior."""

    gradient = GeneralizedDoublyReparameterized()


class MIWAE_ELBO(MultiSampleELBO):
    r"""The mean of several importance-weighted bounds.

    Arguments:
        groups: The number of bounds :math:`M`, which share the particles.
        kwargs: Keyword arguments of :class:`MultiSampleELBO`. The number of particles is :math:`M
            K`.
    """

    def __init__(self, groups: int = 1, num_particles: int = 8, **kwargs: Any):
        super().__init__(num_particles, **kwargs)
        check_whole("groups", groups)
        if num_particles % groups:
            raise ValueError(
                f"num_particles must be a multiple of groups={groups}, got {num_particles}"
            )
        self.groups = groups

    def model_bound(self, log_w: Tensor) -> Bound:
        return log_mean_exp(log_w, self.groups)


class PIWAE_ELBO(MIWAE_ELBO):
    r"""An :class:`IWAE_ELBO` for the model, and a :class:`MIWAE_ELBO` for the guide.

    The loss is the former. Arguments are those of :class:`MIWAE_ELBO`.
    """

    def model_bound(self, log_w: Tensor) -> Bound:
        return log_mean_exp(log_w)

    def guide_bound(self, log_w: Tensor) -> Bound:
        return log_mean_exp(log_w, self.groups)


class CIWAE_ELBO(MultiSampleELBO):
    r"""A combination of the ELBO and an importance-weighted bound.

    .. math:: \beta \, \mathrm{ELBO} + (1 - \beta) \, \mathrm{IWAE}

    Arguments:
        beta: The weight :math:`\beta` of the ELBO, from 0 to 1.
        kwargs: Keyword arguments of :class:`MultiSampleELBO`.
    """

    def __init__(self, beta: float = 0.5, num_particles: int = 8, **kwargs: Any):
        super().__init__(num_particles, **kwargs)
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {beta}: elsewhere it is no bound")
        self.beta = beta

    def model_bound(self, log_w: Tensor) -> Bound:
        pairs = zip(log_mean_exp(log_w, len(log_w)), log_mean_exp(log_w), strict=True)
        return Bound(*(self.beta * elbo + (1 - self.beta) * iwae for elbo, iwae in pairs))
