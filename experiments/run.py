r"""Trains, evaluates and shows a variational autoencoder: ``python experiments/run.py --help``.

The script is ``python -m pyro_vaediff``; what it does is in ``pyro_vaediff/train/main.py``.
"""

from __future__ import annotations

import os

os.environ["MPLBACKEND"] = "Agg"  # whatever a notebook has set, which may not be there

from pyro_vaediff.arguments import exit_on_error
from pyro_vaediff.train.main import DEFAULTS, main, parse_args

__all__ = ["DEFAULTS", "main", "parse_args"]

if __name__ == "__main__":
    with exit_on_error("continue with --resume"):
        main()
