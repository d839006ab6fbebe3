r"""Configurations of models and of their training, as checkpoints carry them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ModelConfig", "TrainConfig"]


@dataclass(frozen=True)
class ModelConfig:
    r"""What determines the architecture of a VAE; a checkpoint carries it.

    Arguments:
        prior: The prior, ``"gaussian"``, ``"flow"`` or ``"diffusion"``.
        latent_dim: The number of latent dimensions :math:`D`.
        image_shape: The shape :math:`(C, H, W)` of an image.
        levels: The number of values of a pixel.
        likelihood: The likelihood, see :func:`~pyro_vaediff.likelihoods.make_likelihood`.
        networks: ``"default"``, or ``"paper"`` for the networks of the paper's code.
        width: The number of channels of the first convolution.
        num_timesteps: The number of steps :math:`T` of a diffusion prior.
        schedule: The variance schedule of a diffusion prior.
        parameterization: What the denoiser of a diffusion prior predicts.
        reverse_variance: The reverse variance of a diffusion prior.
    """

    prior: str = "diffusion"
    latent_dim: int = 16
    image_shape: Sequence[int] = (1, 8, 8)
    levels: int = 256
    likelihood: str = "gaussian"
    networks: str = "default"
    width: int = 32
    num_timesteps: int = 1000
    schedule: str = "linear"
    parameterization: str = "eps"
    reverse_variance: str = "beta"


@dataclass(frozen=True)
class TrainConfig:
    r"""The settings of a training run.

    Arguments:
        epochs: The number of passes over the training images.
        batch_size: The number of images per step.
        lr: The learning rate of Adam.
        lr_schedule: ``"constant"`` or ``"cosine"`` (to zero at the last step).
        clip_norm: The largest global norm of the gradient of the loss in nats per datum.
        ema: The decay of an exponential moving average of the weights, which then is what is
            evaluated and kept; 0 for none.
        precision: ``"float32"``, ``"float64"``, or ``"bf16"`` for autocast of the convolutions.
        seed: The seed of everything random.
    """

    epochs: int = 100
    batch_size: int = 100
    lr: float = 5e-4
    lr_schedule: str = "constant"
    clip_norm: float | None = 100.0
    ema: float = 0.0
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {self.clip_norm}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        for name, choices in (
            ("lr_schedule", ("constant", "cosine")),
            ("precision", ("float32", "float64", "bf16")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(choices)}"
                )
