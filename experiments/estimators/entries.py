r"""The estimators on the bench, one entry each."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_vaediff.bench import Entry, timestep_entry
from pyro_vaediff.infer import TraceKL_ELBO
from pyro_vaediff.vae import VAE

from .contenders import (
    GradientAware,
    Orthogonal_ELBO,
    Shared_ELBO,
    SobolPerBatch_ELBO,
    SobolPerDatum_ELBO,
)
from .corrections import ControlVariate_ELBO, Hybrid_ELBO, Regressed_ELBO, Taylor_ELBO
from .counterexamples import NoisyIWAE, log_mean_exp_bias, mean_field_bias
from .per_datum import PerDatum_ELBO
from .score import ScoreFunction_ELBO, VarGrad_ELBO

__all__ = ["BASELINE", "ENTRIES", "SERIOUS"]


def predict_mean_field(
    order: str, elbo: TraceMeanField_ELBO, vae: VAE, x: Tensor, draws: int
) -> list[float]:
    r"""Returns predictions of the bias of closed-form KLs, one per draw."""
    return mean_field_bias(vae, x, order, draws=max(4, draws // 4)).tolist()


def predict_log_mean_exp(elbo: NoisyIWAE, vae: VAE, x: Tensor, draws: int) -> list[float]:
    r"""Returns predictions of the bias of a log-mean-exp, each from draws of its own."""
    return [log_mean_exp_bias(elbo, vae, x, max(4, draws // 8)) for _ in range(4)]


LD: dict[str, Any] = {"low_discrepancy": True}
ANTITHETIC = LD | {"antithetic": True}

_entries = [
    # What everything is compared with: one uniform timestep per datum, as in the paper.
    timestep_entry("uniform"),
    # All T sites, as the programs are written.
    Entry("Trace_ELBO", "unrolled", Trace_ELBO, "forward", unrolled=True),
    Entry("TraceGraph_ELBO", "unrolled", TraceGraph_ELBO, "forward", unrolled=True),
    Entry("closed-form KLs, posterior", "unrolled", TraceKL_ELBO, "posterior", unrolled=True),
    Entry("closed-form KLs, reversed", "unrolled", TraceKL_ELBO, "reversed", unrolled=True),
    # All timesteps at once.
    timestep_entry("all", group="exhaustive"),
    timestep_entry("all", conditioning="x", group="exhaustive"),
    # Which timesteps, given what.
    *(
        timestep_entry(proposal, k, conditioning, low_discrepancy=ld)
        for conditioning in ("z_0", "x")
        for k in (1, 8)
        for proposal, ld in itertools.product(
            ("uniform", "importance", "loss-aware"), (False, True)
        )
        if (proposal, k, ld, conditioning) != ("uniform", 1, False, "z_0")
    ),
    # How many.
    *(timestep_entry("importance", k, **LD) for k in (2, 4, 16, 32, 64)),
    # Less noise from the same timesteps.
    timestep_entry("importance", 8, entropy="path", group="less noise", **LD),
    *(timestep_entry("importance", k, group="less noise", **ANTITHETIC) for k in (2, 8, 16)),
    timestep_entry("importance", 8, "x", group="less noise", **ANTITHETIC),
    timestep_entry("importance", 8, entropy="path", group="less noise", **ANTITHETIC),
    timestep_entry("importance", 8, num_particles=2, group="less noise", **LD),
    timestep_entry("importance", 8, num_particles=2, group="less noise", **ANTITHETIC),
    *(
        timestep_entry(
            "importance", k, entropy="path", num_particles=2, group="less noise", **ANTITHETIC
        )
        for k in (8, 16)
    ),
    # Ideas that did not win.
    *(
        timestep_entry("gradient-aware", 8, given, "other ideas", proposal=GradientAware, **LD)
        for given in ("z_0", "x")
    ),
    *(
        timestep_entry("importance", 8, group="other ideas", make=make, **LD)
        for make in (Hybrid_ELBO, ControlVariate_ELBO, Orthogonal_ELBO, Shared_ELBO)
    ),
    *(
        timestep_entry("importance", 8, group="other ideas", make=make)
        for make in (SobolPerDatum_ELBO, SobolPerBatch_ELBO)
    ),
    *(
        timestep_entry("importance", k, given, "other ideas", PerDatum_ELBO, **LD)
        for given in ("z_0", "x")
        for k in (1, 8)
    ),
    *(
        replace(
            timestep_entry("importance", 8, make=make, group="other ideas", **options),
            warmup=40,  # it learns
        )
        for make, options in (
            (Regressed_ELBO, LD),
            (Regressed_ELBO, ANTITHETIC),
            (Taylor_ELBO, LD),
        )
    ),
    # The encoder's gradient without a path.
    *(
        timestep_entry("importance", 8, make=make, group="score function", **LD)
        for make in (ScoreFunction_ELBO, VarGrad_ELBO)
    ),
    # What is not an estimator of the bound.
    *(
        Entry(
            f"TraceMeanField_ELBO, {order}",
            "counterexample",
            TraceMeanField_ELBO,
            order,
            unrolled=True,
            counterexample="closed-form KLs where they are illegal",
            predict=partial(predict_mean_field, order),
        )
        for order in ("forward", "posterior")
    ),
    Entry(
        "log-mean-exp of 16 x uniform k=1 | z_0",
        "counterexample",
        lambda: NoisyIWAE("uniform", k=1, low_discrepancy=False, num_particles=16),
        counterexample="a log-mean-exp of noisy estimates",
        predict=predict_log_mean_exp,
    ),
]

#: The estimators by name, in the order of the tables. To add one, add an entry.
ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _entries}

#: The name of the paper's choice, with which the others are compared.
BASELINE = "uniform k=1 | z_0"

#: The estimators that one might train with, for the comparison in equal time.
SERIOUS = (
    BASELINE,
    "importance LD k=1 | z_0",
    "importance LD k=8 | z_0",
    "importance LD k=8 | z_0, antithetic",
    "importance LD k=8 | z_0, antithetic, path",
    "importance LD k=8 | z_0, antithetic, path, 2 particles",
    "importance LD k=8 | x, antithetic",
)
