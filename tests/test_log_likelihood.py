r"""Importance-weighted likelihoods against an evidence that is known."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from pyro.infer import Trace_ELBO
from test_evaluation import known_vae
from test_likelihood_metrics import gaussian_vae, log_evidence, use_exact_posterior
from test_samplers import shaped_priors
from torch import nn

from pyro_vaediff import VAE, DiffusionPrior, FlowPrior, GaussianPrior, MixturePrior, Prior
from pyro_vaediff.evaluate import (
    chain_log_weight,
    importance_log_likelihood,
    importance_weighted_bound,
    log_likelihood,
    log_likelihood_by_samples,
    preprocess,
    prior_log_prob,
)
from pyro_vaediff.evaluate.likelihood import by_samples
from pyro_vaediff.likelihoods import make_likelihood
from pyro_vaediff.nn import ConvDecoder, ConvEncoder
from pyro_vaediff.sampling import ProbabilityFlow
from pyro_vaediff.testing import LinearGaussian, Oracle, linear_gaussian_vae


@pytest.fixture
def x(device):
    return torch.randn(2, 3, dtype=torch.float64, device=device)


class Chain(Prior):
    def model(self, c=None):
        z_1 = pyro.sample("z_1", self.standard_normal())
        return pyro.sample("z_0", dist.Normal(z_1, 1.0).to_event(1))


class Linear(nn.Module):
    r"""A network whose flow is affine: z_T = A z_0 + b up to rounding."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.05]]))
        self.bias = nn.Parameter(torch.tensor([0.05]))

    def forward(self, z, log_snr):
        return z @ self.weight.mT + self.bias


def linear_flow_vae(device):
    r"""Returns a VAE with a diffusion prior, and the moments of its flow of 5 steps."""
    vae = gaussian_vae(device)
    vae.prior = DiffusionPrior(1, 20, backbone=Linear()).double().to(device)
    flow = ProbabilityFlow(vae.prior, num_steps=5)
    with torch.no_grad():
        ends = flow.decode(torch.tensor([[0.0], [1.0]], dtype=torch.float64, device=device))
    return vae, ends[0], (ends[1] - ends[0]).abs()


# --- The density of a prior -----------------------------------------------------------------------


def test_the_density_of_a_diffusion_prior_is_that_of_its_flow(device):
    prior = linear_flow_vae(device)[0].prior
    z_0 = torch.randn(4, 5, 1, dtype=torch.float64, device=device)
    coarse, fine = (prior_log_prob(prior, z_0, num_steps=n) for n in (2, 20))
    assert torch.equal(fine, ProbabilityFlow(prior, num_steps=20).log_prob(z_0))
    assert (coarse - fine).abs().max() > 1e-3


@pytest.mark.parametrize("make", [GaussianPrior, FlowPrior, lambda D: MixturePrior(D, 3)])
def test_exact_densities_have_gradients(make):
    prior = make(2).double()
    z_0 = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    inputs = z_0, *prior.parameters()
    assert prior_log_prob(prior, z_0).requires_grad
    assert torch.autograd.gradcheck(lambda z, *_: prior_log_prob(prior, z), inputs, fast_mode=True)


def test_a_prior_without_a_density_is_an_error(device):
    with one_line_value_error("prior must be a DiffusionPrior, got Chain"):
        prior_log_prob(Chain(2).to(device), torch.zeros(3, 2, device=device))


# --- The likelihood -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [1, 5])
def test_the_exact_posterior_has_no_gap(x, num_samples):
    vae = gaussian_vae(x.device)
    use_exact_posterior(vae)
    estimate = importance_log_likelihood(vae, x, num_samples)
    torch.testing.assert_close(estimate, log_evidence(vae, x), atol=1e-10, rtol=0)


def test_it_is_the_importance_weighted_bound_if_z_0_is_the_only_site(x):
    vae, results = gaussian_vae(x.device), []
    for estimate in (
        lambda: importance_log_likelihood(vae, x, 7),
        lambda: importance_weighted_bound(vae.model, vae.guide, x, elbo=Trace_ELBO(7)),
    ):
        torch.manual_seed(3)
        results.append(estimate())
    torch.testing.assert_close(*results, atol=1e-10, rtol=0)


def test_the_bound_rises_to_the_evidence_of_the_flow(x):
    # p(z_0) of the flow is N(m, s^2): x is Gaussian.
    vae, m, s = linear_flow_vae(x.device)
    use_exact_posterior(vae)  # of a prior N(0, 1)
    vae.encoder.log_scale.data += 0.3
    W, noise = vae.decoder.weight[0].detach() * s, vae.decoder.log_scale[0].exp().square().detach()
    mean = vae.decoder.bias[0].detach() + vae.decoder.weight[0].detach() @ m
    evidence = dist.MultivariateNormal(mean, W @ W.mT + noise.diag()).log_prob(x)
    assert abs(m.item()) > 0.1 and abs(s.item() - 1) > 0.1

    replicas, bounds = 1000, []
    for num_samples in (1, 5, 50):
        bound = importance_log_likelihood(vae, x.repeat(replicas, 1), num_samples, num_steps=5)
        bound = bound.unflatten(0, (replicas, len(x)))
        se = bound.std(0) / replicas**0.5
        assert (se < 0.1).all()
        assert (bound.mean(0) < evidence + 5 * se).all()
        if bounds:
            assert (bound.mean(0) > bounds[-1] - 5 * se).all()
        bounds.append(bound.mean(0))
        # The expectation of the mean weight is the evidence itself.
        ratio = (bound - evidence).exp()
        ratio_se = ratio.std(0) / replicas**0.5
        if num_samples == 50:
            assert (ratio_se < 0.02).all()
            assert ((ratio.mean(0) - 1).abs() < 5 * ratio_se).all()
    assert (evidence - bounds[0] > 0.05).all()
    assert (evidence - bounds[-1] < 0.02).all()


def test_the_flow_and_the_chain_are_different_models(x):
    # Neither is a bound on the other: their densities differ where the denoiser is not perfect.
    vae = linear_gaussian_vae(3, seed=0).to(x.device)
    flow, chain = (importance_log_likelihood(vae, x, 100, log_prior=p) for p in ("flow", "chain"))
    assert (flow - chain).abs().max() > 0.1


@pytest.mark.parametrize("num_steps", [None, 3])
@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde", "learned"])
def test_the_weights_of_the_chain_are_those_of_traces(x, num_steps, reverse_variance):
    vae = linear_gaussian_vae(6, reverse_variance=reverse_variance).to(x.device)
    prior = vae.prior.with_steps(num_steps) if num_steps else vae.prior
    programs, results = VAE(vae.encoder, vae.decoder, prior), []
    options = {"log_prior": "chain", "num_steps": num_steps, "batch_size": 1}
    for estimate in (
        lambda: importance_log_likelihood(vae, x, 7, **options),
        lambda: importance_weighted_bound(programs.model, programs.guide, x, elbo=Trace_ELBO(7)),
    ):
        torch.manual_seed(3)
        results.append(estimate())
    torch.testing.assert_close(*results, atol=1e-10, rtol=0)


def test_the_mean_weight_of_the_chain_is_the_evidence(x):
    vae, replicas, x = linear_gaussian_vae(3, seed=0).to(x.device), 4000, x / 4
    evidence = Oracle(vae, x).log_evidence.detach()
    bound = importance_log_likelihood(
        vae, x.repeat(replicas, 1), 50, log_prior="chain", batch_size=40 * replicas
    )
    ratio = (bound.unflatten(0, (replicas, len(x))) - evidence).exp()
    se = ratio.std(0) / replicas**0.5
    assert (se < 0.03).all(), se
    assert ((ratio.mean(0) - 1).abs() < 5 * se).all()


@pytest.mark.parametrize("context", [False, True])
def test_the_chain_of_events_of_another_shape_and_a_context(device, context):
    flat, shaped = (prior.requires_grad_(False) for prior in shaped_priors(device, context))
    c = torch.tensor([[0.0, 1.0]]).to(flat.origin).expand(5, 2) if context else None
    z_0, results = torch.randn(3, 5, 2, dtype=torch.float64, device=device), []
    for prior, z, c_z in ((flat, z_0, None), (shaped, z_0.unsqueeze(-1).unsqueeze(-3), c)):
        torch.manual_seed(3)
        results.append(chain_log_weight(prior, z, c_z))
    assert results[0].shape == (3, 5)
    torch.testing.assert_close(*results, atol=1e-10, rtol=0)


def test_samples_at_once_are_those_of_one_after_the_other(device):
    # The decoder adds the context, which has to stay with its datum.
    vae = known_vae(device)
    x, c = torch.randn(2, 7, 3, dtype=torch.float64, device=device)
    one, *others = (log_likelihood(vae, x, 5, c=c, batch_size=n) for n in (7, 15, 100))
    for other in others:
        torch.testing.assert_close(other, one, atol=1e-10, rtol=0)
    assert (log_likelihood(vae, x, 5, c=c.flip(0)) - one).abs().max() > 0.1


# --- By the number of samples ---------------------------------------------------------------------


def test_smaller_numbers_of_samples_are_those_of_groups():
    log_weights = torch.randn(6, 2, dtype=torch.float64)
    found, weights = by_samples(log_weights), log_weights.exp()
    expected = {
        1: log_weights.mean(0),
        2: (weights[::2] + weights[1::2]).div(2).log().mean(0),
        4: weights[:4].mean(0).log(),
        6: weights.mean(0).log(),
    }
    assert list(found) == list(expected)
    for k, value in expected.items():
        torch.testing.assert_close(found[k], value, atol=1e-12, rtol=0)


def test_they_rise_to_the_estimate_of_all(x):
    vae, x = gaussian_vae(x.device), x.repeat(500, 1)
    found = log_likelihood_by_samples(vae, x, 16)
    assert list(found) == [1, 2, 4, 8, 16]
    assert torch.equal(found[16], log_likelihood(vae, x, 16))
    values = torch.stack(list(found.values()))
    assert (values.diff(dim=0) > 0).all()  # Jensen's inequality, for each datum
    # Each has the expectation of an estimate from that many samples, and less noise.
    for k in (1, 4):
        alone = log_likelihood(vae, x, k, seed=1)
        assert alone.unflatten(0, (500, 2)).std(0).gt(found[k].unflatten(0, (500, 2)).std(0)).all()
        difference = (found[k] - alone).unflatten(0, (500, 2))
        se = difference.std(0) / 500**0.5
        assert (se < 0.1).all(), se
        assert (difference.mean(0).abs() < 5 * se).all()


# --- Of images ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 17, (7, 1, 8, 8), dtype=torch.uint8, generator=generator)


def image_vae(device, prior, likelihood="gaussian"):
    likelihood = make_likelihood(likelihood, (1, 8, 8), 17)
    encoder = ConvEncoder((1, 8, 8), prior.latent_dim, width=8)
    decoder = ConvDecoder(prior.latent_dim, likelihood, width=8)
    return VAE(encoder, decoder, prior, likelihood.space(17)).to(device)


@pytest.mark.parametrize("make", [GaussianPrior, FlowPrior, DiffusionPrior])
def test_images(device, images, make):
    vae = image_vae(device, make(3))
    options = {"num_steps": 5} if make is DiffusionPrior else {}
    state = torch.get_rng_state()
    estimate = log_likelihood(vae, images, 4, batch_size=3, seed=1, **options)
    assert estimate.shape == (7,) and estimate.isfinite().all() and not estimate.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.training and not list(pyro.get_param_store())
    torch.rand(5)
    again = log_likelihood(vae, images, 4, batch_size=3, seed=1, **options)
    assert torch.equal(estimate, again)
    # The first batch: dequantization, then latents.
    torch.manual_seed(1)
    vae.eval()
    x = preprocess(vae, images[:3])
    expected = importance_log_likelihood(vae, x, 4, **options)
    torch.testing.assert_close(estimate[:3], expected)


def test_priors_that_are_equal_have_the_same_likelihood(device, images):
    # A diffusion prior at its start is N(0, I).
    vae = image_vae(device, GaussianPrior(3))
    expected = log_likelihood(vae, images, 4)
    vae.prior = DiffusionPrior(3).to(device)
    torch.testing.assert_close(log_likelihood(vae, images, 4), expected, atol=1e-3, rtol=0)


def test_an_unknown_density_is_an_error(x):
    with one_line_value_error("unknown log_prior .bound.: choose one of chain, flow"):
        importance_log_likelihood(gaussian_vae(x.device), x, log_prior="bound")
    with one_line_value_error("prior must be a DiffusionPrior, got GaussianPrior"):
        chain_log_weight(GaussianPrior(2), torch.zeros(3, 2))


@pytest.mark.parametrize("num_samples", [0, 2.5])
def test_the_number_of_samples_is_checked(x, num_samples):
    with one_line_value_error(f"num_samples must be a whole number >= 1, got {num_samples}"):
        importance_log_likelihood(gaussian_vae(x.device), x, num_samples)


def test_the_likelihood_of_a_discrete_pixel_is_a_probability(device):
    # One pixel of three levels: the likelihoods of all images sum to one.
    levels, likelihood = 3, make_likelihood("categorical", (1, 1, 1), 3)

    class Encoder(LinearGaussian):
        def forward(self, x):
            return super().forward(x.flatten(1))

    class Decoder(nn.Linear):
        def forward(self, z):
            return self.likelihood(super().forward(z).unflatten(-1, (-1, 1, 1)))

    encoder, decoder = Encoder((1,), (1,), log_scale=0.0), Decoder(1, likelihood.num_maps)
    decoder.likelihood = likelihood
    vae = VAE(encoder, decoder, GaussianPrior(1), likelihood.space(levels)).double().to(device)
    images = torch.arange(levels, dtype=torch.uint8).reshape(-1, 1, 1, 1).repeat(200, 1, 1, 1)
    p = log_likelihood(vae, images, 50, batch_size=600).exp().unflatten(0, (200, levels))
    total = p.sum(1)
    se = total.std() / math.sqrt(len(total))
    assert se < 0.02
    assert (total.mean() - 1).abs() < 5 * se
