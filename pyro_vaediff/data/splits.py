r"""The three splits of a data set."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

Splits = tuple[Tensor, Tensor, Tensor]


class Source(NamedTuple):
    r"""The train, validation and test split, and the labels of their images, if there are any."""

    images: Splits
    labels: Splits | None = None
    num_classes: int | None = None


def three(parts: Iterable[Tensor]) -> Splits:
    r"""Returns the train, validation and test split as a tuple of three."""
    train, validation, test = parts
    return train, validation, test


def permutation(count: int, seed: int) -> Tensor:
    r"""Returns the permutation of that seed, the same on every device."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")


def warn_of_copies(name: str, train: Tensor, validation: Tensor, test: Tensor) -> None:
    r"""Warns if an image is in two splits, pixel by pixel."""
    rows = {
        split: Counter(hash(image.tobytes()) for image in images.numpy())
        for split, images in (("train", train), ("validation", validation), ("test", test))
    }
    for one, other in (("test", "train"), ("test", "validation"), ("validation", "train")):
        if count := sum(number for key, number in rows[one].items() if key in rows[other]):
            warnings.warn(
                f"data set {name!r}: {count} of {rows[one].total()} {one} images are exact copies "
                f"of {other} images",
                stacklevel=3,
            )
