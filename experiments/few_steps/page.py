r"""The page and the pictures of the numbers."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from common import provenance
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from study import number, table

from pyro_vaediff.plotting.style import COLORS, DASHES, FONT, GREY, slide, write

from .numbers import KEY, Row, Study

MARKERS = "os^Dvx*"  # of the names, for readers without colors


def section(study: Study) -> list[str]:
    r"""Returns the part of the page that is a run's."""
    lines = [f"## {study.name}", ""]
    for measure, digits, text in (
        ("nats", 2, "Test −ELBO in nats, by reverse variance (the run's first), grid and steps:"),
        ("distance", 3, f"{study.extractor.label}, by sampler, grid and evaluations at most:"),
    ):
        rows = [row for row in study.rows if row["measure"] == measure]
        budgets = sorted({row["budget"] for row in rows}, reverse=True)
        found = {tuple(row[k] for k in KEY[1:]): number(row["value"], digits) for row in rows}
        cells = [
            [*key, *(found.get((*key, n), "") for n in budgets)]
            for key in dict.fromkeys((row["name"], row["grid"]) for row in rows)
        ]
        lines += [text, "", *table(["", "grid", *map(str, budgets)], cells), ""]
    return [*lines, f"![The same against steps and evaluations]({study.name}.png)", ""]


def plot(study: Study, path: Path) -> None:
    r"""Draws the bound and the distance against the evaluations of the network."""
    title = f"{study.name}: what fewer steps cost"
    figure, panels = slide(title, 2)
    labels = ("nats above the largest number of steps", study.extractor.label)
    for axes, measure, label in zip(panels, ("nats", "distance"), labels, strict=True):
        rows = [row for row in study.rows if row["measure"] == measure]
        longest = max(rows, key=lambda row: row["steps"])["value"]
        lines(axes, rows, longest if measure == "nats" else 0.0)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("evaluations of the network", fontsize=FONT)
        axes.set_title(label, fontsize=FONT)
    panels[1].set_yscale("log")
    panels[1].yaxis.set_minor_formatter("{x:g}")
    for axes in panels:
        axes.yaxis.set_major_formatter("{x:g}")
    panels[1].axhline(longest, color=GREY, linestyle=":")
    write(path, (".png",), lambda file: figure.savefig(file, format="png"))


def lines(axes: Axes, rows: list[Row], base: float) -> None:
    r"""Draws a line per name and grid: names have colors and markers, grids have dashes."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    grids = list(dict.fromkeys(row["grid"] for row in rows))
    for (i, name), (j, grid) in itertools.product(enumerate(names), enumerate(grids)):
        own = sorted(
            (row["evaluations"], row["value"] - base)
            for row in rows
            if (row["name"], row["grid"]) == (name, grid)
        )
        style: dict[str, Any] = {"color": COLORS[i], "linestyle": DASHES[j], "marker": MARKERS[i]}
        axes.plot([x for x, _ in own], [y for _, y in own], markersize=4, **style)
    handles = [
        Line2D([], [], color=COLORS[i], marker=MARKERS[i], label=name)
        for i, name in enumerate(names)
    ]
    dashes: list[Any] = [*DASHES]
    handles += [
        Line2D([], [], color=GREY, linestyle=dashes[j], label=f"grid {grid}")
        for j, grid in enumerate(grids)
    ]
    axes.legend(handles=handles, fontsize=FONT - 3, edgecolor="none")


def page(studies: list[Study], args: argparse.Namespace) -> str:
    r"""Returns the page."""
    head = [
        "# What fewer steps cost",
        "",
        f"Bounds of {args.num_images:,} test images at most; distances of {args.num_samples:,} "
        f"samples to as many test images at most; seed {args.seed}; on {provenance(args.device)}. "
        "Heun's method evaluates the network twice per step.",
        "",
    ]
    return "\n".join([*head, *(line for study in studies for line in section(study))])
