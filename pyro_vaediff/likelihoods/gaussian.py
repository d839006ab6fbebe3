r"""The likelihood of images as points of a continuous space."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..nn.scale import bounded_scale, upcast
from .base import Likelihood
from .distributions import IsotropicNormal
from .spaces import DequantizedSpace

__all__ = ["GaussianLikelihood"]


class GaussianLikelihood(Likelihood):
    r"""A factorized Gaussian density of uniformly dequantized images in [-1, 1].

    .. math:: p_\theta(x \mid z_0) = \mathcal{N}(x \mid \mu_\theta(z_0), \sigma^2 I)

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of one image.
        sigma: ``"shared"`` for one learned number, ``"pixel"`` for a map predicted by the decoder
            per pixel and channel, or a positive number for a fixed standard deviation, in x-space.
            Learned ones are bounded below by 1e-3.

    References:
        | Simple and Effective VAE Training with Calibrated Decoders (Rybkin et al., 2021)
        | https://arxiv.org/abs/2006.13202
    """

    space_type = DequantizedSpace
    floor = 1e-3
    gain = 10.0

    def __init__(self, image_shape: Sequence[int], sigma: str | float = "shared"):
        super().__init__(image_shape, maps_per_channel=2 if sigma == "pixel" else 1)
        fixed = isinstance(sigma, int | float) and 0 < sigma < math.inf
        if not fixed and sigma not in ("shared", "pixel"):
            raise ValueError(f"sigma must be 'shared', 'pixel' or a positive number, got {sigma!r}")
        self.mean_only = sigma != "pixel"
        self.fixed_sigma = float(sigma) if fixed else None
        if sigma == "shared":
            # sigma starts at 0.49, about the spread of natural images on [-1, 1]. Adam moves every
            # parameter by about lr per step: without the gain, log sigma would need thousands of
            # steps to arrive, and the latents would wait for it.
            self.raw_sigma = nn.Parameter(torch.tensor(-1.0 / self.gain))

    def _distribution(self, params: Tensor) -> TorchDistribution:
        if not self.mean_only:
            loc, raw = params.chunk(2, dim=-3)
            return dist.Normal(loc, bounded_scale(raw, self.floor))
        if self.fixed_sigma is not None:
            sigma = params.new_full((), self.fixed_sigma)
        else:
            sigma = bounded_scale(upcast(self.gain * self.raw_sigma), self.floor)
        return IsotropicNormal(params, sigma, event_dim=3)
