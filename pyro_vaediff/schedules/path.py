r"""The path of a diffusion through the log-SNRs, between the times of any grid."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .tables import Tables, check_betas

__all__ = ["Path"]


class Path(Tables):
    r"""The path on which :math:`\log \bar\alpha` is linear between times :math:`t / T`.

    Arguments:
        betas: The variances :math:`\beta_1, \dots, \beta_T` of the steps between these times, with
            shape :math:`(T,)`.
    """

    def __init__(self, betas: Any):
        super().__init__()
        # log alpha_t, the slopes of the path: its differences would be lost in its values
        log_alphas = torch.log1p(-check_betas(betas))
        self._path = {"log_alphas": log_alphas, "path": F.pad(log_alphas.cumsum(0), (1, 0))}

    def original(self, name: str) -> Tensor:
        return self._path[name] if name in self._path else super().original(name)

    def forward(self, t: Tensor) -> Tensor:
        r"""Returns the log-SNR :math:`\lambda(t)`.

        Arguments:
            t: Times in :math:`[0, 1]`, best in float64, with shape :math:`(*)`.

        Returns:
            The log-SNR, with shape :math:`(*)`.
        """
        step, part = self.locate(t)
        path = self.original_on("path", t.device).to(t)
        log_alpha_bar = torch.lerp(path.take(step), path.take(step + 1), part)
        return log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))

    def slope(self, t: Tensor) -> Tensor:
        r"""Returns the derivative :math:`\lambda'(t)`, which is negative.

        Arguments:
            t: Times in :math:`(0, 1]`, in float64 and with shape :math:`(*)`.
        """
        log_alphas = self.original_on("log_alphas", t.device).to(t)
        slope = len(log_alphas) * log_alphas.take(self.locate(t)[0])  # of log alpha_bar
        return slope / torch.sigmoid(-self(t))

    def locate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the piece of the path that times are in, and the part of it that is passed."""
        last = len(self._path["log_alphas"]) - 1
        position = t * (last + 1)
        nearest = position.round()  # a time of the grid is on it, whatever its rounding
        position = torch.where((position - nearest).abs() < 1e-9, nearest, position)
        step = position.detach().long().clamp(0, last)
        return step, position - step

    def log_alpha(self, t: Tensor, s: Tensor) -> Tensor:
        r"""Returns :math:`\log \bar\alpha_t - \log \bar\alpha_s` without cancellation.

        Arguments:
            t: The later times in :math:`[0, 1]`, in float64.
            s: The earlier times; the latents of time zero are clean.
        """
        (i, u), (j, v) = self.locate(t), self.locate(s)
        slopes, path = (self.original_on(n, t.device).to(t) for n in ("log_alphas", "path"))
        # Indexing by a single number would read it from the device.
        slope, slope_s = slopes.take(i), slopes.take(j)
        across = slope * u + (path.take(i) - path.take(j + 1)) + slope_s * (1 - v)
        return torch.where(i == j, slope * (u - v), across)
