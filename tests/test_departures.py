r"""The departures of the paper's public code: each differs from the ELBO by the predicted amount.

And ``experiments/departures.py``, which measures what they cost: what it leaves behind, what it
repeats, and its errors. Nothing is asserted about who wins.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
import re

import pyro
import pytest
import torch
from code_2021.objectives import (
    NeverLast,
    PriorTermGivenX,
    ShiftedLabels,
    constant_errors,
    log_variance_as_log_scale,
    unweighted,
    without_first_step,
)
from PIL import Image
from scripts import EXPERIMENTS, call, script_errors
from unbiased import assert_unbiased, draws, exact_values

from pyro_vaediff import VAE, DiffusionPrior, GaussianPrior, Timestep_ELBO, TraceKL_ELBO
from pyro_vaediff.evaluate import bits_per_dim
from pyro_vaediff.infer import ImportanceTimesteps, Reweighted, UniformTimesteps
from pyro_vaediff.likelihoods import make_likelihood
from pyro_vaediff.nn import ConvEncoder
from pyro_vaediff.testing import LinearGaussian, Oracle, linear_gaussian_vae
from pyro_vaediff.testing.affine import condition, expected_kl

SCRIPT = EXPERIMENTS / "departures.py"
T = 4


@pytest.fixture
def x(device):
    return torch.randn(2, 3, dtype=torch.float64, device=device)


@pytest.fixture(params=["beta", "beta_tilde"])
def vae(request, device):
    return linear_gaussian_vae(T, reverse_variance=request.param).to(device)


def steps(oracle, mean):
    r"""The posterior means and covariances of the steps t = 2..T, and the model's means."""
    z = oracle.z
    return {t: (*condition(z[t - 1], [z[t], z[0]]), mean(t)) for t in range(2, oracle.T + 1)}


def squares(oracle, mean):
    r"""E|mu_tilde - mu|^2 of the steps t = 2..T."""
    return {
        t: (tilde - mu).mean_square.sum(-1) for t, (tilde, _, mu) in steps(oracle, mean).items()
    }


def shifted_mean(oracle):
    def mean(t):
        matrix, vector = oracle.linear_reverse(t - 1)
        return matrix @ oracle.z[t] + vector

    return mean


def mutual_information(vae, oracle):
    alpha_bar, s = oracle.alpha_bar[-1], vae.encoder.log_scale[0].exp()
    return (1 + alpha_bar / (1 - alpha_bar) * s.square()).log().sum() / 2


def last_step(vae, oracle):
    r"""The KL of t = T, without its part that is a constant."""
    return squares(oracle, oracle.mu)[T] / (2 * oracle.fixed_variance(T))


# --- What each of them adds to the ELBO -----------------------------------------------------------


@pytest.mark.parametrize("timesteps", ["all", "uniform"])
def test_unweighted_kls(vae, x, timesteps):
    oracle = Oracle(vae, x)
    terms = oracle.terms("z_0")
    kls, sums = terms["z_s"].sum(0), sum(squares(oracle, oracle.mu).values())
    elbo = Reweighted(Timestep_ELBO(timesteps, k=4, chunk_size=2), unweighted)
    exact = exact_values(vae, oracle.negative_elbo - kls + sums)
    assert_unbiased(draws(elbo, vae, x), exact, target=0.05)


@pytest.mark.parametrize("timesteps", ["all", "importance"])
def test_without_the_first_step(vae, x, timesteps):
    oracle = Oracle(vae, x)
    elbo = Reweighted(Timestep_ELBO(timesteps, k=4), without_first_step)
    exact = exact_values(vae, oracle.negative_elbo - oracle.terms("z_0")["z_0"])
    assert_unbiased(draws(elbo, vae, x), exact, target=0.05)


@pytest.mark.parametrize("timesteps", ["all", "importance"])
def test_the_prior_term_given_x_lacks_a_mutual_information(vae, x, timesteps):
    oracle = Oracle(vae, x)
    lack = mutual_information(vae, oracle)
    given_z_0, given_x = (oracle.terms(c)[f"z_{T}"] for c in ("z_0", "x"))
    torch.testing.assert_close(given_z_0 - given_x, lack.expand(2), atol=1e-10, rtol=0)
    elbo = PriorTermGivenX(timesteps, k=4)
    exact = exact_values(vae, oracle.negative_elbo - lack)
    assert_unbiased(draws(elbo, vae, x), exact, target=0.05)


@pytest.mark.parametrize("proposal", [UniformTimesteps, ImportanceTimesteps])
def test_the_last_timestep_is_never_drawn(vae, x, proposal):
    oracle = Oracle(vae, x)
    elbo = Timestep_ELBO(NeverLast(proposal()), k=4)
    lack = last_step(vae, oracle)
    assert (lack > 0.01).all()
    assert_unbiased(draws(elbo, vae, x), exact_values(vae, oracle.negative_elbo - lack), 0.05)
    probs = NeverLast(proposal())(vae.prior, "z_0")
    assert probs[-1] == 0 and (probs[:-1] > 0).all() and float(probs.sum()) == pytest.approx(1)


@pytest.mark.parametrize("timesteps", ["all", "importance"])
def test_shifted_labels(vae, x, timesteps):
    oracle = Oracle(vae, x)
    kls = sum(
        expected_kl(tilde, cov, mu, oracle.sigma(t))
        for t, (tilde, cov, mu) in steps(oracle, shifted_mean(oracle)).items()
    )
    exact = oracle.negative_elbo - oracle.terms("z_0")["z_s"].sum(0) + kls
    shifted = VAE(vae.encoder, vae.decoder, ShiftedLabels(vae.prior)).to(x.device, x.dtype)
    values = draws(Timestep_ELBO(timesteps, k=4), shifted, x)
    assert_unbiased(values, exact_values(shifted, exact), target=0.05)


def test_shifted_labels_share_the_network(device):
    prior = DiffusionPrior(2, num_timesteps=5).to(device)
    torch.nn.init.normal_(prior.denoiser.backbone.outputs.weight)
    shifted, z = ShiftedLabels(prior).to(device), torch.randn(5, 2, device=device)
    assert {*shifted.parameters()} == {*prior.parameters()}
    t = torch.arange(1, 6, device=device)
    expected = prior.reverse(z, torch.tensor([1, 1, 2, 3, 4], device=device))
    torch.testing.assert_close(shifted.reverse(z, t).mean, expected.mean)
    torch.testing.assert_close(shifted.reverse(z, t).stddev, prior.reverse(z, t).stddev)
    for i in range(5):
        torch.testing.assert_close(shifted.reverse(z[i], i + 1).mean, expected.mean[i])


def test_all_of_the_chain_at_once(runs, vae, x):
    r"""The objective of the code, up to constants: written down term by term."""
    oracle = Oracle(vae, x)
    sums = squares(oracle, shifted_mean(oracle))
    exact = oracle.reconstruction + oracle.negative_entropy + oracle.terms("x")[f"z_{T}"]
    exact = exact + sum(value for t, value in sums.items() if t < T)
    shifted = VAE(vae.encoder, vae.decoder, ShiftedLabels(vae.prior)).to(x.device, x.dtype)
    elbo = runs.RUNS["chain"].estimator(k=4)
    assert_unbiased(draws(elbo, shifted, x), exact_values(shifted, exact), target=0.05)


def test_a_log_variance_read_as_a_log_scale(x, device):
    torch.manual_seed(0)
    vae = VAE(LinearGaussian(3, 2, -0.5), LinearGaussian(2, 3, 0.0), GaussianPrior(2))
    vae = vae.double().to(device)
    losses = []
    for elbo in (TraceKL_ELBO(), Reweighted(TraceKL_ELBO(), log_variance_as_log_scale)):
        pyro.set_rng_seed(0)
        losses.append(elbo.differentiable_loss(vae.model, vae.guide, x))
    s = vae.encoder(x).stddev
    predicted = (s - s.square() + s.log()).sum() / 2
    torch.testing.assert_close(losses[1] - losses[0], predicted, atol=1e-10, rtol=0)
    # Its KL is that of N(m, s) to N(0, I), which pulls log s up half as much.
    (gradient,) = torch.autograd.grad(losses[1] - losses[0], vae.encoder.log_scale)
    expected = len(x) * ((s - 2 * s.square()) / 2 + 0.5)[0]
    torch.testing.assert_close(gradient[0], expected, atol=1e-10, rtol=0)


def test_unweighted_kls_need_z_0_and_a_fixed_variance(x, device):
    vae = linear_gaussian_vae(T, reverse_variance="learned").to(device)
    with pytest.raises(ValueError, match="are defined for conditioning='z_0'"):
        Reweighted(Timestep_ELBO(), unweighted).loss(vae.model, vae.guide, x)


# --- Constants, the likelihood and BatchNorm ------------------------------------------------------


@pytest.mark.parametrize("D, nats", [(40, 55), (100, 140), (200, 282)])
def test_constants(D, nats):
    errors = constant_errors(D, 3072)
    assert round(errors["-H[z_0]"]) == nats
    normal = torch.distributions.Normal(torch.zeros(D), torch.full((D,), 0.3))
    standard = torch.distributions.Normal(torch.zeros(D), torch.ones(D))
    # What the code has: the formulas of its entropy, its KL and its likelihood.
    entropy = normal.scale.log().sum() + math.log(2 * (math.pi * math.e) ** 0.5)
    kl = (-normal.scale.log() + normal.loc**2 / 2 + normal.scale**2 / 2).sum()
    exact = torch.distributions.kl_divergence(normal, standard).sum()
    assert float(normal.entropy().sum() - entropy) == pytest.approx(errors["-H[z_0]"], rel=1e-5)
    assert float(kl - exact) == pytest.approx(errors["z_T"], rel=1e-5)
    likelihood = make_likelihood("gaussian-fixed", (3, 32, 32))
    x, mean = torch.rand(2, 3, 32, 32)
    negative_log = -likelihood(mean).log_prob(x)
    assert float((x - mean).square().sum() - negative_log) == pytest.approx(errors["x"], rel=1e-5)


def test_the_floor_of_the_fixed_likelihood():
    likelihood = make_likelihood("gaussian-fixed", (3, 32, 32))
    x = torch.rand(3, 32, 32) * 2 - 1
    nats = -float(likelihood(x).log_prob(x))
    bits = bits_per_dim(nats, (3, 32, 32), likelihood.space(256).log_bin_width)
    assert nats == pytest.approx(3072 / 2 * math.log(math.pi), rel=1e-6)
    assert bits == pytest.approx(7.83, abs=0.005)


@pytest.mark.parametrize("norm, coupled", [("batch", True), ("none", False), ("group", False)])
def test_what_couples_images(norm, coupled, device):
    encoder = ConvEncoder((1, 8, 8), 3, width=8, norm=norm).to(device).train()
    x = torch.rand(5, 1, 8, 8, device=device)
    alone, together = encoder(x[:3]).mean[0], encoder(x).mean[0]
    assert torch.allclose(alone, together, atol=1e-5) != coupled


# --- The script -----------------------------------------------------------------------------------

TINY = {
    **{"limit": 40, "epochs": 1, "num-timesteps": 5, "width": 4, "latent-dim": 3},
    **{"batch-size": 20, "num-images": 20},
}


def arguments(out, device_name, runs=(), seeds=(0, 1), **others):
    options = TINY | {"out": out, "device": device_name} | others
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return [*words, "--seeds", *map(str, seeds), *(("--runs", *runs) if runs else ())]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("departures")


@pytest.fixture
def runs(script):
    return importlib.import_module("code_2021.runs")


@pytest.fixture(scope="module")
def output(tmp_path_factory, device_name):
    out = tmp_path_factory.mktemp("departures") / "new" / "folder"
    return out, call(SCRIPT.name, *arguments(out, device_name))


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def tables_of(markdown):
    blocks = re.findall(r"(?:^\|.*\|\n)+", markdown, flags=re.MULTILINE)
    return [[line[1:-1].split("|") for line in block.splitlines()] for block in blocks]


def test_the_files_are_those_of_the_docstring(output, script):
    out, printed = output
    block = script.__doc__.partition("then holds\n\n")[2].partition("\n\n")[0]
    promised = {re.split(r"\s{2,}", line.strip())[0] for line in block.splitlines()}
    assert {"runs/*.json", "departures.csv", "departures.md", "departures.png"} <= promised
    found = {path for path in out.rglob("*") if path.is_file()}
    assert found == {path for name in promised for path in out.glob(name)}
    assert all(list(out.glob(name)) for name in promised)
    assert len(list((out / "runs").iterdir())) == 2 * len(script.RUNS)
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            low, high = image.convert("L").getextrema()
        assert low < high
    assert (out / "departures.md").read_text(encoding="utf-8") in printed
    assert printed.splitlines()[-1] == f"written to {out}"


def test_costs_are_differences_of_pairs(output, script):
    out, _ = output
    rows = {(row["run"], int(row["seed"])): row for row in read(out / "departures.csv")}
    assert set(rows) == {(name, seed) for name in script.RUNS for seed in (0, 1)}
    for (name, seed), row in rows.items():
        terms = [float(v) for key, v in row.items() if key.startswith("term ") and v]
        assert float(row["negative_elbo"]) == pytest.approx(sum(terms), abs=1e-3)
        reference = script.RUNS[name].reference
        assert bool(row["cost"]) == bool(reference)
        if reference:
            difference = float(row["negative_elbo"]) - float(rows[reference, seed]["negative_elbo"])
            assert float(row["cost"]) == pytest.approx(difference, abs=1e-4)
        assert (float(row["coupling"]) > 0) == script.RUNS[name].batch_norm
    text = (out / "departures.md").read_text(encoding="utf-8")
    costs = {row[0].strip(): row[2].strip() for row in tables_of(text)[0]}
    pair = [float(rows["shifted", seed]["cost"]) for seed in (0, 1)]
    cell = costs["(6) network told t − 1"].replace("−", "-").split(" ± ")
    assert float(cell[0]) == pytest.approx(sum(pair) / 2, abs=6e-3)
    assert float(cell[1]) == pytest.approx(abs(pair[0] - pair[1]) / 2, abs=6e-3)


def test_reports_differ_where_they_should(output, script):
    rows = read(output[0] / "misreports.csv")
    terms = {}
    for row in rows:
        terms.setdefault(row["objective"], set()).add(row["term"])
        model = script.RUNS[row["objective"]].reference if row["objective"] in script.RUNS else ""
        assert row["model"] == (model or "diffusion") or row["objective"] == "batch-norm"
    assert terms.pop("batch-norm") >= {"x", "z_s", "-H[z_0]"}
    assert terms == {
        "unweighted": {"z_s", "constant"},
        "first-step": {"z_0"},
        "prior-term": {"z_T"},
        "likelihood": {"x"},
        "never-last": {"z_s"},
        "shifted": {"z_s"},
        "chain": {"z_s", "constant", "z_T", "z_0"},
        "networks": {"x"},
        "all": {"z_s", "constant", "z_T", "z_0", "x"},
        "gaussian-bug": {"z_0"},
        "gaussian-networks": {"x"},
        "gaussian-all": {"z_0", "x"},
        "flow-all": {"x"},
        "constants": {"x", "-H[z_0]", "z_T"},
    }
    # What is missing is a mutual information.
    lacks = [float(row["nats"]) for row in rows if row["objective"] == "prior-term"]
    assert all(value < 0 for value in lacks)


def test_runs_of_a_seed_start_from_the_same_weights(script, runs, device_name, tmp_path):
    args = script.parse_args(arguments(tmp_path, device_name))
    data = script.load("digits", "data", download=False, limit=40)
    vaes = {name: runs.make(run, data, args, 3) for name, run in runs.RUNS.items()}
    for name, vae in vaes.items():
        run = runs.RUNS[name]
        first = vaes[run.reference or name].state_dict()
        for key, value in vae.state_dict().items():
            assert key not in first or torch.equal(value, first[key])
        norms = [m for m in vae.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert bool(norms) == run.batch_norm
        fixed = vae.decoder.likelihood.fixed_sigma
        assert fixed == (pytest.approx(0.5**0.5) if run.fixed_likelihood else None)


def test_a_second_call_repeats_no_run(output, script, device_name, capsys):
    out, printed = output
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob("runs/*")}
    lost = out / "runs" / "unweighted-s1.json"
    _, contents = before.pop(lost)
    lost.unlink()
    script.main([*arguments(out, device_name), "--quiet"])
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    assert capsys.readouterr().out.splitlines()[-1] == printed.splitlines()[-1]
    if device_name == "cpu":  # the lost run is made again, and is the one that it was
        assert json.loads(lost.read_text())["terms"] == pytest.approx(json.loads(contents)["terms"])


def test_what_was_stopped_continues(script, device_name, tmp_path, monkeypatch, capsys):
    options = [*arguments(tmp_path, device_name, ("gaussian", "gaussian-bug"), (0,)), "--quiet"]
    measure = script.measure

    def stopped(name, *args):
        if name == "gaussian-bug":
            raise KeyboardInterrupt
        return measure(name, *args)

    monkeypatch.setattr(script, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        script.main(options)
    assert [row["run"] for row in read(tmp_path / "departures.csv")] == ["gaussian"]
    monkeypatch.setattr(script, "measure", measure)
    script.main(options)
    assert [row["run"] for row in read(tmp_path / "departures.csv")] == ["gaussian", "gaussian-bug"]
    capsys.readouterr()


def test_the_page_has_the_numbers_of_the_tables():
    docs = EXPERIMENTS.parent / "docs"
    page = (docs / "theory" / "code-2021.md").read_text(encoding="utf-8")
    tables = (docs / "results" / "departures" / "departures.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|") and "±" in line]
    assert len(rows) > 20 and set(rows) <= set(tables.splitlines())


@pytest.fixture
def error_of(monkeypatch, capsys):
    return script_errors(SCRIPT, monkeypatch, capsys)


def test_other_settings_need_another_folder(output, error_of, device_name):
    options = [*arguments(output[0], device_name), "--lr", "0.5"]
    assert "was run with other settings, now there is lr=0.5" in error_of(*options)


BAD_OPTIONS = {
    "--runs nonsense": "argument --runs: invalid choice: 'nonsense'",
    "--epochs 0": "--epochs must be positive and finite, got 0",
    "--lr nan": "--lr must be positive and finite, got nan",
    "--num-timesteps 2": "--num-timesteps must be at least 3, got 2",
    "--dataset nonsense": "argument --dataset: invalid choice: 'nonsense'",
    "--device foo": "argument --device: 'foo' is no device: use cpu or cuda",
    f"--out {__file__}": "is a file: choose a folder",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options(error_of, options):
    assert BAD_OPTIONS[options] in error_of(*options.split())
