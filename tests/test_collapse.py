r"""The study of collapsing latents: its objectives, and a run of the script."""

from __future__ import annotations

import csv
import importlib
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


def test_a_run(script, tmp_path, monkeypatch, capsys):
    tiny = ["--epochs", "2", "--points", "2", "--seeds", "0", "1", "--width", "4", "--limit", "40"]
    monkeypatch.setattr(sys, "argv", ["collapse.py", *tiny, "--out", str(tmp_path)])
    script.main()
    with open(tmp_path / "collapse.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2 * 3
    assert {row["objective"] for row in rows} == set(script.objectives(1))
    starts = {row["elbo"] for row in rows if row["epoch"] == "0" and row["seed"] == "0"}
    assert len(starts) == 1  # from the same weights
    page = (tmp_path / "collapse.md").read_text()
    assert "2 epochs, 2 seeds" in page and page in capsys.readouterr().out
    assert (tmp_path / "collapse.png").stat().st_size > 10_000
