r"""Estimators by name."""

from __future__ import annotations

import inspect
from typing import Any

from pyro.infer import Trace_ELBO

from ..arguments import check_choice, check_whole
from .multi_sample import IWAE_ELBO, DReG_ELBO
from .reweighted import Reweighted
from .timestep_elbo import Timestep_ELBO
from .trace_kl_elbo import TraceKL_ELBO

__all__ = ["ESTIMATORS", "MULTI_SAMPLE", "make_elbo", "particle_options"]

#: Bounds of many samples.
MULTI_SAMPLE: dict[str, Any] = {"iwae": IWAE_ELBO, "dreg": DReG_ELBO}
ESTIMATORS: dict[str, Any] = {
    "timestep": Timestep_ELBO, "trace": Trace_ELBO, "trace-kl": TraceKL_ELBO, **MULTI_SAMPLE
}  # fmt: skip


def particle_options(num_particles: int) -> dict[str, Any]:
    r"""Returns the options of an estimator with that many vectorized particles, for a VAE.

    They are in a plate outside of those of the data and of the timesteps.

    Arguments:
        num_particles: The number of particles.
    """
    check_whole("num_particles", num_particles)
    if num_particles == 1:
        return {}
    return {
        "num_particles": num_particles, "vectorize_particles": True, "max_plate_nesting": 3
    }  # fmt: skip


def make_elbo(name: str, weighting: str = "elbo", **options: Any) -> Trace_ELBO:
    r"""Returns the estimator of that name.

    Arguments:
        name: ``"timestep"``, ``"trace"`` or ``"trace-kl"``; or a bound of many samples, ``"iwae"``
            or ``"dreg"``.
        weighting: ``"elbo"``, or the name of a :class:`Reweighted` objective, which is no bound.
        options: Keyword arguments of :class:`Timestep_ELBO`. The other estimators take those that
            apply to them: they have no timesteps to choose.
    """
    check_choice("estimator", name, ESTIMATORS)
    if name != "timestep":
        ours, theirs = (inspect.signature(made) for made in (ESTIMATORS[name], Trace_ELBO))
        known = {*ours.parameters, *theirs.parameters}
        options = {key: value for key, value in options.items() if key in known}
    elbo = ESTIMATORS[name](**options)
    return elbo if weighting == "elbo" else Reweighted(elbo, weighting)
