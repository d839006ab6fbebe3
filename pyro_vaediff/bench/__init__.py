r"""The bench, on which estimators of the ELBO are compared, and the exact numbers behind it.

:func:`linear_gaussian_vae` makes a VAE whose networks are affine, and an :class:`Oracle` knows the
expectation of every estimator of its ELBO. Whoever writes an estimator can test that it is
unbiased; an :class:`Entry` in :data:`ENTRIES` puts it next to the others.
"""

from ..testing.linear_gaussian import (
    LinearDenoiser,
    LinearGaussian,
    linear_gaussian_vae,
    one_copy_per_datum,
)
from ..testing.oracle import Oracle
from .cost import count_evaluations, peak_memory, step_times, svi_step
from .entries import BASELINE, ENTRIES, SERIOUS, Entry, timestep_entry
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
from .page import markdown_table, write_page, write_pictures

__all__ = [
    "BASELINE",
    "ENTRIES",
    "SERIOUS",
    "Draws",
    "Entry",
    "LinearDenoiser",
    "LinearGaussian",
    "Noise",
    "Oracle",
    "Reference",
    "add_merits",
    "count_evaluations",
    "draw",
    "draw_values",
    "exact_reference",
    "exhaustive_reference",
    "gradient_noise_by_timestep",
    "linear_gaussian_vae",
    "markdown_table",
    "measure",
    "measure_costs",
    "minibatch_noise",
    "noise_of",
    "one_copy_per_datum",
    "optimal_proposal",
    "peak_memory",
    "rms_error",
    "step_times",
    "svi_step",
    "timestep_entry",
    "training_step",
    "write_page",
    "write_pictures",
]
