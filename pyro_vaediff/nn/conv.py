r"""Convolutional encoders and decoders in the manner of DCGAN, for images of 8 to 256 pixels.

The encoder halves the image with strided convolutions down to 3 to 6 pixels along its shorter side
and reads the posterior off these features with a linear layer; the decoder is its mirror image. An
image whose sides do not halve so often is padded with zeros. Three choices are ours:

- There is no norm by default. GroupNorm (``norm="group"``) treats each example alone as well, but
  networks of this depth train faster without. BatchNorm (``norm="batch"``, the norm of DCGAN)
  couples the examples of a batch in training: then "the ELBO of one datum" is not defined.
- No norm follows the layer that sees the image (as in DCGAN). In the decoder, GroupNorm does not
  follow the layer that sees the latent either: it would divide out the length of the latent.
- The activation is SiLU. SELU, which the 2021 code used, takes many times longer on a CPU.

References:
    | Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks
      (Radford et al., 2016)
    | https://arxiv.org/abs/1511.06434

    | Group Normalization (Wu & He, 2018)
    | https://arxiv.org/abs/1803.08494
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..arguments import check_choice, check_ends, check_whole
from .vectors import Head, check_scales, gaussian, with_context

__all__ = ["ConvDecoder", "ConvEncoder", "check_image_size"]

Kernel = tuple[int, int, int]  # its size, stride and padding, in the order of torch's arguments
_HALVE: Kernel = (4, 2, 1)
_KEEP: Kernel = (3, 1, 1)

_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group": lambda channels: nn.GroupNorm(8 if channels % 8 == 0 else 1, channels),
    "batch": nn.BatchNorm2d,
    "none": lambda channels: nn.Identity(),
}


class ConvEncoder(nn.Module):
    r"""The amortized posterior :math:`q_\psi(z_0 \mid x) = \mathcal{N}(m(x), s(x)^2)`.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of an image, with H and W from 8 to 256.
        latent_dim: The dimension D of the latent.
        width: The number of channels after the first convolution; it doubles up to 8 times that.
        norm: ``"group"`` (examples stay independent), ``"batch"`` (they do not) or ``"none"``.
        min_scale: The lower bound of s(x), in the units of the latent.
        max_scale: The upper bound of s(x), in the units of the latent.
        channels: The channels after each convolution, from the image inwards, in place of
            ``width``.
        activation: The activation module.
        context_features: The number of features :math:`F` of the context, ``None`` to ignore it.

    Raises:
        ValueError: If an argument is not as above.

    Example:
        >>> import torch
        >>> encoder = ConvEncoder((1, 8, 8), latent_dim=2)
        >>> encoder(torch.zeros(5, 1, 8, 8))
        Independent(Normal(loc: torch.Size([5, 2]), scale: torch.Size([5, 2])), 1)
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        latent_dim: int,
        width: int = 32,
        norm: str = "none",
        min_scale: float = 1e-4,
        max_scale: float = 1e2,
        *,
        channels: Sequence[int] | None = None,
        activation: type[nn.Module] = nn.SiLU,
        context_features: int | None = 0,
    ):
        super().__init__()
        plan = make_plan(image_shape, latent_dim, width, norm, channels)
        check_scales(min_scale, max_scale)
        self.image_shape = tuple(image_shape)
        self.latent_dim = latent_dim
        self.min_scale, self.max_scale = min_scale, max_scale
        self.context_features = context_features
        self.pad = plan.pad

        layers: list[nn.Module] = []
        before = self.image_shape[0]
        for i, (kernel, after) in enumerate(zip(plan.kernels, plan.channels, strict=True)):
            layers.append(initialized(nn.Conv2d(before, after, *kernel), activation))
            layers += [_NORMS[norm if i > 0 else "none"](after), activation()]
            before = after
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(
            before * math.prod(plan.sides) + (context_features or 0), 2 * latent_dim
        )

    def forward(self, x: Tensor, c: Tensor | None = None) -> TorchDistribution:
        r"""Returns :math:`q_\psi(z_0 \mid x)`.

        Arguments:
            x: Images in x-space, with shape :math:`(*, C, H, W)`.
            c: The context, with shape :math:`(B, F)`; the last of the leading dimensions is B.

        Returns:
            A Gaussian with batch shape :math:`(*)` and event shape :math:`(D,)`.

        Raises:
            ValueError: If the last three dimensions of ``x`` are not as above.
        """
        check_ends("x", x, self.image_shape)

        # Convolutions take one batch dimension; vectorized particles bring more of them.
        flat = F.pad(x.reshape(-1, *self.image_shape), self.pad)
        h = self.features(flat)
        h = with_context(h.reshape(*x.shape[:-3], h.shape[-1]), c, self.context_features)
        return gaussian(self.head(h), self.min_scale, self.max_scale)


class ConvDecoder(nn.Module):
    r"""The decoder :math:`p_\theta(x \mid z_0)`: maps from the latent, read by a likelihood.

    Arguments:
        latent_dim: The dimension D of the latent.
        likelihood: The likelihood that reads the maps; its ``image_shape`` is the decoder's.
        width: The number of channels before the last convolution, as in :class:`ConvEncoder`.
        norm: ``"group"`` (examples stay independent), ``"batch"`` (they do not) or ``"none"``.
        channels: The channels before each convolution, from the latent outwards, in place of
            ``width``.
        activation: The activation module.
        tanh: Whether the maps go through a tanh; only for likelihoods that read a mean in [-1, 1].
        context_features: The number of features :math:`F` of the context, ``None`` to ignore it.

    Raises:
        ValueError: If an argument is not as above.
    """

    def __init__(
        self,
        latent_dim: int,
        likelihood: Head,
        width: int = 32,
        norm: str = "none",
        *,
        channels: Sequence[int] | None = None,
        activation: type[nn.Module] = nn.SiLU,
        tanh: bool = False,
        context_features: int | None = 0,
    ):
        super().__init__()
        inwards = None if channels is None else tuple(reversed(channels))
        plan = make_plan(likelihood.image_shape, latent_dim, width, norm, inwards)
        if tanh and not getattr(likelihood, "mean_only", False):
            raise ValueError(
                f"tanh needs a likelihood whose maps are a mean in [-1, 1], got {likelihood}"
            )
        self.latent_dim = latent_dim
        self.likelihood = likelihood
        self.context_features = context_features
        self.pad = [-p for p in plan.pad]

        before, *rest = reversed(plan.channels)
        layers: list[nn.Module] = [
            nn.Linear(latent_dim + (context_features or 0), before * math.prod(plan.sides)),
            nn.Unflatten(-1, (before, *plan.sides)),
            _NORMS["none" if norm == "group" else norm](before),
            activation(),
        ]
        for kernel, after in zip(plan.kernels[:0:-1], rest, strict=True):
            layers.append(initialized(nn.ConvTranspose2d(before, after, *kernel), activation))
            layers += [_NORMS[norm](after), activation()]
            before = after
        output = nn.ConvTranspose2d(before, likelihood.num_maps, *plan.kernels[0])
        layers += [initialized(output, activation), nn.Tanh() if tanh else nn.Identity()]
        self.maps = nn.Sequential(*layers)

    def forward(self, z: Tensor, c: Tensor | None = None) -> TorchDistribution:
        r"""Returns :math:`p_\theta(x \mid z_0)`.

        Arguments:
            z: Latents, with shape :math:`(*, D)`.
            c: The context, with shape :math:`(B, F)`; the last of the leading dimensions is B.

        Returns:
            A distribution with batch shape :math:`(*)` and event shape :math:`(C, H, W)`.

        Raises:
            ValueError: If the last dimension of ``z`` is not D.
        """
        check_ends("z", z, (self.latent_dim,))

        h = with_context(z, c, self.context_features)
        maps = F.pad(self.maps(h.reshape(-1, h.shape[-1])), self.pad)
        return self.likelihood(maps.reshape(*z.shape[:-1], *maps.shape[1:]))


# --- Geometry and initialization ----------------------------------------------------------------


class Plan(NamedTuple):
    r"""The geometry of a network, from the image inwards.

    Arguments:
        kernels: The convolutions. A transposed one with the same geometry undoes a change of size.
        channels: The channels after each of them.
        sides: The height and width of the last features.
        pad: The zeros around the image, as ``torch.nn.functional.pad`` takes them.
    """

    kernels: list[Kernel]
    channels: tuple[int, ...]
    sides: tuple[int, int]
    pad: tuple[int, int, int, int]


def check_image_size(height: int, width: int | None = None) -> None:
    r"""Raises a ``ValueError`` unless the convolutional networks take images of that size.

    Arguments:
        height: The number of rows.
        width: The number of columns, or ``None`` for square images.
    """
    width = height if width is None else width
    for side in (height, width):
        if not isinstance(side, int) or not 8 <= side <= 256:
            raise ValueError(
                f"images of {height} x {width} pixels: the convolutional networks take 8 to 256 "
                "pixels a side: resize the images (--image-size), or use networks of your own"
            )


def make_plan(
    image_shape: Sequence[int],
    latent_dim: int,
    width: int,
    norm: str,
    channels: Sequence[int] | None,
) -> Plan:
    r"""Returns the geometry of a network, after a check of its arguments."""
    if len(image_shape) != 3 or image_shape[0] < 1:
        raise ValueError(f"image_shape must be (C, H, W) with C >= 1, got {tuple(image_shape)}")
    check_image_size(*image_shape[1:])
    check_whole("latent_dim", latent_dim)
    check_whole("width", width)
    check_choice("norm", norm, _NORMS)

    halvings = count_halvings(image_shape)
    # A small image is halved only once, which is little capacity even for digits, so that a
    # convolution at full size comes first.
    kernels = ([_KEEP] if halvings == 1 else []) + [_HALVE] * halvings
    if channels is None:
        channels = [width * min(2**i, 8) for i in range(len(kernels))]
    if len(channels) != len(kernels) or min(channels) < 1:
        raise ValueError(
            f"channels must be {len(kernels)} positive ints for {min(image_shape[1:])} pixels, "
            f"got {tuple(channels)}"
        )
    return Plan(kernels, tuple(channels), *halved(image_shape, halvings))


def count_halvings(image_shape: Sequence[int]) -> int:
    r"""Returns how often an image is halved until its shorter side has 3 to 6 pixels."""
    return max(1, round(math.log2(min(image_shape[1:]) / 4)))


def halved(
    image_shape: Sequence[int], halvings: int
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    r"""Returns the height and width after some halvings, and the zeros around the image for it."""
    height, width = (math.ceil(side / 2**halvings) for side in image_shape[1:])
    rows, columns = (height << halvings) - image_shape[1], (width << halvings) - image_shape[2]
    pad = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return (height, width), pad


def initialized(conv: nn.Conv2d | nn.ConvTranspose2d, activation: type[nn.Module]) -> nn.Module:
    r"""Draws weights which keep the variance of the signal: LeCun for SELU, He otherwise."""
    fan_in = conv.in_channels * conv.kernel_size[0] ** 2
    if isinstance(conv, nn.ConvTranspose2d):
        # With a stride, each output pixel is reached by only a part of the kernel.
        fan_in //= conv.stride[0] ** 2
    nn.init.normal_(conv.weight, std=math.sqrt((1 if activation is nn.SELU else 2) / fan_in))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
