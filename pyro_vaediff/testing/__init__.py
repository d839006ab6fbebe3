r"""Linear-Gaussian oracles: the exact ELBO, its terms and gradients, and the evidence.

:func:`linear_gaussian_vae` makes a VAE whose networks are affine, and an :class:`Oracle` knows the
expectation of every estimator of its ELBO: whoever writes an estimator can test it. In continuous
time, a :class:`ContinuousOracle` does. For other linear-Gaussian programs, such as hierarchies,
there is :func:`exact_elbo`. Counts of a known generator are :func:`synthetic_counts`.
"""

from .continuous import ContinuousOracle
from .counts import Counts, synthetic_counts
from .cubature import exact_elbo
from .linear_gaussian import (
    LinearDenoiser,
    LinearGaussian,
    SmoothDenoiser,
    linear_gaussian_vae,
    one_copy_per_datum,
)
from .oracle import Oracle

__all__ = [
    "ContinuousOracle",
    "Counts",
    "LinearDenoiser",
    "LinearGaussian",
    "Oracle",
    "SmoothDenoiser",
    "exact_elbo",
    "linear_gaussian_vae",
    "one_copy_per_datum",
    "synthetic_counts",
]
