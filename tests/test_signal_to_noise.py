r"""The figures of the encoder's signal and noise: a tiny run of each, and what they compute."""

from __future__ import annotations

import csv
import importlib
import sys

import pyro
import pytest
import torch
from scripts import EXPERIMENTS

COLUMNS = {"estimator", "module", "draws", "snr", "variance", "variance_se"}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield importlib.import_module("signal_to_noise")
    pyro.enable_validation(True)
    torch.distributions.Distribution.set_default_validate_args(True)


@pytest.fixture
def run(script, tmp_path, monkeypatch, device_name):
    def call(*options):
        common = ("--out", str(tmp_path), "--device", device_name)
        monkeypatch.setattr(sys, "argv", ["signal_to_noise.py", *options, *common])
        script.main()
        with open(tmp_path / f"{options[0]}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert (tmp_path / f"{options[0]}.png").stat().st_size > 10_000
        return rows

    return call


def test_particles(script, run, capsys):
    rows = run("particles", "--draws", "100", "--particles", "1", "8", "--steps", "2")
    assert len(rows) == 2 * len(script.BOUNDS) * 2
    assert set(rows[0]) == COLUMNS | {"particles"}
    assert {row["draws"] for row in rows} == {"100"}
    assert {row["module"] for row in rows} == {"encoder", "prior"}
    assert all(float(row["variance"]) > 0 for row in rows)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(rows) and printed[0].startswith("estimator IWAE, particles 1")


def test_entropy(run, capsys):
    options = ["--epochs", "2", "--points", "2", "--width", "4", "--limit", "40", "--draws", "3"]
    rows = run("entropy", *options, "--batch-size", "20")
    assert [(row["estimator"], row["epoch"]) for row in rows] == [
        (name, epoch) for epoch in "012" for name in ("exact", "path")
    ]
    assert set(rows[0]) == COLUMNS | {"epoch"}
    assert "the path derivative has the smaller variance" in capsys.readouterr().out


@pytest.mark.parametrize(
    "path, expected",
    [([2.0, 2.0, 2.0], None), ([0.5, 0.5, 0.5], 0.0), ([2.0, 2.0, 0.5], 15.0), ([0.5, 2, 0.5], 15)],
)
def test_where_the_variances_cross(script, path, expected):
    rows = [
        {"estimator": name, "epoch": 10 * i, "variance": variance}
        for name, variances in (("exact", [1.0, 1.0, 1.0]), ("path", path))
        for i, variance in enumerate(variances)
    ]
    assert script.crossing(rows) == pytest.approx(expected)
