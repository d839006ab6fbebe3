r"""Diffusion priors in variational autoencoders, written as Pyro programs."""

from . import (
    data,
    denoise,
    diffusion,
    evaluate,
    infer,
    likelihoods,
    nn,
    plotting,
    priors,
    sampling,
    schedules,
    testing,
    train,
)
from .denoise import Denoiser
from .infer import Reweighted, Timestep_ELBO, TraceKL_ELBO
from .priors import (
    DiffusionPrior,
    ExemplarPrior,
    FlowPrior,
    GaussianPrior,
    MixturePrior,
    Prior,
    VampPrior,
)
from .register import register
from .vae import VAE

__version__ = "0.2.0"

__all__ = [
    "VAE",
    "Denoiser",
    "DiffusionPrior",
    "ExemplarPrior",
    "FlowPrior",
    "GaussianPrior",
    "MixturePrior",
    "Prior",
    "Reweighted",
    "Timestep_ELBO",
    "TraceKL_ELBO",
    "VampPrior",
    "data",
    "denoise",
    "diffusion",
    "evaluate",
    "infer",
    "likelihoods",
    "nn",
    "plotting",
    "priors",
    "register",
    "sampling",
    "schedules",
    "testing",
    "train",
]
