"""Pictures: exact pixels where there are images, valid files of a known size everywhere."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vaediff.plotting import (
    plot_elbo_terms,
    plot_history,
    plot_kl_by_timestep,
    plot_log_likelihood,
    save_image_grid,
    save_reconstructions,
    save_strip,
)

TERMS = {"x": 231.4, "-H[z_0]": -45.7, "z_1000": 0.02, "z_s": 40.1, "z_0": 12.5}


def without_train(start, num_epochs):
    epochs = range(start + 1, start + num_epochs + 1)
    return [{"epoch": epoch, "validation": 12.0 + 1 / epoch} for epoch in epochs]


def history(n):
    epochs = range(1, n + 1)
    return [{"epoch": e, "train": 10.0 + 90 / e, "validation": 12.0 + (e - 7) ** 2} for e in epochs]


def images(*shape, device, levels=17):
    torch.manual_seed(0)
    return (torch.randint(levels, shape) / (levels - 1)).to(device)


def read(path):
    """The pixels of a PNG file as (H, W, 3)."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def enlarged(image, scale):
    """Nearest-neighbor enlargement of one (C, H, W) image in [0, 1], as (H, W, 3) bytes."""
    pixels = np.rint(255 * image.detach().cpu().double().numpy()).astype(np.uint8)
    pixels = np.kron(pixels, np.ones((1, scale, scale), np.uint8))
    return np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0)


def find(tile, picture):
    """The top left corners at which a tile occurs in a picture, pixel by pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, tile.shape)[:, :, 0]
    # Sparse pixels first: comparing whole windows everywhere would take minutes.
    step = max(1, tile.shape[0] // 8)
    hits = (windows[..., ::step, ::step, :] == tile[::step, ::step]).all((-3, -2, -1))
    return [(y, x) for y, x in np.argwhere(hits) if (windows[y, x] == tile).all()]


pytestmark = pytest.mark.usefixtures("no_global_state")


# --- Images ---


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("kwargs", "columns", "scale", "padding"),
    [
        ({}, 3, 6, 1),  # 8 images in 3 columns; 48 pixels each
        ({"columns": 4, "scale": 1, "padding": 0}, 4, 1, 0),
        ({"columns": 8, "scale": 3, "padding": 2}, 8, 3, 2),
        ({"columns": 20}, 20, 6, 1),
    ],
)
def test_grid_is_exact(tmp_path, device, channels, kwargs, columns, scale, padding):
    x = images(8, channels, 8, 8, device=device)
    save_image_grid(x, tmp_path / "grid.png", **kwargs)
    rows, cell, edge = -(-8 // columns), (8 + padding) * scale, padding * scale
    expected = np.full((rows * cell + edge, columns * cell + edge, 3), 255, np.uint8)
    for i, image in enumerate(x):
        y, z = edge + i // columns * cell, edge + i % columns * cell
        expected[y : y + 8 * scale, z : z + 8 * scale] = enlarged(image, scale)
    np.testing.assert_array_equal(read(tmp_path / "grid.png"), expected)


@pytest.mark.parametrize(("size", "pixels"), [(8, 48), (16, 48), (28, 56), (32, 64), (64, 64)])
def test_images_are_enlarged_until_they_are_readable(tmp_path, device, size, pixels):
    save_image_grid(images(1, 1, size, size, device=device), tmp_path / "one.png", padding=0)
    assert read(tmp_path / "one.png").shape == (pixels, pixels, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_grid_takes_any_dtype_and_gradients(tmp_path, device, dtype):
    x = images(4, 1, 8, 8, device=device, levels=2)
    save_image_grid(x, tmp_path / "float32.png")
    save_image_grid(x.to(dtype).requires_grad_(), tmp_path / "other.png")
    np.testing.assert_array_equal(read(tmp_path / "float32.png"), read(tmp_path / "other.png"))


def test_strip_shows_every_image_once_in_order(tmp_path, device):
    rows = images(2, 3, 3, 8, 8, device=device)
    save_strip(rows, tmp_path / "strip.png", ["t = 1000", "t = 500", "t = 0"])
    picture = read(tmp_path / "strip.png")
    places = np.array([[find(enlarged(image, 13), picture) for image in row] for row in rows])
    assert places.shape == (2, 3, 1, 2)  # each image is found exactly once
    y, x = places[:, :, 0, 0], places[:, :, 0, 1]
    assert (np.diff(y, axis=1) == 0).all() and (np.diff(y, axis=0) == 13 * 9).all()
    assert (np.diff(x, axis=0) == 0).all() and (np.diff(x, axis=1) == 13 * 9).all()
    # There is ink above each column, centered on it to within two pixels.
    for left in x[0]:
        ink = np.flatnonzero((picture[y.min() - 20 : y.min(), left : left + 104] < 128).any((0, 2)))
        assert ink.max() - ink.min() > 20
        assert abs((ink.min() + ink.max()) / 2 - 51.5) < 2


def test_strip_makes_room_for_long_labels_and_titles(tmp_path, device):
    rows = images(1, 2, 1, 8, 8, device=device)
    save_strip(rows, tmp_path / "short.png", ["a", "b"], title="A")
    save_strip(rows, tmp_path / "long.png", ["a long label of 31 characters", "b"], title="A " * 60)
    short, long = read(tmp_path / "short.png").shape, read(tmp_path / "long.png").shape
    assert long[1] > 2 * 29 * 0.6 * 18 and long[0] > short[0]


def test_reconstructions_are_below_their_images(tmp_path, device):
    x, y = images(5, 1, 8, 8, device=device), 1 - images(5, 1, 8, 8, device=device)
    save_reconstructions(x, y, tmp_path / "pairs.png", columns=3)
    picture = read(tmp_path / "pairs.png")
    for i in range(5):
        (upper,) = find(enlarged(x[i], 12), picture)
        (lower,) = find(enlarged(y[i], 12), picture)
        assert (lower[0] - upper[0], lower[1] - upper[1]) == (12 * 9, 0)


# --- Charts ---


def plots(path, device):
    """Calls which must all work, and the widths of their pictures."""
    kl = torch.logspace(1, -8, 1000, dtype=torch.float64, device=device)
    signed = torch.cat([-50 * kl.new_ones(1), kl[1:]])
    zero_inside = kl * (torch.arange(1000, device=device) % 2)
    return {
        "kl": (1600, lambda: plot_kl_by_timestep(kl, path)),
        "half precision": (
            1600,
            lambda: plot_kl_by_timestep(kl[:500].bfloat16().requires_grad_(), path),
        ),
        "one step": (1600, lambda: plot_kl_by_timestep(kl[:1], path)),
        "two steps": (1600, lambda: plot_kl_by_timestep(kl[:2], path, title="Two")),
        "zeros": (1600, lambda: plot_kl_by_timestep(zero_inside, path)),
        "signed": (1600, lambda: plot_kl_by_timestep(signed, path)),
        "zero and signed": (1600, lambda: plot_kl_by_timestep({"a": 0 * kl, "b": signed}, path)),
        "runs": (
            1600,
            lambda: plot_kl_by_timestep({str(i): kl[: 10 * i + 1] for i in range(12)}, path),
        ),
        "terms": (1280, lambda: plot_elbo_terms(TERMS, path)),
        "tensors": (
            1280,
            lambda: plot_elbo_terms({k: kl.new_tensor(v) for k, v in TERMS.items()}, path),
        ),
        "negative": (
            1280,
            lambda: plot_elbo_terms({"x": -4532.4, "z": 3.0}, path, title="Densities"),
        ),
        "zero": (1280, lambda: plot_elbo_terms({"x": 0.0}, path)),
        "history": (1280, lambda: plot_history(history(50), path)),
        "of the prior alone": (
            1280,
            lambda: plot_history([*history(9), *without_train(9, 3)], path),
        ),
        "of nothing but the prior": (1280, lambda: plot_history(without_train(0, 3), path)),
        "one epoch": (1280, lambda: plot_history(history(1), path)),
        "constant": (
            1280,
            lambda: plot_history([history(1)[0] | {"epoch": e} for e in range(20)], path),
        ),
        "estimates": (
            1280,
            lambda: plot_log_likelihood({k: -100 - 9 / k for k in (1, 2, 4, 5)}, path),
        ),
        "one estimate": (1280, lambda: plot_log_likelihood({1: 3.2}, path)),
    }


@pytest.mark.parametrize("name", plots(None, "cpu"))
def test_charts_are_slides(tmp_path, device, name):
    path = tmp_path / "new" / "folders" / "chart.png"
    # Warnings are errors in this suite: no missing glyph, no failed layout.
    width, plot = plots(path, device)[name]
    assert plot() is None
    picture = read(path)
    assert picture.shape == (720, width, 3)
    # There is something on it: between 1 and 40 % of the pixels are not white.
    assert 0.01 < (picture < 250).any(-1).mean() < 0.4
    assert os.listdir(path.parent) == ["chart.png"]


@pytest.mark.parametrize("suffix", [".pdf", ".svg"])
def test_charts_are_vector_graphics_by_their_suffix(tmp_path, suffix):
    path = tmp_path / f"terms{suffix}"
    plot_elbo_terms(TERMS, path)
    assert (b"%PDF" if suffix == ".pdf" else b"<svg") in path.read_bytes()


def colored(picture, color):
    """The pixels of exactly that color, as the extent of x and y."""
    y, x = np.nonzero((picture == np.array(color)).all(-1))
    return x.min(), x.max(), y.min(), y.max()


def test_waterfall_has_bars_in_proportion(tmp_path):
    plot_elbo_terms({"x": 200.0, "-H": -50.0}, tmp_path / "terms.png")
    picture = read(tmp_path / "terms.png")
    x = colored(picture, (0xD5, 0x5E, 0x00))
    h = colored(picture, (0x00, 0x72, 0xB2))
    # Bars have an edge of about two pixels; 50 nats are a quarter of 200, and end where x ends.
    assert (h[1] - h[0]) == pytest.approx((x[1] - x[0]) / 4, abs=3)
    assert h[1] == pytest.approx(x[1], abs=2) and h[2] > x[3]
    # The total is 150 nats: it begins where x begins and ends where the second bar ends.
    top = 2 * h[2] - x[2]
    total = np.flatnonzero((picture[top + 10 : top + 20] == 0x59).all((0, 2)))
    assert total.min() == pytest.approx(x[0], abs=2) and total.max() == pytest.approx(h[0], abs=2)


def test_the_last_estimate_is_compared_with_that_of_half_as_many(tmp_path):
    plot_log_likelihood({1: -9.0, 2: -8.0, 4: -7.0, 5: -6.5}, tmp_path / "estimates.svg")
    text = (tmp_path / "estimates.svg").read_text()
    assert "−6.50 nats at K = 5" in text and "+1.50 since K = 2" in text


def test_files_are_reproducible(tmp_path):
    for name in ("a.png", "b.png"):
        plot_history(history(20), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# --- Broken input ---


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.zeros(4, 8, 8), r"images must have shape \(N, C, H, W\).*got \(4, 8, 8\)"),
        (torch.zeros(4, 2, 8, 8), "C = 1 or 3"),
        (torch.zeros(0, 1, 8, 8), "no empty dimension"),
        (torch.full((1, 1, 8, 8), 1.5), r"in \[0, 1\], got values from 1.5 to 1.5"),
        (torch.full((1, 1, 8, 8), -0.1), r"images must be finite and in \[0, 1\]"),
        (torch.full((1, 1, 8, 8), torch.nan), "images must be finite"),
        (torch.full((1, 1, 8, 8), torch.inf), "images must be finite"),
    ],
)
def test_broken_images_raise(tmp_path, x, match):
    with pytest.raises(ValueError, match=match):
        save_image_grid(x, tmp_path / "grid.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "kwargs", [{"columns": 0}, {"columns": 1.5}, {"scale": 0}, {"scale": -2}, {"padding": -1}]
)
def test_broken_numbers_raise(tmp_path, kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))} must be a whole number"):
        save_image_grid(torch.zeros(1, 1, 8, 8), tmp_path / "grid.png", **kwargs)


def test_broken_strips_and_pairs_raise(tmp_path):
    x, path = torch.zeros(4, 1, 8, 8), tmp_path / "x.png"
    with pytest.raises(ValueError, match=r"rows must have shape \(R, S, C, H, W\)"):
        save_strip(x, path, ["a"])
    with pytest.raises(ValueError, match="one label for each of the 4 columns, got 1"):
        save_strip(x[None], path, ["a"])
    with pytest.raises(ValueError, match="reconstruction must have the shape of x"):
        save_reconstructions(x, x[:2], path)
    with pytest.raises(ValueError, match="reconstruction must be finite"):
        save_reconstructions(x, x - 1, path)
    with pytest.raises(ValueError, match="columns must be a whole number"):
        save_reconstructions(x, x, path, columns=0)


@pytest.mark.parametrize(
    ("kl", "match"),
    [
        (torch.zeros(3, 2), r"kl must have shape \(T,\), got \(3, 2\)"),
        ({"run": torch.zeros(0)}, r"kl 'run' must have shape \(T,\), got \(0,\)"),
        (torch.tensor([1.0, torch.nan]), "kl must be finite"),
        ({"run": torch.tensor([torch.inf])}, "kl 'run' must be finite"),
        (torch.zeros(5), "must not be zero at every timestep"),
        ({"a": torch.ones(5), "b": torch.zeros(5)}, "kl 'b' must not be zero at every timestep"),
        ({}, "kl must hold at least one run"),
    ],
)
def test_broken_kls_raise(tmp_path, kl, match):
    with pytest.raises(ValueError, match=match):
        plot_kl_by_timestep(kl, tmp_path / "kl.png")


@pytest.mark.parametrize(
    ("terms", "match"),
    [
        ({}, "terms must not be empty"),
        ({"x": 1.0, "z_0": float("nan")}, "term 'z_0' must be finite"),
        ({"x": torch.ones(3)}, r"term 'x' must be one number, got shape \(3,\)"),
    ],
)
def test_broken_terms_raise(tmp_path, terms, match):
    with pytest.raises(ValueError, match=match):
        plot_elbo_terms(terms, tmp_path / "terms.png")


@pytest.mark.parametrize(
    ("estimates", "match"),
    [({}, "estimates must hold at least one"), ({1: float("nan")}, "estimates must be finite")],
)
def test_broken_estimates_raise(tmp_path, estimates, match):
    with pytest.raises(ValueError, match=match):
        plot_log_likelihood(estimates, tmp_path / "likelihood.png")


@pytest.mark.parametrize(
    ("records", "match"),
    [
        ([], "history must have at least one epoch"),
        ([{"epoch": 1, "validation": 1.0}, *history(2)], "'train', which record 0 lacks"),
        ([*history(3), {"epoch": 4, "train": 1.0}], "'validation', which record 3 lacks"),
        ([history(1)[0] | {"train": float("inf")}], "history 'train' must be finite"),
    ],
)
def test_broken_histories_raise(tmp_path, records, match):
    with pytest.raises(ValueError, match=match):
        plot_history(records, tmp_path / "history.png")


def test_other_suffixes_raise(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in .png, got .*grid.jpg"):
        save_image_grid(torch.zeros(1, 1, 8, 8), tmp_path / "grid.jpg")
    with pytest.raises(ValueError, match=r"path must end in .png or .pdf or .svg, got .*terms'"):
        plot_elbo_terms(TERMS, tmp_path / "terms")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "terms.png"
    plot_elbo_terms(TERMS, path)
    before = path.read_bytes()

    def half(figure, file, **kwargs):
        file.write(b"half of a picture")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.raises(OSError, match="disk full"):
        plot_elbo_terms(TERMS, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["terms.png"]
