r"""Models from their configurations."""

from __future__ import annotations

from torch import nn

from ..arguments import check_choice
from ..likelihoods import make_likelihood
from ..nn import ConvDecoder, ConvEncoder, paper_decoder, paper_encoder
from ..nn.denoiser import DENOISERS, make_denoiser
from ..priors import PRIORS, DiffusionPrior, FlowPrior, MixturePrior, Prior, VampPrior
from ..priors.diffusion import PARAMETERIZATIONS, REVERSE_VARIANCES
from ..schedules import SCHEDULES, LinearSchedule, make_schedule
from ..vae import VAE
from .config import ModelConfig

__all__ = ["make_prior", "make_vae"]

CHOICES = {
    "prior": PRIORS,
    "denoiser": DENOISERS,
    "schedule": SCHEDULES,
    "parameterization": PARAMETERIZATIONS,
    "reverse_variance": REVERSE_VARIANCES,
}


def make_prior(config: ModelConfig, encoder: nn.Module | None = None) -> Prior:
    r"""Returns the prior of a configuration.

    Arguments:
        config: The configuration.
        encoder: The encoder of the VAE, which only a VampPrior needs.
    """
    D = config.latent_dim
    # Also the names that this prior has no use for: a mistake in one is a mistake all the same.
    for name, choices in CHOICES.items():
        check_choice(name, getattr(config, name), choices)
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
        T = config.num_timesteps
        if config.schedule == "linear":
            schedule = LinearSchedule(T, config.beta_min, config.beta_max)
        else:
            schedule = make_schedule(config.schedule, T)
        num_outputs = 2 if config.reverse_variance == "learned" else 1
        return DiffusionPrior(
            D,
            T,
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
    check_choice("networks", config.networks, ("default", "paper"))
    image_shape = tuple(config.image_shape)
    likelihood = make_likelihood(config.likelihood, image_shape, config.levels)
    if config.networks == "paper":
        encoder = paper_encoder(image_shape, config.latent_dim)
        decoder = paper_decoder(config.latent_dim, likelihood)
    else:
        encoder = ConvEncoder(image_shape, config.latent_dim, config.width)
        decoder = ConvDecoder(config.latent_dim, likelihood, config.width)
    return VAE(encoder, decoder, make_prior(config, encoder))
