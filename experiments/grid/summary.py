r"""Many runs on one page: statistics over seeds, as records and as Markdown.

A *record* is what one run found: ``"dataset"``, ``"row"`` (a prior and its settings),
``"latent_dim"`` and ``"seed"``, and the numbers of its ``results.json`` as :func:`flatten` names
them. All numbers of a table are such that less is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from study import Statistic, statistic, table

__all__ = [
    "flatten",
    "page",
    "paired_table",
    "summarize",
    "with_all_keys",
]

Record = Mapping[str, Any]
# What evaluate.py adds, if it was run.
EVALUATIONS = (
    ("likelihood.negative_log_likelihood", "Importance-weighted −log p(x) (nats per image)", 2),
    ("likelihood.gap", "What the ELBO of the same images leaves (nats)", 2),
    ("surgery.marginal_kl", "KL(q(z_0) ‖ p(z_0)) of the aggregate posterior (nats)", 2),
    ("surgery_flow.marginal_kl", "The same, with the probability flow's density (nats)", 2),
    ("aggregate.negative_elbo", "−ELBO with the training images' aggregate as prior (nats)", 2),
)
KEYS = ("dataset", "latent_dim", "row", "seed")


def flatten(results: Mapping[str, Any], prefix: str = "") -> dict[str, float | str]:
    r"""Returns the numbers and texts of nested results, their names joined by dots.

    Arguments:
        results: The results. Lists are left out.
        prefix: What the names start with.

    Example:
        >>> flatten({"test_images": 300, "frechet": {"samples": 0.5, "label": "FID"}})
        {'test_images': 300, 'frechet.samples': 0.5, 'frechet.label': 'FID'}
    """
    flat: dict[str, float | str] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, int | float | str):
            flat[prefix + name] = value
    return flat


def with_all_keys(records: Sequence[Record]) -> list[dict[str, Any]]:
    r"""Returns the records with the keys of all of them, as a table needs them; empty where a
    record has no value."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    return [{key: record.get(key, "") for key in keys} for record in records]


def summarize(records: Iterable[Record]) -> list[dict[str, Any]]:
    r"""Returns mean, sd and number of seeds of every number of every data set, latent size and row.

    Arguments:
        records: The records of all runs.

    Returns:
        Records with the keys ``"dataset"``, ``"latent_dim"``, ``"row"``, ``"metric"``, ``"mean"``,
        ``"sd"`` (empty for one seed) and ``"n"``.
    """
    groups: dict[tuple[Any, ...], list[float]] = {}
    for record in records:
        for metric, value in record.items():
            if metric not in KEYS and not isinstance(value, str):
                groups.setdefault((*(record[key] for key in KEYS[:3]), metric), []).append(value)
    summary = []
    for group, values in groups.items():
        found = statistic(values)
        numbers = {"mean": found.mean, "sd": found.sd if found.n > 1 else "", "n": found.n}
        summary.append(dict(zip((*KEYS[:3], "metric"), group, strict=True)) | numbers)
    return summary


# Markdown -----------------------------------------------------------------------------------------


def metric_table(
    records: Sequence[Record],
    metric: str,
    rows: Mapping[str, str],
    latent_dims: Sequence[int],
    num_seeds: int,
    digits: int,
) -> list[str]:
    r"""Returns the lines of a table of one number: rows x latent sizes.

    The best mean of a column is bold, and so are those that tie with it.

    Arguments:
        records: The records of a data set.
        metric: The name of the number.
        rows: The titles of the rows by their names.
        latent_dims: The columns.
        num_seeds: The number of seeds that a cell should have; n is shown if it has another.
        digits: The number of decimals.
    """
    cells = {name: [title] for name, title in rows.items()}
    for latent_dim in latent_dims:
        found: dict[str, Statistic] = {}
        for name in rows:
            values = [
                record[metric]
                for record in records
                if (record["row"], record["latent_dim"]) == (name, latent_dim) and metric in record
            ]
            if values:
                found[name] = statistic(values)
        finite = [stat for stat in found.values() if math.isfinite(stat.mean)]
        best = min(finite, key=lambda stat: stat.mean, default=None)
        for name in rows:
            stat = found.get(name)
            if stat is None:
                cells[name].append("-")
                continue
            text = stat.text(digits)
            if best is not None and len(finite) > 1 and stat.ties(best):
                text = f"**{text}**"
            cells[name].append(text if stat.n == num_seeds else f"{text} (n = {stat.n})")
    return table(["prior", *(f"D = {dim}" for dim in latent_dims)], cells.values())


def paired_table(
    records: Sequence[Record],
    metric: str,
    rows: Mapping[str, str],
    latent_dims: Sequence[int],
    reference: str,
    digits: int,
) -> list[str]:
    r"""Returns the lines of a table of differences from one row, in pairs of the same seed.

    What a seed does to both rows, such as a start that they share, is not in the difference. Its
    error is the standard error of the mean over seeds.

    Arguments:
        records: The records of a data set.
        metric: The name of the number.
        rows: The titles of the rows by their names.
        latent_dims: The columns.
        reference: The name of the row that is subtracted.
        digits: The number of decimals.
    """
    values = {
        (record["row"], record["latent_dim"], record["seed"]): record[metric]
        for record in records
        if metric in record
    }
    cells = {name: [title] for name, title in rows.items() if name != reference}
    for name, row in cells.items():
        for dim in latent_dims:
            differences = [
                value - values[reference, dim, seed]
                for (other, latent_dim, seed), value in values.items()
                if (other, latent_dim) == (name, dim) and (reference, dim, seed) in values
            ]
            if not differences:
                row.append("-")
                continue
            found = statistic(differences)
            row.append(f"{found.text(digits, 'standard_error')} (n = {found.n})")
    return table(["prior", *(f"D = {dim}" for dim in latent_dims)], cells.values())


def footnote(records: Sequence[Record], metric: str, rows: Mapping[str, str]) -> list[str]:
    r"""Returns the lines that say what a number is, row by row, if the records say it."""
    found: dict[str, list[str]] = {}
    for name, title in rows.items():
        texts = {r[f"{metric}_is"] for r in records if r["row"] == name and f"{metric}_is" in r}
        for text in sorted(texts):
            found.setdefault(text, []).append(title)
    notes = [f"{', '.join(titles)}: {text}." for text, titles in found.items()]
    return ["", f"<small>{' '.join(notes)}</small>"] if notes else []


def parameter_table(
    records: Sequence[Record], rows: Mapping[str, str], latent_dims: Sequence[int]
) -> list[str]:
    r"""Returns the lines of a table of the numbers of parameters of the priors."""
    counts = {
        (record["row"], record["latent_dim"]): record["parameters.prior"]
        for record in records
        if "parameters.prior" in record
    }
    cells = [
        [
            title,
            *(f"{counts[name, dim]:,}" if (name, dim) in counts else "-" for dim in latent_dims),
        ]
        for name, title in rows.items()
    ]
    return table(["prior", *(f"D = {dim}" for dim in latent_dims)], cells)


def page(
    title: str,
    caption: str,
    records: Sequence[Record],
    datasets: Mapping[str, str],
    rows: Mapping[str, str],
    latent_dims: Mapping[str, Sequence[int]],
    num_seeds: int,
    pictures: Mapping[str, Sequence[str]] | None = None,
    reference: str | None = None,
) -> str:
    r"""Returns the page of a grid of runs, in Markdown.

    Arguments:
        title: The title.
        caption: What is above the tables: where the numbers come from.
        records: The records of all runs.
        datasets: The titles of the data sets by their names.
        rows: The titles of the rows by their names.
        latent_dims: The latent sizes of each data set.
        num_seeds: The number of seeds of a complete cell.
        pictures: The files of the pictures of each data set.
        reference: The row that the others are compared with, in pairs of the same seed.
    """
    lines = [f"# {title}", "", caption]
    for dataset, name in datasets.items():
        mine = [record for record in records if record["dataset"] == dataset]
        lines += ["", f"## {name}"]
        if not mine:
            lines += ["", "No run is finished yet."]
            continue
        args = (rows, latent_dims[dataset])
        # Distances in different features, or of different numbers of images, do not compare.
        keys = ("frechet.label", "frechet.num_images", "frechet.reference")
        for protocol in dict.fromkeys(tuple(r[k] for k in keys) for r in mine if keys[0] in r):
            same = [record for record in mine if tuple(record.get(k) for k in keys) == protocol]
            label, count, split = protocol
            lines += ["", f"### {label}", ""]
            # That the images are a folder says nothing.
            images = split.removeprefix("folder ")
            lines += [f"Of {count:,} samples, and as many images of the {images}:", ""]
            lines += metric_table(same, "frechet.samples", *args, num_seeds, 2)
            lines += ["", "Of reconstructions, the floor that the decoder sets:", ""]
            lines += metric_table(same, "frechet.reconstructions", *args, num_seeds, 2)
        counts = " or ".join(f"{n:,}" for n in sorted({record["test_images"] for record in mine}))
        lines += ["", f"### Test −ELBO (nats per image, {counts} images)", ""]
        lines += metric_table(mine, "test_negative_elbo", *args, num_seeds, 2)
        lines += footnote(mine, "test_negative_elbo", rows)
        if reference is not None:
            lines += [
                "",
                f"Difference from {rows[reference]}, in pairs of the same seed (± standard error):",
                "",
                *paired_table(mine, "test_negative_elbo", *args, reference, 2),
            ]
        lines += ["", "### Bits/dim", ""]
        lines += metric_table(mine, "test_bits_per_dim", *args, num_seeds, 3)
        lines += footnote(mine, "test_negative_elbo", rows)
        for metric, heading, digits in EVALUATIONS:
            if any(metric in record for record in mine):
                lines += ["", f"### {heading}", ""]
                lines += metric_table(mine, metric, *args, num_seeds, digits)
                lines += footnote(mine, metric, rows)
        lines += ["", "### Parameters of the prior", "", *parameter_table(mine, *args)]
        for picture in (pictures or {}).get(dataset, ()):
            lines += ["", f"![{name}]({picture})"]
    return "\n".join(lines) + "\n"
