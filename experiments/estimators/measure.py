r"""What a comparison measures: estimators at moments of training, and the noise of timesteps."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vaediff.bench import (
    Entry,
    Reference,
    draw_values,
    exact_reference,
    exhaustive_reference,
    gradient_noise_by_timestep,
    measure,
    measure_costs,
    minibatch_noise,
    optimal_proposal,
    rms_error,
    training_step,
)
from pyro_vaediff.diffusion import base_normal
from pyro_vaediff.infer import ImportanceTimesteps, UniformTimesteps
from pyro_vaediff.priors import DiffusionPrior
from pyro_vaediff.vae import VAE

from .entries import BASELINE, ENTRIES
from .minibatches import Record, mean_reference, over_minibatches

__all__ = ["CONVERGENCE", "choose", "measure_all", "measure_noise_by_timestep", "split_refused"]

CONVERGENCE = (
    BASELINE,
    "importance LD k=1 | z_0",
    "importance LD k=8 | z_0",
    "importance LD k=8 | z_0, antithetic, path, 2 particles",
    "all | z_0",
    "TraceMeanField_ELBO, posterior",
)


def choose(patterns: Sequence[str]) -> list[Entry]:
    r"""Returns the entries whose names contain one of the patterns, and the baseline."""
    entries = [
        entry
        for entry in ENTRIES.values()
        if entry.name == BASELINE or not patterns or any(p in entry.name for p in patterns)
    ]
    if unmatched := [p for p in patterns if not any(p in name for name in ENTRIES)]:
        raise ValueError(f"--only {unmatched[0]!r} matches none of: {'; '.join(ENTRIES)}")
    return entries


def split_refused(
    entries: Sequence[Entry], vae: VAE, x: Tensor
) -> tuple[list[Entry], dict[str, str]]:
    r"""Returns the estimators that are for a model, and why the others are not, by name.

    An estimator that is not legal for a model says so by a ``ValueError``: at the first step, or
    when it is asked for the bias that theory predicts.

    Arguments:
        entries: The estimators.
        vae: The VAE.
        x: A few data, with shape :math:`(B, *)`.

    Raises:
        ValueError: If the baseline is not for the model.
    """
    kept, reasons = [], {}
    for entry in entries:
        try:
            training_step(entry, vae, x)()
            if entry.predict is not None:
                entry.predict(entry.make(), vae, x, 1)
        except ValueError as error:
            if entry.name == BASELINE:
                raise
            reasons[entry.name] = " ".join(str(error).split())
        else:
            kept.append(entry)
    return kept, reasons


def measure_all(
    entries: Sequence[Entry], moments: Mapping[str, VAE], x: Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    r"""Returns all that is measured beside times, as a record of numbers and texts.

    Arguments:
        entries: The estimators.
        moments: The model at each moment of training.
        x: Minibatches, with shape :math:`(N, B, *)`. The first ones are for the estimators, and all
            of them for the minibatch's own noise.
        args: The arguments of the script.
    """
    last = list(moments.values())[-1]
    entries, reasons = split_refused(entries, last, x[0, :2])
    batches = x[: args.minibatches]
    found: list[Record] = []
    with tqdm(total=len(moments) * len(entries), unit="estimator", disable=args.quiet) as bar:
        for moment, vae in moments.items():
            torch.manual_seed(args.seed)
            bar.set_description(f"{moment}: reference")
            make = exact_reference if args.oracle else exhaustive_reference
            references = [make(vae, batch) for batch in batches]
            tables: list[list[Record]] = [[] for _ in batches]
            for entry in entries:
                bar.update()
                if entry.unrolled and vae is not last:
                    continue
                bar.set_description(f"{moment}: {entry.name}")
                for number, batch in enumerate(batches):
                    record = measure_one(entry, vae, batch, references[number], number, args)
                    tables[number].append({"moment": moment} | record)
            found.append(
                {
                    "moment": moment,
                    "reference": mean_reference(references),
                    "noise": minibatch_noise(vae, x.unbind()),
                    "records": over_minibatches(tables),
                }
            )
        bar.set_description("cost")
        costs = measure_costs(entries, last, batches[0], repeats=0)
        for record in (record for part in found for record in part["records"]):
            record |= costs[record["estimator"]]
        bar.set_description("convergence")
        errors = measure_errors(entries, last, batches[0], references[0], args)
        bar.set_description("noise by timestep")
        by_timestep = measure_noise_by_timestep(last, batches[0, : args.noise_data], args)
    if not by_timestep:
        why = "it is that of a single diffusion prior, with three timesteps or more"
        reasons["the gradient noise by timestep"] = why
    return {
        "moments": found,
        "left_out": reasons,
        "errors": errors,
        "floor": references[0].value_se,
        "by_timestep": by_timestep,
    }


def measure_one(
    entry: Entry, vae: VAE, x: Tensor, reference: Reference, number: int, args: argparse.Namespace
) -> Record:
    r"""Returns the record of an estimator on the minibatch of that number."""
    # Those of a few timesteps are cheap, and have all their draws.
    slow = entry.unrolled or entry.group == "exhaustive"
    seconds = args.seconds if slow else math.inf
    seed = args.seed + number
    record, _ = measure(entry, vae, x, reference, args.draws, seconds, args.min_draws, seed)
    return record


def measure_errors(
    entries: Sequence[Entry], vae: VAE, x: Tensor, reference: Reference, args: argparse.Namespace
) -> dict[str, dict]:
    r"""Returns the error of the value against the number of samples, for some estimators."""
    errors = {}
    for entry in entries:
        if entry.name in CONVERGENCE:
            values = draw_values(entry, vae, x, args.values, 8 * args.seconds)
            samples, error = rms_error(values, reference.value)
            biased = bool(entry.counterexample)
            name = entry.name.replace(" | ", " given ")
            curve = {"samples": samples.tolist(), "error": error.tolist(), "biased": biased}
            errors[name] = curve
    return errors


def measure_noise_by_timestep(vae: VAE, x: Tensor, args: argparse.Namespace) -> list[dict]:
    r"""Returns the gradient noise of each of some timesteps, and what proposals make of it.

    There are no rows for a chain of less than three steps, a hierarchy or a prior in continuous
    time, and none given x for a posterior that is not Gaussian.
    """
    prior = vae.prior
    if not isinstance(prior, DiffusionPrior) or prior.continuous or prior.schedule.learned:
        return []
    if (T := prior.num_timesteps) < 3:
        return []
    t = torch.logspace(0, 1, args.points, base=T / 2).mul(2).round().long().clamp(2, T).unique()
    columns = {"t": t}
    gaussian = base_normal(vae.encoder(x)) is not None
    for given in ("z_0", "x") if gaussian else ("z_0",):
        noise = gradient_noise_by_timestep(vae, x, t.tolist(), given, args.noise_draws)
        columns |= {f"{module} given {given}": rms for module, rms in noise.items()}
    columns["r optimal"] = optimal_proposal(t, columns["prior given z_0"].cpu(), T)
    proposals = {"importance": ImportanceTimesteps(), "uniform": UniformTimesteps()}
    for name, proposal in proposals.items():
        columns[f"r {name}"] = proposal(prior, "z_0").cpu()[t - 2]
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]
