r"""The ELBO of a diffusion prior from a few timesteps per datum.

The same ``prior.model()`` and ``prior.guide(q_z0)`` that unroll into :math:`T + 1` sample sites are
re-interpreted by an effect handler, :class:`~pyro_vaediff.infer.CollapseChain`, as two programs
with the sites of a few timesteps. The bound is the same, but its cost does not depend on :math:`T`.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from ..arguments import check_choice, check_whole
from ..priors import DiffusionPrior
from .collapse import PLATE, CollapseChain
from .proposals import Proposal, make_proposal
from .trace_kl_elbo import Term, TraceKL_ELBO

__all__ = ["Timestep_ELBO"]

CONDITIONINGS = ("z_0", "x")


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

    In continuous time, with a prior that has ``num_timesteps=None``, the sum over :math:`t \geq 2`
    becomes an integral over the log-SNR, from that of :math:`z_T` to that of :math:`z_1`,

    .. math:: \frac{1}{2} \int E_q \| \epsilon_q - \hat\epsilon(z_\lambda) \|^2 \, d\lambda,

    where :math:`\epsilon_q` is the noise given :math:`z_0` or its mean given :math:`x`, see
    :func:`~pyro_vaediff.diffusion.q_noise`. Its cells are chosen as timesteps are, and a time is
    drawn in each: ``"all"`` is an estimate as well, from one time per cell and datum.

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
            :class:`~pyro_vaediff.infer.Antithetic`: that of vectorized particles, and that of the
            timesteps of a datum. If :math:`k` is even, these are then :math:`k / 2` different ones,
            twice each.
        entropy: How to estimate :math:`-\mathrm{H}[q(z_0 | x)]`, ``"path"`` or ``"exact"``, see
            :class:`TraceKL_ELBO`. Given :math:`x`, it is part of the KLs.
        chunk_size: The number of timesteps that are evaluated at once with ``"all"``. Without
            gradients, the memory that the denoiser takes is proportional to it; besides, only the
            latents of all timesteps are kept.
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
        r"""Lets the proposals learn from the KLs of the steps, without their weights."""
        seen: dict[DiffusionPrior, list[tuple[Tensor, Tensor]]] = {}
        for term in steps:
            infer = term.site["infer"]
            kl = term.value.detach() / term.site["scale"]
            seen.setdefault(infer["prior"], []).append((infer["t"], kl))
        for prior, pairs in seen.items():
            self.propose(prior).update(*(torch.stack(xs) for xs in zip(*pairs, strict=True)))

    def state_dict(self) -> dict[str, Tensor]:
        r"""Returns the state that the proposals have learned, for checkpoints."""
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
