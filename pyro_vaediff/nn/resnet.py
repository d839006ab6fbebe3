r"""Residual encoders and decoders, whose latents are vectors or images.

The encoder halves the image until its sides are those of the latent, the decoder is its mirror
image. For a vector, it halves down to 3 to 6 pixels, which a linear layer reads. There is no norm:
a residual branch ends in a layer that starts at zero, so that the network starts as a shallow one
and examples never see each other. An image whose sides do not halve so often is padded with zeros.

References:
    | Deep Residual Learning for Image Recognition (He et al., 2016)
    | https://arxiv.org/abs/1512.03385

    | Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images
      (Child, 2021)
    | https://arxiv.org/abs/2011.10650
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..arguments import as_shape, check_ends, check_whole
from .conv import check_image_size, count_halvings, halved
from .mlp import zero_last
from .vectors import Head, check_scales, gaussian, with_context

__all__ = ["ResNetDecoder", "ResNetEncoder", "check_latent_shape"]


class ResidualBlock2d(nn.Module):
    r"""Adds two convolutions of the features, :math:`h + f(h)`, where :math:`f` starts at zero.

    Arguments:
        channels: The number of channels.
        told: The number of features of what else the block is told, which moves its hidden
            channels; 0 for nothing.
    """

    def __init__(self, channels: int, told: int = 0):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        zero_last(self.second)
        if told:
            self.told = nn.Linear(told, channels)

    def forward(self, h: Tensor, told: Tensor | None = None) -> Tensor:
        r"""Returns the features, with shape :math:`(N, C, H, W)`.

        Arguments:
            h: The features, with that shape.
            told: What else there is, with shape :math:`(N, E)`.
        """
        hidden = self.first(F.silu(h))
        if told is not None:
            hidden = hidden + self.told(told)[..., None, None]
        return h + self.second(F.silu(hidden))


class Ladder(NamedTuple):
    r"""The geometry of a network, from the image inwards.

    Arguments:
        channels: The channels at each resolution, the first of which is half of the image's.
        sides: The height and width of the last features.
        pad: The zeros around the image, as ``torch.nn.functional.pad`` takes them.
    """

    channels: tuple[int, ...]
    sides: tuple[int, int]
    pad: tuple[int, int, int, int]


def check_latent_shape(latent_shape: Sequence[int], image_shape: Sequence[int]) -> None:
    r"""Raises a ``ValueError`` unless a latent is a vector, or an image that halvings arrive at.

    Arguments:
        latent_shape: The shape :math:`(D,)` or :math:`(C, h, w)` of a latent.
        image_shape: The shape :math:`(C, H, W)` of an image.
    """
    make_ladder(image_shape, latent_shape, 1)


def make_ladder(image_shape: Sequence[int], latent_shape: Sequence[int], width: int) -> Ladder:
    r"""Returns the geometry of a network, after a check of its arguments."""
    check_image_size(*image_shape[1:])
    check_whole("width", width)
    shape, (height, columns) = as_shape("latent_shape", latent_shape), image_shape[1:]
    deepest = count_halvings(image_shape)
    sizes = [halved(image_shape, n)[0] for n in range(1, deepest + 2)]
    if len(shape) == 1:
        halvings = deepest
    elif len(shape) == 3 and tuple(shape[1:]) in sizes:
        halvings = 1 + sizes.index((shape[1], shape[2]))
    else:
        choices = ", ".join(f"{h} x {w}" for h, w in sizes)
        raise ValueError(
            f"latent_shape must be D or C h w, where images of {height} x {columns} pixels halve "
            f"to h x w = {choices}, got {' '.join(map(str, shape))}"
        )
    channels = tuple(width * min(2**i, 4) for i in range(halvings))
    return Ladder(channels, *halved(image_shape, halvings))


class ResNetEncoder(nn.Module):
    r"""The amortized posterior :math:`q_\psi(z_0 \mid x) = \mathcal{N}(m(x), s(x)^2)`.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of an image, with H and W from 8 to 256.
        latent_shape: The shape :math:`(C, h, w)` of a latent, where :math:`h \times w` is the
            image's size after one or more halvings; a number :math:`D` means a vector.
        width: The number of channels after the first halving; it doubles up to 4 times that.
        num_blocks: The number of residual blocks per resolution.
        min_scale: The lower bound of s(x), in the units of the latent.
        max_scale: The upper bound of s(x), in the units of the latent.
        context_features: The number of features :math:`F` of the context, ``None`` to ignore it.

    Raises:
        ValueError: If an argument is not as above.

    Example:
        >>> import torch
        >>> encoder = ResNetEncoder((3, 32, 32), (4, 8, 8), width=8)
        >>> encoder(torch.zeros(5, 3, 32, 32)).event_shape
        torch.Size([4, 8, 8])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        latent_shape: int | Sequence[int],
        width: int = 32,
        num_blocks: int = 1,
        min_scale: float = 1e-4,
        max_scale: float = 1e2,
        *,
        context_features: int | None = 0,
    ):
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.latent_shape = as_shape("latent_shape", latent_shape)
        ladder = make_ladder(self.image_shape, self.latent_shape, width)
        check_whole("num_blocks", num_blocks)
        check_scales(min_scale, max_scale)
        self.min_scale, self.max_scale = min_scale, max_scale
        self.context_features, self.pad = context_features, ladder.pad

        layers: list[nn.Module] = []
        before = self.image_shape[0] + (context_features or 0)
        for after in ladder.channels:
            layers.append(nn.Conv2d(before, after, 4, stride=2, padding=1))
            layers += [ResidualBlock2d(after) for _ in range(num_blocks)]
            before = after
        self.features = nn.Sequential(*layers, nn.SiLU())
        if len(self.latent_shape) == 1:
            size = before * math.prod(ladder.sides)
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(size, 2 * self.latent_shape[0]))
        else:
            self.head = nn.Sequential(nn.Conv2d(before, 2 * self.latent_shape[0], 3, padding=1))

    def forward(self, x: Tensor, c: Tensor | None = None) -> TorchDistribution:
        r"""Returns :math:`q_\psi(z_0 \mid x)`.

        Arguments:
            x: Images in x-space, with shape :math:`(*, C, H, W)`.
            c: The context, with shape :math:`(B, F)`; the last of the leading dimensions is B.

        Returns:
            A Gaussian with batch shape :math:`(*)` and the event shape of a latent.

        Raises:
            ValueError: If the last three dimensions of ``x`` are not as above.
        """
        check_ends("x", x, self.image_shape)
        x = with_maps(x, c, self.context_features)
        outputs = self.head(self.features(F.pad(x.reshape(-1, *x.shape[-3:]), self.pad)))
        outputs = outputs.reshape(*x.shape[:-3], *outputs.shape[1:])
        return gaussian(outputs, self.min_scale, self.max_scale, len(self.latent_shape))


class ResNetDecoder(nn.Module):
    r"""The decoder :math:`p_\theta(x \mid z_0)`: maps from the latent, read by a likelihood.

    Arguments:
        latent_shape: The shape :math:`(C, h, w)` of a latent, or the number :math:`D` of a vector's
            dimensions, as in :class:`ResNetEncoder`.
        likelihood: The likelihood that reads the maps; its ``image_shape`` is the decoder's.
        width: The number of channels before the last doubling, as in :class:`ResNetEncoder`.
        num_blocks: The number of residual blocks per resolution.
        context_features: The number of features :math:`F` of the context, ``None`` to ignore it.

    Raises:
        ValueError: If an argument is not as above.
    """

    def __init__(
        self,
        latent_shape: int | Sequence[int],
        likelihood: Head,
        width: int = 32,
        num_blocks: int = 1,
        *,
        context_features: int | None = 0,
    ):
        super().__init__()
        self.latent_shape = as_shape("latent_shape", latent_shape)
        ladder = make_ladder(likelihood.image_shape, self.latent_shape, width)
        check_whole("num_blocks", num_blocks)
        self.likelihood, self.context_features = likelihood, context_features
        self.pad = [-p for p in ladder.pad]

        before, *rest = reversed(ladder.channels)
        inputs = self.latent_shape[0] + (context_features or 0)
        layers: list[nn.Module] = [nn.Conv2d(inputs, before, 3, padding=1)]
        if len(self.latent_shape) == 1:
            first = nn.Linear(inputs, before * math.prod(ladder.sides))
            layers = [first, nn.Unflatten(-1, (before, *ladder.sides))]
        for after in (*rest, likelihood.num_maps):
            layers += [ResidualBlock2d(before) for _ in range(num_blocks)]
            layers += [nn.SiLU(), nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)]
            before = after
        self.maps = nn.Sequential(*layers)

    def forward(self, z: Tensor, c: Tensor | None = None) -> TorchDistribution:
        r"""Returns :math:`p_\theta(x \mid z_0)`.

        Arguments:
            z: Latents, with shape :math:`(*, \dots)`.
            c: The context, with shape :math:`(B, F)`; the last of the leading dimensions is B.

        Returns:
            A distribution with batch shape :math:`(*)` and event shape :math:`(C, H, W)`.

        Raises:
            ValueError: If the last dimensions of ``z`` are not those of a latent.
        """
        check_ends("z", z, self.latent_shape)
        event_dim = len(self.latent_shape)
        batch = z.shape[: z.ndim - event_dim]
        told = with_maps if event_dim == 3 else with_context
        h = told(z, c, self.context_features)
        maps = F.pad(self.maps(h.reshape(-1, *h.shape[-event_dim:])), self.pad)
        return self.likelihood(maps.reshape(*batch, *maps.shape[1:]))


def with_maps(images: Tensor, c: Tensor | None, context_features: int | None) -> Tensor:
    r"""Returns images with the features of a context as further, constant channels.

    Arguments:
        images: The images, with shape :math:`(*, B, C, H, W)`.
        c: The context, with shape :math:`(B, F)`, or ``None`` if F = 0.
        context_features: The number of features F that the network was made for, ``None`` to
            ignore the context.
    """
    # Contexts are joined to the last dimension.
    features = images.movedim(-3, -1)
    c = None if c is None else c[:, None, None]
    return with_context(features, c, context_features).movedim(-1, -3)
