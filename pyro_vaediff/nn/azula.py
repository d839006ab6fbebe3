r"""Backbones for latents that are images, :math:`(C, h, w)`: the networks of azula.

The noise level and the context enter by modulation: Fourier features of the log-SNR and the context
make one vector, which scales and shifts the normalized features of each block (adaLN-Zero). Sides
may be of any length, odd ones too. No layer couples the examples of a batch: the norms are over the
channels of one pixel or token. The output starts at zero. azula is imported when it is needed.

References:
    | Azula: Diffusion models in PyTorch (Rozet et al., 2024)
    | https://github.com/probabilists/azula
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..arguments import check_whole
from .images import ImageBackbone
from .mlp import zero_last

__all__ = ["DiTBackbone", "UNetBackbone", "ViTBackbone"]


class Modulated(ImageBackbone):
    r"""A backbone around a network of azula's, called as ``net(z, mod)``.

    Arguments:
        event_shape: The shape :math:`(C, h, w)` of a latent.
        log_snr_range: The ends of the log-SNR, see :class:`~pyro_vaediff.nn.LogSNRFeatures`.
        num_outputs: The number of outputs per latent dimension.
        context_features: The number of features :math:`F` of the context.
    """

    embedding_dim = 32  #: The number of features of the log-SNR.
    mod_features = 64  #: The number of features of the modulation.
    net: nn.Module

    def __init__(
        self,
        event_shape: int | Sequence[int],
        log_snr_range: tuple[float, float],
        num_outputs: int,
        context_features: int,
    ):
        super().__init__(
            event_shape, log_snr_range, num_outputs, self.embedding_dim, context_features
        )
        inputs = self.embedding_dim + context_features
        self.modulation = nn.Sequential(nn.Linear(inputs, self.mod_features), nn.SiLU())

    def maps(self, z: Tensor, told: Tensor) -> Tensor:
        return self.net(z, self.modulation(told))


class UNetBackbone(Modulated):
    r"""The U-Net of azula: convolutions at full size, at half of it, and so on, and back.

    Arguments:
        event_shape: The shape :math:`(C, h, w)` of a latent.
        log_snr_range: The ends of the log-SNR, see :class:`~pyro_vaediff.nn.LogSNRFeatures`.
        num_outputs: The number of outputs per latent dimension.
        width: The number of channels at full size.
        channel_factors: The numbers of channels at each size, in multiples of the width.
        num_blocks: The number of residual blocks at each size, on the way down and on that up.
        context_features: The number of features :math:`F` of the context.

    References:
        | U-Net: Convolutional Networks for Biomedical Image Segmentation (Ronneberger et al., 2015)
        | https://arxiv.org/abs/1505.04597

    Example:
        >>> import torch
        >>> net = UNetBackbone((4, 8, 5), num_outputs=2)
        >>> [out.shape for out in net(torch.randn(10, 4, 8, 5), torch.zeros(10))]
        [torch.Size([10, 4, 8, 5]), torch.Size([10, 4, 8, 5])]
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        log_snr_range: tuple[float, float] = (-10.0, 10.0),
        num_outputs: int = 1,
        width: int = 32,
        channel_factors: Sequence[int] = (1, 2),
        num_blocks: int = 1,
        context_features: int = 0,
    ):
        super().__init__(event_shape, log_snr_range, num_outputs, context_features)
        check_whole("width", width, least=2, why=" as the norms are over the channels")
        check_whole("num_blocks", num_blocks)
        channels = self.event_shape[0]
        self.net = net = networks("unet").UNet(
            channels,
            num_outputs * channels,
            hid_channels=[width * factor for factor in channel_factors],
            hid_blocks=[num_blocks] * len(channel_factors),
            mod_features=self.mod_features,
        )
        zero_last(net.ascent[-1][-1])


class ViTBackbone(Modulated):
    r"""The vision transformer of azula, whose tokens are patches.

    Arguments:
        event_shape: The shape :math:`(C, h, w)` of a latent.
        log_snr_range: The ends of the log-SNR, see :class:`~pyro_vaediff.nn.LogSNRFeatures`.
        num_outputs: The number of outputs per latent dimension.
        width: The number of channels of a token, even.
        num_blocks: The number of transformer blocks.
        num_heads: The number of attention heads, or rather its greatest common divisor with the
            width.
        patch_size: The sides of a patch, or rather their greatest common divisors with :math:`h`
            and :math:`w`: along an odd side, a patch of 2 is a single pixel.
        context_features: The number of features :math:`F` of the context.

    References:
        | An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale (Dosovitskiy et
          al., 2021)
        | https://arxiv.org/abs/2010.11929
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        log_snr_range: tuple[float, float] = (-10.0, 10.0),
        num_outputs: int = 1,
        width: int = 64,
        num_blocks: int = 3,
        num_heads: int = 4,
        patch_size: int = 2,
        context_features: int = 0,
    ):
        super().__init__(event_shape, log_snr_range, num_outputs, context_features)
        check_whole("width", width, least=2)
        if width % 2:
            raise ValueError(f"the width of a transformer must be even, got {width}")
        counts = {"num_blocks": num_blocks, "num_heads": num_heads, "patch_size": patch_size}
        for name, count in counts.items():
            check_whole(name, count)
        channels, *sides = self.event_shape
        self.net = net = networks("vit").ViT(
            channels,
            num_outputs * channels,
            mod_features=self.mod_features,
            hid_channels=width,
            hid_blocks=num_blocks,
            patch_size=[math.gcd(patch_size, side) for side in sides],
            attention_heads=math.gcd(num_heads, width),
        )
        zero_last(net.out_proj)

    def forward(
        self, z: Tensor, log_snr: Tensor, c: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        # The fused attentions have no second gradients, which the probability flow takes.
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(z, log_snr, c)


class DiTBackbone(ViTBackbone):
    r"""The diffusion transformer of azula, with a token per pixel that is told its coordinates.

    This is :class:`ViTBackbone` with patches of one pixel, and takes several times longer. The
    arguments are the others of that class.

    References:
        | Scalable Diffusion Models with Transformers (Peebles & Xie, 2022)
        | https://arxiv.org/abs/2212.09748
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options | {"patch_size": 1})


def networks(name: str) -> ModuleType:
    r"""Returns a module of azula's networks."""
    try:
        return importlib.import_module(f"azula.nn.{name}")
    except ImportError as error:
        raise ValueError(f"the network azula.nn.{name} is missing: pip install azula") from error
