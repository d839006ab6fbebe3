r"""Antithetic noise: every Gaussian draw together with its mirror image.

A gradient at :math:`z = m + s \epsilon` is nearly linear in the noise :math:`\epsilon` wherever the
scale :math:`s` is small against the curvature of what is differentiated. Its linear part has mean
zero: it is only noise, and it cancels in the mean over the pair :math:`(\epsilon, -\epsilon)`. Each
of the two has the same law as a single draw, so that there is no bias.

References:
    | A New Monte Carlo Technique: Antithetic Variates (Hammersley & Morton, 1956)
    | https://doi.org/10.1017/S0305004100031455

    | Differentiable Antithetic Sampling for Variance Reduction in Stochastic Variational Inference
      (Wu et al., 2019)
    | https://arxiv.org/abs/1810.02555
"""

from __future__ import annotations

from typing import cast

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Size

from ..diffusion import base_normal
from .proposals import Timesteps

__all__ = ["Antithetic"]


class Antithetic(Messenger):
    r"""An effect handler that draws the two halves of a plate as mirror images of each other.

    It applies to the latent sites inside of one of the given plates, whose elements must be draws
    of one estimate: copies that meet only in the mean of a loss. A diagonal Gaussian gets the
    noise :math:`\epsilon` in the first half and :math:`-\epsilon` in the second, about the mean
    and in the scale that it has in each. Timesteps are drawn for the first half and shared with the
    second. Other distributions stay as they are, and so does a plate of an odd size.

    Arguments:
        plates: The names of the plates. A site inside of several is mirrored along the first.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def guide():
        ...     with pyro.plate("pair", 2):
        ...         return pyro.sample("z", dist.Normal(3.0, 1.0))
        >>> Antithetic("pair")(guide)().mean()
        tensor(3.)
    """

    def __init__(self, *plates: str):
        super().__init__()
        self.plates = plates

    def _pyro_sample(self, msg: Message) -> None:
        if msg["done"] or msg["value"] is not None or site_is_subsample(msg):
            return
        dims = {frame.name: frame.dim for frame in msg["cond_indep_stack"]}
        dim = next((dims[name] for name in self.plates if name in dims), None)
        fn = cast(TorchDistribution, msg["fn"])
        if dim is None or fn.batch_shape[dim] % 2:
            return
        half = list(fn.batch_shape)
        half[dim] //= 2
        if isinstance(fn, Timesteps):
            t = fn.expand(Size(half)).sample()
            msg["value"] = torch.cat([t, t], dim)
        elif fn.has_rsample and (normal := base_normal(fn)) is not None:
            dim -= len(fn.event_shape)
            noise = torch.randn(*half, *fn.event_shape, dtype=fn.mean.dtype, device=fn.mean.device)
            msg["value"] = normal.loc + normal.scale * torch.cat([noise, -noise], dim)
