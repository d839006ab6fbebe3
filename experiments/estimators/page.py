r"""The page of the bench: tables, pictures, and the numbers behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from study import number, table

from pyro_vaediff.bench import Reference, plot_pareto
from pyro_vaediff.files import write_atomically, write_csv

from .entries import BASELINE, ENTRIES
from .plots import plot_convergence, plot_gradient_noise

Record = dict[str, Any]

__all__ = ["markdown_table", "write_page", "write_pictures"]


def write_page(
    out: Path,
    title: str,
    caption: str,
    records: dict[str, list[Record]],
    noises: dict[str, dict[str, float]],
    references: dict[str, Reference],
    pictures: dict[str, str],
) -> str:
    r"""Writes a page of tables and pictures, and returns its text.

    Arguments:
        out: The folder.
        title: The title.
        caption: How all was measured.
        records: The records, with costs and merits, by moment of training.
        noises: The minibatch's own gradient variance of each module, by moment.
        references: What the estimators should give, by moment.
        pictures: The captions of the pictures in the folder, by their names.
    """
    lines = [
        f"# The bench: {title}",
        "",
        caption,
        "",
        "Values are in nats per datum. The bias has a 95 % confidence interval. The variance of a "
        "gradient is the trace of its covariance, SNR its signal-to-noise ratio. *z_t* counts the "
        "latents per datum at which the denoiser is evaluated. Times are those of a whole training "
        "step, and memory that of the tensors which it makes. The last columns are the effective "
        "compute multipliers: variance × time of the first row, as a multiple of an estimator's.",
        "",
        *(f"![{caption}]({name}.png)" + "\n" for name, caption in pictures.items()),
    ]
    for moment, rows in records.items():
        reference = references[moment]
        lines += ["", f"## {moment[0].upper()}{moment[1:]}", ""]
        known = "exact" if reference.value_se == 0 else f"± {1.96 * reference.value_se:.2f}"
        lines += [f"Reference −ELBO: {number(reference.value, 2)} nats per datum ({known})."]
        if reference.evidence is not None:
            lines += [
                f"−log p(x): {number(-reference.evidence, 2)} nats. A loss whose bias is below "
                f"{number(-reference.evidence - reference.value, 2)} claims more than the evidence."
            ]
        lines += ["", *markdown_table(rows, noises[moment])]
    text = "\n".join(lines) + "\n"
    write_atomically(out / "estimators.md", lambda file: file.write(text.encode()))
    return text


def write_pictures(
    out: Path,
    records: list[Record],
    errors: dict[str, dict],
    floor: float,
    by_timestep: list[dict[str, float]],
) -> dict[str, str]:
    r"""Draws the pictures, writes the numbers behind them, and returns their captions by name.

    Arguments:
        out: The folder.
        records: The records of one moment of training, with costs and merits.
        errors: See :func:`plot_convergence`.
        floor: The standard error of the reference, in nats per datum.
        by_timestep: A row per timestep, with the column ``"t"``, those of the gradient noise, and
            those of proposals, whose names begin with ``"r "``; or nothing.
    """
    pictures = {}
    baseline = next(r for r in records if r["estimator"] == BASELINE)
    valid = [r for r in records if not ENTRIES[r["estimator"]].counterexample]
    for module in ("prior", "encoder", "decoder"):
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
    plot_convergence(errors, out / "convergence.png", floor=floor or None)
    pictures["convergence"] = "Error of the value against the number of samples"
    write_csv(
        out / "convergence.csv",
        [
            {"estimator": name, "samples": n, "error": error}
            for name, curve in errors.items()
            for n, error in zip(curve["samples"].tolist(), curve["error"].tolist(), strict=True)
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
        records: The records, with costs and merits.
        noise: The minibatch's own gradient variance, by module.
    """
    order = ("prior", "encoder", "decoder")
    header = ["estimator", "bias (nats)", "sd", "gradient variance: prior", *order[1:]]
    header += ["SNR: prior", *order[1:], "z_t per datum", "ms", "MB"]
    header += ["compute multiplier: prior", *order[1:]]
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
            significant(r[f"{module}_{what}"]) for what in ("variance", "snr") for module in order
        )
        costs = (
            f"{r['denoiser_evaluations']:g}",
            significant(r["ms"]),
            significant(r["megabytes"]),
        )
        merits = (
            " ± ".join(significant(r[f"{module}_merit{se}"]) for se in ("", "_se"))
            for module in order
        )
        rows.append([name, bias, significant(r["sd"]), *noises, *costs, *merits])
    if noise is not None:
        variances = (significant(noise[module]) for module in order)
        rows.append(["*the minibatch's own noise*", "", "", *variances, *[""] * 9])
    return table(header, rows)


def significant(value: float) -> str:
    r"""Formats a number with two significant digits, and all of them from 100 on."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}" if abs(value) >= 1e-3 else f"{value:.1e}"
