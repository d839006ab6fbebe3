r"""Preconditioning: the moments of the latents, which a denoiser knows before it is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["Preconditioning"]


class Preconditioning(nn.Module):
    r"""The knowledge of the mean and the scale of the clean latents.

    If they were :math:`z_0 \sim \mathcal{N}(m, \mathrm{diag}(s^2))`, then :math:`z_t` would have
    the variance :math:`v_t = \bar\alpha_t s^2 + 1 - \bar\alpha_t`, and its noise would be

    .. math:: E[\epsilon | z_t] = \sqrt{1 - \bar\alpha_t} \, v_t^{-1}
        (z_t - \sqrt{\bar\alpha_t} \, m) .

    The backbone :math:`F` sees standardized latents and is left with the departure from this,

    .. math:: E[\epsilon | z_t] + \sqrt{\bar\alpha_t} \, s \, v_t^{-1/2} \, F(v_t^{-1/2} (z_t -
        \sqrt{\bar\alpha_t} \, m), \lambda_t) .

    The moments :math:`m, s` are learned, and start at 0 and 1: an encoder that is trained with the
    prior moves them.

    Arguments:
        event_shape: The shape of a latent.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022)
        | https://arxiv.org/abs/2206.00364
    """

    # The scale has to follow the encoder, at the learning rate of the networks.
    gain = 10.0

    def __init__(self, event_shape: Sequence[int]):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(*event_shape))
        self.log_scale = nn.Parameter(torch.zeros(*event_shape))  # divided by the gain

    @property
    def scale(self) -> Tensor:
        r"""The scale :math:`s` of the clean latents, with the shape of one."""
        return torch.exp(self.gain * self.log_scale)

    def forward(
        self, net: Callable[[Tensor], tuple[Tensor, ...]], z: Tensor, log_snr: Tensor
    ) -> tuple[Tensor, ...]:
        r"""Returns the outputs of a backbone, the first of them preconditioned.

        Arguments:
            net: The backbone as a function of the latents.
            z: The latents :math:`z_t`.
            log_snr: The log-SNR, which broadcasts with them.
        """
        alpha_bar, one_minus = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
        root, scale = alpha_bar.sqrt(), self.scale
        mean, variance = root * self.mean, alpha_bar * scale.square() + one_minus
        std = variance.sqrt()
        # 1 / v_t - 1 without cancellation, where v_t is close to one
        anchor = alpha_bar * (1 - scale.square()) * z - mean
        out, *others = net((z - mean) / std)
        return (one_minus.sqrt() * anchor / variance + root * scale / std * out, *others)
