r"""The contract of a likelihood: the maps of a decoder in, a distribution over images out."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..nn.scale import upcast

__all__ = ["Likelihood", "check_range"]


class Likelihood(nn.Module):
    r"""The contract: maps of the decoder in, a distribution over images out.

    A subclass defines `_distribution`, `_preprocess` and `to_unit`, and `log_bin_width` if x-space
    is continuous.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of one image.
        maps_per_channel: The number of decoder maps per image channel.

    Attributes:
        num_maps: The number of channels that the decoder has to output.
        discrete: Whether `log_prob` is a log-probability (in nats) rather than a log-density.
        mean_only: Whether the maps are the mean image in [-1, 1], and nothing else.
    """

    discrete: bool
    mean_only: bool = False

    def __init__(self, image_shape: tuple[int, int, int], maps_per_channel: int):
        super().__init__()
        image_shape = tuple(image_shape)
        if len(image_shape) != 3 or any(not isinstance(n, int) or n < 1 for n in image_shape):
            raise ValueError(
                f"image_shape must be three positive ints (C, H, W), got {image_shape}"
            )
        self.image_shape = image_shape
        self.num_maps = maps_per_channel * image_shape[0]

    def forward(self, params: Tensor) -> TorchDistribution:
        r"""Returns :math:`p_\theta(x \mid z_0)`.

        Arguments:
            params: The decoder's maps, with shape :math:`(*, \mathrm{num\_maps}, H, W)`.

        Returns:
            A distribution with batch shape :math:`(*)` and event shape :math:`(C, H, W)`.

        Raises:
            ValueError: If the last three dimensions of `params` are not as above.
        """
        expected = (self.num_maps, *self.image_shape[1:])
        if params.shape[-3:] != expected:
            raise ValueError(f"params must end in shape {expected}, got {tuple(params.shape)}")
        p_x = self._distribution(upcast(params))
        # Pyro's to_event would unwrap a distribution of images down to that of the pixels.
        return p_x if p_x.event_dim == 3 else p_x.to_event(3)

    def preprocess(self, images: Tensor, levels: int = 256) -> Tensor:
        r"""Takes 8-bit images to x-space, drawing noise afresh where the likelihood needs it.

        The values are not looked at, because that would synchronise the device in every training
        step; call `check_range` once where the data are loaded.

        Arguments:
            images: uint8 images with values 0 .. levels - 1 and shape :math:`(*, C, H, W)`.
            levels: The number of levels that a pixel can take, at most 256.

        Returns:
            The images in x-space, in the default dtype and with the shape of `images`.

        Raises:
            ValueError: If dtype, shape or `levels` are not as above.
        """
        check_levels(levels)
        if images.dtype != torch.uint8:
            raise ValueError(
                f"images must be uint8 with values 0..{levels - 1}, got {images.dtype}"
            )
        if images.shape[-3:] != self.image_shape:
            raise ValueError(
                f"images must end in shape {self.image_shape}, got {tuple(images.shape)}"
            )
        return self._preprocess(images.to(torch.get_default_dtype()), levels)

    def to_unit(self, x: Tensor, levels: int = 256) -> Tensor:
        r"""Takes images from x-space to [0, 1], where u becomes u / (levels - 1).

        Arguments:
            x: Images in x-space, of any shape: data, samples or means.
            levels: The number of levels that a pixel can take.

        Returns:
            The images in [0, 1], clamped, with the shape of `x`.
        """
        raise NotImplementedError

    def log_bin_width(self, levels: int = 256) -> float:
        r"""Returns the log of the volume of one pixel value in x-space, in nats (0 if discrete).

        Adding it to the log-density per dimension gives a lower bound on the log-probability.
        """
        return 0.0

    def _distribution(self, params: Tensor) -> TorchDistribution:
        raise NotImplementedError

    def _preprocess(self, u: Tensor, levels: int) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"image_shape={self.image_shape}, num_maps={self.num_maps}"


def check_levels(levels: int) -> None:
    if not isinstance(levels, int) or not 2 <= levels <= 256:
        raise ValueError(f"levels must be an int from 2 to 256 (images are uint8), got {levels}")


def check_range(images: Tensor, levels: int) -> None:
    r"""Checks once, where the data are loaded, that no pixel is beyond `levels`.

    Arguments:
        images: uint8 images of any shape.
        levels: The number of levels that a pixel can take, at most 256.

    Raises:
        ValueError: If the largest value is not below `levels`.
    """
    check_levels(levels)
    if images.numel() > 0 and (largest := int(images.max())) >= levels:
        raise ValueError(
            f"images has the value {largest}, beyond levels={levels}: pass more levels"
        )
