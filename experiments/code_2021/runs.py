r"""What ``departures.py`` trains, and what it measures of a trained model."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_vaediff.data import ImageData, batches
from pyro_vaediff.diffusion import base_normal
from pyro_vaediff.evaluate import load_extractor
from pyro_vaediff.evaluate.elbo import evaluating, in_batches, preprocess
from pyro_vaediff.infer import Importance, Timestep_ELBO, TraceKL_ELBO, Uniform, elbo_terms
from pyro_vaediff.infer.departures import (
    LogVarianceAsLogScale,
    NeverLast,
    PriorTermGivenX,
    ShiftedLabels,
    UnweightedKL,
    WithoutFirstStep,
    constant_errors,
)
from pyro_vaediff.likelihoods import make_likelihood
from pyro_vaediff.nn import ConvEncoder
from pyro_vaediff.train.build import make_vae
from pyro_vaediff.train.config import ModelConfig
from pyro_vaediff.train.optim import SVI, TorchOptim, per_datum
from pyro_vaediff.train.report import frechet_distances
from pyro_vaediff.vae import VAE

# What is trained ----------------------------------------------------------------------------------


class Code2021(UnweightedKL, WithoutFirstStep, PriorTermGivenX):
    r"""The objective of the diffusion prior in the code of 2021, up to constants."""


@dataclass(frozen=True)
class Run:
    r"""A model and the objective that it is trained with.

    Arguments:
        title: What it departs in.
        reference: The run that departs in nothing, or nothing if this is it.
        prior: The prior.
        elbo: Makes the estimator, from the schedule of the prior (if it has one) and options.
        timesteps: The proposal of the timesteps.
        never_last: Whether the step t = T is left out.
        shifted: Whether the network is told t - 1 in training.
        fixed_likelihood: Whether the likelihood is N(., 1/2).
        batch_norm: Whether the encoder has BatchNorm.
    """

    title: str
    reference: str = ""
    prior: str = "diffusion"
    elbo: Callable[..., TraceKL_ELBO] = lambda schedule, **options: Timestep_ELBO(**options)
    timesteps: Callable[[], nn.Module] = Importance
    never_last: bool = False
    shifted: bool = False
    fixed_likelihood: bool = False
    batch_norm: bool = False

    def estimator(self, vae: VAE, **options: object) -> TraceKL_ELBO:
        r"""Returns the objective: to train with, or with other options."""
        proposal = NeverLast(self.timesteps()) if self.never_last else self.timesteps()
        schedule = getattr(vae.prior, "schedule", None)
        return self.elbo(schedule, **{"timesteps": proposal} | options)


NETWORKS = {"fixed_likelihood": True, "batch_norm": True}
BUG = {"prior": "gaussian", "elbo": lambda schedule, **options: LogVarianceAsLogScale()}
CHAIN = {"elbo": Code2021, "timesteps": Uniform, "never_last": True, "shifted": True}
RUNS = {
    "diffusion": Run("the ELBO"),
    "unweighted": Run(
        "(1) reverse KLs without 1/2σ²",
        "diffusion",
        elbo=lambda schedule, **options: UnweightedKL(**options),
        timesteps=Uniform,  # without their weights, the terms are of about the same size
    ),
    "first-step": Run(
        "(2) without −log p(z_0 given z_1)",
        "diffusion",
        elbo=lambda schedule, **options: WithoutFirstStep(**options),
    ),
    "prior-term": Run("(4) KL at t = T given x", "diffusion", elbo=PriorTermGivenX),
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
    return VAE(vae.encoder, vae.decoder, ShiftedLabels(vae.prior)) if run.shifted else vae


def train(run: Run, vae: VAE, data: ImageData, args: argparse.Namespace, seed: int) -> None:
    r"""Trains a VAE with the objective of a run."""
    seen = objective(run, vae).to(args.device)
    batch_size = min(args.batch_size, len(data.train))
    steps = args.epochs * (len(data.train) // batch_size)
    adam = torch.optim.Adam(vae.train().parameters(), lr=args.lr)
    optim = TorchOptim(adam, args.clip_norm, CosineAnnealingLR(adam, steps))
    svi = SVI(per_datum(seen.model), per_datum(seen.guide), optim, run.estimator(vae))
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    with pyro.get_param_store().scope():
        for _ in range(args.epochs):
            for batch in batches(
                data.train,
                batch_size,
                shuffle=True,
                generator=order,
                device=args.device,
                drop_last=True,
                flip=data.horizontal_flip,
            ):
                svi.step(preprocess(vae, batch, data.levels))
    vae.eval()


# What is measured ---------------------------------------------------------------------------------


@torch.no_grad()
def test_terms(run: Run, vae: VAE, data: ImageData, args: argparse.Namespace) -> dict[str, float]:
    r"""Returns the terms of a run's objective on the test images, over all of its timesteps."""
    elbo, terms = run.estimator(vae, timesteps="all", entropy="exact"), {}
    vae = objective(run, vae).to(args.device)
    with evaluating(vae, seed=0) as device:
        for x in in_batches(vae, data.test, data.levels, args.batch_size, device):
            for name, term in elbo_terms(vae.model, vae.guide, x, elbo=elbo).items():
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
            model = VAE(vae.encoder, decoder, vae.prior)
        if other != "batch-norm":
            reports[other] = excess(run, model)
    if name == "batch-norm":
        reports[name] = excess(RUNS[name], VAE(TrainMode(vae.encoder), vae.decoder, vae.prior))
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


@torch.no_grad()
def coupling(vae: VAE, data: ImageData, args: argparse.Namespace) -> float:
    r"""Returns the KL between the posteriors of an image in two batches, a mean over images."""
    encoder = TrainMode(vae.encoder)
    with evaluating(vae, seed=0) as device:
        x = preprocess(vae, data.test.to(device), data.levels)
        posteriors = []
        for _ in range(2):
            order = torch.randperm(len(x))
            normals = [base_normal(encoder(x[i])) for i in order.split(args.batch_size)]
            loc, scale = (torch.cat([getattr(q, p) for q in normals]) for p in ("loc", "scale"))
            back = order.argsort()
            posteriors.append(Normal(loc[back], scale[back]))
    return kl_divergence(*posteriors).sum(-1).mean().item()


@torch.no_grad()
def latent_scales(vae: VAE, data: ImageData, args: argparse.Namespace) -> dict[str, float]:
    r"""Returns the root mean square of the latents, and the typical scale of a posterior."""
    with evaluating(vae, seed=0) as device:
        x = in_batches(vae, data.test, data.levels, args.batch_size, device)
        q = [base_normal(vae.encode(batch)) for batch in x]
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
