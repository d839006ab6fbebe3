r"""The probability flow of a diffusion prior: a deterministic model whose density is known.

A forward diffusion turns :math:`p(z_0)` into noise through marginals :math:`p_t(z)`. So does an
ordinary differential equation. In terms of the ratio of noise to signal, and of the estimate
:math:`\hat z_0(z, t) = E[z_0 | z_t = z]` of the denoiser, it is

.. math:: \frac{dz}{ds} = v(z, t) = \frac{\sqrt{\bar\alpha_t} \, z - \hat z_0(z, t)}{\sigma_t},
    \qquad \sigma_t = \sqrt{\frac{1 - \bar\alpha_t}{\bar\alpha_t}}, \qquad s_t =
    \operatorname{arsinh} \sigma_t .

The time :math:`s` is the ratio :math:`\sigma` itself while there is little noise, and its logarithm
later. The velocity is the noise that the denoiser predicts, less what it would predict for a prior
:math:`\mathcal{N}(0, I)`. With the parameterization ``"eps"`` and the reverse variance ``"beta"``,
it is the output of the network, which is moderate at all times. It is known at whole :math:`t \geq
1`, and zero at :math:`t = 0` if the density of :math:`z_0` is smooth.

References:
    | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021)
    | https://arxiv.org/abs/2011.13456

    | Denoising Diffusion Implicit Models (Song et al., 2021), equation (14)
    | https://arxiv.org/abs/2010.02502
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Size, Tensor

from ..arguments import check_whole
from ..priors import Prior
from .samplers import check_diffusion

__all__ = ["ProbabilityFlow"]

Velocity = Callable[[Tensor, int], Tensor]
# The Jacobians of a chunk of latents are made in that many parts, so that the network sees more
# latents at once where there is nothing to differentiate.
PARTS = 16


class ProbabilityFlow(dist.TorchDistribution):
    r"""The law of :math:`z_0` if noise :math:`z_T \sim \mathcal{N}(0, I)` follows the probability
    flow of a diffusion prior down to :math:`t = 0`.

    The flow takes steps of the trapezoidal rule between some of the whole times, :math:`0 = t_0 <
    \dots < t_n = T`. With half of their lengths, :math:`h_i = (s_{t_{i+1}} - s_{t_i}) / 2`,

    .. math::
        z_{t_{i+1}} - h_i v(z_{t_{i+1}}, t_{i+1}) & = z_{t_i} + h_i v(z_{t_i}, t_i) \\
        \log p(z_0) & = \log \mathcal{N}(z_T; 0, I) + \sum_{i=0}^{n-1} \log \frac{|\det(I + h_i
        \nabla v(z_{t_i}, t_i))|}{|\det(I - h_i \nabla v(z_{t_{i+1}}, t_{i+1}))|}

    Each step is solved exactly in both directions, and the Jacobians :math:`\nabla v` are exact.
    Hence this is the density of the samples of the *same* steps, and it is normalized for any
    number of them that makes :math:`h_i \| \nabla v \| < 1`: their number is part of the model. As
    it grows the density converges, with errors of second order, to that of the differential
    equation.

    The flow is another model than the chain of ancestral steps that ``prior.model()`` is, with the
    same denoiser. Both have a likelihood. Only for a perfect denoiser, infinitely many steps and
    :math:`\bar\alpha_T = 0` would they be the same. With the reverse variance ``"beta"`` and a
    network that returns zero, both are :math:`\mathcal{N}(0, I)`.

    The density and the samples of :meth:`rsample` have gradients, first and second ones, with
    respect to latents and parameters, so that the flow is a prior in any program. They cost memory
    in proportion to the number of steps: where only numbers are wanted, use ``torch.no_grad()``,
    and where the parameters are fixed, ``prior.requires_grad_(False)``.

    Arguments:
        prior: The prior, with latents of any event shape of :math:`D` elements. Its denoiser is
            evaluated as it is: call ``prior.eval()`` before if it has layers to which that matters.
        num_steps: The number of steps :math:`n`, at most :math:`T`, by default the smaller one of
            50 and :math:`T`. They are shorter near :math:`t = 0`: times grow as :math:`i^{3/2}`.
        chunk_size: The number of directional derivatives that are evaluated at once, of :math:`D`
            per latent, to which the memory is proportional. On a CPU, they best fit into its cache.
        c: The context, with shape :math:`(B, *)`. The flow then has batch shape :math:`(B,)`.

    Raises:
        ValueError: If the prior is not a diffusion prior, or a number is out of range. Also when it
            is evaluated, if the steps are too long for the trapezoidal rule to have one solution.

    Example:
        >>> from pyro_vaediff import DiffusionPrior
        >>> flow = ProbabilityFlow(DiffusionPrior(2), num_steps=10)
        >>> flow.log_prob(torch.zeros(2)).detach()
        tensor(-1.8379)
        >>> flow.sample((5,)).shape
        torch.Size([5, 2])
    """

    arg_constraints: dict = {}  # noqa: RUF012  (as in torch)
    has_rsample = True
    max_iterations = 200

    def __init__(
        self,
        prior: Prior,
        num_steps: int | None = None,
        chunk_size: int = 2048,
        c: Tensor | None = None,
    ):
        prior = check_diffusion(prior)
        T = prior.num_timesteps
        num_steps = min(T, 50) if num_steps is None else num_steps
        if num_steps not in range(1, T + 1):
            raise ValueError(f"num_steps must be a whole number from 1 to T = {T}, got {num_steps}")
        check_whole("chunk_size", chunk_size)
        prior.check_signal()
        self.prior = prior
        self.c = c
        #: The times :math:`0 = t_0 < \dots < t_n = T`.
        self.times = [max(i, round(T * (i / num_steps) ** 1.5)) for i in range(num_steps + 1)]
        self.chunk_size = chunk_size
        # In float64, whatever the dtype of the prior.
        log_snr = prior.schedule.original("log_snr")
        sigma = torch.exp(-log_snr / 2)
        self._signal, self._sigma = torch.sigmoid(log_snr).sqrt().tolist(), sigma.tolist()
        s = sigma.asinh().tolist()
        self._steps = [(t, u, (s[u] - s[t]) / 2) for t, u in itertools.pairwise(self.times)]
        super().__init__(Size() if c is None else c.shape[:1], prior.origin.shape)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        r"""The support of the density, all real events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Returns :math:`\log p(z_0)` in nats.

        Arguments:
            value: The latents :math:`z_0`, with shape :math:`(*, *\mathrm{event})`.

        Returns:
            The log-densities, with shape :math:`(*)`.
        """
        if self._validate_args:
            self._validate_sample(value)
        z_T, log_det = self.encode(value)
        return self.prior.standard_normal().log_prob(z_T) + log_det

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        r"""Returns samples of :math:`z_0`, with the given shape before those of batch and event."""
        shape = Size(sample_shape) + self.batch_shape
        return self.decode(self.prior.standard_normal().expand(shape).sample())

    def encode(self, z_0: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the noise that latents come from.

        Arguments:
            z_0: The latents, with shape :math:`(*, *\mathrm{event})`.

        Returns:
            The noise :math:`z_T`, with the same shape, and the logarithm of the volume ratio
            :math:`|\det \partial z_T / \partial z_0|`, with shape :math:`(*)`.
        """
        z_T, log_det = self._in_chunks(self._encode, z_0, self.event_shape.numel())
        shape = torch.broadcast_shapes(self._batch_of(z_0), self.batch_shape)
        return z_T.reshape(shape + self.event_shape), log_det.reshape(shape)

    def decode(self, z_T: Tensor) -> Tensor:
        r"""Returns the latents that come from noise, the inverse of :meth:`encode`.

        Arguments:
            z_T: The noise, with shape :math:`(*, *\mathrm{event})`.

        Returns:
            The latents :math:`z_0`, with the same shape.
        """
        # With gradients, there are the Jacobians of the steps.
        size = self.event_shape.numel() if self._differentiates(z_T) else PARTS
        (z_0,) = self._in_chunks(lambda z, v: (self._decode(z, v),), z_T, size)
        shape = torch.broadcast_shapes(self._batch_of(z_T), self.batch_shape)
        return z_0.reshape(shape + self.event_shape)

    def velocity(self, z: Tensor, t: int, c: Tensor | None = None) -> Tensor:
        r"""Returns :math:`v(z_t, t)`.

        Arguments:
            z: The latents :math:`z_t`, with shape :math:`(*, *\mathrm{event})`.
            t: The time, from 0 to :math:`T`.
            c: The context, one row for each of the latents.
        """
        if self._sigma[t] == 0:
            return torch.zeros_like(z)
        # A chain that starts on the path has no step to its start, but a time there.
        time = t or self.prior.schedule.start
        return (self._signal[t] * z - self.prior.denoise(z, time, c)) / self._sigma[t]

    def _batch_of(self, z: Tensor) -> Size:
        return z.shape[: z.ndim - len(self.event_shape)]

    def _differentiates(self, z: Tensor) -> bool:
        parameters = (*self.prior.parameters(), z, *(() if self.c is None else (self.c,)))
        return torch.is_grad_enabled() and any(x.requires_grad for x in parameters)

    def _in_chunks(self, fn: Callable, z: Tensor, size: int) -> list[Tensor]:
        r"""Returns the results of a function of flat latents, of which each takes some memory."""
        batch = torch.broadcast_shapes(self._batch_of(z), self.batch_shape)
        flat = z.expand(batch + self.event_shape).reshape(-1, self.event_shape.numel())
        chunks, length = [], max(1, PARTS * self.chunk_size // size)
        c = self.c
        if c is not None:
            c = c.expand(batch + c.shape[1:]).flatten(0, len(batch) - 1)
        for start in range(0, max(1, len(flat)), length):
            rows = slice(start, start + length)
            part = None if c is None else c[rows]

            def velocity(z: Tensor, t: int, part: Tensor | None = part) -> Tensor:
                return self.velocity(z.reshape(-1, *self.event_shape), t, part).reshape(z.shape)

            chunks.append(fn(flat[rows], velocity))
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    def _linearize(self, velocity: Velocity, z: Tensor, t: int) -> tuple[Tensor, Tensor]:
        r"""Returns the velocity and its Jacobian."""
        # Each latent has its own velocity. Hence a direction that all of them share is one row of
        # all Jacobians at once, and the network sees batches as it always does.
        v, pullback = torch.func.vjp(lambda z: velocity(z, t), z)[:2]
        rows = torch.func.vmap(
            lambda direction: pullback(direction.expand_as(z))[0],
            out_dims=-2,
            chunk_size=max(1, self.chunk_size // max(1, len(z))),
        )
        return v, rows(identity(z))

    def _encode(self, z: Tensor, velocity: Velocity) -> tuple[Tensor, Tensor]:
        eye, log_det = identity(z), z.new_zeros(len(z))
        v, jacobian = torch.zeros_like(z), torch.zeros_like(eye)  # at a clean end, nothing moves
        if self._sigma[0] > 0:
            v, jacobian = self._linearize(velocity, z, 0)
        for _, u, h in self._steps:
            log_det = log_det + torch.linalg.slogdet(eye + h * jacobian).logabsdet
            z = self._solve(velocity, z + h * v, u, -h)
            # The only Jacobian of the step: the next one starts where this one ends.
            v, jacobian = self._linearize(velocity, z, u)
            log_det = log_det - torch.linalg.slogdet(eye - h * jacobian).logabsdet
        return z, log_det

    def _decode(self, z: Tensor, velocity: Velocity) -> Tensor:
        for t, u, h in reversed(self._steps):
            z = self._solve(velocity, z - h * velocity(z, u), t, h)
        return z

    def _solve(self, velocity: Velocity, known: Tensor, t: int, h: float) -> Tensor:
        r"""Returns the solution of :math:`z + h v(z, t)` = ``known``, by fixed-point iteration."""
        if self._sigma[t] == 0:
            return known
        with torch.no_grad():
            z = self._iterate(velocity, known, t, h)
        if not self._differentiates(known):
            return z
        # By the implicit function theorem, the derivatives of the solution are those of Newton's
        # steps from it. With the Jacobian held fixed, k of them have the first k derivatives.
        with torch.no_grad():
            matrix = identity(z) + h * self._linearize(velocity, z, t)[1]
        for _ in range(2):
            residual = z + h * velocity(z, t) - known
            z = z - torch.linalg.solve(matrix, residual)
        return z

    def _iterate(self, velocity: Velocity, known: Tensor, t: int, h: float) -> Tensor:
        z, tolerance = known, 100 * torch.finfo(known.dtype).eps
        for _ in range(self.max_iterations):
            previous, z = z, known - h * velocity(z, t)
            if ((z - previous).abs() <= tolerance * (1 + z.abs())).all():
                return z
        raise ValueError(
            f"num_steps={len(self._steps)} is too small for this denoiser: no solution is found "
            f"for the step of the probability flow to t={t}; use more steps, up to T = "
            f"{self.prior.num_timesteps}"
        )


def identity(z: Tensor) -> Tensor:
    return torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
