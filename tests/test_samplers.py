r"""Samplers against the exact law of linear chains, and against Gaussian data."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from torch import nn

from pyro_vaediff import VAE, DiffusionPrior, FlowPrior, GaussianPrior
from pyro_vaediff.denoise import BetaTilde
from pyro_vaediff.nn import TimeAdapter
from pyro_vaediff.sampling import (
    ddim,
    dpm_solver,
    heun,
    interpolate,
    point,
    reconstruct,
    sample,
    trajectory,
)
from pyro_vaediff.schedules import LinearSchedule, make_schedule
from pyro_vaediff.testing import LinearGaussian

N = 20_000


class Zero(nn.Module):
    r"""A network that returns zero and remembers its times."""

    def __init__(self, num_outputs=1):
        super().__init__()
        self.num_outputs = num_outputs
        self.visited = []

    def forward(self, z, t):
        self.visited.append(int(t[0]))
        return (torch.zeros_like(z),) * self.num_outputs


class GaussianDenoiser(nn.Module):
    r"""The best reverse mean for data from N(m, S), for ``parameterization="mu"``.

    The mean of q(z_{t-1} | z_t, z_0) is linear in z_0, and E[z_0 | z_t] is the regression of z_0 on
    z_t = sqrt(abar) z_0 + sqrt(1 - abar) eps. The prior adds sqrt(1 - sigma_t^2) z_t.
    """

    def __init__(self, m, S, betas, reverse_variance):
        super().__init__()
        eye, abar = torch.eye(len(m)).to(S), torch.cumprod(1 - betas, 0)
        weights, biases = [0 * eye], [0 * m]
        for t in range(1, len(betas)):
            gain = abar[t].sqrt() * S @ torch.linalg.inv(abar[t] * S + (1 - abar[t]) * eye)
            of_zt = (1 - betas[t]).sqrt() * (1 - abar[t - 1]) / (1 - abar[t])
            of_z0 = abar[t - 1].sqrt() * betas[t] / (1 - abar[t])
            variance = betas[t]
            if reverse_variance == "beta_tilde" and t > 1:
                variance = betas[t] * (1 - abar[t - 1]) / (1 - abar[t])
            weights.append((of_zt - (1 - variance).sqrt()) * eye + of_z0 * gain)
            biases.append(of_z0 * (m - abar[t].sqrt() * gain @ m))
        self.weight, self.bias = (nn.Parameter(torch.stack(x)) for x in (weights, biases))

    def forward(self, z, t):
        return (self.weight[t] @ z.unsqueeze(-1)).squeeze(-1) + self.bias[t]


def gaussian_data(device):
    m = torch.tensor([1.0, -0.5], dtype=torch.float64, device=device)
    S = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64, device=device)
    return m, S


def gaussian_prior(device, T, reverse_variance="beta", schedule="linear"):
    r"""Returns a prior with the best denoiser for Gaussian data."""
    schedule = make_schedule(schedule, T)
    net = GaussianDenoiser(*gaussian_data("cpu"), schedule.original("betas"), reverse_variance)
    backbone = TimeAdapter(net, schedule, "index")
    prior = DiffusionPrior(
        2, T, schedule, backbone, parameterization="mu", reverse_variance=reverse_variance
    )
    return prior.double().to(device)


def assert_law(z, mean, cov, tolerance=1e-10, target=0.02):
    r"""Asserts that samples have a mean and a covariance within 5 se and a tolerance."""
    centred = z - z.mean(0)
    products = centred.unsqueeze(-1) * centred.unsqueeze(-2)
    for draws, exact in ((z, mean), (products, cov)):
        se = draws.std(0) / len(draws) ** 0.5
        assert se.max() < target
        assert ((draws.mean(0) - exact).abs() < 5 * se + tolerance).all()


def exact_law(prior, steps):
    r"""Returns the law of z_0: steps (A, b, variance) of z -> A z + b + noise, from N(0, I)."""
    mean, cov = prior.origin.double(), torch.eye(prior.latent_dim).to(prior.origin).double()
    for A, b, variance in steps:
        mean, cov = A @ mean + b, A @ cov @ A.mT + variance * torch.eye(len(b)).to(A)
    return mean, cov


def ancestral_steps(prior):
    betas, net = prior.schedule.betas, prior.denoiser.backbone.net
    abar = torch.cumprod(1 - betas, 0)
    for t in range(prior.num_timesteps, 0, -1):
        variance = betas[t]
        if isinstance(prior.denoiser.variance, BetaTilde) and t > 1:
            variance = betas[t] * (1 - abar[t - 1]) / (1 - abar[t])
        skip = (1 - variance).sqrt() * torch.eye(2).to(betas)
        yield skip + net.weight[t], net.bias[t], variance


def ddim_steps(prior, times, eta):
    r"""Equation (12) of DDIM with the exact regression of z_0 on z_t."""
    m, S = gaussian_data(prior.origin.device)
    abar, eye = torch.cumprod(1 - prior.schedule.betas, 0), torch.eye(2).to(S)
    for t, s in itertools.pairwise(times):
        G = abar[t].sqrt() * S @ torch.linalg.inv(abar[t] * S + (1 - abar[t]) * eye)
        g = m - abar[t].sqrt() * G @ m
        variance = eta**2 * (1 - abar[s]) / (1 - abar[t]) * (1 - abar[t] / abar[s])
        of_eps = (1 - abar[s] - variance).clamp(min=0).sqrt() / (1 - abar[t]).sqrt()
        A = abar[s].sqrt() * G + of_eps * (eye - abar[t].sqrt() * G)
        yield A, (abar[s].sqrt() - of_eps * abar[t].sqrt()) * g, variance


# --- The prior that starts at N(0, I) -------------------------------------------------------------


@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde", "learned"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_fresh_prior_samples_from_a_standard_normal(device, schedule, reverse_variance):
    # The default denoiser starts at zero as well, but takes its time.
    schedule = make_schedule(schedule, 50)
    zero = TimeAdapter(Zero(2 if reverse_variance == "learned" else 1), schedule, "index")
    prior = DiffusionPrior(2, 50, schedule, zero, reverse_variance=reverse_variance).to(device)
    assert_law(sample(prior, N), torch.zeros(2).to(device), torch.eye(2).to(device), 1e-6)


def test_priors_with_one_site(device):
    z = sample(GaussianPrior(2).to(device), N)
    assert_law(z, torch.zeros(2).to(device), torch.eye(2).to(device))
    assert sample(FlowPrior(2).to(device), 7).shape == (7, 2)


def test_ddim_of_a_fresh_prior_is_a_product_of_cosines(device):
    # With abar = cos^2(theta) and E[z_0 | z_t] = cos(theta_t) z_t, a step turns by an angle.
    prior = DiffusionPrior(2, 40).double().to(device)
    theta = prior.schedule.alphas_cumprod.sqrt().acos()
    torch.manual_seed(1)
    z_T = prior.standard_normal().expand([9]).sample()
    for num_steps, times in ((1, [40, 0]), (4, [40, 30, 20, 10, 0]), (40, range(40, -1, -1))):
        torch.manual_seed(1)
        z_0 = ddim(prior, 9, num_steps)
        factor = math.prod((theta[list(times)].diff()).cos().tolist())
        torch.testing.assert_close(z_0, factor * z_T, atol=1e-10, rtol=0)


# --- Gaussian data --------------------------------------------------------------------------------

# What T steps leave of the difference between the chain and the data, as measured: O(1 / T).
TOLERANCE = {200: 0.03, 1000: 0.006}


@pytest.mark.parametrize("T", TOLERANCE)
@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde"])
def test_ancestral_sampling_of_gaussian_data(device, T, reverse_variance):
    prior = gaussian_prior(device, T, reverse_variance)
    mean, cov = exact_law(prior, ancestral_steps(prior))
    z = sample(prior, N)
    assert_law(z, mean, cov)
    m, S = gaussian_data(device)
    assert (mean - m).abs().max() < TOLERANCE[T]
    assert (cov - S).abs().max() < TOLERANCE[T]
    assert_law(z, m, S, TOLERANCE[T])


@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [200, 20, 7])
def test_ddim_of_gaussian_data(device, num_steps, eta, reverse_variance):
    # The kernel's variance does not matter: DDIM only reads E[z_0 | z_t] off the prior.
    prior = gaussian_prior(device, 200, reverse_variance)
    times = torch.linspace(200, 0, num_steps + 1).round().long().tolist()
    mean, cov = exact_law(prior, ddim_steps(prior, times, eta))
    assert_law(ddim(prior, N, num_steps, eta), mean, cov)
    m, S = gaussian_data(device)
    tolerance = {200: 0.03, 20: 0.2, 7: 0.3}[num_steps]
    assert (mean - m).abs().max() < tolerance
    assert (cov - S).abs().max() < tolerance


def test_ddim_visits_every_time_once(device):
    schedule = LinearSchedule(60)
    for num_steps in (1, 2, 7, 31, 59, 60):
        net = Zero()
        prior = DiffusionPrior(1, 60, schedule, TimeAdapter(net, schedule, "index")).to(device)
        net.visited.clear()
        ddim(prior, 1, num_steps)
        # The whole numbers that are nearest to equal steps.
        assert net.visited == [math.floor(60 - 60 * i / num_steps + 0.5) for i in range(num_steps)]
        assert sorted(set(net.visited), reverse=True) == net.visited


# --- Events of any shape, and context -------------------------------------------------------------


class Reshaped(nn.Module):
    r"""A network of flat latents for those of another shape, shifted by a context."""

    def __init__(self, net, shift=0.0):
        super().__init__()
        self.net = net
        shift = torch.as_tensor(shift, dtype=torch.float64)
        self.shift = nn.Parameter(shift, requires_grad=False)

    def forward(self, z, t, c=None):
        shift = self.shift if c is None else c @ self.shift
        return (self.net(z.flatten(1), t) + shift).reshape(z.shape)


def shaped_priors(device, context=False):
    r"""Returns a prior of flat latents, and the same prior of latents with shape (1, 2, 1).

    With a context, the second one has one-hot labels, and the first is that of the last label.
    """
    flat, T = gaussian_prior(device, 12), 12
    shift = torch.tensor([[-1.0, 2.0], [0.3, 0.1]], dtype=torch.float64) if context else 0.0
    net = Reshaped(flat.denoiser.backbone.net, shift)
    shaped = DiffusionPrior(
        (1, 2, 1),
        T,
        flat.schedule,
        TimeAdapter(net, flat.schedule, "index"),
        parameterization="mu",
        context_features=2 if context else 0,
    )
    if context:
        net = Reshaped(flat.denoiser.backbone.net, shift[1])
        backbone = TimeAdapter(net, flat.schedule, "index")
        flat = DiffusionPrior(2, T, flat.schedule, backbone, parameterization="mu")
    return flat.double().to(device), shaped.double().to(device)


SAMPLERS = {
    "sample": sample,
    "trajectory": lambda *args, **kwargs: trajectory(*args, num_frames=4, **kwargs)[1],
    "ddim": lambda *args, **kwargs: ddim(*args, num_steps=5, eta=0.5, **kwargs),
    "heun": lambda *args, **kwargs: heun(*args, num_steps=5, **kwargs),
    "dpm-solver": lambda *args, **kwargs: dpm_solver(*args, num_steps=5, **kwargs),
}


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_of_another_shape_and_with_a_context(device, name, context):
    flat, shaped = shaped_priors(device, context)
    c = {"c": torch.tensor([[0.0, 1.0]]).to(flat.origin).expand(7, 2)} if context else {}
    torch.manual_seed(3)
    expected = SAMPLERS[name](flat, 7)
    torch.manual_seed(3)
    z = SAMPLERS[name](shaped, 7, **c)
    assert z.shape[-4:] == (7, 1, 2, 1)
    torch.testing.assert_close(z, expected.reshape(z.shape), atol=1e-10, rtol=0)
    if context:
        torch.manual_seed(3)
        assert (SAMPLERS[name](shaped, 7, c=c["c"].flip(1)) - z).abs().max() > 0.1


# --- Frames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_frames, times", [(2, [10, 0]), (4, [10, 7, 3, 0]), (6, [10, 8, 6, 4, 2, 0])]
)
def test_frames_of_a_trajectory(device, num_frames, times):
    prior = gaussian_prior(device, 10)
    torch.manual_seed(2)
    found, z = trajectory(prior, 4, num_frames)
    assert found.tolist() == times
    assert z.shape == (num_frames, 4, 2)
    torch.manual_seed(2)
    every, path = trajectory(prior, 4, num_frames=100)  # more than the chain has
    assert every.tolist() == list(range(10, -1, -1))
    assert torch.equal(z, path[[10 - t for t in times]])
    torch.manual_seed(2)
    assert torch.equal(path[-1], sample(prior, 4))


def test_frames_have_the_laws_of_their_times(device):
    prior = gaussian_prior(device, 50)
    times, z = trajectory(prior, N, num_frames=3)
    steps = list(ancestral_steps(prior))
    for t, frame in zip(times.tolist(), z, strict=True):
        assert_law(frame, *exact_law(prior, steps[: 50 - t]))


@pytest.fixture
def vae(device):
    encoder, decoder = (
        LinearGaussian((3,), (2,), log_scale=-0.5),
        LinearGaussian((2,), (3,), log_scale=0.0),
    )
    return VAE(encoder, decoder, GaussianPrior(2)).double().to(device)


def test_reconstructions_and_interpolations(vae, device):
    x, y = torch.randn(2, 4, 3, dtype=torch.float64, device=device)
    mean = lambda net, v: v @ net.weight[0].mT + net.bias[0]  # noqa: E731
    expected = [mean(vae.decoder, mean(vae.encoder, v)) for v in (x, y)]
    torch.testing.assert_close(reconstruct(vae, x), expected[0], atol=1e-10, rtol=0)

    frames = interpolate(vae, x, y, num_frames=5)
    assert frames.shape == (5, 4, 3)
    for frame, w in zip(frames, (0, 0.25, 0.5, 0.75, 1), strict=True):  # a linear decoder
        mix = (1 - w) * expected[0] + w * expected[1]
        torch.testing.assert_close(frame, mix, atol=1e-10, rtol=0)


class Conditional(nn.Module):
    r"""A network whose mean is shifted by its context, for latents with shape (2, 1)."""

    def __init__(self, net, shapes):
        super().__init__()
        self.net, self.shapes = net, shapes

    def forward(self, x, c):
        p = self.net(x.reshape(-1, *self.shapes[0]))
        loc = (p.mean + c).reshape(-1, *self.shapes[1])
        return dist.Normal(loc, 1.0).to_event(len(self.shapes[1]))


def test_interpolations_with_a_context_and_an_event_shape(vae, device):
    x, y = torch.randn(2, 4, 3, dtype=torch.float64, device=device)
    c = torch.arange(4.0, dtype=torch.float64, device=device).unsqueeze(-1)
    other = VAE(
        Conditional(vae.encoder, ((3,), (2, 1))),
        Conditional(vae.decoder, ((2,), (3,))),
        GaussianPrior((2, 1)).double().to(device),
    )
    expected = [vae.decoder(vae.encoder(v).mean + c).mean + c for v in (x, y)]
    torch.testing.assert_close(reconstruct(other, x, c), expected[0], atol=1e-10, rtol=0)
    frames = interpolate(other, x, y, num_frames=3, c=c)
    torch.testing.assert_close(frames[0], expected[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(frames[1], sum(expected) / 2, atol=1e-10, rtol=0)


def test_a_point_is_a_mean_or_a_mode_or_a_sample():
    class WithMode(dist.TorchDistribution):
        mode = torch.tensor(2.0)

    flow = dist.TransformedDistribution(dist.Normal(0.0, 1.0), dist.transforms.TanhTransform())
    assert point(dist.Beta(1.0, 3.0)) == 0.25
    assert point(WithMode(validate_args=False)) == 2
    assert -1 < point(flow) < 1


# --- Programs and errors --------------------------------------------------------------------------


def test_sampling_leaves_nothing_behind(device):
    for prior in (DiffusionPrior(2, 3), GaussianPrior(2), FlowPrior(2)):
        sample(prior.to(device), 2)
    trajectory(DiffusionPrior(2, 3).to(device), 2)
    ddim(DiffusionPrior(2, 3).to(device), 2, 2)
    assert len(list(pyro.get_param_store().keys())) == 0


def test_samples_have_no_graph_and_the_dtype_of_the_prior(device):
    for dtype in (torch.float32, torch.float64):
        prior = DiffusionPrior(2, 3).to(device, dtype)
        for z in (sample(prior, 2), trajectory(prior, 2)[1], ddim(prior, 2, 2, eta=0.5)):
            assert z.dtype == dtype
            assert not z.requires_grad


def test_errors(vae):
    prior, x = DiffusionPrior(2, 10), torch.zeros(1, 3, dtype=torch.float64)
    for call, match in {
        (lambda: sample(prior, 0)): "num_samples must be a whole number >= 1, got 0",
        (lambda: trajectory(prior, 0)): "num_samples must be a whole number >= 1, got 0",
        (
            lambda: trajectory(prior, 1, num_frames=1)
        ): "num_frames must be a whole number >= 2, got 1",
        (lambda: ddim(prior, 0)): "num_samples must be a whole number >= 1, got 0",
        (lambda: ddim(prior, 1, num_steps=0)): "num_steps must be a whole number >= 1, got 0",
        (lambda: ddim(prior, 1, 5, eta=-0.1)): r"eta must be in \[0, 1\], got -0.1",
        (lambda: ddim(prior, 1, 5, eta=1.1)): r"eta must be in \[0, 1\], got 1.1",
        (lambda: ddim(GaussianPrior(2), 1)): "prior must be a DiffusionPrior, got GaussianPrior",
        (lambda: trajectory(FlowPrior(2), 1)): "prior must be a DiffusionPrior, got FlowPrior",
        (
            lambda: interpolate(vae, x, x, num_frames=1)
        ): "num_frames must be a whole number >= 2, got 1",
        (lambda: vae.model(num_samples=0)): "num_samples must be a whole number >= 1, got 0",
    }.items():
        with one_line_value_error(match):
            call()
