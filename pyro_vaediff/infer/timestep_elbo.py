r"""The ELBO of a diffusion prior from a few timesteps per datum.

The same ``prior.model()`` and ``prior.guide(q_z0)`` which unroll into :math:`T + 1` sample sites
are re-interpreted by an effect handler, :class:`Collapse`, as two programs with the sites of a few
timesteps. The bound is the same, its cost does not depend on :math:`T`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..arguments import check_choice, check_whole
from ..diffusion import at_time, normal, q_marginal, q_reverse, q_reverse_moments
from ..priors import DiffusionPrior
from ..register import register
from .proposals import PROPOSALS, Proposal, Timesteps
from .trace_kl_elbo import TraceKL_ELBO
from .weightings import WEIGHTINGS, Weighting

__all__ = ["Collapse", "Timestep_ELBO"]

CONDITIONINGS = ("z_0", "x")
PLATE = "diffusion_timesteps"  # unlike any plate of the programs around


class Collapse(Messenger):
    r"""An effect handler that interprets the chain of a diffusion prior as a few of its steps.

    For each chosen timestep there are two sites: ``"z_t"`` has the law :math:`q(z_t | \cdot)` and
    only a value, ``"z_s"`` with :math:`s = t - 1` has the reverse kernels :math:`q(z_s | z_t,
    \cdot)` and :math:`p(z_s | z_t)`, and the weight :math:`1 / k r(t)` of its timestep.

    Arguments:
        proposal: The proposal of the timesteps, or ``None`` for all of them.
        k: The number of timesteps per datum.
        conditioning: What the dot stands for, ``"z_0"`` or ``"x"``.
        weighting: The weighting of the timesteps.
        low_discrepancy: Whether the timesteps of a batch are spread evenly.
        chunk_size: The number of timesteps that are evaluated at once if there is no proposal.
    """

    def __init__(
        self,
        proposal: Proposal | None,
        k: int,
        conditioning: str,
        weighting: Weighting,
        low_discrepancy: bool,
        chunk_size: int,
    ):
        super().__init__()
        self.proposal = proposal
        self.k = k
        self.conditioning = conditioning
        self.weighting = weighting
        self.low_discrepancy = low_discrepancy
        self.chunk_size = chunk_size

    # The statements' messages carry the prior as their first argument.
    def _pyro_diffusion_model(self, msg: dict) -> None:
        msg["fn"] = self.model

    def _pyro_diffusion_guide(self, msg: dict) -> None:
        msg["fn"] = self.guide

    def model(self, prior: DiffusionPrior) -> Tensor:
        r"""Interprets ``prior.model()``."""
        register("prior", prior)
        constant = self.weighting.constant(prior, self.conditioning)
        if constant:
            pyro.factor("constant", prior.origin.new_full((), -constant))
        p_T, T = prior.standard_normal(), prior.num_timesteps
        with poutine.mask(mask=self.weighting.keep_z_T):
            z_T = pyro.sample(f"z_{T}", p_T)
        # Nuisances have no law in the model. Their distributions only say which shape they have.
        z_1 = z_T if T == 1 else nuisance("z_1", p_T)
        for chunk, t in self.timesteps(prior):
            z_t = nuisance(f"z_t{chunk}", p_T)
            p_s = prior.reverse(z_t, t)
            pyro.sample(f"z_s{chunk}", self.rescale(prior, p_s.mean, p_s.stddev, t))
        with poutine.mask(mask=self.weighting.keep_z_0):
            return pyro.sample("z_0", prior.reverse(z_1, 1))

    def guide(self, prior: DiffusionPrior, q_z0: dist.TorchDistribution) -> Tensor:
        r"""Interprets ``prior.guide(q_z0)``."""
        prior.check_posterior(q_z0)
        schedule, T, legal = prior.schedule, prior.num_timesteps, {"closed_form_kl": True}
        start = q_z0 if self.conditioning == "x" else pyro.sample("z_0", q_z0)
        with poutine.mask(mask=self.weighting.keep_z_T):
            z_T = pyro.sample(f"z_{T}", q_marginal(schedule, start, T), infer=dict(legal))
        z_1 = z_T if T == 1 else nuisance("z_1", q_marginal(schedule, start, 1))
        for chunk, t in self.timesteps(prior):
            z_t = nuisance(f"z_t{chunk}", q_marginal(schedule, start, t))
            loc, variance = q_reverse_moments(schedule, start, z_t, t)
            q_s = self.rescale(prior, loc, variance.sqrt(), t)
            pyro.sample(f"z_s{chunk}", q_s, infer=dict(legal))
        if self.conditioning == "z_0":
            return start
        return pyro.sample("z_0", q_reverse(schedule, start, z_1, 1), infer=dict(legal))

    def timesteps(self, prior: DiffusionPrior) -> Iterator[tuple[str, Tensor]]:
        r"""Yields the timesteps inside of their plate and weight, with a suffix for their sites."""
        self.weighting.check(prior, self.conditioning)
        first, T = self.weighting.first, prior.num_timesteps
        multiplier = self.weighting.multiplier(prior)
        if first > T:
            return
        if self.proposal is None:
            every = torch.arange(first, T + 1, device=prior.origin.device)
            for t in every.split(self.chunk_size):
                # The chunk is named without reading the device.
                chunk = f"[{first}:{min(first + self.chunk_size, T + 1)}]"
                first += self.chunk_size
                plate = pyro.plate(f"{PLATE}{chunk}", len(t))
                with plate, poutine.scale(scale=multiplier):
                    yield chunk, t.reshape((-1,) + (1,) * (-1 - plate.dim))
            return
        probs = self.proposal(prior, self.conditioning, first)
        with pyro.plate(PLATE, self.k):
            t = nuisance("t", Timesteps(probs, first, self.low_discrepancy))
            with poutine.scale(scale=multiplier / (self.k * probs[t - first])):
                yield "", t

    def rescale(
        self, prior: DiffusionPrior, loc: Tensor, scale: Tensor, t: Tensor
    ) -> dist.TorchDistribution:
        r"""Returns a reverse kernel, at the common scale of the weighting if it has one."""
        scales = self.weighting.common_scales(prior, self.conditioning)
        return normal(loc, scale if scales is None else at_time(scales, t))


def nuisance(name: str, fn: dist.TorchDistribution) -> Tensor:
    r"""Samples a site whose value matters, but whose density is not part of the bound."""
    with poutine.mask(mask=False):
        return pyro.sample(name, fn)


class Timestep_ELBO(TraceKL_ELBO):
    r"""The ELBO of programs with a diffusion prior, from :math:`k` timesteps per datum.

    Given :math:`z_0`, the bound is equation (11) with its sign corrected,

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
    form where that is legal (:class:`TraceKL_ELBO`).

    Arguments:
        timesteps: The proposal :math:`r(t)`: ``"uniform"``, ``"importance"``, ``"loss-aware"`` or
            a :class:`~pyro_vaediff.infer.Proposal`; or ``"all"`` for the exact sum.
        k: The number of timesteps per datum.
        conditioning: What the KLs are conditioned on, ``"z_0"`` or ``"x"``.
        weighting: ``"elbo"``, or ``"simple"`` or ``"paper"``, which are no bounds. See
            :mod:`~pyro_vaediff.infer.weightings`.
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
        weighting: str = "elbo",
        low_discrepancy: bool = True,
        antithetic: bool = True,
        entropy: str = "path",
        chunk_size: int = 64,
        **kwargs,
    ):
        super().__init__(antithetic=antithetic, entropy=entropy, **kwargs)
        if not isinstance(timesteps, Proposal):
            check_choice("timesteps", timesteps, ("all", *PROPOSALS))
        for name, value in (("k", k), ("chunk_size", chunk_size)):
            check_whole(name, value)
        if conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning must be 'z_0' or 'x', got {conditioning!r}")
        check_choice("weighting", weighting, WEIGHTINGS)
        if timesteps == "all":
            self.proposal = None
        else:
            self.proposal = timesteps if isinstance(timesteps, Proposal) else PROPOSALS[timesteps]()
        self.weighting = WEIGHTINGS[weighting]
        self.collapse = Collapse(
            self.proposal, k, conditioning, self.weighting, low_discrepancy, chunk_size
        )

    mirrored_plates = (PLATE, *TraceKL_ELBO.mirrored_plates)

    def _get_traces(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Iterator:
        self._seen = []
        yield from super()._get_traces(self.collapse(model), self.collapse(guide), args, kwargs)
        # The proposal learns once all particles are done: they share it, and their number of
        # evaluations is one.
        if self._seen:
            self.proposal.update(*(torch.stack(column) for column in zip(*self._seen, strict=True)))

    def site_terms(self, model_trace: Trace, guide_trace: Trace) -> Iterator[tuple[str, Tensor]]:
        for name, term in super().site_terms(model_trace, guide_trace):
            if name == "z_s" and self.proposal is not None and torch.is_grad_enabled():
                kl = term.detach() / guide_trace.nodes[name]["scale"]
                self._seen.append((guide_trace.nodes["t"]["value"], kl))
            # The chunks of an exact sum are parts of one term.
            yield "z_s" if name.startswith("z_s[") else name, term

    def state_dict(self) -> dict[str, Tensor]:
        r"""Returns what the proposal has learned, for checkpoints."""
        return {} if self.proposal is None else self.proposal.state_dict()

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        r"""Loads what :meth:`state_dict` returned."""
        if self.proposal is not None:
            self.proposal.load_state_dict(state_dict)
