r"""Denoisers: the networks inside :math:`p_\phi(z_{t-1} | z_t)`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..schedules import Tables
from .mlp import mlp

__all__ = ["MLPDenoiser", "sinusoidal_embedding"]


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
