r"""Where a run starts: from another run, or from its data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..evaluate import preprocess
from ..priors import Prior
from ..vae import VAE
from . import distributed
from .runs import load_run
from .splits import Splits

__all__ = ["fitting_weights", "initialize"]

INITIAL = 2000  # the number of training data that a prior may start from


def initialize(vae: VAE, data: Splits, init: str | Path | None, seed: int) -> None:
    r"""Starts from another run, and the prior from training data if it has a use for them.

    Arguments:
        vae: The VAE.
        data: The data.
        init: The run directory or the checkpoint, if there is one.
        seed: The seed of the noise that the pixel space adds.
    """
    if init is not None:
        state = distributed.from_main(lambda: load_run(init))
        groups = state["data"].get("groups")
        if groups != data.groups:
            raise ValueError(
                f"cannot start from {init}: it was trained on other splits, and may have seen "
                f"the test images (groups={groups}, not {data.groups})"
            )
        if fitting_weights(vae, state["vae"], init):
            return
    if type(vae.prior).initialize is not Prior.initialize:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vae.prior.initialize(preprocess(vae, data.train.x[:INITIAL]))


def fitting_weights(vae: VAE, saved: Mapping[str, Tensor], path: str | Path) -> bool:
    r"""Loads weights of another run, and those of its prior if it is of the same kind.

    Arguments:
        vae: The VAE, whose encoder and decoder must fit.
        saved: The weights.
        path: Where they are from, for the message.

    Returns:
        Whether the weights of the prior were loaded.
    """
    own = {name for name in vae.state_dict() if name.startswith("prior.")}
    same = own == {name for name in saved if name.startswith("prior.")}
    kept = {k: v for k, v in saved.items() if same or not k.startswith("prior.")}
    try:
        missing, _ = vae.load_state_dict(kept, strict=False)
        if any(not name.startswith("prior.") for name in missing):
            raise RuntimeError(f"it lacks {missing[0]}")
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot start from {path}: other networks ({reason})") from error
    return same
