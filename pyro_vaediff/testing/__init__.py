r"""Linear-Gaussian oracles: the exact ELBO, its terms and gradients, and the evidence.

:func:`linear_gaussian_vae` makes a VAE whose networks are affine, and an :class:`Oracle` knows the
expectation of every estimator of its ELBO: whoever writes an estimator can test it. In continuous
time, a :class:`ContinuousOracle` does. For other linear-Gaussian programs, such as hierarchies,
there is :func:`exact_elbo`.
"""

from .continuous import ContinuousOracle
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
    "LinearDenoiser",
    "LinearGaussian",
    "Oracle",
    "SmoothDenoiser",
    "exact_elbo",
    "linear_gaussian_vae",
    "one_copy_per_datum",
]
