r"""The tables and the pictures of ``departures.py``."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import provenance
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator
from study import number, statistic, table

from pyro_vaediff.files import write_atomically, write_csv
from pyro_vaediff.plotting.style import BLUE, FONT, ORANGE, VERMILLION, slide, write

from .runs import PRIORS, RUNS


def read_records(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    r"""Returns what is known of the finished runs, by name and seed."""
    records = [json.loads(path.read_text()) for path in (out / "runs").glob("*.json")]
    records.sort(key=lambda record: (list(RUNS).index(record["run"]), record["seed"]))
    return {(record["run"], record["seed"]): record for record in records}


class Numbers(list[float]):
    r"""The numbers of several seeds."""

    def __init__(self, values: Iterable[float] = ()):
        super().__init__(values)
        found = statistic(self) if self else None
        self.mean = found.mean if found else math.nan
        self.se = found.standard_error if found else math.nan

    def __str__(self) -> str:
        if not self:
            return "–"
        # Where two digits would be none, the leading one says how small it is.
        digits = 2 if abs(self.mean) >= 0.005 or self.mean == 0 else 5
        return statistic(self).text(digits, "standard_error")


class Results:
    r"""The numbers of the finished runs, seed by seed."""

    def __init__(self, records: dict[tuple[str, int], dict[str, Any]]):
        self.records = records

    def of(self, name: str, key: str) -> Numbers:
        return Numbers([r[key] for (run, _), r in self.records.items() if run == name])

    def costs(self, name: str) -> Numbers:
        r"""Returns the differences to the run of the same seed that departs in nothing."""
        reference = RUNS[name].reference
        return Numbers(
            [
                record["negative_elbo"] - self.records[reference, seed]["negative_elbo"]
                for (run, seed), record in self.records.items()
                if run == name and (reference, seed) in self.records
            ]
        )

    def misreports(self, name: str, term: str | None = None) -> Numbers:
        r"""Returns what an objective says in excess of the -ELBO, in all or in one of its terms."""
        found = [r["misreports"][name] for r in self.records.values() if name in r["misreports"]]
        return Numbers([sum(t.values()) if term is None else t.get(term, 0.0) for t in found])


def write_tables(args: argparse.Namespace) -> tuple[Results, str]:
    r"""Writes the tables, and returns the numbers and the page."""
    records = read_records(args.out)
    rows = []
    for (name, seed), record in records.items():
        row = {key: v for key, v in record.items() if key not in ("terms", "misreports")}
        reference = records.get((RUNS[name].reference, seed))
        if reference is not None:
            row["cost"] = record["negative_elbo"] - reference["negative_elbo"]
        rows.append(row | {f"term {key}": value for key, value in record["terms"].items()})
    write_csv(args.out / "departures.csv", [rounded(row) for row in rows])
    rows = [
        {"objective": name, "model": trained, "seed": seed, "term": term, "nats": nats}
        for (trained, seed), record in records.items()
        for name, terms in record["misreports"].items()
        for term, nats in terms.items()
    ]
    if rows:
        write_csv(args.out / "misreports.csv", [rounded(row) for row in rows])
    text = page(results := Results(records), args)
    write_atomically(args.out / "departures.md", lambda file: file.write(text.encode()))
    return results, text


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()}


TERMS = {
    "x": "−log p(x given z_0)",
    "-H[z_0]": "−H[q(z_0 given x)]",
    "z_T": "KL at T",
    "z_s": "KLs of t = 2..T",
    "constant": "their constant",
    "z_0": "step t = 1, or KL of z_0",
}
COLUMNS = (
    "the ELBO",
    "the code's terms of the prior",
    "the ELBO; (5), (7)",
    "the code's terms; (5), (7)",
)


def title(name: str) -> str:
    r"""Returns what an objective is called, with its prior if that is not the diffusion prior."""
    if name not in RUNS:
        return "(6) constants"
    run = RUNS[name]
    return run.title if run.prior == "diffusion" else f"{run.prior.capitalize()}: {run.title}"


def page(results: Results, args: argparse.Namespace) -> str:
    r"""Returns the tables as Markdown."""
    command = shlex.join(["python", "experiments/departures.py", *args.argv])
    seeds = sorted({seed for _, seed in results.records})
    header = ["trained with", "test −ELBO", "cost", "its report, minus the −ELBO"]
    header += ["rms of the latents", "scale s of a posterior"]
    lines = [
        f"# What the departures cost: {args.dataset}",
        "",
        f"`{command}`: D = {args.latent_dim}, T = {args.num_timesteps}, {args.epochs} epochs, "
        f"seeds {', '.join(map(str, seeds))}, on {provenance(args.device)}. Mean and standard "
        "error over seeds, in nats per image.",
        "",
    ]
    rows = []
    for name, run in RUNS.items():
        numbers = [results.of(name, "negative_elbo"), results.costs(name), results.misreports(name)]
        numbers += [results.of(name, "latent_rms"), results.of(name, "posterior_sd")]
        if numbers[0]:
            rows.append(
                [title(name) if run.reference else f"**{title(name)}**", *map(str, numbers)]
            )
    lines += [*table(header, rows), "", "The reports, term by term:", ""]
    rows = []
    for name in [*RUNS, "constants"]:
        numbers = [results.misreports(name, term) for term in TERMS]
        if numbers[0]:
            rows.append([title(name), *(str(x) if any(x) else "" for x in numbers)])
    lines += table(["objective", *TERMS.values()], rows)
    lines += ["", "Three priors, with the terms of the ELBO and with those of the code:", ""]
    for key, what in (("negative_elbo", "test −ELBO"), ("frechet", "Fréchet distance (pixels)")):
        rows = [
            [prior, *(str(results.of(name, key)) for name in names)]
            for prior, names in PRIORS.items()
        ]
        lines += [*table([what, *COLUMNS], rows), ""]
    lines += ["![What each departure costs and what its objective reports](departures.png)", ""]
    lines += ["![Three priors, with the ELBO and with all departures](priors.png)"]
    return "\n".join(lines) + "\n"


def plot_departures(results: Results, path: Path) -> None:
    r"""Plots what each departure costs, and what its objective reports."""
    names = [name for name in RUNS if results.costs(name)]
    if not names:
        return
    figure, panels = slide("What a departure costs, and what its objective reports", panels=2)
    figure.set_size_inches(10, 0.36 * len(names) + 1.4)
    cost = "cost: −ELBO of the model,\nminus that with the ELBO"
    report = "report: the objective,\nminus the −ELBO"
    for axes, numbers, what, color in (
        (panels[0], results.costs, cost, VERMILLION),
        (panels[1], results.misreports, report, BLUE),
    ):
        bars = [numbers(name) for name in names]
        for i, bar in enumerate(bars):
            error = 0.0 if math.isnan(bar.se) else bar.se
            axes.barh(i, bar.mean, xerr=error, height=0.6, color=color, ecolor="black", capsize=3)
            digits = 1 if abs(bar.mean) >= 9.95 else 2
            label = number(bar.mean, digits, "+")
            axes.annotate(
                label,
                (max(bar.mean + error, 0), i),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=FONT - 3,
            )
        axes.axvline(0, color="black", linewidth=1)
        axes.set_xscale("symlog", linthresh=1, linscale=0.5)
        low, high = min(bar.mean for bar in bars), max(bar.mean for bar in bars)
        axes.set_xlim(1.5 * min(low, -1), 12 * max(high, 1))  # with room for the numbers
        axes.xaxis.set_major_locator(FixedLocator([-100, -10, -1, 0, 1, 10, 100, 1000]))
        axes.xaxis.set_minor_locator(FixedLocator([]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params(axis="x", labelsize=FONT - 3)
        axes.set_title(what, fontsize=FONT - 1)
        axes.set_xlabel("nats per image, logarithmic from 1 on", fontsize=FONT - 2)
        axes.set_yticks(range(len(names)), [])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(False, axis="y")
    panels[0].set_yticks(range(len(names)), map(title, names), fontsize=FONT - 2)
    write(path, (".png",), lambda file: figure.savefig(file, format="png"))


def plot_priors(results: Results, path: Path) -> None:
    r"""Plots the three priors, trained with the ELBO and with all departures."""
    figure, panels = slide("Three priors, with the ELBO and with all departures", panels=2)
    labels = ("the ELBO, learned likelihood", "all departures")
    for axes, key, title in (
        (panels[0], "negative_elbo", "test −ELBO (nats)"),
        (panels[1], "frechet", "Fréchet distance of samples (features=pixels)"),
    ):
        for i, names in enumerate(PRIORS.values()):
            for j, name in enumerate((names[0], names[-1])):
                if not (bar := results.of(name, key)):
                    continue
                x, up = i + 0.4 * j - 0.2, bar.mean >= 0
                axes.bar(
                    x,
                    bar.mean,
                    0.36,
                    color=(BLUE, ORANGE)[j],
                    hatch=("", "//")[j],
                    edgecolor="white",
                    yerr=None if math.isnan(bar.se) else bar.se,
                    capsize=3,
                )
                axes.annotate(
                    number(bar.mean, 1 if key == "negative_elbo" else 2),
                    (x, bar.mean + (1 if up else -1) * (0 if math.isnan(bar.se) else bar.se)),
                    xytext=(0, 4 if up else -4),
                    textcoords="offset points",
                    ha="center",
                    va="bottom" if up else "top",
                    fontsize=FONT - 2,
                )
        axes.axhline(0, color="black", linewidth=1)
        axes.margins(y=0.12)
        axes.set_title(title, fontsize=FONT)
        axes.set_xticks(range(len(PRIORS)), PRIORS, fontsize=FONT)
        axes.grid(False, axis="x")
    handles = [Patch(facecolor=BLUE), Patch(facecolor=ORANGE, hatch="//", edgecolor="white")]
    panels[0].legend(handles, labels, fontsize=FONT - 1, frameon=False)
    write(path, (".png",), lambda file: figure.savefig(file, format="png"))
