r"""A small residual convolutional network as a backbone, for latents that are images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import as_shape, check_whole
from .images import ImageBackbone
from .mlp import zero_last
from .resnet import ResidualBlock2d

__all__ = ["ConvBackbone"]


class ConvBackbone(ImageBackbone):
    r"""Residual blocks of convolutions at the resolution of the latents.

    Each block is told Fourier features of the log-SNR, and a context that is a vector. A context
    that is an image, such as the state of a hierarchy, comes as further channels. The output starts
    at zero.

    Arguments:
        event_shape: The shape :math:`(C, h, w)` of a latent.
        log_snr_range: The ends of the log-SNR, see :class:`~pyro_vaediff.nn.LogSNRFeatures`.
        num_outputs: The number of outputs per latent dimension.
        width: The number of channels.
        num_blocks: The number of residual blocks.
        embedding_dim: The number of features of the log-SNR, even.
        context_features: The number of features :math:`F` of the context, or its shape :math:`(F,
            h, w)`; 0 for none.

    Example:
        >>> backbone = ConvBackbone((4, 8, 8), context_features=(16, 8, 8))
        >>> backbone(torch.randn(5, 4, 8, 8), torch.zeros(5), torch.randn(5, 16, 8, 8)).abs().max()
        tensor(0., grad_fn=<MaxBackward1>)
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        log_snr_range: tuple[float, float] = (-10.0, 10.0),
        num_outputs: int = 1,
        width: int = 64,
        num_blocks: int = 3,
        embedding_dim: int = 32,
        context_features: int | Sequence[int] = 0,
    ):
        shape = as_shape("context_features", context_features) if context_features else ()
        channels, features = (shape[0] if len(shape) == n else 0 for n in (3, 1))
        super().__init__(event_shape, log_snr_range, num_outputs, embedding_dim, features)
        check_whole("width", width)
        check_whole("num_blocks", num_blocks)
        if len(shape) > 1 and shape[1:] != self.event_shape[1:]:
            raise ValueError(
                f"context_features must be F or (F, h, w) with the sides of the latents, "
                f"{tuple(self.event_shape[1:])}, got {shape}"
            )
        self.context_channels = channels
        self.inputs = nn.Conv2d(self.event_shape[0] + channels, width, 3, padding=1)
        told = embedding_dim + features
        self.blocks = nn.ModuleList(ResidualBlock2d(width, told) for _ in range(num_blocks))
        self.outputs = zero_last(nn.Conv2d(width, num_outputs * self.event_shape[0], 3, padding=1))

    def forward(
        self, z: Tensor, log_snr: Tensor, c: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        r"""Returns the outputs.

        Arguments:
            z: The latents :math:`z_t`, with shape :math:`(N, C, h, w)`.
            log_snr: The log-SNR, with shape :math:`(N,)`.
            c: The context, with shape :math:`(N, F)` or :math:`(N, F, h, w)`.
        """
        if self.context_channels and c is not None:
            z, c = torch.cat([z, c], 1), None
        return super().forward(z, log_snr, c)

    def maps(self, z: Tensor, told: Tensor) -> Tensor:
        h = self.inputs(z)
        for block in self.blocks:
            h = block(h, told)
        return self.outputs(F.silu(h))
