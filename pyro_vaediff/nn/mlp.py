r"""Multi-layer perceptrons, and the encoders and decoders that are made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..arguments import as_shape, check_ends, check_whole
from .vectors import Head, check_scales, gaussian, with_context

__all__ = ["MLPDecoder", "MLPEncoder", "mlp"]


def mlp(
    in_features: int,
    out_features: int,
    hidden_features: Sequence[int] = (300, 300, 300),
    activation: type[nn.Module] = nn.SiLU,
    gated: bool = False,
) -> nn.Sequential:
    r"""Returns a multi-layer perceptron.

    Arguments:
        in_features: The number of inputs.
        out_features: The number of outputs.
        hidden_features: The width of each hidden layer.
        activation: The activation between the layers. The paper's code has ``nn.SELU``, which takes
            many times longer on a CPU and did not fit better.
        gated: Whether a hidden layer is linear, times a gate in (0, 1), in place of the activation.
    """
    for width in (in_features, *hidden_features, out_features):
        check_whole("the width of a layer", width)
    layers: list[nn.Module] = []
    for width in hidden_features:
        if gated:
            layers += [nn.Linear(in_features, 2 * width), nn.GLU()]
        else:
            layers += [nn.Linear(in_features, width), activation()]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, out_features))


def zero_last(net: nn.Module) -> nn.Module:
    r"""Sets the last layer of a network to zero, and returns the network."""
    last = net[-1] if isinstance(net, nn.Sequential) else net
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return net


class MLPEncoder(nn.Module):
    r"""The amortized posterior :math:`q_\psi(z_0 \mid x) = \mathcal{N}(m(x), s(x)^2)` of an MLP.

    With ``gated=True``, it is that of the papers on the VampPrior: two gated layers of 300 units.

    Arguments:
        shape: The shape of a datum, such as :math:`(C, H, W)`, or its number of dimensions.
        latent_dim: The dimension D of the latent.
        hidden_features: The width of each hidden layer.
        gated: Whether the hidden layers are gated, see :func:`mlp`.
        min_scale: The lower bound of s(x), in the units of the latent.
        max_scale: The upper bound of s(x), in the units of the latent.
        context_features: The number of features :math:`F` of the context, ``None`` to ignore it.

    References:
        | VAE with a VampPrior (Tomczak & Welling, 2018)
        | https://arxiv.org/abs/1705.07120

    Example:
        >>> import torch
        >>> MLPEncoder((1, 8, 8), latent_dim=2)(torch.zeros(5, 1, 8, 8))
        Independent(Normal(loc: torch.Size([5, 2]), scale: torch.Size([5, 2])), 1)
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        latent_dim: int,
        hidden_features: Sequence[int] = (300, 300),
        gated: bool = False,
        min_scale: float = 1e-4,
        max_scale: float = 1e2,
        context_features: int | None = 0,
    ):
        super().__init__()
        check_scales(min_scale, max_scale)
        self.shape = as_shape("shape", shape)
        self.latent_dim = latent_dim
        self.min_scale, self.max_scale = min_scale, max_scale
        self.context_features = context_features
        inputs = math.prod(self.shape) + (context_features or 0)
        self.net = mlp(inputs, 2 * latent_dim, hidden_features, gated=gated)

    def forward(self, x: Tensor, c: Tensor | None = None) -> TorchDistribution:
        r"""Returns :math:`q_\psi(z_0 \mid x)`.

        Arguments:
            x: Data, with shape :math:`(*, *\mathrm{shape})`.
            c: The context, with shape :math:`(B, F)`; the last of the leading dimensions is B.

        Returns:
            A Gaussian with batch shape :math:`(*)` and event shape :math:`(D,)`.

        Raises:
            ValueError: If the last dimensions of ``x`` are not as above.
        """
        dims = len(self.shape)
        check_ends("x", x, self.shape)
        h = x.reshape(*x.shape[:-dims], math.prod(self.shape))
        h = with_context(h, c, self.context_features)
        return gaussian(self.net(h), self.min_scale, self.max_scale)


class MLPDecoder(nn.Module):
    r"""The decoder :math:`p_\theta(x \mid z_0)` of an MLP: maps of a latent, read by a likelihood.

    Arguments:
        latent_dim: The dimension D of the latent.
        likelihood: The likelihood that reads the maps; its ``image_shape`` is the decoder's.
        hidden_features: The width of each hidden layer.
        gated: Whether the hidden layers are gated, see :func:`mlp`.
        context_features: The number of features :math:`F` of the context, ``None`` to ignore it.
    """

    def __init__(
        self,
        latent_dim: int,
        likelihood: Head,
        hidden_features: Sequence[int] = (300, 300),
        gated: bool = False,
        context_features: int | None = 0,
    ):
        super().__init__()
        self.latent_dim = latent_dim
        self.likelihood = likelihood
        self.context_features = context_features
        self.maps_shape = (likelihood.num_maps, *likelihood.image_shape[1:])
        inputs = latent_dim + (context_features or 0)
        self.net = mlp(inputs, math.prod(self.maps_shape), hidden_features, gated=gated)

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
        maps = self.net(with_context(z, c, self.context_features))
        return self.likelihood(maps.reshape(*z.shape[:-1], *self.maps_shape))
