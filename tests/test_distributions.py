"""Distributions over pixel values against scipy, and the frequencies of their samples."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch

from pyro_vaediff.likelihoods.distributions import (
    DiscretizedLogistic,
    GridCategorical,
    IsotropicNormal,
)

LEVELS = 5


def as_numpy(x):
    return x.detach().cpu().double().numpy()


def logistic_bins(loc, scale, levels):
    """log p(x_k) of the discretized logistic from scipy's cdf and survival function."""
    edges = np.concatenate(
        [[-np.inf], (2 * np.arange(levels - 1) + 1) / (levels - 1) - 1, [np.inf]]
    )
    law = scipy.stats.logistic(loc, scale)
    # On each side of the location, the difference of the smaller tails loses no digits.
    left, right = np.diff(law.cdf(edges)), -np.diff(law.sf(edges))
    return np.log(np.where(edges[1:] <= loc, left, right))


@pytest.mark.parametrize("levels", [2, 5, 256])
@pytest.mark.parametrize(("loc", "scale"), [(0.1, 0.5), (-0.7, 0.02), (1.5, 0.1), (0.013, 20.0)])
def test_discretized_logistic_is_scipys(device, levels, loc, scale):
    x = torch.linspace(-1, 1, levels, dtype=torch.float64, device=device)
    law = DiscretizedLogistic(x.new_tensor(loc), x.new_tensor(scale), levels)
    exact = logistic_bins(loc, scale, levels)
    np.testing.assert_allclose(as_numpy(law.log_prob(x)), exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_discretized_logistic_sums_to_one_at_extremes(device, levels, dtype):
    loc = torch.tensor([-50.0, -1.0, -0.501, 0.0, 1 / 255, 0.999, 50.0], dtype=dtype, device=device)
    scale = torch.tensor([4e-4, 1e-3, 0.1, 1e2], dtype=dtype, device=device)[:, None]
    loc.requires_grad_(), scale.requires_grad_()
    x = torch.linspace(-1, 1, levels, dtype=dtype, device=device)[:, None, None]
    log_prob = DiscretizedLogistic(loc, scale, levels).log_prob(x)
    gradients = torch.autograd.grad(log_prob.sum(), (loc, scale))
    assert log_prob.isfinite().all() and all(g.isfinite().all() for g in gradients)
    total = log_prob.logsumexp(0)
    atol = 1e-10 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(total, torch.zeros_like(total), atol=atol, rtol=0)


def test_categorical_sums_to_one_at_extremes(device):
    torch.manual_seed(0)
    logits = 1e4 * torch.randn(3, 256, dtype=torch.float64, device=device)
    logits.requires_grad_()
    x = torch.linspace(-1, 1, 256, dtype=torch.float64, device=device)[:, None]
    log_prob = GridCategorical(logits).log_prob(x)
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
    assert log_prob.isfinite().all() and gradient.isfinite().all()
    total = log_prob.logsumexp(0)
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-10, rtol=0)


@pytest.mark.parametrize("scale", [0.05, 0.5, 3.0])
def test_logistic_samples_have_the_frequencies_of_scipy(device, scale):
    torch.manual_seed(0)
    loc = torch.tensor(0.3, dtype=torch.float64, device=device)
    samples = DiscretizedLogistic(loc, torch.full_like(loc, scale), LEVELS).sample((40_000,))
    p = np.exp(logistic_bins(0.3, scale, LEVELS))
    frequencies = [(samples == x).double().mean().item() for x in np.linspace(-1, 1, LEVELS)]
    se = np.sqrt(p * (1 - p) / 40_000)
    assert sum(frequencies) == 1.0
    assert (np.abs(frequencies - p) < 5 * se + 1e-5).all() and se.max() < 0.003


def test_categorical_samples_have_the_frequencies_of_the_softmax(device):
    torch.manual_seed(0)
    logits = torch.randn(LEVELS, dtype=torch.float64, device=device)
    samples = GridCategorical(logits).sample((40_000,))
    p = scipy.special.softmax(as_numpy(logits))
    frequencies = [(samples == x).double().mean().item() for x in np.linspace(-1, 1, LEVELS)]
    se = np.sqrt(p * (1 - p) / 40_000)
    assert sum(frequencies) == 1.0
    assert (np.abs(frequencies - p) < 5 * se).all() and se.max() < 0.003


def test_isotropic_normal_is_a_normal(device):
    x, loc = torch.randn(2, 7, 3, 4, dtype=torch.float64, device=device)
    results = []
    for law in (
        lambda loc, scale: IsotropicNormal(loc, scale, event_dim=2),
        lambda loc, scale: dist.Normal(loc, scale).to_event(2),
    ):
        parameters = [loc.clone().requires_grad_(), x.new_tensor(0.3).requires_grad_()]
        log_prob = law(*parameters).log_prob(x)
        assert log_prob.shape == (7,)
        results.append([log_prob, *torch.autograd.grad(log_prob.sum(), parameters)])
    torch.testing.assert_close(*results, atol=1e-10, rtol=1e-12)


def test_isotropic_normal_samples_and_broadcasts_like_a_normal(device):
    loc, scale = torch.randn(3, 4, device=device), torch.tensor(0.3, device=device)
    law = IsotropicNormal(loc, scale, event_dim=2)
    assert law.batch_shape == () and law.event_shape == (3, 4)
    torch.manual_seed(0)
    sample = law.expand((5,)).rsample()
    torch.manual_seed(0)
    assert torch.equal(sample, dist.Normal(loc, scale).to_event(2).expand((5,)).rsample())
    assert isinstance(law.expand((5,)), IsotropicNormal)
    assert law.expand((5,)).log_prob(sample).shape == (5,)
    assert torch.equal(law.mean, loc) and (law.stddev == scale).all()
    with pytest.raises(ValueError, match="support"):
        law.log_prob(sample * math.nan)
