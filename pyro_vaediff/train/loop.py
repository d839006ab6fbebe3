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
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..arguments import check_whole
from ..data import ImageData, batches, load
from ..data.groups import list_name
from ..evaluate.elbo import evaluate, preprocess, value_elbo
from ..files import load_checkpoint, remove_unfinished, save_checkpoint, write_csv
from ..infer import Timestep_ELBO, TraceKL_ELBO
from ..priors import DiffusionPrior, GaussianPrior, VampPrior
from ..vae import VAE
from . import distributed
from .build import make_vae
from .config import ModelConfig, TrainConfig
from .optim import SVI, TorchOptim, per_datum

__all__ = ["NonFiniteError", "Trainer", "load_data", "load_vae"]

CHECKPOINT, BEST, METRICS = "checkpoint.pt", "best.pt", "metrics.csv"
# What every checkpoint of a run has, and what its parts have at least.
PARTS: dict[str, set[str]] = {
    "model_config": {"prior", "image_shape"},
    "train_config": {"precision"},
    "data": {"dataset"},
    "vae": set(),
}


class NonFiniteError(RuntimeError):
    r"""A loss or a gradient that is NaN or infinite."""


class Trainer:
    r"""A training run, from its start or from its last checkpoint.

    It is one run in all processes of a :func:`~pyro_vaediff.train.distributed.process_group`:
    each has a trainer with the same arguments, and computes its share of every batch. The main
    process writes the files.

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
        for name, mine, theirs in (
            ("image_shape", tuple(model_config.image_shape), data.image_shape),
            ("levels", model_config.levels, data.levels),
        ):
            if mine != theirs:
                raise ValueError(f"{name} must be that of the data, {theirs}, got {mine}")
        if not isinstance(elbo, pyro.infer.ELBO):
            raise ValueError(f"elbo must be an estimator of the ELBO, got {elbo!r}")
        torch.manual_seed(train_config.seed)
        self.model_config, self.config, self.elbo, self.data = (
            model_config, train_config, elbo, data
        )  # fmt: skip
        self.device = torch.device(device)
        self.out = None if out is None else Path(out)
        self.snapshots = frozenset(snapshots)
        for epoch in self.snapshots:
            check_whole("each of snapshots", epoch, least=0)
        self.dtype = torch.float64 if train_config.precision == "float64" else torch.float32
        self.vae = make_vae(model_config).to(self.device, self.dtype)
        self.history: list[dict[str, float]] = []

        if isinstance(elbo, Timestep_ELBO) and isinstance(self.vae.prior, DiffusionPrior):
            elbo.weighting.check(self.vae.prior, elbo.collapse.conditioning)

        self.batch_size = min(train_config.batch_size, len(data.train))
        if self.batch_size < distributed.size():
            raise ValueError(
                f"batch_size must be at least the number of processes, {distributed.size()}, got "
                f"{self.batch_size} ({len(data.train)} training images)"
            )
        self.steps_per_epoch = len(data.train) // self.batch_size
        self.initialize(init)
        distributed.broadcast_([*self.vae.parameters(), *self.vae.buffers()])
        self.optim = self.make_optim()
        vae = self.vae
        gaussian = GaussianPrior(model_config.latent_dim).to(vae.prior.origin)
        first = VAE(vae.encoder, vae.decoder, gaussian)
        self.svi, self.gaussian_svi, self.prior_svi = (
            SVI(*(per_datum(program, self.batch_size) for program in programs), self.optim, elbo)
            for programs in (
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
        if max(self.snapshots, default=0) > self.total_epochs:
            raise ValueError(
                f"each of snapshots must be at most the number of epochs, {self.total_epochs}, got "
                f"{max(self.snapshots)}"
            )
        self.average = None
        if train_config.ema:
            self.average = WeightAverage(self.vae, train_config.ema)
        # Whatever draws random numbers between here and `fit` does not change the run.
        self._rng = self.rng_state()

    def initialize(self, init: str | Path | None) -> None:
        r"""Puts the model where training starts, if that is not a random draw."""
        if init is not None:
            # A prior of another kind has other parameters, and starts afresh.
            state = distributed.from_main(lambda: load_run(init))
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
        known, lr, decay = set(prior), config.prior_lr or config.lr, config.prior_weight_decay
        decayed = [p for p in prior if decay and p.ndim >= 2]
        others = [p for p in prior if not (decay and p.ndim >= 2)]
        groups = [
            {"params": [p for p in self.vae.parameters() if p not in known]},
            {"params": others, "lr": lr},
            {"params": decayed, "lr": lr, "weight_decay": decay},
        ]
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.0)
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
        if self.out is not None and distributed.is_main():
            remove_unfinished(self.out)
        if not self.history:
            self.save_snapshot()
        total, done = self.total_epochs, len(self.history)
        bar = tqdm(
            total=total * self.steps_per_epoch,
            initial=done * self.steps_per_epoch,
            unit="step",
            disable=not (progress and distributed.is_main()),
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
            generator=self.seed_epoch(),
            rank=distributed.rank(),
            size=distributed.size(),
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
        self.synchronize()
        means = (total / self.steps_per_epoch).tolist()
        # Of the prior alone there is no reconstruction, hence no sum.
        record = {} if svi is self.prior_svi else {"train": sum(means[:-1])}
        record["grad_norm"] = means[-1]
        return record | {f"train {name}": mean for name, mean in zip(terms, means, strict=False)}

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
        models = [self.vae] if self.average is None else [self.vae, self.average]
        tensors = [tensor for model in models for tensor in model.state_dict().values()]
        if isinstance(self.elbo, Timestep_ELBO):
            tensors += self.elbo.state_dict().values()
        distributed.broadcast_(tensors)

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
        images, seed = distributed.share(self.data.validation), 0
        if distributed.size() > 1:
            seed = distributed.fold_seed(0, distributed.rank())
        options = {"batch_size": max(self.batch_size, 100), "seed": seed}
        loss = torch.zeros((), dtype=torch.float64)
        if len(images):  # or there are more processes than images
            terms = evaluate(model, images, self.data.levels, value_elbo(), **options)
            loss += sum(terms.values()) * (len(images) / len(self.data.validation))
        distributed.sum_([loss])
        return float(loss)

    # Checkpoints ----------------------------------------------------------------------------------

    def save(self) -> None:
        r"""Writes the metrics, the model if it is the best one, and the checkpoint, in this order.

        A run that is killed in between repeats its last epoch, to the same result.
        """
        is_best = self.best_epoch() == len(self.history)
        if is_best:
            self._best = self.weights()
        if self.out is None or not distributed.is_main():
            return
        write_csv(self.out / METRICS, self.history)
        if is_best:
            self.save_best()
        self.save_snapshot()
        save_checkpoint(self.out / CHECKPOINT, self.describe() | self.state_dict())

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

        With another number of processes it continues with other random numbers.

        Raises:
            FileNotFoundError: If there is no checkpoint.
            ValueError: If the checkpoint is broken, or of a run with other settings.
        """
        if self.out is None:
            raise ValueError("out must be a run directory to resume from, got None")
        state = distributed.from_main(lambda: load_run(self.out / CHECKPOINT))
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
        for name in ("optim", "history", "best", "rng", *(["average"] if self.average else [])):
            if name not in state:
                raise ValueError(
                    f"cannot resume {self.out / CHECKPOINT}: it has no {name!r}, as if it were a "
                    "model alone, such as best.pt"
                )
        self.vae.load_state_dict(state["vae"])
        self.optim.set_state(state["optim"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if isinstance(self.elbo, Timestep_ELBO):
            self.elbo.load_state_dict(state.get("elbo", {}))
        self.history, self._best = state["history"], state["best"]
        self._rng = state["rng"]
        if distributed.is_main():
            # It may be of an epoch that was not finished, and that now has another result.
            self.save_best()


class WeightAverage(AveragedModel):
    r"""An exponential moving average of a model's weights and buffers.

    Arguments:
        model: The model.
        decay: How much of the average an update leaves.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    def update_parameters(self, model: nn.Module) -> None:
        r"""Moves the average towards a model; the first update copies it."""
        # torch's own method moves its counter to the device, and waits for that in every step.
        ours, theirs = (
            [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
            for module in (self.module, model)
        )
        if self.n_averaged == 0:
            for mine, other in zip(ours, theirs, strict=True):
                mine.copy_(other)
        else:
            for dtype in dict.fromkeys(tensor.dtype for tensor in ours):
                lists = ([x for x in tensors if x.dtype == dtype] for tensors in (ours, theirs))
                self.multi_avg_fn(*lists, None)
        self.n_averaged += 1


def load_vae(path: str | Path, device: torch.device | str = "cpu") -> tuple[VAE, ModelConfig]:
    r"""Loads a trained VAE.

    Arguments:
        path: A run directory, whose best model is loaded, or a checkpoint in one.
        device: Where the VAE goes.

    Returns:
        The VAE in eval mode, and its configuration.
    """
    state = load_run(path)
    try:
        config = ModelConfig(**state["model_config"])
    except TypeError as error:
        raise ValueError(f"{path} has settings of another version: {error}") from error
    precision = state["train_config"]["precision"]
    vae = make_vae(config).to(device, torch.float64 if precision == "float64" else torch.float32)
    try:
        vae.load_state_dict(state["vae"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} has weights of other networks ({reason})") from error
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
    for part, names in PARTS.items():
        found = state.get(part)
        if not isinstance(found, dict) or not names <= found.keys():
            raise ValueError(f"{path} is no checkpoint of a run: {part!r} is missing or incomplete")
    state["data"].setdefault("groups", None)
    state["model_config"].setdefault("denoiser", "mlp")
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
