r"""Runs a grid of ``run.py`` and makes its table: priors x latent sizes x data sets x seeds.

    python experiments/table.py smoke
    python experiments/table.py paper --root cifar10=/data --root celeba=/data --jobs 2

The first argument is the name of a preset in ``experiments/presets``, or the path of a TOML file of
your own. The folder ``--out`` then holds

    table.md               the page to read: for every data set, mean ± sd over seeds
    table.csv              every number of every run that is finished: one row per run
    summary.csv            mean, sd and number of seeds of every number
    samples-*.png          of every data set: samples of the priors side by side
    reconstructions-*.png  of every data set: test images and their reconstructions
    cost-*.png             of every data set: nats against hours of training
    cells/*/*              the run directories, DATASET/LATENTDIM-ROW-sSEED

A run directory also has cell.json (the settings), log.txt (the command and what it printed) and
lock. The tables are written again whenever a run finishes, the pictures at the end or by
``--summary-only``.

It may be killed anywhere and started again: finished runs are kept, the others continue from their
last epoch. A run that is still going, because only this script was killed or because another one
works on the same folder, is waited for and never started twice: several terminals may share a
grid. Seed by seed, a grid that is stopped early has whole tables. A run that fails does not stop
the others, and is tried again at the next start.

``--jobs N`` has N runs at once, each with an equal share of the CPU's cores (unless OMP_NUM_THREADS
says how many threads). ``--only`` takes the runs whose names match, such as ``cifar10/*``,
``*diffusion*`` or ``*/40-*-s0``; ``--dry-run`` prints the names and the commands.

A preset has

    title = "..."              of the page
    latent-dims = [40, 100]    a data set may have its own
    seeds = [0, 1, 2]
    reference = "NAME"         a row that the others are compared with, in pairs of the same seed
    [settings]                 options of run.py by their long names: epochs = 250; true for a flag
    [datasets.NAME]            title, options; dataset = "..." if it is not the name; published = {
                               SOURCE = NATS }, -log p(x) that others have published
    [rows.NAME]                title, options; prior = "..." if it is not the name; init-row = a row
                               above, whose encoder and decoder the runs of this row start from
    [[overrides]]              options for the runs in all of the lists of datasets, rows,
                               latent-dims and seeds that are given here

where overrides win over rows, rows over data sets, and these over the settings. Where data are
depends on the machine: ``--root NAME=PATH``, and ``--groups NAME=FILE`` for splits that keep groups
apart.
"""

from __future__ import annotations

import argparse
import shlex
import signal
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from common import choose_device, exit_on_error
from grid.cells import read_preset
from grid.page import save_pictures, write_tables
from grid.runs import Runner, check_cell, command

from pyro_vaediff.arguments import folder
from pyro_vaediff.files import check_folder


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", help="a name in experiments/presets, or a path of a .toml file")
    parser.add_argument("--out", type=folder, help="the folder of the grid (runs/table-PRESET)")
    for name, what in (("root", "PATH"), ("groups", "FILE")):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            action="extend",
            default=[],
            metavar=f"NAME={what}",
            help=f"the --{name} of data sets of the preset on this machine",
        )
    parser.add_argument("--fid-weights", help="a local file of the Inception weights")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (%(default)s)")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="only the runs with such names"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of those of the preset")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dry-run", action="store_true", help="print the runs, and start none")
    parser.add_argument(
        "--summary-only", action="store_true", help="write tables and pictures, and start no run"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    for name in ("root", "groups"):
        if wrong := [pair for pair in getattr(args, name) if not all(pair.partition("="))]:
            parser.error(f"--{name} must be NAME=PATH, got {wrong[0]!r}")
        setattr(args, name, dict(pair.split("=", 1) for pair in getattr(args, name)))
    args.out = args.out or Path("runs") / f"table-{Path(args.preset).stem}"
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_folder("--out", args.out)
    choose_device(args.device)
    paths = {"root": args.root, "groups": args.groups}
    paths |= {"fid-weights": args.fid_weights} if args.fid_weights else {}
    preset = read_preset(args.preset, args.seeds, paths)
    for cell in preset.cells:
        check_cell(cell, args.out)
    cells = [
        cell
        for cell in preset.cells
        if any(fnmatchcase(cell.name, pattern) for pattern in args.only or ["*"])
    ]
    if not cells:
        raise ValueError(
            f"--only {' '.join(args.only)} matches no run, such as {preset.cells[0].name}"
        )
    if args.dry_run:
        for cell in cells:
            state = "finished" if cell.is_finished(args.out) else "to run"
            print(f"{cell.name} ({state})\n    {shlex.join(command(cell, args.out, args.device))}")
        return

    failed = {}
    if not args.summary_only:
        tables = partial(write_tables, preset, args.out)
        runner = Runner(cells, args.out, args.device, args.jobs, not args.quiet, tables)
        failed = runner.run()
    if args.summary_only or any(cell.is_finished(args.out) for cell in preset.cells):
        save_pictures(preset, args.out, choose_device(args.device))
        print(f"\n{write_tables(preset, args.out)}")
        print(f"written to {args.out}")
    if failed:
        lines = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise ValueError(f"{len(failed)} of {len(cells)} runs failed: {lines}")


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    with exit_on_error("the same command continues"):
        main()
