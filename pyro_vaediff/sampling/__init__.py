r"""Samples of priors and of VAEs, and the probability flow of a diffusion prior."""

from .azula import AzulaDenoiser
from .grids import GRIDS, karras_grid, log_snr_grid, time_grid
from .guidance import guided
from .probability_flow import ProbabilityFlow
from .samplers import (
    SAMPLERS,
    ancestral,
    interpolate,
    num_evaluations,
    point,
    reconstruct,
    sample,
    trajectory,
)
from .solvers import ddim, dpm_solver, heun

__all__ = [
    "GRIDS",
    "SAMPLERS",
    "AzulaDenoiser",
    "ProbabilityFlow",
    "ancestral",
    "ddim",
    "dpm_solver",
    "guided",
    "heun",
    "interpolate",
    "karras_grid",
    "log_snr_grid",
    "num_evaluations",
    "point",
    "reconstruct",
    "sample",
    "time_grid",
    "trajectory",
]
