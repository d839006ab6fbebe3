r"""Models from their configurations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .likelihoods import make_likelihood
from .nn import ConvDecoder, ConvEncoder, paper_decoder, paper_encoder
from .priors import PRIORS, DiffusionPrior, Prior
from .vae import VAE

__all__ = ["ModelConfig", "make_prior", "make_vae"]


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
