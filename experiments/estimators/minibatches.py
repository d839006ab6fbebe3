r"""Records of estimators over several minibatches, and what times make of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pyro_vaediff.bench import Reference

from .entries import BASELINE

__all__ = ["MODULES", "add_times", "mean_reference", "over_minibatches"]

Record = dict[str, Any]

MODULES = ("prior", "encoder", "decoder")


def over_minibatches(tables: Sequence[Sequence[Record]]) -> list[Record]:
    r"""Returns a record per estimator, with its means over minibatches.

    A *ratio* is the variance of the baseline as a multiple of the estimator's. A noisy minibatch is
    one for both, so that the error of a ratio is that of paired differences.

    Arguments:
        tables: The records of each minibatch, in the same order of estimators.
    """
    merged = [mean_record(rows) for rows in zip(*tables, strict=True)]
    number = next(i for i, record in enumerate(merged) if record["estimator"] == BASELINE)
    for record, *rows in zip(merged, *tables, strict=True):
        for module in MODULES:
            key, ratio_key = f"{module}_variance", f"{module}_ratio"
            own, first = record[key], merged[number][key]
            record[ratio_key], relative = first / own if own else math.inf, 0.0
            if record is not merged[number] and own and first:
                pairs = [(row, table[number]) for row, table in zip(rows, tables, strict=True)]
                relative = standard_error(
                    [row[key] / own - other[key] / first for row, other in pairs],
                    [
                        math.hypot(row[f"{key}_se"] / own, other[f"{key}_se"] / first)
                        for row, other in pairs
                    ],
                )
            record[f"{ratio_key}_se"] = record[ratio_key] * relative if relative else 0.0
    return merged


def mean_record(rows: Sequence[Record]) -> Record:
    r"""Returns the means of an estimator's records, with the smallest number of draws."""
    record = rows[0] | {"draws": min(row["draws"] for row in rows)}
    for key in (key for key, value in rows[0].items() if isinstance(value, float)):
        if not key.endswith("_se"):
            values = [row[key] for row in rows]
            record[key] = statistics.fmean(values)
            if f"{key}_se" in record:
                record[f"{key}_se"] = standard_error(values, [row[f"{key}_se"] for row in rows])
    return record


def standard_error(values: Sequence[float], errors: Sequence[float]) -> float:
    r"""Returns the standard error of a mean over minibatches.

    It is that of their spread, or that of the draws if it is larger: the spread of a few may be
    small by chance.

    Arguments:
        values: A number of each minibatch.
        errors: Their standard errors, due to the draws.
    """
    n = len(values)
    spread = statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0
    return max(spread, math.hypot(*errors) / n)


def mean_reference(references: Sequence[Reference]) -> Record:
    r"""Returns the mean value of references, its standard error, and the mean evidence if known."""
    n, known = len(references), [r.evidence for r in references if r.evidence is not None]
    return {
        "value": statistics.fmean(r.value for r in references),
        "value_se": math.hypot(*(r.value_se for r in references)) / n,
        "evidence": statistics.fmean(known) if len(known) == n else None,
    }


def add_times(records: Sequence[Record], times: Mapping[str, Mapping[str, float]]) -> None:
    r"""Adds the time of a step and the effective compute multipliers to each record.

    A multiplier is the ratio of variances times that of the times, and its standard error that of
    independent factors.

    Arguments:
        records: The records of :func:`over_minibatches`.
        times: For each estimator ``"ms"``, and ``"ms_se"`` if it is known.

    Raises:
        ValueError: If an estimator has no time.
    """
    missing = [r["estimator"] for r in records if r["estimator"] not in times]
    if missing:
        raise ValueError(f"there is no time of {missing[0]!r}: measure the times by --only-time")
    first = times[BASELINE]
    for record in records:
        time = times[record["estimator"]]
        record |= time
        for module in MODULES:
            ratio, ratio_se = record[f"{module}_ratio"], record[f"{module}_ratio_se"]
            merit, relative = ratio * first["ms"] / time["ms"], 0.0
            if record["estimator"] != BASELINE and 0 < merit < math.inf:
                errors = (t.get("ms_se", 0.0) / t["ms"] for t in (time, first))
                relative = math.hypot(ratio_se / ratio, *errors)
            record |= {
                f"{module}_merit": merit,
                f"{module}_merit_se": merit * relative if relative else 0.0,
            }
