r"""Convolutional encoders and decoders in the manner of DCGAN, for images of 8 to 64 pixels.

The encoder halves the image with strided convolutions down to 4 x 4 features and reads the
posterior off them with a linear layer; the decoder is its mirror image. Three choices are ours:

- There is no norm by default. GroupNorm (`norm="group"`) treats each example alone as well, but
  networks of this depth train faster without. BatchNorm (`norm="batch"`, the norm of DCGAN) couples
  the examples of a batch in training: then "the ELBO of one datum" is not defined.
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
from typing import TYPE_CHECKING

import pyro.distributions as dist
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..arguments import check_whole
from .scale import bounded_scale, upcast

if TYPE_CHECKING:
    from ..likelihoods import Likelihood

__all__ = ["ConvDecoder", "ConvEncoder"]

# The side of the feature maps between the convolutions and the linear layers.
_SIDE = 4

_HALVE = {"kernel_size": 4, "stride": 2, "padding": 1}
_KEEP = {"kernel_size": 3, "stride": 1, "padding": 1}

# The convolutions of each image size, from the image inwards. A transposed convolution with the
# same geometry undoes the change of size. An 8-pixel image is halved only once, which is little
# capacity even for digits, so that a convolution at full size comes first.
_GEOMETRIES = {
    8: [_KEEP, _HALVE],
    16: [_HALVE] * 2,
    28: [_HALVE] * 3,  # padded to 32
    32: [_HALVE] * 3,
    64: [_HALVE] * 4,
}

_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group": lambda channels: nn.GroupNorm(8 if channels % 8 == 0 else 1, channels),
    "batch": nn.BatchNorm2d,
    "none": lambda channels: nn.Identity(),
}


class ConvEncoder(nn.Module):
    r"""The amortised posterior :math:`q_\psi(z_0 \mid x) = \mathcal{N}(m(x), s(x)^2)`.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of an image, with H = W in 8, 16, 28, 32, 64.
        latent_dim: The dimension D of the latent.
        width: The number of channels after the first convolution; it doubles up to 8 times that.
        norm: `"group"` (examples stay independent), `"batch"` (they do not) or `"none"`.
        min_scale: The lower bound of s(x), in the units of the latent.
        max_scale: The upper bound of s(x), in the units of the latent.
        channels: The channels after each convolution, from the image inwards, in place of `width`.
        activation: The activation module.

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
        image_shape: tuple[int, int, int],
        latent_dim: int,
        width: int = 32,
        norm: str = "none",
        min_scale: float = 1e-4,
        max_scale: float = 1e2,
        *,
        channels: Sequence[int] | None = None,
        activation: type[nn.Module] = nn.SiLU,
    ):
        super().__init__()
        geometry, channels = _plan(image_shape, latent_dim, width, norm, channels)
        if not 0 < min_scale < max_scale < math.inf:
            raise ValueError(
                f"need 0 < min_scale < max_scale < inf, got {min_scale=} and {max_scale=}"
            )
        self.image_shape = tuple(image_shape)
        self.latent_dim = latent_dim
        self.min_scale, self.max_scale = min_scale, max_scale
        self.pad = _padding(image_shape)

        layers: list[nn.Module] = []
        before = image_shape[0]
        for i, (kernel, after) in enumerate(zip(geometry, channels, strict=True)):
            layers.append(_initialised(nn.Conv2d(before, after, **kernel), activation))
            layers += [_NORMS[norm if i > 0 else "none"](after), activation()]
            before = after
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(channels[-1] * _SIDE**2, 2 * latent_dim)

    def forward(self, x: Tensor) -> TorchDistribution:
        r"""Returns :math:`q_\psi(z_0 \mid x)`.

        Arguments:
            x: Images in x-space, with shape :math:`(*, C, H, W)`.

        Returns:
            A Gaussian with batch shape :math:`(*)` and event shape :math:`(D,)`.

        Raises:
            ValueError: If the last three dimensions of `x` are not as above.
        """
        if x.shape[-3:] != self.image_shape:
            raise ValueError(f"x must end in shape {self.image_shape}, got {tuple(x.shape)}")

        batch_shape = x.shape[:-3]
        # Convolutions take one batch dimension; vectorised particles bring more of them.
        x = F.pad(x.reshape(-1, *self.image_shape), (self.pad,) * 4)
        outputs = upcast(self.head(self.features(x))).reshape(*batch_shape, 2 * self.latent_dim)
        loc, raw = outputs.chunk(2, dim=-1)
        return dist.Normal(loc, bounded_scale(raw, self.min_scale, self.max_scale)).to_event(1)


class ConvDecoder(nn.Module):
    r"""The decoder :math:`p_\theta(x \mid z_0)`: maps from the latent, read by a likelihood.

    Arguments:
        latent_dim: The dimension D of the latent.
        likelihood: The likelihood that reads the maps; its `image_shape` is the decoder's.
        width: The number of channels before the last convolution, as in `ConvEncoder`.
        norm: `"group"` (examples stay independent), `"batch"` (they do not) or `"none"`.
        channels: The channels before each convolution, from the latent outwards, in place of
            `width`.
        activation: The activation module.
        tanh: Whether the maps go through a tanh; only for likelihoods that read a mean in [-1, 1].

    Raises:
        ValueError: If an argument is not as above.
    """

    def __init__(
        self,
        latent_dim: int,
        likelihood: Likelihood,
        width: int = 32,
        norm: str = "none",
        *,
        channels: Sequence[int] | None = None,
        activation: type[nn.Module] = nn.SiLU,
        tanh: bool = False,
    ):
        super().__init__()
        inwards = None if channels is None else tuple(reversed(channels))
        geometry, inwards = _plan(likelihood.image_shape, latent_dim, width, norm, inwards)
        if tanh and not likelihood.mean_only:
            raise ValueError(
                f"tanh needs a likelihood whose maps are a mean in [-1, 1], got {likelihood}"
            )
        self.latent_dim = latent_dim
        self.likelihood = likelihood
        self.pad = _padding(likelihood.image_shape)

        channels = inwards[::-1]
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, channels[0] * _SIDE**2),
            nn.Unflatten(-1, (channels[0], _SIDE, _SIDE)),
            _NORMS["none" if norm == "group" else norm](channels[0]),
            activation(),
        ]
        before = channels[0]
        for kernel, after in zip(geometry[:0:-1], channels[1:], strict=True):
            layers.append(_initialised(nn.ConvTranspose2d(before, after, **kernel), activation))
            layers += [_NORMS[norm](after), activation()]
            before = after
        output = nn.ConvTranspose2d(before, likelihood.num_maps, **geometry[0])
        layers += [_initialised(output, activation), nn.Tanh() if tanh else nn.Identity()]
        self.maps = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> TorchDistribution:
        r"""Returns :math:`p_\theta(x \mid z_0)`.

        Arguments:
            z: Latents, with shape :math:`(*, D)`.

        Returns:
            A distribution with batch shape :math:`(*)` and event shape :math:`(C, H, W)`.

        Raises:
            ValueError: If the last dimension of `z` is not D.
        """
        if z.shape[-1:] != (self.latent_dim,):
            raise ValueError(f"z must end in shape ({self.latent_dim},), got {tuple(z.shape)}")

        batch_shape = z.shape[:-1]
        maps = self.maps(z.reshape(-1, self.latent_dim))
        maps = F.pad(maps, (-self.pad,) * 4)
        return self.likelihood(maps.reshape(*batch_shape, *maps.shape[1:]))


# --- Checks and initialisation ------------------------------------------------------------------


def _plan(
    image_shape: tuple[int, int, int],
    latent_dim: int,
    width: int,
    norm: str,
    channels: Sequence[int] | None,
) -> tuple[list[dict[str, int]], tuple[int, ...]]:
    r"""Checks the arguments and returns geometry and channels, both from the image inwards."""
    image_shape = tuple(image_shape)
    if len(image_shape) != 3 or image_shape[0] < 1:
        raise ValueError(f"image_shape must be (C, H, W) with C >= 1, got {image_shape}")
    if image_shape[1] != image_shape[2] or image_shape[1] not in _GEOMETRIES:
        raise ValueError(
            f"image_shape must have H = W in {', '.join(map(str, _GEOMETRIES))}, got {image_shape}"
        )
    for name, value in (("latent_dim", latent_dim), ("width", width)):
        check_whole(name, value)
    if norm not in _NORMS:
        raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}")

    geometry = _GEOMETRIES[image_shape[1]]
    if channels is None:
        channels = [width * min(2**i, 8) for i in range(len(geometry))]
    if len(channels) != len(geometry) or min(channels) < 1:
        raise ValueError(
            f"channels must be {len(geometry)} positive ints for {image_shape[1]} pixels, "
            f"got {tuple(channels)}"
        )
    return geometry, tuple(channels)


def _padding(image_shape: tuple[int, int, int]) -> int:
    return 2 if image_shape[1] == 28 else 0


def _initialised(
    conv: nn.Conv2d | nn.ConvTranspose2d, activation: type[nn.Module]
) -> nn.Conv2d | nn.ConvTranspose2d:
    r"""Draws weights which keep the variance of the signal: LeCun for SELU, He otherwise."""
    fan_in = conv.in_channels * conv.kernel_size[0] ** 2
    if isinstance(conv, nn.ConvTranspose2d):
        # With a stride, each output pixel is reached by only a part of the kernel.
        fan_in //= conv.stride[0] ** 2
    nn.init.normal_(conv.weight, std=math.sqrt((1 if activation is nn.SELU else 2) / fan_in))
    nn.init.zeros_(conv.bias)
    return conv
