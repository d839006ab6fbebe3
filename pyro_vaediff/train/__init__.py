r"""Training: the loop, its optimizer, checkpoints, configurations and reports of runs."""
