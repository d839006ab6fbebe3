r"""A cell of a grid: one run of ``run.py``."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pyro_vaediff.files import read_json

__all__ = ["Cell"]

# What differs from machine to machine, but not in its results.
OF_THE_MACHINE = ("root", "no-download", "fid-weights")
RESULTS, EVALUATION = "results.json", "evaluation.json"  # the latter by evaluate.py


@dataclass(frozen=True)
class Cell:
    r"""One run of the grid.

    Arguments:
        dataset: The name of its data set in the preset.
        row: The name of its row, a prior and its settings.
        latent_dim: The number of latent dimensions.
        seed: The seed.
        options: The options of ``run.py`` by their long names.
        epochs: The number of epochs that they mean.
        init_row: The row whose run it starts from, of the same data set, latent size and seed.
    """

    dataset: str
    row: str
    latent_dim: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict, compare=False)
    epochs: int = field(default=0, compare=False)
    init_row: str | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        r"""The name of the cell, and the path of its folder. A data set is a folder of cells, which
        share the statistics of its images."""
        return f"{self.dataset}/{self.latent_dim}-{self.row}-s{self.seed}"

    @property
    def init(self) -> Cell | None:
        r"""The cell that it starts from, without its options."""
        return None if self.init_row is None else replace(self, row=self.init_row, init_row=None)

    @property
    def settings(self) -> dict[str, Any]:
        r"""The options that determine the result. A list of groups is known by its name."""
        settings = {name: v for name, v in self.options.items() if name not in OF_THE_MACHINE}
        if "groups" in settings:
            settings["groups"] = Path(settings["groups"]).name
        return settings if self.init_row is None else settings | {"init-row": self.init_row}

    @property
    def words(self) -> list[str]:
        r"""The options as a command line."""
        words = []
        for name, value in self.options.items():
            if value is False:
                continue
            values = () if value is True else value if isinstance(value, list) else (value,)
            words += [f"--{name}", *map(str, values)]
        return words

    def folder(self, out: Path) -> Path:
        r"""Returns its run directory in the folder of the grid."""
        return out / "cells" / self.name

    def is_finished(self, out: Path) -> bool:
        r"""Whether it has results."""
        return (self.folder(out) / RESULTS).exists()

    def results(self, out: Path) -> dict[str, Any]:
        r"""Returns the results, and those of ``evaluate.py`` if there are any."""
        results = read_json(self.folder(out) / RESULTS)
        with contextlib.suppress(FileNotFoundError):
            more = read_json(self.folder(out) / EVALUATION)
            results |= {name: more[name] for name in more if name not in ("options", "seconds")}
        return results
