r"""Registration of networks with Pyro, such that two models never disturb each other."""

from __future__ import annotations

import itertools
import weakref

import pyro
from torch import nn

__all__ = ["register"]

_names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_counter = itertools.count()


def register(name: str, module: nn.Module) -> nn.Module:
    r"""Registers the trainable parameters of a module with Pyro, under names of its own.

    :func:`pyro.module` identifies a parameter by its name: a second model of the same class in one
    process computes with its own weights while SVI updates those of the first, and never trains.
    Here, every module *object* gets a name of its own, also when it is a deep copy. Parameters
    with ``requires_grad=False`` are frozen on purpose, and left out without a warning.

    Arguments:
        name: A readable prefix for the names, such as ``"encoder"``.
        module: The module.

    Returns:
        The same module.
    """
    unique = _names.get(module)
    if unique is None:
        unique = _names[module] = f"{name}.{next(_counter)}"
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            pyro.param(f"{unique}$$${key}", parameter)
    return module
