r"""Training: the loop, its optimizer, checkpoints, configurations and reports of runs."""

from .build import make_prior, make_vae
from .config import ModelConfig, TrainConfig
from .loop import NonFiniteError, Trainer
from .report import report
from .runs import load_checkpoint, load_data, load_vae, load_weights, save_checkpoint

__all__ = [
    "ModelConfig",
    "NonFiniteError",
    "TrainConfig",
    "Trainer",
    "load_checkpoint",
    "load_data",
    "load_vae",
    "load_weights",
    "make_prior",
    "make_vae",
    "report",
    "save_checkpoint",
]
