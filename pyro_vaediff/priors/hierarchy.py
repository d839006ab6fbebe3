r"""Hierarchies: groups of latents, each given those above, as one prior."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.autoname import scope
from torch import Tensor, nn

from ..diffusion import base_normal
from ..nn.modes import shallow_copy
from ..nn.scale import bounded_scale, upcast
from ..register import register
from .base import Prior, call
from .diffusion import DiffusionPrior

__all__ = ["ConditionalGaussianPrior", "HierarchicalPrior", "Posterior"]

#: The lazy posterior of data, which is a function from the number of a group (from 1), the state of
#: the path above it (``None`` for the first) and the normals of its prior, if that is a Gaussian
#: given the state (else ``None``), to :math:`q(z^l | z^{<l}, x)`.
Posterior = Callable[
    [int, Tensor | None, torch.distributions.Normal | None], dist.TorchDistribution
]


class ConditionalGaussianPrior(Prior):
    r"""A Gaussian with moments that a network makes of the context.

    .. math:: p(z_0 | c) = \mathcal{N}(m(c), s(c)^2)

    The mean starts at 0 and the scale at 1 if the network starts at zero.

    Arguments:
        event_shape: The shape of a latent; a number :math:`D` means :math:`(D,)`.
        net: The network, which maps contexts of shape :math:`(N, \dots)`, with as many dimensions
            as a latent has, to :math:`(N, 2 C, \dots)`: the event shape with twice as many entries
            along its first dimension.
        min_scale: The lower bound of the scale.
        max_scale: Its upper bound.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        net: nn.Module,
        min_scale: float = 1e-3,
        max_scale: float = 1e2,
    ):
        super().__init__(event_shape)
        self.net, self.min_scale, self.max_scale = net, min_scale, max_scale

    def distribution(self, c: Tensor | None = None) -> dist.Independent:
        r"""Returns :math:`p(z_0 | c)`.

        Raises:
            ValueError: If there is no context, or the network returns another shape.
        """
        if c is None:
            raise ValueError("a ConditionalGaussianPrior needs a context, got None")
        n = self.event_dim  # that of a context as well
        outputs = upcast(self.net(c.reshape(-1, *c.shape[-n:])))
        channels, *sides = self.event_shape
        if outputs.shape[1:] != (2 * channels, *sides):
            raise ValueError(
                "the net of a ConditionalGaussianPrior must return tensors of shape (N, "
                f"{', '.join(map(str, (2 * channels, *sides)))}), got {tuple(outputs.shape)}"
            )
        loc, raw = outputs.reshape(*c.shape[:-n], *outputs.shape[1:]).chunk(2, dim=-n)
        scale = bounded_scale(raw, self.min_scale, self.max_scale)
        return dist.Normal(loc, scale).to_event(n)

    def model(self, c: Tensor | None = None) -> Tensor:
        register("prior", self)
        return pyro.sample("z_0", self.distribution(c))


class HierarchicalPrior(Prior):
    r"""Groups of latents :math:`z^1, \dots, z^L`, each given those above it.

    .. math:: p(z) = p(z^1) \prod_{l=2}^L p(z^l | h_{l-1}), \qquad
        h_l = f_l(h_{l-1}, z^l), \quad h_0 = \varnothing

    A group is any prior, whose context is the state :math:`h_{l-1}` of the generative path; each
    but the first must take one. The sites of group :math:`l` are called ``"group<l>/..."``, and so
    are its terms. Both :meth:`model` and :meth:`guide` return the last state :math:`h_L`, which
    the decoder sees in place of :math:`z_0`.

    The encoder returns a *lazy* posterior, a function that is asked for one group after the other
    and is told the state so far: the posterior shares the generative path (a ladder). Since the
    guide draws the groups in the order of the model, every closed-form KL that is legal within a
    group is legal in the hierarchy.

    Arguments:
        groups: The priors, from the top.
        path: For each group, the module :math:`f_l`. It is called as ``f(h, z)``, the first one as
            ``f(None, z)``, and maps tensors of shape :math:`(*, \dots)` to tensors of such a shape.
        event_shape: The shape of the last state :math:`h_L`.

    Raises:
        ValueError: If a group is no prior, or there are not as many groups as modules.

    References:
        | Ladder Variational Autoencoders (Sønderby et al., 2016)
        | https://arxiv.org/abs/1602.02282

        | NVAE: A Deep Hierarchical Variational Autoencoder (Vahdat & Kautz, 2020)
        | https://arxiv.org/abs/2007.03898

    Example:
        >>> from pyro_vaediff import DiffusionPrior
        >>> class Concatenate(nn.Module):
        ...     def forward(self, h, z):
        ...         return z if h is None else torch.cat([h, z], -1)
        >>> import torch
        >>> groups = [DiffusionPrior(2, 3), ConditionalGaussianPrior(3, nn.Linear(2, 6))]
        >>> prior = HierarchicalPrior(groups, [Concatenate(), Concatenate()], 5)
        >>> trace = pyro.poutine.trace(prior.model).get_trace()
        >>> list(trace.stochastic_nodes)
        ['group1/z_3', 'group1/z_2', 'group1/z_1', 'group1/z_0', 'group2/z_0']
    """

    def __init__(
        self,
        groups: Sequence[Prior],
        path: Sequence[nn.Module],
        event_shape: int | Sequence[int],
    ):
        super().__init__(event_shape)
        if not groups or len(groups) != len(path):
            raise ValueError(
                f"groups and path must have one entry per group, got {len(groups)} and {len(path)}"
            )
        for group in groups:
            if not isinstance(group, Prior):
                raise ValueError(f"each of groups must be a Prior, got a {type(group).__name__}")
        self.groups, self.path = nn.ModuleList(groups), nn.ModuleList(path)

    def model(self, c: Tensor | None = None) -> Tensor:
        register("path", self.path)
        h: Any = c
        for group, prior, step in self.steps():
            with scope(prefix=f"group{group}"):
                z = call(prior.model, h)
            h = step(h, z)
        return h

    def guide(self, posterior: Posterior, c: Tensor | None = None) -> Tensor:
        if not callable(posterior) or isinstance(posterior, torch.distributions.Distribution):
            raise ValueError(
                "the encoder of a hierarchy must return a function of a group's number, the state "
                f"above it and its prior's normals, got a {type(posterior).__name__}"
            )
        h: Any = c
        for group, prior, step in self.steps():
            q = posterior(group, h, self.gaussian(prior, h))
            with scope(prefix=f"group{group}"):
                z = call(prior.guide, q, h)
            h = step(h, z)
        return h

    def reconstruct(
        self, posterior: Posterior, num_groups: int | None = None, c: Tensor | None = None
    ) -> Tensor:
        r"""Returns the state from the means of some groups, and draws of the prior below them.

        Arguments:
            posterior: The posterior of the data.
            num_groups: The number of groups from the top whose means are kept; all by default.
            c: The context of the first group, with shape :math:`(B, F)`.

        Raises:
            ValueError: If there are not that many groups.
        """
        if num_groups is not None and num_groups not in range(1, len(self.groups) + 1):
            raise ValueError(
                f"num_groups must be between 1 and {len(self.groups)}, got {num_groups!r}"
            )
        h: Any = c
        for group, prior, step in self.steps():
            if num_groups is None or group <= num_groups:
                z = posterior(group, h, self.gaussian(prior, h)).mean
            else:
                with pyro.plate("data", len(h)):
                    z = prior.model(h)
            h = step(h, z)
        return h

    def with_steps(self, steps: int | Tensor) -> HierarchicalPrior:
        r"""Returns the hierarchy whose diffusion priors have other steps.

        Arguments:
            steps: As of :meth:`DiffusionPrior.with_steps`.
        """
        return self.with_diffusions(lambda prior: prior.with_steps(steps))

    def with_diffusions(
        self, change: Callable[[DiffusionPrior], DiffusionPrior]
    ) -> HierarchicalPrior:
        r"""Returns the hierarchy in which a function of each diffusion prior takes its place.

        Arguments:
            change: The function. The path and the other groups are shared with this hierarchy.
        """
        new = shallow_copy(self)
        new.groups = nn.ModuleList(
            change(prior) if isinstance(prior, DiffusionPrior) else prior for prior in self.groups
        )
        return new

    def steps(self) -> Iterator[tuple[int, Prior, nn.Module]]:
        r"""Yields the number of each group, its prior and its step of the path."""
        for number, (prior, step) in enumerate(zip(self.groups, self.path, strict=True), start=1):
            assert isinstance(prior, Prior)
            yield number, prior, step

    def gaussian(self, prior: Prior, h: Tensor | None) -> torch.distributions.Normal | None:
        r"""Returns the normals of a group's prior, if it is a Gaussian given the state."""
        if isinstance(prior, ConditionalGaussianPrior):
            return base_normal(prior.distribution(h))
        return None
