r"""Parts of charts: checked columns, logarithmic axes, legends, and labels clear of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import LogLocator
from torch import Tensor

from .charts import check_finite
from .style import FONT, GREY


def check_keys(
    name: str, records: Mapping[str, object] | Sequence[object], keys: tuple[str, ...]
) -> None:
    if not records:
        raise ValueError(f"{name} must not be empty")
    for i, record in records.items() if isinstance(records, Mapping) else enumerate(records):
        for key in keys:
            if not isinstance(record, Mapping) or key not in record:
                raise ValueError(f"{name} must have the key {key!r}, which record {i!r} lacks")


def column(name: str, values: object, n: int | None = None, positive: bool = False) -> Tensor:
    r"""Returns finite numbers with shape :math:`(n,)`, where any n > 0 will do by default."""
    if not isinstance(values, Tensor):
        try:
            values = torch.as_tensor(values, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} must be numbers: {error}") from error
    if values.ndim != 1 or len(values) == 0 or len(values) != (n or len(values)):
        raise ValueError(f"{name} must have shape ({n or 'n'},), got {tuple(values.shape)}")
    values = check_finite(name, values)
    if positive and (values <= 0).any():
        raise ValueError(f"{name} must be positive: the axis is logarithmic, got {values.min():g}")
    return values


def log_axis(axis: Axis, values: Tensor, margin: float, room: float = 0.0) -> tuple[float, float]:
    r"""Makes an axis logarithmic, and returns its limits.

    Arguments:
        axis: The axis.
        values: The values to be shown, with shape :math:`(n,)`.
        margin: The least factor between the values and both limits.
        room: The share of the length of the values that is to be free below them.
    """
    low, high = values.min().item(), values.max().item()
    margin = max(margin, (high / low) ** 0.04)
    low, high = low / margin / (high / low) ** room, high * margin
    name = "x" if isinstance(axis, XAxis) else "y"
    axis.axes.set(**{f"{name}scale": "log", f"{name}lim": (low, high)})
    if high < 100 * low:  # powers of ten would be too few
        subs = (1, 2, 5) if high > 5 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
        axis.set_major_locator(LogLocator(subs=subs))
    if low > 1e-3 and high < 1e6:
        axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter("")
    return low, high


def wrap(name: str) -> str:
    return fill(name.replace(" = ", "\u00a0=\u00a0"), 26)


def legend_outside(owner: Axes | Figure, width: float, **place: Any) -> None:
    r"""Draws a legend beside the data, as large and wide as fits into a width in pixels."""
    columns = (1,) if place["loc"] == "outside right center" else (4, 3, 2, 1)
    for n, size in ((n, size) for size in (FONT, FONT - 2, FONT - 4) for n in columns):
        legend = owner.legend(**place, ncols=n, fontsize=size, frameon=False)
        box = legend.get_window_extent()
        if (box.width <= width and box.height <= 600) or (n, size) == (columns[-1], FONT - 4):
            break
        legend.remove()


def label_points(axes: Axes, points: Tensor, names: Mapping[int, str], line: Tensor) -> None:
    r"""Writes names next to their points, each in the nearest place where it covers nothing.

    Arguments:
        axes: The axes, whose limits are final.
        points: All points, with shape :math:`(n, 2)`.
        names: The names, by the index of their points.
        line: The corners of a staircase to be kept clear, with shape :math:`(m, 2)`.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None  # on which the axes are
    pt = figure.dpi / 72
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # places hold for this layout
    dots, corners = (torch.from_numpy(axes.transData.transform(x.numpy())) for x in (points, line))
    steps = torch.linspace(0, 1, 46, dtype=torch.float64)[:, None, None]
    stairs = torch.lerp(corners[:-1], corners[1:], steps).flatten(0, 1)
    stairs = (stairs / (4 * pt)).round().unique(dim=0) * 4 * pt  # short steps have too many
    start, stop = dots.new_tensor(axes.bbox.padded(-4 * pt).get_points())
    margin, fontsize = dots.new_tensor([5 * pt, pt]), FONT - 2 if len(names) <= 12 else FONT - 4
    texts: dict[int, Text] = {}
    boxes: dict[int, tuple[Tensor, Tensor]] = {}
    rods: dict[int, Tensor] = {}
    for i, name in names.items():
        texts[i] = axes.text(0, 0, name, fontsize=fontsize, zorder=4, ha="left", va="bottom")
        texts[i].set_path_effects([withStroke(linewidth=3, foreground="white")])
    for i in [*names] * 3:  # later rounds know where the other names are
        size = dots.new_tensor(texts[i].get_window_extent().size)
        x, y = (
            torch.arange(a, max(a + 1, b), 4 * pt) for a, b in zip(start, stop - size, strict=True)
        )
        low = torch.cartesian_prod(x, y)[:, None]
        high = low + size
        near = dots.clamp(low, high)
        gaps = (near - dots).norm(dim=-1) / pt
        mine, others = gaps[:, i], gaps[:, torch.arange(len(dots)) != i]
        confusing = (others < mine[:, None] + 8).any(-1)
        rod = torch.lerp(dots[i], near[:, i, None], steps[::5, 0])
        lines = torch.cat([stairs, *(rods[j] for j in rods if j != i)])
        cost = mine + 300 * (gaps < 7).sum(-1) + confusing * (30 + 15 * (mine < 14))
        cost += 60 * touch(low - 5 * pt, high + 5 * pt, lines)
        for j in boxes:
            if j != i:
                cost += 1e5 * ((low < boxes[j][1]) & (boxes[j][0] < high)).all(-1)[:, 0]
                cost += 1e3 * touch(boxes[j][0], boxes[j][1], rod)
        best = cost.argmin()
        boxes[i] = low[best, 0] - margin, high[best, 0] + margin
        rods[i] = rod[best] if mine[best] > 12 or confusing[best] else rod[best, :0]
    to_data = axes.transData.inverted().transform
    for i, text in texts.items():
        text.set_position(tuple(to_data((boxes[i][0] + margin).numpy())))
        axes.plot(*to_data(rods[i].numpy()).T, color=GREY, linewidth=0.8, zorder=2)


def touch(low: Tensor, high: Tensor, x: Tensor) -> Tensor:
    r"""Whether any of the points x is in a box."""
    return ((low < x) & (x < high)).all(-1).any(-1)
