r"""Heat maps of one-dimensional chains: densities over time, and the way back from one point."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from torch import Tensor

from ..diffusion import q_reverse
from ..schedules import Schedule
from .style import VERMILLION

__all__ = ["draw_heat_map", "draw_way_back"]


def draw_heat_map(axes: Axes, density: Tensor, z: Tensor) -> AxesImage:
    r"""Draws the densities of :math:`z_0, \dots, z_T` as grey levels over :math:`(t, z)`.

    Black is the largest density of a timestep, as that of :math:`z_0` would outshine all others.

    Arguments:
        axes: The axes to draw into.
        density: The densities for :math:`t = 0, \dots, T`, with shape :math:`(T + 1, n)`, as
            :func:`~pyro_vaediff.evaluate.guide_marginals` and
            :func:`~pyro_vaediff.evaluate.model_marginals` return them.
        z: The points of the grid, evenly spaced, with shape :math:`(n,)`.

    Returns:
        The image.

    Raises:
        ValueError: If the shapes do not fit, or a density is negative or not finite.
    """
    if density.ndim != 2 or density.shape[1:] != z.shape or len(z) < 2:
        raise ValueError(
            "density must have shape (T + 1, n) and z shape (n,), got "
            f"{tuple(density.shape)} and {tuple(z.shape)}"
        )
    density, z = density.detach().cpu().double(), z.detach().cpu().double()
    largest = density.amax(1, keepdim=True)
    if not bool(torch.isfinite(density).all() and (density >= 0).all() and (largest > 0).all()):
        raise ValueError("density must be finite, at least 0, and positive somewhere at each t")
    half = (z[1] - z[0]).item() / 2
    image = axes.imshow(
        (density / largest).T.numpy(),
        extent=(-0.5, len(density) - 0.5, z[0].item() - half, z[-1].item() + half),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="Greys",
        vmin=0,
        vmax=1,
    )
    axes.grid(False)
    axes.set(xlabel="timestep t", ylabel="$z_t$")
    return image


def draw_way_back(
    axes: Axes,
    schedule: Schedule,
    z_0: float,
    z_t: float,
    t: int,
    color: str = VERMILLION,
    linestyle: str = "-",
    label: str | None = None,
) -> None:
    r"""Draws :math:`q(z_s | z_t, z_0)` for all :math:`s < t`: its mean, and two standard deviations
    to both sides.

    For :math:`s = t - 1`, it is the guide's step back. It ends at the point :math:`z_0`.

    Arguments:
        axes: The axes to draw into.
        schedule: The schedule.
        z_0: Where the chain started.
        z_t: Where it was at time :math:`t`.
        t: The timestep :math:`t \geq 1`.
        color: The color of the lines.
        linestyle: The dashes of the mean.
        label: What the legend calls it.

    Raises:
        ValueError: If there is no such timestep.
    """
    if t not in range(1, schedule.num_timesteps + 1):
        raise ValueError(f"t must be from 1 to T = {schedule.num_timesteps}, got {t}")
    start, end = (torch.tensor([float(value)]) for value in (z_0, z_t))
    steps = [q_reverse(schedule, start, end, t, s) for s in range(1, t)]
    mean = torch.tensor([float(z_0), *(q.mean.item() for q in steps), float(z_t)])
    sd = torch.tensor([0.0, *(q.stddev.item() for q in steps), 0.0])
    times = torch.arange(t + 1)
    axes.fill_between(times, mean - 2 * sd, mean + 2 * sd, color=color, alpha=0.25, linewidth=0)
    for line in (mean - 2 * sd, mean + 2 * sd):
        axes.plot(times, line, color=color, linewidth=1)
    casing = [withStroke(linewidth=4.5, foreground="white")]  # visible on black as well
    axes.plot(
        times, mean, color=color, linestyle=linestyle, linewidth=2, label=label, path_effects=casing
    )
    axes.plot([0, t], [z_0, z_t], "o", color=color, markeredgecolor="white", markersize=7)
