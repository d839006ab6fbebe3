r"""A VAE whose encoder, decoder and denoiser are affine: an :class:`Oracle` knows its ELBO.

Every parameter has a first dimension of copies. There is one copy, or one for each datum, which
then has a gradient of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..arguments import as_shape, check_seed, check_whole
from ..nn.backbones import TimeAdapter
from ..nn.vector_backbone import Vectors
from ..priors import DiffusionPrior
from ..schedules import Schedule
from ..vae import VAE

__all__ = [
    "LinearDenoiser",
    "LinearGaussian",
    "SmoothDenoiser",
    "linear_gaussian_vae",
    "one_copy_per_datum",
]


def random(*shape: int, scale: float = 1.0, shift: float = 0.0) -> nn.Parameter:
    return nn.Parameter(shift + scale * torch.randn(1, *shape, dtype=torch.float64))


def affine(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return (weight @ x.unsqueeze(-1)).squeeze(-1) + bias


class LinearGaussian(nn.Module):
    r"""A network which returns :math:`\mathcal{N}(W x + b, \mathrm{diag}(e^{2 r}))`.

    Its parameters are random, in float64: ``weight`` for :math:`W`, with shape :math:`(1, O, I)`,
    and ``bias`` for :math:`b` and ``log_scale`` for :math:`r`, with shape :math:`(1, O)`.

    Arguments:
        in_shape: The shape of an input, or its number of features, with :math:`I` numbers in all.
        out_shape: The shape of a draw, or its number of features, with :math:`O` numbers in all.
        log_scale: The mean of the random :math:`r`, the logarithms of the standard deviations.

    Example:
        >>> network = LinearGaussian(3, 2, log_scale=0.0)
        >>> network(torch.zeros(5, 3, dtype=torch.float64)).mean.shape
        torch.Size([5, 2])
    """

    def __init__(
        self, in_shape: int | Sequence[int], out_shape: int | Sequence[int], log_scale: float
    ):
        super().__init__()
        in_shape, self.out_shape = as_shape("in_shape", in_shape), as_shape("out_shape", out_shape)
        self.in_dim = len(in_shape)
        inputs, outputs = math.prod(in_shape), math.prod(self.out_shape)
        self.weight = random(outputs, inputs, scale=0.5)
        self.bias = random(outputs, scale=0.3)
        self.log_scale = random(outputs, scale=0.2, shift=log_scale)

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        r"""Returns the distribution, with batch shape :math:`(*, B)`.

        Arguments:
            x: The inputs, with batch shape :math:`(*, B)`. If there are copies, :math:`B` is their
                number.
        """
        loc = affine(self.weight, self.bias, x.flatten(-self.in_dim)).unflatten(-1, self.out_shape)
        scale = self.log_scale.exp().unflatten(-1, self.out_shape)
        return dist.Normal(loc, scale).to_event(len(self.out_shape))


class LinearDenoiser(Vectors):
    r"""A network :math:`M_t z + n_t`, followed by numbers :math:`u_t` if variances are learned.

    Its parameters are random, in float64: ``weight`` for :math:`M_t`, with shape :math:`(1, T + 1,
    D, D)`, and ``bias`` for :math:`n_t` and ``u`` for :math:`u_t`, with shape :math:`(1, T + 1,
    D)`. The entries at :math:`t = 0` are not used. It is told the time by a
    :class:`~pyro_vaediff.nn.TimeAdapter`.

    Arguments:
        event_shape: The shape of a latent, with :math:`D` numbers in all.
        num_timesteps: The number of steps :math:`T`.
        learned_variance: Whether there are numbers :math:`u_t`, as a prior with
            ``reverse_variance="learned"`` needs them.
    """

    def __init__(
        self, event_shape: int | Sequence[int], num_timesteps: int, learned_variance: bool = False
    ):
        super().__init__(event_shape, 2 if learned_variance else 1)
        check_whole("num_timesteps", num_timesteps)
        D = self.features
        self.weight = random(num_timesteps + 1, D, D, scale=0.3)
        self.bias = random(num_timesteps + 1, D, scale=0.3)
        if learned_variance:
            self.u = random(num_timesteps + 1, D)

    def forward(self, z: Tensor, t: Tensor) -> Tensor | tuple[Tensor, ...]:
        r"""Returns the outputs.

        Arguments:
            z: The latents :math:`z_t`, with batch shape :math:`(*, B)`. If there are copies,
                :math:`B` is their number.
            t: The timestep(s), integers with shape :math:`(*, B)`.
        """
        at = (torch.arange(len(self.weight), device=z.device), t)
        z = self.flatten(z)
        net = affine(self.weight[at], self.bias[at], z)
        if self.num_outputs > 1:
            net = torch.cat([net, self.u[at].expand_as(net)], -1)
        return self.split(net)


class SmoothDenoiser(Vectors):
    r"""A network :math:`M(\lambda) z + n(\lambda)` for continuous time.

    .. math:: M(\lambda) = M_0 + \tanh(\lambda / 5) M_1, \qquad n(\lambda) = n_0 +
        \tanh(\lambda / 5) n_1

    Its parameters are random, in float64: ``weight`` for :math:`M_0, M_1`, with shape :math:`(1, 2,
    D, D)`, and ``bias`` for :math:`n_0, n_1`, with shape :math:`(1, 2, D)`.

    Arguments:
        event_shape: The shape of a latent, with :math:`D` numbers in all.
    """

    def __init__(self, event_shape: int | Sequence[int]):
        super().__init__(event_shape)
        D = self.features
        self.weight = random(2, D, D, scale=0.3)
        self.bias = random(2, D, scale=0.3)

    def forward(self, z: Tensor, log_snr: Tensor) -> Tensor | tuple[Tensor, ...]:
        r"""Returns the output.

        Arguments:
            z: The latents :math:`z_t`, with batch shape :math:`(*, B)`. If there are copies,
                :math:`B` is their number.
            log_snr: The log-SNR, with shape :math:`(*, B)`.
        """
        share = torch.tanh(log_snr / 5).unsqueeze(-1)
        parts = (affine(self.weight[:, i], self.bias[:, i], self.flatten(z)) for i in range(2))
        constant, linear = parts
        return self.split(constant + share * linear)


def linear_gaussian_vae(
    num_timesteps: int | None = 3,
    event_shape: int | Sequence[int] = 2,
    num_features: int = 3,
    reverse_variance: str = "beta",
    seed: int | None = None,
    **kwargs: Any,
) -> VAE:
    r"""Returns a VAE whose networks are affine, with random parameters and in float64.

    .. math::
        z_0 & \sim \mathcal{N}(A x + c, \mathrm{diag}(s^2)) & \text{encoder} \\
        x & \sim \mathcal{N}(W z_0 + b, \mathrm{diag}(\varsigma^2)) & \text{decoder} \\
        \mathrm{net}(z_t, t) & = M_t z_t + n_t & \text{denoiser}

    The variances of its schedule grow linearly from 0.3 to 0.6, so that each of few steps matters.
    In continuous time, it is the linear schedule of Ho et al.

    Arguments:
        num_timesteps: The number of steps :math:`T`, or ``None`` for continuous time.
        event_shape: The shape of a latent; a number :math:`D` means :math:`(D,)`.
        num_features: The number of dimensions :math:`X` of a datum. Data have shape :math:`(B, X)`.
        reverse_variance: The reverse variance of the prior, by its name.
        seed: The seed of the parameters. It leaves the global generators as they are. By default
            the parameters are drawn from the global generator of the CPU.
        kwargs: The ``parameterization`` and the ``order`` of the
            :class:`~pyro_vaediff.priors.DiffusionPrior`.

    Returns:
        The VAE, on the CPU. Its networks are of the classes :class:`LinearGaussian` and
        :class:`LinearDenoiser`, or in continuous time :class:`SmoothDenoiser`.

    Raises:
        ValueError: If an argument is out of range or unknown.

    Example:
        >>> vae = linear_gaussian_vae(num_timesteps=5, order="reversed", seed=0)
        >>> vae.prior.num_timesteps
        5
    """
    shape = as_shape("event_shape", event_shape)
    if num_timesteps is not None:
        check_whole("num_timesteps", num_timesteps)
    if seed is not None:
        check_seed(seed)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            # `torch.manual_seed` would seed the generators of all CUDA devices as well.
            torch.default_generator.manual_seed(int(seed))
        schedule: str | Schedule = "linear"
        net: nn.Module
        if num_timesteps is None:
            net = SmoothDenoiser(shape)
        else:
            schedule = Schedule(torch.linspace(0.3, 0.6, num_timesteps, dtype=torch.float64))
            linear = LinearDenoiser(shape, num_timesteps, reverse_variance == "learned")
            net = TimeAdapter(linear, schedule, "index")
        prior = DiffusionPrior(
            shape, num_timesteps, schedule, net, reverse_variance=reverse_variance, **kwargs
        )
        encoder = LinearGaussian(num_features, shape, log_scale=-0.5)
        decoder = LinearGaussian(shape, num_features, log_scale=0.0)
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
    check_whole("num_data", num_data)
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
