r"""Bits per dimension, and importance-weighted bounds against an evidence that is known."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vaediff import VAE, DiffusionPrior, GaussianPrior, Timestep_ELBO, TraceKL_ELBO
from pyro_vaediff.evaluate import bits_per_dim, importance_weighted_bound
from pyro_vaediff.infer import elbo_terms
from pyro_vaediff.likelihoods import make_likelihood
from pyro_vaediff.testing import LinearGaussian, Oracle, linear_gaussian_vae


@pytest.fixture
def x(device):
    return torch.randn(2, 3, dtype=torch.float64, device=device)


def mean_and_se(draws, target):
    se = draws.std(0) / len(draws) ** 0.5
    assert (se < target).all(), se
    return draws.mean(0), se


# --- Bits per dimension ---------------------------------------------------------------------------


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (3, 32, 32), (1, 1, 1)])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_a_uniform_density_has_log2_levels_bits(image_shape, levels):
    # Dequantized images fill [-1, 1]^d, where the uniform density is 2^-d.
    space = make_likelihood("gaussian", image_shape, levels).space(levels)
    nats = math.prod(image_shape) * math.log(2)
    bits = bits_per_dim(nats, image_shape, space.log_bin_width)
    assert bits == pytest.approx(math.log2(levels), rel=1e-12)
    # So has the uniform distribution over the levels, which has no bins.
    space = make_likelihood("categorical", image_shape, levels).space(levels)
    nats = math.prod(image_shape) * math.log(levels)
    bits = bits_per_dim(nats, image_shape, space.log_bin_width)
    assert bits == pytest.approx(math.log2(levels), rel=1e-12)


def test_bits_per_dim_of_a_fair_coin_and_of_certainty():
    assert bits_per_dim(3 * math.log(2), (3, 1, 1)) == pytest.approx(1.0, rel=1e-12)
    assert bits_per_dim(0.0, (3, 1, 1)) == 0.0


def test_the_fixed_gaussian_of_the_papers_code_cannot_go_below_its_floor():
    # N(., 1/2) at its mean: log2(sqrt(2 pi / 2)) + log2(256 / 2) bits per dimension.
    likelihood = make_likelihood("gaussian-fixed", (3, 4, 4), 256)
    maps = torch.zeros(1, likelihood.num_maps, 4, 4, dtype=torch.float64)
    nats = -likelihood(maps).log_prob(torch.zeros(1, 3, 4, 4, dtype=torch.float64)).item()
    bits = bits_per_dim(nats, (3, 4, 4), likelihood.space(256).log_bin_width)
    assert bits == pytest.approx(math.log2(math.sqrt(math.pi)) + 7, rel=1e-6)


def test_the_dequantized_density_bounds_the_discrete_probability(device):
    # P(u) of the bin is known for a Gaussian density: its expected log is at most log P.
    torch.manual_seed(0)
    u, levels = torch.randint(0, 17, (1, 1, 8, 8), dtype=torch.uint8), 17
    space = make_likelihood("gaussian-fixed", (1, 8, 8), levels).space(levels)
    p = dist.Normal(torch.zeros((), dtype=torch.float64), math.sqrt(0.5))
    low = 2 * u.double() / levels - 1
    log_P = (p.cdf(low + 2 / levels) - p.cdf(low)).log().sum().item()
    x = torch.stack([space.preprocess(u) for _ in range(4000)]).double()
    mean, se = mean_and_se(-p.log_prob(x).flatten(1).sum(1), 0.05)
    bits = bits_per_dim(mean.item(), (1, 8, 8), space.log_bin_width)
    exact = -log_P / 64 / math.log(2)
    assert exact - 5 * se / 44 < bits < exact + 0.01  # bins this small lose little


# --- Importance-weighted bounds -------------------------------------------------------------------


def gaussian_vae(device):
    r"""A VAE with p(z_0) = N(0, 1) and affine networks: x is Gaussian."""
    encoder = LinearGaussian((3,), (1,), log_scale=-0.5)
    decoder = LinearGaussian((1,), (3,), log_scale=0.0)
    return VAE(encoder, decoder, GaussianPrior(1)).double().to(device)


def log_evidence(vae, x):
    W, noise = vae.decoder.weight[0], vae.decoder.log_scale[0].exp().square().diag()
    p_x = dist.MultivariateNormal(vae.decoder.bias[0], W @ W.mT + noise)
    return p_x.log_prob(x).detach()


def use_exact_posterior(vae):
    r"""Sets the encoder to p(z_0 | x), which is Gaussian."""
    W, precision = vae.decoder.weight.data[0], vae.decoder.log_scale.data[0].mul(-2).exp()
    variance = 1 / (1 + (W.mT * precision) @ W)
    vae.encoder.weight.data[0] = variance * (W.mT * precision)
    vae.encoder.bias.data[0] = -vae.encoder.weight.data[0] @ vae.decoder.bias.data[0]
    vae.encoder.log_scale.data[0] = variance.log().flatten() / 2


@pytest.mark.parametrize("K", [1, 5])
def test_the_exact_posterior_has_no_gap(x, K):
    vae = gaussian_vae(x.device)
    use_exact_posterior(vae)
    bound = importance_weighted_bound(vae.model, vae.guide, x, elbo=Trace_ELBO(num_particles=K))
    torch.testing.assert_close(bound, log_evidence(vae, x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("make", [Trace_ELBO, TraceGraph_ELBO])
def test_the_bound_rises_from_the_elbo_to_the_evidence(x, make):
    vae, replicas = gaussian_vae(x.device), 4000
    use_exact_posterior(vae)
    vae.encoder.log_scale.data += 0.3
    vae.encoder.bias.data += 0.5 * vae.encoder.log_scale.data.exp()
    m, s2 = vae.encoder(x).mean, vae.encoder(x).variance
    W, sigma2 = vae.decoder.weight[0], vae.decoder.log_scale[0].exp().square()
    residual = (x - m @ W.mT - vae.decoder.bias[0]).square() + s2 @ W.mT.square()
    reconstruction = (residual / sigma2 + (2 * math.pi * sigma2).log()).sum(-1) / 2
    elbo = (-reconstruction - (m.square() + s2 - 1 - s2.log()).sum(-1) / 2).detach()
    evidence, previous = log_evidence(vae, x), None
    assert (evidence - elbo > 0.02).all()
    for K in (1, 4, 16, 64, 256):
        bound = importance_weighted_bound(
            vae.model, vae.guide, x.repeat(replicas, 1), elbo=make(num_particles=K)
        )
        mean, se = mean_and_se(bound.unflatten(0, (replicas, len(x))), 0.05)
        assert (mean < evidence + 5 * se).all(), K
        if previous is None:
            assert ((mean - elbo).abs() < 5 * se).all()
        else:
            assert (mean > previous[0] - 5 * (se + previous[1])).all(), K
        previous = mean, se
    assert ((mean - evidence).abs() < 5 * se + 0.01).all()


@pytest.mark.parametrize("order", ["forward", "posterior", "reversed"])
def test_the_bound_of_a_chain(x, order):
    vae, replicas = linear_gaussian_vae(3, order=order).to(x.device), 4000
    oracle = Oracle(vae, x)
    elbo, evidence = -oracle.negative_elbo.detach(), oracle.log_evidence.detach()
    assert (evidence - elbo > 0.1).all()
    means = []
    for K in (1, 50):
        bound = importance_weighted_bound(
            vae.model, vae.guide, x.repeat(replicas, 1), elbo=Trace_ELBO(num_particles=K)
        )
        mean, se = mean_and_se(bound.unflatten(0, (replicas, len(x))), 0.1)
        assert (mean < evidence + 5 * se).all()
        means.append(mean)
        if K == 1:
            assert ((mean - elbo).abs() < 5 * se).all()
    assert (means[1] > means[0] + 0.5 * (evidence - elbo)).all()


def test_the_default_has_64_particles(x):
    vae = gaussian_vae(x.device)
    bounds = []
    for options in ({}, {"elbo": Trace_ELBO(num_particles=64)}):
        torch.manual_seed(2)
        bounds.append(importance_weighted_bound(vae.model, vae.guide, x, **options))
    assert bounds[0].shape == (len(x),)
    assert torch.equal(*bounds)


# --- Estimates whose log-mean-exp is no bound -----------------------------------------------------


@pytest.mark.parametrize(
    "elbo",
    [
        Timestep_ELBO(),
        Timestep_ELBO("all"),
        TraceKL_ELBO(),
        TraceMeanField_ELBO(),
        RenyiELBO(alpha=0.0),
    ],
    ids=lambda elbo: type(elbo).__name__,
)
def test_other_estimators_are_an_error_that_says_why(x, elbo):
    vae = linear_gaussian_vae(3).to(x.device)
    with one_line_value_error(
        f"log-mean-exp of {type(elbo).__name__} is not a bound on log p.x., as its particles are "
        "not .* of one draw of all sites: use Trace_ELBO"
    ):
        importance_weighted_bound(vae.model, vae.guide, x, elbo=elbo)


class Zero(nn.Module):
    def forward(self, z, log_snr):
        return torch.zeros_like(z)


@pytest.mark.parametrize(
    "elbo", [Timestep_ELBO("uniform", k=1), TraceKL_ELBO()], ids=lambda elbo: type(elbo).__name__
)
def test_the_log_mean_exp_of_an_estimate_exceeds_the_evidence(x, elbo):
    # The reason for the error above. Here the ELBO equals log p(x): the chain leaves N(0, 1)
    # unchanged, its forward diffusion is its exact posterior, and the encoder is exact as well.
    vae = gaussian_vae(x.device)
    use_exact_posterior(vae)
    evidence = log_evidence(vae, x)
    vae.prior = DiffusionPrior(1, 20, backbone=Zero()).double().to(x.device)
    bound = importance_weighted_bound(vae.model, vae.guide, x, elbo=Trace_ELBO(num_particles=2))
    torch.testing.assert_close(bound, evidence, atol=1e-10, rtol=0)

    # Estimates whose expectation is log p(x), but the expectation of their exponential is not p(x).
    K, replicas = 64, 500
    with torch.no_grad():
        terms = elbo_terms(vae.model, vae.guide, x.repeat(K * replicas, 1), elbo=elbo)
    estimates = -sum(term.sum(0) if term.ndim > 1 else term for term in terms.values())
    estimates = estimates.unflatten(0, (K, replicas, len(x)))
    mean, se = mean_and_se(estimates.flatten(0, 1), 0.05)
    assert ((mean - evidence).abs() < 5 * se).all()
    mean, se = mean_and_se(estimates.logsumexp(0) - math.log(K), 0.1)
    assert (mean > evidence + 1).all()
    assert (mean > evidence + 5 * se).all()


# --- Programs with scales and masks ---------------------------------------------------------------


def normal_programs(weights=(1.0, 1.0)):
    r"""Returns z ~ N(0, 1), x ~ N(z, 1) and the exact posterior N(x / 2, 1 / 2), with scales."""

    def model(x, plate):
        with plate(), poutine.scale(scale=weights[0]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.scale(scale=weights[1]):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, plate):
        with plate(), poutine.scale(scale=weights[0]):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    return model, guide


@pytest.mark.parametrize("case", ["subsampled plate", "weight of the KL", "tempered", "mean loss"])
def test_scales_are_no_part_of_the_weights(case):
    # With the exact posterior each weight is p(x) = N(x; 0, 2): log p(0) = -1.2655.
    x = torch.tensor([0.0, 1.0, -2.0])
    model, guide = normal_programs(
        {"weight of the KL": (0.1, 10.0), "tempered": (1.0, 0.3)}.get(case, (1.0, 1.0))
    )
    plate = lambda: pyro.plate("data", 3)  # noqa: E731
    if case == "subsampled plate":
        plate = lambda: pyro.plate("data", 300, subsample=torch.tensor([5, 17, 2]))  # noqa: E731
    elif case == "mean loss":
        model, guide = (poutine.scale(fn, scale=1 / 3) for fn in (model, guide))
    bound = importance_weighted_bound(model, guide, x, plate, elbo=Trace_ELBO(5))
    torch.testing.assert_close(bound, dist.Normal(0.0, 2**0.5).log_prob(x), atol=1e-6, rtol=0)
    assert bound[0].item() == pytest.approx(-1.2655, abs=1e-4)


def test_masks_are_part_of_the_weights():
    x, mask = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([True, False, True])
    programs = (poutine.mask(fn, mask=mask) for fn in normal_programs())
    bound = importance_weighted_bound(*programs, x, lambda: pyro.plate("data", 3))
    expected = dist.Normal(0.0, 2**0.5).log_prob(x) * mask
    torch.testing.assert_close(bound, expected, atol=1e-6, rtol=0)


# --- Programs that are not understood -------------------------------------------------------------


def test_vectorized_particles_are_an_error(x):
    vae = gaussian_vae(x.device)
    with one_line_value_error("must not vectorize"):
        elbo = Trace_ELBO(num_particles=2, vectorize_particles=True)
        importance_weighted_bound(vae.model, vae.guide, x, elbo=elbo)


def test_sites_outside_of_the_plate_are_an_error():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with one_line_value_error(r"site 'z' .* shape \(\): every site must be inside"):
        importance_weighted_bound(model, model)
