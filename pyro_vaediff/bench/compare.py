r"""Any estimator beside others, for any pair of Pyro programs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import check_choice, check_seed, check_whole
from ..files import write_csv
from ..infer import Estimator, Timestep_ELBO
from .entry import Entry
from .harness import Record, add_merits, measure, measure_costs
from .paired import Difference, common_random_numbers
from .pareto import plot_pareto
from .programs import Data, Groups, find_programs, own_store
from .reference import ANTITHETIC_PAIRS, Reference, estimated_reference

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    r"""What :func:`compare` has measured: a record per estimator, as a table, a file or a chart.

    Arguments:
        records: The records, whose columns are those of :func:`compare`.
        baseline: The name of the estimator that the others are compared with.
        groups: The names of the groups of parameters.
        reference: What all of them should give.
    """

    records: Sequence[Record]
    baseline: str
    groups: Sequence[str]
    reference: Reference

    @property
    def frame(self) -> Any:
        r"""The records as a ``pandas.DataFrame``, with the names of the estimators as its index.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError(
                "frame needs pandas, which is not installed: pip install pandas, or use records"
            ) from error
        return pandas.DataFrame(list(self.records)).set_index("estimator")

    def write(self, path: str | Path) -> None:
        r"""Writes the records as a CSV file."""
        write_csv(path, list(self.records))

    def plot(self, path: str | Path, group: str | None = None) -> None:
        r"""Plots the variance of a group's gradient against the time of a step.

        Arguments:
            path: The path of the file, ``.png``, ``.pdf`` or ``.svg``.
            group: The group, by default the first one. Estimators whose variance is no more than
                rounding are left out.
        """
        group = self.groups[0] if group is None else group
        check_choice("group", group, tuple(self.groups))
        unit = next(r for r in self.records if r["estimator"] == self.baseline)
        points = [
            {
                "name": r["estimator"],
                "group": "baseline" if r is unit else "compared",
                "cost": r["ms"],
                "variance": r[f"{group}_variance"] / (unit[f"{group}_variance"] or 1.0),
                "label": True,
            }
            for r in self.records
        ]
        points = [point for point in points if point["variance"] > 1e-12]
        plot_pareto(points, path, f"Gradient of the {group}: variance against cost")

    def __str__(self) -> str:
        header = ["estimator", "bias", "variance", "ms"]
        header += [f"{what}: {g}" for what in ("gradient", "multiplier") for g in self.groups]
        rows = [header]
        for r in self.records:
            keys = ["bias", "variance", "ms"]
            keys += [f"{g}_{what}" for what in ("variance", "merit") for g in self.groups]
            cells = [f"{r[key]:.3g} ± {r.get(f'{key}_se', 0.0):.1g}" for key in keys]
            rows.append([r["estimator"], *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join(lines)


def compare(
    model: Callable,
    guide: Callable,
    data: Data,
    estimators: Mapping[str, Estimator],
    *,
    baseline: str | None = None,
    reference: Estimator | Reference | None = None,
    groups: Groups | None = None,
    draws: int = 100,
    repeats: int = 21,
    warmup: int = 10,
    seed: int = 0,
) -> Comparison:
    r"""Returns bias, variance and cost of estimators of one ELBO, as a table.

    The programs may be any, with a diffusion prior or without: SVI would train them with each of
    the estimators. Their parameters, and Pyro's parameter store, stay as they are. Values are in
    nats per datum, and standard errors are those of one sigma. There is a row per estimator, with
    the columns

    ====================== ========================================================================
    column                 meaning
    ====================== ========================================================================
    ``estimator``          its name
    ``draws``              the number of independent evaluations
    ``bias``               mean of the loss minus that of the reference
    ``sd``                 standard deviation of the loss
    ``variance``           its square
    ``difference``         mean of the loss minus that of the baseline, by common random numbers
    ``GROUP_variance``     variance of the gradient: the trace of its covariance
    ``GROUP_snr``          length of its mean over the root of its variance, 0 if not resolved
    ``GROUP_bias``         relative bias along the reference's gradient
    ``megabytes``          peak memory of the tensors that a training step makes
    ``ms``                 median time of a training step, measured in turns
    ``GROUP_merit``        effective compute multiplier: variance × time of the baseline, as a
                           multiple of the estimator's; larger is better
    ====================== ========================================================================

    for each ``GROUP`` of parameters. ``bias``, ``variance``, ``difference``, ``ms`` and all of a
    group's but ``GROUP_snr`` come with a standard error, in a column of the same name and ``_se``;
    ``ms_se`` is empty of steps that take more than a second, which are timed once.

    Arguments:
        model: The model.
        guide: The guide.
        data: The argument of both, a batch of data, or a tuple of all arguments, whose first one
            is. Without arguments, ``()``, there is one datum.
        estimators: The estimators by name, such as Pyro's or your own.
        baseline: The one that the others are compared with, by default the first.
        reference: What they should give: a :class:`Reference`, or an unbiased estimator which is
            drawn ``draws`` times. By default, that is ``Timestep_ELBO("all")`` with antithetic
            pairs of particles, which needs reparameterized guides; otherwise use Pyro's
            ``Trace_ELBO(num_particles=10)``.
        groups: The groups, modules or parameters by name, such as ``{"encoder": vae.encoder}``. By
            default, there is one of the model and one of the guide.
        draws: The number of draws behind every variance.
        repeats: How many times each training step is timed.
        warmup: How many evaluations an estimator may learn from before it is measured.
        seed: The seed of all draws; those of different estimators have common random numbers.

    Returns:
        The table.

    Raises:
        ValueError: If there is no estimator, the baseline is none, or there is nothing to train.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     loc = pyro.param("loc", torch.zeros(len(x)))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(loc, 1.0))
        >>> both = {"sampled": Trace_ELBO(), "closed form": TraceMeanField_ELBO()}
        >>> comparison = compare(model, guide, torch.randn(50), both, repeats=3)
        >>> sampled, closed_form = comparison.records
        >>> abs(sampled["bias"]) < 5 * sampled["bias_se"]
        True
        >>> closed_form["guide_variance"] < sampled["guide_variance"]
        True
    """
    if not estimators:
        raise ValueError("estimators must hold at least one estimator by name, got none")
    baseline = next(iter(estimators)) if baseline is None else baseline
    check_choice("baseline", baseline, tuple(estimators))
    for name, value, least in (("draws", draws, 4), ("repeats", repeats, 1), ("warmup", warmup, 0)):
        check_whole(name, value, least)
    check_seed(seed, "seed")
    entries = [
        Entry(name, "", lambda elbo=elbo: elbo, warmup=warmup)  # type: ignore[misc]
        for name, elbo in estimators.items()
    ]
    if reference is None:
        reference = Timestep_ELBO("all", **ANTITHETIC_PAIRS)
    with common_random_numbers(seed), own_store():
        programs = find_programs(model, guide, data, estimators[baseline], groups)
        if not isinstance(reference, Reference):
            reference = estimated_reference(reference, programs, data, draws)
        rows = [measure(entry, programs, data, reference, draws, seed=seed) for entry in entries]
        costs = measure_costs(entries, programs, data, repeats)
    losses = {record["estimator"]: sample.values for record, sample in rows}
    records = []
    for record, sample in rows:
        difference = Difference.of(sample.values, losses[baseline])
        paired = {"difference": difference.mean, "difference_se": difference.se}
        kept = {key: value for key, value in record.items() if key not in FOR_PAGES}
        records.append(kept | paired | costs[record["estimator"]])
    add_merits(records, baseline)
    return Comparison(records, baseline, tuple(programs.groups), reference)


# Columns of the bench's own pages.
FOR_PAGES = ("group", "counterexample", "predicted_bias", "predicted_bias_se")
