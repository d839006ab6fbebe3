r"""Variances of a reverse kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..arguments import check_choice

__all__ = [
    "REVERSE_VARIANCES",
    "Analytic",
    "Beta",
    "BetaTilde",
    "Diagonal",
    "Learned",
    "ReverseVariance",
    "make_reverse_variance",
]


class ReverseVariance(nn.Module):
    r"""The variance :math:`\sigma^2` of a reverse kernel.

    Arguments:
        event_shape: The shape of a latent, for those that depend on it.
    """

    num_outputs = 1  #: The number of outputs of the backbone, its prediction included.
    fixed = True  #: Whether the variance has no parameters, so that a KL has a constant part.

    def __init__(self, event_shape: Sequence[int] = ()):
        super().__init__()

    def forward(self, beta: Tensor, beta_tilde: Tensor) -> Tensor:
        r"""Returns the variances of steps before any of it is learned.

        The part of the mean that is linear in :math:`z_t` leaves :math:`\mathcal{N}(0, I)` as it is
        with these, whatever is learned.

        Arguments:
            beta: :math:`\beta_{t|s}`, of any shape and in float64.
            beta_tilde: :math:`\tilde\beta_{t|s}`, of the same shape, zero for :math:`s = 0`.
        """
        return beta

    def scale(
        self, kernel: Callable[[str], Tensor], log_snr: Tensor, outputs: Sequence[Tensor]
    ) -> Tensor:
        r"""Returns the standard deviations :math:`\sigma`, which broadcast with latents.

        Arguments:
            kernel: A function from the names of coefficients to them, ready for latents.
            log_snr: The log-SNR :math:`\lambda_t`, with shape :math:`(*)`.
            outputs: The outputs of the backbone beside its prediction.
        """
        return kernel("sigmas")


class Beta(ReverseVariance):
    r"""The variance :math:`\beta_{t|s}`, which is right for :math:`z_0 \sim \mathcal{N}(0, I)`."""


class BetaTilde(ReverseVariance):
    r"""The variance :math:`\tilde\beta_{t|s}` of the posterior, as in the paper, which is right for
    a known :math:`z_0`. It is :math:`\beta_{t|s}` for :math:`s = 0`, where the former is no
    density.
    """

    def forward(self, beta: Tensor, beta_tilde: Tensor) -> Tensor:
        return torch.where(beta_tilde > 0, beta_tilde, beta)


class Learned(ReverseVariance):
    r"""A variance per dimension, from a second output :math:`u` of the backbone.

    .. math:: \log \sigma^2 = \log \beta_{t|s} + 2 \tanh(u / 2) \log
        \frac{\beta_{t|s}}{\tilde\beta_{t|s}}

    It starts at :math:`\beta_{t|s}` and stays within twice the width of the interval between
    :math:`\log \tilde\beta` and :math:`\log \beta` around it: it can neither overflow nor vanish.
    """

    num_outputs = 2
    fixed = False

    def scale(
        self, kernel: Callable[[str], Tensor], log_snr: Tensor, outputs: Sequence[Tensor]
    ) -> Tensor:
        return kernel("sigmas") * torch.exp(kernel("log_ranges") * torch.tanh(outputs[0] / 2))

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


class Analytic(ReverseVariance):
    r"""The best variance for the mean, one per noise level, for the steps of any chain.

    .. math:: \sigma^2 = \tilde\beta_{t|s} + b_{t|s}^2 \, e(\lambda_t), \qquad
        e(\lambda_t) = \frac{1}{D} E \| z_0 - \hat z_0(z_t) \|^2

    is the variance of the step if :math:`z_0` were known, plus what is not known of it: the minimum
    of :math:`E[-\log p(z_s | z_t)]`. The error is that of latents :math:`z_0 \sim \mathcal{N}(0,
    I)` at first, with which :math:`\sigma^2 = \beta_{t|s}`, times a learned ratio,

    .. math:: e(\lambda_t) = (1 - \bar\alpha_t) \, e^{r(\lambda_t)} ,

    where :math:`r` is a table, interpolated linearly in the log-SNR. It learns from the gradient of
    the bound, which vanishes at the best variance, with whatever estimator;
    :func:`~pyro_vaediff.priors.fit_variances` measures it. Either way it is a parameter of the
    prior: fitted to training data, the bound of other data remains one.

    Arguments:
        event_shape: The shape of a latent.
        log_snr: The log-SNRs of the table, increasing, with shape :math:`(K,)`.
        start: The variance that the network was trained with, if it was another one.

    References:
        | Analytic-DPM: an Analytic Estimate of the Optimal Reverse Variance in Diffusion
          Probabilistic Models (Bao et al., 2022), Theorem 1, for the best mean
        | https://arxiv.org/abs/2201.06503

        | Estimating the Optimal Covariance with Imperfect Mean in Diffusion Probabilistic Models
          (Bao et al., 2022), for any mean
        | https://arxiv.org/abs/2206.07309
    """

    fixed = False
    per_dimension: ClassVar[bool] = False
    # The ratios have to follow the network, at its learning rate.
    gain = 10.0

    log_snr: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        log_snr: Tensor | None = None,
        start: ReverseVariance | None = None,
    ):
        super().__init__()
        self.start = Beta() if start is None else start
        self.num_outputs = self.start.num_outputs
        log_snr = torch.linspace(-12, 12, 49) if log_snr is None else log_snr
        shape = tuple(event_shape) if self.per_dimension else (1,) * len(event_shape)
        self.register_buffer("log_snr", log_snr)
        self.log_ratios = nn.Parameter(torch.zeros(len(log_snr), *shape))  # divided by the gain

    def forward(self, beta: Tensor, beta_tilde: Tensor) -> Tensor:
        return self.start(beta, beta_tilde)

    def scale(
        self, kernel: Callable[[str], Tensor], log_snr: Tensor, outputs: Sequence[Tensor]
    ) -> Tensor:
        return (kernel("betas_tilde") + kernel("b").square() * self.error(log_snr)).sqrt()

    def error(self, log_snr: Tensor) -> Tensor:
        r"""Returns the squared error :math:`e(\lambda)`, which broadcasts with latents.

        Arguments:
            log_snr: The log-SNR, with shape :math:`(*)`.
        """
        flat = log_snr.reshape(-1)  # a single number would be read from the device
        ones = (1,) * (self.log_ratios.ndim - 1)
        upper = torch.searchsorted(self.log_snr, flat).clamp(max=len(self.log_snr) - 1)
        lower = (upper - 1).clamp(min=0)
        low, high = self.log_snr[lower], self.log_snr[upper]
        part = ((flat - low) / (high - low).clamp(min=1e-9)).clamp(0, 1).reshape(-1, *ones)
        log_ratio = self.gain * torch.lerp(self.log_ratios[lower], self.log_ratios[upper], part)
        error = torch.sigmoid(-flat).reshape(-1, *ones) * log_ratio.exp()
        return error.reshape(*log_snr.shape, *error.shape[1:])

    @torch.no_grad()
    def set_error(self, error: Tensor) -> None:
        r"""Sets the squared errors of the table, with shape :math:`(K, \dots)`."""
        typical = torch.sigmoid(-self.log_snr.double()).reshape(-1, *[1] * (error.ndim - 1))
        # A dimension that is known exactly would have no density.
        self.log_ratios.copy_((error / typical).clamp(min=1e-6).log() / self.gain)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The table of variances that were measured has a length of its own.
        saved = state_dict.get(prefix + "log_snr", self.log_snr)
        if len(saved) != len(self.log_snr):
            self.log_snr = self.log_snr.new_zeros(len(saved))
            shape = (len(saved), *self.log_ratios.shape[1:])
            self.log_ratios = nn.Parameter(self.log_ratios.new_zeros(shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Diagonal(Analytic):
    r"""The best variance for the mean, one per noise level and dimension: see :class:`Analytic`."""

    per_dimension = True


REVERSE_VARIANCES: dict[str, type[ReverseVariance]] = {
    "beta": Beta,
    "beta_tilde": BetaTilde,
    "learned": Learned,
    "analytic": Analytic,
    "diagonal": Diagonal,
}


def make_reverse_variance(
    variance: str | ReverseVariance, event_shape: Sequence[int]
) -> ReverseVariance:
    r"""Returns the reverse variance of that name for latents of that shape, or the given one."""
    if isinstance(variance, ReverseVariance):
        return variance
    check_choice("reverse_variance", variance, REVERSE_VARIANCES)
    return REVERSE_VARIANCES[variance](event_shape)
