r"""The ELBO of a linear-Gaussian VAE in closed form, its terms and the evidence.

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

import pyro.distributions as dist
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
    stack,
    white_noise,
)
from .linear_gaussian import LinearDenoiser, LinearGaussian
from .reverse import LinearReverse

__all__ = ["Oracle"]


class Oracle(LinearReverse):
    r"""Expectations under the guide of a linear-Gaussian VAE, in nats and one value per datum.

    They are those of the parameters at the time of the call, except for those of the encoder and
    the schedule, which are read once. Gradients follow by differentiation, more than once with
    ``retain_graph=True``. A chain of :math:`T` steps takes :math:`O((T D)^3)` operations: the
    oracle is for short chains.

    Arguments:
        vae: The VAE, such as :func:`~pyro_vaediff.testing.linear_gaussian_vae` makes.
        x: The data, with shape :math:`(B, X)`, and with the dtype and the device of the VAE.

    Raises:
        ValueError: If the VAE is not linear and Gaussian with one copy of its parameters. Methods
            raise it for a timestep outside of 1 to :math:`T`.

    Example:
        >>> from pyro_vaediff.testing import Oracle, linear_gaussian_vae
        >>> vae = linear_gaussian_vae(num_timesteps=3, seed=0)
        >>> oracle = Oracle(vae, torch.zeros(2, 3, dtype=torch.float64))
        >>> {name: tuple(term.shape) for name, term in oracle.terms("x").items()}
        {'x': (2,), 'z_3': (2,), 'z_s': (2, 2), 'z_0': (2,)}
        >>> (oracle.log_evidence >= -oracle.negative_elbo).all()
        tensor(True)
        >>> gradients = torch.autograd.grad(oracle.negative_elbo.sum(), list(vae.parameters()))
    """

    x: Tensor  #: The data.
    z: list[Affine]  #: The variables :math:`z_0, \dots, z_T` of the guide, given :math:`x`.

    def __init__(self, vae: VAE, x: Tensor):
        prior, encoder, self.decoder, net = linear_parts(vae)
        super().__init__(prior, net)
        self.x, beta = x, self.beta

        # The guide, by forward recursion: D noises for each of its T + 1 variables.
        noise = white_noise([self.D] * (self.T + 1), like=x)
        scale = encoder.log_scale[0].exp().diag()
        self.z = [scale @ noise[0] + (x @ encoder.weight[0].mT + encoder.bias[0])]
        for t in range(1, self.T + 1):
            self.z.append(self.z[t - 1] * (1 - beta[t]).sqrt() + noise[t] * beta[t].sqrt())

    def mu(self, t: int) -> Affine:
        r"""Returns the reverse mean :math:`\mu_\phi(z_t, t)` under the guide.

        Arguments:
            t: The timestep, from 1 to :math:`T`.
        """
        matrix, vector = self.linear_reverse(t)
        return matrix @ self.z[t] + vector

    # The bound, from its definition and term by term.

    @property
    def reconstruction(self) -> Tensor:
        r"""The expectation of :math:`-\log p(x | z_0)`, with shape :math:`(B,)`."""
        mean = self.decoder.weight[0] @ self.z[0] + self.decoder.bias[0]
        x = Affine(self.x, torch.zeros_like(mean.coef))
        return cross_entropy(x, mean, self.decoder.log_scale[0].exp())

    @property
    def negative_entropy(self) -> Tensor:
        r"""The negative entropy :math:`-\mathrm{H}[q(z_0 | x)]`, with shape :math:`(B,)`."""
        return -entropy(covariance(self.z[0], self.z[0])).expand(len(self.x))

    @property
    def negative_elbo(self) -> Tensor:
        r"""The expectation of :math:`\log q(z_{0:T} | x) - \log p(z_{0:T}, x)`, with shape
        :math:`(B,)`."""
        z, joint = self.z, stack(self.z)
        one, zero = torch.ones_like(z[0].mean[0]), z[0] * 0.0
        steps = [cross_entropy(z[t - 1], self.mu(t), self.sigma(t)) for t in range(1, self.T + 1)]
        cross = self.reconstruction + cross_entropy(z[self.T], zero, one) + sum(steps)
        return cross - entropy(covariance(joint, joint))

    def kl(self, t: int, given: list[Affine]) -> Tensor:
        r"""Returns the expected KL of step :math:`t`, given :math:`z_t` and other variables.

        .. math:: E[\mathrm{KL}(q(z_{t-1} | z_t, \dots, x) \,\|\, p(z_{t-1} | z_t))]

        Arguments:
            t: The timestep, from 1 to :math:`T`.
            given: The other variables of the guide that are known, from :attr:`z`. They must leave
                :math:`z_{t-1}` a density.

        Returns:
            The KL, with shape :math:`(B,)`.
        """
        mean, sigma = self.mu(t), self.sigma(t)
        return expected_kl(*condition(self.z[t - 1], [self.z[t], *given]), mean, sigma)

    def terms(self, conditioning: str) -> dict[str, Tensor]:
        r"""Returns the terms of the negative ELBO, by the names of
        :func:`~pyro_vaediff.infer.elbo_terms`.

        The KLs of the steps are whole: given :math:`z_0`, their constant part, due to the
        variances, is in ``"z_s"`` and not a term of its own.

        Arguments:
            conditioning: What the KLs of the steps are conditioned on, ``"z_0"`` or ``"x"``.

        Returns:
            The terms, which sum to :attr:`negative_elbo`. Their shapes are :math:`(B,)`, and
            :math:`(T - 1, B)` for ``"z_s"``.

        Raises:
            ValueError: If the conditioning is unknown.
        """
        check_choice("conditioning", conditioning, ("z_0", "x"))
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
        r"""Returns the expectation of a loss that is no bound: see
        :mod:`pyro_vaediff.infer.reweighted`.

        Arguments:
            weighting: The weighting, ``"simple"`` for the loss of Ho et al. or ``"paper"`` for the
                paper's equation (20).

        Returns:
            The loss, with shape :math:`(B,)`.

        Raises:
            ValueError: If the weighting is unknown, or the variance is learned.
        """
        check_choice("weighting", weighting, ("simple", "paper"))
        if not self.variance.fixed:
            raise ValueError(
                f"weighting={weighting!r} is defined for a fixed reverse variance: make the VAE "
                f"with reverse_variance='beta' or 'beta_tilde'"
            )
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
        r"""Returns the bias of Pyro's mean-field ELBO, whose closed forms are not legal here.

        It freezes :math:`\mu(z_t)` at each site. At an invalid site :math:`z_{t-1}`, the square
        :math:`\| z_{t-1} - \mu(z_t) \|^2` is averaged as if both were independent given the guide's
        parents of :math:`z_{t-1}`.

        Arguments:
            order: The order of the guide, ``"forward"``, ``"posterior"`` or ``"reversed"``. The
                order of the VAE's prior is not looked at.

        Returns:
            The bias of :class:`pyro.infer.TraceMeanField_ELBO`, with shape :math:`(B,)`.

        Raises:
            ValueError: If the order is unknown.
        """
        check_choice("order", order, ("forward", "posterior", "reversed"))
        sites = {"forward": range(1, self.T + 1), "posterior": range(1, 2), "reversed": ()}[order]
        bias = torch.zeros_like(self.x[:, 0])
        for t in sites:
            parents = [self.z[t - 2]] if t > 1 else []
            z, mu = ((y - condition(y, parents)[0]) for y in (self.z[t - 1], self.mu(t)))
            bias = bias + (covariance(z, mu).diagonal() / self.sigma(t).square()).sum()
        return bias

    # The evidence, from the model alone.

    def model(self) -> list[Affine]:
        r"""Returns :math:`z_0, \dots, z_T, x` under the model, whose noise is not the guide's."""
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
        r"""The evidence :math:`\log p(x)`, with shape :math:`(B,)`."""
        x = self.model()[-1]
        return dist.MultivariateNormal(x.mean, covariance(x, x)).log_prob(self.x)


def linear_parts(
    vae: VAE,
) -> tuple[DiffusionPrior, LinearGaussian, LinearGaussian, LinearDenoiser]:
    r"""Returns the prior, the encoder, the decoder and the network of the denoiser.

    Raises:
        ValueError: Unless their parameters say all about the VAE.
    """
    prior, encoder, decoder = vae.prior, vae.encoder, vae.decoder
    backbone = prior.denoiser.backbone if isinstance(prior, DiffusionPrior) else None
    net = getattr(backbone, "net", None)
    # A subclass may compute something else from the same parameters.
    if not (
        isinstance(prior, DiffusionPrior)
        and type(encoder) is LinearGaussian
        and type(decoder) is LinearGaussian
        and type(net) is LinearDenoiser
    ):
        networks = (encoder, decoder, net)
        raise ValueError(
            "vae must be linear and Gaussian, such as linear_gaussian_vae makes it, got networks "
            f"of the classes {', '.join(type(net).__name__ for net in networks)}"
        )
    if encoder.weight.shape[0] != 1:
        raise ValueError(f"vae must have one copy of its parameters, got {encoder.weight.shape[0]}")
    return prior, encoder, decoder, net
