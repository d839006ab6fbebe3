r"""Bounds as functions of log-weights, and what their gradients are made of."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Bound",
    "DoublyReparameterized",
    "GeneralizedDoublyReparameterized",
    "Gradient",
    "StickingTheLanding",
    "log_mean_exp",
]


class Bound(NamedTuple):
    r"""A bound and its derivatives.

    Arguments:
        value: The bound :math:`L` of each datum, with shape :math:`(*)`.
        first: The derivatives :math:`c_k = \partial L / \partial \log w_k`, with shape :math:`(K,
            *)`.
        second: The second ones :math:`c'_k = \partial^2 L / \partial (\log w_k)^2`, with shape
            :math:`(K, *)`.
    """

    value: Tensor
    first: Tensor
    second: Tensor


def log_mean_exp(log_w: Tensor, groups: int = 1) -> Bound:
    r"""Returns the mean over groups of the log-mean-exp of the weights in each group.

    .. math:: \frac{1}{M} \sum_{m=1}^M \log \frac{1}{K} \sum_{k=1}^K w_{mk}

    With one group, it is the bound of an importance-weighted autoencoder. With as many groups as
    there are weights, it is the ELBO.

    Arguments:
        log_w: The logarithms of the weights, with shape :math:`(M K, *)`.
        groups: The number of groups :math:`M`.

    Example:
        >>> log_mean_exp(torch.tensor([1.0, 3.0]).log()).value.exp()
        tensor(2.)
    """
    log_w = log_w.unflatten(0, (groups, -1))
    share = log_w.softmax(1)
    value = (log_w.logsumexp(1) - math.log(log_w.shape[1])).mean(0)
    first, second = (x.flatten(0, 1) / groups for x in (share, share * (1 - share)))
    return Bound(value, first, second)


class Gradient:
    r"""The gradient as automatic differentiation gives it: both the score and the path."""

    #: Whether the latents of the model are reparameterized as well.
    generalized = False

    def score(self, bound: Bound) -> Tensor:
        r"""Returns the weights :math:`s_k` of the score, with shape :math:`(K, *)`."""
        return bound.first

    def path(self, bound: Bound) -> Tensor:
        r"""Returns the weights :math:`a_k` of the path, with shape :math:`(K, *)`."""
        return bound.first


class StickingTheLanding(Gradient):
    r"""The path alone. What it leaves out has mean zero for one sample; for more it is **biased**.

    References:
        | Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference
          (Roeder et al., 2017)
        | https://arxiv.org/abs/1703.09194
    """

    def score(self, bound: Bound) -> Tensor:
        return torch.zeros_like(bound.first)


class DoublyReparameterized(StickingTheLanding):
    r"""The path alone, which takes the mean of the score in.

    The score is reparameterized once more: :math:`E[c_k \nabla_\psi \log q(z^k)] = E[c'_k \,
    (\partial \log w_k / \partial z^k) \nabla_\psi z^k]`. For a log-mean-exp with the normalized
    weights :math:`\tilde w_k`, the path has the weights :math:`c_k - c'_k = \tilde w_k^2`.

    References:
        | Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al.,
          2018), equation (8)
        | https://arxiv.org/abs/1810.04152
    """

    def path(self, bound: Bound) -> Tensor:
        return bound.first - bound.second


class GeneralizedDoublyReparameterized(DoublyReparameterized):
    r"""The same for the latents of the model, which must be Gaussian.

    The parameters of a prior :math:`p_\phi(z)` have a score as well, :math:`c_k \nabla_\phi \log
    p_\phi(z^k)`. With the noise from which the prior would have made :math:`z^k`, and which is
    then held fixed, :math:`z^k` is a function of :math:`\phi` and that score has the mean of

    .. math:: \left( c_k \frac{\partial \log p(x | z^k)}{\partial z^k} - (c_k - c'_k)
        \frac{\partial \log w_k}{\partial z^k} \right) \nabla_\phi z^k .

    References:
        | Generalized Doubly Reparameterized Gradient Estimators (Bauer & Mnih, 2021)
        | https://arxiv.org/abs/2101.11046
    """

    generalized = True
