r"""The ELBO of two traces, site by site, in closed form where that is legal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.infer import Trace_ELBO
from pyro.infer.util import is_validation_enabled, torch_item
from pyro.poutine import Trace, replay, trace
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor
from torch.distributions import kl_divergence

from ..arguments import check_whole
from ..diffusion import base_normal, kl_normal
from .antithetic import Antithetic

__all__ = ["TraceKL_ELBO"]

ENTROPIES = ("exact", "path")


class TraceKL_ELBO(Trace_ELBO):
    r"""The ELBO with analytic KL divergences at the sites where they are legal.

    The negative ELBO is a sum over the sites of the two programs. An observed site contributes
    :math:`-\log p(x | \cdot)`. A latent site :math:`z` contributes

    .. math:: \mathrm{KL}(q(z | \cdot) \,\|\, p(z | \cdot))

    in closed form, if its guide site says ``infer={"closed_form_kl": True}``, and otherwise

    .. math:: -\mathrm{H}[q(z | \cdot)] - \log p(z | \cdot)

    with the entropy in closed form where the distribution has one. The latter is always legal. The
    former is iff the parents of :math:`z` in the model contain no descendant of :math:`z` in the
    guide, which only the author of the programs can promise; Pyro's ``TraceMeanField_ELBO`` assumes
    it of every site. See :func:`~pyro_vaediff.infer.check_mean_field`.

    With ``entropy="path"``, the entropy is sampled, :math:`-\log q(z | \cdot)`, and its gradient
    goes through :math:`z` only, not through the parameters of :math:`q`. What is left out, the
    score, has no mean; and what is left cancels the noise in the gradient of :math:`\log p` if
    :math:`q` is near the true posterior.

    Arguments:
        num_particles: The number of samples of the guide per evaluation.
        max_plate_nesting: The number of nested plates, which only vectorization needs. It is found
            out by running the programs once, if not given.
        vectorize_particles: Whether the samples are drawn in one run of the programs, in a plate.
        antithetic: Whether the Gaussian noise of vectorized particles comes in mirrored pairs. See
            :class:`~pyro_vaediff.infer.Antithetic`.
        entropy: ``"exact"``, in closed form where there is one, or ``"path"``. A closed-form KL
            has no entropy to be sampled.

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
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = False,
        antithetic: bool = True,
        entropy: str = "exact",
    ):
        check_whole("num_particles", num_particles)
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        if entropy not in ENTROPIES:
            raise ValueError(f"entropy must be 'exact' or 'path', got {entropy!r}")
        self.antithetic = antithetic
        self.entropy = entropy

    def _guess_max_plate_nesting(self, model: Callable, guide: Callable, args, kwargs) -> None:
        # Pyro runs the programs for it: that must not change what is drawn afterwards, or a run
        # that is resumed would differ from one that was not stopped.
        devices = {x.device for x in args if isinstance(x, Tensor) and x.is_cuda}
        with torch.random.fork_rng(devices=list(devices)):
            super()._guess_max_plate_nesting(model, guide, args, kwargs)

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple:
        # As in Pyro, but without log-densities: only the sites that need one compute it.
        if self.antithetic:
            guide = Antithetic(*self.mirrored_plates)(guide)
        guide_trace = trace(guide).get_trace(*args, **kwargs)
        model_trace = trace(replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        model_trace = prune_subsample_sites(model_trace)
        guide_trace = prune_subsample_sites(guide_trace)
        if is_validation_enabled():
            for site in [*model_trace.nodes.values(), *guide_trace.nodes.values()]:
                if site["type"] == "sample":
                    site = site | {"log_prob": unscaled_log_prob(site)}
                    check_site_shape(site, self.max_plate_nesting)
        return model_trace, guide_trace

    def site_terms(self, model_trace: Trace, guide_trace: Trace) -> Iterator[tuple[str, Tensor]]:
        r"""Yields the terms of the negative ELBO with their names, one value per datum."""
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site["is_observed"]:
                yield name, -log_prob(site)
                continue
            guide_site = guide_trace.nodes[name]
            if guide_site["mask"] is False:
                continue
            check_reparameterized(guide_site)
            if guide_site["infer"].get("closed_form_kl", False):
                try:
                    kl = closed_form_kl(guide_site["fn"], site["fn"])
                    yield name, scale_and_mask(kl, guide_site["scale"], guide_site["mask"])
                    continue
                except NotImplementedError:  # such as a flow; the sampled form is legal as well
                    pass
            yield f"-H[{name}]", negative_entropy(guide_site, self.entropy)
            if site["mask"] is not False:
                yield name, -log_prob(site)
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name not in model_trace.nodes:  # an auxiliary site
                check_reparameterized(site)
                yield f"-H[{name}]", negative_entropy(site, self.entropy)

    def terms(self, model: Callable, guide: Callable, *args, **kwargs) -> dict[str, Tensor]:
        r"""Returns the terms whose sum is the loss, each summed over the data.

        Arguments:
            model: The model.
            guide: The guide.
            args: The arguments of the model and the guide.
            kwargs: The keyword arguments of the model and the guide.
        """
        terms: dict[str, Tensor] = defaultdict(float)
        for traces in self._get_traces(model, guide, args, kwargs):
            for name, term in self.site_terms(*traces):
                terms[name] = terms[name] + term.sum() / self.num_particles
        return dict(terms)

    def _differentiable_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple:
        loss = sum(term.sum() for _, term in self.site_terms(model_trace, guide_trace))
        return torch_item(loss), loss

    def loss(self, model: Callable, guide: Callable, *args, **kwargs) -> float:
        r"""Returns an estimate of the negative ELBO."""
        with torch.no_grad():
            return torch_item(sum(self.terms(model, guide, *args, **kwargs).values()))


def closed_form_kl(q: TorchDistribution, p: TorchDistribution) -> Tensor:
    normals = base_normal(q), base_normal(p)
    if None in normals:
        return kl_divergence(q, p)
    return sum_rightmost(kl_normal(*normals), len(q.event_shape))


def unscaled_log_prob(site: dict) -> Tensor:
    return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])


def log_prob(site: dict) -> Tensor:
    return scale_and_mask(unscaled_log_prob(site), site["scale"], site["mask"])


def negative_entropy(site: dict, entropy: str) -> Tensor:
    r"""Returns :math:`-H[q] = E_q[\log q]`, in closed form if there is one, or an estimate."""
    if entropy == "path":
        return scale_and_mask(path_log_prob(site), site["scale"], site["mask"])
    try:
        value = -site["fn"].entropy()
    except NotImplementedError:
        value = unscaled_log_prob(site)
    return scale_and_mask(value, site["scale"], site["mask"])


def path_log_prob(site: dict) -> Tensor:
    r"""Returns :math:`\log q(z)`, with a gradient that goes through :math:`z` only."""
    if not torch.is_grad_enabled():
        return unscaled_log_prob(site)
    z = site["value"].detach().requires_grad_()
    log_q = unscaled_log_prob(site | {"value": z})
    slope = None
    if log_q.requires_grad:
        (slope,) = torch.autograd.grad(log_q.sum(), z, retain_graph=True, allow_unused=True)
    if slope is None:  # of a Delta or a Uniform, whose density has no path
        return unscaled_log_prob(site)
    linear = slope * (site["value"] - z.detach())
    return log_q.detach() + sum_rightmost(linear, len(site["fn"].event_shape))


def check_reparameterized(site: dict) -> None:
    if not getattr(site["fn"], "has_rsample", False):
        raise ValueError(
            f"site {site['name']!r} is not reparameterized ({type(site['fn']).__name__}): its "
            f"gradient needs a score function, use Pyro's Trace_ELBO or TraceGraph_ELBO"
        )
