r"""Autoregressive likelihoods: enumerated images, what a pixel sees, and samples by definition."""

from __future__ import annotations

import itertools
import math

import pyro
import pytest
import scipy.stats
import torch
from errors import one_line_value_error
from pyro.infer import SVI
from torch import nn

from pyro_vaediff import VAE, DiffusionPrior, Timestep_ELBO
from pyro_vaediff.likelihoods import (
    AUTOREGRESSIVE,
    AutoregressiveLikelihood,
    BernoulliLikelihood,
    make_likelihood,
)
from pyro_vaediff.nn import ConvDecoder, ConvEncoder, PixelCNN
from pyro_vaediff.sampling import point

F = 4  # features per pixel
# Small enough that all their images can be listed: 64, 81, 729 and 64 of them.
SMALL = [
    ("bernoulli", (1, 2, 3), 2),
    ("categorical", (1, 2, 2), 3),
    ("categorical", (3, 1, 2), 3),
    ("logistic-mixture", (3, 1, 2), 2),
]


def randomized(module, scale=0.35):
    r"""Draws all parameters, also those that start at zero."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=scale)
    return module.double()


def make(name, shape, levels, device, batch_shape=(), **options):
    r"""Returns a likelihood of random weights and random features for it."""
    torch.manual_seed(0)
    pixel = make_likelihood(name, (1, *shape[1:]), levels)
    options = {"num_features": F, "kernel_sizes": (3, 3), "width": 12} | options
    likelihood = randomized(AutoregressiveLikelihood(pixel, shape[0], **options))
    features = torch.randn(*batch_shape, F, *shape[1:], dtype=torch.float64)
    return likelihood.to(device), features.to(device)


def every_image(name, shape, levels, device):
    values = torch.linspace(0 if name == "bernoulli" else -1, 1, levels, dtype=torch.float64)
    images = itertools.product(values.tolist(), repeat=math.prod(shape))
    return torch.tensor(list(images), dtype=torch.float64, device=device).reshape(-1, *shape)


# --- Probabilities ---


@pytest.mark.parametrize("kernel_sizes", [(3,), (5, 1), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_probabilities_sum_to_one(device, case, kernel_sizes):
    likelihood, features = make(*case, device, (2,), kernel_sizes=kernel_sizes)
    p_x = likelihood(features)
    assert (p_x.batch_shape, p_x.event_shape) == ((2,), case[1])
    images = every_image(*case, device).unsqueeze(1)  # for both of the features
    log_prob = p_x.log_prob(images)
    total = log_prob.logsumexp(0)
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-10, rtol=0)
    assert log_prob.std(0).min() > 0.2  # neither uniform, nor the same for both features
    assert (log_prob[:, 0] - log_prob[:, 1]).abs().max() > 0.2


def walk(start, size, channels, strict=False):
    r"""Returns the (channel, row, column) that a masked kernel sees, by its definition."""
    c, i, j = start
    reach = range(-(size // 2), size // 2 + 1)
    before = [(i + di, j + dj) for di, dj in itertools.product(reach, reach) if (di, dj) < (0, 0)]
    own = [(b, i, j) for b in range(c if strict else c + 1)]
    return {(b, *pixel) for b in range(channels) for pixel in before} | set(own)


def sees(start, kernel_sizes, channels):
    r"""Returns the parts of the image, and the pixels of the features, that an output sees."""
    first, *others = kernel_sizes
    hidden = {start}
    for size in others:
        hidden = set().union(*(walk(h, size, channels) for h in hidden))
    image = set().union(*(walk(h, first, channels, strict=True) for h in hidden))
    return image, {(i, j) for _, i, j in hidden}


@pytest.mark.parametrize("kernel_sizes", [(1,), (3,), (7, 1, 1), (3, 3), (1, 3, 1, 3)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_pixel_sees_its_receptive_field_and_nothing_else(device, channels, kernel_sizes):
    torch.manual_seed(0)
    net = randomized(PixelCNN(channels, F, 2, kernel_sizes, width=7)).to(device)
    shape = (4, 7)
    x = torch.randn(1, channels, *shape, dtype=torch.float64, device=device)
    told = torch.randn(1, F, *shape, dtype=torch.float64, device=device)
    of_x, of_told = torch.autograd.functional.jacobian(net, (x, told))
    # From (1, C, M, H, W, 1, C, H, W), which output depends on which input.
    of_x, of_told = ((d.squeeze(5).squeeze(0) != 0).any(1).cpu() for d in (of_x, of_told))
    reach = sum(size // 2 for size in kernel_sizes)
    assert net.reach == reach
    for c, i, j in itertools.product(range(channels), *map(range, shape)):
        image, features = sees((c, i, j), kernel_sizes, channels)
        for b, k, m in itertools.product(range(channels), *map(range, shape)):
            assert of_x[c, i, j, b, k, m] == ((b, k, m) in image)
            if of_x[c, i, j, b, k, m]:
                assert (k, m, b) < (i, j, c) and i - k <= reach and abs(j - m) <= reach
        for k, m in itertools.product(*map(range, shape)):
            assert (of_told[c, i, j, :, k, m] == ((k, m) in features)).all()


def test_the_receptive_field_grows_with_each_kernel():
    for sizes, window in (((1,), (1, 1)), ((7, 1, 1), (4, 7)), ((5, 3, 3, 3), (6, 11))):
        likelihood = make_likelihood("autoregressive", (1, 8, 8), kernel_sizes=sizes)
        assert likelihood.receptive_field == window


def test_without_a_window_pixels_are_independent(device):
    likelihood, features = make("bernoulli", (1, 3, 4), 2, device, (5,), kernel_sizes=(1, 1))
    x = torch.randint(2, (5, 1, 3, 4), device=device).double()
    logits = likelihood.net(torch.zeros_like(x), features).squeeze(2)
    exact = BernoulliLikelihood((1, 3, 4))(logits).log_prob(x)
    torch.testing.assert_close(likelihood(features).log_prob(x), exact, atol=1e-10, rtol=0)


# --- Samples ---


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_samples_have_the_probabilities(device, case):
    likelihood, features = make(*case, device)
    p_x, images, count = likelihood(features), every_image(*case, device), 40_000
    expected = count * p_x.log_prob(images).exp().detach().cpu()
    samples = p_x.sample((count,))
    assert samples.shape == (count, *case[1])
    # An image is a number whose digits are its pixels, in the order of the list.
    lowest, levels = images.min(), case[2]
    digits = ((samples - lowest) / (1 - lowest) * (levels - 1)).round().long().flatten(1).cpu()
    powers = levels ** torch.arange(digits.shape[1]).flip(0)
    observed = (digits * powers).sum(1).bincount(minlength=len(images)).double()
    # Rare images together, so that the statistic has its law.
    rare = expected < 10
    observed, expected = (
        torch.cat((n[~rare], n[rare].sum().reshape(-1))) if rare.any() else n
        for n in (observed, expected)
    )
    assert len(expected) > 25
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-4


@pytest.mark.parametrize("kernel_sizes", [(1,), (5,), (3, 3, 1, 5)], ids=str)
@pytest.mark.parametrize(
    ("name", "shape", "levels"),
    [
        ("bernoulli", (1, 5, 6), 2),
        ("categorical", (3, 3, 4), 4),
        ("logistic-mixture", (3, 3, 4), 256),
        ("gaussian", (2, 3, 4), 256),
    ],
)
def test_samples_are_those_of_the_definition(device, name, shape, levels, kernel_sizes):
    likelihood, features = make(name, shape, levels, device, (6,), kernel_sizes=kernel_sizes)
    p_x = likelihood(features)
    assert p_x.support.event_dim == 3
    torch.manual_seed(1)
    samples = p_x.sample()
    # Each channel of each pixel by itself, from the whole network's outputs for the whole image.
    torch.manual_seed(1)
    x, (channels, height, width) = torch.zeros_like(samples), shape
    with torch.no_grad():
        for i, j, c in itertools.product(range(height), range(width), range(channels)):
            maps = likelihood.net(x, features)[:, c, :, i : i + 1, j : j + 1]
            x[:, c, i, j] = likelihood.pixel._distribution(maps).sample().flatten()
    assert samples.flatten(1).unique(dim=0).shape[0] > 1
    torch.testing.assert_close(samples, x, atol=1e-10, rtol=0)


def test_a_point_is_a_sample(device):
    likelihood, features = make("bernoulli", (1, 3, 4), 2, device, (5,))
    p_x = likelihood(features)
    for name in ("mean", "mode"):
        with pytest.raises(NotImplementedError):
            getattr(p_x, name)
    torch.manual_seed(1)
    x = point(p_x)
    torch.manual_seed(1)
    assert torch.equal(x, p_x.sample()) and not x.requires_grad


# --- In programs ---


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
@pytest.mark.parametrize("batch_shape", [(), (5,), (3, 1)])
def test_data_are_scored_alone_in_plates(device, name, batch_shape):
    torch.manual_seed(0)
    likelihood = randomized(make_likelihood(name, (3, 3, 4), 5, num_features=F, width=12))
    features = torch.randn(*batch_shape, F, 3, 4, dtype=torch.float64, device=device)
    p_x = likelihood.to(device)(features)

    def model(x=None):
        with pyro.plate("data", 5, dim=-1):
            return pyro.sample("x", p_x, obs=x)

    drawn = model()
    assert drawn.shape == (*torch.broadcast_shapes(batch_shape, (5,)), 3, 3, 4)
    x = drawn.reshape(-1, 5, 3, 3, 4)[0]
    trace = pyro.poutine.trace(model).get_trace(x)
    trace.compute_log_prob()
    log_prob = trace.nodes["x"]["log_prob"]
    assert log_prob.shape == drawn.shape[:-3]
    rows = features.expand(*log_prob.shape, F, 3, 4).reshape(-1, 5, F, 3, 4)
    exact = [likelihood(f).log_prob(v) for row in rows for f, v in zip(row, x, strict=True)]
    torch.testing.assert_close(log_prob.flatten(), torch.stack(exact), atol=1e-10, rtol=0)


def test_expand_is_the_same_distribution(device):
    likelihood, features = make("bernoulli", (3, 3, 4), 2, device, (5,))
    p_x = likelihood(features)
    wide = p_x.expand((2, 5))
    x = wide.sample()
    assert (wide.batch_shape, wide.event_shape) == ((2, 5), (3, 3, 4)) and x.shape == (
        2,
        5,
        3,
        3,
        4,
    )
    torch.testing.assert_close(wide.log_prob(x), p_x.log_prob(x), atol=1e-10, rtol=0)
    assert p_x.sample((2,)).shape == x.shape


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_every_weight_that_is_not_masked_learns_in_svi(device, precision):
    torch.manual_seed(0)
    likelihood = make_likelihood(
        "autoregressive-mixture", (3, 8, 8), 17, kernel_sizes=(3, 3), width=6
    )
    decoder, shape = ConvDecoder(2, likelihood, width=4), (3, 8, 8)
    prior = DiffusionPrior(2, num_timesteps=10)
    vae = VAE(ConvEncoder(shape, 2, width=4), decoder, prior, likelihood.space(17)).to(device)
    images = torch.randint(17, (8, *shape), dtype=torch.uint8, device=device)
    x = vae.space.preprocess(images)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Timestep_ELBO())
    before = {name: p.clone() for name, p in decoder.named_parameters()}
    assert any(name.startswith("likelihood.net.layers") for name in before)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        first = svi.step(x)
        for _ in range(20):
            last = svi.step(x)
        assert vae.decoder(torch.zeros(8, 2, device=device)).log_prob(x).dtype == torch.float32
    assert last < first
    masks = dict(decoder.named_buffers())
    for name, parameter in decoder.named_parameters():
        mask = masks.get(name.replace("weight", "mask"), torch.ones_like(parameter)).bool()
        moved = parameter != before[name]
        assert (moved == mask).all() if name.startswith("likelihood") else moved.any(), name


def test_autocast_changes_the_network_only(device):
    torch.manual_seed(0)
    likelihood = make_likelihood("autoregressive-mixture", (1, 8, 8)).to(device)
    p_x = likelihood(torch.randn(5, likelihood.num_maps, 8, 8, device=device))
    with torch.autocast(device.type, torch.bfloat16):
        x = p_x.sample()
        log_prob = p_x.log_prob(x)
    assert log_prob.dtype == x.dtype == torch.float32
    assert p_x.support.check(x).all()  # bfloat16 is coarser than the grid of 256 levels
    exact = p_x.log_prob(x)
    assert 0 < (log_prob - exact).abs().max() < 0.01 * exact.abs().max()


# --- Broken input ---


def test_validation_finds_images_of_another_x_space(device):
    likelihood, features = make("bernoulli", (1, 3, 4), 2, device)
    x = torch.full((1, 3, 4), 0.5, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="support"):
        likelihood(features).log_prob(x)
    with pytest.raises(ValueError, match="params must end in shape"):
        likelihood(features[1:])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kernel_sizes": (5, 4)}, r"kernel_sizes must be odd, got \(5, 4\)"),
        ({"kernel_sizes": (5, -1)}, "each number in kernel_sizes must be a whole number >= 1"),
        ({"kernel_sizes": ()}, "kernel_sizes must have at least one dimension"),
        ({"num_features": 0}, "num_features must be a whole number >= 1"),
        (
            {"width": 2},
            r"width must be .* >= 3 \(one per channel of the image\), got 2",
        ),
    ],
)
def test_broken_options_raise(options, match):
    with one_line_value_error(match):
        make_likelihood("autoregressive", (3, 8, 8), **options)


def test_the_pixel_has_one_channel():
    with one_line_value_error(r"pixel must be a likelihood of one channel, .* got \(3, 8, 8\)"):
        AutoregressiveLikelihood(BernoulliLikelihood((3, 8, 8)), 3)
