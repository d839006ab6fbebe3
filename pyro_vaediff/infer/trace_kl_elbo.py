r"""The ELBO of two traces, site by site, in closed form where that is legal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from operator import add
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine import Trace
from pyro.util import warn_if_nan
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ..arguments import check_choice, check_whole
from ..diffusion import base_normal, kl_normal
from .antithetic import Antithetic
from .traced import TracedELBO, check_reparameterized, sites, unscaled_log_prob

__all__ = ["Term", "TermsELBO", "TraceKL_ELBO"]

ENTROPIES = ("exact", "path")


class Term(NamedTuple):
    r"""A term of the negative ELBO.

    Arguments:
        name: Its name, such as ``"z_s"`` or ``"-H[z_0]"``.
        value: Its values in nats, one per datum, scaled and masked as its site is.
        role: What it is for: ``"observed"``, ``"entropy"``, or what its guide site says in
            ``infer``: with a diffusion prior, ``"last"`` (:math:`z_T`), ``"steps"``, ``"first"``
            (:math:`z_0`) and ``"constant"``. If the site says nothing, it is ``"latent"``.
        site: The guide site of a latent, or the site that is observed.
    """

    name: str
    value: Tensor
    role: str
    site: dict[str, Any]


class TermsELBO(TracedELBO):
    r"""An estimator that is a sum of terms."""

    def particles(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> list[list[Term]]:
        r"""Returns the terms of the loss of each particle."""
        raise NotImplementedError

    def terms(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        r"""Returns the terms whose sum is the loss, each summed over the data.

        Arguments:
            model: The model.
            guide: The guide.
            args: The arguments of the model and the guide.
            kwargs: The keyword arguments of the model and the guide.
        """
        terms: dict[str, Tensor] = {}
        for particle in self.particles(model, guide, *args, **kwargs):
            for term in particle:
                value = term.value.sum()
                value = value / self.num_particles if self.num_particles > 1 else value
                terms[term.name] = terms[term.name] + value if term.name in terms else value
        return terms

    def state_dict(self) -> dict[str, Tensor]:
        r"""Returns the state that the estimator has learned, for checkpoints: empty by default."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        r"""Loads a state that :meth:`state_dict` returned."""

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        r"""Returns an estimate of the negative ELBO, as a tensor with a gradient."""
        terms = self.terms(model, guide, *args, **kwargs)
        loss = reduce(add, terms.values()) if terms else torch.zeros(())
        warn_if_nan(loss, "loss")
        return loss


class TraceKL_ELBO(TermsELBO):
    r"""The ELBO with analytic KL divergences at the sites where they are legal.

    The negative ELBO is a sum over the sites of the two programs. An observed site contributes
    :math:`-\log p(x | \cdot)`. A latent site :math:`z` contributes

    .. math:: \mathrm{KL}(q(z | \cdot) \,\|\, p(z | \cdot))

    in closed form, if its guide site says ``infer={"closed_form_kl": True}``, and otherwise

    .. math:: -\mathrm{H}[q(z | \cdot)] - \log p(z | \cdot)

    with the entropy in closed form where the distribution has one. The latter is always legal. The
    former is legal iff the parents of :math:`z` in the model contain no descendant of :math:`z` in
    the guide. Only the author of the programs can promise that; Pyro's ``TraceMeanField_ELBO``
    assumes it of every site. See :func:`~pyro_vaediff.infer.check_mean_field`.

    With ``entropy="path"``, the entropy of a Gaussian is sampled, :math:`-\log q(z | \cdot)`, and
    its gradient goes through :math:`z` only, not through the parameters of :math:`q`. The score,
    which is left out, has mean zero; and the rest cancels the noise in the gradient of :math:`\log
    p` if :math:`q` is near the true posterior. Other distributions, such as flows, have their
    sampled or exact entropy: to score a copy of :math:`z` again would cost an autoregressive flow
    :math:`D` passes.

    Arguments:
        num_particles: The number of samples of the guide per evaluation.
        antithetic: Whether the Gaussian noise of vectorized particles comes in mirrored pairs. See
            :class:`~pyro_vaediff.infer.Antithetic`.
        entropy: ``"exact"``, in closed form where there is one, or ``"path"``. A closed-form KL
            has no entropy to be sampled.
        kwargs: Keyword arguments of :class:`pyro.infer.Trace_ELBO`.

    References:
        | Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference
          (Roeder et al., 2017)
        | https://arxiv.org/abs/1703.09194
    """

    #: The plates along which antithetic noise is mirrored.
    mirrored_plates: ClassVar[tuple[str, ...]] = ("num_particles_vectorized",)

    def __init__(
        self,
        num_particles: int = 1,
        *,
        antithetic: bool = True,
        entropy: str = "exact",
        **kwargs: Any,
    ):
        check_whole("num_particles", num_particles)
        super().__init__(num_particles=num_particles, **kwargs)
        check_choice("entropy", entropy, ENTROPIES)
        self.antithetic = antithetic
        self.entropy = entropy

    def _get_trace(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[Trace, Trace]:
        if self.antithetic:
            guide = Antithetic(*self.mirrored_plates)(guide)
        return super()._get_trace(model, guide, args, kwargs)

    def particles(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> list[list[Term]]:
        r"""Returns the terms of the loss of each particle, whose sum is that of its datum."""
        return [
            list(self.site_terms(*traces))
            for traces in self._get_traces(model, guide, args, kwargs)
        ]

    def site_terms(self, model_trace: Trace, guide_trace: Trace) -> Iterator[Term]:
        r"""Yields the terms of the negative ELBO, site by site."""
        for name, site in sites(model_trace).items():
            if site["type"] != "sample":
                continue
            if site["is_observed"]:
                role = site["infer"].get("role", "observed")
                yield Term(name, -log_prob(site), role, site)
                continue
            q = sites(guide_trace)[name]
            role = q["infer"].get("role", "latent")
            if q["mask"] is False or role == "nuisance":
                continue
            check_reparameterized(q)
            legal = q["infer"].get("closed_form_kl", False)
            kl = closed_form_kl(q["fn"], site["fn"]) if legal else None
            if kl is not None:
                yield Term(name, scale_and_mask(kl, q["scale"], q["mask"]), role, q)
            else:
                yield Term(f"-H[{name}]", negative_entropy(q, self.entropy), "entropy", q)
                if site["mask"] is not False:
                    yield Term(name, -log_prob(site), role, q)
        for name, site in sites(guide_trace).items():
            if site["type"] == "sample" and name not in model_trace.nodes:  # an auxiliary site
                check_reparameterized(site)
                yield Term(f"-H[{name}]", negative_entropy(site, self.entropy), "entropy", site)


def closed_form_kl(q: TorchDistribution, p: TorchDistribution) -> Tensor | None:
    r"""Returns :math:`\mathrm{KL}(q \,\|\, p)`, or ``None`` where no closed form is known."""
    normal_q, normal_p = base_normal(q), base_normal(p)
    if normal_q is not None and normal_p is not None:
        return sum_rightmost(kl_normal(normal_q, normal_p), len(q.event_shape))
    try:
        return kl_divergence(q, p)
    except NotImplementedError:  # such as of a flow; the sampled form is legal as well
        return None


def log_prob(site: dict[str, Any]) -> Tensor:
    return scale_and_mask(unscaled_log_prob(site), site["scale"], site["mask"])


def negative_entropy(site: dict[str, Any], entropy: str) -> Tensor:
    r"""Returns :math:`-H[q] = E_q[\log q]`, in closed form if there is one, or an estimate."""
    fn, normal = site["fn"], base_normal(site["fn"])
    if entropy == "path" and normal is not None:
        # A constant distribution, at a value with a gradient, gives the path derivative.
        constant = Normal(normal.loc.detach(), normal.scale.detach(), validate_args=False)
        value = sum_rightmost(constant.log_prob(site["value"]), len(fn.event_shape))
    else:
        try:
            value = -fn.entropy()
        except NotImplementedError:
            value = unscaled_log_prob(site)
    return scale_and_mask(value, site["scale"], site["mask"])


def per_datum(terms: Iterable[Term]) -> dict[str, Tensor]:
    r"""Returns terms by name; the chunks of an exact sum become one."""
    chunks: dict[str, list[Tensor]] = defaultdict(list)
    for term in terms:
        chunks[term.name].append(term.value)
    return {name: torch.cat(xs) if len(xs) > 1 else xs[0] for name, xs in chunks.items()}
