r"""The common parts of encoders and decoders: the head, the Gaussian posterior, the context."""

from __future__ import annotations

import math
from typing import Protocol

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from .scale import bounded_scale, upcast

__all__ = ["Head"]


class Head(Protocol):
    r"""The part of a likelihood that a decoder needs: from ``num_maps`` maps to a distribution."""

    num_maps: int
    image_shape: tuple[int, int, int]

    def __call__(self, maps: Tensor, /) -> TorchDistribution: ...


def gaussian(
    outputs: Tensor, min_scale: float, max_scale: float, event_dim: int = 1
) -> TorchDistribution:
    r"""Returns the Gaussian with the mean and the unconstrained scale that a network outputs.

    Arguments:
        outputs: The outputs, of which the first half along the first dimension of an event is the
            mean.
        min_scale: The lower bound of the scale.
        max_scale: Its upper bound.
        event_dim: The number of dimensions of an event.
    """
    loc, raw = upcast(outputs).chunk(2, dim=-event_dim)
    return dist.Normal(loc, bounded_scale(raw, min_scale, max_scale)).to_event(event_dim)


def check_scales(min_scale: float, max_scale: float) -> None:
    if not 0 < min_scale < max_scale < math.inf:
        raise ValueError(f"need 0 < min_scale < max_scale < inf, got {min_scale=} and {max_scale=}")


def with_context(features: Tensor, c: Tensor | None, context_features: int | None) -> Tensor:
    r"""Returns features and context side by side.

    Arguments:
        features: The features, with shape :math:`(*, B, L)`.
        c: The context, with shape :math:`(B, F)`, or ``None`` if F = 0.
        context_features: The number of features F that the network was made for, ``None`` to
            ignore the context.

    Raises:
        ValueError: If the context has another number of features.
    """
    if context_features is None:
        return features
    given = 0 if c is None else c.shape[-1]
    if given != context_features:
        raise ValueError(
            f"c must be a context with {context_features} features (context_features), got {given}"
        )
    if c is None:
        return features
    return torch.cat((features, c.to(features).expand(*features.shape[:-1], given)), -1)
