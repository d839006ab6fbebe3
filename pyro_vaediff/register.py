r"""Registration of networks with Pyro, such that two models never disturb each other."""

from __future__ import annotations

import weakref

import pyro
from pyro.params.param_store import ParamStoreDict
from torch import Tensor, nn

__all__ = ["register"]

DIVIDER = "$$$"  # that of pyro.module, between the name of a module and that of a parameter

_names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
# By identity, as tensors are not compared by it. An id is given again once its tensor is gone.
_registered: dict[int, weakref.ref[Tensor]] = {}


def register(name: str, module: nn.Module) -> nn.Module:
    r"""Registers the trainable parameters of a module with Pyro, under names of its own.

    :func:`pyro.module` identifies a parameter by its name: a second model of the same class in one
    process computes with its own weights while SVI updates those of the first, and never trains.
    Here, every live module *object* has a name of its own: ``"encoder"``, ``"encoder_1"``, and so
    on. The names are the same in every process that makes the same modules, so that a saved
    parameter store can be loaded: values that the store has from elsewhere are copied to the module
    when it is first registered. A layer that was replaced takes the place of the old one.
    Parameters with ``requires_grad=False`` are frozen on purpose, and left out without a warning.

    Arguments:
        name: A readable prefix for the names, such as ``"encoder"``.
        module: The module.

    Returns:
        The same module.

    Raises:
        ValueError: If a parameter is not contiguous in memory.
    """
    store = pyro.get_param_store()
    prefix = _names.get(module)
    if prefix is None:
        prefix = _names[module] = free_name(name)
        forget_dead(store)
    known = dict(store.named_parameters())
    names = {parameter: full for full, parameter in known.items()}
    for key, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if not parameter.is_contiguous():
            raise ValueError(
                f"parameter {key} of the {name} must be contiguous, or Pyro's store would train a "
                "copy of it: convert the data to another memory format, not the networks"
            )
        # A parameter that modules share has one name: the store could not forget a second one.
        full = names.get(parameter, f"{prefix}{DIVIDER}{key}")
        stored = known.get(full)
        if stored is not parameter:
            if stored is not None:
                if not is_registered(stored):  # but loaded from a file, or set by hand
                    parameter.data.copy_(stored.detach())
                del store[full]
            _registered[id(parameter)] = weakref.ref(parameter)
        pyro.param(full, parameter)
    return module


def is_registered(parameter: Tensor) -> bool:
    r"""Returns ``True`` if a tensor of a store is the parameter of a module."""
    reference = _registered.get(id(parameter))
    return reference is not None and reference() is parameter


def free_name(name: str) -> str:
    taken = set(_names.values())
    number = 0
    while (candidate := f"{name}_{number}" if number else name) in taken:
        number += 1
    return candidate


def forget_dead(store: ParamStoreDict) -> None:
    r"""Removes what modules that are no more have left in a store, and in the table."""
    live = set(_names.values())
    for full, parameter in list(store.named_parameters()):
        prefix, divider, _ = full.partition(DIVIDER)
        if divider and prefix not in live and is_registered(parameter):
            del store[full]
    for key, reference in list(_registered.items()):
        if reference() is None:
            del _registered[key]
