r"""Contenders of the bench by name, and those that may be given x."""

from __future__ import annotations

from typing import Any

from estimators.contenders import GradientAware, Orthogonal_ELBO, Shared_ELBO, SobolPerDatum_ELBO
from estimators.corrections import ControlVariate_ELBO, Hybrid_ELBO, Regressed_ELBO, Taylor_ELBO
from estimators.per_datum import PerDatum_ELBO

from pyro_vaediff import Timestep_ELBO


def gradient_aware(timesteps="ignored", **options):
    return Timestep_ELBO(GradientAware(), **options)


def regressed(*args, **options):
    r"""With a coefficient as if it had learned."""
    elbo = Regressed_ELBO(*args, **options)
    elbo.products = (0.8, 1.0)
    return elbo


def taylor(*args, **options):
    r"""With a coefficient as if it had learned, and without antithetic pairs."""
    elbo = Taylor_ELBO(*args, **options | {"antithetic": False})
    elbo.products = (0.8, 1.0)
    return elbo


def per_datum(timesteps="ignored", **options):
    return PerDatum_ELBO("importance", **options)


CONTENDERS: dict[str, Any] = {
    "hybrid": Hybrid_ELBO,
    "control variate": ControlVariate_ELBO,
    "regressed": regressed,
    "orthogonal": Orthogonal_ELBO,
    "shared": Shared_ELBO,
    "sobol": SobolPerDatum_ELBO,
    "gradient-aware": gradient_aware,
    "taylor": taylor,
    "per datum": per_datum,
}
GIVEN_X = ("orthogonal", "shared", "gradient-aware", "per datum")
