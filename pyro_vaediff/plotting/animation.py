r"""Moving pictures: latents that diffuse and are denoised."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from .style import write

__all__ = ["Animation", "animate"]


@dataclass(frozen=True)
class Animation:
    r"""An animated GIF, which notebooks show as what a cell returns.

    Arguments:
        data: The bytes of the file.
    """

    data: bytes

    def save(self, path: str | Path) -> None:
        r"""Writes the file, atomically.

        Arguments:
            path: Where, with the suffix ``.gif``.
        """
        write(path, (".gif",), lambda file: file.write(self.data))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"image/gif": base64.b64encode(self.data).decode()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.data)} bytes)"


def animate(
    figure: Figure,
    draw: Callable[[Any], Any],
    frames: Iterable[Any],
    fps: float = 10.0,
    hold: float = 2.0,
    dpi: float = 100.0,
) -> Animation:
    r"""Animates a figure.

    Arguments:
        figure: The figure.
        draw: A function that changes the figure into that of one frame.
        frames: What ``draw`` is called with, frame by frame.
        fps: The number of frames per second, up to 50.
        hold: How long the last frame stays, in seconds, before the animation begins anew.
        dpi: The resolution, in pixels per inch.

    Returns:
        The animation. A notebook displays it; ``.save(path)`` writes it to a file.

    Raises:
        ValueError: If there are no frames, or too many per second.

    Example:
        >>> figure = Figure(figsize=(2, 2))
        >>> line, = figure.subplots().plot([0, 1], [0, 0])
        >>> animate(figure, lambda y: line.set_ydata([0, y]), [0.0, 0.01, 0.02])
        Animation(... bytes)
    """
    if not 0 < fps <= 50:
        raise ValueError(f"fps must be above 0 and at most 50, as GIF viewers allow, got {fps}")
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    images = []
    for frame in frames:
        draw(frame)
        canvas.draw()
        # One palette per frame, and no dither: dots that do not move do not flicker either.
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        images.append(image.quantize(128, dither=Image.Dither.NONE))
    if not images:
        raise ValueError("frames is empty: give draw at least one frame to draw")
    durations = [round(1000 / fps)] * len(images)
    durations[-1] += round(1000 * hold)
    with io.BytesIO() as file:
        images[0].save(
            file, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0
        )
        return Animation(file.getvalue())
