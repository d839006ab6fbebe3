r"""Normalizing flow priors."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import AffineAutoregressive
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn

from ..arguments import check_whole
from ..register import register
from .base import Prior

__all__ = ["FlowPrior"]


class FlowPrior(Prior):
    r"""A masked autoregressive flow, :math:`z_0 = f_1 \circ \dots \circ f_n(u)` with :math:`u \sim
    \mathcal{N}(0, I)`.

    Each step is affine and autoregressive, and the order of the variables is reversed from one to
    the next. A prior scores latents in every training step and samples rarely: the steps score in
    one pass and sample in :math:`D` (the MAF direction).

    Arguments:
        latent_dim: The number of latent dimensions :math:`D`.
        num_steps: The number of affine autoregressive steps. The paper uses 3.
        hidden_features: The width of each hidden layer of the conditioners. They are widened to
            :math:`D` if they are narrower, as the masks need at least one unit per variable.

    References:
        | Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017)
        | https://arxiv.org/abs/1705.07057
    """

    def __init__(
        self,
        latent_dim: int,
        num_steps: int = 3,
        hidden_features: Sequence[int] = (300, 300, 300),
    ):
        super().__init__(latent_dim)
        check_whole("num_steps", num_steps)
        if not hidden_features or min(hidden_features) < 1:
            raise ValueError(f"hidden_features must be one or more widths, got {hidden_features}")
        order = torch.arange(latent_dim)
        self.steps = nn.ModuleList(
            AutoregressiveStep(conditioner(order if i % 2 == 0 else order.flip(0), hidden_features))
            for i in range(num_steps)
        )

    def distribution(self, c: Tensor | None = None) -> dist.TransformedDistribution:
        r"""Returns :math:`p(z_0)`, whose log-density is exact."""
        for step in self.steps:
            step.forget()
        # The transforms are registered as modules, their inverses are views.
        return dist.TransformedDistribution(
            self.standard_normal(), [step.inv for step in self.steps]
        )

    def model(self, c: Tensor | None = None) -> Tensor:
        register("prior", self)
        return pyro.sample("z_0", self.distribution())


class AutoregressiveStep(AffineAutoregressive):
    r"""Pyro's affine autoregressive transform, in any dtype and safe to copy."""

    def _call(self, x: Tensor) -> Tensor:
        # A density needs its full precision also under autocast.
        with torch.autocast(x.device.type, enabled=False):
            return super()._call(x)

    def _inverse(self, y: Tensor) -> Tensor:
        # Pyro's own inverse computes in the default dtype, whatever the dtype of y. The iteration
        # x <- (y - loc(x)) / scale(x) is exact after D steps, in any autoregressive order.
        x = torch.zeros_like(y)
        for _ in range(y.shape[-1]):
            loc, log_scale = self.arn(x)
            log_scale = log_scale.clamp(self.log_scale_min_clip, self.log_scale_max_clip)
            x = (y - loc) * torch.exp(-log_scale)
        self._cached_log_scale = log_scale
        return x

    def forget(self) -> None:
        r"""Empties the cache, which recognizes a tensor but not that parameters have changed."""
        self._cached_x_y = (None, None)

    def __getstate__(self) -> dict:
        # The caches of the last evaluation hold on to its graph, which cannot be copied.
        return super().__getstate__() | {"_cached_x_y": (None, None), "_cached_log_scale": None}


def conditioner(order: Tensor, hidden_features: Sequence[int]) -> nn.Module:
    r"""Returns the masked network of one autoregressive step."""
    dim = len(order)
    if dim == 1:
        return Unconditional()
    widths = [max(width, dim) for width in hidden_features]
    return AutoRegressiveNN(dim, widths, permutation=order, nonlinearity=nn.ELU())


class Unconditional(nn.Module):
    r"""The conditioner of a single variable, which has nothing to be conditioned on."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1))
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.loc.expand_as(z), self.log_scale.expand_as(z)
