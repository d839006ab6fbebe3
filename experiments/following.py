r"""What the studies of latents share: runs that are followed by epoch, and their page and plot."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from common import parse_device, provenance
from study import statistic, table

from pyro_vaediff.arguments import check_seed, check_whole, folder
from pyro_vaediff.data import ImageData, load
from pyro_vaediff.evaluate import active_units, evaluate, preprocess, value_elbo
from pyro_vaediff.files import check_folder, write_atomically, write_csv
from pyro_vaediff.infer import Estimator
from pyro_vaediff.plotting.style import legend, slide, write
from pyro_vaediff.train import ModelConfig, TrainConfig, Trainer

__all__ = ["LATENTS", "Row", "Study", "follow", "latents"]

Row = dict[str, float | str]
# Told apart without colors, and where they lie upon each other.
STYLES: list[dict[str, Any]] = [
    {"linestyle": "-", "linewidth": 6, "alpha": 0.35},
    {"linestyle": ":", "color": "black"},
    {"linestyle": "-."},
    {"linestyle": "--"},
    {"linestyle": "-", "marker": "."},
]


#: The quantities of :func:`latents`, with labels.
LATENTS: dict[str, str] = {
    "mean": "rms of the posterior means",
    "scale": "rms of the posterior scales",
    "active": "active units",
    "reconstruction": "-log p(x | z_0) (nats)",
    "elbo": "-ELBO (nats)",
}


@torch.no_grad()
def latents(trainer: Trainer) -> Row:
    r"""Returns what has become of the latents of the validation images, and their bound."""
    vae, images = trainer.vae, trainer.data.validation.x
    terms = evaluate(vae, images, value_elbo())
    q = vae.encoder(preprocess(vae, images))
    return {
        "mean": q.mean.square().mean().sqrt().item(),
        "scale": q.variance.mean().sqrt().item(),
        "active": float(active_units(vae, images)[""].active),
        "reconstruction": terms["x"],
        "elbo": sum(terms.values()),
    }


def follow(trainer: Trainer, points: int, record: Callable[[int], object]) -> None:
    r"""Trains, and records what there is before it and after every few epochs.

    Arguments:
        trainer: The trainer.
        points: The number of records after the first one.
        record: A function of the number of epochs so far.
    """
    every = max(1, trainer.config.epochs // points)
    record(0)
    trainer.on_epoch = lambda r: record(int(r["epoch"])) if r["epoch"] % every == 0 else None
    trainer.fit(progress=False)


class Study(ABC):
    r"""Variants of one model on the digits, each followed through its training.

    Arguments:
        description: The help text of the script.
    """

    name: ClassVar[str]  # of the files that are written
    key: ClassVar[str]  # what a variant is
    title: ClassVar[str]  # of the page
    variants: ClassVar[Sequence[str]]
    quantities: ClassVar[Mapping[str, str]]  # what is measured, with labels
    logarithmic: ClassVar[Sequence[str]] = ()
    hidden: ClassVar[Sequence[str]] = ()  # in the plot

    def __init__(self, description: str | None):
        self.parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add, out = self.parser.add_argument, Path("runs", self.name)
        add("--epochs", type=int, default=60, help="epochs of each run (60)")
        add("--points", type=int, default=15, help="records of each run (15)")
        add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
        add("--width", type=int, default=32, help="channels of the first convolution (32)")
        add("--k", type=int, default=8, help="timesteps per datum (8)")
        add("--limit", type=int, help="use at most this many images per split")
        add("--device", type=parse_device, default="cpu", help="where to compute (cpu)")
        add("--out", type=folder, default=out, help=f"folder ({out})")

    @abstractmethod
    def model(self, variant: str, args: argparse.Namespace) -> tuple[ModelConfig, Estimator]:
        r"""Returns the model of a variant and the objective that it is trained with."""

    @abstractmethod
    def measure(self, trainer: Trainer) -> Row:
        r"""Returns the quantities of a trainer's model, of the validation images."""

    def follow(
        self, variant: str, seed: int, data: ImageData, args: argparse.Namespace
    ) -> list[Row]:
        r"""Returns the records of a run, the first one from before its training."""
        config = TrainConfig(
            epochs=args.epochs, lr=2e-3, lr_schedule="cosine", seed=seed, validate_every=args.epochs
        )
        model, elbo = self.model(variant, args)
        trainer = Trainer.from_config(model, config, elbo, data, args.device)
        rows: list[Row] = []

        def record(epoch: int) -> None:
            key: Row = {self.key: variant, "seed": seed, "epoch": epoch}
            rows.append(key | self.measure(trainer))

        follow(trainer, args.points, record)
        return rows

    def page(self, rows: Sequence[Row], args: argparse.Namespace) -> str:
        r"""Returns the page."""
        last = max(float(row["epoch"]) for row in rows)
        lines = []
        for variant in self.variants:
            own = [row for row in rows if row[self.key] == variant and row["epoch"] == last]
            values = [statistic([float(row[q]) for row in own]) for q in self.quantities]
            lines.append([variant, *(v.text(3, "standard_error") for v in values)])
        return "\n".join(
            [
                f"# {self.title}",
                "",
                f"The digits, D = 16, {args.epochs} epochs, {len(args.seeds)} seeds, mean ± "
                "standard error, of the validation images after the last epoch, on "
                f"{provenance(args.device)}.",
                "",
                *table([self.key, *self.quantities.values()], lines),
                "",
            ]
        )

    def plot(self, rows: Sequence[Row], path: Path) -> None:
        r"""Draws the quantities against epochs, the mean over seeds."""
        shown = {q: label for q, label in self.quantities.items() if q not in self.hidden}
        figure, panels = slide("What becomes of the latents", len(shown))
        for axes, (quantity, label) in zip(panels, shown.items(), strict=True):
            for variant, style in zip(self.variants, STYLES, strict=False):
                own = [row for row in rows if row[self.key] == variant]
                epochs = sorted({float(row["epoch"]) for row in own})
                means = [
                    statistic([float(r[quantity]) for r in own if r["epoch"] == epoch]).mean
                    for epoch in epochs
                ]
                axes.plot(epochs, means, label=variant, **style)
            axes.set_xlabel("epoch")
            axes.set_title(label, fontsize="medium" if len(shown) < 5 else "small")
            axes.set_yscale("log" if quantity in self.logarithmic else "linear")
        legend(panels[list(shown).index("elbo")])  # which falls, and leaves room
        write(path, (".png",), lambda file: figure.savefig(file, format="png"))

    def main(self, argv: list[str] | None = None) -> None:
        r"""Runs the script."""
        args = self.parser.parse_args(argv)
        check_folder("--out", args.out)
        for name in ("epochs", "points"):
            check_whole(name, getattr(args, name))
        for seed in args.seeds:
            check_seed(seed, "each of --seeds")
        data, rows, path = load("digits", limit=args.limit), [], args.out / self.name
        for seed in args.seeds:
            for variant in self.variants:
                rows += self.follow(variant, seed, data, args)
                print(", ".join(f"{k} {_show(v)}" for k, v in rows[-1].items()), flush=True)
                write_csv(path.with_suffix(".csv"), rows)
        text = self.page(rows, args)
        write_atomically(path.with_suffix(".md"), lambda file: file.write(text.encode()))
        self.plot(rows, path.with_suffix(".png"))
        print(text)


def _show(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
