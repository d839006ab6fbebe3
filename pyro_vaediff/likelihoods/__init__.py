r"""Likelihoods :math:`p_\theta(x | z_0)`, eq. (15): heads, and the pixel spaces they are over.

A head maps the outputs of a decoder to a distribution over images. A :class:`PixelSpace` says in
which space (``x``-space) these images live: ``head.space(levels)`` is the usual one of a head.

========================  ==================  ===================================================
head                      maps per channel    its space
========================  ==================  ===================================================
Gaussian                  1 (2 if per pixel)  :class:`Dequantized`
Bernoulli                 1                   :class:`Binarized`
discretized logistic      2                   :class:`PixelGrid`
categorical               levels              :class:`PixelGrid`
========================  ==================  ===================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .base import Likelihood
from .discrete import BernoulliLikelihood, CategoricalLikelihood, DiscretizedLogisticLikelihood
from .gaussian import GaussianLikelihood
from .spaces import Binarized, Dequantized, PixelGrid, PixelSpace, check_levels, check_range

__all__ = [
    "LIKELIHOODS",
    "BernoulliLikelihood",
    "Binarized",
    "CategoricalLikelihood",
    "Dequantized",
    "DiscretizedLogisticLikelihood",
    "GaussianLikelihood",
    "Likelihood",
    "PixelGrid",
    "PixelSpace",
    "check_range",
    "make_likelihood",
]

#: The likelihoods by name, from the image shape and the number of levels.
LIKELIHOODS: dict[str, Callable[[Sequence[int], int], Likelihood]] = {
    "gaussian": lambda shape, levels: GaussianLikelihood(shape, "shared"),
    "gaussian-pixel": lambda shape, levels: GaussianLikelihood(shape, "pixel"),
    # The 2021 code's likelihood. "N(., 1/2)" is the variance: its floor of
    # log2(sqrt(2 pi / 2)) + log2(256 / 2) = 7.83 bits/dim is reached with x = mean, while a
    # standard deviation of 1/2 would have 7.33.
    "gaussian-fixed": lambda shape, levels: GaussianLikelihood(shape, math.sqrt(0.5)),
    "bernoulli": lambda shape, levels: BernoulliLikelihood(shape),
    "discretized-logistic": DiscretizedLogisticLikelihood,
    "categorical": CategoricalLikelihood,
}


def make_likelihood(name: str, image_shape: Sequence[int], levels: int = 256) -> Likelihood:
    r"""Returns the likelihood of that name.

    Arguments:
        name: One of `"gaussian"` (learned shared sigma), `"gaussian-pixel"` (sigma per pixel and
            channel), `"gaussian-fixed"` (variance 1/2, which cannot go below 7.83 bits/dim at 256
            levels), `"bernoulli"`, `"discretized-logistic"` and `"categorical"`.
        image_shape: The shape :math:`(C, H, W)` of one image.
        levels: The number of levels that a pixel can take, at most 256.

    Returns:
        The likelihood.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> make_likelihood("categorical", (1, 8, 8), levels=17)
        CategoricalLikelihood(image_shape=(1, 8, 8), num_maps=17)
    """
    if name not in LIKELIHOODS:
        raise ValueError(f"name must be one of {', '.join(LIKELIHOODS)}, got {name!r}")
    check_levels(levels)
    return LIKELIHOODS[name](image_shape, levels)
