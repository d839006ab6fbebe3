r"""Paths that are learned, in continuous time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_whole
from .base import Schedule
from .families import LogSNRSchedule
from .tables import Tables

__all__ = ["LearnedSchedule", "MonotoneLogSNR"]


class MonotoneLogSNR(nn.Module):
    r"""A network :math:`\lambda(t)` whose weights are positive, so that it decreases.

    .. math::
        \lambda(t) & = \lambda_\mathrm{max} - (\lambda_\mathrm{max} - \lambda_\mathrm{min}) \,
            \frac{h(u) - h(0)}{h(1) - h(0)}, \qquad u = \frac{t - \tau_1}{1 - \tau_1} \\
        h(u) & = a u + \sum_k b_k \, \mathrm{sigmoid}(c_k u + d_k), \qquad a, b_k, c_k > 0

    It starts close to a line.

    Arguments:
        shape: The shape of :math:`\lambda(t)`, each of whose entries has parameters of its own.
        ends: The first :math:`\lambda_\mathrm{min}` and :math:`\lambda_\mathrm{max}`.
        first: The time :math:`\tau_1` of :math:`\lambda_\mathrm{max}`.
        num_units: The number of units :math:`k`.
    """

    def __init__(
        self,
        shape: Sequence[int] = (),
        ends: tuple[float, float] = (-10.0, 9.0),
        first: float = 1e-3,
        num_units: int = 8,
    ):
        super().__init__()
        self.shape, self.first = torch.Size(shape), first
        low, high = ends
        # All that is positive goes through a softplus, of which a large number is left as it is.
        self.low = nn.Parameter(torch.full(self.shape, low))
        self.width = nn.Parameter(torch.full(self.shape, high - low))
        self.linear = nn.Parameter(torch.full(self.shape, 0.5))
        units = (*self.shape, num_units)
        self.weight = nn.Parameter(torch.full(units, -3.0))
        self.rate = nn.Parameter(torch.full(units, 8.0))
        self.shift = nn.Parameter(-8 * torch.linspace(0, 1, num_units).expand(units).clone())

    @property
    def ends(self) -> list[nn.Parameter]:
        r"""The parameters of the ends."""
        return [self.low, self.width]

    @property
    def interior(self) -> list[nn.Parameter]:
        r"""The parameters of the path between them."""
        return [self.linear, self.weight, self.rate, self.shift]

    def forward(self, t: Tensor) -> Tensor:
        r"""Returns :math:`\lambda(t)`, with shape :math:`(*, \dots)` for times of shape (*)."""
        h, _ = self.h((t - self.first) / (1 - self.first))
        start, end = self.h(torch.arange(2, dtype=t.dtype, device=t.device))[0]
        width = F.softplus(self.width.double())
        return self.low.double() + width * (end - h) / (end - start)

    def slope(self, t: Tensor) -> Tensor:
        r"""Returns :math:`\lambda'(t)`, with the same shape."""
        _, slope = self.h((t - self.first) / (1 - self.first))
        start, end = self.h(torch.arange(2, dtype=t.dtype, device=t.device))[0]
        return -F.softplus(self.width.double()) * slope / (end - start) / (1 - self.first)

    def h(self, u: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns :math:`h(u)` and its derivative."""
        u = u[(...,) + (None,) * len(self.shape)]
        linear, weight, rate = (
            F.softplus(p.double()) for p in (self.linear, self.weight, self.rate)
        )
        unit = torch.sigmoid(rate * u.unsqueeze(-1) + self.shift.double())
        value = linear * u + (weight * unit).sum(-1)
        return value, linear + (weight * rate * unit * (1 - unit)).sum(-1)


class LearnedSchedule(LogSNRSchedule):
    r"""A schedule in continuous time whose path is learned with the prior, by the bound.

    With one path for all dimensions, the bound depends on its ends only: those are learned. How
    fast the path is passed through in between is a choice of the proposal of times, which
    :class:`~pyro_vaediff.infer.LossAwareTimesteps` learns by the variance of the estimator.

    If each dimension has a path :math:`\lambda_i(t)` of its own, the bound is an integral along a
    curve,

    .. math:: \frac{1}{2} \int \sum_i E (\epsilon_{q, i} - \hat\epsilon_i(z_t))^2 \, d\lambda_i ,

    which depends on the curve: all of it is learned. The network is told the mean of
    :math:`\lambda_i(t)`.

    The tables are those of the path that it starts with. A prior takes what it needs from the path
    itself; its :attr:`~pyro_vaediff.priors.DiffusionPrior.chain` and
    :meth:`~pyro_vaediff.priors.DiffusionPrior.with_steps` have the path as it is when they are
    asked for, and do not change it.

    Arguments:
        shape: The shape of :math:`\lambda(t)`, which broadcasts with latents and has as many
            dimensions: :math:`(D,)` for a path per dimension, :math:`(C, 1, 1)` for one per
            channel, and ``()`` for one.
        learn_ends: Whether the ends are learned.
        num_timesteps: The number of steps of the grid.
        log_snr: The path that is learned, a :class:`MonotoneLogSNR` by default.

    References:
        | Variational Diffusion Models (Kingma et al., 2021), Appendix H
        | https://arxiv.org/abs/2107.00630

        | Diffusion Models With Learned Adaptive Noise (Sahoo et al., 2024)
        | https://arxiv.org/abs/2312.13236

    Example:
        >>> from pyro_vaediff import DiffusionPrior
        >>> prior = DiffusionPrior(5, num_timesteps=None, schedule=LearnedSchedule((5,)))
        >>> prior.schedule.log_snr[[1, 1000]].mean(-1).round()
        tensor([  9., -10.])
    """

    function: MonotoneLogSNR
    continuous = learned = True

    def __init__(
        self,
        shape: Sequence[int] = (),
        learn_ends: bool = True,
        num_timesteps: int = 1000,
        log_snr: MonotoneLogSNR | None = None,
    ):
        Tables.__init__(self)
        self._path = {}
        check_whole("num_timesteps", num_timesteps, least=2)
        self.function = MonotoneLogSNR(shape) if log_snr is None else log_snr
        self.shape = self.function.shape
        for parameter in self.function.ends:
            parameter.requires_grad_(learn_ends)
        for parameter in self.function.interior:  # on which a bound with one path does not depend
            parameter.requires_grad_(bool(self.shape))
        times = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
        times[1] = self.function.first
        self.discretize(times)

    def slope(self, t: Tensor) -> Tensor:
        return self.function.slope(t)

    def starting_at(self, log_snr: float) -> Schedule:
        raise ValueError("the ends of a learned schedule are its own: leave out the log-SNR")

    def on_grid(self, times: Tensor, continuous: bool = False) -> Schedule:
        new = super().on_grid(times, continuous)
        new.learned = continuous
        return new if continuous else new.requires_grad_(False)
