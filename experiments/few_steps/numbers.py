r"""The numbers of a run: bounds by reverse variance, distances by sampler."""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vaediff.denoise import REVERSE_VARIANCES, Analytic
from pyro_vaediff.evaluate import (
    Extractor,
    FeatureStatistics,
    evaluate,
    image_statistics,
    load_extractor,
    preprocess,
    reference_statistics,
)
from pyro_vaediff.files import write_csv
from pyro_vaediff.infer import Timestep_ELBO
from pyro_vaediff.priors import DiffusionPrior, fit_variances, optimal_steps
from pyro_vaediff.sampling import GRIDS, num_evaluations, point, sample
from pyro_vaediff.sampling.solvers import check_diffusion
from pyro_vaediff.train import TrainConfig, Trainer
from pyro_vaediff.train.report import pixel_space
from pyro_vaediff.train.runs import load_data, load_vae
from pyro_vaediff.train.splits import one_hot
from pyro_vaediff.vae import call, posterior

Row = dict[str, Any]
Fit = Callable[..., DiffusionPrior]
Job = tuple[Row, Callable[[], float]]
KEY = ("measure", "name", "grid", "budget")  # of a number
COLUMNS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("measure", "name", "grid"), str),
    **dict.fromkeys(("budget", "steps", "evaluations"), int),
    **dict.fromkeys(("value", "seconds"), float),
}


# What a prior can be made of latents of training images, beside what it is.
FITTED: dict[str, Fit] = {
    "analytic": fit_variances,
    "diagonal": partial(fit_variances, per_dimension=True),
}


def variances(prior: DiffusionPrior) -> dict[str, Fit]:
    r"""Returns the reverse variances that a trained prior can have, its own one first."""
    trained = type(prior.denoiser.variance)
    own = next(name for name, kind in REVERSE_VARIANCES.items() if kind is trained)
    fitted = {f"{name}, fitted": fit for name, fit in FITTED.items()}
    return {own: lambda prior, z_0, c=None: prior} | fitted


def grids(prior: DiffusionPrior, names: Sequence[str], num_steps: int) -> dict[str, Tensor]:
    r"""Returns grids by name, and the best one for variances that are the best for the mean."""
    times = {name: GRIDS[name](prior, num_steps) for name in names}
    if isinstance(prior.denoiser.variance, Analytic) and num_steps < prior.num_timesteps:
        times["optimal"] = optimal_steps(prior, num_steps)
    return times


class Study:
    r"""The numbers of a run, in a table that is written after each of them.

    Arguments:
        path: The run directory.
        args: The options.
    """

    def __init__(self, path: Path, args: argparse.Namespace):
        self.args, self.name = args, path.resolve().name
        self.vae, config = load_vae(path, args.device)
        self.prior = check_diffusion(self.vae.prior)
        self.num_classes = config.num_classes
        self.data = load_data(path, args.root, not args.no_download)
        self.table, self.rows = args.out / f"{self.name}.csv", []
        if self.table.exists():
            with open(self.table, newline="") as file:
                self.rows = [parse(self.table, row) for row in csv.DictReader(file)]

    def run(self) -> None:
        r"""Computes what is missing."""
        known = {tuple(row[k] for k in KEY) for row in self.rows}
        for row, measure in (*self.bounds(), *self.distances()):
            if tuple(row[k] for k in KEY) not in known:
                start = time.perf_counter()
                value = measure()
                self.rows.append(row | {"value": value, "seconds": time.perf_counter() - start})
                write_csv(self.table, self.rows)
                print(f"{self.name}:", *(show(x) for x in self.rows[-1].values()), flush=True)

    def part(self, split: str, num_images: int) -> tuple[Tensor, Tensor | None]:
        r"""Returns the first images of a split, and their labels if the model is given these."""
        images, labels = (getattr(self.data, split + end) for end in ("", "_labels"))
        c = one_hot(labels[:num_images], self.num_classes) if self.num_classes else None
        return images[:num_images], c

    def bounds(self) -> Iterator[Job]:
        r"""Yields what is to be known of bounds, and functions that compute it."""
        torch.manual_seed(self.args.seed)
        x, c = self.part("train", self.args.num_fit)
        x = preprocess(self.vae, x)
        c = None if c is None else c.to(x)
        with torch.no_grad():
            z_0 = posterior(self.vae, x, c).sample()
        for name, fit in variances(self.prior).items():
            prior = fit(self.prior, z_0, c)
            for n in self.args.steps:
                for grid, times in grids(prior, self.args.grids, n).items():
                    row = {"measure": "nats", "name": name, "grid": grid, "budget": n, "steps": n}
                    yield row | {"evaluations": n}, partial(self.bound, prior, times)
                    if self.args.fine_tune and (name, grid) == ("diagonal, fitted", "optimal"):
                        row |= {"name": "diagonal, fine-tuned", "evaluations": n}
                        yield row, partial(self.fine_tuned_bound, prior, times)

    def fine_tuned_bound(self, prior: DiffusionPrior, times: Tensor) -> float:
        r"""Returns the negative ELBO after the prior has been trained with these steps."""
        vae = copy.deepcopy(self.vae)
        vae.prior = copy.deepcopy(prior).with_steps(times)
        epochs, seed = self.args.fine_tune, self.args.seed
        config = TrainConfig(
            epochs=0, prior_epochs=epochs, lr=1e-3, lr_schedule="cosine", seed=seed
        )
        trainer = Trainer(
            vae, self.data, Timestep_ELBO(), config, self.args.device, labels=bool(self.num_classes)
        )
        return self.bound(check_diffusion(trainer.fit(progress=False).prior), times)

    def bound(self, prior: DiffusionPrior, times: Tensor) -> float:
        r"""Returns the negative ELBO of test images with other steps, in nats per image."""
        x, c = self.part("test", self.args.num_images)
        batches = x.split(100)
        contexts = [None] * len(batches) if c is None else c.split(100)
        try:
            self.vae.prior = prior.with_steps(times)
            # A seed per batch gives all chains the same z_0.
            sums = [
                len(x) * sum(evaluate(self.vae, x, c=c, seed=self.args.seed + i).values())
                for i, (x, c) in enumerate(zip(batches, contexts, strict=True))
            ]
        finally:
            self.vae.prior = self.prior
        return sum(sums) / sum(map(len, batches))

    def distances(self) -> Iterator[Job]:
        r"""Yields what is to be known of distances, and functions that compute it."""
        T = self.prior.num_timesteps
        whole = {"measure": "distance", "name": "ancestral", "grid": "time", "budget": T}
        yield whole | {"steps": T, "evaluations": T}, partial(self.distance, "ancestral", "time", T)
        options = self.args.samplers, self.args.grids, self.args.evaluations
        for name, grid, budget in itertools.product(*options):
            steps = largest(self.prior, name, budget)
            if steps and budget != T:
                row = {"measure": "distance", "name": name, "grid": grid, "budget": budget}
                row |= {"steps": steps, "evaluations": num_evaluations(self.prior, name, steps)}
                yield row, partial(self.distance, name, grid, steps)

    @functools.cached_property
    def extractor(self) -> Extractor:
        r"""The features of the distances."""
        name = self.args.features
        if name == "auto":
            name = "pixels" if self.data.name == "digits" else "efficientnet-lite0"
        return load_extractor(name, device=self.args.device)

    @functools.cached_property
    def reference(self) -> FeatureStatistics:
        r"""The statistics of test images."""
        images, cache = self.data.test[: self.args.num_samples], self.args.out / "statistics"
        return reference_statistics(
            images, self.extractor, levels=self.data.levels, cache_dir=cache
        )

    @torch.no_grad()
    def distance(self, sampler: str, grid: str, num_steps: int) -> float:
        r"""Returns the Fréchet distance of samples to test images."""
        torch.manual_seed(self.args.seed)  # of the noise, which samplers without any share
        num_samples = self.args.num_samples
        _, c = self.part("test", num_samples)
        if c is not None:  # as many of each class as there are test images, over and over
            c = c[torch.arange(num_samples) % len(c)].to(self.prior.origin)
        z_0 = sample(self.prior, num_samples, c, sampler, num_steps, grid)
        space, decoder = pixel_space(self.vae), self.vae.decoder
        contexts = [None] * num_samples if c is None else c.split(100)
        images = (
            space.to_unit(point(call(decoder, z, c)))
            for z, c in zip(z_0.split(100), contexts, strict=False)
        )
        return image_statistics(images, self.extractor).distance(self.reference)


def largest(prior: DiffusionPrior, sampler: str, budget: int) -> int:
    r"""Returns the largest number of steps that a sampler makes with so many evaluations."""
    steps = range(budget, 0, -1)
    return next((n for n in steps if num_evaluations(prior, sampler, n) <= budget), 0)


def parse(path: Path, row: dict[str, str]) -> Row:
    r"""Returns a row of a table with its numbers."""
    try:
        return {name: kind(row[name]) for name, kind in COLUMNS.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, mend or remove it: no number in {row}") from error


def show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
