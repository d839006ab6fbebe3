r"""The contract of a head: the maps of a decoder in, a distribution over images out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..nn.scale import upcast
from .spaces import PixelSpace

__all__ = ["Likelihood"]


class Likelihood(nn.Module, ABC):
    r"""A head: from the maps of a decoder to :math:`p_\theta(x | z_0)`.

    A subclass defines ``_distribution`` and its usual :meth:`space`.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of one image.
        maps_per_channel: The number of decoder maps per image channel.
    """

    #: Whether the maps are the mean image in [-1, 1], and nothing else.
    mean_only: bool = False

    def __init__(self, image_shape: Sequence[int], maps_per_channel: int):
        super().__init__()
        shape = tuple(image_shape)
        if len(shape) != 3 or any(not isinstance(n, int) or n < 1 for n in shape):
            raise ValueError(f"image_shape must be three positive ints (C, H, W), got {shape}")
        #: The shape of one image.
        self.image_shape: tuple[int, int, int] = (shape[0], shape[1], shape[2])
        #: The number of channels that the decoder has to output.
        self.num_maps: int = maps_per_channel * shape[0]

    def forward(self, maps: Tensor) -> TorchDistribution:
        r"""Returns :math:`p_\theta(x | z_0)`, with event shape :math:`(C, H, W)`.

        Arguments:
            maps: The decoder's maps, with shape :math:`(*, M, H, W)` for :math:`M` maps.
        """
        expected = (self.num_maps, *self.image_shape[1:])
        if maps.shape[-3:] != expected:
            raise ValueError(f"maps must end in shape {expected}, got {tuple(maps.shape)}")
        p_x = self._distribution(upcast(maps))
        # Pyro's to_event would unwrap a distribution of images down to that of the pixels.
        return p_x if p_x.event_dim == 3 else p_x.to_event(3)

    @abstractmethod
    def space(self, levels: int = 256) -> PixelSpace:
        r"""Returns the pixel space that the distribution is over.

        Arguments:
            levels: The number of levels that a pixel can take, at most 256.
        """

    @abstractmethod
    def _distribution(self, maps: Tensor) -> TorchDistribution: ...

    def extra_repr(self) -> str:
        return f"image_shape={self.image_shape}, num_maps={self.num_maps}"
