r"""The configuration of a run, in dataclasses: one field per option, in one place.

A field is an option of ``experiments/run.py``, a key of its TOML presets, its help and its check;
see :mod:`~pyro_vaediff.train.options`.
"""

# ruff: noqa: RUF009

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..arguments import as_shape, check_nonnegative, check_seed
from ..data import DATASETS
from ..denoise import PARAMETERIZATIONS, REVERSE_VARIANCES
from ..evaluate import EXTRACTORS
from ..infer import ESTIMATORS, PROPOSALS, REWEIGHTINGS
from ..likelihoods import LIKELIHOODS
from ..nn import BACKBONES, FLOWS, check_latent_groups, check_latent_shape
from ..priors import PRIORS
from ..schedules import SCHEDULES
from .options import check, choice, number, option, positive, whole

__all__ = [
    "DENOISERS",
    "DataConfig",
    "EstimatorConfig",
    "ModelConfig",
    "ReportConfig",
    "RunConfig",
    "TrainConfig",
]

#: The denoisers that a configuration knows, which are the backbones and a preconditioned one.
DENOISERS = (*BACKBONES, "preconditioned")
Users = dict[str, tuple[str, ...]]
DIFFUSION: Users = {"prior": ("diffusion",)}  # who has a use for an option
TIMESTEP: Users = {"estimator": ("timestep",)}
TERMS: Users = {"estimator": ("timestep", "trace-kl")}


class Checked:
    r"""A dataclass whose fields are checked when it is made."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class DataConfig(Checked):
    r"""Which images."""

    dataset: str = option("digits", "the data set", choice(DATASETS, "data set"))
    root: str = option("data", "where the data are, or go")
    image_size: int | None = option(None, "resize and crop images to this many pixels", whole())
    limit: int | None = option(None, "use at most this many images per split", whole())
    groups: Path | None = option(
        None,
        "folder: a list 'FILE GROUP' whose groups, such as persons, are kept in one split each",
        metavar="FILE",
    )
    no_download: bool = option(False, "never download data")
    condition: str = option("none", "what the model is given", choice(("none", "labels")))


@dataclass(frozen=True)
class ModelConfig(Checked):
    r"""What determines the architecture of a VAE; a checkpoint carries it.

    Beside the options, it has the shape :math:`(C, H, W)` and the number of ``levels`` of the
    images, and the number of classes of the labels that it is given, 0 for none.
    """

    prior: str = option("diffusion", "the prior", choice(PRIORS))
    latent_dim: int = option(16, "latent dimensions D", whole())
    latent_shape: tuple[int, ...] = option(
        (), "shape C h w of the latents, in place of D", metavar="N"
    )
    latent_groups: tuple[str, ...] = option(
        (), "a hierarchy: the shapes D or CxHxW of its groups, the top one first", metavar="SHAPE"
    )
    group_priors: str = option(
        "top", "which groups have the prior, the others being Gaussian", choice(("top", "every"))
    )
    image_shape: Sequence[int] = (1, 8, 8)
    levels: int = 256
    likelihood: str = option("gaussian", "of the images", choice(LIKELIHOODS))
    networks: str = option(
        "default",
        "encoder and decoder; default is resnet for latents that are images",
        choice(("default", "paper", "resnet")),
    )
    width: int = option(32, "channels of the first convolution", whole())
    num_blocks: int = option(1, "residual blocks per resolution of a resnet", whole())
    num_components: int = option(
        500,
        "components of a mixture, pseudo-inputs of a VampPrior",
        whole(),
        of={"prior": ("mixture", "vamp")},
    )
    flow: str = option(
        "autoregressive",
        "kind of flow; coupling is for latents that are images",
        choice(FLOWS),
        of={"prior": ("flow",)},
    )
    prior_width: int | None = option(
        None,
        "hidden width of a flow or a denoiser (its own default)",
        whole(),
        of={"prior": ("flow", "diffusion")},
    )
    denoiser: str | None = option(
        None,
        "network of the prior (conv for latents that are images, else residual)",
        choice(DENOISERS),
        of=DIFFUSION,
    )
    num_timesteps: int = option(1000, "T", whole(), of=DIFFUSION)
    schedule: str = option("linear", "variances", choice(SCHEDULES), of=DIFFUSION)
    beta_min: float = option(1e-4, "first of the linear schedule", of=DIFFUSION)
    beta_max: float = option(0.02, "last of the linear schedule", of=DIFFUSION)
    parameterization: str = option(
        "eps", "what the network predicts", choice(PARAMETERIZATIONS), of=DIFFUSION
    )
    reverse_variance: str = option(
        "beta", "variance of a reverse step", choice(REVERSE_VARIANCES), of=DIFFUSION
    )
    num_classes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.image_shape) != 3:
            raise ValueError(f"image_shape must be (C, H, W), got {tuple(self.image_shape)}")
        as_shape("image_shape", tuple(self.image_shape))
        if self.latent_shape and self.latent_groups:
            raise ValueError("latent_shape is that of one group: leave it out with latent_groups")
        if self.networks == "paper" and (self.latent_shape or self.latent_groups):
            raise ValueError("networks='paper' have a vector of latents: give latent_dim")
        if self.group_priors == "every" and self.prior != "diffusion":
            raise ValueError(
                f"group_priors='every' needs a prior with images as context, 'diffusion', got "
                f"{self.prior!r}"
            )
        if self.latent_groups and self.prior == "vamp":
            raise ValueError("prior='vamp' has no hierarchy: its encoder would need one of its own")
        _ = self.event_shape, self.groups  # which are checked as they are read

    @property
    def event_shape(self) -> tuple[int, ...]:
        r"""The shape of the latents, or of those of the first group."""
        if self.latent_groups:
            return self.groups[0]
        return as_shape("latent_shape", tuple(self.latent_shape) or self.latent_dim)

    @property
    def groups(self) -> list[tuple[int, ...]]:
        r"""The shapes of the groups of a hierarchy; empty if there is none."""
        return [parse_shape(text) for text in self.latent_groups]

    def check_sizes(self) -> None:
        r"""Raises a ``ValueError`` unless the networks have such latents of images of that size."""
        if self.latent_groups:
            check_latent_groups(self.groups, self.image_shape)
        elif self.latent_shape:
            check_latent_shape(self.event_shape, self.image_shape)


def parse_shape(text: str) -> tuple[int, ...]:
    r"""Returns the shape that a text such as ``"4x8x8"`` or ``"16"`` means."""
    parts = text.split("x")
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"a shape must be D or CxHxW, such as 16 or 4x8x8, got {text!r}")
    return as_shape("latent_groups", tuple(map(int, parts)))


@dataclass(frozen=True)
class EstimatorConfig(Checked):
    r"""How the bound is estimated in training."""

    estimator: str = option(
        "timestep",
        "timestep: from k timesteps per datum; trace: Pyro's Trace_ELBO, all T sites; trace-kl: "
        "all T sites, closed-form KLs",
        choice(ESTIMATORS),
    )
    timesteps: str = option(
        "importance", "which timesteps", choice(("all", *PROPOSALS)), of=TIMESTEP
    )
    k: int = option(8, "timesteps per datum", whole(), of=TIMESTEP)
    conditioning: str = option("z_0", "what the KLs are given", choice(("z_0", "x")), of=TIMESTEP)
    no_antithetic: bool = option(False, "independent noise in place of mirrored pairs", of=TERMS)
    entropy: str = option(
        "path",
        "of q(z_0 | x), path for its path derivative",
        choice(("path", "exact")),
        of=TERMS,
    )
    num_particles: int = option(1, "draws of z_0 per datum", whole())
    weighting: str = option(
        "elbo",
        "what is trained with; elbo is the bound itself",
        choice(("elbo", *REWEIGHTINGS)),
        of=TERMS | DIFFUSION,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighting != "elbo" and self.conditioning == "x":
            raise ValueError(
                f"weighting={self.weighting!r} is defined for conditioning='z_0', got 'x'"
            )


@dataclass(frozen=True)
class TrainConfig(Checked):
    r"""How a model is trained. The first budget that is spent ends the training.

    Example:
        >>> TrainConfig(epochs=10_000, max_steps=5000, patience=3).batch_size
        100
    """

    epochs: int = option(100, "passes that train everything", whole(0))
    gaussian_epochs: int = option(
        0, "the first of these, in which N(0, I) stands in for the prior", whole(0)
    )
    prior_epochs: int = option(0, "passes after --epochs that train only the prior", whole(0))
    batch_size: int = option(100, "images per step, of all processes together", whole())
    lr: float = option(5e-4, "learning rate of Adam", positive)
    prior_lr: float | None = option(None, "that of the prior, if another one", positive)
    prior_weight_decay: float = option(
        0.0,
        "decoupled weight decay of the prior's matrices",
        check_nonnegative,
    )
    lr_schedule: str = option(
        "constant", "of the rates, cosine to zero", choice(("constant", "cosine"))
    )
    warmup: int = option(0, "steps in which the rates rise", whole(0))
    kl_warmup: int = option(0, "epochs in which the weight of the KL rises to 1", whole(0))
    free_bits: float = option(
        0.0,
        "nats per datum that the KL of each group of latents may have for free",
        check_nonnegative,
    )
    clip_norm: float | None = option(
        100.0, "global gradient norm, per datum", number("positive", lambda x: x > 0)
    )
    ema: float = option(
        0.0, "decay of a weight average, 0: none", number("in [0, 1)", lambda x: 0 <= x < 1)
    )
    precision: str = option(
        "float32",
        "of the networks, bf16 for autocast of the convolutions",
        choice(("float32", "float64", "bf16")),
    )
    seed: int = option(0, "of everything random", lambda name, value: check_seed(value, name))
    max_steps: int | None = option(None, "steps after which training ends", whole())
    max_seconds: float | None = option(None, "seconds after which training ends", positive)
    patience: int | None = option(
        None, "epochs without a better validation loss before training ends", whole()
    )
    validate_every: int = option(1, "epochs from one validation to the next", whole())

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs == 0 and not self.prior_epochs:
            raise ValueError("epochs must be positive, got 0")
        if self.gaussian_epochs > self.epochs:
            raise ValueError(
                f"gaussian_epochs must be at most epochs={self.epochs}, got {self.gaussian_epochs}"
            )


@dataclass(frozen=True)
class RunConfig(Checked):
    r"""Where and how a run is run."""

    init: Path | None = option(
        None,
        "start from the encoder and decoder of this run, and from its prior if of one kind",
        metavar="RUN",
    )
    device: str = option("auto", "where to compute", choice(("auto", "cpu", "cuda")))
    deterministic: bool = option(
        False, "the same numbers whenever the run is repeated, also on a GPU (slower)"
    )
    out: Path | None = option(None, "run directory (runs/DATASET-PRIOR-sSEED)")
    snapshots: tuple[int, ...] = option(
        (), "epochs whose model is kept as epoch-N.pt, 0: its initialization", metavar="EPOCH"
    )
    resume: bool = option(False, "continue the run in --out")
    validate: bool = option(False, "check every distribution (slow)")
    quiet: bool = option(False, "no progress bars")


@dataclass(frozen=True)
class ReportConfig(Checked):
    r"""What is evaluated after training."""

    features: str = option(
        "auto",
        "of the Fréchet distance. inception is FID; auto is pixels for digits and inception "
        "otherwise, if its weights can be had",
        choice(("auto", "none", *EXTRACTORS)),
    )
    fid_weights: Path | None = option(None, "a local file of the Inception weights")
    test_k: int = option(
        0, "timesteps per test image of a diffusion prior; 0: all T of them", whole(0)
    )
    num_images: int = option(10_000, "images per side of the Fréchet distance, at most")
