r"""The negative ELBO of a set of data, and how the functions of this package go through one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pyro
import pyro.infer
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..arguments import check_seed, check_whole
from ..infer import Estimator, Reweighted, Timestep_ELBO, elbo_terms
from ..infer.terms import differentiable_terms
from ..likelihoods import check_range
from ..nn.modes import eval_mode
from ..priors import HierarchicalPrior
from ..vae import VAE

__all__ = [
    "evaluate",
    "evaluating",
    "in_batches",
    "kl_by_timestep",
    "preprocess",
    "value_elbo",
]

#: Data in one tensor, in batches or in a data set of torch, with or without a context.
Data = Tensor | Iterable | Dataset


def value_elbo(k: int = 32) -> Timestep_ELBO:
    r"""Returns an estimator of values of the bound, such as those of validation in training.

    Antithetic pairs would lower the noise of gradients; that of values is lowered by twice as many
    different timesteps.

    Arguments:
        k: The number of timesteps per datum.
    """
    return Timestep_ELBO("importance", k=k, antithetic=False, entropy="exact")


@torch.no_grad()
def evaluate(
    vae: VAE,
    data: Data,
    elbo: Estimator | None = None,
    *,
    c: Tensor | None = None,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, float]:
    r"""Returns the mean terms of the negative ELBO over data, in nats per datum.

    The random numbers are those of ``seed``, whatever was drawn before, and the state of the
    global generators is restored.

    Arguments:
        vae: The VAE. It is evaluated in eval mode, on the device of its parameters.
        data: The data, see :func:`in_batches`.
        elbo: The estimator. By default, all timesteps and exact entropies:
            ``Timestep_ELBO("all", entropy="exact")``.
        c: The context, with shape :math:`(N, *)`.
        batch_size: The number of data that are evaluated at once.
        seed: The seed of dequantization, latents and timesteps.
        progress: Whether to show a progress bar.

    Returns:
        The terms by name; their sum is the negative ELBO.

    Raises:
        ValueError: If there are no data, or an argument is out of range.
    """
    elbo = Timestep_ELBO("all", entropy="exact") if elbo is None else elbo
    check_bound(elbo)
    totals: dict[str, Tensor] = {}
    count = 0
    with evaluating(vae, seed):
        for x, c_x in in_batches(vae, data, c, batch_size, progress and "evaluation"):
            for name, term in differentiable_terms(elbo, vae.model, vae.guide, x, c_x).items():
                totals[name] = totals.get(name, 0.0) + term.double()
            count += len(x)
    return {name: float(total / count) for name, total in totals.items()}


def check_bound(elbo: object) -> None:
    r"""Raises a ``ValueError`` unless an estimator is one of a bound, as all reports need it."""
    if isinstance(elbo, Reweighted):
        raise ValueError(
            f"elbo must estimate a bound, got Reweighted ({elbo.name}): use elbo.bound"
        )
    if not isinstance(elbo, pyro.infer.ELBO):
        raise ValueError(f"elbo must be an estimator of the ELBO, got {elbo!r}")


@torch.no_grad()
def kl_by_timestep(vae: VAE, x: Tensor, c: Tensor | None = None) -> Tensor:
    r"""Returns :math:`\mathrm{KL}(q(z_{t-1} | z_t, x) \,\|\, p(z_{t-1} | z_t))` for :math:`t = 1,
    \dots, T`, averaged over data, in nats.

    Together with :math:`\mathrm{KL}(q(z_T | x) \,\|\, p(z_T))` they sum to the KL divergence of the
    whole chain.

    Arguments:
        vae: A VAE with a diffusion prior and a Gaussian encoder.
        x: The data in x-space, with shape :math:`(B, *)`.
        c: The context, with shape :math:`(B, *)`.

    Returns:
        The KLs, with shape :math:`(T,)`.

    Raises:
        ValueError: If :math:`q(z_0 | x)` is not Gaussian, or if there is more than one.
    """
    if isinstance(vae.prior, HierarchicalPrior):
        raise ValueError(
            "vae.prior must be a DiffusionPrior, got a HierarchicalPrior: use evaluate"
        )
    elbo = Timestep_ELBO("all", conditioning="x")
    with in_eval_mode(vae):
        terms = elbo_terms(vae.model, vae.guide, x, c, elbo=elbo)
    first = terms["z_0"].mean().reshape(1)
    return torch.cat([first, terms["z_s"].mean(-1)]) if "z_s" in terms else first


def in_batches(
    vae: VAE,
    data: Data,
    c: Tensor | None = None,
    batch_size: int = 100,
    progress: str | bool = False,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    r"""Yields data in their order and in batches, as the networks see them.

    Images in ``uint8`` go through ``vae.space``, everything else is in x-space already. Both are
    moved to the device and the dtype of the VAE.

    Arguments:
        vae: The VAE.
        data: The data: a tensor with shape :math:`(N, *)`, a data set of torch, or an iterable over
            batches. An item may also be a pair of a datum (a batch) and its context.
        c: The context of a tensor of data, with shape :math:`(N, *)`.
        batch_size: The number of data in a batch, unless they come in batches.
        progress: The label of a progress bar, or ``False`` for none.

    Yields:
        The data, with shape :math:`(B, *)`, and their context if there is one.

    Raises:
        ValueError: If there are no data, or images in ``uint8`` and no pixel space.
    """
    check_whole("batch_size", batch_size)
    total = None
    if isinstance(data, Tensor):
        if data.dtype == torch.uint8 and vae.space is not None:
            check_range(data, vae.space.levels)
        total = math.ceil(len(data) / batch_size)
        rows = (data,) if c is None else (data, c)
        data = zip(*(x.split(batch_size) for x in rows), strict=True)
    elif isinstance(data, Dataset):
        data = DataLoader(data, batch_size)
    elif c is not None:
        raise ValueError("c must be None if data are batches: let each be a pair of x and c")
    parameter, count = next(vae.parameters()), 0
    for batch in tqdm(data, progress or None, total, leave=False, disable=not progress):
        x, c = (*((batch,) if isinstance(batch, Tensor) else batch), None)[:2]
        if len(x) > 0:
            count += len(x)
            yield preprocess(vae, x), None if c is None else to(c, parameter)
    if count == 0:
        raise ValueError("data must hold at least one datum")


def preprocess(vae: VAE, x: Tensor) -> Tensor:
    r"""Returns a batch of data as the networks see them.

    Arguments:
        vae: The VAE.
        x: Images in ``uint8``, or data in x-space, with shape :math:`(B, *)`.
    """
    parameter = next(vae.parameters())
    x = x.to(parameter.device)
    if x.dtype == torch.uint8:
        if vae.space is None:
            raise ValueError("images are uint8, but vae.space is None: give the VAE a PixelSpace")
        x = vae.space.preprocess(x)
    return to(x, parameter)


def to(x: Tensor, parameter: Tensor) -> Tensor:
    return x.to(parameter if x.is_floating_point() else parameter.device)


@contextmanager
def evaluating(vae: VAE, seed: int) -> Iterator[torch.device]:
    r"""Puts a VAE in eval mode and seeds the generators; both are restored afterwards.

    It yields the device of the VAE.
    """
    check_seed(seed)
    device = next(vae.parameters()).device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        in_eval_mode(vae),
    ):
        torch.manual_seed(seed)
        yield device


@contextmanager
def in_eval_mode(vae: VAE) -> Iterator[None]:
    r"""Puts a VAE in eval mode, and restores the mode of each of its modules afterwards.

    Nothing that its programs register stays in the global parameter store.
    """
    with eval_mode(vae), pyro.get_param_store().scope():
        yield
