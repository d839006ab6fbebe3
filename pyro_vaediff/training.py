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
from .data.groups import list_name
from .evaluation import evaluate, preprocess, value_elbo
from .infer import Timestep_ELBO, TraceKL_ELBO
from .priors import DiffusionPrior, GaussianPrior, VampPrior
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
        init: A run directory or a checkpoint, whose encoder and decoder this run starts from, and
            whose prior if it is of the same kind.

    Raises:
        ValueError: If a configuration is not valid, not for the estimator or not for ``init``.
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
        init: str | Path | None = None,
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
        self.initialize(init)
        self.optim = self.make_optim()
        vae = self.vae
        gaussian = GaussianPrior(model_config.latent_dim).to(vae.prior.origin)
        first = VAE(vae.encoder, vae.decoder, gaussian)
        self.svi, self.gaussian_svi, self.prior_svi = (
            SVI(per_datum(model), per_datum(guide), self.optim, elbo)
            for model, guide in (
                (vae.model, vae.guide),
                (first.model, first.guide),
                (vae.prior_model, vae.prior_guide),
            )
        )
        self.total_epochs = train_config.epochs
        if any(True for _ in vae.prior.parameters()):  # there is something to train
            self.total_epochs += train_config.prior_epochs
        elif not train_config.epochs:
            raise ValueError(
                f"epochs must be positive, got 0: a {model_config.prior} prior has no parameters"
            )
        self.average = None
        if train_config.ema:
            average = get_ema_multi_avg_fn(train_config.ema)
            self.average = AveragedModel(self.vae, multi_avg_fn=average, use_buffers=True)
        # Whatever draws random numbers between here and `fit` does not change the run.
        self._rng = self.rng_state()

    def initialize(self, init: str | Path | None) -> None:
        r"""Puts the model where training starts, if that is not a random draw."""
        if init is not None:
            # A prior of another kind has other parameters, and starts afresh.
            state = load_run(init)
            prior = state["model_config"]["prior"]
            kept = {
                name: value
                for name, value in state["vae"].items()
                if prior == self.model_config.prior or not name.startswith("prior.")
            }
            groups = state["data"]["groups"]
            if groups != self.data.groups:
                raise ValueError(
                    f"cannot start from {init}: it was trained on other splits, and may have seen "
                    f"the test images (groups={groups}, not {self.data.groups})"
                )
            try:
                missing, _ = self.vae.load_state_dict(kept, strict=False)
                if any(not name.startswith("prior.") for name in missing):
                    raise RuntimeError(f"it lacks {missing[0]}")
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200]
                raise ValueError(f"cannot start from {init}: other networks ({reason})") from error
        if isinstance(self.vae.prior, VampPrior) and (init is None or prior != "vamp"):
            first = self.data.train[: self.model_config.num_components].to(self.device)
            self.vae.prior.initialize(preprocess(self.vae, first, self.data.levels))

    def make_optim(self) -> TorchOptim:
        r"""Returns Adam with the learning rates of the configuration, as functions of the step."""
        config, prior = self.config, list(self.vae.prior.parameters())
        known = set(prior)
        groups = [{"params": [p for p in self.vae.parameters() if p not in known]}]
        if prior:
            groups.append({"params": prior, "lr": config.prior_lr or config.lr})
        optimizer = torch.optim.Adam(groups, lr=config.lr)
        joint, alone = (
            max(1, epochs * self.steps_per_epoch) for epochs in (config.epochs, config.prior_epochs)
        )

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
            if config.lr_schedule == "constant":
                return warm
            start = config.epochs * self.steps_per_epoch
            done = (step - start) / alone if step >= start else step / joint
            return warm * (1 + math.cos(math.pi * min(1.0, done))) / 2

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return TorchOptim(optimizer, config.clip_norm, scheduler)

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
        total, done = self.total_epochs, len(self.history)
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
        svi, done = self.svi, len(self.history)
        if done < self.config.gaussian_epochs:
            svi = self.gaussian_svi
        if done >= self.config.epochs:
            # Of the prior alone: frozen networks are in eval mode, and need no gradients.
            svi = self.prior_svi
            for module in (self.vae.encoder, self.vae.decoder):
                module.eval().requires_grad_(False)
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
                terms = svi.step(x)
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
        # Of the prior alone there is no reconstruction, hence no sum.
        record = {} if svi is self.prior_svi else {"train": sum(means[:-1])}
        record["grad_norm"] = means[-1]
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
            "data": {
                "dataset": self.data.name,
                "train_images": len(self.data.train),
                "groups": self.data.groups,
            },
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
        state = load_run(self.out / CHECKPOINT)
        for part, mine in self.settings().items():
            for name, saved in state.get(part, {}).items():
                # More epochs continue a run, unless its learning rate depends on their number.
                last = "prior_epochs" if self.config.prior_epochs else "epochs"
                if name == last and self.config.lr_schedule == "constant":
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
    state = load_run(path)
    config = ModelConfig(**state["model_config"])
    precision = state["train_config"]["precision"]
    vae = make_vae(config).to(device, torch.float64 if precision == "float64" else torch.float32)
    vae.load_state_dict(state["vae"])
    return vae.eval(), config


def load_data(
    path: str | Path,
    root: str | Path = "data",
    download: bool = True,
    groups: str | Path | None = None,
) -> ImageData:
    r"""Loads the images that a VAE was trained on, in its size and channels.

    Arguments:
        path: A run directory, or a checkpoint in one.
        root: The folder that holds the data sets, or the images themselves.
        download: Whether to download what is missing from ``root``.
        groups: The list of groups that the run's splits keep apart, if it had one.

    Raises:
        ValueError: If ``groups`` is not the run's own, which would give other splits.
    """
    state = load_run(path)
    channels, size, _ = state["model_config"]["image_shape"]
    name, listed = state["data"]["dataset"], state["data"]["groups"]
    given = None if groups is None else list_name(groups)
    if given != listed:
        raise ValueError(
            f"{path} has other splits: it was trained with groups={listed}, not {given}; give the "
            "list it was trained with, if any (--groups)"
        )
    options = {"image_size": size, "channels": channels, "groups": groups}
    return load(name, root, download=download, **options)


def load_run(path: str | Path) -> dict[str, Any]:
    r"""Loads a checkpoint of a run, with what older ones do not have."""
    state = load_checkpoint(model_path(path))
    state.setdefault("data", {}).setdefault("groups", None)
    state.setdefault("model_config", {}).setdefault("denoiser", "mlp")
    return state


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
