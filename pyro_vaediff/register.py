r"""Registration of networks with Pyro, such that two models never disturb each other."""

from __future__ import annotations

import weakref

import pyro
from pyro.params.param_store import ParamStoreDict
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Tensor, nn

__all__ = ["RegisterOnce", "register"]

DIVIDER = "$$$"  # that of pyro.module, between the name of a module and that of a parameter

_names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
# By identity, as tensors are not compared by it. An id is given again once its tensor is gone.
_registered: dict[int, weakref.ref[Tensor]] = {}


@effectful(type="register")
def register(name: str, module: nn.Module) -> nn.Module:
    r"""Registers the trainable parameters of a module with Pyro, under names of its own.

    :func:`pyro.module` identifies a parameter by its name: a second model of the same class in one
    process computes with its own weights while SVI updates those of the first, and never trains.
    Here, every live module *object* has a name of its own: ``"encoder"``, ``"encoder_1"``, and so
    on. The names are the same in every process that makes the same modules, so that a saved
    parameter store can be loaded: values that the store has from elsewhere are copied to the module
    when it is first registered. A layer that was replaced takes the place of the old one.
    Parameters with ``requires_grad=False`` are frozen on purpose, and left out without a warning.

    It is an *effectful statement*, of the message type ``"register"``: see :class:`RegisterOnce`.

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


class RegisterOnce(Messenger):
    r"""An effect handler that has each module registered once, not in every step.

    Registration walks through all of a module's parameters, which for small networks takes longer
    than what is computed with them. Whoever steps an optimizer that has the parameters already, as
    :func:`~pyro_vaediff.train.optim.make_svi` does, has no use for a second time.

    Example:
        >>> once, net = RegisterOnce(), nn.Linear(2, 2)
        >>> for _ in range(2):
        ...     with pyro.poutine.trace() as tracer, once:
        ...         _ = register("net", net)
        ...     print(len(tracer.trace.param_nodes))
        2
        0
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def clear(self) -> None:
        r"""Has all modules registered again, such as after a layer was replaced."""
        self.seen.clear()

    def _pyro_register(self, msg: dict) -> None:
        module = msg["args"][1]
        if module in self.seen:
            msg["value"] = module

    def _pyro_post_register(self, msg: dict) -> None:
        self.seen.add(msg["value"])


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
