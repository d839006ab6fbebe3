r"""Masked convolutions: networks of images whose outputs at a pixel see only the pixels before it.

Pixels are ordered row by row, and the channels of a pixel after one another.

References:
    | Pixel Recurrent Neural Networks (van den Oord et al., 2016)
    | https://arxiv.org/abs/1601.06759

    | Conditional Image Generation with PixelCNN Decoders (van den Oord et al., 2016)
    | https://arxiv.org/abs/1606.05328
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import as_shape, check_whole
from .mlp import zero_last

__all__ = ["MaskedConv2d", "PixelCNN", "check_kernel_sizes"]


class MaskedConv2d(nn.Conv2d):
    r"""A convolution that sees the pixels before its own, without padding.

    Its kernel is the upper half of a square: the rows above the pixel, and its own row as far as
    the pixel. Channels are in groups, one per channel of the image, in their order. At the pixel
    itself, an output sees the inputs of the groups up to its own.

    Arguments:
        in_channels: The number of channels of the input.
        out_channels: The number of channels of the output.
        kernel_size: The side of the square, odd.
        num_groups: The number of groups.
        strict: Whether it sees those of the groups before its own only.
    """

    mask: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        num_groups: int = 1,
        strict: bool = False,
    ):
        center = kernel_size // 2
        super().__init__(in_channels, out_channels, (center + 1, kernel_size))
        group_in = torch.arange(in_channels) * num_groups // in_channels
        group_out = torch.arange(out_channels).unsqueeze(-1) * num_groups // out_channels
        mask = torch.ones_like(self.weight)
        mask[..., -1, center] = (group_in < group_out) if strict else (group_in <= group_out)
        mask[..., -1, center + 1 :] = 0
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        r"""Returns the outputs, with shape :math:`(N, C_\mathrm{out}, H - K // 2, W - K + 1)`.

        Arguments:
            x: The input, with shape :math:`(N, C_\mathrm{in}, H, W)`.
        """
        return F.conv2d(x, self.weight * self.mask, self.bias)


class MaskedResidual(nn.Module):
    r"""Adds masked convolutions of the features, :math:`h + f(h)`, where :math:`f` starts at zero.

    Arguments:
        channels: The number of channels.
        kernel_size: The side of the square that the first of them sees the upper half of, odd.
        num_groups: The number of groups, see :class:`MaskedConv2d`.
    """

    def __init__(self, channels: int, kernel_size: int, num_groups: int):
        super().__init__()
        self.reach = kernel_size // 2
        self.first = MaskedConv2d(channels, channels, kernel_size, num_groups)
        self.second = MaskedConv2d(channels, channels, 1, num_groups)
        zero_last(self.second)

    def forward(self, h: Tensor) -> Tensor:
        own = h[..., self.reach :, self.reach : h.shape[-1] - self.reach]
        return own + self.second(F.silu(self.first(F.silu(h))))


class PixelCNN(nn.Module):
    r"""A network of images, and of features beside them, with a local receptive field.

    A masked convolution looks at the image, and masked residual layers at what it saw and at the
    features. Images are padded once, such that an output is a function of the pixels in its
    receptive field alone, and can be computed from them.

    Arguments:
        num_channels: The number of channels :math:`C` of the image.
        num_features: The number of features :math:`F` per pixel.
        num_outputs: The number of outputs :math:`M` per pixel and channel.
        kernel_sizes: The sides of the kernels, odd: of the first convolution, then of a residual
            layer each. In ``(7, 1, 1)``, the depth is apart from the receptive field.
        width: The number of hidden channels.

    Attributes:
        reach: The number of rows above a pixel, and of columns on each side, that are seen.
        reach_of_features: The same, of the features.

    Raises:
        ValueError: If an argument is not as above.
    """

    def __init__(
        self,
        num_channels: int,
        num_features: int,
        num_outputs: int,
        kernel_sizes: Sequence[int] = (5, 3, 3, 3),
        width: int = 32,
    ):
        super().__init__()
        check_kernel_sizes("kernel_sizes", kernel_sizes)
        check_whole("num_features", num_features)
        check_whole("width", width, least=num_channels, why=" (one per channel of the image)")
        self.num_channels, self.num_outputs = num_channels, num_outputs
        first, *others = kernel_sizes
        self.reach_of_features = sum(size // 2 for size in others)
        self.reach = first // 2 + self.reach_of_features
        self.look = MaskedConv2d(num_channels, width, first, num_channels, strict=True)
        self.told = nn.Conv2d(num_features, width, 1)
        self.layers = nn.Sequential(*(MaskedResidual(width, size, num_channels) for size in others))
        self.outputs = MaskedConv2d(width, num_channels * num_outputs, 1, num_channels)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        r"""Returns the outputs, with shape :math:`(N, C, M, H, W)`.

        Arguments:
            x: The images, with shape :math:`(N, C, H, W)`.
            features: The features, with shape :math:`(N, F, H, W)`.
        """
        return self.inside(*self.padded(x, features))

    def padded(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns images and features in the zeros that are seen from their borders."""
        return pad(x, self.reach), pad(features, self.reach_of_features)

    def at(self, i: int, j: int, x: Tensor, features: Tensor) -> Tensor:
        r"""Returns the outputs of one pixel, with shape :math:`(N, C, M, 1, 1)`, from what it sees.

        Arguments:
            i: Its row.
            j: Its column.
            x: The images as :meth:`padded` returns them.
            features: The features as :meth:`padded` returns them.
        """
        return self.inside(seen(x, i, j, self.reach), seen(features, i, j, self.reach_of_features))

    def inside(self, x: Tensor, features: Tensor) -> Tensor:
        r"""Returns the outputs of those pixels all of whose receptive field is given."""
        # Convolutions of so few channels are several times faster with the channels last.
        h = self.look(x).contiguous(memory_format=torch.channels_last)
        h = h + self.told(features.contiguous(memory_format=torch.channels_last))
        h = self.outputs(F.silu(self.layers(h)))
        return h.unflatten(1, (self.num_channels, self.num_outputs))


def pad(images: Tensor, reach: int) -> Tensor:
    return F.pad(images, (reach, reach, reach, 0))


def seen(images: Tensor, i: int, j: int, reach: int) -> Tensor:
    r"""Returns the part of padded images that is seen from the pixel in row i and column j."""
    return images[..., i : i + reach + 1, j : j + 2 * reach + 1]


def check_kernel_sizes(argument: str, sizes: Sequence[int]) -> None:
    r"""Raises a ``ValueError`` unless the sizes are those of kernels that have a center."""
    if any(size % 2 == 0 for size in as_shape(argument, sizes)):
        raise ValueError(f"{argument} must be odd, got {tuple(sizes)}")
