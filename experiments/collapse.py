r"""Shows that the collapse of latent diffusion is a missing entropy: four objectives, one network.

    python experiments/collapse.py

trains encoder, decoder and diffusion prior of the digits jointly, from the same weights, with

    denoising     reconstruction + the loss L_simple of the denoiser, whose gradient reaches the
                  encoder: how latent diffusion would be trained end to end
    denoising+kl  the same + 1e-6 KL(q(z_0|x) || N(0, I)), as in autoencoders for latent diffusion
    simple        the first with -H[q(z_0|x)] and KL(q(z_T|z_0) || p(z_T)): only the weights of the
                  noise levels are not those of the bound
    elbo          the bound

and records after every few epochs what becomes of the latents. The folder ``--out`` then holds

    collapse.csv  a row per objective, seed and recorded epoch, of the validation images: the root
                  mean square of the posterior means and of the posterior scales, the number of
                  active units, the reconstruction and the -ELBO in nats
    collapse.md   the page to read: the end of every run, mean and standard error over seeds
    collapse.png  the same against epochs

The -ELBO is that of the same bound for all objectives.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import exit_on_error, parse_device, provenance
from pyro.distributions.util import scale_and_mask
from study import statistic, table
from torch import Tensor

from pyro_vaediff.arguments import check_seed, check_whole, folder
from pyro_vaediff.data import ImageData, load
from pyro_vaediff.diffusion import base_normal, kl_normal
from pyro_vaediff.evaluate import active_units, evaluate, preprocess, value_elbo
from pyro_vaediff.files import check_folder, write_atomically, write_csv
from pyro_vaediff.infer import Estimator, Reweighted, Term, Timestep_ELBO
from pyro_vaediff.infer.reweighted import simple
from pyro_vaediff.plotting.style import legend, slide, write
from pyro_vaediff.train import ModelConfig, TrainConfig, Trainer
from pyro_vaediff.vae import VAE

Row = dict[str, float | str]
QUANTITIES = {
    "mean": "rms of the posterior means",
    "scale": "rms of the posterior scales",
    "active": "active units",
    "reconstruction": "-log p(x | z_0) (nats)",
    "elbo": "-ELBO (nats)",
}
# Told apart without colors, too: the first two lines lie upon each other.
STYLES: dict[str, dict[str, Any]] = {
    "denoising": {"linestyle": "-", "linewidth": 6, "alpha": 0.35},
    "denoising+kl": {"linestyle": ":", "color": "black"},
    "simple": {"linestyle": "-."},
    "elbo": {"linestyle": "--"},
}


def denoising(term: Term) -> Tensor | None:
    r"""Returns a term of the reconstruction and L_simple alone."""
    return None if term.role in ("entropy", "last") else simple(term)


def denoising_kl(term: Term) -> Tensor | None:
    r"""Returns a term of :func:`denoising`, or a millionth of KL(q(z_0|x) || N(0, I))."""
    if term.role != "entropy":
        return denoising(term)
    q = base_normal(term.site["fn"])
    assert q is not None
    standard = torch.distributions.Normal(torch.zeros_like(q.loc), torch.ones_like(q.scale))
    kl = kl_normal(q, standard).flatten(term.value.ndim).sum(-1)
    return 1e-6 * scale_and_mask(kl, term.site["scale"], term.site["mask"])


def objectives(k: int) -> dict[str, Callable[[], Estimator]]:
    r"""Returns the objectives by name."""
    return {
        "denoising": lambda: Reweighted(Timestep_ELBO(k=k), denoising),
        "denoising+kl": lambda: Reweighted(Timestep_ELBO(k=k), denoising_kl),
        "simple": lambda: Reweighted(Timestep_ELBO(k=k), simple),
        "elbo": lambda: Timestep_ELBO(k=k),
    }


@torch.no_grad()
def measure(vae: VAE, images: Tensor) -> Row:
    r"""Returns what has become of the latents, and the terms of the bound."""
    terms = evaluate(vae, images, value_elbo())
    q = vae.encoder(preprocess(vae, images))
    return {
        "mean": q.mean.square().mean().sqrt().item(),
        "scale": q.variance.mean().sqrt().item(),
        "active": float(active_units(vae, images)[""].active),
        "reconstruction": terms["x"],
        "elbo": sum(terms.values()),
    }


def train(name: str, seed: int, data: ImageData, args: argparse.Namespace) -> list[Row]:
    r"""Returns the records of a run."""
    every = max(1, args.epochs // args.points)
    config = TrainConfig(
        epochs=args.epochs, lr=2e-3, lr_schedule="cosine", seed=seed, validate_every=args.epochs
    )
    model = ModelConfig(latent_dim=16, width=args.width, levels=17)
    elbo = objectives(args.k)[name]()
    rows: list[Row] = []
    trainer = Trainer.from_config(model, config, elbo, data, args.device)

    def record(epoch: int) -> None:
        key: Row = {"objective": name, "seed": seed, "epoch": epoch}
        rows.append(key | measure(vae, images))

    vae, images = trainer.vae, data.validation
    record(0)
    trainer.on_epoch = lambda r: record(int(r["epoch"])) if r["epoch"] % every == 0 else None
    trainer.fit(progress=False)
    return rows


def show(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def page(rows: Sequence[Row], args: argparse.Namespace) -> str:
    r"""Returns the page."""
    last = max(float(row["epoch"]) for row in rows)
    ends = [row for row in rows if row["epoch"] == last]
    lines = []
    for name in objectives(1):
        own = [row for row in ends if row["objective"] == name]
        values = [statistic([float(row[q]) for row in own]) for q in QUANTITIES]
        lines.append([name, *(v.text(3, "standard_error") for v in values)])
    return "\n".join(
        [
            "# The collapse of latent diffusion is a missing entropy",
            "",
            f"The digits, D = 16, {args.epochs} epochs, {len(args.seeds)} seeds, mean ± standard "
            f"error, of the validation images after the last epoch, on {provenance(args.device)}.",
            "",
            *table(["objective", *QUANTITIES.values()], lines),
            "",
        ]
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    r"""Draws the quantities against epochs, the mean over seeds."""
    figure, panels = slide("What becomes of the latents", len(QUANTITIES) - 1)
    shown = {q: label for q, label in QUANTITIES.items() if q != "active"}
    for axes, (quantity, label) in zip(panels, shown.items(), strict=True):
        for name in objectives(1):
            own = [row for row in rows if row["objective"] == name]
            epochs = sorted({float(row["epoch"]) for row in own})
            means = [
                statistic([float(r[quantity]) for r in own if r["epoch"] == epoch]).mean
                for epoch in epochs
            ]
            axes.plot(epochs, means, label=name, **STYLES[name])
        axes.set_xlabel("epoch")
        axes.set_title(label, fontsize="medium")
        axes.set_yscale("log" if quantity in ("mean", "scale") else "linear")
    legend(panels[-1])
    write(path, (".png",), lambda file: figure.savefig(file, format="png"))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--epochs", type=int, default=60, help="epochs of each run (60)")
    add("--points", type=int, default=15, help="records of each run (15)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    add("--width", type=int, default=32, help="channels of the first convolution (32)")
    add("--k", type=int, default=8, help="timesteps per datum (8)")
    add("--limit", type=int, help="use at most this many images per split")
    add("--device", type=parse_device, default="cpu", help="where to compute (cpu)")
    add("--out", type=folder, default=Path("runs/collapse"), help="folder (runs/collapse)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_folder("--out", args.out)
    for name in ("epochs", "points"):
        check_whole(name, getattr(args, name))
    for seed in args.seeds:
        check_seed(seed, "each of --seeds")
    data, rows = load("digits", limit=args.limit), []
    for seed in args.seeds:
        for name in objectives(args.k):
            rows += train(name, seed, data, args)
            print(", ".join(f"{key} {show(value)}" for key, value in rows[-1].items()), flush=True)
            write_csv(args.out / "collapse.csv", rows)
    text = page(rows, args)
    write_atomically(args.out / "collapse.md", lambda file: file.write(text.encode()))
    plot(rows, args.out / "collapse.png")
    print(text)


if __name__ == "__main__":
    with exit_on_error():
        main()
