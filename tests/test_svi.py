r"""One torch optimizer inside of Pyro's SVI."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from errors import one_line_value_error
from pyro.infer import Trace_ELBO

from pyro_vaediff import Timestep_ELBO, TraceKL_ELBO
from pyro_vaediff.infer import elbo_terms
from pyro_vaediff.testing import linear_gaussian_vae
from pyro_vaediff.train.optim import TorchOptim, make_svi, per_datum

# --- The optimizer --------------------------------------------------------------------------------


def parameters(device):
    return [torch.randn(n, device=device, dtype=torch.float64, requires_grad=True) for n in (3, 5)]


@pytest.mark.parametrize("clip_norm", [None, 1e-3, 0.5, 1e3])
def test_the_global_norm_is_clipped(device, clip_norm):
    params = parameters(device)
    optim = TorchOptim(torch.optim.SGD(params, lr=1.0), clip_norm)
    before = [p.detach().clone() for p in params]
    grads = [torch.randn_like(p) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optim(params)
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
    factor = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
    for p, b, g in zip(params, before, grads, strict=True):
        # torch divides by norm + 1e-6
        torch.testing.assert_close(p.detach(), b - factor * g, atol=1e-6, rtol=0)
    assert float(optim.grad_norm) == pytest.approx(norm, rel=1e-12)


def test_parameters_that_the_optimizer_lacks_are_an_error(device):
    known, unknown = parameters(device)
    optim = TorchOptim(torch.optim.SGD([known], lr=1.0))
    known.grad = torch.ones_like(known)
    optim([known])
    with one_line_value_error(r"lacks parameters .*\(5,\)"):
        optim([known, unknown])


def test_an_encoder_that_the_optimizer_lacks_is_an_error(device):
    vae, x = linear_gaussian_vae().to(device), torch.randn(4, 3, dtype=torch.float64, device=device)
    optim = TorchOptim(torch.optim.SGD([*vae.decoder.parameters(), *vae.prior.parameters()], 1e-3))
    with one_line_value_error("the optimizer lacks parameters"):
        make_svi(vae.model, vae.guide, optim, Timestep_ELBO()).step(x)


def test_the_state_of_the_optimizer_continues_its_run(device):
    def start():
        torch.manual_seed(1)
        params = parameters(device)
        optimizer = torch.optim.Adam(params, lr=0.1)
        return params, TorchOptim(
            optimizer, 1.0, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        )

    def steps(params, optim, n):
        for _ in range(n):
            sum((p - 1).square().sum() for p in params).backward()
            optim(params)
            for p in params:
                p.grad = None

    straight, optim = start()
    steps(straight, optim, 8)
    first, optim = start()
    steps(first, optim, 3)
    state = copy.deepcopy(optim.get_state())
    second, optim = start()
    for p, q in zip(second, first, strict=True):
        p.data.copy_(q)
    optim.set_state(state)
    steps(second, optim, 5)
    assert optim.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    assert all(torch.equal(p, q) for p, q in zip(straight, second, strict=True))


# --- The step -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "elbo", [Timestep_ELBO(k=2), TraceKL_ELBO(), Trace_ELBO()], ids=lambda elbo: type(elbo).__name__
)
def test_a_step_of_svi_is_a_step_of_torch(device, elbo):
    vae, x = linear_gaussian_vae().to(device), torch.randn(6, 3, dtype=torch.float64, device=device)
    other = copy.deepcopy(vae)
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.1)
    programs = per_datum(vae.model), per_datum(vae.guide)
    svi = make_svi(*programs, TorchOptim(optimizer, 0.5), elbo)

    optimizer = torch.optim.Adam(other.parameters(), lr=0.1)
    for step in range(3):
        torch.manual_seed(step)
        svi.step(x)
        terms = svi.loss.terms
        assert not any(term.requires_grad for term in terms.values())

        torch.manual_seed(step)
        if isinstance(elbo, TraceKL_ELBO):
            per_term = elbo_terms(other.model, other.guide, x, elbo=elbo)
            losses = {name: term.sum() / len(x) for name, term in per_term.items()}
        else:
            losses = {"-ELBO": elbo.differentiable_loss(other.model, other.guide, x) / len(x)}
        assert terms.keys() == losses.keys()
        for name in terms:
            torch.testing.assert_close(terms[name], losses[name].detach(), atol=1e-10, rtol=0)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        for p, q in zip(vae.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-10, rtol=0)
            assert p.grad is None


def test_per_datum_losses_do_not_depend_on_the_size_of_the_batch(device):
    # With equal data, the mean of a large batch is that of a small one.
    vae, x = linear_gaussian_vae().to(device), torch.randn(1, 3, dtype=torch.float64, device=device)
    elbo = Timestep_ELBO("all")
    losses = torch.tensor([
        [elbo.loss(per_datum(vae.model), per_datum(vae.guide), x.repeat(n, 1)) for _ in range(100)]
        for n in (200, 400)
    ])  # fmt: skip
    mean, se = losses.mean(1), losses.std(1) / 10
    assert se.max() < 0.05
    assert (mean[0] - mean[1]).abs() < 5 * se.norm()
