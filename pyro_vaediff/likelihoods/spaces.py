r"""Pixel spaces: where the 8-bit images of a data set live as the :math:`x` of the programs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .distributions import to_grid

__all__ = ["BinarizedSpace", "DequantizedSpace", "GridSpace", "PixelSpace", "check_range"]


@dataclass(frozen=True)
class PixelSpace:
    r"""The contract of a pixel space, which takes 8-bit images to x-space and back.

    A subclass defines :meth:`to_x` and :meth:`to_unit`, and :attr:`log_bin_width` if its values
    have a density.

    Arguments:
        levels: The number of levels that a pixel can take, at most 256.

    Raises:
        ValueError: If ``levels`` is not as above.
    """

    levels: int = 256
    #: The interval that x-space is in.
    support: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        check_levels(self.levels)

    def preprocess(self, images: Tensor) -> Tensor:
        r"""Returns images in x-space, with noise drawn afresh where the space needs it.

        The values are not looked at, because that would synchronize the device in every training
        step; call :func:`check_range` once where the data are loaded.

        Arguments:
            images: ``uint8`` images with values 0 .. levels - 1, of any shape.

        Returns:
            The images in x-space, in the default dtype and with the shape of ``images``.

        Raises:
            ValueError: If the dtype is not as above.
        """
        if images.dtype != torch.uint8:
            raise ValueError(
                f"images must be uint8 with values 0..{self.levels - 1}, got {images.dtype}"
            )
        return self.to_x(images.to(torch.get_default_dtype()))

    def to_x(self, u: Tensor) -> Tensor:
        r"""Returns pixel values 0 .. levels - 1, as floating-point numbers, in x-space."""
        raise NotImplementedError

    def to_unit(self, x: Tensor) -> Tensor:
        r"""Returns images in [0, 1], clamped, where u has become u / (levels - 1).

        Arguments:
            x: Images in x-space, of any shape: data, samples or means.
        """
        raise NotImplementedError

    @property
    def log_bin_width(self) -> float:
        r"""The log of the volume of one pixel value in x-space, in nats (0 if discrete).

        Adding it to the log-density per dimension gives a lower bound on the log-probability.
        """
        return 0.0


class DequantizedSpace(PixelSpace):
    r"""The interval [-1, 1], where a pixel value is uniform over its bin."""

    def to_x(self, u: Tensor) -> Tensor:
        return 2 * (u + torch.rand_like(u)) / self.levels - 1

    def to_unit(self, x: Tensor) -> Tensor:
        # The center of the bin of u is 2 (u + 1/2) / levels - 1.
        return (((x + 1) * (self.levels / 2) - 0.5) / (self.levels - 1)).clamp(0, 1)

    @property
    def log_bin_width(self) -> float:
        return math.log(2 / self.levels)


class BinarizedSpace(PixelSpace):
    r"""The values 0 and 1, where a pixel is 1 with probability u / (levels - 1)."""

    support = (0.0, 1.0)

    def to_x(self, u: Tensor) -> Tensor:
        return (torch.rand_like(u) < u / (self.levels - 1)).to(u.dtype)

    def to_unit(self, x: Tensor) -> Tensor:
        return x.clamp(0, 1)


class GridSpace(PixelSpace):
    r"""The ``levels`` equally spaced points from -1 to 1."""

    def to_x(self, u: Tensor) -> Tensor:
        return to_grid(u, self.levels)

    def to_unit(self, x: Tensor) -> Tensor:
        return ((x + 1) / 2).clamp(0, 1)


def check_levels(levels: int) -> None:
    if not isinstance(levels, int) or not 2 <= levels <= 256:
        raise ValueError(f"levels must be an int from 2 to 256 (images are uint8), got {levels}")


def check_range(images: Tensor, levels: int) -> None:
    r"""Checks once, where the data are loaded, that no pixel is beyond ``levels``.

    Arguments:
        images: ``uint8`` images of any shape.
        levels: The number of levels that a pixel can take, at most 256.

    Raises:
        ValueError: If the largest value is not below ``levels``.
    """
    check_levels(levels)
    if images.numel() > 0 and (largest := int(images.max())) >= levels:
        raise ValueError(
            f"images has the value {largest}, beyond levels={levels}: pass more levels"
        )
