r"""Backbones for latents that are images, from the networks of azula."""

from __future__ import annotations

import copy
import math
import pickle
import sys

import pyro
import pytest
import torch
from errors import one_line_value_error
from image_latents import EVENT, Decoder, Encoder
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_vaediff import VAE, DiffusionPrior, GaussianPrior, Timestep_ELBO, TraceKL_ELBO
from pyro_vaediff.nn import DiTBackbone, LogSNRFeatures, UNetBackbone, ViTBackbone, make_backbone
from pyro_vaediff.sampling.probability_flow import ProbabilityFlow
from pyro_vaediff.schedules import LinearSchedule
from pyro_vaediff.train.build import make_prior
from pyro_vaediff.train.config import ModelConfig
from pyro_vaediff.train.model_config import DENOISERS

pytest.importorskip("azula")

NAMES = {"unet": UNetBackbone, "vit": ViTBackbone, "dit": DiTBackbone}
SHAPES = [(1, 2, 2), (3, 5, 4), (2, 7, 3), (2, 1, 6), (4, 8, 8)]
T = 5


def make(name, shape, device="cpu", dtype=torch.float64, random=True, **options):
    r"""Returns a small backbone, away from its start."""
    options = {"width": 8} | options
    net = make_backbone(name, shape, LinearSchedule(T), **options)
    if random:
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.3)
    return net.to(device, dtype)


def inputs(device, shape, N=3, context=0):
    like = {"dtype": torch.float64, "device": device}
    told = [torch.randn(N, context, **like)] if context else []
    return [torch.randn(N, *shape, **like), 5 * torch.randn(N, **like), *told]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_prior_starts_at_a_standard_normal(device, name, shape, dtype):
    for num_outputs, variance in ((1, "beta"), (2, "learned")):
        net = make(name, shape, device, dtype, random=False, num_outputs=num_outputs)
        prior = DiffusionPrior(shape, T, backbone=net, reverse_variance=variance).to(device, dtype)
        z = torch.randn(4, *shape, device=device, dtype=dtype)
        for t in (1, T):
            p, beta = prior.reverse(z, t), prior.schedule.betas[t]
            # The reverse of a step of N(0, I), which is its own marginal at all times.
            torch.testing.assert_close(p.mean, (1 - beta).sqrt() * z)
            torch.testing.assert_close(p.stddev, beta.sqrt().expand_as(z))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_maps_of_the_latents_channels(device, name, shape):
    net = make(name, shape, device, num_outputs=2, random=False)
    last = net.net.ascent[-1][-1] if name == "unet" else net.net.out_proj
    channels = torch.arange(2.0 * shape[0], device=device).double()
    with torch.no_grad():  # a patch has its pixels within each channel
        last.bias.copy_(channels.repeat_interleave(len(last.bias) // len(channels)))
    outputs = net(*inputs(device, shape))
    for output, values in zip(outputs, channels.chunk(2), strict=True):
        assert torch.equal(output, values[:, None, None].expand(3, *shape))


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_examples_stay_apart(device, name, mode):
    shape = (2, 4, 3)
    net = make(name, shape, device, context_features=2).train(mode)
    z, log_snr, c = inputs(device, shape, context=2)
    z.requires_grad_()
    together = net(z, log_snr, c)
    alone = torch.cat([net(z[i, None], log_snr[i, None], c[i, None]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-10, rtol=0)
    (slope,) = torch.autograd.grad(together[1].sum(), z)
    assert slope[1].all() and not slope[[0, 2]].any()


@pytest.mark.parametrize("name", NAMES)
def test_the_output_depends_on_all_pixels_the_noise_level_and_the_context(device, name):
    shape = (2, 8, 7)
    net = make(name, shape, device, context_features=2)
    given = inputs(device, shape, N=1, context=2)
    for x in given:
        x.requires_grad_()
    slopes = torch.autograd.grad(net(*given)[0, 0, 0, 0], given)
    assert all(slope.all() for slope in slopes)


@pytest.mark.parametrize("shape", [(2, 4, 3), (1, 3, 2)], ids=str)
def test_a_diffusion_transformer_is_azulas(device, shape):
    dit = pytest.importorskip("azula.nn.dit")
    C, height, width = shape
    net = make("dit", shape, device, context_features=2, width=12)
    reference = dit.DiT(
        C, C, mod_features=64, pos_channels=2, hid_channels=12, hid_blocks=3, attention_heads=4
    ).to(device, torch.float64)
    reference.load_state_dict(net.net.state_dict())
    z, log_snr, c = inputs(device, shape, context=2)
    layer = net.modulation[0]
    told = torch.cat([net.embedding(log_snr), c], -1) @ layer.weight.mT + layer.bias
    pixels = [(i, j) for i in range(height) for j in range(width)]
    tokens = torch.stack([z[:, :, i, j] for i, j in pixels], 1)
    positions = torch.tensor(pixels, dtype=torch.float64, device=device)
    expected = reference(tokens, told * told.sigmoid(), pos=positions)
    actual = torch.stack([net(z, log_snr, c)[:, :, i, j] for i, j in pixels], 1)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


def test_features_of_the_log_snr(device):
    log_snr = torch.tensor([[-8.0], [0.0], [3.0], [4.0]], device=device).double()
    features = LogSNRFeatures((-8.0, 4.0), dim=6)(log_snr)
    assert features.shape == (4, 1, 6)
    for u, row in zip((0, 2 / 3, 11 / 12, 1), features[:, 0].tolist(), strict=True):
        waves = [f(k * math.pi * u / 2) for f in (math.sin, math.cos) for k in (1, 2, 3)]
        assert row == pytest.approx(waves, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_a_mean_over_all_pixels(device, name):
    net = make(name, (1, 4, 3), device, torch.float32, random=False, width=16)
    optimizer, errors = torch.optim.Adam(net.parameters(), lr=1e-2), []
    for _ in range(100):
        z, log_snr = torch.randn(64, 1, 4, 3, device=device), 2 * torch.randn(64, device=device)
        mean = z.mean((1, 2, 3), keepdim=True) * log_snr.sigmoid()[:, None, None, None]
        error = (net(z, log_snr) - 12**0.5 * mean).square().mean() / (12 * mean.square().mean())
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[0] == pytest.approx(1)  # that of zero
    assert sum(errors[-20:]) / 20 < 0.2


# --- In programs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_bound_starts_at_that_of_a_standard_normal_prior(device, name):
    # The reverse steps are the exact posterior of the forward ones, so that the ratio of a path is
    # that of its first sample.
    prior = DiffusionPrior(EVENT, T, backbone=make(name, EVENT, random=False))
    vae = VAE(Encoder(), Decoder(), prior).to(device, torch.float64)
    gaussian = VAE(vae.encoder, vae.decoder, GaussianPrior(EVENT)).to(device, torch.float64)
    x, losses = torch.randn(6, 3, dtype=torch.float64, device=device), []
    for program in (vae, gaussian):
        pyro.set_rng_seed(0)
        losses.append(Trace_ELBO().loss(program.model, program.guide, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make_elbo", [Trace_ELBO, TraceKL_ELBO, lambda: Timestep_ELBO(k=2)])
def test_gradients_reach_every_parameter(device, name, make_elbo):
    prior = DiffusionPrior(EVENT, T, backbone=make(name, EVENT))
    vae = VAE(Encoder(), Decoder(), prior).to(device, torch.float64)
    x = torch.randn(6, 3, dtype=torch.float64, device=device)
    assert math.isfinite(make_elbo().loss_and_grads(vae.model, vae.guide, x))
    assert all(p.grad.isfinite().all() and p.grad.any() for p in prior.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_probability_flow_has_first_and_second_gradients(device, name):
    shape = (1, 2, 3)
    flow = ProbabilityFlow(DiffusionPrior(shape, T, backbone=make(name, shape, device, width=4)), 2)
    flow.prior.to(device, torch.float64)
    for parameter in flow.prior.denoiser.backbone.parameters():
        nn.init.normal_(parameter, std=0.1)
    z = torch.randn(2, *shape, dtype=torch.float64, device=device, requires_grad=True)
    (first,) = torch.autograd.grad(flow.log_prob(z).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), z)
    step = 1e-5 * torch.randn_like(z)

    def squares(z):
        return torch.autograd.grad(flow.log_prob(z).sum(), z)[0].square().sum()

    difference = squares(z + step) - squares(z - step)
    expected = 2 * (second * step).sum()
    torch.testing.assert_close(difference, expected, atol=1e-9, rtol=1e-3)


# --- As objects -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", NAMES)
def test_copies_and_states(device, name, make_copy):
    net, given = make(name, (2, 4, 3), device), inputs(device, (2, 4, 3))
    other = make(name, (2, 4, 3), device)
    assert (net(*given) != other(*given)).any()
    other.load_state_dict(net.state_dict())
    for same in (other, make_copy(net)):
        assert torch.equal(net(*given), same(*given))
    assert net.state_dict().keys() == {name for name, _ in net.named_parameters()}


@pytest.mark.parametrize("name, kind", NAMES.items())
def test_small_defaults_by_name(name, kind):
    net = make_backbone(name, (4, 8, 8), LinearSchedule(T))
    assert type(net) is kind and name in DENOISERS
    assert 1e5 < sum(p.numel() for p in net.parameters()) < 5e5


@pytest.mark.parametrize("name", NAMES)
def test_missing_azula_is_one_line(monkeypatch, name):
    for module in ("azula.nn.unet", "azula.nn.vit"):
        monkeypatch.setitem(sys.modules, module, None)
    with one_line_value_error(r"^the network azula.nn.\w+ is missing: pip install azula$"):
        make(name, (1, 2, 2))


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: make("unet", 2), r"event_shape must be \(C, h, w\) for a UNet.*, got \(2,\)$"),
        (
            lambda: make("vit", (2, 3)),
            r"event_shape must be \(C, h, w\) for a ViT.*, got \(2, 3\)$",
        ),
        (lambda: make("dit", (2,)), r"event_shape must be \(C, h, w\) for a DiT.*, got \(2,\)$"),
        (lambda: make("unet", (2, 2, 0)), "each number in event_shape .* got 0"),
        (lambda: make("unet", (1, 2, 2), width=1), "width must be a whole number >= 2 .* got 1"),
        (lambda: make("vit", (1, 2, 2), width=7), "width of a transformer must be even, got 7"),
        (lambda: UNetBackbone((1, 2, 2), num_blocks=0), "num_blocks .* got 0"),
        (lambda: ViTBackbone((1, 2, 2), patch_size=0), "patch_size .* got 0"),
        (lambda: ViTBackbone((1, 2, 2), num_heads=0), "num_heads .* got 0"),
        (
            lambda: make("dit", (1, 2, 2), context_features=2)(*inputs("cpu", (1, 2, 2))),
            "2 features .* got 0",
        ),
        (lambda: make_prior(ModelConfig(denoiser="unet")), r"for a UNetBackbone, got \(16,\)"),
    ],
)
def test_bad_input(make, match):
    with one_line_value_error(match):
        make()
