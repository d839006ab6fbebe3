r"""The configuration of a run, in dataclasses: one field per option, in one place.

A field is an option of ``experiments/run.py``, a key of its TOML presets, its help and its check;
see :mod:`~pyro_vaediff.train.options`.
"""

# ruff: noqa: RUF009

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..arguments import check_nonnegative, check_seed
from ..data import DATASETS
from ..evaluate import EXTRACTORS
from ..infer import ESTIMATORS, MULTI_SAMPLE, PROPOSALS, REWEIGHTINGS
from ..sampling import SAMPLERS
from .model_config import DIFFUSION, ModelConfig, Users
from .options import Checked, choice, number, option, positive, whole

__all__ = [
    "DataConfig",
    "EstimatorConfig",
    "ModelConfig",
    "ReportConfig",
    "RunConfig",
    "TrainConfig",
]

TIMESTEP: Users = {"estimator": ("timestep",)}
TERMS: Users = {"estimator": ("timestep", "trace-kl")}


@dataclass(frozen=True)
class DataConfig(Checked):
    r"""The images."""

    dataset: str = option("digits", "the data set", choice(DATASETS, "data set"))
    root: str = option("data", "where the data are, or go")
    image_size: int | None = option(None, "resize and crop images to this many pixels", whole())
    limit: int | None = option(None, "use at most this many images per split", whole())
    num_validation: int | None = option(
        None,
        "training images kept for validation (a tenth; mnist, fashion-mnist, cifar10)",
        whole(),
    )
    groups: Path | None = option(
        None,
        "folder: a list 'FILE GROUP' whose groups, such as persons, are kept in one split each",
        metavar="FILE",
    )
    no_download: bool = option(False, "never download data")
    condition: str = option("none", "the context of the model", choice(("none", "labels")))


@dataclass(frozen=True)
class EstimatorConfig(Checked):
    r"""How the bound is estimated in training."""

    estimator: str = option(
        "timestep",
        "timestep: from k timesteps per datum; trace: Pyro's Trace_ELBO, all T sites; trace-kl: "
        "all T sites, closed-form KLs; iwae, dreg: the importance-weighted bound of num_particles "
        "draws of all T sites, with its plain or its doubly reparameterized gradient",
        choice(ESTIMATORS),
    )
    timesteps: str = option(
        "importance", "the proposal of timesteps", choice(("all", *PROPOSALS)), of=TIMESTEP
    )
    k: int | str = option(
        8,
        "timesteps per datum, or 'auto' for the number that the noise of the gradient is worth",
        whole(word="auto"),
        metavar="K",
        of=TIMESTEP,
    )
    conditioning: str = option(
        "z_0", "the variable that the KLs are given", choice(("z_0", "x")), of=TIMESTEP
    )
    no_antithetic: bool = option(False, "independent noise in place of mirrored pairs", of=TERMS)
    entropy: str = option(
        "path",
        "entropy of q(z_0 | x): exact, or sampled for its path derivative",
        choice(("path", "exact")),
        of=TERMS,
    )
    num_particles: int = option(1, "draws of z_0 per datum", whole())
    weighting: str = option(
        "elbo",
        "weights of the terms in training; elbo is the bound itself",
        choice(("elbo", *REWEIGHTINGS)),
        of=TERMS | DIFFUSION,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k == "auto" and (self.timesteps == "all" or self.estimator != "timestep"):
            raise ValueError(
                "k='auto' needs timesteps that are drawn, got "
                f"estimator={self.estimator!r} and timesteps={self.timesteps!r}"
            )
        if self.weighting != "elbo" and self.conditioning == "x":
            raise ValueError(
                f"weighting={self.weighting!r} is defined for conditioning='z_0', got 'x'"
            )
        if self.estimator in MULTI_SAMPLE and self.num_particles == 1:
            raise ValueError(
                f"estimator={self.estimator!r} of one particle is the ELBO: give num_particles, "
                "such as 8"
            )


@dataclass(frozen=True)
class TrainConfig(Checked):
    r"""How a model is trained. The first budget that is spent ends the training.

    Example:
        >>> TrainConfig(epochs=10_000, max_steps=5000, patience=3).batch_size
        100
    """

    epochs: int = option(100, "passes that train everything", whole(0))
    gaussian_epochs: int | str = option(
        0,
        "number of the first of these in which N(0, I) takes the place of the prior; 'auto': until "
        "the encoder has settled, at most a quarter of them",
        whole(0, word="auto"),
        metavar="N",
    )
    prior_epochs: int = option(0, "passes after --epochs that train only the prior", whole(0))
    batch_size: int = option(100, "images per step, of all processes together", whole())
    lr: float = option(5e-4, "learning rate of Adam", positive)
    prior_lr: float | None = option(None, "learning rate of the prior (that of --lr)", positive)
    prior_weight_decay: float = option(
        0.0,
        "decoupled weight decay of the prior's matrices",
        check_nonnegative,
    )
    lr_schedule: str = option(
        "constant",
        "schedule of the learning rates: cosine to zero, inverse-sqrt of the step without an end",
        choice(("constant", "cosine", "inverse-sqrt")),
    )
    warmup: int = option(0, "steps over which the learning rates rise from zero", whole(0))
    beta: tuple[float, ...] = option(
        (),
        "weight of the KL, or one for each group of latents from the top (1); a bound only at 1",
        metavar="WEIGHT",
    )
    tc_weight: float = option(
        1.0, "weight of the total correlation of the latents (beta-TCVAE)", check_nonnegative
    )
    kl_warmup: int = option(0, "epochs over which the weight of the KL rises from 0 to 1", whole(0))
    kl_balance: bool = option(
        False, "balance the KLs of the groups of latents during the warm-up (NVAE)"
    )
    free_bits: float = option(
        0.0,
        "nats per datum of the KL of each group of latents that cost nothing",
        check_nonnegative,
    )
    clip_norm: float | None = option(
        100.0, "largest global norm of the gradient, per datum", number("positive", lambda x: x > 0)
    )
    ema: float = option(
        0.0,
        "decay of the moving average of the weights, 0 for none",
        number("in [0, 1)", lambda x: 0 <= x < 1),
    )
    ema_share: float = option(
        0.0,
        "share of the steps so far that a weight average is over, in place of --ema",
        number("in [0, 1]", lambda x: 0 <= x <= 1),
    )
    precision: str = option(
        "float32",
        "precision of the networks, bf16 for autocast of the convolutions",
        choice(("float32", "float64", "bf16")),
    )
    channels_last: bool = option(
        False, "memory format of convolutions, which may be faster, above all with bf16"
    )
    seed: int = option(0, "seed of everything random", lambda name, value: check_seed(value, name))
    max_steps: int | None = option(None, "steps after which training ends", whole())
    max_seconds: float | None = option(None, "seconds after which training ends", positive)
    patience: int | None = option(
        None, "epochs without a better validation loss before training ends", whole()
    )
    validate_every: int = option(1, "epochs from one validation to the next", whole())
    validate_k: int = option(
        8, "timesteps per validation image, with the same random numbers each time", whole()
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs == 0 and not self.prior_epochs:
            raise ValueError("epochs must be positive, got 0")
        for value in self.beta:
            check_nonnegative("each of beta", value)
        if self.kl_balance and not self.kl_warmup:
            raise ValueError("kl_balance ends with the warm-up of the KL: give kl_warmup")
        if self.ema and self.ema_share:
            raise ValueError(
                f"ema_share={self.ema_share} takes the place of ema, got {self.ema}: leave one out"
            )
        if isinstance(self.gaussian_epochs, int) and self.gaussian_epochs > self.epochs:
            raise ValueError(
                f"gaussian_epochs must be at most epochs={self.epochs}, got {self.gaussian_epochs}"
            )


@dataclass(frozen=True)
class RunConfig(Checked):
    r"""Where and how a run is executed."""

    init: Path | None = option(
        None,
        "start from the encoder and decoder of this run, and from its prior if of one kind",
        metavar="RUN",
    )
    device: str = option("auto", "where to compute", choice(("auto", "cpu", "cuda")))
    deterministic: bool = option(
        False, "use algorithms that repeat a run exactly, also on a GPU (slower)"
    )
    out: Path | None = option(None, "run directory (runs/DATASET-PRIOR-sSEED)")
    snapshots: tuple[int, ...] = option(
        (), "epochs whose model is kept as epoch-N.pt, 0: its initialization", metavar="EPOCH"
    )
    resume: bool = option(False, "continue the run in --out")
    validate: bool = option(False, "let Pyro check every distribution (slow)")
    quiet: bool = option(False, "no progress bars")


@dataclass(frozen=True)
class ReportConfig(Checked):
    r"""The evaluation after training."""

    features: str = option(
        "auto",
        "features of the Fréchet distance. inception is FID; auto is pixels for digits and "
        "inception otherwise, if its weights can be had",
        choice(("auto", "none", *EXTRACTORS)),
    )
    fid_weights: Path | None = option(None, "a local file of the Inception weights")
    test_k: int = option(
        0, "timesteps per test image of a diffusion prior; 0: all T of them", whole(0)
    )
    num_images: int = option(10_000, "images per side of the Fréchet distance, at most")
    guidance: float = option(
        0.0,
        "weight w of classifier-free guidance, for a picture of samples that are not the model's",
        number("finite", math.isfinite),
        of=DIFFUSION,
    )
    sampler: str = option(
        "ancestral",
        "sampler of the images that are shown and evaluated",
        choice(SAMPLERS),
        of=DIFFUSION,
    )
    sample_steps: int | None = option(
        None, "steps of the sampler, of equal length in time (all T of them)", whole(), of=DIFFUSION
    )

    def check_use(self, model: ModelConfig) -> None:
        r"""Raises a ``ValueError`` if a model has no use for an option."""
        if model.latent_groups and self.sampler != "ancestral":
            raise ValueError(
                "a hierarchy is sampled by its program, got latent_groups and sampler="
                f"{self.sampler!r}: leave it out"
            )
