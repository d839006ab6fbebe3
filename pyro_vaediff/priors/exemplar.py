r"""Priors that are mixtures over training data: the aggregate posterior, and the Exemplar VAE's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..arguments import check_whole
from ..diffusion import base_normal
from ..nn.scale import bounded_scale, upcast
from ..register import register
from .base import Prior
from .mixture import GaussianMixture

__all__ = ["AggregatePrior", "ExemplarPrior"]


class AggregatePrior(Prior):
    r"""The aggregate posterior of data as a prior: the equal mixture of the given Gaussians,

    .. math:: p(z_0) = \frac{1}{N} \sum_{n=1}^N q(z_0 | x_n) .

    For an encoder that stays as it is, no prior has a higher ELBO on these data: what it leaves is
    the mutual information, see :func:`~pyro_vaediff.evaluate.elbo_surgery`. For other data it is a
    density like any other. It has no parameters, and the densities are computed in float64.

    Arguments:
        loc: The means, with shape :math:`(N, *\mathrm{event})`.
        scale: The standard deviations, with the same shape.

    Example:
        >>> prior = AggregatePrior(torch.zeros(3, 2), torch.ones(3, 2))
        >>> prior.log_prob(torch.zeros(2))
        tensor(-1.8379, dtype=torch.float64)
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor):
        super().__init__(tuple(loc.shape[1:]))
        if loc.shape != scale.shape:
            raise ValueError(
                f"scale must have the shape of loc, {tuple(loc.shape)}, got {tuple(scale.shape)}"
            )
        self.origin = self.origin.to(loc)
        self.register_buffer("loc", loc.double())
        self.register_buffer("scale", scale.double())

    def distribution(self, c: Tensor | None = None) -> dist.MixtureSameFamily:
        r"""Returns :math:`p(z_0)`, whose log-density is exact; the context has no part in it."""
        components = dist.Normal(self.loc, self.scale).to_event(self.event_dim)
        weights = dist.Categorical(logits=self.loc.new_zeros(len(self.loc)))
        return GaussianMixture(weights, components)

    def model(self, c: Tensor | None = None) -> Tensor:
        return pyro.sample("z_0", self.distribution(c)).to(self.origin)


class ExemplarPrior(Prior):
    r"""The prior of the Exemplar VAE: a Gaussian about the encoding of each training datum,

    .. math:: p(z_0) = \frac{1}{N} \sum_{n=1}^N \mathcal{N}(z_0 | m_n, \mathrm{diag}(\sigma^2)) .

    All share the learned variance :math:`\sigma^2`. The means :math:`m_n` are those of
    :math:`q(z_0 | x_n)`, as the encoder was when it last saw :math:`x_n`: the guide keeps them in
    train mode. They are no parameters and have no gradient. Little is lost by that: a mixture that
    *is* the aggregate posterior is at its optimum, where :math:`E_{q(z_0)}[\nabla \log p(z_0)] =
    0`.

    **Leave one out.** A context is the number :math:`n` of each datum among the training data, with
    shape :math:`(B, 1)`, as a :class:`~pyro_vaediff.train.Trainer` gives it in training. The
    datum's own component is left out,

    .. math:: p(z_0 | n) = \frac{1}{|S \setminus n|} \sum_{m \in S \setminus n} \mathcal{N}(z_0 |
        m_m, \mathrm{diag}(\sigma^2)),

    or it would be all that a datum needs. :math:`S` are all training data, or ``num_components`` of
    them, drawn at random whenever the prior is evaluated: by Jensen's inequality the mean
    log-density is a lower bound of that with all of them, so that the loss stays a bound. Without a
    context, such as for test data, the mixture is that of all training data. That is the same
    density for each test datum, and its bound is a bound.

    Networks that see the context as well must ignore it (``context_features=None``). The prior
    starts with means that are drawn such that its moments are those of :math:`\mathcal{N}(0, I)`.
    If several processes train it, they all go on with the means of the main one after an epoch.

    Arguments:
        event_shape: The shape of a latent; a number :math:`D` means :math:`(D,)`.
        num_data: The number of training data :math:`N`.
        num_components: The number of components given a context; all :math:`N` if there are fewer.

    References:
        | Exemplar VAE: Linking Generative Models, Nearest Neighbor Retrieval, and Data Augmentation
          (Norouzi et al., 2020), equations (5) and (8)
        | https://arxiv.org/abs/2004.04795

    Example:
        >>> prior = ExemplarPrior(2, num_data=50)
        >>> prior.log_prob(torch.zeros(3, 2), torch.tensor([[0], [1], [49]])).shape
        torch.Size([3])
    """

    loc: Tensor
    # The standard deviation of the means. Their variance and that of a component add up to one.
    spread = 0.5
    floor = 1e-2  # the smallest standard deviation

    def __init__(self, event_shape: int | Sequence[int], num_data: int, num_components: int = 500):
        super().__init__(event_shape)
        check_whole("num_data", num_data, least=2)
        check_whole("num_components", num_components, least=2, why=", one of which is left out")
        self.num_components = num_components
        scale = math.sqrt(1 - self.spread**2) - self.floor
        raw = math.log(math.expm1(scale)) - math.log(math.expm1(1))
        self.raw_scale = nn.Parameter(torch.full(self.event_shape, raw))
        self.register_buffer("loc", self.spread * torch.randn(num_data, *self.event_shape))

    def distribution(self, c: Tensor | None = None) -> dist.MixtureSameFamily:
        r"""Returns :math:`p(z_0)`, or given the numbers of data :math:`p(z_0 | n)`."""
        loc, number = upcast(self.loc), torch.arange(len(self.loc), device=self.loc.device)
        if c is not None and self.num_components < len(loc):
            number = torch.randperm(len(loc), device=loc.device)[: self.num_components]
            loc = loc[number]
        logits = loc.new_zeros(len(loc))
        if c is not None:
            logits = torch.where(own(c).unsqueeze(-1) == number, -math.inf, logits)
        scale = bounded_scale(upcast(self.raw_scale), self.floor)
        components = dist.Normal(loc, scale).to_event(self.event_dim)
        return GaussianMixture(dist.Categorical(logits=logits), components)

    def model(self, c: Tensor | None = None) -> Tensor:
        register("prior", self)
        return pyro.sample("z_0", self.distribution(c))

    def guide(self, q_z0: dist.TorchDistribution, c: Tensor | None = None) -> Tensor:
        if c is not None and self.training:
            self.remember(q_z0, c)
        return super().guide(q_z0, c)

    @torch.no_grad()
    def remember(self, q_z0: dist.TorchDistribution, c: Tensor) -> None:
        r"""Keeps the means of the posteriors of training data; the context has their numbers.

        Raises:
            ValueError: If the posteriors are not Gaussian.
        """
        self.check_posterior(q_z0)
        if base_normal(q_z0) is None:
            raise ValueError(
                "an ExemplarPrior needs the means of a Gaussian encoder, got a "
                f"{type(q_z0).__name__}: use a DiffusionPrior or a FlowPrior for it"
            )
        # A new tensor, as the last one may be needed for a gradient.
        self.loc = self.loc.index_copy(0, own(c), q_z0.mean.to(self.loc))


def own(c: Tensor) -> Tensor:
    r"""Returns the numbers of data, with shape :math:`(B,)`, from a context of one feature."""
    if c.shape[-1:] != (1,):
        raise ValueError(
            "the context of an ExemplarPrior must be the number of each training datum, with shape "
            f"(B, 1), got {tuple(c.shape)}: leave out labels"
        )
    return c.squeeze(-1).long()
