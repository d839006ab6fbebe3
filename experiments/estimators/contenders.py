r"""Estimators that looked promising and did not win, kept where they can be measured again.

Each of them is unbiased. What they gain and what they cost is in the tables of the bench.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vaediff.diffusion import base_normal
from pyro_vaediff.infer import LossAwareTimesteps, QuasiRandom, Timestep_ELBO
from pyro_vaediff.infer.collapse import PLATE
from pyro_vaediff.priors import DiffusionPrior

__all__ = [
    "Coupled",
    "GradientAware",
    "Orthogonal",
    "Orthogonal_ELBO",
    "Shared",
    "Shared_ELBO",
    "SobolPerBatch_ELBO",
    "SobolPerDatum_ELBO",
]


class GradientAware(LossAwareTimesteps):
    r"""Timesteps in proportion to the gradient with respect to the denoiser's output.

    With a fixed variance, :math:`L_t = \|\tilde\mu_t - \mu_\phi\|^2 / 2 \sigma_t^2`, and the
    gradient with respect to the output of the network has the norm :math:`(g_t / \sigma_t) \sqrt{2
    L_t}`: the proposal that minimizes the variance of the *gradient* is a known factor times the
    root of the terms, which are learned while training.

    References:
        | Not All Samples Are Created Equal: Deep Learning with Importance Sampling
          (Katharopoulos & Fleuret, 2018)
        | https://arxiv.org/abs/1803.00942
    """

    def forward(self, prior: DiffusionPrior, conditioning: str) -> Tensor:
        super().forward(prior, conditioning)  # which makes the table of squares
        kernel = prior.denoiser.kernel
        gain, sigma = (x.reshape(len(x), -1).mean(1) for x in (kernel.gains.abs(), kernel.sigmas))
        factor = gain / sigma
        norm = (factor * self.squares.pow(0.25))[2:] + torch.finfo(self.squares.dtype).tiny
        return (1 - self.uniform) * norm / norm.sum() + self.uniform / len(norm)


class Coupled(Messenger, ABC):
    r"""An effect handler that couples the noises of a datum's timesteps.

    The noise of every timestep must still be a standard normal. Latents are flattened.

    Arguments:
        plate: The name of the plate of the timesteps.
    """

    def __init__(self, plate: str):
        super().__init__()
        self.plate = plate

    @abstractmethod
    def couple(self, noise: Tensor) -> Tensor:
        r"""Returns coupled noises from independent ones, with shape :math:`(*, k, D)`."""

    def _pyro_sample(self, msg: dict) -> None:
        dims = {frame.name: frame.dim for frame in msg["cond_indep_stack"]}
        normal = base_normal(msg["fn"])
        if msg["done"] or self.plate not in dims or normal is None:
            return
        fn, dim, like = msg["fn"], dims[self.plate] - 1, msg["fn"].mean
        shape = (*fn.batch_shape, fn.event_shape.numel())
        noise = torch.randn(shape, dtype=like.dtype, device=like.device).movedim(dim, -2)
        noise = self.couple(noise).movedim(-2, dim).unflatten(-1, fn.event_shape)
        msg["value"] = normal.loc + normal.scale * noise


class Orthogonal(Coupled):
    r"""Makes the noises of a datum's timesteps orthogonal, in groups of :math:`D`."""

    def couple(self, noise: Tensor) -> Tensor:
        r"""Returns coupled noises from independent ones, with shape :math:`(*, k, D)`."""
        groups = [torch.linalg.qr(rows.mT)[0].mT for rows in noise.split(noise.shape[-1], dim=-2)]
        # The signs of QR are not uniform: those of the noise are.
        signs = torch.randn_like(noise[..., :1]).sign()
        length = torch.randn_like(noise).norm(dim=-1, keepdim=True)
        return length * signs * torch.cat(groups, -2)


class Shared(Coupled):
    r"""Gives all timesteps of a datum the same noise: a point of the same path at many times."""

    def couple(self, noise: Tensor) -> Tensor:
        r"""Returns coupled noises from independent ones, with shape :math:`(*, k, D)`."""
        return noise[..., :1, :].expand_as(noise)


class _Handled_ELBO(Timestep_ELBO):
    handler: Callable[[], Messenger]

    def _get_trace(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[Trace, Trace]:
        return super()._get_trace(model, type(self).handler()(guide), args, kwargs)


class Orthogonal_ELBO(_Handled_ELBO):
    r"""A :class:`Timestep_ELBO` whose timesteps have orthogonal noise."""

    handler = partial(Orthogonal, PLATE)


class Shared_ELBO(_Handled_ELBO):
    r"""A :class:`Timestep_ELBO` whose timesteps have the same noise."""

    handler = partial(Shared, PLATE)


class SobolPerDatum_ELBO(_Handled_ELBO):
    r"""A :class:`Timestep_ELBO` whose :math:`(t, \epsilon)` of a datum are Sobol points."""

    handler = partial(QuasiRandom, *Timestep_ELBO.mirrored_plates)


class SobolPerBatch_ELBO(_Handled_ELBO):
    r"""A :class:`Timestep_ELBO` whose :math:`(z_0, t, \epsilon)` of a batch are Sobol points."""

    handler = partial(QuasiRandom, "data", *Timestep_ELBO.mirrored_plates)
