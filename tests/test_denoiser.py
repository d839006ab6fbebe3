r"""Denoisers: what they start at, what they are told of the time, and their shapes."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_vaediff.nn import DENOISERS, ResidualDenoiser, make_denoiser
from pyro_vaediff.nn.denoiser import log_snr_embedding
from pyro_vaediff.schedules import CosineSchedule, LinearSchedule, Schedule

T = 20


@pytest.fixture(params=DENOISERS)
def denoiser(request, device):
    net = make_denoiser(request.param, 3, LinearSchedule(T), num_outputs=2, width=16)
    return net.to(device, torch.float64)


def test_shapes_and_the_start_at_zero(denoiser, device):
    z = torch.randn(4, 5, 3, dtype=torch.float64, device=device)
    t = torch.randint(1, T + 1, (4, 5), device=device)
    for time in (t, t[:1], t[:, :1], 7):
        outputs = denoiser(z, time)
        assert outputs.shape == (4, 5, 6)
        assert not outputs.any()


def test_the_output_depends_on_latent_and_time(denoiser, device):
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    z = torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True)
    one, other = denoiser(z, 3), denoiser(z, 4)
    assert (one - other).abs().min() > 1e-6
    (slope,) = torch.autograd.grad(one[0].sum(), z)
    assert slope[0].all() and not slope[1].any()  # data stay apart
    mixed = denoiser(z, torch.tensor([3, 4], device=device))
    torch.testing.assert_close(mixed, torch.stack([one[0], other[1]]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("schedule", [LinearSchedule(T), CosineSchedule(T)])
def test_the_embedding_is_of_the_log_snr(schedule):
    embedding = log_snr_embedding(schedule, 4)
    alpha_bar = schedule.original("alphas_cumprod")[1:]
    log_snr = (alpha_bar / (1 - alpha_bar)).log()
    u = (log_snr - log_snr.min()) / (log_snr.max() - log_snr.min())
    expected = torch.stack([f(k * math.pi / 2 * u) for f in (torch.sin, torch.cos) for k in (1, 2)])
    torch.testing.assert_close(embedding[1:], expected.T, atol=1e-10, rtol=0)
    assert torch.equal(embedding[0], embedding[1])  # at t = 0 the SNR is infinite


def test_one_timestep_has_an_embedding():
    assert log_snr_embedding(Schedule(torch.tensor([0.5])), 2).isfinite().all()
    net = ResidualDenoiser(2, LinearSchedule(1), width=8)
    assert net(torch.zeros(3, 2), 1).shape == (3, 2)


def test_the_tables_are_not_part_of_the_state(denoiser):
    assert not any("embedding" in name for name in denoiser.state_dict())
