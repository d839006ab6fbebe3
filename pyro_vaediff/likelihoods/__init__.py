r"""Likelihoods :math:`p_\theta(x \mid z_0)`, eq. (15), and the pixel spaces of their images.

A likelihood, or *head*, says which maps the decoder has to output, and which distribution over
images they parameterize. A *pixel space* says where 8-bit images live as :math:`x`: ``preprocess``
takes them there, ``to_unit`` takes them back. ``head.space(levels)`` is the usual one.

========================  ==================  ===================================================
likelihood                maps per channel    its pixel space, for values u = 0 .. levels - 1
========================  ==================  ===================================================
Gaussian                  1 (2 if per pixel)  [-1, 1], 2 (u + U[0, 1)) / levels - 1 (a density)
Bernoulli                 1                   {0, 1}, drawn with probability u / (levels - 1)
discretized logistic      2                   grid on [-1, 1], 2 u / (levels - 1) - 1
logistic mixture          3 per component     grid on [-1, 1], 2 u / (levels - 1) - 1
categorical               levels              grid on [-1, 1], 2 u / (levels - 1) - 1
========================  ==================  ===================================================

An autoregressive likelihood wraps any of them: its maps are features, of any number, and its pixel
space is that of the one it wraps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .autoregressive import AutoregressiveLikelihood
from .base import Likelihood
from .discrete import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    DiscretizedLogisticLikelihood,
    LogisticMixtureLikelihood,
)
from .gaussian import GaussianLikelihood
from .spaces import (
    BinarizedSpace,
    DequantizedSpace,
    GridSpace,
    PixelSpace,
    check_levels,
    check_range,
)

__all__ = [
    "AUTOREGRESSIVE",
    "LIKELIHOODS",
    "AutoregressiveLikelihood",
    "BernoulliLikelihood",
    "BinarizedSpace",
    "CategoricalLikelihood",
    "DequantizedSpace",
    "DiscretizedLogisticLikelihood",
    "GaussianLikelihood",
    "GridSpace",
    "Likelihood",
    "LogisticMixtureLikelihood",
    "PixelSpace",
    "check_range",
    "make_likelihood",
]

LIKELIHOODS: dict[str, Callable[..., Likelihood]] = {
    "gaussian": lambda shape, levels: GaussianLikelihood(shape, "shared"),
    "gaussian-pixel": lambda shape, levels: GaussianLikelihood(shape, "pixel"),
    # The 2021 code's likelihood. "N(., 1/2)" is the variance: its floor of
    # log2(sqrt(2 pi / 2)) + log2(256 / 2) = 7.83 bits/dim is reached with x = mean, while a
    # standard deviation of 1/2 would have 7.33.
    "gaussian-fixed": lambda shape, levels: GaussianLikelihood(shape, math.sqrt(0.5)),
    "bernoulli": lambda shape, levels: BernoulliLikelihood(shape),
    "discretized-logistic": DiscretizedLogisticLikelihood,
    "logistic-mixture": LogisticMixtureLikelihood,
    "categorical": CategoricalLikelihood,
}


def autoregressive(pixel: str) -> Callable[..., Likelihood]:
    r"""Returns how to make an autoregressive likelihood from the likelihood of one channel."""

    def make(shape: Sequence[int], levels: int, **options: Any) -> Likelihood:
        channels, *sides = shape
        return AutoregressiveLikelihood(
            LIKELIHOODS[pixel]((1, *sides), levels), channels, **options
        )

    return make


#: The autoregressive ones, which take the options of :class:`AutoregressiveLikelihood`.
AUTOREGRESSIVE = {
    "autoregressive": autoregressive("bernoulli"),
    "autoregressive-mixture": autoregressive("logistic-mixture"),
    "autoregressive-categorical": autoregressive("categorical"),
}
LIKELIHOODS |= AUTOREGRESSIVE


def make_likelihood(
    name: str, image_shape: Sequence[int], levels: int = 256, **options: Any
) -> Likelihood:
    r"""Returns the likelihood of that name.

    Arguments:
        name: One of ``"gaussian"`` (learned shared sigma), ``"gaussian-pixel"`` (sigma per pixel
            and channel), ``"gaussian-fixed"`` (variance 1/2, which cannot go below 7.83 bits/dim at
            256 levels), ``"bernoulli"``, ``"discretized-logistic"``, ``"logistic-mixture"``,
            ``"categorical"``, and ``"autoregressive"`` (of Bernoulli variables),
            ``"autoregressive-mixture"`` and ``"autoregressive-categorical"``.
        image_shape: The shape :math:`(C, H, W)` of one image.
        levels: The number of levels that a pixel can take, at most 256.
        options: The options of the likelihood, such as ``kernel_sizes`` of an
            :class:`AutoregressiveLikelihood`.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> make_likelihood("categorical", (1, 8, 8), levels=17)
        CategoricalLikelihood(image_shape=(1, 8, 8), num_maps=17)
    """
    if name not in LIKELIHOODS:
        raise ValueError(f"name must be one of {', '.join(LIKELIHOODS)}, got {name!r}")
    check_levels(levels)
    return LIKELIHOODS[name](image_shape, levels, **options)
