r"""Statistics of the features of images, and the Fréchet distances of a model's images from them.

Images come in batches, as samples do; those of a data set have a cache.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data import ImageData
from ..sampling.samplers import point, reconstruct, sample
from ..vae import VAE, call
from .elbo import in_batches, in_eval_mode
from .features import Extractor
from .frechet import FeatureStatistics

__all__ = ["frechet_distances", "image_statistics", "reference_statistics"]


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
        levels: The number of gray levels: pixels run from 0 to ``levels - 1``.
        cache_dir: The folder of the cache files, made if needed. If ``None``, nothing is cached.
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
        digest.update(images.cpu().contiguous().numpy().data)
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


@torch.no_grad()
def frechet_distances(
    vae: VAE,
    data: ImageData,
    extractor: Extractor,
    num_images: int = 10_000,
    cache_dir: str | Path | None = None,
    batch_size: int = 100,
    progress: bool = False,
    c: Tensor | None = None,
    draw: Callable[..., Tensor] = sample,
) -> dict[str, Any]:
    r"""Returns the Fréchet distances of samples and of reconstructions to the test images.

    Samples and reconstructions are the means of :math:`p(x | z_0)`, as in the paper, or draws of it
    if it has none. The distance of the reconstructions is the floor that the decoder sets.

    Arguments:
        vae: The VAE, with a pixel space.
        data: The images. The reference is the test split, or its first ``num_images``.
        extractor: The features.
        num_images: The number of images on each side, at most.
        cache_dir: Where the statistics of the reference are cached.
        batch_size: The number of images that are sampled at once.
        progress: Whether to show progress bars.
        c: The context of the test images and of as many samples, with shape :math:`(N, *)`.
        draw: The sampler, called as ``draw(prior, num_samples, c)``: by default
            :func:`~pyro_vaediff.sampling.sample`, or that with options by ``functools.partial``.

    Returns:
        The distances of samples and of reconstructions, with the entries ``"label"``,
        ``"samples"``, ``"reconstructions"``, ``"num_images"`` and ``"reference"``.
    """
    if (space := vae.space) is None:
        raise ValueError("vae.space is None: Fréchet distances need a PixelSpace")
    reference = data.test[:num_images]
    c = None if c is None else c[: len(reference)].to(next(vae.parameters()))

    def samples() -> Iterator[Tensor]:
        # The more latents go through a chain of a thousand steps at once, the faster it is.
        for many in torch.arange(len(reference)).split(10 * batch_size):
            z_0 = draw(vae.prior, len(many), None if c is None else c[many])
            for rows, z in zip(many.split(batch_size), z_0.split(batch_size), strict=True):
                yield space.to_unit(point(call(vae.decoder, z, None if c is None else c[rows])))

    def reconstructions() -> Iterator[Tensor]:
        for x, c_x in in_batches(vae, reference, c, batch_size):
            yield space.to_unit(reconstruct(vae, x, c_x))

    statistics = reference_statistics(
        reference, extractor, levels=data.levels, cache_dir=cache_dir, progress=progress
    )
    with in_eval_mode(vae):
        of_samples = image_statistics(samples(), extractor)
        of_reconstructions = image_statistics(reconstructions(), extractor)
    return {
        "label": extractor.label,
        "samples": of_samples.distance(statistics),
        "reconstructions": of_reconstructions.distance(statistics),
        "num_images": len(reference),
        "reference": f"{data.name} test split",
    }
