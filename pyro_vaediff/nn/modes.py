r"""Modes and memory formats of networks, and copies that share their parts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

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


def use_channels_last(module: nn.Module) -> None:
    r"""Has the convolutions of a module see images with the channels last in memory.

    Some processors compute convolutions faster this way, above all in ``bfloat16``. The parameters
    stay as they are: Pyro's store would train copies of others. Results are the same up to
    rounding.

    Arguments:
        module: The module, which is changed.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            part.register_forward_pre_hook(channels_last)


def channels_last(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    r"""Returns the arguments of a convolution with the channels last in memory."""
    return (args[0].contiguous(memory_format=torch.channels_last), *args[1:])
