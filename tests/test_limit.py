r"""The comparison of continuous time with chains of many steps."""

from __future__ import annotations

import csv
import importlib

import pytest
import torch
from scripts import EXPERIMENTS, call, script_errors

RUN = {"epochs": 1, "limit": 60, "latent-dim": 2, "width": 4, "features": "none"}


@pytest.fixture
def limit(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("limit")


@pytest.fixture(scope="module")
def runs(device_name, tmp_path_factory):
    r"""Runs with a prior in continuous time, and with a chain."""
    out = tmp_path_factory.mktemp("runs")
    for name, steps in (("continuous", "continuous"), ("chain", 9)):
        options = RUN | {"num-timesteps": steps, "out": out / name, "device": device_name}
        call("run.py", *(word for key, value in options.items() for word in (f"--{key}", value)))
    return out


def test_the_squared_distance_is_unbiased_and_knows_its_error(limit):
    torch.manual_seed(0)
    shift, found = torch.tensor([0.3, 0.0, -0.4], dtype=torch.float64), []
    for _ in range(1000):
        noise = torch.randn(2, 40, 3, dtype=torch.float64)
        found.append(limit.squared_distance(noise[0] + shift, noise[1]))
    values, errors = torch.tensor(found).unbind(1)
    sd = values.std()
    assert abs(values.mean() - 0.25) < 5 * sd / 1000**0.5  # without a correction, 0.4
    assert 0.8 < errors.square().mean().sqrt() / sd < 1.4
    same = torch.randn(40, 3)
    assert limit.squared_distance(same, same) == (0.0, 0.0)


def numbers(out):
    with open(out / "limit.csv", newline="") as file:
        return {row["quantity"]: row for row in csv.DictReader(file)}


def test_a_fine_chain_is_the_limit_and_a_coarse_one_is_not(limit, runs, device_name, tmp_path):
    few = ["--draws", "60", "--k", "8", "--num-images", "40", "--device", device_name]
    for steps in (4000, 3):
        out = tmp_path / str(steps)
        limit.main(
            [str(runs / "continuous"), "--steps", str(steps), "--out", str(out), *map(str, few)]
        )
        rows = numbers(out)
        assert list(rows) == ["-ELBO", *(f"gradient, {n}" for n in ("encoder", "decoder", "prior"))]
        z = abs(float(rows["-ELBO"]["z"]))
        assert z < 5 if steps == 4000 else z > 5
        page = (out / "limit.md").read_text()
        assert f"T = {steps:,}" in page and "nan" not in page


def test_errors_are_one_line(runs, tmp_path, monkeypatch, capsys):
    errors = script_errors(EXPERIMENTS / "limit.py", monkeypatch, capsys)
    assert "9 steps" in errors(runs / "chain", "--out", tmp_path)
    assert "no run directory" in errors(tmp_path / "missing", "--out", tmp_path)
    assert "--draws" in errors(runs / "continuous", "--draws", 3)
