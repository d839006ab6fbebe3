r"""The context of a denoiser, which it is told beside the latents and the time, or its absence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Context"]


class Context(nn.Module):
    r"""The context of a denoiser, which may be dropped in training.

    In train mode, a learned null context takes the place of that of each datum with probability
    :math:`p`, at each call of the denoiser. If :math:`L(c)` is the loss, then the network learns
    from

    .. math:: (1 - p) \, L(c) + p \, L(\varnothing)

    to be a prior with a context and one without. In eval mode nothing is dropped: the bound stays
    that of the data given their context.

    Arguments:
        shape: The shape of the context of a datum, empty if there is none; ``None`` if that of the
            program is ignored.
        dropout: The probability :math:`p`. If it is positive, a call without a context means the
            null context, which starts at zero, in either mode.

    Raises:
        ValueError: If the probability is out of range, or there is no context to drop.

    References:
        | Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), algorithm 1
        | https://arxiv.org/abs/2207.12598

    Example:
        >>> context = Context((2,), dropout=0.5)
        >>> _ = torch.manual_seed(0)
        >>> context(torch.ones(4, 2)).tolist()
        [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
        >>> context.eval()(torch.ones(1, 2)).tolist()
        [[1.0, 1.0]]
    """

    def __init__(self, shape: tuple[int, ...] | None, dropout: float = 0.0):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"context_dropout must be in [0, 1), got {dropout}")
        if dropout and not shape:
            raise ValueError(
                f"context_dropout must be 0 if there is no context to drop, got {dropout}: give "
                "context_features, or condition='labels'"
            )
        self.ignored, self.shape, self.dropout = shape is None, shape or (), dropout
        self.null = nn.Parameter(torch.zeros(self.shape)) if dropout else None

    def forward(self, c: Tensor | None) -> Tensor | None:
        r"""Returns the context that the network is told.

        Arguments:
            c: The context, with shape :math:`(B, *\mathrm{shape})`.

        Raises:
            ValueError: If there is a context and should be none, or the reverse.
        """
        if self.ignored:
            return None
        if self.null is not None and c is None:
            return self.null
        self.check(c)
        if c is None or self.null is None or not (self.training and self.dropout):
            return c
        dims = len(self.shape)
        dropped = torch.rand(c.shape[:-dims], device=c.device) < self.dropout
        return torch.where(dropped[(...,) + (None,) * dims], self.null, c)

    def check(self, c: Tensor | None) -> None:
        r"""Raises a ``ValueError`` unless there is a context if and only if there has to be one."""
        shape, given = self.shape, None if c is None else tuple(c.shape)
        if (not shape and c is not None) or (shape and (given or ())[-len(shape) :] != shape):
            expected = f"a context that ends in shape {shape}" if shape else "None"
            raise ValueError(
                f"c must be {expected}, as the prior has context_features="
                f"{shape[0] if len(shape) == 1 else shape or 0}, got {given}"
            )
