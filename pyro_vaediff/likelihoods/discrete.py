r"""Likelihoods of images with a finite number of levels: their values are probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor

from ..arguments import check_whole
from ..nn.scale import bounded_scale
from .base import Likelihood
from .distributions import DiscretizedLogistic, GridCategorical
from .spaces import BinarizedSpace, GridSpace, PixelSpace, check_levels

__all__ = [
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "DiscretizedLogisticLikelihood",
    "LogisticMixtureLikelihood",
]


class BernoulliLikelihood(Likelihood):
    r"""Independent Bernoulli variables for stochastically binarized images in {0, 1}.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of one image.
    """

    space_type = BinarizedSpace

    def __init__(self, image_shape: Sequence[int]):
        super().__init__(image_shape, maps_per_channel=1)

    def _distribution(self, params: Tensor) -> TorchDistribution:
        return dist.Bernoulli(logits=params)


class GridLikelihood(Likelihood):
    r"""The common part of the likelihoods on the grid of pixel values: the number of levels."""

    space_type = GridSpace

    def __init__(self, image_shape: Sequence[int], maps_per_channel: int, levels: int):
        super().__init__(image_shape, maps_per_channel)
        check_levels(levels)
        self.levels = levels

    def space(self, levels: int = 256) -> PixelSpace:
        if levels != self.levels:
            raise ValueError(f"levels={levels}, but the likelihood was made for {self.levels}")
        return GridSpace(levels)


def smallest_scale(levels: int) -> float:
    # With a scale of a tenth of half a bin, a bin holds up to 0.9999 of the mass. Below it the
    # likelihood has nothing to gain, and the gradients grow without bound.
    return 0.1 / (levels - 1)


class DiscretizedLogisticLikelihood(GridLikelihood):
    r"""A discretized logistic per pixel and channel; the decoder outputs location and scale.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of one image.
        levels: The number of levels that a pixel can take, at most 256.
    """

    def __init__(self, image_shape: Sequence[int], levels: int = 256):
        super().__init__(image_shape, maps_per_channel=2, levels=levels)
        self.floor = smallest_scale(levels)

    def _distribution(self, params: Tensor) -> TorchDistribution:
        loc, raw = params.chunk(2, dim=-3)
        return DiscretizedLogistic(loc, bounded_scale(raw, self.floor), self.levels)


class LogisticMixtureLikelihood(GridLikelihood):
    r"""A mixture of discretized logistics per pixel and channel.

    .. math:: p(x) = \sum_{k=1}^K w_k \, p_k(x), \qquad w = \mathrm{softmax}(\mathrm{logits})

    with :math:`p_k` a :class:`~pyro_vaediff.likelihoods.distributions.DiscretizedLogistic`. The
    decoder outputs a logit, a location and a scale per component.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of one image.
        levels: The number of levels that a pixel can take, at most 256.
        num_components: The number of components :math:`K`.

    References:
        | PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other
          Modifications (Salimans et al., 2017), equation (2)
        | https://arxiv.org/abs/1701.05517
    """

    def __init__(self, image_shape: Sequence[int], levels: int = 256, num_components: int = 5):
        check_whole("num_components", num_components)
        super().__init__(image_shape, maps_per_channel=3 * num_components, levels=levels)
        self.floor = smallest_scale(levels)

    def _distribution(self, params: Tensor) -> TorchDistribution:
        maps = params.unflatten(-3, (3, -1, self.image_shape[0]))
        logits, loc, raw = maps.movedim(-4, -1).unbind(-5)
        components = DiscretizedLogistic(loc, bounded_scale(raw, self.floor), self.levels)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), components)


class CategoricalLikelihood(GridLikelihood):
    r"""A categorical per pixel and channel; the decoder outputs one map per channel and level.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of one image.
        levels: The number of levels that a pixel can take, at most 256.
    """

    def __init__(self, image_shape: Sequence[int], levels: int = 256):
        super().__init__(image_shape, maps_per_channel=levels, levels=levels)

    def _distribution(self, params: Tensor) -> TorchDistribution:
        logits = params.unflatten(-3, (self.image_shape[0], self.levels))
        return GridCategorical(logits.movedim(-3, -1))
