r"""Objectives that weight the KLs of a bound differently. **None of them is a bound.**

They are for training only; whatever reports takes the bound itself, see :class:`Reweighted`. Each
takes an estimator of the bound, or another objective: they can be nested.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Normal

from ..arguments import check_nonnegative
from ..diffusion import base_normal
from .reweighted import Reweighted
from .timestep_elbo import Timestep_ELBO
from .trace_kl_elbo import Term, TermsELBO

__all__ = ["FreeBits", "KLBalance", "KLWeight", "TotalCorrelation", "group_of", "total_correlation"]


def group_of(name: str) -> str:
    r"""Returns the group of latents that a term belongs to: the scope of its name, if it has one.

    Example:
        >>> group_of("group1/z_s"), group_of("-H[group2/z_0]"), group_of("z_0")
        ('group1', 'group2', '')
    """
    scope, divider, _ = name.removeprefix("-H[").rpartition("/")
    return scope if divider else ""


def by_group(terms: list[Term]) -> tuple[list[Term], dict[str, list[Term]]]:
    r"""Returns the terms of the data, and those of each group of latents, whose sum is its KL."""
    groups: dict[str, list[Term]] = defaultdict(list)
    for term in terms:
        if term.role != "observed":
            groups[group_of(term.name)].append(term)
    return [term for term in terms if term.role == "observed"], groups


def total(members: list[Term]) -> Tensor:
    r"""Returns the sum of terms over the data, without a gradient."""
    return torch.stack([term.value.detach().sum() for term in members]).sum()


def example(members: list[Term]) -> Term:
    r"""Returns a term of a group that has one value per datum."""
    return next(term for term in members if term.role not in ("steps", "constant"))


def one_nat(members: list[Term]) -> Tensor:
    r"""Returns the sum of a nat per datum, in the scale of the programs, such as 1 / B."""
    term = example(members)
    return scale_and_mask(torch.ones_like(term.value), term.site["scale"], term.site["mask"]).sum()


class KLWeight:
    r"""The weight :math:`\beta` of all terms but those of the data, for a :class:`Reweighted`.

    .. math:: E_q[-\log p(x | z)] + \beta \, \mathrm{KL}(q(z | x) \,\|\, p(z))

    Its minima trace the curve of rate and distortion, :math:`\beta` being its slope. It may be
    changed between steps: KL warm-up raises it from 0 to 1.

    Arguments:
        value: The weight :math:`\beta`.
        groups: Further factors of some groups of latents, such as ``{"group1": 0.5}``.

    References:
        | beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework (Higgins
          et al., 2017), equation (4)
        | https://openreview.net/forum?id=Sy2fzU9gl

        | Ladder Variational Autoencoders (Sønderby et al., 2016), section 2.2, for warm-up
        | https://arxiv.org/abs/1602.02282

    Example:
        >>> from pyro_vaediff.infer import Reweighted, Timestep_ELBO
        >>> weight = KLWeight(0.0)
        >>> objective = Reweighted(Timestep_ELBO(), weight)
        >>> weight.value = 0.5
    """

    def __init__(self, value: float = 1.0, groups: Mapping[str, float] | None = None):
        check_nonnegative("value", value)
        self.value, self.groups = value, dict(groups or {})
        for group, factor in self.groups.items():
            check_nonnegative(f"groups[{group!r}]", factor)
        self.__name__ = "KL weight"

    def __call__(self, term: Term) -> Tensor:
        r"""Returns the value that takes the place of a term."""
        if term.role == "observed":
            return term.value
        return self.value * self.groups.get(group_of(term.name), 1.0) * term.value


class FreeBits(Reweighted):
    r"""A bound in which the KL of each group of latents is free up to a number of nats.

    .. math:: E_q[-\log p(x | z)] + \sum_l \max\Big(\lambda, \frac{1}{B} \sum_{b=1}^B
        \mathrm{KL}_l(x_b)\Big)

    A group is all that stands in one :func:`pyro.contrib.autoname.scope`, such as those of a
    :class:`~pyro_vaediff.priors.HierarchicalPrior`; without scopes, all latents are one group.

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
        super().__init__(elbo, {})
        self.nats, self.name = nats, f"free bits, {nats} nats"

    def reweight(self, terms: list[Term]) -> list[Term]:
        kept, groups = by_group(terms)
        for members in groups.values():
            free = self.nats * one_nat(members)
            above = (total(members) > free).to(free.dtype)
            first, *others = (term._replace(value=term.value * above) for term in members)
            share = (1 - above) * free / first.value.numel()
            kept += [first._replace(value=first.value + share), *others]
        return kept


class KLBalance(Reweighted):
    r"""A bound whose KL warms up, and until then is balanced over the groups of latents.

    .. math:: E_q[-\log p(x | z)] + \beta \sum_{l=1}^L \gamma_l \, \mathrm{KL}_l, \qquad \gamma_l
        \propto \frac{1}{D_l} \Big( \frac{1}{B} \Big| \sum_{b=1}^B \mathrm{KL}_l(x_b) \Big| +
        0.01 \Big), \qquad \frac{1}{L} \sum_{l=1}^L \gamma_l = 1

    The coefficients have no gradient. A group that is hardly in use, given its number :math:`D_l`
    of latents, costs little. Once :math:`\beta \geq 1`, the coefficients are 1.

    Arguments:
        elbo: The estimator of the bound.
        weight: The weight :math:`\beta` of the KL, which is changed between steps.

    References:
        | NVAE: A Deep Hierarchical Variational Autoencoder (Vahdat & Kautz, 2020), appendix A, with
          the offset 0.01 of its code
        | https://arxiv.org/abs/2007.03898
    """

    def __init__(self, elbo: TermsELBO, weight: KLWeight):
        super().__init__(elbo, weight)
        self.weight, self.name = weight, "KL balancing"

    def reweight(self, terms: list[Term]) -> list[Term]:
        kept, groups = by_group(terms)
        if self.weight.value >= 1:
            return super().reweight(terms)
        use = torch.stack([self.use(members) for members in groups.values()])
        for members, gamma in zip(groups.values(), use / use.mean(), strict=True):
            kept += [term._replace(value=gamma * term.value) for term in members]
        return super().reweight(kept)

    def use(self, members: list[Term]) -> Tensor:
        r"""Returns how much a group is in use, in nats per datum and latent."""
        kl = (total(members) / one_nat(members)).abs()
        return (kl + 0.01) / example(members).site["fn"].event_shape.numel()


class TotalCorrelation(Reweighted):
    r"""A bound with another weight of the total correlation of the latents, as in beta-TCVAE.

    The more the latents depend on each other, the farther the aggregate posterior is from the
    product of its marginals. This part of :math:`\mathrm{KL}(q(z_0) \,\|\, p(z_0))` gets the
    weight :math:`\beta` in place of 1:

    .. math:: -\mathrm{ELBO} + (\beta - 1) \, \mathrm{KL}\Big(q(z_0) \,\Big\|\, \prod_{d=1}^D
        q(z_{0,d})\Big)

    It is a part of the KL for any prior, but only for a factorized one is the rest a sum of one KL
    per latent. The batch stands in for the data, see :func:`total_correlation`.

    Arguments:
        elbo: The estimator of the bound, given :math:`z_0`.
        beta: The weight :math:`\beta`.

    Raises:
        ValueError: If the weight is negative, or the estimator is given :math:`x`; and when it is
            evaluated, if there is not exactly one :math:`q(z_0 | x)`, a diagonal Gaussian.

    References:
        | Isolating Sources of Disentanglement in Variational Autoencoders (Chen et al., 2018),
          equation (4)
        | https://arxiv.org/abs/1802.04942

    Example:
        >>> from pyro_vaediff.infer import Timestep_ELBO
        >>> objective = TotalCorrelation(Timestep_ELBO(), beta=4.0)
    """

    def __init__(self, elbo: TermsELBO, beta: float):
        check_nonnegative("beta", beta)
        super().__init__(elbo, {})
        if isinstance(self.bound, Timestep_ELBO) and self.bound.collapse.conditioning == "x":
            raise ValueError(
                "the total correlation needs q(z_0 | x) as a site: conditioning='z_0', got 'x'"
            )
        self.beta, self.name = beta, f"total correlation, weight {beta}"

    def reweight(self, terms: list[Term]) -> list[Term]:
        site = posterior_site(terms)
        value = (self.beta - 1) * total_correlation(site["fn"], site["value"])
        value = scale_and_mask(value, site["scale"], site["mask"])
        return [*terms, Term(f"TC[{site['name']}]", value, "total correlation", site)]


def posterior_site(terms: list[Term]) -> dict[str, Any]:
    r"""Returns the guide site of :math:`q(z_0 | x)`, of which there must be one."""
    found = {
        term.site["name"]: term.site
        for term in terms
        if term.role in ("entropy", "latent")
        and term.site["infer"].get("role", "latent") in ("first", "latent")
    }
    if len(found) != 1:
        raise ValueError(
            "the total correlation needs one site of q(z_0 | x), not those of a hierarchy, got "
            f"{', '.join(found) or 'none'}"
        )
    return next(iter(found.values()))


def total_correlation(q: TorchDistribution, z: Tensor) -> Tensor:
    r"""Returns estimates of the total correlation of the latents of a batch, one per datum.

    .. math:: \log q(z_b) - \sum_{d=1}^D \log q_d(z_{b,d}), \qquad q(z) = \frac{1}{B}
        \sum_{b=1}^B q(z | x_b)

    Their mean is unbiased for the total correlation of this mixture. If the batch is only a part of
    the data, that is not the total correlation of all data: each latent has a component of its own,
    with a weight as large as :math:`1 / B`. The minibatch-weighted sampling of Chen et al.,
    equation (3), has the weights :math:`1 / N B` in place of :math:`1 / B` for :math:`N` data: a
    number that is larger by the constant :math:`(D - 1) \log N`, with the same gradient.

    Arguments:
        q: The posteriors :math:`q(z | x_b)`, diagonal Gaussians with batch shape :math:`(*, B)`.
        z: A latent of each, with shape :math:`(*, B, \dots)`.

    Returns:
        The estimates in nats, with shape :math:`(*, B)`.

    Raises:
        ValueError: If the posteriors are not diagonal Gaussians.
    """
    normals, shape, n = base_normal(q), q.batch_shape + q.event_shape, len(q.event_shape)
    if normals is None:
        raise ValueError(
            f"the total correlation needs a diagonal Gaussian, got a {type(q).__name__}"
        )
    loc, scale = (x.expand(shape).flatten(-n) for x in (normals.loc, normals.scale))
    z = z.flatten(-n)
    # Of each latent of a datum (third from last) under the posterior of each (second from last).
    log_probs = Normal(loc.unsqueeze(-3), scale.unsqueeze(-3)).log_prob(z.unsqueeze(-2))
    number = math.log(z.shape[-2])
    joint = log_probs.sum(-1).logsumexp(-1) - number
    return joint - (log_probs.logsumexp(-2) - number).sum(-1)
