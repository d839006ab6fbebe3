r"""Estimators that looked promising and did not win, kept where they can be measured again.

Each of them is unbiased. What they gain and what they cost is in the tables of the bench.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..diffusion import at_time, base_normal, normal, q_reverse_moments
from ..infer import Collapse, LossAware, Timestep_ELBO
from ..priors import DiffusionPrior

__all__ = [
    "ControlVariate_ELBO",
    "Coupled",
    "GradientAware",
    "Hybrid_ELBO",
    "Orthogonal",
    "Orthogonal_ELBO",
    "Shared",
    "Shared_ELBO",
]


class GradientAware(LossAware):
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

    def forward(self, prior: DiffusionPrior, conditioning: str, first: int) -> Tensor:
        super().forward(prior, conditioning, first)  # which makes the table of squares
        factor = prior.kernel.gains.abs() / prior.kernel.sigmas
        norm = (factor * self.squares.pow(0.25))[first:] + torch.finfo(self.squares.dtype).tiny
        return (1 - self.uniform) * norm / norm.sum() + self.uniform / len(norm)


class _Remember(Collapse):
    r"""Remembers the prior that it collapses."""

    prior: DiffusionPrior

    def model(self, prior: DiffusionPrior) -> Tensor:
        self.prior = prior
        return super().model(prior)


class _Corrected(Timestep_ELBO):
    r"""Changes the terms of sampled timesteps, whose KLs are given z_0."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        options = (self.collapse.conditioning, self.weighting.name)
        if self.proposal is None or options != ("z_0", "elbo"):
            raise ValueError(
                f"{type(self).__name__} needs conditioning='z_0', weighting='elbo' and timesteps "
                f"other than 'all'"
            )
        self.collapse.__class__ = _Remember


class Hybrid_ELBO(_Corrected):
    r"""The prior's gradient from the KLs given :math:`x`, the encoder's from those given
    :math:`z_0`, in one surrogate.

    The gradients of both with respect to the denoiser have the same expectation. Their difference,

    .. math:: \nabla_\phi \left\langle \tilde\mu(z_t, z_0) - \tilde\mu(z_t, x), \;
        \mu_\phi(z_t, t) \right\rangle / \sigma_t^2

    at a fixed :math:`z_t`, is added to the gradient given :math:`z_0`, and nothing to the value. It
    costs another pass through the denoiser.
    """

    def site_terms(self, model_trace: Trace, guide_trace: Trace) -> Iterator[tuple[str, Tensor]]:
        for name, term in super().site_terms(model_trace, guide_trace):
            if name == "z_s" and torch.is_grad_enabled():
                term = term + self.difference(guide_trace)
            yield name, term

    def difference(self, guide_trace: Trace) -> Tensor:
        prior, nodes = self.collapse.prior, guide_trace.nodes
        z_t, t, site = nodes["z_t"]["value"].detach(), nodes["t"]["value"], nodes["z_s"]
        q_z0 = base_normal(nodes["z_0"]["fn"])
        q_z0 = normal(q_z0.loc.detach(), q_z0.scale.detach())
        loc, _ = q_reverse_moments(prior.schedule, q_z0, z_t, t)
        p_s = prior.reverse(z_t, t)
        difference = (site["fn"].mean - loc).detach() / p_s.variance.detach()
        inner = (difference * p_s.mean).sum(-1)
        return scale_and_mask(inner - inner.detach(), site["scale"], site["mask"])


class ControlVariate_ELBO(_Corrected):
    r"""The standard Gaussian prior's KLs as a control variate, for the encoder's gradient.

    Without its network, the prior is :math:`\mathcal{N}(0, I)` and its KL at every :math:`t` a
    quadratic form of :math:`z_0` and noise. Its expected sum over :math:`t`, :math:`c \|z_0\|^2 +
    \mathrm{const}`, is known: the sampled terms are subtracted, and the sum is added.
    """

    def site_terms(self, model_trace: Trace, guide_trace: Trace) -> Iterator[tuple[str, Tensor]]:
        for name, term in super().site_terms(model_trace, guide_trace):
            if name == "z_s":
                sampled, expected = self.gaussian(guide_trace)
                yield "control", expected
                term = term - sampled
            yield name, term

    def gaussian(self, guide_trace: Trace) -> tuple[Tensor, Tensor]:
        prior, nodes = self.collapse.prior, guide_trace.nodes
        kernel, first = prior.kernel, self.weighting.first
        site, t, start = nodes["z_s"], nodes["t"]["value"], nodes["z_0"]
        # q's mean is a z_t + b z_0, and without the network the prior's is skip z_t.
        loc = site["fn"].mean - at_time(kernel.skips, t) * nodes["z_t"]["value"]
        sampled = (loc / at_time(kernel.sigmas, t)).square().sum(-1) / 2
        sampled = scale_and_mask(sampled, site["scale"], site["mask"])

        original = prior.schedule.original
        alpha_bar, one_minus = original("alphas_cumprod"), original("one_minus_alphas_cumprod")
        variance = kernel.original("sigmas").square()
        a = original("alphas").sqrt() * one_minus.roll(1) / one_minus
        b = alpha_bar.roll(1).sqrt() * original("betas") / one_minus
        skip = kernel.original("skips")
        of_z0 = ((a - skip) * alpha_bar.sqrt() + b).square() / (2 * variance)
        of_noise = (a - skip).square() * one_minus / (2 * variance)
        z_0 = start["value"]
        expected = (of_z0[first:].sum() * z_0.square() + of_noise[first:].sum()).sum(-1)
        return sampled, scale_and_mask(expected, start["scale"], start["mask"])


class Coupled(Messenger, ABC):
    r"""An effect handler that couples the noises of a datum's timesteps.

    The noise of every timestep must still be a standard normal.

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


class _Coupled_ELBO(Timestep_ELBO):
    coupling: type[Coupled]

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple:
        guide = self.coupling(self.mirrored_plates[0])(guide)
        return super()._get_trace(model, guide, args, kwargs)


class Orthogonal_ELBO(_Coupled_ELBO):
    r"""A :class:`Timestep_ELBO` whose timesteps have orthogonal noise."""

    coupling = Orthogonal


class Shared_ELBO(_Coupled_ELBO):
    r"""A :class:`Timestep_ELBO` whose timesteps have the same noise."""

    coupling = Shared
