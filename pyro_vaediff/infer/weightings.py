r"""Weightings: how much each timestep counts. Only the first is a bound.

Every weighting compares the means of :math:`q(z_{t-1} | z_t, z_0)` and :math:`p(z_{t-1} | z_t)`
at a common scale :math:`c_t`, where

.. math:: \mathrm{KL}(\mathcal{N}(\tilde\mu_t, c_t^2 I) \,\|\, \mathcal{N}(\mu_\phi, c_t^2 I)) =
    \frac{\|\tilde\mu_t - \mu_\phi\|^2}{2 c_t^2} .

- ``"elbo"``: the KL divergences of equation (11). With a fixed reverse variance, :math:`c_t =
  \sigma_t`, and the rest of each KL is a constant: the constants are summed exactly.
- ``"simple"``: :math:`L_\mathrm{simple} = E_{t \sim \mathcal{U}\{1, \dots, T\}} \|\epsilon -
  \hat\epsilon\|^2` of Ho et al. takes the place of all steps, also of :math:`-\log p(z_0 | z_1)`.
- ``"paper"``: equations (12) and (20) as printed (sign corrected): :math:`c_t = \sigma_t`, the
  mean over :math:`t = 2, \dots, T` in place of the sum, neither :math:`\mathrm{KL}(q(z_T | z_0)
  \,\|\, p(z_T))` nor :math:`-\log p(z_0 | z_1)`.

References:
    | Denoising Diffusion Probabilistic Models (Ho et al., 2020), equation (14)
    | https://arxiv.org/abs/2006.11239
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..priors import DiffusionPrior

__all__ = ["WEIGHTINGS", "Weighting"]


@dataclass(frozen=True)
class Weighting:
    r"""A weighting of the timesteps.

    Arguments:
        name: Its name.
        scales: The table of the prior's kernel that holds the common scales :math:`c_t`.
        first: The first timestep of the sum over :math:`t`.
        average: Whether the mean over timesteps takes the place of the sum.
        keep_z_T: Whether :math:`\mathrm{KL}(q(z_T | z_0) \,\|\, p(z_T))` counts.
        keep_z_0: Whether :math:`-\log p(z_0 | z_1)` counts.
    """

    name: str
    scales: str
    first: int
    average: bool
    keep_z_T: bool
    keep_z_0: bool

    @property
    def is_bound(self) -> bool:
        r"""Whether the loss is the negative of a lower bound on :math:`\log p(x)`."""
        return self.name == "elbo"

    def check(self, prior: DiffusionPrior, conditioning: str) -> None:
        r"""Raises a ``ValueError`` if the weighting does not apply to the estimator."""
        if not self.is_bound and (conditioning != "z_0" or prior.reverse_variance == "learned"):
            raise ValueError(
                f"weighting={self.name!r} is defined for conditioning='z_0' and a fixed reverse "
                f"variance, got conditioning={conditioning!r} and "
                f"reverse_variance={prior.reverse_variance!r}"
            )

    def common_scales(self, prior: DiffusionPrior, conditioning: str) -> Tensor | None:
        r"""Returns the table of :math:`c_t`, or ``None`` if only the whole KL is known."""
        if conditioning != "z_0" or prior.reverse_variance == "learned":
            return None
        return getattr(prior.kernel, self.scales)

    def multiplier(self, prior: DiffusionPrior) -> float:
        r"""Returns the factor of each timestep in the sum over :math:`t`."""
        return 1 / max(1, prior.num_timesteps + 1 - self.first) if self.average else 1.0

    def constant(self, prior: DiffusionPrior, conditioning: str) -> float:
        r"""Returns the sum over :math:`t` of what the common scales leave out of the KLs."""
        if not self.is_bound or self.common_scales(prior, conditioning) is None:
            return 0.0
        return prior.latent_dim * prior.variance_kl[self.first :].sum().item()


WEIGHTINGS: dict[str, Weighting] = {
    weighting.name: weighting
    for weighting in (
        Weighting("elbo", "sigmas", first=2, average=False, keep_z_T=True, keep_z_0=True),
        Weighting("simple", "noise_scales", first=1, average=True, keep_z_T=True, keep_z_0=False),
        Weighting("paper", "sigmas", first=2, average=True, keep_z_T=False, keep_z_0=False),
    )
}
