r"""Models from their configurations."""

from __future__ import annotations

from ..denoise import REVERSE_VARIANCES
from ..likelihoods import make_likelihood
from ..nn import ConvDecoder, ConvEncoder, paper_decoder, paper_encoder
from ..nn.backbones import make_backbone
from ..priors import PRIORS, DiffusionPrior, FlowPrior, MixturePrior, Prior, VampPrior
from ..schedules import LinearSchedule, Schedule, make_schedule
from ..vae import VAE
from .config import DENOISERS, ModelConfig

__all__ = ["DENOISERS", "make_prior", "make_vae"]


def make_prior(config: ModelConfig) -> Prior:
    r"""Returns the prior of a configuration. A VampPrior gets its encoder from the VAE.

    Arguments:
        config: The configuration.
    """
    D, width = config.latent_dim, config.prior_width
    if config.prior == "mixture":
        return MixturePrior(D, config.num_components)
    if config.prior == "vamp":
        if config.num_classes:
            raise ValueError("prior='vamp' takes no labels: leave out condition")
        return VampPrior(None, D, config.image_shape, config.num_components)
    if config.prior == "flow":
        widths = None if width is None else (width,) * 3
        return FlowPrior(D, None, widths, config.num_classes, config.flow)
    if config.prior == "diffusion":
        return make_diffusion_prior(config)
    return PRIORS[config.prior](D)


def make_diffusion_prior(config: ModelConfig) -> DiffusionPrior:
    r"""Returns the diffusion prior of a configuration."""
    D, T = config.latent_dim, config.num_timesteps
    schedule: Schedule
    if config.schedule == "linear":
        schedule = LinearSchedule(T, config.beta_min, config.beta_max)
    else:
        schedule = make_schedule(config.schedule, T)
    special = config.denoiser == "preconditioned"
    num_outputs = REVERSE_VARIANCES[config.reverse_variance].num_outputs
    backbone = make_backbone(
        "residual" if special else config.denoiser,
        D,
        schedule,
        num_outputs,
        config.prior_width,
        config.num_classes,
    )
    return DiffusionPrior(
        D,
        T,
        schedule,
        backbone,
        config.parameterization,
        config.reverse_variance,
        preconditioning=special,
        context_features=config.num_classes,
    )


def make_vae(config: ModelConfig) -> VAE:
    r"""Returns the VAE of a configuration, freshly initialized."""
    image_shape = tuple(config.image_shape)
    likelihood = make_likelihood(config.likelihood, image_shape, config.levels)
    if config.networks == "paper":
        if config.num_classes:
            raise ValueError("networks='paper' take no labels: leave out condition")
        encoder = paper_encoder(image_shape, config.latent_dim)
        decoder = paper_decoder(config.latent_dim, likelihood)
    else:
        width, features = config.width, config.num_classes
        encoder = ConvEncoder(image_shape, config.latent_dim, width, context_features=features)
        decoder = ConvDecoder(config.latent_dim, likelihood, width, context_features=features)
    return VAE(encoder, decoder, make_prior(config), likelihood.space(config.levels))
