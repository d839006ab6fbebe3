r"""The frontier of variance and cost, and its chart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..plotting.charts import save
from ..plotting.layout import check_keys, column, label_points, legend_outside, log_axis, wrap
from ..plotting.style import BLACK, COLORS, FONT, MARKERS, slide

__all__ = ["pareto_front", "plot_pareto"]


def pareto_front(cost: Tensor | Sequence[float], variance: Tensor | Sequence[float]) -> list[int]:
    r"""Returns the points that no other one dominates, by increasing cost.

    A point dominates another if neither its cost nor its variance is larger, and one is smaller.
    Equal points do not dominate each other.

    Arguments:
        cost: The cost of each point in any unit, with shape :math:`(n,)`.
        variance: The variance of each point in any unit, with shape :math:`(n,)`.

    Returns:
        Their indices.

    Raises:
        ValueError: If a value is not finite, or a shape is not :math:`(n,)`.
    """
    costs = column("cost", cost).tolist()
    points = list(zip(costs, column("variance", variance, len(costs)).tolist(), strict=True))
    front: list[int] = []
    for i in sorted(range(len(points)), key=points.__getitem__):
        if not front or points[i][1] < points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


def plot_pareto(
    points: Sequence[Mapping[str, object]],
    path: str | Path,
    title: str = "Variance against cost of gradient estimators",
) -> None:
    r"""Plots estimators by cost and variance, and the frontier of those which none dominates.

    Estimators on one gray diagonal are equally good: half the variance takes twice the time.

    Arguments:
        points: A record per estimator, with the keys ``"name"``; ``"group"``, which decides color
            and marker; ``"cost"`` in milliseconds per step; and ``"variance"``, relative to that
            of a baseline. The frontier is labeled, and so are records with ``"label": True``.
        path: The path of the file, ``.png``, ``.pdf`` or ``.svg``.
        title: The title.

    Raises:
        ValueError: If there are no points, a key is missing, or a number is not finite or not
            positive.
    """
    check_keys("points", points, ("name", "group", "cost", "variance"))
    cost = column("points 'cost'", [point["cost"] for point in points], positive=True)
    variance = column("points 'variance'", [point["variance"] for point in points], positive=True)
    front = pareto_front(cost, variance)
    groups = [str(point["group"]) for point in points]

    figure, (axes,) = slide(title)
    figure.set_size_inches(10, 4.5)
    axes.grid(False)
    # With room for names below and to the left of the frontier, where there are no points.
    left, right = log_axis(axes.xaxis, cost, 1.5, room=0.3)
    bottom, top = log_axis(axes.yaxis, variance, 1.5, room=0.15)
    low, high = math.log(left * bottom), math.log(right * top)
    factor = next(x for x in (2, *(10**k for k in range(1, 99))) if high - low < 12 * math.log(x))
    first, last = math.ceil(low / math.log(factor)), math.floor(high / math.log(factor))
    for k in range(first, last + 1):
        label = f"equal variance × time,\n{factor}× apart" if k == first else ""
        merit = float(factor) ** k
        line = [merit / left, merit / right]
        axes.plot([left, right], line, color="#BBBBBB", linewidth=0.8, zorder=1, label=label)
    x = torch.cat([cost[front], cost.new_tensor([right])]).repeat_interleave(2)[:-1]
    y = torch.cat([cost.new_tensor([top]), variance[front]]).repeat_interleave(2)[1:]
    axes.plot(x, y, color=BLACK, linewidth=2, label="Pareto frontier")
    for i, group in enumerate(dict.fromkeys(groups)):
        mine = [j for j, other in enumerate(groups) if other == group]
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        style: dict[str, Any] = {"color": color, "marker": marker, "s": 70}
        axes.scatter(cost[mine], variance[mine], ec="white", label=wrap(group), zorder=3, **style)
        mine = [j for j in mine if j in front]
        axes.scatter(cost[mine], variance[mine], ec=BLACK, zorder=3.5, **style)
    axes.set_xlabel("time of a step (ms)", fontsize=FONT)
    axes.set_ylabel("variance relative to the baseline", fontsize=FONT)
    legend_outside(figure, 700, loc="outside right center")
    wanted = front + [i for i, p in enumerate(points) if p.get("label") and i not in front]
    names = {i: str(points[i]["name"]) for i in wanted}
    label_points(axes, torch.stack([cost, variance], -1), names, torch.stack([x, y], -1))
    save(figure, path)
