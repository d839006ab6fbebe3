r"""The effect handler that looks at a few timesteps of a diffusion prior in place of all."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..denoise.kernel import Kernel
from ..diffusion import Start, normal, q_marginal, q_noise, q_reverse, q_reverse_moments
from ..priors import DiffusionPrior, SiteInfer
from ..register import register
from ..schedules import at_time
from .proposals import Proposal, Timesteps, cell
from .step_kls import variance_kl

__all__ = ["PLATE", "CollapseChain"]

PLATE = "diffusion_timesteps"  # unlike any plate of the programs around


class CollapseChain(Messenger):
    r"""An effect handler that interprets the chain of a diffusion prior as a few of its steps.

    For each chosen timestep there are two sites. ``"z_t"`` has the law :math:`q(z_t | \cdot)`, and
    only its value counts. ``"z_s"`` with :math:`s = t - 1` has the reverse kernels :math:`q(z_s |
    z_t, \cdot)` and :math:`p(z_s | z_t)`, and the weight :math:`1 / k r(t)` of its timestep.

    Arguments:
        propose: A function that returns the proposal of a prior, or ``None`` for all timesteps.
        k: The number of timesteps per datum.
        conditioning: What the dot stands for, ``"z_0"`` or ``"x"``.
        low_discrepancy: Whether the timesteps of a batch are spread evenly.
        chunk_size: The number of timesteps that are evaluated at once if there is no proposal.
    """

    def __init__(
        self,
        propose: Callable[[DiffusionPrior], Proposal] | None,
        k: int,
        conditioning: str,
        low_discrepancy: bool,
        chunk_size: int,
    ):
        super().__init__()
        self.propose = propose
        self.k = k
        self.conditioning = conditioning
        self.low_discrepancy = low_discrepancy
        self.chunk_size = chunk_size
        self._constants: weakref.WeakKeyDictionary[Kernel, float] = weakref.WeakKeyDictionary()

    # The statements' messages carry the prior as their first argument.
    def _pyro_diffusion_model(self, msg: dict) -> None:
        msg["fn"] = self.model

    def _pyro_diffusion_guide(self, msg: dict) -> None:
        msg["fn"] = self.guide

    def model(self, prior: DiffusionPrior, c: Tensor | None = None) -> Tensor:
        r"""Interprets ``prior.model(c)``."""
        register("prior", prior)
        self.add_constant(prior)
        # Nuisances have no law in the model. Their distributions only say which shape they have.
        p_T, T = prior.standard_normal(), prior.num_timesteps
        z_T = pyro.sample(f"z_{T}", p_T)
        z_1 = z_T if T == 1 else nuisance("z_1", p_T)
        for chunk, t in self.timesteps(prior):
            z_t = nuisance(f"z_t{chunk}", p_T)
            pyro.sample(f"z_s{chunk}", self.p_reverse(prior, z_t, t, c))
        return pyro.sample("z_0", prior.reverse(z_1, 1, c))

    def guide(
        self, prior: DiffusionPrior, q_z0: dist.TorchDistribution, c: Tensor | None = None
    ) -> Tensor:
        r"""Interprets ``prior.guide(q_z0, c)``."""
        prior.check_posterior(q_z0)
        q, T, n = prior.schedule, prior.num_timesteps, prior.event_dim
        legal, given_x = SiteInfer(closed_form_kl=True), self.conditioning == "x"
        start = q_z0 if given_x else pyro.sample("z_0", q_z0, infer=prior.role(0))
        z_T = pyro.sample(f"z_{T}", q_marginal(q, start, T, n), infer=legal | prior.role(T))
        z_1 = z_T if T == 1 else nuisance("z_1", q_marginal(q, start, 1, n))
        for chunk, t in self.timesteps(prior, start):
            time = q.between(t)[0] if prior.continuous else t
            z_t = nuisance(f"z_t{chunk}", q_marginal(q, start, time, n))
            role = prior.role(1) | SiteInfer(t=cell(t), chunk=chunk)
            pyro.sample(f"z_s{chunk}", self.q_reverse(prior, start, z_t, t), infer=legal | role)
        if not given_x:
            return start
        q_0 = q_reverse(q, start, z_1, 1, event_dim=n)
        return pyro.sample("z_0", q_0, infer=legal | prior.role(0))

    def timesteps(
        self, prior: DiffusionPrior, start: Start | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        r"""Yields the timesteps inside of their plate and weight, with a suffix for their sites.

        In continuous time, they are positions inside of the timesteps' cells.

        Arguments:
            prior: The prior.
            start: What the KLs are given, :math:`z_0` or :math:`q(z_0 | x)`; it is known to the
                guide, which runs first. Subclasses may choose timesteps by it.
        """
        T = prior.num_timesteps
        if T == 1:
            return
        if self.propose is not None:
            probs = self.propose(prior)(prior, self.conditioning)
            with pyro.plate(PLATE, self.k):
                law = Timesteps(probs, 2, self.low_discrepancy, continuous=prior.continuous)
                t = nuisance("t", law)
                with poutine.scale(scale=1 / (self.k * probs[cell(t) - 2])):
                    yield "", t
            return
        first = 2
        for t in torch.arange(2, T + 1, device=prior.origin.device).split(self.chunk_size):
            # The chunk is named without reading the device.
            chunk = f"[{first}:{min(first + self.chunk_size, T + 1)}]"
            first += self.chunk_size
            plate = pyro.plate(f"{PLATE}{chunk}", len(t))
            with plate:
                assert plate.dim is not None  # inside of the plate
                t = t.reshape((-1,) + (1,) * (-1 - plate.dim))
                if prior.continuous:
                    t = nuisance(f"t{chunk}", dist.Uniform((t - 1).double(), t.double()))
                yield chunk, t

    # Given z_0 and with a fixed variance, a KL is a square of means and a constant, whose sum over
    # all timesteps is known.
    def has_constant(self, prior: DiffusionPrior) -> bool:
        r"""Returns ``True`` if the part of the KLs due to the variances is a separate constant."""
        fixed = prior.denoiser.variance.fixed and not prior.continuous
        return self.conditioning == "z_0" and fixed

    def add_constant(self, prior: DiffusionPrior) -> None:
        r"""Adds the sum over all timesteps of the constant part of the KLs."""
        if self.has_constant(prior) and prior.num_timesteps > 1:
            kernel = prior.denoiser.kernel
            if kernel not in self._constants:
                self._constants[kernel] = prior.latent_dim * variance_kl(prior).sum().item()
            constant = self._constants[kernel]
            unit = dist.Unit(prior.schedule.betas.new_full((), -constant))
            pyro.sample("constant", unit, obs=unit.sample(), infer=SiteInfer(role="constant"))

    def p_reverse(
        self, prior: DiffusionPrior, z_t: Tensor, t: Tensor, c: Tensor | None
    ) -> dist.TorchDistribution:
        r"""Returns :math:`p(z_s | z_t)`, or its limit."""
        if prior.continuous:
            return limit(prior, t, lambda time: prior.denoiser.noise(z_t, time, c))
        return prior.reverse(z_t, t, c)

    def q_reverse(
        self, prior: DiffusionPrior, start: Start, z_t: Tensor, t: Tensor
    ) -> dist.TorchDistribution:
        r"""Returns :math:`q(z_s | z_t, \cdot)`, at a prior's scale that is fixed, or its limit."""
        n = prior.event_dim
        if prior.continuous:
            return limit(prior, t, lambda time: q_noise(prior.schedule, start, z_t, time, n))
        loc, variance = q_reverse_moments(prior.schedule, start, z_t, t, event_dim=n)
        if self.has_constant(prior):
            return normal(loc, at_time(prior.denoiser.kernel.sigmas, t, n), n)
        return normal(loc, variance.sqrt(), n)


def limit(
    prior: DiffusionPrior, position: Tensor, noise: Callable[[Tensor], Tensor]
) -> dist.Independent:
    r"""Returns the law that takes the place of :math:`z_s` for a cell in continuous time.

    It is :math:`\mathcal{N}(\epsilon, (-\lambda'(t) \Delta)^{-1} I)` for a cell of length
    :math:`\Delta`. The KL divergence of two such distributions is that of as many steps as there
    may be in the cell, if all of them were like the one at time :math:`t`. In expectation over
    :math:`t`, it is their integral.

    Arguments:
        prior: The prior.
        position: The position of the time :math:`t` on the grid.
        noise: A function of time, which returns the noise :math:`\epsilon`, see
            :func:`~pyro_vaediff.diffusion.q_noise`.
    """
    time, length = prior.schedule.between(position)
    loc = noise(time)
    slope = prior.schedule.ready(prior.schedule.slope(time), prior.event_dim)
    precision = -slope * length[(...,) + (None,) * prior.event_dim]
    return normal(loc, precision.rsqrt().to(loc), prior.event_dim)


def nuisance(name: str, fn: dist.TorchDistribution) -> Tensor:
    r"""Samples a site whose value matters, but whose density is not part of the bound."""
    with poutine.mask(mask=False):
        return pyro.sample(name, fn, infer=SiteInfer(role="nuisance"))
