r"""Trades rate for distortion: models of the digits that are trained with another weight of the KL.

    python experiments/rate_distortion.py

trains the same networks with each of ``--priors`` and each weight of ``--betas``, from the same
weights of encoder and decoder for each seed, by minimizing

    distortion + beta * rate,    rate = KL(q(z | x) || p(z)),    distortion = E_q[-log p(x | z)]

and evaluates both on the test images after the last epoch. A better prior has the same distortion
at a lower rate. The folder ``--out`` then holds

    rate_distortion.csv  a row per prior, beta and seed: the rate (an upper bound on it, for a
                         diffusion prior) and the distortion, in nats per image
    rate_distortion.md   the page to read: mean and standard error over seeds, and how far apart the
                         curves of two priors are at the same rate
    rate_distortion.png  the curves
    settings.json        the settings

Rate + distortion is the -ELBO of a model, whatever it was trained with. What it was trained with is
no bound but at beta = 1, and is not reported.

The script may be killed and started again: what is in the table is not trained again. More priors,
betas or seeds may be added.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from common import exit_on_error, parse_device, provenance
from study import Statistic, check_settings, number, statistic, table

from pyro_vaediff.arguments import check_choice, check_seed, check_whole, folder
from pyro_vaediff.data import ImageData, load
from pyro_vaediff.evaluate import evaluate
from pyro_vaediff.files import check_folder, write_atomically, write_csv
from pyro_vaediff.infer import Timestep_ELBO
from pyro_vaediff.plotting.style import COLORS, DASHES, MARKERS, legend, slide, write
from pyro_vaediff.priors import PRIORS
from pyro_vaediff.train import ModelConfig, TrainConfig, Trainer

Row = dict[str, str | float]
Curve = list[tuple[float, float]]  # of rates, which increase, and distortions
KEY = ("prior", "beta", "seed")


def train(prior: str, beta: float, seed: int, data: ImageData, args: argparse.Namespace) -> Row:
    r"""Returns the rate and the distortion of a model that is trained with a weight of the KL."""
    model = ModelConfig(prior, args.latent_dim, levels=data.levels, width=args.width)
    config = TrainConfig(
        epochs=args.epochs,
        lr=2e-3,
        lr_schedule="cosine",
        beta=(beta,),
        seed=seed,
        validate_every=args.epochs,
    )
    trainer = Trainer.from_config(model, config, Timestep_ELBO(k=args.k), data, args.device)
    trainer.fit(progress=False)
    # The last model: the best one would be chosen by the bound, which has beta = 1.
    terms = evaluate(trainer.vae, data.test)
    distortion = terms.pop("x")
    key: Row = {"prior": prior, "beta": beta, "seed": seed}
    return key | {"rate": sum(terms.values()), "distortion": distortion}


def read(path: Path) -> list[Row]:
    r"""Returns the rows of a table that there may be."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {"prior": row.pop("prior"), "beta": float(row["beta"]), "seed": int(row["seed"])}
            | {name: float(row[name]) for name in ("rate", "distortion")}
            for row in csv.DictReader(file)
        ]


def points(rows: Sequence[Row], prior: str) -> dict[float, tuple[Statistic, Statistic]]:
    r"""Returns the rate and the distortion of a prior for each beta, over seeds."""
    own = [row for row in rows if row["prior"] == prior]
    return {
        beta: (
            statistic([float(row["rate"]) for row in own if row["beta"] == beta]),
            statistic([float(row["distortion"]) for row in own if row["beta"] == beta]),
        )
        for beta in sorted({float(row["beta"]) for row in own})
    }


def curve(rows: Sequence[Row], prior: str) -> Curve:
    r"""Returns the curve of a prior, the mean over seeds."""
    return sorted((rate.mean, distortion.mean) for rate, distortion in points(rows, prior).values())


def difference(one: Curve, other: Curve) -> list[tuple[float, float]]:
    r"""Returns rates, and how much higher the distortion of one curve is there than of the other.

    Both are linear from point to point, and so is the difference: these are all its corners, where
    both curves are.
    """
    low, high = max(one[0][0], other[0][0]), min(one[-1][0], other[-1][0])
    rates = sorted({rate for rate, _ in one + other if low <= rate <= high})
    values = [np.interp(rates, [r for r, _ in c], [d for _, d in c]) for c in (one, other)]
    return [(rate, float(a - b)) for rate, a, b in zip(rates, *values, strict=True)]


def page(rows: Sequence[Row], args: argparse.Namespace) -> str:
    r"""Returns the page."""
    lines, priors = [], list(dict.fromkeys(str(row["prior"]) for row in rows))
    for prior in priors:
        for beta, (rate, distortion) in points(rows, prior).items():
            own = [row for row in rows if row["prior"] == prior and row["beta"] == beta]
            total = statistic([float(row["rate"]) + float(row["distortion"]) for row in own])
            texts = (value.text(2, "standard_error") for value in (rate, distortion, total))
            lines.append([prior, f"{beta:g}", *texts])
    return "\n".join(
        [
            "# Rate and distortion",
            "",
            f"The digits, D = {args.latent_dim}, {args.epochs} epochs, seeds "
            f"{', '.join(sorted({str(row['seed']) for row in rows}))}, mean ± standard error, of "
            f"the test images after the last epoch, on {provenance(args.device)}. Rate + "
            "distortion is the -ELBO of a model, whatever it was trained with; what it was trained "
            "with is no bound but at β = 1, and is not shown.",
            "",
            *table(["prior", "β", "rate", "distortion", "rate + distortion (nats)"], lines),
            "",
            *(
                compare(rows, one, other)
                for other in priors
                for one in priors[priors.index(other) + 1 :]
            ),
            "",
        ]
    )


def compare(rows: Sequence[Row], one: str, other: str) -> str:
    r"""Returns a line on how far apart the curves of two priors are."""
    gaps = difference(curve(rows, one), curve(rows, other))
    if not gaps:
        return f"- {one} and {other} have no rate in common."
    low, high = (number(end(gap for _, gap in gaps), 2, "+") for end in (min, max))
    ends = f"{number(gaps[0][0], 1)} to {number(gaps[-1][0], 1)}"
    return (
        f"- The distortion of {one} less that of {other}, at rates of {ends} nats: {low} to {high}."
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    r"""Draws the curves, the mean over seeds."""
    figure, (axes,) = slide("Rate and distortion")
    for i, prior in enumerate(dict.fromkeys(str(row["prior"]) for row in rows)):
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)]}  # and told apart without
        style |= {"marker": MARKERS[i % len(MARKERS)], "linestyle": DASHES[i % len(DASHES)]}
        axes.plot(*zip(*curve(rows, prior), strict=True), label=prior, **style)
    for beta, (rate, distortion) in points(rows, str(rows[-1]["prior"])).items():
        where = (rate.mean, distortion.mean)
        axes.annotate(f"β = {beta:g}", where, (-8, -14), textcoords="offset points", ha="right")
    axes.margins(0.1)  # room for the weights
    axes.set_xlabel("rate (nats)")
    axes.set_ylabel("distortion (nats)")
    legend(axes)
    write(path, (".png",), lambda file: figure.savefig(file, format="png"))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    priors = ["gaussian", "flow", "diffusion"]
    add("--priors", nargs="+", default=priors, help=f"({' '.join(priors)})")
    betas = [0.25, 0.5, 1.0, 2.0, 4.0]
    add("--betas", type=float, nargs="+", default=betas, help="weights of the KL (1/4 to 4)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    add("--epochs", type=int, default=60, help="epochs of each run (60)")
    add("--latent-dim", type=int, default=16, help="latent dimensions (16)")
    add("--width", type=int, default=32, help="channels of the first convolution (32)")
    add("--k", type=int, default=8, help="timesteps per datum (8)")
    add("--limit", type=int, help="use at most this many images per split")
    add("--device", type=parse_device, default="cpu", help="where to compute (cpu)")
    out = Path("runs/rate_distortion")
    add("--out", type=folder, default=out, help=f"folder ({out})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_folder("--out", args.out)
    for name in ("epochs", "latent_dim", "width", "k"):
        check_whole(name, getattr(args, name))
    for seed in args.seeds:
        check_seed(seed, "each of --seeds")
    for prior in args.priors:
        check_choice("prior", prior, PRIORS)
    for beta in args.betas:
        TrainConfig(beta=(beta,))  # which checks it
    # Checks of arguments are for tests and for learning, not for long runs.
    pyro.enable_validation(False)
    torch.distributions.Distribution.set_default_validate_args(False)
    data = load("digits", limit=args.limit)
    fixed = ("epochs", "latent_dim", "width", "k", "limit")
    check_settings(args.out / "settings.json", {name: getattr(args, name) for name in fixed})
    path = args.out / "rate_distortion.csv"
    rows = read(path)
    for seed in args.seeds:
        for beta in args.betas:
            for prior in args.priors:
                if any((prior, beta, seed) == tuple(row[name] for name in KEY) for row in rows):
                    continue
                rows.append(train(prior, beta, seed, data, args))
                print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
                write_csv(path, rows)
    text = page(rows, args)
    write_atomically(args.out / "rate_distortion.md", lambda file: file.write(text.encode()))
    plot(rows, args.out / "rate_distortion.png")
    print(text)


if __name__ == "__main__":
    with exit_on_error():
        main()
