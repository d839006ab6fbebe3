r"""Models from their configurations."""

from __future__ import annotations

from ..arguments import check_choice
from ..denoise import PARAMETERIZATIONS, REVERSE_VARIANCES
from ..likelihoods import make_likelihood
from ..nn import ConvDecoder, ConvEncoder, paper_decoder, paper_encoder
from ..nn.backbones import BACKBONES, make_backbone
from ..priors import PRIORS, DiffusionPrior, FlowPrior, MixturePrior, Prior, VampPrior
from ..schedules import SCHEDULES, LinearSchedule, make_schedule
from ..vae import VAE
from .config import ModelConfig

__all__ = ["DENOISERS", "make_prior", "make_vae"]

#: The denoisers by name: the backbones, and a residual one that is preconditioned.
DENOISERS = (*BACKBONES, "preconditioned")

CHOICES = {
    "prior": PRIORS,
    "denoiser": DENOISERS,
    "schedule": SCHEDULES,
    "parameterization": PARAMETERIZATIONS,
    "reverse_variance": REVERSE_VARIANCES,
}


def make_prior(config: ModelConfig) -> Prior:
    r"""Returns the prior of a configuration. A VampPrior gets its encoder from the VAE.

    Arguments:
        config: The configuration.
    """
    D, width = config.latent_dim, config.prior_width
    # Also the names that this prior has no use for: a mistake in one is a mistake all the same.
    for name, choices in CHOICES.items():
        check_choice(name, getattr(config, name), choices)
    if config.prior == "mixture":
        return MixturePrior(D, config.num_components)
    if config.prior == "vamp":
        return VampPrior(None, D, config.image_shape, config.num_components)
    if config.prior == "flow":
        return FlowPrior(D) if width is None else FlowPrior(D, hidden_features=(width,) * 3)
    if config.prior == "diffusion":
        return make_diffusion_prior(config)
    return PRIORS[config.prior](D)


def make_diffusion_prior(config: ModelConfig) -> DiffusionPrior:
    r"""Returns the diffusion prior of a configuration."""
    D, T = config.latent_dim, config.num_timesteps
    if config.schedule == "linear":
        schedule = LinearSchedule(T, config.beta_min, config.beta_max)
    else:
        schedule = make_schedule(config.schedule, T)
    special = config.denoiser == "preconditioned"
    num_outputs = 2 if config.reverse_variance == "learned" else 1
    backbone = make_backbone(
        "residual" if special else config.denoiser,
        D,
        schedule,
        num_outputs,
        config.prior_width,
    )
    return DiffusionPrior(
        D,
        T,
        schedule,
        backbone,
        config.parameterization,
        config.reverse_variance,
        preconditioning=special,
    )


def make_vae(config: ModelConfig) -> VAE:
    r"""Returns the VAE of a configuration, freshly initialized."""
    check_choice("networks", config.networks, ("default", "paper"))
    image_shape = tuple(config.image_shape)
    likelihood = make_likelihood(config.likelihood, image_shape, config.levels)
    if config.networks == "paper":
        encoder = paper_encoder(image_shape, config.latent_dim)
        decoder = paper_decoder(config.latent_dim, likelihood)
    else:
        encoder = ConvEncoder(image_shape, config.latent_dim, config.width)
        decoder = ConvDecoder(config.latent_dim, likelihood, config.width)
    return VAE(encoder, decoder, make_prior(config), likelihood.space(config.levels))
