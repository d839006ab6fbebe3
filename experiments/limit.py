r"""Compares priors in continuous time with chains of many steps: is the limit reached?

    python experiments/run.py --num-timesteps continuous --out runs/continuous
    python experiments/limit.py runs/continuous

takes trained models whose prior is in continuous time, and trains nothing. For one minibatch of
training images it draws the bound, and its gradient by the encoder, the decoder and the prior, many
times each: in continuous time, and from the chain of ``--steps`` steps with the same networks, from
the same random numbers. Both are unbiased estimates, the latter of a bound that tends to the
former. The first step of the chain, which has a density, is that in continuous time: before it, no
network has been trained. The folder ``--out`` then holds

    limit.csv  a row per run and quantity: the mean of both in nats per image, their difference with
               its standard error, and the noise of the estimate in continuous time, which is the
               standard deviation of a draw; of a gradient, its length along the common direction,
               the squared distance of both means relative to their squared length, without the
               noise, and as the noise the total variance of a draw relative to the squared length
    limit.md   the page to read

The noise is what a learned schedule may lower, with the ``--k`` of training. The direction is that
of the first half of the draws, and the second half is projected on it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import exit_on_error, parse_device, provenance
from study import number, table
from torch import Tensor

from pyro_vaediff.arguments import check_seed, check_whole, folder
from pyro_vaediff.bench import Draws, draw
from pyro_vaediff.bench.paired import random_seeds
from pyro_vaediff.evaluate import preprocess
from pyro_vaediff.files import check_folder, write_atomically, write_csv
from pyro_vaediff.infer import Timestep_ELBO
from pyro_vaediff.priors import DiffusionPrior
from pyro_vaediff.train.runs import load_data, load_vae
from pyro_vaediff.vae import VAE

NUM_GROUPS = 10  # of draws, whose means have no draw in common


def squared_distance(one: Tensor, other: Tensor) -> tuple[float, float]:
    r"""Returns an unbiased estimate of the squared distance of two means, and its standard error.

    The products of differences that have no draw in common have no noise in their mean.

    Arguments:
        one: Draws, with shape :math:`(N, P)`.
        other: Draws of the other, with the same shape, from the same random numbers or others.
    """
    kept = len(one) // NUM_GROUPS * NUM_GROUPS
    groups = (one - other)[:kept].double().unflatten(0, (NUM_GROUPS, -1)).mean(1)
    products, n = groups @ groups.T, NUM_GROUPS

    def off_diagonal(kept: list[int]) -> float:
        part = products[kept][:, kept]
        return ((part.sum() - part.trace()) / (len(kept) * (len(kept) - 1))).item()

    without = torch.tensor([off_diagonal([i for i in range(n) if i != j]) for j in range(n)])
    error = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt().item()
    return off_diagonal(list(range(n))), error


def compare(run: str, limit: Draws, chain: Draws) -> list[dict[str, Any]]:
    r"""Returns a row per quantity."""
    rows = [row(run, "-ELBO", limit.values, chain.values)]
    rows[0]["noise"] = limit.values.std().item()
    for name, gradients in limit.gradients.items():
        others, half = chain.gradients[name], len(gradients) // 2
        direction = (gradients[:half].mean(0) + others[:half].mean(0)) / 2
        length = direction.norm()
        unit = direction / length
        projected = (x[half:].double() @ unit.double() for x in (gradients, others))
        square, error = squared_distance(gradients, others)
        rows.append(
            row(run, f"gradient, {name}", *projected)
            | {
                "squared_distance": square / length.item() ** 2,
                "squared_distance_error": error / length.item() ** 2,
                "noise": gradients.var(0).sum().item() / length.item() ** 2,
            }
        )
    return rows


def row(run: str, quantity: str, limit: Tensor, chain: Tensor) -> dict[str, Any]:
    r"""Returns the means of draws of both, and their difference."""
    difference = limit - chain
    mean, error = difference.mean().item(), difference.std().item() / len(difference) ** 0.5
    means = {"continuous": limit.mean().item(), "chain": chain.mean().item()}
    # The decoder's gradient is that of one and the same draw.
    differences = {"difference": mean, "error": error, "z": mean / error if mean else 0.0}
    return {"run": run, "quantity": quantity} | means | differences


def seeded(x: Tensor, draws: int, seed: int) -> Iterator[Tensor]:
    r"""Yields the data for each draw, which then starts from a seed of its own."""
    for one in random_seeds(seed, draws):
        torch.manual_seed(one)
        yield x


def measure(path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    r"""Returns the rows of a run.

    Raises:
        ValueError: If its prior is no diffusion prior in continuous time.
    """
    vae, _ = load_vae(path, args.device)
    prior = vae.prior
    if not (isinstance(prior, DiffusionPrior) and prior.continuous):
        raise ValueError(
            f"{path} must have a diffusion prior in continuous time, got {type(prior).__name__}"
            f"{f' of {prior.num_timesteps} steps' if isinstance(prior, DiffusionPrior) else ''}"
        )
    images = load_data(path, args.root, not args.no_download).train[: args.num_images]
    torch.manual_seed(args.seed)
    x, elbo = preprocess(vae, images), Timestep_ELBO(k=args.k)
    start, first, *_, end = prior.schedule.original("times").tolist()
    times = torch.linspace(first, end, args.steps, dtype=torch.float64)
    few = prior.with_steps(torch.cat([times.new_tensor([start]), times]))
    chain = VAE(vae.encoder, vae.decoder, few, vae.space).eval()
    draws = [draw(elbo, model, seeded(x, args.draws, args.seed)) for model in (vae, chain)]
    return compare(path.resolve().name, *draws)


def page(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    r"""Returns the page."""
    lines = []
    for r in rows:
        difference = f"{number(r['difference'], 4)} ± {number(r['error'], 4)}"
        distance = ""
        if "squared_distance" in r:
            parts = (number(r[f"squared_distance{end}"], 5) for end in ("", "_error"))
            distance = " ± ".join(parts)
        means = (number(r[name], 3) for name in ("continuous", "chain"))
        cells = [*means, difference, number(r["z"], 1, "+"), distance, number(r["noise"], 3)]
        lines.append([r["run"], r["quantity"], *cells])
    header = ["run", "quantity", "continuous", f"T = {args.steps:,}", "difference", "z"]
    header += ["squared distance, relative", "noise"]
    return "\n".join(
        [
            "# Continuous time and a chain of many steps",
            "",
            f"{args.num_images} training images, {args.draws} draws of each with k = {args.k}, "
            f"mean ± standard error, in nats per image, on {provenance(args.device)}.",
            "",
            *table(header, lines),
            "",
        ]
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    add("--steps", type=int, default=4000, help="of the chain (%(default)s)")
    add("--draws", type=int, default=400, help="of bound and gradient (%(default)s)")
    add("--k", type=int, default=64, help="timesteps per image and draw (%(default)s)")
    add("--num-images", type=int, default=100, help="of the minibatch (%(default)s)")
    add("--root", default="data", help="where the data are (%(default)s)")
    add("--no-download", action="store_true", help="never download data")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--device", type=parse_device, default="cpu", help="where to compute (%(default)s)")
    add("--out", type=folder, default=Path("runs/limit"), help="folder (%(default)s)")
    args = parser.parse_args(argv)
    check_seed(args.seed, "--seed")
    for name, least in (("steps", 2), ("draws", 2 * NUM_GROUPS), ("k", 1), ("num_images", 1)):
        check_whole(f"--{name.replace('_', '-')}", getattr(args, name), least=least)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_folder("--out", args.out)
    rows: list[dict[str, Any]] = []
    for path in args.runs:
        if not path.is_dir():
            raise FileNotFoundError(f"no run directory at {path}")
        rows += measure(path, args)
        write_csv(args.out / "limit.csv", rows)
    text = page(rows, args)
    write_atomically(args.out / "limit.md", lambda file: file.write(text.encode()))
    print(text)


if __name__ == "__main__":
    with exit_on_error("what is in the table is kept"):
        main()
