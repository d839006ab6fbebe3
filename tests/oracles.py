r"""A VAE with a diffusion prior that is linear and Gaussian, and its ELBO in closed form.

.. math::
    z_0 & \sim \mathcal{N}(A x + c, \mathrm{diag}(s^2)) & \text{encoder} \\
    x & \sim \mathcal{N}(W z_0 + b, \mathrm{diag}(\varsigma^2)) & \text{decoder} \\
    \mathrm{net}(z_t, t) & = M_t z_t + n_t & \text{denoiser}

Given :math:`x`, every variable of the guide is then an affine function of standard normal noise
:math:`\xi`, and so is every mean of the model. All expectations are those of squares of such
functions, :math:`E \| \mu + C \xi \|^2 = \| \mu \|^2 + \| C \|^2`, and every conditional
distribution follows from one rule, the conditioning of a Gaussian. Nothing here uses the algebra
of the package; only the parameters are read. Everything is differentiable in the parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vaediff import VAE

# --- Gaussian variables as affine functions of noise ----------------------------------------------


@dataclass
class Affine:
    r"""A random vector :math:`\mu + C \xi` with :math:`\xi \sim \mathcal{N}(0, I)`.

    The means have shape :math:`(B, D)`, the coefficients :math:`(D, N)` for :math:`N` noises.
    """

    mean: Tensor
    coef: Tensor

    def __add__(self, other: Affine | Tensor) -> Affine:
        if isinstance(other, Tensor):
            return Affine(self.mean + other, self.coef)
        return Affine(self.mean + other.mean, self.coef + other.coef)

    def __mul__(self, number: Tensor | float) -> Affine:
        return Affine(self.mean * number, self.coef * number)

    def __sub__(self, other: Affine) -> Affine:
        return self + other * -1.0

    def __rmatmul__(self, matrix: Tensor) -> Affine:
        return Affine(self.mean @ matrix.mT, matrix @ self.coef)

    @property
    def mean_square(self) -> Tensor:
        r"""The expectation of the squares, with shape :math:`(B, D)`."""
        return self.mean.square() + self.coef.square().sum(-1)


def white_noise(sizes: list[int], like: Tensor) -> list[Affine]:
    r"""Returns independent standard normal vectors of the given sizes, one row per datum."""
    identity = torch.eye(sum(sizes), dtype=like.dtype, device=like.device)
    return [Affine(like.new_zeros(len(like), len(C)), C) for C in identity.split(sizes)]


def covariance(a: Affine, b: Affine) -> Tensor:
    return a.coef @ b.coef.mT


def stack(variables: list[Affine]) -> Affine:
    return Affine(
        torch.cat([v.mean for v in variables], -1), torch.cat([v.coef for v in variables])
    )


def condition(y: Affine, given: list[Affine]) -> tuple[Affine, Tensor]:
    r"""Returns the mean of :math:`y` given other variables, affine in these, and its covariance."""
    if not given:
        return Affine(y.mean, torch.zeros_like(y.coef)), covariance(y, y)
    given = stack(given)
    gain = torch.linalg.solve(covariance(given, given), covariance(given, y)).mT
    return Affine(y.mean, gain @ given.coef), covariance(y, y) - gain @ covariance(given, y)


def cross_entropy(y: Affine, mean: Affine, sigma: Tensor) -> Tensor:
    r"""Returns :math:`E[-\log \mathcal{N}(y; m, \sigma^2)]` for a mean :math:`m`, per datum."""
    squares = (y - mean).mean_square / sigma.square()
    return (squares + (2 * math.pi * sigma.square()).log()).sum(-1) / 2


def entropy(cov: Tensor) -> Tensor:
    return torch.logdet(2 * math.pi * math.e * cov) / 2


def expected_kl(mean_q: Affine, cov_q: Tensor, mean_p: Affine, sigma: Tensor) -> Tensor:
    r"""Returns :math:`E[\mathrm{KL}(\mathcal{N}(m_q, S_q) \,\|\, \mathcal{N}(m_p, \sigma^2))]`."""
    trace = (cov_q.diagonal() / sigma.square()).sum() / 2
    return cross_entropy(mean_q, mean_p, sigma) + trace - entropy(cov_q)


# --- The oracle -----------------------------------------------------------------------------------


class Oracle:
    r"""Expectations under the guide of a linear-Gaussian VAE, one value per datum.

    Arguments:
        vae: The VAE.
        x: The data, with shape :math:`(B, X)`.
    """

    def __init__(self, vae: VAE, x: Tensor):
        self.x, self.prior, self.decoder = x, vae.prior, vae.decoder
        self.D, self.T = vae.prior.latent_dim, vae.prior.num_timesteps
        self.beta = beta = vae.prior.schedule.betas
        self.alpha_bar = torch.cumprod(1 - beta, 0)

        # The guide, by forward recursion: D noises for each of its T + 1 variables.
        encoder = vae.encoder
        noise = white_noise([self.D] * (self.T + 1), like=x)
        scale = encoder.log_scale[0].exp().diag()
        self.z = [scale @ noise[0] + (x @ encoder.weight[0].mT + encoder.bias[0])]
        for t in range(1, self.T + 1):
            self.z.append(self.z[t - 1] * (1 - beta[t]).sqrt() + noise[t] * beta[t].sqrt())

    # The reverse kernel of the prior, from its definition.

    def beta_tilde(self, t: int) -> Tensor:
        r"""The variance of :math:`z_{t-1}` given :math:`z_t` and :math:`z_0`: precisions add up."""
        return 1 / ((1 - self.beta[t]) / self.beta[t] + 1 / (1 - self.alpha_bar[t - 1]))

    def fixed_variance(self, t: int) -> Tensor:
        use_tilde = self.prior.reverse_variance == "beta_tilde" and t > 1
        return self.beta_tilde(t) if use_tilde else self.beta[t]

    def sigma(self, t: int) -> Tensor:
        sigma = self.fixed_variance(t).sqrt().expand(self.D)
        if self.prior.reverse_variance == "learned":
            ratio = self.beta_tilde(max(t, 2)) / self.beta[max(t, 2)] if self.T > 1 else 0.5
            sigma = sigma * ratio ** -torch.tanh(self.prior.denoiser.u[0, t] / 2)
        return sigma

    def gain(self, t: int) -> Tensor:
        r"""What a unit change of the prediction changes in the mean of :math:`z_{t-1}`."""
        alpha_bar, previous = self.alpha_bar[t], self.alpha_bar[t - 1]
        # Of z_0 at fixed z_t: the weight of sqrt(alpha_bar_{t-1}) z_0 is its share of precision.
        of_z0 = previous.sqrt() * (self.beta_tilde(t) / (1 - previous) if t > 1 else 1.0)
        return {
            "z0": of_z0,
            "eps": of_z0 * -((1 - alpha_bar) / alpha_bar).sqrt(),
            "v": of_z0 * -(1 - alpha_bar).sqrt(),
            "mu": torch.ones_like(of_z0),
        }[self.prior.parameterization]

    def linear_reverse(self, t: int) -> tuple[Tensor, Tensor]:
        r"""Returns the matrix and the vector of :math:`\mu_\phi(z, t) = R z + r`."""
        net, gain = self.prior.denoiser, self.gain(t)
        skip = (1 - self.fixed_variance(t)).sqrt() * torch.eye(self.D).to(gain)
        return skip + gain * net.weight[0, t], gain * net.bias[0, t]

    def mu(self, t: int) -> Affine:
        matrix, vector = self.linear_reverse(t)
        return matrix @ self.z[t] + vector

    # The bound, from its definition and term by term.

    @property
    def reconstruction(self) -> Tensor:
        mean = self.decoder.weight[0] @ self.z[0] + self.decoder.bias[0]
        x = Affine(self.x, torch.zeros_like(mean.coef))
        return cross_entropy(x, mean, self.decoder.log_scale[0].exp())

    @property
    def negative_entropy(self) -> Tensor:
        return -entropy(covariance(self.z[0], self.z[0])).expand(len(self.x))

    @property
    def negative_elbo(self) -> Tensor:
        r"""The expectation of :math:`\log q(z_{0:T} | x) - \log p(z_{0:T}, x)`."""
        z, joint = self.z, stack(self.z)
        one, zero = torch.ones_like(z[0].mean[0]), z[0] * 0.0
        steps = [cross_entropy(z[t - 1], self.mu(t), self.sigma(t)) for t in range(1, self.T + 1)]
        cross = self.reconstruction + cross_entropy(z[self.T], zero, one) + sum(steps)
        return cross - entropy(covariance(joint, joint))

    def kl(self, t: int, given: list[Affine]) -> Tensor:
        r"""The KL of step :math:`t`, given other variables than :math:`z_t` as well."""
        return expected_kl(
            *condition(self.z[t - 1], [self.z[t], *given]), self.mu(t), self.sigma(t)
        )

    def terms(self, conditioning: str) -> dict[str, Tensor]:
        r"""The terms of the negative ELBO, given :math:`z_0` or :math:`x`; the steps stacked."""
        T, z = self.T, self.z
        given, first = ([z[0]], 2) if conditioning == "z_0" else ([], 1)
        one, zero = torch.ones_like(z[0].mean[0]), z[0] * 0.0
        steps = [self.kl(t, given) for t in range(first, T + 1)]
        terms = {
            "x": self.reconstruction,
            f"z_{T}": expected_kl(*condition(z[T], given), zero, one),
            "z_s": torch.stack(steps[2 - first :]) if T > 1 else self.x.new_zeros(0, len(self.x)),
        }
        if conditioning == "x":
            return terms | {"z_0": steps[0]}
        z_0 = cross_entropy(z[0], self.mu(1), self.sigma(1))
        return terms | {"-H[z_0]": self.negative_entropy, "z_0": z_0}

    def weighted(self, weighting: str) -> Tensor:
        r"""The losses which are no bounds: Ho et al.'s L_simple and the paper's equation (20)."""
        T, z = self.T, self.z
        loss = self.reconstruction + self.negative_entropy
        if weighting == "paper":
            means = [condition(z[t - 1], [z[t], z[0]])[0] - self.mu(t) for t in range(2, T + 1)]
            steps = [
                (difference.mean_square / (2 * self.fixed_variance(t))).sum(-1)
                for t, difference in enumerate(means, start=2)
            ]
            return loss + sum(steps) / max(1, len(steps))
        for t in range(1, T + 1):
            beta, one_minus = self.beta[t], 1 - self.alpha_bar[t]
            eps = (z[t] - z[0] * self.alpha_bar[t].sqrt()) * one_minus.rsqrt()
            # mu = (z_t - beta / sqrt(1 - alpha_bar) eps_hat) / sqrt(alpha), solved for eps_hat
            eps_hat = (z[t] - self.mu(t) * (1 - beta).sqrt()) * (one_minus.sqrt() / beta)
            loss = loss + (eps - eps_hat).mean_square.sum(-1) / T
        return loss + self.terms("z_0")[f"z_{T}"]

    def mean_field_bias(self, order: str) -> Tensor:
        r"""What Pyro's mean-field ELBO adds to the loss by freezing :math:`\mu(z_t)` at each site.

        At an invalid site :math:`z_{t-1}`, the square :math:`\| z_{t-1} - \mu(z_t) \|^2` is
        averaged as if both were independent given the guide's parents of :math:`z_{t-1}`.
        """
        sites = {"forward": range(1, self.T + 1), "posterior": range(1, 2), "reversed": ()}[order]
        bias = torch.zeros_like(self.x[:, 0])
        for t in sites:
            parents = [self.z[t - 2]] if t > 1 else []
            z, mu = ((y - condition(y, parents)[0]) for y in (self.z[t - 1], self.mu(t)))
            bias = bias + (covariance(z, mu).diagonal() / self.sigma(t).square()).sum()
        return bias

    # The evidence, from the model alone.

    def model(self) -> list[Affine]:
        r"""Returns :math:`z_0, \dots, z_T, x` under the model."""
        T, D, X = self.T, self.D, self.x.shape[-1]
        noise = white_noise([D] * (T + 1) + [X], like=self.x)
        z = [noise[T]]
        for t in range(T, 0, -1):
            matrix, vector = self.linear_reverse(t)
            z.insert(0, matrix @ z[0] + vector + self.sigma(t).diag() @ noise[t - 1])
        x = self.decoder.weight[0] @ z[0] + self.decoder.bias[0]
        return [*z, x + self.decoder.log_scale[0].exp().diag() @ noise[-1]]

    @property
    def log_evidence(self) -> Tensor:
        x = self.model()[-1]
        return dist.MultivariateNormal(x.mean, covariance(x, x)).log_prob(self.x)
