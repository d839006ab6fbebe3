r"""The negative ELBO of a set of images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import pyro.infer
import torch
from torch import Tensor
from tqdm import tqdm

from ..arguments import check_seed
from ..data import batches
from ..infer import Timestep_ELBO
from ..infer.terms import differentiable_terms
from ..likelihoods import check_range
from ..vae import VAE

__all__ = ["evaluate", "evaluating", "in_batches", "preprocess", "value_elbo"]


def preprocess(vae: VAE, images: Tensor, levels: int) -> Tensor:
    r"""Returns images as the VAE's likelihood sees them, in the dtype of its parameters.

    Arguments:
        vae: The VAE, whose decoder has a likelihood.
        images: The images, uint8 with shape :math:`(B, C, H, W)`.
        levels: The number of values of a pixel.
    """
    return vae.decoder.likelihood.preprocess(images, levels).to(next(vae.parameters()).dtype)


def value_elbo(k: int = 32) -> Timestep_ELBO:
    r"""Returns the estimator of values that stand for the bound, such as while models are trained.

    Antithetic pairs would lower the noise of gradients; that of values is lowered by twice as many
    different timesteps.

    Arguments:
        k: The number of timesteps per datum.
    """
    return Timestep_ELBO("importance", k=k, antithetic=False, entropy="exact")


@torch.no_grad()
def evaluate(
    vae: VAE,
    images: Tensor,
    levels: int,
    elbo: pyro.infer.ELBO | None = None,
    *,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, float]:
    r"""Returns the mean terms of the negative ELBO over images, in nats per datum.

    The random numbers are those of ``seed``, whatever was drawn before, and the state of the
    global generators is restored.

    Arguments:
        vae: The VAE. It is evaluated in eval mode, on the device of its parameters.
        images: The images, uint8 with shape :math:`(N, C, H, W)`.
        levels: The number of values of a pixel.
        elbo: The estimator. By default, all timesteps and exact entropies:
            ``Timestep_ELBO("all", entropy="exact")``.
        batch_size: The number of images that are evaluated at once.
        seed: The seed of dequantization, latents and timesteps.
        progress: Whether to show a progress bar.

    Returns:
        The terms by name; their sum is the negative ELBO.

    Raises:
        ValueError: If the images are not what the likelihood is for, or there are none, or another
            argument is out of range.
    """
    elbo = Timestep_ELBO("all", entropy="exact") if elbo is None else elbo
    if not isinstance(elbo, pyro.infer.ELBO):
        raise ValueError(f"elbo must be an estimator of the ELBO, got {elbo!r}")
    totals: dict[str, Tensor] = {}
    with evaluating(vae, seed) as device:
        for x in in_batches(vae, images, levels, batch_size, device, progress and "evaluation"):
            for name, term in differentiable_terms(elbo, vae.model, vae.guide, x).items():
                totals[name] = totals.get(name, 0.0) + term.double() / len(images)
    return {name: float(term) for name, term in totals.items()}


def in_batches(
    vae: VAE,
    images: Tensor,
    levels: int,
    batch_size: int,
    device: torch.device,
    progress: str | bool = False,
) -> Iterator[Tensor]:
    r"""Yields images in their order, as the VAE's likelihood sees them.

    Arguments:
        vae: The VAE.
        images: The images, uint8 with shape :math:`(N, C, H, W)`.
        levels: The number of values of a pixel.
        batch_size: The number of images that are yielded at once.
        device: Where they go.
        progress: The label of a progress bar, or ``False`` for none.
    """
    if levels != 256:  # every uint8 is below 256
        check_range(images, levels)
    loader = batches(images, batch_size, shuffle=False, device=device)
    length = math.ceil(len(images) / batch_size)
    for batch in tqdm(loader, progress or None, length, leave=False, disable=not progress):
        yield preprocess(vae, batch, levels)


@contextmanager
def evaluating(vae: VAE, seed: int) -> Iterator[torch.device]:
    r"""Puts a VAE in eval mode and seeds the generators; both are restored afterwards.

    It yields the device of the VAE.
    """
    check_seed(seed)
    device, training = next(vae.parameters()).device, vae.training
    vae.eval()
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            pyro.get_param_store().scope(),
        ):
            torch.manual_seed(seed)
            yield device
    finally:
        vae.train(training)
