r"""A normalizing flow for latents that are images: affine coupling layers of zuko's kind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
import zuko
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from ..arguments import as_image, check_whole
from .mlp import zero_last

__all__ = ["coupling_flow"]

_LOG_SCALE = math.log(1e3)  # the bound of log-scales, that of zuko's affine transforms


def coupling_flow(
    event_shape: int | Sequence[int],
    context: int = 0,
    num_steps: int = 8,
    hidden_features: Sequence[int] = (32, 32, 32),
) -> zuko.flows.Flow:
    r"""Returns a flow of affine coupling layers, which is scored and sampled in one pass each.

    A step keeps half of the variables, :math:`x_a`, and scales and shifts the others by functions
    of them that a convolutional network computes, the conditioner,

    .. math:: y_a = x_a, \qquad y_b = x_b \exp(s(x_a)) + t(x_a) .

    What is kept alternates: a checkerboard and its complement, then half of the channels and the
    other half. Which channels are halved goes by the binary digits of their numbers, in turn, so
    that any two are told apart. Before all, each variable has a scale and a shift of its own. The
    flow starts at the identity, and :math:`|s| < \log 1000`.

    Arguments:
        event_shape: The shape :math:`(C, h, w)` of a latent. The flow is over flat vectors.
        context: The number of features :math:`F` of the context.
        num_steps: The number of coupling layers.
        hidden_features: The number of channels of each hidden layer of the conditioners. Layers of
            as many channels as the one before are residual.

    Raises:
        ValueError: If the latents are no images, or have a single variable.

    References:
        | Density estimation using Real NVP (Dinh et al., 2017)
        | https://arxiv.org/abs/1605.08803

        | Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018)
        | https://arxiv.org/abs/1807.03039

    Example:
        >>> flow = coupling_flow((4, 8, 8))
        >>> flow().log_prob(torch.zeros(256)).item() / 256  # it starts at N(0, I)
        -0.9189...
    """
    shape = as_image("event_shape", event_shape, "coupling flow")
    check_whole("num_steps", num_steps)
    D = math.prod(shape)
    if D == 1:
        raise ValueError(f"a coupling flow needs two variables or more, got event_shape={shape}")
    masks = coupling_masks(shape)
    affine = zuko.lazy.UnconditionalTransform(
        zuko.transforms.MonotonicAffineTransform, torch.zeros(D), torch.zeros(D)
    )
    steps = [SpatialCoupling(next(masks), context, hidden_features) for _ in range(num_steps)]
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(D), torch.ones(D), buffer=True
    )
    return zuko.flows.Flow([affine, *steps], base)


def coupling_masks(shape: tuple[int, int, int]) -> Iterator[Tensor]:
    r"""Yields the masks of the steps, true for what is kept, with the shape of a latent."""
    C, height, width = shape
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    digits = (C - 1).bit_length()
    while True:
        for digit in range(max(digits, 1)):
            halves = []
            if height * width > 1:
                halves.append((rows + columns) % 2 == 0)
            if digits:
                halves.append((torch.arange(C)[:, None, None] >> digit) % 2 == 0)
            for half in halves:
                yield half.expand(shape)
                yield ~half.expand(shape)


class SpatialCoupling(zuko.lazy.LazyTransform):
    r"""An affine coupling layer over flat images, whose conditioner is a convolutional network.

    Arguments:
        mask: What is kept, with shape :math:`(C, h, w)`.
        context: The number of features :math:`F` of the context.
        hidden_features: The number of channels of each hidden layer.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, context: int, hidden_features: Sequence[int]):
        super().__init__()
        self.register_buffer("mask", mask.to(torch.get_default_dtype()), persistent=False)
        # A latent of one pixel is a vector, and its convolutions are linear layers.
        kernel_size = 3 if mask[0].numel() > 1 else 1
        self.conditioner = ConvConditioner(len(mask), context, hidden_features, kernel_size)

    def forward(self, c: Tensor | None = None) -> Transform:
        return AffineCoupling(partial(self.maps, c))

    def maps(self, c: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the log-scales and the shifts, which are zero for what is kept.

        Arguments:
            c: The context, with shape :math:`(*, F)`, broadcastable with the latents.
            x: The latents, with shape :math:`(*, D)`. Only what is kept matters.
        """
        shape, batch = self.mask.shape, x.shape[:-1]
        x = x.unflatten(-1, shape) * self.mask
        if c is not None:
            batch = torch.broadcast_shapes(batch, c.shape[:-1])
            c = c.expand(*batch, -1).reshape(-1, c.shape[-1])
        maps = self.conditioner(x.expand(*batch, *shape).reshape(-1, *shape), c)
        raw, shift = (maps.unflatten(1, (2, -1)) * (1 - self.mask)).flatten(2).unbind(1)
        log_scale = raw / (1 + raw.abs() / _LOG_SCALE)
        return log_scale.reshape(*batch, -1), shift.reshape(*batch, -1)


class AffineCoupling(Transform):
    r"""The coupling with given maps, or its inverse.

    zuko's own ``CouplingTransform`` evaluates the network twice for a sample and its score, and
    waits for the device to count the entries of the mask.

    Arguments:
        maps: A function of the latents to log-scales and shifts, which are zero for what is kept,
            and depend on nothing else.
        inverted: Whether it is the inverse.
    """

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, maps: Callable[[Tensor], tuple[Tensor, Tensor]], inverted: bool = False):
        super().__init__()
        self.maps, self.inverted = maps, inverted

    @property
    def inv(self) -> Transform:
        return AffineCoupling(self.maps, not self.inverted)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.maps(x)
        if self.inverted:
            return (x - shift) * torch.exp(-log_scale), -log_scale.sum(-1)
        return x * torch.exp(log_scale) + shift, log_scale.sum(-1)

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]


class ConvConditioner(nn.Module):
    r"""A convolutional network whose output, two maps per channel, starts at zero.

    Arguments:
        channels: The number of channels :math:`C`.
        context: The number of features :math:`F` of the context, which each layer is told.
        hidden_features: The number of channels of each hidden layer.
        kernel_size: The side of the kernels, which is odd.
    """

    def __init__(
        self, channels: int, context: int, hidden_features: Sequence[int], kernel_size: int = 3
    ):
        super().__init__()
        widths, sides = [channels, *hidden_features], (kernel_size, 1, kernel_size // 2)
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, *sides) for before, after in itertools.pairwise(widths)
        )
        if context:
            self.told = nn.ModuleList(nn.Linear(context, w, bias=False) for w in hidden_features)
        self.outputs = zero_last(nn.Conv2d(widths[-1], 2 * channels, *sides))

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        h = x
        for i, layer in enumerate(self.layers):
            new = layer(h if i == 0 else F.silu(h))
            if c is not None:
                new = new + self.told[i](c)[..., None, None]
            h = h + new if i > 0 and h.shape == new.shape else new
        return self.outputs(F.silu(h))
