r"""Samples of priors and of VAEs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from ..arguments import check_choice, check_whole
from ..priors import DiffusionPrior, HierarchicalPrior, Prior
from ..vae import VAE, call, posterior
from .solvers import check_diffusion, ddim, dpm_solver, heun, on_grid

__all__ = [
    "SAMPLERS",
    "ancestral",
    "interpolate",
    "num_evaluations",
    "point",
    "reconstruct",
    "sample",
    "trajectory",
]


def point(p: dist.TorchDistribution) -> Tensor:
    r"""Returns the mean of a distribution, or else its mode, or else a sample.

    Arguments:
        p: The distribution.

    Example:
        >>> point(dist.Normal(1.0, 2.0))
        tensor(1.)
    """
    for name in ("mean", "mode"):
        try:
            return getattr(p, name)
        except NotImplementedError:
            pass
    return p.sample()


@torch.no_grad()
def ancestral(
    prior: Prior,
    num_samples: int,
    num_steps: int | None = None,
    c: Tensor | None = None,
    grid: str = "time",
) -> Tensor:
    r"""Returns samples of :math:`z_0` from the program of any prior, or of one with other steps.

    Arguments:
        prior: The prior.
        num_samples: The number of samples :math:`N`.
        num_steps: The number of steps of a diffusion prior, or of each in a hierarchy; ``None`` for
            the program as it is.
        c: The context, with shape :math:`(N, *)`.
        grid: Where these steps are, one of :data:`~pyro_vaediff.sampling.grids.GRIDS`.

    Returns:
        The latents, with shape :math:`(N, *\mathrm{event})`.
    """
    check_whole("num_samples", num_samples)
    if num_steps is not None and isinstance(prior, HierarchicalPrior):
        prior = prior.with_diffusions(lambda group: on_grid(group, num_steps, grid))
    elif num_steps is not None:
        prior = on_grid(prior, num_steps, grid)
    # In a parameter store of its own: sampling leaves nothing behind in the global one.
    with pyro.get_param_store().scope(), pyro.plate("samples", num_samples):
        return prior.model(c)


#: The samplers by name. The last three are for a :class:`~pyro_vaediff.priors.DiffusionPrior`.
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "heun": heun,
    "dpm-solver": dpm_solver,
}


def sample(
    prior: Prior,
    num_samples: int,
    c: Tensor | None = None,
    sampler: str = "ancestral",
    num_steps: int | None = None,
    grid: str = "time",
) -> Tensor:
    r"""Returns samples of :math:`p(z_0)`, by default from the prior's program.

    Arguments:
        prior: The prior.
        num_samples: The number of samples :math:`N`.
        c: The context, with shape :math:`(N, *)`.
        sampler: How a diffusion prior is sampled, one of :data:`SAMPLERS`; other priors only have
            ``"ancestral"``, their program.
        num_steps: The number of steps of a diffusion prior, or of each in a hierarchy, by default
            those of its own grid, which :meth:`~pyro_vaediff.priors.DiffusionPrior.with_steps` sets
            to any times.
        grid: Where these steps are, one of :data:`~pyro_vaediff.sampling.grids.GRIDS`.

    Returns:
        The latents, with shape :math:`(N, *\mathrm{event})`.

    Raises:
        ValueError: If the sampler or the grid is unknown, or not for that prior.

    Example:
        >>> from pyro_vaediff import DiffusionPrior
        >>> prior = DiffusionPrior(2, num_timesteps=1000)
        >>> sample(prior, 5, sampler="dpm-solver", num_steps=10).shape
        torch.Size([5, 2])
    """
    check_choice("sampler", sampler, SAMPLERS)
    return SAMPLERS[sampler](prior, num_samples, num_steps, c=c, grid=grid)


def num_evaluations(
    prior: DiffusionPrior, sampler: str = "ancestral", num_steps: int | None = None
) -> int:
    r"""Returns how often a sampler evaluates the network of a diffusion prior.

    Arguments:
        prior: The prior.
        sampler: The sampler, one of :data:`SAMPLERS`.
        num_steps: The number of steps, by default that of the prior's own grid.

    Example:
        >>> from pyro_vaediff import DiffusionPrior
        >>> prior = DiffusionPrior(2, num_timesteps=1000)
        >>> [num_evaluations(prior, sampler, num_steps=10) for sampler in SAMPLERS]
        [10, 10, 19, 10]
    """
    check_choice("sampler", sampler, SAMPLERS)
    prior = check_diffusion(prior)
    n = prior.num_timesteps if num_steps is None else num_steps
    if SAMPLERS[sampler] is not heun:
        return n
    return 2 * n - bool(prior.schedule.original("log_snr")[0].isinf().all())


@torch.no_grad()
def trajectory(
    prior: DiffusionPrior, num_samples: int, num_frames: int = 9, c: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Returns frames of sampled chains :math:`z_T \to \dots \to z_0`.

    Arguments:
        prior: The prior.
        num_samples: The number of chains :math:`N`.
        num_frames: The number of frames :math:`F` from :math:`T` to 0, ends included.
        c: The context, with shape :math:`(N, *)`.

    Returns:
        The times of the frames, with shape :math:`(F,)`, and the latents, with shape
        :math:`(F, N, *\mathrm{event})`. There are fewer frames if the chain is shorter.
    """
    prior = check_diffusion(prior)
    check_whole("num_samples", num_samples)
    check_whole("num_frames", num_frames, least=2)
    with pyro.get_param_store().scope(), pyro.plate("samples", num_samples):
        trace = poutine.trace(prior.model).get_trace(c)
    T = prior.num_timesteps
    times = torch.linspace(T, 0, min(num_frames, T + 1)).round().long()
    frames: list[Any] = [trace.nodes[f"z_{t}"]["value"] for t in times.tolist()]
    return times, torch.stack(frames)


@torch.no_grad()
def reconstruct(
    vae: VAE, x: Tensor, c: Tensor | None = None, num_groups: int | None = None
) -> Tensor:
    r"""Returns the :func:`point` of :math:`p(x | z_0)` at that of :math:`q(z_0 | x)`: the means.

    Arguments:
        vae: The VAE.
        x: The data, with shape :math:`(B, *)`.
        c: The context, with shape :math:`(B, *)`.
        num_groups: For a :class:`~pyro_vaediff.priors.HierarchicalPrior`, the number of groups from
            the top that are those of the data, where the others are drawn; all by default.

    Returns:
        The reconstructions, with the shape of ``x``.

    Raises:
        ValueError: If there are not so many groups.
    """
    q = call(vae.encoder, x, c)
    if num_groups is not None and not isinstance(vae.prior, HierarchicalPrior):
        raise ValueError(
            f"num_groups is for a HierarchicalPrior, got {num_groups} and a "
            f"{type(vae.prior).__name__}: leave it out"
        )
    if isinstance(vae.prior, HierarchicalPrior):
        with pyro.get_param_store().scope():
            z_0 = vae.prior.reconstruct(q, num_groups, c)
    else:
        z_0 = point(q)
    return point(call(vae.decoder, z_0, c))


@torch.no_grad()
def interpolate(
    vae: VAE, x: Tensor, y: Tensor, num_frames: int = 8, c: Tensor | None = None
) -> Tensor:
    r"""Returns images decoded on the line between the posterior means of two batches of data.

    Arguments:
        vae: The VAE.
        x: The data at one end, with shape :math:`(B, *)`.
        y: The data at the other end, with the same shape.
        num_frames: The number of frames :math:`F`, ends included.
        c: The context of both ends, with shape :math:`(B, *)`.

    Returns:
        The frames, with shape :math:`(F, B, *)`.
    """
    check_whole("num_frames", num_frames, least=2)
    if x.shape != y.shape:
        raise ValueError(f"y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    start, end = (point(posterior(vae, v, c)) for v in (x, y))
    weights = torch.linspace(0, 1, num_frames, dtype=start.dtype, device=start.device)
    z_0 = torch.lerp(start, end, weights.reshape(-1, *[1] * start.ndim)).flatten(0, 1)
    c = None if c is None else c.repeat(num_frames, *[1] * (c.ndim - 1))
    return point(call(vae.decoder, z_0, c)).unflatten(0, (num_frames, len(x)))
