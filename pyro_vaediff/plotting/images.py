r"""Images, written pixel by pixel."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .style import GREY, write

__all__ = ["save_image_grid", "save_panels", "save_reconstructions", "save_strip"]


def save_image_grid(
    images: Tensor,
    path: str | Path,
    columns: int | None = None,
    scale: int | None = None,
    padding: int = 1,
) -> None:
    r"""Saves images side by side, row by row, as a lossless PNG.

    Arguments:
        images: The images in [0, 1], with shape :math:`(N, C, H, W)` and :math:`C` 1 or 3.
        path: The path of the ``.png`` file.
        columns: The number of images per row. By default, the grid is about square.
        scale: The number of pixels in the file per pixel of an image, in each direction. By
            default, the smallest one which shows an image at 48 pixels or more.
        padding: The number of white pixels around each image, before they are enlarged.

    Raises:
        ValueError: If the images are not as above, or if a number is out of its range.
    """
    images = as_images("images", images, "NCHW")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    scale = readable_scale(images, 48) if scale is None else scale
    for name, value, least in (
        ("columns", columns, 1),
        ("scale", scale, 1),
        ("padding", padding, 0),
    ):
        if int(value) != value or value < least:
            raise ValueError(f"{name} must be a whole number >= {least}, got {value}")
    picture = Image.fromarray(tile(images, columns, padding, scale).numpy())
    write(path, (".png",), lambda file: picture.save(file, format="png"))


def save_strip(
    rows: Tensor,
    path: str | Path,
    labels: Sequence[str],
    title: str = "From noise to images: decoded latents along the reverse diffusion",
) -> None:
    r"""Saves rows of images with a label above each column, such as ``"t = 1000"`` to ``"t = 0"``.

    Arguments:
        rows: The images in [0, 1], with shape :math:`(R, S, C, H, W)`: a row per sample, a column
            per timestep.
        path: The path of the ``.png`` file.
        labels: The labels of the :math:`S` columns.
        title: The title.

    Raises:
        ValueError: If the images are not as above, or their columns are not as many as the labels.
    """
    rows = as_images("rows", rows, "RSCHW")
    if len(labels) != rows.shape[1]:
        raise ValueError(
            f"labels must be one label for each of the {rows.shape[1]} columns, got {len(labels)}"
        )
    save_labeled([rows.flatten(0, 1)], path, title, columns=labels)


def save_reconstructions(
    x: Tensor,
    reconstruction: Tensor,
    path: str | Path,
    columns: int = 8,
    title: str = "Images and their reconstructions",
) -> None:
    r"""Saves images, each one above its reconstruction.

    Arguments:
        x: The images in [0, 1], with shape :math:`(N, C, H, W)`.
        reconstruction: Their reconstructions in [0, 1], with the same shape.
        path: The path of the ``.png`` file.
        columns: The number of pairs side by side.
        title: The title.

    Raises:
        ValueError: If the images are not as above, or ``columns`` is not positive.
    """
    x, reconstruction = (
        as_images("x", x, "NCHW"),
        as_images("reconstruction", reconstruction, "NCHW"),
    )
    if x.shape != reconstruction.shape:
        raise ValueError(
            f"reconstruction must have the shape of x, {tuple(x.shape)}, got "
            f"{tuple(reconstruction.shape)}"
        )
    if int(columns) != columns or columns < 1:
        raise ValueError(f"columns must be a whole number >= 1, got {columns}")
    columns = min(columns, len(x))
    # Missing images of the last pairs are white, as the background.
    fill = x.new_ones(-len(x) % columns, *x.shape[1:])
    pairs = zip(
        torch.cat([x, fill]).split(columns),
        torch.cat([reconstruction, fill]).split(columns),
        strict=True,
    )
    blocks = [torch.cat(pair) for pair in pairs]
    save_labeled(blocks, path, title, columns=[""] * columns, rows=("image", "reconstruction"))


def save_panels(
    panels: Sequence[Sequence[Tensor | None]],
    path: str | Path,
    columns: Sequence[str],
    rows: Sequence[str],
    title: str,
    images_per_row: int | None = None,
) -> None:
    r"""Saves grids of images as the panels of a table, such as priors side by side.

    Arguments:
        panels: The images in [0, 1] of each panel, row by row, each with shape
            :math:`(N, C, H, W)`; ``None`` leaves a panel empty. At least one must not be.
        path: The path of the ``.png`` file.
        columns: The labels of the columns of panels.
        rows: The labels of the rows of panels.
        title: The title.
        images_per_row: The number of images per row of a panel. By default, it is about square.

    Raises:
        ValueError: If the images are not as above, or the panels are not as many as the labels.
    """
    if not rows or not columns or [len(row) for row in panels] != [len(columns)] * len(rows):
        raise ValueError(
            f"panels must be {len(rows)} rows of {len(columns)} panels, at least one each, got "
            f"rows of {[len(row) for row in panels]}"
        )
    found = {
        (i, j): as_images(f"panels[{i}][{j}]", images, "NCHW")
        for i, row in enumerate(panels)
        for j, images in enumerate(row)
        if images is not None
    }
    shapes = {tuple(images.shape) for images in found.values()}
    if len(shapes) != 1:
        raise ValueError(f"panels must have one shape (N, C, H, W), got {sorted(shapes)}")
    first = next(iter(found.values()))
    n = math.ceil(math.sqrt(len(first))) if images_per_row is None else images_per_row
    if int(n) != n or n < 1:
        raise ValueError(f"images_per_row must be a whole number >= 1, got {n}")
    grids = {at: tile(images, n, 1, readable_scale(first, 48)) for at, images in found.items()}
    panel_height, panel_width = next(iter(grids.values())).shape[:2]

    em = min(28, max(16, panel_width // 16))  # the size of the letters, in pixels
    gap = em
    labels = [textwrap.wrap(label, max(8, int(panel_width / (0.6 * em)))) for label in columns]
    left = gap + math.ceil(0.62 * em * max(map(len, rows))) + gap
    width = left + len(columns) * (panel_width + gap)
    lines = textwrap.wrap(title, max(16, int(width / (0.8 * em))))
    top = gap + math.ceil(em * (1.7 * len(lines) + 0.5 + 1.3 * max(map(len, labels))))
    height = top + len(rows) * (panel_height + gap)
    with pixels(width, height, path) as (figure, text):
        text(gap, gap, "\n".join(lines), 1.2 * em, va="top", fontweight="bold")
        for j, wrapped in enumerate(labels):
            center = left + j * (panel_width + gap) + panel_width / 2
            text(center, top - 0.5 * em, "\n".join(wrapped), em, ha="center", va="bottom")
        for i, label in enumerate(rows):
            y = top + i * (panel_height + gap)
            text(left - gap, y + panel_height / 2, label, em, ha="right", va="center")
            for j in range(len(columns)):
                x = left + j * (panel_width + gap)
                if (i, j) in grids:
                    below = height - y - panel_height
                    figure.figimage(grids[i, j].numpy(), x, below, origin="upper")
                else:
                    middle = x + panel_width / 2, y + panel_height / 2
                    text(*middle, "not run", em, ha="center", va="center", color=GREY)


def as_images(name: str, images: Tensor, shape: str) -> Tensor:
    r"""Returns images in float64 and on the CPU, once they are known to be images."""
    if images.ndim != len(shape) or images.numel() == 0 or images.shape[-3] not in (1, 3):
        raise ValueError(
            f"{name} must have shape ({', '.join(shape)}) with C = 1 or 3 and no empty dimension, "
            f"got {tuple(images.shape)}"
        )
    images = images.detach().cpu().double()
    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError(
            f"{name} must be finite and in [0, 1], got values from {images.min():.3g} to "
            f"{images.max():.3g}: likelihood.to_unit takes x-space there"
        )
    return images


def readable_scale(images: Tensor, pixels: int) -> int:
    return max(1, math.ceil(pixels / min(images.shape[-2:])))


def tile(images: Tensor, columns: int, padding: int, scale: int) -> Tensor:
    r"""Returns a grid of images, with shape :math:`(H', W', 3)` and dtype uint8."""
    n, _, height, width = images.shape
    height, width = height + padding, width + padding
    rows = math.ceil(n / columns)
    grid = torch.ones(3, rows * height + padding, columns * width + padding, dtype=images.dtype)
    for i, image in enumerate(images):
        top, left = padding + i // columns * height, padding + i % columns * width
        grid[:, top : top + height - padding, left : left + width - padding] = image
    grid = grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return (255 * grid).round().byte().permute(1, 2, 0).contiguous()


def save_labeled(
    blocks: Sequence[Tensor],
    path: str | Path,
    title: str,
    columns: Sequence[str],
    rows: Sequence[str] = (),
) -> None:
    r"""Saves blocks of images below each other, with labels of the columns and of their rows."""
    em, gap = 18, 12  # the size of the letters and the margins, in pixels
    label_width = max(0.62 * em * len(label) for label in columns) + em / 2
    scale = readable_scale(blocks[0], max(96, math.ceil(label_width)))
    grids = [tile(block, len(columns), 1, scale) for block in blocks]
    grid_height, grid_width = grids[0].shape[:2]

    left = gap + math.ceil(max((0.62 * em * len(row) + gap for row in rows), default=0))
    width = max(left + grid_width + gap, 360)
    title = textwrap.fill(title, width // int(0.66 * em))
    top = gap + math.ceil(1.4 * em * (title.count("\n") + 1 + any(columns)))
    height = top + len(grids) * (grid_height + gap)

    with pixels(width, height, path) as (figure, text):
        text(gap, gap, title, em, va="top", fontweight="bold")
        for x, label in zip(centers(grid_width, len(columns), scale), columns, strict=True):
            text(left + x, top - 0.2 * em, label, em, ha="center", va="baseline")
        for i, grid in enumerate(grids):
            above = top + i * (grid_height + gap)
            figure.figimage(grid.numpy(), left, height - above - grid_height, origin="upper")
            for y, label in zip(centers(grid_height, len(rows), scale), rows, strict=True):
                text(left - gap, above + y, label, em, ha="right", va="center")


@contextmanager
def pixels(
    width: int, height: int, path: str | Path
) -> Iterator[tuple[Figure, Callable[..., None]]]:
    r"""Yields a figure whose units are the pixels of the file, such that nothing is resampled, and
    a function that writes into it: at x from the left and y from the top, a text of some size. The
    figure is saved in the end."""
    dpi = 100
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="white")

    def text(x: float, y: float, label: str, size: float, **kwargs: Any) -> None:
        figure.text(x / width, 1 - y / height, label, fontsize=size * 72 / dpi, **kwargs)

    yield figure, text
    write(path, (".png",), lambda file: figure.savefig(file, format="png", dpi=dpi))


def centers(length: int, n: int, padding: int) -> list[float]:
    r"""Returns the positions of the centers of n tiles in a grid of that length."""
    return [padding / 2 + (i + 0.5) * (length - padding) / n for i in range(n)]
