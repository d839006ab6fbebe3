r"""Variances of a reverse kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_choice

__all__ = [
    "REVERSE_VARIANCES",
    "Beta",
    "BetaTilde",
    "Learned",
    "ReverseVariance",
    "make_reverse_variance",
]


class ReverseVariance:
    r"""The variance :math:`\sigma^2` of a reverse kernel."""

    num_outputs = 1  #: The number of outputs of the backbone, its prediction included.

    def __call__(self, beta: Tensor, beta_tilde: Tensor) -> Tensor:
        r"""Returns the variances of steps, from those of the forward process and its posterior.

        Arguments:
            beta: :math:`\beta_{t|s}`, of any shape and in float64.
            beta_tilde: :math:`\tilde\beta_{t|s}`, of the same shape, zero for :math:`s = 0`.
        """
        return beta


class Beta(ReverseVariance):
    r"""The variance :math:`\beta_{t|s}`, which is right for :math:`z_0 \sim \mathcal{N}(0, I)`."""


class BetaTilde(ReverseVariance):
    r"""The variance :math:`\tilde\beta_{t|s}` of the posterior, as in the paper, which is right for
    a known :math:`z_0`. It is :math:`\beta_{t|s}` for :math:`s = 0`, where the former is no
    density.
    """

    def __call__(self, beta: Tensor, beta_tilde: Tensor) -> Tensor:
        return torch.where(beta_tilde > 0, beta_tilde, beta)


class Learned(ReverseVariance):
    r"""A variance per dimension, from a second output :math:`u` of the backbone.

    .. math:: \log \sigma^2 = \log \beta_{t|s} + 2 \tanh(u / 2) \log
        \frac{\beta_{t|s}}{\tilde\beta_{t|s}}

    It starts at :math:`\beta_{t|s}` and stays within twice the width of the interval between
    :math:`\log \tilde\beta` and :math:`\log \beta` around it: it can neither overflow nor vanish.
    """

    num_outputs = 2

    @staticmethod
    def log_range(beta: Tensor, beta_tilde: Tensor) -> Tensor:
        r"""Returns the largest change of :math:`\log \sigma`, for the steps of a chain."""
        ratio = beta_tilde / beta
        # The posterior variance is zero for s = 0, where its ratio continues that of the next step.
        after = ratio.roll(-1) if ratio.numel() > 1 else torch.full_like(ratio, 0.5)
        ratio = torch.where(ratio > 0, ratio, after)
        # The interval is no wider than e^5, so that gradients cannot overflow in float32. That of
        # the usual schedules is not even as wide as e^2.
        return -ratio.log().clamp(min=-5.0)


REVERSE_VARIANCES: dict[str, type[ReverseVariance]] = {
    "beta": Beta,
    "beta_tilde": BetaTilde,
    "learned": Learned,
}


def make_reverse_variance(variance: str | ReverseVariance) -> ReverseVariance:
    r"""Returns the reverse variance of that name, or the given one."""
    if isinstance(variance, ReverseVariance):
        return variance
    check_choice("reverse_variance", variance, REVERSE_VARIANCES)
    return REVERSE_VARIANCES[variance]()
