r"""A table of bad inputs, to the library and to each script, with the error that each must give."""

from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.infer
import torch

from pyro_vaediff import (
    VAE,
    DiffusionPrior,
    FlowPrior,
    GaussianPrior,
    MixturePrior,
    Reweighted,
    Timestep_ELBO,
    TraceKL_ELBO,
    VampPrior,
)
from pyro_vaediff.data import ImageData, batches, load
from pyro_vaediff.diffusion import q_marginal, q_step
from pyro_vaediff.evaluate import (
    Extractor,
    FeatureStatistics,
    elbo_surgery,
    evaluate,
    frechet_distance,
    image_statistics,
    importance_weighted_bound,
    load_extractor,
    log_likelihood,
    prior_log_prob,
    reference_statistics,
)
from pyro_vaediff.files import check_folder, read_json
from pyro_vaediff.infer import (
    ImportanceTimesteps,
    LossAwareTimesteps,
    elbo_terms,
    make_elbo,
    particle_options,
)
from pyro_vaediff.likelihoods import (
    BernoulliLikelihood,
    GaussianLikelihood,
    make_likelihood,
)
from pyro_vaediff.nn import ConvDecoder, ConvEncoder, MLPBackbone, ResidualMLP
from pyro_vaediff.plotting import plot_history, save_image_grid
from pyro_vaediff.sampling import ddim, interpolate, reconstruct, sample, trajectory
from pyro_vaediff.sampling.probability_flow import ProbabilityFlow
from pyro_vaediff.schedules import CosineSchedule, LinearSchedule, Schedule, make_schedule
from pyro_vaediff.testing import Oracle, linear_gaussian_vae
from pyro_vaediff.train import load_checkpoint
from pyro_vaediff.train.build import make_vae
from pyro_vaediff.train.config import ModelConfig, TrainConfig
from pyro_vaediff.train.report import report
from pyro_vaediff.train.runs import load_data, load_vae

nan, inf = math.nan, math.inf


def decoded(it, p_x):
    r"""Runs the model of a VAE whose decoder returns that distribution."""
    vae = VAE(it.vae.encoder, torch.nn.Identity(), it.vae.prior)
    vae.decoder.forward = lambda z: p_x
    return vae.model(torch.zeros(1, 1, 8, 8))


# A function of what `it` has, a fixture of the test, and an expression for the whole message.
LIBRARY = [
    # Data
    (lambda it: load("imagenet"), "unknown data set 'imagenet': choose one of digits, mnist, .*"),
    (lambda it: load("digits", limit=0), "limit must be a whole number >= 1, got 0"),
    (lambda it: load("digits", limit=1.5), r"limit must be a whole number >= 1, got 1\.5"),
    (lambda it: load("digits", seed=-1), r"seed must be a whole number in \[0, 2\^63\), got -1"),
    (lambda it: load("digits", seed=2**63), "seed must be a whole number in .* got 9223.*"),
    (lambda it: load("digits", channels=2), r"channels must be 1 \(gray\) or 3 \(RGB\), not 2"),
    (lambda it: load("digits", image_size=16), "the digits are 8x8 gray images: leave out .*=16.*"),
    (lambda it: load("folder", it.missing), "root='.*missing' is not a folder: give the folder .*"),
    (lambda it: load("folder", it.file), "root='.*file' is not a folder: give the folder of .*"),
    (
        lambda it: load("folder", it.empty),
        "root='.*' holds 0 images, .* so three in all, with a .*",
    ),
    (
        lambda it: load("folder", it.images, groups=it.missing),
        "groups='.*missing' is not a file: give a list 'FILE GROUP'",
    ),
    (
        lambda it: load("digits", groups=it.file),
        r"groups='.*' is for the data set 'folder', not 'digits': leave it out \(--groups\)",
    ),
    (
        lambda it: load("cifar10", it.empty, download=False),
        r"--dataset cifar10: could not read it \(download=False\) \(RuntimeError: .*\); put .*",
    ),
    (
        lambda it: ImageData("mine", it.images_.float(), it.images_, it.images_),
        r"data set 'mine': train must be a uint8 tensor \(N, C, H, W\), not torch.float32 .*",
    ),
    (
        lambda it: ImageData("mine", it.images_, it.images_[:0], it.images_),
        "data set 'mine': validation holds no image",
    ),
    (
        lambda it: ImageData("mine", it.images_, it.images_, it.images_.repeat(1, 3, 1, 1)),
        r"data set 'mine': test has images of shape \(3, 8, 8\), but train of shape \(1, 8, 8\)",
    ),
    (
        lambda it: ImageData("mine", it.images_, it.images_, it.images_, levels=16),
        r"data set 'mine': train holds the value 16, but levels=16 allows 0\.\.15",
    ),
    (
        lambda it: ImageData("mine", it.images_, it.images_, it.images_, levels=1000),
        "data set 'mine': levels must be from 2 to 256, as pixels are uint8, not 1000",
    ),
    (
        lambda it: ImageData("mine", [1], it.images_, it.images_),
        "data set 'mine': train must be a tensor, not list",
    ),
    (
        lambda it: batches(it.images_, 0, shuffle=False, device="cpu"),
        "batch_size must be a whole number >= 1, got 0",
    ),
    (
        lambda it: batches(it.images_[:0], 2, shuffle=False, device="cpu"),
        "images must hold at least one image",
    ),
    # Schedules and priors
    (lambda it: Schedule([]), r"betas must have shape \(T,\) with T >= 1, got \(0,\)"),
    (lambda it: Schedule([0.1, nan]), r"betas must lie in \(0, 1\): a step neither keeps nor .*"),
    (lambda it: Schedule("linear"), "betas must be numbers, got 'linear'"),
    (lambda it: LinearSchedule(0), "num_timesteps must be a whole number >= 1, got 0"),
    (lambda it: LinearSchedule(2.5), r"num_timesteps must be a whole number >= 1, got 2\.5"),
    (lambda it: LinearSchedule(inf), "num_timesteps must be a whole number >= 1, got inf"),
    (
        lambda it: LinearSchedule(9, beta_min=0.5, beta_max=0.1),
        r"expected 0 < beta_min <= beta_max < 1, got 0\.5, 0\.1",
    ),
    (lambda it: CosineSchedule(9, offset=nan), r"betas must lie in \(0, 1\): .*"),
    (lambda it: make_schedule("sqrt", 9), "unknown schedule 'sqrt': choose one of linear, cosine"),
    (
        lambda it: make_schedule(LinearSchedule(3), 4),
        "num_timesteps is 4, but the schedule has 3",
    ),
    (
        lambda it: q_step(LinearSchedule(4), torch.zeros(2), 0.5),
        "s must be given if t is a time, which has no step before it",
    ),
    (
        lambda it: q_marginal(LinearSchedule(4), torch.zeros(2), 5),
        "t must be from 0 to T = 4, got 5",
    ),
    (
        lambda it: q_marginal(it.vae.prior.schedule, laplace(), 1),
        r"q\(z_t \| x\) is only known .* for a diagonal Gaussian encoder, got Laplace: .*",
    ),
    (lambda it: GaussianPrior(0), "event_shape must be a whole number >= 1, got 0"),
    (lambda it: DiffusionPrior("2"), "event_shape must be a whole number >= 1, got '2'"),
    (lambda it: DiffusionPrior(True), "event_shape must be a whole number >= 1, got True"),
    (
        lambda it: DiffusionPrior(2, parameterization="x"),
        "unknown parameterization 'x': choose one of eps, z0, mu, v",
    ),
    (
        lambda it: DiffusionPrior(2, reverse_variance="b"),
        "unknown reverse_variance 'b': choose one of beta, beta_tilde, learned, analytic, diagonal",
    ),
    (
        lambda it: DiffusionPrior(2, order="back"),
        "unknown order 'back': choose one of forward, posterior, reversed",
    ),
    (
        lambda it: it.vae.prior.reverse(torch.zeros(1, 2), 0),
        "t must be from 1 to T = 4, got 0",
    ),
    (
        lambda it: it.vae.prior.reverse(torch.zeros(1, 2), 5),
        "t must be from 0 to T = 4, got 5",
    ),
    (
        lambda it: it.vae.prior.reverse(torch.zeros(1, 2), 1, torch.eye(1)),
        r"c must be None, as the prior has context_features=0, got \(1, 1\)",
    ),
    (
        lambda it: DiffusionPrior(2, 5, context_features=3).reverse(torch.zeros(1, 2), 1),
        r"c must be a context that ends in shape \(3,\), as the prior has context_features=3, .*",
    ),
    (
        lambda it: DiffusionPrior(2, 5, context_features=3).model(torch.zeros(1, 2)),
        r"c must be a context that ends in shape \(3,\), .* got \(1, 2\)",
    ),
    (
        lambda it: decoded(it, dist.Normal(torch.zeros(()), 1.0)),
        r"vae\.decoder must return a distribution per latent, with batch shape .*",
    ),
    (
        lambda it: decoded(it, dist.Normal(torch.zeros(1, 1, 8, 8), 1.0)),
        r"vae\.decoder must return .* not over their single numbers: add \.to_event\(3\)",
    ),
    (
        lambda it: it.vae.prior.reverse(torch.zeros(1, 3), 1),
        r"z must end in shape \(2,\), got \(1, 3\)",
    ),
    (lambda it: FlowPrior(2, num_steps=0), "num_steps must be a whole number >= 1, got 0"),
    (
        lambda it: FlowPrior(2, hidden_features=(0,)),
        r"hidden_features must be one or more widths, got \(0,\)",
    ),
    (
        lambda it: FlowPrior(2, flow="coupling"),
        r"event_shape must be \(C, h, w\) for a coupling flow, got \(2,\)",
    ),
    (lambda it: MixturePrior(2, 0), "num_components must be a whole number >= 1, got 0"),
    (
        lambda it: VampPrior(it.vae.encoder, 3, (1, 8, 8), 2).model(),
        r"q\(z_0 \| x\) must have event shape \(3,\), as the prior has, got \(2,\)",
    ),
    (
        lambda it: VampPrior(it.vae.encoder, 2, (1, 8, 8), 2).initialize(torch.zeros(1, 3, 8, 8)),
        r"x must have shape \(B, 1, 8, 8\), got \(1, 3, 8, 8\)",
    ),
    (
        lambda it: VampPrior(it.vae.encoder, 2, (1, 8, 8), 2, support=(1, -1)),
        r"support must be an interval \(low, high\), got \(1, -1\)",
    ),
    # Networks and likelihoods
    (
        lambda it: ConvEncoder((1, 7, 7), 2),
        r"images of 7 x 7 pixels: the convolutional networks take 8 to 256 .*\(--image-size\).*",
    ),
    (lambda it: ConvEncoder((1, 8, 8), 0), "latent_dim must be a whole number >= 1, got 0"),
    (lambda it: ConvEncoder((1, 8, 8), 2, width=0), "width must be a whole number >= 1, got 0"),
    (
        lambda it: ConvEncoder((1, 8, 8), 2, norm="layer"),
        "unknown norm 'layer': choose one of group, batch, none",
    ),
    (
        lambda it: ConvEncoder((1, 8, 8), 2, max_scale=nan),
        "need 0 < min_scale < max_scale < inf, got .* max_scale=nan",
    ),
    (
        lambda it: ConvDecoder(2, BernoulliLikelihood((1, 8, 8)), tanh=True),
        r"tanh needs a likelihood whose maps are a mean in \[-1, 1\], got Bernoulli.*",
    ),
    (
        lambda it: ResidualMLP(2, LinearSchedule(4), width=0),
        "width must be a whole number >= 1, got 0",
    ),
    (
        lambda it: ResidualMLP(2, LinearSchedule(4), embedding_dim=3),
        "the embedding dimension must be even and positive, got 3",
    ),
    (
        lambda it: MLPBackbone(2, hidden_features=(0,)),
        "the width of a layer must be a whole number >= 1, got 0",
    ),
    (
        lambda it: make_likelihood("poisson", (1, 8, 8)),
        "name must be one of gaussian, .*, got 'poisson'",
    ),
    (
        lambda it: make_likelihood("categorical", (1, 8, 8), 257),
        r"levels must be an int from 2 to 256 \(images are uint8\), got 257",
    ),
    (
        lambda it: GaussianLikelihood((1, 8, 8), sigma=0),
        "sigma must be 'shared', 'pixel' or a positive number, got 0",
    ),
    (
        lambda it: GaussianLikelihood((8, 8)),
        r"image_shape must be three positive ints \(C, H, W\), got \(8, 8\)",
    ),
    (
        lambda it: it.vae.space.preprocess(it.images_.float() / 17),
        r"images must be uint8 with values 0\.\.16, got torch.float32",
    ),
    # The programs
    (lambda it: VAE(it.vae.encoder, it.vae.decoder, None), "prior must be a Prior, got NoneType"),
    (
        lambda it: VAE(it.vae.encoder, it.vae.decoder, GaussianPrior(3)).guide(it.x),
        r"q\(z_0 \| x\) must have event shape \(3,\), as the prior has, got \(2,\)",
    ),
    (
        lambda it: VAE(it.vae.encoder, it.vae.decoder, DiffusionPrior(3, 4)).guide(it.x),
        r"q\(z_0 \| x\) must have event shape \(3,\), as the prior has, got \(2,\)",
    ),
    (
        lambda it: VAE(it.vae.encoder, it.vae.decoder, GaussianPrior(3)).model(it.x),
        r"z must end in shape \(2,\), got \(4, 3\)",
    ),
    (
        lambda it: it.vae.model(torch.zeros(2, 3, 8, 8)),
        r"x must have shape \(B, 1, 8, 8\) as the decoder's images do, got \(2, 3, 8, 8\)",
    ),
    (
        lambda it: it.vae.guide(torch.zeros(2, 3, 8, 8)),
        r"x must end in shape \(1, 8, 8\), got \(2, 3, 8, 8\)",
    ),
    (
        lambda it: it.vae.guide(it.images_),
        "x must be a non-empty batch of floating-point images, got torch.uint8 .* converts uint8.*",
    ),
    (
        lambda it: it.vae.guide(it.x[:0]),
        r"x must be a non-empty batch of .* of shape \(0, 1, 8, 8\): .*",
    ),
    (
        lambda it: it.vae.guide(it.x * nan),
        "x holds NaN or infinite pixels: remove or repair these images",
    ),
    (lambda it: it.vae.model(num_samples=0), "num_samples must be a whole number >= 1, got 0"),
    # Estimators
    (lambda it: Timestep_ELBO("some"), "unknown timesteps 'some': choose one of all, uniform, .*"),
    (lambda it: Timestep_ELBO(k=0), "k must be a whole number >= 1, got 0"),
    (lambda it: Timestep_ELBO(k=1.5), r"k must be a whole number >= 1, got 1\.5"),
    (lambda it: Timestep_ELBO(chunk_size=0), "chunk_size must be a whole number >= 1, got 0"),
    (
        lambda it: Timestep_ELBO(conditioning="x_0"),
        "unknown conditioning 'x_0': choose one of z_0, x",
    ),
    (
        lambda it: Reweighted(Timestep_ELBO(), "vlb"),
        "unknown weighting 'vlb': choose one of simple, paper",
    ),
    (lambda it: TraceKL_ELBO(entropy="none"), "unknown entropy 'none': choose one of exact, path"),
    (lambda it: TraceKL_ELBO(num_particles=0), "num_particles must be a whole number >= 1, got 0"),
    (
        lambda it: Timestep_ELBO(num_particles=-1),
        "num_particles must be a whole number >= 1, got -1",
    ),
    (
        lambda it: Reweighted(Timestep_ELBO(conditioning="x"), "simple").loss(
            it.vae.model, it.vae.guide, it.x
        ),
        "the weightings 'simple' and 'paper' are defined for conditioning='z_0' and a fixed .*",
    ),
    (
        lambda it: Timestep_ELBO(conditioning="x").loss(
            it.vae.model, partial(laplace_guide, it.vae), it.x
        ),
        "q.* is only known in closed form for a diagonal Gaussian encoder, got Laplace: .*",
    ),
    (lambda it: particle_options(1.5), r"num_particles must be a whole number >= 1, got 1\.5"),
    (
        lambda it: make_elbo("vr"),
        "unknown estimator 'vr': choose one of timestep, trace, trace-kl, iwae, dreg",
    ),
    (lambda it: ImportanceTimesteps(scale=inf), "scale must be positive and finite, got inf"),
    (lambda it: ImportanceTimesteps(uniform=0), r"uniform must be in \(0, 1\], got 0"),
    (lambda it: LossAwareTimesteps(decay=nan), "decay must .* got nan"),
    (
        lambda it: elbo_terms(it.vae.model, it.vae.guide, it.x, elbo=pyro.infer.Trace_ELBO()),
        "elbo must be a TraceKL_ELBO or Timestep_ELBO, got Trace_ELBO",
    ),
    (
        lambda it: importance_weighted_bound(it.vae.model, it.vae.guide, it.x, elbo=it.elbo),
        r"the log-mean-exp of Timestep_ELBO is not a bound on log p\(x\), .* use Trace_ELBO",
    ),
    (lambda it: linear_gaussian_vae(0), "num_timesteps must be a whole number >= 1, got 0"),
    (
        lambda it: Oracle(it.vae, it.x),
        "vae must be linear and Gaussian, such as linear_gaussian_vae makes it, got .*",
    ),
    # Evaluation and samples
    (
        lambda it: evaluate(it.vae, it.images_, pyro.infer.TraceGraph_ELBO()),
        "elbo must have a differentiable_loss, .* which a TraceGraph_ELBO lacks",
    ),
    (
        lambda it: report(it.vae, it.x, [], it.out, labels=True),
        "labels=True needs ImageData with labels, such as the digits",
    ),
    (lambda it: evaluate(it.vae, it.images_[:0]), "data must hold at least one datum"),
    (
        lambda it: evaluate(it.vae, it.images_ + 1),
        "images has the value 17, beyond levels=17: pass more levels",
    ),
    (
        lambda it: evaluate(it.vae, it.images_, batch_size=0),
        "batch_size must be a whole number >= 1, got 0",
    ),
    (
        lambda it: evaluate(it.vae, it.images_, seed=-1),
        r"seed must be a whole number in \[0, 2\^63\), got -1",
    ),
    (
        lambda it: evaluate(it.vae, it.images_, "all"),
        "elbo must be an estimator of the ELBO, got 'all'",
    ),
    (
        lambda it: log_likelihood(it.gaussian, it.images_, 0),
        "num_samples must be a whole number >= 1, got 0",
    ),
    (
        lambda it: log_likelihood(it.vae, it.images_, 1, num_steps=5),
        "num_steps must be a whole number from 1 to T = 4, got 5",
    ),
    (
        lambda it: prior_log_prob(it.gaussian.prior, torch.zeros(3, 3)),
        "Value is not broadcastable with .*",
    ),
    (
        lambda it: elbo_surgery(it.gaussian, it.images_, log_prior="ode"),
        "unknown log_prior 'ode': choose one of chain, flow",
    ),
    (
        lambda it: elbo_surgery(it.gaussian, it.images_, num_samples=1),
        "num_samples must be a whole number >= 2 for standard errors, got 1",
    ),
    (
        lambda it: ProbabilityFlow(it.gaussian.prior),
        "prior must be a DiffusionPrior, got GaussianPrior: .*",
    ),
    (
        lambda it: ProbabilityFlow(it.vae.prior, chunk_size=0),
        "chunk_size must be a whole number >= 1, got 0",
    ),
    (lambda it: sample(it.vae.prior, 1.5), r"num_samples must be a whole number >= 1, got 1\.5"),
    (
        lambda it: trajectory(it.gaussian.prior, 2),
        "prior must be a DiffusionPrior, got GaussianPrior: use sample without .*",
    ),
    (lambda it: ddim(it.vae.prior, 2, 1.5), "num_steps must be a whole number >= 1, got 1.5"),
    (lambda it: sample(it.vae.prior, 2, sampler="euler"), "unknown sampler 'euler': choose one .*"),
    (lambda it: sample(it.vae.prior, 2, None, "heun", 2, "even"), "unknown grid 'even': choose .*"),
    (
        lambda it: sample(it.gaussian.prior, 2, num_steps=5),
        "prior must be a DiffusionPrior, got GaussianPrior: use sample without .*",
    ),
    (lambda it: ddim(it.vae.prior, 2, 2, eta=nan), r"eta must be in \[0, 1\], got nan"),
    (
        lambda it: interpolate(it.vae, it.x, it.x[:2]),
        r"y must have the shape of x, \(4, 1, 8, 8\), got \(2, 1, 8, 8\)",
    ),
    (
        lambda it: reconstruct(it.vae, torch.zeros(2, 3, 8, 8)),
        r"x must end in shape \(1, 8, 8\), got \(2, 3, 8, 8\)",
    ),
    (
        lambda it: load_extractor("vgg"),
        "features must be one of inception, .*, pixels, got 'vgg'",
    ),
    (
        lambda it: load_extractor("pixels")(torch.full((2, 1, 8, 8), 1.5)),
        r"images must lie in \[0, 1\], got \[1\.5, 1\.5\]: rescale or clamp them",
    ),
    (
        lambda it: load_extractor("pixels")(torch.full((2, 1, 8, 8), nan)),
        r"images must lie in \[0, 1\], got \[nan, nan\]: rescale or clamp them",
    ),
    (
        lambda it: load_extractor("pixels")(it.images_),
        r"images must be floats in \[0, 1\], got torch.uint8: divide by 255",
    ),
    (
        lambda it: load_extractor("pixels", weights=it.file),
        "weights are for features 'inception' only, got .* for 'pixels'",
    ),
    (
        lambda it: load_extractor("inception", weights=it.missing),
        "there are no Inception weights at .*missing: get https://.*",
    ),
    (
        lambda it: Extractor("../up", torch.flatten),
        r"name must be that of a file, without a folder, got '\.\./up'",
    ),
    (
        lambda it: image_statistics([], load_extractor("pixels")),
        "batches must hold at least one batch of images, got none",
    ),
    (
        lambda it: reference_statistics(it.images_[:1], load_extractor("pixels"), levels=17),
        r"images must be at least 2 images with shape \(N, C, H, W\) in uint8, got \(1, .*",
    ),
    (
        lambda it: FeatureStatistics.load(it.file),
        ".*file does not hold feature statistics: .*",
    ),
    (
        lambda it: frechet_distance(*[torch.zeros(2), torch.eye(2)], torch.zeros(3), torch.eye(3)),
        "features differ in dimension: 2 against 3",
    ),
    (
        lambda it: save_image_grid(torch.full((4, 1, 8, 8), 3.0), it.out / "grid.png"),
        r"images must be finite and in \[0, 1\], got values from 3 to 3: .*",
    ),
    (
        lambda it: plot_history([], it.out / "a.png"),
        "history must have at least one epoch, got none",
    ),
    # Configurations, runs and their files
    (lambda it: TrainConfig(epochs=-1), "epochs must be a whole number >= 0, got -1"),
    (lambda it: TrainConfig(epochs=1.5), r"epochs must be a whole number >= 0, got 1\.5"),
    (lambda it: TrainConfig(epochs="3"), "epochs must be a whole number >= 0, got '3'"),
    (lambda it: TrainConfig(prior_epochs=-1), "prior_epochs must be a whole number >= 0, got -1"),
    (
        lambda it: TrainConfig(epochs=1, gaussian_epochs=2),
        "gaussian_epochs must be at most epochs=1, got 2",
    ),
    (lambda it: TrainConfig(batch_size=2.5), r"batch_size must be a whole number >= 1, got 2\.5"),
    (lambda it: TrainConfig(lr=nan), "lr must be positive and finite, got nan"),
    (lambda it: TrainConfig(prior_lr=0), "prior_lr must be positive and finite, got 0"),
    (
        lambda it: TrainConfig(prior_weight_decay=-1),
        "prior_weight_decay must be a finite number >= 0, got -1",
    ),
    (
        lambda it: make_vae(ModelConfig(beta_min=0.5, beta_max=0.1)),
        r"expected 0 < beta_min <= beta_max < 1, got 0\.5, 0\.1",
    ),
    (
        lambda it: make_vae(ModelConfig(denoiser="preconditioned", parameterization="v")),
        "a preconditioned denoiser predicts 'eps': parameterization must be 'eps', got 'v'",
    ),
    (
        lambda it: TrainConfig(lr_schedule="step"),
        "unknown lr_schedule 'step': choose one of constant, cosine, inverse-sqrt",
    ),
    (lambda it: TrainConfig(warmup=-1), "warmup must be a whole number >= 0, got -1"),
    (lambda it: TrainConfig(clip_norm=nan), "clip_norm must be positive, got nan"),
    (lambda it: TrainConfig(ema=1), r"ema must be in \[0, 1\), got 1"),
    (
        lambda it: TrainConfig(precision="fp16"),
        "unknown precision 'fp16': choose one of float32, float64, bf16",
    ),
    (lambda it: TrainConfig(seed=0.5), r"seed must be a whole number in \[0, 2\^63\), got 0\.5"),
    (lambda it: ModelConfig(latent_dim=0), "latent_dim must be a whole number >= 1, got 0"),
    (lambda it: ModelConfig(prior_width=0), "prior_width must be a whole number >= 1, got 0"),
    (
        lambda it: ModelConfig("gaussian", num_timesteps=0),
        "num_timesteps must be a whole number >= 1 or 'continuous', got 0",
    ),
    (
        lambda it: ModelConfig(image_shape=(8, 8)),
        r"image_shape must be \(C, H, W\), got \(8, 8\)",
    ),
    (
        lambda it: make_vae(ModelConfig("gausian")),
        "unknown prior 'gausian': choose one of gaussian, mixture, vamp, exemplar, flow, diffusion",
    ),
    (
        lambda it: make_vae(ModelConfig("gaussian", schedule="sqrt")),
        "unknown schedule 'sqrt': choose one of linear, cosine, learned, learned-diagonal",
    ),
    (
        lambda it: make_vae(ModelConfig(networks="unet")),
        "unknown networks 'unet': choose one of default, paper, resnet, mlp",
    ),
    (
        lambda it: it.trainer(model={"image_shape": (3, 8, 8)}),
        r"image_shape must be that of the data, \(1, 8, 8\), got \(3, 8, 8\)",
    ),
    (
        lambda it: it.trainer(model={"levels": 256}),
        "levels must be that of the data, 17, got 256",
    ),
    (
        lambda it: it.trainer(elbo="timestep"),
        "elbo must be an estimator of the ELBO, got 'timestep'",
    ),
    (
        lambda it: it.trainer(snapshots=[-1]),
        "each of snapshots must be a whole number >= 0, got -1",
    ),
    (
        lambda it: it.trainer(snapshots=[0, 7]),
        "each of snapshots must be at most the number of epochs, 1, got 7",
    ),
    (lambda it: it.trainer(init=it.missing), "no checkpoint at .*missing"),
    (lambda it: it.trainer(init=it.file), r".*file is not a checkpoint, or is truncated \(.*\)"),
    (
        lambda it: it.trainer(model={"latent_dim": 3}, init=it.run),
        "cannot start from .*: other networks .*",
    ),
    (lambda it: it.trainer().resume(), "out must be a run directory to resume from, got None"),
    (
        lambda it: it.trainer(out=it.only_best, train=it.settings).resume(),
        r"cannot resume .*checkpoint\.pt: it has no 'optim', as if it were a model alone, .*",
    ),
    (
        lambda it: it.trainer(out=it.run, train={"lr": 1.0}).resume(),
        r"cannot resume .* with lr=1\.0: the run was started with .*",
    ),
    (lambda it: load_vae(it.missing), "no checkpoint at .*missing"),
    (lambda it: load_vae(it.images), r"no checkpoint at .*best\.pt"),
    (
        lambda it: load_vae(it.no_run),
        r".*no_run\.pt is no checkpoint of a run: 'train_config' is missing or incomplete",
    ),
    (
        lambda it: load_vae(it.other_version),
        r".*other\.pt has settings of another version: .* 'colour'",
    ),
    (
        lambda it: load_vae(it.other_weights),
        r".*weights\.pt has weights of other networks \(.*\)",
    ),
    (
        lambda it: load_data(it.run, groups=it.file),
        r".* has other splits: it was trained with groups=None, not file \(sha256 .*--groups\)",
    ),
    (lambda it: load_checkpoint(it.missing), "no checkpoint at .*missing"),
    (lambda it: read_json(it.file), ".*file is damaged, mend or remove it: .*"),
    (
        lambda it: check_folder("out", it.file / "run"),
        "out .*file/run: .*file is a file: choose a folder",
    ),
]


def laplace():
    return dist.Laplace(torch.zeros(4, 2), torch.ones(4, 2)).to_event(1)


def laplace_guide(vae, x):
    with pyro.plate("data", len(x), dim=-1):
        return vae.prior.guide(laplace())


# Arguments, and an expression for the whole message after "error: ".
SCRIPTS = {
    "run.py": [
        ("--prior diffuson", "unknown prior 'diffuson': choose one of gaussian, mixture, .*"),
        ("--prior gaussian --schedule sqrt", "unknown schedule 'sqrt': choose one of .*"),
        ("--prior flow --num-timesteps 9", "prior='flow' has no use for num_timesteps, .*"),
        ("--flow coupling", "prior='diffusion' has no use for flow, .*"),
        ("--prior flow --flow glow", "unknown flow 'glow': choose one of autoregressive, coupling"),
        ("--denoiser unet", r"event_shape must be \(C, h, w\) for a UNetBackbone, got \(.*,\)"),
        ("--dataset imagenet", "unknown data set 'imagenet': choose one of .*"),
        ("--dataset folder --root {missing}", "root='.*missing' is not a folder: give .*"),
        ("--dataset folder --root {images} --image-size 7", "images of 7 x 7 pixels: .*"),
        ("--dataset mnist --root {empty} --no-download", "--dataset mnist: could not read .*"),
        ("--groups {file}", "groups='.*' is for the data set 'folder', not 'digits': .*"),
        ("--limit 0", "limit must be a whole number >= 1, got 0"),
        ("--limit many", "argument --limit: invalid int value: 'many'"),
        ("--latent-dim 0", "latent_dim must be a whole number >= 1, got 0"),
        ("--width -1", "width must be a whole number >= 1, got -1"),
        ("--num-components 0", "num_components must be a whole number >= 1, got 0"),
        ("--prior-width 0", "prior_width must be a whole number >= 1, got 0"),
        ("--networks paper", r"image_shape must have 32 or 64 pixels a side, got \(1, 8, 8\)"),
        ("--likelihood poisson", "unknown likelihood 'poisson': choose one of .*"),
        ("--likelihood autoregressive --kernels 5 4", r"kernels must be odd, got \(5, 4\)"),
        ("--kernels 5 1", "likelihood='gaussian' has no use for kernels, .*"),
        ("--epochs -1", "epochs must be a whole number >= 0, got -1"),
        ("--epochs 0", "epochs must be positive, got 0"),
        ("--batch-size 0", "batch_size must be a whole number >= 1, got 0"),
        ("--lr nan", "lr must be positive and finite, got nan"),
        ("--lr -1", r"lr must be positive and finite, got -1\.0"),
        ("--warmup -1", "warmup must be a whole number >= 0, got -1"),
        ("--clip-norm nan", "clip_norm must be positive, got nan"),
        ("--ema nan", r"ema must be in \[0, 1\), got nan"),
        ("--seed -1", r"seed must be a whole number in \[0, 2\^63\), got -1"),
        ("--k 0", "k must be a whole number >= 1 or 'auto', got 0"),
        ("--num-particles 0", "num_particles must be a whole number >= 1, got 0"),
        ("--estimator vr", "unknown estimator 'vr': choose one of timestep, trace, .*"),
        (
            "--estimator iwae",
            "estimator='iwae' of one particle is the ELBO: .*",
        ),
        ("--weighting simple --conditioning x", "weighting='simple' is defined for .*"),
        ("--estimator trace-kl --timesteps all", "estimator='trace-kl' has no use for timesteps.*"),
        ("--condition labels --networks paper", "networks='paper' take no labels: .*"),
        (
            "--context-dropout 1 --condition labels",
            r"context_dropout must be in \[0, 1\), got 1\.0",
        ),
        ("--beta -1", r"each of beta must be a finite number >= 0, got -1\.0"),
        ("--beta 1 2", "beta must be one number or one for each of 1 groups of latents, got 1.*"),
        ("--kl-balance", "kl_balance ends with the warm-up of the KL: give kl_warmup"),
        ("--kl-balance --kl-warmup 1", "kl_balance is for a hierarchy, .*"),
        ("--tc-weight 2 --conditioning x", "the total correlation needs .* got 'x'"),
        ("--context-dropout 0.1", "context_dropout must be 0 if there is no context to drop, .*"),
        ("--guidance 2 --condition labels", r"guidance=2\.0 needs a prior that has learned .*"),
        ("--guidance nan", "guidance must be finite, got nan"),
        ("--snapshots -1", "each of snapshots must be a whole number >= 0, got -1"),
        ("--snapshots 9", "each of snapshots must be at most the number of epochs, 1, got 9"),
        ("--test-k -1", "test_k must be a whole number >= 0, got -1"),
        ("--features pixels --num-images 1", "a Fréchet distance needs at least 2 images, .*"),
        ("--features inception --fid-weights {file}", ".*file does not hold .* weights.*"),
        ("--init {missing}", "no checkpoint at .*missing"),
        ("--init {file}", r".*file is not a checkpoint, or is truncated \(.*\)"),
        ("--out {file}", "--out .*file: .*file is a file: choose a folder"),
        ("--out {file}/run", "--out .*file/run: .*file is a file: choose a folder"),
        ("--out=", "argument --out: must be the path of a folder, got ''"),
        ("--out {run}", "--out .* holds a run already: continue it with --resume, or .*"),
        ("--resume", r"no checkpoint at .*checkpoint\.pt"),
        ("--out {run} --resume --lr 1", r"cannot resume .* with lr=1\.0: the run was .*"),
        ("--out {run} --resume --likelihood bernoulli", "cannot resume .* with likelihood=.*"),
        ("--out {only_best} --resume", "cannot resume .*: it has no 'optim', as if .*"),
        ("--epoch-s 3", "unrecognized arguments: --epoch-s 3"),
    ],
    "evaluate.py": [
        ("", "the following arguments are required: RUN"),
        ("{missing}", "no run directory at .*missing"),
        ("{images}", r"no checkpoint at .*best\.pt"),
        ("{run} --num-images 0", "--num-images must be at least 1, got 0"),
        ("{run} --num-samples -1", "--num-samples must be at least 1, got -1"),
        ("{run} --log-prior flow --num-steps 5", "num_steps must be .* from 1 to T = 4, got 5"),
        ("{run} --surgery-images 1", "--surgery-images must be at least 2, got 1"),
        ("{run} --seed -1", r"--seed must be a whole number in \[0, 2\^63\), got -1"),
        ("{run} --device tpu", "argument --device: 'tpu' is no device: use cpu or cuda"),
        ("{run} --device meta", "argument --device: 'meta' is not supported: use .*"),
        ("{run} --groups {missing}", "groups='.*' is not a file: give a list .*"),
        ("{damaged}", r".*evaluation\.json is damaged, mend or remove it: .*"),
    ],
    "compare_estimators.py": [
        ("", "one of the arguments --checkpoint --oracle is required"),
        ("--oracle --draws 3", "--draws must be at least 4, got 3"),
        ("--oracle --batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--oracle --minibatches 0", "--minibatches must be at least 1, got 0"),
        ("--oracle --seconds nan", "--seconds must be positive and .* got nan"),
        ("--oracle --seconds -1", r"--seconds must be positive .* got -1\.0"),
        ("--oracle --num-timesteps 0", "num_timesteps must be .* >= 1, got 0"),
        ("--oracle --seed -1", "--seed must be a whole number in .*, got -1"),
        ("--oracle --only foo", "--only 'foo' matches none of: .*"),
        ("--oracle --out {file}", "--out .*file is a file: choose a folder"),
        ("--checkpoint {missing}", "no checkpoint at .*missing"),
        ("--checkpoint {file}", ".*file is not a checkpoint, or is .*"),
        ("--checkpoint {gaussian}", "--checkpoint .*: prior must be a DiffusionPrior or hold .*"),
        ("--checkpoint {run}", "--batch-size 100 times 12 must be at most .*"),
    ],
    "train_estimators.py": [
        ("--estimators foo", "unknown estimator 'foo': choose from .*"),
        ("--seconds nan", "--seconds must be positive and finite, got nan"),
        ("--points 0", "--points must be positive and finite, got 0"),
        ("--lr 0", r"--lr must be positive and finite, got 0\.0"),
        ("--width 0", "width must be a whole number >= 1, got 0"),
        ("--num-timesteps 0", "num_timesteps must be a whole number >= 1 .*, got 0"),
        ("--seeds 0 -1", "each of --seeds must be a whole number in .*, got -1"),
        ("--start {missing}", "no checkpoint at .*missing"),
        ("--start {gaussian}", "--start .* must have a diffusion prior"),
        ("--out {file}", "--out .*file is a file: choose a folder"),
        ("--out {bad_times}", r".*times\.csv is damaged, mend or remove it: .*"),
        (
            "--out {bad_settings} --estimators Trace_ELBO",
            r".*settings\.json is damaged, mend or remove it: .*",
        ),
    ],
    "collapse.py": [
        ("--epochs 0", "epochs must be a whole number >= 1, got 0"),
        ("--points 0", "points must be a whole number >= 1, got 0"),
        ("--k 0", "k must be a whole number >= 1, got 0"),
        ("--width 0", "width must be a whole number >= 1, got 0"),
        ("--limit 0", "limit must be a whole number >= 1, got 0"),
        ("--seeds 0 -1", "each of --seeds must be a whole number in .*, got -1"),
        ("--device tpu", "argument --device: 'tpu' is .*"),
        ("--out {file}", "--out .*file: .*file is a file: choose a folder"),
    ],
    "clock.py": [
        ("neither", "argument study: invalid choice: 'neither' .*"),
        ("priors --budgets 0", r"each of --budgets must be positive and finite, got 0\.0"),
        ("priors --seeds -1", "each of --seeds must be a whole number in .*, got -1"),
        ("priors --recipes no", "unknown recipe 'no': choose from .*"),
        ("priors --out {file}", "--out .*file: .*file is a file: choose a folder"),
    ],
    "noise_matched.py": [
        ("--epochs 0", "epochs must be a whole number >= 1, got 0"),
        ("--seeds 0 -1", "each of --seeds must be a whole number in .*, got -1"),
        ("--out {file}", "--out .*file: .*file is a file: choose a folder"),
    ],
    "signal_to_noise.py": [
        ("neither", "argument what: invalid choice: 'neither' .*"),
        ("entropy --epochs 0", "--epochs must be a whole number >= 1, got 0"),
        ("entropy --points 0", "--points must be a whole number >= 1, got 0"),
        ("entropy --limit 0", "limit must be a whole number >= 1, got 0"),
        ("entropy --width 0", "width must be a whole number >= 1, got 0"),
        ("entropy --batch-size 0", "--batch-size must be a whole number >= 1, got 0"),
        ("particles --draws 1", "--draws must be a whole number >= 2, got 1"),
        ("particles --particles 4 0", "each of --particles must be a whole number >= 1, got 0"),
        ("particles --num-timesteps 0", "--num-timesteps must be a whole number >= 1, got 0"),
        ("particles --seed -1", "--seed must be a whole number in .*, got -1"),
        ("particles --device tpu", "argument --device: 'tpu' is .*"),
        ("particles --out {file}", "--out .*file: .*file is a file: choose a folder"),
    ],
    "rate_distortion.py": [
        ("--epochs 0", "epochs must be a whole number >= 1, got 0"),
        ("--latent-dim 0", "latent_dim must be a whole number >= 1, got 0"),
        ("--limit 0", "limit must be a whole number >= 1, got 0"),
        ("--priors flow copula", "unknown prior 'copula': choose one of .*"),
        ("--betas 1 -1", r"each of beta must be a finite number >= 0, got -1\.0"),
        ("--seeds 0 -1", "each of --seeds must be a whole number in .*, got -1"),
        ("--device tpu", "argument --device: 'tpu' is .*"),
        ("--out {file}", "--out .*file: .*file is a file: choose a folder"),
    ],
    "steps.py": [
        ("", "the following arguments are required: RUN"),
        ("{missing}", "no run directory at .*missing"),
        ("{gaussian}", "prior must be a DiffusionPrior, got GaussianPrior: use sample without .*"),
        ("{run} {run}", "runs must have different names, as their tables do: use several --out"),
        ("{run} --steps 5 0", "--steps must be a whole number >= 1, got 0"),
        ("{run} --num-samples 1", "--num-samples must be a whole number >= 2, got 1"),
        ("{run} --num-fit 0", "--num-fit must be a whole number >= 1, got 0"),
        ("{run} --fine-tune -1", "--fine-tune must be a whole number >= 0, got -1"),
        ("{run} --samplers euler", "unknown sampler 'euler': choose one of ancestral, .*"),
        ("{run} --grids even", "unknown grid 'even': choose one of time, .*"),
        ("{run} --features vgg", "unknown features 'vgg': choose one of auto, .*"),
        ("{run} --seed -1", r"--seed must be a whole number in \[0, 2\^63\), got -1"),
        ("{run} --out {file}", "--out .*file: .*file is a file: choose a folder"),
    ],
    "limit.py": [
        ("", "the following arguments are required: RUN"),
        ("{missing}", "no run directory at .*missing"),
        ("{gaussian}", ".* must have a diffusion prior in continuous time, got GaussianPrior"),
        ("{run}", ".* must have a diffusion prior in continuous time, got DiffusionPrior of .*"),
        ("{run} --steps 1", "--steps must be a whole number >= 2, got 1"),
        ("{run} --draws 9", "--draws must be a whole number >= 20, got 9"),
        ("{run} --seed -1", r"--seed must be a whole number in \[0, 2\^63\), got -1"),
        ("{run} --out {file}", "--out .*file: .*file is a file: choose a folder"),
    ],
    "benchmark.py": [
        ("--repeats 1", "--repeats must be at least 2, got 1"),
        ("--configurations mnist", "argument --configurations: invalid choice: .*"),
        ("--device cuda:x", "argument --device: 'cuda:x' is no device: use cpu or cuda"),
        ("--out {file}", "--out .*file: .*file is a file: choose a folder"),
        ("--out {file}/new", "--out .*file/new: .*file is a file: choose a folder"),
    ],
    "table.py": [
        ("", "the following arguments are required: preset"),
        ("nowhere", r"no preset at .*nowhere\.toml: give the path of a \.toml file, or .*"),
        ("{toml[empty]}", r".*empty\.toml: at least one table \[datasets\.NAME\] is needed"),
        ("{toml[typo]}", r".*: \[settings\] .* name 'epoch': did you mean 'epochs'\?"),
        ("{toml[prior]}", r".*: \[rows\.b\] has the unknown prior 'b': choose one of .*"),
        ("{toml[value]}", ".*: digits/2-flow-s0: argument --epochs: invalid int value: .*"),
        ("{toml[path]}", r".*: \[rows\.\.\./b\]: a name has letters, digits and .*"),
        ("{toml[syntax]}", r".*syntax\.toml is not TOML: .*"),
        ("smoke --out {file}", "--out .*file: .*file is a file: choose a folder"),
        ("smoke --jobs 0", "--jobs must be at least 1, got 0"),
        ("smoke --seeds -1", r".*: seeds must be a list of different integers >= 0, .*"),
        ("smoke --only none", "--only none matches no run, such as digits/2-gaussian-s0"),
        ("smoke --root data", "--root must be NAME=PATH, got 'data'"),
        ("smoke --root cifar=/", ".*: --root has the unknown name 'cifar': there are digits"),
        ("smoke --summary-only --out {empty}", "no run in .* is finished yet: there is .*"),
        ("smoke --out {bad_cell}", r".*cell\.json is damaged, mend or remove it: .*"),
    ],
    "departures.py": [
        ("--epochs 0", "--epochs must be positive and finite, got 0"),
        ("--num-timesteps 2", "--num-timesteps must be at least 3, got 2"),
        ("--out {file}", "--out .*file is a file: choose a folder"),
        ("--out=", "argument --out: must be the path of a folder, got ''"),
    ],
    # The loss by hand is a module of benchmark.py.
    "by_hand.py": [
        (
            lambda by_hand, it: by_hand.ByHand(it.gaussian),
            "vae must have a diffusion prior of 2 timesteps or more, got GaussianPrior.*",
        ),
        (lambda by_hand, it: by_hand.ByHand(it.vae, k=3), "k must be even, .*, got 3"),
        (lambda by_hand, it: by_hand.ByHand(it.vae, k=0), "k must be even, .*, got 0"),
        (
            lambda by_hand, it: by_hand.ByHand(it.bernoulli),
            "vae must have .* and a Gaussian likelihood with a shared sigma, got .*Bernoulli.*",
        ),
    ],
}
