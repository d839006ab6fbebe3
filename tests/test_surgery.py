r"""ELBO surgery against quadrature, closed forms and the oracle."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from torch import nn

from pyro_vaediff import VAE, DiffusionPrior, FlowPrior, GaussianPrior, Timestep_ELBO
from pyro_vaediff.bench import Oracle, linear_gaussian_vae
from pyro_vaediff.evaluate.log_likelihood import prior_log_prob
from pyro_vaediff.evaluate.surgery import aggregate_log_prob, chain_log_prob, elbo_surgery
from pyro_vaediff.likelihoods import make_likelihood
from pyro_vaediff.nn import MLPDenoiser


class Table(nn.Module):
    r"""An encoder that knows N(m_n, s_n^2) of each image, which is nothing but its number n."""

    def __init__(self, loc, scale):
        super().__init__()
        self.loc, self.scale = nn.Parameter(loc), nn.Parameter(scale)

    def forward(self, x):
        n = ((x.flatten() + 1) / 2 * 255).round().long()
        return dist.Normal(self.loc[n], self.scale[n]).to_event(1)


def numbers(N):
    return torch.arange(N, dtype=torch.uint8).reshape(-1, 1, 1, 1)


def table_vae(device, loc, scale, prior):
    decoder = nn.Module()
    decoder.likelihood = make_likelihood("categorical", (1, 1, 1), 256)
    return VAE(Table(loc, scale), decoder, prior).double().to(device)


def random_table(N, D):
    return torch.randn(N, D), 0.3 + torch.rand(N, D)


def assert_estimate(estimate, exact, target):
    assert estimate.se < target
    assert abs(estimate.mean - exact) < 5 * estimate.se, (estimate, exact)


# --- The decomposition ----------------------------------------------------------------------------


def small_diffusion_prior(latent_dim):
    denoiser = MLPDenoiser(latent_dim, 20, hidden_features=(8,), embedding_dim=4)
    return DiffusionPrior(latent_dim, 20, denoiser=denoiser)


@pytest.mark.parametrize("make", [GaussianPrior, FlowPrior, small_diffusion_prior])
def test_it_is_that_of_quadrature(device, make):
    # In one dimension every integral is a sum over a grid.
    prior = make(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    N = 5
    vae = table_vae(device, *random_table(N, 1), prior)
    z = torch.linspace(-10, 10, 2001, dtype=torch.float64, device=device).unsqueeze(-1)
    q = dist.Normal(vae.encoder.loc.unsqueeze(1), vae.encoder.scale.unsqueeze(1)).to_event(1)
    log_q_x = q.log_prob(z).detach()
    log_q, log_p = log_q_x.logsumexp(0) - math.log(N), prior_log_prob(vae.prior, z)
    width = (z[1] - z[0]).item()
    exact = [
        ((log_q_x.exp() * log_ratio).sum() * width / N).item()
        for log_ratio in (log_q_x - log_q, log_q - log_p, log_q_x - log_p)
    ]
    images = numbers(N)
    surgery = elbo_surgery(vae, images, 256, log_prior="flow", num_samples=2000, batch_size=2)
    assert_estimate(surgery.mutual_information, exact[0], 0.01)
    assert_estimate(surgery.marginal_kl, exact[1], 0.03)
    assert_estimate(surgery.total_kl, exact[2], 0.03)
    parts = surgery.mutual_information.mean + surgery.marginal_kl.mean
    assert surgery.total_kl.mean == pytest.approx(parts, abs=1e-10)
    assert surgery.max_mutual_information == math.log(N)
    assert not surgery.is_bound


def test_the_total_of_a_gaussian_prior_is_the_closed_form(device):
    loc, scale = random_table(100, 4)
    vae = table_vae(device, loc, scale, GaussianPrior(4))
    exact = (loc.square() + scale.square() - 1 - 2 * scale.log()).sum(-1).mean().item() / 2
    assert_estimate(elbo_surgery(vae, numbers(100), 256, num_samples=50).total_kl, exact, 0.05)


def test_standard_errors_are_those_of_repetitions(device):
    vae = table_vae(device, *random_table(20, 2), GaussianPrior(2))
    runs = [elbo_surgery(vae, numbers(20), 256, seed=seed) for seed in range(300)]
    for name in ("mutual_information", "marginal_kl", "total_kl"):
        means, ses = torch.tensor([getattr(run, name) for run in runs]).T
        # The relative standard error of a standard deviation is about (2 * 300)^(-1/2) = 0.04.
        assert (means.std() / ses.square().mean().sqrt() - 1).abs() < 0.25


def test_posteriors_far_apart_say_which_image_it_is(device):
    N = 10
    loc, scale = 50 * torch.arange(N).unsqueeze(-1) * torch.ones(2), torch.ones(N, 2)
    surgery = elbo_surgery(table_vae(device, loc, scale, GaussianPrior(2)), numbers(N), 256)
    assert surgery.mutual_information.mean == pytest.approx(math.log(N), abs=1e-10)
    assert surgery.mutual_information.se < 1e-10
    assert surgery.active_units == 2


def test_collapsed_posteriors_say_nothing(device):
    vae = table_vae(device, torch.zeros(10, 2), torch.ones(10, 2), GaussianPrior(2))
    surgery = elbo_surgery(vae, numbers(10), 256)
    for estimate in (surgery.mutual_information, surgery.marginal_kl, surgery.total_kl):
        assert estimate.mean == pytest.approx(0, abs=1e-10)
    assert surgery.active_units == 0


def test_active_units(device):
    # The variance of +-a is a^2, against a threshold of 0.01.
    signs = torch.tensor([[1.0], [-1.0]]).repeat(5, 1)
    loc = signs * torch.tensor([0.0, 0.09, 0.11, 2.0]) + 7
    vae = table_vae(device, loc, torch.ones(10, 4), GaussianPrior(4))
    surgery = elbo_surgery(vae, numbers(10), 256)
    exact = torch.tensor([0.0, 0.0081, 0.0121, 4.0], dtype=torch.float64)
    torch.testing.assert_close(surgery.mean_variances, exact, atol=1e-6, rtol=0)
    assert surgery.active_units == 2


def test_the_aggregate_is_a_mixture(device, monkeypatch):
    loc, scale = (x.double().to(device) for x in random_table(6, 3))
    z_0 = torch.randn(11, 3, dtype=torch.float64, device=device)
    components = dist.Normal(loc + 100, scale).to_event(1)
    expected = dist.MixtureSameFamily(dist.Categorical(torch.ones_like(loc[:, 0])), components)
    for chunk in (1, 20, 10**6):
        monkeypatch.setattr("pyro_vaediff.evaluate.surgery.CHUNK", chunk)
        log_prob = aggregate_log_prob(z_0 + 100, loc + 100, scale)
        torch.testing.assert_close(log_prob, expected.log_prob(z_0 + 100), atol=1e-10, rtol=0)


# --- The bound of a chain -------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["forward", "posterior", "reversed"])
@pytest.mark.parametrize("timesteps", ["all", "importance"])
def test_the_chains_bound_gives_the_kl_of_the_elbo(device, order, timesteps):
    vae = linear_gaussian_vae(3, order=order).to(device)
    x = torch.randn(2, 3, dtype=torch.float64, device=device)
    oracle = Oracle(vae, x)
    exact = (oracle.negative_elbo - oracle.reconstruction).detach()
    with torch.no_grad():
        q_z0 = vae.encode(x)
        z_0 = q_z0.sample((10_000,))
        elbo = Timestep_ELBO(timesteps, k=4, antithetic=False, entropy="exact")
        log_p = chain_log_prob(vae.prior, z_0.flatten(0, 1), elbo).unflatten(0, (-1, len(x)))
        kl = q_z0.log_prob(z_0) - log_p
    se = kl.std(0) / len(kl) ** 0.5
    assert (se < 0.1).all()
    assert ((kl.mean(0) - exact).abs() < 5 * se).all()


def test_the_chains_bound_is_tight_at_its_start(device):
    # The chain leaves N(0, I) unchanged, and the forward diffusion is its exact posterior.
    vae = table_vae(device, *random_table(100, 2), DiffusionPrior(2, 20))
    bound = elbo_surgery(vae, numbers(100), 256, num_samples=20)
    vae.prior = GaussianPrior(2).double().to(device)
    exact = elbo_surgery(vae, numbers(100), 256, num_samples=20)
    assert bound.is_bound and not exact.is_bound
    for a, b in ((bound.marginal_kl, exact.marginal_kl), (bound.total_kl, exact.total_kl)):
        assert max(a.se, b.se) < 0.05
        assert abs(a.mean - b.mean) < 5 * math.hypot(a.se, b.se)


# --- What it leaves behind, and errors ------------------------------------------------------------


def test_it_is_a_function_of_its_seed(device):
    vae = table_vae(device, *random_table(10, 2), DiffusionPrior(2, 20))
    state = torch.get_rng_state()
    first, second = (elbo_surgery(vae, numbers(10), 256, batch_size=4, seed=1) for _ in range(2))
    assert first.total_kl == second.total_kl
    assert first.total_kl != elbo_surgery(vae, numbers(10), 256, batch_size=4, seed=2).total_kl
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.training and not list(pyro.get_param_store())


def test_other_encoders_are_an_error(device):
    class Laplace(Table):
        def forward(self, x):
            return dist.Laplace(self.loc, self.scale).to_event(1)

    vae = table_vae(device, torch.zeros(3, 1), torch.ones(3, 1), GaussianPrior(1))
    vae.encoder = Laplace(vae.encoder.loc, vae.encoder.scale)
    with one_line_value_error("vae.encoder must return a diagonal Gaussian"):
        elbo_surgery(vae, numbers(3), 256)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"log_prior": "ode"}, "unknown log_prior 'ode': choose one of chain, flow"),
        ({"num_samples": 1}, "num_samples must be a whole number >= 2 for standard errors, got 1"),
        ({"log_prior": "flow", "num_steps": 0}, "num_steps must be a whole number from 1"),
    ],
)
def test_options_are_checked(device, options, match):
    vae = table_vae(device, torch.zeros(1, 1), torch.ones(1, 1), DiffusionPrior(1, 20))
    with one_line_value_error(match):
        elbo_surgery(vae, numbers(1), 256, **options)
