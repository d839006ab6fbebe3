r"""Samples of priors and of VAEs, and the probability flow of a diffusion prior."""

from .guidance import guided
from .probability_flow import ProbabilityFlow
from .samplers import ddim, interpolate, point, reconstruct, sample, trajectory

__all__ = [
    "ProbabilityFlow",
    "ddim",
    "guided",
    "interpolate",
    "point",
    "reconstruct",
    "sample",
    "trajectory",
]
