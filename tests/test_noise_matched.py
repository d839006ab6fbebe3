r"""Encoders with the noise of the diffusion path, and chains that start on it."""

from __future__ import annotations

import pytest
import torch
from errors import one_line_value_error
from pyro.infer import Trace_ELBO
from unbiased import assert_unbiased, draws, exact_values

from pyro_vaediff import VAE, DiffusionPrior, Timestep_ELBO, TraceKL_ELBO
from pyro_vaediff.diffusion import q_marginal, q_reverse
from pyro_vaediff.infer import elbo_terms
from pyro_vaediff.nn import NoiseMatched, ResidualMLP, TimeAdapter
from pyro_vaediff.sampling import ddim, sample
from pyro_vaediff.sampling.probability_flow import ProbabilityFlow
from pyro_vaediff.schedules import CosineSchedule, LinearSchedule, LogSNRSchedule, Schedule
from pyro_vaediff.testing import LinearDenoiser, LinearGaussian, exact_elbo

SCHEDULES = [
    LinearSchedule(8),
    CosineSchedule(6),
    Schedule(torch.linspace(0.05, 0.6, 5, dtype=torch.float64)),
    LogSNRSchedule(lambda t: 9 - 15 * t, 5),
]


def exact(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.fixture
def x(device):
    torch.manual_seed(1)
    return torch.randn(2, 3, dtype=torch.float64, device=device)


def linear_vae(variance="beta_tilde", parameterization="eps", log_snr=1.0, T=3):
    torch.manual_seed(0)
    path = Schedule(torch.linspace(0.1, 0.6, T, dtype=torch.float64))
    schedule = path.starting_at(log_snr)
    net = LinearDenoiser(2, T, variance == "learned")
    prior = DiffusionPrior(
        2, T, schedule, TimeAdapter(net, schedule, "index"), parameterization, variance,
        order="reversed",
    )  # fmt: skip
    encoder = NoiseMatched(LinearGaussian(3, 2, log_scale=0.0), log_snr)
    return VAE(encoder, LinearGaussian(2, 3, log_scale=0.0), prior).double()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_a_chain_that_starts_on_the_path(schedule):
    schedule = schedule.double()
    late = schedule.starting_at(1.0)
    assert late.num_timesteps == schedule.num_timesteps and late.times[-1] == 1
    assert late.log_snr[0].item() == pytest.approx(1.0, abs=1e-9)
    # The chain is relative to its start; log-SNRs are those of the path.
    alpha_bar = torch.sigmoid(late.log_snr)
    exact(late.alphas_cumprod, alpha_bar / alpha_bar[0])
    exact(late.one_minus_alphas_cumprod, 1 - alpha_bar / alpha_bar[0])
    exact(late.signal(late.times[2], 0)[0], late.alphas_cumprod[2])
    exact(late(late.times), late.log_snr, atol=1e-9)
    again = late.with_steps(3)
    assert again.start == late.start and again.num_timesteps == 3
    exact(again.alphas_cumprod[-1], late.alphas_cumprod[-1])
    with one_line_value_error("steps must be a number or times from 0"):
        late.with_steps(torch.tensor([0.0, 0.5, 1.0]))


@pytest.mark.parametrize("log_snr", [-50.0, float("nan"), float("inf")])
def test_starts_that_are_refused(log_snr):
    with one_line_value_error("log_snr must be finite and above that of the last time"):
        LinearSchedule(10).starting_at(log_snr)


def test_the_posterior_is_on_the_path(x):
    vae = linear_vae().to(x.device)
    q, schedule, clean = vae.encoder(x), vae.prior.schedule, vae.encoder.encoder(x).mean
    alpha_bar = torch.sigmoid(schedule.log_snr)
    for t in range(4):
        q_t = q_marginal(schedule, q, t)
        exact(q_t.mean, alpha_bar[t].sqrt() * clean)
        exact(q_t.variance, (1 - alpha_bar[t]).expand(2, 2))
    z = torch.randn(2, 2, dtype=torch.float64, device=x.device)
    for t in range(1, 4):
        # Bayes' rule, for a clean point on the path
        beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
        variance = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta
        exact(q_reverse(schedule, q, z, t).variance, variance.expand(2, 2))


@pytest.mark.parametrize("parameterization", ["eps", "z0", "mu", "v"])
def test_each_kl_is_a_weighted_square_of_the_clean_latents(x, parameterization):
    vae = linear_vae(parameterization=parameterization).to(x.device)
    prior, q, clean = vae.prior, vae.encoder(x), vae.encoder.encoder(x).mean
    snr = prior.schedule.log_snr.exp()
    z = torch.randn(2, 2, dtype=torch.float64, device=x.device)
    for t in range(1, 4):
        q_s, p_s = q_reverse(prior.schedule, q, z, t), prior.reverse(z, t)
        kl = torch.distributions.kl_divergence(q_s, p_s)
        squares = (clean - prior.denoise(z, t)).square().sum(-1)
        exact(kl, (snr[t - 1] - snr[t]) / 2 * squares)


ESTIMATORS = {
    "Trace_ELBO": Trace_ELBO,
    "TraceKL_ELBO": TraceKL_ELBO,
    "all": lambda: Timestep_ELBO("all"),
    "all, given x": lambda: Timestep_ELBO("all", conditioning="x"),
    "importance": lambda: Timestep_ELBO(k=2),
    "importance, given x": lambda: Timestep_ELBO(k=2, conditioning="x"),
}


@pytest.mark.parametrize(
    "name, variance",
    [*((n, "beta_tilde") for n in ESTIMATORS), ("all", "beta"), ("all", "learned")],
)
def test_estimators_are_unbiased(x, name, variance):
    vae = linear_vae(variance).to(x.device)
    truth = exact_values(vae, -exact_elbo(vae.model, vae.guide, x))
    assert_unbiased(draws(ESTIMATORS[name](), vae, x), truth, target=0.05)


def test_the_bound_given_x_has_neither_an_entropy_nor_a_constant(x):
    vae = linear_vae().to(x.device)
    terms = elbo_terms(vae.model, vae.guide, x, elbo=Timestep_ELBO("all", conditioning="x"))
    assert list(terms) == ["z_3", "z_s", "z_0", "x"]
    assert (terms["z_0"] > 0).all()


def gaussian_prior(shift=1.0, log_snr=1.0, T=50):
    r"""A prior that is exact for clean latents from N(m, s^2)."""
    schedule = LinearSchedule(T).starting_at(log_snr)
    prior = DiffusionPrior(
        2, T, schedule, ResidualMLP(2, width=4), reverse_variance="beta_tilde", preconditioning=True
    ).double()
    moments = prior.denoiser.preconditioning
    with torch.no_grad():
        moments.mean.copy_(shift * torch.tensor([1.0, -0.5]))
        moments.log_scale.copy_(torch.tensor([0.5, 1.5]).log() / moments.gain)
    alpha_bar = torch.sigmoid(torch.tensor(log_snr, dtype=torch.float64))
    variance = alpha_bar * moments.scale.square() + 1 - alpha_bar
    return prior, alpha_bar.sqrt() * moments.mean.detach(), variance.detach()


def test_samples_are_those_of_the_noisy_latents():
    prior, mean, variance = gaussian_prior()
    torch.manual_seed(0)
    for z in (sample(prior, 5000), ddim(prior, 5000, 50), ddim(prior, 5000, 50, eta=1.0)):
        se = (variance / len(z)).sqrt()
        assert ((z.mean(0) - mean).abs() < 5 * se + 0.01).all()
        assert ((z.var(0) / variance - 1).abs() < 5 * (2 / len(z)) ** 0.5 + 0.03).all()


def test_the_density_of_the_flow_is_that_of_the_noisy_latents():
    # Centered, as the flow takes z_T for N(0, I), where 0.6 % of the mean are left.
    prior, mean, variance = gaussian_prior(shift=0.0)
    flow = ProbabilityFlow(prior, 50)
    z = mean + torch.randn(5, 2, dtype=torch.float64)
    normal = torch.distributions.Normal(mean, variance.sqrt())
    exact(flow.log_prob(z), normal.log_prob(z).sum(-1), atol=2e-3)
