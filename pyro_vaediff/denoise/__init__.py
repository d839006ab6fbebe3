r"""Denoisers: the reverse kernel :math:`p_\phi(z_s | z_t)` between any two times.

A denoiser is a backbone × a schedule × a parameterization × a variance × a preconditioning. The
mean of the forward posterior is linear, :math:`\tilde\mu = a z_t + b z_0`, and the network's output
determines an estimate of :math:`z_0`. So does it determine the reverse mean

.. math:: \mu_\phi(z_t) = a z_t + b \hat z_0(z_t) = \sqrt{1 - \sigma^2} \, z_t + g \,
    \mathrm{net}(z_t, \lambda_t),

whose first part leaves :math:`\mathcal{N}(0, I)` unchanged. With a network that starts at zero, the
prior starts exactly at :math:`p(z_0) = \mathcal{N}(0, I)`.
"""

from .context import Context
from .denoiser import PARAMETERIZATIONS, Denoiser
from .preconditioning import Preconditioning
from .variances import (
    REVERSE_VARIANCES,
    Analytic,
    Beta,
    BetaTilde,
    Diagonal,
    Learned,
    ReverseVariance,
    make_reverse_variance,
)

__all__ = [
    "PARAMETERIZATIONS",
    "REVERSE_VARIANCES",
    "Analytic",
    "Beta",
    "BetaTilde",
    "Context",
    "Denoiser",
    "Diagonal",
    "Learned",
    "Preconditioning",
    "ReverseVariance",
    "make_reverse_variance",
]
