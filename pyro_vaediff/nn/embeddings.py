r"""Embeddings of the time and of the log-SNR, which tell a network how noisy its latents are."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["LogSNRFeatures", "sinusoidal_embedding"]


def sinusoidal_embedding(t: Tensor, dim: int, max_period: float = 1e4) -> Tensor:
    r"""Returns sines and cosines of times, at geometrically spaced frequencies.

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
    check_even(dim)
    steps = torch.linspace(0, 1, dim // 2, dtype=t.dtype, device=t.device)
    angles = t.unsqueeze(-1) * torch.exp(-math.log(max_period) * steps)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class LogSNRFeatures(nn.Module):
    r"""Fourier features of the log-SNR.

    The log-SNR says how much of :math:`z_0` is left in :math:`z_t`, whatever the schedule and
    :math:`T`. Mapped to :math:`u \in [0, 1]`, it becomes :math:`\sin(k \pi u / 2),
    \cos(k \pi u / 2)` for :math:`k = 1, \dots, E / 2`.

    Arguments:
        log_snr_range: The log-SNR that is mapped to 0, and the one that is mapped to 1.
        dim: The number of features :math:`E`, even.

    References:
        | Variational Diffusion Models (Kingma et al., 2021)
        | https://arxiv.org/abs/2107.00630

    Example:
        >>> features = LogSNRFeatures((-10.0, 10.0), dim=2)
        >>> features(torch.tensor([-10.0, 0.0]))  # sin and cos of 0 and of pi / 4
        tensor([[0.0000, 1.0000],
                [0.7071, 0.7071]])
    """

    def __init__(self, log_snr_range: tuple[float, float] = (-10.0, 10.0), dim: int = 32):
        super().__init__()
        check_even(dim)
        self.low, self.span = log_snr_range[0], max(log_snr_range[1] - log_snr_range[0], 1e-12)
        self.dim = dim

    def forward(self, log_snr: Tensor) -> Tensor:
        r"""Returns the features, with shape :math:`(*, E)`, of log-SNRs of shape :math:`(*)`."""
        u = (log_snr - self.low) / self.span
        k = torch.arange(1, self.dim // 2 + 1, dtype=u.dtype, device=u.device)
        angles = u.unsqueeze(-1) * k * (math.pi / 2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def check_even(dim: int) -> None:
    if dim < 2 or dim % 2:
        raise ValueError(f"the embedding dimension must be even and positive, got {dim}")
