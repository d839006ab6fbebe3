r"""Training with Pyro's SVI: minibatches, validation, the best model, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyro
import pyro.infer
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from .build import make_vae
from .checkpoint import load_checkpoint, save_checkpoint, write_csv
from .config import ModelConfig, TrainConfig
from .data import ImageData, batches, load
from .evaluation import evaluate, preprocess, value_elbo
from .infer import Timestep_ELBO, TraceKL_ELBO
from .priors import DiffusionPrior
from .svi import SVI, TorchOptim, per_datum
from .vae import VAE

__all__ = ["NonFiniteError", "Trainer", "load_data", "load_vae"]

CHECKPOINT, BEST, METRICS = "checkpoint.pt", "best.pt", "metrics.csv"


class NonFiniteError(RuntimeError):
    r"""A loss or a gradient that is NaN or infinite."""


class Trainer:
    r"""A training run, from its start or from its last checkpoint.

    Arguments:
        model_config: What to train.
        train_config: How to train it.
        elbo: The estimator to train with.
        data: The images.
        device: Where to train.
        out: The run directory, for ``checkpoint.pt``, ``best.pt`` and ``metrics.csv``; ``None`` to
            write nothing.
        snapshots: The epochs after which the model is kept as ``epoch-N.pt`` as well; 0 is its
            initialization.

    Raises:
        ValueError: If a configuration is not valid, or not for the estimator.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        train_config: TrainConfig,
        elbo: pyro.infer.ELBO,
        data: ImageData,
        device: torch.device | str = "cpu",
        out: str | Path | None = None,
        snapshots: Iterable[int] = (),
    ):
        torch.manual_seed(train_config.seed)
        self.model_config, self.config, self.elbo, self.data = (
            model_config, train_config, elbo, data
        )  # fmt: skip
        self.device = torch.device(device)
        self.out = None if out is None else Path(out)
        self.snapshots = frozenset(snapshots)
        self.dtype = torch.float64 if train_config.precision == "float64" else torch.float32
        self.vae = make_vae(model_config).to(self.device, self.dtype)
        self.history: list[dict[str, float]] = []

        if isinstance(elbo, Timestep_ELBO) and isinstance(self.vae.prior, DiffusionPrior):
            elbo.weighting.check(self.vae.prior, elbo.collapse.conditioning)

        self.batch_size = min(train_config.batch_size, len(data.train))
        self.steps_per_epoch = len(data.train) // self.batch_size
        optimizer = torch.optim.Adam(self.vae.parameters(), lr=train_config.lr)
        scheduler = None
        if train_config.lr_schedule == "cosine":
            steps = train_config.epochs * self.steps_per_epoch
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        self.optim = TorchOptim(optimizer, train_config.clip_norm, scheduler)
        self.svi = SVI(per_datum(self.vae.model), per_datum(self.vae.guide), self.optim, elbo)
        self.average = None
        if train_config.ema:
            average = get_ema_multi_avg_fn(train_config.ema)
            self.average = AveragedModel(self.vae, multi_avg_fn=average, use_buffers=True)
        # Whatever draws random numbers between here and `fit` does not change the run.
        self._rng = self.rng_state()

    # Training -------------------------------------------------------------------------------------

    def fit(self, progress: bool = True) -> VAE:
        r"""Trains until the last epoch and returns the best model, in eval mode.

        Each epoch ends with the negative ELBO of the validation images, which decides which model
        is the best, and with a checkpoint.

        Arguments:
            progress: Whether to show a progress bar.

        Raises:
            NonFiniteError: If the loss or its gradient is NaN or infinite.
        """
        self.set_rng_state(self._rng)
        if not self.history:
            self.save_snapshot()
        total, done = self.config.epochs, len(self.history)
        bar = tqdm(
            total=total * self.steps_per_epoch,
            initial=done * self.steps_per_epoch,
            unit="step",
            disable=not progress,
            dynamic_ncols=True,
        )
        # Parameters are registered in a store of this run's own, not in Pyro's global one.
        with bar, pyro.get_param_store().scope():
            for epoch in range(done + 1, total + 1):
                bar.set_description(f"epoch {epoch}/{total}")
                record = {"epoch": epoch} | self.train_epoch(bar)
                record["validation"] = self.validate()
                if not math.isfinite(record["validation"]):
                    raise NonFiniteError(
                        f"the validation loss is {record['validation']} after epoch {epoch}"
                        f"{self.whereabouts()}"
                    )
                self.history.append(record)
                self._rng = self.rng_state()
                self.save()
        return self.best_model()

    def train_epoch(self, bar: tqdm) -> dict[str, float]:
        r"""Trains for an epoch and returns the mean of each term of the loss."""
        self.vae.train()
        bf16 = self.config.precision == "bf16"
        # Reading a value waits for a GPU, hence only now and then.
        check_every = 1 if self.device.type == "cpu" else 20
        total, loader = None, batches(
            self.data.train,
            self.batch_size,
            shuffle=True,
            device=self.device,
            drop_last=True,
            flip=self.data.horizontal_flip,
        )  # fmt: skip
        for step, batch in enumerate(loader, start=1):
            x = preprocess(self.vae, batch, self.data.levels)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                terms = self.svi.step(x)
            if self.average is not None:
                self.average.update_parameters(self.vae)
            values = torch.stack([*terms.values(), self.optim.grad_norm])
            # A sum remembers that one of its terms was not finite.
            total = values if total is None else total + values
            if step % check_every == 0 or step == self.steps_per_epoch:
                self.check_finite(terms, total.tolist(), step)
                bar.set_postfix_str(describe(terms), refresh=False)
            bar.update()
        means = (total / self.steps_per_epoch).tolist()
        record = {"train": sum(means[:-1]), "grad_norm": means[-1]}
        return record | {f"train {name}": mean for name, mean in zip(terms, means, strict=False)}

    def check_finite(self, terms: dict[str, Tensor], total: list[float], step: int) -> None:
        r"""Raises a :class:`NonFiniteError` that names the terms which are not finite."""
        names = [*terms, "the norm of the gradient"]
        broken = [
            name for name, value in zip(names, total, strict=True) if not math.isfinite(value)
        ]
        if broken:
            step += len(self.history) * self.steps_per_epoch
            values = ", ".join(f"{name} = {total[names.index(name)]}" for name in broken)
            raise NonFiniteError(
                f"step {step} (epoch {len(self.history) + 1}) is not finite: {values}"
                f"{self.whereabouts()}; try a smaller lr or clip_norm"
            )

    def whereabouts(self) -> str:
        if self.out is None or not self.history:
            return "; no checkpoint was written yet"
        return f"; the last good checkpoint is {self.out / CHECKPOINT} (epoch {len(self.history)})"

    def validate(self) -> float:
        r"""Returns the negative ELBO of the validation images, in nats per datum.

        The bound is estimated from 32 timesteps per datum with the same random numbers in every
        epoch, such that models are compared and not their noise.
        """
        model = self.vae if self.average is None else self.average.module
        images, batch_size = self.data.validation, max(self.batch_size, 100)
        terms = evaluate(model, images, self.data.levels, value_elbo(), batch_size=batch_size)
        return sum(terms.values())

    # Checkpoints ----------------------------------------------------------------------------------

    def save(self) -> None:
        r"""Writes the metrics, the model if it is the best one, and the checkpoint, in this order.

        A run that is killed in between repeats its last epoch, to the same result.
        """
        if self.best_epoch() == len(self.history):
            self._best = self.weights()
        if self.out is None:
            return
        write_csv(self.out / METRICS, self.history)
        if self.best_epoch() == len(self.history):
            save_checkpoint(self.out / BEST, self.describe() | {"vae": self._best})
        self.save_snapshot()
        save_checkpoint(self.out / CHECKPOINT, self.describe() | self.state_dict())

    def save_snapshot(self) -> None:
        r"""Writes the model if its epoch is one of the snapshots."""
        epoch = len(self.history)
        if self.out is not None and epoch in self.snapshots:
            state = self.settings() | {"epoch": epoch, "vae": self.weights()}
            save_checkpoint(self.out / f"epoch-{epoch}.pt", state)

    def weights(self) -> dict[str, Tensor]:
        r"""Returns a copy of the weights that are evaluated and kept."""
        model = self.vae if self.average is None else self.average.module
        return {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}

    def best_epoch(self) -> int:
        r"""The epoch with the lowest validation loss, counted from 1."""
        losses = [record["validation"] for record in self.history]
        return 1 + losses.index(min(losses))

    def best_model(self) -> VAE:
        r"""Returns a copy of the best model so far, in eval mode."""
        vae = make_vae(self.model_config).to(self.device, self.dtype)
        vae.load_state_dict(self._best)
        return vae.eval()

    def settings(self) -> dict[str, dict[str, Any]]:
        r"""Returns what a run has in common with the run that resumes it."""
        model = asdict(self.model_config) | {"image_shape": list(self.model_config.image_shape)}
        return {
            "model_config": model,
            "train_config": asdict(self.config),
            "data": {"dataset": self.data.name, "train_images": len(self.data.train)},
            "estimator": describe_elbo(self.elbo),
        }

    def describe(self) -> dict[str, Any]:
        return self.settings() | {"history": self.history, "best_epoch": self.best_epoch()}

    def state_dict(self) -> dict[str, Any]:
        r"""Returns everything that the rest of the run depends on."""
        state: dict[str, Any] = {
            "vae": self.vae.state_dict(),
            "best": self._best,
            "optim": self.optim.get_state(),
            "rng": self._rng,
        }
        if self.average is not None:
            state["average"] = self.average.state_dict()
        if isinstance(self.elbo, Timestep_ELBO):
            state["elbo"] = self.elbo.state_dict()
        return state

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

        Raises:
            FileNotFoundError: If there is no checkpoint.
            ValueError: If the checkpoint is broken, or of a run with other settings.
        """
        if self.out is None:
            raise ValueError("out must be a run directory to resume from, got None")
        state = load_checkpoint(self.out / CHECKPOINT)
        for part, mine in self.settings().items():
            for name, saved in state.get(part, {}).items():
                # More epochs continue a run, unless its learning rate depends on their number.
                if name == "epochs" and self.config.lr_schedule == "constant":
                    continue
                if mine.get(name) != saved:
                    raise ValueError(
                        f"cannot resume {self.out / CHECKPOINT} with {name}={mine.get(name)!r}: "
                        f"the run was started with {saved!r}"
                    )
        self.vae.load_state_dict(state["vae"])
        self.optim.set_state(state["optim"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if isinstance(self.elbo, Timestep_ELBO):
            self.elbo.load_state_dict(state.get("elbo", {}))
        self.history, self._best = state["history"], state["best"]
        self._rng = state["rng"]


def load_vae(path: str | Path, device: torch.device | str = "cpu") -> tuple[VAE, ModelConfig]:
    r"""Loads a trained VAE.

    Arguments:
        path: A run directory, whose best model is loaded, or a checkpoint in one.
        device: Where the VAE goes.

    Returns:
        The VAE in eval mode, and its configuration.
    """
    state = load_checkpoint(model_path(path))
    config = ModelConfig(**state["model_config"])
    precision = state["train_config"]["precision"]
    vae = make_vae(config).to(device, torch.float64 if precision == "float64" else torch.float32)
    vae.load_state_dict(state["vae"])
    return vae.eval(), config


def load_data(path: str | Path, root: str | Path = "data", download: bool = True) -> ImageData:
    r"""Loads the images that a VAE was trained on, in its size and channels.

    Arguments:
        path: A run directory, or a checkpoint in one.
        root: The folder that holds the data sets, or the images themselves.
        download: Whether to download what is missing from ``root``.
    """
    state = load_checkpoint(model_path(path))
    channels, size, _ = state["model_config"]["image_shape"]
    name = state["data"]["dataset"]
    return load(name, root, image_size=size, channels=channels, download=download)


def model_path(path: str | Path) -> Path:
    r"""Returns the checkpoint that a path means: of a run directory, its best model."""
    path = Path(path)
    return path / BEST if path.is_dir() else path


def describe_elbo(elbo: pyro.infer.ELBO) -> dict[str, Any]:
    r"""Returns the settings of an estimator."""
    settings = {"estimator": type(elbo).__name__, "num_particles": elbo.num_particles}
    if isinstance(elbo, TraceKL_ELBO):
        settings |= {"antithetic": elbo.antithetic, "entropy": elbo.entropy}
    if isinstance(elbo, Timestep_ELBO):
        settings |= {
            "timesteps": "all" if elbo.proposal is None else type(elbo.proposal).__name__,
            "k": elbo.collapse.k,
            "conditioning": elbo.collapse.conditioning,
            "weighting": elbo.weighting.name,
            "low_discrepancy": elbo.collapse.low_discrepancy,
        }
    return settings


def describe(terms: dict[str, Tensor]) -> str:
    r"""Returns the terms of a loss on one line, their sum first."""
    values = {"-ELBO": sum(terms.values())} | (terms if len(terms) > 1 else {})
    return ", ".join(f"{name} {float(value):.1f}" for name, value in values.items())
