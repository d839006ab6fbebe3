r"""An average of a model's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["WeightAverage"]


class WeightAverage:
    r"""An exponential moving average of a model's state: its weights and its statistics.

    Arguments:
        model: The model.
        decay: The share of the average that an update leaves.
        share: In place of a decay, the share of all updates so far that the average is over,
            approximately: the n-th update leaves :math:`1 - 1 / \mathrm{share} \, n` of it. The end
            of training need not be known.
    """

    def __init__(self, model: nn.Module, decay: float = 0.0, share: float = 0.0):
        self.decay, self.share, self.count = decay, share, 0
        # Without the tables of a schedule, which are no state: they are constants, some infinite.
        self.values = {name: x.clone() for name, x in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        r"""Moves the average towards a model; the first update copies it."""
        ours, theirs = [], []
        for name, x in model.state_dict().items():
            if x.is_floating_point() and self.count:
                ours.append(self.values[name])
                theirs.append(x)
            else:  # such as a number of batches, and all of the first model
                self.values[name].copy_(x)
        if ours:
            new = min(1.0, 1 / (self.share * self.count)) if self.share else 1 - self.decay
            torch._foreach_lerp_(ours, theirs, new)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        r"""Returns the average and the number of updates."""
        return self.values | {"count": torch.tensor(self.count)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        r"""Restores what :meth:`state_dict` returned."""
        self.count = int(state_dict["count"])
        for name, value in self.values.items():
            value.copy_(state_dict[name])
