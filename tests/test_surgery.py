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
from pyro_vaediff.evaluate import aggregate_log_prob, chain_log_prob, elbo_surgery, prior_log_prob
from pyro_vaediff.nn import make_backbone
from pyro_vaediff.schedules import LinearSchedule
from pyro_vaediff.testing import Oracle, linear_gaussian_vae


class Table(nn.Module):
    r"""An encoder that knows the law (m_n, s_n) of each datum, which is nothing but its number."""

    def __init__(self, loc, scale, law=dist.Normal):
        super().__init__()
        self.loc, self.scale, self.law = nn.Parameter(loc), nn.Parameter(scale), law

    def forward(self, x):
        n = x.flatten().long()
        return self.law(self.loc[n], self.scale[n]).to_event(self.loc.ndim - 1)


def numbers(N):
    return torch.arange(float(N)).unsqueeze(-1)


def table_vae(device, loc, scale, prior, law=dist.Normal):
    return VAE(Table(loc, scale, law), nn.Identity(), prior).double().to(device)


def random_table(N, D):
    return torch.randn(N, D), 0.3 + torch.rand(N, D)


def assert_estimate(estimate, exact, target):
    assert estimate.se < target
    assert abs(estimate.mean - exact) < 5 * estimate.se, (estimate, exact)


# --- The decomposition ----------------------------------------------------------------------------


def small_diffusion_prior(latent_dim):
    schedule = LinearSchedule(20)
    backbone = make_backbone("mlp", latent_dim, schedule, width=8)
    return DiffusionPrior(latent_dim, 20, schedule, backbone).requires_grad_(False)


class NoMoments(dist.Laplace):
    r"""A law that is not Gaussian, with nothing but samples and a density."""

    @property
    def mean(self):
        raise NotImplementedError

    def entropy(self):
        raise NotImplementedError


@pytest.mark.parametrize("law", [dist.Normal, dist.Laplace, NoMoments])
@pytest.mark.parametrize("make", [GaussianPrior, FlowPrior, small_diffusion_prior])
def test_it_is_that_of_quadrature(device, make, law):
    # In one dimension every integral is a sum over a grid.
    prior = make(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    N = 5
    vae = table_vae(device, *random_table(N, 1), prior, law)
    z = torch.linspace(-20, 20, 4001, dtype=torch.float64, device=device).unsqueeze(-1)
    q = law(vae.encoder.loc.unsqueeze(1), vae.encoder.scale.unsqueeze(1)).to_event(1)
    log_q_x = q.log_prob(z).detach()
    log_q, log_p = log_q_x.logsumexp(0) - math.log(N), prior_log_prob(vae.prior, z).detach()
    width = (z[1] - z[0]).item()
    exact = [
        ((log_q_x.exp() * log_ratio).sum() * width / N).item()
        for log_ratio in (log_q_x - log_q, log_q - log_p, log_q_x - log_p)
    ]
    images = numbers(N)
    surgery = elbo_surgery(vae, images, log_prior="flow", num_samples=2000, batch_size=2)
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
    assert_estimate(elbo_surgery(vae, numbers(100), num_samples=50).total_kl, exact, 0.05)


@pytest.mark.parametrize(("N", "num_samples"), [(6, 2), (6, 5), (20, 2)])
def test_standard_errors_are_those_of_repetitions(device, N, num_samples):
    # Without the slopes of the other data, they were too small by factors of 1.4, 1.1 and 1.1.
    vae = table_vae(device, *random_table(N, 2), GaussianPrior(2))
    options = {"num_samples": num_samples}
    runs = [elbo_surgery(vae, numbers(N), seed=seed, **options) for seed in range(500)]
    for name in ("mutual_information", "marginal_kl", "total_kl"):
        means, ses = torch.tensor([getattr(run, name) for run in runs]).T
        # The relative standard error of a standard deviation is about (2 * 500)^(-1/2) = 0.03.
        ratio = means.std() / ses.square().mean().sqrt()
        assert 0.8 < ratio < 1.1, (name, ratio)


def test_one_datum_has_no_mutual_information(device):
    vae = table_vae(device, *random_table(1, 2), GaussianPrior(2))
    surgery = elbo_surgery(vae, numbers(1))
    assert surgery.mutual_information == pytest.approx((0, 0), abs=1e-12)
    assert surgery.marginal_kl == pytest.approx(surgery.total_kl)
    assert surgery.total_kl.se > 0


def test_posteriors_far_apart_say_which_image_it_is(device):
    N = 10
    loc, scale = 50 * torch.arange(N).unsqueeze(-1) * torch.ones(2), torch.ones(N, 2)
    surgery = elbo_surgery(table_vae(device, loc, scale, GaussianPrior(2)), numbers(N))
    assert surgery.mutual_information.mean == pytest.approx(math.log(N), abs=1e-10)
    assert surgery.mutual_information.se < 1e-10
    assert surgery.active_units == 2


def test_collapsed_posteriors_say_nothing(device):
    vae = table_vae(device, torch.zeros(10, 2), torch.ones(10, 2), GaussianPrior(2))
    surgery = elbo_surgery(vae, numbers(10))
    for estimate in (surgery.mutual_information, surgery.marginal_kl, surgery.total_kl):
        assert estimate.mean == pytest.approx(0, abs=1e-10)
    assert surgery.active_units == 0


def test_active_units(device):
    # The variance of +-a is a^2, against a threshold of 0.01.
    signs = torch.tensor([[1.0], [-1.0]]).repeat(5, 1)
    loc = signs * torch.tensor([0.0, 0.09, 0.11, 2.0]) + 7
    vae = table_vae(device, loc, torch.ones(10, 4), GaussianPrior(4))
    surgery = elbo_surgery(vae, numbers(10))
    exact = torch.tensor([0.0, 0.0081, 0.0121, 4.0], dtype=torch.float64)
    torch.testing.assert_close(surgery.mean_variances, exact, atol=1e-6, rtol=0)
    assert surgery.active_units == 2


def test_variances_of_means_that_are_not_known(device):
    # The variance of a mean of two samples, which is 1, is no activity.
    loc = torch.tensor([0.0, 1.0]) * torch.tensor([[1.0], [-1.0]]).repeat(2000, 1)
    vae = table_vae(device, loc, torch.ones_like(loc), GaussianPrior(2), NoMoments)
    variances = elbo_surgery(vae, numbers(4000)).mean_variances
    torch.testing.assert_close(variances, torch.tensor([0.0, 1.0]).double(), atol=0.15, rtol=0)


def test_the_aggregate_is_a_mixture(device, monkeypatch):
    loc, scale = (x.double().to(device) for x in random_table(6, 3))
    z_0 = torch.randn(11, 3, dtype=torch.float64, device=device)
    components = dist.Normal(loc + 100, scale).to_event(1)
    expected = dist.MixtureSameFamily(dist.Categorical(torch.ones_like(loc[:, 0])), components)
    parts = list(zip((loc + 100).split(4), scale.split(4), strict=True))
    for chunk in (1, 20, 10**6):
        monkeypatch.setattr("pyro_vaediff.evaluate.aggregate.CHUNK", chunk)
        posteriors = [dist.Normal(m, s).to_event(1) for m, s in parts]
        log_prob = aggregate_log_prob(z_0 + 100, posteriors)
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
        q_z0 = vae.encoder(x)
        z_0 = q_z0.sample((10_000,))
        elbo = Timestep_ELBO(timesteps, k=4, antithetic=False, entropy="exact")
        log_p = chain_log_prob(vae.prior, z_0, elbo)
        kl = q_z0.log_prob(z_0) - log_p
    se = kl.std(0) / len(kl) ** 0.5
    assert (se < 0.1).all()
    assert ((kl.mean(0) - exact).abs() < 5 * se).all()


def test_the_estimator_of_the_chains_bound_is_the_given_one(device):
    vae = table_vae(device, *random_table(5, 2), DiffusionPrior(2, 20))
    elbo, used = Timestep_ELBO("all"), []
    elbo.particles = lambda *args, **kwargs: (
        used.append(1) or Timestep_ELBO.particles(elbo, *args, **kwargs)
    )
    elbo_surgery(vae, numbers(5), elbo=elbo, batch_size=3)
    assert len(used) == 2


def test_the_chains_bound_is_tight_at_its_start(device):
    # The chain leaves N(0, I) unchanged, and the forward diffusion is its exact posterior.
    vae = table_vae(device, *random_table(100, 2), DiffusionPrior(2, 20))
    bound = elbo_surgery(vae, numbers(100), num_samples=20)
    vae.prior = GaussianPrior(2).double().to(device)
    exact = elbo_surgery(vae, numbers(100), num_samples=20)
    assert bound.is_bound and not exact.is_bound
    for a, b in ((bound.marginal_kl, exact.marginal_kl), (bound.total_kl, exact.total_kl)):
        assert max(a.se, b.se) < 0.05
        assert abs(a.mean - b.mean) < 5 * math.hypot(a.se, b.se)


# --- What it leaves behind, and errors ------------------------------------------------------------


def test_it_is_a_function_of_its_seed(device):
    vae = table_vae(device, *random_table(10, 2), DiffusionPrior(2, 20))
    state = torch.get_rng_state()
    first, second = (elbo_surgery(vae, numbers(10), batch_size=4, seed=1) for _ in range(2))
    assert first.total_kl == second.total_kl
    assert first.total_kl != elbo_surgery(vae, numbers(10), batch_size=4, seed=2).total_kl
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.training and not list(pyro.get_param_store())


def test_events_of_any_shape(device):
    # The same as those of flat ones, whose numbers they share.
    loc, scale = random_table(6, 4)
    flat = table_vae(device, loc, scale, GaussianPrior(4))
    shaped = table_vae(
        device, loc.reshape(6, 1, 2, 2), scale.reshape(6, 1, 2, 2), GaussianPrior((1, 2, 2))
    )
    expected, surgery = (elbo_surgery(vae, numbers(6), batch_size=4) for vae in (flat, shaped))
    assert surgery.total_kl == pytest.approx(expected.total_kl, abs=1e-10)
    assert surgery.marginal_kl == pytest.approx(expected.marginal_kl, abs=1e-10)
    variances = expected.mean_variances.reshape(1, 2, 2)
    torch.testing.assert_close(surgery.mean_variances, variances, atol=1e-10, rtol=0)
    for log_prior in ("chain", "flow"):
        shaped.prior = small_diffusion_prior((1, 2, 2)).double().to(device)
        total = elbo_surgery(shaped, numbers(6), log_prior=log_prior, num_samples=100).total_kl
        # A diffusion prior at its start is N(0, I).
        exact = (loc.square() + scale.square() - 1 - 2 * scale.log()).sum(-1).mean().item() / 2
        assert_estimate(total, exact, 0.2)


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
        elbo_surgery(vae, numbers(1), **options)
