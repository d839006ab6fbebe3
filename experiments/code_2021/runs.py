r"""What ``departures.py`` trains, and what it measures of a trained model."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from pyro_vaediff.data import ImageData
from pyro_vaediff.diffusion import base_normal
from pyro_vaediff.evaluate import (
    evaluating,
    frechet_distances,
    in_batches,
    load_extractor,
    preprocess,
)
from pyro_vaediff.infer import (
    ImportanceTimesteps,
    Proposal,
    Reweighted,
    TermsELBO,
    Timestep_ELBO,
    TraceKL_ELBO,
    UniformTimesteps,
)
from pyro_vaediff.infer.trace_kl_elbo import per_datum
from pyro_vaediff.likelihoods import make_likelihood
from pyro_vaediff.nn import ConvEncoder
from pyro_vaediff.sampling.samplers import check_diffusion
from pyro_vaediff.train import ModelConfig, TrainConfig, Trainer, make_vae
from pyro_vaediff.vae import VAE

from .objectives import (
    NeverLast,
    PriorTermGivenX,
    Reweighting,
    ShiftedLabels,
    all_of,
    constant_errors,
    log_variance_as_log_scale,
    unweighted,
    without_first_step,
)

# What is trained ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    r"""A model and the objective that it is trained with.

    Arguments:
        title: What it departs in.
        reference: The run that departs in nothing, or nothing if this is it.
        prior: The prior.
        bound: The class of the estimator.
        weights: What takes the place of its terms.
        timesteps: The proposal of the timesteps.
        never_last: Whether the step t = T is left out.
        shifted: Whether the network is told t - 1 in training.
        fixed_likelihood: Whether the likelihood is N(., 1/2).
        batch_norm: Whether the encoder has BatchNorm.
    """

    title: str
    reference: str = ""
    prior: str = "diffusion"
    bound: Callable[..., TraceKL_ELBO] = Timestep_ELBO
    weights: Reweighting | None = None
    timesteps: Callable[[], Proposal] = ImportanceTimesteps
    never_last: bool = False
    shifted: bool = False
    fixed_likelihood: bool = False
    batch_norm: bool = False

    def estimator(self, **options: Any) -> TermsELBO:
        r"""Returns the objective: to train with, or with other options."""
        if self.bound is not TraceKL_ELBO:
            proposal = NeverLast(self.timesteps()) if self.never_last else self.timesteps()
            options = {"timesteps": proposal} | options
        else:
            options = {}
        elbo = self.bound(**options)
        return elbo if self.weights is None else Reweighted(elbo, self.weights)


NETWORKS: dict[str, Any] = {"fixed_likelihood": True, "batch_norm": True}
BUG: dict[str, Any] = {
    "prior": "gaussian", "bound": TraceKL_ELBO, "weights": log_variance_as_log_scale
}  # fmt: skip
CHAIN: dict[str, Any] = {
    "bound": PriorTermGivenX,
    "weights": all_of(unweighted, without_first_step),
    "timesteps": UniformTimesteps,
    "never_last": True,
    "shifted": True,
}
RUNS = {
    "diffusion": Run("the ELBO"),
    "unweighted": Run(
        "(1) reverse KLs without 1/2σ²",
        "diffusion",
        weights=unweighted,
        timesteps=UniformTimesteps,  # without their weights, the terms are of about the same size
    ),
    "first-step": Run("(2) without −log p(z_0 given z_1)", "diffusion", weights=without_first_step),
    "prior-term": Run("(4) KL at t = T given x", "diffusion", bound=PriorTermGivenX),
    "likelihood": Run("(5) likelihood N(·, 1/2)", "diffusion", fixed_likelihood=True),
    "never-last": Run("(6) t = T never trained", "diffusion", never_last=True),
    "shifted": Run("(6) network told t − 1", "diffusion", shifted=True),
    "batch-norm": Run("(7) BatchNorm in the encoder", "diffusion", batch_norm=True),
    "chain": Run("(1), (2), (4), (6)", "diffusion", **CHAIN),
    "networks": Run("(5), (7)", "diffusion", **NETWORKS),
    "all": Run("(1), (2), (4) to (7)", "diffusion", **CHAIN, **NETWORKS),
    "gaussian": Run("the ELBO", prior="gaussian"),
    "gaussian-bug": Run("(3) log-variance read as log-sd", "gaussian", **BUG),
    "gaussian-networks": Run("(5), (7)", "gaussian", prior="gaussian", **NETWORKS),
    "gaussian-all": Run("(3), (5), (7)", "gaussian", **BUG, **NETWORKS),
    "flow": Run("the ELBO", prior="flow"),
    "flow-all": Run("(5), (7)", "flow", prior="flow", **NETWORKS),
}
# The runs of each prior, with its terms as they should be and as in the code: first with a learned
# likelihood, then with the networks and the likelihood of the code.
PRIORS = {
    "Gaussian": ("gaussian", "gaussian-bug", "gaussian-networks", "gaussian-all"),
    "flow": ("flow", "flow", "flow-all", "flow-all"),
    "diffusion": ("diffusion", "chain", "networks", "all"),
}


def make(run: Run, data: ImageData, args: argparse.Namespace, seed: int) -> VAE:
    r"""Returns the untrained VAE of a run. All of a seed and a prior have the same weights."""
    torch.manual_seed(seed)
    config = ModelConfig(
        prior=run.prior,
        latent_dim=args.latent_dim,
        image_shape=data.image_shape,
        levels=data.levels,
        likelihood="gaussian-fixed" if run.fixed_likelihood else "gaussian",
        width=args.width,
        num_timesteps=args.num_timesteps,
    )
    vae = make_vae(config)
    if run.batch_norm:
        encoder = ConvEncoder(data.image_shape, args.latent_dim, args.width, norm="batch")
        encoder.load_state_dict(vae.encoder.state_dict(), strict=False)
        vae.encoder = encoder
    return vae.to(args.device)


def objective(run: Run, vae: VAE) -> VAE:
    r"""Returns the programs that the objective of a run sees, with the networks of a VAE."""
    if not run.shifted:
        return vae
    device = next(vae.parameters()).device
    prior = ShiftedLabels(check_diffusion(vae.prior))
    return VAE(vae.encoder, vae.decoder, prior, vae.space).to(device)


def train(run: Run, vae: VAE, data: ImageData, args: argparse.Namespace, seed: int) -> None:
    r"""Trains a VAE with the objective of a run."""
    config = TrainConfig(
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        lr_schedule="cosine",
        clip_norm=args.clip_norm,
        seed=seed,
        validate_every=args.epochs,  # nothing is selected: it is the last model that is measured
    )
    programs = objective(run, vae)
    Trainer(programs, data, run.estimator(), config, args.device).fit(progress=False)
    vae.eval()


# What is measured ---------------------------------------------------------------------------------


@torch.no_grad()
def test_terms(run: Run, vae: VAE, data: ImageData, args: argparse.Namespace) -> dict[str, float]:
    r"""Returns the terms of a run's objective on the test images, over all of its timesteps."""
    elbo = run.estimator(timesteps="all", entropy="exact")
    terms: dict[str, float] = {}
    vae = objective(run, vae)
    with evaluating(vae, seed=0):
        for x, _ in in_batches(vae, data.test, batch_size=args.batch_size):
            (particle,) = elbo.particles(vae.model, vae.guide, x)
            for name, term in per_datum(particle).items():
                if name == "z_s":  # with shape (T - 1, B)
                    term = (term[:-1] if run.never_last else term).sum(0)
                name = "z_T" if name == f"z_{args.num_timesteps}" else name
                value = term.expand(len(x)).double().sum().item() / len(data.test)
                terms[name] = terms.get(name, 0.0) + value
    return terms


def misreports(
    name: str, vae: VAE, terms: dict[str, float], data: ImageData, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    r"""Returns what objectives say of a trained VAE in excess of its -ELBO, term by term."""

    def excess(run: Run, model: VAE) -> dict[str, float]:
        said = test_terms(run, model, data, args)
        names = dict.fromkeys([*terms, *said])
        excess = {key: said.get(key, 0.0) - terms.get(key, 0.0) for key in names}
        return {key: value for key, value in excess.items() if value}

    reports = {}
    for other, run in RUNS.items():
        if run.reference != name:
            continue
        model = vae
        if run.fixed_likelihood:
            decoder = copy.deepcopy(vae.decoder)
            decoder.likelihood = make_likelihood("gaussian-fixed", data.image_shape, data.levels)
            model = VAE(vae.encoder, decoder, vae.prior, vae.space)
        if other != "batch-norm":
            reports[other] = excess(run, model)
    if name == "batch-norm":
        in_train_mode = VAE(TrainMode(vae.encoder), vae.decoder, vae.prior, vae.space)
        reports[name] = excess(RUNS[name], in_train_mode)
    if name == "diffusion":
        reports["constants"] = constant_errors(args.latent_dim, math.prod(data.image_shape))
    return reports


class TrainMode(nn.Module):
    r"""An encoder that stays in train mode, where BatchNorm couples the images of a batch."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = copy.deepcopy(encoder)

    def forward(self, x: Tensor) -> TorchDistribution:
        return self.encoder.train()(x)


def normals_of(q_z0: TorchDistribution) -> Normal:
    r"""Returns the normals of a posterior, which is Gaussian in every run."""
    normals = base_normal(q_z0)
    assert normals is not None
    return normals


@torch.no_grad()
def coupling(vae: VAE, data: ImageData, args: argparse.Namespace) -> float:
    r"""Returns the KL between the posteriors of an image in two batches, a mean over images."""
    encoder = TrainMode(vae.encoder)
    with evaluating(vae, seed=0):
        x = preprocess(vae, data.test)
        posteriors = []
        for _ in range(2):
            order = torch.randperm(len(x))
            normals = [normals_of(encoder(x[i])) for i in order.split(args.batch_size)]
            loc, scale = (torch.cat([getattr(q, p) for q in normals]) for p in ("loc", "scale"))
            back = order.argsort()
            posteriors.append(Normal(loc[back], scale[back]))
    return kl_divergence(*posteriors).sum(-1).mean().item()


@torch.no_grad()
def latent_scales(vae: VAE, data: ImageData, args: argparse.Namespace) -> dict[str, float]:
    r"""Returns the root mean square of the latents, and the typical scale of a posterior."""
    with evaluating(vae, seed=0):
        batches = in_batches(vae, data.test, batch_size=args.batch_size)
        q = [normals_of(vae.encoder(x)) for x, _ in batches]
    loc, scale = torch.cat([p.loc for p in q]), torch.cat([p.scale for p in q])
    rms = (loc.square() + scale.square()).mean().sqrt()
    return {"latent_rms": rms.item(), "posterior_sd": scale.log().mean().exp().item()}


def measure(name: str, data: ImageData, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    r"""Trains a run and returns what is found."""
    run, vae = RUNS[name], make(RUNS[name], data, args, seed)
    train(run, vae, data, args, seed)
    bound = RUNS[run.reference or name]
    terms = test_terms(bound, vae, data, args)
    torch.manual_seed(seed)
    distances = frechet_distances(vae, data, load_extractor("pixels"), args.num_images)
    return {
        "run": name,
        "seed": seed,
        "negative_elbo": sum(terms.values()),
        "frechet": distances["samples"],
        "coupling": coupling(vae, data, args) if run.batch_norm else 0.0,
        **latent_scales(vae, data, args),
        "terms": terms,
        "misreports": misreports(name, vae, terms, data, args),
    }
