r"""What our estimators share: how two programs are traced, and how a loss is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from pyro.infer import Trace_ELBO
from pyro.infer.util import is_validation_enabled, torch_item
from pyro.poutine import Trace, replay, trace
from pyro.poutine.runtime import Message
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

__all__ = ["TracedELBO", "check_reparameterized", "sites", "unscaled_log_prob"]


class TracedELBO(Trace_ELBO):
    r"""An estimator that is all in its differentiable loss: the methods that Pyro calls use it."""

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        r"""Returns an estimate of the negative bound, as a tensor with a gradient."""
        raise NotImplementedError

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        r"""Returns an estimate of the negative bound."""
        with torch.no_grad():
            return torch_item(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        r"""Returns an estimate of the negative bound, and adds its gradient to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return torch_item(loss)

    def _guess_max_plate_nesting(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> None:
        # Pyro runs the programs for it: that must not change what is drawn afterwards, or a run
        # that is resumed would differ from one that was not stopped.
        devices = {x.device for x in args if isinstance(x, Tensor) and x.is_cuda}
        with torch.random.fork_rng(devices=list(devices)):
            super()._guess_max_plate_nesting(model, guide, args, kwargs)

    def _get_trace(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[Trace, Trace]:
        # As in Pyro, but without log-densities: only the sites that need one compute it.
        guide_trace = trace(guide).get_trace(*args, **kwargs)
        model_trace = trace(replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        for name, site in sites(model_trace).items():
            latent = site["type"] == "sample" and not site["is_observed"]
            if latent and not site_is_subsample(cast(Message, site)):
                check_guide_has(name, guide_trace)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        model_trace = prune_subsample_sites(model_trace)
        guide_trace = prune_subsample_sites(guide_trace)
        if is_validation_enabled():
            for site in [*sites(model_trace).values(), *sites(guide_trace).values()]:
                if site["type"] == "sample":
                    site = site | {"log_prob": unscaled_log_prob(site)}
                    check_site_shape(cast(Message, site), self.max_plate_nesting)
        return model_trace, guide_trace


def sites(trace: Trace) -> dict[str, dict[str, Any]]:
    r"""Returns the sites of a trace, with other entries in ``infer`` than Pyro's types allow."""
    return cast("dict[str, dict[str, Any]]", trace.nodes)


def check_guide_has(name: str, guide_trace: Trace) -> None:
    r"""Raises a ``ValueError`` unless the guide has a latent site of the model."""
    if name not in guide_trace.nodes:
        raise ValueError(
            f"the guide has no site {name!r}, which the model samples: with a diffusion prior, the "
            "guide must call prior.guide(q_z0); for an AutoGuide use pyro.infer.Trace_ELBO"
        )


def unscaled_log_prob(site: dict[str, Any]) -> Tensor:
    return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])


def check_reparameterized(site: dict[str, Any]) -> None:
    if not getattr(site["fn"], "has_rsample", False):
        raise ValueError(
            f"site {site['name']!r} is not reparameterized ({type(site['fn']).__name__}): its "
            f"gradient needs a score function, use Pyro's Trace_ELBO or TraceGraph_ELBO"
        )
