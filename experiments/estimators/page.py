r"""The page of the bench: tables, pictures, and the numbers behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from study import number, table

from pyro_vaediff.bench import plot_pareto
from pyro_vaediff.files import write_atomically, write_csv

from .entries import BASELINE, ENTRIES
from .minibatches import MODULES, Record, add_times
from .plots import plot_convergence, plot_gradient_noise

__all__ = ["markdown_table", "write_report"]

INTRODUCTION = """\
Values are in nats per datum, and numbers are means over minibatches. The bias has a 95 % confidence
interval. The variance of a gradient is the trace of its covariance, SNR its signal-to-noise ratio.
*z_t* counts the latents per datum at which the denoiser is evaluated, and memory is that of the
tensors which a training step makes."""

MULTIPLIERS = """\
Times are those of a whole training step, on {}. The last columns are the effective compute
multipliers: variance × time of the first row, as a multiple of an estimator's. What follows ± is
one standard error, from the spread over minibatches or from the draws, whichever is larger."""

RATIOS = """\
**Times were not measured.** The last columns are ratios of variances: that of the first row, as a
multiple of an estimator's. What follows ± is one standard error, from the spread over minibatches
or from the draws, whichever is larger."""

REMARKS = {
    ", Taylor": """\
*Taylor* subtracts the part of each KL that is linear in the noise of its latent, with a regressed
coefficient. Antithetic pairs cancel the same term, without a second pass through the denoiser: the
two are alternatives.""",
    ", PerDatum": """\
*PerDatum* chooses the timesteps of each datum by its own latents, or given x by its own posterior:
r(t | x).""",
}


def write_report(
    out: Path,
    measured: Mapping[str, Any],
    times: Mapping[str, Mapping[str, float]],
    machine: str,
) -> str:
    r"""Writes the page with its tables, pictures and numbers, and returns its text.

    Arguments:
        out: The folder.
        measured: What :func:`~estimators.measure.measure_all` returned, with a ``"title"`` and a
            ``"caption"``.
        times: The times of each estimator, or none.
        machine: On what these were measured.
    """
    for part in measured["moments"] if times else ():
        add_times(part["records"], times)
    every = [
        {key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in record.items()}
        for part in measured["moments"]
        for record in part["records"]
    ]
    write_csv(out / "estimators.csv", every)
    pictures = write_pictures(out, measured)
    names = {str(record["estimator"]) for record in every}
    remarks = [text for end, text in REMARKS.items() if any(end in name for name in names)]
    explained = MULTIPLIERS.format(machine) if times else RATIOS
    paragraphs = [
        f"# The bench: {measured['title']}",
        measured["caption"],
        *(" ".join(text.split("\n")) for text in (f"{INTRODUCTION} {explained}", *remarks)),
        *(f"![{caption}]({name}.png)" for name, caption in pictures.items()),
    ]
    for part in measured["moments"]:
        moment = part["moment"]
        lines = markdown_table(part["records"], part["noise"])
        paragraphs += [f"## {moment[0].upper()}{moment[1:]}", known(part["reference"])]
        paragraphs.append("\n".join(lines))
    if measured["left_out"]:
        reasons = (
            f"- {name.replace('|', 'given')}: {why}" for name, why in measured["left_out"].items()
        )
        paragraphs += ["## Left out", "Not for this model are"]
        paragraphs.append("\n".join(reasons))
    text = "\n\n".join(paragraphs) + "\n"
    write_atomically(out / "estimators.md", lambda file: file.write(text.encode()))
    return text


def known(reference: Record) -> str:
    r"""Returns the sentences about what the estimators should give."""
    value, se, evidence = (reference[key] for key in ("value", "value_se", "evidence"))
    error = "exact" if se == 0 else f"± {1.96 * se:.2f}"
    text = f"Reference −ELBO: {number(value, 2)} nats per datum ({error})."
    if evidence is not None:
        text += (
            f"\n−log p(x): {number(-evidence, 2)} nats. A loss whose bias is below "
            f"{number(-evidence - value, 2)} claims more than the evidence."
        )
    return text


def write_pictures(out: Path, measured: Mapping[str, Any]) -> dict[str, str]:
    r"""Draws the pictures, writes the numbers behind them, and returns their captions by name.

    Arguments:
        out: The folder.
        measured: What was measured; with times, at the last moment of training there are pictures
            of variance against cost.
    """
    pictures = {}
    records = measured["moments"][-1]["records"]
    baseline = next(r for r in records if r["estimator"] == BASELINE)
    valid = [r for r in records if not ENTRIES[r["estimator"]].counterexample]
    for module in MODULES if "ms" in baseline else ():
        points = [
            {
                "name": r["estimator"].replace(" | ", " given "),
                "group": r["group"],
                "cost": r["ms"],
                "variance": r[f"{module}_variance"] / baseline[f"{module}_variance"],
                "label": r is baseline,
            }
            for r in valid
        ]
        title = f"Gradient of the {module}: variance against cost"
        plot_pareto(points, out / f"pareto-{module}.png", title)
        pictures[f"pareto-{module}"] = title
    errors, by_timestep = measured["errors"], measured["by_timestep"]
    curves = {
        name: {"samples": torch.tensor(c["samples"]), "error": torch.tensor(c["error"])}
        | {"biased": c["biased"]}
        for name, c in errors.items()
    }
    plot_convergence(curves, out / "convergence.png", floor=measured["floor"] or None)
    pictures["convergence"] = "Error of the value against the number of samples"
    write_csv(
        out / "convergence.csv",
        [
            {"estimator": name, "samples": n, "error": error}
            for name, curve in errors.items()
            for n, error in zip(curve["samples"], curve["error"], strict=True)
        ],
    )
    if by_timestep:
        write_csv(out / "gradient_noise.csv", by_timestep)
        columns = {name: torch.tensor([r[name] for r in by_timestep]) for name in by_timestep[0]}
        proposals = {n[2:]: r for n, r in columns.items() if n.startswith("r ")}
        noise = {n: rms for n, rms in columns.items() if " given " in n}
        plot_gradient_noise(columns["t"], noise, proposals, out / "gradient_noise.png")
        pictures["gradient_noise"] = "Gradient noise by timestep"
    return pictures


def markdown_table(records: Sequence[Record], noise: dict[str, float] | None = None) -> list[str]:
    r"""Returns the lines of a table with a row per estimator.

    Arguments:
        records: The records, with costs, and with times and multipliers if there are any.
        noise: The minibatch's own gradient variance, by module.
    """
    timed = "ms" in records[0]
    last, what = ("merit", "compute multiplier") if timed else ("ratio", "ratio of variances")
    header = ["estimator", "draws", "bias (nats)", "sd"]
    for text in ("gradient variance", "SNR"):
        header += [f"{text}: {MODULES[0]}", *MODULES[1:]]
    header += ["z_t per datum", *["ms"] * timed, "MB", f"{what}: {MODULES[0]}", *MODULES[1:]]
    rows = []
    for r in records:
        bias = f"{number(r['bias'], 2, '+')} ± {1.96 * r['bias_se']:.2f}"
        if r["predicted_bias"]:
            predicted = number(r["predicted_bias"], 2, "+")
            bias += f" (predicted {predicted} ± {1.96 * r['predicted_bias_se']:.2f})"
        name = str(r["estimator"]).replace("|", "given")
        if r.get("counterexample"):
            name += f" (**counter-example**: {r['counterexample']})"
        noises = (
            significant(r[f"{module}_{what}"]) for what in ("variance", "snr") for module in MODULES
        )
        costs = [f"{r['denoiser_evaluations']:g}"]
        costs += [significant(r[key]) for key in ("ms", "megabytes") if key in r]
        merits = (
            " ± ".join(significant(r[f"{module}_{last}{se}"]) for se in ("", "_se"))
            for module in MODULES
        )
        rows.append([name, f"{r['draws']}", bias, significant(r["sd"]), *noises, *costs, *merits])
    if noise is not None:
        variances = [significant(noise[module]) for module in MODULES]
        cells = ["*the minibatch's own noise*", "", "", "", *variances]
        rows.append(cells + [""] * (len(header) - len(cells)))
    return table(header, rows)


def significant(value: float) -> str:
    r"""Formats a number with two significant digits, and all of them from 100 on."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}" if abs(value) >= 1e-3 else f"{value:.1e}"
