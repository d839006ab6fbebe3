r"""``experiments/train_estimators.py``: what it leaves behind, what it repeats, and its errors.

Nothing is asserted about time, nor about who wins.
"""

from __future__ import annotations

import csv
import importlib
import re
from pathlib import Path

import pytest
import torch
from estimators import ENTRIES, SERIOUS
from PIL import Image
from pyro.infer import Trace_ELBO
from scripts import EXPERIMENTS, call, script_errors

from pyro_vaediff.bench import Entry
from pyro_vaediff.data import load
from pyro_vaediff.evaluate import evaluate
from pyro_vaediff.infer import Timestep_ELBO
from pyro_vaediff.train import ModelConfig, load_vae, loop, make_vae

SCRIPT = EXPERIMENTS / "train_estimators.py"
NAMES = ("uniform k=1 | z_0", "importance LD k=8 | z_0, antithetic")
TINY = {
    **{"seconds": 0.15, "points": 2, "repeats": 2, "num-test": 25, "latent-dim": 3, "width": 4},
    **{"num-timesteps": 10, "batch-size": 20},
}


def arguments(out, device_name, seeds=(0, 1), **others):
    options = TINY | {"out": out, "device": device_name} | others
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["--estimators", *NAMES, "--seeds", *map(str, seeds), *words]


@pytest.fixture(scope="module")
def output(tmp_path_factory, device_name):
    out = tmp_path_factory.mktemp("training") / "new" / "folder"
    return out, call(SCRIPT.name, *arguments(out, device_name))


@pytest.fixture(scope="module")
def run(tmp_path_factory, device_name):
    r"""A run of ``run.py``."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    tiny = ["--limit", 40, "--epochs", 1, "--num-timesteps", 10, "--width", 4, "--latent-dim", 3]
    call("run.py", *tiny, "--features", "none", "--out", out, "--device", device_name)
    return out


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("train_estimators")


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def curves_of(out, script, names=NAMES, seeds=(0, 1)):
    return {
        (name, seed): [
            {key: float(value) for key, value in row.items()}
            for row in read(script.curve_path(out, name, seed))
        ]
        for name in names
        for seed in seeds
    }


def table_of(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in lines)
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


# --- Files ----------------------------------------------------------------------------------------


def test_the_files_are_those_of_the_docstring(output, script):
    out, printed = output
    block = script.__doc__.partition("then holds\n\n")[2].partition("\n\n")[0]
    promised = {re.split(r"\s{2,}", line.strip())[0] for line in block.splitlines()}
    assert {"curves/*.csv", "training.csv", "training.md", "training.png"} <= promised
    found = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    assert found == {path.relative_to(out) for name in promised for path in out.glob(name)}
    assert all(list(out.glob(name)) for name in promised)
    assert len(list((out / "curves").iterdir())) == len(NAMES) * 2
    with Image.open(out / "training.png") as image:
        low, high = image.convert("L").getextrema()
    assert low < high
    assert (out / "training.md").read_text(encoding="utf-8") in printed
    assert printed.splitlines()[-1] == f"written to {out}"


def test_the_curves(output, script):
    out, _ = output
    times = {row["estimator"]: float(row["ms"]) for row in read(out / "times.csv")}
    assert list(times) == list(NAMES) and all(ms > 0 for ms in times.values())
    for (name, _), curve in curves_of(out, script).items():
        # As many steps as fit into 0.15 s, and measurements at equal distances.
        total = max(2, round(150 / times[name]))
        assert [row["steps"] for row in curve] == [0, round(total / 2), total]
        for row in curve:
            assert row["seconds"] == pytest.approx(row["steps"] * times[name] / 1e3)
        assert curve[-1]["loss"] < curve[0]["loss"]


def test_curves_of_a_seed_start_from_the_same_loss(output, script, device):
    r"""That of a model from that seed, which is evaluated as every other one."""
    curves = curves_of(output[0], script)
    first = {seed: {curves[name, seed][0]["loss"] for name in NAMES} for seed in (0, 1)}
    assert all(len(losses) == 1 for losses in first.values()) and first[0] != first[1]
    data = load("digits", "data", download=False)
    config = ModelConfig(latent_dim=3, width=4, num_timesteps=10, levels=data.levels)
    for seed, losses in first.items():
        torch.manual_seed(seed)
        vae = make_vae(config).to(device)
        elbo = Timestep_ELBO("importance", k=32, antithetic=False, entropy="exact")
        terms = evaluate(vae, data.test[:25], elbo, batch_size=20)
        assert losses.pop() == pytest.approx(sum(terms.values()), rel=1e-5)


def test_the_end_of_every_run(output, script):
    out, _ = output
    curves = curves_of(out, script)
    records = read(out / "training.csv")
    assert [(row["estimator"], int(row["seed"])) for row in records] == list(curves)
    for record, curve in zip(records, curves.values(), strict=True):
        for key, value in curve[-1].items():
            assert float(record[key]) == pytest.approx(value, abs=5e-4)


def test_the_table_summarizes_the_seeds(output, script):
    out, _ = output
    curves = curves_of(out, script)
    report = (out / "training.md").read_text(encoding="utf-8")
    assert re.search("^`python experiments/train_estimators.py --estimators ", report, re.M)
    assert all((out / name).is_file() for name in re.findall(r"!\[.+?\]\((.+?)\)", report))
    assert "0.15 s per run" in report and f"torch {torch.__version__}" in report
    header, rule, *rows = table_of(report)
    assert {len(row) for row in (header, rule, *rows)} == {len(header)} and set(rule) == {"---"}
    assert [row[0] for row in rows] == [name.replace("|", "given") for name in NAMES]
    for name, row in zip(NAMES, rows, strict=True):
        cells = dict(zip(header, row, strict=True))
        last = torch.tensor([curves[name, s][-1]["loss"] for s in (0, 1)], dtype=torch.float64)
        loss, spread = (float(s.replace("−", "-")) for s in cells["test −ELBO (nats)"].split(" ± "))
        assert cells["seeds"] == "2"
        assert loss == pytest.approx(last.mean().item(), abs=0.0051)
        # The deviation of two numbers is their distance over sqrt(2).
        assert spread == pytest.approx(((last[0] - last[1]).abs() / 2**0.5).item(), abs=0.0051)


# --- Continuing -----------------------------------------------------------------------------------


def test_a_second_call_repeats_no_run(output, script, device_name):
    out, printed = output
    files = [*out.glob("curves/*.csv"), out / "times.csv"]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    table = (out / "training.md").read_text(encoding="utf-8")
    again = call(SCRIPT.name, *arguments(out, device_name))
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files} == before
    assert again == printed
    assert (out / "training.md").read_text(encoding="utf-8") == table

    # A run that is not there is made, and is the one that it was.
    lost = script.curve_path(out, NAMES[1], 0)
    _, contents = before.pop(lost)
    lost.unlink()
    script.main([*arguments(out, device_name), "--quiet"])
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    if device_name == "cpu":
        assert lost.read_bytes() == contents


def test_other_settings_need_another_folder(output, error_of, device_name):
    options = [*arguments(output[0], device_name), "--lr", "0.5"]
    assert "was run with other settings, now there is lr=0.5" in error_of(*options)


def test_seeds_are_added(output, script, device_name, tmp_path, capsys):
    out, _ = output
    for path in [*out.glob("curves/*.csv"), out / "times.csv"]:
        target = tmp_path / path.relative_to(out)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    script.main([*arguments(tmp_path, device_name, seeds=(1, 2)), "--quiet"])
    assert {row["seed"] for row in read(tmp_path / "training.csv")} == {"1", "2"}
    assert len(list(tmp_path.glob("curves/*.csv"))) == 3 * len(NAMES)
    assert f"written to {tmp_path}" in capsys.readouterr().out


def test_no_seeds_measure_the_time_only(script, device_name, tmp_path, capsys):
    script.main([*arguments(tmp_path, device_name, seeds=()), "--quiet"])
    assert [path.name for path in tmp_path.iterdir()] == ["times.csv"]
    assert capsys.readouterr().out.splitlines()[-1].endswith(str(tmp_path / "times.csv"))
    # The times are of these estimators.
    args = arguments(tmp_path, device_name)
    args[1] = "all | x"
    with pytest.raises(ValueError, match=r"times.csv lacks 'all | x'"):
        script.main([*args, "--quiet"])


def test_files_of_different_runs_have_different_names(script):
    paths = {script.curve_path(Path(), name, seed) for name in ENTRIES for seed in (0, 1, 10)}
    assert len(paths) == 3 * len(ENTRIES)
    assert all(re.fullmatch(r"[a-z0-9_.-]+\.csv", path.name) for path in paths)


# --- Training -------------------------------------------------------------------------------------


def test_estimators_see_the_same_images_in_their_order(
    script, device_name, tmp_path, monkeypatch, capsys
):
    seen, orders = [], []
    preprocess = loop.preprocess

    class Spy(Trace_ELBO):
        def differentiable_loss(self, model, guide, *args, **kwargs):
            orders.append(model)
            return super().differentiable_loss(model, guide, *args, **kwargs)

    def record(vae, images):
        seen.append((vae.prior.order, images.cpu().clone()))
        return preprocess(vae, images)

    monkeypatch.setattr(loop, "preprocess", record)
    monkeypatch.setitem(ENTRIES, "spy", Entry("spy", "test", Spy, order="reversed"))
    # Two batches are an epoch of the 1197 images.
    args = arguments(tmp_path, device_name, seconds=1e-6, points=4, **{"batch-size": 500})
    args[2] = "spy"
    (tmp_path / "times.csv").write_text(f"estimator,ms\n{args[1]},1.0\nspy,1.0\n")
    script.main([*args, "--quiet"])
    # Two seeds, two estimators, four steps.
    assert [order for order, _ in seen] == (["forward"] * 4 + ["reversed"] * 4) * 2
    images = torch.stack([x for _, x in seen]).unflatten(0, (2, 2, 4))
    assert torch.equal(images[:, 0], images[:, 1])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0, 0, :2], images[0, 0, 2:])
    assert len(orders) == 2 * 4
    capsys.readouterr()


def test_a_run_goes_on_from_a_model(script, run, device, device_name, tmp_path, capsys):
    script.main([*arguments(tmp_path, device_name, start=run), "--quiet"])
    curves = curves_of(tmp_path, script)
    first = {curve[0]["loss"] for curve in curves.values()}
    vae, _ = load_vae(run / "best.pt", device)
    data = load("digits", "data", download=False)
    elbo = Timestep_ELBO("importance", k=32, antithetic=False, entropy="exact")
    terms = evaluate(vae, data.test[:25], elbo, batch_size=20)
    assert len(first) == 1
    assert first.pop() == pytest.approx(sum(terms.values()), rel=1e-5)
    assert len({curve[-1]["loss"] for curve in curves.values()}) == len(curves)
    capsys.readouterr()


# --- Errors ---------------------------------------------------------------------------------------


@pytest.fixture
def error_of(monkeypatch, capsys):
    r"""Returns the error message of a run that ends in one."""
    return script_errors(SCRIPT, monkeypatch, capsys)


BAD_OPTIONS = {
    "--estimators nonsense": "unknown estimator 'nonsense': choose from uniform k=1 | z_0, ",
    "--seconds 0": "--seconds must be positive and finite, got 0.0",
    "--seconds nan": "--seconds must be positive and finite, got nan",
    "--points 0": "--points must be positive and finite, got 0",
    "--points 2.5": "argument --points: invalid int value: '2.5'",
    "--num-test -1": "--num-test must be positive and finite, got -1",
    "--batch-size 0": "--batch-size must be positive and finite, got 0",
    "--lr -0.1": "--lr must be positive and finite, got -0.1",
    "--clip-norm 0": "--clip-norm must be positive and finite, got 0.0",
    "--dataset nonsense": "argument --dataset: invalid choice: 'nonsense'",
    "--num-timesteps 0": "num_timesteps must be",
    "--start no/such/run": "no checkpoint at no/such/run",
    "--seconds inf": "--seconds must be positive and finite, got inf",
    "--device foo": "argument --device: 'foo' is no device: use cpu or cuda",
    f"--out {__file__}": "is a file: choose a folder",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options(error_of, options):
    assert BAD_OPTIONS[options] in error_of(*options.split())


def test_a_missing_gpu(error_of):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "no CUDA device is available" in error_of("--device", "cuda")


def test_the_defaults_are_the_serious_ones(script):
    args = script.parse_args([])
    assert tuple(args.estimators) == SERIOUS and args.seeds == [0, 1, 2]
    assert args.out == Path("runs/training-digits")
    assert script.parse_args(["--start", "a/b/run-7"]).out == Path("runs/training-run-7")
