r"""Randomized quasi-Monte Carlo: noise from scrambled Sobol points.

:math:`n` points of a Sobol sequence fill the unit cube more evenly than independent ones. Scrambled
at random, each of them is still uniform, so that a mean over the points has no bias; its variance
falls faster than :math:`1 / n` for smooth functions of few dimensions. The sites of a program take
coordinates of the same points, so that they are even *jointly*: the noise of :math:`z_0`, the
timestep :math:`t` and the noise of :math:`z_t`.

References:
    | Quasi-Monte Carlo Variational Inference (Buchholz et al., 2018)
    | https://arxiv.org/abs/1807.01604

    | Scrambled Net Variance for Integrals of Smooth Functions (Owen, 1997)
    | https://doi.org/10.1214/aos/1031594731
"""

from __future__ import annotations

from typing import cast

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.quasirandom import SobolEngine

from ..diffusion import base_normal
from .proposals import Timesteps

__all__ = ["QuasiRandom"]

GRID = 2**SobolEngine.MAXBIT  # points have whole multiples of its inverse


class QuasiRandom(Messenger):
    r"""An effect handler that draws Gaussian noise and timesteps from scrambled Sobol points.

    The elements of the given plates are the points; they must be draws of one estimate, which meet
    only in the mean of a loss: data, timesteps of a datum, vectorized particles. Along other
    dimensions, such as that of the data if they are not named, points are shifted independently of
    each other. Other distributions stay as they are. The points are from torch's generator on the
    CPU. They are most even if their number is a power of two, and if data are in random order:
    every second point is in the same half, and so on.

    Around a guide, ``QuasiRandom("data")(guide)``, the handler has precedence over
    :class:`~pyro_vaediff.infer.Antithetic`. As a context around an estimator, ``with
    QuasiRandom("data"): svi.step(x)``, it draws what is left to be drawn, and sees vectorized
    particles as well.

    Arguments:
        plates: The names of the plates. For the timesteps of each datum, that is
            ``"diffusion_timesteps"``; for those of a whole batch, ``"data"`` as well.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def guide():
        ...     with pyro.plate("data", 8):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> z = QuasiRandom("data")(guide)()
        >>> (8 * dist.Normal(0.0, 1.0).cdf(z)).long().sort().values  # one in each eighth
        tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """

    def __init__(self, *plates: str):
        super().__init__()
        self.plates = plates

    def __enter__(self) -> QuasiRandom:
        self.coordinate = 1  # the next one, after that of timesteps
        return super().__enter__()

    def _pyro_sample(self, msg: Message) -> None:
        if msg["done"] or msg["value"] is not None or site_is_subsample(msg):
            return
        fn = cast(TorchDistribution, msg["fn"])
        n = len(fn.batch_shape)
        dims = [n + f.dim for f in msg["cond_indep_stack"] if f.name in self.plates and f.dim]
        if not dims:
            return
        if isinstance(fn, Timesteps):
            u = uniform(fn.batch_shape, fn.event_shape, sorted(dims), coordinate=0)
            msg["value"] = fn.icdf(u.to(fn.probs.device))
        elif fn.has_rsample and (normal := base_normal(fn)) is not None:
            if self.coordinate + fn.event_shape.numel() > SobolEngine.MAXDIM:
                self.coordinate = 1  # scrambled anew, a coordinate may be taken again
            u = uniform(fn.batch_shape, fn.event_shape, sorted(dims), self.coordinate)
            self.coordinate += fn.event_shape.numel()
            msg["value"] = normal.loc + normal.scale * torch.special.ndtri(u).to(fn.mean)


def uniform(shape: Size, event_shape: Size, dims: list[int], coordinate: int) -> Tensor:
    r"""Returns scrambled Sobol points, uniform in :math:`(0, 1)` and in float64.

    Arguments:
        shape: The batch shape.
        event_shape: The event shape, each number of which is a coordinate.
        dims: The dimensions of the batch along which the points are; points are shifted
            independently along the others.
        coordinate: The first coordinate.

    Returns:
        The points, with shape ``shape + event_shape``.
    """
    others = [dim for dim in range(len(shape)) if dim not in dims]
    repeats, n = (Size(shape[dim] for dim in part).numel() for part in (others, dims))
    d = event_shape.numel()
    engine = SobolEngine(coordinate + d, scramble=True)
    points = (GRID * engine.draw(n, dtype=torch.float64)[:, coordinate:]).long()
    # A digital shift leaves points as even as they are. Inside of a cell of the grid, they are
    # uniform.
    points = points ^ torch.randint(GRID, (repeats, 1, d))
    u = (points + torch.rand(repeats, n, d, dtype=torch.float64)) / GRID
    order = others + dims
    u = u.clamp(1e-16, 1 - 1e-16).reshape([shape[dim] for dim in order] + list(event_shape))
    back = [order.index(dim) for dim in range(len(shape))]
    return u.permute(*back, *range(len(shape), u.ndim)).contiguous()
