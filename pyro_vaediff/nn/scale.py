r"""Positive scales which stay away from zero and from infinity."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bounded_scale", "upcast"]

# softplus(log(e - 1)) = 1, so that a head which outputs zero means a scale of about one.
_UNIT_SHIFT = math.log(math.e - 1)


def bounded_scale(raw: Tensor, floor: float = 1e-4, ceiling: float = 1e2) -> Tensor:
    r"""Maps a real number to a scale between `floor` and `ceiling`, smoothly and increasingly.

    .. math:: s = f + \mathrm{softplus}(r') - \mathrm{softplus}(r' - (c - f)),
        \qquad r' = r + \log(e - 1)

    The first softplus lifts the scale off the floor :math:`f`, the second one stops it at the
    ceiling :math:`c`; in between the scale grows linearly. The value and the gradient are finite
    for every finite `raw`.

    Arguments:
        raw: The unconstrained number, of any shape.
        floor: The lower bound of the scale, in the units of the scale.
        ceiling: The upper bound of the scale, in the units of the scale.

    Returns:
        The scale, with the shape of `raw`; `raw = 0` gives `1 + floor` (if the ceiling is far).

    Raises:
        ValueError: If `0 < floor < ceiling` does not hold.

    Example:
        >>> bounded_scale(torch.tensor([-1e30, 0.0, 1e30]))
        tensor([1.0000e-04, 1.0001e+00, 1.0000e+02])
    """
    if not 0 < floor < ceiling < math.inf:
        raise ValueError(f"need 0 < floor < ceiling < inf, got floor={floor}, ceiling={ceiling}")

    span = ceiling - floor
    # Far above the ceiling the difference of two large numbers would lose all its digits. 40 past
    # the ceiling the exact value is the ceiling to within exp(-40), so raw can be cut there.
    raw = (raw + _UNIT_SHIFT).clamp(max=span + 40.0)
    return floor + F.softplus(raw) - F.softplus(raw - span)


def upcast(x: Tensor) -> Tensor:
    r"""Casts half-precision network outputs to float32, where densities are to be computed.

    Arguments:
        x: A tensor of any shape, for instance the output of a network under autocast.

    Returns:
        The tensor in float32 if it was in float16 or bfloat16, else the tensor itself.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
