r"""A number of timesteps that follows the noise of the gradient, and what it costs to lower it.

The gradient of a step has a part of its variance that no number of timesteps lowers, :math:`A`,
from the minibatch and from :math:`z_0`, and a part that falls with it:

.. math:: \mathrm{tr} \, \mathrm{Cov}(g) = A + V / k, \qquad \mathrm{cost} = c_0 + c_1 k .

In a fixed time, the variance of the mean gradient is proportional to their product, whose minimum
is at

.. math:: k^* = \sqrt{\frac{V \, c_0}{A \, c_1}} .
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from pyro.infer import SVI
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..infer import Estimator, Reweighted, Timestep_ELBO
from ..vae import VAE
from . import distributed
from .splits import Split

__all__ = ["AutoK", "best_k", "split_noise"]

#: A function from the arguments of the programs to the gradient of the loss, by parameter.
Gradient = Callable[..., Sequence[Tensor]]


def best_k(fixed: float, falling: float, cost: float, cost_per_timestep: float) -> float:
    r"""Returns :math:`k^*`, as a real number.

    Arguments:
        fixed: The variance :math:`A` that timesteps do not lower.
        falling: The variance :math:`V` of a single timestep.
        cost: The cost :math:`c_0` of a step without timesteps.
        cost_per_timestep: The cost :math:`c_1` of each.

    Example:
        >>> best_k(fixed=1.0, falling=16.0, cost=4.0, cost_per_timestep=1.0)
        8.0
    """
    if fixed <= 0 or cost_per_timestep <= 0:  # estimates may be
        return math.inf
    return math.sqrt(max(0.0, falling) * max(0.0, cost) / (fixed * cost_per_timestep))


def split_noise(low: float, high: float, total: float, ks: tuple[int, int]) -> tuple[float, float]:
    r"""Returns the variances :math:`A` and :math:`V`.

    Arguments:
        low: The variance of the gradient of one minibatch with few timesteps.
        high: That with many.
        total: The variance with many timesteps over minibatches.
        ks: How few and how many.

    Example:
        >>> split_noise(1.0 + 8 / 2, 1.0 + 8 / 8, 3.0 + 1.0 + 8 / 8, ks=(2, 8))
        (4.0, 8.0)
    """
    falling = (low - high) / (1 / ks[0] - 1 / ks[1])
    return total - falling / ks[1], falling


class AutoK:
    r"""Sets the number of timesteps of an estimator to the best one, measured while it trains.

    A measurement takes gradients of a few minibatches, twice each with 2 and with 8 timesteps. The
    first one is after ``first`` steps, each further one after twice as many: their cost dwindles.
    The variance of each parameter tensor is relative to the mean square of its gradient, as Adam
    divides by the root of it, and what was measured before counts as much as what is new.

    The costs are counted floating-point operations, not seconds: by a clock, a run could neither be
    repeated nor resumed bit for bit, and would depend on what else the machine does.

    Arguments:
        elbo: The estimator, or one that is reweighted, with timesteps that are drawn.
        batch_size: The number of data in a step, and in a minibatch of a measurement.
        first: The number of steps before the first measurement.
        num_batches: The number of minibatches of a measurement, at least 2.
        most: The largest number of timesteps.

    Raises:
        ValueError: If the estimator has no number of timesteps.
    """

    ks = (2, 8)

    def __init__(
        self,
        elbo: Estimator,
        batch_size: int = 100,
        first: int = 100,
        num_batches: int = 4,
        most: int = 64,
    ):
        bound = elbo.bound if isinstance(elbo, Reweighted) else elbo
        if not isinstance(bound, Timestep_ELBO) or bound.proposal is None:
            raise ValueError(
                "k='auto' needs a Timestep_ELBO with timesteps that are drawn, got "
                f"{type(bound).__name__}"
            )
        if num_batches < 2:
            raise ValueError(f"num_batches must be at least 2, got {num_batches}")
        self.collapse, self.batch_size = bound.collapse, batch_size
        self.num_batches, self.most = num_batches, most
        #: The step after which the next measurement is.
        self.due = first
        self.noise: tuple[float, float] | None = None  # A and V
        self.cost: tuple[float, float] | None = None  # c_0 and c_1

    @property
    def k(self) -> int:
        r"""The number of timesteps per datum."""
        return self.collapse.k

    def follow(self, step: int, svi: SVI, vae: VAE, data: Split) -> None:
        r"""Measures after a step, if it is time to.

        Arguments:
            step: The number of steps that were taken.
            svi: The SVI that takes them.
            vae: The VAE.
            data: The training data, from which minibatches are drawn.
        """
        if step < self.due:
            return
        size = max(1, self.batch_size // distributed.size())
        batches = (data.draw(vae, size) for _ in range(self.num_batches))
        self.measure(partial(svi.loss.gradient, svi.model, svi.guide), batches)

    def measure(self, gradient: Gradient, batches: Iterable[Sequence[Tensor]]) -> None:
        r"""Measures the noise, and sets the number of timesteps.

        Arguments:
            gradient: A function from the arguments of the programs to the gradient of the loss.
            batches: The minibatches, as these arguments.
        """
        self.due *= 2
        spread: dict[str, list[Tensor]] = {"low": [], "high": [], "total": [], "square": []}
        before: Sequence[Tensor] | None = None
        for batch in batches:
            if self.cost is None:
                self.cost = self.count(gradient, batch)
            few, many = ([self.at(k, gradient, batch) for _ in range(2)] for k in self.ks)
            spread["low"].append(half_squares(*few))
            spread["high"].append(half_squares(*many))
            spread["square"].append(2 * half_squares(many[0]))
            if before is not None:
                spread["total"].append(half_squares(before, many[0]))
            before = many[1]
        # Each tensor relative to the mean square of its elements, and as often as it has elements.
        square = torch.stack(spread.pop("square")).mean(0)
        sizes = torch.tensor([float(g.numel()) for g in before or ()], dtype=torch.float64)
        weights = torch.where(square > 0, sizes / square, 0.0)
        low, high, total = (float(torch.stack(v).mean(0) @ weights) for v in spread.values())
        new = split_noise(low, high, total, self.ks)
        self.noise = new if self.noise is None else mean(self.noise, new)
        assert self.cost is not None
        best = min(best_k(*self.noise, *self.cost), self.most)
        chosen = torch.tensor(float(max(2, 2 * round(best / 2))))  # even, for pairs
        distributed.broadcast_([chosen])
        self.collapse.k = int(chosen)

    def at(self, k: int, gradient: Gradient, batch: Sequence[Tensor]) -> Sequence[Tensor]:
        r"""Returns a gradient with another number of timesteps."""
        mine, self.collapse.k = self.collapse.k, k
        try:
            return gradient(*batch)
        finally:
            self.collapse.k = mine

    def count(self, gradient: Gradient, batch: Sequence[Tensor]) -> tuple[float, float]:
        r"""Returns the operations of a step without timesteps, and of each of them."""
        flops = []
        for k in self.ks:
            with FlopCounterMode(display=False) as counter:
                self.at(k, gradient, batch)
            flops.append(counter.get_total_flops())
        each = (flops[1] - flops[0]) / (self.ks[1] - self.ks[0])
        return flops[0] - self.ks[0] * each, each

    def state_dict(self) -> dict[str, Tensor]:
        r"""Returns what was measured, for checkpoints."""
        noise, cost = ((math.nan, math.nan) if x is None else x for x in (self.noise, self.cost))
        numbers = [self.k, self.due, *noise, *cost]
        return {"auto_k": torch.tensor(numbers, dtype=torch.float64)}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        r"""Loads what :meth:`state_dict` returned."""
        k, due, *numbers = state_dict["auto_k"].tolist()
        self.collapse.k, self.due = int(k), int(due)
        self.noise, self.cost = (
            None if math.isnan(pair[0]) else (pair[0], pair[1])
            for pair in (numbers[:2], numbers[2:])
        )


def half_squares(one: Sequence[Tensor], other: Sequence[Tensor] | None = None) -> Tensor:
    r"""Returns half of the squared distance of two gradients, tensor by tensor."""
    pairs = zip(one, one if other is None else other, strict=True)
    squares = [(a if other is None else a - b).double().square().sum().cpu() / 2 for a, b in pairs]
    return torch.stack(squares)


def mean(old: tuple[float, float], new: tuple[float, float]) -> tuple[float, float]:
    return (old[0] + new[0]) / 2, (old[1] + new[1]) / 2
