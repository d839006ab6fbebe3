r"""The probability flow: normalized at any number of steps, and the law of data that are known."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from test_samplers import gaussian_data, gaussian_prior, shaped_priors
from torch import nn

from pyro_vaediff import DiffusionPrior, GaussianPrior
from pyro_vaediff.nn import TimeAdapter, make_backbone
from pyro_vaediff.sampling import ProbabilityFlow
from pyro_vaediff.schedules import LinearSchedule, Schedule


class Random(nn.Module):
    r"""A smooth random network, whose Lipschitz constant is about 1."""

    def __init__(self, latent_dim, num_timesteps, num_outputs=1):
        super().__init__()
        self.num_outputs = num_outputs
        self.first, self.last = nn.Linear(latent_dim, 8), nn.Linear(8, num_outputs * latent_dim)
        with torch.no_grad():
            self.last.weight *= 0.5
        self.shift = nn.Parameter(torch.linspace(-1, 1, num_timesteps + 1))

    def forward(self, z, t):
        out = self.last(torch.sin(2 * self.first(z) + self.shift[t].unsqueeze(-1)))
        return out if self.num_outputs == 1 else out.chunk(2, -1)


def random_prior(device, latent_dim=2, T=20, reverse_variance="beta"):
    network = Random(latent_dim, T, 2 if reverse_variance == "learned" else 1)
    # So short that even a single step of the flow, of length 1.2, is contracting.
    schedule = Schedule(torch.linspace(0.02, 0.1, T))
    backbone = TimeAdapter(network, schedule, "index")
    prior = DiffusionPrior(latent_dim, T, schedule, backbone, reverse_variance=reverse_variance)
    return prior.double().to(device).requires_grad_(False)


class MixtureDenoiser(nn.Module):
    r"""E[z_0 | z_t] of an equal mixture of N(m_k, s^2 I), less what is linear in z_t."""

    def __init__(self, locs, scale):
        super().__init__()
        self.register_buffer("locs", locs)
        self.variance = scale**2

    def forward(self, z, log_snr):
        alpha_bar, noise = (torch.sigmoid(x).reshape(-1, 1, 1) for x in (log_snr, -log_snr))
        v = alpha_bar * self.variance + noise
        residual = z.unsqueeze(-2) - alpha_bar.sqrt() * self.locs
        weights = (-residual.square().sum(-1, keepdim=True) / (2 * v)).softmax(-2)
        means = self.locs + alpha_bar.sqrt() * self.variance / v * residual
        return (weights * means).sum(-2) - alpha_bar.sqrt().squeeze(-1) * z


def mixture(device, scale):
    r"""Returns a prior with the best denoiser for a mixture, and the mixture."""
    # Its last variances are so large that it ends in N(0, I) up to 1e-6.
    schedule = LinearSchedule(1000, beta_max=0.05)
    locs = [[1.0, 0.5], [-0.5, 0.3], [0.0, -1.0]]
    locs = torch.tensor(locs, dtype=torch.float64, device=device)
    prior = DiffusionPrior(2, 1000, schedule, MixtureDenoiser(locs, scale), parameterization="z0")
    components = dist.Normal(locs, torch.full_like(locs, scale)).to_event(1)
    law = dist.MixtureSameFamily(dist.Categorical(torch.ones_like(locs[:, 0])), components)
    return prior.double().to(device), law


# --- What is exact --------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("parameterization", ["eps", "z0", "mu", "v"])
def test_a_prior_at_its_start_is_a_standard_normal(device, schedule, parameterization):
    prior = DiffusionPrior(5, 1000, schedule, parameterization=parameterization).to(device)
    z_0 = 2 * torch.randn(7, 5, device=device)
    for dtype, atol in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        with torch.no_grad():
            log_prob = ProbabilityFlow(prior.to(dtype), num_steps=10).log_prob(z_0.to(dtype))
        expected = prior.standard_normal().log_prob(z_0.to(dtype))
        torch.testing.assert_close(log_prob, expected, atol=atol, rtol=0)


def test_the_velocity_is_the_output_of_a_network_that_predicts_noise(device):
    prior = random_prior(device)
    z = torch.randn(7, 2, dtype=torch.float64, device=device)
    for t in (1, 10, 20):
        expected = prior.denoiser.network(z, t)[0]
        velocity = ProbabilityFlow(prior).velocity(z, t)
        torch.testing.assert_close(velocity, expected, atol=1e-10, rtol=0)
    assert (ProbabilityFlow(prior).velocity(z, 0) == 0).all()


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("num_steps", [1, 3, 20])
@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde", "learned"])
def test_the_density_is_normalized(device, latent_dim, num_steps, reverse_variance):
    # The trapezoidal rule converges faster than any power of its step for such a density.
    flow = ProbabilityFlow(random_prior(device, latent_dim, 20, reverse_variance), num_steps)
    axis = torch.linspace(-12, 12, 181, dtype=torch.float64, device=device)
    grid = torch.cartesian_prod(*[axis] * latent_dim).reshape(-1, latent_dim)
    log_prob = flow.log_prob(grid)
    assert (log_prob - flow.prior.standard_normal().log_prob(grid)).abs().max() > 0.1
    total = (log_prob.exp().sum() * (axis[1] - axis[0]) ** latent_dim).item()
    assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("num_steps", [1, 5, 20])
def test_samples_have_that_density(device, num_steps):
    # E_p[q(z) / p(z)] = 1 for any density q, here a narrow one beside the centre.
    flow = ProbabilityFlow(random_prior(device), num_steps)
    z_0 = flow.sample((20_000,))
    loc = torch.tensor([0.5, -0.3], dtype=torch.float64, device=device)
    q = dist.Normal(loc, torch.full_like(loc, 0.6)).to_event(1)
    ratio = (q.log_prob(z_0) - flow.log_prob(z_0)).exp()
    se = ratio.std() / len(ratio) ** 0.5
    assert se < 0.02
    assert (ratio.mean() - 1).abs() < 5 * se


def test_the_noise_of_latents_gives_them_back(device):
    flow = ProbabilityFlow(random_prior(device), num_steps=7)
    z_0 = torch.randn(3, 5, 2, dtype=torch.float64, device=device)
    z_T, log_det = flow.encode(z_0)
    assert (z_T.shape, log_det.shape) == ((3, 5, 2), (3, 5))
    assert (z_T - z_0).abs().max() > 0.1
    torch.testing.assert_close(flow.decode(z_T), z_0, atol=1e-10, rtol=0)
    # The volume ratio, from central differences.
    steps = 1e-5 * torch.eye(2, dtype=torch.float64, device=device)
    columns = [(flow.encode(z_0 + e)[0] - flow.encode(z_0 - e)[0]) / 2e-5 for e in steps]
    numerical = torch.linalg.slogdet(torch.stack(columns, -1)).logabsdet
    torch.testing.assert_close(log_det, numerical, atol=1e-7, rtol=0)


def test_single_precision_is_exact_to_a_hundredth_of_a_nat(device):
    # At the size of the public benchmark: D = 40, the default network, and Jacobians of order one.
    prior = DiffusionPrior(40, 1000, preconditioning=True).requires_grad_(False).to(device)
    for parameter in prior.denoiser.backbone.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    z_0 = 1.5 * torch.randn(20, 40, device=device)
    values = [
        ProbabilityFlow(prior.to(z.dtype), num_steps=10).log_prob(z) for z in (z_0, z_0.double())
    ]
    assert (values[1] - prior.standard_normal().log_prob(z_0)).abs().min() > 0.1
    torch.testing.assert_close(values[0].double(), values[1], atol=0.01, rtol=0)


# --- The limit of many steps ----------------------------------------------------------------------


def test_gaussian_data(device):
    # With the best denoiser for N(m, S) the flow is affine, and its law known for any abar_T.
    prior, (m, S) = gaussian_prior(device, 1000), gaussian_data(device)
    alpha_bar, eye = prior.schedule.alphas_cumprod[-1], torch.eye(2).to(S)
    values, vectors = torch.linalg.eigh(S)
    gain = (values / (alpha_bar * values + 1 - alpha_bar)).sqrt()
    matrix = vectors @ gain.diag() @ vectors.mT
    law = dist.MultivariateNormal(m - alpha_bar.sqrt() * matrix @ m, matrix @ eye @ matrix.mT)
    z_0 = law.sample((200,))
    errors = []
    for num_steps in (25, 50, 100, 200):
        error = ProbabilityFlow(prior, num_steps).log_prob(z_0) - law.log_prob(z_0)
        errors.append(error.abs().max().item())
    assert errors[-1] < 5e-4
    for error, halved in itertools.pairwise(errors):
        assert 3.5 < error / halved < 4.5, errors  # second order


@pytest.mark.parametrize(("scale", "target"), [(0.5, 2e-3), (0.1, 0.1)])
def test_a_mixture_of_gaussians(device, scale, target):
    prior, law = mixture(device, scale)
    z_0 = law.sample((100,))
    errors = []
    for num_steps in (50, 100, 200):
        error = ProbabilityFlow(prior, num_steps).log_prob(z_0) - law.log_prob(z_0)
        errors.append(error.square().mean().sqrt().item())
    assert errors[0] < target, errors
    for error, halved in itertools.pairwise(errors):
        assert 3 < error / halved < 5, errors


def test_samples_of_a_mixture_of_gaussians(device):
    prior, _ = mixture(device, 0.5)
    z_0 = ProbabilityFlow(prior).sample((10_000,))
    locs = prior.denoiser.backbone.locs
    cov = locs.mT.cov(correction=0) + 0.25 * torch.eye(2).to(locs)
    centered = z_0 - locs.mean(0)
    second = centered.unsqueeze(-1) * centered.unsqueeze(-2)
    for values, exact in ((centered, 0 * locs[0]), (second, cov)):
        se = values.std(0) / len(values) ** 0.5
        assert (se < 0.015).all()
        assert ((values.mean(0) - exact).abs() < 5 * se + 1e-3).all()


# --- Gradients ------------------------------------------------------------------------------------


def test_gradients_are_those_of_differences(device):
    # First and second ones, with respect to latents and to parameters, of densities and samples.
    flow = ProbabilityFlow(random_prior(device, T=5).requires_grad_(True), num_steps=3)
    z = torch.randn(2, 2, dtype=torch.float64, device=device, requires_grad=True)
    # The parameters are perturbed in place.
    inputs = z, *flow.prior.parameters()
    for fn in (lambda z, *_: flow.log_prob(z), lambda z, *_: flow.decode(z)):
        assert torch.autograd.gradcheck(fn, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(fn, inputs, fast_mode=True)


def test_without_gradients_the_numbers_are_the_same(device):
    flow = ProbabilityFlow(random_prior(device).requires_grad_(True), num_steps=5)
    z_0 = torch.randn(7, 2, dtype=torch.float64, device=device)
    log_prob, z_T = flow.log_prob(z_0), flow.decode(z_0)
    assert log_prob.requires_grad and z_T.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(flow.log_prob(z_0), log_prob, atol=1e-10, rtol=0)
        torch.testing.assert_close(flow.decode(z_0), z_T, atol=1e-10, rtol=0)
        assert not flow.log_prob(z_0).requires_grad
    assert not flow.sample().requires_grad and flow.rsample().requires_grad


def test_it_is_a_prior_of_somebodys_model(device):
    # The prior starts at N(0, I). With y ~ N(z, I) at y = (2, 2), the posterior is N(1, I / 2).
    backbone = make_backbone("mlp", (2,), schedule := LinearSchedule(4), width=8)
    prior = DiffusionPrior(2, 4, schedule, backbone).to(device).requires_grad_(False)
    p_z = ProbabilityFlow(prior, num_steps=1)
    y = torch.full((2,), 2.0, device=device)

    def model():
        pyro.sample("y", dist.Normal(pyro.sample("z", p_z), 1.0).to_event(1), obs=y)

    start = init_to_value(values={"z": torch.zeros(2, device=device)})
    for make, steps in ((AutoDelta, 150), (AutoNormal, 150)):
        guide = make(model, init_loc_fn=start)
        options = {"optim_args": {"lr": 0.15}, "gamma": 0.01 ** (1 / steps)}
        optimizer = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam} | options)
        svi = SVI(model, guide, optimizer, TraceMeanField_ELBO())
        for _ in range(steps):
            svi.step()
            optimizer.step()
        z = guide.median()["z"]
        target = 0.02 if make is AutoDelta else 0.15
        torch.testing.assert_close(z, torch.ones_like(y), atol=target, rtol=0)
        if make is AutoNormal:
            sd = guide.quantiles([0.841345])["z"][0] - z
            torch.testing.assert_close(sd, torch.full_like(y, 0.5**0.5), atol=0.1, rtol=0)
        pyro.clear_param_store()


# --- Events of any shape, and context -------------------------------------------------------------


@pytest.mark.parametrize("context", [False, True])
def test_events_of_another_shape_and_a_context(device, context):
    flat, shaped = (p.requires_grad_(False) for p in shaped_priors(device, context))
    c = torch.tensor([[0.0, 1.0]]).to(flat.origin).expand(5, 2) if context else None
    flow, other = ProbabilityFlow(flat, 4), ProbabilityFlow(shaped, 4, chunk_size=6, c=c)
    assert (other.batch_shape, other.event_shape) == ((5,) if context else (), (1, 2, 1))
    z = torch.randn(3, 5, 2, dtype=torch.float64, device=device)
    expected, of_shaped = flow.log_prob(z), z.unsqueeze(-1).unsqueeze(-3)
    torch.testing.assert_close(other.log_prob(of_shaped), expected, atol=1e-10, rtol=0)
    z_0 = other.decode(other.encode(of_shaped)[0])
    torch.testing.assert_close(z_0, of_shaped, atol=1e-10, rtol=0)
    with pyro.plate("data", 5), pyro.poutine.trace() as capture:
        z_0 = pyro.sample("z_0", other)
    capture.trace.compute_log_prob()
    assert (z_0.shape, capture.trace.nodes["z_0"]["log_prob"].shape) == ((5, 1, 2, 1), (5,))
    if context:
        flipped = ProbabilityFlow(shaped, 4, c=c.flip(1)).log_prob(of_shaped)
        assert (flipped - expected).abs().max() > 0.1


# --- The distribution -----------------------------------------------------------------------------


def test_chunks_change_nothing_but_the_memory(device):
    prior = random_prior(device)
    z_0 = torch.randn(9, 2, dtype=torch.float64, device=device)
    expected = ProbabilityFlow(prior).log_prob(z_0)
    for chunk_size in (1, 5):
        flow = ProbabilityFlow(prior, chunk_size=chunk_size)
        torch.testing.assert_close(flow.log_prob(z_0), expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(flow.decode(flow.encode(z_0)[0]), z_0, atol=1e-10, rtol=0)
    assert flow.log_prob(z_0[0]).shape == ()


def test_it_is_a_distribution_for_programs(device):
    flow = ProbabilityFlow(random_prior(device))
    assert (flow.batch_shape, flow.event_shape) == ((), (2,))
    assert flow.sample().shape == (2,)
    with pyro.plate("data", 3), pyro.poutine.trace() as capture:
        z_0 = pyro.sample("z_0", flow)
    capture.trace.compute_log_prob()
    assert z_0.shape == (3, 2)
    log_prob = capture.trace.nodes["z_0"]["log_prob"]
    torch.testing.assert_close(log_prob, flow.log_prob(z_0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("T", [1, 2, 7, 1000])
def test_times_rise_from_0_to_T(T):
    for num_steps in {1, min(2, T), (T + 1) // 2, T}:
        times = ProbabilityFlow(DiffusionPrior(1, T), num_steps).times
        assert (times[0], times[-1], len(times)) == (0, T, num_steps + 1)
        assert all(t < u for t, u in itertools.pairwise(times))
        assert num_steps < T or times == list(range(T + 1))


def test_times_are_the_nearest_whole_numbers():
    # 10 (i / 4)^1.5 is 0, 1.25, 3.54, 6.495 and 10.
    assert ProbabilityFlow(DiffusionPrior(1, 10), 4).times == [0, 1, 4, 6, 10]


# --- Errors ---------------------------------------------------------------------------------------


def test_other_priors_are_an_error():
    with one_line_value_error("prior must be a DiffusionPrior, got GaussianPrior: use sample"):
        ProbabilityFlow(GaussianPrior(2))


@pytest.mark.parametrize("num_steps", [0, 21, 2.5])
def test_the_number_of_steps_is_checked(device, num_steps):
    with one_line_value_error(f"num_steps must be .* from 1 to T = 20, got {num_steps}"):
        ProbabilityFlow(random_prior(device), num_steps)


def test_the_chunk_size_is_checked(device):
    with one_line_value_error("chunk_size must be a whole number >= 1, got 0"):
        ProbabilityFlow(random_prior(device), chunk_size=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_latents_that_are_not_finite_are_an_error(device, value):
    z_0 = torch.full((1, 2), value, dtype=torch.float64, device=device)
    with pytest.raises(ValueError):
        ProbabilityFlow(random_prior(device)).log_prob(z_0)


def test_steps_that_are_too_long_are_an_error(device):
    prior = random_prior(device)
    with torch.no_grad():
        prior.denoiser.backbone.net.last.weight *= 100
    with one_line_value_error("num_steps=1 is too small for this denoiser: .* up to T = 20"):
        z_0 = torch.randn(9, 2, dtype=torch.float64, device=device)
        ProbabilityFlow(prior, num_steps=1).log_prob(z_0)
