r"""A VAE whose encoder, decoder and denoiser are affine: an :class:`Oracle` knows its ELBO.

Every parameter has a first dimension of copies. There is one copy, or one for each datum, which
then has a gradient of its own.
"""

from __future__ import annotations

import copy

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..arguments import check_seed, check_whole
from ..priors import DiffusionPrior
from ..schedules import Schedule
from ..vae import VAE

__all__ = ["LinearDenoiser", "LinearGaussian", "linear_gaussian_vae", "one_copy_per_datum"]


def random(*shape: int, scale: float = 1.0, shift: float = 0.0) -> nn.Parameter:
    return nn.Parameter(shift + scale * torch.randn(1, *shape, dtype=torch.float64))


def affine(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return (weight @ x.unsqueeze(-1)).squeeze(-1) + bias


class LinearGaussian(nn.Module):
    r"""A network which returns :math:`\mathcal{N}(W x + b, \mathrm{diag}(e^{2 r}))`.

    Its parameters are random, in float64: ``weight`` for :math:`W`, with shape :math:`(1, O, I)`,
    and ``bias`` for :math:`b` and ``log_scale`` for :math:`r`, with shape :math:`(1, O)`.

    Arguments:
        in_features: The number of inputs :math:`I`.
        out_features: The number of outputs :math:`O`.
        log_scale: The mean of the random :math:`r`, the logarithms of the standard deviations.

    Raises:
        ValueError: If there is no input or no output.

    Example:
        >>> network = LinearGaussian(in_features=3, out_features=2, log_scale=0.0)
        >>> network(torch.zeros(5, 3, dtype=torch.float64)).mean.shape
        torch.Size([5, 2])
    """

    def __init__(self, in_features: int, out_features: int, log_scale: float):
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features)
        self.weight = random(out_features, in_features, scale=0.5)
        self.bias = random(out_features, scale=0.3)
        self.log_scale = random(out_features, scale=0.2, shift=log_scale)

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        r"""Evaluates the network.

        Arguments:
            x: The inputs, with shape :math:`(*, B, I)`. If there are copies, :math:`B` is their
                number.

        Returns:
            The distribution, with batch shape :math:`(*, B)` and event shape :math:`(O,)`.
        """
        scale = self.log_scale.exp()
        return dist.Normal(affine(self.weight, self.bias, x), scale).to_event(1)


class LinearDenoiser(nn.Module):
    r"""A network :math:`M_t z + n_t`, followed by numbers :math:`u_t` if variances are learned.

    Its parameters are random, in float64: ``weight`` for :math:`M_t`, with shape :math:`(1, T + 1,
    D, D)`, and ``bias`` for :math:`n_t` and ``u`` for :math:`u_t`, with shape :math:`(1, T + 1,
    D)`. The entries at :math:`t = 0` are not used.

    Arguments:
        latent_dim: The number of latent dimensions :math:`D`.
        num_timesteps: The number of steps :math:`T`.
        learned_variance: Whether there are numbers :math:`u_t`, as a prior with
            ``reverse_variance="learned"`` needs them.

    Raises:
        ValueError: If there is no latent dimension or no timestep.
    """

    def __init__(self, latent_dim: int, num_timesteps: int, learned_variance: bool):
        super().__init__()
        check_sizes(latent_dim=latent_dim, num_timesteps=num_timesteps)
        self.weight = random(num_timesteps + 1, latent_dim, latent_dim, scale=0.3)
        self.bias = random(num_timesteps + 1, latent_dim, scale=0.3)
        if learned_variance:
            self.u = random(num_timesteps + 1, latent_dim)

    def forward(self, z: Tensor, t: int | Tensor) -> Tensor:
        r"""Evaluates the network.

        Arguments:
            z: The latents :math:`z_t`, with shape :math:`(*, B, D)`. If there are copies, :math:`B`
                is their number.
            t: The timestep(s), an integer or an integer tensor with shape :math:`(*, B)`.

        Returns:
            The outputs, with shape :math:`(*, B, D)`, or :math:`(*, B, 2D)` with :math:`u_t`.
        """
        at = (torch.arange(len(self.weight), device=z.device), t)
        net = affine(self.weight[at], self.bias[at], z)
        return torch.cat([net, self.u[at].expand_as(net)], -1) if hasattr(self, "u") else net


def linear_gaussian_vae(
    num_timesteps: int = 3,
    latent_dim: int = 2,
    num_features: int = 3,
    reverse_variance: str = "beta",
    seed: int | None = None,
    **kwargs,
) -> VAE:
    r"""Returns a VAE whose networks are affine, with random parameters and in float64.

    .. math::
        z_0 & \sim \mathcal{N}(A x + c, \mathrm{diag}(s^2)) & \text{encoder} \\
        x & \sim \mathcal{N}(W z_0 + b, \mathrm{diag}(\varsigma^2)) & \text{decoder} \\
        \mathrm{net}(z_t, t) & = M_t z_t + n_t & \text{denoiser}

    The variances of its schedule grow linearly from 0.3 to 0.6, so that each of few steps matters.

    Arguments:
        num_timesteps: The number of steps :math:`T`.
        latent_dim: The number of latent dimensions :math:`D`.
        num_features: The number of dimensions :math:`X` of a datum. Data have shape :math:`(B, X)`.
        reverse_variance: The reverse variance of the prior, ``"beta"``, ``"beta_tilde"`` or
            ``"learned"``.
        seed: The seed of the parameters. It leaves the global generators as they are. By default
            the parameters are drawn from the global generator of the CPU.
        kwargs: The ``parameterization`` and the ``order`` of the
            :class:`~pyro_vaediff.priors.DiffusionPrior`.

    Returns:
        The VAE, on the CPU. Its networks are of the classes :class:`LinearGaussian` and
        :class:`LinearDenoiser`.

    Raises:
        ValueError: If an argument is out of range or unknown.

    Example:
        >>> vae = linear_gaussian_vae(num_timesteps=5, order="reversed", seed=0)
        >>> vae.prior.num_timesteps
        5
    """
    check_sizes(num_timesteps=num_timesteps, latent_dim=latent_dim, num_features=num_features)
    if seed is not None:
        check_seed(seed)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            # `torch.manual_seed` would seed the generators of all CUDA devices as well.
            torch.default_generator.manual_seed(int(seed))
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
        decoder = LinearGaussian(latent_dim, num_features, log_scale=0.0)
    return VAE(encoder, decoder, prior).double()


def one_copy_per_datum(vae: VAE, num_data: int) -> VAE:
    r"""Returns a VAE with parameters of its own for each datum, hence with gradients per datum.

    Arguments:
        vae: A VAE with one copy of its parameters, such as :func:`linear_gaussian_vae` makes.
        num_data: The number of data :math:`B` in every batch from now on.

    Returns:
        A new VAE, the first dimension of whose parameters has size :math:`B`.

    Raises:
        ValueError: If there are no data, or the parameters have no dimension of copies.

    Example:
        >>> vae = one_copy_per_datum(linear_gaussian_vae(), num_data=100)
        >>> vae.encoder.weight.shape
        torch.Size([100, 2, 3])
    """
    check_sizes(num_data=num_data)
    for name, parameter in vae.named_parameters():
        if parameter.ndim == 0 or len(parameter) != 1:
            raise ValueError(
                f"vae must have one copy of its parameters, in a first dimension of size 1, but "
                f"{name} has shape {tuple(parameter.shape)}: linear_gaussian_vae makes such a VAE"
            )
    vae = copy.deepcopy(vae)
    for parameter in vae.parameters():
        parameter.data = parameter.data.repeat(num_data, *(1 for _ in parameter.shape[1:]))
    return vae


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        check_whole(name, size)
