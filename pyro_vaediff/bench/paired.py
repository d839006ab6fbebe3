r"""Common random numbers: the difference of two estimates whose noise is shared.

.. math:: \mathrm{Var}(a - b) = \mathrm{Var}(a) + \mathrm{Var}(b) - 2 \, \mathrm{Cov}(a, b)

Two models, or two estimators, that draw alike from one seed have a large covariance, and their
difference is known long before either of them is.

References:
    | Simulation and the Monte Carlo Method (Rubinstein & Kroese, 2016), section 5.2
    | https://doi.org/10.1002/9781118631980
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..arguments import check_seed, check_whole

__all__ = ["Difference", "common_random_numbers", "paired_difference", "random_seeds"]

T = TypeVar("T")


@contextmanager
def common_random_numbers(seed: int) -> Iterator[None]:
    r"""A context inside of which torch's generators start from a seed, and go on as before after.

    Arguments:
        seed: The seed.

    Example:
        >>> with common_random_numbers(3):
        ...     a = torch.randn(2)
        >>> with common_random_numbers(3):
        ...     b = torch.randn(2)
        >>> torch.equal(a, b)
        True
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def random_seeds(seed: int, draws: int) -> list[int]:
    r"""Returns a seed for each of several draws, the same ones again from the same seed.

    Arguments:
        seed: The seed.
        draws: The number of draws.
    """
    check_seed(seed, "seed")
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**62, (draws,), generator=generator).tolist()


def reseeded(x: T, seeds: Iterable[int]) -> Iterator[T]:
    r"""Yields the same thing for each seed, from which torch's generators start meanwhile."""
    for seed in seeds:
        with common_random_numbers(seed):
            yield x


@dataclass(frozen=True)
class Difference:
    r"""A difference of two expectations.

    Arguments:
        mean: Its estimate, the mean of the paired differences.
        se: The standard error of the mean.
        independent_se: What the standard error would be if the draws were independent.
    """

    mean: float
    se: float
    independent_se: float

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Difference:
        r"""Returns the difference of paired draws, with shape :math:`(N,)` each."""
        difference, root = first - second, len(first) ** 0.5
        independent = (first.var() + second.var()).sqrt()
        return cls(
            difference.mean().item(), (difference.std() / root).item(), (independent / root).item()
        )


def paired_difference(
    first: Callable[[], float | Tensor],
    second: Callable[[], float | Tensor],
    draws: int = 100,
    seed: int = 0,
) -> Difference:
    r"""Returns the difference of two expectations, by common random numbers.

    Every pair of draws starts from a seed of its own. The expectations may be of anything, such as
    of the losses of two models; that their random numbers mean the same in both is what makes the
    standard error small, and it is right in any case.

    Arguments:
        first: A function that draws from the first, a number.
        second: A function that draws from the second.
        draws: The number of pairs, at least 2.
        seed: The seed.

    Example:
        >>> def loss(scale):
        ...     return (scale * torch.randn(100)).square().mean()
        >>> difference = paired_difference(lambda: loss(1.1), lambda: loss(1.0))
        >>> difference.se < difference.independent_se / 5
        True
    """
    check_whole("draws", draws, least=2)
    seeds = random_seeds(seed, draws)
    columns = [
        torch.tensor([float(f()) for f in reseeded(function, seeds)], dtype=torch.float64)
        for function in (first, second)
    ]
    return Difference.of(*columns)
