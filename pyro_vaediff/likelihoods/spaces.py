r"""Pixel spaces: where 8-bit images live as the :math:`x` of a likelihood.

=====================  =====================================================================
space                  x, for pixel values u = 0 .. levels - 1
=====================  =====================================================================
:class:`Dequantized`   [-1, 1], 2 (u + U[0, 1)) / levels - 1, of which a density is taken
:class:`Binarized`     {0, 1}, drawn with probability u / (levels - 1)
:class:`PixelGrid`     a grid on [-1, 1], 2 u / (levels - 1) - 1
=====================  =====================================================================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .distributions import to_grid

__all__ = ["Binarized", "Dequantized", "PixelGrid", "PixelSpace", "check_levels", "check_range"]


class PixelSpace(ABC):
    r"""The conversion of 8-bit images to the :math:`x` of a likelihood, and back.

    Arguments:
        levels: The number of levels that a pixel can take, at most 256.

    Raises:
        ValueError: If the number of levels is out of range.
    """

    def __init__(self, levels: int = 256):
        check_levels(levels)
        self.levels = levels

    def preprocess(self, images: Tensor) -> Tensor:
        r"""Returns 8-bit images in x-space, with fresh noise where the space needs it.

        The values are not looked at, because that would synchronize the device in every training
        step; call :func:`check_range` once where the data are loaded.

        Arguments:
            images: Images in ``uint8`` with values below :attr:`levels`, of any shape.

        Returns:
            The images in x-space, in the default dtype and with the shape of ``images``.

        Raises:
            ValueError: If the images are no ``uint8``.
        """
        if images.dtype != torch.uint8:
            raise ValueError(
                f"images must be uint8 with values 0..{self.levels - 1}, got {images.dtype}"
            )
        return self._preprocess(images.to(torch.get_default_dtype()))

    @abstractmethod
    def _preprocess(self, u: Tensor) -> Tensor: ...

    @abstractmethod
    def to_unit(self, x: Tensor) -> Tensor:
        r"""Returns images from x-space in [0, 1], where u becomes u / (levels - 1).

        Arguments:
            x: Images in x-space, of any shape: data, samples or means.

        Returns:
            The images in [0, 1], clamped, with the shape of ``x``.
        """

    @property
    def log_bin_width(self) -> float:
        r"""The log of the volume of one pixel value in x-space, in nats (0 if discrete).

        Adding it to the log-density per dimension gives a lower bound on the log-probability.
        """
        return 0.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(levels={self.levels})"


class Dequantized(PixelSpace):
    r"""Uniformly dequantized images in [-1, 1], of which a density is taken."""

    def _preprocess(self, u: Tensor) -> Tensor:
        return 2 * (u + torch.rand_like(u)) / self.levels - 1

    def to_unit(self, x: Tensor) -> Tensor:
        # The center of the bin of u is 2 (u + 1/2) / levels - 1.
        return (((x + 1) * (self.levels / 2) - 0.5) / (self.levels - 1)).clamp(0, 1)

    @property
    def log_bin_width(self) -> float:
        return math.log(2 / self.levels)


class Binarized(PixelSpace):
    r"""Stochastically binarized images in {0, 1}."""

    def _preprocess(self, u: Tensor) -> Tensor:
        return (torch.rand_like(u) < u / (self.levels - 1)).to(u.dtype)

    def to_unit(self, x: Tensor) -> Tensor:
        return x.clamp(0, 1)


class PixelGrid(PixelSpace):
    r"""Images on the grid of their pixel values in [-1, 1]."""

    def _preprocess(self, u: Tensor) -> Tensor:
        return to_grid(u, self.levels)

    def to_unit(self, x: Tensor) -> Tensor:
        return ((x + 1) / 2).clamp(0, 1)


def check_levels(levels: int) -> None:
    r"""Raises a ``ValueError`` unless 8-bit pixels can take so many levels."""
    if not isinstance(levels, int) or not 2 <= levels <= 256:
        raise ValueError(f"levels must be an int from 2 to 256 (images are uint8), got {levels}")


def check_range(images: Tensor, levels: int) -> None:
    r"""Checks once, where the data are loaded, that no pixel is beyond ``levels``.

    Arguments:
        images: Images in ``uint8``, of any shape.
        levels: The number of levels that a pixel can take, at most 256.

    Raises:
        ValueError: If the largest value is not below ``levels``.
    """
    check_levels(levels)
    if images.numel() > 0 and (largest := int(images.max())) >= levels:
        raise ValueError(
            f"images has the value {largest}, beyond levels={levels}: pass more levels"
        )
