r"""Models from their configurations."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..denoise import REVERSE_VARIANCES
from ..likelihoods import AUTOREGRESSIVE, Likelihood, make_likelihood
from ..nn import (
    POSTERIOR_FLOWS,
    ConvDecoder,
    ConvEncoder,
    FlowEncoder,
    LadderEncoder,
    LadderStep,
    MLPDecoder,
    MLPEncoder,
    NoiseMatched,
    ResNetDecoder,
    ResNetEncoder,
    ladder_path,
    paper_decoder,
    paper_encoder,
)
from ..nn.backbones import make_backbone
from ..priors import (
    PRIORS,
    ConditionalGaussianPrior,
    DiffusionPrior,
    ExemplarPrior,
    FlowPrior,
    HierarchicalPrior,
    MixturePrior,
    Prior,
    VampPrior,
)
from ..schedules import LearnedSchedule, LinearSchedule, Schedule, make_schedule
from ..vae import VAE
from .config import ModelConfig
from .model_config import ENCODED

__all__ = ["make_prior", "make_vae"]


def make_prior(config: ModelConfig) -> Prior:
    r"""Returns the prior of a configuration. A VampPrior gets its encoder from the VAE.

    Arguments:
        config: The configuration.
    """
    if config.latent_groups:
        return make_hierarchy(config)
    shape, width = config.event_shape, config.prior_width
    if config.prior == "mixture":
        return MixturePrior(shape, config.num_components)
    if config.prior in ENCODED and config.num_classes:
        raise ValueError(f"prior={config.prior!r} takes no labels: leave out condition")
    if config.prior == "exemplar":
        return ExemplarPrior(shape, config.num_data, config.num_components)
    if config.prior == "vamp":
        likelihood = make_likelihood(config.likelihood, tuple(config.image_shape), config.levels)
        support = likelihood.space(config.levels).support
        return VampPrior(None, shape, config.image_shape, config.num_components, support)
    if config.prior == "flow":
        widths = None if width is None else (width,) * 3
        return FlowPrior(shape, None, widths, config.num_classes, config.flow)
    if config.prior == "diffusion":
        return make_diffusion_prior(config, config.num_classes)
    return PRIORS[config.prior](shape)


def make_diffusion_prior(config: ModelConfig, context: int | tuple[int, ...]) -> DiffusionPrior:
    r"""Returns the diffusion prior of a configuration, with a context of that shape."""
    shape = config.event_shape
    T = config.num_timesteps if isinstance(config.num_timesteps, int) else None  # continuous
    schedule: Schedule
    if config.schedule == "linear":
        schedule = LinearSchedule(T or 1000, config.beta_min, config.beta_max)
    elif config.schedule.startswith("learned"):
        each = (shape[0], *(1 for _ in shape[1:]))  # dimension of a vector, or channel
        schedule = LearnedSchedule(each if config.schedule == "learned-diagonal" else ())
    else:
        schedule = make_schedule(config.schedule, T or 1000)
    if config.noise_log_snr is not None:
        schedule = schedule.starting_at(config.noise_log_snr)
    special, name = config.denoiser == "preconditioned", config.denoiser
    if special or name is None:
        name = "conv" if len(shape) == 3 else "residual"
    num_outputs = REVERSE_VARIANCES[config.reverse_variance].num_outputs
    backbone = make_backbone(name, shape, schedule, num_outputs, config.prior_width, context)
    return DiffusionPrior(
        shape,
        T,
        schedule,
        backbone,
        config.parameterization,
        config.reverse_variance,
        preconditioning=special,
        context_features=context,
        context_dropout=config.context_dropout,
    )


def make_hierarchy(config: ModelConfig) -> HierarchicalPrior:
    r"""Returns a hierarchy with the prior of the configuration on its top group, or on each."""
    if config.num_classes:
        raise ValueError("a hierarchy takes no labels: leave out condition")
    path = make_path(config)
    groups: list[Prior] = []
    for step in path:
        alone = replace(config, latent_groups=(), latent_shape=step.event_shape, group_priors="top")
        if not groups:
            groups.append(make_prior(alone))
        elif config.group_priors == "every":
            groups.append(make_diffusion_prior(alone, (config.width, *step.sides)))
        else:
            C = step.event_shape[0]
            net = nn.Conv2d(config.width, 2 * C, 3, padding=1)
            groups.append(ConditionalGaussianPrior(step.event_shape, net))
    return HierarchicalPrior(groups, path, (config.width, *path[-1].next_sides))


def make_path(config: ModelConfig) -> list[LadderStep]:
    r"""Returns the generative path of a hierarchy."""
    return ladder_path(config.groups, config.image_shape, config.width, config.num_blocks)


def make_networks(config: ModelConfig, likelihood: Likelihood) -> tuple[nn.Module, nn.Module]:
    r"""Returns the encoder and the decoder of a configuration."""
    image_shape, shape, width = tuple(config.image_shape), config.event_shape, config.width
    # An exemplar prior alone is told the number of a training image.
    features = None if config.prior == "exemplar" else config.num_classes
    blocks = config.num_blocks
    if config.latent_groups:
        encoder = LadderEncoder(image_shape, config.groups, width, blocks)
        state = (width, *encoder.sides[-1])
        return encoder, ResNetDecoder(state, likelihood, width, blocks)
    if config.networks == "paper":
        if config.num_classes:
            raise ValueError("networks='paper' take no labels: leave out condition")
        return (
            paper_encoder(image_shape, shape[0], features),
            paper_decoder(shape[0], likelihood, features),
        )
    if config.networks == "mlp":
        return (
            MLPEncoder(image_shape, shape[0], gated=True, context_features=features),
            MLPDecoder(shape[0], likelihood, gated=True, context_features=features),
        )
    if config.networks == "resnet" or len(shape) > 1:
        return (
            ResNetEncoder(image_shape, shape, width, blocks, context_features=features),
            ResNetDecoder(shape, likelihood, width, blocks, context_features=features),
        )
    return (
        ConvEncoder(image_shape, shape[0], width, context_features=features),
        ConvDecoder(shape[0], likelihood, width, context_features=features),
    )


def make_vae(config: ModelConfig) -> VAE:
    r"""Returns the VAE of a configuration, freshly initialized."""
    options = {"kernel_sizes": config.kernels} if config.likelihood in AUTOREGRESSIVE else {}
    shape = tuple(config.image_shape)
    likelihood = make_likelihood(config.likelihood, shape, config.levels, **options)
    encoder, decoder = make_networks(config, likelihood)
    if config.noise_log_snr is not None:
        encoder = NoiseMatched(encoder, config.noise_log_snr)
    prior = make_prior(config)
    # Made last, so that everything else starts as with a Gaussian posterior.
    if config.posterior != "gaussian":
        event, context = config.event_shape, 2 * prior.latent_dim
        flow = POSTERIOR_FLOWS[config.posterior](event, context, config.posterior_flows)
        encoder = FlowEncoder(encoder, flow)
    return VAE(encoder, decoder, prior, likelihood.space(config.levels))
