r"""Statistics of the features of images: of samples in batches, and of a data set in a cache."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from functools import reduce
from operator import add
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .features import Extractor
from .frechet import FeatureStatistics

__all__ = ["image_statistics", "reference_statistics"]


def image_statistics(batches: Iterable[Tensor], extractor: Extractor) -> FeatureStatistics:
    r"""Returns the statistics of the features of images that come in batches.

    Arguments:
        batches: Batches of images in :math:`[0, 1]`, each with shape :math:`(B, C, H, W)`. Their
            sizes may differ.
        extractor: The feature extractor.

    Raises:
        ValueError: If there is no batch.

    Example:
        >>> from pyro_vaediff.evaluate import load_extractor
        >>> batches = torch.rand(100, 1, 8, 8).split(32)
        >>> image_statistics(batches, load_extractor("pixels")).count
        100
    """
    statistics = (FeatureStatistics.from_features(extractor(images)) for images in batches)
    first = next(statistics, None)

    if first is None:
        raise ValueError("batches must hold at least one batch of images, got none")

    return reduce(add, statistics, first)


def reference_statistics(
    images: Tensor,
    extractor: Extractor,
    *,
    levels: int = 256,
    cache_dir: str | Path | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> FeatureStatistics:
    r"""Returns the statistics of a data set's features, from a cache if there is one.

    A cache file is named after the features, the number of images and a hash of their pixels, so
    that it is never mistaken for that of other images.

    Arguments:
        images: The images, with shape :math:`(N, C, H, W)`, in uint8.
        extractor: The feature extractor.
        levels: The number of grey levels: pixels run from 0 to ``levels - 1``.
        cache_dir: The folder of the cache files, made if needed. If :py:`None`, nothing is cached.
        batch_size: The number of images per batch.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If ``images`` are not at least 2 images in uint8 with values below ``levels``.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) < 2:
        raise ValueError(
            "images must be at least 2 images with shape (N, C, H, W) in uint8, "
            f"got {tuple(images.shape)} in {images.dtype}"
        )
    if levels < 2 or int(images.max()) >= levels:
        raise ValueError(f"images must be below levels={levels}, got {images.max()}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")

    path = None

    if cache_dir is not None:
        digest = hashlib.sha256(f"{tuple(images.shape)} {levels} ".encode())
        digest.update(images.cpu().contiguous().numpy())
        path = Path(cache_dir) / f"{extractor.name}-n{len(images)}-{digest.hexdigest()[:16]}.npz"

    if path is not None and path.is_file():
        try:
            return _cached_statistics(path, extractor, len(images))
        except ValueError as error:
            warnings.warn(f"{error}; they are computed again", stacklevel=2)

    batches = (batch.float() / (levels - 1) for batch in images.split(batch_size))
    total = -(-len(images) // batch_size)
    batches = tqdm(batches, f"{extractor.name} features", total, disable=not progress)
    statistics = image_statistics(batches, extractor)

    if path is not None:
        statistics.save(path)

    return statistics


def _cached_statistics(path: Path, extractor: Extractor, count: int) -> FeatureStatistics:
    statistics = FeatureStatistics.load(path)

    if statistics.count != count or extractor.dim not in (None, len(statistics.mean)):
        raise ValueError(f"{path} does not hold the statistics of these features and images")

    return statistics
