r"""A VAE whose encoder, decoder and denoiser are affine, in float64: see ``oracles``.

Every parameter has a first dimension of copies. There is one copy, or one for each datum, which
then has a gradient of its own.
"""

from __future__ import annotations

import copy

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vaediff import VAE, DiffusionPrior
from pyro_vaediff.schedules import Schedule


def random(*shape: int, scale: float = 1.0, shift: float = 0.0) -> nn.Parameter:
    return nn.Parameter(shift + scale * torch.randn(1, *shape, dtype=torch.float64))


def affine(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return (weight @ x.unsqueeze(-1)).squeeze(-1) + bias


class LinearGaussian(nn.Module):
    r"""A network which returns :math:`\mathcal{N}(W x + b, \mathrm{diag}(e^{2 r}))`."""

    def __init__(self, in_features: int, out_features: int, log_scale: float):
        super().__init__()
        self.weight = random(out_features, in_features, scale=0.5)
        self.bias = random(out_features, scale=0.3)
        self.log_scale = random(out_features, scale=0.2, shift=log_scale)

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        scale = self.log_scale.exp()
        return dist.Normal(affine(self.weight, self.bias, x), scale).to_event(1)


class LinearDenoiser(nn.Module):
    r"""A network :math:`M_t z + n_t`, followed by numbers :math:`u_t` if variances are learned."""

    def __init__(self, latent_dim: int, num_timesteps: int, learned_variance: bool):
        super().__init__()
        self.weight = random(num_timesteps + 1, latent_dim, latent_dim, scale=0.3)
        self.bias = random(num_timesteps + 1, latent_dim, scale=0.3)
        if learned_variance:
            self.u = random(num_timesteps + 1, latent_dim)

    def forward(self, z: Tensor, t: int | Tensor) -> Tensor:
        at = (torch.arange(len(self.weight), device=z.device), t)
        net = affine(self.weight[at], self.bias[at], z)
        return torch.cat([net, self.u[at].expand_as(net)], -1) if hasattr(self, "u") else net


def linear_gaussian_vae(
    num_timesteps: int = 3,
    latent_dim: int = 2,
    num_features: int = 3,
    reverse_variance: str = "beta",
    **kwargs,
) -> VAE:
    r"""Returns a VAE with random parameters, in float64."""
    learned = reverse_variance == "learned"
    prior = DiffusionPrior(
        latent_dim,
        num_timesteps,
        schedule=Schedule(torch.linspace(0.3, 0.6, num_timesteps, dtype=torch.float64)),
        denoiser=LinearDenoiser(latent_dim, num_timesteps, learned),
        reverse_variance=reverse_variance,
        **kwargs,
    )
    encoder = LinearGaussian(num_features, latent_dim, log_scale=-0.5)
    return VAE(encoder, LinearGaussian(latent_dim, num_features, log_scale=0.0), prior).double()


def one_copy_per_datum(vae: VAE, num_data: int) -> VAE:
    r"""Returns a VAE with parameters of its own for each datum, hence with gradients per datum."""
    vae = copy.deepcopy(vae)
    for parameter in vae.parameters():
        parameter.data = parameter.data.repeat(num_data, *(1 for _ in parameter.shape[1:]))
    return vae
