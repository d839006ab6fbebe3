r"""Estimators that looked promising and did not win, kept where they can be measured again.

Each of them is unbiased. What they gain and what they cost is in the tables of the bench.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vaediff.diffusion import base_normal, normal, q_reverse_moments
from pyro_vaediff.infer import LossAwareTimesteps, QuasiRandom, Term, Timestep_ELBO
from pyro_vaediff.infer.collapse import PLATE
from pyro_vaediff.infer.trace_kl_elbo import sites
from pyro_vaediff.priors import DiffusionPrior
from pyro_vaediff.schedules import at_time

__all__ = [
    "ControlVariate_ELBO",
    "Coupled",
    "GradientAware",
    "Hybrid_ELBO",
    "Orthogonal",
    "Orthogonal_ELBO",
    "Regressed_ELBO",
    "Shared",
    "Shared_ELBO",
    "SobolPerBatch_ELBO",
    "SobolPerDatum_ELBO",
]


class GradientAware(LossAwareTimesteps):
    r"""Timesteps in proportion to the gradient with respect to the denoiser's output.

    With a fixed variance, :math:`L_t = \|\tilde\mu_t - \mu_\phi\|^2 / 2 \sigma_t^2`, and the
    gradient with respect to the output of the network has the norm :math:`(g_t / \sigma_t) \sqrt{2
    L_t}`: the proposal that minimizes the variance of the *gradient* is a known factor times the
    root of the terms, which are learned while training.

    References:
        | Not All Samples Are Created Equal: Deep Learning with Importance Sampling
          (Katharopoulos & Fleuret, 2018)
        | https://arxiv.org/abs/1803.00942
    """

    def forward(self, prior: DiffusionPrior, conditioning: str) -> Tensor:
        super().forward(prior, conditioning)  # which makes the table of squares
        kernel = prior.denoiser.kernel
        factor = kernel.gains.abs() / kernel.sigmas
        norm = (factor * self.squares.pow(0.25))[2:] + torch.finfo(self.squares.dtype).tiny
        return (1 - self.uniform) * norm / norm.sum() + self.uniform / len(norm)


class _Corrected(Timestep_ELBO):
    r"""Changes the terms of sampled timesteps, whose KLs are given z_0."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.proposal is None or self.collapse.conditioning != "z_0":
            raise ValueError(
                f"{type(self).__name__} needs conditioning='z_0' and timesteps other than 'all'"
            )

    def site_terms(self, model_trace: Trace, guide_trace: Trace) -> Iterator[Term]:
        for term in super().site_terms(model_trace, guide_trace):
            if term.role == "steps":
                scope = term.name.removesuffix("z_s")
                z_t, start = (sites(guide_trace)[scope + name] for name in ("z_t", "z_0"))
                yield from self.correct(term, z_t["value"], start)
            else:
                yield term

    @abstractmethod
    def correct(self, term: Term, z_t: Tensor, start: dict) -> Iterator[Term]:
        r"""Yields what takes the place of the term of the steps from ``z_t``.

        Arguments:
            term: The term, on whose site the prior and the timesteps are.
            z_t: The latents.
            start: The guide's site of :math:`z_0`.
        """


class Hybrid_ELBO(_Corrected):
    r"""The prior's gradient from the KLs given :math:`x`, the encoder's from those given
    :math:`z_0`, in one surrogate.

    The gradients of both with respect to the denoiser have the same expectation. Their difference,

    .. math:: \nabla_\phi \left\langle \tilde\mu(z_t, z_0) - \tilde\mu(z_t, x), \;
        \mu_\phi(z_t, t) \right\rangle / \sigma_t^2

    at a fixed :math:`z_t`, is added to the gradient given :math:`z_0`, and nothing to the value. It
    costs another pass through the denoiser.
    """

    def correct(self, term: Term, z_t: Tensor, start: dict) -> Iterator[Term]:
        if torch.is_grad_enabled():
            term = term._replace(value=term.value + self.difference(term.site, z_t.detach(), start))
        yield term

    def difference(self, site: dict, z_t: Tensor, start: dict) -> Tensor:
        prior, t = site["infer"]["prior"], site["infer"]["t"]
        n, base = prior.event_dim, base_normal(start["fn"])
        if base is None:
            raise ValueError("q(z_0 | x) must be a diagonal Gaussian")
        q_z0 = normal(base.loc.detach(), base.scale.detach(), n)
        loc, _ = q_reverse_moments(prior.schedule, q_z0, z_t, t, event_dim=n)
        p_s = prior.reverse(z_t, t)
        difference = (site["fn"].mean - loc).detach() / p_s.variance.detach()
        inner = sum_rightmost(difference * p_s.mean, n)
        return scale_and_mask(inner - inner.detach(), site["scale"], site["mask"])


class ControlVariate_ELBO(_Corrected):
    r"""The standard Gaussian prior's KLs as a control variate, for the encoder's gradient.

    Without its network, the prior is :math:`\mathcal{N}(0, I)` and its KL at every :math:`t` a
    quadratic form of :math:`z_0` and noise. Its expected sum over :math:`t`, :math:`c \|z_0\|^2 +
    \mathrm{const}`, is known: the sampled terms are subtracted, and the sum is added.
    """

    def correct(self, term: Term, z_t: Tensor, start: dict) -> Iterator[Term]:
        sampled, expected = self.gaussian(term.site, z_t, start)
        yield Term(term.name.removesuffix("z_s") + "control", expected, "control", start)
        yield term._replace(value=term.value - sampled)

    def gaussian(self, site: dict, z_t: Tensor, start: dict) -> tuple[Tensor, Tensor]:
        prior, t = site["infer"]["prior"], site["infer"]["t"]
        n, kernel = prior.event_dim, prior.denoiser.kernel
        # q's mean is a z_t + b z_0, and without the network the prior's is skip z_t.
        loc = site["fn"].mean - at_time(kernel.skips, t, n) * z_t
        sampled = sum_rightmost((loc / at_time(kernel.sigmas, t, n)).square(), n) / 2
        sampled = scale_and_mask(sampled, site["scale"], site["mask"])

        original = prior.schedule.original
        alpha_bar, one_minus = original("alphas_cumprod"), original("one_minus_alphas_cumprod")
        variance, skip = kernel.original("sigmas").square(), kernel.original("skips")
        a = original("alphas").sqrt() * one_minus.roll(1) / one_minus
        b = alpha_bar.roll(1).sqrt() * original("betas") / one_minus
        of_z0 = ((a - skip) * alpha_bar.sqrt() + b).square() / (2 * variance)
        of_noise = (a - skip).square() * one_minus / (2 * variance)
        expected = of_z0[2:].sum() * start["value"].square() + of_noise[2:].sum()
        return sampled, scale_and_mask(sum_rightmost(expected, n), start["scale"], start["mask"])


class Regressed_ELBO(ControlVariate_ELBO):
    r"""The same control variate times a coefficient that is regressed on earlier draws.

    With the gradients :math:`g` of the terms and :math:`h` of the control with respect to
    :math:`z_0`, the variance of :math:`g - c h` is smallest for :math:`c = E\langle g, h \rangle /
    E \|h\|^2`. Both are running means of earlier evaluations, so that the coefficient does not
    depend on the draws that it corrects, and there is no bias. To learn takes another backward pass
    through the denoiser.

    Arguments:
        args: Arguments of :class:`Timestep_ELBO`.
        decay: How much of the running means an evaluation leaves.
        kwargs: Keyword arguments of :class:`Timestep_ELBO`.
    """

    def __init__(self, *args: Any, decay: float = 0.95, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.decay, self.products = decay, (0.0, 0.0)

    def correct(self, term: Term, z_t: Tensor, start: dict) -> Iterator[Term]:
        sampled, expected = self.gaussian(term.site, z_t, start)
        gh, hh = self.products
        c = gh / hh if hh else 0.0
        if torch.is_grad_enabled() and start["value"].requires_grad:
            g, h = (
                torch.autograd.grad(y, start["value"], retain_graph=True)[0]
                for y in (term.value.sum(), sampled.sum() - expected.sum())
            )
            new = ((g * h).sum().item(), h.square().sum().item())
            self.products = tuple(
                self.decay * old + (1 - self.decay) * now
                for old, now in zip(self.products, new, strict=True)
            )
        yield Term(term.name.removesuffix("z_s") + "control", c * expected, "control", start)
        yield term._replace(value=term.value - c * sampled)


class Coupled(Messenger, ABC):
    r"""An effect handler that couples the noises of a datum's timesteps.

    The noise of every timestep must still be a standard normal. Latents are vectors.

    Arguments:
        plate: The name of the plate of the timesteps.
    """

    def __init__(self, plate: str):
        super().__init__()
        self.plate = plate

    @abstractmethod
    def couple(self, noise: Tensor) -> Tensor:
        r"""Returns coupled noises from independent ones, with shape :math:`(*, k, D)`."""

    def _pyro_sample(self, msg: dict) -> None:
        dims = {frame.name: frame.dim for frame in msg["cond_indep_stack"]}
        normal = base_normal(msg["fn"])
        if msg["done"] or self.plate not in dims or normal is None:
            return
        fn, dim = msg["fn"], dims[self.plate] - len(msg["fn"].event_shape)
        shape, like = fn.batch_shape + fn.event_shape, fn.mean
        noise = torch.randn(shape, dtype=like.dtype, device=like.device).movedim(dim, -2)
        msg["value"] = normal.loc + normal.scale * self.couple(noise).movedim(-2, dim)


class Orthogonal(Coupled):
    r"""Makes the noises of a datum's timesteps orthogonal, in groups of :math:`D`."""

    def couple(self, noise: Tensor) -> Tensor:
        r"""Returns coupled noises from independent ones, with shape :math:`(*, k, D)`."""
        groups = [torch.linalg.qr(rows.mT)[0].mT for rows in noise.split(noise.shape[-1], dim=-2)]
        # The signs of QR are not uniform: those of the noise are.
        signs = torch.randn_like(noise[..., :1]).sign()
        length = torch.randn_like(noise).norm(dim=-1, keepdim=True)
        return length * signs * torch.cat(groups, -2)


class Shared(Coupled):
    r"""Gives all timesteps of a datum the same noise: a point of the same path at many times."""

    def couple(self, noise: Tensor) -> Tensor:
        r"""Returns coupled noises from independent ones, with shape :math:`(*, k, D)`."""
        return noise[..., :1, :].expand_as(noise)


class _Handled_ELBO(Timestep_ELBO):
    handler: Callable[[], Messenger]

    def _get_trace(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[Trace, Trace]:
        return super()._get_trace(model, type(self).handler()(guide), args, kwargs)


class Orthogonal_ELBO(_Handled_ELBO):
    r"""A :class:`Timestep_ELBO` whose timesteps have orthogonal noise."""

    handler = partial(Orthogonal, PLATE)


class Shared_ELBO(_Handled_ELBO):
    r"""A :class:`Timestep_ELBO` whose timesteps have the same noise."""

    handler = partial(Shared, PLATE)


class SobolPerDatum_ELBO(_Handled_ELBO):
    r"""A :class:`Timestep_ELBO` whose :math:`(t, \epsilon)` of a datum are Sobol points."""

    handler = partial(QuasiRandom, *Timestep_ELBO.mirrored_plates)


class SobolPerBatch_ELBO(_Handled_ELBO):
    r"""A :class:`Timestep_ELBO` whose :math:`(z_0, t, \epsilon)` of a batch are Sobol points."""

    handler = partial(QuasiRandom, "data", *Timestep_ELBO.mirrored_plates)
