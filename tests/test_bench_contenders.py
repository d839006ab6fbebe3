r"""Estimators that did not win: they are unbiased, and less noisy where theory says so."""

from __future__ import annotations

from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from contenders import CONTENDERS, GIVEN_X
from errors import one_line_value_error
from estimators.contenders import (
    GradientAware,
    Orthogonal,
    Orthogonal_ELBO,
    Shared,
)
from estimators.corrections import ControlVariate_ELBO, Hybrid_ELBO, Regressed_ELBO, Taylor_ELBO
from pyro import poutine
from scipy import stats
from torch import nn
from unbiased import assert_matches_oracle, assert_unbiased, draws

from pyro_vaediff import VAE, DiffusionPrior, Timestep_ELBO
from pyro_vaediff.infer import Timesteps, UniformTimesteps, typical_kl
from pyro_vaediff.testing import LinearGaussian, linear_gaussian_vae

SINGLE = {"low_discrepancy": False, "antithetic": False}


@pytest.fixture
def x(device):
    return torch.randn(2, 3, dtype=torch.float64, device=device)


def gradient_of(estimates, vae, wanted):
    r"""Returns the columns of the gradient of the parameters whose names start so."""
    columns, start = [], 1  # the value comes first
    for name, parameter in vae.named_parameters():
        part = estimates[..., start : start + parameter.numel()]
        start += parameter.numel()
        if name.startswith(wanted):
            columns.append(part.unflatten(-1, parameter.shape))
    return columns


def steps_from_two(estimates, vae):
    r"""Returns the gradient of the denoiser at t >= 2: the rows of its tables are times."""
    columns = gradient_of(estimates, vae, "prior.denoiser")
    return torch.cat([column[:, :, 0, 2:].flatten(2) for column in columns], -1)


def total_variance(estimates):
    r"""Returns the trace of the covariance, averaged over the data, and its standard error."""
    squares = (estimates - estimates.mean(0)).square().sum(-1).mean(1)
    return squares.mean().item(), squares.std().item() / len(squares) ** 0.5


# --- Unbiased -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [SINGLE, {}], ids=["iid", "default"])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde", "learned"])
@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders(x, name, reverse_variance, k, options):
    vae = linear_gaussian_vae(4, reverse_variance=reverse_variance).to(x.device)
    assert_matches_oracle(CONTENDERS[name]("uniform", k=k, **options), vae, x, target=0.05)


@pytest.mark.parametrize("T", [1, 2, 6])
@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_of_other_chains(x, name, T):
    vae = linear_gaussian_vae(T, parameterization="v").to(x.device)
    assert_matches_oracle(CONTENDERS[name]("importance", k=2), vae, x, target=0.05)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_with_particles(x, name, vectorize):
    vae = linear_gaussian_vae(3).to(x.device)
    elbo = CONTENDERS[name](num_particles=3, k=2, vectorize_particles=vectorize)
    assert_matches_oracle(elbo, vae, x)


@pytest.mark.parametrize("name", GIVEN_X)
def test_contenders_given_x(x, name):
    vae = linear_gaussian_vae(4).to(x.device)
    assert_matches_oracle(CONTENDERS[name]("uniform", k=3, conditioning="x"), vae, x, target=0.05)


@pytest.mark.parametrize("options", [{"conditioning": "x"}, {"timesteps": "all"}], ids=str)
@pytest.mark.parametrize(
    "Contender", [Hybrid_ELBO, ControlVariate_ELBO, Regressed_ELBO, Taylor_ELBO]
)
def test_what_corrections_are_not_made_for(Contender, options):
    with one_line_value_error(f"{Contender.__name__} needs conditioning='z_0'"):
        Contender(**options)


# --- A coefficient that is learned from earlier draws ---------------------------------------------


def learned(vae, x, evaluations=60, make=Regressed_ELBO, **options):
    r"""Returns a control variate that has learned, from data of its own draws."""
    elbo = make("uniform", **options)
    for _ in range(evaluations):
        elbo.loss_and_grads(vae.model, vae.guide, x.repeat(20, 1))
    vae.zero_grad()
    return elbo


@pytest.mark.parametrize("options", [SINGLE, {}], ids=["iid", "default"])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("make", [Regressed_ELBO, Taylor_ELBO])
def test_a_learned_coefficient_is_unbiased(x, make, k, options):
    vae = linear_gaussian_vae(4).to(x.device)
    elbo = learned(vae, x, make=make, k=k, **options)
    gh, hh = elbo.products
    assert abs(gh / hh) > 0.02
    assert_matches_oracle(elbo, vae, x, target=0.05)


def test_the_coefficient_of_a_standard_prior_is_one(x):
    r"""Its KLs are the control itself, and nothing is left of the timesteps' noise."""
    vae = linear_gaussian_vae(4).to(x.device)
    for parameter in vae.prior.parameters():
        parameter.data.zero_()
    elbo = learned(vae, x, k=2, **SINGLE)
    assert elbo.products[0] / elbo.products[1] == pytest.approx(1.0, abs=0.03)


def test_the_regression_has_less_variance_than_either_fixed_coefficient(x):
    r"""Where the prior is far from standard: one is too much, and nothing is too little."""
    vae = linear_gaussian_vae(4, seed=1).to(x.device)
    variances = []
    for elbo in (
        Timestep_ELBO("uniform", k=1, **SINGLE),
        ControlVariate_ELBO("uniform", k=1, **SINGLE),
        learned(vae, x, k=1, **SINGLE),
    ):
        columns = gradient_of(draws(elbo, vae, x), vae, "encoder")
        variances.append(total_variance(torch.cat([c.flatten(2) for c in columns], -1)))
    (none, none_se), (one, one_se), (best, se) = variances
    assert best - none < -3 * (se**2 + none_se**2) ** 0.5
    assert best - one < 3 * (se**2 + one_se**2) ** 0.5


# --- Hybrid: the gradient of the prior given x ----------------------------------------------------


@pytest.mark.parametrize("k", [1, 4])
def test_hybrid_changes_the_gradient_of_the_prior_only(x, k):
    vae = linear_gaussian_vae(4).to(x.device)
    estimates = []
    for make in (Timestep_ELBO, Hybrid_ELBO):
        torch.manual_seed(0)
        estimates.append(draws(make("uniform", k=k, **SINGLE), vae, x))
    given_z_0, hybrid = estimates
    torch.testing.assert_close(hybrid[..., 0], given_z_0[..., 0], atol=1e-10, rtol=0)
    for module in ("encoder", "decoder"):
        pair = (gradient_of(estimate, vae, module) for estimate in (hybrid, given_z_0))
        torch.testing.assert_close(*pair, atol=1e-9, rtol=0)
    change = steps_from_two(hybrid, vae) - steps_from_two(given_z_0, vae)
    assert (change.std(0) > 0.05).any(-1).all()
    assert_unbiased(change, torch.zeros_like(change[0]), target=0.1)


def test_hybrid_has_the_prior_gradient_of_kls_given_x(x):
    r"""With one timestep, z_t has the same law, and the gradient is the same function of it."""
    vae = linear_gaussian_vae(4).to(x.device)
    vae.encoder.log_scale.data.fill_(0.0)  # a broad encoder
    (given_z_0, se), (given_x, se_x), (hybrid, se_hybrid) = (
        total_variance(steps_from_two(draws(elbo, vae, x), vae))
        for elbo in (
            Timestep_ELBO("uniform", k=1, **SINGLE),
            Timestep_ELBO("uniform", k=1, conditioning="x", **SINGLE),
            Hybrid_ELBO("uniform", k=1, **SINGLE),
        )
    )
    assert max(se, se_x, se_hybrid) < 0.05 * given_x
    assert abs(hybrid - given_x) < 5 * (se_x**2 + se_hybrid**2) ** 0.5
    assert given_z_0 > 1.4 * hybrid


def test_hybrid_gains_nothing_from_a_sharp_encoder(x):
    vae = linear_gaussian_vae(4).to(x.device)
    vae.encoder.log_scale.data.fill_(-5.0)
    estimates = []
    for make in (Timestep_ELBO, Hybrid_ELBO):
        torch.manual_seed(0)
        estimates.append(steps_from_two(draws(make("uniform", k=1, **SINGLE), vae, x), vae))
    variance, _ = total_variance(estimates[0])
    change, _ = total_variance(estimates[1] - estimates[0])
    assert change < 1e-3 * variance


# --- ControlVariate: exact for a prior without a network ------------------------------------------


def without_network(vae):
    for parameter in vae.prior.denoiser.parameters():
        parameter.data.zero_()
    return vae


@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize(
    "options", [{}, {"num_particles": 2, "vectorize_particles": True}], ids=str
)
def test_without_a_network_the_steps_have_no_noise(x, options, reverse_variance):
    vae = linear_gaussian_vae(5, reverse_variance=reverse_variance).to(x.device)
    elbo = ControlVariate_ELBO("uniform", k=2, **SINGLE, **options)
    encoder = list(vae.encoder.parameters())

    def sampled():
        term = elbo.terms(vae.model, vae.guide, x)["z_s"]
        gradient = torch.autograd.grad(term, encoder, materialize_grads=True)
        return [term.detach(), *gradient]

    assert all(value.abs().max() > 1e-2 for value in sampled())
    without_network(vae)
    for value in sampled():
        torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-10, rtol=0)


def test_a_fresh_prior_has_no_network(x):
    encoder, decoder = LinearGaussian(3, 2, log_scale=-0.5), LinearGaussian(2, 3, log_scale=0.0)
    vae = VAE(encoder, decoder, DiffusionPrior(2, 1000)).double().to(x.device)
    for make, noisy in ((ControlVariate_ELBO, False), (Timestep_ELBO, True)):
        term = make("uniform", k=1).terms(vae.model, vae.guide, x)["z_s"]
        (gradient,) = torch.autograd.grad(term, encoder.bias)
        assert (gradient.abs().max() > 1e-4) == noisy
        assert noisy or gradient.abs().max() < 1e-10


def test_what_is_left_is_the_noise_of_an_exact_sum(x):
    r"""Without a network, one timestep is as good as the exact expectation given z_0."""
    vae = without_network(linear_gaussian_vae(6)).to(x.device)
    variances = {}
    for label, elbo in {
        "one": Timestep_ELBO("uniform", k=1, **SINGLE),
        "control": ControlVariate_ELBO("uniform", k=1, **SINGLE),
        "many": ControlVariate_ELBO("uniform", k=16, **SINGLE),
    }.items():
        torch.manual_seed(0)  # the same z_0: it is drawn first
        estimates = torch.cat(
            [g.flatten(2) for g in gradient_of(draws(elbo, vae, x), vae, "encoder")], -1
        )
        variances[label] = total_variance(estimates)
    (one, se), (control, se_control), (many, se_many) = variances.values()
    assert max(se, se_control, se_many) < 0.05 * control
    assert control < 0.9 * one and one - control > 5 * (se**2 + se_control**2) ** 0.5
    assert abs(control - many) < 5 * (se_control**2 + se_many**2) ** 0.5


# --- Coupled noise --------------------------------------------------------------------------------


def coupled_noise(handler, device, k, num_data, D, dim=-2, dtype=torch.float64):
    r"""Returns noise, in the plate of the handler with shape (k, num_data, D) and outside of it."""
    shape = (k, num_data) if dim == -2 else (num_data, k)
    loc = torch.randn(*shape, D, dtype=dtype, device=device)
    scale = torch.rand(D, dtype=dtype, device=device) + 0.1

    def program():
        with pyro.plate("data", num_data, dim=-3 - dim):
            pyro.sample("outside", dist.Normal(0 * loc.narrow(dim - 1, 0, 1), 1.0).to_event(1))
            with pyro.plate("steps", k, dim=dim):
                pyro.sample("t", Timesteps(torch.ones(4, device=device) / 4))
                pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    nodes = poutine.trace(handler("steps")(program)).get_trace().nodes
    assert nodes["t"]["value"].shape == shape
    z, outside = nodes["z"]["value"], nodes["outside"]["value"]
    assert (z.dtype, z.device, z.shape) == (dtype, loc.device, loc.shape)
    return ((z - loc) / scale).movedim(dim - 1, 0), outside.reshape(num_data, D)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("handler", [Orthogonal, Shared])
def test_every_noise_is_standard_normal(device, handler, dim):
    k, num_data, D = 5, 20_000, 3
    noise, _ = coupled_noise(handler, device, k, num_data, D, dim)
    assert noise.shape == (k, num_data, D)
    se = num_data**-0.5
    assert se < 0.01
    assert (noise.mean(1).abs() < 5 * se).all()
    # The covariance of all noises of a datum. Orthogonal ones are uncorrelated.
    rows = noise.transpose(0, 1).flatten(1)
    if handler is Shared:
        torch.testing.assert_close(noise, noise[:1].expand_as(noise), atol=1e-12, rtol=0)
        expected = torch.eye(D, dtype=rows.dtype, device=device).repeat(k, k)
    else:
        expected = torch.eye(k * D, dtype=rows.dtype, device=device)
    products = rows.unsqueeze(1) * rows.unsqueeze(2)
    error = products.mean(0) - expected
    assert (error.abs() < 5 * products.std(0) * se + 1e-10).all()
    for row in noise.cpu():
        assert stats.kstest(row[:, 0].numpy(), stats.norm.cdf).pvalue > 1e-4
        squares = row.square().sum(-1).numpy()
        assert stats.kstest(squares, stats.chi2(D).cdf).pvalue > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noises_are_orthogonal_in_groups(device, dtype):
    noise, outside = coupled_noise(Orthogonal, device, k=8, num_data=50, D=3, dtype=dtype)
    cosine = nn.functional.normalize(noise.transpose(0, 1), dim=-1)
    cosine = (cosine @ cosine.mT).abs()  # (data, k, k)
    group = torch.arange(8, device=device) // 3  # of D, and a last one of two
    same = (group[:, None] == group) & ~torch.eye(8, dtype=torch.bool, device=device)
    assert cosine[:, same].max() < (1e-5 if dtype == torch.float32 else 1e-12)
    other = group[:, None] != group
    assert (cosine[:, other] > 1e-3).double().mean() > 0.98
    # Outside of the plate, and from one datum to the next, nothing is orthogonal.
    for rows in (outside, noise[0]):
        rows = nn.functional.normalize(rows[:3], dim=-1)
        assert (rows @ rows.mT).triu(1).abs().max() > 1e-2


def test_the_estimator_draws_orthogonal_noise(x):
    vae = linear_gaussian_vae(6, event_shape=4).to(x.device)
    elbo = Orthogonal_ELBO("uniform", k=3, **SINGLE)
    model, guide = elbo.collapse(vae.model), elbo.collapse(vae.guide)
    _, trace = elbo._get_trace(model, guide, (x,), {})
    nodes = trace.nodes
    q = nodes["z_t"]["fn"]
    noise = ((nodes["z_t"]["value"] - q.mean) / q.stddev).detach().transpose(0, 1)  # (B, k, D)
    gram = noise @ noise.mT
    lengths = gram.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(gram, torch.diag_embed(lengths), atol=1e-10, rtol=0)
    assert (lengths > 1e-3).all()


# --- Timesteps in proportion to gradients ---------------------------------------------------------


def step_at_distance(prior, t, distance):
    r"""Returns the KL of a step whose means differ by a distance in each dimension, and the norm of
    its gradient with respect to the output of the network."""
    output = torch.randn(prior.latent_dim, dtype=torch.float64, device=prior.origin.device)
    output.requires_grad_()
    with mock.patch.object(prior.denoiser, "network_at", lambda z, log_snr, c: (output,)):
        p = prior.reverse(torch.randn_like(output), t)
    q = dist.Normal(p.mean.detach() + distance, p.stddev).to_event(1)
    kl = torch.distributions.kl_divergence(q, p)
    (gradient,) = torch.autograd.grad(kl, output)
    return kl.detach(), gradient.norm()


@pytest.mark.parametrize("parameterization", ["eps", "z0", "mu", "v"])
@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde"])
def test_gradient_aware_learns_the_optimal_proposal(device, reverse_variance, parameterization):
    options = {"parameterization": parameterization, "reverse_variance": reverse_variance}
    prior = DiffusionPrior(2, 6, **options).double().to(device)
    norm = torch.tensor([3.0, 0.2, 1.0, 0.5, 2.0], dtype=torch.float64, device=device)
    # Means as far apart as it takes for these gradients, to which the distance is proportional.
    distance = [norm[t - 2] / step_at_distance(prior, t, 1.0)[1] for t in range(2, 7)]
    steps = [step_at_distance(prior, t, d) for t, d in enumerate(distance, start=2)]
    kl = torch.stack([kl for kl, _ in steps])
    torch.testing.assert_close(torch.stack([norm for _, norm in steps]), norm)

    proposal = GradientAware(decay=0.98, uniform=0.1)
    for _ in range(800):
        probs = proposal(prior, "z_0")
        t = Timesteps(probs, first=2, low_discrepancy=True).expand([4, 50]).sample()
        noise = torch.randn(2, *t.shape, dtype=torch.float64, device=device)
        proposal.update(t, kl[t - 2] * noise.square().mean(0))  # the distance varies
    probs = proposal(prior, "z_0")
    torch.testing.assert_close(probs, 0.9 * norm / norm.sum() + 0.1 / 5, atol=0.02, rtol=0)

    # The proposal has nearly the smallest variance among all; the uniform one has not.
    def second_moment(r):
        return (norm.square() / r).sum()

    assert second_moment(probs) < 1.2 * norm.sum() ** 2
    assert second_moment(UniformTimesteps()(prior, "z_0")) > 1.5 * norm.sum() ** 2


@pytest.mark.parametrize("conditioning, scale", [("z_0", 0.0), ("x", 0.3)])
def test_gradient_aware_starts_from_a_standard_gaussian(device, conditioning, scale):
    prior = DiffusionPrior(2, 8).double().to(device)
    kl = typical_kl(prior, scale)[2:]
    steps = [step_at_distance(prior, t, 1.0) for t in range(2, 9)]
    factor = torch.stack([norm / kl.sqrt() for kl, norm in steps])
    expected = factor * kl.sqrt()
    expected = 0.9 * expected / expected.sum() + 0.1 / 7
    probs = GradientAware()(prior, conditioning)
    torch.testing.assert_close(probs, expected, atol=1e-10, rtol=0)
