r"""What is known of the KLs of the steps of a chain before any data are seen."""

from __future__ import annotations

import torch
from torch import Tensor

from ..priors import DiffusionPrior

__all__ = ["mean_over_dimensions", "typical_kl", "variance_kl"]


def variance_kl(prior: DiffusionPrior) -> Tensor:
    r"""Returns the part of :math:`\mathrm{KL}(q(z_{t-1}|z_t, z_0) \,\|\, p(z_{t-1}|z_t))` that is
    due to the variances, for a fixed :math:`\sigma_t^2` and in the mean over dimensions.

    .. math:: \frac{1}{2} \left( \frac{\tilde\beta_t}{\sigma_t^2} - 1 - \log
        \frac{\tilde\beta_t}{\sigma_t^2} \right)

    Arguments:
        prior: The prior.

    Returns:
        The KLs in nats, in float64, with shape :math:`(T + 1,)` and zero for :math:`t \leq 1`.
    """
    sigmas = prior.denoiser.kernel.original("sigmas")
    ratio = prior.schedule.original("betas_tilde") / sigmas.square()
    ratio[:2] = 1.0  # no steps
    return mean_over_dimensions((ratio - 1 - ratio.log()) / 2)


def mean_over_dimensions(table: Tensor) -> Tensor:
    r"""Returns the entries of times, in the mean over dimensions that have paths of their own."""
    return table.reshape(len(table), -1).mean(1)


def typical_kl(prior: DiffusionPrior, scale: float) -> Tensor:
    r"""Returns the expected KL of each step if both the aggregate posterior and the prior are
    :math:`\mathcal{N}(0, I)`, per dimension and without :func:`variance_kl` if it is constant.

    Arguments:
        prior: The prior.
        scale: The encoder's scale :math:`s`, with :math:`s = 0` for KLs given :math:`z_0`.

    Returns:
        The KLs in nats, in float64, with shape :math:`(T + 1,)` and zero at :math:`t = 0`.
    """
    original, kernel = prior.schedule.original, prior.denoiser.kernel.original
    alpha_bar, sigma = original("alphas_cumprod"), kernel("sigmas")
    v = alpha_bar * scale**2 + original("one_minus_alphas_cumprod")
    v[0] = scale**2
    ratio = torch.where(v > 0, v.roll(1, 0) / v, 0.0)
    # E|mu_q - skip z_t|^2 for z_t = m_t + sqrt(v_t) eps, where m ~ N(0, 1 - s^2)
    skip, gain = kernel("skips"), original("alphas").sqrt() * ratio
    of_m = (alpha_bar.roll(1, 0).sqrt() - skip * alpha_bar.sqrt()).square()
    kl = (of_m * max(0.0, 1 - scale**2) + (gain - skip).square() * v) / (2 * sigma.square())
    if scale > 0:
        rho = ratio * original("betas") / sigma.square()
        kl = kl + (rho - 1 - rho.log()) / 2
    kl = mean_over_dimensions(kl)
    kl[0] = 0.0
    return kl if scale > 0 or prior.denoiser.variance.fixed else kl + variance_kl(prior)
