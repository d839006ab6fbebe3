r"""Estimators of the ELBO, and checks of when they are valid."""

from .antithetic import Antithetic
from .checks import check_mean_field
from .collapse import CollapseChain
from .factory import ESTIMATORS, make_elbo, particle_options
from .objectives import FreeBits, KLBalance, KLWeight, TotalCorrelation, total_correlation
from .proposals import (
    PROPOSALS,
    ImportanceTimesteps,
    LossAwareTimesteps,
    Proposal,
    Timesteps,
    UniformTimesteps,
    typical_kl,
    variance_kl,
)
from .quasi_random import QuasiRandom
from .reweighted import REWEIGHTINGS, Reweighted
from .terms import Estimator, differentiable_terms, elbo_terms
from .timestep_elbo import Timestep_ELBO
from .trace_kl_elbo import Term, TermsELBO, TraceKL_ELBO

__all__ = [
    "ESTIMATORS",
    "PROPOSALS",
    "REWEIGHTINGS",
    "Antithetic",
    "CollapseChain",
    "Estimator",
    "FreeBits",
    "ImportanceTimesteps",
    "KLBalance",
    "KLWeight",
    "LossAwareTimesteps",
    "Proposal",
    "QuasiRandom",
    "Reweighted",
    "Term",
    "TermsELBO",
    "Timestep_ELBO",
    "Timesteps",
    "TotalCorrelation",
    "TraceKL_ELBO",
    "UniformTimesteps",
    "check_mean_field",
    "differentiable_terms",
    "elbo_terms",
    "make_elbo",
    "particle_options",
    "total_correlation",
    "typical_kl",
    "variance_kl",
]
