r"""What a comparison measures beside variances: errors of the value, and the noise of each step."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_vaediff.bench import (
    Entry,
    Reference,
    draw_values,
    gradient_noise_by_timestep,
    optimal_proposal,
    rms_error,
)
from pyro_vaediff.infer import ImportanceTimesteps, UniformTimesteps
from pyro_vaediff.sampling.samplers import check_diffusion
from pyro_vaediff.vae import VAE

from .entries import BASELINE, ENTRIES

__all__ = ["CONVERGENCE", "choose", "measure_errors", "measure_noise_by_timestep"]

CONVERGENCE = (
    BASELINE,
    "importance LD k=1 | z_0",
    "importance LD k=8 | z_0",
    "importance LD k=8 | z_0, antithetic, path, 2 particles",
    "all | z_0",
    "TraceMeanField_ELBO, posterior",
)


# What is measured ---------------------------------------------------------------------------------


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
            errors[name] = {"samples": samples, "error": error, "biased": biased}
    return errors


def measure_noise_by_timestep(vae: VAE, x: Tensor, args: argparse.Namespace) -> list[dict]:
    r"""Returns the gradient noise of each of some timesteps, and what proposals make of it."""
    T = check_diffusion(vae.prior).num_timesteps
    if T < 3:
        return []
    t = torch.logspace(0, 1, args.points, base=T / 2).mul(2).round().long().clamp(2, T).unique()
    columns = {"t": t}
    for given in ("z_0", "x"):
        noise = gradient_noise_by_timestep(vae, x, t.tolist(), given, args.noise_draws)
        columns |= {f"{module} given {given}": rms for module, rms in noise.items()}
    columns["r optimal"] = optimal_proposal(t, columns["prior given z_0"].cpu(), T)
    proposals = {"importance": ImportanceTimesteps(), "uniform": UniformTimesteps()}
    for name, proposal in proposals.items():
        columns[f"r {name}"] = proposal(vae.prior, "z_0").cpu()[t - 2]
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]
