r"""An estimator on the bench."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..infer import Estimator, Proposal, Timestep_ELBO, particle_options

__all__ = ["Entry", "timestep_entry"]


@dataclass(frozen=True)
class Entry:
    r"""An estimator of the ELBO, and what the bench has to know of it.

    Arguments:
        name: Its name, in tables and on plots.
        group: The family that it belongs to, which decides its color.
        make: A function without arguments that returns a new estimator.
        order: The order of the guide of the diffusion prior, if it is not to stay as it is.
        unrolled: Whether all :math:`T + 1` sites are sampled, at a cost that grows with :math:`T`.
        warmup: The number of evaluations that its proposal learns from before it is measured.
        counterexample: Why it is no estimator of the ELBO, if it is not.
        predict: A function of the estimator, the VAE, the data and a number of draws, that returns
            independent predictions of its bias in nats per datum.
    """

    name: str
    group: str
    make: Callable[[], Estimator]
    order: str | None = None
    unrolled: bool = False
    warmup: int = 0
    counterexample: str = ""
    predict: Callable[[Any, Any, Tensor, int], Sequence[float]] | None = None


def timestep_entry(
    timesteps: str,
    k: int = 1,
    conditioning: str = "z_0",
    group: str = "",
    make: type[Timestep_ELBO] = Timestep_ELBO,
    proposal: Callable[[], Proposal] | None = None,
    **options: Any,
) -> Entry:
    r"""Returns the entry of a :class:`~pyro_vaediff.infer.Timestep_ELBO`, named by its options.

    Arguments:
        timesteps: The name of the proposal.
        k: The number of timesteps per datum.
        conditioning: What the KLs are given.
        group: The family, by default ``"given z_0"`` or ``"given x"``.
        make: The class of the estimator.
        proposal: A function that returns a new proposal, if it is not one of the library.
        options: More keyword arguments. By default, all that lowers the noise is off.

    Example:
        >>> timestep_entry("importance", k=8, low_discrepancy=True).name
        'importance LD k=8 | z_0'
    """
    plain: dict[str, Any] = {"low_discrepancy": False, "antithetic": False, "entropy": "exact"}
    options = plain | options
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
    options |= {"k": k, "conditioning": conditioning} | particle_options(particles)
    return Entry(
        name,
        group or f"given {conditioning}",
        lambda: make(timesteps if proposal is None else proposal(), **options),
        warmup=40 if timesteps.endswith("-aware") else 0,  # it learns
    )
