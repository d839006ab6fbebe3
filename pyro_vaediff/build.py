r"""Models from their configurations."""

from __future__ import annotations

from torch import nn

from .config import ModelConfig
from .likelihoods import make_likelihood
from .nn import ConvDecoder, ConvEncoder, paper_decoder, paper_encoder
from .nn.denoiser import make_denoiser
from .priors import PRIORS, DiffusionPrior, FlowPrior, MixturePrior, Prior, VampPrior
from .schedules import make_schedule
from .vae import VAE

__all__ = ["make_prior", "make_vae"]


def make_prior(config: ModelConfig, encoder: nn.Module | None = None) -> Prior:
    r"""Returns the prior of a configuration.

    Arguments:
        config: The configuration.
        encoder: The encoder of the VAE, which only a VampPrior needs.
    """
    D = config.latent_dim
    if config.prior not in PRIORS:
        raise ValueError(f"unknown prior {config.prior!r}: choose one of {', '.join(PRIORS)}")
    if config.prior == "mixture":
        return MixturePrior(D, config.num_components)
    if config.prior == "vamp":
        if encoder is None:
            raise ValueError("a VampPrior needs an encoder, got encoder=None")
        return VampPrior(encoder, D, config.image_shape, config.num_components)
    if config.prior == "flow":
        width = config.prior_width
        return FlowPrior(D) if width is None else FlowPrior(D, hidden_features=(width,) * 3)
    if config.prior == "diffusion":
        schedule = make_schedule(config.schedule, config.num_timesteps)
        num_outputs = 2 if config.reverse_variance == "learned" else 1
        return DiffusionPrior(
            D,
            config.num_timesteps,
            schedule=schedule,
            denoiser=make_denoiser(
                config.denoiser, D, schedule, num_outputs=num_outputs, width=config.prior_width
            ),
            parameterization=config.parameterization,
            reverse_variance=config.reverse_variance,
        )
    return PRIORS[config.prior](D)


def make_vae(config: ModelConfig) -> VAE:
    r"""Returns the VAE of a configuration, freshly initialized."""
    image_shape = tuple(config.image_shape)
    likelihood = make_likelihood(config.likelihood, image_shape, config.levels)
    if config.networks == "paper":
        encoder = paper_encoder(image_shape, config.latent_dim)
        decoder = paper_decoder(config.latent_dim, likelihood)
    elif config.networks == "default":
        encoder = ConvEncoder(image_shape, config.latent_dim, config.width)
        decoder = ConvDecoder(config.latent_dim, likelihood, config.width)
    else:
        raise ValueError(f"unknown networks {config.networks!r}: choose one of default, paper")
    return VAE(encoder, decoder, make_prior(config, encoder))
