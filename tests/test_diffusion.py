r"""The Gaussian algebra against the conditioning of the joint Gaussian of the whole chain."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error

from pyro_vaediff.diffusion import gaussian_moments, q_marginal, q_reverse, q_step
from pyro_vaediff.schedules import CosineSchedule, LinearSchedule, Schedule, at_time

T = 6
SCHEDULES = {
    "linear": LinearSchedule(T),
    "cosine": CosineSchedule(T),
    "even": Schedule(torch.linspace(0.1, 0.5, T, dtype=torch.float64)),
}
M, S = torch.tensor([[0.7, -1.2], [2.0, 0.1]]).double(), torch.tensor([[0.3, 1.5], [0.9, 0.6]])


@pytest.fixture(params=SCHEDULES)
def schedule(request, device):
    return SCHEDULES[request.param].to(device, torch.float64)


def exact(actual, expected):
    torch.testing.assert_close(actual.cpu(), torch.as_tensor(expected), atol=1e-10, rtol=0)


def joint(schedule, m, s2):
    r"""Returns the mean and the covariance of z_0, ..., z_T, for one dimension, by recursion."""
    betas = schedule.betas.cpu().numpy()
    mean, cov = np.zeros(T + 1), np.zeros((T + 1, T + 1))
    mean[0], cov[0, 0] = m, s2
    for t in range(1, T + 1):
        a = np.sqrt(1 - betas[t])
        mean[t] = a * mean[t - 1]
        cov[t, :t] = cov[:t, t] = a * cov[t - 1, :t]
        cov[t, t] = a**2 * cov[t - 1, t - 1] + betas[t]
    return mean, cov


def conditional(mean, cov, of, given, values):
    r"""Returns the mean and the variance of one variable, given the values of others."""
    gain = np.linalg.solve(cov[np.ix_(given, given)], cov[given, of])
    return mean[of] + gain @ (values - mean[given]), cov[of, of] - gain @ cov[given, of]


@pytest.mark.parametrize("start", ["z_0", "x"])
@pytest.mark.parametrize("t", range(1, T + 1))
def test_laws_of_the_chain(device, schedule, start, t):
    z_t = torch.randn(2, 2, dtype=torch.float64)
    m, s = M.to(device), S.double().to(device)
    q_z0 = dist.Normal(m, s).to_event(1) if start == "x" else m
    marginal = q_marginal(schedule, q_z0, t)
    assert marginal.batch_shape == (2,) and marginal.event_shape == (2,)
    for i in np.ndindex(2, 2):
        mean, cov = joint(schedule, M[i].item(), S[i].item() ** 2 if start == "x" else 0.0)
        exact(marginal.mean[i], mean[t])
        exact(marginal.variance[i], cov[t, t])
        if start == "x" or t > 1:
            reverse = q_reverse(schedule, q_z0, z_t.to(device), t)
            loc, variance = conditional(mean, cov, t - 1, [t], [z_t[i].item()])
            exact(reverse.mean[i], loc)
            exact(reverse.variance[i], variance)


@pytest.mark.parametrize("t", range(2, T + 1))
def test_given_z_0_and_given_x_is_given_z_0(device, schedule, t):
    # Given z_0 the start no longer matters: the same law follows from any joint with s > 0.
    z_0, z_t = torch.randn(2, 1, dtype=torch.float64)
    mean, cov = joint(schedule, 0.4, 0.8)
    loc, variance = conditional(mean, cov, t - 1, [0, t], [z_0.item(), z_t.item()])
    reverse = q_reverse(schedule, z_0.to(device), z_t.to(device), t)
    exact(reverse.mean[0], loc)
    exact(reverse.variance[0], variance)
    exact(reverse.variance[0], schedule.betas_tilde[t].cpu())


@pytest.mark.parametrize("t", range(1, T + 1))
def test_a_step(device, schedule, t):
    z = torch.randn(3, 2, dtype=torch.float64, device=device)
    step = q_step(schedule, z, t)
    exact(step.mean, (1 - schedule.betas[t]).sqrt().cpu() * z.cpu())
    exact(step.variance, schedule.betas[t].cpu().expand(3, 2))


@pytest.mark.parametrize("t", range(1, T + 1))
def test_a_point_is_the_limit_of_a_narrow_gaussian(device, schedule, t):
    z = torch.randn(2, 2, dtype=torch.float64, device=device)
    m = M.to(device)
    narrow = dist.Normal(m, torch.full_like(m, 1e-8)).to_event(1)
    pairs = [(q_marginal(schedule, narrow, t), q_marginal(schedule, m, t))]
    if t > 1:
        pairs.append((q_reverse(schedule, narrow, z, t), q_reverse(schedule, m, z, t)))
    for limit, point in pairs:
        exact(limit.mean, point.mean.cpu())
        exact(limit.variance, point.variance.cpu())
    if t == 1:  # the law of z_0 collapses onto the point
        exact(q_reverse(schedule, narrow, z, 1).mean, M)
        assert (q_reverse(schedule, narrow, z, 1).stddev < 1e-7).all()


@pytest.mark.parametrize("shape", [(), (3,), (4, 3)])
def test_timesteps_may_differ_over_the_batch(device, schedule, shape):
    z = torch.randn(*shape, 2, dtype=torch.float64, device=device)
    t = torch.randint(2, T + 1, shape, device=device)
    q_z0 = dist.Normal(z.flip(-1), z.exp()).to_event(1)
    laws = (
        lambda z, q, u: q_step(schedule, z, u),
        lambda z, q, u: q_marginal(schedule, q, u),
        lambda z, q, u: q_marginal(schedule, q.mean, u),
        lambda z, q, u: q_reverse(schedule, q, z, u),
        lambda z, q, u: q_reverse(schedule, q.mean, z, u),
    )
    for law in laws:
        batch = law(z, q_z0, t)
        assert batch.batch_shape == shape and batch.event_shape == (2,)
        for i in np.ndindex(*shape):
            one = law(z[i], dist.Normal(z[i].flip(-1), z[i].exp()).to_event(1), t[i].item())
            exact(batch.mean[i], one.mean.cpu())
            exact(batch.variance[i], one.variance.cpu())


def test_at_time(device):
    table = torch.arange(5.0, device=device)
    assert at_time(table, 3).tolist() == [3.0]
    t = torch.tensor([[1, 2, 3]], device=device)
    assert at_time(table, t).tolist() == [[[1.0], [2.0], [3.0]]]


def test_moments_are_found_inside_of_wrappers(device):
    m, s = M.to(device), S.double().to(device)
    normal = dist.Normal(m, s)
    for wrapped in (
        normal.to_event(1),
        normal.to_event(1).expand([4, 2]),
        torch.distributions.Independent(torch.distributions.Normal(m, s), 1),
    ):
        loc, variance = gaussian_moments(wrapped)
        exact(loc, M.expand(loc.shape))
        exact(variance, S.double().square().expand(variance.shape))


@pytest.mark.parametrize(
    "q_z0",
    [
        dist.Laplace(torch.zeros(3, 2), 1.0).to_event(1),
        dist.LogNormal(torch.zeros(3, 2), 1.0).to_event(1),
        dist.MultivariateNormal(torch.zeros(3, 2), torch.eye(2)),
    ],
    ids=lambda q: type(q).__name__,
)
def test_only_diagonal_gaussians_have_closed_forms(q_z0):
    with one_line_value_error(r"diagonal Gaussian .* got \w+: use conditioning='z_0'"):
        q_marginal(LinearSchedule(T), q_z0, 1)
