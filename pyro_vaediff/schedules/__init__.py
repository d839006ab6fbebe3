r"""Schedules: the log-signal-to-noise ratio of the forward diffusion, and a grid of times.

Time :math:`t \in [0, 1]` runs from clean to noise, and all that the Gaussian algebra needs to know
of it is the log-SNR, which decreases:

.. math:: \lambda(t) = \log \frac{\bar\alpha(t)}{1 - \bar\alpha(t)}, \qquad \bar\alpha =
    \mathrm{sigmoid}(\lambda), \qquad 1 - \bar\alpha = \mathrm{sigmoid}(-\lambda) .

A chain of :math:`T` steps is a grid of times :math:`0 = \tau_0 < \dots < \tau_T = 1`. Everywhere,
an *integer* is an index of the grid and a *floating-point* number is a time. Tables have :math:`T +
1` entries, so that they are indexed by the :math:`t` of the equations: :math:`\beta_0 = 0`,
:math:`\bar\alpha_0 = 1`, and

.. math:: \alpha_t = 1 - \beta_t, \qquad \bar\alpha_t = \prod_{s=1}^{t} \alpha_s .

References:
    | Denoising Diffusion Probabilistic Models (Ho et al., 2020)
    | https://arxiv.org/abs/2006.11239

    | Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021)
    | https://arxiv.org/abs/2102.09672

    | Variational Diffusion Models (Kingma et al., 2021)
    | https://arxiv.org/abs/2107.00630
"""

from .base import Schedule
from .families import SCHEDULES, CosineSchedule, LinearSchedule, LogSNRSchedule, make_schedule
from .learned import LearnedSchedule, MonotoneLogSNR
from .path import Path
from .tables import Tables, Times, at_time, is_index

__all__ = [
    "SCHEDULES",
    "CosineSchedule",
    "LearnedSchedule",
    "LinearSchedule",
    "LogSNRSchedule",
    "MonotoneLogSNR",
    "Path",
    "Schedule",
    "Tables",
    "Times",
    "at_time",
    "is_index",
    "make_schedule",
]
