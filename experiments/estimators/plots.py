r"""Charts which compare gradient estimators of one ELBO: error, noise and training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyro_vaediff.plotting.charts import save
from pyro_vaediff.plotting.layout import check_keys, column, legend_outside, log_axis, wrap
from pyro_vaediff.plotting.style import (
    BLACK,
    COLORS,
    DASHES,
    FONT,
    GREY,
    MARKERS,
    ORANGE,
    VERMILLION,
    slide,
)

__all__ = [
    "plot_convergence",
    "plot_gradient_noise",
    "plot_training",
]

BIASED = (VERMILLION, ORANGE)
UNBIASED = tuple(color for color in COLORS if color not in BIASED)


def plot_convergence(
    errors: Mapping[str, Mapping[str, object]],
    path: str | Path,
    title: str = "Error against the number of samples",
    floor: float | None = None,
) -> None:
    r"""Plots how the errors of estimators fall, beside the :math:`1 / \sqrt{n}` of averages.

    Arguments:
        errors: For each name, the keys ``"samples"``, with shape :math:`(n,)`; ``"error"``, root
            mean squares in nats per datum, with shape :math:`(n,)`; and ``"biased"``, whether it
            converges to something else. Biased ones are reddish and dashed.
        path: The path of the file, ``.png``, ``.pdf`` or ``.svg``.
        title: The title.
        floor: The error of the reference in nats per datum, if it has one: errors below it are
            not resolved.

    Raises:
        ValueError: If there are no errors, a key is missing, or a number is not finite or not
            positive.
    """
    check_keys("errors", errors, ("samples", "error", "biased"))
    runs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, run in errors.items():
        n = column(f"errors {name!r} 'samples'", run["samples"], positive=True)
        runs[name] = n, column(f"errors {name!r} 'error'", run["error"], len(n), positive=True)
    levels = [] if floor is None else [column("floor", [floor], positive=True)]
    fair = [runs[name] for name in runs if not errors[name]["biased"]] or list(runs.values())

    figure, (axes,) = slide(title)
    figure.set_size_inches(10, 4.5)
    ends = torch.tensor(log_axis(axes.xaxis, torch.cat([n for n, _ in runs.values()]), 1.3))
    bottom, _ = log_axis(
        axes.yaxis, torch.cat([*(error for _, error in runs.values()), *levels]), 2
    )
    count = {True: 0, False: 0}
    for i, (name, (n, error)) in enumerate(runs.items()):
        biased = bool(errors[name]["biased"])
        colors, k = BIASED if biased else UNBIASED, count[biased]
        style: dict[str, Any] = {"color": colors[k % len(colors)], "linewidth": 2.5}
        style |= {"linestyle": DASHES[1 + k % 3 if biased else 0]}
        style |= {"marker": MARKERS[i % len(MARKERS)], "markevery": math.ceil(len(n) / 30)}
        axes.plot(n, error, label=wrap(f"{name} (biased)" if biased else name), **style)
        count[biased] += 1
    guide = 1.5 * max((n.sqrt() * error).max() for n, error in fair) / ends.sqrt()
    axes.plot(ends, guide, color=GREY, linewidth=1, label="slope −1/2")
    if floor is not None:
        axes.axhspan(
            bottom, floor, color="#E5E5E5", zorder=0, label="not resolved by\nthe reference"
        )
    axes.set_xlabel("number of samples", fontsize=FONT)
    axes.set_ylabel("RMS error (nats per datum)", fontsize=FONT)
    legend_outside(figure, 700, loc="outside right center", handlelength=2.8)
    save(figure, path)


def plot_gradient_noise(
    t: Tensor,
    noise: Mapping[str, Tensor],
    proposals: Mapping[str, Tensor],
    path: str | Path,
    title: str = "Which timesteps are noisy, and which are drawn",
) -> None:
    r"""Plots the size of the gradient of a timestep, and the probability of drawing it.

    A curve has a gap where it is zero, and ends a million times below the largest value.

    Arguments:
        t: Increasing timesteps, with shape :math:`(n,)`.
        noise: For each name, the root mean square norm of the gradient of the KL term of one
            timestep, with shape :math:`(n,)`.
        proposals: For each name, the probability :math:`r(t)` of a timestep, with shape
            :math:`(n,)`. The one named ``"optimal"`` is black and thick.
        path: The path of the file, ``.png``, ``.pdf`` or ``.svg``.
        title: The title.

    Raises:
        ValueError: If there are no curves, ``t`` does not increase from above zero, or a curve is
            negative or not finite somewhere, or zero everywhere.
    """
    t = column("t", t, positive=True)
    if (t.diff() <= 0).any():
        i = int((t.diff() <= 0).nonzero()[0])
        raise ValueError(f"t must increase, got {t[i + 1]:g} after {t[i]:g}")
    panels = {"noise": dict(noise), "proposals": dict(proposals)}
    for kind, curves in panels.items():
        if not curves:
            raise ValueError(f"{kind} must hold at least one curve, got none")
        for name, values in curves.items():
            curves[name] = values = column(f"{kind} {name!r}", values, len(t))
            if (values < 0).any() or not values.any():
                message = "must not be negative, nor zero everywhere, got a smallest value of"
                raise ValueError(f"{kind} {name!r} {message} {values.min():g}")
    # A name has one look in both panels, and two names have two.
    looks: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(name for name in {**noise, **proposals} if name != "optimal"):
        looks[name] = {"color": COLORS[i % 6], "linestyle": DASHES[i % 4], "linewidth": 2.5}
        looks[name]["marker"] = MARKERS[i % len(MARKERS)]
    looks["optimal"] = {"color": BLACK, "linewidth": 6, "zorder": 1.9, "marker": "o"}

    figure, (left, right) = slide(title, panels=2)
    for axes, curves in zip((left, right), panels.values(), strict=True):
        for name, values in curves.items():
            # Points show single values between zeros.
            few: dict[str, Any] = {} if len(t) <= 30 else {"marker": "" if values.all() else "."}
            axes.plot(t, values.where(values > 0, torch.nan), label=name, **looks[name] | few)
        values = torch.cat(list(curves.values()))
        log_axis(axes.xaxis, t, 1.25)
        log_axis(axes.yaxis, values[values > 1e-6 * values.max()], 2)
        axes.set_xlabel("timestep t", fontsize=FONT)
        legend_outside(axes, 700, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    left.set_ylabel("RMS gradient norm of step t", fontsize=FONT)
    right.set_ylabel("probability r(t)", fontsize=FONT)
    save(figure, path)


def plot_training(
    curves: Mapping[str, Sequence[Mapping[str, Tensor]]],
    path: str | Path,
    title: str = "Negative ELBO of the test images during training",
) -> None:
    r"""Plots the loss against seconds and against steps: mean and deviation over seeds.

    The axis is cut above the second half of the curves, which then fills most of it.

    Arguments:
        curves: For each name, a record per seed, with the keys ``"seconds"``, ``"steps"`` and
            ``"loss"`` (nats per datum), each with shape :math:`(n,)`. The seeds of a name have
            the same :math:`n`; the band is one standard deviation to each side.
        path: The path of the file, ``.png``, ``.pdf`` or ``.svg``.
        title: The title.

    Raises:
        ValueError: If there are no curves, a key is missing, seeds differ in :math:`n`, or a value
            is not finite.
    """
    if not curves:
        raise ValueError("curves must not be empty")
    means: dict[str, dict[str, Tensor]] = {}
    for name, seeds in curves.items():
        check_keys(f"curves {name!r}", seeds, ("seconds", "steps", "loss"))
        n, stacks = len(column(f"curves {name!r} 'steps' of seed 0", seeds[0]["steps"])), {}
        for key in ("seconds", "steps", "loss"):
            what = f"curves {name!r} {key!r} of seed"
            stacks[key] = torch.stack(
                [column(f"{what} {i}", s[key], n) for i, s in enumerate(seeds)]
            )
        means[name] = {key: stack.mean(0) for key, stack in stacks.items()}
        means[name]["band"] = stacks["loss"].std(0, correction=min(1, len(seeds) - 1))

    figure, (left, right) = slide(title, panels=2)
    right.sharey(left)
    right.tick_params(labelleft=False)
    for axes, key in ((left, "seconds"), (right, "steps")):
        for i, (name, mean) in enumerate(means.items()):
            color, x, y, band = COLORS[i % len(COLORS)], mean[key], mean["loss"], mean["band"]
            style: dict[str, Any] = {"linestyle": DASHES[i % len(DASHES)]}
            if i >= len(DASHES):  # the dashes are used again: told apart without colors
                style |= {"marker": MARKERS[i // len(DASHES) - 1], "markersize": 7}
                style |= {"markevery": math.ceil(len(y) / 30)}
            style |= {"marker": "o", "clip_on": False} if len(y) == 1 else {}
            axes.plot(x, y, color=color, linewidth=2.5, label=name, **style)
            if band.any():
                axes.fill_between(x, y - band, y + band, color=color, alpha=0.2, linewidth=0)
        axes.set_xlim(0, 1.02 * max(mean[key].max().item() for mean in means.values()) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter("{x:,g}")
    low = min((mean["loss"] - mean["band"]).min().item() for mean in means.values())
    late = [(m["loss"] + m["band"])[len(m["loss"]) // 2 :].max().item() for m in means.values()]
    span = (max(late) - low) or 1.0
    left.set_ylim(low - 0.05 * span, max(late) + 0.15 * span)
    left.set_xlabel("wall-clock time (s)", fontsize=FONT)
    right.set_xlabel("training steps", fontsize=FONT)
    left.set_ylabel("test −ELBO (nats per datum)", fontsize=FONT)
    handles, _ = left.get_legend_handles_labels()
    if any(mean["band"].any() for mean in means.values()):
        handles.append(Patch(color=GREY, alpha=0.3, label="± 1 standard deviation of seeds"))
    legend_outside(figure, 1560, loc="outside lower center", handles=handles)
    save(figure, path)
