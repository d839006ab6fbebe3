r"""Checks of arguments. Each error is one line: the argument, what it must be, and what it is."""

from __future__ import annotations

import argparse
import operator
from collections.abc import Iterable
from pathlib import Path

__all__ = ["check_choice", "check_seed", "check_whole", "folder"]


def check_whole(argument: str, value: object, least: int = 1, why: str = "") -> None:
    r"""Raises a ``ValueError`` unless a value is a whole number.

    Arguments:
        argument: The name of the argument.
        value: Its value.
        least: The smallest number that is allowed.
        why: What needs it, for the message.
    """
    try:
        valid = operator.index(value) >= least and not isinstance(value, bool)
    except TypeError:  # also whole floats, which do not count anything
        valid = False
    if not valid:
        raise ValueError(f"{argument} must be a whole number >= {least}{why}, got {value!r}")


def check_choice(argument: str, value: object, choices: Iterable[str]) -> None:
    r"""Raises a ``ValueError`` unless a value is one of the choices, which it names."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"unknown {argument} {value!r}: choose one of {', '.join(choices)}")


def check_seed(seed: object, argument: str = "seed") -> None:
    r"""Raises a ``ValueError`` unless a value is a seed of torch's generators.

    They take some negative numbers as well, which mean the same as others.
    """
    try:
        valid = 0 <= operator.index(seed) < 2**63 and not isinstance(seed, bool)
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"{argument} must be a whole number in [0, 2^63), got {seed!r}")


def folder(text: str) -> Path:
    r"""Returns the path of a folder, for ``argparse``: an empty one is a shell's unset variable."""
    if not text:
        raise argparse.ArgumentTypeError(f"must be the path of a folder, got {text!r}")
    return Path(text)
