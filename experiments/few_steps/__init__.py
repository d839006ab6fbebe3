r"""What fewer steps cost: the numbers of a run, and their page, for ``experiments/steps.py``."""
