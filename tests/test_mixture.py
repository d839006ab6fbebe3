r"""Mixture priors against scipy, and what a VampPrior shares with its VAE."""

from __future__ import annotations

import copy

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch

from pyro_vaediff import VAE, MixturePrior, TraceKL_ELBO, VampPrior
from pyro_vaediff.likelihoods import GaussianLikelihood
from pyro_vaediff.nn import ConvDecoder, ConvEncoder

SHAPE = (1, 8, 8)


def make_vae(name):
    encoder = ConvEncoder(SHAPE, 3, width=4)
    decoder = ConvDecoder(3, GaussianLikelihood(SHAPE), width=4)
    prior = VampPrior(None, 3, SHAPE, 5) if name == "vamp" else MixturePrior(3, 5)
    return VAE(encoder, decoder, prior)


def mixture_log_density(z, log_weights, loc, scale):
    r"""Returns the log-density of a mixture of factorized Gaussians, by scipy."""
    z, log_weights, loc, scale = (
        np.asarray(v.detach().cpu()) for v in (z, log_weights, loc, scale)
    )
    parts = scipy.stats.norm.logpdf(z[:, None], loc, scale).sum(-1)
    return scipy.special.logsumexp(parts + log_weights - scipy.special.logsumexp(log_weights), -1)


@pytest.fixture
def vae(device):
    return make_vae("vamp").to(device, torch.float64)


@pytest.fixture
def x(device):
    return torch.rand(6, *SHAPE, dtype=torch.float64, device=device) * 2 - 1


@pytest.mark.parametrize(("D", "K"), [(1, 1), (3, 5)])
def test_the_density_of_a_mixture_is_scipys(device, D, K):
    prior = MixturePrior(D, K).to(device, torch.float64)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_()
    z = torch.randn(7, D, dtype=torch.float64, device=device)
    components = prior.distribution().component_distribution
    expected = mixture_log_density(z, prior.logits, components.mean, components.stddev)
    actual = prior.distribution().log_prob(z)
    np.testing.assert_allclose(actual.detach().cpu(), expected, rtol=0, atol=1e-10)


def test_a_mixture_starts_with_the_moments_of_a_standard_normal(device):
    law = MixturePrior(4, 20_000).to(device, torch.float64).distribution()
    mean, second = law.mean, law.variance + law.mean.square()
    # z_0 = mu_k + sigma eps: a mean over K draws of mu_k ~ N(0, 1/4)
    se = 20_000**-0.5
    assert (mean.abs() < 5 * 0.5 * se).all()
    assert ((second - 1).abs() < 5 * 0.25 * 2**0.5 * se).all()


def test_the_density_of_a_vamp_prior_is_the_mean_posterior(vae, device):
    z = torch.randn(7, 3, dtype=torch.float64, device=device)
    q = vae.encoder(vae.prior.pseudo_inputs)
    expected = mixture_log_density(z, torch.zeros(5, dtype=z.dtype), q.mean, q.stddev)
    actual = vae.prior.distribution().log_prob(z)
    np.testing.assert_allclose(actual.detach().cpu(), expected, rtol=0, atol=1e-10)


def test_with_the_data_as_pseudo_inputs_the_prior_is_the_aggregate_posterior(vae, x):
    vae.prior.initialize(x)  # of six images, the first five
    q = vae.encoder(x[:5])
    marginal = dist.MixtureSameFamily(dist.Categorical(q.mean.new_ones(5)), q)
    z = q.sample()
    torch.testing.assert_close(
        vae.prior.distribution().log_prob(z), marginal.log_prob(z), atol=1e-10, rtol=0
    )


def test_fewer_data_than_pseudo_inputs_leave_the_others_as_they_were(vae, x):
    before = vae.prior.pseudo_inputs.detach().clone()
    vae.prior.initialize(x[:2])
    assert torch.equal(vae.prior.pseudo_inputs[:2], x[:2])
    assert torch.equal(vae.prior.pseudo_inputs[2:], before[2:])


def test_the_encoder_stays_the_vaes(vae, x):
    assert [name for name, _ in vae.prior.named_parameters()] == ["pseudo_inputs"]
    assert not any(name.startswith("prior._") for name in vae.state_dict())
    twin = copy.deepcopy(vae)
    assert twin.prior._encoder[0] is twin.encoder is not vae.encoder
    # The KL divergence depends on the encoder through the guide and through the prior.
    loss = TraceKL_ELBO().differentiable_loss(vae.prior_model, vae.guide, x)
    loss.backward()
    assert vae.prior.pseudo_inputs.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in vae.encoder.parameters())
    # The guide of the prior alone does not train the encoder.
    vae.zero_grad()
    vae.encoder.requires_grad_(False)
    TraceKL_ELBO().differentiable_loss(vae.prior_model, vae.prior_guide, x).backward()
    assert all(p.grad is None for p in vae.encoder.parameters())
    assert vae.prior.pseudo_inputs.grad.abs().sum() > 0


def test_pseudo_inputs_stay_in_their_support_but_keep_their_gradient(device):
    def encoder(u):
        return dist.Normal(u, 1.0).to_event(1)

    u = torch.tensor([[-3.0, 0.5], [0.2, 4.0], [0.0, 1.0]], device=device)
    confined = u.clamp(0, 1).requires_grad_()
    prior = VampPrior(encoder, 2, (2,), 3, support=(0.0, 1.0)).to(device)
    with torch.no_grad():
        prior.pseudo_inputs.copy_(u)
    z = torch.tensor([0.3, 0.6], device=device)
    expected = (encoder(confined).log_prob(z).exp().mean()).log()
    torch.testing.assert_close(prior.log_prob(z), expected)
    # The gradient of all of them, also of those outside, is that where they are seen.
    prior.log_prob(z).backward()
    expected.backward()
    torch.testing.assert_close(prior.pseudo_inputs.grad, confined.grad)
    assert (confined.grad != 0).all()


def test_pseudo_inputs_start_anywhere_in_their_support():
    u = VampPrior(None, 2, (50,), 40, support=(2.0, 4.0)).pseudo_inputs
    # The ends of 2000 uniform numbers are within 2 * 20 / 2000 of those of the interval.
    assert 2.0 <= u.min() < 2.02 and 3.98 < u.max() <= 4.0


@pytest.mark.parametrize("name", ["mixture", "vamp"])
def test_the_loss_is_the_monte_carlo_average_of_exact_densities(device, x, name):
    vae = make_vae(name).to(device, torch.float64)
    elbo = TraceKL_ELBO()
    torch.manual_seed(3)
    terms = elbo.terms(vae.model, vae.guide, x)
    torch.manual_seed(3)
    q = vae.encoder(x)
    z = q.rsample()
    expected = -vae.prior.distribution().log_prob(z).sum()
    torch.testing.assert_close(terms["z_0"], expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(terms["-H[z_0]"], -q.entropy().sum(), atol=1e-10, rtol=0)


def test_a_new_encoder_of_the_vae_is_the_priors_as_well(vae, device):
    for make in (lambda: vae, lambda: copy.deepcopy(vae)):
        other = make()
        other.encoder = ConvEncoder(SHAPE, 3, width=2).to(device, torch.float64)
        q = other.encoder(other.prior.pseudo_inputs)
        components = other.prior.distribution().component_distribution
        assert torch.equal(components.mean, q.mean)


def test_a_mixture_over_images_is_that_over_vectors(device):
    flat, prior = MixturePrior(6, 5).to(device), MixturePrior((1, 2, 3), 5).to(device)
    state = flat.state_dict()
    prior.load_state_dict({k: v.reshape(prior.state_dict()[k].shape) for k, v in state.items()})
    z = torch.randn(4, 1, 2, 3, device=device)
    torch.testing.assert_close(prior.log_prob(z), flat.log_prob(z.flatten(1)))
    assert prior.distribution().sample().shape == (1, 2, 3)


def test_densities_are_in_full_precision_under_autocast(device):
    prior = MixturePrior(8, 50).to(device)
    with torch.no_grad():
        prior.raw_scale.sub_(3), prior.loc.mul_(3)  # far and narrow: exponents of hundreds
        z = prior.distribution().sample([6])
    with torch.autocast(device.type, torch.bfloat16):
        actual = prior.log_prob(z)
    assert torch.equal(actual, prior.log_prob(z))


@pytest.mark.parametrize("D", [1, 2])
def test_a_mixture_integrates_to_one(device, D):
    prior = MixturePrior((D, 1), 4).to(device, torch.float64)
    line = torch.linspace(-9, 9, 361, dtype=torch.float64, device=device)
    grid = torch.cartesian_prod(*[line] * D).reshape(-1, D, 1)
    mass = (prior.log_prob(grid).exp() * (line[1] - line[0]) ** D).sum()
    assert mass.item() == pytest.approx(1, abs=1e-6)


def test_a_vamp_prior_without_an_encoder_is_refused():
    with pytest.raises(ValueError, match="needs an encoder"):
        VampPrior(None, 3, SHAPE, 5).model()
