r"""The contract of a prior: a pair of Pyro programs that agree on their latent sites."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.runtime import InferDict
from torch import Tensor, nn

from ..arguments import as_shape
from ..nn.scale import upcast

__all__ = ["Prior", "SiteInfer"]


class SiteInfer(InferDict, total=False):
    r"""The entries of ``infer`` by which a guide site informs the estimators of this package.

    Arguments:
        closed_form_kl: Whether a KL divergence in closed form is legal.
        role: What the site is for, see :class:`~pyro_vaediff.infer.Term`.
        t: The timestep(s) of a step.
        chunk: The suffix of the site's name, if the site has only some of the timesteps.
    """

    closed_form_kl: bool
    role: str
    t: int | Tensor
    chunk: str


class Prior(nn.Module, ABC):
    r"""A prior :math:`p(z_0)`, as a pair of Pyro programs.

    :meth:`model` samples :math:`z_0`, possibly through other latent sites. :meth:`guide` samples
    the same sites from the posterior, given the encoder's distribution :math:`q(z_0 | x)`. A prior
    opens no plate for its data: it is called inside the plate of the program that uses it. Several
    priors in one program live under names of their own, by
    :func:`pyro.contrib.autoname.scope`.

    Arguments:
        event_shape: The shape of a latent, such as :math:`(C, H, W)`; a number :math:`D` means
            :math:`(D,)`.

    Raises:
        ValueError: If it is not a shape.
    """

    origin: Tensor

    def __init__(self, event_shape: int | Sequence[int]):
        super().__init__()
        #: The shape of a latent.
        self.event_shape = torch.Size(as_shape("event_shape", event_shape))
        self.register_buffer("origin", torch.zeros(self.event_shape), persistent=False)

    @property
    def event_dim(self) -> int:
        r"""The number of dimensions of :attr:`event_shape`."""
        return len(self.event_shape)

    @property
    def latent_dim(self) -> int:
        r"""The number of latent variables :math:`D`, in all dimensions."""
        return self.event_shape.numel()

    @abstractmethod
    def model(self, c: Tensor | None = None) -> Tensor:
        r"""Samples :math:`z_0 \sim p(z_0 | c)`, with the event shape, or a batch of it in plates.

        Arguments:
            c: The context, with shape :math:`(B, F)`, if the prior has one.
        """

    def guide(self, q_z0: dist.TorchDistribution, c: Tensor | None = None) -> Tensor:
        r"""Samples :math:`z_0 \sim q(z_0 | x)`.

        Arguments:
            q_z0: The encoder's distribution :math:`q(z_0 | x)`, with the event shape of a latent.
            c: The context, with shape :math:`(B, F)`, if the prior has one.

        Returns:
            The latents :math:`z_0`.
        """
        self.check_posterior(q_z0)
        # The model's z_0 has no parents, hence KL(q(z_0|x) || p(z_0)) is legal in closed form.
        return pyro.sample("z_0", q_z0, infer=SiteInfer(closed_form_kl=True))

    def distribution(self, c: Tensor | None = None) -> dist.TorchDistribution:
        r"""Returns :math:`p(z_0 | c)`, if its density is known."""
        raise NotImplementedError(
            f"the density of a {type(self).__name__} is not known: use the ELBO, or the "
            "ProbabilityFlow of a diffusion prior"
        )

    def log_prob(self, z_0: Tensor, c: Tensor | None = None) -> Tensor:
        r"""Returns :math:`\log p(z_0 | c)` in nats, if it is known exactly.

        Arguments:
            z_0: The latents, with shape :math:`(*, \dots)`.
            c: The context, with shape :math:`(B, F)`, if the prior has one.

        Returns:
            The log-densities, with shape :math:`(*)`.
        """
        return self.distribution(c).log_prob(z_0)

    def bind(self, encoder: Callable[[Tensor], dist.TorchDistribution] | None) -> None:
        r"""Receives the encoder of its VAE, and each new one; most priors have no use for it."""

    def initialize(self, x: Tensor) -> None:
        r"""Starts from training data where a prior has a use for them; most have none.

        Arguments:
            x: Data as the encoder sees them, with shape :math:`(B, \dots)`.
        """

    def check_posterior(self, q_z0: dist.TorchDistribution) -> None:
        r"""Raises a ``ValueError`` unless ``q_z0`` is a distribution over :math:`z_0`."""
        if not isinstance(q_z0, dist.torch_distribution.TorchDistributionMixin):
            raise ValueError(
                "the encoder must return a distribution of pyro.distributions over z_0, such as "
                f"Normal(loc, scale).to_event({self.event_dim}), got a {type(q_z0).__name__}"
            )
        if tuple(q_z0.event_shape) != tuple(self.event_shape):
            shape = ", ".join(map(str, self.event_shape)) + ("," if self.event_dim == 1 else "")
            raise ValueError(
                f"q(z_0 | x) must have event shape ({shape}), as the prior has, got "
                f"{tuple(q_z0.event_shape)}"
            )

    def standard_normal(self) -> dist.Independent:
        r"""Returns :math:`\mathcal{N}(0, I)` over latents."""
        origin = upcast(self.origin)
        return dist.Normal(origin, torch.ones_like(origin)).to_event(self.event_dim)


def call(function: Callable, *args: Any) -> Any:
    r"""Returns the result of a function, whose last argument is the context, if there is one."""
    return function(*args) if args[-1] is not None else function(*args[:-1])
