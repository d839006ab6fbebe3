r"""Samplers in the log-SNR, against flows in closed form, and the grids of their steps."""

from __future__ import annotations

import math

import pytest
import torch
from errors import one_line_value_error
from torch import nn

from pyro_vaediff import DiffusionPrior, GaussianPrior
from pyro_vaediff.denoise import PARAMETERIZATIONS
from pyro_vaediff.nn import ResidualMLP
from pyro_vaediff.priors import HierarchicalPrior
from pyro_vaediff.sampling import (
    GRIDS,
    SAMPLERS,
    AzulaDenoiser,
    ddim,
    dpm_solver,
    heun,
    log_snr_grid,
    num_evaluations,
    sample,
)
from pyro_vaediff.schedules import (
    CosineSchedule,
    LearnedSchedule,
    LinearSchedule,
    LogSNRSchedule,
    Schedule,
)

SOLVERS = {"ddim": ddim, "heun": heun, "dpm-solver": dpm_solver}
ORDERS = {"ddim": 1, "heun": 2, "dpm-solver": 2}
M, S = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, -0.5], [0.4, 1.3]))


def exact(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def noise(n, shape=(2,), like=None):
    r"""What a sampler draws first after ``torch.manual_seed(1)``."""
    torch.manual_seed(1)
    return torch.randn(n, *shape, dtype=torch.float64, device=like.device)


def draw(prior, sampler, num_steps, grid="log-snr", n=50, **kwargs):
    r"""The samples that start from :func:`noise`."""
    torch.manual_seed(1)
    return sample(prior, n, sampler=sampler, num_steps=num_steps, grid=grid, **kwargs)


def gaussian_prior(device, schedule):
    r"""A prior whose denoiser is exact for clean latents from N(M, S^2), at every time."""
    T = None if schedule.continuous else schedule.num_timesteps
    prior = DiffusionPrior(2, T, schedule, ResidualMLP(2, width=4), preconditioning=True).double()
    moments = prior.denoiser.preconditioning
    with torch.no_grad():
        moments.mean.copy_(M)
        moments.log_scale.copy_(S.log() / moments.gain)
    return prior.to(device)


def scales(log_snr):
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def gaussian_flow(z, log_snr_t, log_snr_s):
    r"""The solution of the probability flow: what is standardized stays the same."""
    (a, b), (c, d) = scales(log_snr_t), scales(log_snr_s)
    m, s = M.to(z), S.to(z)
    standard = (z - a * m) / (a**2 * s**2 + b**2).sqrt()
    return c * m + (c**2 * s**2 + d**2).sqrt() * standard


def gaussian_mean(z, log_snr):
    r"""E[z_0 | z_t], by precisions."""
    a, b = scales(log_snr)
    m, s = M.to(z), S.to(z)
    return (m / s**2 + a / b**2 * z) / (1 / s**2 + a**2 / b**2)


# --- Gaussian latents: a flow in closed form ------------------------------------------------------

NOISY = LogSNRSchedule(lambda t: 9 - 15 * t, 100).starting_at(6.0)
CLEAN = LogSNRSchedule(lambda t: 4 - 8 * t, 4)  # a first step that is not small


def errors(prior, sampler, grid, expected, steps=(40, 80)):
    return [(draw(prior, sampler, n, grid) - expected).abs().max().item() for n in steps]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sampler", SOLVERS)
def test_order_of_convergence(device, sampler, grid):
    prior = gaussian_prior(device, NOISY)
    ends = prior.schedule.original("log_snr")[[-1, 0]]
    expected = gaussian_flow(noise(50, like=prior.origin), *ends)
    coarse, fine = errors(prior, sampler, grid, expected)
    assert fine < {1: 0.1, 2: 0.005}[ORDERS[sampler]]
    assert abs(math.log2(coarse / fine) - ORDERS[sampler]) < 0.2


def own_paths():
    r"""A learned path for each dimension."""
    schedule = LearnedSchedule((2,), num_timesteps=20)
    with torch.no_grad():
        schedule.function.low.copy_(torch.tensor([-6.0, -8.0]))
        schedule.function.width.copy_(torch.tensor([9.0, 10.0]))
        schedule.function.weight[0] += 3.0
    return schedule


@pytest.mark.parametrize("path", ["shared", "own"])
@pytest.mark.parametrize("grid", ["log-snr", "karras"])
@pytest.mark.parametrize("sampler", SOLVERS)
def test_the_last_step_to_clean_latents(device, sampler, grid, path):
    # These grids have the first positive time of the prior's: the rest of the flow converges.
    prior = gaussian_prior(device, CLEAN if path == "shared" else own_paths())
    first, last = prior.chain.schedule.original("log_snr")[[1, -1]].to(device)
    z_1 = gaussian_flow(noise(50, like=prior.origin), last, first)
    expected = z_0 = gaussian_mean(z_1, first)
    if sampler == "heun":
        ratio, (alpha, _) = torch.exp(-first / 2), scales(first)
        expected = z_1 - ratio.asinh() / ratio * (alpha * z_1 - z_0)
        assert (expected - z_0).abs().max() > 1e-3
    coarse, fine = errors(prior, sampler, grid, expected)
    assert fine < {1: 0.1, 2: 0.002}[ORDERS[sampler]]
    assert abs(math.log2(coarse / fine) - ORDERS[sampler]) < 0.2


def test_the_last_step_of_the_program_adds_noise(device):
    prior, z = gaussian_prior(device, CLEAN), noise(9, like=torch.zeros((), device=device))
    p = prior.reverse(z, 1)
    first = prior.schedule.original("log_snr")[1]
    exact(p.mean, gaussian_mean(z, first))
    exact(prior.denoise(z, 1), p.mean)
    assert (p.stddev > 0.1).all()


@pytest.mark.parametrize("num_steps", [1, 3, 10])
@pytest.mark.parametrize("schedule", [LinearSchedule(1000), NOISY], ids=["clean", "noisy"])
def test_heun_is_exact_for_a_standard_normal(device, schedule, num_steps):
    prior = DiffusionPrior(2, schedule.num_timesteps, schedule).double().to(device)
    exact(draw(prior, "heun", num_steps, "time"), noise(50, like=prior.origin))


# --- A mixture of two Gaussians: a flow that keeps the distribution function ----------------------


class MixtureMean(nn.Module):
    r"""E[z_0 | z_t] of two Gaussians, for ``parameterization="z0"``: less sqrt(abar) z_t."""

    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([-1.5, 1.0], dtype=torch.float64)
    scales = torch.tensor([0.3, 0.5], dtype=torch.float64)

    def __init__(self):
        super().__init__()
        self.dtype = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def parts(self, z, alpha, sigma):
        w, m, s = (x.to(z) for x in (self.weights, self.means, self.scales))
        return w, torch.distributions.Normal(alpha * m, (alpha**2 * s**2 + sigma**2).sqrt())

    def cdf(self, z, log_snr):
        w, normal = self.parts(z, *scales(log_snr.to(z)))
        return (w * normal.cdf(z)).sum(-1)

    def forward(self, z, log_snr):
        alpha, sigma = (x.unsqueeze(-1) for x in scales(log_snr))
        w, normal = self.parts(z, alpha, sigma)
        of_part = (w.log() + normal.log_prob(z)).softmax(-1)
        s2 = self.scales.to(z).square()
        mean = self.means.to(z) + alpha * s2 / normal.variance * (z - normal.mean)
        return (of_part * mean).sum(-1, keepdim=True) - alpha * z


@pytest.mark.parametrize("sampler, atol", [("ddim", 0.03), ("heun", 5e-4), ("dpm-solver", 5e-4)])
def test_the_flow_of_a_mixture_keeps_the_distribution_function(device, sampler, atol):
    net = MixtureMean()
    prior = DiffusionPrior(1, 100, NOISY, net, parameterization="z0").double().to(device)
    log_snr = prior.schedule.original("log_snr")
    z_T, z_0 = noise(200, (1,), prior.origin), draw(prior, sampler, 100, n=200)
    exact(net.cdf(z_0, log_snr[0]), net.cdf(z_T, log_snr[-1]), atol)
    assert ((z_0 > 0).double().mean() - 0.7).abs() < 0.15


# --- DDIM with noise is the program with the variances beta_tilde ---------------------------------


@pytest.mark.parametrize("schedule", [LinearSchedule(12), NOISY], ids=["clean", "noisy"])
@pytest.mark.parametrize("grid", GRIDS)
def test_ddim_with_eta_1_on_any_grid(device, monkeypatch, schedule, grid):
    torch.manual_seed(2)
    T = schedule.num_timesteps
    prior = DiffusionPrior(2, T, schedule, reverse_variance="beta_tilde")
    nn.init.normal_(prior.denoiser.backbone.outputs.weight, std=0.1)
    prior = prior.double().to(device)
    few = prior.with_steps(GRIDS[grid](prior, 5))
    xi = noise(5 * 7, like=prior.origin).reshape(5, 7, 2)
    draws = iter(xi)
    monkeypatch.setattr(torch, "randn_like", lambda z: next(draws))
    torch.manual_seed(1)
    z_0 = ddim(prior, 7, 5, eta=1.0, grid=grid)
    monkeypatch.undo()
    z = noise(7, like=prior.origin)
    with torch.no_grad():
        for t in range(5, 0, -1):
            p = few.reverse(z, t)
            # The last step to clean latents is E[z_0 | z_1]; beta_tilde_1 = 0 is no density.
            clean = t == 1 and few.schedule.log_snr[0].isinf()
            z = p.mean if clean else p.mean + p.stddev * xi[5 - t]
    exact(z_0, z)


# --- One interface --------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [LinearSchedule(20), NOISY], ids=["clean", "noisy"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_number_of_evaluations(device, sampler, schedule):
    net = ResidualMLP(2, width=4)
    prior = DiffusionPrior(2, schedule.num_timesteps, schedule, net).to(device)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    for num_steps in (1, 2, 7, None):
        calls.clear()
        z = sample(prior, 3, sampler=sampler, num_steps=num_steps)
        assert z.shape == (3, 2) and z.dtype == torch.float32 and not z.requires_grad
        assert len(calls) == num_evaluations(prior, sampler, num_steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_those_of_the_seed_and_of_the_prior_on_that_grid(device, sampler):
    prior = gaussian_prior(device, LinearSchedule(20))
    z = draw(prior, sampler, 6)
    assert torch.equal(z, draw(prior, sampler, 6))
    assert not torch.equal(z, draw(prior, sampler, 6, "time"))
    assert torch.equal(z, draw(prior.with_steps(log_snr_grid(prior, 6)), sampler, None))


def test_samplers_are_for_diffusion_priors():
    hierarchy = HierarchicalPrior([GaussianPrior(2)], [nn.Identity()], 2)
    prior = DiffusionPrior(2, 10)
    for call, match in {
        (lambda: sample(hierarchy, 1, sampler="heun")): "got HierarchicalPrior: use sample with",
        (lambda: sample(GaussianPrior(2), 1, sampler="ddim")): "must be a DiffusionPrior, got Gau",
        (lambda: AzulaDenoiser(GaussianPrior(2))): "must be a DiffusionPrior, got GaussianPrior",
        (lambda: sample(prior, 1, sampler="euler")): "unknown sampler 'euler': choose one of anc",
        (lambda: sample(prior, 1, num_steps=5, grid="?")): r"unknown grid '\?': choose one of time",
        (lambda: num_evaluations(prior, "euler")): "unknown sampler 'euler'",
        (lambda: heun(prior, 0)): "num_samples must be a whole number >= 1, got 0",
        (lambda: dpm_solver(prior, 1, 0)): "num_steps must be a whole number >= 1, got 0",
        (lambda: log_snr_grid(prior, 2.5)): "num_steps must be a whole number >= 1, got 2.5",
    }.items():
        with one_line_value_error(match):
            call()


# --- Grids, and the denoiser between the times of its own -----------------------------------------

SCHEDULES = {
    "linear": LinearSchedule(1000),
    "cosine": CosineSchedule(50),
    "betas": Schedule(torch.linspace(0.05, 0.6, 5, dtype=torch.float64)),
    "noisy": NOISY,
    "one step": LinearSchedule(1),
}
COORDINATES = {
    "time": lambda times, log_snr: times,
    "log-snr": lambda times, log_snr: -log_snr,
    "karras": lambda times, log_snr: torch.exp(-log_snr / 14),
}


@pytest.mark.parametrize("num_steps", [1, 2, 9])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("grid", GRIDS)
def test_steps_of_a_grid_are_equal(name, grid, num_steps):
    schedule = SCHEDULES[name]
    prior = DiffusionPrior(1, schedule.num_timesteps, schedule, ResidualMLP(1, width=4))
    if name == "one step" and grid != "time" and num_steps > 1:
        return  # there is no log-SNR before the last one
    few = prior.with_steps(GRIDS[grid](prior, num_steps)).schedule
    assert few.num_timesteps == num_steps and few.start == schedule.start
    skip = int(grid != "time" and few.original("log_snr")[0].isinf())
    x = COORDINATES[grid](few.original("times"), few.original("log_snr"))[skip:].diff()
    assert ((x / x.mean() - 1).abs() < 1e-9).all()
    if skip and num_steps > 1:
        exact(few.original("times")[1], schedule.original("times")[1])


@pytest.mark.parametrize("variance", ["beta", "beta_tilde", "learned"])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_denoise_on_another_grid_is_that_between_times(device, parameterization, variance):
    num_outputs = 2 if variance == "learned" else 1
    net = ResidualMLP((2, 1, 3), num_outputs=num_outputs, width=4, context_features=2)
    prior = DiffusionPrior(
        (2, 1, 3),
        10,
        backbone=net,
        parameterization=parameterization,
        reverse_variance=variance,
        context_features=2,
    )
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.3)
    prior = prior.double().to(device)
    few = prior.with_steps(7)
    z, c = noise(4, (2, 1, 3), prior.origin), noise(4, like=prior.origin)
    for i, t in enumerate(few.schedule.original("times").tolist()[1:], start=1):
        at_index = few.denoise(z, i, c)
        exact(at_index, prior.denoise(z, t, c))
        exact(at_index, prior.denoise(z, torch.full((4,), t, dtype=torch.float64).to(z), c))


@pytest.mark.parametrize("name", ["linear", "betas", "noisy"])
def test_denoise_between_times_is_exact_for_gaussians(device, name):
    prior = gaussian_prior(device, SCHEDULES[name])
    z = noise(5, like=prior.origin)
    for share in (0.0004, 0.05, 0.33, 0.777, 1.0):
        t = prior.schedule.start + (1 - prior.schedule.start) * share
        exact(prior.denoise(z, t), gaussian_mean(z, prior.schedule.log_snr_at(t)))


# --- azula ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_that_of_azula(device, eta):
    samplers = pytest.importorskip("azula.sample")
    torch.manual_seed(2)
    prior = DiffusionPrior((3, 1), 20, context_features=2, backbone=None)
    nn.init.normal_(prior.denoiser.backbone.outputs.weight, std=0.3)
    prior = prior.double().to(device)
    c = noise(6, like=prior.origin)
    torch.manual_seed(1)
    expected = ddim(prior, 6, 8, eta, c)
    sampler = samplers.DDIMSampler(
        AzulaDenoiser(prior), eta=eta, steps=8, silent=True, dtype=torch.float64
    )
    z_T = noise(6, (3, 1), prior.origin)
    exact(sampler(z_T, c=c), expected)


@pytest.mark.parametrize(
    "name, reference", [("HeunSampler", "heun"), ("xEABSampler", "dpm-solver")]
)
def test_samplers_of_azula_have_the_same_limit(device, name, reference):
    samplers = pytest.importorskip("azula.sample")
    prior = gaussian_prior(device, NOISY)
    sampler = getattr(samplers, name)(
        AzulaDenoiser(prior), stop=prior.schedule.start, steps=200, silent=True, dtype=torch.float64
    )
    z = noise(50, like=prior.origin)
    exact(sampler(z), draw(prior, reference, 200, "time"), 1e-3)
    exact(sampler(z), gaussian_flow(z, *prior.schedule.original("log_snr")[[-1, 0]]), 1e-3)
