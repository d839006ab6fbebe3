r"""What backbones of vectors share: any event shape, and blocks that stay in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import as_shape

__all__ = ["InBlocks", "Vectors"]

Outputs = Tensor | tuple[Tensor, ...]


class Vectors(nn.Module):
    r"""A backbone that sees latents of any shape as vectors.

    Arguments:
        event_shape: The shape of a latent, or its number of dimensions.
        num_outputs: The number of outputs per latent dimension.
    """

    any_batch = True

    def __init__(self, event_shape: int | Sequence[int], num_outputs: int = 1):
        super().__init__()
        self.event_shape = torch.Size(as_shape("event_shape", event_shape))
        self.num_outputs = num_outputs
        self.features = self.event_shape.numel()

    def flatten(self, z: Tensor) -> Tensor:
        return z if len(self.event_shape) == 1 else z.flatten(-len(self.event_shape))

    def split(self, h: Tensor) -> Outputs:
        outputs = [
            out if len(self.event_shape) == 1 else out.unflatten(-1, self.event_shape)
            for out in h.split(self.features, -1)
        ]
        return outputs[0] if self.num_outputs == 1 else tuple(outputs)


class InBlocks(Vectors):
    r"""A backbone of vectors that go through its layers block by block."""

    rows = 2048  #: The latents that a CPU evaluates at once if no gradients are needed.

    def forward(self, z: Tensor, told: Tensor, c: Tensor | None = None) -> Outputs:
        r"""Returns the outputs.

        Arguments:
            z: The latents :math:`z_t`, with shape :math:`(*, \dots)`.
            told: The log-SNR, or the time in :math:`[0, 1]` of an :class:`MLPBackbone`,
                broadcastable to shape :math:`(*)`.
            c: The context, broadcastable to shape :math:`(*, F)`.
        """
        z = self.flatten(z)
        size = self.rows * self.features * len(z) // max(1, z.numel())
        if torch.is_grad_enabled() or z.device.type != "cpu" or z.ndim < 2 or size >= len(z):
            return self.split(self.outputs_of(z, told, c))
        # Block by block, what is between two matrix products stays in the cache.
        zs = z.split(max(1, size))
        blocks = zip(zs, of_blocks(told, z.ndim - 1, zs), of_blocks(c, z.ndim, zs), strict=True)
        return self.split(torch.cat([self.outputs_of(x, t, c) for x, t, c in blocks]))

    def outputs_of(self, z: Tensor, told: Tensor, c: Tensor | None) -> Tensor:
        r"""Returns the outputs side by side, of latents that are vectors."""
        raise NotImplementedError


def of_blocks(x: Any, ndim: int, blocks: Sequence[Tensor]) -> Sequence[Any]:
    r"""Returns the rows of each block of what is there for all rows, or for each of them."""
    if x is None or x.ndim < ndim or len(x) == 1:
        return [x] * len(blocks)
    return x.split(len(blocks[0]))


# Without gradients, features that nobody else needs are overwritten.
def silu(h: Tensor) -> Tensor:
    return F.silu(h, inplace=not torch.is_grad_enabled())


def plus(h: Tensor, other: Tensor) -> Tensor:
    return h + other if torch.is_grad_enabled() else h.add_(other)
