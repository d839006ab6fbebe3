r"""Estimators that change the sampled KLs: control variates, and another gradient of the prior.

Each of them is unbiased. What they gain and what they cost is in the tables of the bench.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine import Trace
from torch import Tensor

from pyro_vaediff.diffusion import base_normal, kl_normal, normal, q_marginal, q_reverse_moments
from pyro_vaediff.infer import Term, Timestep_ELBO
from pyro_vaediff.infer.trace_kl_elbo import sites
from pyro_vaediff.schedules import Tables, at_time

__all__ = ["ControlVariate_ELBO", "Hybrid_ELBO", "Regressed_ELBO", "Taylor_ELBO"]


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
                schedule = term.site["infer"]["prior"].schedule
                if schedule.continuous or schedule.learned:
                    raise ValueError(
                        f"{type(self).__name__} needs the steps of a fixed schedule, got a "
                        f"{type(schedule).__name__} in continuous time"
                    )
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
    costs another pass through the denoiser, which must have no context.
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
        sampled, expected = self.control(term, z_t, start)
        yield Term(term.name.removesuffix("z_s") + "control", expected, "control", start)
        yield term._replace(value=term.value - sampled)

    def control(self, term: Term, z_t: Tensor, start: dict) -> tuple[Tensor, Tensor]:
        r"""Returns the control at the sampled timesteps, and its expected sum given z_0."""
        site, z_0 = term.site, start["value"]
        prior, t = site["infer"]["prior"], site["infer"]["t"]
        n, kernel = prior.event_dim, prior.denoiser.kernel
        # q's mean is a z_t + b z_0, and without the network the prior's is skip z_t.
        loc = site["fn"].mean - at_time(kernel.skips, t, n) * z_t
        sampled = sum_rightmost((loc / at_time(kernel.sigmas, t, n)).square(), n) / 2
        sampled = scale_and_mask(sampled, site["scale"], site["mask"])

        def table(tables: Tables, name: str) -> Tensor:
            original = tables.original_on(name, z_0.device)
            return original[(...,) + (None,) * (n + 1 - original.ndim)]

        alpha_bar, one_minus, alpha, beta = (
            table(prior.schedule, name)
            for name in ("alphas_cumprod", "one_minus_alphas_cumprod", "alphas", "betas")
        )
        variance, skip = table(kernel, "sigmas").square(), table(kernel, "skips")
        a = alpha.sqrt() * one_minus.roll(1, 0) / one_minus
        b = alpha_bar.roll(1, 0).sqrt() * beta / one_minus
        of_z0 = ((a - skip) * alpha_bar.sqrt() + b).square() / (2 * variance)
        of_noise = (a - skip).square() * one_minus / (2 * variance)
        sums = (x[2:].sum(0).to(z_0) for x in (of_z0, of_noise))
        expected = next(sums) * z_0.square() + next(sums)
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
        sampled, expected = self.control(term, z_t, start)
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


class Taylor_ELBO(Regressed_ELBO):
    r"""The linear part of each KL in the noise of :math:`z_t` as a control variate.

    With :math:`z_t = m_t + \sqrt{1 - \bar\alpha_t} \, \epsilon`, a Taylor expansion of the first
    order of the denoiser about the mean :math:`m_t = \sqrt{\bar\alpha_t} \, z_0` has the linear
    part

    .. math:: h_t = \left\langle \nabla_{z_t} \mathrm{KL}_t \big|_{z_t = m_t}, \; z_t - m_t
        \right\rangle,

    which has no mean given :math:`z_0`, whatever the network. It is subtracted, times a coefficient
    that is regressed as in :class:`Regressed_ELBO`. It costs another pass through the denoiser,
    which must have no context, and derivatives of the second order. The mean over an antithetic
    pair of noises has no linear part in the first place.

    References:
        | Reducing Reparameterization Gradient Variance (Miller et al., 2017)
        | https://arxiv.org/abs/1705.07880

    Arguments:
        args: Arguments of :class:`Timestep_ELBO`.
        antithetic: That of :class:`Timestep_ELBO`, which must be ``False``.
        kwargs: Keyword arguments of :class:`Regressed_ELBO`.

    Raises:
        ValueError: If noise is antithetic. All that is left of the linear part then is rounding.
    """

    def __init__(self, *args: Any, antithetic: bool = False, **kwargs: Any):
        super().__init__(*args, antithetic=antithetic, **kwargs)
        if antithetic:
            raise ValueError("antithetic pairs cancel the linear term: antithetic must be False")

    def control(self, term: Term, z_t: Tensor, start: dict) -> tuple[Tensor, Tensor]:
        site, z_0 = term.site, start["value"]
        prior, t = site["infer"]["prior"], site["infer"]["t"]
        n, q_s = prior.event_dim, base_normal(site["fn"])
        mean = q_marginal(prior.schedule, z_0, t, n).mean
        with_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            shift = torch.zeros_like(mean, requires_grad=True)
            q_mean, _ = q_reverse_moments(prior.schedule, z_0, mean + shift, t, event_dim=n)
            p_s = base_normal(prior.reverse(mean + shift, t))
            assert q_s is not None and p_s is not None  # steps are Gaussian
            kl = kl_normal(torch.distributions.Normal(q_mean, q_s.scale), p_s)
            (slope,) = torch.autograd.grad(kl.sum(), shift, create_graph=with_graph)
        linear = sum_rightmost(slope * (z_t - mean).detach(), n)
        linear = scale_and_mask(linear, site["scale"], site["mask"])
        return linear, torch.zeros_like(linear)
