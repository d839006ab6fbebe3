r"""Encoders whose noise is that of the diffusion path."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

__all__ = ["NoiseMatched"]


class NoiseMatched(nn.Module):
    r"""An encoder with the noise of a diffusion at a fixed log-SNR.

    .. math:: q(z_0 | x) = \mathcal{N}\big( \sqrt{\bar\alpha_0} \, \hat z(x), \; (1 - \bar\alpha_0)
        I \big), \qquad \bar\alpha_0 = \mathrm{sigmoid}(\lambda_0)

    With a chain that starts at the same log-SNR,
    :meth:`~pyro_vaediff.schedules.Schedule.starting_at`, :math:`z_0` is on the path that starts at
    :math:`\hat z(x)`. Given :math:`x`, with :math:`\sigma_t^2 = \tilde\beta_t`, each step has

    .. math:: \mathrm{KL}(q(z_{t-1} | z_t, x) \,\|\, p(z_{t-1} | z_t)) = \frac{1}{2} \left(
        e^{\lambda_{t-1}} - e^{\lambda_t} \right) \| \hat z(x) - \hat z_\phi(z_t) \|^2 ,

    the first one included: the entropy of the encoder is constant and cancels.

    Arguments:
        encoder: The encoder, whose mean is :math:`\hat z(x)`. Its scale is not used.
        log_snr: The log-SNR :math:`\lambda_0`.

    Raises:
        ValueError: If the log-SNR is not finite.

    References:
        | Unified Latents: How to train your latents (2026)
        | https://arxiv.org/abs/2602.17270

    Example:
        >>> from pyro_vaediff.nn import ConvEncoder
        >>> encoder = NoiseMatched(ConvEncoder((1, 8, 8), latent_dim=2), log_snr=0.0)
        >>> encoder(torch.zeros(5, 1, 8, 8)).variance[0]
        tensor([0.5000, 0.5000])
    """

    def __init__(self, encoder: nn.Module, log_snr: float = 5.0):
        super().__init__()
        if not math.isfinite(log_snr):
            raise ValueError(f"log_snr must be finite, got {log_snr}")
        self.encoder, self.log_snr = encoder, log_snr
        double = torch.tensor(log_snr, dtype=torch.float64)
        self.signal, self.noise = (torch.sigmoid(s * double).sqrt().item() for s in (1, -1))

    def forward(self, x: Tensor, *context: Tensor) -> TorchDistribution:
        r"""Returns :math:`q(z_0 | x)`.

        Arguments:
            x: The data, as the encoder takes them.
            context: The context, if there is one.

        Raises:
            ValueError: If the encoder has no mean, such as that of a flow.
        """
        q = self.encoder(x, *context)
        try:
            mean = q.mean
        except NotImplementedError:
            raise ValueError(
                f"encoder must return a distribution with a mean for NoiseMatched, got a "
                f"{type(q).__name__}: leave its flow out"
            ) from None
        return dist.Normal(self.signal * mean, self.noise).expand(mean.shape).to_event(q.event_dim)
