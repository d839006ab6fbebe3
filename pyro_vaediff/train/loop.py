r"""Training with Pyro's SVI: minibatches, validation, the best model, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.infer
import torch
from tqdm import tqdm

from ..data import ImageData
from ..evaluate import preprocess, value_elbo
from ..files import remove_unfinished
from ..infer import Estimator
from ..nn.modes import use_channels_last
from ..priors import GaussianPrior
from ..vae import VAE
from . import distributed
from .auto_k import AutoK
from .average import WeightAverage
from .build import make_vae
from .config import ModelConfig, TrainConfig
from .objective import make_objective, warm
from .optim import describe, make_optim, make_svi, per_datum
from .saving import NonFiniteError, Record, SavedRun
from .splits import Splits, validation_loss
from .start import initialize, stands_in

__all__ = ["Trainer"]


class Trainer(SavedRun):
    r"""A training run of any VAE, from its start or from its last checkpoint.

    It is one run in all processes of a :func:`~pyro_vaediff.train.distributed.process_group`: each
    has a trainer with the same arguments and its share of every batch, the main one writes files.

    Arguments:
        vae: The VAE, which is moved to the device and trained in place.
        data: :class:`~pyro_vaediff.data.ImageData`, or a training and a validation split, each a
            tensor with shape :math:`(N, \dots)` or a pair of it and its context. Images in
            ``uint8`` go through ``vae.space``, floats are in x-space already.
        elbo: The estimator to train with.
        config: How to train.
        device: Where to train.
        out: The run directory, for ``checkpoint.pt``, ``best.pt`` and ``metrics.csv``; ``None`` to
            write nothing.
        snapshots: The epochs after which the model is kept as ``epoch-N.pt`` as well; 0 is its
            initialization.
        init: A run directory or a checkpoint whose encoder and decoder this run starts from, as
            well as its prior if that is of the same kind.
        model_config: What the VAE was made from, for :func:`~pyro_vaediff.train.load_vae`. Without
            one, :func:`~pyro_vaediff.train.load_weights` loads the weights.
        make_optimizer: A function from groups of parameters, each with its ``"lr"``, to an
            optimizer of torch; AdamW by default.
        on_epoch: A function that is called with the record of each epoch, in the main process.
        on_step: What to do with the number of each step that has been taken, in every process.
        labels: Whether the labels of the images are the context, one-hot.
        auto_k: Whether the number of timesteps of the estimator follows the noise of the gradient,
            see :class:`~pyro_vaediff.train.auto_k.AutoK`.

    Raises:
        ValueError: If the arguments do not fit each other.

    Example:
        A callback that writes to TensorBoard::

            def log(record):
                for name, value in record.items():
                    writer.add_scalar(name, value, record["epoch"])

            writer = torch.utils.tensorboard.SummaryWriter("runs/mine")
            Trainer(vae, data, Timestep_ELBO(), on_epoch=log, out="runs/mine").fit()
    """

    def __init__(
        self,
        vae: VAE,
        data: ImageData | Sequence[Any],
        elbo: Estimator,
        config: TrainConfig | None = None,
        device: torch.device | str = "cpu",
        out: str | Path | None = None,
        snapshots: Iterable[int] = (),
        init: str | Path | None = None,
        *,
        model_config: ModelConfig | None = None,
        make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
        on_epoch: Callable[[Record], object] | None = None,
        on_step: Callable[[int], object] = lambda step: None,
        labels: bool = False,
        auto_k: bool = False,
    ):
        self.config = config = TrainConfig() if config is None else config
        if not isinstance(elbo, pyro.infer.ELBO):
            raise ValueError(f"elbo must be an estimator of the ELBO, got {elbo!r}")
        levels, space = getattr(data, "levels", None), vae.space
        if space is not None and levels not in (None, space.levels):
            raise ValueError(
                f"levels of vae.space must be that of the data, {levels}, got {space.levels}"
            )
        self.device = torch.device(device)
        self.dtype = torch.float64 if config.precision == "float64" else torch.float32
        self.vae, self.elbo = vae.to(self.device, self.dtype), elbo
        self.data = Splits.of(data, labels).for_prior(vae.prior)
        self.model_config, self.on_epoch, self.on_step = model_config, on_epoch, on_step
        self.out, self.snapshots = None if out is None else Path(out), frozenset(snapshots)
        self.history: list[Record] = []
        self.steps, self.seconds = 0, 0.0
        self.batch_size = min(config.batch_size, len(self.data.train))
        if self.batch_size < distributed.size():
            raise ValueError(
                f"batch_size must be at least the number of processes, {distributed.size()}, got "
                f"{self.batch_size} ({len(self.data.train)} training images)"
            )
        self.steps_per_epoch = len(self.data.train) // self.batch_size
        self.total_epochs = self.count_epochs()
        initialize(self.vae, self.data, init, config.seed)
        distributed.broadcast_([*vae.parameters(), *vae.buffers()])
        self.optim = make_optim(vae, config, self.steps_per_epoch, make_optimizer)
        objective, self.kl_weight = make_objective(vae, elbo, config)
        gaussian = GaussianPrior(vae.prior.event_shape).to(vae.prior.origin)
        first, size = VAE(vae.encoder, vae.decoder, gaussian), self.batch_size
        self.svi, self.gaussian_svi, self.prior_svi = (
            make_svi(per_datum(model, size), per_datum(guide, size), self.optim, loss)
            for model, guide, loss in (
                (vae.model, vae.guide, objective),
                (first.model, first.guide, objective),
                (vae.prior_model, vae.prior_guide, elbo),
            )
        )
        averages = config.ema or config.ema_share
        self.average = WeightAverage(vae, config.ema, config.ema_share) if averages else None
        self.auto_k = AutoK(elbo, self.batch_size) if auto_k else None
        if config.channels_last:
            use_channels_last(vae)
        # Whatever draws random numbers between here and `fit` does not change the run.
        torch.manual_seed(config.seed)
        self._rng = self.rng_state()

    @classmethod
    def from_config(
        cls,
        model_config: ModelConfig,
        config: TrainConfig,
        elbo: Estimator,
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
        if model_config.prior == "exemplar":
            model_config = replace(model_config, num_data=len(data.train))
        for name, mine, theirs in (
            ("image_shape", tuple(model_config.image_shape), data.image_shape),
            ("levels", model_config.levels, data.levels),
        ):
            if mine != theirs:
                raise ValueError(f"{name} must be that of the data, {theirs}, got {mine}")
        torch.manual_seed(config.seed)
        vae = make_vae(model_config)
        return cls(vae, data, elbo, config, *args, model_config=model_config, **kwargs)

    def fit(self, progress: bool = True) -> VAE:
        r"""Trains until the last epoch and returns the best model, in eval mode.

        Each epoch ends with a checkpoint, and with the validation that decides which is the best.

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
                self.seconds += time.perf_counter() - start
                record["validation"] = self.validate(epoch)
                self.history.append(record)
                self._rng = self.rng_state()
                self.save()
                if self.on_epoch is not None and distributed.is_main():
                    self.on_epoch(record)
        return self.best_model()

    def train_epoch(self, bar: tqdm) -> Record:
        r"""Trains for an epoch and returns the mean of each term of the loss."""
        bf16 = self.config.precision == "bf16"
        # Reading a value waits for a GPU, hence only now and then.
        check_every = 1 if self.device.type == "cpu" else 20
        total: Any = 0.0
        start = time.perf_counter() - self.seconds
        loader = self.data.train.minibatches(
            self.batch_size, self.device, self.data.flip, self.seed_epoch()
        )
        with self.phase() as svi:
            for step, (batch, c) in enumerate(loader, start=1):
                x = preprocess(self.vae, batch)
                self.kl_weight.value = warm(self.config, self.steps, self.steps_per_epoch)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                    svi.step(*(x,) if c is None else (x, c.to(x.dtype)))
                    self.steps += 1
                    if self.auto_k is not None and svi is not self.gaussian_svi:
                        self.auto_k.follow(self.steps, svi, self.vae, self.data.train)
                if self.average is not None:
                    self.average.update(self.vae)
                self.on_step(self.steps)
                terms = svi.loss.terms
                values = torch.stack([*terms.values(), self.optim.grad_norm])
                # A sum remembers that one of its terms was not finite.
                total = total + values
                late = self.is_late(time.perf_counter() - start)
                over = late or self.steps == self.config.max_steps
                if step % check_every == 0 or step == self.steps_per_epoch or over:
                    self.check_finite(terms, total.tolist(), step)
                    bar.set_postfix_str(describe(terms), refresh=False)
                bar.update()
                if over:
                    break
        self.synchronize()
        means = (total / step).tolist()
        # The prior alone has no reconstruction, hence no negative ELBO.
        record = {} if svi is self.prior_svi else {"train": sum(means[:-1])}
        record["grad_norm"] = means[-1]
        return record | {f"train {n}": mean for n, mean in zip(terms, means, strict=False)}

    @contextmanager
    def phase(self) -> Iterator[pyro.infer.SVI]:
        r"""Yields the SVI of an epoch, with its networks in train mode and the others frozen."""
        self.vae.train()
        if len(self.history) < self.config.epochs:
            losses = [record["train"] for record in self.history]
            first = stands_in(self.config, losses, self.steps_per_epoch)
            yield self.gaussian_svi if first else self.svi
            return
        # Of the prior alone: frozen networks are in eval mode, and need no gradients.
        networks = (self.vae.encoder.eval(), self.vae.decoder.eval())
        frozen = [p for network in networks for p in network.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield self.prior_svi
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def validate(self, epoch: int) -> float:
        r"""Returns the negative ELBO of the validation images, in nats per datum.

        The bound is estimated with the same random numbers in every epoch, so that models are
        compared and not their noise. An epoch that is not validated has the loss of the one before.

        Arguments:
            epoch: The number of the epoch, from 1.
        """
        every = self.config.validate_every
        # The last epoch is always validated, whichever budget ends the run.
        if epoch % every and self.history and not self.is_spent(epoch):
            return self.history[-1]["validation"]
        start, size = time.perf_counter(), max(self.batch_size, 100)
        elbo = value_elbo(self.config.validate_k)
        loss = validation_loss(self.current(), self.data.validation, elbo, size)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the validation loss is {loss} after epoch {epoch}{self.whereabouts()}"
            )
        self.seconds += time.perf_counter() - start
        return loss
