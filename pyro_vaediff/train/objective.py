r"""The objective of training: the estimator of the bound, and remedies for collapsing latents."""

from __future__ import annotations

from collections.abc import Sequence

from ..infer import (
    Estimator,
    FreeBits,
    KLBalance,
    KLWeight,
    Reweighted,
    TermsELBO,
    TotalCorrelation,
)
from ..priors import HierarchicalPrior
from ..vae import VAE
from .config import TrainConfig

__all__ = ["make_objective", "warm"]

#: The options that make an objective of the bound.
OBJECTIVES = ("beta", "tc_weight", "free_bits", "kl_warmup", "kl_balance")


def make_objective(vae: VAE, elbo: Estimator, config: TrainConfig) -> tuple[Estimator, KLWeight]:
    r"""Returns the objective of a run, and the weight of its KL, which warms up.

    Arguments:
        vae: The VAE.
        elbo: The estimator of the bound.
        config: How to train.

    Raises:
        ValueError: If the estimator has no terms that could be weighted, the VAE has other groups
            of latents, or a hierarchy is to be trained with a Gaussian in place of its prior.
    """
    if config.gaussian_epochs and isinstance(vae.prior, HierarchicalPrior):
        raise ValueError(
            f"gaussian_epochs must be 0 for a hierarchy, got {config.gaussian_epochs}: its decoder "
            "sees the state of the generative path"
        )
    count = len(vae.prior.groups) if isinstance(vae.prior, HierarchicalPrior) else 1
    check_groups(config, count)
    weight, objective = KLWeight(), elbo
    names = [name for name in OBJECTIVES if getattr(config, name) != getattr(TrainConfig, name)]
    if not names:
        return elbo, weight
    if not isinstance(objective, TermsELBO):
        raise ValueError(
            f"{names[0]} needs an estimator with terms, Timestep_ELBO or TraceKL_ELBO, got "
            f"{type(objective).__name__}"
        )
    if config.free_bits:
        objective = FreeBits(objective, config.free_bits)
    if config.beta:
        objective = Reweighted(objective, kl_weight(config.beta))
    if config.tc_weight != 1:
        objective = TotalCorrelation(objective, config.tc_weight)
    if config.kl_balance:
        return KLBalance(objective, weight), weight
    return (Reweighted(objective, weight) if config.kl_warmup else objective), weight


def check_groups(config: TrainConfig, count: int) -> None:
    r"""Raises a ``ValueError`` unless an objective is for that many groups of latents."""
    if config.kl_balance and count == 1:
        raise ValueError("kl_balance is for a hierarchy, whose latents have groups: leave it out")
    if config.tc_weight != 1 and count > 1:
        raise ValueError("tc_weight is for latents without groups: leave it out for a hierarchy")
    if len(config.beta) not in (0, 1, count):
        raise ValueError(
            f"beta must be one number or one for each of {count} groups of latents, got "
            f"{', '.join(map(str, config.beta))}"
        )


def kl_weight(beta: Sequence[float]) -> KLWeight:
    r"""Returns the weight of the KL, from one number or from one for each group of latents."""
    if len(beta) == 1:
        return KLWeight(beta[0])
    return KLWeight(groups={f"group{number}": b for number, b in enumerate(beta, start=1)})


def warm(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    r"""Returns the weight of the KL in a step of the joint training, which is counted from 0."""
    return min(1.0, (step + 1) / (config.kl_warmup * steps_per_epoch)) if config.kl_warmup else 1.0
