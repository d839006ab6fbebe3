r"""What estimators of the bound should give on average: closed forms, or many draws."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..infer import Estimator, Timestep_ELBO, particle_options
from ..testing.oracle import Oracle
from ..vae import VAE
from .gradients import draw, noise_of
from .programs import Data, Programs

__all__ = ["Reference", "estimated_reference", "exact_reference", "exhaustive_reference"]

ANTITHETIC_PAIRS = particle_options(2) | {"antithetic": True}


@dataclass(frozen=True)
class Reference:
    r"""The value that an estimator of the bound should have on average.

    Arguments:
        value: The negative ELBO, in nats per datum.
        value_se: Its standard error, zero if it is exact.
        gradients: Its gradient with respect to the parameters of each group.
        again: An independent estimate of the gradients, or the same ones if they are exact.
        evidence: :math:`\log p(x)`, in nats per datum, if it is known.
        relative_se: The relative standard errors of the gradients' lengths; none if exact.
    """

    value: float
    value_se: float
    gradients: dict[str, Tensor]
    again: dict[str, Tensor]
    evidence: float | None = None
    relative_se: dict[str, float] = field(default_factory=dict)


def exact_reference(vae: VAE, x: Tensor) -> Reference:
    r"""Returns the closed forms of a linear-Gaussian VAE."""
    oracle = Oracle(vae, x)
    loss = oracle.negative_elbo.mean()
    gradients = {}
    for name, module in vae.named_children():
        grads = torch.autograd.grad(
            loss, list(module.parameters()), retain_graph=True, materialize_grads=True
        )
        gradients[name] = torch.cat([grad.flatten() for grad in grads])
    return Reference(loss.item(), 0.0, gradients, gradients, oracle.log_evidence.mean().item())


def exhaustive_reference(vae: VAE | Programs, x: Data, draws: int = 8) -> Reference:
    r"""Returns the mean over draws of all timesteps, with antithetic pairs of particles."""
    return estimated_reference(Timestep_ELBO("all", **ANTITHETIC_PAIRS), vae, x, draws)


def estimated_reference(
    elbo: Estimator, vae: VAE | Programs, x: Data, draws: int = 100
) -> Reference:
    r"""Returns the mean over draws of an estimator that is known to be unbiased.

    Arguments:
        elbo: The estimator.
        vae: The VAE, or any programs.
        x: The data, with shape :math:`(B, *)`, or the arguments of the programs.
        draws: The number of draws, at least 4.
    """
    sample = draw(elbo, vae, itertools.repeat(x, draws))
    halves = [{name: g[i::2] for name, g in sample.gradients.items()} for i in range(2)]
    one, again = ({name: g.mean(0) for name, g in half.items()} for half in halves)
    noises = {name: noise_of(g, one[name], again[name]) for name, g in halves[1].items()}
    return Reference(
        sample.values.mean().item(),
        sample.values.std().item() / draws**0.5,
        one,
        again,
        relative_se={name: noise.bias_se for name, noise in noises.items()},
    )
