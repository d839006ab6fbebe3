r"""The ELBO of a diffusion prior from a few timesteps per datum.

The same ``prior.model()`` and ``prior.guide(q_z0)`` which unroll into :math:`T + 1` sample sites
are re-interpreted by an effect handler, :class:`CollapseChain`, as two programs with the sites of a
few timesteps. The bound is the same, its cost does not depend on :math:`T`.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..arguments import check_choice, check_whole
from ..diffusion import normal, q_marginal, q_reverse, q_reverse_moments
from ..priors import DiffusionPrior, SiteInfer
from ..register import register
from ..schedules import at_time
from .proposals import Proposal, Timesteps, make_proposal, variance_kl
from .trace_kl_elbo import Term, TraceKL_ELBO

__all__ = ["CollapseChain", "Timestep_ELBO"]

CONDITIONINGS = ("z_0", "x")
PLATE = "diffusion_timesteps"  # unlike any plate of the programs around


class CollapseChain(Messenger):
    r"""An effect handler that interprets the chain of a diffusion prior as a few of its steps.

    For each chosen timestep there are two sites: ``"z_t"`` has the law :math:`q(z_t | \cdot)` and
    only a value, ``"z_s"`` with :math:`s = t - 1` has the reverse kernels :math:`q(z_s | z_t,
    \cdot)` and :math:`p(z_s | z_t)`, and the weight :math:`1 / k r(t)` of its timestep.

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
            pyro.sample(f"z_s{chunk}", prior.reverse(z_t, t, c))
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
        for chunk, t in self.timesteps(prior):
            z_t = nuisance(f"z_t{chunk}", q_marginal(q, start, t, n))
            role = prior.role(1) | SiteInfer(t=t, chunk=chunk)
            pyro.sample(f"z_s{chunk}", self.q_reverse(prior, start, z_t, t), infer=legal | role)
        if not given_x:
            return start
        q_0 = q_reverse(q, start, z_1, 1, event_dim=n)
        return pyro.sample("z_0", q_0, infer=legal | prior.role(0))

    def timesteps(self, prior: DiffusionPrior) -> Iterator[tuple[str, Tensor]]:
        r"""Yields the timesteps inside of their plate and weight, with a suffix for their sites."""
        T = prior.num_timesteps
        if T == 1:
            return
        if self.propose is not None:
            probs = self.propose(prior)(prior, self.conditioning)
            with pyro.plate(PLATE, self.k):
                t = nuisance("t", Timesteps(probs, 2, self.low_discrepancy))
                with poutine.scale(scale=1 / (self.k * probs[t - 2])):
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
                yield chunk, t.reshape((-1,) + (1,) * (-1 - plate.dim))

    # Given z_0 and with a fixed variance, a KL is a square of means and a constant, whose sum over
    # all timesteps is known.
    def has_constant(self, prior: DiffusionPrior) -> bool:
        r"""Returns whether the variances' part of the KLs is a constant of its own."""
        return self.conditioning == "z_0" and prior.denoiser.variance.num_outputs == 1

    def add_constant(self, prior: DiffusionPrior) -> None:
        r"""Adds the sum over all timesteps of the constant part of the KLs."""
        if self.has_constant(prior) and prior.num_timesteps > 1:
            constant = prior.latent_dim * variance_kl(prior).sum().item()
            unit = dist.Unit(prior.schedule.betas.new_full((), -constant))
            pyro.sample("constant", unit, obs=unit.sample(), infer=SiteInfer(role="constant"))

    def q_reverse(
        self, prior: DiffusionPrior, start: Tensor | dist.TorchDistribution, z_t: Tensor, t: Tensor
    ) -> dist.TorchDistribution:
        r"""Returns :math:`q(z_s | z_t, \cdot)`, at the scale of the prior's if that is fixed."""
        n = prior.event_dim
        loc, variance = q_reverse_moments(prior.schedule, start, z_t, t, event_dim=n)
        if self.has_constant(prior):
            return normal(loc, at_time(prior.denoiser.kernel.sigmas, t, n), n)
        return normal(loc, variance.sqrt(), n)


def nuisance(name: str, fn: dist.TorchDistribution) -> Tensor:
    r"""Samples a site whose value matters, but whose density is not part of the bound."""
    with poutine.mask(mask=False):
        return pyro.sample(name, fn, infer=SiteInfer(role="nuisance"))


class Timestep_ELBO(TraceKL_ELBO):
    r"""The ELBO of programs with diffusion priors, from :math:`k` timesteps per datum.

    Given :math:`z_0`, the bound is equation (17) with the terms of (11) for the chain,

    .. math::
        -\mathrm{ELBO} = E_q \Big[ & -\log p(x | z_0) + \log q(z_0 | x)
            + \mathrm{KL}(q(z_T | z_0) \,\|\, p(z_T)) \\ & + \sum_{t=2}^T
            \mathrm{KL}(q(z_{t-1} | z_t, z_0) \,\|\, p(z_{t-1} | z_t)) - \log p(z_0 | z_1) \Big],

    and given :math:`x`, which needs a Gaussian encoder, the same number is

    .. math::
        E_q \Big[ -\log p(x | z_0) + \mathrm{KL}(q(z_T | x) \,\|\, p(z_T)) + \sum_{t=1}^T
        \mathrm{KL}(q(z_{t-1} | z_t, x) \,\|\, p(z_{t-1} | z_t)) \Big] .

    The sum over :math:`t \geq 2` is estimated from :math:`k` timesteps per datum. The step
    :math:`t = 1` is evaluated for every datum, and so are the constants of the KLs given
    :math:`z_0`. Programs without a diffusion prior are left as they are, with their KLs in closed
    form where that is legal (:class:`TraceKL_ELBO`). Several diffusion priors in one program live
    under names of their own, by :func:`pyro.contrib.autoname.scope`.

    Arguments:
        timesteps: The proposal :math:`r(t)`: ``"uniform"``, ``"importance"``, ``"loss-aware"`` or
            a :class:`~pyro_vaediff.infer.Proposal`, of which every prior after the first gets a
            copy; or ``"all"`` for the exact sum.
        k: The number of timesteps per datum.
        conditioning: What the KLs are conditioned on, ``"z_0"`` or ``"x"``.
        low_discrepancy: Whether the timesteps of a batch are spread evenly.
        antithetic: Whether Gaussian noise comes in mirrored pairs, see
            :class:`~pyro_vaediff.infer.Antithetic`: that of the timesteps of a datum, which then
            are :math:`k / 2` different ones twice each if :math:`k` is even, and that of vectorized
            particles.
        entropy: How to estimate :math:`-\mathrm{H}[q(z_0 | x)]`, ``"path"`` or ``"exact"``, see
            :class:`TraceKL_ELBO`. Given :math:`x`, it is part of the KLs.
        chunk_size: The number of timesteps that are evaluated at once with ``"all"``. Without
            gradients, the memory that the denoiser takes is proportional to it, and beside that
            only the latents of all timesteps are kept.
        kwargs: Keyword arguments of :class:`TraceKL_ELBO`.

    Example:
        >>> from pyro_vaediff import VAE, DiffusionPrior
        >>> from pyro_vaediff.nn import ConvDecoder, ConvEncoder
        >>> from pyro_vaediff.likelihoods import GaussianLikelihood
        >>> _ = torch.manual_seed(0)
        >>> likelihood = GaussianLikelihood((1, 8, 8))
        >>> encoder, decoder = ConvEncoder((1, 8, 8), 5), ConvDecoder(5, likelihood)
        >>> vae = VAE(encoder, decoder, DiffusionPrior(5, num_timesteps=1000))
        >>> x = torch.rand(16, 1, 8, 8)
        >>> terms = Timestep_ELBO(k=4).terms(vae.model, vae.guide, x)
        >>> list(terms)
        ['constant', 'z_1000', 'z_s', '-H[z_0]', 'z_0', 'x']
    """

    def __init__(
        self,
        timesteps: str | Proposal = "importance",
        k: int = 8,
        conditioning: str = "z_0",
        low_discrepancy: bool = True,
        antithetic: bool = True,
        entropy: str = "path",
        chunk_size: int = 64,
        **kwargs: Any,
    ):
        super().__init__(antithetic=antithetic, entropy=entropy, **kwargs)
        #: The proposal of the first prior, or ``None`` for all timesteps.
        self.proposal = make_proposal(timesteps)
        for name, value in (("k", k), ("chunk_size", chunk_size)):
            check_whole(name, value)
        check_choice("conditioning", conditioning, CONDITIONINGS)
        self._pristine = copy.deepcopy(self.proposal)
        self._proposals: weakref.WeakKeyDictionary[DiffusionPrior, Proposal]
        self._proposals = weakref.WeakKeyDictionary()
        self._loaded: dict[int, dict[str, Tensor]] = {}  # states of proposals yet to be made
        propose = None if self.proposal is None else self.propose
        self.collapse = CollapseChain(propose, k, conditioning, low_discrepancy, chunk_size)

    mirrored_plates = (PLATE, *TraceKL_ELBO.mirrored_plates)

    def _get_traces(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Iterator:
        return super()._get_traces(self.collapse(model), self.collapse(guide), args, kwargs)

    def particles(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> list[list[Term]]:
        particles = super().particles(model, guide, *args, **kwargs)
        # The proposals learn once all particles are done: the number of evaluations is one.
        if self.proposal is not None and torch.is_grad_enabled():
            self.learn([term for terms in particles for term in terms if term.role == "steps"])
        return particles

    def site_terms(self, model_trace: Trace, guide_trace: Trace) -> Iterator[Term]:
        for term in super().site_terms(model_trace, guide_trace):
            # The chunks of an exact sum are parts of one term.
            chunk = term.site["infer"].get("chunk", "")
            yield term._replace(name=term.name.removesuffix(chunk)) if chunk else term

    def propose(self, prior: DiffusionPrior) -> Proposal:
        r"""Returns the proposal of a prior."""
        if prior not in self._proposals:
            number = len(self._proposals)
            proposal = copy.deepcopy(self._pristine) if number else self.proposal
            assert proposal is not None  # or nobody would ask
            if number in self._loaded:
                proposal.load_state_dict(self._loaded.pop(number))
            self._proposals[prior] = proposal
        return self._proposals[prior]

    def learn(self, steps: list[Term]) -> None:
        r"""Has the proposals learn from the KLs of the steps, as they are without their weights."""
        seen: dict[DiffusionPrior, list[tuple[Tensor, Tensor]]] = {}
        for term in steps:
            infer = term.site["infer"]
            kl = term.value.detach() / term.site["scale"]
            seen.setdefault(infer["prior"], []).append((infer["t"], kl))
        for prior, pairs in seen.items():
            self.propose(prior).update(*(torch.stack(xs) for xs in zip(*pairs, strict=True)))

    def state_dict(self) -> dict[str, Tensor]:
        r"""Returns what the proposals have learned, for checkpoints."""
        states = dict(enumerate(p.state_dict() for p in self._proposals.values())) | self._loaded
        return {f"{i}.{name}": x for i, state in states.items() for name, x in state.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        r"""Loads what :meth:`state_dict` returned; priors are told apart by their order."""
        self._loaded = {}
        for full, x in state_dict.items():
            prefix, _, name = full.partition(".")
            self._loaded.setdefault(int(prefix), {})[name] = x
        for number, proposal in enumerate(self._proposals.values()):
            if number in self._loaded:
                proposal.load_state_dict(self._loaded.pop(number))
