r"""Mixture priors: a mixture of Gaussians, and the VampPrior."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..arguments import check_whole
from ..nn.scale import bounded_scale, upcast
from ..register import register
from .base import Prior

__all__ = ["MixturePrior", "VampPrior"]


class MixturePrior(Prior):
    r"""A mixture of factorized Gaussians,

    .. math:: p(z_0) = \sum_{k=1}^K \pi_k \, \mathcal{N}(z_0 | \mu_k, \sigma_k^2) .

    It starts with equal weights, and with means and variances such that its own are about those of
    :math:`\mathcal{N}(0, I)`.

    Arguments:
        event_shape: The shape of a latent; a number :math:`D` means :math:`(D,)`.
        num_components: The number of components :math:`K`.

    Example:
        >>> prior = MixturePrior(5, num_components=3)
        >>> prior.distribution()
        MixtureSameFamily(
          Categorical(logits: torch.Size([3])),
          Independent(Normal(loc: torch.Size([3, 5]), scale: torch.Size([3, 5])), 1))
    """

    # The standard deviation of the means. Their variance and that of a component add up to one.
    spread = 0.5
    floor = 1e-2  # the smallest standard deviation

    def __init__(self, event_shape: int | Sequence[int], num_components: int = 500):
        super().__init__(event_shape)
        check_whole("num_components", num_components)
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(self.spread * torch.randn(num_components, *self.event_shape))
        scale = math.sqrt(1 - self.spread**2) - self.floor
        raw = math.log(math.expm1(scale)) - math.log(math.expm1(1))
        self.raw_scale = nn.Parameter(torch.full((num_components, *self.event_shape), raw))

    def distribution(self, c: Tensor | None = None) -> dist.MixtureSameFamily:
        r"""Returns :math:`p(z_0)`, whose log-density is exact; the context has no part in it."""
        scale = bounded_scale(upcast(self.raw_scale), self.floor)
        components = dist.Normal(upcast(self.loc), scale).to_event(self.event_dim)
        return GaussianMixture(dist.Categorical(logits=upcast(self.logits)), components)

    def model(self, c: Tensor | None = None) -> Tensor:
        register("prior", self)
        return pyro.sample("z_0", self.distribution(c))


class GaussianMixture(dist.MixtureSameFamily):
    r"""A mixture of factorized Gaussians, whose log-density takes two matrix products.

    The exponent of a Gaussian is linear in :math:`(z^2, z)`. No tensor of shape :math:`(B, K, D)`
    is made, which for hundreds of components would cost more than a small VAE. A sample takes that
    of one component.

    Arguments:
        weights: The weights of the components, of which there may be a batch.
        components: The :math:`K` components, which are those of the whole batch.
    """

    def __init__(self, weights: dist.Categorical, components: dist.Independent):
        super().__init__(weights, components)
        self._batch_shape = weights.batch_shape

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008  (as in torch)
        with torch.no_grad():
            k = self.mixture_distribution.sample(sample_shape)
            normals = self.component_distribution.base_dist
            return torch.normal(normals.loc[k], normals.scale[k])

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        normals = self.component_distribution.base_dist
        loc, scale = normals.loc.flatten(1), normals.scale.flatten(1)
        value = value.flatten(-self.event_dim).to(loc.dtype)
        precision = scale.square().reciprocal()
        # In half precision, as autocast has it, the exponent would be wrong by many nats.
        with torch.autocast(value.device.type, enabled=False):
            exponent = value @ (loc * precision).mT - value.square() @ precision.mT / 2
        constant = (loc.square() * precision / 2 + scale.log()).sum(-1)
        constant = constant + self.event_shape.numel() * math.log(2 * math.pi) / 2
        log_weights = self.mixture_distribution.logits.log_softmax(-1)
        return torch.logsumexp(exponent + log_weights - constant, -1)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> dist.TorchDistribution:
        # A batch of the same mixture has one set of components.
        return dist.ExpandedDistribution(self, torch.Size(batch_shape))


class VampPrior(Prior):
    r"""The variational mixture of posteriors: the encoder's posteriors of learned images,

    .. math:: p(z_0) = \frac{1}{K} \sum_{k=1}^K q_\psi(z_0 | u_k) .

    The aggregate posterior is the best prior of all, and the mean of :math:`q_\psi(z_0 | x)` over
    all training images. The pseudo-inputs :math:`u_k` stand in for these images.

    Arguments:
        encoder: The encoder :math:`q_\psi(z_0 | x)` of the VAE. It stays the VAE's own: the prior
            only refers to it, and its parameters are not among the prior's. A VAE hands its encoder
            to its prior, so that ``None`` will do.
        event_shape: The shape of a latent; a number :math:`D` means :math:`(D,)`.
        image_shape: The shape :math:`(C, H, W)` of an image.
        num_components: The number of pseudo-inputs :math:`K`. The encoder sees all of them in each
            training step.
        support: The interval that pseudo-inputs are confined to, in x-space.

    References:
        | VAE with a VampPrior (Tomczak & Welling, 2018)
        | https://arxiv.org/abs/1705.07120
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], dist.TorchDistribution] | None,
        event_shape: int | Sequence[int],
        image_shape: Sequence[int],
        num_components: int = 500,
        support: tuple[float, float] = (-1.0, 1.0),
    ):
        super().__init__(event_shape)
        check_whole("num_components", num_components)
        if not support[0] < support[1]:
            raise ValueError(f"support must be an interval (low, high), got {support}")
        self.bind(encoder)
        self.support = support
        noise = torch.rand(num_components, *image_shape)
        self.pseudo_inputs = nn.Parameter(support[0] + (support[1] - support[0]) * noise)

    def bind(self, encoder: Callable[[Tensor], dist.TorchDistribution] | None) -> None:
        r"""Refers to another encoder, such as that of the VAE it becomes a part of."""
        # In a tuple, the encoder is not registered as a part of the prior.
        self._encoder = (encoder,)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        r"""Puts pseudo-inputs on data, as many as there are; the others stay noise.

        Arguments:
            x: Images in x-space, with shape :math:`(B, C, H, W)`.
        """
        if x.shape[1:] != self.pseudo_inputs.shape[1:]:
            shape = ", ".join(map(str, self.pseudo_inputs.shape[1:]))
            raise ValueError(f"x must have shape (B, {shape}), got {tuple(x.shape)}")
        x = x[: len(self.pseudo_inputs)]
        self.pseudo_inputs[: len(x)] = x

    def distribution(self, c: Tensor | None = None) -> dist.MixtureSameFamily:
        r"""Returns :math:`p(z_0)`, whose log-density is exact; the context has no part in it."""
        # The gradient of a clamped pseudo-input is zero, and it could never come back: hence the
        # clamped value with the gradient of the unclamped one.
        u: Tensor = self.pseudo_inputs
        u = u + (u.clamp(*self.support) - u).detach()
        if (encoder := self._encoder[0]) is None:
            raise ValueError("a VampPrior needs an encoder: make it a part of a VAE first")
        components = encoder(u)
        self.check_posterior(components)
        weights = dist.Categorical(logits=upcast(self.origin).new_zeros(len(u)))
        normal = isinstance(getattr(components, "base_dist", None), dist.Normal)
        return (GaussianMixture if normal else dist.MixtureSameFamily)(weights, components)

    def model(self, c: Tensor | None = None) -> Tensor:
        register("prior", self)
        return pyro.sample("z_0", self.distribution(c))
