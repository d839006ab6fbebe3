r"""Checks of arguments. Each error is one line: the argument, what it must be, and what it is."""

from __future__ import annotations

import argparse
import math
import operator
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "as_image",
    "as_shape",
    "check_choice",
    "check_ends",
    "check_nonnegative",
    "check_seed",
    "check_whole",
    "exit_on_error",
    "folder",
]


def check_whole(argument: str, value: object, least: int = 1, why: str = "") -> None:
    r"""Raises a ``ValueError`` unless a value is a whole number.

    Arguments:
        argument: The name of the argument.
        value: Its value.
        least: The smallest number that is allowed.
        why: What needs it, for the message.
    """
    if not is_whole(value, least):
        raise ValueError(f"{argument} must be a whole number >= {least}{why}, got {value!r}")


def as_shape(argument: str, shape: int | Sequence[int]) -> tuple[int, ...]:
    r"""Returns a shape as a tuple; a number :math:`D` means :math:`(D,)`.

    Arguments:
        argument: The name of the argument, for the message.
        shape: The shape, of positive numbers.
    """
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if not sizes:
        raise ValueError(f"{argument} must have at least one dimension, got ()")
    for size in sizes:
        check_whole(argument if len(sizes) == 1 else f"each number in {argument}", size)
    return tuple(int(size) for size in sizes)


def as_image(argument: str, shape: int | Sequence[int], what: str) -> tuple[int, int, int]:
    r"""Returns the shape :math:`(C, h, w)` of an image as a tuple.

    Arguments:
        argument: The name of the argument, for the message.
        shape: The shape, of positive numbers.
        what: What needs an image, for the message.
    """
    sizes = as_shape(argument, shape)
    if len(sizes) != 3:
        raise ValueError(f"{argument} must be (C, h, w) for a {what}, got {sizes}")
    return sizes


def check_ends(argument: str, x: Tensor, shape: Sequence[int]) -> None:
    r"""Raises a ``ValueError`` unless the shape of a tensor ends in the given one."""
    if tuple(x.shape[-len(shape) :]) != tuple(shape):
        raise ValueError(f"{argument} must end in shape {tuple(shape)}, got {tuple(x.shape)}")


def check_nonnegative(argument: str, value: object) -> None:
    r"""Raises a ``ValueError`` unless a value is a number that is finite and at least 0."""
    if not (isinstance(value, int | float) and 0 <= value < math.inf):
        raise ValueError(f"{argument} must be a finite number >= 0, got {value!r}")


def is_whole(value: object, least: int, below: float = math.inf) -> bool:
    if not isinstance(value, SupportsIndex):  # also whole floats, which do not count anything
        return False
    try:
        return least <= operator.index(value) < below and not isinstance(value, bool)
    except TypeError:  # such as a tensor of several numbers
        return False


def check_choice(argument: str, value: object, choices: Iterable[str]) -> None:
    r"""Raises a ``ValueError`` unless a value is one of the choices, which it names."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"unknown {argument} {value!r:.80}: choose one of {', '.join(choices)}")


def check_seed(seed: object, argument: str = "seed") -> None:
    r"""Raises a ``ValueError`` unless a value is a seed of torch's generators.

    They take some negative numbers as well, which mean the same as others.
    """
    if not is_whole(seed, least=0, below=2**63):
        raise ValueError(f"{argument} must be a whole number in [0, 2^63), got {seed!r}")


def folder(text: str) -> Path:
    r"""Returns the path of a folder, for ``argparse``: an empty one is a shell's unset variable."""
    if not text:
        raise argparse.ArgumentTypeError(f"must be the path of a folder, got {text!r}")
    return Path(text)


@contextmanager
def exit_on_error(interrupted: str | None = None) -> Iterator[None]:
    r"""Ends a script with one line, and not a traceback, if its input is not valid.

    Arguments:
        interrupted: What to tell whoever interrupts the script, or ``None`` for a traceback.
    """
    try:
        yield
    except (ValueError, OSError, ArithmeticError) as error:
        process = f"process {os.environ['RANK']}: " if "RANK" in os.environ else ""
        # Pyro appends the shapes of the trace to an error that is raised inside a program.
        sys.exit(f"error: {process}{str(error).partition(chr(10))[0]}")
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        sys.exit(f"interrupted: {interrupted}")
