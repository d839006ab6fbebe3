r"""What the studies share: statistics over seeds, tables in Markdown, settings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_vaediff.files import read_json, write_json

__all__ = ["Statistic", "check_settings", "number", "statistic", "table"]


@dataclass(frozen=True)
class Statistic:
    r"""A number over seeds.

    Arguments:
        mean: Its mean.
        sd: Its standard deviation, with n - 1 in the denominator; NaN for one seed.
        n: The number of seeds.
    """

    mean: float
    sd: float
    n: int

    @property
    def standard_error(self) -> float:
        r"""The standard error of the mean, NaN for one seed."""
        return self.sd / math.sqrt(self.n)

    def ties(self, best: Statistic) -> bool:
        r"""Returns whether the mean is within the combined standard error of the best one."""
        error = math.hypot(self.standard_error, best.standard_error)
        return self.mean == best.mean or abs(self.mean - best.mean) <= error

    def text(self, digits: int, spread: str = "sd") -> str:
        r"""Returns the mean ± the ``"sd"`` or the ``"standard_error"``, to be read."""
        text = number(self.mean, digits)
        return text if self.n == 1 else f"{text} ± {number(getattr(self, spread), digits)}"


def statistic(values: Sequence[float]) -> Statistic:
    r"""Returns the statistic of the values of all seeds, at least one.

    Example:
        >>> statistic([1.0, 2.0, 6.0])
        Statistic(mean=3.0, sd=2.6457513110645907, n=3)
    """
    if not values:
        raise ValueError("values must hold at least one number, got none")
    if not all(map(math.isfinite, values)):
        return Statistic(math.nan, math.nan, len(values))
    sd = statistics.stdev(values) if len(values) > 1 else math.nan
    return Statistic(statistics.fmean(values), sd, len(values))


def number(value: float, digits: int, sign: str = "") -> str:
    r"""Returns a number to be read, with a minus sign in place of a hyphen, and no −0.00."""
    text = f"{value:{sign},.{digits}f}"
    if text.startswith("-") and not text.strip("-0.,"):
        text = f"{0.0:{sign}.{digits}f}"
    return text.replace("-", "−")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    r"""Returns the lines of a Markdown table.

    Arguments:
        header: The names of the columns.
        rows: The texts of the cells.

    Example:
        >>> print("\n".join(table(["prior", "FID"], [["a | b", "-1.0"]])))
        | prior | FID |
        |---|---|
        | a \| b | -1.0 |
    """
    cells = [[text.replace("|", r"\|") for text in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    r"""Raises a ``ValueError`` if a file remembers other settings; a new one remembers these."""
    settings = {
        name: v if isinstance(v, bool | int | float | list | None) else str(v)
        for name, v in settings.items()
    }
    if not path.exists():
        write_json(path, settings)
    old = read_json(path)
    differences = [
        f"{name}={settings.get(name)!r} in place of {old.get(name)!r}"
        for name in {**old, **settings}
        if old.get(name) != settings.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path.parent} was run with other settings, now there is {', '.join(differences)}: "
            "choose another --out"
        )
