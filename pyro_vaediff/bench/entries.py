r"""The estimators on the bench, one entry each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from ..infer import Timestep_ELBO, TraceKL_ELBO, particle_options
from .contenders import (
    ControlVariate_ELBO,
    GradientAware,
    Hybrid_ELBO,
    Orthogonal_ELBO,
    Shared_ELBO,
)
from .counterexamples import NoisyIWAE

__all__ = ["BASELINE", "ENTRIES", "SERIOUS", "Entry", "timestep_entry"]


@dataclass(frozen=True)
class Entry:
    r"""An estimator of the ELBO, and what the bench has to know of it.

    Arguments:
        name: Its name, in tables and on plots.
        group: The family that it belongs to, which decides its color.
        make: A function without arguments that returns a new estimator.
        order: The order of the guide of the diffusion prior.
        unrolled: Whether all :math:`T + 1` sites are sampled, at a cost that grows with :math:`T`.
        warmup: The number of evaluations that its proposal learns from before it is measured.
        counterexample: Why it is no estimator of the ELBO, if it is not.
    """

    name: str
    group: str
    make: Callable[[], ELBO]
    order: str = "forward"
    unrolled: bool = False
    warmup: int = 0
    counterexample: str = ""


def timestep_entry(
    timesteps: str,
    k: int = 1,
    conditioning: str = "z_0",
    group: str = "",
    make: type[Timestep_ELBO] = Timestep_ELBO,
    **options,
) -> Entry:
    r"""Returns the entry of a :class:`~pyro_vaediff.infer.Timestep_ELBO`, named by its options.

    Arguments:
        timesteps: The proposal.
        k: The number of timesteps per datum.
        conditioning: What the KLs are given.
        group: The family, by default ``"given z_0"`` or ``"given x"``.
        make: The class of the estimator.
        options: More keyword arguments. By default, all that lowers the noise is off.

    Example:
        >>> timestep_entry("importance", k=8, low_discrepancy=True).name
        'importance LD k=8 | z_0'
    """
    off = {"low_discrepancy": False, "antithetic": False, "entropy": "exact"}
    options = off | options
    name = timesteps + " LD" * options["low_discrepancy"] + f" k={k}" * (timesteps != "all")
    name += f" | {conditioning}"
    particles = options.get("num_particles", 1)
    for extra, condition in (
        ("antithetic", options["antithetic"]),
        ("path", options["entropy"] == "path"),
        (f"{particles} particles", particles > 1),
    ):
        name += f", {extra}" * condition
    if make is not Timestep_ELBO:
        name += f", {make.__name__.removesuffix('_ELBO')}"
    options |= {"k": k, "conditioning": conditioning}
    options |= particle_options(particles)
    proposal = {"gradient-aware": GradientAware}.get(timesteps, lambda: timesteps)
    warmup = 40 if timesteps in ("loss-aware", "gradient-aware") else 0
    return Entry(
        name,
        group or f"given {conditioning}",
        lambda: make(proposal(), **options),
        warmup=warmup,
    )


LD = {"low_discrepancy": True}
ANTITHETIC = LD | {"antithetic": True}

_entries = [
    # What everything is compared with: one uniform timestep per datum, as in the paper.
    timestep_entry("uniform"),
    # All T sites, as the programs are written.
    Entry("Trace_ELBO", "unrolled", Trace_ELBO, unrolled=True),
    Entry("TraceGraph_ELBO", "unrolled", TraceGraph_ELBO, unrolled=True),
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
    timestep_entry("gradient-aware", 8, group="other ideas", **LD),
    timestep_entry("gradient-aware", 8, "x", group="other ideas", **LD),
    timestep_entry("importance", 8, group="other ideas", make=Hybrid_ELBO, **LD),
    timestep_entry("importance", 8, group="other ideas", make=ControlVariate_ELBO, **LD),
    timestep_entry("importance", 8, group="other ideas", make=Orthogonal_ELBO, **LD),
    timestep_entry("importance", 8, group="other ideas", make=Shared_ELBO, **LD),
    # What is not an estimator of the bound.
    *(
        Entry(
            f"TraceMeanField_ELBO, {order}",
            "counterexample",
            TraceMeanField_ELBO,
            order,
            unrolled=True,
            counterexample="closed-form KLs where they are illegal",
        )
        for order in ("forward", "posterior")
    ),
    Entry(
        "log-mean-exp of 16 x uniform k=1 | z_0",
        "counterexample",
        lambda: NoisyIWAE("uniform", k=1, low_discrepancy=False, num_particles=16),
        counterexample="a log-mean-exp of noisy estimates",
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
