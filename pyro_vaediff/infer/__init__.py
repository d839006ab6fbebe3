r"""Estimators of the ELBO, and checks of when they are valid."""

from .antithetic import Antithetic
from .checks import check_mean_field
from .factory import make_elbo, particle_options
from .proposals import PROPOSALS, Importance, LossAware, Proposal, Timesteps, Uniform
from .terms import elbo_terms
from .timestep_elbo import Collapse, Timestep_ELBO
from .trace_kl_elbo import TraceKL_ELBO
from .weightings import WEIGHTINGS, Weighting

__all__ = [
    "PROPOSALS",
    "WEIGHTINGS",
    "Antithetic",
    "Collapse",
    "Importance",
    "LossAware",
    "Proposal",
    "Timestep_ELBO",
    "Timesteps",
    "TraceKL_ELBO",
    "Uniform",
    "Weighting",
    "check_mean_field",
    "elbo_terms",
    "make_elbo",
    "particle_options",
]
