r"""Objectives against collapsed latents: a bound whose KLs weigh less. **Neither is a bound.**

Both are for training only; whatever reports takes the bound itself, see :class:`Reweighted`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from ..arguments import check_nonnegative
from .reweighted import Reweighted
from .trace_kl_elbo import Term, TermsELBO

__all__ = ["FreeBits", "KLWeight", "group_of"]


def group_of(name: str) -> str:
    r"""Returns the group of latents that a term is of: the scope of its name, if it has one.

    Example:
        >>> group_of("group1/z_s"), group_of("-H[group2/z_0]"), group_of("z_0")
        ('group1', 'group2', '')
    """
    scope, divider, _ = name.removeprefix("-H[").rpartition("/")
    return scope if divider else ""


class KLWeight:
    r"""The weight :math:`\beta` of all terms but those of the data, for a :class:`Reweighted`.

    .. math:: E_q[-\log p(x | z)] + \beta \, \mathrm{KL}(q(z | x) \,\|\, p(z))

    It may be changed between steps: KL warm-up raises it from 0 to 1.

    Arguments:
        value: The weight :math:`\beta`.

    References:
        | Ladder Variational Autoencoders (Sønderby et al., 2016), section 2.2
        | https://arxiv.org/abs/1602.02282

    Example:
        >>> from pyro_vaediff.infer import Reweighted, Timestep_ELBO
        >>> weight = KLWeight(0.0)
        >>> objective = Reweighted(Timestep_ELBO(), weight)
        >>> weight.value = 0.5
    """

    def __init__(self, value: float = 1.0):
        check_nonnegative("value", value)
        self.value = value
        self.__name__ = "KL weight"

    def __call__(self, term: Term) -> Tensor:
        r"""Returns what takes the place of a term."""
        return term.value if term.role == "observed" else self.value * term.value


class FreeBits(Reweighted):
    r"""A bound in which the KL of each group of latents is free up to a number of nats.

    .. math:: E_q[-\log p(x | z)] + \sum_l \max\Big(\lambda, \frac{1}{B} \sum_{b=1}^B
        \mathrm{KL}_l(x_b)\Big)

    A group is what stands in one :func:`pyro.contrib.autoname.scope`, such as those of a
    :class:`~pyro_vaediff.priors.HierarchicalPrior`; without scopes all latents are one.

    Arguments:
        elbo: The estimator of the bound.
        nats: The free nats :math:`\lambda` per datum and group.

    References:
        | Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
          equation (15)
        | https://arxiv.org/abs/1606.04934
    """

    def __init__(self, elbo: TermsELBO, nats: float):
        check_nonnegative("nats", nats)
        super().__init__(elbo, lambda term: term.value)
        self.nats, self.name = nats, f"free bits, {nats} nats"

    def particles(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> list[list[Term]]:
        particles = self.elbo.particles(model, guide, *args, **kwargs)
        return [self.clamp(terms) for terms in particles]

    def clamp(self, terms: list[Term]) -> list[Term]:
        r"""Returns terms in which the KL of a group is no less than what is free."""
        groups: dict[str, list[Term]] = defaultdict(list)
        for term in terms:
            if term.role != "observed":
                groups[group_of(term.name)].append(term)
        kept = [term for term in terms if term.role == "observed"]
        for members in groups.values():
            total = torch.stack([term.value.sum() for term in members]).sum()
            free = self.free(members)
            above = (total.detach() > free).to(free.dtype)
            first, *others = (term._replace(value=term.value * above) for term in members)
            share = (1 - above) * free / first.value.numel()
            kept += [first._replace(value=first.value + share), *others]
        return kept

    def free(self, members: list[Term]) -> Tensor:
        r"""Returns what is free for the terms of a group, in the units of their sum."""
        # The scale of the programs, such as 1 / B, is that of any site with one value per datum.
        term = next(term for term in members if term.role not in ("steps", "constant"))
        ones = torch.ones_like(term.value)
        return self.nats * scale_and_mask(ones, term.site["scale"], term.site["mask"]).sum()
