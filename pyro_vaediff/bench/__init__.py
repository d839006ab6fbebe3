r"""The bench, on which estimators of the ELBO are compared.

Whoever writes an estimator can test that it is unbiased against the closed forms of
:mod:`pyro_vaediff.testing`; an :class:`Entry` puts it next to others.
"""

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
    Reference,
    add_merits,
    draw_values,
    exact_reference,
    exhaustive_reference,
    measure,
    measure_costs,
    minibatch_noise,
    rms_error,
    training_step,
)

__all__ = [
    "Draws",
    "Entry",
    "Noise",
    "Reference",
    "add_merits",
    "count_evaluations",
    "draw",
    "draw_values",
    "exact_reference",
    "exhaustive_reference",
    "gradient_noise_by_timestep",
    "measure",
    "measure_costs",
    "minibatch_noise",
    "noise_of",
    "optimal_proposal",
    "peak_memory",
    "rms_error",
    "step_times",
    "timestep_entry",
    "training_step",
    "whole_step",
]
