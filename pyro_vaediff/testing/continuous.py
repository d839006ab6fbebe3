r"""The exact ELBO of a linear-Gaussian VAE in continuous time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_choice
from ..priors import DiffusionPrior
from ..vae import VAE
from .affine import (
    Affine,
    condition,
    covariance,
    cross_entropy,
    entropy,
    expected_kl,
    white_noise,
)
from .linear_gaussian import LinearGaussian, SmoothDenoiser

__all__ = ["ContinuousOracle"]


class ContinuousOracle:
    r"""Expectations under the guide of a linear-Gaussian VAE in continuous time, in nats.

    The integral over the log-SNR is a Gauss-Legendre quadrature, with errors below 1e-10. All that
    is read of the prior are its parameters and the log-SNRs at both ends of the integral. If
    dimensions have paths of their own, the curve is cut into 200 pieces.

    Arguments:
        vae: The VAE, such as :func:`~pyro_vaediff.testing.linear_gaussian_vae` makes with
            ``num_timesteps=None``.
        x: The data, with shape :math:`(B, X)`, and with the dtype and the device of the VAE.

    Raises:
        ValueError: If the VAE is another one.

    Example:
        >>> from pyro_vaediff.testing import linear_gaussian_vae
        >>> oracle = ContinuousOracle(linear_gaussian_vae(None, seed=0), torch.zeros(2, 3).double())
        >>> torch.allclose(sum(oracle.terms("x").values()), sum(oracle.terms("z_0").values()))
        True
    """

    num_nodes = 80

    def __init__(self, vae: VAE, x: Tensor):
        encoder, decoder, prior = vae.encoder, vae.decoder, vae.prior
        net = prior.denoiser.backbone if isinstance(prior, DiffusionPrior) else None
        if not (
            isinstance(prior, DiffusionPrior)
            and type(net) is SmoothDenoiser
            and type(encoder) is LinearGaussian
            and type(decoder) is LinearGaussian
        ):
            raise ValueError(
                "vae must be linear and Gaussian in continuous time, such as "
                f"linear_gaussian_vae(None) makes it, got a {type(net).__name__}"
            )
        self.x, self.decoder = x, decoder
        self.parameters = net.weight, net.bias
        self.parameterization = prior.denoiser.parameterization
        self.schedule = prior.schedule
        self.ends = prior.schedule.original("times")[[1, -1]].to(x.device)
        #: The log-SNRs at the ends of the integral, that of :math:`z_1` first.
        self.high, self.low = self.schedule(self.ends)
        self.D = net.features
        start, self.noise = white_noise([self.D, self.D], like=x)
        scale = encoder.log_scale[0].exp().diag()
        self.z_0 = scale @ start + (x @ encoder.weight[0].mT + encoder.bias[0])

    def z(self, log_snr: Tensor) -> Affine:
        r"""Returns the latents of a log-SNR, with shape () or (D,)."""
        signal, noise = self.matrices(log_snr)
        return signal @ self.z_0 + noise @ self.noise

    def matrices(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the factors of the clean latents and of their noise, two diagonal matrices."""
        both = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        return both[0].expand(self.D).diag(), both[1].expand(self.D).diag()

    def denoise(self, log_snr: Tensor) -> Affine:
        r"""Returns the estimate of :math:`z_0`, from what the network predicts."""
        (signal, noise), z, told = self.matrices(log_snr), self.z(log_snr), log_snr.mean()
        weight, bias = (p[0, 0] + torch.tanh(told / 5) * p[0, 1] for p in self.parameters)
        net = weight @ z + bias
        if self.parameterization == "z0":  # beside what is best for N(0, I)
            return signal @ z + net
        if self.parameterization == "v":
            return signal @ z - noise @ net
        eps = noise @ z + net
        return signal.inverse() @ (z - noise @ eps)

    def squares(self, log_snr: Tensor, given: list[Affine]) -> Tensor:
        r"""Returns :math:`\frac{1}{2} E (\epsilon_q - \hat\epsilon)^2`, with shape (B, D)."""
        (signal, noise), z = self.matrices(log_snr), self.z(log_snr)
        eps, _ = condition(self.noise, [z, *given])
        difference = eps - noise.inverse() @ (z - signal @ self.denoise(log_snr))
        return difference.mean_square / 2

    def integral(self, given: list[Affine]) -> Tensor:
        r"""Returns the integral over time, with shape (B,)."""
        if not self.schedule.shape:
            nodes, weights = np.polynomial.legendre.leggauss(self.num_nodes)
            middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
            return sum(
                half * weight * self.squares(middle + half * node, given).sum(-1)
                for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True)
            )
        # A sum over pieces of the curve, which needs no derivative of it.
        first, last = self.ends
        curve = self.schedule(first + (last - first) * torch.linspace(0, 1, 401).to(first))
        middles, pieces = curve[1::2], curve[:-2:2] - curve[2::2]
        return sum(
            (self.squares(middle, given) * piece).sum(-1)
            for middle, piece in zip(middles, pieces, strict=True)
        )

    def terms(self, conditioning: str) -> dict[str, Tensor]:
        r"""Returns the terms of the negative ELBO, each with shape :math:`(B,)`.

        They have the names that :func:`~pyro_vaediff.infer.elbo_terms` gives them, but for
        ``"z_T"``.

        Arguments:
            conditioning: What the KLs are conditioned on, ``"z_0"`` or ``"x"``.
        """
        check_choice("conditioning", conditioning, ("z_0", "x"))
        given = [self.z_0] if conditioning == "z_0" else []
        one, zero = torch.ones_like(self.z_0.mean[0]), self.z_0 * 0.0
        mean = self.decoder.weight[0] @ self.z_0 + self.decoder.bias[0]
        x = Affine(self.x, torch.zeros_like(mean.coef))
        terms = {
            "x": cross_entropy(x, mean, self.decoder.log_scale[0].exp()),
            "z_T": expected_kl(*condition(self.z(self.low), given), zero, one),
            "z_s": self.integral(given),
        }
        p_0, sigma = self.denoise(self.high), (-self.high).sigmoid().sqrt().expand(self.D)
        if conditioning == "x":
            first = condition(self.z_0, [self.z(self.high)])
            return terms | {"z_0": expected_kl(*first, p_0, sigma)}
        H = entropy(covariance(self.z_0, self.z_0)).expand(len(self.x))
        return terms | {"-H[z_0]": -H, "z_0": cross_entropy(self.z_0, p_0, sigma)}

    @property
    def negative_elbo(self) -> Tensor:
        r"""The negative ELBO, with shape :math:`(B,)`."""
        return torch.stack(list(self.terms("z_0").values())).sum(0)
