r"""Measures of how well a model fits and samples."""

from .features import EXTRACTORS, Extractor, load_extractor
from .frechet import FeatureStatistics, feature_statistics, frechet_distance
from .statistics import image_statistics, reference_statistics

__all__ = [
    "EXTRACTORS",
    "Extractor",
    "FeatureStatistics",
    "feature_statistics",
    "frechet_distance",
    "image_statistics",
    "load_extractor",
    "reference_statistics",
]
