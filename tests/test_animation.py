r"""Animations, and the style of slides."""

from __future__ import annotations

import base64
import io

import matplotlib as mpl
import pytest
from errors import one_line_value_error
from matplotlib.figure import Figure
from PIL import Image, ImageSequence

from pyro_vaediff.plotting import animate


def moving(figure, xs, **options):
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis((0, 1, 0, 1))
    axes.axis("off")
    (dot,) = axes.plot([], [], "o", color="black", markersize=20)
    return animate(figure, lambda x: dot.set_data([x], [0.5]), xs, **options)


def test_a_frame_is_drawn_for_each_argument(tmp_path):
    xs = [0.25, 0.5, 0.75]
    animation = moving(Figure(figsize=(2, 1)), xs, fps=20, hold=1.0, dpi=100)
    animation.save(tmp_path / "dot.gif")

    with Image.open(tmp_path / "dot.gif") as gif:
        assert gif.size == (200, 100)
        assert gif.info["loop"] == 0  # for ever
        frames = [frame.convert("L") for frame in ImageSequence.Iterator(gif)]
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
    assert durations == [50, 50, 1050]
    for x, frame in zip(xs, frames, strict=True):
        dark = [frame.getpixel((round(200 * at), 50)) < 50 for at in xs]
        assert dark == [at == x for at in xs]


def test_notebooks_show_it():
    animation = moving(Figure(figsize=(1, 1)), [0.2, 0.8])
    bundle = animation._repr_mimebundle_()
    assert list(bundle) == ["image/gif"]
    with Image.open(io.BytesIO(base64.b64decode(bundle["image/gif"]))) as gif:
        assert gif.format == "GIF" and gif.n_frames == 2


@pytest.mark.parametrize("fps", [0, -1, 51])
def test_impossible_speeds_are_refused(fps):
    with one_line_value_error(rf"fps .*{fps}"):
        moving(Figure(figsize=(1, 1)), [0.5], fps=fps)


def test_no_frames_and_other_suffixes_are_refused(tmp_path):
    with one_line_value_error("frames"):
        moving(Figure(figsize=(1, 1)), [])
    with one_line_value_error(r"path .*\.gif"):
        moving(Figure(figsize=(1, 1)), [0.5]).save(tmp_path / "dot.png")


def test_the_style_has_the_palette_of_the_pictures():
    from pyro_vaediff.plotting.style import COLORS

    with mpl.rc_context(), mpl.style.context("pyro_vaediff.plotting.slides"):
        colors = [f"#{c.lstrip('#')}" for c in mpl.rcParams["axes.prop_cycle"].by_key()["color"]]
        assert tuple(colors) == COLORS
