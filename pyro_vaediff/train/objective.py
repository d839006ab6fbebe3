r"""What is trained with: the estimator of the bound, and what keeps latents from collapsing."""

from __future__ import annotations

from ..infer import Estimator, FreeBits, KLWeight, Reweighted, TermsELBO
from ..priors import HierarchicalPrior
from ..vae import VAE
from .config import TrainConfig

__all__ = ["make_objective", "warm"]


def make_objective(vae: VAE, elbo: Estimator, config: TrainConfig) -> tuple[Estimator, KLWeight]:
    r"""Returns the objective of a run, and the weight of its KL, which warms up.

    Arguments:
        vae: The VAE.
        elbo: The estimator of the bound.
        config: How to train.

    Raises:
        ValueError: If the estimator has no terms that could be weighted, or a hierarchy is to be
            trained with a Gaussian in place of its prior.
    """
    if config.gaussian_epochs and isinstance(vae.prior, HierarchicalPrior):
        raise ValueError(
            f"gaussian_epochs must be 0 for a hierarchy, got {config.gaussian_epochs}: its decoder "
            "sees the state of the generative path"
        )
    weight, objective = KLWeight(), elbo
    if not (config.free_bits or config.kl_warmup):
        return elbo, weight
    if not isinstance(objective, TermsELBO):
        raise ValueError(
            "free_bits and kl_warmup need an estimator with terms, Timestep_ELBO or TraceKL_ELBO, "
            f"got {type(objective).__name__}"
        )
    if config.free_bits:
        objective = FreeBits(objective, config.free_bits)
    return (Reweighted(objective, weight) if config.kl_warmup else objective), weight


def warm(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    r"""Returns the weight of the KL in a step of the joint training, which is counted from 0."""
    return min(1.0, (step + 1) / (config.kl_warmup * steps_per_epoch)) if config.kl_warmup else 1.0
