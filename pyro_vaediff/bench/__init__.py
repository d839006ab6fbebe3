r"""The bench, on which estimators of the ELBO are compared.

Whoever writes an estimator can test that it is unbiased against the closed forms of
:mod:`pyro_vaediff.testing`; :func:`compare` puts it next to others, for any pair of programs.
"""

from .compare import Comparison, compare
from .cost import count_evaluations, peak_memory, step_times, whole_step
from .entry import Entry, timestep_entry
from .gradients import (
    Draws,
    Noise,
    draw,
    gradient_noise_by_timestep,
    noise_of,
    optimal_proposal,
)
from .harness import (
    add_merits,
    draw_values,
    measure,
    measure_costs,
    minibatch_noise,
    rms_error,
    training_step,
)
from .paired import Difference, common_random_numbers, paired_difference
from .pareto import pareto_front, plot_pareto
from .programs import Programs, diffusion_priors, find_programs, programs_of
from .reference import Reference, estimated_reference, exact_reference, exhaustive_reference

__all__ = [
    "Comparison",
    "Difference",
    "Draws",
    "Entry",
    "Noise",
    "Programs",
    "Reference",
    "add_merits",
    "common_random_numbers",
    "compare",
    "count_evaluations",
    "diffusion_priors",
    "draw",
    "draw_values",
    "estimated_reference",
    "exact_reference",
    "exhaustive_reference",
    "find_programs",
    "gradient_noise_by_timestep",
    "measure",
    "measure_costs",
    "minibatch_noise",
    "noise_of",
    "optimal_proposal",
    "paired_difference",
    "pareto_front",
    "peak_memory",
    "plot_pareto",
    "programs_of",
    "rms_error",
    "step_times",
    "timestep_entry",
    "training_step",
    "whole_step",
]
