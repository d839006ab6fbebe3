r"""Grids of runs of ``run.py``, see ``table.py``."""
