r"""What the bench makes, and what it says if it cannot: ``test_elbo`` has the numbers."""

from __future__ import annotations

import pytest
import torch
from errors import one_line_value_error

from pyro_vaediff import VAE, DiffusionPrior, GaussianPrior
from pyro_vaediff.testing import (
    LinearDenoiser,
    LinearGaussian,
    Oracle,
    linear_gaussian_vae,
    one_copy_per_datum,
)


@pytest.fixture
def vae(device):
    return linear_gaussian_vae(3).to(device)


@pytest.fixture
def x(device):
    return torch.randn(2, 3, dtype=torch.float64, device=device)


# --- Seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse_variance", ["beta", "learned"])
def test_a_seed_determines_the_parameters(reverse_variance):
    def parameters(seed):
        return linear_gaussian_vae(3, reverse_variance=reverse_variance, seed=seed).state_dict()

    def differ(a, b):
        return [not torch.equal(a[name], b[name]) for name in a]

    first = parameters(seed=5)
    assert all(differ(first, parameters(seed=6)))
    torch.randn(7)
    assert not any(differ(first, parameters(seed=5)))
    torch.manual_seed(5)  # the same numbers as from the global generator
    assert not any(differ(first, parameters(seed=None)))
    assert all(differ(first, parameters(seed=None)))


def test_a_seed_leaves_the_global_generators_alone(device):
    def draws():
        return torch.randn(3).tolist(), torch.randn(3, device=device).tolist()

    torch.manual_seed(1)
    expected = draws()
    torch.manual_seed(1)
    linear_gaussian_vae(seed=0)
    assert draws() == expected

    torch.manual_seed(1)
    with one_line_value_error("unknown reverse_variance"):
        linear_gaussian_vae(seed=0, reverse_variance="gamma")
    assert draws() == expected


# --- The VAE --------------------------------------------------------------------------------------


def test_copies_are_the_same_vae_with_gradients_per_datum(vae, x):
    copies = one_copy_per_datum(vae, len(x))
    assert all(parameter.shape[0] == 1 for parameter in vae.parameters())
    z_0 = x[:, :2]
    torch.testing.assert_close(copies.decoder(z_0).mean, vae.decoder(z_0).mean)
    one, other = (v.prior.reverse(z_0, 2).mean for v in (copies, vae))
    torch.testing.assert_close(one, other)

    copies.encoder(x).log_prob(z_0).sum().backward()
    log_q = vae.encoder(x).log_prob(z_0)
    torch.testing.assert_close(copies.encoder(x).log_prob(z_0), log_q)
    for i in range(len(x)):
        (gradient,) = torch.autograd.grad(log_q[i], vae.encoder.weight, retain_graph=True)
        torch.testing.assert_close(copies.encoder.weight.grad[i], gradient[0])


@pytest.mark.parametrize(
    "make, options, match",
    [
        (linear_gaussian_vae, {"num_timesteps": 0}, "num_timesteps must be .* >= 1, got 0"),
        (linear_gaussian_vae, {"num_timesteps": 2.5}, "num_timesteps must be .* got 2.5"),
        (linear_gaussian_vae, {"event_shape": -1}, "event_shape must be .* got -1"),
        (linear_gaussian_vae, {"num_features": 0}, "in_shape must be .* got 0"),
        (linear_gaussian_vae, {"seed": -1}, "seed must be .* got -1"),
        (linear_gaussian_vae, {"seed": "one"}, "seed must be .* got 'one'"),
        (linear_gaussian_vae, {"reverse_variance": "gamma"}, "reverse_variance 'gamma': choose"),
        (linear_gaussian_vae, {"parameterization": "x"}, "parameterization 'x': choose one of"),
        (linear_gaussian_vae, {"order": "backward"}, "order 'backward': choose one of"),
        (LinearGaussian, {"in_shape": 0, "out_shape": 1}, "in_shape must be .* got 0"),
        (LinearGaussian, {"in_shape": 1, "out_shape": 0}, "out_shape must be .* got 0"),
        (LinearDenoiser, {"event_shape": 0, "num_timesteps": 1}, "event_shape must be .* got 0"),
        (LinearDenoiser, {"event_shape": 1, "num_timesteps": 0}, "num_timesteps must be .* got 0"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_networks_need_sizes_and_known_options(make, options, match):
    last = {LinearGaussian: {"log_scale": 0.0}, LinearDenoiser: {"learned_variance": False}}
    with one_line_value_error(match):
        make(**options, **last.get(make, {}))


def test_copies_need_data_and_a_dimension_of_copies(vae):
    with one_line_value_error("num_data must be .* got 0"):
        one_copy_per_datum(vae, 0)
    for other in (one_copy_per_datum(vae, 2), VAE(torch.nn.Linear(3, 2), vae.decoder, vae.prior)):
        with one_line_value_error("vae must have one copy .* linear_gaussian_vae makes"):
            one_copy_per_datum(other, 2)


# --- The oracle -----------------------------------------------------------------------------------


class HalfGaussian(LinearGaussian):
    def forward(self, x):
        return super().forward(x / 2)


@pytest.mark.parametrize("name", ["prior", "encoder", "decoder", "denoiser", "copies"])
def test_the_vae_must_be_linear_and_gaussian(vae, x, name):
    if name == "copies":
        vae = one_copy_per_datum(vae, 2)
    elif name in ("prior", "denoiser"):
        vae.prior = GaussianPrior(2) if name == "prior" else DiffusionPrior(2, 3)
    else:
        setattr(vae, name, HalfGaussian(3, 2, log_scale=0.0))
    with one_line_value_error("^vae must (be linear and Gaussian|have one copy)"):
        Oracle(vae, x)


@pytest.mark.parametrize(
    "ask, match",
    [
        (lambda oracle: oracle.terms("y"), "conditioning 'y': choose one of z_0, x"),
        (lambda oracle: oracle.weighted("elbo"), "weighting 'elbo': choose one of simple, paper"),
        (lambda oracle: oracle.mean_field_bias("x"), "order 'x': choose one of forward, "),
        (lambda oracle: oracle.sigma(0), "t must be .* from 1 to T = 3, got 0"),
        (lambda oracle: oracle.beta_tilde(-1), "t must be .* from 1 to T = 3, got -1"),
        (lambda oracle: oracle.mu(4), "t must be .* from 1 to T = 3, got 4"),
        (lambda oracle: oracle.kl(0, []), "t must be .* from 1 to T = 3, got 0"),
        (lambda oracle: oracle.kl(4, []), "t must be .* from 1 to T = 3, got 4"),
    ],
)
def test_questions_without_an_answer(vae, x, ask, match):
    with one_line_value_error(match):
        ask(Oracle(vae, x))


@pytest.mark.parametrize("weighting", ["simple", "paper"])
def test_weightings_need_fixed_variances(x, weighting):
    vae = linear_gaussian_vae(3, reverse_variance="learned").to(x.device)
    with one_line_value_error(f"weighting='{weighting}' .* reverse_variance='beta'"):
        Oracle(vae, x).weighted(weighting)
