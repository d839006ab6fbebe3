r"""Masked convolutions: networks of images whose outputs at a pixel see only the pixels before it.

Pixels are ordered row by row, and the channels of a pixel after one another.

References:
    | Pixel Recurrent Neural Networks (van den Oord et al., 2016)
    | https://arxiv.org/abs/1601.06759

    | Conditional Image Generation with PixelCNN Decoders (van den Oord et al., 2016)
    | https://arxiv.org/abs/1606.05328
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_whole
from .mlp import zero_last

__all__ = ["MaskedConv2d", "PixelCNN"]


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


class PixelCNN(nn.Module):
    r"""A network of images, and of features beside them, with a local receptive field.

    A masked convolution looks at a window of the pixels before each pixel. Residual layers of that
    pixel take in what it saw and the features: so the receptive field is the window, whatever the
    depth, it has no blind spot, and a pixel is sampled from its window alone.

    Arguments:
        num_channels: The number of channels :math:`C` of the image.
        num_features: The number of features :math:`F` per pixel.
        num_outputs: The number of outputs :math:`M` per pixel and channel.
        kernel_size: The side :math:`K` of the window, odd.
        width: The number of hidden channels.
        num_layers: The number of residual layers.

    Attributes:
        reach: The number of rows above a pixel, and of columns on each side, that are seen.

    Raises:
        ValueError: If an argument is not as above.
    """

    def __init__(
        self,
        num_channels: int,
        num_features: int,
        num_outputs: int,
        kernel_size: int = 7,
        width: int = 32,
        num_layers: int = 2,
    ):
        super().__init__()
        check_whole("num_layers", num_layers, least=0)
        check_whole("width", width, least=num_channels, why=" (one per channel of the image)")
        check_whole("num_features", num_features)
        check_whole("kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.num_channels, self.num_outputs = num_channels, num_outputs
        self.reach = kernel_size // 2
        self.look = MaskedConv2d(num_channels, width, kernel_size, num_channels, strict=True)
        self.told = nn.Conv2d(num_features, width, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(),
                MaskedConv2d(width, width, num_groups=num_channels),
                nn.SiLU(),
                zero_last(MaskedConv2d(width, width, num_groups=num_channels)),
            )
            for _ in range(num_layers)
        )
        self.outputs = MaskedConv2d(width, num_channels * num_outputs, num_groups=num_channels)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        r"""Returns the outputs, with shape :math:`(N, C, M, H, W)`.

        Arguments:
            x: The images, with shape :math:`(N, C, H, W)`.
            features: The features, with shape :math:`(N, F, H, W)`.
        """
        return self.inside(self.padded(x), features)

    def padded(self, x: Tensor) -> Tensor:
        r"""Returns images in the zeros that the windows at their borders see."""
        return F.pad(x, (self.reach, self.reach, self.reach, 0))

    def inside(self, x: Tensor, features: Tensor) -> Tensor:
        r"""Returns the outputs of pixels whose windows are given, with shape as in `forward`.

        Arguments:
            x: The part of the padded images that these pixels see.
            features: Their features.
        """
        # Convolutions of so few channels are several times faster with the channels last.
        h = self.look(x).contiguous(memory_format=torch.channels_last)
        h = h + self.told(features.contiguous(memory_format=torch.channels_last))
        for layer in self.layers:
            h = h + layer(h)
        return self.outputs(F.silu(h)).unflatten(1, (self.num_channels, self.num_outputs))
