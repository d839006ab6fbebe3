r"""Priors in continuous time, against integrals in closed form and against chains of many steps."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from pyro.infer import Trace_ELBO
from torch import nn
from unbiased import assert_unbiased, draws, exact_values

from pyro_vaediff import DiffusionPrior, Reweighted, Timestep_ELBO, TraceKL_ELBO
from pyro_vaediff.evaluate import evaluate, kl_by_timestep
from pyro_vaediff.infer import Antithetic, Timesteps, elbo_terms
from pyro_vaediff.nn import NoiseMatched, ResidualMLP
from pyro_vaediff.sampling import ProbabilityFlow, sample, trajectory
from pyro_vaediff.schedules import (
    CosineSchedule,
    LinearSchedule,
    LogSNRSchedule,
    Schedule,
    make_schedule,
)
from pyro_vaediff.testing import ContinuousOracle, linear_gaussian_vae

EVENT = (1, 2, 1)


@pytest.fixture
def x(device):
    return torch.randn(2, 3, dtype=torch.float64, device=device)


def exact(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def grid(schedule, num_cells):
    r"""Returns the times of a chain with the same first step, and that many after it.

    They are closer to each other where the log-SNR changes fast.
    """
    times = schedule.original("times")
    u = torch.linspace(0, 1, num_cells + 1, dtype=torch.float64)
    return torch.cat([times[:1], torch.lerp(times[1], times[-1], u**2)])


# --- The schedule ---------------------------------------------------------------------------------

SCHEDULES = {
    "linear": LinearSchedule(1000),
    "cosine": CosineSchedule(50),
    "betas": Schedule([0.1, 0.3, 0.2]),
    "function": LogSNRSchedule(lambda t: 9 - 12 * t - 7 * t**2, 20),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_slope_is_the_derivative_of_the_log_snr(name):
    schedule = SCHEDULES[name]
    t = torch.linspace(0.0513, 0.9847, 100, dtype=torch.float64)  # on no corner of the path
    h = 1e-6
    expected = (schedule(t + h) - schedule(t - h)) / (2 * h)
    torch.testing.assert_close(schedule.slope(t), expected, rtol=1e-7, atol=1e-7)


def test_a_schedule_in_continuous_time_keeps_its_path_and_grid():
    discrete = LinearSchedule(1000)
    schedule = discrete.in_continuous_time()
    assert schedule.continuous and not discrete.continuous
    exact(schedule.original("times"), discrete.original("times"), 0)
    assert "continuous" in repr(schedule) and "continuous" not in repr(discrete)
    assert schedule.double().continuous and not schedule.with_steps(10).continuous
    times = discrete.in_continuous_time(first=1e-5).original("times")
    exact(times[[0, 1, -1]], torch.tensor([0, 1e-5, 1.0], dtype=torch.float64), 0)
    exact(times.diff()[1:], torch.full((999,), (1 - 1e-5) / 999, dtype=torch.float64))
    later = schedule.starting_at(5.0)
    assert later.continuous and later.log_snr[0] == pytest.approx(5.0)


def test_positions_are_between_the_times_of_the_grid():
    schedule = SCHEDULES["linear"].with_steps(torch.tensor([0.0, 0.1, 0.4, 1.0]))
    position = torch.tensor([0.5, 1.0, 1.25, 2.999], dtype=torch.float64)
    time, length = schedule.between(position)
    exact(time, torch.tensor([0.05, 0.1, 0.175, 0.9994], dtype=torch.float64), 1e-7)
    exact(length, torch.tensor([0.1, 0.3, 0.3, 0.6], dtype=torch.float64), 1e-7)


@pytest.mark.parametrize("low_discrepancy", [False, True])
def test_positions_are_drawn_from_a_density(device, low_discrepancy):
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64, device=device)
    law = Timesteps(probs, 2, low_discrepancy, continuous=True).expand([10_000])
    p = law.sample()
    assert p.dtype == torch.float64 and ((p >= 1) & (p < 5)).all()
    # What the cumulative distribution makes of them is uniform.
    i = p.long() - 1
    u = torch.cat([probs.new_zeros(1), probs.cumsum(0)])[i] + probs[i] * (p - p.floor())
    gap = (u.sort().values - (torch.arange(10_000, device=device) + 0.5) / 10_000).abs().max()
    assert gap < (1e-4 if low_discrepancy else 0.025)
    exact(law.log_prob(p), probs[i].log())


# --- The bound ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [2, EVENT], ids=str)
@pytest.mark.parametrize("parameterization", ["eps", "z0", "v"])
@pytest.mark.parametrize("conditioning", ["z_0", "x"])
def test_values_and_gradients_are_those_of_the_integral(x, conditioning, parameterization, shape):
    if parameterization != "eps" and shape == EVENT:
        pytest.skip("one is enough")
    vae = linear_gaussian_vae(None, shape, parameterization=parameterization).to(x.device)
    exact_losses = exact_values(vae, ContinuousOracle(vae, x).negative_elbo)
    elbo = Timestep_ELBO(k=4, conditioning=conditioning)
    # The error of a predicted z_0 is multiplied by the SNR, which is large at one end.
    target = 0.1 if parameterization == "z0" else 0.03
    assert_unbiased(draws(elbo, vae, x), exact_losses, target)


@pytest.mark.parametrize(
    "options",
    [
        {"timesteps": "uniform", "low_discrepancy": False, "antithetic": False},
        {"timesteps": "loss-aware", "entropy": "exact"},
        {"timesteps": "importance", "k": 1},
    ],
    ids=str,
)
def test_every_proposal_is_unbiased(x, options):
    vae = linear_gaussian_vae(None, reverse_variance="beta_tilde").to(x.device)
    exact_losses = exact_values(vae, ContinuousOracle(vae, x).negative_elbo)
    assert_unbiased(draws(Timestep_ELBO(**{"k": 4} | options), vae, x), exact_losses, target=0.05)


@pytest.mark.parametrize("conditioning", ["z_0", "x"])
def test_each_term_is_that_of_the_oracle(x, conditioning):
    vae = linear_gaussian_vae(None).to(x.device)
    expected = ContinuousOracle(vae, x).terms(conditioning)
    expected["z_1000"] = expected.pop("z_T")
    replicas = 400
    with torch.no_grad():
        elbo = Timestep_ELBO("all", conditioning=conditioning, chunk_size=400)
        terms = elbo_terms(vae.model, vae.guide, x.repeat(replicas, 1), elbo=elbo)
    assert terms["z_s"].shape == (999, 2 * replicas)
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        term = term.sum(0) if term.ndim > 1 else term
        values = term.unflatten(-1, (replicas, len(x)))
        mean, se = values.mean(0), values.std(0) / replicas**0.5
        assert (se < 0.2).all(), name
        assert ((mean - expected[name]).abs() < 5 * se + 1e-10).all(), name


def test_the_oracle_has_one_bound():
    # Given z_0 or x: the terms are others, what they sum to is one number.
    x = torch.randn(4, 3, dtype=torch.float64)
    for parameterization in ("eps", "z0", "v"):
        vae = linear_gaussian_vae(None, 3, parameterization=parameterization)
        oracle = ContinuousOracle(vae, x)
        given_x = sum(oracle.terms("x").values())
        torch.testing.assert_close(given_x, oracle.negative_elbo, atol=0, rtol=1e-11)


def test_a_chain_of_4000_steps_has_the_same_values_and_gradients(x):
    vae = linear_gaussian_vae(None).to(x.device)
    exact_losses = exact_values(vae, ContinuousOracle(vae, x).negative_elbo)
    vae.prior = vae.prior.with_steps(grid(vae.prior.schedule, 4000))
    assert not vae.prior.continuous
    assert_unbiased(draws(Timestep_ELBO(k=4), vae, x), exact_losses, target=0.03)


@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("parameterization", ["eps", "z0", "v"])
def test_the_bound_of_a_chain_tends_to_the_limit(x, parameterization, reverse_variance):
    # The KLs of its steps in closed form, with errors that fall as 1 / T.
    vae = linear_gaussian_vae(
        None, parameterization=parameterization, reverse_variance=reverse_variance
    )
    oracle = ContinuousOracle(vae, x.cpu())
    limit = oracle.terms("z_0")["z_s"]
    errors = []
    for T in (400, 800):
        prior = vae.prior.with_steps(grid(vae.prior.schedule, T))
        total = 0.0
        for t in range(2, T + 2):
            kernel, log_snr = prior.denoiser.kernel, prior.schedule.log_snr[t]
            scale, ratio = kernel.sigmas[t], prior.schedule.betas_tilde[t] / kernel.sigmas[t] ** 2
            mean = oracle.z_0 * kernel.b[t] + oracle.z(log_snr) * (kernel.a[t] - kernel.skips[t])
            estimate = oracle.denoise(log_snr) - oracle.z(log_snr) * kernel.z0_skips[t]
            square = (mean - estimate * kernel.b[t]).mean_square.sum(-1)
            total = total + square / scale**2 / 2 + ratio - 1 - ratio.log()  # two dimensions
        errors.append((total - limit).abs())
    assert (errors[1] < 0.6 * errors[0]).all() and (errors[1] < 0.05 * limit).all()


@pytest.mark.parametrize("conditioning", ["z_0", "x"])
def test_a_chain_may_start_from_noisy_latents(x, conditioning):
    torch.manual_seed(0)
    vae = linear_gaussian_vae(None, 2).to(x.device)
    schedule = LinearSchedule(1000).starting_at(3.0)
    vae.encoder = NoiseMatched(vae.encoder, 3.0)
    results = []
    for given in (schedule.in_continuous_time(), schedule):
        T = None if given.continuous else 1000
        vae.prior = DiffusionPrior(2, T, given, vae.prior.denoiser.backbone).to(x)
        elbo = Timestep_ELBO("importance", k=64, conditioning=conditioning, entropy="exact")
        with torch.no_grad():
            terms = elbo_terms(vae.model, vae.guide, x.repeat(4000, 1), elbo=elbo)
        values = torch.stack([v.sum(0) if v.ndim > 1 else v for v in terms.values()]).sum(0)
        values = values.unflatten(0, (4000, len(x)))
        results.append((values.mean(0), values.std(0) / 4000**0.5))
    (limit, se), (chain, chain_se) = results
    se = (se.square() + chain_se.square()).sqrt()
    assert (se < 0.15).all()
    assert ((limit - chain).abs() < 5 * se + 0.01).all()


def test_a_prior_starts_at_a_standard_normal(device):
    # KL(q(z_0 | x) || N(0, I)), of which the chain's bound is exact.
    prior = DiffusionPrior(3, None, backbone=ResidualMLP(3, width=4)).to(device, torch.float64)
    loc = torch.tensor([0.3, -0.8, 1.2], dtype=torch.float64, device=device).expand(20_000, 3)
    q = torch.distributions.Normal(loc, 0.5)
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0 * loc, 1.0))
    for conditioning in ("x", "z_0"):
        elbo = Timestep_ELBO(conditioning=conditioning, entropy="exact")
        kl = bound(prior, dist.Normal(loc, 0.5).to_event(1), elbo)
        assert kl.std() / 20_000**0.5 < 0.05
        assert (kl.mean() - expected.sum(-1).mean()).abs() < 5 * kl.std() / 20_000**0.5


def bound(prior, q, elbo, c=None):
    def program(run):
        with pyro.plate("data", len(q.mean)):
            run()

    with torch.no_grad():
        terms = elbo_terms(
            lambda: program(lambda: prior.model(c)),
            lambda: program(lambda: prior.guide(q, c)),
            elbo=elbo,
        )
    return torch.stack([v.sum(0) if v.ndim > 1 else v for v in terms.values()]).sum(0)


def test_preconditioning_is_exact_for_its_gaussian(device):
    # -ELBO = E[-log p(z_0)] for the exact denoiser of N(m, s^2).
    net = ResidualMLP(2, width=4)
    prior = DiffusionPrior(2, None, backbone=net, preconditioning=True).to(device, torch.float64)
    m, s = prior.denoiser.preconditioning.mean, prior.denoiser.preconditioning.scale
    with torch.no_grad():
        m.copy_(torch.tensor([0.4, -0.7]))
        prior.denoiser.preconditioning.log_scale.copy_(torch.tensor([0.5, 0.8]).log() / 10)
    s = prior.denoiser.preconditioning.scale.detach()
    z_0 = m + s * torch.randn(20_000, 2, dtype=torch.float64, device=device)
    values = bound(prior, dist.Delta(z_0, event_dim=1), Timestep_ELBO())
    error = (values + dist.Normal(m, s).to_event(1).log_prob(z_0)).detach()
    # The first step ends in a density that is not quite Gaussian: its variance is fixed.
    se = error.std() / 20_000**0.5
    assert se < 0.05 and error.mean().abs() < 5 * se + 1e-3


# --- The programs ---------------------------------------------------------------------------------


@pytest.fixture
def vae(device):
    return linear_gaussian_vae(None).to(device)


def test_the_model_runs_the_chain_of_the_grid(vae):
    prior = vae.prior
    assert prior.continuous and prior.num_timesteps == 1000
    assert sample(prior, 3).shape == (3, 2)
    few = prior.with_steps(5)
    assert not few.continuous and few.num_timesteps == 5
    assert [*map(id, few.parameters())] == [*map(id, prior.parameters())]
    times, frames = trajectory(few, 4, num_frames=3)
    assert times.tolist() == [5, 2, 0] and frames.shape == (3, 4, 2)
    z = torch.randn(3, 2, dtype=torch.float64, device=prior.origin.device)
    assert torch.isfinite(ProbabilityFlow(prior, num_steps=50).log_prob(z)).all()


@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde"])
def test_the_network_means_the_same_estimate_on_any_grid(device, reverse_variance):
    prior = linear_gaussian_vae(None, reverse_variance=reverse_variance).to(device).prior
    z = torch.randn(3, 2, dtype=torch.float64, device=device)
    for t in (0.3, 0.001, 1.0):
        exact(prior.denoise(z, t), prior.with_steps(7).denoise(z, t))
        eps = prior.denoiser.noise(z, t)
        alpha_bar = prior.schedule.log_snr_at(t).sigmoid()
        z_0 = (z - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        torch.testing.assert_close(prior.denoise(z, t), z_0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceKL_ELBO()])
@pytest.mark.parametrize("order", ["forward", "posterior", "reversed"])
def test_unrolling_is_refused(vae, x, elbo, order):
    vae.prior.order = order
    with one_line_value_error(r"use Timestep_ELBO, or prior.with_steps\(n\)"):
        elbo.loss(vae.model, vae.guide, x)
    vae.prior = vae.prior.with_steps(5)
    elbo.loss(vae.model, vae.guide, x)


@pytest.mark.parametrize("weighting", ["simple", "paper"])
def test_weightings_of_steps_are_refused(vae, x, weighting):
    with one_line_value_error("defined for a number of steps"):
        Reweighted(Timestep_ELBO(), weighting).loss(vae.model, vae.guide, x)


@pytest.mark.parametrize(
    "options, match",
    [
        (
            {"parameterization": "mu"},
            "a mean 'mu' and a learned .* have no limit, got .*'mu'",
        ),
        ({"reverse_variance": "learned"}, "have no limit, got .*and a Learned"),
        ({"schedule": Schedule([0.1])}, "num_timesteps must be a whole number >= 2"),
        ({"num_timesteps": 0}, "num_timesteps must be"),
    ],
    ids=str,
)
def test_what_has_no_limit_is_refused(options, match):
    with one_line_value_error(match):
        DiffusionPrior(2, **{"num_timesteps": None} | options)


def test_num_timesteps_and_the_schedule_agree():
    schedule = LinearSchedule(1000).in_continuous_time()
    assert make_schedule(schedule, None) is schedule
    assert make_schedule("cosine", None).num_timesteps == 1000
    with one_line_value_error("num_timesteps is 1000, but the schedule is in continuous time"):
        DiffusionPrior(2, 1000, schedule)
    with one_line_value_error("first must be between 0 and 1, got 1.5"):
        LinearSchedule(1000).in_continuous_time(first=1.5)


def test_evaluation_takes_a_time_in_each_cell(vae, x):
    terms = evaluate(vae, x)
    assert {"x", "z_s", "z_0", "-H[z_0]", "z_1000"} == terms.keys()
    total, exact_total = sum(terms.values()), ContinuousOracle(vae, x).negative_elbo.mean()
    assert abs(total - exact_total) < 10  # of a single latent per datum
    kl = kl_by_timestep(vae, x.repeat(500, 1))
    assert kl.shape == (1000,)
    expected = ContinuousOracle(vae, x).terms("x")
    expected = (expected["z_s"] + expected["z_0"]).mean()
    assert kl.sum() == pytest.approx(expected.item(), rel=0.05)


def test_a_time_is_shared_by_an_antithetic_pair(vae, x):
    elbo = Timestep_ELBO(k=4)
    guide = Antithetic(*elbo.mirrored_plates)(elbo.collapse(vae.guide))
    trace = pyro.poutine.trace(guide).get_trace(x)
    t = trace.nodes["t"]["value"]
    assert t.is_floating_point() and torch.equal(t[:2], t[2:])


def test_training_lowers_the_bound(device):
    # Two clusters: a standard normal is far from them.
    torch.manual_seed(0)
    prior = DiffusionPrior(1, None, backbone=ResidualMLP(1, width=32)).to(device)
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)
    z = (2 * torch.randint(0, 2, (256, 1), device=device) - 1.0) + 0.1 * torch.randn(256, 1).to(
        device
    )
    q, elbo = dist.Delta(z, event_dim=1), Timestep_ELBO(k=4)

    def program(run):
        with pyro.plate("data", len(z)):
            run()

    model, guide = lambda: program(prior.model), lambda: program(lambda: prior.guide(q))
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(elbo.loss_and_grads(model, guide) / len(z))
        optimizer.step()
    # -log p of N(0, 1) is 1.42 nats, the entropy -0.19.
    assert sum(losses[:5]) / 5 > 1.2 and sum(losses[-20:]) / 20 < 0.7
    samples = sample(prior.with_steps(50), 500)
    assert (samples.abs() > 0.6).float().mean() > 0.7
    assert math.isfinite(samples.sum())


def test_a_context_goes_through(device):
    # Each datum has its own: what is predicted is permuted with the contexts.
    prior = DiffusionPrior((2, 4, 4), None, context_features=3).to(device, torch.float64)
    for p in prior.parameters():
        nn.init.normal_(p, std=0.3)
    z = torch.randn(3, 2, 4, 4, dtype=torch.float64, device=device)
    c, t = torch.eye(3).to(z), torch.tensor([0.1, 0.5, 0.9]).to(z)
    eps = prior.denoiser.noise(z, t, c)
    for i in range(3):
        exact(eps[i], prior.denoiser.noise(z[i : i + 1], t[i], c[i : i + 1])[0])
    assert (eps - prior.denoiser.noise(z, t, c.flip(0))).abs().amax((1, 2, 3))[0] > 0.01
    q = dist.Normal(z, 1.0).to_event(3)
    torch.manual_seed(0)
    one = bound(prior, q, Timestep_ELBO(k=2), c)
    torch.manual_seed(0)
    other = bound(prior, q, Timestep_ELBO(k=2), c.flip(0))
    assert torch.isfinite(one).all() and (one - other).abs()[0] > 0.01
    assert sample(prior.with_steps(2), 3, c).shape == z.shape
