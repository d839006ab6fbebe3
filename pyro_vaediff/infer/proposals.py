r"""Proposals :math:`r(t)`: which timesteps an estimator looks at.

A sum over timesteps is estimated without bias from a few of them,

.. math:: \sum_t L_t = E_{r(t)}\left[ \frac{L_t}{r(t)} \right],

for any proposal that is positive wherever :math:`L_t` is not zero. Its variance is smallest for
:math:`r(t) \propto \sqrt{E[L_t^2]}`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Size, Tensor, nn

from ..arguments import check_choice
from ..priors import DiffusionPrior
from ..schedules import is_index
from .step_kls import typical_kl

__all__ = [
    "PROPOSALS",
    "ImportanceTimesteps",
    "LossAwareTimesteps",
    "Proposal",
    "Timesteps",
    "UniformTimesteps",
]


class Timesteps(dist.TorchDistribution):
    r"""A distribution over timesteps, with i.i.d. or low-discrepancy samples.

    Low-discrepancy samples are the quantiles of :math:`(u + j / n) \bmod 1` for a single
    :math:`u \sim \mathcal{U}(0, 1)` and :math:`j = 0, \dots, n - 1`, in the row-major order of the
    batch. Each one has the distribution of the others. With batch shape :math:`(k, B)`, the
    :math:`k` samples of a datum are spread evenly, and the data fill the gaps.

    Arguments:
        probs: The probabilities of the timesteps, with shape :math:`(n,)`.
        first: The timestep of the first probability.
        low_discrepancy: Whether the samples of a batch are spread evenly.
        batch_shape: The batch shape.
        continuous: Whether samples are positions, uniform in :math:`[t - 1, t)`, not :math:`t`.

    References:
        | Variational Diffusion Models (Kingma et al., 2021), Appendix I.1
        | https://arxiv.org/abs/2107.00630

    Example:
        >>> timesteps = Timesteps(torch.ones(4) / 4, first=2, low_discrepancy=True)
        >>> timesteps.expand([8]).sample().sort().values
        tensor([2, 2, 3, 3, 4, 4, 5, 5])
    """

    arg_constraints = {"probs": constraints.simplex}  # noqa: RUF012, torch's protocol
    has_rsample = False

    def __init__(
        self,
        probs: Tensor,
        first: int = 1,
        low_discrepancy: bool = False,
        batch_shape: Sequence[int] = (),
        continuous: bool = False,
        validate_args: bool | None = None,
    ):
        self.probs = probs
        self.first = first
        self.low_discrepancy = low_discrepancy
        self.continuous = continuous
        super().__init__(Size(batch_shape), Size(), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        last = self.first + self.probs.shape[-1] - 1
        if self.continuous:
            return constraints.half_open_interval(self.first - 1, last)
        return constraints.integer_interval(self.first, last)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> Timesteps:
        options = self.low_discrepancy, batch_shape, self.continuous
        new = type(self)(self.probs, self.first, *options, validate_args=False)
        new._validate_args = self._validate_args  # of values; the probabilities have been validated
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        where: dict[str, Any] = {"dtype": torch.float64, "device": self.probs.device}
        if not self.low_discrepancy:
            return self.icdf(torch.rand(shape, **where))
        u = torch.arange(shape.numel(), **where) / shape.numel()
        return self.icdf(((u + torch.rand((), **where)) % 1).reshape(shape))

    def icdf(self, value: Tensor) -> Tensor:
        cdf = self.probs.double().cumsum(0)  # of thousands of timesteps, below 1e-3 each
        cdf = cdf / cdf[-1]
        index = torch.searchsorted(cdf, value, right=True).clamp(max=len(cdf) - 1)
        if not self.continuous:
            return self.first + index
        rest = 1 - (cdf[index] - value) / cdf.diff(prepend=cdf.new_zeros(1))[index]
        return self.first - 1 + index + rest.clamp(0, 1 - 1e-9)  # inside, whatever its rounding

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.probs[cell(value) - self.first].log()

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values = self.first + torch.arange(self.probs.shape[-1], device=self.probs.device)
        values = values.reshape((-1,) + (1,) * len(self.batch_shape))
        return values.expand((-1, *self.batch_shape)) if expand else values


def cell(t: Tensor) -> Tensor:
    r"""Returns the timesteps of positions in :math:`[t - 1, t)`; timesteps are their own."""
    return t if is_index(t) else t.long() + 1


class Proposal(nn.Module, ABC):
    r"""A rule that assigns a prior its probabilities :math:`r(t)`."""

    @abstractmethod
    def forward(self, prior: DiffusionPrior, conditioning: str) -> Tensor:
        r"""Returns :math:`r(t)` for :math:`t = 2, \dots, T`; the step :math:`t = 1` is never drawn.

        Arguments:
            prior: The prior whose chain is estimated.
            conditioning: What the guide's reverse kernel is conditioned on, ``"z_0"`` or ``"x"``.

        Returns:
            The probabilities, with shape :math:`(T - 1,)`.
        """

    def update(self, t: Tensor, terms: Tensor) -> None:
        r"""Learns from terms :math:`L_t` at timesteps ``t``, two tensors of the same shape."""


class UniformTimesteps(Proposal):
    r"""Every timestep is as likely as any other, as in the paper."""

    def forward(self, prior: DiffusionPrior, conditioning: str) -> Tensor:
        n = prior.num_timesteps - 1
        return prior.schedule.betas.new_full((n,), 1 / n)


class ImportanceTimesteps(Proposal):
    r"""Timesteps in proportion to the terms that a standard Gaussian :math:`q(z_0)` would have.

    If both the aggregate posterior and the prior are :math:`\mathcal{N}(0, I)`, every term is known
    in closed form, :func:`typical_kl`, and trained models differ by a slowly varying factor.

    Arguments:
        scale: The encoder scale :math:`s` that is assumed when conditioning on ``"x"``.
        uniform: The share of a uniform proposal that is mixed in: no weight exceeds
            :math:`T / \mathrm{uniform}`.
    """

    def __init__(self, scale: float = 0.3, uniform: float = 0.1):
        super().__init__()
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        if not 0 < uniform <= 1:
            raise ValueError(f"uniform must be in (0, 1], got {uniform}")
        self.scale = scale
        self.uniform = uniform
        self._cache: tuple[object, Tensor] | None = None

    def forward(self, prior: DiffusionPrior, conditioning: str) -> Tensor:
        key = (prior.denoiser.kernel, conditioning)
        like = prior.schedule.betas
        if self._cache is None or self._cache[0] != key or self._cache[1].device != like.device:
            kl = typical_kl(prior, 0.0 if conditioning == "z_0" else self.scale)[2:]
            # For a chain that does next to nothing, or erases all at once, only rounding is left.
            kl = kl.clamp(min=0) + torch.finfo(kl.dtype).tiny
            probs = (1 - self.uniform) * kl / kl.sum() + self.uniform / len(kl)
            self._cache = key, probs.to(like.device)
        return self._cache[1].to(like.dtype)


class LossAwareTimesteps(Proposal):
    r"""Timesteps in proportion to :math:`\sqrt{E[L_t^2]}`, learned from the terms that were seen.

    Arguments:
        decay: The share of a running mean that an observation leaves, per evaluation that saw its
            timestep. Nichol & Dhariwal keep the last 10 terms per timestep.
        uniform: The share of a uniform proposal that is mixed in.

    References:
        | Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), eq. (18)
        | https://arxiv.org/abs/2102.09672
    """

    squares: Tensor

    def __init__(self, decay: float = 0.9, uniform: float = 0.1):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if not 0 < uniform <= 1:
            raise ValueError(f"uniform must be in (0, 1], got {uniform}")
        self.decay = decay
        self.uniform = uniform
        self.register_buffer("squares", torch.zeros(0))

    def forward(self, prior: DiffusionPrior, conditioning: str) -> Tensor:
        like = prior.schedule.betas
        if len(self.squares) != prior.num_timesteps + 1:
            # Until a timestep is seen, what is known of a standard Gaussian stands in for it.
            kl = typical_kl(prior, 0.0 if conditioning == "z_0" else 0.3)
            self.squares = (prior.latent_dim * kl).square().to(like)
        self.squares = self.squares.to(like)  # a checkpoint may come from another device
        rms = self.squares[2:].sqrt() + torch.finfo(self.squares.dtype).tiny
        return (1 - self.uniform) * rms / rms.sum() + self.uniform / len(rms)

    @torch.no_grad()
    def update(self, t: Tensor, terms: Tensor) -> None:
        t, squares = t.flatten(), terms.detach().flatten().square().to(self.squares.dtype)
        count = torch.zeros_like(self.squares).index_add(0, t, torch.ones_like(squares))
        total = torch.zeros_like(self.squares).index_add(0, t, squares)
        mean = torch.where(count > 0, total / count.clamp(min=1), self.squares)
        self.squares = torch.lerp(mean, self.squares, self.decay)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The table gets its length from the first prior that it sees.
        self.squares = torch.zeros_like(state_dict.get(prefix + "squares", self.squares))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


PROPOSALS: dict[str, type[Proposal]] = {
    "uniform": UniformTimesteps,
    "importance": ImportanceTimesteps,
    "loss-aware": LossAwareTimesteps,
}


def make_proposal(timesteps: str | Proposal) -> Proposal | None:
    r"""Returns the proposal of that name, or the given one; there is none for ``"all"``."""
    if isinstance(timesteps, Proposal):
        return timesteps
    check_choice("timesteps", timesteps, ("all", *PROPOSALS))
    return None if timesteps == "all" else PROPOSALS[timesteps]()
