r"""A schedule with given variances, on a grid of times and between them."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_whole
from .path import Path
from .tables import Times, at_time, is_index

__all__ = ["Schedule"]


class Schedule(Path):
    r"""The schedule of a chain with given variances.

    Between the times :math:`\tau_t = t / T`, :math:`\log \bar\alpha` is interpolated linearly, so
    that the path of the diffusion is known at every time. A subclass that knows more overrides
    :meth:`~pyro_vaediff.schedules.Path.forward`.

    Arguments:
        betas: The variances :math:`\beta_1, \dots, \beta_T` in :math:`(0, 1)`, with shape
            :math:`(T,)`.

    Raises:
        ValueError: If ``betas`` is empty, not one-dimensional, leaves :math:`(0, 1)`, or has a
            variance below 1e-15.

    Example:
        >>> schedule = Schedule(torch.tensor([0.1, 0.5]))
        >>> schedule.betas
        tensor([0.0000, 0.1000, 0.5000])
        >>> schedule.alphas_cumprod
        tensor([1.0000, 0.9000, 0.4500])
        >>> schedule(torch.tensor(0.25)).sigmoid()
        tensor(0.9487)
    """

    times: Tensor  #: The grid :math:`\tau_t`.
    log_snr: Tensor  #: :math:`\lambda_t`, infinite at :math:`t = 0`.
    betas: Tensor  #: :math:`\beta_t`, with :math:`\beta_0 = 0`.
    alphas: Tensor  #: :math:`\alpha_t = 1 - \beta_t`.
    alphas_cumprod: Tensor  #: :math:`\bar\alpha_t`, with :math:`\bar\alpha_0 = 1`.
    log_alphas_cumprod: Tensor  #: :math:`\log \bar\alpha_t`, also where it underflows.
    one_minus_alphas_cumprod: Tensor  #: :math:`1 - \bar\alpha_t`, free of cancellation.
    betas_tilde: Tensor  #: :math:`\tilde\beta_t`, the variance of :math:`q(z_{t-1}|z_t, z_0)`.
    continuous = False  #: Whether it is in continuous time, see :meth:`in_continuous_time`.
    learned = False  #: Whether the path has parameters, so that the tables are as it once was.
    shape = torch.Size()  #: The shape of :math:`\lambda(t)`, if dimensions have paths of their own.

    def __init__(self, betas: Any):
        super().__init__(betas)
        self.discretize(torch.linspace(0, 1, len(self.original("path")), dtype=torch.float64))

    def variances(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the variances of :math:`q(z_t | z_s)` and of :math:`q(z_s | z_t, z_0)`.

        .. math:: \beta_{t|s} = 1 - \frac{\bar\alpha_t}{\bar\alpha_s}, \qquad \tilde\beta_{t|s} =
            \frac{1 - \bar\alpha_s}{1 - \bar\alpha_t} \beta_{t|s}

        Arguments:
            t: The later times, in float64.
            s: The earlier times.
        """
        beta = -torch.expm1(self.log_alpha(t, s))
        noise_t, noise_s = (torch.sigmoid(-self.log_snr_at(u)) for u in (t, s))
        return beta, beta * (noise_s / noise_t).clamp(max=1)

    def discretize(self, times: Tensor) -> None:
        r"""Makes the tables of a grid of times, with shape :math:`(T + 1,)` and in float64.

        They are those of a chain that starts at the first of these times.
        """
        with torch.no_grad():
            log_snr, log_alpha_bar = self.log_snr_at(times), self.log_alpha(times, times[:1])
            betas = with_zero(-torch.expm1(self.log_alpha(times[1:], times[:-1])))
        one_minus = -torch.expm1(log_alpha_bar)
        tilde = betas[1:] * (one_minus[:-1] / one_minus[1:])
        self.tabulate(
            {
                "times": times,
                "log_snr": log_snr,
                "betas": betas,
                "alphas": 1 - betas,
                "alphas_cumprod": log_alpha_bar.exp(),
                "log_alphas_cumprod": log_alpha_bar,
                "one_minus_alphas_cumprod": one_minus,
                "betas_tilde": with_zero(tilde),
            }
        )

    def with_steps(self, steps: int | Tensor) -> Schedule:
        r"""Returns the schedule of another chain along the same path.

        Arguments:
            steps: The number of steps of equal length, or the times :math:`\tau_0 < \dots <
                \tau_T = 1`, with shape :math:`(T + 1,)`, from the same start :math:`\tau_0`.

        Raises:
            ValueError: If it is neither.

        Example:
            >>> from pyro_vaediff.schedules import LinearSchedule
            >>> LinearSchedule(1000).with_steps(25).alphas_cumprod[-1]
            tensor(4.0358e-05)
        """
        if not isinstance(steps, Tensor):
            check_whole("steps", steps)
            steps = torch.linspace(self.start, 1, steps + 1, dtype=torch.float64)
        times = steps.detach().cpu().double()
        if times.ndim != 1 or len(times) < 2 or times[0] != self.start or times[-1] != 1:
            raise ValueError(
                f"steps must be a number or times from {self.start:g} to 1, got {steps!r:.80}"
            )
        if not (times.diff() > 0).all():
            raise ValueError(f"steps must be times that increase, got {steps!r:.80}")
        return self.on_grid(times)

    def starting_at(self, log_snr: float) -> Schedule:
        r"""Returns the schedule of a chain that starts where the path has a log-SNR.

        Its :math:`z_0` is not clean, but :math:`\sqrt{\bar\alpha_0} \, \hat z + \sqrt{1 -
        \bar\alpha_0} \, \epsilon` for some clean :math:`\hat z`, such as a
        :class:`~pyro_vaediff.nn.NoiseMatched` encoder has it. The tables, and the algebra of
        :mod:`~pyro_vaediff.diffusion`, are relative to this :math:`z_0`; log-SNRs, and with them
        what a denoiser predicts and the variances :math:`\tilde\beta`, to :math:`\hat z`.

        Arguments:
            log_snr: The log-SNR :math:`\lambda_0`, between the ends of the path.

        Raises:
            ValueError: If it is not.

        Example:
            >>> from pyro_vaediff.schedules import LinearSchedule
            >>> LinearSchedule(1000).starting_at(5.0).log_snr[[0, 1000]]
            tensor([  5.0000, -10.1177])
        """
        low, high = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        if not self(high) < log_snr < math.inf:
            raise ValueError(
                f"log_snr must be finite and above that of the last time, {float(self(high)):g}, "
                f"got {log_snr}"
            )
        for _ in range(100):  # halves the interval
            middle = (low + high) / 2
            low, high = (middle, high) if self.log_snr_at(middle) > log_snr else (low, middle)
        grid = torch.linspace(0, 1, self.num_timesteps + 1, dtype=torch.float64)
        return self.on_grid(torch.lerp(high, torch.ones_like(high), grid), self.continuous)

    def in_continuous_time(self, first: float | None = None) -> Schedule:
        r"""Returns the schedule of a bound in continuous time.

        Only the step to the first time :math:`\tau_1` is one: it ends at the density of clean
        latents. The others are cells of an integral, which takes the place of their sum. The grid
        remains that of a chain, which programs in continuous time run to draw samples.

        Arguments:
            first: The first time :math:`\tau_1`, after which all cells are of equal length. By
                default, the grid stays as it is.

        Raises:
            ValueError: If it is not between the first and the last time, or there is one step only.

        Example:
            >>> from pyro_vaediff.schedules import LinearSchedule
            >>> LinearSchedule(1000).in_continuous_time(first=1e-4).times[[0, 1, 1000]]
            tensor([0.0000e+00, 1.0000e-04, 1.0000e+00])
        """
        times, T = self.original("times"), self.num_timesteps
        check_whole("num_timesteps", T, least=2, why=" for a grid in continuous time")
        if first is not None:
            if not self.start < first < 1:
                raise ValueError(f"first must be between {self.start:g} and 1, got {first}")
            times = torch.cat([times[:1], torch.linspace(first, 1, T, dtype=torch.float64)])
        return self.on_grid(times, continuous=True)

    def on_grid(self, times: Tensor, continuous: bool = False) -> Schedule:
        r"""Returns the same path on another grid of times."""
        new = copy.deepcopy(self)
        new.discretize(times)
        new.continuous = continuous
        return new.to(self.betas)

    @property
    def start(self) -> float:
        r"""The first time :math:`\tau_0`, 0 unless the chain starts later."""
        return self.original("times")[0].item()

    def signal(self, t: Times, event_dim: int = 1) -> tuple[Tensor, Tensor]:
        r"""Returns :math:`\bar\alpha` and :math:`1 - \bar\alpha`, ready to multiply latents.

        Both are relative to the first time of the grid, where the chain starts.

        Arguments:
            t: The time(s), with shape :math:`(*)`.
            event_dim: The number of dimensions of a latent.

        Returns:
            Two tensors of shape :math:`(*, 1, \dots, 1)`.
        """
        if is_index(t) and not self.learned:
            alpha_bar, one_minus = self.alphas_cumprod, self.one_minus_alphas_cumprod
            return at_time(alpha_bar, t, event_dim), at_time(one_minus, t, event_dim)
        t = self.time(t)
        start = self.original_on("times", t.device)[0]
        log_alpha_bar = self.ready(self.log_alpha(t, start), event_dim)
        return log_alpha_bar.exp().to(self.betas), -torch.expm1(log_alpha_bar).to(self.betas)

    def beta(self, t: Times, s: Times | None = None, event_dim: int = 1) -> Tensor:
        r"""Returns the variance that the forward diffusion adds from :math:`s` to :math:`t`.

        .. math:: \beta_{t|s} = 1 - \frac{\bar\alpha_t}{\bar\alpha_s}

        Arguments:
            t: The later time(s), with shape :math:`(*)`.
            s: The earlier time(s); by default, the step before an index.
            event_dim: The number of dimensions of a latent.

        Returns:
            The variance, with shape :math:`(*, 1, \dots, 1)`.

        Raises:
            ValueError: If ``t`` is no index, and ``s`` is not given.
        """
        if s is None:
            if not is_index(t):
                raise ValueError("s must be given if t is a time, which has no step before it")
            if not self.learned:
                return at_time(self.betas, t, event_dim)
            s = t - 1
        log_alpha = self.log_alpha(*(self.time(u) for u in (t, s)))
        return -torch.expm1(self.ready(log_alpha, event_dim)).to(self.betas)

    def ready(self, x: Tensor, event_dim: int = 1) -> Tensor:
        r"""Returns values at times, with shape :math:`(*)`, ready to multiply latents."""
        return x[(...,) + (None,) * (event_dim - len(self.shape))]

    def log_snr_at(self, t: Times) -> Tensor:
        r"""Returns the log-SNR at indices or times, in float64 and infinite at time zero."""
        t = self.time(t)
        clean = (t <= 0)[(...,) + (None,) * len(self.shape)]  # the latents of time zero
        return self(t).masked_fill(clean, torch.inf)

    def time(self, t: Times) -> Tensor:
        r"""Returns the times of indices or times, in float64."""
        if is_index(t):
            device = t.device if isinstance(t, Tensor) else torch.device("cpu")
            device = self.betas.device if self.learned else device  # where the parameters are
            return at_time(self.original_on("times", device), t, 0)
        return torch.as_tensor(t, dtype=torch.float64)

    def position(self, log_snr: Tensor) -> Tensor:
        r"""Returns where on the grid a log-SNR is: the inverse of the table ``log_snr``.

        Arguments:
            log_snr: The log-SNR, with shape :math:`(*)`.

        Returns:
            Real numbers in :math:`[1, T]`, with shape :math:`(*)`: whole ones for the log-SNR of
            the grid, and interpolated linearly between them.
        """
        table = -self.log_snr[1:].reshape(self.num_timesteps, -1).mean(1)
        if len(table) == 1:
            return torch.ones_like(log_snr)
        value = -log_snr.to(table.dtype)
        # Not of a single number, whose value would be read from the device.
        upper = torch.searchsorted(table, value.reshape(-1)).reshape(value.shape)
        upper = upper.clamp(1, len(table) - 1)
        low, high = table.take(upper - 1), table.take(upper)
        return (upper + ((value - low) / (high - low)).clamp(0, 1)).to(log_snr.dtype)

    def between(self, position: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the times of positions on the grid, and the lengths of the cells they are in.

        Arguments:
            position: Real numbers in :math:`[0, T)`, best in float64: those in :math:`[t - 1, t)`
                are in the cell that ends at :math:`\tau_t`.
        """
        s = position.long().clamp(max=self.num_timesteps - 1)  # whatever its rounding
        grid = self.original_on("times", position.device)
        return torch.lerp(grid[s], grid[s + 1], position - s), grid[s + 1] - grid[s]

    @property
    def num_timesteps(self) -> int:
        r"""The number of steps :math:`T`."""
        return len(self.betas) - 1

    def extra_repr(self) -> str:
        return f"num_timesteps={self.num_timesteps}" + ", continuous" * self.continuous


def with_zero(table: Tensor) -> Tensor:
    r"""Returns a table with an entry for :math:`t = 0`."""
    return torch.cat([torch.zeros_like(table[:1]), table])
