r"""Trains the same model with several estimators of its ELBO, for the same time each.

    python experiments/train_estimators.py --dataset fashion-mnist
    python experiments/train_estimators.py --start runs/digits-diffusion-s0

Does an estimator with less noise buy a better model? For each estimator and seed, a VAE with a
diffusion prior is trained for as many steps as fit into ``--seconds``, while the learning rate
falls to zero along a cosine, and its test -ELBO is measured at ``--points`` equidistant times. With
``--start``, training goes on from the best model of a run of ``run.py``, where the noise of the
gradient matters more than early in training.

The models of a seed start from the same weights and see the images in the same order. Every
measurement has the same images, random numbers and estimator (importance, k = 32 timesteps per
datum).

Time is the number of steps times what a step takes. The latter is measured once, before anything is
trained: the median of steps of all estimators in turns. Only then must the machine be idle
(``--seeds`` without a value measures it and stops); afterwards several comparisons may share it.

The folder ``--out`` then holds

    settings.json   the settings that all runs have in common
    times.csv       milliseconds per step
    curves/*.csv    a file per run: seconds, steps, test -ELBO
    training.csv    the end of every run: one row per estimator and seed
    training.md     the page to read: mean and standard deviation over seeds
    training.png    test -ELBO against seconds, and against steps

Runs whose file is there are not repeated: a comparison that was stopped continues, and a new
seed is added to it.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyro
import torch
from common import exit_on_error, parse_device, provenance
from estimators import ENTRIES, SERIOUS, plot_training
from study import check_settings, statistic, table
from torch import Tensor
from tqdm import tqdm

from pyro_vaediff.arguments import check_seed, folder
from pyro_vaediff.bench import Entry, step_times, training_step
from pyro_vaediff.data import DATASETS, ImageData, load
from pyro_vaediff.evaluate import evaluate, preprocess, value_elbo
from pyro_vaediff.files import check_folder, write_atomically, write_csv
from pyro_vaediff.priors import DiffusionPrior
from pyro_vaediff.sampling.samplers import check_diffusion
from pyro_vaediff.train import ModelConfig, TrainConfig, Trainer, load_data, load_vae, make_vae
from pyro_vaediff.vae import VAE

Curve = list[dict[str, float]]
CURVE = ("seconds", "steps", "loss")
FREE = ("seeds", "estimators", "root", "no_download", "quiet", "out", "title", "argv")


def measure_times(
    entries: Sequence[Entry], make: Callable[[], VAE], data: ImageData, args: argparse.Namespace
) -> dict[str, float]:
    r"""Returns the median time of a training step of each estimator, in milliseconds."""
    x = preprocess(vae := make(), data.train[: args.batch_size])
    steps = [training_step(entry, vae, x) for entry in entries]
    step_times(steps, 3, args.device)  # the first steps are slower
    times = step_times(steps, args.repeats, args.device)
    return {entry.name: time for entry, time in zip(entries, times, strict=True)}


class InOneOrder(Trainer):
    r"""A training run whose order of images is that of its seed, whatever its estimator draws."""

    order: torch.Generator | None = None

    def seed_epoch(self) -> torch.Generator:
        self.order = self.order or torch.Generator().manual_seed(self.config.seed)
        return self.order


def train(
    entry: Entry,
    vae: VAE,
    data: ImageData,
    args: argparse.Namespace,
    seed: int,
    milliseconds: float,
) -> Curve:
    r"""Returns the test -ELBO at equidistant times of a training run."""
    total = max(args.points, round(1e3 * args.seconds / milliseconds))
    test = data.test[: args.num_test]
    if entry.order is not None:
        check_diffusion(vae.prior).order = entry.order
    due = {round(total * i / args.points) for i in range(args.points + 1)}
    curve = []

    def measure(step: int) -> None:
        if step in due:
            terms = evaluate(vae, test, value_elbo(), batch_size=args.batch_size)
            seconds = step * milliseconds / 1e3
            curve.append({"seconds": seconds, "steps": step, "loss": sum(terms.values())})

    config = TrainConfig(
        epochs=total,
        max_steps=total,
        batch_size=args.batch_size,
        lr=args.lr,
        lr_schedule="cosine",
        clip_norm=args.clip_norm,
        seed=seed,
        validate_every=total,  # nothing is selected
    )
    measure(0)
    InOneOrder(vae, data, entry.make(), config, args.device, on_step=measure).fit(progress=False)
    return curve


# Files --------------------------------------------------------------------------------------------


def curve_path(out: Path, name: str, seed: int) -> Path:
    return out / "curves" / f"{re.sub('[^a-z0-9_]+', '-', name.lower())}-s{seed}.csv"


def read_curve(path: Path) -> Curve:
    curve = [{key: number(path, row, key) for key in CURVE} for row in read_rows(path)]
    if not curve:
        raise ValueError(f"{path} is damaged, mend or remove it: it has no rows")
    return curve


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def number(path: Path, row: dict[str, str], key: str) -> float:
    try:
        return float(row[key])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, mend or remove it: {row.get(key)!r} is no number of {key!r}"
        ) from error


def summarize(curves: dict[str, dict[int, Curve]]) -> tuple[list[dict[str, object]], list[str]]:
    r"""Returns a record per run, and the lines of a table with a row per estimator."""
    records = [
        {"estimator": name, "seed": seed, **{key: round(v, 3) for key, v in curve[-1].items()}}
        for name, by_seed in curves.items()
        for seed, curve in by_seed.items()
    ]
    rows = []
    for name, by_seed in curves.items():
        last = [curve[-1] for curve in by_seed.values()]
        steps, loss = last[0]["steps"], statistic([row["loss"] for row in last])
        row = [name.replace("|", "given"), str(loss.n), f"{1e3 * last[0]['seconds'] / steps:.1f}"]
        rows.append([*row, f"{steps:.0f}", loss.text(2)])
    header = ["estimator", "seeds", "ms per step", "steps", "test −ELBO (nats)"]
    return records, table(header, rows)


def columns(curve: Curve) -> dict[str, Tensor]:
    return {key: torch.tensor([row[key] for row in curve]) for key in curve[0]}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=DATASETS, default="digits", help="(%(default)s)")
    parser.add_argument(
        "--start", type=Path, metavar="RUN", help="go on from a run of run.py, with its data"
    )
    parser.add_argument("--root", default="data", help="where the data are (%(default)s)")
    parser.add_argument("--groups", type=Path, metavar="FILE", help="a folder's list of groups")
    parser.add_argument("--no-download", action="store_true", help="never download data")
    parser.add_argument(
        "--estimators", nargs="+", default=SERIOUS, metavar="NAME", help="names of the bench"
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--seconds", type=float, default=60.0, help="per run (%(default)s)")
    parser.add_argument("--repeats", type=int, default=30, help="timed steps (%(default)s)")
    parser.add_argument("--points", type=int, default=10, help="measurements (%(default)s)")
    parser.add_argument("--num-test", type=int, default=1000, help="test images (%(default)s)")
    parser.add_argument("--latent-dim", type=int, default=40, help="(%(default)s)")
    parser.add_argument("--width", type=int, default=16, help="of the networks (%(default)s)")
    parser.add_argument("--num-timesteps", type=int, default=1000, help="T (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="of Adam (%(default)s)")
    parser.add_argument("--clip-norm", type=float, default=1000.0, help="(%(default)s)")
    parser.add_argument("--device", type=parse_device, default="cpu", help="(%(default)s)")
    parser.add_argument("--title", help="of the page (the name of the data set or run)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--out", type=folder, help="(runs/training-DATASET)")
    args = parser.parse_args(argv)
    for name in ("seconds", "points", "num_test", "batch_size", "lr", "clip_norm", "repeats"):
        if not 0 < (value := getattr(args, name)) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive and finite, got {value}")
    if unknown := [name for name in args.estimators if name not in ENTRIES]:
        parser.error(f"unknown estimator {unknown[0]!r}: choose from {', '.join(ENTRIES)}")
    name = args.start.resolve().name if args.start else args.dataset
    args.out = args.out or Path("runs") / f"training-{name}"
    args.title = args.title or name
    args.argv = sys.argv[1:] if argv is None else argv
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_folder("--out", args.out)
    for seed in args.seeds:
        check_seed(seed, "each of --seeds")
    pyro.enable_validation(False)
    torch.distributions.Distribution.set_default_validate_args(False)
    if args.start is None:
        data = load(args.dataset, args.root, download=not args.no_download, groups=args.groups)
    else:
        data = load_data(args.start, args.root, not args.no_download, args.groups)
    config = ModelConfig(
        prior="diffusion",
        latent_dim=args.latent_dim,
        image_shape=data.image_shape,
        levels=data.levels,
        width=args.width,
        num_timesteps=args.num_timesteps,
    )

    def make() -> VAE:
        if args.start is not None:
            return load_vae(args.start, args.device)[0]
        return make_vae(config).to(args.device)

    if not isinstance(make().prior, DiffusionPrior):
        raise ValueError(f"--start {args.start} must have a diffusion prior")
    path = args.out / "times.csv"
    if not path.exists():
        times = measure_times([ENTRIES[name] for name in args.estimators], make, data, args)
        write_csv(path, [{"estimator": name, "ms": round(ms, 3)} for name, ms in times.items()])
    times = {row.get("estimator", ""): number(path, row, "ms") for row in read_rows(path)}
    if missing := [name for name in args.estimators if name not in times]:
        raise ValueError(f"{path} lacks {missing[0]!r}: choose another --out, or remove the file")
    if not args.seeds:
        print(f"measured the time of a step: {path}")
        return

    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    check_settings(args.out / "settings.json", settings)
    curves: dict[str, dict[int, Curve]] = {name: {} for name in args.estimators}
    # Seed by seed, such that a comparison that is stopped has all estimators of some seeds.
    runs = [(seed, name) for seed in args.seeds for name in args.estimators]
    for seed, name in tqdm(runs, "runs", disable=args.quiet):
        path = curve_path(args.out, name, seed)
        if not path.exists():
            torch.manual_seed(seed)
            write_csv(path, train(ENTRIES[name], make(), data, args, seed, times[name]))
        curves[name][seed] = read_curve(path)

    records, lines = summarize(curves)
    caption = (
        f"`{shlex.join(['python', 'experiments/train_estimators.py', *args.argv])}`: "
        f"{args.seconds:g} s per run on {provenance(args.device)}."
    )
    picture = "![Test −ELBO during training](training.png)"
    text = "\n".join([f"# Equal time: {args.title}", "", caption, "", *lines, "", picture]) + "\n"
    print(f"\n{text}")
    write_csv(args.out / "training.csv", records)
    write_atomically(args.out / "training.md", lambda file: file.write(text.encode()))
    plot_training(
        {name: [columns(c) for c in by_seed.values()] for name, by_seed in curves.items()},
        args.out / "training.png",
    )
    print(f"written to {args.out}")


if __name__ == "__main__":
    with exit_on_error():
        main()
