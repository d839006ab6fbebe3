r"""The encoder's gradient without a path through its latents, for teaching.

.. math:: \nabla_\psi E_{q_\psi}[f] = E_{q_\psi}[(f - b) \, \nabla_\psi \log q_\psi(z_0 | x)],
    \qquad f = \log q_\psi(z_0 | x) - \log p(x, z_0)

for any baseline :math:`b` that does not depend on :math:`z_0`. It needs no derivative of the model,
and is far noisier than the path derivative where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vaediff.infer import Term, Timestep_ELBO

__all__ = ["ScoreFunction_ELBO", "VarGrad_ELBO"]


class WithoutPath(Messenger):
    r"""Draws :math:`z_0` such that no gradient leads through it."""

    def _pyro_sample(self, msg: dict) -> None:
        if msg["infer"].get("role") == "first" and not msg["done"]:
            msg["value"] = msg["fn"].sample()


def scored(term: Term) -> bool:
    r"""Returns ``True`` for the entropy of latents that were drawn without a path."""
    return term.role == "entropy" and term.site["infer"].get("role") == "first"


class ScoreFunction_ELBO(Timestep_ELBO):
    r"""A :class:`Timestep_ELBO` given :math:`z_0`, with the score function's gradient.

    Arguments:
        args: Arguments of :class:`Timestep_ELBO`.
        num_particles: The number of draws of :math:`z_0`, one after the other.
        options: Keyword arguments of it, without those of vectorized particles and the entropy.

    References:
        | Black Box Variational Inference (Ranganath et al., 2014)
        | https://arxiv.org/abs/1401.0118
    """

    def __init__(self, *args: Any, num_particles: int = 1, **options: Any):
        super().__init__(*args, **options | {"num_particles": num_particles, "entropy": "path"})
        if self.collapse.conditioning != "z_0" or self.vectorize_particles:
            raise ValueError(
                f"{type(self).__name__} needs conditioning='z_0' and particles one after the other"
            )

    def _get_trace(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[Trace, Trace]:
        return super()._get_trace(model, WithoutPath()(guide), args, kwargs)

    def particles(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> list[list[Term]]:
        particles = super().particles(model, guide, *args, **kwargs)
        starts = [[t.site for t in terms if scored(t)] for terms in particles]
        log_q = torch.stack(
            [sum(site["fn"].log_prob(site["value"]) for site in start) for start in starts]
        )
        values = [[term.value.sum_to_size(log_q[0].shape) for term in terms] for terms in particles]
        f = torch.stack([torch.stack(terms).sum(0) for terms in values]).detach()
        # It has a gradient, and the value zero.
        scores = self.center(f) * (log_q - log_q.detach())
        for terms, score, start in zip(particles, scores, starts, strict=True):
            terms.append(Term("score", score, "score", start[0]))
        return particles

    def center(self, f: Tensor) -> Tensor:
        r"""Returns :math:`f - b`, with shape :math:`(P, B)`; here without a baseline."""
        return f


class VarGrad_ELBO(ScoreFunction_ELBO):
    r"""The score function with the mean of the other particles as its baseline.

    That is the gradient of the log-variance loss, :math:`\frac{1}{2} \mathrm{Var}(f)` over draws
    whose own distribution is held fixed.

    References:
        | VarGrad: A Low-Variance Gradient Estimator for Variational Inference
          (Richter et al., 2020)
        | https://arxiv.org/abs/2010.10436
    """

    def __init__(self, *args: Any, num_particles: int = 4, **options: Any):
        super().__init__(*args, num_particles=num_particles, **options)
        if num_particles < 2:
            raise ValueError(f"num_particles must be at least 2, got {num_particles}")

    def center(self, f: Tensor) -> Tensor:
        r"""Returns :math:`f` minus its mean over the other particles, with shape :math:`(P, B)`."""
        return (f - f.mean(0)) * len(f) / (len(f) - 1)
