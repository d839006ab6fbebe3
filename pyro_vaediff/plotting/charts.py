r"""Charts: where the nats of the negative ELBO go, and how they fall during training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from .style import BLACK, BLUE, COLORS, DASHES, FONT, GREY, VERMILLION, legend, slide, write

__all__ = ["plot_elbo_terms", "plot_history", "plot_kl_by_timestep", "plot_log_likelihood"]


def plot_kl_by_timestep(
    kl: Tensor | Mapping[str, Tensor],
    path: str | Path,
    title: str = "Where the KL divergence is spent along the chain",
) -> None:
    r"""Plots the KL divergence of each step, and the share of the steps up to :math:`t`.

    If a term is negative, as :math:`-\log p(z_0 | z_1)` can be, the scale is linear around zero
    and the second panel has the cumulated nats in place of their share.

    Arguments:
        kl: The KL divergences for :math:`t = 1, \dots, T` in nats, with shape :math:`(T,)`; or
            several runs by name, which may differ in :math:`T`.
        path: The path of the file, ``.png``, ``.pdf`` or ``.svg``.
        title: The title.

    Raises:
        ValueError: If a tensor is not finite or not one-dimensional, or if a run without negative
            terms sums to zero.
    """
    runs = dict(kl) if isinstance(kl, Mapping) else {"": kl}
    if not runs:
        raise ValueError("kl must hold at least one run, got none")
    signed = False
    for name, values in runs.items():
        label = f"kl {name!r}" if name else "kl"
        if values.ndim != 1 or len(values) == 0:
            raise ValueError(f"{label} must have shape (T,), got {tuple(values.shape)}")
        runs[name] = check_finite(label, values)
        signed |= bool((values < 0).any())
    for name, values in runs.items():
        if not signed and not values.any():
            raise ValueError(f"kl {name!r} must not be zero at every timestep: there is no share")
    largest = max(values.abs().max().item() for values in runs.values())

    figure, (left, right) = slide(title, panels=2)
    for i, (name, values) in enumerate(runs.items()):
        t, total = torch.arange(1, len(values) + 1), values.sum()
        label = f"{name}: {nats(total)} nats" if name else f"sum: {nats(total)} nats"
        color, dash = COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]
        style: dict[str, Any] = {"color": color, "linestyle": dash, "linewidth": 2.5}
        style["marker"] = "o" if len(values) <= 30 else ""
        left.plot(t, values, label=label, **style)
        right.plot(t, values.cumsum(0) if signed else values.cumsum(0) / total, **style)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlim(0.8, 1.25 * max(map(len, runs.values())))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("timestep t", fontsize=FONT)
    if signed:
        # A power of ten, whose ticks do not collide with the one at zero.
        threshold = 10.0 ** math.floor(math.log10(1e-3 * largest))
        left.set_yscale("symlog", linthresh=threshold, linscale=0.5)
        left.set_ylabel("term of the step at t (nats)", fontsize=FONT)
        right.set_ylabel("cumulated up to t (nats)", fontsize=FONT)
    else:
        # Steps below a millionth of the largest one would take up most of the axis.
        smallest = min(values[values > 0].min() for values in runs.values()).item()
        left.set_yscale("log")
        left.set_ylabel("KL of the step at t (nats)", fontsize=FONT)
        left.set_ylim(max(smallest, 1e-6 * largest) / 2, 2 * largest)
        right.set_ylim(0, 1.02)
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
        right.set_ylabel("cumulated share up to t", fontsize=FONT)
    legend(left)
    save(figure, path)


def plot_elbo_terms(
    terms: Mapping[str, float],
    path: str | Path,
    title: str = "The terms of the negative ELBO",
) -> None:
    r"""Plots how the terms add up to the negative ELBO, as a waterfall.

    Arguments:
        terms: The terms in nats per datum, from the first to the last. They may be negative.
        path: The path of the file, ``.png``, ``.pdf`` or ``.svg``.
        title: The title.

    Raises:
        ValueError: If there are no terms, or one is not finite.
    """
    if not terms:
        raise ValueError("terms must not be empty")
    values = []
    for name, number in terms.items():
        term = torch.as_tensor(number)
        if term.numel() != 1:
            raise ValueError(f"term {name!r} must be one number, got shape {tuple(term.shape)}")
        values.append(check_finite(f"term {name!r}", term).item())
    ends = torch.tensor(values, dtype=torch.float64).cumsum(0).tolist()
    starts, total = [0.0, *ends[:-1]], ends[-1]
    colors = [VERMILLION if value >= 0 else BLUE for value in values]

    figure, (axes,) = slide(title)
    positions = range(len(values) + 1)
    # The edge keeps a term visible which is too small for the scale.
    colors = [*colors, GREY]
    style: dict[str, Any] = {"color": colors, "edgecolor": colors, "linewidth": 1}
    bars = axes.barh(positions, [*values, total], 0.6, [*starts, 0.0], **style)
    labels = [nats(value, sign=True) for value in values]
    for position, end in enumerate(ends):  # to the next bar
        axes.plot([end, end], [position + 0.3, position + 0.7], color=GREY, linewidth=1)
    for bar, label in zip(bars, [*labels, nats(total)], strict=True):
        right = max(bar.get_x(), bar.get_x() + bar.get_width())
        y = bar.get_y() + bar.get_height() / 2
        axes.annotate(
            label, (right, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=FONT
        )
    axes.axvline(0, color=BLACK, linewidth=1)
    low, high = min(0.0, *ends), max(0.0, *ends)
    span = (high - low) or 1.0
    axes.set_xlim(low - 0.02 * span, high + 0.16 * span)  # with room for the numbers
    axes.set_yticks(positions, [*terms, "−ELBO"], fontsize=FONT)
    axes.get_yticklabels()[-1].set_fontweight("bold")
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel("nats per datum", fontsize=FONT)
    save(figure, path)


def plot_history(
    history: Sequence[Mapping[str, float]],
    path: str | Path,
    title: str = "Negative ELBO by epoch",
) -> None:
    r"""Plots the negative ELBO of training and validation, and marks the best epoch.

    If the first tenth of the epochs is far above the others, the axis leaves it out.

    Arguments:
        history: A record per epoch, with the keys ``"epoch"``, ``"train"`` and ``"validation"``,
            the latter two in nats per datum. The last epochs may lack ``"train"``: when the prior
            is trained alone, the images are not reconstructed.
        path: The path of the file, ``.png``, ``.pdf`` or ``.svg``.
        title: The title.

    Raises:
        ValueError: If there are no records, a key is missing, or a value is not finite.
    """
    if not history:
        raise ValueError("history must have at least one epoch, got none")
    columns, joint = {}, sum("train" in record for record in history)
    for key in ("epoch", "train", "validation"):
        records = history[:joint] if key == "train" else history
        if missing := [i for i, record in enumerate(records) if key not in record]:
            raise ValueError(f"history must have the key {key!r}, which record {missing[0]} lacks")
        values = torch.tensor([float(record[key]) for record in records], dtype=torch.float64)
        columns[key] = check_finite(f"history {key!r}", values)
    epoch, losses = columns["epoch"], torch.cat([columns["train"], columns["validation"]])
    best = int(columns["validation"].argmin())
    best_epoch, best_loss = epoch[best].item(), columns["validation"][best].item()

    figure, (axes,) = slide(title)
    marker = "o" if len(epoch) == 1 else ""
    line = partial(axes.plot, marker=marker)
    if joint:
        line(epoch[:joint], columns["train"], "--", color=VERMILLION, linewidth=2, label="train")
    line(epoch, columns["validation"], "-", color=BLUE, linewidth=2.5, label="validation")
    label = f"best: {nats(best_loss)} nats, epoch {best_epoch:g}"
    axes.plot(best_epoch, best_loss, "*", color=BLACK, markersize=18, label=label, clip_on=False)
    first = len(epoch) // 10
    later = torch.cat([columns["train"][first:], columns["validation"][first:]])
    spread = (later.max() - losses.min()).item()
    if 0 < 4 * spread < (losses.max() - losses.min()).item():
        axes.set_ylim(losses.min().item() - 0.05 * spread, later.max().item() + 0.1 * spread)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("epoch", fontsize=FONT)
    axes.set_ylabel("−ELBO (nats per datum)", fontsize=FONT)
    legend(axes)
    save(figure, path)


def plot_log_likelihood(
    estimates: Mapping[int, float],
    path: str | Path,
    title: str = "Importance-weighted log p(x) by the number of samples",
) -> None:
    r"""Plots importance-weighted estimates, and says by how much the last one is above that of half
    as many samples: as far as it still rises, it is below :math:`\log p(x)`.

    Arguments:
        estimates: The estimates of :math:`\log p(x)` in nats per datum, by the number of samples.
        path: The path of the file, ``.png``, ``.pdf`` or ``.svg``.
        title: The title.

    Raises:
        ValueError: If there are no estimates, or one is not finite.
    """
    if not estimates:
        raise ValueError("estimates must hold at least one number of samples, got none")
    values = check_finite("estimates", torch.tensor(list(estimates.values())))
    K = max(estimates)
    label = f"{estimates[K]:,.2f} nats at K = {K:,}"
    if smaller := [k for k in estimates if 2 * k <= K]:
        half = max(smaller)
        label += f"\n{estimates[K] - estimates[half]:+,.2f} since K = {half:,}"
    figure, (axes,) = slide(title)
    style: dict[str, Any] = {"color": BLUE, "marker": "o", "linewidth": 2.5}
    axes.plot(list(estimates), values, label=label.replace("-", "−"), **style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel("samples K per datum", fontsize=FONT)
    axes.set_ylabel("log p(x) (nats per datum), from below", fontsize=FONT)
    axes.legend(fontsize=FONT, frameon=False, loc="lower right")
    save(figure, path)


def nats(value: Tensor | float, sign: bool = False) -> str:
    r"""Formats nats with as many decimals as are worth reading."""
    value = float(value)
    decimals = 2 if abs(value) < 1 else 1 if abs(value) < 1000 else 0
    return f"{value:{'+' if sign else ''},.{decimals}f}".replace("-", "−")


def check_finite(name: str, values: Tensor) -> Tensor:
    values = values.detach().cpu().double()
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite values")
    return values


def save(figure: Figure, path: str | Path) -> None:
    suffix = Path(path).suffix.lower()
    write(
        path,
        (".png", ".pdf", ".svg"),
        lambda file: figure.savefig(file, format=suffix[1:], dpi="figure"),
    )
