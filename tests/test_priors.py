r"""The reverse kernels of the diffusion prior, exactly, and what all priors have in common."""

from __future__ import annotations

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from pyro import poutine
from torch import nn

from pyro_vaediff import DiffusionPrior, FlowPrior, GaussianPrior, MixturePrior, VampPrior
from pyro_vaediff.diffusion import q_reverse
from pyro_vaediff.nn import MLPBackbone, ResidualMLP, make_backbone
from pyro_vaediff.schedules import LinearSchedule, Schedule

SCHEDULES = ("linear", "cosine")
PARAMETERIZATIONS = ("eps", "z0", "mu", "v")
VARIANCES = ("beta", "beta_tilde", "learned", "analytic", "diagonal")
PRIORS = {
    "gaussian": lambda D: GaussianPrior(D),
    "flow": lambda D: FlowPrior(D, hidden_features=[8]),
    "mixture": lambda D: MixturePrior(D, num_components=3),
    "vamp": lambda D: VampPrior(narrow_normal, D, image_shape=(D,), num_components=3),
    "diffusion": lambda D: DiffusionPrior(D, 4),
}


def narrow_normal(x):
    return dist.Normal(x, 0.5).to_event(1)


class Constant(nn.Module):
    r"""A backbone whose outputs are given numbers, in float64."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = [torch.tensor(output, dtype=torch.float64) for output in outputs]

    def forward(self, z, log_snr):
        outputs = tuple(output.to(z).expand_as(z) for output in self.outputs)
        return outputs if len(outputs) > 1 else outputs[0]


def exact(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


# --- The start at N(0, I) -------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 10, 1000])
@pytest.mark.parametrize("reverse_variance", VARIANCES)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_prior_starts_at_the_standard_normal(
    device, schedule, parameterization, reverse_variance, T
):
    prior = DiffusionPrior(
        2, T, schedule, parameterization=parameterization, reverse_variance=reverse_variance
    )
    prior = prior.double().to(device)
    mean, variance = 0.0, 1.0  # of z_T, then through the affine kernels of the whole chain
    probes = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-3.0, 2.0]], dtype=torch.float64, device=device)
    with torch.no_grad():
        for t in range(T, 0, -1):
            kernel = prior.reverse(probes, t)
            gain = kernel.mean[1, 0].item()
            exact(kernel.mean, gain * probes)
            exact(kernel.variance, kernel.variance[0, 0].expand(3, 2))
            mean, variance = gain * mean, gain**2 * variance + kernel.variance[0, 0].item()
            assert mean == 0 and abs(variance - 1) < 1e-10


def test_the_program_samples_the_standard_normal(device):
    prior = DiffusionPrior(2, 5).to(device)
    with torch.no_grad(), pyro.plate("samples", 20_000):
        z = prior.model()
    se = 20_000**-0.5
    assert (z.mean(0).abs() < 5 * se).all()
    assert ((z.T @ z / len(z) - torch.eye(2, device=device)).abs() < 5 * 2**0.5 * se).all()


# --- Variances ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_variances(device, schedule):
    for t in range(1, 7):
        z = torch.randn(3, 2, dtype=torch.float64, device=device)
        for name, table in (("beta", "betas"), ("beta_tilde", "betas_tilde")):
            prior = DiffusionPrior(2, 6, schedule, reverse_variance=name).double().to(device)
            expected = getattr(prior.schedule, table if t > 1 else "betas")[t]
            exact(prior.reverse(z, t).variance, expected.expand(3, 2))


@pytest.mark.parametrize("T", [1, 2, 6])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learned_variances_are_bounded(device, schedule, T):
    def log_variance(u, t):
        backbone = Constant([0.0, 0.0], [u, -u])
        prior = DiffusionPrior(2, T, schedule, backbone, reverse_variance="learned")
        return prior.double().to(device).reverse(torch.zeros(1, 2, device=device), t).variance.log()

    original = DiffusionPrior(2, T, schedule).schedule.original
    for t in range(1, T + 1):
        at = max(t, 2)  # the ratio at t = 1 continues that at t = 2
        ratio = (original("betas_tilde")[at] / original("betas")[at]).item() if T > 1 else 0.5
        log_beta, width = original("betas")[t].log().item(), -math.log(ratio)
        for u in (-1e6, -3.0, 0.0, 0.5, 1e6):
            values = log_variance(u, t)[0].cpu()
            assert values.isfinite().all()
            assert ((values - log_beta).abs() < 2 * width + 1e-10).all()
            assert (values - log_beta).sum().abs() < 1e-10  # odd in u
        exact(log_variance(0.0, t)[0].cpu(), torch.full((2,), log_beta).double(), atol=1e-7)
        # Its range contains log beta_tilde well inside: tanh(u / 2) = -1/2 for u = -log 3.
        middle = log_variance(-math.log(3.0), t)[0, 0].item()
        assert middle == pytest.approx(log_beta - width, abs=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.01, 1e-6])
def test_the_interval_of_a_learned_variance_is_no_wider_than_e_to_the_5(beta):
    # Here beta_tilde / beta is e^-1.7, e^-3.9 or e^-13.1.
    schedule, backbone = Schedule(torch.tensor([beta, 0.5])), Constant([0.0], [1e6])
    prior = DiffusionPrior(1, 2, schedule, backbone, reverse_variance="learned").double()
    largest = prior.reverse(torch.zeros(1), 2).variance.log().item()
    width = min(5.0, -math.log(beta / (beta + 0.5 - beta * 0.5)))
    assert largest == pytest.approx(math.log(0.5) + 2 * width, abs=1e-6)


# --- Parameterizations ----------------------------------------------------------------------------


def conditional_mean(schedule, z_t, z_0, t):
    r"""Returns E[z_{t-1} | z_t, z_0], by conditioning the Gaussian (z_{t-1}, z_t) given z_0."""
    beta = schedule.original("betas").numpy()
    previous = np.prod(1 - beta[:t])
    gain = np.sqrt(1 - beta[t]) * (1 - previous) / ((1 - beta[t]) * (1 - previous) + beta[t])
    return previous**0.5 * z_0 + gain * (z_t - np.sqrt(previous * (1 - beta[t])) * z_0)


@pytest.mark.parametrize("t", range(1, 7))
@pytest.mark.parametrize("reverse_variance", VARIANCES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_prediction_moves_the_mean_as_its_definition_says(device, schedule, reverse_variance, t):
    z_t, z_0, other = 0.7, -0.4, 1.3
    schedule = DiffusionPrior(1, 6, schedule).schedule
    alpha_bar = schedule.original("alphas_cumprod")[t].item()

    def prediction(parameterization, z_0):
        eps = (z_t - alpha_bar**0.5 * z_0) / (1 - alpha_bar) ** 0.5
        return {
            "eps": eps,
            "z0": z_0,
            "mu": conditional_mean(schedule, z_t, z_0, t),
            "v": alpha_bar**0.5 * eps - (1 - alpha_bar) ** 0.5 * z_0,
        }[parameterization]

    def reverse_mean(parameterization, z_0):
        outputs = [prediction(parameterization, z_0)] + [0.0] * (reverse_variance == "learned")
        prior = DiffusionPrior(
            1, 6, schedule, Constant(*outputs), parameterization, reverse_variance
        )
        return prior.double().to(device).reverse(z, t).mean.item()

    z = torch.tensor([z_t], dtype=torch.float64, device=device)
    expected = conditional_mean(schedule, z_t, other, t) - conditional_mean(schedule, z_t, z_0, t)
    for parameterization in PARAMETERIZATIONS:
        moved = reverse_mean(parameterization, other) - reverse_mean(parameterization, z_0)
        assert moved == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("reverse_variance", VARIANCES)
def test_denoise_is_what_the_reverse_mean_implies(device, reverse_variance, parameterization):
    num_outputs = 2 if reverse_variance == "learned" else 1
    backbone = ResidualMLP(2, num_outputs=num_outputs, width=16)
    nn.init.normal_(backbone.outputs.weight)
    prior = DiffusionPrior(2, 6, "cosine", backbone, parameterization, reverse_variance)
    prior = prior.double().to(device)
    z = torch.randn(5, 2, dtype=torch.float64, device=device)
    for t in range(2, 7):
        implied = q_reverse(prior.schedule, prior.denoise(z, t), z, t).mean
        exact(implied, prior.reverse(z, t).mean, atol=1e-9)
    exact(prior.denoise(z, 1), prior.reverse(z, 1).mean, atol=1e-9)
    t = torch.tensor([1, 2, 3, 4, 6], device=device)
    for i in range(5):
        exact(prior.denoise(z, t)[i], prior.denoise(z[i], t[i].item()), atol=1e-9)
        exact(prior.reverse(z, t).mean[i], prior.reverse(z[i], t[i].item()).mean, atol=1e-9)
        exact(prior.reverse(z, t).stddev[i], prior.reverse(z[i], t[i].item()).stddev, atol=1e-9)


# --- All priors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [1, 3])
@pytest.mark.parametrize("name", PRIORS)
def test_programs_agree_on_their_sites(device, name, D, dtype):
    prior = PRIORS[name](D).to(device, dtype)
    q_z0 = dist.Normal(torch.zeros(5, D).to(device, dtype), 1.0).to_event(1)
    with pyro.plate("data", 5):
        guide = poutine.trace(prior.guide).get_trace(q_z0)
        model = poutine.trace(poutine.replay(prior.model, trace=guide)).get_trace()
        free = poutine.trace(prior.model).get_trace()
    assert set(guide.stochastic_nodes) == set(model.stochastic_nodes) == set(free.stochastic_nodes)
    for trace in (guide, model, free):
        trace.compute_log_prob()
        assert trace.nodes["_RETURN"]["value"] is trace.nodes["z_0"]["value"]
        for site in trace.stochastic_nodes:
            assert trace.nodes[site]["value"].shape == (5, D)
            assert trace.nodes[site]["value"].dtype == dtype
            assert trace.nodes[site]["log_prob"].shape == (5,)


@pytest.mark.parametrize("name", PRIORS)
def test_outside_of_plates_there_is_one_sample(device, name):
    prior = PRIORS[name](3).to(device)
    assert prior.model().shape == (3,)
    assert copy.deepcopy(prior).model().shape == (3,)


@pytest.mark.parametrize(
    "make, match",
    [
        *((lambda make=make: make(0), "event_shape .* got 0") for make in PRIORS.values()),
        *((lambda make=make: make(1.5), "event_shape .* got 1.5") for make in PRIORS.values()),
        (lambda: DiffusionPrior(2, 0), "num_timesteps .* got 0"),
        (lambda: DiffusionPrior(2, 5, "quadratic"), "unknown schedule 'quadratic'"),
        (lambda: DiffusionPrior(2, 5, Schedule(torch.tensor([0.5]))), "num_timesteps is 5, .* 1"),
        (lambda: DiffusionPrior(2, 5, parameterization="x"), "unknown parameterization 'x': .*eps"),
        (
            lambda: DiffusionPrior(2, 5, reverse_variance="x"),
            "unknown reverse_variance 'x': .*beta",
        ),
        (lambda: DiffusionPrior(2, 5, order="x"), "unknown order 'x': .*forward"),
        (lambda: FlowPrior(2, num_steps=0), "num_steps .* got 0"),
        (lambda: FlowPrior(2, hidden_features=[]), r"hidden_features .* got \[\]"),
        (lambda: FlowPrior(2, hidden_features=[8, 0]), r"hidden_features .* got \[8, 0\]"),
        (lambda: MixturePrior(2, num_components=0), "num_components .* got 0"),
        (lambda: VampPrior(None, 2, (2,), num_components=1.5), "num_components .* got 1.5"),
        (lambda: VampPrior(None, 2, (2,), support=(1, 0)), r"support .* got \(1, 0\)"),
        (lambda: ResidualMLP(2, LinearSchedule(5), embedding_dim=3), "positive, got 3"),
        (lambda: make_backbone("cnn", 2, LinearSchedule(5)), "unknown denoiser 'cnn': .*mlp"),
        (
            lambda: make_backbone("vit", (1, 2, 2), LinearSchedule(5), context_features=(3, 2, 2)),
            r"context_features must be a number for a denoiser 'vit', got \(3, 2, 2\)",
        ),
        (lambda: MLPBackbone(2, embedding_dim=3), "even and positive, got 3"),
    ],
)
def test_bad_input(make, match):
    with one_line_value_error(match):
        make()


@pytest.mark.parametrize("name", PRIORS)
def test_the_encoder_must_have_the_same_latent_dim(name):
    q_z0 = dist.Normal(torch.zeros(5, 4), 1.0).to_event(1)
    with pyro.plate("data", 5), one_line_value_error(r"event shape \(3,\).* got \(4,\)"):
        PRIORS[name](3).guide(q_z0)
