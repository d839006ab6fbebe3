r"""Training with Pyro's SVI: minibatches, validation, the best model, checkpoints."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyro
import pyro.infer
import torch
from torch import Tensor
from tqdm import tqdm

from ..arguments import check_whole
from ..data import ImageData, batches
from ..evaluate import evaluate, preprocess, value_elbo
from ..files import remove_unfinished, write_csv
from ..priors import GaussianPrior
from ..vae import VAE
from . import distributed
from .build import make_vae
from .config import ModelConfig, TrainConfig
from .optim import TorchOptim, WeightAverage, learning_rate, make_svi, parameter_groups, per_datum
from .runs import (
    BEST,
    CHECKPOINT,
    METRICS,
    compare_settings,
    describe_elbo,
    fitting_weights,
    load_run,
    save_checkpoint,
)

__all__ = ["NonFiniteError", "Trainer"]

Record = dict[str, float]


class NonFiniteError(RuntimeError):
    r"""A loss or a gradient that is NaN or infinite."""


class Trainer:
    r"""A training run of any VAE, from its start or from its last checkpoint.

    It is one run in all processes of a :func:`~pyro_vaediff.train.distributed.process_group`:
    each has a trainer with the same arguments, and computes its share of every batch. The main
    process writes the files.

    Arguments:
        vae: The VAE, which is moved to the device and trained in place.
        data: The images. What is needed are tensors ``train`` and ``validation``, of images in
            ``uint8`` that ``vae.space`` converts, or of data in x-space.
        elbo: The estimator to train with.
        config: How to train.
        device: Where to train.
        out: The run directory, for ``checkpoint.pt``, ``best.pt`` and ``metrics.csv``; ``None`` to
            write nothing.
        snapshots: The epochs after which the model is kept as ``epoch-N.pt`` as well; 0 is its
            initialization.
        init: A run directory or a checkpoint, whose encoder and decoder this run starts from, and
            whose prior if it is of the same kind.
        model_config: What the VAE was made from, for :func:`~pyro_vaediff.train.load_vae`. Without
            one, :func:`~pyro_vaediff.train.load_weights` loads the weights.
        make_optimizer: A function from groups of parameters, each with its ``"lr"``, to a torch
            optimizer; by default AdamW without weight decay.
        on_epoch: What to do with the record of each epoch in the main process.

    Raises:
        ValueError: If the arguments do not fit each other.

    Example:
        A callback that writes to TensorBoard::

            writer = torch.utils.tensorboard.SummaryWriter("runs/mine")

            def log(record):
                for name, value in record.items():
                    writer.add_scalar(name, value, record["epoch"])

            Trainer(vae, data, Timestep_ELBO(), on_epoch=log, out="runs/mine").fit()

        With Weights & Biases, ``on_epoch=wandb.log`` is all.
    """

    def __init__(
        self,
        vae: VAE,
        data: ImageData | Any,
        elbo: pyro.infer.ELBO,
        config: TrainConfig | None = None,
        device: torch.device | str = "cpu",
        out: str | Path | None = None,
        snapshots: Iterable[int] = (),
        init: str | Path | None = None,
        *,
        model_config: ModelConfig | None = None,
        make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
        on_epoch: Callable[[Record], object] | None = None,
    ):
        self.config = config = TrainConfig() if config is None else config
        if not isinstance(elbo, pyro.infer.ELBO):
            raise ValueError(f"elbo must be an estimator of the ELBO, got {elbo!r}")
        levels = getattr(data, "levels", None)
        if vae.space is not None and levels not in (None, vae.space.levels):
            raise ValueError(
                f"levels of vae.space must be that of the data, {levels}, got {vae.space.levels}"
            )
        self.device = torch.device(device)
        self.dtype = torch.float64 if config.precision == "float64" else torch.float32
        self.vae, self.data, self.elbo = vae.to(self.device, self.dtype), data, elbo
        self.model_config, self.on_epoch = model_config, on_epoch
        self.out = None if out is None else Path(out)
        self.snapshots = frozenset(snapshots)
        self.history: list[Record] = []
        self.steps, self.seconds = 0, 0.0

        self.batch_size = min(config.batch_size, len(data.train))
        if self.batch_size < distributed.size():
            raise ValueError(
                f"batch_size must be at least the number of processes, {distributed.size()}, got "
                f"{self.batch_size} ({len(data.train)} training images)"
            )
        self.steps_per_epoch = len(data.train) // self.batch_size
        self.total_epochs = self.count_epochs()
        self.initialize(init)
        distributed.broadcast_([*vae.parameters(), *vae.buffers()])
        groups = parameter_groups(vae, config)
        make = make_optimizer or (lambda groups: torch.optim.AdamW(groups, weight_decay=0.0))
        optimizer, factor = make(groups), learning_rate(config, self.steps_per_epoch)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self.optim = TorchOptim(optimizer, config.clip_norm, scheduler)

        gaussian = GaussianPrior(vae.prior.event_shape).to(vae.prior.origin)
        first = VAE(vae.encoder, vae.decoder, gaussian)
        self.svi, self.gaussian_svi, self.prior_svi = (
            make_svi(*(per_datum(p, self.batch_size) for p in programs), self.optim, elbo)
            for programs in (
                (vae.model, vae.guide),
                (first.model, first.guide),
                (vae.prior_model, vae.prior_guide),
            )
        )
        self.average = WeightAverage(vae, config.ema) if config.ema else None
        # Whatever draws random numbers between here and `fit` does not change the run.
        torch.manual_seed(config.seed)
        self._rng = self.rng_state()

    @classmethod
    def from_config(
        cls,
        model_config: ModelConfig,
        config: TrainConfig,
        elbo: pyro.infer.ELBO,
        data: ImageData,
        *args: Any,
        **kwargs: Any,
    ) -> Trainer:
        r"""Returns the run of a VAE that is made from its configuration, and from the seed.

        Arguments:
            model_config: What to train.
            config: How to train it.
            elbo: The estimator to train with.
            data: The images.
            args: Further arguments of :class:`Trainer`, from ``device`` on.
            kwargs: Further keyword arguments of :class:`Trainer`.
        """
        for name, mine, theirs in (
            ("image_shape", tuple(model_config.image_shape), data.image_shape),
            ("levels", model_config.levels, data.levels),
        ):
            if mine != theirs:
                raise ValueError(f"{name} must be that of the data, {theirs}, got {mine}")
        torch.manual_seed(config.seed)
        vae = make_vae(model_config)
        return cls(vae, data, elbo, config, *args, model_config=model_config, **kwargs)

    def count_epochs(self) -> int:
        r"""Returns the number of epochs, after a look at whether there is something to train."""
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

    def initialize(self, init: str | Path | None) -> None:
        r"""Starts from another run, and the prior from training data if it has a use for them."""
        if init is not None:
            state = distributed.from_main(lambda: load_run(init))
            groups, own = state["data"].get("groups"), getattr(self.data, "groups", None)
            if groups != own:
                raise ValueError(
                    f"cannot start from {init}: it was trained on other splits, and may have seen "
                    f"the test images (groups={groups}, not {own})"
                )
            if fitting_weights(self.vae, state["vae"], init):
                return
        pseudo_inputs = getattr(self.vae.prior, "pseudo_inputs", ())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            x = preprocess(self.vae, self.data.train[: max(1, len(pseudo_inputs))])
        self.vae.prior.initialize(x)

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
        if self.out is not None and distributed.is_main():
            remove_unfinished(self.out)
        if not self.history:
            self.save_snapshot()
        bar = tqdm(
            total=self.total_epochs * self.steps_per_epoch,
            initial=len(self.history) * self.steps_per_epoch,
            unit="step",
            disable=not (progress and distributed.is_main()),
            dynamic_ncols=True,
        )
        # Parameters are registered in a store of this run's own, not in Pyro's global one.
        with bar, pyro.get_param_store().scope():
            while not self.is_finished():
                start, epoch = time.perf_counter(), len(self.history) + 1
                bar.set_description(f"epoch {epoch}/{self.total_epochs}")
                record = {"epoch": epoch} | self.train_epoch(bar)
                record["validation"] = self.validate(epoch)
                self.history.append(record)
                self.seconds += time.perf_counter() - start
                self._rng = self.rng_state()
                self.save()
                if self.on_epoch is not None and distributed.is_main():
                    self.on_epoch(record)
        return self.best_model()

    def is_finished(self) -> bool:
        r"""Returns whether the budget is spent, or validation has not improved for too long."""
        config, done = self.config, len(self.history)
        stale = done - self.best_epoch() if done else 0
        return (
            done >= self.total_epochs
            or (config.max_steps is not None and self.steps >= config.max_steps)
            or (config.max_seconds is not None and self.seconds >= config.max_seconds)
            or (config.patience is not None and stale >= config.patience)
        )

    def train_epoch(self, bar: tqdm) -> Record:
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
        total, step, deadline = None, 0, time.perf_counter() + self.remaining_seconds()
        for batch in self.batches():
            x = preprocess(self.vae, batch)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                svi.step(x)
            step, self.steps = step + 1, self.steps + 1
            if self.average is not None:
                self.average.update(self.vae)
            terms = svi.loss.terms
            values = torch.stack([*terms.values(), self.optim.grad_norm])
            # A sum remembers that one of its terms was not finite.
            total = values if total is None else total + values
            if step % check_every == 0 or step == self.steps_per_epoch:
                self.check_finite(terms, total.tolist(), step)
                bar.set_postfix_str(describe(terms), refresh=False)
            bar.update()
            if self.steps == self.config.max_steps or time.perf_counter() > deadline:
                break
        self.synchronize()
        means = (total / step).tolist()
        # The prior alone has no reconstruction, hence no negative ELBO.
        record = {} if svi is self.prior_svi else {"train": sum(means[:-1])}
        record["grad_norm"] = means[-1]
        return record | {f"train {n}": mean for n, mean in zip(terms, means, strict=False)}

    def batches(self) -> Iterable[Tensor]:
        r"""Returns the batches of an epoch, or this process's parts of them."""
        return batches(
            self.data.train,
            self.batch_size,
            shuffle=True,
            device=self.device,
            drop_last=True,
            flip=getattr(self.data, "horizontal_flip", False),
            generator=self.seed_epoch(),
            rank=distributed.rank(),
            size=distributed.size(),
        )

    def remaining_seconds(self) -> float:
        r"""Returns what is left of the budget in seconds."""
        budget = self.config.max_seconds
        return math.inf if budget is None else budget - self.seconds

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

    def whereabouts(self) -> str:
        if self.out is None or not self.history:
            return "; no checkpoint was written yet"
        return f"; the last good checkpoint is {self.out / CHECKPOINT} (epoch {len(self.history)})"

    def validate(self, epoch: int) -> float:
        r"""Returns the negative ELBO of the validation images, in nats per datum.

        The bound is estimated from 32 timesteps per datum with the same random numbers in every
        epoch, such that models are compared and not their noise. Epochs that are not validated have
        the loss of the one before.

        Arguments:
            epoch: The number of the epoch, from 1.
        """
        if epoch % self.config.validate_every and epoch < self.total_epochs and self.history:
            return self.history[-1]["validation"]
        data, seed = distributed.share(self.data.validation), 0
        if distributed.size() > 1:
            seed = distributed.fold_seed(0, distributed.rank())
        loss = torch.zeros((), dtype=torch.float64)
        if len(data):  # or there are more processes than images
            size = max(self.batch_size, 100)
            terms = evaluate(self.current(), data, value_elbo(), batch_size=size, seed=seed)
            loss += sum(terms.values()) * (len(data) / len(self.data.validation))
        distributed.sum_([loss])
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the validation loss is {float(loss)} after epoch {epoch}{self.whereabouts()}"
            )
        return float(loss)

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
            state = self.average.weights(self.vae)
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def best_epoch(self) -> int:
        r"""Returns the epoch with the lowest validation loss, counted from 1."""
        losses = [record["validation"] for record in self.history]
        return 1 + losses.index(min(losses))

    def best_model(self) -> VAE:
        r"""Returns a copy of the best model so far, in eval mode."""
        vae = copy.deepcopy(self.vae)
        vae.load_state_dict(self._best)
        return vae.requires_grad_(True).eval()

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
            self.save_best()
        self.save_snapshot()
        history = {"history": self.history, "best_epoch": self.best_epoch()}
        save_checkpoint(self.out / CHECKPOINT, self.settings() | history | self.state_dict())

    def save_best(self) -> None:
        r"""Writes the best model so far, as it was written after its epoch."""
        best = self.best_epoch()
        history = {"history": self.history[:best], "best_epoch": best}
        save_checkpoint(self.out / BEST, self.settings() | history | {"vae": self._best})

    def save_snapshot(self) -> None:
        r"""Writes the model if its epoch is one of the snapshots."""
        epoch = len(self.history)
        if self.out is not None and epoch in self.snapshots and distributed.is_main():
            state = self.settings() | {"epoch": epoch, "vae": self.weights()}
            save_checkpoint(self.out / f"epoch-{epoch}.pt", state)

    def settings(self) -> dict[str, dict[str, Any]]:
        r"""Returns what a run has in common with the run that resumes it."""
        model = {} if self.model_config is None else asdict(self.model_config)
        return {
            "model_config": {k: list(v) if isinstance(v, tuple) else v for k, v in model.items()},
            "train_config": asdict(self.config),
            "data": {
                "dataset": getattr(self.data, "name", type(self.data).__name__),
                "train_images": len(self.data.train),
                "groups": getattr(self.data, "groups", None),
            },
            "estimator": describe_elbo(self.elbo),
        }

    def state_dict(self) -> dict[str, Any]:
        r"""Returns everything that the rest of the run depends on."""
        return {
            "vae": self.vae.state_dict(),
            "best": self._best,
            "optim": self.optim.get_state(),
            "rng": self._rng,
            "spent": {"steps": self.steps, "seconds": self.seconds},
            "average": {} if self.average is None else self.average.state_dict(),
            "elbo": self.elbo_state(),
        }

    def elbo_state(self) -> dict[str, Tensor]:
        r"""Returns what the estimator has learned; one of Pyro's own learns nothing."""
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

        With another number of processes it continues with other random numbers.

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
        self.vae.load_state_dict(state["vae"])
        self.optim.set_state(state["optim"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if state["elbo"]:
            self.elbo.load_state_dict(state["elbo"])
        self.history, self._best, self._rng = state["history"], state["best"], state["rng"]
        self.steps, self.seconds = state["spent"]["steps"], state["spent"]["seconds"]
        if distributed.is_main():
            # It may be of an epoch that was not finished, and that now has another result.
            self.save_best()


def describe(terms: dict[str, Tensor]) -> str:
    r"""Returns the terms of a loss on one line, their sum first."""
    values = {"-ELBO": sum(terms.values())} | (terms if len(terms) > 1 else {})
    return ", ".join(f"{name} {float(value):.1f}" for name, value in values.items())
