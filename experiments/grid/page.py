r"""What the cells of a grid found: tables and pictures; see the docstring of ``table.py``."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch
from run import parse_args
from torch import Tensor

from pyro_vaediff.data import ImageData, load
from pyro_vaediff.evaluate import preprocess
from pyro_vaediff.files import read_json, write_atomically, write_csv
from pyro_vaediff.plotting import save_panels
from pyro_vaediff.sampling import point, reconstruct, sample
from pyro_vaediff.train import load_vae
from pyro_vaediff.train.report import pixel_space
from pyro_vaediff.train.runs import BEST

from .cells import Cell, Preset
from .cost import plot_cost
from .summary import flatten, page, summarize, with_all_keys

NUM_IMAGES = 36  # in a panel of a picture


def read_records(preset: Preset, out: Path) -> list[dict[str, Any]]:
    r"""Returns the numbers of the finished cells."""
    keys = ("dataset", "latent_dim", "row", "seed")
    return [
        {key: getattr(cell, key) for key in keys} | flatten(cell.results(out))
        for cell in preset.cells
        if cell.is_finished(out)
    ]


def write_tables(preset: Preset, out: Path) -> str:
    r"""Writes the tables of the cells that are finished, and returns the page.

    Raises:
        ValueError: If there are none.
    """
    records = read_records(preset, out)
    if not records:
        raise ValueError(f"no run in {out} is finished yet: there is nothing to summarize")
    write_csv(out / "table.csv", with_all_keys(records))
    write_csv(out / "summary.csv", summarize(records))
    pictures = {
        dataset: [path.name for path in picture_paths(dataset, out) if path.exists()]
        for dataset in preset.datasets
    }
    text = page(
        preset.title,
        caption(preset, records, out),
        records,
        preset.datasets,
        preset.rows,
        preset.latent_dims,
        len(preset.seeds),
        pictures,
        preset.reference,
    )
    write_atomically(out / "table.md", lambda file: file.write(text.encode()))
    return text


def caption(preset: Preset, records: list[dict[str, Any]], out: Path) -> str:
    r"""Returns where the numbers come from, in sentences."""
    results = [cell.folder(out) / "results.json" for cell in preset.cells if cell.is_finished(out)]
    configs = [read_json(path.with_name("config.json")) for path in results]
    torches, devices = (
        " and ".join(sorted({str(config[key]) for config in configs}))
        for key in ("torch", "device")
    )
    days = [datetime.date.fromtimestamp(path.stat().st_mtime) for path in results]
    dates = " to ".join(str(day) for day in sorted({min(days), max(days)}))
    hours = sum(record["training_seconds"] for record in records) / 3600
    if len(preset.seeds) > 1:
        seeds = f"mean ± sd over the seeds {', '.join(map(str, preset.seeds))}"
        seeds += f" (n where there are not {len(preset.seeds)} yet)"
    else:
        seeds = f"seed {preset.seeds[0]}"
    return (
        f"Preset `{preset.name}`, {seeds}. Less is better; the best of each column is bold, with "
        "all that differ from it by less than the combined standard error. "
        f"{len(records)} of {len(preset.cells)} runs are finished, {hours:.1f} hours of training "
        f"in all, with torch {torches} on {devices}, {dates}."
    )


# Pictures -----------------------------------------------------------------------------------------


def picture_paths(dataset: str, out: Path) -> tuple[Path, Path, Path]:
    return (
        out / f"samples-{dataset}.png",
        out / f"reconstructions-{dataset}.png",
        out / f"cost-{dataset}.png",
    )


def has_model(cell: Cell, out: Path) -> bool:
    return cell.is_finished(out) and (cell.folder(out) / BEST).exists()


def load_images(cell: Cell) -> ImageData | None:
    r"""Returns the first images of the data set of a cell, if it is on this machine."""
    args = parse_args(cell.words)
    options = {name: getattr(args, name) for name in ("image_size", "groups")}
    limit = min(args.limit or NUM_IMAGES, NUM_IMAGES)
    try:
        return load(args.dataset, args.root, download=False, limit=limit, **options)
    except (OSError, ValueError) as error:
        print(f"no picture of reconstructions: {str(error).partition(chr(10))[0]}")
        return None


@torch.no_grad()
def decoded(
    cell: Cell, out: Path, data: ImageData | None, device: torch.device
) -> list[Tensor | None]:
    r"""Returns samples of the best model of a cell and reconstructions of the test images."""
    if not has_model(cell, out):
        return [None, None]
    vae, _ = load_vae(cell.folder(out), device)
    space = pixel_space(vae)
    torch.manual_seed(cell.seed)
    pictures = [space.to_unit(point(vae.decoder(sample(vae.prior, NUM_IMAGES))))]
    if data is None:
        return [*pictures, None]
    return [*pictures, space.to_unit(reconstruct(vae, preprocess(vae, data.test)))]


def save_pictures(preset: Preset, out: Path, device: torch.device) -> None:
    r"""Writes figures 1 and 2 of the paper, from the models of the first seed, and the cost of
    nats, from all that are finished."""
    records = read_records(preset, out)
    first = [cell for cell in preset.cells if cell.seed == preset.seeds[0]]
    for dataset, title in preset.datasets.items():
        cells = [cell for cell in first if cell.dataset == dataset]
        samples, reconstructions, cost = picture_paths(dataset, out)
        if own := [record for record in records if record["dataset"] == dataset]:
            plot_cost(own, preset.rows, preset.published[dataset], f"{title}: nats and cost", cost)
        if not any(has_model(cell, out) for cell in cells):
            continue
        data, width = load_images(cells[0]), len(preset.rows)
        pairs = [decoded(cell, out, data, device) for cell in cells]
        # Cells are in the order of the table: rows side by side, latent sizes below each other.
        table = [pairs[i : i + width] for i in range(0, len(pairs), width)]
        columns = list(preset.rows.values())
        labels = [f"D = {dim}" for dim in preset.latent_dims[dataset]]
        panels = [[pair[0] for pair in row] for row in table]
        save_panels(panels, samples, columns, labels, f"{title}: samples")
        if data is not None:
            images = data.test.double() / (data.levels - 1)
            panels = [[images, *(pair[1] for pair in row)] for row in table]
            columns = ["test images", *columns]
            save_panels(panels, reconstructions, columns, labels, f"{title}: reconstructions")
