r"""Means of values and gradients against exact numbers.

An estimator runs on many replicas of the same data. Each replica has parameters and a loss scale of
its own, so that a single backward pass gives the loss and its gradient for each of them. Hence
every mean comes with a standard error, and must be within five of these of the exact number.
"""

from __future__ import annotations

import pytest
import torch
from pyro import poutine
from scipy import stats

from pyro_vaediff.testing import Oracle, one_copy_per_datum

NUM_REPLICAS = 10_000


def per_datum(elbo, vae, x):
    r"""Returns the loss of each datum, from the derivative with respect to a scale of its sites."""
    scale = torch.ones(len(x), dtype=x.dtype, device=x.device, requires_grad=True)
    model, guide = (poutine.scale(fn, scale=scale) for fn in (vae.model, vae.guide))
    loss = elbo.loss_and_grads(model, guide, x)
    assert scale.grad.sum().item() == pytest.approx(loss, rel=1e-9)
    return scale.grad


def draws(elbo, vae, x):
    r"""Returns losses and gradients of replicas, with shape (R, B, 1 + parameters)."""
    vae = one_copy_per_datum(vae, NUM_REPLICAS * len(x))
    values = [per_datum(elbo, vae, x.repeat(NUM_REPLICAS, 1))]
    for parameter in vae.parameters():
        values.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    values = torch.cat([v.reshape(NUM_REPLICAS * len(x), -1) for v in values], dim=-1)
    return values.unflatten(0, (NUM_REPLICAS, len(x)))


def exact_values(vae, losses):
    r"""Returns exact losses and gradients, with shape (B, 1 + parameters)."""
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(
            loss, list(vae.parameters()), retain_graph=True, materialize_grads=True
        )
        rows.append(torch.cat([loss.detach().reshape(1), *(g.flatten() for g in grads)]))
    return torch.stack(rows)


def assert_unbiased(draws, exact, target):
    r"""Asserts |mean - exact| < 5 se, and se < target times the largest entry (at least 1)."""
    mean, se = draws.mean(0), draws.std(0) / len(draws) ** 0.5
    assert mean.shape == exact.shape
    assert (se < target * exact.abs().amax().clamp(min=1.0)).all(), se.max()
    error = (mean - exact).abs() / (5 * se + 1e-10)
    assert (error < 1).all(), f"{error.max():.2f} of the tolerance, entry {error.argmax()}"
    for rows, truth in zip(draws.unbind(1), exact, strict=True):
        assert hotelling(rows, truth) > 1e-8


def hotelling(draws, exact):
    r"""Returns the p-value of all means at once: Hotelling's test.

    A bias that is small in every entry is large in some direction, in which the noise is small.
    """
    scale = draws.std(0)
    varies = scale > 1e-8 * scale.max()
    rows = (draws - exact)[:, varies] / scale[varies]
    mean, covariance = rows.mean(0), torch.cov(rows.T).reshape(rows.shape[1], -1)
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > 1e-6 * values.max()  # entries may be functions of others
    squares = (mean @ vectors).square() * len(rows) / values
    return stats.chi2.sf(squares[kept].sum().item(), int(kept.sum()))


def assert_matches_oracle(elbo, vae, x, target=0.03):
    assert_unbiased(draws(elbo, vae, x), exact_values(vae, Oracle(vae, x).negative_elbo), target)
