r"""Where a run starts: from another run, or from its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..evaluate import preprocess
from ..priors import Prior
from ..vae import VAE
from . import distributed
from .config import TrainConfig
from .runs import load_run
from .splits import Splits

__all__ = ["fitting_weights", "initialize", "is_settled", "stands_in"]

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


def is_settled(losses: Sequence[float]) -> bool:
    r"""Returns ``True`` if an encoder has settled, by the losses of its epochs with N(0, I).

    It has settled once the later half of the epochs gained less than a tenth of what all of them
    did, whatever the unit of the loss, and however many epochs there will be.

    Arguments:
        losses: The training losses by epoch, in nats per datum.

    Example:
        >>> falling = [100 / epoch for epoch in range(1, 100)]
        >>> next(n for n in range(99) if is_settled(falling[:n]))
        11
    """
    if len(losses) < 4:
        return False
    first, middle, last = losses[0], losses[(len(losses) - 1) // 2], losses[-1]
    return middle - last < 0.1 * (first - last) or last >= first


def stands_in(config: TrainConfig, losses: Sequence[float], steps_per_epoch: int) -> bool:
    r"""Returns whether N(0, I) stands in for the prior in the next epoch.

    It does for so many epochs, or with ``"auto"`` until the encoder :func:`is_settled`, but for no
    more than a quarter of the epochs in which everything is trained: the prior needs the others.

    Arguments:
        config: The configuration.
        losses: The training losses of the epochs so far, in nats per datum.
        steps_per_epoch: The number of steps in an epoch.
    """
    if config.gaussian_epochs != "auto":
        return len(losses) < int(config.gaussian_epochs)
    steps = config.epochs * steps_per_epoch
    late = len(losses) * steps_per_epoch >= min(steps, config.max_steps or steps) / 4
    return not late and not any(is_settled(losses[:n]) for n in range(len(losses) + 1))
