r"""The common style of all pictures: colors, letters, and how files are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import write_atomically

# The palette of Okabe & Ito, without its yellow, which a projector does not show on white.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
)  # fmt: skip
COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"
GREY = "#595959"
FONT = 13  # in points, on slides of 4.5 inches


def slide(title: str, panels: int = 1) -> tuple[Figure, list[Axes]]:
    r"""Returns a figure of 1280 x 720 pixels, or 1600 x 720 for several panels, and its axes."""
    size = (8 if panels == 1 else 10, 4.5)
    figure = Figure(figsize=size, dpi=160, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=FONT + 3, fontweight="bold")
    row: list[Axes] = figure.subplots(1, panels, squeeze=False)[0].tolist()
    for axes in row:
        axes.grid(color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=FONT - 1)
    return figure, row


def legend(axes: Axes) -> None:
    axes.legend(fontsize=FONT, facecolor="white", edgecolor="none", framealpha=0.9)


def write(path: str | Path, suffixes: tuple[str, ...], save: Callable[[IO[bytes]], Any]) -> None:
    r"""Writes a file atomically, if its suffix is one of those given."""
    if Path(path).suffix.lower() not in suffixes:
        raise ValueError(f"path must end in {' or '.join(suffixes)}, got {str(path)!r}")
    write_atomically(path, save)
