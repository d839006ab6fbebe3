r"""Configurations of models and of their training, as checkpoints carry them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from ..arguments import check_choice, check_seed, check_whole

__all__ = ["ModelConfig", "TrainConfig"]


@dataclass(frozen=True)
class ModelConfig:
    r"""What determines the architecture of a VAE; a checkpoint carries it.

    Arguments:
        prior: The prior, a key of :data:`~pyro_vaediff.priors.PRIORS`.
        latent_dim: The number of latent dimensions :math:`D`.
        image_shape: The shape :math:`(C, H, W)` of an image.
        levels: The number of values of a pixel.
        likelihood: The likelihood, see :func:`~pyro_vaediff.likelihoods.make_likelihood`.
        networks: ``"default"``, or ``"paper"`` for the networks of the paper's code.
        width: The number of channels of the first convolution.
        num_components: The number of components :math:`K` of a mixture prior or a VampPrior.
        prior_width: The width of the hidden layers of a flow's or a diffusion prior's networks, or
            ``None`` for that of their own.
        denoiser: The network of a diffusion prior, a key of
            :data:`~pyro_vaediff.train.build.DENOISERS`.
        num_timesteps: The number of steps :math:`T` of a diffusion prior.
        schedule: The variance schedule of a diffusion prior.
        beta_min: The first of the thousand variances of the linear schedule.
        beta_max: The last of the thousand variances of the linear schedule.
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
    num_components: int = 500
    prior_width: int | None = None
    denoiser: str = "residual"
    num_timesteps: int = 1000
    schedule: str = "linear"
    beta_min: float = 1e-4
    beta_max: float = 0.02
    parameterization: str = "eps"
    reverse_variance: str = "beta"

    def __post_init__(self) -> None:
        # All of them, also those that this prior has no use for. Names are checked where they are
        # looked up, by `pyro_vaediff.train.build`.
        for name in ("latent_dim", "width", "num_components", "prior_width", "num_timesteps"):
            if name != "prior_width" or self.prior_width is not None:
                check_whole(name, getattr(self, name))
        if len(self.image_shape) != 3:
            raise ValueError(f"image_shape must be (C, H, W), got {tuple(self.image_shape)}")
        for size in self.image_shape:
            check_whole("each number in image_shape", size)


@dataclass(frozen=True)
class TrainConfig:
    r"""The settings of a training run.

    Arguments:
        epochs: The number of passes over the training images in which all networks are trained.
        gaussian_epochs: The number of these passes, from the first one on, in which
            :math:`\mathcal{N}(0, I)` stands in for the prior.
        prior_epochs: The number of passes after the ``epochs``, in which only the prior is trained.
            Encoder and decoder stay as they are, and the decoder need not be evaluated.
        batch_size: The number of images per step.
        lr: The learning rate of Adam.
        prior_lr: The learning rate of the prior's parameters, or ``None`` for that of the others.
        prior_weight_decay: The decoupled weight decay of the prior's matrices, in units of the
            learning rate; vectors, such as biases, are not decayed.
        lr_schedule: ``"constant"`` or ``"cosine"`` (to zero at the last step, and once more in the
            passes that train only the prior).
        warmup: The number of steps in which the learning rates rise linearly from zero.
        clip_norm: The largest global norm of the gradient of the loss in nats per datum.
        ema: The decay of an exponential moving average of the weights, which then is what is
            evaluated and kept; 0 for none.
        precision: ``"float32"``, ``"float64"``, or ``"bf16"`` for autocast of the convolutions.
        seed: The seed of everything random.
        max_steps: The number of steps after which training ends at the latest, if given.
        max_seconds: The time after which training ends at the latest, if given, validation
            included.
        patience: The number of epochs without a better validation loss after which training ends.
        validate_every: The number of epochs from one validation to the next.
    """

    epochs: int = 100
    gaussian_epochs: int = 0
    prior_epochs: int = 0
    batch_size: int = 100
    lr: float = 5e-4
    prior_lr: float | None = None
    prior_weight_decay: float = 0.0
    lr_schedule: str = "constant"
    warmup: int = 0
    clip_norm: float | None = 100.0
    ema: float = 0.0
    precision: str = "float32"
    seed: int = 0
    max_steps: int | None = None
    max_seconds: float | None = None
    patience: int | None = None
    validate_every: int = 1

    def __post_init__(self) -> None:
        for name in ("max_steps", "patience", "validate_every"):
            if (value := getattr(self, name)) is not None:
                check_whole(name, value)
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds must be positive, got {self.max_seconds!r}")
        for name in ("epochs", "batch_size", "lr", "prior_lr"):
            value = getattr(self, name)
            if name == "epochs" and value == 0 < self.prior_epochs:
                continue
            if value is not None and not (isinstance(value, Real) and 0 < value < math.inf):
                raise ValueError(f"{name} must be positive and finite, got {value!r}")
        for name in ("epochs", "gaussian_epochs", "prior_epochs", "batch_size", "warmup"):
            check_whole(name, getattr(self, name), least=0)
        if self.gaussian_epochs > self.epochs:
            raise ValueError(
                f"gaussian_epochs must be at most epochs={self.epochs}, got {self.gaussian_epochs}"
            )
        check_seed(self.seed)
        clip = self.clip_norm
        if clip is not None and not (isinstance(clip, Real) and clip > 0):
            raise ValueError(f"clip_norm must be positive, got {clip!r}")
        decay = self.prior_weight_decay
        if not (isinstance(decay, Real) and 0 <= decay < math.inf):
            raise ValueError(f"prior_weight_decay must be finite and at least 0, got {decay!r}")
        if not (isinstance(self.ema, Real) and 0 <= self.ema < 1):
            raise ValueError(f"ema must be in [0, 1), got {self.ema!r}")
        check_choice("lr_schedule", self.lr_schedule, ("constant", "cosine"))
        check_choice("precision", self.precision, ("float32", "float64", "bf16"))
