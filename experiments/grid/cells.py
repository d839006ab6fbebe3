r"""The cells of a grid of runs, from a preset in TOML; see the docstring of ``table.py``."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import run

from pyro_vaediff.data import DATASETS
from pyro_vaediff.priors import PRIORS

from .cell import Cell

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["PRESETS", "Cell", "Preset", "read_preset"]

PRESETS = Path(__file__).parents[1] / "presets"
TABLES = ("title", "reference", "settings", "datasets", "rows", "latent-dims", "seeds", "overrides")
# What a preset leaves to the grid.
RESERVED = ("out", "resume", "quiet", "device", "seed", "latent-dim")
CONDITIONS = {"datasets": "dataset", "rows": "row", "latent-dims": "latent_dim", "seeds": "seed"}


@dataclass(frozen=True)
class Preset:
    r"""A grid.

    Arguments:
        name: The name of its file, without the suffix.
        title: The title of the table.
        datasets: The titles of the data sets by their names.
        rows: The titles of the rows by their names.
        published: What others have published of each data set, -log p(x) in nats by its source.
        latent_dims: The latent sizes of each data set.
        seeds: The seeds.
        reference: The row that the others are compared with.
        cells: All runs. Seeds are outermost, such that a grid which is stopped has whole tables.
    """

    name: str
    title: str
    datasets: dict[str, str]
    rows: dict[str, str]
    published: dict[str, dict[str, float]]
    latent_dims: dict[str, list[int]]
    seeds: list[int]
    reference: str | None
    cells: list[Cell]


def read_preset(
    preset: str,
    seeds: Sequence[int] | None = None,
    paths: Mapping[str, str | Mapping[str, str]] | None = None,
) -> Preset:
    r"""Reads a preset, and checks the options of every run.

    Arguments:
        preset: The name of a file in ``experiments/presets``, or a path.
        seeds: The seeds, in place of those of the preset.
        paths: Options that are paths on this machine: one for all data sets, or by data set.

    Raises:
        FileNotFoundError: If there is no such preset.
        ValueError: If it is not valid, in one line that names what and where.
    """
    path = Path(preset) if preset.endswith(".toml") else PRESETS / f"{preset}.toml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in PRESETS.glob("*.toml")))
        raise FileNotFoundError(f"no preset at {path}: give the path of a .toml file, or {names}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    try:
        return make_preset(path.stem, content, seeds, paths or {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def make_preset(
    name: str,
    content: dict[str, Any],
    seeds: Sequence[int] | None,
    paths: Mapping[str, str | Mapping[str, str]],
) -> Preset:
    r"""Returns the preset with that content."""
    check_names("the preset", content, TABLES)
    settings = read_options("[settings]", content.get("settings", {}))
    datasets, rows = (read_tables(content, key) for key in ("datasets", "rows"))
    dims = content.get("latent-dims")
    latent_dims = {
        dataset: read_integers(f"latent-dims of {dataset}", options.pop("latent-dims", dims), 1)
        for dataset, options in datasets.items()
    }
    published = {
        dataset: read_published(f"published of {dataset}", options.pop("published", {}))
        for dataset, options in datasets.items()
    }
    seeds = read_integers("seeds", content.get("seeds", [0]) if seeds is None else list(seeds), 0)
    titles, row_titles = (
        {k: str(v.pop("title", k)) for k, v in part.items()} for part in (datasets, rows)
    )
    for option, path in paths.items():
        by_dataset = dict.fromkeys(datasets, path) if isinstance(path, str) else path
        check_names(f"--{option}", by_dataset, datasets)
        for dataset, value in by_dataset.items():
            datasets[dataset][option] = value
    init_rows = {row: options.pop("init-row", None) for row, options in rows.items()}
    for row, init in init_rows.items():
        # The rows before it, so that a grid which runs in order never waits.
        before = list(rows)[: list(rows).index(row)]
        check_names(f"[rows.{row}]: init-row", [] if init is None else [init], before)
    for kind, tables in (("datasets", datasets), ("rows", rows)):
        for key, options in tables.items():
            read_options(f"[{kind}.{key}]", options)
    overrides = read_overrides(content.get("overrides", []), datasets, rows)

    cells = []
    for seed in seeds:
        for dataset, latent_dim in ((d, dim) for d in datasets for dim in latent_dims[d]):
            for row in rows:
                cell = Cell(dataset, row, latent_dim, seed, init_row=init_rows[row])
                options = {"dataset": dataset if dataset in DATASETS else None, "prior": row}
                options |= settings | datasets[dataset] | rows[row]
                for conditions, others in overrides:
                    if all(getattr(cell, name) in values for name, values in conditions.items()):
                        options |= others
                options |= {"latent-dim": latent_dim, "seed": seed}
                cells.append(check_cell(replace(cell, options=options)))
    title, reference = str(content.get("title", name)), content.get("reference")
    check_names("reference", [] if reference is None else [reference], rows)
    return Preset(name, title, titles, row_titles, published, latent_dims, seeds, reference, cells)


def read_overrides(
    overrides: Any, datasets: Mapping[str, Any], rows: Mapping[str, Any]
) -> list[tuple[dict[str, list[Any]], dict[str, Any]]]:
    r"""Returns for each override its conditions, by the attributes of a cell, and its options."""
    if not isinstance(overrides, list) or not all(isinstance(part, dict) for part in overrides):
        raise ValueError(f"overrides must be tables, [[overrides]], got {overrides!r}")
    pairs = []
    for i, part in enumerate(overrides, start=1):
        where = f"[[overrides]] number {i}"
        given = {key: part[key] for key in CONDITIONS if key in part}
        for key, values in given.items():
            if not isinstance(values, list) or not all(isinstance(v, int | str) for v in values):
                raise ValueError(f"{where}: {key} must be a list, got {values!r}")
        for key, known in (("datasets", datasets), ("rows", rows)):
            check_names(f"{where}: {key}", given.get(key, []), known)
        options = read_options(where, {k: v for k, v in part.items() if k not in CONDITIONS})
        pairs.append(({CONDITIONS[key]: values for key, values in given.items()}, options))
    return pairs


def check_cell(cell: Cell) -> Cell:
    r"""Returns the cell with its number of epochs, once ``run.py`` takes its options."""
    if cell.options["dataset"] is None:
        raise ValueError(f"[datasets.{cell.dataset}] needs dataset = one of {', '.join(DATASETS)}")
    if cell.options["prior"] not in PRIORS:
        prior = cell.options["prior"]
        raise ValueError(
            f"[rows.{cell.row}] has the unknown prior {prior!r}: choose one of {', '.join(PRIORS)}"
        )
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            args = run.parse_args(cell.words)
    except SystemExit:
        message = errors.getvalue().strip().rpartition("error: ")[2]
        raise ValueError(f"{cell.name}: {' '.join(message.split())}") from None
    return replace(cell, epochs=args.epochs + args.prior_epochs)


def read_tables(content: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    r"""Returns tables of options by name, of which there must be at least one."""
    tables = content.get(key)
    if not isinstance(tables, dict) or not tables:
        raise ValueError(f"at least one table [{key}.NAME] is needed")
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"{key}.{name} must be a table, [{key}.{name}], got {table!r}")
        # They are parts of paths, and must not lead out of the folder.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"[{key}.{name}]: a name has letters, digits and . _ - only, and starts with one "
                "of the former or _"
            )
    return {name: dict(table) for name, table in tables.items()}


def read_published(where: str, numbers: Any) -> dict[str, float]:
    r"""Returns a table of numbers by their source, if that is what it is."""
    if not isinstance(numbers, dict) or not all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in numbers.values()
    ):
        raise ValueError(f"{where} must be a table of numbers, got {numbers!r}")
    return {source: float(value) for source, value in numbers.items()}


def read_options(where: str, options: Any) -> dict[str, Any]:
    r"""Returns a table of options of ``run.py``, if that is what it is."""
    if not isinstance(options, dict):
        raise ValueError(f"{where} must be a table, got {options!r}")
    known = [name.replace("_", "-") for name in vars(run.parse_args([]))]
    for name, value in options.items():
        if name in RESERVED:
            raise ValueError(f"{where} has {name!r}, which is an option or a list of the grid")
        check_names(where, [name], known)
        parts = value if isinstance(value, list) else [value]
        # It is a word of a command line, where it would be another option.
        if dashed := [part for part in parts if isinstance(part, str) and part.startswith("-")]:
            raise ValueError(f"{where}: {name} must not start with a dash, got {dashed[0]!r}")
        if not all(isinstance(part, bool | int | float | str) for part in parts):
            raise ValueError(
                f"{where}: {name} must be a number, a text, true, false or a list, got {value!r}"
            )
    return options


def read_integers(name: str, values: Any, least: int) -> list[int]:
    r"""Returns a list of different integers, of which there must be at least one."""
    if (
        not isinstance(values, list)
        or not values
        or not all(type(value) is int and value >= least for value in values)
        or len(set(values)) < len(values)
    ):
        raise ValueError(f"{name} must be a list of different integers >= {least}, got {values!r}")
    return values


def check_names(where: str, names: Any, known: Any) -> None:
    r"""Raises a ``ValueError`` if there is a name which is not known."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), list(known), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            raise ValueError(f"{where} has the unknown name {name!r}: {hint}")
