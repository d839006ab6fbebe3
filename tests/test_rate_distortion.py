r"""The study of rate and distortion: its curves, and a run of the script that is continued."""

from __future__ import annotations

import importlib
import sys

import pytest
from errors import one_line_value_error
from scripts import EXPERIMENTS

from pyro_vaediff.data import load


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("rate_distortion")


def test_the_difference_of_curves_at_the_same_rate(script):
    one, other = [(1.0, 9.0), (3.0, 5.0), (5.0, 4.0)], [(2.0, 6.0), (4.0, 5.0), (9.0, 0.0)]
    assert script.difference(one, other) == [(2.0, 1.0), (3.0, -0.5), (4.0, -0.5), (5.0, 0.0)]
    assert script.difference(one[:1], other) == []


def test_the_curve_is_the_mean_over_seeds_in_the_order_of_rates(script):
    rows = [
        {"prior": "flow", "beta": beta, "seed": seed, "rate": 8 / beta + seed, "distortion": beta}
        for beta in (1.0, 2.0, 4.0)
        for seed in (0, 2)
    ]
    assert script.curve(rows, "flow") == [(3.0, 4.0), (5.0, 2.0), (9.0, 1.0)]
    rate, distortion = script.points(rows, "flow")[2.0]
    assert (rate.mean, rate.standard_error, distortion.sd) == (5.0, pytest.approx(1.0), 0.0)


def test_curves_are_told_apart_without_colors(script, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(script, "legend", drawn.append)
    rows = [
        {"prior": prior, "beta": beta, "seed": 0, "rate": 8 / beta, "distortion": beta}
        for prior in ("gaussian", "flow", "diffusion")
        for beta in (1.0, 2.0)
    ]
    script.plot(rows, tmp_path / "curves.png")
    looks = {(line.get_linestyle(), line.get_marker()) for line in drawn[0].lines}
    assert len(looks) == 3


def test_a_higher_weight_has_a_lower_rate(script):
    args = script.parse_args(["--epochs", "6", "--width", "8", "--latent-dim", "4"])
    data = load("digits", limit=300)
    low, high = (script.train("gaussian", beta, 0, data, args) for beta in (0.1, 10.0))
    assert low["rate"] > high["rate"] + 1
    assert low["distortion"] < high["distortion"] - 1


def test_a_run_is_continued(script, tmp_path, monkeypatch, capsys):
    tiny = ["--epochs", "1", "--seeds", "0", "--width", "4", "--limit", "40", "--latent-dim", "2"]
    out, trained, train = ["--out", str(tmp_path)], [], script.train
    monkeypatch.setattr(script, "train", lambda *key: trained.append(key[:3]) or train(*key))

    def main(*words):
        trained.clear()
        monkeypatch.setattr(sys, "argv", ["rate_distortion.py", *tiny, *out, *words])
        script.main()
        return script.read(tmp_path / "rate_distortion.csv")

    two = ["--priors", "gaussian", "diffusion", "--betas", "0.5"]
    rows = main(*two)
    assert trained == [("gaussian", 0.5, 0), ("diffusion", 0.5, 0)]
    more = main(*two, "2")
    assert trained == [("gaussian", 2.0, 0), ("diffusion", 2.0, 0)]
    assert more[:2] == rows and len(more) == 4
    assert main(*two, "2") == more and not trained
    page = (tmp_path / "rate_distortion.md").read_text()
    assert page in capsys.readouterr().out
    for row in more:
        total = f"{row['rate'] + row['distortion']:.2f}".replace("-", "−")
        assert f"| {row['prior']} | {row['beta']:g} |" in page and f"| {total} |" in page
    assert "- The distortion of diffusion less that of gaussian" in page or "in common" in page
    assert (tmp_path / "rate_distortion.png").stat().st_size > 10_000
    with one_line_value_error("was run with other settings, now there is epochs=2 in place of 1"):
        main("--epochs", "2")
