r"""The log-weights of draws of all latents, and gradients along the paths of the draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import get_dependent_plate_dims
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.autograd import grad

from ..diffusion import base_normal, unwrap
from .traced import check_reparameterized, sites, unscaled_log_prob

__all__ = ["Cut", "along_path", "common_scale", "drawn", "log_densities", "regenerated"]

Site = dict[str, Any]
Traces = Sequence[tuple[Trace, Trace]]


class Cut(Messenger):
    r"""An effect handler that hands a latent on without its history, and keeps what was drawn.

    Densities are then functions of latents and parameters, as they are written, and the gradient
    with respect to either is the partial one.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["value"] is not None or site_is_subsample(msg):
            return
        check_reparameterized(msg)
        msg["infer"]["drawn"] = msg["fn"](*msg["args"], **msg["kwargs"])
        msg["value"] = msg["infer"]["drawn"].detach().requires_grad_()


def drawn(guide_trace: Trace) -> list[tuple[Tensor, Tensor]]:
    r"""Returns the guide's draws and the values that it went on with, in the program's order."""
    latents = latent_sites(guide_trace)
    return [(s["infer"]["drawn"], s["value"]) for s in latents if "drawn" in s["infer"]]


def regenerated(model_trace: Trace) -> list[tuple[Tensor, Tensor]]:
    r"""Returns the latents as the model makes them from their noise, and as they are."""
    pairs = []
    for site in latent_sites(model_trace):
        normal, z = base_normal(site["fn"]), site["value"]
        if normal is None:
            raise ValueError(
                f"site {site['name']!r} is a {type(unwrap(site['fn'])).__name__} in the model, and "
                "only the noise of Gaussians is known: use DReG_ELBO"
            )
        noise = ((z - normal.loc) / normal.scale).detach()
        pairs.append((normal.loc + normal.scale * noise, z))
    return pairs


def along_path(target: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    r"""Returns a number whose gradient is that of the target through the draws.

    The effect of a draw on later ones is added from the last to the first, by the chain rule.

    Arguments:
        target: A function of the latents, a single number.
        pairs: Draws with their history and the latents that went on without it, in order.
    """
    latents = [z for _, z in pairs]
    total = torch.zeros_like(target)
    if not latents:
        return total
    slopes = list(grad(target, latents, retain_graph=True, materialize_grads=True))
    for i in reversed(range(len(pairs))):
        draw = pairs[i][0]
        if not draw.requires_grad:
            continue
        total = total + (slopes[i] * draw).sum()
        earlier = latents[:i]
        more = grad(draw, earlier, slopes[i], retain_graph=True, allow_unused=True) if i else ()
        for j, slope in enumerate(more):
            slopes[j] = slopes[j] if slope is None else slopes[j] + slope
    return total


def log_densities(model_trace: Trace, guide_trace: Trace) -> Sequence[Tensor]:
    r"""Returns :math:`\log p(x | z)`, :math:`\log p(z)` and :math:`\log q(z | x)` of each datum."""
    model, guide = sample_sites(model_trace), sample_sites(guide_trace)
    dims = get_dependent_plate_dims([*model, *guide])

    def total(parts: list[Site]) -> Tensor:
        result = torch.zeros(())
        for site in parts:
            value = scale_and_mask(unscaled_log_prob(site), mask=site["mask"])
            within = [dim for dim in dims if value.ndim >= -dim]
            result = result + (value.sum(within, keepdim=True) if within else value)
        return result

    observed = [site for site in model if site["is_observed"]]
    if not observed:
        raise ValueError(
            "the model has no data: its bound is on log 1, for any prior; use TraceKL_ELBO"
        )
    return torch.broadcast_tensors(total(observed), total(latent_sites(model_trace)), total(guide))


def sample_sites(trace: Trace) -> list[Site]:
    return [site for site in sites(trace).values() if site["type"] == "sample"]


def latent_sites(trace: Trace) -> list[Site]:
    return [site for site in sample_sites(trace) if not site["is_observed"]]


def common_scale(traces: Traces, shape: Size) -> Any:
    r"""Returns the scale that all sites share, a number or one for each datum.

    Arguments:
        traces: The traces of the model and the guide, for each of the particles.
        shape: The shape of the data.

    Raises:
        ValueError: If the expectation of a weight would not be :math:`p(x)`.
    """
    scale: Any = None
    for model_trace, guide_trace in traces:
        for site in latent_sites(guide_trace):
            if site["mask"] is False or site["name"] not in model_trace.nodes:
                raise ValueError(
                    f"site {site['name']!r} must have a density in both programs, or a log-mean-exp"
                    " is no bound: use Trace_ELBO"
                )
        for site in [*sample_sites(model_trace), *sample_sites(guide_trace)]:
            scale = site["scale"] if scale is None else scale
            if not (equal(site["scale"], scale) and fits(scale, shape)):
                raise ValueError(
                    f"site {site['name']!r} has a scale of its own, and the log-mean-exp of a "
                    "multiple of log p - log q is no bound: use Timestep_ELBO or Trace_ELBO"
                )
    return scale


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def fits(scale: Any, shape: Size) -> bool:
    r"""Returns ``True`` if a scale has at most one value for each datum."""
    if not isinstance(scale, Tensor):
        return True
    return torch.broadcast_shapes(scale.shape, shape).numel() == shape.numel()
