r"""The use of each group of latents: its KL, and how many of its units are active."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from ..arguments import check_nonnegative
from ..infer import Timestep_ELBO
from ..infer.objectives import group_of
from ..vae import VAE, call
from .aggregate import posterior_means
from .elbo import Data, evaluating, in_batches

__all__ = ["ActiveUnits", "active_units", "kl_by_group"]


class ActiveUnits(NamedTuple):
    r"""How many units of a group of latents are active.

    Arguments:
        active: The number of active units.
        total: The number of units.
    """

    active: int
    total: int


def kl_by_group(terms: Mapping[str, float]) -> dict[str, float]:
    r"""Returns the KL divergence of each group of latents, in the units of the terms.

    Arguments:
        terms: The terms of the negative ELBO, such as :func:`evaluate` returns them.

    Returns:
        The sums of the terms of each scope, ``""`` for latents without one.

    Example:
        >>> kl_by_group({"group1/z_0": 2.0, "group2/z_0": 3.0, "-H[group1/z_0]": -1.0, "x": 9.0})
        {'group1': 1.0, 'group2': 3.0}
    """
    sums: dict[str, float] = {}
    for name, value in terms.items():
        if name != "x":
            sums[group_of(name)] = sums.get(group_of(name), 0.0) + value
    return sums


@torch.no_grad()
def active_units(
    vae: VAE,
    data: Data,
    threshold: float = 0.01,
    *,
    c: Tensor | None = None,
    batch_size: int = 100,
    seed: int = 0,
) -> dict[str, ActiveUnits]:
    r"""Returns the number of units of each group of latents whose posterior means move with x.

    .. math:: A_u = \mathrm{Var}_x \big( E_{q(z|x)}[z_u] \big) > \text{threshold}

    The posterior of a group below others depends on what was drawn above it, once per datum. Where
    a mean has no closed form, as with a flow, it is that of draws, and their noise is subtracted.

    Arguments:
        vae: The VAE.
        data: The data, see :func:`in_batches`.
        threshold: The threshold, in squared units of the latents.
        c: The context of a tensor of data, with shape :math:`(N, *)`.
        batch_size: The number of data at once.
        seed: The seed of what is drawn.

    Returns:
        The numbers by group, with the name ``""`` for latents that are no group.

    References:
        | Importance Weighted Autoencoders (Burda et al., 2016), section 5
        | https://arxiv.org/abs/1509.00519
    """
    check_nonnegative("threshold", threshold)
    # Of the chains, only z_0 and what a single step needs.
    guide = Timestep_ELBO("uniform", k=1).collapse(vae.guide)
    counts = 0
    means: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}
    with evaluating(vae, seed):
        for x, c_x in in_batches(vae, data, c, batch_size):
            trace = poutine.trace(lambda *args: call(guide, *args)).get_trace(x, c_x)
            counts += len(x)
            for name, site in trace.nodes.items():
                if site["type"] != "sample" or name.rpartition("/")[2] != "z_0":
                    continue
                # Welford's update, batch by batch.
                fn: Any = site["fn"]
                (mean, error), group = posterior_means(fn), group_of(name)
                old = means.get(group, torch.zeros_like(mean[0]))
                new = old + (mean - old).sum(0) / counts
                update = ((mean - old) * (mean - new)).sum(0)
                squares[group] = squares.get(group, 0.0) + update
                means[group] = new
                errors[group] = errors.get(group, 0.0) + error.sum(0)
    return {
        group: ActiveUnits(
            int(((square - errors[group]) / counts > threshold).sum()), square.numel()
        )
        for group, square in squares.items()
    }
