r"""Learned schedules: against sums along their curves, and against chains."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from torch import nn

from pyro_vaediff import DiffusionPrior, Timestep_ELBO, TraceKL_ELBO
from pyro_vaediff.evaluate import chain_log_prob
from pyro_vaediff.infer import elbo_terms, variance_kl
from pyro_vaediff.nn import ResidualMLP
from pyro_vaediff.sampling import ProbabilityFlow, ddim, sample, trajectory
from pyro_vaediff.schedules import LearnedSchedule, MonotoneLogSNR
from pyro_vaediff.testing import ContinuousOracle, SmoothDenoiser, linear_gaussian_vae
from pyro_vaediff.train.build import make_vae
from pyro_vaediff.train.config import ModelConfig


@pytest.fixture
def x(device):
    return torch.randn(2, 3, dtype=torch.float64, device=device)


def bend(schedule):
    r"""Moves the parameters of a path away from where they start."""
    generator = torch.Generator().manual_seed(1)
    for p in schedule.function.parameters():
        noise = torch.randn(p.shape, generator=generator).to(p)
        p.data += 2.0 * noise if p.ndim > len(schedule.shape) else 0.5 * noise
    return schedule


def make(shape, bent=True, **options):
    vae = linear_gaussian_vae(None, seed=0)
    schedule = LearnedSchedule(shape, **options)
    prior = DiffusionPrior(2, None, bend(schedule) if bent else schedule, SmoothDenoiser(2))
    prior.denoiser.backbone = vae.prior.denoiser.backbone
    vae.prior = prior
    return vae.double()


# --- The path -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 1)], ids=str)
def test_the_path_decreases_and_its_slope_is_its_derivative(device, shape):
    schedule = LearnedSchedule(shape).to(device)
    start = schedule(torch.tensor([1e-3, 1.0], dtype=torch.float64, device=device))
    ends = torch.tensor([9.0, -10.0], dtype=torch.float64, device=device)
    assert (start - ends[(...,) + (None,) * len(shape)]).abs().max() < 1e-5
    bend(schedule)
    t = torch.linspace(0.0013, 0.999, 200, dtype=torch.float64, device=device).reshape(40, 5)
    slope = schedule.slope(t)
    assert slope.shape == (40, 5, *shape) and (slope < 0).all()
    h = 1e-6
    numeric = (schedule(t + h) - schedule(t - h)) / (2 * h)
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-5)


def test_what_is_learned():
    def names(schedule):
        return {n.partition(".")[2] for n, p in schedule.named_parameters() if p.requires_grad}

    interior = {"linear", "weight", "rate", "shift"}
    assert names(LearnedSchedule()) == {"low", "width"}
    assert names(LearnedSchedule((2,))) == {"low", "width"} | interior
    assert names(LearnedSchedule((2,), learn_ends=False)) == interior
    assert names(LearnedSchedule((2,)).with_steps(5)) == set()


# --- The bound ------------------------------------------------------------------------------------


def sampled(vae, x, elbo, batches=20, replicas=500):
    r"""Returns losses and gradients per datum of some batches, with shape (batches, 1 + P)."""
    parameters = [p for p in vae.parameters() if p.requires_grad]
    rows = []
    for _ in range(batches):
        loss = elbo.differentiable_loss(vae.model, vae.guide, x.repeat(replicas, 1))
        grads = torch.autograd.grad(loss, parameters)
        row = [loss.detach().reshape(1), *(g.flatten() for g in grads)]
        rows.append(torch.cat([r.double() for r in row]) / replicas)
    return torch.stack(rows)


def exact(vae, x):
    r"""Returns the same from the oracle."""
    loss = ContinuousOracle(vae, x).negative_elbo.sum()
    parameters = [p for p in vae.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters)
    return torch.cat([loss.detach().reshape(1), *(g.flatten() for g in grads)])


def assert_mean(rows, expected, target):
    mean, se = rows.mean(0), rows.std(0) / len(rows) ** 0.5
    assert (se < target * expected.abs().amax().clamp(min=1.0)).all(), se.max()
    error = (mean - expected).abs() / (6 * se + 1e-9)  # a t-distribution
    assert (error < 1).all(), (error.max(), error.argmax())


@pytest.mark.parametrize("shape", [(), (2,), (1,)], ids=str)
@pytest.mark.parametrize("conditioning", ["z_0", "x"])
def test_values_and_gradients_are_those_of_the_integral(x, conditioning, shape):
    vae = make(shape).to(x.device)
    elbo = Timestep_ELBO(k=16, conditioning=conditioning)
    assert_mean(sampled(vae, x, elbo), exact(vae, x), target=0.02)


def test_the_gradient_of_the_oracle_is_that_of_finite_differences(x):
    vae = make((2,)).to(x.device)
    exact_gradient = exact(vae, x)[1:]
    parameters = [p for p in vae.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) for p in parameters]
    values = []
    for h in (1e-5, -1e-5):
        other = copy.deepcopy(vae)
        moved = [p for p in other.parameters() if p.requires_grad]
        for p, d in zip(moved, direction, strict=True):
            p.data += h * d
        values.append(ContinuousOracle(other, x).negative_elbo.sum().item())
    along = (exact_gradient * torch.cat([d.flatten() for d in direction])).sum().item()
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(along, rel=1e-6)


def test_only_the_paths_of_several_dimensions_matter(x):
    def change(shape):
        straight, bent = make(shape, bent=False), make(shape)
        for name in ("low", "width"):  # the same ends
            bent.prior.schedule.function.get_parameter(name).data.copy_(
                straight.prior.schedule.function.get_parameter(name)
            )
        values = [curve_integral(v, x) for v in (straight, bent)]
        return (values[0] - values[1]).abs().max().item()

    assert change(()) < 1e-3 and change((2,)) > 0.1


def curve_integral(vae, x):
    r"""Returns the integral over the time of a path, whatever its shape."""
    oracle = ContinuousOracle(vae, x.to(torch.float64))
    t = torch.linspace(1e-3, 1, 401, dtype=torch.float64)
    curve = vae.prior.schedule(t)
    middles, pieces = curve[1::2], curve[:-2:2] - curve[2::2]
    pairs = zip(middles, pieces, strict=True)
    return sum((oracle.squares(m, [oracle.z_0]) * piece).sum(-1) for m, piece in pairs).detach()


def test_an_exact_denoiser_per_dimension_is_tight(device):
    # z_0 ~ N(m, s^2) per dimension: whatever the curve, -ELBO = E[-log p(z_0)].
    net = ResidualMLP(2, width=4)
    schedule = bend(LearnedSchedule((2,)))
    prior = DiffusionPrior(2, None, schedule, net, preconditioning=True).to(device, torch.float64)
    moments = prior.denoiser.preconditioning
    with torch.no_grad():
        moments.mean.copy_(torch.tensor([0.4, -0.7]))
        moments.log_scale.copy_(torch.tensor([0.5, 0.8]).log() / moments.gain)
        law = dist.Normal(moments.mean.detach(), moments.scale.detach()).to_event(1)
    z_0 = law.sample((20_000,))
    error = bound(prior, dist.Delta(z_0, event_dim=1), Timestep_ELBO(k=8)) + law.log_prob(z_0)
    se = error.std() / len(z_0) ** 0.5
    assert se < 0.05 and error.mean().abs() < 5 * se + 0.01


def bound(prior, q, elbo):
    def program(run):
        with pyro.plate("data", len(q.mean)):
            run()

    with torch.no_grad():
        terms = elbo_terms(
            lambda: program(prior.model), lambda: program(lambda: prior.guide(q)), elbo=elbo
        )
    return torch.stack([v.sum(0) if v.ndim > 1 else v for v in terms.values()]).sum(0)


@pytest.mark.parametrize("shape", [(), (2,)], ids=str)
def test_a_chain_of_many_steps_has_the_same_bound(x, shape):
    vae = make(shape).to(x.device)
    expected = ContinuousOracle(vae, x).negative_elbo.sum().detach().reshape(1)
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)
    times = torch.cat([u[:1], torch.lerp(torch.tensor(1e-3).to(u), torch.ones(1).to(u), u)])
    vae.prior = vae.prior.with_steps(times)
    for conditioning in ("z_0", "x"):
        elbo = Timestep_ELBO(k=16, conditioning=conditioning)
        with torch.no_grad():
            rows = [elbo.loss(vae.model, vae.guide, x.repeat(500, 1)) / 500 for _ in range(10)]
        rows = torch.tensor(rows, dtype=torch.float64)
        se = rows.std() / 10**0.5
        assert se < 0.5 and (rows.mean() - expected).abs() < 5 * se + 0.05


def evaluated(prior, q):
    torch.manual_seed(0)
    return bound(prior, q, Timestep_ELBO(k=128, antithetic=False)).mean()


def test_training_improves_a_bad_path(device):
    # Scales that differ by a factor of 20: the end of each path follows its dimension.
    torch.manual_seed(0)
    z = torch.randn(512, 2, device=device) * torch.tensor([4.0, 0.2], device=device)
    q, elbo = dist.Delta(z, event_dim=1), Timestep_ELBO(k=8)
    schedule = LearnedSchedule((2,), log_snr=MonotoneLogSNR((2,), ends=(-3.0, 6.0)))
    net = ResidualMLP(2, width=4)
    prior = DiffusionPrior(2, None, schedule, net, preconditioning=True).to(device)
    moments = prior.denoiser.preconditioning
    moments.log_scale.data = torch.tensor([4.0, 0.2], device=device).log() / moments.gain
    optimizer = torch.optim.Adam(prior.schedule.parameters(), lr=0.1)
    before = evaluated(prior, q)

    def program(run):
        with pyro.plate("data", len(q.mean)):
            run()

    for _ in range(60):
        optimizer.zero_grad()
        elbo.loss_and_grads(lambda: program(prior.model), lambda: program(lambda: prior.guide(q)))
        optimizer.step()
    low, _ = prior.schedule(torch.tensor([1.0, 1e-3], device=device).double()).unbind(0)
    assert evaluated(prior, q) < before - 0.05  # of the 0.16 that it is above the entropy
    assert low[0] < low[1] - 1  # the wide one needs more noise


# --- The programs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (2, 1, 1)], ids=str)
def test_samples_follow_the_path_as_it_is(device, shape):
    torch.manual_seed(0)
    schedule = LearnedSchedule(shape, num_timesteps=20)
    prior = DiffusionPrior((2, 3, 3), None, schedule).to(device)
    for p in prior.denoiser.backbone.parameters():
        torch.nn.init.normal_(p, std=0.1)
    before = prior.with_steps(5)
    z = torch.randn(4, 2, 3, 3, device=device)
    old = prior.denoise(z, 10)
    bend(prior.schedule)
    assert (prior.denoise(z, 10) - old).abs().max() > 1e-3  # also by an index of the grid
    torch.testing.assert_close(prior.chain.denoise(z, 10), prior.denoise(z, 10))
    torch.testing.assert_close(prior.chain.reverse(z, 7).mean, prior.reverse(z, 7).mean)
    assert (prior.with_steps(5).denoise(z, 3) - before.denoise(z, 3)).abs().max() > 1e-3
    path = prior.schedule(prior.schedule.original("times")[1:].to(device)).float()
    torch.testing.assert_close(prior.chain.schedule.log_snr[1:], path)
    few = prior.with_steps(3)
    assert sample(few, 2).shape == (2, 2, 3, 3) and not few.continuous
    assert sample(prior, 2).shape == (2, 2, 3, 3)
    assert ddim(prior, 2, num_steps=3).shape == (2, 2, 3, 3)
    assert trajectory(few, 2, 3)[1].shape == (3, 2, 2, 3, 3)
    if shape:
        with one_line_value_error("one log-SNR for all dimensions"):
            ProbabilityFlow(prior)
    else:
        assert ProbabilityFlow(prior, num_steps=3).event_shape == (2, 3, 3)


def test_the_path_is_saved_with_the_prior(device):
    prior = DiffusionPrior(3, None, LearnedSchedule((3,))).to(device)
    bend(prior.schedule)
    other = DiffusionPrior(3, None, LearnedSchedule((3,))).to(device)
    other.load_state_dict(prior.state_dict())
    z = torch.randn(5, 3, device=device)
    torch.testing.assert_close(other.reverse(z, 400).mean, prior.reverse(z, 400).mean)
    torch.testing.assert_close(other.chain.schedule.log_snr, prior.chain.schedule.log_snr)


@pytest.mark.parametrize("name, shape", [("learned", ()), ("learned-diagonal", (4, 1, 1))])
def test_configurations(device, name, shape):
    config = ModelConfig(num_timesteps="continuous", schedule=name, latent_shape=(4, 4, 4), width=8)
    vae = make_vae(config).to(device)
    assert vae.prior.schedule.shape == shape
    x = torch.rand(3, 1, 8, 8, device=device)
    Timestep_ELBO(k=2).loss_and_grads(vae.model, vae.guide, x)
    moved = [p for p in vae.prior.schedule.parameters() if p.requires_grad]
    assert all(p.grad.abs().sum() > 0 for p in moved)
    for options in ({"num_timesteps": 1000}, {"noise_log_snr": 4.0}):
        options = {"num_timesteps": "continuous", "schedule": name} | options
        with one_line_value_error(f"schedule='{name}' is in continuous time"):
            ModelConfig(**options)


def test_what_is_refused():
    with one_line_value_error("num_timesteps is 1000, but the schedule is in continuous time"):
        DiffusionPrior(2, 1000, LearnedSchedule())
    with one_line_value_error("the ends of a learned schedule are its own"):
        LearnedSchedule().starting_at(4.0)


@pytest.mark.parametrize("shape", [2, (2, 1, 2)], ids=str)
def test_a_chain_on_paths_per_dimension_has_one_bound(device, shape):
    # With the part of the KLs that is a constant, or with every KL as it is.
    torch.manual_seed(0)
    net = ResidualMLP(shape, width=8)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.05)
    schedule = LearnedSchedule((2,) if shape == 2 else (2, 1, 1))
    for parameter in schedule.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    prior = DiffusionPrior(shape, None, schedule, net)
    chain = prior.double().to(device).with_steps(6)
    z_0 = torch.randn(1, *chain.event_shape, dtype=torch.float64, device=device)
    z_0 = z_0.expand(20_000, *chain.event_shape)
    draws = [
        chain_log_prob(chain, z_0, elbo)
        for elbo in (Timestep_ELBO("all"), Timestep_ELBO(k=8), TraceKL_ELBO())
    ]
    means = [draw.mean() for draw in draws]
    errors = [draw.std() / len(draw) ** 0.5 for draw in draws]
    constant = chain.latent_dim * variance_kl(chain).sum()
    for i in (0, 1):
        error = (errors[i].square() + errors[2].square()).sqrt()
        assert abs(means[i] - means[2]) < 5 * error < constant / 4
