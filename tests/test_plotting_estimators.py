"""Pictures of estimators: slides of a known size, on which no name covers another."""

from __future__ import annotations

import itertools
import os
import sys

import numpy as np
import pytest
import torch
from errors import one_line_value_error
from estimators.plots import plot_convergence, plot_gradient_noise, plot_training
from PIL import Image

from pyro_vaediff.bench import pareto_front, plot_pareto
from pyro_vaediff.plotting.style import BLACK, BLUE, ORANGE, VERMILLION

GROUPS = ("sampled KL", "closed-form KL", "one timestep", "importance", "antithetic", "collapsed")


pytestmark = pytest.mark.usefixtures("no_global_state")


@pytest.fixture
def drawn(monkeypatch):
    """Calls a function that plots, and returns the axes that it would have saved."""

    def draw(plot, *args, **kwargs):
        figures = []
        module = sys.modules[plot.__module__]
        monkeypatch.setattr(module, "save", lambda figure, path: figures.append(figure))
        plot(*args, path="unused.png", **kwargs)
        (figure,) = figures
        figure.draw_without_rendering()
        return figure.axes

    return draw


def estimators_of(n=45):
    """Made-up estimators in six groups, whose merits differ by four orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    cost = 2 * torch.logspace(0, 1.7, n) * (1 + 2 * torch.rand(n, generator=generator))
    merit = 10 ** (2 - 4 * torch.rand(n, generator=generator))
    names = [f"{GROUPS[i % 6]}, K = {2 ** (i // 6)}" for i in range(n)]
    points = [
        {"name": name, "group": GROUPS[i % 6], "cost": cost[i], "variance": merit[i] / cost[i]}
        for i, name in enumerate(names)
    ]
    points[0]["label"] = True
    return points


def staircase(n):
    """Estimators all of which are on the frontier, close to each other."""
    return [
        {"name": f"estimator {i}", "group": "a", "cost": 1.15**i, "variance": 0.8**i}
        for i in range(n)
    ]


def errors(n=12, **scales):
    samples = 2 ** torch.arange(n)
    return {
        name: {
            "samples": samples,
            "error": (scale**2 / samples + 0.01 * (name == "iwae")).sqrt(),
            "biased": name == "iwae",
        }
        for name, scale in scales.items()
    }


def training(names=2, seeds=3, n=41, start=500.0):
    """Curves from ``start`` to 100 nats, 110 nats and so on, whose seeds are 1 nat apart."""
    steps = torch.arange(n) * 500
    return {
        f"estimator {i}": [
            {
                "steps": steps,
                "seconds": steps * 0.01 * (i + 1),
                "loss": 100.0 + 10 * i + seed + (start - 100) * torch.exp(-steps / 1000),
            }
            for seed in range(seeds)
        ]
        for i in range(names)
    }


T = torch.arange(1, 1001, dtype=torch.float64)
NOISE = {"predict noise": 30 / T, "predict z_0": T**-0.5}
PROPOSALS = {"uniform": 0 * T + 1e-3, "optimal": (1 / T) / (1 / T).sum()}


# --- The frontier ---


def by_definition(cost, variance):
    """The points that none dominates, compared with each other point."""
    points = list(zip(cost, variance, strict=True))

    def dominates(p, q):
        return p[0] <= q[0] and p[1] <= q[1] and p != q

    return {i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("levels", [3, 10, 10**6])  # few levels have many ties
def test_front_is_that_of_brute_force(device, seed, levels):
    generator = torch.Generator().manual_seed(seed)
    cost, variance = torch.randint(levels, (2, 40), generator=generator).double().to(device)
    front = pareto_front(cost, variance)
    assert len(front) == len(set(front))
    assert set(front) == by_definition(cost.tolist(), variance.tolist())
    assert cost[front].diff().ge(0).all() and variance[front].diff().le(0).all()
    assert pareto_front(cost.tolist(), variance.tolist()) == front


def test_front_by_hand():
    assert pareto_front([3.0, 1.0, 2.0, 2.0], [1.0, 3.0, 2.0, 2.5]) == [1, 2, 0]
    assert pareto_front([1.0, 1.0, 1.0], [2.0, 2.0, 3.0]) == [0, 1]
    assert pareto_front([1.0], [1.0]) == [0]


# --- All pictures ---


def plots(path, device):
    """Calls which must all work."""
    t, ones = T.to(device), torch.ones(5, device=device)
    one_seed = training(seeds=1)
    return {
        "pareto": lambda: plot_pareto(estimators_of(), path),
        "one point": lambda: plot_pareto(estimators_of(1), path, title="One"),
        "tensors": lambda: plot_pareto([p | {"cost": ones[0]} for p in estimators_of(3)], path),
        "twenty orders": lambda: plot_pareto(
            [p | {"variance": 10.0 ** (i - 10)} for i, p in enumerate(estimators_of(20))], path
        ),
        "many groups": lambda: plot_pareto(
            [p | {"group": f"a group with a long name, {i}"} for i, p in enumerate(staircase(7))],
            path,
        ),
        "convergence": lambda: plot_convergence(errors(a=1.0, b=20.0, iwae=5.0), path, floor=0.1),
        "all biased": lambda: plot_convergence(errors(n=1, iwae=5.0), path, title="Biased"),
        "many samples": lambda: plot_convergence(errors(n=40, a=5.0), path),
        "half precision": lambda: plot_convergence(
            {"a": {"samples": ones, "error": ones.bfloat16().requires_grad_(), "biased": 0}}, path
        ),
        "noise": lambda: plot_gradient_noise(t, NOISE, PROPOSALS, path),
        "one step": lambda: plot_gradient_noise(t[:1], {"a": t[:1]}, {"b": t[:1]}, path),
        "zeros": lambda: plot_gradient_noise(t, {"a": (t - 5).relu()}, {"a": t % 2}, path),
        "long names": lambda: plot_gradient_noise(
            t, {f"{i} {'x' * 40}": i * t for i in range(1, 5)}, PROPOSALS, path
        ),
        "training": lambda: plot_training(training(names=8), path),
        "one seed": lambda: plot_training(one_seed, path),
        "one record": lambda: plot_training(training(n=1), path),
        "constant": lambda: plot_training(training(seeds=1, start=100.0), path, title="Flat"),
    }


@pytest.mark.parametrize("name", plots(None, "cpu"))
def test_charts_are_slides(tmp_path, device, name):
    path = tmp_path / "new" / "folders" / "chart.png"
    # Warnings are errors in this suite: no missing glyph, no failed layout.
    assert plots(path, device)[name]() is None
    with Image.open(path) as image:
        picture = np.asarray(image.convert("RGB"))
    assert picture.shape == (720, 1600, 3)
    assert 0.01 < (picture < 250).any(-1).mean() < 0.4
    # Nothing is cut off: the border is empty.
    inner = picture[1:-1, 1:-1]
    assert (picture == 255).all(-1).sum() - (inner == 255).all(-1).sum() == 2 * (720 + 1600) - 4
    assert os.listdir(path.parent) == ["chart.png"]


@pytest.mark.parametrize("suffix", [".pdf", ".svg"])
def test_charts_are_vector_graphics_by_their_suffix(tmp_path, suffix):
    path = tmp_path / f"pareto{suffix}"
    plot_pareto(estimators_of(), path)
    assert (b"%PDF" if suffix == ".pdf" else b"<svg") in path.read_bytes()


def test_files_are_reproducible(tmp_path):
    for name in ("a.png", "b.png"):
        plot_pareto(estimators_of(), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# --- Variance against cost ---


@pytest.mark.parametrize("points", [estimators_of(), staircase(12), staircase(20)])
def test_names_cover_neither_each_other_nor_points(drawn, points):
    (axes,) = drawn(plot_pareto, points)
    cost, variance = (torch.tensor([p[key] for p in points]) for key in ("cost", "variance"))
    front = by_definition(cost.tolist(), variance.tolist())
    labelled = {p["name"] for i, p in enumerate(points) if i in front or p.get("label")}
    assert sorted(text.get_text() for text in axes.texts) == sorted(labelled)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    pixels = axes.transData.transform(torch.stack([cost, variance], -1).numpy())
    for box in boxes:
        assert axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
        assert not any(box.padded(5).contains(*pixel) for pixel in pixels)


def test_a_name_is_next_to_its_point_if_it_is_alone(drawn):
    (axes,) = drawn(plot_pareto, staircase(1))
    (text,) = axes.texts
    x, y = axes.transData.transform((1.0, 1.0))
    near = np.clip((x, y), *text.get_window_extent().get_points())
    assert np.hypot(*(near - (x, y))) < 12 * 160 / 72  # 12 points of 1/72 inch, at 160 dpi


def test_the_frontier_is_a_staircase_and_merits_are_diagonals(drawn):
    points = [
        {"name": "a", "group": "a", "cost": 1.0, "variance": 8.0},
        {"name": "b", "group": "b", "cost": 4.0, "variance": 0.5},
        {"name": "c", "group": "b", "cost": 5.0, "variance": 5.0},
    ]
    (axes,) = drawn(plot_pareto, points)
    lines = {line.get_label(): np.stack(line.get_data()) for line in axes.lines}
    top, right = axes.get_ylim()[1], axes.get_xlim()[1]
    expected = [[1, 1, 4, 4, right], [top, 8, 8, 0.5, 0.5]]
    np.testing.assert_allclose(lines["Pareto frontier"], expected)
    merits = [line.get_data() for line in axes.lines if line.get_color() == "#BBBBBB"]
    products = np.array([np.multiply(*data) for data in merits])
    np.testing.assert_allclose(products[:, 0], products[:, 1])  # constant along a line
    np.testing.assert_allclose(products[1:, 0] / products[:-1, 0], 2)  # as the legend says
    assert "equal variance × time,\n2× apart" in lines
    assert products.min() < 2 and products.max() > 25  # the merits of b and c
    assert axes.get_xlim()[0] < 1 and axes.get_ylim()[0] < 0.5 and right > 5 and top > 8


# --- Error against samples ---


def test_biased_estimators_look_and_are_called_so(drawn):
    (axes,) = drawn(plot_convergence, errors(a=1.0, iwae=5.0, b=20.0), floor=0.05)
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"a", "b", "iwae (biased)", "slope −1/2"}
    for name in ("a", "b"):
        assert lines[name].get_linestyle() == "-"
        assert lines[name].get_color() not in (VERMILLION, ORANGE)
    assert lines["iwae (biased)"].get_linestyle() == "--"
    assert lines["iwae (biased)"].get_color() == VERMILLION
    # The guide has the slope that it is called after, and is above the unbiased errors.
    n, guide = (np.log(x) for x in lines["slope −1/2"].get_data())
    assert (guide[1] - guide[0]) / (n[1] - n[0]) == pytest.approx(-0.5, abs=1e-6)
    assert np.exp(guide[0] + n[0] / 2) > 20
    low, high = axes.get_ylim()
    assert low < 0.05 and high > 20
    (band,) = axes.patches
    assert band.get_extents().transformed(axes.transData.inverted()).y1 == pytest.approx(0.05)


# --- Noise of timesteps ---


def test_the_optimal_proposal_is_black_and_thick(drawn):
    left, right = drawn(plot_gradient_noise, T, NOISE, PROPOSALS)
    lines = {line.get_label(): line for line in (*left.lines, *right.lines)}
    assert set(lines) == {*NOISE, *PROPOSALS}
    widths = {name: line.get_linewidth() for name, line in lines.items()}
    assert widths.pop("optimal") > 1.5 * max(widths.values())
    assert lines["optimal"].get_color() == BLACK
    assert len({(line.get_color(), line.get_linestyle()) for line in lines.values()}) == 4
    assert left.get_xlim() == right.get_xlim()
    assert left.get_xscale() == left.get_yscale() == right.get_yscale() == "log"


def test_a_name_has_the_same_look_in_both_panels(drawn):
    left, right = drawn(plot_gradient_noise, T, {"a": T, "b": T}, {"optimal": T, "b": T})
    (b,) = (line for line in left.lines if line.get_label() == "b")
    (other,) = (line for line in right.lines if line.get_label() == "b")
    assert b.get_color() == other.get_color() and b.get_linestyle() == other.get_linestyle()


def test_zeros_are_gaps_and_tiny_values_leave_the_axis(drawn):
    noise = torch.where(T < 10, 0.0, torch.where(T < 20, 1e-30, 1.0))
    left, _ = drawn(plot_gradient_noise, T, {"a": noise}, PROPOSALS)
    assert np.isnan(left.lines[0].get_ydata()).sum() == 9
    assert 0.1 < left.get_ylim()[0] < 1 < left.get_ylim()[1]


# --- Training ---


def test_lines_are_means_and_bands_are_deviations(drawn):
    left, right = drawn(plot_training, training())
    for axes, end in ((left, 200.0), (right, 20000.0)):
        x, y = axes.lines[0].get_data()
        # The seeds are 100, 101 and 102 nats at the end: their deviation is 1.
        assert (x[-1], y[-1]) == pytest.approx((end, 101.0), abs=1e-3)
        vertices = axes.collections[0].get_paths()[0].vertices
        assert sorted({*vertices[vertices[:, 0] == x[-1], 1].round(3)}) == [100.0, 102.0]
    assert "± 1 standard deviation of seeds" in legend_of(left)


def test_one_seed_has_no_band(drawn):
    left, right = drawn(plot_training, training(seeds=1))
    assert not left.collections and not right.collections
    assert legend_of(left) == ["estimator 0", "estimator 1"]


def legend_of(axes):
    (legend,) = axes.figure.legends
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("start", [500.0, 1e6, 101.0])
def test_the_transient_does_not_squash_the_end(drawn, start):
    curves = training(seeds=1, start=start)
    for i, seeds in enumerate(curves.values()):
        seeds[0]["loss"] = seeds[0]["loss"] + torch.linspace(6 - 9 * i, 0, 41)
    left, right = drawn(plot_training, curves)
    late = torch.cat([seeds[0]["loss"][20:] for seeds in curves.values()])
    low, high = left.get_ylim()
    assert low < late.min() and late.max() < high
    assert (late.max() - late.min()) / (high - low) > 0.7
    assert right.get_ylim() == (low, high)
    assert left.get_xlim()[0] == right.get_xlim()[0] == 0
    assert left.get_xlim()[1] > 400 and right.get_xlim()[1] > 20000
    assert left.get_xscale() == right.get_xscale() == "linear"


def test_legends_cover_no_panel(drawn):
    for axes in (
        drawn(plot_training, training(names=8)),
        drawn(plot_convergence, errors(a=1.0, iwae=3.0)),
        drawn(plot_pareto, estimators_of()),
    ):
        (legend,) = axes[0].figure.legends
        assert not any(legend.get_window_extent().overlaps(panel.bbox) for panel in axes)
    for axes in drawn(plot_gradient_noise, T, NOISE, PROPOSALS):
        assert axes.get_legend().get_window_extent().y0 >= axes.bbox.y1


def test_eight_names_have_eight_looks(drawn):
    left, right = drawn(plot_training, training(names=8))
    for axes in (left, right):
        looks = [(line.get_color(), line.get_linestyle()) for line in axes.lines]
        assert len(set(looks)) == 8 and looks[0] == (BLUE, "-")
        grey = {(line.get_linestyle(), line.get_marker()) for line in axes.lines}
        assert len(grey) == 8  # told apart without colors


def test_unbiased_errors_and_noises_are_told_apart_without_colors(drawn):
    (axes,) = drawn(plot_convergence, errors(**{name: 1.0 for name in "abcdef"}))
    curves = [line for line in axes.lines if line.get_label() in "abcdef"]
    assert len({line.get_marker() for line in curves}) == 6
    t = torch.arange(1, 21, dtype=torch.float64)
    left, _ = drawn(plot_gradient_noise, t, {name: 1 / t for name in "abcdef"}, {"uniform": t})
    assert len({(line.get_linestyle(), line.get_marker()) for line in left.lines}) == 6


# --- Broken input ---

POINT = {"name": "a", "group": "b", "cost": 1.0, "variance": 1.0}


@pytest.mark.parametrize(
    ("points", "match"),
    [
        ([], "points must not be empty"),
        ([POINT, {"name": "a", "group": "b", "cost": 1}], "'variance', which record 1 lacks"),
        ([POINT | {"cost": 0.0}], "points 'cost' must be positive.*got 0"),
        ([POINT | {"variance": -2.5}], "points 'variance' must be positive.*got -2.5"),
        ([POINT | {"variance": float("nan")}], "points 'variance' must be finite"),
        ([POINT | {"cost": None}], "points 'cost' must be numbers"),
        ([POINT | {"cost": "fast"}], "points 'cost' must be numbers"),
    ],
)
def test_broken_points_raise(tmp_path, points, match):
    with one_line_value_error(match):
        plot_pareto(points, tmp_path / "pareto.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("cost", "variance", "match"),
    [
        ([1.0, 2.0], [1.0], r"variance must have shape \(2,\), got \(1,\)"),
        ([], [], r"cost must have shape \(n,\), got \(0,\)"),
        (torch.ones(2, 2), [1.0], r"cost must have shape \(n,\), got \(2, 2\)"),
        ([1.0], [float("inf")], "variance must be finite"),
    ],
)
def test_broken_fronts_raise(cost, variance, match):
    with one_line_value_error(match):
        pareto_front(cost, variance)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"error": torch.ones(3)}, r"errors 'a' 'error' must have shape \(12,\), got \(3,\)"),
        ({"error": torch.zeros(12)}, "errors 'a' 'error' must be positive.*got 0"),
        ({"samples": torch.arange(12)}, "errors 'a' 'samples' must be positive.*got 0"),
        ({"error": torch.full((12,), torch.nan)}, "errors 'a' 'error' must be finite"),
    ],
)
def test_broken_errors_raise(tmp_path, change, match):
    with one_line_value_error(match):
        plot_convergence({"a": errors(a=1.0)["a"] | change}, tmp_path / "errors.png")


def test_other_broken_errors_raise(tmp_path):
    path = tmp_path / "errors.png"
    with one_line_value_error("errors must not be empty"):
        plot_convergence({}, path)
    with one_line_value_error("errors must have the key 'error', which record 'a' lacks"):
        plot_convergence({"a": {"samples": T, "biased": True}}, path)
    with one_line_value_error("floor must be positive.*got 0"):
        plot_convergence(errors(a=1.0), path, floor=0.0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"t": T.flip(0)}, "t must increase, got 999 after 1000"),
        ({"t": T - 1}, "t must be positive.*got 0"),
        ({"t": T[:, None]}, r"t must have shape \(n,\), got \(1000, 1\)"),
        ({"noise": {}}, "noise must hold at least one curve"),
        ({"proposals": {}}, "proposals must hold at least one curve"),
        ({"noise": {"a": T[:5]}}, r"noise 'a' must have shape \(1000,\), got \(5,\)"),
        ({"noise": {"a": T - 3}}, "noise 'a' must not be negative.*value of -2"),
        ({"proposals": {"a": 0 * T}}, "proposals 'a' must not be .* zero everywhere.*value of 0"),
        ({"proposals": {"a": T / 0}}, "proposals 'a' must be finite"),
    ],
)
def test_broken_noise_raises(tmp_path, change, match):
    given = {"t": T, "noise": NOISE, "proposals": PROPOSALS} | change
    with one_line_value_error(match):
        plot_gradient_noise(**given, path=tmp_path / "noise.png")


def test_broken_curves_raise(tmp_path):
    path, record = tmp_path / "training.png", training()["estimator 0"][0]
    short = {key: values[:5] for key, values in record.items()}
    for curves, match in (
        ({}, "curves must not be empty"),
        ({"a": []}, "curves 'a' must not be empty"),
        ({"a": record}, "curves 'a' must have the key 'seconds'"),  # not a sequence of seeds
        ({"a": [record, {"loss": T}]}, "curves 'a' must have the key 'seconds', which record 1"),
        ({"a": [record, short]}, r"'a' 'seconds' of seed 1 must have shape \(41,\), got \(5,\)"),
        ({"a": [record | {"loss": T}]}, r"'a' 'loss' of seed 0 must have shape \(41,\)"),
        ({"a": [record | {"loss": record["loss"] / 0}]}, "'loss' of seed 0 must be finite"),
    ):
        with one_line_value_error(match):
            plot_training(curves, path)


def test_other_suffixes_raise(tmp_path):
    with one_line_value_error(r"path must end in .png or .pdf or .svg, got .*pareto.jpg"):
        plot_pareto(estimators_of(3), tmp_path / "pareto.jpg")
