r"""``experiments/run.py``: what a run leaves behind, resuming, and its errors."""

from __future__ import annotations

import csv
import errno
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pyro
import pytest
import torch
from errors import exit_message
from image_files import noise, write_folder, write_mnist
from PIL import Image

from pyro_vaediff.priors import PRIORS
from pyro_vaediff.train import load_checkpoint, loop
from pyro_vaediff.train.runs import load_data, load_vae

RUN = Path(__file__).parents[1] / "experiments" / "run.py"
TINY = {"epochs": 2, "limit": 40, "width": 4, "latent-dim": 2, "num-timesteps": 10, "k": 2}
FILES = {
    *("config.json", "metrics.csv", "checkpoint.pt", "best.pt", "results.json", "terms.csv"),
    *("samples.png", "reconstructions.png", "history.png", "terms.png"),
}
OF_DIFFUSION = {"denoising.png", "kl_by_timestep.png", "kl_by_timestep.csv"}


@pytest.fixture(autouse=True)
def validation():
    yield
    pyro.enable_validation(True)  # the script switches it off


@pytest.fixture
def arguments(device):
    r"""Returns the command line of a tiny run; ``None`` leaves an option out."""

    def make(out, *flags, **options):
        options = {k.replace("_", "-"): v for k, v in options.items()}
        tiny = dict(TINY)
        if options.get("prior", "diffusion") != "diffusion":
            del tiny["num-timesteps"]  # which would be refused
        if options.get("estimator", "timestep") != "timestep":
            del tiny["k"]
        options = tiny | {"device": device.type, "batch-size": 20, "out": out} | options
        pairs = ((f"--{k}", str(v)) for k, v in options.items() if v is not None)
        return ["--quiet", *flags, *(word for pair in pairs for word in pair)]

    return make


@pytest.fixture
def run(arguments, monkeypatch, capsys):
    r"""Runs the script in this process, and returns what it printed."""

    def call(*args, **options):
        monkeypatch.setattr(sys, "argv", [str(RUN), *arguments(*args, **options)])
        runpy.run_path(str(RUN), run_name="__main__")
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out.splitlines()

    return call


@pytest.fixture
def error_of(run, capsys):
    r"""Returns the error message of a run that ends in one."""

    def call(*args, **options):
        with pytest.raises(SystemExit) as info:
            run(*args, **options)
        return exit_message(info.value, capsys.readouterr().err)

    return call


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def results(out):
    content = json.loads((out / "results.json").read_text())
    content.pop("training_seconds")
    return content


def check_run(out, lines, prior, epochs=2, T=10):
    files = FILES | (OF_DIFFUSION if prior == "diffusion" else set())
    assert {path.name for path in out.iterdir()} == files
    assert lines[-1].endswith(f"are in {out}")
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            low, high = image.convert("L").getextrema()
        assert low < high, path

    config = json.loads((out / "config.json").read_text())
    assert (config["prior"], config["epochs"], config["dataset"]) == (prior, epochs, "digits")
    metrics = table(out / "metrics.csv")
    assert [int(row["epoch"]) for row in metrics] == list(range(1, epochs + 1))
    found = results(out)
    assert sum(found["terms"].values()) == pytest.approx(found["test_negative_elbo"], rel=1e-9)
    assert {row["term"]: float(row["nats"]) for row in table(out / "terms.csv")} == found["terms"]
    losses = [float(row["validation"]) for row in metrics]
    assert found["best_epoch"] == 1 + losses.index(min(losses))
    assert found["frechet"]["num_images"] == 40
    assert f"{found['test_negative_elbo']:.2f} nats" in "\n".join(lines)
    if prior == "diffusion":
        rows = table(out / "kl_by_timestep.csv")
        assert [int(row["t"]) for row in rows] == list(range(1, T + 1))
        assert all(float(row["nats"]) > -1e-3 for row in rows)

    vae, model_config = load_vae(out)
    assert type(vae.prior).__name__.lower() == f"{prior}prior"
    assert model_config.latent_dim == 2
    sizes = {k: sum(p.numel() for p in m.parameters()) for k, m in vae.named_children()}
    assert found["parameters"] == sizes


# --- Runs -----------------------------------------------------------------------------------------


def test_a_run_from_the_command_line(arguments, tmp_path):
    # Not in a checkout, and with the backend of a notebook, whose module is not there.
    out, environ = tmp_path / "run", os.environ | {"MPLBACKEND": "module://of.a.notebook"}
    command = [sys.executable, "-m", "pyro_vaediff", *arguments(out, prior="diffusion")]
    options = {"capture_output": True, "text": True, "timeout": 120, "cwd": tmp_path}
    done = subprocess.run(command, env=environ, **options)
    assert (done.returncode, done.stderr) == (0, "")
    check_run(out, done.stdout.splitlines(), "diffusion")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "statistics"}


def test_an_error_on_the_command_line(arguments, tmp_path):
    command = [sys.executable, str(RUN), *arguments(tmp_path / "run", prior="copula")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"error: unknown prior 'copula': choose one of {', '.join(PRIORS)}\n"


@pytest.mark.parametrize("prior", [name for name in PRIORS if name != "diffusion"])
def test_other_priors(run, tmp_path, prior):
    out = tmp_path / "run"
    check_run(out, run(out, prior=prior), prior)


@pytest.mark.parametrize(
    "options",
    [
        {
            "ema": 0.9,
            "lr_schedule": "constant",
            "timesteps": "loss-aware",
            "likelihood": "bernoulli",
            "reverse_variance": "diagonal",
        },
        {"estimator": "trace", "parameterization": "v", "likelihood": "categorical"},
        {"estimator": "trace-kl", "reverse_variance": "beta_tilde", "precision": "float64"},
        {"estimator": "dreg", "num_particles": 4, "parameterization": "v"},
        {"conditioning": "x", "schedule": "cosine", "likelihood": "discretized-logistic"},
        {"weighting": "simple", "timesteps": "uniform", "likelihood": "gaussian-pixel"},
        {"weighting": "paper", "timesteps": "all", "precision": "bf16"},
        {"condition": "labels"},
        {"likelihood": "autoregressive", "kernels": 3, "precision": "bf16"},
        {"beta": 0.5, "tc_weight": 2.0},
        {"conditioning": "x", "reverse_variance": "beta_tilde", "noise_log_snr": 3.0},
        {"sampler": "dpm-solver", "sample_steps": 2},
        {"sampler": "heun", "noise_log_snr": 3.0},
    ],
    ids=str,
)
def test_every_option_runs(run, tmp_path, options):
    lines = run(tmp_path / "run", epochs=1, **options)
    check_run(tmp_path / "run", lines, "diffusion", epochs=1)
    sampler = options.get("sampler", "ancestral")
    evaluations = options.get("sample_steps", TINY["num-timesteps"]) * (
        2 if sampler == "heun" else 1
    )
    expected = {"sampler": sampler, "evaluations": evaluations}
    assert results(tmp_path / "run")["sampling"] == expected


def test_guidance_is_one_more_picture_and_no_number(run, tmp_path):
    options = {"condition": "labels", "context_dropout": 0.2, "epochs": 1}
    run(tmp_path / "a", **options)
    lines = run(tmp_path / "b", guidance=2.0, **options)
    assert "guided.png: guidance 2.0, these samples are not the model's" in lines
    assert (tmp_path / "b" / "guided.png").exists() and not (tmp_path / "a" / "guided.png").exists()
    assert results(tmp_path / "a") == results(tmp_path / "b")
    assert load_vae(tmp_path / "b")[0].prior.denoiser.context.null is not None


def words(option, values):
    return [f"--{option}", *values]


@pytest.mark.parametrize("schedule", ["cosine", "learned-diagonal"])
def test_continuous_time(run, tmp_path, schedule):
    out = tmp_path / "run"
    options = {"num_timesteps": "continuous", "schedule": schedule, "limit": 10}
    run(out, "--features", "none", **options)
    assert {path.name for path in out.iterdir()} == FILES | OF_DIFFUSION
    assert "KL of the times from 1 to T" in results(out)["terms"]
    assert len(table(out / "kl_by_timestep.csv")) == 1000
    run(out, "--features", "none", "--resume", **options)
    vae, config = load_vae(out)
    assert vae.prior.continuous and config.num_timesteps == "continuous"


@pytest.mark.parametrize(
    "prior, flags",
    [
        *((prior, []) for prior in PRIORS),
        ("flow", ["--flow", "coupling"]),
        ("diffusion", ["--denoiser", "preconditioned"]),
        ("diffusion", ["--denoiser", "residual", "--networks", "resnet"]),
        ("diffusion", ["--condition", "labels"]),
    ],
    ids=str,
)
def test_latents_that_are_images(run, tmp_path, prior, flags):
    out, components = tmp_path / "run", ["--num-components", "3"]
    flags = [*flags, *(components if prior in ("mixture", "vamp", "exemplar") else [])]
    shape = words("latent-shape", "244")
    lines = run(out, *shape, *flags, prior=prior, latent_dim=None, epochs=1)
    assert " of 32 latents are active" in "\n".join(lines)
    vae, config = load_vae(out)
    assert config.latent_dim == 32 and vae.prior.event_shape == (2, 4, 4)
    assert (out / "denoising.png").exists() == (prior == "diffusion")
    assert "not_available" not in results(out)


@pytest.mark.parametrize("prior", ["gaussian", "diffusion", "flow"])
@pytest.mark.parametrize("group_priors", ["top", "every"])
def test_hierarchies(run, error_of, tmp_path, prior, group_priors):
    out = tmp_path / "run"
    shapes = words("latent-groups", ["3", "1x2x2", "2x4x4"])
    options = {"prior": prior, "group_priors": group_priors, "latent_dim": None, "epochs": 2}
    options |= {"kl_warmup": 1, "free_bits": 0.1}
    options |= {"sample_steps": 2} if prior == "diffusion" else {}
    if group_priors == "every" and prior != "diffusion":
        assert "group_priors='every' needs a prior" in error_of(out, *shapes, **options)
        return
    weights = words("beta", ["1", "2", "0.5"])
    lines = run(out, "--kl-balance", *shapes, *weights, **options)
    found = results(out)
    assert set(found["latents"]) == {"group1", "group2", "group3"}
    assert sum(use["kl"] for use in found["latents"].values()) == pytest.approx(
        found["test_negative_elbo"] - found["terms"]["-log p(x | z_0), reconstruction"]
    )
    assert any(line.startswith("group2: ") and line.endswith(" nats") for line in lines)
    assert (out / "groups.png").exists() and "not_available" not in found
    assert (out / "denoising.png").exists() == (prior == "diffusion")
    vae, _ = load_vae(out)
    assert [type(p).__name__ for p in vae.prior.groups][1:] == 2 * [
        "DiffusionPrior" if group_priors == "every" else "ConditionalGaussianPrior"
    ]


@pytest.mark.parametrize(
    "flags, match",
    [
        (["--latent-shape", "4", "3", "3"], "images of 8 x 8 pixels halve to h x w = 4 x 4, 2 x 2"),
        (["--latent-shape", "4", "4"], "latent_shape must be D or C h w"),
        (["--latent-shape", "0", "4", "4"], "each number in latent_shape must be a whole number"),
        (["--latent-groups", "2x4x4", "8"], "only the first group may be a vector"),
        (["--latent-groups", "8", "2x4"], "latent_shape must be D or C h w"),
        (["--latent-groups", "8", "axb"], "a shape must be D or CxHxW, such as 16 or 4x8x8"),
        (["--latent-groups", "8", "--latent-shape", "4"], "latent_shape is that of one group"),
        (["--latent-groups", "8", "--networks", "paper"], "have a vector of latents"),
        (["--latent-shape", "2", "4", "4", "--networks", "mlp"], "'mlp' have a vector of latents"),
        (
            ["--latent-groups", "8", "--gaussian-epochs", "1"],
            "gaussian_epochs must be 0 for a hier",
        ),
        (["--latent-shape", "2", "4", "4", "--latent-dim", "5"], "latent_dim=5 is not the size of"),
        (["--dataset", "mnist", "--root", "nowhere", "--latent-shape", "4", "5", "5"], "28 x 28"),
        (["--estimator", "trace", "--kl-warmup", "1"], "kl_warmup needs an estimator with terms"),
        (["--denoiser", "unet"], "event_shape must be (C, h, w) for a UNetBackbone"),
        (
            ["--latent-groups", "8", "2x4x4", "--group-priors", "every", "--denoiser", "unet"],
            "needs denoisers with images as context, got 'unet': leave denoiser out",
        ),
        (["--latent-groups", "8", "--sampler", "ddim"], "a hierarchy is sampled by its program"),
    ],
    ids=str,
)
def test_latents_that_are_refused(error_of, tmp_path, flags, match):
    options = {"estimator": "trace"} if "--estimator" in flags else {}
    assert match in error_of(tmp_path / "run", *flags, latent_dim=None, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prior", [name for name in PRIORS if name != "exemplar"])
def test_the_smallest_run(run, tmp_path, prior):
    one = {"epochs": 1, "limit": 1, "latent_dim": 1, "width": 1, "k": 1}
    one |= {"num_timesteps": 1} if prior == "diffusion" else {}
    run(tmp_path / "run", prior=prior, features="none", **one)
    assert "frechet" not in results(tmp_path / "run")


def test_a_run_on_a_folder_of_images(run, tmp_path, monkeypatch):
    write_folder(tmp_path / "images", 20)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    data = {"dataset": "folder", "root": tmp_path / "images", "epochs": 1}
    lines = run(tmp_path / "run", prior="gaussian", **data)
    assert any("no FID will be computed" in line and "no network" in line for line in lines)
    assert "frechet" not in results(tmp_path / "run")


def test_the_default_directory_names_the_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = run(None, prior="gaussian", epochs=1, seed=3)
    assert lines[-1].endswith(f"are in {Path('runs', 'digits-gaussian-s3')}")
    assert Path("runs/digits-gaussian-s3/results.json").is_file()


def test_help_is_the_manual(run, capsys):
    with pytest.raises(SystemExit) as info:
        run(None, "--help")
    assert info.value.code == 0
    text = capsys.readouterr().out
    for name in (*FILES, *OF_DIFFUSION - {"kl_by_timestep.csv"}, "--resume", "--weighting"):
        assert name in text


# --- Resuming -------------------------------------------------------------------------------------


def test_a_finished_run_is_reported_again(run, tmp_path):
    first = run(tmp_path / "run", prior="diffusion")
    before = results(tmp_path / "run")
    metrics = (tmp_path / "run" / "metrics.csv").read_bytes()
    again = run(tmp_path / "run", "--resume", prior="diffusion")
    assert again == first
    assert results(tmp_path / "run") == before
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == metrics


def test_a_run_that_was_killed_continues(run, arguments, tmp_path):
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    options = {"prior": "diffusion", "lr_schedule": "constant"}
    command = [sys.executable, str(RUN), *arguments(killed, **options | {"epochs": 10_000})]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (killed / "checkpoint.pt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    # A file that was being written may be left, but every file with a name of ours is whole.
    done = len(load_checkpoint(killed / "checkpoint.pt")["history"])
    assert done >= 1

    options |= {"epochs": done + 2}
    run(killed, "--resume", **options)
    run(straight, **options)
    assert (killed / "metrics.csv").read_bytes() == (straight / "metrics.csv").read_bytes()
    assert results(killed) == results(straight)


def test_a_full_disk_leaves_a_run_that_can_be_resumed(run, error_of, tmp_path, monkeypatch):
    options = {"epochs": 3, "prior": "gaussian", "features": "none"}
    straight, full, sync, calls = tmp_path / "straight", tmp_path / "full", os.fsync, []
    run(straight, **options)

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        message = error_of(full, **options)
    assert "No space left on device" in message and f"{full}/" in message
    assert 1 <= len(load_checkpoint(full / "checkpoint.pt")["history"]) < 3
    assert not list(full.glob(".*"))
    run(full, "--resume", **options)
    assert (full / "metrics.csv").read_bytes() == (straight / "metrics.csv").read_bytes()
    assert results(full) == results(straight)


@pytest.mark.parametrize("flags", [(), ("--deterministic",)], ids=str)
def test_the_same_command_gives_the_same_files_twice(run, tmp_path, monkeypatch, flags):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is restored
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    benchmark = torch.backends.cudnn.benchmark
    try:
        for out in (tmp_path / "a", tmp_path / "b"):
            run(out, *flags, timesteps="loss-aware", ema=0.9)
            torch.rand(7)
        assert torch.are_deterministic_algorithms_enabled() == bool(flags)
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == bool(flags)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = benchmark
    assert results(tmp_path / "a") == results(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        if path.name not in ("results.json", "checkpoint.pt", "best.pt"):
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_float32_is_not_tf32(run, tf32_modules, tmp_path):
    run(tmp_path / "run", epochs=1, prior="gaussian", features="none")
    assert [module.allow_tf32 for module in tf32_modules] == [False, False]


def test_runs_that_are_killed_at_random_moments():
    script = Path(__file__).parent / "stress_resume.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "6"],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sum(json.loads(done.stdout)["kills"].values()) == 6


def test_ctrl_c_says_how_to_continue(run, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Trainer, "validate", interrupt)
    with pytest.raises(SystemExit, match="interrupted: continue with --resume"):
        run(tmp_path / "run")


@pytest.mark.parametrize(
    "options, match",
    [
        ({"k": 3}, "with k=3: the run was started with 2"),
        ({"estimator": "trace"}, "with estimator='Trace_ELBO'"),
        ({"limit": 30}, "with train_images=30: the run was started with 40"),
        ({"prior": "gaussian"}, "with prior='gaussian'"),
        ({"seed": 1}, "with seed=1"),
        ({"epochs": 3}, "with epochs=3"),  # the learning rate depends on it
    ],
    ids=str,
)
def test_other_settings_cannot_resume(error_of, finished_run, options, match):
    before = (finished_run / "config.json").read_bytes()
    one = {"epochs": 1, "lr-schedule": "cosine"}
    assert match in error_of(finished_run, "--resume", **one | options)
    assert (finished_run / "config.json").read_bytes() == before


def test_a_run_without_an_end_may_be_continued(run, tmp_path):
    run(tmp_path / "run", epochs=1)  # the default on the digits
    run(tmp_path / "run", "--resume", epochs=2)
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


def test_an_average_takes_the_place_of_the_other(run, tmp_path):
    for name, options, found in (
        ("own", {"ema": 0.5}, (0.5, 0.0)),
        ("default", {}, (0.0, 0.1)),
    ):
        run(tmp_path / name, epochs=1, **options)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["ema"], config["ema_share"]) == found


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    options = TINY | {"device": "cpu", "batch-size": 20, "epochs": 1, "features": "none"}
    options |= {"lr-schedule": "cosine"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(RUN), "--quiet", *words, "--out", str(out)])
        runpy.run_path(str(RUN), run_name="__main__")
    pyro.enable_validation(True)
    return out


@pytest.mark.parametrize("broken", ["truncated", "empty", "text", "foreign"])
def test_a_broken_checkpoint(error_of, finished_run, tmp_path, broken):
    path, whole = tmp_path / "checkpoint.pt", (finished_run / "checkpoint.pt").read_bytes()
    if broken == "foreign":
        torch.save({"state_dict": {}}, path)
    else:
        content = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no\n"}
        path.write_bytes(content[broken])
    best = tmp_path / "best.pt"
    best.write_bytes((finished_run / "best.pt").read_bytes())
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert str(path) in error_of(tmp_path, "--resume", epochs=1)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    load_vae(tmp_path)  # the best model is still there


@pytest.mark.parametrize("prior", ["vamp", "diffusion"])
def test_the_networks_of_the_public_benchmark(run, tmp_path, prior):
    write_mnist(tmp_path, "MNIST", noise(30, 28, 28), noise(8, 28, 28, seed=1))
    options = {"networks": "mlp", "likelihood": "bernoulli", "num_validation": 10, "width": None}
    components = {"num_components": 3} if prior == "vamp" else {}
    out = tmp_path / "run"
    data = {"dataset": "mnist", "root": tmp_path, "features": "none"}
    run(out, prior=prior, **data, **options, **components)
    images = load_data(out, tmp_path)
    assert (len(images.train), len(images.validation), len(images.test)) == (20, 10, 8)
    vae, _ = load_vae(out)
    assert [type(layer).__name__ for layer in vae.encoder.net[:4]] == ["Linear", "GLU"] * 2
    assert vae.decoder.net[0].out_features == 600
    if prior == "vamp":  # whose pseudo-inputs are images in x-space
        assert vae.prior.support == (0.0, 1.0)


# --- Errors ---------------------------------------------------------------------------------------

ERRORS = [
    ({"prior": "copula"}, "unknown prior 'copula'"),
    ({"networks": "unet"}, "unknown networks 'unet'"),
    ({"networks": "paper"}, "32 or 64 pixels"),
    ({"likelihood": "poisson"}, "'poisson'"),
    ({"schedule": "sqrt"}, "unknown schedule 'sqrt'"),
    ({"parameterization": "x"}, "unknown parameterization 'x'"),
    ({"reverse_variance": "x"}, "unknown reverse_variance 'x'"),
    ({"num_timesteps": 0}, "num_timesteps must be a whole number >= 1 or 'continuous', got 0"),
    ({"latent_dim": 0}, "latent_dim must be a whole number >= 1, got 0"),
    ({"latent_dim": "two"}, "--latent-dim: invalid int value: 'two'"),
    ({"width": 0}, "width must be a whole number >= 1, got 0"),
    ({"estimator": "vr"}, "unknown estimator 'vr'"),
    ({"estimator": "iwae"}, "estimator='iwae' of one particle is the ELBO: give num_particles"),
    (
        {"estimator": "dreg", "num_particles": 4, "prior_epochs": 2},
        "prior_epochs=2 have no data to weight the particles by, which estimator='dreg' needs",
    ),
    (
        {"estimator": "dreg", "num_particles": 4, "entropy": "exact"},
        "estimator='dreg' has no use for entropy",
    ),
    (
        {"estimator": "dreg", "num_particles": 4, "beta": 0.5},
        "beta needs an estimator with terms, Timestep_ELBO or TraceKL_ELBO, got DReG_ELBO",
    ),
    ({"timesteps": "some"}, "unknown timesteps 'some'"),
    ({"k": 0}, "k must be a whole number >= 1 or 'auto', got 0"),
    ({"conditioning": "y"}, "unknown conditioning 'y': choose one of z_0, x"),
    ({"weighting": "vlb"}, "unknown weighting 'vlb'"),
    ({"weighting": "simple", "conditioning": "x"}, "is defined for"),
    ({"weighting": "paper", "reverse_variance": "learned"}, "is defined for"),
    ({"weighting": "simple", "reverse_variance": "diagonal"}, "is defined for"),
    ({"epochs": 0}, "epochs must be positive, got 0"),
    ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
    ({"lr": 0}, "lr must be positive and finite, got 0"),
    ({"lr": "nan"}, "lr must be positive and finite, got nan"),
    ({"lr": "inf"}, "lr must be positive and finite, got inf"),
    ({"lr_schedule": "step"}, "unknown lr_schedule 'step'"),
    ({"clip_norm": -1}, "clip_norm must be positive, got -1"),
    ({"ema": 1.5}, "ema must be in [0, 1), got 1.5"),
    ({"seed": 2**70}, f"seed must be a whole number in [0, 2^63), got {2**70}"),
    ({"precision": "float16"}, "unknown precision 'float16'"),
    ({"device": "tpu"}, "unknown device 'tpu'"),
    ({"dataset": "imagenet"}, "unknown data set 'imagenet'"),
    ({"image_size": 7}, "images of 7 x 7 pixels"),
    ({"limit": 0}, "limit must be a whole number >= 1, got 0"),
    ({"limit": 1}, "needs at least 2 images"),
    ({"num_images": 0}, "needs at least 2 images, got --num-images 0"),
    ({"num_images": 1}, "needs at least 2 images, got --num-images 1"),
    ({"num_images": -5}, "needs at least 2 images, got --num-images -5"),
    ({"features": "vgg"}, "unknown features 'vgg'"),
    ({"prior": "flow", "num_timesteps": 5}, "prior='flow' has no use for num_timesteps"),
    ({"num_timesteps": "half"}, "a whole number >= 1 or 'continuous', got 'half'"),
    (
        {"num_timesteps": "continuous", "weighting": "simple"},
        "num_timesteps='continuous' needs estimator='timestep' and weighting='elbo', got 'timestep'"
        " and 'simple'",
    ),
    ({"num_timesteps": "continuous", "reverse_variance": "learned"}, "have no limit, got"),
    ({"schedule": "learned"}, "is in continuous time, from clean latents: give num_timesteps"),
    ({"prior": "flow", "sampler": "ddim"}, "prior='flow' has no use for sampler"),
    ({"prior": "flow", "sample_steps": 5}, "prior='flow' has no use for sample_steps"),
    ({"sampler": "euler"}, "unknown sampler 'euler': choose one of ancestral, ddim, heun, dpm-sol"),
    ({"estimator": "trace", "entropy": "exact"}, "estimator='trace' has no use for entropy"),
    ({"condition": "labels", "prior": "vamp"}, "prior='vamp' takes no labels"),
    (
        {"prior": "exemplar", "limit": 1, "features": "none"},
        "num_data must be a whole number >= 2, got 1",
    ),
    ({"prior": "exemplar", "condition": "labels"}, "prior='exemplar' takes no labels"),
    ({"prior": "exemplar", "num_components": 1}, ">= 2, one of which is left out, got 1"),
    ({"posterior_flows": 2}, "posterior='gaussian' has no use for posterior_flows"),
    ({"posterior": "iaf", "posterior_flows": 0}, "posterior_flows must be a whole number >= 1"),
    ({"posterior": "maf"}, "unknown posterior 'maf': choose one of gaussian, iaf, coupling"),
    (
        {"posterior": "iaf", "conditioning": "x"},
        "conditioning='x' needs a Gaussian q(z_0 | x), got posterior='iaf': give "
        "conditioning='z_0'",
    ),
    ({"posterior": "coupling", "tc_weight": 2.0}, "tc_weight=2.0 needs a Gaussian q(z_0 | x)"),
    ({"posterior": "iaf", "noise_log_snr": 3.0}, "noise_log_snr=3.0 needs a Gaussian q(z_0 | x)"),
    ({"posterior": "iaf", "prior": "vamp"}, "prior='vamp' needs a Gaussian q(z_0 | x), got"),
    ({"posterior": "coupling", "prior": "exemplar"}, "prior='exemplar' needs a Gaussian q(z_0 |"),
]


@pytest.mark.parametrize("options, match", ERRORS, ids=lambda value: str(value)[:60])
def test_errors(error_of, tmp_path, options, match):
    assert match in error_of(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_errors_of_data_and_weights(error_of, tmp_path, monkeypatch):
    missing, folder, images = tmp_path / "missing", tmp_path / "folder", tmp_path / "images"
    write_folder(folder, 1)
    write_folder(images, 20)
    text = tmp_path / "text.pth"
    text.write_text("no weights")
    for options, match in [
        ({"dataset": "folder", "root": missing}, "is not a folder"),
        ({"dataset": "folder", "root": folder}, "holds 1 images"),
        ({"dataset": "folder", "root": images, "image_size": 7}, "images of 7 x 7 pixels"),
        ({"dataset": "folder", "root": text}, "is not a folder"),
        *(
            ({"dataset": name, "root": missing}, f"--dataset {name}: could not read it")
            for name in ("mnist", "fashion-mnist", "cifar10", "celeba")
        ),
        ({"features": "inception", "fid_weights": missing}, "no Inception weights at"),
        ({"features": "inception", "fid_weights": text}, "does not hold"),
        ({"features": "pixels", "fid_weights": text}, "for features 'inception' only"),
    ]:
        options = {"features": "none"} | options
        assert match in error_of(tmp_path / "run", "--no-download", **options), options
        assert not (tmp_path / "run").exists()

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    message = error_of(tmp_path / "run", features="inception")
    assert "--features inception" in message and "no network" in message


def test_errors_of_the_directory(error_of, finished_run, tmp_path):
    assert "holds a run already" in error_of(finished_run)
    assert "no checkpoint at" in error_of(tmp_path / "run", "--resume")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert "is a file: choose a folder" in error_of(out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(error_of, tmp_path):
    assert "no CUDA device is available" in error_of(tmp_path / "run", device="cuda")


@pytest.mark.parametrize("flags", [(), ("--validate",)], ids=str)
def test_a_run_that_diverges(error_of, tmp_path, flags):
    message = error_of(tmp_path / "run", *flags, lr=1e30, batch_size=5)
    if not flags:
        assert "is not finite" in message and "try a smaller lr" in message
