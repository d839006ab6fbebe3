r"""The contract of a likelihood: the maps of a decoder in, a distribution over images out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..arguments import check_ends
from ..nn.scale import upcast
from .spaces import PixelSpace

__all__ = ["Likelihood"]


class Likelihood(nn.Module):
    r"""The contract of a head: maps of the decoder in, a distribution over images out.

    A subclass defines ``_distribution`` and the type of its usual pixel space.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of one image.
        maps_per_channel: The number of decoder maps per image channel.

    Attributes:
        num_maps: The number of channels that the decoder has to output.
        mean_only: Whether the maps are the mean image in [-1, 1], and nothing else.
    """

    space_type: ClassVar[type[PixelSpace]]
    mean_only: bool = False

    def __init__(self, image_shape: Sequence[int], maps_per_channel: int):
        super().__init__()
        if len(image_shape) != 3 or any(not isinstance(n, int) or n < 1 for n in image_shape):
            raise ValueError(
                f"image_shape must be three positive ints (C, H, W), got {tuple(image_shape)}"
            )
        channels, height, width = image_shape
        self.image_shape: tuple[int, int, int] = (channels, height, width)
        self.num_maps = maps_per_channel * channels

    def forward(self, params: Tensor) -> TorchDistribution:
        r"""Returns :math:`p_\theta(x \mid z_0)`.

        Arguments:
            params: The decoder's maps, with shape :math:`(*, \mathrm{num\_maps}, H, W)`.

        Returns:
            A distribution with batch shape :math:`(*)` and event shape :math:`(C, H, W)`.

        Raises:
            ValueError: If the last three dimensions of ``params`` are not as above.
        """
        expected = (self.num_maps, *self.image_shape[1:])
        check_ends("params", params, expected)
        p_x = self._distribution(upcast(params))
        # Pyro's to_event would unwrap a distribution of images down to that of the pixels.
        return p_x if p_x.event_dim == 3 else p_x.to_event(3)

    def space(self, levels: int = 256) -> PixelSpace:
        r"""Returns the pixel space that images are usually in under this likelihood.

        Arguments:
            levels: The number of levels that a pixel of the data can take, at most 256.
        """
        return self.space_type(levels)

    def _distribution(self, params: Tensor) -> TorchDistribution:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"image_shape={self.image_shape}, num_maps={self.num_maps}"
