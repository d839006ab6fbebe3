r"""What the nats of a grid cost: a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from study import statistic

from pyro_vaediff.plotting.style import BLACK, COLORS, FONT, GREY, MARKERS, legend, slide, write

__all__ = ["nats", "plot_cost"]

Record = Mapping[str, Any]


def nats(record: Record) -> tuple[float, bool]:
    r"""Returns the nats per test image of a run, and whether they are -log p(x) or the -ELBO.

    ``evaluate.py`` knows log p(x) of the first test images: what it gains over the ELBO of these is
    taken to be what it gains of all.
    """
    gap = record.get("likelihood.gap")
    return record["test_negative_elbo"] - (gap or 0.0), gap is not None


def plot_cost(
    records: Sequence[Record],
    rows: Mapping[str, str],
    published: Mapping[str, float],
    title: str,
    path: Path,
) -> None:
    r"""Draws nats against hours of training: a point per row and latent size, with its seeds.

    Arguments:
        records: The numbers of the runs of a data set.
        rows: The titles of the rows by their names.
        published: What others have published, -log p(x) in nats by its source: at any cost.
        title: The title.
        path: The path of the file, ``.png``.
    """
    figure, (axes,) = slide(title)
    styles = cycle(zip(cycle(COLORS), cycle(MARKERS)))  # told apart by marker as well
    for (row, label), (color, marker) in zip(rows.items(), styles, strict=False):
        own = [record for record in records if record["row"] == row]
        for number, dim in enumerate(dict.fromkeys(record["latent_dim"] for record in own)):
            group = [record for record in own if record["latent_dim"] == dim]
            values, exact = zip(*map(nats, group), strict=True)
            found = statistic(values)
            hours = statistic([record["training_seconds"] / 3600 for record in group]).mean
            axes.errorbar(
                hours,
                found.mean,
                yerr=None if found.n == 1 else found.sd,
                marker=marker,
                color=color,
                markerfacecolor=color if all(exact) else "white",
                markersize=9,
                capsize=3,
                linestyle="none",
                label=label if number == 0 else None,
            )
    axes.margins(0.15)
    for source, value in published.items():
        axes.axhline(value, color=GREY, linewidth=1, linestyle="--", zorder=0)
        axes.annotate(
            f"{source}, published", (1, value), xycoords=("axes fraction", "data"),
            ha="right", va="bottom", fontsize=FONT - 3, color=BLACK,
        )  # fmt: skip
    axes.set_xlabel("hours of training")
    axes.set_ylabel("−log p(x), or hollow −ELBO (nats)")
    legend(axes)
    write(path, (".png",), lambda file: figure.savefig(file, format="png"))
