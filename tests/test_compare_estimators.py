r"""``experiments/compare_estimators.py``: what it leaves behind, for every moment, and its errors.

Nothing is asserted about time, nor about who wins.
"""

from __future__ import annotations

import csv
import importlib
import re

import pytest
import torch
from estimators import BASELINE, ENTRIES, measure
from estimators.page import significant
from PIL import Image
from scripts import EXPERIMENTS, call, script_errors

from pyro_vaediff.infer import ImportanceTimesteps
from pyro_vaediff.testing import Oracle, linear_gaussian_vae
from pyro_vaediff.train import load_checkpoint, load_vae

SCRIPT = EXPERIMENTS / "compare_estimators.py"
MODULES = ("encoder", "decoder", "prior")
# Of every kind: unrolled, a proposal that learns, particles, counterexamples.
SOME = ("Trace_ELBO", "loss-aware LD k=8 | z_0", "path, 2 particles", "posterior", "log-mean-exp")


@pytest.fixture(scope="module")
def digits(tmp_path_factory, device_name):
    r"""A run of two epochs that keeps both, and its initialization."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    tiny = ["--limit", 60, "--epochs", 2, "--num-timesteps", 10, "--width", 4, "--latent-dim", 3]
    snapshots = ["--features", "none", "--snapshots", 0, 1, 2]
    call("run.py", *tiny, *snapshots, "--out", out, "--device", device_name)
    return out


@pytest.fixture(scope="module")
def oracle_output(tmp_path_factory, device_name):
    out = tmp_path_factory.mktemp("oracle") / "new" / "folder"
    return out, call(SCRIPT.name, "--oracle", "--quick", "--out", out, "--device", device_name)


@pytest.fixture(scope="module")
def digits_output(tmp_path_factory, digits, device_name):
    out = tmp_path_factory.mktemp("digits")
    options = ["--quick", "--out", out, "--device", device_name, "--no-download"]
    return out, call(SCRIPT.name, "--checkpoint", digits, *options, "--only", *SOME)


@pytest.fixture(params=["oracle", "digits"])
def output(request):
    return request.getfixturevalue(f"{request.param}_output")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("compare_estimators")


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def tables(markdown):
    r"""Returns the rows of each table, by its heading."""
    found = {}
    for section in re.split(r"^##+ ", markdown, flags=re.MULTILINE)[1:]:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        assert all(line.endswith("|") for line in lines)
        found[section.splitlines()[0]] = [
            [cell.strip() for cell in line[1:-1].split("|")] for line in lines
        ]
    return found


# --- Files ----------------------------------------------------------------------------------------


def promised_files(docstring):
    r"""Returns the files that a docstring lists, such as ``name.png, .csv   what it is``."""
    block = docstring.partition("then holds\n\n")[2].partition("\n\n")[0]
    for line in block.splitlines():
        if re.match(r" {4}\S", line):
            first, *suffixes = re.split(r"\s{2,}", line.strip())[0].split(", ")
            for name in (first, *(first.rpartition(".")[0] + suffix for suffix in suffixes)):
                for module in MODULES if "MODULE" in name else ("",):
                    yield name.replace("MODULE", module)


def test_the_files_are_those_of_the_docstring(output, script):
    out, _ = output
    promised = set(promised_files(script.__doc__))
    assert {"estimators.csv", "pareto-prior.png", "convergence.csv"} < promised
    assert {path.name for path in out.iterdir()} == promised
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            low, high = image.convert("L").getextrema()
        assert low < high, path


def test_the_report_is_printed(output):
    out, printed = output
    report = (out / "estimators.md").read_text(encoding="utf-8")
    assert report in printed
    assert printed.splitlines()[-1] == f"written to {out}"
    (command,) = re.findall(r"^`(python experiments/compare_estimators.py .*?)`: ", report, re.M)
    assert "--quick" in command and str(out) in command
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", report)
    assert all((out / picture).is_file() for picture in pictures)
    assert "seed 0" in report and f"torch {torch.__version__}" in report


def test_every_row_is_complete(output):
    out, _ = output
    records = read(out / "estimators.csv")
    for record in records:
        entry = ENTRIES[record.pop("estimator")]
        assert record.pop("moment")
        assert record.pop("group") == entry.group
        assert record.pop("counterexample") == entry.counterexample
        numbers = {name: float(value) for name, value in record.items()}
        assert all(torch.tensor(list(numbers.values())).isfinite()), record
        assert numbers["draws"] >= 2 and numbers["sd"] > 0 and numbers["bias_se"] > 0
        assert numbers["ms"] > 0 and numbers["megabytes"] > 0
        assert numbers["denoiser_evaluations"] >= 2
        assert all(numbers[f"{m}_variance"] > 0 and numbers[f"{m}_snr"] >= 0 for m in MODULES)
        assert (numbers["predicted_bias"] != 0) == bool(entry.counterexample)


def test_merits_are_multiples_of_the_baseline(output):
    records = read(output[0] / "estimators.csv")
    baselines = {r["moment"]: r for r in records if r["estimator"] == BASELINE}
    for record in records:
        baseline = baselines[record["moment"]]
        for module in MODULES:
            product, of_baseline = (
                float(r[f"{module}_variance"]) * float(r["ms"]) for r in (record, baseline)
            )
            merit = float(record[f"{module}_merit"])
            assert merit == pytest.approx(of_baseline / product, rel=1e-4)
            assert record is not baseline or merit == 1.0


def test_the_tables_are_valid_and_hold_the_records(output):
    out, _ = output
    records = read(out / "estimators.csv")
    found = tables((out / "estimators.md").read_text(encoding="utf-8"))
    moments = list(dict.fromkeys(record["moment"] for record in records))
    assert [heading.lower() for heading in found] == moments
    for moment, rows in zip(moments, found.values(), strict=True):
        header, rule, *body, noise = rows
        assert {len(row) for row in rows} == {len(header)} and set(rule) == {"---"}
        mine = [record for record in records if record["moment"] == moment]
        assert len(body) == len(mine)
        for row, record in zip(body, mine, strict=True):
            name, _, why = row[0].partition(" (**counter-example**: ")
            assert name == record["estimator"].replace("|", "given")
            assert why.removesuffix(")") == record["counterexample"]
            columns = dict(zip(header, row, strict=True))
            assert columns["draws"] == record["draws"]
            for column, key in (
                ("sd", "sd"),
                ("gradient variance: prior", "prior_variance"),
                ("SNR: prior", "prior_snr"),
                ("compute multiplier: prior", "prior_merit"),
                ("ms", "ms"),
                ("MB", "megabytes"),
            ):
                # The table is rounded from all digits, the file has six.
                assert float(columns[column].partition(" ± ")[0]) == pytest.approx(
                    float(significant(float(record[key]))), rel=0.06
                )
            assert ("predicted" in columns["bias (nats)"]) == (record["predicted_bias"] != "0.0")
        assert "minibatch" in noise[0] and float(noise[4]) >= 0


def test_convergence(output, script):
    out, _ = output
    records = read(out / "convergence.csv")
    names = list(dict.fromkeys(record["estimator"] for record in records))
    chosen = {record["estimator"] for record in read(out / "estimators.csv")}
    expected = [name for name in ENTRIES if name in chosen and name in measure.CONVERGENCE]
    assert names == [name.replace(" | ", " given ") for name in expected] and names
    for name in names:
        samples = [int(r["samples"]) for r in records if r["estimator"] == name]
        assert samples == [2**i for i in range(len(samples))]
    assert all(float(record["error"]) > 0 for record in records)


def test_gradient_noise(output):
    out, _ = output
    T = 10 if "epoch" in read(out / "estimators.csv")[-1]["moment"] else 8  # of the oracle
    columns = {}
    for record in read(out / "gradient_noise.csv"):
        for name, value in record.items():
            columns.setdefault(name, []).append(float(value))
    columns = {name: torch.tensor(values).double() for name, values in columns.items()}
    t = columns["t"].long()
    assert t[0] == 2 and t[-1] == T and (t.diff() > 0).all()
    assert all((values > 0).all() for values in columns.values())
    assert (columns["r uniform"] - 1 / (T - 1)).abs().max() < 1e-6
    ratio = columns["r optimal"] / columns["prior given z_0"]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), atol=0, rtol=1e-4)
    for name, values in columns.items():
        if name.startswith("r "):
            assert values.sum() < 1
    assert {f"{m} given {c}" for m in ("encoder", "prior") for c in ("z_0", "x")} < columns.keys()


# --- Moments and estimators -----------------------------------------------------------------------


def rows_of(moments, names):
    r"""Returns what should be in the table: unrolled estimators are at the last moment only."""
    return [
        (moment, name)
        for moment in moments
        for name in names
        if moment == moments[-1] or not ENTRIES[name].unrolled
    ]


def test_the_oracle_has_every_estimator(oracle_output):
    records = read(oracle_output[0] / "estimators.csv")
    expected = rows_of(["initial", "40 steps", "400 steps"], ENTRIES)
    assert [(record["moment"], record["estimator"]) for record in records] == expected
    counts = {record["estimator"]: float(record["denoiser_evaluations"]) for record in records}
    assert all(counts[name] == 8 for name, entry in ENTRIES.items() if entry.unrolled)
    assert counts[BASELINE] == 2


def test_the_oracle_says_what_is_exact(oracle_output, device):
    report = (oracle_output[0] / "estimators.md").read_text(encoding="utf-8")
    said = re.findall(
        r"Reference −ELBO: (\S+) nats per datum \(exact\)\.\n"
        r"−log p\(x\): (\S+) nats\. A loss whose bias is below (\S+) claims",
        report,
    )
    said = [[float(number.replace("−", "-")) for number in numbers] for numbers in said]
    assert len(said) == 3
    for loss, evidence, least in said:
        assert least == pytest.approx(evidence - loss, abs=0.011) and least <= 0
    losses = [loss for loss, _, _ in said]
    assert losses == sorted(losses, reverse=True)  # it is fitted
    # The same data from the same seed, and their closed forms.
    torch.manual_seed(0)
    vae = linear_gaussian_vae(8, seed=0).to(device)
    with torch.no_grad():
        x = vae.model(num_samples=3 * 4)[: 2 * 4]  # of which two minibatches are measured
    oracle = Oracle(vae, x)
    exact = [oracle.negative_elbo.mean().item(), -oracle.log_evidence.mean().item()]
    assert said[0][:2] == pytest.approx(exact, abs=0.006)


def test_every_moment_of_a_run(digits, digits_output):
    best = load_checkpoint(digits / "best.pt")["best_epoch"]
    moments = ["initial", f"epoch {3 - best}", f"epoch {best} (best)"]  # once each
    chosen = [
        name for name in ENTRIES if name == BASELINE or any(pattern in name for pattern in SOME)
    ]
    assert len(chosen) > len(SOME)
    expected = rows_of(moments, chosen)
    records = read(digits_output[0] / "estimators.csv")
    assert [(record["moment"], record["estimator"]) for record in records] == expected
    # A model that is not trained yet has another loss.
    report = (digits_output[0] / "estimators.md").read_text(encoding="utf-8")
    losses = re.findall(r"Reference −ELBO: (\S+) nats per datum \(± \S+\)\.", report)
    assert len(set(losses)) == len(moments)
    assert "log p(x)" not in report


def test_the_moments_of_files(digits, script, device):
    assert list(script.moments_of(digits / "epoch-0.pt", device)) == ["epoch-0"]
    best = load_checkpoint(digits / "best.pt")["best_epoch"]
    moments = script.moments_of(digits / "best.pt", device)
    assert list(moments) == [f"epoch {best} (best)"]
    (vae,) = moments.values()
    saved, initial = (load_vae(digits / name)[0].state_dict() for name in ("best.pt", "epoch-0.pt"))
    for name, value in vae.state_dict().items():
        assert torch.equal(value.cpu(), saved[name])
    assert any(not torch.equal(saved[name], initial[name]) for name in saved)


def test_the_minibatches_are_images_of_the_run(digits, script):
    args = ["--checkpoint", str(digits), "--batch-size", "7", "--noise-minibatches", "5"]
    args += ["--no-download"]
    _, x = script.load_run(script.parse_args(args))
    assert x.shape == (5, 7, 1, 8, 8) and x.min() >= -1 and x.max() <= 1
    assert x.flatten(0, 1).flatten(1).unique(dim=0).shape[0] == 35


def test_only(script):
    assert [entry.name for entry in script.choose([])] == list(ENTRIES)
    names = [entry.name for entry in script.choose(["Hybrid", "reversed"])]
    assert names == [
        BASELINE,
        "closed-form KLs, reversed",
        "importance LD k=8 | z_0, Hybrid",
    ]
    assert script.choose(["uniform k=1 | z_0"])[0].name == BASELINE


def test_the_optimal_proposal_is_interpolated(script, monkeypatch, device):
    r"""Between the timesteps at which the noise is measured, by a power law."""

    def noise(vae, x, timesteps, given, draws):
        rms = torch.tensor(timesteps, device=device).double() ** -1.5
        return {"encoder": rms, "prior": 7 * rms}

    monkeypatch.setattr(measure, "gradient_noise_by_timestep", noise)
    vae = linear_gaussian_vae(50).to(device)
    x = torch.zeros(1, 3, dtype=torch.float64, device=device)
    args = script.parse_args(["--oracle", "--quick"])
    rows = measure.measure_noise_by_timestep(vae, x, args)
    law = torch.arange(2, 51).double() ** -1.5
    importance = ImportanceTimesteps()(vae.prior, "z_0")
    assert 3 <= len(rows) < 10
    for row in rows:
        expected = (row["t"] ** -1.5 / law.sum()).item()
        assert row["r optimal"] == pytest.approx(expected, rel=1e-5)
        assert row["r importance"] == pytest.approx(importance[row["t"] - 2].item(), rel=1e-5)


@pytest.mark.parametrize("T, count", [(1, 0), (2, 0), (3, 2)])
def test_short_chains_have_few_timesteps(script, device, T, count):
    vae = linear_gaussian_vae(T).to(device)
    x = torch.randn(2, 3, dtype=torch.float64, device=device)
    rows = measure.measure_noise_by_timestep(vae, x, script.parse_args(["--oracle", "--quick"]))
    assert len(rows) == count


# --- Errors ---------------------------------------------------------------------------------------


@pytest.fixture
def error_of(monkeypatch, capsys):
    r"""Returns the error message of a run that ends in one."""
    return script_errors(SCRIPT, monkeypatch, capsys)


BAD_OPTIONS = {
    "": "one of the arguments --checkpoint --oracle is required",
    "--oracle --checkpoint runs/x": "not allowed with argument",
    "--oracle --only Hybrid nonsense": "--only 'nonsense' matches none of: uniform k=1 | z_0; ",
    "--oracle --draws 1": "--draws must be at least 4, got 1",
    "--oracle --batch-size 0": "--batch-size must be at least 1, got 0",
    "--oracle --minibatches 0": "--minibatches must be at least 1, got 0",
    "--oracle --noise-minibatches 1": "--noise-minibatches must be at least 2, got 1",
    "--oracle --no-time --only-time": "not allowed with argument",
    "--oracle --repeats 0": "--repeats must be at least 1, got 0",
    "--oracle --num-timesteps 0": "num_timesteps must be a whole number >= 1, got 0",
    "--checkpoint no/such/run": "no checkpoint at no/such/run",
    "--oracle --device foo": "argument --device: 'foo' is no device: use cpu or cuda",
    f"--oracle --out {__file__}": "is a file: choose a folder",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options(error_of, options):
    assert BAD_OPTIONS[options] in error_of(*options.split())


def test_bad_checkpoints(error_of, digits, tmp_path, device_name):
    (tmp_path / "best.pt").write_bytes((digits / "best.pt").read_bytes()[:1000])
    assert "is not a checkpoint, or is truncated" in error_of("--checkpoint", tmp_path)
    message = error_of("--checkpoint", digits, "--batch-size", 1000, "--minibatches", 3)
    assert "--batch-size 1000 times 12 must be at most the 1" in message
    tiny = ["--limit", 20, "--epochs", 1, "--width", 4, "--latent-dim", 2, "--features", "none"]
    run = tmp_path / "gaussian"
    call("run.py", "--prior", "gaussian", *tiny, "--out", run, "--device", device_name)
    message = error_of("--checkpoint", run)
    assert f"--checkpoint {run}: prior must be a DiffusionPrior or hold one, got Gauss" in message


def test_a_missing_gpu(error_of):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "no CUDA device is available" in error_of("--oracle", "--device", "cuda")
