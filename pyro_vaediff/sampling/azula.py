r"""The samplers of azula, on a diffusion prior.

azula has many more samplers than this package, among them multistep methods of any order and
predictor-corrector methods. They take an :class:`AzulaDenoiser`; azula itself is not needed here.

References:
    | Azula: Diffusion models in PyTorch (Rozet et al., 2024)
    | https://github.com/probabilists/azula
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..priors import DiffusionPrior, Prior
from .solvers import check_diffusion

__all__ = ["AzulaDenoiser"]


class AzulaDenoiser(nn.Module):
    r"""A diffusion prior as what a sampler of azula calls a denoiser.

    Most samplers of azula divide by the noise at the time where they stop: let them stop at the
    first positive time of the prior's grid, and go on to :math:`E[z_0 | z_t]` there.

    Arguments:
        prior: The prior.

    Raises:
        ValueError: If it is not a diffusion prior.

    Example:
        >>> from azula.sample import HeunSampler
        >>> from pyro_vaediff import DiffusionPrior
        >>> prior, z = DiffusionPrior(2, num_timesteps=1000), torch.randn(5, 2)
        >>> sampler = HeunSampler(AzulaDenoiser(prior), stop=0.001, steps=10, silent=True)
        >>> prior.denoise(sampler(z), sampler.stop).shape
        torch.Size([5, 2])
    """

    def __init__(self, prior: Prior):
        super().__init__()
        self.prior: DiffusionPrior = check_diffusion(prior)

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the scales :math:`\sqrt{\bar\alpha}` and :math:`\sqrt{1 - \bar\alpha}`.

        Arguments:
            t: The times in :math:`[0, 1]`, of any shape.
        """
        log_snr = self.prior.schedule.log_snr_at(t)
        return torch.sigmoid(log_snr).sqrt().to(t), torch.sigmoid(-log_snr).sqrt().to(t)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> dist.Delta:
        r"""Returns the point mass at :math:`E[z_0 | z_t]`.

        Arguments:
            x_t: The latents :math:`z_t`, with shape :math:`(B, *\mathrm{event})`.
            t: The time, with shape :math:`()` or :math:`(B,)`.
            c: The context, with shape :math:`(B, *)`.
        """
        return dist.Delta(self.prior.denoise(x_t, t, c), event_dim=self.prior.event_dim)
