r"""Likelihoods of images with a finite number of levels: their values are probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor

from ..nn.scale import bounded_scale
from .base import Likelihood
from .distributions import DiscretizedLogistic, GridCategorical
from .spaces import Binarized, PixelGrid, check_levels

__all__ = ["BernoulliLikelihood", "CategoricalLikelihood", "DiscretizedLogisticLikelihood"]


class BernoulliLikelihood(Likelihood):
    r"""Independent Bernoulli variables for stochastically binarized images in {0, 1}.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of one image.
    """

    def __init__(self, image_shape: Sequence[int]):
        super().__init__(image_shape, maps_per_channel=1)

    def space(self, levels: int = 256) -> Binarized:
        return Binarized(levels)

    def _distribution(self, maps: Tensor) -> TorchDistribution:
        return dist.Bernoulli(logits=maps)


class _GridLikelihood(Likelihood):
    r"""The likelihoods on the grid of pixel values."""

    def __init__(self, image_shape: Sequence[int], maps_per_channel: int, levels: int):
        check_levels(levels)
        super().__init__(image_shape, maps_per_channel)
        self.levels = levels

    def space(self, levels: int | None = None) -> PixelGrid:
        if levels not in (None, self.levels):
            raise ValueError(f"levels={levels}, but the likelihood was made for {self.levels}")
        return PixelGrid(self.levels)


class DiscretizedLogisticLikelihood(_GridLikelihood):
    r"""A discretized logistic per pixel and channel; the decoder outputs location and scale.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of one image.
        levels: The number of levels that a pixel can take, at most 256.
    """

    def __init__(self, image_shape: Sequence[int], levels: int = 256):
        super().__init__(image_shape, maps_per_channel=2, levels=levels)
        # With a scale of a tenth of half a bin, a bin holds up to 0.9999 of the mass. Below it
        # the likelihood has nothing to gain, and the gradients grow without bound.
        self.floor = 0.1 / (levels - 1)

    def _distribution(self, maps: Tensor) -> TorchDistribution:
        loc, raw = maps.chunk(2, dim=-3)
        return DiscretizedLogistic(loc, bounded_scale(raw, self.floor), self.levels)


class CategoricalLikelihood(_GridLikelihood):
    r"""A categorical per pixel and channel; the decoder outputs one map per channel and level.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of one image.
        levels: The number of levels that a pixel can take, at most 256.
    """

    def __init__(self, image_shape: Sequence[int], levels: int = 256):
        super().__init__(image_shape, maps_per_channel=levels, levels=levels)

    def _distribution(self, maps: Tensor) -> TorchDistribution:
        logits = maps.unflatten(-3, (self.image_shape[0], self.levels))
        return GridCategorical(logits.movedim(-3, -1))
