r"""Denoisers: what they start at, what they are told of the time, and their shapes."""

from __future__ import annotations

import pytest
import torch
from errors import one_line_value_error
from torch import nn

from pyro_vaediff.denoise import REVERSE_VARIANCES, Denoiser, Learned
from pyro_vaediff.infer import Timestep_ELBO
from pyro_vaediff.likelihoods.distributions import Normal
from pyro_vaediff.nn import BACKBONES, make_backbone
from pyro_vaediff.priors import DiffusionPrior
from pyro_vaediff.sampling.probability_flow import ProbabilityFlow
from pyro_vaediff.schedules import CosineSchedule, LinearSchedule, Schedule

T = 20


@pytest.fixture(params=[*BACKBONES, "preconditioned"])
def denoiser(request, device):
    schedule, special = LinearSchedule(T), request.param == "preconditioned"
    name = "residual" if special else request.param
    shape = (3,)
    if name in ("conv", "unet", "vit", "dit"):
        pytest.importorskip("azula")
        shape = (3, 2, 1)
    net = make_backbone(name, shape, schedule, num_outputs=2, width=16)
    denoiser = Denoiser(net, schedule, shape, "eps", "learned", special)
    return denoiser.to(device, torch.float64)


def test_shapes_and_the_start_at_zero(denoiser, device):
    z = torch.randn(4, 5, *denoiser.event_shape, dtype=torch.float64, device=device)
    t = torch.randint(1, T + 1, (4, 5), device=device)
    for time in (t, t[:1], t[:, :1], 7):
        for output in denoiser.network(z, time):
            assert output.shape == z.shape
            assert not output.any()


def test_the_output_depends_on_latent_and_time(denoiser, device):
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    z = torch.randn(2, *denoiser.event_shape, dtype=torch.float64, device=device)
    z.requires_grad_()
    one, other = denoiser.network(z, 3)[0], denoiser.network(z, 4)[0]
    assert (one - other).abs().min() > 1e-6
    (slope,) = torch.autograd.grad(one[0].sum(), z)
    assert slope[0].all() and not slope[1].any()  # data stay apart
    mixed = denoiser.network(z, torch.tensor([3, 4], device=device))[0]
    torch.testing.assert_close(mixed, torch.stack([one[0], other[1]]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("schedule", [LinearSchedule(T), CosineSchedule(T)])
def test_the_backbone_is_told_the_log_snr(schedule):
    told = []

    class Spy(nn.Module):
        def forward(self, z, log_snr):
            told.append((z.shape, log_snr))
            return torch.zeros_like(z)

    denoiser = Denoiser(Spy(), schedule, (2, 1, 1)).double()
    z, t = torch.randn(4, 3, 2, 1, 1).double(), torch.randint(1, T + 1, (4, 1))
    denoiser(z, t)
    denoiser(z, 5)
    alpha_bar = schedule.original("alphas_cumprod")
    log_snr = (alpha_bar / (1 - alpha_bar)).log()
    (_, (shape, many), (_, one)) = told  # the first was the check at construction
    assert shape == (12, 2, 1, 1)
    torch.testing.assert_close(many, log_snr[t].expand(4, 3).reshape(-1), atol=1e-10, rtol=0)
    torch.testing.assert_close(one, log_snr[5].expand(12), atol=1e-10, rtol=0)


def test_one_timestep_has_an_embedding():
    prior = DiffusionPrior(2, 1, Schedule(torch.tensor([0.5])))
    assert prior.reverse(torch.zeros(3, 2), 1).mean.isfinite().all()


def test_a_step_before_any_time():
    backbone = make_backbone("residual", 3, LinearSchedule(10), width=4)
    denoiser = Denoiser(backbone, LinearSchedule(10), (3,))
    times = torch.tensor([0.04, 0.1, 0.35, 0.4, 1.0]).double()
    expected = torch.tensor([0.0, 0.0, 0.25, 0.3, 0.9]).double()
    torch.testing.assert_close(denoiser.before(times), expected, atol=1e-7, rtol=0)
    with one_line_value_error("^t must be from 1 to T = 10, got 0$"):
        denoiser(torch.zeros(3), 0)


def test_the_tables_are_not_part_of_the_state(denoiser):
    names = {name for name, _ in denoiser.named_parameters()}
    assert denoiser.state_dict().keys() == names


def test_autocast_does_not_reach_the_network(denoiser, device):
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    denoiser, z = denoiser.float(), torch.randn(4, *denoiser.event_shape, device=device)
    expected = denoiser(z, 3).mean
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(denoiser(z, 3).mean, expected)


def test_the_check_of_a_backbone_leaves_its_statistics(device):
    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, z, log_snr):
            return self.norm(z)

    backbone = Normalized()
    Denoiser(backbone, LinearSchedule(T), (3,))
    assert backbone.norm.num_batches_tracked == 0 and backbone.training


# --- The preconditioned denoiser ------------------------------------------------------------------

MEAN, SCALE = [0.3, -2.0], [0.2, 1.7]


def gaussian_prior(num_timesteps, reverse_variance="beta"):
    r"""Returns a prior whose denoiser is exact for latents from N(MEAN, SCALE^2)."""
    schedule = LinearSchedule(num_timesteps)
    num_outputs = 2 if reverse_variance == "learned" else 1
    net = make_backbone("residual", 2, schedule, num_outputs, width=8)
    prior = DiffusionPrior(
        2, num_timesteps, schedule, net, reverse_variance=reverse_variance, preconditioning=True
    )
    moments = prior.denoiser.preconditioning
    with torch.no_grad():
        moments.mean.copy_(torch.tensor(MEAN))
        moments.log_scale.copy_(torch.tensor(SCALE).log() / moments.gain)
    return prior.to(torch.float64)


def test_preconditioning_is_its_equation():
    moments = gaussian_prior(10).denoiser.preconditioning
    m, s = torch.tensor(MEAN).double(), torch.tensor(SCALE).double()
    z, log_snr = torch.randn(3, 2).double(), torch.tensor([[-4.0], [0.0], [3.0]]).double()
    out, other = moments(lambda u: (u.sin(), u.cos()), z, log_snr)
    alpha_bar = log_snr.sigmoid()
    v = alpha_bar * s**2 + 1 - alpha_bar
    u = (z - alpha_bar.sqrt() * m) / v.sqrt()
    noise = ((1 - alpha_bar) / v).sqrt() * u + (alpha_bar / v).sqrt() * s * u.sin()
    # The part that is linear in z_t is the denoiser's own.
    torch.testing.assert_close(out + (1 - alpha_bar).sqrt() * z, noise, atol=1e-6, rtol=0)
    torch.testing.assert_close(other, u.cos(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_timesteps", [10, 50])
@pytest.mark.parametrize("reverse_variance", REVERSE_VARIANCES)
def test_preconditioning_denoises_gaussian_latents_exactly(reverse_variance, num_timesteps):
    prior, t = gaussian_prior(num_timesteps, reverse_variance), torch.tensor([1, 3, 7, 10])
    torch.testing.assert_close(prior.denoiser.preconditioning.scale, torch.tensor(SCALE).double())
    z = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha_bar = prior.schedule.original("alphas_cumprod")[t, None]
    m, s = torch.tensor(MEAN).double(), torch.tensor(SCALE).double()
    gain = alpha_bar.sqrt() * s**2 / (alpha_bar * s**2 + 1 - alpha_bar)
    expected = m + gain * (z - alpha_bar.sqrt() * m)
    torch.testing.assert_close(prior.denoise(z, t), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("reverse_variance", ["beta", "learned"])
def test_the_chain_of_a_preconditioned_prior_ends_in_its_moments(reverse_variance):
    prior = gaussian_prior(4000, reverse_variance)
    mean, variance = torch.zeros(2).double(), torch.ones(2).double()
    with torch.no_grad():
        for t in range(4000, 0, -1):  # the reverse kernel is affine: its moments are exact
            ends = prior.reverse(torch.stack([torch.zeros(2), torch.ones(2)]).double(), t)
            offset, slope = ends.mean[0], ends.mean[1] - ends.mean[0]
            mean, variance = slope * mean + offset, slope**2 * variance + ends.variance[0]
    # up to the discretization and what is left of z_0 in z_T, both of order 1 / T here
    torch.testing.assert_close(mean, torch.tensor(MEAN).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(variance.sqrt(), torch.tensor(SCALE).double(), atol=0, rtol=0.02)


def test_the_bound_of_a_preconditioned_prior_is_the_kl_of_gaussians():
    torch.manual_seed(0)
    prior = gaussian_prior(1000)
    q = Normal(torch.tensor(MEAN).double() + 0.1, torch.full((2,), 0.15).double()).to_event(1)
    p = Normal(torch.tensor(MEAN).double(), torch.tensor(SCALE).double()).to_event(1)
    kl = torch.distributions.kl_divergence(q, p)
    elbo = Timestep_ELBO("all", conditioning="x", entropy="exact")
    with torch.no_grad():
        losses = torch.stack(
            [elbo.differentiable_loss(lambda _: prior.model(), prior.guide, q) for _ in range(200)]
        )
    assert losses.mean() > kl - 4 * losses.std() / len(losses) ** 0.5  # a bound
    assert losses.mean() < kl + 0.05 + 4 * losses.std() / len(losses) ** 0.5  # and a tight one


def test_the_probability_flow_of_a_preconditioned_prior_has_the_density_of_its_moments():
    prior, m, s = gaussian_prior(1000), torch.tensor(MEAN).double(), torch.tensor(SCALE).double()
    p = Normal(m, s).to_event(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        z = p.sample((50,))
    # The flow is affine, and carries z to where N(m, s^2) has not quite become N(0, I).
    alpha_bar = prior.schedule.original("alphas_cumprod")[-1]
    mean, scale = alpha_bar.sqrt() * m, (alpha_bar * s**2 + 1 - alpha_bar).sqrt()
    z_T = mean + scale / s * (z - m)
    start, noised = Normal(torch.zeros_like(m), 1.0).to_event(1), Normal(mean, scale).to_event(1)
    expected = p.log_prob(z) + start.log_prob(z_T) - noised.log_prob(z_T)
    log_prob = ProbabilityFlow(prior, num_steps=1000).log_prob(z)  # of second order in 1 / T
    torch.testing.assert_close(log_prob, expected, atol=1e-3, rtol=0)


def test_preconditioning_is_for_a_network_that_predicts_the_noise():
    with pytest.raises(ValueError, match=r"^a preconditioned denoiser predicts 'eps'.* got 'v'$"):
        DiffusionPrior(2, T, parameterization="v", preconditioning=True)


def test_a_variance_is_given_by_its_name_or_as_an_object():
    shapes = [
        {name: p.shape for name, p in DiffusionPrior(3, 4, reverse_variance=v).named_parameters()}
        for v in ("learned", Learned())
    ]
    assert shapes[0] == shapes[1]
