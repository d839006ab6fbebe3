r"""Minibatches of images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def batches(
    images: Tensor,
    batch_size: int,
    *,
    shuffle: bool,
    generator: torch.Generator | None = None,
    device: torch.device | str,
    drop_last: bool = False,
    flip: bool = False,
) -> Iterator[Tensor]:
    r"""Iterates once over images, in batches on a device.

    The order and the flips are drawn when this function is called, so that an epoch is a function
    of the generator's state at its start, whatever else draws random numbers in between.

    Arguments:
        images: The images, with shape :math:`(N, C, H, W)`.
        batch_size: The number of images :math:`B` in a batch.
        shuffle: Whether to permute the images.
        generator: The source of the order and of the flips; the global one by default.
        device: Where the batches go.
        drop_last: Whether to leave out a last batch of fewer than `batch_size` images. A set of
            fewer than `batch_size` images is one batch all the same.
        flip: Whether to flip each image horizontally with probability 1/2.

    Returns:
        An iterator over new tensors of the images' dtype, with shape :math:`(B, C, H, W)`.

    Raises:
        ValueError: If there are no images, or `batch_size` is less than 1.

    Example:
        >>> images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
        >>> [x.flatten().tolist() for x in batches(images, 2, shuffle=False, device="cpu")]
        [[0, 1], [2, 3], [4]]
    """

    count = len(images)
    if count == 0:
        raise ValueError("images must hold at least one image")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    device = torch.device(device)

    rng = {"generator": generator, "device": generator.device if generator else "cpu"}
    order = torch.randperm(count, **rng) if shuffle else torch.arange(count, device="cpu")
    order = order.to(images.device)
    flipped = (torch.rand(count, **rng) < 0.5).to(device) if flip else None

    stop = count - count % batch_size if drop_last and count >= batch_size else count
    return _iterate(images, order[:stop], flipped, batch_size, device)


def _iterate(
    images: Tensor, order: Tensor, flipped: Tensor | None, batch_size: int, device: torch.device
) -> Iterator[Tensor]:
    # A copy from pinned memory overlaps with the computation on the batch before.
    pin = device.type == "cuda" and images.device.type == "cpu"
    for start in range(0, len(order), batch_size):
        batch = images[order[start : start + batch_size]]
        batch = (batch.pin_memory() if pin else batch).to(device, non_blocking=pin)
        if flipped is not None:
            flags = flipped[start : start + batch_size, None, None, None]
            batch = torch.where(flags, batch.flip(-1), batch)
        yield batch
