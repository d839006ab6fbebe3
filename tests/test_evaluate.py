r"""``experiments/evaluate.py``: what it writes, that it does nothing twice, and its errors."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from evaluate import describe
from PIL import Image
from scripts import EXPERIMENTS, call, script_errors

from pyro_vaediff import VAE
from pyro_vaediff.data import load
from pyro_vaediff.evaluate import aggregate_prior, evaluate
from pyro_vaediff.train.runs import load_vae

TINY = ("--num-images", "6", "--num-samples", "2", "--num-steps", "4", "--surgery-images", "8")


@pytest.fixture(scope="module", params=["gaussian", "mixture", "diffusion"])
def run(request, device_name, tmp_path_factory):
    r"""A run directory, evaluated, with what was printed."""
    out = tmp_path_factory.mktemp("runs") / request.param
    options = {"prior": request.param, "epochs": 1, "limit": 60, "latent-dim": 2, "width": 4}
    options |= {"features": "none", "out": out}
    options |= {"mixture": {"num-components": 3}, "diffusion": {"num-timesteps": 10}}.get(
        request.param, {}
    )
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    call("run.py", "--device", device_name, *words)
    printed = call("evaluate.py", out, *TINY, "--device", device_name)
    return out, printed


def test_the_numbers(run, device):
    out, _ = run
    results = json.loads((out / "evaluation.json").read_text())
    part = results["likelihood"]
    assert part["gap"] == pytest.approx(part["negative_elbo"] - part["negative_log_likelihood"])
    vae, _ = load_vae(out, device)
    data = load("digits")
    expected = sum(evaluate(vae, data.test[:6]).values())
    assert part["negative_elbo"] == pytest.approx(expected, rel=1e-5)
    # Two samples, and a prior that is exact or is nearly N(0, I) after one epoch.
    assert part["gap"] > -1
    values = torch.tensor(part["log_likelihoods"], dtype=torch.float64)
    assert all(round(value, 4) == value for value in part["log_likelihoods"])
    assert part["negative_log_likelihood"] == pytest.approx(-values.mean().item(), abs=1e-3)
    assert part["standard_error"] == pytest.approx(values.std().item() / 6**0.5, rel=1e-3)
    one, two = part["by_samples"]["1"], part["by_samples"]["2"]
    assert one > two == pytest.approx(part["negative_log_likelihood"], abs=1e-4)
    with Image.open(out / "likelihood.png") as image:
        assert image.size == (1280, 720)
    best, train = results["aggregate"], load("digits").train
    assert (best["images"], best["training_images"]) == (6, len(train))
    prior = aggregate_prior(vae, train)
    expected = sum(
        evaluate(VAE(vae.encoder, vae.decoder, prior, vae.space), data.test[:6]).values()
    )
    assert best["negative_elbo"] == pytest.approx(expected, rel=1e-5)
    assert best["negative_elbo_is"].startswith("a bound by the model with an AggregatePrior")
    surgeries = [results[name] for name in results if name.startswith("surgery")]
    assert len(surgeries) == (2 if "diffusion" in out.name else 1)
    for surgery in surgeries:
        total = surgery["mutual_information"] + surgery["marginal_kl"]
        assert total == pytest.approx(surgery["total_kl"])
        assert 0 <= surgery["active_units"] <= 2
        assert all(isinstance(value, int | float) for value in surgery.values())


def test_what_is_printed(run):
    out, printed = run
    lines = printed.splitlines()
    assert lines[0] == str(out)
    assert "log p(x) >= " in lines[1] and "(6 images, 2 samples)" in lines[1]
    # What each number is.
    is_diffusion = "diffusion" in out.name
    of = "the chain of T = 4 steps" if is_diffusion else "the model with a "
    compared = "numbers of two models, " if is_diffusion else "two numbers of the same model"
    assert lines[2].startswith(f"        log p(x): an importance-weighted bound by {of}")
    assert lines[2].endswith(", from 2 samples per datum")
    assert lines[3].startswith("        ELBO: a bound by the ")
    assert ("the chain of T = 10 steps" in lines[3]) == is_diffusion
    assert lines[4].startswith(f"        compared: {compared}")
    assert "(at most 2.08)" in lines[5] and "active units" in lines[5]
    assert len(lines) == (8 if is_diffusion else 7)
    assert "with the aggregate posterior of " in lines[-1] and lines[-1].endswith("images as prior")
    # A file of an earlier version does not say it.
    old = json.loads((out / "evaluation.json").read_text())
    for name in ("negative_log_likelihood", "negative_elbo", "gap"):
        del old["likelihood"][f"{name}_is"]
    assert describe(old) == [*lines[1:2], *lines[5:]]


def test_nothing_is_done_twice_but_other_options_count(run, device_name):
    out, printed = run
    file = out / "evaluation.json"
    os.utime(file, (0, 0))
    args = (out, *TINY, "--device", device_name)
    assert call("evaluate.py", *args) == printed
    assert file.stat().st_mtime == 0
    call("evaluate.py", *args, "--seed", "1")
    assert file.stat().st_mtime > 0
    call("evaluate.py", *args)  # as the other tests expect it


def test_the_density_of_the_flow(run, device_name, tmp_path):
    out, twin = run[0], tmp_path / "twin"
    shutil.copytree(out, twin)
    results = json.loads((out / "evaluation.json").read_text())
    options = ("--log-prior", "flow", "--batch-size", "4", "--device", device_name)
    call("evaluate.py", twin, *TINY[:4], *TINY[-2:], *options)
    part = json.loads((twin / "evaluation.json").read_text())["likelihood"]
    is_diffusion, found = "diffusion" in out.name, (part.get("log_prior"), part.get("num_steps"))
    assert found == (("flow", 8) if is_diffusion else (None, None))
    changed = part["log_likelihoods"] != results["likelihood"]["log_likelihoods"]
    assert changed or not is_diffusion


def test_runs_are_compared_image_by_image(run, device_name, tmp_path):
    out, _ = run
    twin = tmp_path / "twin"
    shutil.copytree(out, twin)
    results = json.loads((twin / "evaluation.json").read_text())
    # One nat less on half of the images: 1/2 in the mean, sd sqrt(6 / 5) / 2, standard error 0.22.
    values = results["likelihood"]["log_likelihoods"]
    results["likelihood"]["log_likelihoods"] = [v - (i % 2) for i, v in enumerate(values)]
    (twin / "evaluation.json").write_text(json.dumps(results))
    lines = call("evaluate.py", out, twin, *TINY, "--device", device_name).splitlines()
    assert lines[-3] == f"log p(x) less than that of {out}, in pairs of the same image:"
    assert lines[-2].split(maxsplit=4) == ["0.00", "±", "0.00", "nats", f" {out}".strip()]
    assert lines[-1].split(maxsplit=4) == ["0.50", "±", "0.22", "nats", str(twin)]


@pytest.fixture
def error_of(monkeypatch, capsys):
    return script_errors(EXPERIMENTS / "evaluate.py", monkeypatch, capsys)


@pytest.mark.parametrize(
    "args, match",
    [
        (["nowhere"], "no run directory at nowhere"),
        (["nowhere", "--num-images", "0"], "--num-images must be at least 1, got 0"),
        (["nowhere", "--num-samples", "0"], "--num-samples must be at least 1, got 0"),
        (["nowhere", "--num-steps", "0"], "--num-steps must be at least 1, got 0"),
        (["nowhere", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["nowhere", "--log-prior", "bound"], "invalid choice: 'bound'"),
        (["nowhere", "--surgery-images", "1"], "--surgery-images must be at least 2, got 1"),
        (["nowhere", "--device", "gpu"], "'gpu' is no device"),
    ],
)
def test_errors(error_of, args, match):
    assert match in error_of(*args)


def test_a_folder_without_a_model(error_of, tmp_path):
    assert "no checkpoint at" in error_of(tmp_path)
