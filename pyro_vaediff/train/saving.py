r"""The memory of a training run: its best model, its checkpoints, and how it resumes from them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_whole
from ..files import write_csv
from ..infer import Estimator
from ..vae import VAE
from . import distributed
from .auto_k import AutoK
from .average import WeightAverage
from .config import ModelConfig, TrainConfig
from .optim import TorchOptim
from .runs import (
    BEST,
    CHECKPOINT,
    METRICS,
    compare_settings,
    describe_elbo,
    load_run,
    save_checkpoint,
)
from .splits import Splits

__all__ = ["SavedRun"]

Record = dict[str, float]


class NonFiniteError(FloatingPointError):
    r"""A loss or a gradient that is NaN or infinite."""


class SavedRun:
    r"""The part of a :class:`~pyro_vaediff.train.loop.Trainer` that is about its state."""

    vae: VAE
    data: Splits
    elbo: Estimator
    config: TrainConfig
    model_config: ModelConfig | None
    device: torch.device
    out: Path | None
    snapshots: frozenset[int]
    optim: TorchOptim
    average: WeightAverage | None
    auto_k: AutoK | None
    history: list[Record]
    steps: int
    steps_per_epoch: int
    total_epochs: int
    seconds: float
    _best: dict[str, Tensor]
    _rng: dict[str, Tensor]

    def current(self) -> VAE:
        r"""Returns the model that is evaluated: the VAE, or one with the averaged weights."""
        if self.average is None:
            return self.vae
        vae = copy.deepcopy(self.vae)
        vae.load_state_dict(self.weights())
        return vae

    def weights(self) -> dict[str, Tensor]:
        r"""Returns a copy of the weights that are evaluated and kept."""
        state = self.vae.state_dict()
        if self.average is not None:
            state = self.average.values
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def count_epochs(self) -> int:
        r"""Returns the number of epochs, after a check that there is something to train."""
        config, total = self.config, self.config.epochs
        if any(True for _ in self.vae.prior.parameters()):
            total += config.prior_epochs
        elif not config.epochs:
            raise ValueError(
                f"epochs must be positive, got 0: a {type(self.vae.prior).__name__} has no "
                "parameters"
            )
        for epoch in self.snapshots:
            check_whole("each of snapshots", epoch, least=0)
        if max(self.snapshots, default=0) > total:
            raise ValueError(
                f"each of snapshots must be at most the number of epochs, {total}, got "
                f"{max(self.snapshots)}"
            )
        return total

    def is_finished(self) -> bool:
        r"""Returns ``True`` if the budget is spent, or validation has not improved for too long."""
        config, done = self.config, len(self.history)
        # Epochs that were not validated cannot tell.
        validated = done > 0 and done % config.validate_every == 0
        if config.patience is not None and validated:
            stale = done - self.best_epoch() >= config.patience
        else:
            stale = False
        return stale or self.is_spent(done)

    def is_spent(self, epochs: int) -> bool:
        r"""Returns ``True`` if the budget is spent after a number of epochs."""
        limit = self.config.max_steps
        return (
            epochs >= self.total_epochs
            or (limit is not None and self.steps >= limit)
            or self.is_late(self.seconds)
        )

    def is_late(self, seconds: float) -> bool:
        r"""Returns ``True`` if the seconds exceed the budget, by those of the main process."""
        if self.config.max_seconds is None:
            return False
        late = torch.tensor(float(seconds >= self.config.max_seconds))
        distributed.broadcast_([late])
        return bool(late)

    def best_epoch(self) -> int:
        r"""Returns the epoch with the lowest validation loss, counted from 1."""
        losses = [record["validation"] for record in self.history]
        return 1 + losses.index(min(losses))

    def best_model(self) -> VAE:
        r"""Returns a copy of the best model so far, in eval mode."""
        vae = copy.deepcopy(self.vae)
        vae.load_state_dict(self._best)
        return vae.eval()

    # The files of the run, in an order in which a run that is killed repeats its last epoch at
    # most.

    def save(self) -> None:
        r"""Writes the metrics, the model if it is the best one, and the checkpoint."""
        is_best = self.best_epoch() == len(self.history)
        if is_best:
            self._best = self.weights()
        if self.out is None or not distributed.is_main():
            return
        write_csv(self.out / METRICS, self.history)
        if is_best:
            self.save_best(self.out)
        self.save_snapshot()
        history = {"history": self.history, "best_epoch": self.best_epoch()}
        save_checkpoint(self.out / CHECKPOINT, self.settings() | history | self.state_dict())

    def save_best(self, out: Path) -> None:
        r"""Writes the best model so far, as it was written after its epoch."""
        best = self.best_epoch()
        history = {"history": self.history[:best], "best_epoch": best}
        save_checkpoint(out / BEST, self.settings() | history | {"vae": self._best})

    def save_snapshot(self) -> None:
        r"""Writes the model if its epoch is one of the snapshots."""
        epoch = len(self.history)
        if self.out is not None and epoch in self.snapshots and distributed.is_main():
            state = self.settings() | {"epoch": epoch, "vae": self.weights()}
            save_checkpoint(self.out / f"epoch-{epoch}.pt", state)

    def settings(self) -> dict[str, dict[str, Any]]:
        r"""Returns the settings that a run shares with the run that resumes it."""
        model = {} if self.model_config is None else asdict(self.model_config)
        return {
            "model_config": {k: list(v) if isinstance(v, tuple) else v for k, v in model.items()},
            "train_config": asdict(self.config),
            "data": {
                "dataset": self.data.name,
                "train_images": len(self.data.train),
                "groups": self.data.groups,
                "num_validation": self.data.num_validation,
                "context": self.data.train.c is not None,
            },
            "estimator": describe_elbo(self.elbo) | ({"k": "auto"} if self.auto_k else {}),
            "optimizer": {"optimizer": type(self.optim.optimizer).__name__},
        }

    def state_dict(self) -> dict[str, Any]:
        r"""Returns everything that the rest of the run depends on."""
        return {
            "vae": self.vae.state_dict(),
            "best": self._best,
            "optim": self.optim.get_state(),
            "rng": self._rng,
            # Without a budget of seconds, two runs leave the same checkpoint.
            "spent": {
                "steps": self.steps,
                "seconds": self.seconds if self.config.max_seconds is not None else 0.0,
            },
            "average": {} if self.average is None else self.average.state_dict(),
            "elbo": self.elbo_state(),
            "auto_k": {} if self.auto_k is None else self.auto_k.state_dict(),
        }

    def elbo_state(self) -> dict[str, Tensor]:
        r"""Returns the state that the estimator has learned; one of Pyro's own has none."""
        return getattr(self.elbo, "state_dict", dict)()

    def rng_state(self) -> dict[str, Tensor]:
        r"""Returns the states of the random number generators that a run draws from."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_rng_state(self, state: dict[str, Tensor]) -> None:
        r"""Restores what :meth:`rng_state` returned."""
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def resume(self) -> None:
        r"""Continues from the checkpoint in the run directory, as if the run had never stopped.

        With another number of processes it continues with other random numbers. An epoch that a
        budget of steps or seconds has cut short counts as one: with a larger budget, the run goes
        on with the next.

        Raises:
            FileNotFoundError: If there is no checkpoint.
            ValueError: If the checkpoint is broken, or of a run with other settings.
        """
        if self.out is None:
            raise ValueError("out must be a run directory to resume from, got None")
        path = self.out / CHECKPOINT
        state = distributed.from_main(lambda: load_run(path))
        compare_settings(path, state, self.settings())
        for name in ("optim", "history", "best", "rng", "spent"):
            if name not in state:
                raise ValueError(
                    f"cannot resume {path}: it has no {name!r}, as if it were a model alone, such "
                    "as best.pt"
                )
        try:
            self.vae.load_state_dict(state["vae"])
            self.optim.set_state(state["optim"])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"cannot resume {path} with other networks ({reason})") from error
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.auto_k is not None:
            self.auto_k.load_state_dict(state["auto_k"])
        if state["elbo"]:
            self.elbo.load_state_dict(state["elbo"])  # type: ignore[attr-defined]  # saved its own
        self.history, self._best, self._rng = state["history"], state["best"], state["rng"]
        self.steps, self.seconds = state["spent"]["steps"], state["spent"]["seconds"]
        if distributed.is_main():
            # It may be of an epoch that was not finished, and that now has another result.
            self.save_best(self.out)

    def seed_epoch(self) -> torch.Generator | None:
        r"""Gives each of several processes its own noise, and all of them the same order of images.

        Both are functions of the seed and the epoch, so that any number of processes can resume the
        run. A single process has its global generators, whose state is in the checkpoint.
        """
        if distributed.size() == 1:
            return None
        numbers = self.config.seed, len(self.history) + 1
        torch.manual_seed(distributed.fold_seed(*numbers, distributed.rank()))
        return torch.Generator().manual_seed(distributed.fold_seed(*numbers))

    def synchronize(self) -> None:
        r"""Makes the models of all processes that of the main one.

        Their weights took the same steps; the statistics of BatchNorm and a proposal that learns
        have seen their own images.
        """
        tensors = list(self.vae.state_dict().values())
        if self.average is not None:
            tensors += self.average.values.values()
        tensors += self.elbo_state().values()
        distributed.broadcast_(tensors)

    def whereabouts(self) -> str:
        r"""Returns the place of the last good checkpoint, for a message."""
        if self.out is None or not self.history:
            return "; no checkpoint was written yet"
        return f"; the last good checkpoint is {self.out / CHECKPOINT} (epoch {len(self.history)})"

    def check_finite(self, terms: Iterable[str], total: list[float], step: int) -> None:
        r"""Raises a :class:`NonFiniteError` that names the terms which are not finite."""
        names = [*terms, "the norm of the gradient"]
        broken = {n: v for n, v in zip(names, total, strict=True) if not math.isfinite(v)}
        if broken:
            step += len(self.history) * self.steps_per_epoch
            values = ", ".join(f"{name} = {value}" for name, value in broken.items())
            raise NonFiniteError(
                f"step {step} (epoch {len(self.history) + 1}) is not finite: {values}"
                f"{self.whereabouts()}; try a smaller lr or clip_norm"
            )
