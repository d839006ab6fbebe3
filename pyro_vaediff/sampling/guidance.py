r"""Classifier-free guidance: samples that show their context more than those of the model do.

A denoiser that was trained with dropped contexts predicts the noise with the context and without
it. Guidance moves away from the latter,

.. math:: \hat\epsilon_w(z_t, c) = (1 + w) \, \hat\epsilon(z_t, c) - w \, \hat\epsilon(z_t) .

In terms of scores, it adds :math:`w \nabla \log p_t(c | z_t)` at each noise level. **Guided samples
are not the model's**: their law is neither :math:`p(z_0 | c)`, which the bound is of, nor the one
that is proportional to :math:`p(z_0 | c) \, p(c | z_0)^w`, whose noisy marginals have other scores.
They are less diverse, and no number that is computed from them is a likelihood.

References:
    | Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), equation (6)
    | https://arxiv.org/abs/2207.12598
"""

from __future__ import annotations

import math
from typing import NoReturn

import pyro.distributions as dist
from torch import Tensor, nn

from ..nn.modes import shallow_copy
from ..priors import DiffusionPrior, Prior
from .solvers import check_diffusion

__all__ = ["guided"]


def guided(prior: Prior, w: float) -> DiffusionPrior:
    r"""Returns a prior with guidance, for any sampler. **It is not the model**, see above.

    It shares the parameters of the prior. Each of its steps costs two evaluations of the network. A
    learned variance is that with context.

    Arguments:
        prior: A diffusion prior that was trained with ``context_dropout``.
        w: The weight :math:`w` of the guidance: 0 is the prior with context, -1 that without.

    Returns:
        The prior, whose ``guide`` raises a ``ValueError``: it has no bound to be reported.

    Raises:
        ValueError: If the prior was made without ``context_dropout``, or the weight is not finite.

    Example:
        >>> import torch
        >>> from pyro_vaediff.sampling import ddim
        >>> prior = DiffusionPrior(2, 10, context_features=3, context_dropout=0.1)
        >>> c = torch.eye(3)
        >>> ddim(guided(prior, w=2.0), num_samples=3, num_steps=5, c=c).shape
        torch.Size([3, 2])
    """
    prior = check_diffusion(prior)
    if prior.denoiser.context.null is None:
        raise ValueError(
            "prior must have been trained with context_dropout, got one with 0: it has not learned "
            "to do without a context"
        )
    if not math.isfinite(w):
        raise ValueError(f"w must be a finite number, got {w}")
    return GuidedPrior(prior, w)


class GuidedPrior(DiffusionPrior):
    r"""A diffusion prior with guidance, see :func:`guided`."""

    def __init__(self, prior: DiffusionPrior, w: float):
        denoiser, context = shallow_copy(prior.denoiser), shallow_copy(prior.denoiser.context)
        assert context.null is not None  # as guided has checked
        context.dropout = 0.0
        denoiser.context = context
        denoiser.backbone = GuidedBackbone(denoiser.backbone, context.null, w)
        super().__init__(prior.event_shape, denoiser=denoiser)
        self.origin = prior.origin

    def guide(self, q_z0: dist.TorchDistribution, c: Tensor | None = None) -> NoReturn:
        raise ValueError(
            "a guided prior is for sampling only, as its bound is not that of the model: take the "
            "prior without guidance"
        )


class GuidedBackbone(nn.Module):
    r"""A backbone that is asked with and without the context."""

    # What a denoiser predicts is affine in the output of its backbone, and the weights of the two
    # answers sum to one: the outputs may be combined in place of the noise.
    def __init__(self, backbone: nn.Module, null: Tensor, w: float):
        super().__init__()
        self.backbone, self.null, self.w = backbone, null, w
        self.any_batch = getattr(backbone, "any_batch", False)

    def forward(self, z: Tensor, log_snr: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        answers = [self.backbone(z, log_snr, told) for told in (c, self.null.to(c).expand_as(c))]
        (given, *others), (free, *_) = (a if isinstance(a, tuple) else (a,) for a in answers)
        return (1 + self.w) * given - self.w * free, *others
