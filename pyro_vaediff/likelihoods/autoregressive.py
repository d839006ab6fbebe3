r"""Autoregressive likelihoods, whose pixels are given the pixels before them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor

from ..nn.pixelcnn import PixelCNN
from ..nn.scale import upcast
from .base import Likelihood
from .spaces import PixelSpace

__all__ = ["AutoregressiveImages", "AutoregressiveLikelihood"]


class AutoregressiveLikelihood(Likelihood):
    r"""Pixels given the pixels before them in a window, and features of the latents.

    .. math:: p_\theta(x \mid z_0) = \prod_i p_\theta(x_i \mid x_{W(i)}, f(z_0))

    The maps of the decoder are the features :math:`f`. A :class:`~pyro_vaediff.nn.PixelCNN` sees
    them and a window :math:`W(i)` of the pixels before a pixel, and outputs the maps of another
    likelihood. What pixels have in common with their neighbors, such as strokes and textures, is
    then modeled there; the latents are needed for whatever is larger than the window, and tend to
    hold only that. The channels of a pixel are given the channels before them.

    Arguments:
        pixel: The likelihood of one channel, for images of shape :math:`(1, H, W)`.
        num_channels: The number of channels :math:`C` of an image.
        num_features: The number of features per pixel, which are the maps of the decoder.
        kernel_sizes: The sides of the kernels of the network, odd, which make the window: of its
            first convolution, then of a residual layer each.
        width: The number of its hidden channels.

    Raises:
        ValueError: If an argument is not as above.

    References:
        | Variational Lossy Autoencoder (Chen et al., 2017)
        | https://arxiv.org/abs/1611.02731

        | PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other
          Modifications (Salimans et al., 2017)
        | https://arxiv.org/abs/1701.05517

    Example:
        >>> from pyro_vaediff.likelihoods import BernoulliLikelihood
        >>> likelihood = AutoregressiveLikelihood(BernoulliLikelihood((1, 8, 8)), num_features=4)
        >>> p_x = likelihood(torch.zeros(5, 4, 8, 8))
        >>> p_x.log_prob(p_x.sample()).shape
        torch.Size([5])
    """

    def __init__(
        self,
        pixel: Likelihood,
        num_channels: int = 1,
        num_features: int = 8,
        kernel_sizes: Sequence[int] = (5, 3, 3, 3),
        width: int = 32,
    ):
        if pixel.image_shape[0] != 1:
            raise ValueError(
                f"pixel must be a likelihood of one channel, (1, H, W), got {pixel.image_shape}"
            )
        super().__init__((num_channels, *pixel.image_shape[1:]), maps_per_channel=1)
        self.num_maps = num_features
        self.pixel = pixel
        self.net = PixelCNN(num_channels, num_features, pixel.num_maps, kernel_sizes, width)

    @property
    def receptive_field(self) -> tuple[int, int]:
        r"""The height and width that the window is within; its last row ends before the pixel."""
        return self.net.reach + 1, 2 * self.net.reach + 1

    def space(self, levels: int = 256) -> PixelSpace:
        return self.pixel.space(levels)

    def _distribution(self, params: Tensor) -> TorchDistribution:
        return AutoregressiveImages(self.net, self.pixel, params)


class AutoregressiveImages(TorchDistribution):
    r"""The distribution of images whose pixels are given the pixels before them.

    It is scored in one pass of the network. It is sampled pixel by pixel and channel by channel,
    with a pass for one window each. It has no mean and no mode in closed form.

    Arguments:
        net: The network, which maps images and features to the maps of each channel.
        pixel: The likelihood that reads these maps.
        features: The features, with shape :math:`(*, F, H, W)`.
        validate_args: Whether values are checked; ``None`` takes Pyro's setting.
    """

    arg_constraints: ClassVar = {}

    def __init__(
        self,
        net: PixelCNN,
        pixel: Likelihood,
        features: Tensor,
        validate_args: bool | None = None,
    ):
        self.net, self.pixel, self.features = net, pixel, features
        event_shape = Size((net.num_channels, *features.shape[-2:]))
        super().__init__(features.shape[:-3], event_shape, validate_args)

    @property
    def support(self) -> constraints.Constraint:
        law = self.channel(self.features.new_zeros(1, self.net.num_outputs, 1, 1))
        return constraints.independent(law.support, 3 - law.event_dim)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> AutoregressiveImages:
        return AutoregressiveImages(
            self.net, self.pixel, self.expanded(batch_shape), self._validate_args
        )

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        batch_shape = torch.broadcast_shapes(value.shape[:-3], self.batch_shape)
        x = value.expand(*batch_shape, *self.event_shape).reshape(-1, *self.event_shape)
        maps = self.net(x, self.expanded(batch_shape).reshape(-1, *self.features.shape[-3:]))
        return self.pixel(maps).log_prob(x.unsqueeze(2)).sum(-1).reshape(batch_shape)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        batch_shape = Size(sample_shape) + self.batch_shape
        C, H, W = self.event_shape
        reach = self.net.reach
        features = self.expanded(batch_shape).reshape(-1, *self.features.shape[-3:])
        x = features.new_zeros(len(features), C, H, W)
        x, features = self.net.padded(x, features)
        for i, j, c in product(range(H), range(W), range(C)):
            maps = self.net.at(i, j, x, features)
            x[:, c, i + reach, j + reach] = self.channel(maps[:, c]).sample().flatten()
        return x[..., reach:, reach : reach + W].reshape(*batch_shape, C, H, W)

    def channel(self, maps: Tensor) -> TorchDistribution:
        r"""Returns the distribution of one channel of one pixel, with maps of size 1 × 1."""
        return self.pixel._distribution(upcast(maps))

    def expanded(self, batch_shape: Sequence[int]) -> Tensor:
        return self.features.expand(*batch_shape, *self.features.shape[-3:])
