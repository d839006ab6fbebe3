r"""The numbers of a model: bounds, likelihoods, ELBO surgery and Fréchet distances."""

from .elbo import evaluate, evaluating, in_batches, preprocess, value_elbo
from .features import EXTRACTORS, Extractor, load_extractor
from .frechet import FeatureStatistics, feature_statistics, frechet_distance
from .likelihood import bits_per_dim, importance_weighted_bound
from .log_likelihood import importance_log_likelihood, log_likelihood, prior_log_prob
from .statistics import image_statistics, reference_statistics
from .surgery import Estimate, Surgery, aggregate_log_prob, chain_log_prob, elbo_surgery

__all__ = [
    "EXTRACTORS",
    "Estimate",
    "Extractor",
    "FeatureStatistics",
    "Surgery",
    "aggregate_log_prob",
    "bits_per_dim",
    "chain_log_prob",
    "elbo_surgery",
    "evaluate",
    "evaluating",
    "feature_statistics",
    "frechet_distance",
    "image_statistics",
    "importance_log_likelihood",
    "importance_weighted_bound",
    "in_batches",
    "load_extractor",
    "log_likelihood",
    "preprocess",
    "prior_log_prob",
    "reference_statistics",
    "value_elbo",
]
