r"""Likelihoods against scipy, explicit sums over the levels, and the law of their samples."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import scipy.special
import scipy.stats
import torch

from pyro_vaediff.likelihoods import (
    BinarizedSpace,
    CategoricalLikelihood,
    DequantizedSpace,
    GaussianLikelihood,
    LogisticMixtureLikelihood,
    check_range,
    make_likelihood,
)
from pyro_vaediff.nn.scale import bounded_scale

NAMES = [
    "gaussian",
    "gaussian-pixel",
    "gaussian-fixed",
    "bernoulli",
    "discretized-logistic",
    "logistic-mixture",
    "categorical",
]
SHAPE = (2, 3, 4)
LEVELS = 5


def make(name, device, batch_shape=(), dtype=torch.float64, seed=0):
    """Returns a likelihood and its distribution under random maps."""
    torch.manual_seed(seed)
    likelihood = make_likelihood(name, SHAPE, LEVELS).to(device, dtype)
    params = torch.randn(*batch_shape, likelihood.num_maps, *SHAPE[1:], dtype=torch.float64)
    return likelihood, params.to(device, dtype)


def as_numpy(x):
    return x.detach().cpu().double().numpy()


# --- The bounded scale ---


def test_bounded_scale_is_a_difference_of_softplus(device):
    raw = torch.linspace(-15, 15, 31, dtype=torch.float64, device=device)
    shifted = as_numpy(raw) + np.log(np.e - 1)
    exact = 0.1 + np.logaddexp(0, shifted) - np.logaddexp(0, shifted - 9.9)
    np.testing.assert_allclose(as_numpy(bounded_scale(raw, 0.1, 10.0)), exact, atol=1e-10)
    assert torch.autograd.gradcheck(bounded_scale, raw.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounded_scale_stays_finite_for_every_finite_raw(device, dtype):
    largest = torch.finfo(dtype).max
    raw = [-largest, -1e4, -30.0, 0.0, 30.0, 99.0, 101.0, 1e4, largest]
    raw = torch.tensor(raw, dtype=dtype, device=device, requires_grad=True)
    scale = bounded_scale(raw)
    scale.sum().backward()
    assert raw.grad.isfinite().all() and (raw.grad >= 0).all()
    assert (scale.diff() >= 0).all()
    assert scale[0].item() == pytest.approx(1e-4)
    assert scale[3].item() == pytest.approx(1 + 1e-4, rel=1e-6)
    assert scale[-1].item() == pytest.approx(1e2, rel=1e-6)


@pytest.mark.parametrize(
    ("floor", "ceiling"), [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (1.0, math.inf)]
)
def test_bounded_scale_rejects_impossible_bounds(floor, ceiling):
    with pytest.raises(ValueError, match="floor"):
        bounded_scale(torch.zeros(1), floor, ceiling)


# --- Densities ---


@pytest.mark.parametrize("sigma", ["shared", "pixel", 0.3])
def test_gaussian_density_is_scipys(device, sigma):
    torch.manual_seed(0)
    likelihood = GaussianLikelihood(SHAPE, sigma).to(device, torch.float64)
    params = torch.randn(6, likelihood.num_maps, 3, 4, dtype=torch.float64, device=device)
    x = torch.randn(6, *SHAPE, dtype=torch.float64, device=device)
    # The first C maps are the mean, the next C the unconstrained sigma, both as documented.
    raw = {"shared": torch.tensor(-1.0, dtype=torch.float64), "pixel": params[:, 2:]}.get(sigma)
    scale = 0.3 if raw is None else 1e-3 + np.logaddexp(0, as_numpy(raw) + np.log(np.e - 1))
    exact = scipy.stats.norm.logpdf(as_numpy(x), as_numpy(params[:, :2]), scale).sum((1, 2, 3))
    np.testing.assert_allclose(as_numpy(likelihood(params).log_prob(x)), exact, atol=1e-10)
    assert likelihood.num_maps == (4 if sigma == "pixel" else 2)


def test_fixed_gaussian_has_the_floor_of_the_2021_code(device):
    likelihood = make_likelihood("gaussian-fixed", (3, 32, 32)).to(device)
    mean = torch.zeros(3, 32, 32, device=device)
    nats_per_dim = -likelihood(mean).log_prob(mean).item() / 3072 - likelihood.space().log_bin_width
    # log2(sqrt(pi)) + log2(256 / 2); a standard deviation of 1/2 would have 7.33.
    assert nats_per_dim / math.log(2) == pytest.approx(math.log2(math.pi) / 2 + 7, abs=1e-5)
    assert nats_per_dim / math.log(2) == pytest.approx(7.83, abs=0.005)


def test_learned_sigma_is_bounded_below_and_gets_a_gradient(device):
    likelihood = GaussianLikelihood(SHAPE).to(device)
    x = torch.zeros(SHAPE, device=device)
    likelihood(x).log_prob(x + 1).backward()
    assert likelihood.raw_sigma.grad.abs() > 0.1
    with torch.no_grad():
        likelihood.raw_sigma.fill_(-1e6)
    assert likelihood(x).base_dist.scale.min().item() == pytest.approx(1e-3)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_a_bin_of_the_logistic_holds_at_most_a_known_mass(device, levels):
    # The smallest scale is a tenth of half a bin, so that a bin holds F(10) - F(-10) = tanh(5). In
    # float64: float32 rounds locations of 256 levels by more than a ten-thousandth of a bin.
    likelihood = make_likelihood("discretized-logistic", (1, 1, 1), levels).to(device)
    x = torch.tensor([[[2 / (levels - 1) - 1]]], dtype=torch.float64, device=device)
    loc = x.clone().requires_grad_()
    law = likelihood(torch.cat([loc, torch.full_like(loc, -1e6)]))
    exact = math.tanh(5) if levels > 2 else scipy.special.expit(10)
    log_prob = law.log_prob(x)
    assert log_prob.exp().item() == pytest.approx(exact, rel=1e-9)
    log_prob.backward()
    assert loc.grad.isfinite().all()


def test_bernoulli_probability_is_scipys(device):
    likelihood, params = make("bernoulli", device, (6,))
    x = (torch.rand(6, *SHAPE, dtype=torch.float64, device=device) < 0.5).double()
    exact = scipy.stats.bernoulli.logpmf(as_numpy(x), scipy.special.expit(as_numpy(params)))
    log_prob = as_numpy(likelihood(params).log_prob(x))
    np.testing.assert_allclose(log_prob, exact.sum((1, 2, 3)), atol=1e-10)


def test_categorical_is_a_log_softmax_over_the_levels_of_its_channel(device):
    likelihood, params = make("categorical", device, (6,))
    index = torch.randint(LEVELS, (6, *SHAPE))
    # Maps are ordered channel by channel, the levels of one channel next to each other.
    logits = as_numpy(params).reshape(6, 2, LEVELS, 3, 4)
    log_probs = scipy.special.log_softmax(logits, axis=2)
    exact = np.take_along_axis(log_probs, index.numpy()[:, :, None], axis=2).sum((1, 2, 3, 4))
    x = (2 * index.double() / (LEVELS - 1) - 1).to(device)
    np.testing.assert_allclose(as_numpy(likelihood(params).log_prob(x)), exact, atol=1e-10)


def test_logistic_mixture_is_a_weighted_sum_of_bins(device):
    torch.manual_seed(0)
    likelihood = LogisticMixtureLikelihood(SHAPE, LEVELS, num_components=3).to(device)
    params = torch.randn(6, likelihood.num_maps, *SHAPE[1:], dtype=torch.float64, device=device)
    index = torch.randint(LEVELS, (6, *SHAPE))
    x = 2 * index.double() / (LEVELS - 1) - 1
    # Logits, then locations, then scales; in each, the channels of a component side by side.
    logits, loc, raw = as_numpy(params).reshape(6, 3, 3, *SHAPE).swapaxes(0, 1)
    scale = 0.1 / (LEVELS - 1) + np.logaddexp(0, raw + np.log(np.e - 1))
    edges = as_numpy(x)[:, None] + np.array([-1, 1]).reshape(2, 1, 1, 1, 1, 1) / (LEVELS - 1)
    lower, upper = scipy.stats.logistic.cdf(edges, loc, scale)
    lower = np.where(index.numpy()[:, None] == 0, 0.0, lower)
    upper = np.where(index.numpy()[:, None] == LEVELS - 1, 1.0, upper)
    exact = np.log((scipy.special.softmax(logits, 1) * (upper - lower)).sum(1)).sum((1, 2, 3))
    log_prob = as_numpy(likelihood(params).log_prob(x.to(device)))
    np.testing.assert_allclose(log_prob, exact, atol=1e-10)


# --- Samples and means ---


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_mean(device, name):
    likelihood, params = make(name, device, (2,))
    law = likelihood(params)
    samples = law.sample((20_000,))
    assert samples.shape == (20_000, 2, *SHAPE)
    error = (samples.mean(0) - law.mean).abs()
    se = samples.std(0) / math.sqrt(len(samples))
    assert (se < 0.03).all()
    assert (error < 5 * se + 1e-12).all()


@pytest.mark.parametrize("name", ["discretized-logistic", "logistic-mixture", "categorical"])
def test_mean_is_the_sum_over_the_levels(device, name):
    likelihood, params = make(name, device)
    law = likelihood(params).base_dist
    x = torch.linspace(-1, 1, LEVELS, dtype=torch.float64, device=device)
    exact = sum(value * law.log_prob(value.expand(SHAPE)).exp() for value in x)
    torch.testing.assert_close(law.mean, exact, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_mean_and_log_prob_are_differentiable(device, name):
    likelihood, params = make(name, device)
    x = likelihood.space(LEVELS).preprocess(torch.ones(SHAPE, dtype=torch.uint8, device=device))
    x = x.double()
    params.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: likelihood(p).log_prob(x), params)
    assert torch.autograd.gradcheck(lambda p: likelihood(p).mean, params)


# --- x-space ---


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("name", ["discretized-logistic", "logistic-mixture", "categorical"])
def test_grid_round_trip(device, name, levels):
    u = torch.arange(levels, dtype=torch.uint8, device=device).view(levels, 1, 1, 1)
    space = make_likelihood(name, (1, 1, 1), levels).space(levels)
    x = space.preprocess(u)
    assert x.dtype == torch.get_default_dtype() and x.device == u.device
    exact = 2 * u.float() / (levels - 1) - 1
    torch.testing.assert_close(x, exact, atol=0, rtol=0)
    torch.testing.assert_close(space.to_unit(x), u.float() / (levels - 1))


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_gaussian_dequantization_is_uniform_over_the_bin(device, levels):
    torch.manual_seed(0)
    space = DequantizedSpace(levels)
    u = torch.arange(levels, dtype=torch.uint8, device=device).view(levels, 1, 1, 1)
    x = space.preprocess(u.expand(10_000, -1, -1, -1, -1)).double()
    center = (2 * (u.double() + 0.5) / levels) - 1
    width = math.exp(space.log_bin_width)
    assert (x - center).abs().max() <= width / 2 + 1e-6
    noise = ((x - center) / width).flatten()
    # The noise is U[-1/2, 1/2]: mean 0, variance 1/12, fourth moment 1/80.
    se = math.sqrt(1 / 12 / len(noise))
    assert noise.mean().abs() < 5 * se and se < 0.003
    se = math.sqrt((1 / 80 - 1 / 144) / len(noise))
    assert (noise.square().mean() - 1 / 12).abs() < 5 * se and se < 0.001
    unit = u.double() / (levels - 1)
    torch.testing.assert_close(space.to_unit(center), unit, atol=1e-10, rtol=0)


def test_bernoulli_binarization_keeps_the_mean(device):
    torch.manual_seed(0)
    space = BinarizedSpace(17)
    u = torch.arange(17, dtype=torch.uint8, device=device).view(17, 1, 1, 1)
    x = space.preprocess(u.expand(20_000, -1, -1, -1, -1))
    assert ((x == 0) | (x == 1)).all()
    p = u.float() / 16
    se = (p * (1 - p) / 20_000).sqrt()
    # At 0 and 16 the standard error is zero: these pixels are never random.
    assert ((space.to_unit(x).mean(0) - p).abs() <= 5 * se).all() and se.max() < 0.004


def test_to_unit_clamps(device):
    x = torch.tensor([-7.0, 7.0], device=device)
    for name in NAMES:
        assert make_likelihood(name, (1, 8, 8)).space().to_unit(x).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", NAMES)
def test_only_a_density_has_bins(name):
    space = make_likelihood(name, (1, 8, 8), 17).space(17)
    assert space.levels == 17
    exact = math.log(2 / 17) if "gaussian" in name else 0.0
    assert space.log_bin_width == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_number_of_maps(name):
    per_channel = {"gaussian-pixel": 2, "discretized-logistic": 2, "categorical": LEVELS}
    per_channel["logistic-mixture"] = 3 * 5
    assert make_likelihood(name, SHAPE, LEVELS).num_maps == 2 * per_channel.get(name, 1)


# --- Inside programs ---


@pytest.mark.parametrize("particles", [(), (3, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_observed_in_a_plate_with_validation(device, name, particles):
    likelihood, params = make(name, device, (3, 5) if particles else (5,), torch.float32)
    images = torch.randint(LEVELS, (5, *SHAPE), dtype=torch.uint8).to(device)
    x = likelihood.space(LEVELS).preprocess(images)

    def model():
        with pyro.plate("data", 5, dim=-1):
            pyro.sample("x", likelihood(params), obs=x)

    with pyro.validation_enabled():
        trace = pyro.poutine.trace(model).get_trace()
        trace.compute_log_prob()
    # Datum by datum, without any broadcasting.
    rows = params.reshape(-1, 5, *params.shape[-3:])
    exact = [[likelihood(p).log_prob(v) for p, v in zip(row, x, strict=True)] for row in rows]
    exact = torch.stack([torch.stack(row) for row in exact])
    log_prob = trace.nodes["x"]["log_prob"].reshape(exact.shape)
    torch.testing.assert_close(log_prob, exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_plate_expands_the_distribution(device, name):
    likelihood, params = make(name, device)

    def model():
        with pyro.plate("data", 5, dim=-1):
            return pyro.sample("x", likelihood(params))

    with pyro.validation_enabled():
        x = model()
        law = likelihood(params).expand((5,))
        assert x.shape == (5, *SHAPE) and law.batch_shape == (5,)
        exact = torch.stack([likelihood(params).log_prob(v) for v in x])
        torch.testing.assert_close(law.log_prob(x), exact, atol=1e-10, rtol=0)
        torch.testing.assert_close(law.mean[3], likelihood(params).mean, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "name", ["bernoulli", "discretized-logistic", "logistic-mixture", "categorical"]
)
def test_validation_finds_images_of_another_x_space(device, name):
    likelihood, params = make(name, device)
    dequantized = torch.full(SHAPE, 0.123, dtype=torch.float64, device=device)
    with pyro.validation_enabled(), pytest.raises(ValueError, match="support"):
        likelihood(params).log_prob(dequantized)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_maps_are_cast_up(device, name):
    likelihood, params = make(name, device, (), torch.float32)
    params = params.bfloat16()
    law = likelihood(params)
    x = law.sample()
    assert x.dtype == torch.float32
    with torch.autocast(device.type, torch.bfloat16):
        inside = likelihood(params)
        assert inside.mean.dtype == inside.log_prob(x).dtype == torch.float32
        torch.testing.assert_close(inside.log_prob(x), law.log_prob(x))
        torch.testing.assert_close(inside.mean, law.mean)


# --- Broken input ---


def test_broken_input_raises():
    with pytest.raises(ValueError, match=r"name must be one of gaussian, .*got 'poisson'"):
        make_likelihood("poisson", SHAPE)
    for shape in [(8, 8), (0, 8, 8), (1, 8.0, 8)]:
        with pytest.raises(ValueError, match="image_shape"):
            make_likelihood("gaussian", shape)
    for levels in [1, 257, 16.0]:
        with pytest.raises(ValueError, match="levels"):
            make_likelihood("categorical", SHAPE, levels)
    for sigma in ["fixed", 0.0, -1.0, math.nan, None]:
        with pytest.raises(ValueError, match="sigma"):
            GaussianLikelihood(SHAPE, sigma)


@pytest.mark.parametrize("name", NAMES)
def test_broken_images_and_maps_raise(device, name):
    likelihood, params = make(name, device)
    with pytest.raises(ValueError, match=r"images must be uint8 with values 0\.\.4, got"):
        likelihood.space(LEVELS).preprocess(torch.zeros(SHAPE, device=device))
    with pytest.raises(ValueError, match="levels"):
        likelihood.space(1)
    with pytest.raises(ValueError, match="params must end in shape"):
        likelihood(params[1:])


def test_grid_likelihoods_reject_other_levels():
    with pytest.raises(ValueError, match="levels=256"):
        CategoricalLikelihood((1, 2, 2), 17).space()


def test_check_range(device):
    images = torch.tensor([0, 16], dtype=torch.uint8, device=device)
    check_range(images, 17)
    check_range(images[:0], 17)
    with pytest.raises(ValueError, match="value 16, beyond levels=16"):
        check_range(images, 16)
