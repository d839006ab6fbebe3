r"""Estimators of the ELBO, and checks of when they are valid."""

from .antithetic import Antithetic
from .checks import check_mean_field
from .collapse import CollapseChain
from .factory import ESTIMATORS, MULTI_SAMPLE, make_elbo, particle_options
from .multi_sample import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    STL_IWAE_ELBO,
    DReG_ELBO,
    GDReG_ELBO,
    MultiSampleELBO,
)
from .objectives import FreeBits, KLBalance, KLWeight, TotalCorrelation, total_correlation
from .proposals import (
    PROPOSALS,
    ImportanceTimesteps,
    LossAwareTimesteps,
    Proposal,
    Timesteps,
    UniformTimesteps,
)
from .quasi_random import QuasiRandom
from .reweighted import REWEIGHTINGS, Reweighted
from .score_and_path import (
    Bound,
    DoublyReparameterized,
    GeneralizedDoublyReparameterized,
    Gradient,
    StickingTheLanding,
    log_mean_exp,
)
from .step_kls import typical_kl, variance_kl
from .terms import Estimator, differentiable_terms, elbo_terms
from .timestep_elbo import Timestep_ELBO
from .trace_kl_elbo import Term, TermsELBO, TraceKL_ELBO

__all__ = [
    "CIWAE_ELBO",
    "ESTIMATORS",
    "IWAE_ELBO",
    "MIWAE_ELBO",
    "MULTI_SAMPLE",
    "PIWAE_ELBO",
    "PROPOSALS",
    "REWEIGHTINGS",
    "STL_IWAE_ELBO",
    "Antithetic",
    "Bound",
    "CollapseChain",
    "DReG_ELBO",
    "DoublyReparameterized",
    "Estimator",
    "FreeBits",
    "GDReG_ELBO",
    "GeneralizedDoublyReparameterized",
    "Gradient",
    "ImportanceTimesteps",
    "KLBalance",
    "KLWeight",
    "LossAwareTimesteps",
    "MultiSampleELBO",
    "Proposal",
    "QuasiRandom",
    "Reweighted",
    "StickingTheLanding",
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
    "log_mean_exp",
    "make_elbo",
    "particle_options",
    "total_correlation",
    "typical_kl",
    "variance_kl",
]
