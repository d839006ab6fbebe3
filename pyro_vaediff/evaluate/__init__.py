r"""The numbers of a model: bounds, likelihoods, what they are, surgery and Fréchet distances."""

from .aggregate import aggregate_log_prob, aggregate_prior, posterior_means
from .audit import BOUNDS, NO_BOUNDS, Audit, audit
from .demonstration import Demonstration, demonstrate
from .densities import chain_log_weight, prior_log_prob
from .elbo import evaluate, evaluating, in_batches, kl_by_timestep, preprocess, value_elbo
from .features import EXTRACTORS, Extractor, load_extractor
from .frechet import FeatureStatistics, frechet_distance
from .groups import ActiveUnits, active_units, kl_by_group
from .likelihood import (
    bits_per_dim,
    importance_log_likelihood,
    importance_weighted_bound,
    log_likelihood,
    log_likelihood_by_samples,
)
from .marginals import guide_marginals, model_marginals
from .statistics import frechet_distances, image_statistics, reference_statistics
from .surgery import Estimate, Surgery, chain_log_prob, elbo_surgery

__all__ = [
    "BOUNDS",
    "EXTRACTORS",
    "NO_BOUNDS",
    "ActiveUnits",
    "Audit",
    "Demonstration",
    "Estimate",
    "Extractor",
    "FeatureStatistics",
    "Surgery",
    "active_units",
    "aggregate_log_prob",
    "aggregate_prior",
    "audit",
    "bits_per_dim",
    "chain_log_prob",
    "chain_log_weight",
    "demonstrate",
    "elbo_surgery",
    "evaluate",
    "evaluating",
    "frechet_distance",
    "frechet_distances",
    "guide_marginals",
    "image_statistics",
    "importance_log_likelihood",
    "importance_weighted_bound",
    "in_batches",
    "kl_by_group",
    "kl_by_timestep",
    "load_extractor",
    "log_likelihood",
    "log_likelihood_by_samples",
    "model_marginals",
    "posterior_means",
    "preprocess",
    "prior_log_prob",
    "reference_statistics",
    "value_elbo",
]
