r"""The networks of the paper's public code, as settings of :mod:`~pyro_vaediff.nn.conv`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .conv import ConvDecoder, ConvEncoder
from .vectors import Head

__all__ = ["paper_decoder", "paper_encoder"]

_DECODER_CHANNELS = {32: (512, 256, 128), 64: (512, 512, 512, 256)}


def paper_encoder(
    image_shape: Sequence[int], latent_dim: int, context_features: int | None = 0
) -> ConvEncoder:
    r"""The encoder of the paper's public code: its width is a quarter of the latent's dimension.

    With w = D / 4, the channels are w, 2w, 4w (32 pixels) or w, 2w, 4w, 4w (64 pixels), and the
    last convolution of that code, to 8w = 2D channels of 1 x 1, is the linear head here. BatchNorm
    and SELU. BatchNorm comes before the activation here and after it there.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of an image, with H = W in 32, 64.
        latent_dim: The dimension D of the latent, at least 4.
        context_features: The number of features of the context, ``None`` to ignore it.

    Returns:
        The encoder. Its BatchNorm couples the examples of a batch in train mode.

    Raises:
        ValueError: If an argument is not as above.
    """
    size = _paper_size(image_shape)
    if latent_dim < 4:
        raise ValueError(f"latent_dim must be at least 4 for the paper's encoder, got {latent_dim}")
    w = latent_dim // 4
    channels = (w, 2 * w, 4 * w) if size == 32 else (w, 2 * w, 4 * w, 4 * w)
    return ConvEncoder(
        image_shape,
        latent_dim,
        norm="batch",
        channels=channels,
        activation=nn.SELU,
        context_features=context_features,
    )


def paper_decoder(
    latent_dim: int, likelihood: Head, context_features: int | None = 0
) -> ConvDecoder:
    r"""The decoder of the paper's public code: 512, 256, 128 or 512, 512, 512, 256 channels.

    SELU, with BatchNorm at 32 pixels and without a norm at 64. Layers have biases, which that code
    left out. The paper's decoder outputs a mean only, through a tanh: so does this one if
    the likelihood reads nothing but a mean in [-1, 1] (a Gaussian with shared or fixed sigma), and
    the other likelihoods read the maps as they are.

    Arguments:
        latent_dim: The dimension D of the latent.
        likelihood: The likelihood, for images of 32 or 64 pixels.
        context_features: The number of features of the context, ``None`` to ignore it.

    Returns:
        The decoder.

    Raises:
        ValueError: If the image size is not as above.
    """
    size = _paper_size(likelihood.image_shape)
    return ConvDecoder(
        latent_dim,
        likelihood,
        norm="batch" if size == 32 else "none",
        channels=_DECODER_CHANNELS[size],
        activation=nn.SELU,
        tanh=getattr(likelihood, "mean_only", False),
        context_features=context_features,
    )


def _paper_size(image_shape: Sequence[int]) -> int:
    if tuple(image_shape)[1:] not in ((32, 32), (64, 64)):
        raise ValueError(f"image_shape must have 32 or 64 pixels a side, got {tuple(image_shape)}")
    return image_shape[1]
