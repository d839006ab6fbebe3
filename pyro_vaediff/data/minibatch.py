r"""Minibatches of images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_whole


def batches(
    images: Tensor,
    batch_size: int,
    *,
    shuffle: bool,
    generator: torch.Generator | None = None,
    device: torch.device | str,
    drop_last: bool = False,
    flip: bool = False,
    rank: int = 0,
    size: int = 1,
    labels: Tensor | None = None,
) -> Iterator[Any]:
    r"""Returns an iterator that goes once over images, in batches on a device.

    The order and the flips are drawn when this function is called, so that an epoch is a function
    of the generator's state at its start, whatever else draws random numbers in between.

    Arguments:
        images: The images, with shape :math:`(N, C, H, W)`.
        batch_size: The number of images :math:`B` in a batch.
        shuffle: Whether to permute the images.
        generator: The source of the order and of the flips; the global one by default.
        device: Where the batches go.
        drop_last: Whether to leave out a last batch of fewer than ``batch_size`` images. A set of
            fewer than ``batch_size`` images is one batch all the same.
        flip: Whether to flip each image horizontally with probability 1/2.
        rank: The process that asks, of several which share each batch.
        size: The number of these processes. With a generator in the same state in each of them,
            their parts together are the batch; the sizes of the parts differ by one at most.
        labels: What goes with the images, with :math:`N` rows. It changes neither order nor flips.

    Returns:
        An iterator over new tensors of the images' dtype, with shape :math:`(B, C, H, W)`, or with
        that of this process's part; over pairs of images and labels if there are labels.

    Raises:
        ValueError: If there are no images, or ``batch_size`` is less than 1.

    Example:
        >>> images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
        >>> [x.flatten().tolist() for x in batches(images, 2, shuffle=False, device="cpu")]
        [[0, 1], [2, 3], [4]]
    """
    count = len(images)
    if count == 0:
        raise ValueError("images must hold at least one image")
    check_whole("batch_size", batch_size)
    device = torch.device(device)

    source = generator.device if generator else torch.device("cpu")
    order = torch.arange(count, device="cpu")
    if shuffle:
        order = torch.randperm(count, generator=generator, device=source)
    order, flipped = order.to(images.device), None
    if flip:
        chosen = torch.rand(count, generator=generator, device=source) < 0.5
        flipped = to_device(chosen, device)

    stop = count - count % batch_size if drop_last and count >= batch_size else count
    parts = [
        (start + length * rank // size, start + length * (rank + 1) // size)
        for start in range(0, stop, batch_size)
        for length in [min(batch_size, stop - start)]
    ]
    return _iterate(images, labels, order, flipped, parts, device)


def _iterate(
    images: Tensor,
    labels: Tensor | None,
    order: Tensor,
    flipped: Tensor | None,
    parts: list[tuple[int, int]],
    device: torch.device,
) -> Iterator[Any]:
    for start, stop in parts:
        batch = to_device(images[order[start:stop]], device)
        if flipped is not None:
            batch = torch.where(flipped[start:stop, None, None, None], batch.flip(-1), batch)
        if labels is None:
            yield batch
        else:
            yield batch, to_device(labels[order[start:stop].to(labels.device)], device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    r"""Returns a tensor on a device, without waiting for the device."""
    # A copy from pinned memory overlaps with the computation on the batch before.
    pin = device.type == "cuda" and x.device.type == "cpu"
    return (x.pin_memory() if pin else x).to(device, non_blocking=pin)
