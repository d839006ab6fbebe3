r"""Pyro's SVI with one torch optimizer, and the terms of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pyro.infer
import torch
from pyro import poutine
from pyro.optim import PyroOptim
from torch import Tensor, nn

from ..infer.terms import differentiable_terms
from . import distributed

__all__ = ["SVI", "TorchOptim", "per_datum"]


def per_datum(program: Callable, batch_size: int | None = None) -> Callable:
    r"""Scales a program's log-densities by the size of its batch, to nats per datum.

    Arguments:
        program: The program, whose first argument is the batch.
        batch_size: The size of the whole batch, if several processes share it: their losses then
            sum to that of the batch.
    """

    def scaled(x: Tensor, *args, **kwargs) -> Any:
        with poutine.scale(scale=1 / (batch_size or len(x))):
            return program(x, *args, **kwargs)

    return scaled


class TorchOptim(PyroOptim):
    r"""One torch optimizer for all parameters, in the form that Pyro's SVI expects.

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
        self.grad_norm: Tensor | None = None

    def __call__(self, params: Iterable[Tensor], *args, **kwargs) -> None:
        r"""Takes a step. ``params`` are the parameters that the programs registered with Pyro.

        Raises:
            ValueError: If the optimizer lacks one of them, which would never be trained.
        """
        unknown = set(params) - self._known
        if unknown:
            shapes = ", ".join(str(tuple(p.shape)) for p in unknown)
            raise ValueError(f"the optimizer lacks parameters of the programs, of shapes {shapes}")
        self.grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def get_state(self) -> dict:
        r"""Returns the state of the optimizer and of the learning rate schedule."""
        state = {"optimizer": self.optimizer.state_dict()}
        return (
            state if self.scheduler is None else state | {"scheduler": self.scheduler.state_dict()}
        )

    def set_state(self, state_dict: dict) -> None:
        r"""Restores what :meth:`get_state` returned."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state_dict["scheduler"])


class SVI(pyro.infer.SVI):
    r"""Pyro's SVI, whose step returns each term of the loss and leaves it on its device.

    The processes of a :func:`~pyro_vaediff.train.distributed.process_group` take the same step,
    along the sum of their gradients.
    """

    def __init__(self, model: Callable, guide: Callable, optim: TorchOptim, loss: pyro.infer.ELBO):
        self.elbo = loss
        super().__init__(model, guide, optim, loss=loss)

    def step(self, *args, **kwargs) -> dict[str, Tensor]:
        r"""Takes a gradient step and returns the terms whose sum is the loss."""
        with poutine.trace(param_only=True) as capture:
            terms = differentiable_terms(self.elbo, self.model, self.guide, *args, **kwargs)
            sum(terms.values()).backward()
        params = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
        terms = {name: term.detach() for name, term in terms.items()}
        gradients = (p.grad for p in params if p.grad is not None)
        distributed.sum_([*gradients, *terms.values()])
        self.optim(params)
        for parameter in params:
            parameter.grad = None
        return terms
