r"""The linear-Gaussian oracle: the exact ELBO, its terms and gradients, and the evidence.

:func:`linear_gaussian_vae` makes a VAE whose networks are affine, and an :class:`Oracle` knows the
expectation of every estimator of its ELBO: whoever writes an estimator can test it.
"""

from .linear_gaussian import LinearDenoiser, LinearGaussian, linear_gaussian_vae, one_copy_per_datum
from .oracle import Oracle

__all__ = [
    "LinearDenoiser",
    "LinearGaussian",
    "Oracle",
    "linear_gaussian_vae",
    "one_copy_per_datum",
]
