r"""The reverse kernel of a prior whose denoiser is affine, from its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from ..denoise import Analytic, BetaTilde, Learned
from ..priors import DiffusionPrior
from .linear_gaussian import LinearDenoiser

__all__ = ["LinearReverse"]


class LinearReverse:
    r"""The kernel :math:`p(z_{t-1} | z_t) = \mathcal{N}(R_t z_t + r_t, \mathrm{diag}(\sigma_t^2))`.

    Only the parameters of the prior are read, not its algebra.

    Arguments:
        prior: The prior.
        net: The network of its denoiser.
    """

    D: int  #: The number of latent dimensions.
    T: int  #: The number of steps.
    beta: Tensor  #: :math:`\beta_t` for :math:`t = 0, \dots, T`, as the schedule has them.
    alpha_bar: Tensor  #: :math:`\bar\alpha_t = \prod_{s=1}^t (1 - \beta_s)`.

    def __init__(self, prior: DiffusionPrior, net: LinearDenoiser):
        self.prior, self.net, self.variance = prior, net, prior.denoiser.variance
        self.D, self.T = prior.latent_dim, prior.num_timesteps
        self.beta = prior.schedule.betas
        self.alpha_bar = torch.cumprod(1 - self.beta, 0)

    def beta_tilde(self, t: int) -> Tensor:
        r"""Returns the variance of :math:`z_{t-1}` given :math:`z_t` and :math:`z_0`.

        Precisions add up: :math:`1 / \tilde\beta_t = (1 - \beta_t) / \beta_t + 1 / (1 -
        \bar\alpha_{t-1})`. It is zero at :math:`t = 1`.

        Arguments:
            t: The timestep, from 1 to :math:`T`.
        """
        self._check_timestep(t)
        return 1 / ((1 - self.beta[t]) / self.beta[t] + 1 / (1 - self.alpha_bar[t - 1]))

    def fixed_variance(self, t: int) -> Tensor:
        r"""Returns the reverse variance before any of it is learned.

        Arguments:
            t: The timestep, from 1 to :math:`T`.
        """
        self._check_timestep(t)
        use_tilde = isinstance(self.variance, BetaTilde) and t > 1
        return self.beta_tilde(t) if use_tilde else self.beta[t]

    def sigma(self, t: int) -> Tensor:
        r"""Returns the standard deviations :math:`\sigma_t` of :math:`p(z_{t-1} | z_t)`.

        Arguments:
            t: The timestep, from 1 to :math:`T`.

        Returns:
            The standard deviations, with shape :math:`(D,)`.
        """
        sigma = self.fixed_variance(t).sqrt().expand(self.D)
        if isinstance(self.variance, Learned):
            ratio = self.beta_tilde(max(t, 2)) / self.beta[max(t, 2)] if self.T > 1 else 0.5
            sigma = sigma * ratio ** -torch.tanh(self.net.u[0, t] / 2)
        if isinstance(self.variance, Analytic):
            known = self.beta_tilde(t) + self.weight(t).square() * self.error(t)
            sigma = known.sqrt().expand(self.D)
        return sigma

    def error(self, t: int) -> Tensor:
        r"""Returns the squared error of :math:`z_0` in the table of an analytic variance.

        The table is a sum of hat functions, whose log-SNRs are equally spaced.

        Arguments:
            t: The timestep, from 1 to :math:`T`.

        Returns:
            The error, with shape :math:`(1,)` or :math:`(D,)`.
        """
        assert isinstance(self.variance, Analytic)
        alpha_bar, log_snr = self.alpha_bar[t], self.variance.log_snr
        distance = (alpha_bar / (1 - alpha_bar)).log() - log_snr
        hats = (1 - (distance / (log_snr[1] - log_snr[0])).abs()).clamp(min=0)
        log_ratio = self.variance.gain * (hats @ self.variance.log_ratios.flatten(1))
        return (1 - alpha_bar) * log_ratio.exp()

    def weight(self, t: int) -> Tensor:
        r"""Returns the change of the mean of :math:`z_{t-1}` per unit change of :math:`z_0`.

        Arguments:
            t: The timestep, from 1 to :math:`T`.
        """
        self._check_timestep(t)
        previous = self.alpha_bar[t - 1]
        # At fixed z_t: the weight of sqrt(alpha_bar_{t-1}) z_0 is its share of precision.
        return previous.sqrt() * (self.beta_tilde(t) / (1 - previous) if t > 1 else 1.0)

    def gain(self, t: int) -> Tensor:
        r"""Returns the change of the mean of :math:`z_{t-1}` per unit change of the prediction.

        Arguments:
            t: The timestep, from 1 to :math:`T`.
        """
        of_z0, alpha_bar = self.weight(t), self.alpha_bar[t]
        return {
            "z0": of_z0,
            "eps": of_z0 * -((1 - alpha_bar) / alpha_bar).sqrt(),
            "v": of_z0 * -(1 - alpha_bar).sqrt(),
            "mu": torch.ones_like(of_z0),
        }[self.prior.denoiser.parameterization]

    def linear_reverse(self, t: int) -> tuple[Tensor, Tensor]:
        r"""Returns the matrix and the vector of the reverse mean, :math:`\mu_\phi(z, t) = R z + r`.

        Arguments:
            t: The timestep, from 1 to :math:`T`.

        Returns:
            The matrix :math:`R`, with shape :math:`(D, D)`, and :math:`r`, with shape :math:`(D,)`.
        """
        net, gain = self.net, self.gain(t)
        skip = (1 - self.fixed_variance(t)).sqrt() * torch.eye(self.D).to(gain)
        return skip + gain * net.weight[0, t], gain * net.bias[0, t]

    def _check_timestep(self, t: int) -> None:
        if t not in range(1, self.T + 1):
            raise ValueError(f"t must be a whole number from 1 to T = {self.T}, got {t}")
