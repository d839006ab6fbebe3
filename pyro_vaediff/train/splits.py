r"""The data of a training run: a training and a validation split, with or without a context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import ImageData, batches
from ..evaluate import evaluate, preprocess
from ..infer import Estimator
from ..priors import ExemplarPrior, Prior
from ..vae import VAE
from . import distributed

__all__ = ["Split", "Splits", "one_hot", "validation_loss"]


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    r"""Returns labels as the context of a model, with shape :math:`(N, F)` for :math:`F` classes.

    Arguments:
        labels: The labels, integers with shape :math:`(N,)`.
        num_classes: The number of classes :math:`F`.
    """
    return F.one_hot(labels.long(), num_classes).to(torch.get_default_dtype())


@dataclass(frozen=True, eq=False)
class Split:
    r"""Data and their context.

    Arguments:
        x: Images in ``uint8``, or data in x-space, with shape :math:`(N, \dots)`.
        c: The context, with shape :math:`(N, F)`, or ``None``.
    """

    x: Tensor
    c: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def minibatches(
        self,
        batch_size: int,
        device: torch.device,
        flip: bool = False,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        r"""Yields this process's parts of shuffled minibatches, and of their context."""
        loader = batches(
            self.x,
            batch_size,
            shuffle=True,
            generator=generator,
            device=device,
            drop_last=True,
            flip=flip,
            rank=distributed.rank(),
            size=distributed.size(),
            labels=self.c,
        )
        return ((x, None) for x in loader) if self.c is None else loader

    def draw(self, vae: VAE, size: int) -> tuple[Tensor, ...]:
        r"""Returns a random minibatch as the programs of a VAE take it: data, and their context."""
        rows = torch.randint(len(self), (size,)).to(self.x.device)
        x = preprocess(vae, self.x[rows])
        return (x,) if self.c is None else (x, self.c[rows.to(self.c.device)].to(x))


@dataclass(frozen=True, eq=False)
class Splits:
    r"""The splits that a model is trained and selected with.

    Arguments:
        train: The training split.
        validation: The validation split.
        name: The name of the data set, if :func:`~pyro_vaediff.data.load` can load it.
        flip: Whether training flips images at random.
        groups: What the splits keep apart, see :class:`~pyro_vaediff.data.ImageData`.
        num_validation: The number of validation images, if it was chosen.
    """

    train: Split
    validation: Split
    name: str | None = None
    flip: bool = False
    groups: str | None = None
    num_validation: int | None = None

    @classmethod
    def of(cls, data: Any, labels: bool = False) -> Splits:
        r"""Returns the splits of images, or of two tensors or pairs of a tensor and its context."""
        classes = getattr(data, "num_classes", None) if labels else None
        if labels and classes is None:
            raise ValueError("labels=True needs ImageData with labels, such as the digits")
        if isinstance(data, ImageData):
            train, validation = (
                Split(
                    getattr(data, name),
                    None if classes is None else one_hot(getattr(data, f"{name}_labels"), classes),
                )
                for name in ("train", "validation")
            )
            how = (data.horizontal_flip, data.groups, data.num_validation)
            return cls(train, validation, data.name, *how)
        try:
            train, validation = (
                Split(part) if isinstance(part, Tensor) else Split(*part) for part in data
            )
            if any(
                len(part) == 0 or (part.c is not None and len(part.c) != len(part))
                for part in (train, validation)
            ):
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(
                "data must be ImageData, or a training and a validation split, each a tensor with "
                f"shape (N, ...) or a pair (x, c) of such, got {type(data).__name__}"
            ) from None
        return cls(train, validation)

    def for_prior(self, prior: Prior) -> Splits:
        r"""Returns the splits, for an exemplar prior with the numbers of the training data as their
        context: it leaves each datum's own component out.

        Arguments:
            prior: The prior.
        """
        if not isinstance(prior, ExemplarPrior):
            return self
        num_data = len(prior.loc)
        if self.train.c is not None:
            raise ValueError("an ExemplarPrior takes no context but its own: leave out labels")
        if len(self.train) != num_data:
            raise ValueError(
                f"num_data of an ExemplarPrior must be the number of training data, "
                f"{len(self.train)}, got {num_data}"
            )
        numbers = torch.arange(len(self.train), device=self.train.x.device).unsqueeze(1)
        return replace(self, train=Split(self.train.x, numbers))


def validation_loss(vae: VAE, split: Split, elbo: Estimator, batch_size: int) -> float:
    r"""Returns the negative ELBO of a split, of which each process evaluates its share.

    Arguments:
        vae: The VAE.
        split: The split.
        elbo: The estimator of the bound, which draws the same random numbers each time.
        batch_size: The number of data that are evaluated at once.
    """
    x, c = distributed.share(split.x), None if split.c is None else distributed.share(split.c)
    seed = distributed.fold_seed(0, distributed.rank()) if distributed.size() > 1 else 0
    loss = torch.zeros((), dtype=torch.float64)
    if len(x):  # or there are more processes than data
        terms = evaluate(vae, x, elbo, c=c, batch_size=batch_size, seed=seed)
        loss += sum(terms.values()) * (len(x) / len(split))
    distributed.sum_([loss])
    return float(loss)
