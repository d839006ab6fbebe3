r"""One training run in several processes, as `torchrun` starts them.

Each process has a copy of the model, randomness of its own and its share of every batch, whose loss
is scaled by the size of the whole batch. The gradients of the processes then *sum* to that of the
batch, however unevenly it was shared, and every process takes the same step.

In a program of a single process, which needs no `torchrun`, each function here does what its name
says for that process: there is nothing to wait for and nothing to add.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "broadcast_",
    "fold_seed",
    "from_main",
    "in_turns",
    "is_main",
    "process_group",
    "rank",
    "share",
    "size",
    "sum_",
]


@contextmanager
def process_group(device: torch.device | str = "cpu") -> Iterator[torch.device]:
    r"""Joins the processes that `torchrun` has started, and leaves them at the end.

    They communicate through gloo on CPUs and through NCCL on GPUs. Without `torchrun`, nothing
    happens.

    Arguments:
        device: Where to compute. On CUDA, each process of a machine gets a GPU of its own.

    Returns:
        A context manager that yields the device of this process.

    Raises:
        ValueError: If there are more processes than GPUs.
        ConnectionError: If the other processes cannot be reached.
    """
    device = torch.device(device)
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        local, count = local_rank(), torch.cuda.device_count()
        if local >= count:
            raise ValueError(
                f"process {local} of this machine has no GPU, there are {count}: start at most "
                f"--nproc-per-node {count}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    with communicating():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    r"""Returns the number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size() -> int:
    r"""Returns the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    r"""``True`` in the process that writes files and talks to the user."""
    return rank() == 0


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def share(x: Tensor) -> Tensor:
    r"""Returns this process's part of a batch; the sizes of the parts differ by one at most.

    Arguments:
        x: The batch, with shape :math:`(B, *)`.
    """
    return x.tensor_split(size())[rank()]


def fold_seed(*numbers: int) -> int:
    r"""Returns a seed that is a function of numbers, such as of a seed, an epoch and a rank.

    Example:
        >>> fold_seed(0, 1, 2) == fold_seed(0, 1, 2), fold_seed(0, 1, 2) == fold_seed(0, 2, 1)
        (True, False)
    """
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@torch.no_grad()
def sum_(tensors: Iterable[Tensor]) -> None:
    r"""Replaces tensors by their sums over the processes.

    Arguments:
        tensors: The tensors, in the same order in each process.
    """
    _in_place(tensors, dist.all_reduce)


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor]) -> None:
    r"""Replaces tensors by those of the main process.

    Arguments:
        tensors: The tensors, in the same order in each process.
    """
    _in_place(tensors, lambda flat: dist.broadcast(flat, 0))


def from_main(make: Callable[[], Any]) -> Any:
    r"""Returns in every process what a function returns in the main one, which alone calls it.

    Arguments:
        make: A function that returns what a checkpoint can hold, such as one that reads a file that
            other machines do not have.
    """
    if size() == 1:
        return make()
    content = io.BytesIO()
    if is_main():
        torch.save(make(), content)
    length = torch.tensor(content.tell())
    broadcast_([length])
    data = torch.empty(int(length), dtype=torch.uint8)
    if is_main():
        data = torch.frombuffer(content.getbuffer(), dtype=torch.uint8)
    broadcast_([data])
    return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)


@contextmanager
def in_turns() -> Iterator[None]:
    r"""Lets the main process go first, then the first of each other machine, then all others.

    Files that the first ones download, the others find on their disk.
    """
    turn = 0 if is_main() else 1 if local_rank() == 0 else 2
    for _ in range(turn):
        wait_for_all()
    yield
    for _ in range(turn, 2):
        wait_for_all()


def wait_for_all() -> None:
    sum_([torch.zeros(1)])


def _in_place(tensors: Iterable[Tensor], communicate: Callable[[Tensor], object]) -> None:
    if size() == 1:
        return
    groups: dict[tuple, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device, tensor.dtype].append(tensor)
    for group in groups.values():
        # One message takes much less time than one per tensor.
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        with communicating():
            communicate(flat)
        parts = flat.split([tensor.numel() for tensor in group])
        for tensor, part in zip(group, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


@contextmanager
def communicating() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:100]
        raise ConnectionError(
            f"another process of this run has ended, see its own error, or cannot be reached "
            f"({reason}): continue with --resume"
        ) from error
