r"""Models from their configurations."""

from __future__ import annotations

from .config import ModelConfig
from .likelihoods import make_likelihood
from .nn import ConvDecoder, ConvEncoder, paper_decoder, paper_encoder
from .priors import PRIORS, DiffusionPrior, Prior
from .vae import VAE

__all__ = ["make_prior", "make_vae"]


def make_prior(config: ModelConfig) -> Prior:
    r"""Returns the prior of a configuration."""
    if config.prior not in PRIORS:
        raise ValueError(f"unknown prior {config.prior!r}: choose one of {', '.join(PRIORS)}")
    if config.prior == "diffusion":
        return DiffusionPrior(
            config.latent_dim,
            config.num_timesteps,
            schedule=config.schedule,
            parameterization=config.parameterization,
            reverse_variance=config.reverse_variance,
        )
    return PRIORS[config.prior](config.latent_dim)


def make_vae(config: ModelConfig) -> VAE:
    r"""Returns the VAE of a configuration, freshly initialized."""
    image_shape = tuple(config.image_shape)
    prior = make_prior(config)
    likelihood = make_likelihood(config.likelihood, image_shape, config.levels)
    if config.networks == "paper":
        encoder = paper_encoder(image_shape, config.latent_dim)
        decoder = paper_decoder(config.latent_dim, likelihood)
    elif config.networks == "default":
        encoder = ConvEncoder(image_shape, config.latent_dim, config.width)
        decoder = ConvDecoder(config.latent_dim, likelihood, config.width)
    else:
        raise ValueError(f"unknown networks {config.networks!r}: choose one of default, paper")
    return VAE(encoder, decoder, prior)
