r"""Tables of a grid of times, computed once in float64, and how they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

__all__ = ["Tables", "Times", "at_time", "check_betas", "is_index"]

#: Index(es) of a grid, or time(s) in [0, 1].
Times = int | float | Tensor


def is_index(t: Times) -> TypeGuard[int | Tensor]:
    r"""Returns ``True`` if times are indices of a grid, which whole numbers are."""
    return not t.is_floating_point() if isinstance(t, Tensor) else isinstance(t, int)


def at_time(table: Tensor, t: int | Tensor, event_dim: int = 1) -> Tensor:
    r"""Returns the entries of a table, ready to multiply latents.

    Arguments:
        table: A table, with shape :math:`(T + 1,)`, or :math:`(T + 1, \dots)` with a number for
            each dimension of a latent.
        t: The timestep(s), an integer or an integer tensor with shape :math:`(*)`.
        event_dim: The number of dimensions of a latent.

    Returns:
        The entries, with shape :math:`(*, 1, \dots, 1)`.

    Raises:
        ValueError: If an integer is not in the table. The entries of a tensor are not looked at
            on a GPU, which would have to be waited for.
    """
    if isinstance(t, int) and not 0 <= t < len(table):
        raise ValueError(f"t must be from 0 to T = {len(table) - 1}, got {t}")
    return table[t][(...,) + (None,) * (event_dim + 1 - table.ndim)]


class Tables(nn.Module):
    r"""Named tables that are computed in float64.

    They are buffers and follow ``.to(device)``. Whenever the module changes its dtype, they are
    rounded afresh from float64: a model cast to float64 must not keep the rounding of float32, and
    one cast to half precision keeps its tables in float32. They are not part of the state, as the
    configuration of a model determines them.

    Arguments:
        tables: The tables, in float64 and on the CPU.
    """

    def __init__(self, tables: dict[str, Tensor] | None = None):
        super().__init__()
        self._originals: dict[str, Tensor] = {}
        self._copies: dict[tuple[str, torch.device], Tensor] = {}
        if tables is not None:
            self.tabulate(tables)

    def tabulate(self, tables: dict[str, Tensor]) -> None:
        r"""Replaces the tables."""
        self._originals, self._copies = dict(tables), {}
        for name, table in tables.items():
            self.register_buffer(name, table.to(torch.get_default_dtype()), persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> Tables:
        super()._apply(fn, recurse)
        for name, table in self._originals.items():
            cast = getattr(self, name)
            dtype = torch.promote_types(cast.dtype, torch.float32)
            setattr(self, name, table.to(cast.device, dtype))
        return self

    def original(self, name: str) -> Tensor:
        r"""Returns a table in float64, on the CPU."""
        return self._originals[name]

    def original_on(self, name: str, device: torch.device) -> Tensor:
        r"""Returns a table in float64 on a device, to which it is copied once."""
        key = name, device
        if key not in self._copies:
            self._copies[key] = self.original(name).to(device)
        return self._copies[key]


def check_betas(betas: Any) -> Tensor:
    r"""Returns variances in float64 and on the CPU, if they are the variances of a chain."""
    try:
        betas = torch.as_tensor(betas, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"betas must be numbers, got {betas!r:.80}") from error
    if betas.ndim != 1 or len(betas) == 0:
        raise ValueError(f"betas must have shape (T,) with T >= 1, got {tuple(betas.shape)}")
    if not ((betas > 0) & (betas < 1)).all():
        raise ValueError("betas must lie in (0, 1): a step neither keeps nor erases all")
    # With less, 1 - beta is rounded to 1, and gradients of densities overflow in float32.
    if betas.min() < 1e-15:
        raise ValueError(f"betas must be at least 1e-15, got {betas.min():g}: use fewer steps")
    return betas
