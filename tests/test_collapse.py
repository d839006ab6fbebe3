r"""The studies of latents: their variants, and runs of the scripts."""

from __future__ import annotations

import csv
import importlib
import math
import sys

import pytest
import torch
from scripts import EXPERIMENTS

from pyro_vaediff.infer import Reweighted, Timestep_ELBO
from pyro_vaediff.testing import linear_gaussian_vae


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("collapse")


def test_the_objectives_differ_by_the_entropy_and_a_small_kl(script, device):
    vae = linear_gaussian_vae(3, seed=0).to(device)
    x = torch.randn(4, 3, dtype=torch.float64, device=device)

    def terms(elbo):
        torch.manual_seed(0)
        return elbo.terms(vae.model, vae.guide, x)

    names = script.objectives(2)
    bare, with_kl, simple, bound = (
        terms(names[name]()) for name in ("denoising", "denoising+kl", "simple", "elbo")
    )
    assert set(simple) - set(bare) == {"-H[z_0]", "z_3"}
    for name, term in bare.items():
        torch.testing.assert_close(term, simple[name])
        torch.testing.assert_close(term, with_kl[name])
    q = vae.encoder(x).base_dist
    standard = torch.distributions.Normal(torch.zeros_like(q.loc), 1.0)
    kl = torch.distributions.kl_divergence(q, standard).sum()
    torch.testing.assert_close(with_kl["-H[z_0]"], 1e-6 * kl)
    torch.testing.assert_close(simple["x"], bound["x"])
    assert isinstance(names["simple"](), Reweighted)
    assert isinstance(names["elbo"](), Timestep_ELBO)


def run(script, name, tmp_path, monkeypatch, capsys, extra=()):
    r"""Returns the rows that a tiny run of a study writes, and its page."""
    tiny = ["--epochs", "2", "--points", "2", "--width", "4", "--limit", "40", *extra]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *tiny, "--out", str(tmp_path)])
    script.main()
    with open(tmp_path / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    page = (tmp_path / f"{name}.md").read_text()
    assert page in capsys.readouterr().out
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    return rows, page


def test_a_run(script, tmp_path, monkeypatch, capsys):
    arguments = (tmp_path, monkeypatch, capsys, ["--seeds", "0", "1"])
    rows, page = run(script, "collapse", *arguments)
    assert len(rows) == 4 * 2 * 3
    assert {row["objective"] for row in rows} == set(script.objectives(1))
    starts = {row["elbo"] for row in rows if row["epoch"] == "0" and row["seed"] == "0"}
    assert len(starts) == 1  # from the same weights
    assert "2 epochs, 2 seeds" in page


def test_noises_of_the_encoder(script, tmp_path, monkeypatch, capsys):
    script = importlib.import_module("noise_matched")
    monkeypatch.setattr(script, "DRAWS", 5)
    rows, _ = run(script, "noise_matched", tmp_path, monkeypatch, capsys, ["--seeds", "0"])
    assert len(rows) == len(script.NoiseMatchedStudy.variants) * 3
    starts = {row["noise"]: row for row in rows if row["epoch"] == "0"}
    for log_snr in script.LOG_SNRS:  # the noise is on the path, at its log-SNR
        scale = float(starts[f"fixed {log_snr:g}"]["scale"])
        assert scale == pytest.approx((1 + math.exp(log_snr)) ** -0.5, rel=1e-5)
    means = [float(row["mean"]) for row in starts.values()]
    signals = [1.0, *((1 + math.exp(-log_snr)) ** -0.5 for log_snr in script.LOG_SNRS)]
    assert [m / s for m, s in zip(means, signals, strict=True)] == pytest.approx([means[0]] * 5)
    assert all(float(row[name]) > 0 for row in rows for name in ("encoder", "prior"))
