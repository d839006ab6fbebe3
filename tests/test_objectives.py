r"""Objectives against collapsed latents, term by term."""

from __future__ import annotations

import pytest
import torch
from errors import one_line_value_error
from pyro import poutine
from test_hierarchy import linear_hierarchy

from pyro_vaediff.evaluate import evaluate
from pyro_vaediff.infer import FreeBits, KLWeight, Reweighted, Timestep_ELBO, TraceKL_ELBO
from pyro_vaediff.testing import linear_gaussian_vae


@pytest.fixture
def x(device):
    torch.manual_seed(1)
    return torch.randn(2, 3, dtype=torch.float64, device=device)


def terms_of(elbo, vae, x):
    torch.manual_seed(0)
    return elbo.terms(vae.model, vae.guide, x)


def gradient(elbo, vae, x, parameters):
    torch.manual_seed(0)
    vae.zero_grad()
    elbo.loss_and_grads(vae.model, vae.guide, x)
    return torch.stack([p.grad.abs().sum() for p in parameters])


def test_the_weight_is_that_of_all_but_the_data(x):
    vae, weight = linear_hierarchy("top").to(x.device), KLWeight()
    bound, objective = Timestep_ELBO("all"), Reweighted(Timestep_ELBO("all"), weight)
    exact = terms_of(bound, vae, x)
    for value in (0.0, 0.25, 1.0):
        weight.value = value
        for name, term in terms_of(objective, vae, x).items():
            torch.testing.assert_close(term, exact[name] * (1.0 if name == "x" else value))


def group_sums(terms):
    sums = {"group1": 0.0, "group2": 0.0}
    for name, term in terms.items():
        for group in sums:
            sums[group] += term if group in name else 0.0
    return sums


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("elbo", [lambda: Timestep_ELBO("all"), lambda: Timestep_ELBO(k=2)])
def test_a_group_below_its_free_nats_costs_these_and_is_not_trained(x, elbo, scale):
    vae, x = linear_hierarchy("top").to(x.device), x.repeat(50, 1)
    model, guide = (poutine.scale(p, scale) for p in (vae.model, vae.guide))
    kls = group_sums(terms_of(elbo(), vae, x))
    low, high = sorted(kls, key=kls.get)
    nats = (kls[low] + kls[high]).item() / 2 / len(x)  # between the two, per datum
    torch.manual_seed(0)
    free = group_sums(FreeBits(elbo(), nats).terms(model, guide, x))
    assert free[low].item() == pytest.approx(scale * nats * len(x))
    torch.testing.assert_close(free[high], scale * kls[high])
    parameters = list(vae.prior.groups[int(low[-1]) - 1].parameters())
    assert not gradient(FreeBits(elbo(), nats), vae, x, parameters).any()
    assert gradient(FreeBits(elbo(), 0.0), vae, x, parameters).all()


def test_latents_without_a_scope_are_one_group(x):
    vae = linear_gaussian_vae(seed=0).to(x.device)
    terms = terms_of(TraceKL_ELBO(), vae, x)
    kl = sum(term for name, term in terms.items() if name != "x").item()
    free = terms_of(FreeBits(TraceKL_ELBO(), kl / 2 + 1.0), vae, x)
    assert sum(free.values()).item() == pytest.approx(terms["x"].item() + kl + 2.0)
    free = terms_of(FreeBits(TraceKL_ELBO(), kl / 2 - 0.1), vae, x)
    assert sum(free.values()).item() == pytest.approx(terms["x"].item() + kl)


def test_neither_is_reported_as_a_bound(x):
    vae = linear_gaussian_vae(seed=0).to(x.device)
    with one_line_value_error("elbo must estimate a bound, got Reweighted .free bits, 1.0 nats."):
        evaluate(vae, x, FreeBits(TraceKL_ELBO(), 1.0))
    with one_line_value_error("elbo must estimate a bound, got Reweighted .KL weight."):
        evaluate(vae, x, Reweighted(TraceKL_ELBO(), KLWeight(0.5)))
    bound = TraceKL_ELBO()
    assert Reweighted(FreeBits(bound, 1.0), KLWeight(0.5)).bound is bound
    assert FreeBits(bound, 1.0).bound is bound


@pytest.mark.parametrize("value", [-1, float("nan"), "x"])
def test_numbers_that_are_refused(value):
    with one_line_value_error("value must be a finite number >= 0"):
        KLWeight(value)
    with one_line_value_error("nats must be a finite number >= 0"):
        FreeBits(TraceKL_ELBO(), value)
