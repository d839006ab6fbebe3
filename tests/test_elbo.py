r"""Every estimator of the ELBO against the closed forms of a linear-Gaussian VAE."""

from __future__ import annotations

import itertools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from unbiased import (
    NUM_REPLICAS,
    assert_matches_oracle,
    assert_unbiased,
    draws,
    exact_values,
    per_datum,
)

from pyro_vaediff import (
    VAE,
    DiffusionPrior,
    FlowPrior,
    GaussianPrior,
    Reweighted,
    Timestep_ELBO,
    TraceKL_ELBO,
)
from pyro_vaediff.testing import LinearGaussian, Oracle, linear_gaussian_vae
from pyro_vaediff.testing.affine import condition, covariance, stack

NUM_DATA = 2
ORDERS = ("forward", "posterior", "reversed")
VARIANCES = ("beta", "beta_tilde", "learned")


@pytest.fixture
def x(device):
    return torch.randn(NUM_DATA, 3, dtype=torch.float64, device=device)


# --- The oracle itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("reverse_variance", VARIANCES)
@pytest.mark.parametrize("T", [1, 2, 3, 6])
def test_oracle_terms_sum_to_the_bound_and_the_gap_is_a_kl(x, T, reverse_variance):
    vae = linear_gaussian_vae(T, reverse_variance=reverse_variance).to(x.device)
    oracle = Oracle(vae, x)
    for conditioning in ("z_0", "x"):
        terms = oracle.terms(conditioning).values()
        total = sum(term.sum(0) if term.ndim > 1 else term for term in terms)
        torch.testing.assert_close(total, oracle.negative_elbo, atol=1e-10, rtol=0)

    # log p(x) - ELBO = KL(q(z|x) || p(z|x)), where p(z|x) conditions the joint of the model.
    *z, p_x = oracle.model()
    q, p = stack(oracle.z), stack(z)
    gain = torch.linalg.solve(covariance(p_x, p_x), covariance(p_x, p)).mT
    normal = torch.distributions.MultivariateNormal
    posterior = normal(p.mean + (x - p_x.mean) @ gain.mT, condition(p, [p_x])[1])
    kl = torch.distributions.kl_divergence(normal(q.mean, covariance(q, q)), posterior)
    torch.testing.assert_close(oracle.log_evidence + oracle.negative_elbo, kl, atol=1e-10, rtol=0)


# --- The unrolled programs ------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 3, 6])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("Estimator", [Trace_ELBO, TraceKL_ELBO])
def test_unrolled(x, Estimator, order, T):
    vae = linear_gaussian_vae(T, order=order).to(x.device)
    assert_matches_oracle(Estimator(), vae, x)


@pytest.mark.parametrize("parameterization", ["eps", "z0", "mu", "v"])
@pytest.mark.parametrize("reverse_variance", VARIANCES)
def test_unrolled_with_every_kernel(x, reverse_variance, parameterization):
    vae = linear_gaussian_vae(
        3, reverse_variance=reverse_variance, parameterization=parameterization, order="reversed"
    )
    assert_matches_oracle(TraceKL_ELBO(), vae.to(x.device), x)


@pytest.mark.parametrize("T", [1, 2, 6])
@pytest.mark.parametrize("order", ORDERS)
def test_stock_mean_field_is_valid_for_reversed_only(x, order, T):
    vae = linear_gaussian_vae(T, order=order).to(x.device)
    oracle = Oracle(vae, x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimates = draws(TraceMeanField_ELBO(), vae, x)
    assert any("mean field" in str(w.message) for w in caught) == (order != "reversed")

    bias = oracle.mean_field_bias(order)
    se = estimates[..., 0].std(0) / NUM_REPLICAS**0.5
    assert (bias == 0).all() if order == "reversed" else (bias.abs() > 20 * se).all()
    assert_unbiased(estimates, exact_values(vae, oracle.negative_elbo + bias), target=0.03)


# --- A few timesteps per datum --------------------------------------------------------------------

PROPOSALS = [
    ("all", 1, False),
    *itertools.product(["uniform", "importance", "loss-aware"], [1, 4], [False, True]),
]


@pytest.mark.parametrize("conditioning", ["z_0", "x"])
@pytest.mark.parametrize("reverse_variance", VARIANCES)
@pytest.mark.parametrize("timesteps, k, low_discrepancy", PROPOSALS)
def test_timesteps(x, timesteps, k, low_discrepancy, conditioning, reverse_variance):
    vae = linear_gaussian_vae(4, reverse_variance=reverse_variance).to(x.device)
    elbo = Timestep_ELBO(timesteps, k, conditioning, low_discrepancy=low_discrepancy, chunk_size=2)
    assert_matches_oracle(elbo, vae, x, target=0.05)


@pytest.mark.parametrize("T", [1, 2, 3, 6])
@pytest.mark.parametrize("conditioning", ["z_0", "x"])
@pytest.mark.parametrize("timesteps", ["all", "importance"])
def test_timesteps_of_short_chains(x, timesteps, conditioning, T):
    elbo = Timestep_ELBO(timesteps, k=2, conditioning=conditioning, chunk_size=4)
    assert_matches_oracle(elbo, linear_gaussian_vae(T).to(x.device), x, target=0.05)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize(
    "make", [Trace_ELBO, TraceKL_ELBO, Timestep_ELBO, lambda **kw: Timestep_ELBO("all", **kw)]
)
def test_particles(x, make, vectorize):
    vae = linear_gaussian_vae(3).to(x.device)
    elbo = make(num_particles=3, vectorize_particles=vectorize)
    assert_matches_oracle(elbo, vae, x, target=0.02)


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"antithetic": False},
        {"k": 3},
        {"entropy": "exact"},
        {"num_particles": 2, "vectorize_particles": True},
        {"conditioning": "x", "num_particles": 2, "vectorize_particles": True},
        {"timesteps": "all", "num_particles": 3, "vectorize_particles": True},
    ],
    ids=str,
)
def test_less_noise_and_no_bias(x, options, T):
    elbo = Timestep_ELBO(**options)
    assert_matches_oracle(elbo, linear_gaussian_vae(T).to(x.device), x, target=0.05)


@pytest.mark.parametrize("order", ORDERS)
def test_path_derivative_of_the_unrolled_chain(x, order):
    elbo = TraceKL_ELBO(entropy="path", num_particles=2, vectorize_particles=True)
    assert_matches_oracle(elbo, linear_gaussian_vae(3, order=order).to(x.device), x)


@pytest.mark.parametrize(
    "q_z0",
    [
        lambda w: dist.Delta(w, event_dim=1),
        lambda w: dist.Uniform(w - 1, w + w.square()).to_event(1),
    ],
    ids=["Delta", "Uniform"],
)
def test_densities_without_a_path(device, q_z0):
    prior = DiffusionPrior(2, num_timesteps=4).to(device)
    w = torch.tensor([[1.0, 2.0]], device=device, requires_grad=True)

    def model():
        with pyro.plate("data", 1):
            prior.model()

    def guide():
        with pyro.plate("data", 1):
            prior.guide(q_z0(w))

    results = []
    for entropy in ("path", "exact"):
        pyro.set_rng_seed(0)
        loss = Timestep_ELBO(entropy=entropy).differentiable_loss(model, guide)
        results.append([loss, *torch.autograd.grad(loss, w)])
    torch.testing.assert_close(*results)
    assert results[0][1].abs().min() > 0


def test_more_timesteps_and_more_particles_lower_the_variance(x):
    vae = linear_gaussian_vae(6).to(x.device)
    options = [{"k": 1}, {"k": 8}, {"k": 8, "num_particles": 3}]
    spreads = [
        draws(Timestep_ELBO("uniform", **kwargs), vae, x)[..., 0].std(0) for kwargs in options
    ]
    assert (spreads[0] > 1.1 * spreads[1]).all()
    assert (spreads[1] > 1.5 * spreads[2]).all()  # sqrt(3) in theory


# --- Weightings that are no bounds ----------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 6])
@pytest.mark.parametrize("timesteps", ["all", "uniform", "importance"])
@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("weighting", ["simple", "paper"])
def test_weightings(x, weighting, reverse_variance, timesteps, T):
    vae = linear_gaussian_vae(T, reverse_variance=reverse_variance).to(x.device)
    elbo = Reweighted(Timestep_ELBO(timesteps, k=2, chunk_size=4), weighting)
    exact = exact_values(vae, Oracle(vae, x).weighted(weighting))
    assert_unbiased(draws(elbo, vae, x), exact, target=0.05)


# --- Other priors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Trace_ELBO, TraceKL_ELBO, TraceMeanField_ELBO, Timestep_ELBO])
def test_gaussian_prior(x, make):
    encoder, decoder = LinearGaussian(3, 2, log_scale=-0.5), LinearGaussian(2, 3, log_scale=0.0)
    vae = VAE(encoder, decoder, GaussianPrior(2)).double().to(x.device)
    q_z0 = vae.encoder(x)
    m, s2 = q_z0.mean, q_z0.variance
    residual = x - vae.decoder(m).mean
    scatter = decoder.weight[0] @ torch.diag_embed(s2) @ decoder.weight[0].mT
    sigma = decoder.log_scale[0].exp()
    squares = (residual.square() + scatter.diagonal(dim1=-2, dim2=-1)) / sigma.square()
    reconstruction = (squares + (2 * torch.pi * sigma.square()).log()).sum(-1) / 2
    loss = reconstruction + (m.square() + s2 - 1 - s2.log()).sum(-1) / 2
    assert_unbiased(draws(make(), vae, x), exact_values(vae, loss), target=0.03)


@pytest.mark.parametrize("make", [TraceKL_ELBO, Timestep_ELBO])
def test_flow_prior(x, make):
    encoder, decoder = LinearGaussian(3, 2, log_scale=-0.5), LinearGaussian(2, 3, log_scale=0.0)
    vae = VAE(encoder, decoder, FlowPrior(2, hidden_features=[8])).double().to(x.device)
    replicas = x.repeat(NUM_REPLICAS, 1)
    losses, gradients = [], []
    for elbo in (make(entropy="exact"), Trace_ELBO()):
        torch.manual_seed(1)
        vae.zero_grad()
        losses.append(per_datum(elbo, vae, replicas).unflatten(0, (NUM_REPLICAS, len(x))))
        gradients.append([p.grad.clone() for p in vae.prior.parameters()])
    # With the same z_0 the losses differ by log q(z_0 | x) + H[q], and nothing else.
    assert_unbiased(losses[0] - losses[1], torch.zeros_like(x[:, 0]), target=0.02)
    assert (losses[0] - losses[1]).std() > 0.5
    torch.testing.assert_close(*gradients, atol=1e-8, rtol=1e-10)
