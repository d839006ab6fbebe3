r"""Diffusion priors in variational autoencoders, written as Pyro programs."""

from . import diffusion, infer, nn, priors, schedules
from .infer import Timestep_ELBO, TraceKL_ELBO
from .priors import DiffusionPrior, FlowPrior, GaussianPrior, MixturePrior, Prior, VampPrior
from .register import register
from .vae import VAE

__version__ = "0.1.0"

__all__ = [
    "VAE",
    "DiffusionPrior",
    "FlowPrior",
    "GaussianPrior",
    "MixturePrior",
    "Prior",
    "Timestep_ELBO",
    "TraceKL_ELBO",
    "VampPrior",
    "diffusion",
    "infer",
    "nn",
    "priors",
    "register",
    "schedules",
]
