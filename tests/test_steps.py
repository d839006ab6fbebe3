r"""The study of fewer steps: its variances, and runs of the script."""

from __future__ import annotations

import csv
import importlib

import pytest
import torch
from scripts import EXPERIMENTS, call, script_errors
from torch import nn

from pyro_vaediff import DiffusionPrior
from pyro_vaediff.evaluate import evaluate
from pyro_vaediff.nn import ResidualMLP
from pyro_vaediff.train.runs import load_data, load_vae

TINY = ("--steps", "9", "3", "--num-images", "30", "--num-samples", "20")


@pytest.fixture
def numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("few_steps.numbers")


@pytest.mark.parametrize("trained", ["beta_tilde", "learned", "analytic"])
def test_another_variance_has_the_same_mean(numbers, device, trained):
    torch.manual_seed(0)
    outputs = 2 if trained == "learned" else 1
    net = ResidualMLP(2, width=4, num_outputs=outputs)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    prior = DiffusionPrior(2, 9, backbone=net, reverse_variance=trained).double().to(device)
    found = numbers.variances(prior)
    assert list(found) == [trained, "analytic, fitted", "diagonal, fitted"]
    z = torch.randn(500, 2, dtype=torch.float64, device=device)
    for name, fit in found.items():
        fitted = fit(prior, z)
        times = numbers.grids(fitted, ["time"], 3)
        assert ("optimal" in times) == ("fitted" in name or trained == "analytic")
        for grid in times.values():
            few = fitted.with_steps(grid)
            for t in (1, 2, 3):
                p, q = few.reverse(z, t), prior.with_steps(grid).reverse(z, t)
                torch.testing.assert_close(p.mean, q.mean, atol=1e-10, rtol=0)


@pytest.fixture(scope="module")
def out(device_name, tmp_path_factory):
    r"""A run directory."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    options = {"epochs": 1, "limit": 60, "latent-dim": 2, "width": 4, "num-timesteps": 9}
    options |= {"features": "none", "out": out, "device": device_name}
    call("run.py", *(word for name, value in options.items() for word in (f"--{name}", value)))
    return out


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_study_and_more_of_it(out, device, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    steps = importlib.import_module("steps")
    options = [str(out), *TINY, "--device", str(device), "--out", str(tmp_path)]
    steps.main([*options, "--evaluations", "4", "--grids", "time", "--samplers", "heun"])
    first = rows(tmp_path / "tiny.csv")
    fitted, best = ("analytic, fitted", "diagonal, fitted"), ("optimal", "3")
    assert [tuple(row[k] for k in ("name", "grid", "steps", "evaluations")) for row in first] == [
        *(("beta", "time", n, n) for n in "93"),
        *((name, g, n, n) for name in fitted for g, n in (("time", "9"), ("time", "3"), best)),
        ("ancestral", "time", "9", "9"),
        ("heun", "time", "2", "3"),
    ]
    vae, _ = load_vae(out, device)
    exact = sum(evaluate(vae, load_data(out).test[:30]).values())
    assert float(first[0]["value"]) == pytest.approx(exact, rel=1e-5)
    assert (tmp_path / "tiny.png").stat().st_size > 10_000
    capsys.readouterr()

    monkeypatch.setattr(importlib.import_module("few_steps.numbers"), "evaluate", None)
    more = ["--evaluations", "4", "1", "--grids", "time", "--samplers", "heun", "dpm-solver"]
    steps.main([*options, *more])
    second = rows(tmp_path / "tiny.csv")
    assert second[: len(first)] == first
    new = [(row["name"], row["budget"], row["steps"]) for row in second[len(first) :]]
    assert new == [("heun", "1", "1"), ("dpm-solver", "4", "4"), ("dpm-solver", "1", "1")]
    page = (tmp_path / "steps.md").read_text()
    assert page in capsys.readouterr().out
    assert "| beta | time |" in page and "| dpm-solver | time |" in page
    assert "Fréchet distance (features=pixels)" in page and "](tiny.png)" in page


def test_a_prior_may_be_tuned_with_few_steps(out, device_name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    options = ["--evaluations", "3", "--grids", "time", "--samplers", "ddim", "--fine-tune", "60"]
    importlib.import_module("steps").main(
        [str(out), *TINY, *options, "--device", device_name, "--out", str(tmp_path)]
    )
    found = {
        (r["name"], r["grid"], r["steps"]): float(r["value"]) for r in rows(tmp_path / "tiny.csv")
    }
    tuned = {key: value for key, value in found.items() if "tuned" in key[0]}
    assert list(tuned) == [("diagonal, fine-tuned", "optimal", "3")]
    # The model has seen one epoch of 60 images: there is much to gain.
    assert tuned["diagonal, fine-tuned", "optimal", "3"] < found["diagonal, fitted", "optimal", "3"]


def test_what_a_study_refuses(out, device_name, tmp_path, monkeypatch, capsys):
    error = script_errors(EXPERIMENTS / "steps.py", monkeypatch, capsys)
    options = (out, *TINY, "--device", device_name, "--out", tmp_path)
    (tmp_path / "tiny.csv").write_text("measure,name,grid,budget,value\nnats,beta,time,3,one\n")
    assert "tiny.csv is damaged, mend or remove it: no number in" in error(*options)
    (tmp_path / "tiny.csv").unlink()
    (tmp_path / "settings.json").write_text('{"seed": 0}')
    assert "was run with other settings, now there is num_fit=1000 in" in error(*options)


def test_a_study_of_a_model_that_is_given_labels(device_name, device, tmp_path, numbers):
    out = tmp_path / "labels"
    tiny = ("--epochs", 1, "--limit", 60, "--width", 4, "--num-timesteps", 9, "--features", "none")
    call("run.py", *tiny, "--condition", "labels", "--out", out, "--device", device_name)
    options = [str(out), *TINY, "--evaluations", "3", "--grids", "time", "--samplers", "ddim"]
    importlib.import_module("steps").main(
        [*options, "--device", device_name, "--out", str(tmp_path)]
    )
    found = rows(tmp_path / "labels.csv")
    vae, _ = load_vae(out, device)
    data = load_data(out)
    c = torch.nn.functional.one_hot(data.test_labels[:30].long(), 10).float()
    exact = sum(evaluate(vae, data.test[:30], c=c).values())
    assert float(found[0]["value"]) == pytest.approx(exact, rel=1e-5)
    assert {row["name"] for row in found[-2:]} == {"ancestral", "ddim"}
