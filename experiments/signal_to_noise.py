r"""Draws when a gradient of the encoder is more signal than noise.

    python experiments/signal_to_noise.py particles
    python experiments/signal_to_noise.py entropy

answer two questions that users of Pyro have asked. Both measure the gradients of one fixed batch,
again and again:

    particles  does an encoder learn from bounds of many samples? All gradients of the
               importance-weighted bound of K particles, on the full chain of a linear-Gaussian VAE
               with a diffusion prior while it is fitted (Rainforth et al., 2018; pyro #2598)
    entropy    should one always stick the landing? The ELBO of the digits from eight timesteps per
               image, with the entropy of q(z_0 | x) in closed form and with its path derivative,
               by epoch of training (pyro #2854)

The folder ``--out`` then holds WHAT.png and WHAT.csv, with a row per estimator, module and number
of particles or epoch. Its columns are

    estimator                the name of the estimator
    particles, epoch         the number of particles K, or of epochs of training
    module                   encoder, or prior
    draws                    the number of gradients
    snr                      norm of the mean gradient / root of the variance; 0 if the mean cannot
                             be told from noise. Gradients of one mean share the estimate of it that
                             has the least noise: that of GDReG. STL has its bias in the mean
    variance, variance_se    trace of the covariance of the gradient per datum, and standard error
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from common import exit_on_error, parse_device
from following import follow
from torch import Tensor

from pyro_vaediff.arguments import check_seed, check_whole, folder
from pyro_vaediff.bench import draw, noise_of
from pyro_vaediff.data import load
from pyro_vaediff.evaluate import preprocess
from pyro_vaediff.files import check_folder, write_csv
from pyro_vaediff.infer import (
    IWAE_ELBO,
    PIWAE_ELBO,
    STL_IWAE_ELBO,
    DReG_ELBO,
    GDReG_ELBO,
    MultiSampleELBO,
    Timestep_ELBO,
)
from pyro_vaediff.plotting.style import legend, slide, write
from pyro_vaediff.testing import Oracle, linear_gaussian_vae, one_copy_per_datum
from pyro_vaediff.train import ModelConfig, TrainConfig, Trainer
from pyro_vaediff.vae import VAE

Row = dict[str, Any]
BOUNDS: dict[str, Callable[..., MultiSampleELBO]] = {
    "IWAE": IWAE_ELBO,
    "PIWAE, up to 8 groups": lambda num_particles, **options: PIWAE_ELBO(
        math.gcd(8, num_particles), num_particles, **options
    ),
    "STL (biased)": STL_IWAE_ELBO,
    "DReG": DReG_ELBO,
    "GDReG": GDReG_ELBO,
}
VECTORIZED: dict[str, Any] = {"vectorize_particles": True, "max_plate_nesting": 1}


def row(gradients: Tensor, best: Tensor | None = None, **key: Any) -> Row:
    r"""Returns a row of the table.

    Arguments:
        gradients: Draws of a gradient, with shape (N, P).
        best: Draws of another one with the same mean and less noise, if there is one.
        key: What is in the row beside the numbers.
    """
    noise, mean = (noise_of(g, g.mean(0)) for g in (gradients, gradients if best is None else best))
    snr = mean.snr * math.sqrt(mean.variance / noise.variance)
    numbers = {"snr": snr, "variance": noise.variance, "variance_se": noise.variance_se}
    return key | {"draws": len(gradients)} | numbers


# Particles ----------------------------------------------------------------------------------------


def fitted(args: argparse.Namespace) -> tuple[VAE, Tensor]:
    r"""Returns a VAE that is being fitted to data of its own, and these data."""
    vae = linear_gaussian_vae(args.num_timesteps, seed=args.seed).to(args.device)
    with torch.no_grad():
        x = vae.model(num_samples=args.batch_size)
    adam = torch.optim.Adam(vae.parameters(), lr=0.02)
    for _ in range(args.steps):
        adam.zero_grad()
        Oracle(vae, x).negative_elbo.mean().backward()
        adam.step()
    vae.zero_grad()
    return vae, x


def by_particles(args: argparse.Namespace) -> list[Row]:
    r"""Returns the rows of the bounds; all draws of a bound come from one backward pass."""
    vae, x = fitted(args)
    copies = one_copy_per_datum(vae, args.draws * len(x))
    rows: list[Row] = []

    def gradients(elbo: MultiSampleELBO) -> dict[str, Tensor]:
        copies.zero_grad()
        elbo.loss_and_grads(copies.model, copies.guide, x.repeat(args.draws, 1))
        parts = {
            name: torch.cat([p.grad.flatten(1) for p in getattr(copies, name).parameters()], -1)
            for name in ("encoder", "prior")
        }
        return {name: g.unflatten(0, (args.draws, len(x))).mean(1) for name, g in parts.items()}

    for K in args.particles:
        draws = {
            name: gradients(make(num_particles=K, **VECTORIZED)) for name, make in BOUNDS.items()
        }
        for name, module in itertools.product(BOUNDS, ("encoder", "prior")):
            same_mean = name in ("IWAE", "DReG") or module == "prior"
            best = draws["GDReG"][module] if same_mean else None
            key: Row = {"estimator": name, "particles": K, "module": module}
            rows.append(row(draws[name][module], best, **key))
    return rows


def plot_particles(rows: Sequence[Row], path: Path) -> None:
    figure, panels = slide("Signal-to-noise ratio of the gradient of a bound of K particles", 2)
    for axes, module in zip(panels, ("encoder", "prior"), strict=True):
        plot(axes, [r for r in rows if r["module"] == module], "particles", "snr")
        axes.set(title=f"the {module}", xlabel="particles K", yscale="log")
        axes.set_xscale("log", base=2)
    legend(panels[1])
    write(path, (".png",), lambda file: figure.savefig(file, format="png"))


# Entropy ------------------------------------------------------------------------------------------


def by_epoch(args: argparse.Namespace) -> list[Row]:
    r"""Returns the rows of both entropies, from epochs of one training."""
    data = load("digits", limit=args.limit)
    config = TrainConfig(
        epochs=args.epochs, lr=2e-3, lr_schedule="cosine", seed=args.seed,
        validate_every=args.epochs,
    )  # fmt: skip
    model = ModelConfig(latent_dim=16, width=args.width, levels=data.levels)
    trainer = Trainer.from_config(model, config, Timestep_ELBO(), data, args.device)
    x = preprocess(trainer.vae, data.train[: args.batch_size])
    rows: list[Row] = []

    def record(epoch: int) -> None:
        with torch.random.fork_rng(devices=[args.device] if x.is_cuda else []):
            for entropy in ("exact", "path"):
                batches = itertools.repeat(x, args.draws)
                gradients = draw(Timestep_ELBO(entropy=entropy), trainer.vae, batches).gradients
                key: Row = {"estimator": entropy, "epoch": epoch, "module": "encoder"}
                rows.append(row(gradients["encoder"], **key))

    follow(trainer, args.points, record)
    return rows


def crossing(rows: Sequence[Row]) -> float | None:
    r"""Returns the epoch from which on the path derivative has the smaller variance, if any."""
    exact, path = (
        {r["epoch"]: r["variance"] for r in rows if r["estimator"] == name}
        for name in ("exact", "path")
    )
    ratios = [(epoch, math.log(path[epoch] / exact[epoch])) for epoch in exact]
    if ratios[-1][1] >= 0:
        return None
    for (start, above), (stop, below) in reversed(list(itertools.pairwise(ratios))):
        if above >= 0:
            return start + (stop - start) * above / (above - below)
    return 0.0


def plot_entropy(rows: Sequence[Row], path: Path) -> None:
    figure, panels = slide("The encoder's gradient, with either entropy", 2)
    for axes, (quantity, title) in zip(
        panels, {"variance": "variance", "snr": "signal-to-noise ratio"}.items(), strict=True
    ):
        plot(axes, rows, "epoch", quantity)
        axes.set(title=title, xlabel="epoch", yscale="log")
    if epoch := crossing(rows):  # not from the start
        panels[0].axvline(epoch, color="#595959", linestyle=":", label=f"cross at {epoch:.0f}")
    legend(panels[0])
    write(path, (".png",), lambda file: figure.savefig(file, format="png"))


# The script ---------------------------------------------------------------------------------------


def plot(axes: Any, rows: Sequence[Row], across: str, quantity: str) -> None:
    r"""Draws a quantity of each estimator; where it is zero, it has no place on the axis."""
    for number, name in enumerate(dict.fromkeys(r["estimator"] for r in rows)):
        own = [r for r in rows if r["estimator"] == name and r[quantity] > 0]
        style = ("o-", "s--", "^-.", "v-", "x:")[number]
        axes.plot([r[across] for r in own], [r[quantity] for r in own], style, label=name)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=("particles", "entropy"), help="what is drawn")
    add("--draws", type=int, default=400, help="gradients per point (%(default)s)")
    add("--batch-size", type=int, help="data of the batch (particles 8, entropy 100)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--device", type=parse_device, default="cpu", help="where to compute (%(default)s)")
    add("--out", type=folder, default=Path("runs/signal-to-noise"), help="folder (%(default)s)")
    numbers = [1, 4, 16, 64, 256]
    add("--particles", type=int, nargs="+", default=numbers, help=f"particles: K ({numbers})")
    add("--num-timesteps", type=int, default=4, help="particles: T (%(default)s)")
    add("--steps", type=int, default=40, help="particles: steps of the fit (%(default)s)")
    add("--epochs", type=int, default=60, help="entropy: of training (%(default)s)")
    add("--points", type=int, default=15, help="entropy: epochs that are measured (%(default)s)")
    add("--width", type=int, default=32, help="entropy: channels of the networks (%(default)s)")
    add("--limit", type=int, help="entropy: use at most this many images per split")
    args = parser.parse_args(argv)
    check_seed(args.seed, "--seed")
    for name, least in (("draws", 2), ("num_timesteps", 1), ("epochs", 1), ("points", 1)):
        check_whole(f"--{name.replace('_', '-')}", getattr(args, name), least)
    for K in args.particles:
        check_whole("each of --particles", K)
    if args.batch_size is None:
        args.batch_size = 8 if args.what == "particles" else 100
    check_whole("--batch-size", args.batch_size)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_folder("--out", args.out)
    pyro.enable_validation(False)
    torch.distributions.Distribution.set_default_validate_args(False)
    torch.manual_seed(args.seed)
    measure, show = {
        "particles": (by_particles, plot_particles), "entropy": (by_epoch, plot_entropy)
    }[args.what]  # fmt: skip
    rows = measure(args)
    write_csv(args.out / f"{args.what}.csv", rows)
    show(rows, args.out / f"{args.what}.png")
    for r in rows:
        print(
            ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in r.items())
        )
    if args.what == "entropy":
        epoch = crossing(rows)
        where = "nowhere" if epoch is None else f"from epoch {epoch:.1f} on"
        print(f"the path derivative has the smaller variance {where}")


if __name__ == "__main__":
    with exit_on_error():
        main()
