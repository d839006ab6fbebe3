r"""One torch optimizer for Pyro's SVI, and its learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from operator import add
from typing import Any

import pyro.infer
import torch
from pyro import poutine
from pyro.optim import PyroOptim
from torch import Tensor, nn

from ..infer import Estimator, differentiable_terms
from ..register import RegisterOnce
from ..vae import VAE
from . import distributed
from .config import TrainConfig

__all__ = [
    "TermsLoss",
    "TorchOptim",
    "learning_rate",
    "make_optim",
    "make_svi",
    "parameter_groups",
    "per_datum",
]


def per_datum(program: Callable, batch_size: int | None = None) -> Callable:
    r"""Returns a program whose log-densities are divided by the size of its batch.

    Arguments:
        program: The program, whose first argument is the batch.
        batch_size: The size of the whole batch, if several processes share it: their losses then
            sum to that of the batch.
    """

    def scaled(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with poutine.scale(scale=1 / (batch_size or len(x))):
            return program(x, *args, **kwargs)

    return scaled


class TorchOptim(PyroOptim):
    r"""One torch optimizer for all parameters, as :class:`pyro.infer.SVI` calls one.

    Pyro's own optimizers hold one torch optimizer per parameter. A single one is faster, clips the
    *global* norm of the gradient, and has a state to resume from.

    Arguments:
        optimizer: The optimizer.
        clip_norm: The largest global norm of the gradient, if it is clipped.
        scheduler: A learning rate schedule, to be advanced after each step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ):
        # Not super().__init__: it prepares for one torch optimizer per parameter.
        self.optimizer = optimizer
        self.clip_norm = math.inf if clip_norm is None else clip_norm
        self.scheduler = scheduler
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._known = set(self.parameters)
        #: The global norm of the last gradient, before clipping.
        self.grad_norm = torch.tensor(math.nan)

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        r"""Takes a step. ``params`` are the parameters that the programs registered with Pyro.

        Raises:
            ValueError: If the optimizer lacks one of them, which would never be trained.
        """
        unknown = set(params) - self._known
        if unknown:
            shapes = ", ".join(str(tuple(p.shape)) for p in unknown)
            raise ValueError(f"the optimizer lacks parameters of the programs, of shapes {shapes}")
        foreach = self.parameters[0].device.type in ("cpu", "cuda") or None
        self.grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm, foreach=foreach)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        # SVI would leave zeros, with which Adam goes on moving parameters that are frozen later.
        self.optimizer.zero_grad()

    def get_state(self) -> dict[str, Any]:
        r"""Returns the state of the optimizer and of the learning rate schedule."""
        state = {"optimizer": self.optimizer.state_dict()}
        return (
            state if self.scheduler is None else state | {"scheduler": self.scheduler.state_dict()}
        )

    def set_state(self, state_dict: dict[str, Any]) -> None:
        r"""Restores what :meth:`get_state` returned."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state_dict["scheduler"])


#: The epochs before a learning rate falls like the inverse square root of the step.
HOLD = 10


class TermsLoss:
    r"""The loss of :class:`pyro.infer.SVI`, whose terms stay on their device.

    The processes of a :func:`~pyro_vaediff.train.distributed.process_group` take the same step,
    along the sum of their gradients. Modules register their parameters in one step of a hundred:
    the optimizer has them already, and complains about one that it lacks.

    Arguments:
        elbo: The estimator.
        optim: The optimizer.
    """

    register_every = 100

    def __init__(self, elbo: Estimator, optim: TorchOptim):
        self.elbo, self.optim = elbo, optim
        self._once, self._calls = RegisterOnce(), 0
        #: The terms of the last loss, by name.
        self.terms: dict[str, Tensor] = {}

    def __call__(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        r"""Adds the gradient of the loss to those of the parameters, and keeps its terms."""
        if self._calls % self.register_every == 0:
            self._once.clear()
        self._calls += 1
        with self._once:
            terms = differentiable_terms(self.elbo, model, guide, *args, **kwargs)
        reduce(add, terms.values()).backward()
        self.terms = {name: term.detach() for name, term in terms.items()}
        gradients = [p.grad for p in self.optim.parameters if p.grad is not None]
        distributed.sum_([*gradients, *self.terms.values()])
        return 0.0  # a number that is read from the device would have to be waited for

    def gradient(self, model: Callable, guide: Callable, *args: Any) -> Sequence[Tensor]:
        r"""Returns the gradient of the loss by parameter, and leaves those of the parameters."""
        parameters = [p for p in self.optim.parameters if p.requires_grad]
        with self._once:
            loss = reduce(add, differentiable_terms(self.elbo, model, guide, *args).values())
        return torch.autograd.grad(loss, parameters, materialize_grads=True)


def make_svi(
    model: Callable, guide: Callable, optim: TorchOptim, elbo: Estimator
) -> pyro.infer.SVI:
    r"""Returns Pyro's SVI, the terms of whose last loss are in ``svi.loss.terms``.

    Arguments:
        model: The model.
        guide: The guide.
        optim: The optimizer.
        elbo: The estimator.
    """
    loss = TermsLoss(elbo, optim)
    return pyro.infer.SVI(model, guide, optim, loss, loss_and_grads=loss)


def parameter_groups(vae: VAE, config: TrainConfig) -> list[dict[str, Any]]:
    r"""Returns the parameters in groups, each with a learning rate and a weight decay.

    Arguments:
        vae: The VAE.
        config: The configuration.
    """
    prior = list(vae.prior.parameters())
    known, lr, decay = set(prior), config.prior_lr or config.lr, config.prior_weight_decay
    decayed = [p for p in prior if decay and p.ndim >= 2]
    others = [p for p in prior if not (decay and p.ndim >= 2)]
    groups = [
        {"params": [p for p in vae.parameters() if p not in known], "lr": config.lr},
        {"params": others, "lr": lr},
        {"params": decayed, "lr": lr, "weight_decay": decay},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(config: TrainConfig, steps_per_epoch: int) -> Callable[[int], float]:
    r"""Returns the factor of the learning rates as a function of the step.

    Arguments:
        config: The configuration.
        steps_per_epoch: The number of steps in an epoch.
    """
    joint, alone = (
        max(1, epochs * steps_per_epoch) for epochs in (config.epochs, config.prior_epochs)
    )
    joint = min(joint, config.max_steps or joint)

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
        if config.lr_schedule == "constant":
            return warm
        if config.lr_schedule == "inverse-sqrt":
            return warm * math.sqrt(min(1.0, HOLD * steps_per_epoch / max(1, step)))
        start = config.epochs * steps_per_epoch
        done = (step - start) / alone if step >= start else step / joint
        return warm * (1 + math.cos(math.pi * min(1.0, done))) / 2

    return factor


def make_optim(
    vae: VAE,
    config: TrainConfig,
    steps_per_epoch: int,
    make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
) -> TorchOptim:
    r"""Returns the optimizer of a run, with its learning rates and the clipping of gradients.

    Arguments:
        vae: The VAE.
        config: The configuration.
        steps_per_epoch: The number of steps in an epoch.
        make_optimizer: A function from groups of parameters to an optimizer; AdamW by default.
    """
    # Fused, a step of a small network on a CPU takes a fifth less time.
    fused = vae.prior.origin.device.type in ("cpu", "cuda")
    make = make_optimizer or partial(torch.optim.AdamW, weight_decay=0.0, fused=fused)
    optimizer = make(parameter_groups(vae, config))
    if config.lr_schedule == "constant" and not config.warmup:
        return TorchOptim(optimizer, config.clip_norm)
    factor = learning_rate(config, steps_per_epoch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return TorchOptim(optimizer, config.clip_norm, scheduler)


def describe(terms: dict[str, Tensor]) -> str:
    r"""Returns the terms of a loss on one line, their sum first."""
    values = {"-ELBO": sum(terms.values())} | (terms if len(terms) > 1 else {})
    return ", ".join(f"{name} {float(value):.1f}" for name, value in values.items())
