r"""The bench's estimators on latents that are images, in hierarchies, and where they refuse."""

from __future__ import annotations

import pytest
import torch
from contenders import CONTENDERS, GIVEN_X
from errors import one_line_value_error
from estimators.counterexamples import mean_field_bias
from estimators.score import ScoreFunction_ELBO, VarGrad_ELBO
from hierarchies import linear_hierarchy
from unbiased import assert_matches_oracle, assert_unbiased, draws, exact_values

from pyro_vaediff.bench import count_evaluations, diffusion_priors
from pyro_vaediff.bench.reference import ANTITHETIC_PAIRS
from pyro_vaediff.infer import Timestep_ELBO
from pyro_vaediff.priors import GaussianPrior
from pyro_vaediff.testing import Oracle, exact_elbo, linear_gaussian_vae

IMAGE = (1, 2, 1)


@pytest.fixture
def x(device):
    torch.manual_seed(1)
    return torch.randn(2, 3, dtype=torch.float64, device=device)


# --- Latents that are images ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_of_images(x, name):
    vae = linear_gaussian_vae(4, IMAGE).to(x.device)
    assert_matches_oracle(CONTENDERS[name]("importance", k=3), vae, x, target=0.05)


@pytest.mark.parametrize("name", GIVEN_X)
def test_contenders_of_images_given_x(x, name):
    vae = linear_gaussian_vae(4, IMAGE).to(x.device)
    elbo = CONTENDERS[name]("importance", k=3, conditioning="x")
    assert_matches_oracle(elbo, vae, x, target=0.05)


@pytest.mark.parametrize("order", ["forward", "posterior"])
def test_the_mean_field_bias_of_images(device, order):
    vae = linear_gaussian_vae(4, IMAGE).to(device)
    x = torch.randn(2000, 3, dtype=torch.float64, device=device)
    exact = Oracle(vae, x).mean_field_bias(order)[0]
    predicted = mean_field_bias(vae, x, order, draws=25).double()
    se = predicted.std().item() / 5
    assert se < 0.05
    assert abs(predicted.mean().item() - exact.item()) < 5 * se


# --- Hierarchies ----------------------------------------------------------------------------------


NEED_NO_CONTEXT = ("hybrid", "taylor")


@pytest.mark.parametrize("kind", ["top", "every", "below"])
@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_of_hierarchies(x, name, kind):
    vae = linear_hierarchy(kind).to(x.device)
    elbo = CONTENDERS[name]("importance", k=3)
    if name in NEED_NO_CONTEXT and kind != "top":
        with one_line_value_error("c must be a context"):
            elbo.loss_and_grads(vae.model, vae.guide, x)
        return
    exact = exact_values(vae, -exact_elbo(vae.model, vae.guide, x))
    assert_unbiased(draws(elbo, vae, x), exact, target=0.05)


@pytest.mark.parametrize("name", GIVEN_X)
def test_contenders_of_hierarchies_given_x(x, name):
    vae = linear_hierarchy("every").to(x.device)
    elbo = CONTENDERS[name]("importance", k=3, conditioning="x")
    exact = exact_values(vae, -exact_elbo(vae.model, vae.guide, x))
    assert_unbiased(draws(elbo, vae, x), exact, target=0.05)


@pytest.mark.parametrize("name", ["all", "per datum", "control variate"])
def test_pairs_of_particles_of_hierarchies(x, name):
    r"""The reference of the bench, and two that look at all particles' latents."""
    vae = linear_hierarchy("every").to(x.device)
    make = {"all": Timestep_ELBO, **CONTENDERS}[name]
    elbo = make("all" if name == "all" else "importance", **ANTITHETIC_PAIRS)
    exact = exact_values(vae, -exact_elbo(vae.model, vae.guide, x))
    assert_unbiased(draws(elbo, vae, x), exact, target=0.05)


@pytest.mark.parametrize("make", [ScoreFunction_ELBO, VarGrad_ELBO])
@pytest.mark.parametrize("kind", ["top", "every"])
def test_the_score_function_of_hierarchies(x, kind, make):
    vae = linear_hierarchy(kind).to(x.device)
    exact = exact_values(vae, -exact_elbo(vae.model, vae.guide, x))
    assert_unbiased(draws(make(k=4), vae, x), exact, target=0.4)


def test_the_evaluations_of_all_denoisers_of_a_hierarchy_are_counted(x):
    vae = linear_hierarchy("every").to(x.device)
    with count_evaluations(vae) as counts:
        Timestep_ELBO(k=4).loss_and_grads(vae.model, vae.guide, x)
    # Two groups have k steps and the first one each.
    assert counts == {"encoder": 2, "decoder": 2, "denoiser": 2 * 2 * 5}


def test_the_diffusion_priors_of_a_vae(x):
    assert diffusion_priors(vae := linear_gaussian_vae(2)) == [vae.prior]
    vae = linear_hierarchy("every")
    assert diffusion_priors(vae) == list(vae.prior.groups)
    vae = linear_hierarchy("below")
    assert diffusion_priors(vae) == [vae.prior.groups[1]]
    vae.prior = GaussianPrior(3)
    with one_line_value_error("prior must be a DiffusionPrior or hold one, got GaussianPrior"):
        diffusion_priors(vae)


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hybrid", "control variate", "taylor", "per datum"])
def test_continuous_time_is_refused(device, name):
    vae = linear_gaussian_vae(None).to(device)
    x = torch.randn(2, 3, dtype=torch.float64, device=device)
    with one_line_value_error("_ELBO needs "):
        CONTENDERS[name]("importance", k=2).loss_and_grads(vae.model, vae.guide, x)


def test_no_bias_of_mean_field_is_predicted_for_a_hierarchy(x):
    with one_line_value_error("for a single diffusion prior .*, got a HierarchicalPrior"):
        mean_field_bias(linear_hierarchy("top").to(x.device), x, "forward")
