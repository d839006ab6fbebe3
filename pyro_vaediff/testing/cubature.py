r"""The exact ELBO of any linear-Gaussian programs, by cubature.

If every latent site of a guide is Gaussian with a mean that is affine in what was drawn before it
and a constant scale, each value is an affine function of standard normal noise :math:`\xi \in
\mathbb{R}^n`; if the model is of that kind too, :math:`f(\xi) = \log p - \log q` is a quadratic
function. The mean of such a function over noise is its mean over the :math:`2 n` points
:math:`\pm \sqrt{n} \, e_i`, exactly: their first and third moments vanish, and the second ones are
those of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..diffusion import base_normal

__all__ = ["exact_elbo"]


class Noise(Messenger):
    r"""Draws Gaussian sites with given noise.

    Arguments:
        points: The noise, with shape :math:`(P, n)`, of which each site takes the next columns; or
            ``None`` for zeros, which only counts them.
    """

    def __init__(self, points: Tensor | None = None):
        super().__init__()
        self.points, self.taken = points, 0

    def _pyro_sample(self, msg: Message) -> None:
        if msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg):
            return
        fn: Any = msg["fn"]
        normal, shape = base_normal(fn), fn.event_shape
        if normal is None:
            raise ValueError(f"site {msg['name']!r} of the guide must be Gaussian, got {fn}")
        size, self.taken = shape.numel(), self.taken + shape.numel()
        noise = torch.zeros((), dtype=normal.loc.dtype, device=normal.loc.device)
        if self.points is not None:
            columns = self.points[:, self.taken - size : self.taken]
            noise = columns.reshape(-1, 1, *shape)
        msg["value"] = normal.loc + normal.scale * noise


def exact_elbo(model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
    r"""Returns the ELBO of linear-Gaussian programs per datum, in nats.

    Neither closed-form KLs nor the algebra of diffusions are used: log-densities of sites are
    summed. It is differentiable in the parameters of the programs.

    Arguments:
        model: The model. Its only plate is that of the data, at dim −1.
        guide: The guide, whose latent sites are all Gaussian.
        args: The arguments of both.
        kwargs: The keyword arguments of both.

    Returns:
        The ELBO, with shape :math:`(B,)`.

    Raises:
        ValueError: If a site of the guide is not Gaussian.

    References:
        | Approximate Calculation of Multiple Integrals (Stroud, 1971), formula :math:`E_n^{r^2}`
          3-1

    Example:
        >>> from pyro_vaediff.testing import Oracle, linear_gaussian_vae
        >>> vae, x = linear_gaussian_vae(seed=0), torch.zeros(2, 3, dtype=torch.float64)
        >>> bound = exact_elbo(vae.model, vae.guide, x)
        >>> torch.allclose(bound, -Oracle(vae, x).negative_elbo)
        True
    """
    count = Noise()
    with count:
        poutine.trace(guide).get_trace(*args, **kwargs)
    n = count.taken
    points = math.sqrt(n) * torch.eye(n, dtype=args[0].dtype, device=args[0].device)
    plate = pyro.plate("cubature", 2 * n, dim=-2)
    with plate, Noise(torch.cat([points, -points])):
        q = poutine.trace(guide).get_trace(*args, **kwargs)
    with plate:
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(*args, **kwargs)
    return (per_point(p) - per_point(q)).mean(0)


def per_point(trace: poutine.Trace) -> Tensor:
    r"""Returns the log-density of a trace, with shape :math:`(P, B)`."""
    trace.compute_log_prob()
    sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
    log_probs = [site["log_prob"] for site in sites if not site_is_subsample(site)]
    return torch.stack(torch.broadcast_tensors(*log_probs)).sum(0)
