r"""The cost of one evaluation of an estimator: network evaluations, time and memory."""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..infer import Estimator
from ..vae import VAE
from .programs import (
    Data,
    Programs,
    arguments,
    diffusion_priors,
    num_data,
    own_store,
    programs_of,
)

__all__ = ["count_evaluations", "peak_memory", "step_times", "timings", "whole_step"]


@contextmanager
def count_evaluations(vae: VAE) -> Iterator[dict[str, int]]:
    r"""Counts how many inputs the networks of a VAE with a diffusion prior are evaluated at.

    Those of several diffusion priors, in a hierarchy, add up.

    Arguments:
        vae: The VAE.

    Returns:
        A context, inside of which the counts of ``"encoder"``, ``"decoder"`` and ``"denoiser"``
        add up: one for each image, latent or :math:`z_t`.
    """
    networks: list[tuple[str, torch.nn.Module, int | None]]
    networks = [("encoder", vae.encoder, None), ("decoder", vae.decoder, vae.prior.event_dim)]
    for prior in diffusion_priors(vae):
        networks.append(("denoiser", prior.denoiser.backbone, prior.event_dim))
    counts = {name: 0 for name, _, _ in networks}

    def hook(name: str, event_dim: int | None) -> Callable:
        def count(module: torch.nn.Module, args: tuple) -> None:
            shape = args[0].shape
            # Data come in one batch, latents in any.
            batch = shape[:1] if event_dim is None else shape[: len(shape) - event_dim]
            counts[name] += batch.numel()

        return count

    handles = [net.register_forward_pre_hook(hook(n, dim)) for n, net, dim in networks]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


class _LiveMemory(TorchDispatchMode):
    r"""Follows the bytes of the tensors that operations create, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if is_tensor(tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known and id(storage) not in inputs:
                    self._add(storage)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def free() -> None:
            self._known.discard(key)
            self.live -= size

        weakref.finalize(storage, free)


def is_tensor(x: object) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor)


def peak_memory(step: Callable[[], object], device: torch.device) -> int:
    r"""Returns the largest memory of the tensors that a step creates, in bytes.

    Parameters, their gradients of earlier steps and the state of an optimizer are there before.

    Arguments:
        step: The step, which must have run before.
        device: The device that it computes on.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveMemory() as memory:
        step()
    return memory.peak


def whole_step(elbo: Estimator, vae: VAE | Programs, x: Data) -> Callable[[], object]:
    r"""Returns a whole training step: loss, gradient, clipping, Adam. Parameters stay as they are.

    Arguments:
        elbo: The estimator.
        vae: The VAE, or any programs.
        x: The data, with shape :math:`(B, *)`, or the arguments of the programs.
    """
    # Adam computes all the same if its learning rate is zero.
    programs = programs_of(vae)
    parameters = programs.parameters
    adam = torch.optim.Adam(parameters, lr=0.0)
    for parameter in parameters:  # its state is there before the first step
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    adam.zero_grad()
    scale = 1 / num_data(x)
    model, guide = (poutine.scale(p, scale=scale) for p in (programs.model, programs.guide))

    def step() -> float:
        with own_store():
            loss = elbo.loss_and_grads(model, guide, *arguments(x))
        torch.nn.utils.clip_grad_norm_(parameters, 1e6)
        adam.step()
        adam.zero_grad()
        return loss

    return step


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    r"""Returns the time of a step, from and to an idle device."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def timings(
    steps: Sequence[Callable[[], object]], repeats: int, device: torch.device
) -> list[list[float]]:
    r"""Returns the times of each step in milliseconds, measured in turns.

    Arguments:
        steps: The steps.
        repeats: How many times each of them is timed.
        device: The device that they compute on.
    """
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        for column, step in zip(times, steps, strict=True):
            column.append(milliseconds(step, device))
    return times


def step_times(
    steps: Sequence[Callable[[], object]], repeats: int, device: torch.device
) -> list[float]:
    r"""Returns the median time of each step in milliseconds, measured in turns: :func:`timings`."""
    return [statistics.median(column) for column in timings(steps, repeats, device)]


def median_se(times: Sequence[float]) -> float:
    r"""Returns the standard error of a median, :math:`\sqrt{\pi / 2 n} \, \sigma`.

    The deviation :math:`\sigma` is that of normal times with the same median absolute deviation: a
    few steps that were disturbed do not count.
    """
    median = statistics.median(times)
    deviation = statistics.median(abs(time - median) for time in times) / 0.6745
    return math.sqrt(math.pi / (2 * len(times))) * deviation
