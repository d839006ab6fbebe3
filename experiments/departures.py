r"""Measures what each departure of the paper's public code from the ELBO costs, in nats.

    python experiments/departures.py

trains the same VAE on the digits with the ELBO, once per departure with that departure alone, and
once with all of them, for each of three seeds; and so with the Gaussian and the flow prior, as far
as the departures concern them. ``--dataset`` and ``--root`` are those of ``run.py``, whose defaults
the settings are that are not given.

Two numbers answer two questions.

    cost       How much worse is the model? The -ELBO of the test images, which is the bound
               whatever was trained, minus that of the model of the same seed that was trained with
               the ELBO. All timesteps, after the last epoch: nothing is selected.
    misreport  What does the objective say? Its value on the test images minus the -ELBO, both of
               the model that was trained with the ELBO (of the model's own if that has no such
               networks: BatchNorm), term by term.

The models of a seed have the same initial weights, and see the images in the same order. The
folder ``--out`` then holds

    settings.json       the settings that all runs have in common
    runs/*.json         a file per run: the terms of the test -ELBO, and what objectives report
    departures.csv      a row per run: test -ELBO, cost, Frechet distance, scales of the latents
    misreports.csv      a row per objective, seed and term
    departures.md       the tables to read: mean and standard error over seeds
    departures.png      the costs, and what the objectives report, as bars
    priors.png          three priors, with the ELBO and with all departures

The tables are written again after each run, the pictures at the end. Runs whose file is there are
not repeated: a measurement that was stopped continues, and a new seed is added to it.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import pyro
import torch
from code_2021.page import plot_departures, plot_priors, write_tables
from code_2021.runs import RUNS, measure
from common import exit_on_error, parse_device
from run import DEFAULTS
from study import check_settings
from tqdm import tqdm

from pyro_vaediff.arguments import check_seed, folder
from pyro_vaediff.data import DATASETS, load
from pyro_vaediff.files import check_folder, write_json

FREE = ("seeds", "runs", "root", "no_download", "quiet", "out", "argv")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=DATASETS, default="digits", help="(%(default)s)")
    parser.add_argument("--root", default="data", help="where the data are (%(default)s)")
    parser.add_argument("--no-download", action="store_true", help="never download data")
    parser.add_argument("--limit", type=int, help="use at most this many images per split")
    parser.add_argument(
        "--runs", nargs="+", default=list(RUNS), choices=RUNS, metavar="NAME",
        help=f"of {', '.join(RUNS)} (all)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--latent-dim", type=int, help="latent dimensions D")
    parser.add_argument("--width", type=int, help="channels of the first convolution")
    parser.add_argument("--num-timesteps", type=int, default=1000, help="T (%(default)s)")
    parser.add_argument("--epochs", type=int, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--lr", type=float, help="learning rate of Adam, falling along a cosine")
    parser.add_argument("--clip-norm", type=float, help="global gradient norm, per datum")
    parser.add_argument(
        "--num-images", type=int, default=1000, help="samples of the Fréchet distance (%(default)s)"
    )
    parser.add_argument("--device", type=parse_device, default="cpu", help="(%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--out", type=folder, help="(runs/departures-DATASET)")
    args = parser.parse_args(argv)
    for name in ("latent_dim", "width", "epochs", "lr", "clip_norm"):
        if getattr(args, name) is None:
            setattr(args, name, DEFAULTS[args.dataset][name])
    for name in ("epochs", "batch_size", "lr", "clip_norm"):
        if not 0 < (value := getattr(args, name)) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive and finite, got {value}")
    if args.num_timesteps < 3:
        parser.error(f"--num-timesteps must be at least 3, got {args.num_timesteps}")
    for seed in args.seeds:
        check_seed(seed, "each of --seeds")
    args.out = args.out or Path("runs") / f"departures-{args.dataset}"
    args.argv = sys.argv[1:] if argv is None else argv
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_folder("--out", args.out)
    pyro.enable_validation(False)
    torch.distributions.Distribution.set_default_validate_args(False)
    data = load(args.dataset, args.root, download=not args.no_download, limit=args.limit)
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    check_settings(args.out / "settings.json", settings)
    # Seed by seed, such that a measurement that is stopped has all runs of some seeds.
    runs = [(seed, name) for seed in args.seeds for name in RUNS if name in args.runs]
    for seed, name in tqdm(runs, "runs", disable=args.quiet):
        path = args.out / "runs" / f"{name}-s{seed}.json"
        if not path.exists():
            write_json(path, measure(name, data, args, seed))
            write_tables(args)
    results, text = write_tables(args)
    plot_departures(results, args.out / "departures.png")
    plot_priors(results, args.out / "priors.png")
    print(f"\n{text}\nwritten to {args.out}")


if __name__ == "__main__":
    with exit_on_error("the same command continues"):
        main()
