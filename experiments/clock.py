r"""Trains models from scratch by the clock: who is ahead after 15, 30 and 60 seconds?

    python experiments/clock.py priors
    python experiments/clock.py estimators --dataset fashion-mnist --budgets 45 180 1200

The machine must be idle: the seconds are those of training and validation, on one core.
``priors`` compares priors, each as ``run.py`` trains it by default and with a new recipe:

    --lr-schedule inverse-sqrt --ema-share 0.1 --validate-every 5

and for a diffusion prior also ``--denoiser preconditioned --gaussian-epochs auto --k auto``. By
default, the data are the digits in the split of a peer (the first 1,000 images are for training,
350 for validation, 447 for test), with 17 levels of gray as categories and D = 16. ``estimators``
compares numbers of timesteps of the diffusion prior, on any data.

No training knows when it ends. Hence one run as long as the largest budget has the results of all:
for each budget, the best model by validation so far, whose test -ELBO (all timesteps) is computed
after the run.

The folder ``--out`` then holds

    settings.json   the settings that all runs have in common
    runs/*.csv      a file per run: a row per budget
    clock.csv       all of them
    clock.md        the page to read: means and standard deviations over seeds

Runs whose file is there are not repeated. ``--quick`` takes seconds, and has no meaning.
"""

from __future__ import annotations

import argparse
import csv
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from common import exit_on_error, provenance
from study import check_settings, statistic, table

from pyro_vaediff.arguments import check_seed, check_whole, folder
from pyro_vaediff.data import DATASETS, ImageData, load
from pyro_vaediff.evaluate import evaluate, value_elbo
from pyro_vaediff.files import check_folder, write_atomically, write_csv
from pyro_vaediff.infer import Timestep_ELBO
from pyro_vaediff.train import ModelConfig, TrainConfig, Trainer
from pyro_vaediff.train.options import positive
from pyro_vaediff.vae import VAE


@dataclass(frozen=True)
class Recipe:
    r"""How a prior is trained.

    Arguments:
        model: Options of :class:`~pyro_vaediff.train.ModelConfig`.
        training: Options of :class:`~pyro_vaediff.train.TrainConfig`.
        elbo: Options of :class:`~pyro_vaediff.infer.Timestep_ELBO`.
        auto_k: Whether the number of timesteps follows the noise.
    """

    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    elbo: dict[str, Any] = field(default_factory=dict)
    auto_k: bool = False


NEW: dict[str, Any] = {"lr_schedule": "inverse-sqrt", "ema_share": 0.1, "validate_every": 5}
FIRST = {"gaussian_epochs": "auto"}
DIFFUSION = {"prior": "diffusion"}
PRECONDITIONED = DIFFUSION | {"denoiser": "preconditioned"}
SINGLE = {"low_discrepancy": True, "antithetic": False, "entropy": "exact"}
RECIPES: dict[str, dict[str, Recipe]] = {
    "priors": {
        "N(0, I)": Recipe({"prior": "gaussian"}),
        "N(0, I), new": Recipe({"prior": "gaussian"}, NEW),
        "flow": Recipe({"prior": "flow"}),
        "flow, new": Recipe({"prior": "flow"}, NEW | FIRST),
        "diffusion": Recipe(DIFFUSION),
        "diffusion, new": Recipe(PRECONDITIONED, NEW | FIRST, auto_k=True),
    },
    "estimators": {
        "k=1": Recipe(DIFFUSION, elbo=SINGLE | {"k": 1}),
        **{f"k={k}, antithetic, path": Recipe(DIFFUSION, elbo={"k": k}) for k in (2, 4, 8, 16)},
        "k=auto, antithetic, path": Recipe(DIFFUSION, auto_k=True),
        "new recipe": Recipe(PRECONDITIONED, NEW | FIRST, auto_k=True),
    },
}
PEER = (1000, 350, 447)  # images of the digits, in their order
FREE = ("seeds", "recipes", "networks", "root", "no_download", "out", "quiet")


def load_data(args: argparse.Namespace) -> ImageData:
    r"""Returns the images; the digits in the split of the peer."""
    if args.dataset != "digits":
        return load(args.dataset, args.root, download=not args.no_download, limit=args.limit)
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).to(torch.uint8).unsqueeze(1)
    train, validation, test = (part[: args.limit] for part in images.split(PEER))
    return ImageData("digits", train, validation, test, levels=17)


def train(
    recipe: Recipe, networks: str, data: ImageData, args: argparse.Namespace, seed: int
) -> list[dict[str, Any]]:
    r"""Returns a row per budget: the seconds, what was done in them, and the test -ELBO."""
    model = ModelConfig(
        latent_dim=args.latent_dim,
        image_shape=data.image_shape,
        levels=data.levels,
        likelihood=args.likelihood,
        networks=networks,
        width=args.width,
        num_timesteps=args.num_timesteps,
        **recipe.model,
    )
    config = TrainConfig(
        epochs=10**6,
        max_seconds=max(args.budgets),
        batch_size=args.batch_size,
        lr=args.lr,
        clip_norm=1000.0,
        seed=seed,
        **recipe.training,
    )
    best: dict[float, VAE] = {}
    rows: dict[float, dict[str, Any]] = {}

    def keep(record: dict[str, float]) -> None:
        new = trainer.best_model() if trainer.best_epoch() == len(trainer.history) else None
        for budget in args.budgets:
            # An epoch may take longer than a budget, and the clock cuts the last one short.
            end = budget == max(args.budgets) and trainer.is_finished()
            if trainer.seconds <= budget or end or budget not in rows:
                best[budget] = new or best[budget]
                k = trainer.auto_k.k if trainer.auto_k else recipe.elbo.get("k", 8)
                rows[budget] = {
                    "budget": budget, "seconds": round(trainer.seconds, 2), "k": k,
                    "epochs": len(trainer.history), "steps": trainer.steps,
                }  # fmt: skip

    elbo = Timestep_ELBO(**recipe.elbo)
    trainer = Trainer.from_config(model, config, elbo, data, on_epoch=keep, auto_k=recipe.auto_k)
    trainer.fit(progress=False)
    bound = value_elbo(args.test_k) if args.test_k else None
    for budget, row in rows.items():
        terms = evaluate(best[budget], data.test[: args.num_test], bound)
        row["loss"] = round(sum(terms.values()), 4)
    return list(rows.values())


# Files --------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def summarize(records: list[dict[str, Any]], budgets: list[float]) -> list[str]:
    r"""Returns the lines of a table with a row per networks and recipe."""
    rows = []
    for networks, name in dict.fromkeys((r["networks"], r["recipe"]) for r in records):
        mine = [r for r in records if (r["networks"], r["recipe"]) == (networks, name)]
        cells = []
        for budget in budgets:
            at = [float(r["loss"]) for r in mine if float(r["budget"]) == budget]
            cells.append(statistic(at).text(2) if at else "")
        last = [r for r in mine if float(r["budget"]) == max(budgets)]
        steps = f"{statistic([float(r['steps']) for r in last]).mean:.0f}" if last else ""
        k = ", ".join(dict.fromkeys(str(r["k"]) for r in last))
        rows.append([networks, name, str(len({r["seed"] for r in mine})), *cells, steps, k])
    times = [f"{budget:g} s" for budget in budgets]
    return table(["networks", "recipe", "seeds", *times, "steps", "k at the end"], rows)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", choices=RECIPES, help="what is compared")
    add("--dataset", choices=DATASETS, default="digits", help="(%(default)s)")
    add("--root", default="data", help="where the data are (%(default)s)")
    add("--no-download", action="store_true", help="never download data")
    add("--limit", type=int, help="at most this many images per split")
    add("--recipes", nargs="+", metavar="NAME", help="some of them (all)")
    add("--networks", nargs="+", choices=("mlp", "default"), help="(mlp default; or default)")
    add("--budgets", type=float, nargs="+", default=[15.0, 30.0, 60.0], help="seconds (15 30 60)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    add("--likelihood", help="(categorical for the digits, else gaussian)")
    add("--latent-dim", type=int, help="(16 for the digits, else 40)")
    add("--width", type=int, help="of convolutions (32 for the digits, else 16)")
    add("--num-timesteps", type=int, default=1000, help="T (%(default)s)")
    add("--batch-size", type=int, default=100, help="(%(default)s)")
    add("--lr", type=float, default=1e-3, help="of Adam (%(default)s)")
    add("--num-test", type=int, default=1000, help="test images (%(default)s)")
    add("--test-k", type=int, default=0, help="timesteps per test image, 0: all (%(default)s)")
    add("--quick", action="store_true", help="a few seconds, without meaning")
    add("--quiet", action="store_true", help="print the table only")
    add("--out", type=folder, help="(runs/clock-STUDY-DATASET)")
    args = parser.parse_args(argv)
    digits = args.dataset == "digits"
    args.likelihood = args.likelihood or ("categorical" if digits else "gaussian")
    args.latent_dim = args.latent_dim or (16 if digits else 40)
    args.width = args.width or (32 if digits else 16)
    args.networks = args.networks or (["mlp", "default"] if args.study == "priors" else ["default"])
    args.recipes = args.recipes or list(RECIPES[args.study])
    args.out = args.out or Path("runs") / f"clock-{args.study}-{args.dataset}"
    if args.quick:
        args.budgets, args.seeds, args.limit, args.num_timesteps = [0.2, 0.4], [0], 40, 10
        args.batch_size, args.width = 20, 4
    if unknown := [name for name in args.recipes if name not in RECIPES[args.study]]:
        names = ", ".join(map(repr, RECIPES[args.study]))
        parser.error(f"unknown recipe {unknown[0]!r}: choose from {names}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_folder("--out", args.out)
    for name in ("latent_dim", "width", "num_timesteps", "batch_size", "num_test"):
        check_whole(f"--{name.replace('_', '-')}", getattr(args, name))
    for budget in args.budgets:
        positive("each of --budgets", budget)
    for seed in args.seeds:
        check_seed(seed, "each of --seeds")
    pyro.enable_validation(False)
    torch.distributions.Distribution.set_default_validate_args(False)
    torch.set_num_threads(1)
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    check_settings(args.out / "settings.json", settings)
    data, records = load_data(args), []
    # Seed by seed, such that a comparison that is stopped has all recipes of some seeds.
    runs = [(s, n, r) for s in args.seeds for n in args.networks for r in args.recipes]
    for seed, networks, name in runs:
        slug = re.sub("[^a-z0-9]+", "-", f"{networks}-{name}".lower()).strip("-")
        path = args.out / "runs" / f"{slug}-s{seed}.csv"
        if not path.exists():
            rows = train(RECIPES[args.study][name], networks, data, args, seed)
            write_csv(
                path, [{"networks": networks, "recipe": name, "seed": seed} | r for r in rows]
            )
        kept = read_rows(path)
        records += kept
        if not args.quiet:
            line = ", ".join(f"{r['budget']} s: {r['loss']}" for r in kept)
            print(f"{networks}, {name}, seed {seed}: {line}", flush=True)
    text = "\n".join(
        [
            f"# By the clock: {args.study}, {args.dataset}",
            "",
            f"Test −ELBO in nats, on {provenance(torch.device('cpu'))}"
            f"{' (--quick: without meaning)' if args.quick else ''}.",
            "",
            *summarize(records, sorted(args.budgets)),
        ]
    )
    print(f"\n{text}\n\nwritten to {args.out}")
    write_csv(args.out / "clock.csv", records)
    write_atomically(args.out / "clock.md", lambda file: file.write(f"{text}\n".encode()))


if __name__ == "__main__":
    with exit_on_error("what is done is kept"):
        main()
