r"""Modes of networks, and copies that share their parts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    r"""Puts a module in eval mode, and restores the mode of each of its parts afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def shallow_copy(module: M) -> M:
    r"""Returns a module with the same parts and parameters, whose parts can be exchanged."""
    new = copy.copy(module)
    new._modules = dict(module._modules)
    return new
