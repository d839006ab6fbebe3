r"""Backbones: the networks inside of a :class:`~pyro_vaediff.denoise.Denoiser`.

A backbone is told the latents, the log-SNR and the context, and nothing of the schedule:

    ``backbone(z, log_snr)``, or ``backbone(z, log_snr, c)`` if there is a context,

where ``z`` has shape :math:`(N, \dots)`, ``log_snr`` is a floating-point tensor of shape
:math:`(N,)`, and ``c`` has shape :math:`(N, F)`. It returns a tensor with the shape of ``z``, or a
pair of such tensors if the denoiser learns its variance as well. With the attribute ``any_batch =
True``, it is rather called with any batch shape, ``z`` of shape :math:`(*, \dots)`, and with a
log-SNR and a context that broadcast to it, which spares copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_choice, check_whole
from ..schedules import Schedule
from .azula import DiTBackbone, UNetBackbone, ViTBackbone
from .conv_backbone import ConvBackbone
from .embeddings import LogSNRFeatures, check_even, sinusoidal_embedding
from .mlp import mlp, zero_last
from .vector_backbone import InBlocks, Outputs, plus, silu

__all__ = [
    "BACKBONES",
    "MLPBackbone",
    "ResidualMLP",
    "TimeAdapter",
    "from_eps",
    "make_backbone",
]


class MLPBackbone(InBlocks):
    r"""An MLP of the latents and of an embedding of a time, of the size in the paper's code.

    Its last layer starts at zero, and so does its output: see
    :class:`~pyro_vaediff.priors.DiffusionPrior` for why. The time is any number that grows from 0
    to 1, such as :class:`TimeAdapter` makes of the log-SNR.

    Arguments:
        event_shape: The shape of a latent, or its number of dimensions.
        num_outputs: The number of outputs per latent dimension.
        hidden_features: The width of each hidden layer.
        embedding_dim: The number of features of the time embedding.
        context_features: The number of features :math:`F` of the context.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        num_outputs: int = 1,
        hidden_features: Sequence[int] = (300, 300, 300),
        embedding_dim: int = 100,
        context_features: int = 0,
    ):
        super().__init__(event_shape, num_outputs)
        check_even(embedding_dim)
        self.embedding_dim = embedding_dim
        inputs = self.features + embedding_dim + context_features
        self.net = zero_last(mlp(inputs, num_outputs * self.features, hidden_features))

    def outputs_of(self, z: Tensor, told: Tensor, c: Tensor | None) -> Tensor:
        more = [sinusoidal_embedding(1000 * told, self.embedding_dim), *([] if c is None else [c])]
        inputs = [z, *(x.expand(*z.shape[:-1], -1) for x in more)]
        return self.net(torch.cat(inputs, dim=-1))


class ResidualMLP(InBlocks):
    r"""A residual MLP that is told the noise level by Fourier features of the log-SNR.

    They are :class:`~pyro_vaediff.nn.LogSNRFeatures`, and enter each block. Like that of
    :class:`MLPBackbone`, the output starts at zero.

    Arguments:
        event_shape: The shape of a latent, or its number of dimensions.
        log_snr_range: The log-SNR that is mapped to 0, and the one that is mapped to 1.
        num_outputs: The number of outputs per latent dimension.
        width: The number of hidden features.
        num_blocks: The number of residual blocks, with two linear layers each.
        embedding_dim: The number of features of the log-SNR, even.
        context_features: The number of features :math:`F` of the context, which enters each block.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        log_snr_range: tuple[float, float] = (-10.0, 10.0),
        num_outputs: int = 1,
        width: int = 256,
        num_blocks: int = 2,
        embedding_dim: int = 32,
        context_features: int = 0,
    ):
        super().__init__(event_shape, num_outputs)
        check_whole("width", width)
        check_whole("num_blocks", num_blocks, least=0)
        self.embedding = LogSNRFeatures(log_snr_range, embedding_dim)
        self.inputs = nn.Linear(self.features, width)
        self.blocks = nn.ModuleList(
            ResidualBlock(width, embedding_dim, context_features) for _ in range(num_blocks)
        )
        self.outputs = nn.Linear(width, num_outputs * self.features)
        zero_last(self.outputs)

    def outputs_of(self, z: Tensor, told: Tensor, c: Tensor | None) -> Tensor:
        embedding, h = self.embedding(told), self.inputs(z)
        for block in self.blocks:
            h = block(h, embedding, c)
        return self.outputs(silu(h))


class ResidualBlock(nn.Module):
    r"""Adds an MLP of the normalized features, the embedding of the noise level and the context."""

    def __init__(self, width: int, embedding_dim: int, context_features: int = 0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.time = nn.Linear(embedding_dim, width, bias=False)
        if context_features:
            self.context = nn.Linear(context_features, width, bias=False)
        self.second = zero_last(nn.Linear(width, width))

    def forward(self, h: Tensor, embedding: Tensor, c: Tensor | None = None) -> Tensor:
        told = self.time(embedding)
        if c is not None:
            told = told + self.context(c)
        return plus(self.second(silu(plus(self.first(self.norm(h)), told))), h)


class TimeAdapter(nn.Module):
    r"""A backbone from a network that is told the time rather than the log-SNR.

    Arguments:
        net: The network, called as ``net(z, t)`` or ``net(z, t, c)``.
        schedule: The schedule whose grid the time is on.
        unit: What the time is in: ``"steps"`` for real numbers from 1 to :math:`T`, ``"index"`` for
            whole ones as integers, such as ``nn.Embedding`` takes, or ``"interval"`` for
            :math:`t / T`.

    Example:
        >>> from pyro_vaediff.schedules import LinearSchedule
        >>> schedule = LinearSchedule(1000)
        >>> adapter = TimeAdapter(lambda z, t: t, schedule)
        >>> adapter(torch.zeros(2, 5), schedule.log_snr[[1, 400]])
        tensor([  1., 400.])
    """

    units = ("steps", "index", "interval")

    def __init__(self, net: Callable[..., Outputs], schedule: Schedule, unit: str = "steps"):
        super().__init__()
        check_choice("unit", unit, self.units)
        self.net, self.schedule, self.unit = net, schedule, unit
        self.any_batch = getattr(net, "any_batch", False)

    def forward(self, z: Tensor, log_snr: Tensor, *context: Tensor) -> Outputs:
        r"""Returns the outputs of the network."""
        t = self.schedule.position(log_snr)
        if self.unit == "index":
            t = t.round().long()
        elif self.unit == "interval":
            t = t / self.schedule.num_timesteps
        return self.net(z, t, *context)


class EpsAdapter(nn.Module):
    r"""A backbone from a network that predicts the whole noise, see :func:`from_eps`."""

    def __init__(self, net: Callable[..., Tensor]):
        super().__init__()
        self.net = net

    def forward(self, z: Tensor, log_snr: Tensor, *context: Tensor) -> Tensor:
        r"""Returns the predicted noise, less its part that is linear in the latents."""
        noise = torch.sigmoid(-log_snr).sqrt().reshape(-1, *(1 for _ in z.shape[1:]))
        return self.net(z, log_snr, *context) - noise * z


def from_eps(net: Callable[..., Tensor]) -> nn.Module:
    r"""Returns a backbone from a network that predicts the whole noise, as in other libraries.

    Here, a backbone predicts what is left after the part that is linear in :math:`z_t`,

    .. math:: \hat\epsilon(z_t) = \sqrt{1 - \bar\alpha_t} \, z_t + \mathrm{backbone}(z_t,
        \lambda_t),

    so that a network that returns zero means :math:`p(z_0) = \mathcal{N}(0, I)`. Elsewhere
    :math:`\hat\epsilon` is the output itself. The result is a backbone for the reverse variance
    ``"beta"``.

    Arguments:
        net: The network, called like a backbone. It returns :math:`\hat\epsilon`, with shape
            :math:`(N, \dots)`. If it is told the time, put a :class:`TimeAdapter` around it first.

    Example:
        >>> net = from_eps(lambda z, log_snr: torch.sigmoid(-log_snr).sqrt().unsqueeze(-1) * z)
        >>> net(torch.ones(1, 2), torch.zeros(1))  # exact for N(0, I), whose backbone is zero
        tensor([[0., 0.]])
    """
    return EpsAdapter(net)


BACKBONES: dict[str, type[nn.Module]] = {
    "mlp": MLPBackbone,
    "residual": ResidualMLP,
    "conv": ConvBackbone,
    "unet": UNetBackbone,
    "vit": ViTBackbone,
    "dit": DiTBackbone,
}


def make_backbone(
    name: str,
    event_shape: int | Sequence[int],
    schedule: Schedule,
    num_outputs: int = 1,
    width: int | None = None,
    context_features: int | Sequence[int] = 0,
) -> nn.Module:
    r"""Returns the backbone of that name.

    Arguments:
        name: ``"mlp"`` or ``"residual"``; for latents of shape :math:`(C, h, w)` also ``"conv"``,
            and ``"unet"``, ``"vit"`` or ``"dit"`` of azula, see :mod:`~pyro_vaediff.nn.azula`.
        event_shape: The shape of a latent, or its number of dimensions.
        schedule: The schedule whose times or log-SNRs it will see.
        num_outputs: The number of outputs per latent dimension.
        width: The width of the hidden layers, or ``None`` for that of their own.
        context_features: The number of features of the context, or for ``"conv"`` its shape.

    Raises:
        ValueError: If there is no such backbone for latents of that shape, or azula is missing.
    """
    check_choice("denoiser", name, BACKBONES)
    if name != "conv" and not isinstance(context_features, int):
        shape = tuple(context_features)
        raise ValueError(f"context_features must be a number for a denoiser {name!r}, got {shape}")
    options: dict[str, Any] = {"num_outputs": num_outputs, "context_features": context_features}
    if name == "mlp":
        widths = (300, 300, 300) if width is None else (width,) * 3
        return TimeAdapter(
            MLPBackbone(event_shape, hidden_features=widths, **options), schedule, "interval"
        )
    if width is not None:
        options["width"] = width
    low, high = (schedule.original("log_snr")[t].mean().item() for t in (-1, 1))
    return BACKBONES[name](event_shape, (low, high), **options)
