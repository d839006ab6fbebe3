r"""Priors :math:`p(z_0)`, each a pair of Pyro programs."""

from .base import Prior, SiteInfer
from .diffusion import DiffusionPrior
from .exemplar import AggregatePrior, ExemplarPrior
from .few_steps import fit_variances, optimal_steps, step_costs
from .flow import FlowPrior
from .gaussian import GaussianPrior
from .hierarchy import ConditionalGaussianPrior, HierarchicalPrior
from .mixture import MixturePrior, VampPrior

PRIORS: dict[str, type[Prior]] = {
    "gaussian": GaussianPrior,
    "mixture": MixturePrior,
    "vamp": VampPrior,
    "exemplar": ExemplarPrior,
    "flow": FlowPrior,
    "diffusion": DiffusionPrior,
}

__all__ = [
    "PRIORS",
    "AggregatePrior",
    "ConditionalGaussianPrior",
    "DiffusionPrior",
    "ExemplarPrior",
    "FlowPrior",
    "GaussianPrior",
    "HierarchicalPrior",
    "MixturePrior",
    "Prior",
    "SiteInfer",
    "VampPrior",
    "fit_variances",
    "optimal_steps",
    "step_costs",
]
