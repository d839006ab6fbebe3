r"""Measures of how well a model fits and samples."""

from .features import EXTRACTORS, Extractor, load_extractor
from .frechet import FeatureStatistics, feature_statistics, frechet_distance
from .likelihood import bits_per_dim, importance_weighted_bound
from .statistics import image_statistics, reference_statistics

__all__ = [
    "EXTRACTORS",
    "Extractor",
    "FeatureStatistics",
    "bits_per_dim",
    "feature_statistics",
    "frechet_distance",
    "image_statistics",
    "importance_weighted_bound",
    "load_extractor",
    "reference_statistics",
]
