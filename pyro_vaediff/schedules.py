r"""Variance schedules :math:`\beta_1, \dots, \beta_T` of the forward diffusion.

Time runs from :math:`t = 0` (clean) to :math:`t = T` (noise) and every table has :math:`T + 1`
entries, so that a table is indexed by the :math:`t` of the equations: :math:`\beta_0 = 0`,
:math:`\bar\alpha_0 = 1`, and

.. math:: \alpha_t = 1 - \beta_t, \qquad \bar\alpha_t = \prod_{s=1}^{t} \alpha_s .

References:
    | Denoising Diffusion Probabilistic Models (Ho et al., 2020)
    | https://arxiv.org/abs/2006.11239

    | Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021)
    | https://arxiv.org/abs/2102.09672
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .arguments import check_choice, check_whole

__all__ = ["CosineSchedule", "LinearSchedule", "Schedule", "Tables", "make_schedule"]


class Tables(nn.Module):
    r"""Named tables that are computed in float64.

    They are buffers and follow ``.to(device)``. Whenever the module changes its dtype, they are
    rounded afresh from float64: a model cast to float64 must not keep the rounding of float32.
    They are not part of the state, as the configuration of a model determines them.

    Arguments:
        tables: The tables, in float64 and on the CPU.
    """

    def __init__(self, tables: dict[str, Tensor]):
        super().__init__()
        self._originals = dict(tables)
        for name, table in tables.items():
            self.register_buffer(name, table.to(torch.get_default_dtype()), persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> Tables:
        super()._apply(fn, recurse)
        for name, table in self._originals.items():
            getattr(self, name).copy_(table)
        return self

    def original(self, name: str) -> Tensor:
        r"""Returns a table in float64, on the CPU."""
        return self._originals[name]


class Schedule(Tables):
    r"""The tables of a forward diffusion with given variances, indexed by :math:`t = 0, \dots, T`.

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
    """

    betas: Tensor  #: :math:`\beta_t`, with :math:`\beta_0 = 0`.
    alphas: Tensor  #: :math:`\alpha_t = 1 - \beta_t`.
    alphas_cumprod: Tensor  #: :math:`\bar\alpha_t`, with :math:`\bar\alpha_0 = 1`.
    log_alphas_cumprod: Tensor  #: :math:`\log \bar\alpha_t`, also where it underflows.
    one_minus_alphas_cumprod: Tensor  #: :math:`1 - \bar\alpha_t`, free of cancellation.
    betas_tilde: Tensor  #: :math:`\tilde\beta_t`, the variance of :math:`q(z_{t-1}|z_t, z_0)`.

    def __init__(self, betas: Tensor):
        try:
            betas = torch.as_tensor(betas, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"betas must be numbers, got {betas!r}") from error
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas must have shape (T,) with T >= 1, got {tuple(betas.shape)}")
        if not ((betas > 0) & (betas < 1)).all():
            raise ValueError("betas must lie in (0, 1): a step neither keeps nor erases all")
        # With less, 1 - beta is rounded to 1, and gradients of densities overflow in float32.
        if betas.min() < 1e-15:
            raise ValueError(f"betas must be at least 1e-15, got {betas.min():g}: use fewer steps")

        betas = torch.cat([betas.new_zeros(1), betas])
        log_alphas_cumprod = torch.log1p(-betas).cumsum(0)
        one_minus = -torch.expm1(log_alphas_cumprod)
        previous = torch.cat([one_minus.new_zeros(1), one_minus[:-1]])

        super().__init__(
            {
                "betas": betas,
                "alphas": 1 - betas,
                "alphas_cumprod": log_alphas_cumprod.exp(),
                "log_alphas_cumprod": log_alphas_cumprod,
                "one_minus_alphas_cumprod": one_minus,
                # 0 / 0 at t = 0, where the posterior does not exist
                "betas_tilde": torch.cat([betas[:1], (betas * previous / one_minus)[1:]]),
            }
        )

    @property
    def num_timesteps(self) -> int:
        r"""The number of steps :math:`T`."""
        return len(self.betas) - 1

    def extra_repr(self) -> str:
        return f"num_timesteps={self.num_timesteps}"


class LinearSchedule(Schedule):
    r"""The linear schedule of Ho et al. and of the paper, from 1e-4 to 0.02 over 1000 steps.

    For :math:`T \neq 1000`, the chain observes the same noising path at :math:`T` equidistant
    times: :math:`\log \bar\alpha` of the thousand steps is interpolated linearly. Hence
    :math:`\bar\alpha_T \approx 4 \times 10^{-5}` for every :math:`T`, which multiplying the
    variances by :math:`1000 / T` would only achieve for large :math:`T`.

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

        betas = torch.linspace(beta_min, beta_max, 1000, dtype=torch.float64)
        if num_timesteps != 1000:
            log_alphas_cumprod = torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0)])
            times = torch.linspace(0, 1000, num_timesteps + 1, dtype=torch.float64)
            lower = times.long().clamp(max=999)
            path = torch.lerp(
                log_alphas_cumprod[lower], log_alphas_cumprod[lower + 1], times - lower
            )
            betas = -torch.expm1(path.diff())
        super().__init__(betas)


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


SCHEDULES: dict[str, type[Schedule]] = {"linear": LinearSchedule, "cosine": CosineSchedule}


def make_schedule(schedule: str | Schedule, num_timesteps: int) -> Schedule:
    r"""Returns the schedule of that name, or the given one if it has the right length.

    Arguments:
        schedule: ``"linear"``, ``"cosine"`` or a :class:`Schedule`.
        num_timesteps: The number of steps :math:`T`.
    """
    check_whole("num_timesteps", num_timesteps)
    if isinstance(schedule, Schedule):
        if schedule.num_timesteps != num_timesteps:
            raise ValueError(
                f"num_timesteps is {num_timesteps}, but the schedule has {schedule.num_timesteps}"
            )
        return schedule
    check_choice("schedule", schedule, SCHEDULES)
    return SCHEDULES[schedule](num_timesteps)
