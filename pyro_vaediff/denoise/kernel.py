r"""The tables of the reverse kernels of a grid."""

from __future__ import annotations

from torch import Tensor

from ..schedules import Tables

__all__ = ["Kernel"]


class Kernel(Tables):
    r"""The coefficients of the reverse kernels of a grid, zero at :math:`t = 0`."""

    a: Tensor  #: The weight of :math:`z_t` in the mean of the forward posterior.
    b: Tensor  #: The weight of :math:`z_0` in it.
    betas_tilde: Tensor  #: Its variance :math:`\tilde\beta_{t|s}`.
    sigmas: Tensor  #: The standard deviations :math:`\sigma`, before any of it is learned.
    log_ranges: Tensor  #: See :meth:`Learned.log_range`.
    skips: Tensor  #: The weight of :math:`z_t` in the reverse mean.
    gains: Tensor  #: That of the network's output.
    z0_skips: Tensor  #: The weight of :math:`z_t` in the estimate of :math:`z_0`.
    z0_gains: Tensor  #: That of the network's output.
