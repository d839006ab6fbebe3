r"""The configuration of a model, which its checkpoints carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..arguments import as_shape
from ..denoise import PARAMETERIZATIONS, REVERSE_VARIANCES
from ..likelihoods import AUTOREGRESSIVE, LIKELIHOODS
from ..nn import (
    BACKBONES,
    FLOWS,
    POSTERIOR_FLOWS,
    check_kernel_sizes,
    check_latent_groups,
    check_latent_shape,
)
from ..priors import PRIORS
from ..schedules import SCHEDULES
from .options import Checked, choice, number, option, whole

__all__ = ["DENOISERS", "ModelConfig", "parse_shape"]

#: The denoisers that a configuration knows, which are the backbones and a preconditioned one.
DENOISERS = (*BACKBONES, "preconditioned")
Users = dict[str, tuple[str, ...]]
#: The priors that are made of encodings of images.
ENCODED = ("vamp", "exemplar")
DIFFUSION: Users = {"prior": ("diffusion",)}  # who has a use for an option


@dataclass(frozen=True)
class ModelConfig(Checked):
    r"""The architecture of a VAE, which a checkpoint carries.

    Besides the options, it has the shape :math:`(C, H, W)` and the number of ``levels`` of the
    images, the number of classes of the labels that it is given, 0 for none, and the number of
    training data of an exemplar prior.
    """

    prior: str = option("diffusion", "the prior", choice(PRIORS))
    latent_dim: int = option(16, "latent dimensions D", whole())
    image_shape: Sequence[int] = (1, 8, 8)
    levels: int = 256
    latent_shape: tuple[int, ...] = option(
        (), "shape C h w of the latents, in place of D", metavar="N"
    )
    latent_groups: tuple[str, ...] = option(
        (), "a hierarchy: the shapes D or CxHxW of its groups, the top one first", metavar="SHAPE"
    )
    group_priors: str = option(
        "top", "groups that have the prior; the others are Gaussian", choice(("top", "every"))
    )
    likelihood: str = option("gaussian", "likelihood of the images", choice(LIKELIHOODS))
    kernels: tuple[int, ...] = option(
        (5, 3, 3, 3),
        "odd sides of the masked kernels of an autoregressive likelihood, one for each layer",
        check_kernel_sizes,
        metavar="K",
        of={"likelihood": tuple(AUTOREGRESSIVE)},
    )
    networks: str = option(
        "default",
        "encoder and decoder; default is resnet for latents that are images, mlp two gated layers "
        "of 300 units",
        choice(("default", "paper", "resnet", "mlp")),
    )
    width: int = option(32, "channels of the first convolution", whole())
    num_blocks: int = option(1, "residual blocks per resolution of a resnet", whole())
    posterior: str = option(
        "gaussian",
        "the encoder's; iaf and coupling are flows of the Gaussian one",
        choice(("gaussian", *POSTERIOR_FLOWS)),
    )
    posterior_flows: int = option(
        4, "steps of its flow", whole(), of={"posterior": tuple(POSTERIOR_FLOWS)}
    )
    num_components: int = option(
        500,
        "components of a mixture, pseudo-inputs of a VampPrior, training images that an exemplar "
        "prior takes for a step, at most all",
        whole(),
        of={"prior": ("mixture", "vamp", "exemplar")},
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
        "network of the prior, or of the top group's (conv for latents that are images, else "
        "residual)",
        choice(DENOISERS),
        of=DIFFUSION,
    )
    num_timesteps: int | str = option(
        1000, "T, or 'continuous'", whole(word="continuous"), metavar="T", of=DIFFUSION
    )
    schedule: str = option(
        "linear",
        "schedule of the noise; in continuous time also learned, or learned-diagonal per dimension "
        "or channel",
        choice((*SCHEDULES, "learned", "learned-diagonal")),
        of=DIFFUSION,
    )
    beta_min: float = option(1e-4, "first variance of the linear schedule", of=DIFFUSION)
    beta_max: float = option(0.02, "last variance of the linear schedule", of=DIFFUSION)
    parameterization: str = option(
        "eps", "quantity that the network predicts", choice(PARAMETERIZATIONS), of=DIFFUSION
    )
    reverse_variance: str = option(
        "beta", "variance of a reverse step", choice(REVERSE_VARIANCES), of=DIFFUSION
    )
    noise_log_snr: float | None = option(
        None,
        "log-SNR of the encoder's fixed noise, at which the chain starts (the noise is learned)",
        number("finite", math.isfinite),
        of=DIFFUSION,
    )
    context_dropout: float = option(
        0.0,
        "probability of dropping the labels in training, for --guidance",
        number("in [0, 1)", lambda x: 0 <= x < 1),
        of=DIFFUSION,
    )
    num_classes: int = 0
    num_data: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.image_shape) != 3:
            raise ValueError(f"image_shape must be (C, H, W), got {tuple(self.image_shape)}")
        as_shape("image_shape", tuple(self.image_shape))
        if self.latent_shape and self.latent_groups:
            raise ValueError("latent_shape is that of one group: leave it out with latent_groups")
        if self.networks in ("paper", "mlp") and (self.latent_shape or self.latent_groups):
            raise ValueError(
                f"networks={self.networks!r} have a vector of latents: give latent_dim"
            )
        if self.group_priors == "every" and self.prior != "diffusion":
            raise ValueError(
                f"group_priors='every' needs a prior with images as context, 'diffusion', got "
                f"{self.prior!r}"
            )
        if self.schedule.startswith("learned") and (
            self.num_timesteps != "continuous" or self.noise_log_snr is not None
        ):
            raise ValueError(
                f"schedule={self.schedule!r} is in continuous time, from clean latents: give "
                "num_timesteps='continuous' and leave out noise_log_snr"
            )
        if self.latent_groups and self.noise_log_snr is not None:
            raise ValueError("noise_log_snr is for a single group of latents: leave it out")
        if self.group_priors == "every" and self.denoiser not in (None, "conv", "preconditioned"):
            raise ValueError(
                f"group_priors='every' needs denoisers with images as context, got "
                f"{self.denoiser!r}: leave denoiser out"
            )
        if self.latent_groups and self.prior in ENCODED:
            raise ValueError(
                f"prior={self.prior!r} has no hierarchy: it is made of encodings of single groups"
            )
        if self.posterior != "gaussian":
            self.check_posterior()
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

    def check_posterior(self) -> None:
        r"""Raises a ``ValueError`` if something needs a Gaussian posterior."""
        for name, given in (
            ("latent_groups", bool(self.latent_groups)),
            ("noise_log_snr", self.noise_log_snr is not None),
            ("prior", self.prior in ENCODED),
        ):
            if given:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs a Gaussian q(z_0 | x), got posterior="
                    f"{self.posterior!r}: leave one of them out"
                )

    def check_objective(self, conditioning: str, tc_weight: float) -> None:
        r"""Raises a ``ValueError`` if an objective needs a Gaussian posterior, and has none."""
        given = {"conditioning": (conditioning, "z_0"), "tc_weight": (tc_weight, 1.0)}
        for name, (value, legal) in given.items():
            if self.posterior != "gaussian" and value != legal:
                raise ValueError(
                    f"{name}={value!r} needs a Gaussian q(z_0 | x), got posterior="
                    f"{self.posterior!r}: give {name}={legal!r}"
                )

    def check_sizes(self) -> None:
        r"""Raises a ``ValueError`` unless the networks can make such latents of such images."""
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
