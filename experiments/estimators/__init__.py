r"""The estimators on the bench: the entries, those that did not win, and their pages."""

from .counterexamples import NoisyIWAE, log_mean_exp_bias, mean_field_bias
from .entries import BASELINE, ENTRIES, SERIOUS
from .page import write_report
from .plots import plot_training

__all__ = [
    "BASELINE",
    "ENTRIES",
    "SERIOUS",
    "NoisyIWAE",
    "log_mean_exp_bias",
    "mean_field_bias",
    "plot_training",
    "write_report",
]
