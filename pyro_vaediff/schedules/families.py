r"""Schedules by name, and from a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_choice, check_whole
from .base import Schedule
from .tables import Tables

__all__ = ["SCHEDULES", "CosineSchedule", "LinearSchedule", "LogSNRSchedule", "make_schedule"]


class LinearSchedule(Schedule):
    r"""The linear schedule of Ho et al. and of the paper, from 1e-4 to 0.02 over 1000 steps.

    For :math:`T \neq 1000`, the chain observes the same noising path at :math:`T` equidistant
    times. Hence :math:`\bar\alpha_T \approx 4 \times 10^{-5}` for every :math:`T`, which
    multiplying the variances by :math:`1000 / T` would only achieve for large :math:`T`.

    Arguments:
        num_timesteps: The number of steps :math:`T`.
        beta_min: The first of the thousand variances.
        beta_max: The last of the thousand variances.

    Example:
        >>> schedule = LinearSchedule(1000)
        >>> schedule.betas[[1, 1000]]
        tensor([1.0000e-04, 2.0000e-02])
        >>> LinearSchedule(10).alphas_cumprod[10] / schedule.alphas_cumprod[1000]
        tensor(1.)
    """

    def __init__(self, num_timesteps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02):
        check_whole("num_timesteps", num_timesteps)
        if not 0 < beta_min <= beta_max < 1:
            raise ValueError(f"expected 0 < beta_min <= beta_max < 1, got {beta_min}, {beta_max}")
        super().__init__(torch.linspace(beta_min, beta_max, 1000, dtype=torch.float64))
        if num_timesteps != 1000:
            self.discretize(torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64))


class CosineSchedule(Schedule):
    r"""The cosine schedule of Nichol & Dhariwal.

    .. math:: \bar\alpha_t = \frac{f(t)}{f(0)}, \qquad
        f(t) = \cos^2\left(\frac{t / T + s}{1 + s} \frac{\pi}{2}\right)

    Arguments:
        num_timesteps: The number of steps :math:`T`.
        offset: The offset :math:`s`, which keeps the first variances away from zero.
        beta_max: The largest variance; larger ones are clipped, as the last one would be 1.

    Example:
        >>> CosineSchedule(4).alphas_cumprod
        tensor([1.0000e+00, 8.4701e-01, 4.9384e-01, 1.4427e-01, 1.4427e-04])
    """

    def __init__(self, num_timesteps: int = 1000, offset: float = 0.008, beta_max: float = 0.999):
        check_whole("num_timesteps", num_timesteps)
        times = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
        f = torch.cos((times + offset) / (1 + offset) * math.pi / 2) ** 2
        super().__init__((1 - f[1:] / f[:-1]).clamp(max=beta_max))


class LogSNRSchedule(Schedule):
    r"""A schedule from a function: the log-SNR :math:`\lambda(t)` itself.

    Arguments:
        log_snr: A decreasing function of times in :math:`[0, 1]`, from tensors to tensors.
        num_timesteps: The number of steps :math:`T`.

    Example:
        >>> schedule = LogSNRSchedule(lambda t: 10 - 20 * t, num_timesteps=4)
        >>> schedule.log_snr
        tensor([ inf,   5.,   0.,  -5., -10.])
    """

    def __init__(self, log_snr: Callable[[Tensor], Tensor], num_timesteps: int = 1000):
        Tables.__init__(self)
        self._path = {}
        check_whole("num_timesteps", num_timesteps)
        self.function = log_snr
        self.discretize(torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64))
        if not (self.original("log_snr").diff() < 0).all():
            raise ValueError("log_snr must decrease from t = 0 to t = 1")

    def forward(self, t: Tensor) -> Tensor:
        return self.function(t)

    def slope(self, t: Tensor) -> Tensor:
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.function(t).sum(), t)
        return slope

    def log_alpha(self, t: Tensor, s: Tensor) -> Tensor:
        # The function knows no slopes.
        log_t, log_s = (F.logsigmoid(self.log_snr_at(u)) for u in (t, s))
        return log_t - log_s


SCHEDULES: dict[str, type[Schedule]] = {"linear": LinearSchedule, "cosine": CosineSchedule}


def make_schedule(
    schedule: str | Schedule | Tensor | Sequence[float], num_timesteps: int | None
) -> Schedule:
    r"""Returns the schedule of that name, or the given one if it has the right length.

    Arguments:
        schedule: ``"linear"``, ``"cosine"``, a :class:`Schedule`, or its variances :math:`\beta_t`.
        num_timesteps: The number of steps :math:`T`, or ``None`` for continuous time.
    """
    if num_timesteps is not None:
        check_whole("num_timesteps", num_timesteps)
    if not isinstance(schedule, str | Schedule):
        schedule = Schedule(schedule)
    if isinstance(schedule, str):
        check_choice("schedule", schedule, SCHEDULES)
        schedule = SCHEDULES[schedule](1000 if num_timesteps is None else num_timesteps)
    if num_timesteps is None:
        return schedule if schedule.continuous else schedule.in_continuous_time()
    if schedule.continuous or schedule.num_timesteps != num_timesteps:
        has = "is in continuous time" if schedule.continuous else f"has {schedule.num_timesteps}"
        raise ValueError(f"num_timesteps is {num_timesteps}, but the schedule {has}")
    return schedule
