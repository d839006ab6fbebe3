r"""``experiments/compare_estimators.py`` on images of latents and hierarchies, and timed apart."""

from __future__ import annotations

import csv
import json
import math
import re

import pytest
import torch
from estimators import BASELINE, ENTRIES
from estimators.minibatches import MODULES, add_times, mean_reference, over_minibatches
from estimators.page import write_report
from scripts import EXPERIMENTS, call, script_errors

from pyro_vaediff.bench import Reference

SCRIPT = EXPERIMENTS / "compare_estimators.py"
TAYLOR, PER_DATUM = (f"importance LD k=8 | {name}" for name in ("z_0, Taylor", "x, PerDatum"))
HYBRID, FORWARD = "importance LD k=8 | z_0, Hybrid", "TraceMeanField_ELBO, forward"
SOME = (TAYLOR, PER_DATUM, "z_0, Hybrid", "Orthogonal", "VarGrad", FORWARD)
KINDS = {
    "spatial": ["--latent-shape", 4, 2, 2],
    "every": ["--latent-groups", 5, "2x4x4", "--group-priors", "every"],
}


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory, device_name):
    r"""A run of one epoch, and its kind."""
    out = tmp_path_factory.mktemp("runs") / request.param
    tiny = ["--limit", 30, "--epochs", 1, "--num-timesteps", 5, "--width", 4, "--features", "none"]
    call("run.py", *tiny, *KINDS[request.param], "--out", out, "--device", device_name)
    return out, request.param


@pytest.fixture(scope="module")
def untimed(run, tmp_path_factory, device_name):
    r"""The folder of a comparison without times, its options, and the kind of its model."""
    out, options = tmp_path_factory.mktemp("out"), ["--only", *SOME, "--device", device_name]
    options = ["--checkpoint", run[0], "--quick", "--no-download", "--out", out, *options]
    call(SCRIPT.name, "--no-time", *options)
    return out, options, run[1]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_not_for_a_model_is_left_out_with_a_reason(untimed):
    out, _, kind = untimed
    chosen = [n for n in ENTRIES if n == BASELINE or any(pattern in n for pattern in SOME)]
    # Below its first group, a hierarchy has diffusion priors with a context.
    refused = {} if kind == "spatial" else {TAYLOR: "context", HYBRID: "context"}
    refused |= {} if kind == "spatial" else {FORWARD: "got a HierarchicalPrior"}
    records = read(out / "estimators.csv")
    assert [r["estimator"] for r in records] == [name for name in chosen if name not in refused]
    report = (out / "estimators.md").read_text(encoding="utf-8")
    reasons = dict(re.findall(r"^- (.*?): (.*)$", report.partition("## Left out")[2], re.M))
    if kind == "every":
        assert "single diffusion prior" in reasons.pop("the gradient noise by timestep")
    assert (out / "gradient_noise.png").exists() == (kind == "spatial")
    assert list(reasons) == [name.replace("|", "given") for name in chosen if name in refused]
    for name, text in refused.items():
        assert text in reasons[name.replace("|", "given")]
    assert ("Antithetic pairs cancel the same term" in report) == (TAYLOR not in refused)
    assert "r(t | x)" in report
    for record in records:
        assert int(record["draws"]) == 8 or ENTRIES[record["estimator"]].unrolled
        assert all(float(record[f"{m}_variance"]) > 0 for m in MODULES)
        # No error is below that of its own draws: with a few, that of a variance is large.
        assert all(float(record[f"{m}_variance_se"]) > 0 for m in MODULES)


def test_a_page_without_times_gets_them_later(untimed):
    out, options, _ = untimed
    report = (out / "estimators.md").read_text(encoding="utf-8")
    before = read(out / "estimators.csv")
    assert "**Times were not measured.**" in report and "ratio of variances: prior" in report
    assert not list(out.glob("pareto-*.png")) and not (out / "times.csv").exists()
    assert "ms" not in before[0] and "prior_merit" not in before[0]

    printed = call(SCRIPT.name, "--only-time", *options)
    report, after = (
        (out / "estimators.md").read_text(encoding="utf-8"),
        read(out / "estimators.csv"),
    )
    assert report in printed and "Times were not measured" not in report
    assert "compute multiplier: prior" in report and len(list(out.glob("pareto-*.png"))) == 3
    times = {row["estimator"]: row for row in read(out / "times.csv")}
    assert f"Times are those of a whole training step, on {times[BASELINE]['machine']}." in report
    for old, new in zip(before, after, strict=True):
        assert {key: new[key] for key in old} == old  # nothing else was measured again
        assert float(new["ms"]) == pytest.approx(float(times[new["estimator"]]["ms"]), rel=1e-5)
        ratio = float(after[0]["ms"]) / float(new["ms"])
        for module in MODULES:
            merit = float(new[f"{module}_ratio"]) * ratio
            assert float(new[f"{module}_merit"]) == pytest.approx(merit, rel=1e-4)


def test_a_folder_is_that_of_one_model(untimed, monkeypatch, capsys):
    out, options, _ = untimed
    error_of = script_errors(SCRIPT, monkeypatch, capsys)
    message = error_of("--no-time", *options, "--batch-size", 3)
    assert f"{out} was run with other settings, now there is batch_size=3 in place of 4" in message


def test_an_estimator_without_a_time_is_an_error(tmp_path):
    rows = over_minibatches([table(0)])
    measured = {"title": "t", "caption": "c", "moments": [{"moment": "m", "records": rows}]}
    times = {BASELINE: {"ms": 1.0}}
    with pytest.raises(ValueError, match=r"there is no time of 'other': .* --only-time"):
        write_report(tmp_path, json.loads(json.dumps(measured)), times, "here")


# --- Means over minibatches -----------------------------------------------------------------------


def table(seed, minibatch=1.0, draws=0.02):
    r"""Returns noisy records of two estimators on a minibatch, and of one without noise.

    The true variances are 4, 1 and 0 times a factor of the minibatch.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for name, variance in ((BASELINE, 4.0), ("other", 1.0), ("exact", 0.0)):
        noise = 1 + draws * torch.randn(4, generator=generator, dtype=torch.float64)
        bias, *factors = noise.tolist()
        row = {"estimator": name, "draws": 100 - seed, "bias": bias - 1, "bias_se": draws}
        for module, factor in zip(MODULES, factors, strict=True):
            value = variance * factor * minibatch
            row |= {f"{module}_variance": value, f"{module}_variance_se": draws * value}
        rows.append(row)
    return rows


def test_means_over_minibatches_by_hand():
    tables = [table(0, draws=0.0, minibatch=m) for m in (1.0, 2.0, 6.0)]
    for number, rows in enumerate(tables):
        for row in rows:
            row |= {"draws": 100 - number, "bias": 0.1 * number, "bias_se": 0.3}
    first, other, exact = over_minibatches(tables)
    assert (first["draws"], other["estimator"]) == (98, "other")
    assert first["bias"] == pytest.approx(0.1)
    # The draws say 0.3 / sqrt(3), and the spread 0.1 / sqrt(3).
    assert first["bias_se"] == pytest.approx(0.3 / 3**0.5)
    assert other["prior_variance"] == pytest.approx(3.0)
    assert other["prior_variance_se"] == pytest.approx((7 / 3) ** 0.5)
    # A noisy minibatch is one for both.
    assert other["prior_ratio"] == pytest.approx(4.0) and other["prior_ratio_se"] < 1e-12
    assert (first["prior_ratio"], first["prior_ratio_se"]) == (1.0, 0.0)
    assert (exact["prior_ratio"], exact["prior_ratio_se"]) == (math.inf, 0.0)


def test_the_standard_error_of_a_ratio_and_of_a_multiplier():
    r"""Over many comparisons, it is the spread; of a minibatch's draws, or over minibatches."""
    times = {BASELINE: {"ms": 6.0, "ms_se": 0.0}, "other": {"ms": 3.0, "ms_se": 0.03}}
    times["exact"] = {"ms": 1.0}
    for count in (1, 3):
        found = []
        for repeat in range(1500):
            tables = [table(count * repeat + i, minibatch=1.0 + i) for i in range(count)]
            rows = over_minibatches(tables)
            add_times(rows, times)
            found.append([rows[1][f"prior_{key}"] for key in ("ratio", "ratio_se", "merit_se")])
        ratios, claimed, merit_se = torch.tensor(found, dtype=torch.float64).unbind(1)
        spread = ratios.std().item()
        assert spread == pytest.approx(
            4 * 0.02 * (2 * (1 + 4 + 9) / 36 if count == 3 else 2) ** 0.5, rel=0.1
        )
        # Never below the draws; of three minibatches, the larger of two estimates is above both.
        low, high = (0.95, 1.1) if count == 1 else (0.95, 1.5)
        assert low < claimed.mean().item() / spread < high
        expected = (2 * (claimed.square() + (ratios * 0.01).square()).sqrt()).mean()
        assert merit_se.mean().item() == pytest.approx(expected.item(), rel=1e-6)
    assert rows[0]["prior_merit"] == 1.0 and rows[0]["prior_merit_se"] == 0.0
    assert rows[2]["prior_merit"] == math.inf and rows[2]["prior_merit_se"] == 0.0


def test_the_mean_of_references():
    references = [Reference(v, se, {}, {}, e) for v, se, e in ((1.0, 0.3, -4.0), (3.0, 0.4, -6.0))]
    found = mean_reference(references)
    assert found == {"value": 2.0, "value_se": pytest.approx(0.25), "evidence": -5.0}
    assert mean_reference([Reference(1.0, 0.1, {}, {})])["evidence"] is None
