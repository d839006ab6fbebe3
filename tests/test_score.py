r"""The encoder's gradient without a path: unbiased, and as noisy as theory says."""

from __future__ import annotations

import pytest
import torch
from errors import one_line_value_error
from estimators.score import ScoreFunction_ELBO, VarGrad_ELBO
from unbiased import assert_matches_oracle, draws

from pyro_vaediff import Timestep_ELBO
from pyro_vaediff.testing import linear_gaussian_vae


@pytest.fixture
def x(device):
    return torch.randn(2, 3, dtype=torch.float64, device=device)


@pytest.mark.parametrize(
    "elbo, target",
    [
        (ScoreFunction_ELBO("uniform", k=4), 0.4),
        (ScoreFunction_ELBO("importance", k=8, num_particles=2), 0.3),
        (VarGrad_ELBO("uniform", k=4, num_particles=2), 0.2),
        (VarGrad_ELBO("importance", k=8), 0.1),
    ],
    ids=["score", "score, 2", "VarGrad, 2", "VarGrad, 4"],
)
def test_the_score_function_is_unbiased(x, elbo, target):
    assert_matches_oracle(elbo, linear_gaussian_vae(3).to(x.device), x, target=target)


def columns(vae, estimates, wanted):
    sizes = [1] + [p.numel() for p in vae.parameters()]
    parts = dict(zip(["", *dict(vae.named_parameters())], estimates.split(sizes, -1), strict=True))
    return torch.cat([part for name, part in parts.items() if name.startswith(wanted)], -1)


def test_a_baseline_has_less_variance_and_a_path_least(x):
    vae = linear_gaussian_vae(3).to(x.device)
    makes = (Timestep_ELBO, VarGrad_ELBO, ScoreFunction_ELBO)
    estimates = [draws(make(k=8, num_particles=4), vae, x) for make in makes]
    path, with_baseline, without = (
        columns(vae, e, "encoder").var(0).sum().item() for e in estimates
    )
    assert path < 0.5 * with_baseline and with_baseline < 0.3 * without
    # The gradients of the others go through the same terms.
    for name in ("decoder", "prior"):
        variances = [columns(vae, e, name).var(0).sum().item() for e in estimates]
        assert variances[1] == pytest.approx(variances[2], rel=0.2)


def test_vargrad_is_the_gradient_of_the_log_variance(x):
    r"""Of half the variance of log q - log p over draws whose own law is fixed."""
    vae, elbo = linear_gaussian_vae(3).to(x.device), VarGrad_ELBO(k=2, num_particles=3)
    particles = elbo.particles(vae.model, vae.guide, x)
    surrogate = sum(terms[-1].value for terms in particles).sum() / 3
    assert surrogate.item() == 0
    parameters = list(vae.encoder.parameters())
    gradient = torch.autograd.grad(surrogate, parameters, retain_graph=True)
    f = torch.stack(
        [sum(t.value.detach().sum_to_size(2) for t in terms[:-1]) for terms in particles]
    )
    sites = [terms[-1].site for terms in particles]
    log_q = torch.stack([site["fn"].log_prob(site["value"]) for site in sites])
    loss = (f + log_q - log_q.detach()).var(0).sum() / 2
    for expected, found in zip(torch.autograd.grad(loss, parameters), gradient, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_the_value_has_no_score(x):
    vae = linear_gaussian_vae(3).to(x.device)
    losses = []
    for evaluate in ("loss", "loss_and_grads"):
        torch.manual_seed(0)
        losses.append(getattr(VarGrad_ELBO(), evaluate)(vae.model, vae.guide, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("options", [{"conditioning": "x"}, {"vectorize_particles": True}], ids=str)
def test_what_it_is_not_made_for(options):
    with one_line_value_error("VarGrad_ELBO needs conditioning='z_0' and particles one after"):
        VarGrad_ELBO(**options)
    with one_line_value_error("num_particles must be at least 2, got 1"):
        VarGrad_ELBO(num_particles=1)
