r"""Denoisers: the networks inside :math:`p_\phi(z_{t-1} | z_t)`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_choice, check_whole
from ..diffusion import at_time
from ..schedules import Schedule, Tables
from .mlp import mlp

__all__ = [
    "DENOISERS",
    "MLPDenoiser",
    "PreconditionedDenoiser",
    "ResidualDenoiser",
    "make_denoiser",
    "sinusoidal_embedding",
]


def sinusoidal_embedding(t: Tensor, dim: int, max_period: float = 1e4) -> Tensor:
    r"""Embeds times in sines and cosines of geometrically spaced frequencies.

    Arguments:
        t: The times, with shape :math:`(*)`.
        dim: The number of features :math:`E`, even.
        max_period: The period of the slowest wave, in units of ``t``.

    Returns:
        The embeddings, with shape :math:`(*, E)`.

    References:
        | Attention Is All You Need (Vaswani et al., 2017)
        | https://arxiv.org/abs/1706.03762
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"the embedding dimension must be even and positive, got {dim}")
    steps = torch.linspace(0, 1, dim // 2, dtype=t.dtype, device=t.device)
    angles = t.unsqueeze(-1) * torch.exp(-math.log(max_period) * steps)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class MLPDenoiser(nn.Module):
    r"""An MLP of the latent and of an embedding of the time, of the size in the paper's code.

    Its last layer starts at zero, and so does its output: see
    :class:`~pyro_vaediff.priors.DiffusionPrior` for why.

    Arguments:
        latent_dim: The number of latent dimensions :math:`D`.
        num_timesteps: The number of steps :math:`T`. Times are embedded as :math:`1000 \, t / T`,
            so that the embedding does not depend on the discretization.
        num_outputs: The number of outputs per latent dimension.
        hidden_features: The width of each hidden layer.
        embedding_dim: The number of features of the time embedding.
    """

    def __init__(
        self,
        latent_dim: int,
        num_timesteps: int,
        num_outputs: int = 1,
        hidden_features: Sequence[int] = (300, 300, 300),
        embedding_dim: int = 100,
    ):
        super().__init__()
        check_whole("num_timesteps", num_timesteps)
        times = torch.linspace(0, 1000, num_timesteps + 1, dtype=torch.float64)
        self.time = Tables({"embeddings": sinusoidal_embedding(times, embedding_dim)})
        self.net = mlp(latent_dim + embedding_dim, num_outputs * latent_dim, hidden_features)
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, z: Tensor, t: int | Tensor) -> Tensor:
        r"""Evaluates the network.

        Arguments:
            z: The latents :math:`z_t`, with shape :math:`(*, D)`.
            t: The timestep(s), an integer or an integer tensor broadcastable to shape :math:`(*)`.

        Returns:
            The outputs, with shape :math:`(*, D)`, or :math:`(*, n D)` for :math:`n` outputs.
        """
        embedding = self.time.embeddings[t].expand(*z.shape[:-1], -1)
        return self.net(torch.cat([z, embedding], dim=-1))


class ResidualDenoiser(nn.Module):
    r"""A residual MLP that is told the noise level by Fourier features of the log-SNR.

    The signal-to-noise ratio :math:`\bar\alpha_t / (1 - \bar\alpha_t)` says how much of :math:`z_0`
    is left in :math:`z_t`, whatever the schedule and :math:`T`. Its logarithm, mapped to
    :math:`u \in [0, 1]`, enters each block as :math:`\sin(k \pi u / 2), \cos(k \pi u / 2)`.
    Like that of :class:`MLPDenoiser`, the output starts at zero.

    Arguments:
        latent_dim: The number of latent dimensions :math:`D`.
        schedule: The variance schedule.
        num_outputs: The number of outputs per latent dimension.
        width: The number of hidden features.
        num_blocks: The number of residual blocks, with two linear layers each.
        embedding_dim: The number of features of the log-SNR, even.

    References:
        | Variational Diffusion Models (Kingma et al., 2021)
        | https://arxiv.org/abs/2107.00630
    """

    def __init__(
        self,
        latent_dim: int,
        schedule: Schedule,
        num_outputs: int = 1,
        width: int = 256,
        num_blocks: int = 2,
        embedding_dim: int = 32,
    ):
        super().__init__()
        for name, value in (("latent_dim", latent_dim), ("width", width)):
            check_whole(name, value)
        check_whole("num_blocks", num_blocks, least=0)
        self.time = Tables({"embeddings": log_snr_embedding(schedule, embedding_dim)})
        self.inputs = nn.Linear(latent_dim, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, embedding_dim) for _ in range(num_blocks))
        self.outputs = nn.Linear(width, num_outputs * latent_dim)
        nn.init.zeros_(self.outputs.weight)
        nn.init.zeros_(self.outputs.bias)

    def forward(self, z: Tensor, t: int | Tensor) -> Tensor:
        r"""Evaluates the network.

        Arguments:
            z: The latents :math:`z_t`, with shape :math:`(*, D)`.
            t: The timestep(s), an integer or an integer tensor broadcastable to shape :math:`(*)`.

        Returns:
            The outputs, with shape :math:`(*, D)`, or :math:`(*, n D)` for :math:`n` outputs.
        """
        embedding, h = self.time.embeddings[t], self.inputs(z)
        for block in self.blocks:
            h = block(h, embedding)
        return self.outputs(F.silu(h))


class PreconditionedDenoiser(ResidualDenoiser):
    r"""A residual denoiser that knows the mean and the scale of the clean latents.

    If the latents were :math:`z_0 \sim \mathcal{N}(m, \mathrm{diag}(s^2))`, then :math:`z_t` would
    have the variance :math:`v_t = \bar\alpha_t s^2 + 1 - \bar\alpha_t`, and its noise would be

    .. math:: E[\epsilon | z_t] = \sqrt{1 - \bar\alpha_t} \, v_t^{-1}
        (z_t - \sqrt{\bar\alpha_t} \, m) .

    The network :math:`F` sees standardized latents and is left with the departure from this,

    .. math:: E[\epsilon | z_t] - \sqrt{1 - \bar\alpha_t} \, z_t + \sqrt{\bar\alpha_t} \, s \,
        v_t^{-1/2} \, F(v_t^{-1/2} (z_t - \sqrt{\bar\alpha_t} \, m), t) ,

    where the second term is what a :class:`~pyro_vaediff.priors.DiffusionPrior` adds by itself. The
    moments :math:`m, s` are learned, and start at 0 and 1: an encoder that is trained with the
    prior moves them. Like that of the other denoisers, the output starts at zero.

    Arguments:
        latent_dim: The number of latent dimensions :math:`D`.
        schedule: The variance schedule.
        num_outputs: The number of outputs per latent dimension.
        options: Further arguments of :class:`ResidualDenoiser`.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022)
        | https://arxiv.org/abs/2206.00364
    """

    #: What it predicts, the only ``parameterization`` of a prior that it is for.
    parameterization = "eps"

    def __init__(self, latent_dim: int, schedule: Schedule, num_outputs: int = 1, **options):
        super().__init__(latent_dim, schedule, num_outputs, **options)
        self.mean = nn.Parameter(torch.zeros(latent_dim))
        # The scale has to follow the encoder, at the learning rate of the networks.
        self.gain = 10.0
        self.log_scale = nn.Parameter(torch.zeros(latent_dim))  # 1 / gain of it
        names = ("alphas_cumprod", "one_minus_alphas_cumprod")
        self.noise = Tables({name: schedule.original(name) for name in names})

    @property
    def scale(self) -> Tensor:
        r"""The scale :math:`s` of the clean latents, with shape :math:`(D,)`."""
        return torch.exp(self.gain * self.log_scale)

    def forward(self, z: Tensor, t: int | Tensor) -> Tensor:
        alpha_bar = at_time(self.noise.alphas_cumprod, t)
        one_minus = at_time(self.noise.one_minus_alphas_cumprod, t)
        root, scale = alpha_bar.sqrt(), self.scale
        mean, variance = root * self.mean, alpha_bar * scale.square() + one_minus
        std = variance.sqrt()
        # 1 / v_t - 1 without cancellation, where v_t is close to one
        anchor = alpha_bar * (1 - scale.square()) * z - mean
        net, *others = super().forward((z - mean) / std, t).split(z.shape[-1], dim=-1)
        eps = one_minus.sqrt() * anchor / variance + root * scale / std * net
        return torch.cat([eps, *others], dim=-1) if others else eps


class ResidualBlock(nn.Module):
    r"""Adds an MLP of the normalized features and of the embedding of the time."""

    def __init__(self, width: int, embedding_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.time = nn.Linear(embedding_dim, width, bias=False)
        self.second = nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return h + self.second(F.silu(self.first(self.norm(h)) + self.time(embedding)))


def log_snr_embedding(schedule: Schedule, dim: int) -> Tensor:
    r"""Embeds the log-SNR of each timestep in sines and cosines.

    Arguments:
        schedule: The variance schedule.
        dim: The number of features :math:`E`, even.

    Returns:
        The embeddings, in float64 and with shape :math:`(T + 1, E)`; that of :math:`t = 0`, where
        the SNR is infinite, is that of :math:`t = 1`.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"the embedding dimension must be even and positive, got {dim}")
    log_snr = (
        schedule.original("log_alphas_cumprod")
        - schedule.original("one_minus_alphas_cumprod").log()
    )[1:]
    u = (log_snr - log_snr[-1]) / (log_snr[0] - log_snr[-1]).clamp(min=1e-12)
    angles = u.unsqueeze(-1) * torch.arange(1, dim // 2 + 1, dtype=u.dtype) * (math.pi / 2)
    embeddings = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return torch.cat([embeddings[:1], embeddings])


DENOISERS: dict[str, type[nn.Module]] = {
    "mlp": MLPDenoiser,
    "residual": ResidualDenoiser,
    "preconditioned": PreconditionedDenoiser,
}


def make_denoiser(
    name: str,
    latent_dim: int,
    schedule: Schedule,
    num_outputs: int = 1,
    width: int | None = None,
) -> nn.Module:
    r"""Returns the denoiser of that name.

    Arguments:
        name: ``"mlp"``, ``"residual"`` or ``"preconditioned"``.
        latent_dim: The number of latent dimensions :math:`D`.
        schedule: The variance schedule.
        num_outputs: The number of outputs per latent dimension.
        width: The width of the hidden layers, or ``None`` for that of their own.
    """
    check_choice("denoiser", name, DENOISERS)
    if name == "mlp":
        T, options = (
            schedule.num_timesteps,
            {} if width is None else {"hidden_features": (width,) * 3},
        )
        return MLPDenoiser(latent_dim, T, num_outputs, **options)
    options = {} if width is None else {"width": width}
    return DENOISERS[name](latent_dim, schedule, num_outputs, **options)
