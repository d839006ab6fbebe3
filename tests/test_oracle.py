r"""What the bench makes, and what it says if it cannot: ``test_elbo`` has the numbers."""

from __future__ import annotations

import copy

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
    torch.testing.assert_close(copies.prior.denoiser(z_0, 2), vae.prior.denoiser(z_0, 2))

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
        (linear_gaussian_vae, {"latent_dim": -1}, "latent_dim must be .* got -1"),
        (linear_gaussian_vae, {"num_features": 0}, "num_features must be .* got 0"),
        (linear_gaussian_vae, {"seed": -1}, "seed must be .* got -1"),
        (linear_gaussian_vae, {"seed": "one"}, "seed must be .* got 'one'"),
        (linear_gaussian_vae, {"reverse_variance": "gamma"}, "reverse_variance 'gamma': choose"),
        (linear_gaussian_vae, {"parameterization": "x"}, "parameterization 'x': choose one of"),
        (linear_gaussian_vae, {"order": "backward"}, "order 'backward': choose one of"),
        (LinearGaussian, {"in_features": 0, "out_features": 1}, "in_features must be .* got 0"),
        (LinearGaussian, {"in_features": 1, "out_features": 0}, "out_features must be .* got 0"),
        (LinearDenoiser, {"latent_dim": 0, "num_timesteps": 1}, "latent_dim must be .* got 0"),
        (LinearDenoiser, {"latent_dim": 1, "num_timesteps": 0}, "num_timesteps must be .* got 0"),
    ],
    ids=str,
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


def with_another(vae, name):
    r"""Returns a VAE that is not linear and Gaussian, or does not fit together."""
    vae, prior = copy.deepcopy(vae), {}
    if name == "vae":
        return vae.encoder
    if name == "prior":
        vae.prior = GaussianPrior(2)
    elif name == "encoder":
        vae.encoder = HalfGaussian(3, 2, log_scale=0.0)
    elif name == "decoder":
        vae.decoder = torch.nn.Linear(2, 3)
    elif name == "copies":
        return one_copy_per_datum(vae, 2)
    elif name == "sizes":
        vae.decoder = LinearGaussian(2, 4, log_scale=0.0)
    else:
        denoiser = {
            "denoiser": None,
            "steps": LinearDenoiser(2, 4, learned_variance=False),
            "learned": LinearDenoiser(2, 3, learned_variance=True),
            "fixed": LinearDenoiser(2, 3, learned_variance=False),
        }[name]
        prior = {"reverse_variance": "learned"} if name == "fixed" else {}
        vae.prior = DiffusionPrior(2, 3, denoiser=denoiser, **prior)
    return vae


@pytest.mark.parametrize(
    "name, match",
    [
        ("vae", "^vae must be of class VAE, got LinearGaussian: linear_gaussian_vae makes"),
        ("prior", "^vae.prior must be of class DiffusionPrior, got GaussianPrior: "),
        ("encoder", "^vae.encoder must be of class LinearGaussian, got HalfGaussian: "),
        ("decoder", "^vae.decoder must be of class LinearGaussian, got Linear: "),
        ("denoiser", "^vae.prior.denoiser must be of class LinearDenoiser, got ResidualMLP: "),
        (
            "copies",
            r"^vae.encoder.weight must have shape \(1, 2, 3\), got \(2, 2, 3\): .* one copy",
        ),
        ("sizes", r"^vae.decoder.weight must have shape \(1, 3, 2\), got \(1, 4, 2\)"),
        ("steps", r"^vae.prior.denoiser.weight must .* \(1, 4, 2, 2\), got \(1, 5, 2, 2\)"),
        ("learned", "^vae.prior.denoiser must be made with learned_variance=False .*'beta'"),
        ("fixed", "^vae.prior.denoiser must be made with learned_variance=True .*'learned'"),
    ],
)
def test_the_vae_must_be_linear_and_gaussian(vae, x, name, match):
    with one_line_value_error(match):
        Oracle(with_another(vae, name), x)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 4), (2, 1, 3)])
def test_data_must_have_the_shape_that_the_encoder_takes(vae, x, shape):
    with one_line_value_error(rf"^x must be .* \(B, 3\) .* got \({shape[0]},.*: reshape it"):
        Oracle(vae, x.new_zeros(shape))


def test_data_must_be_a_tensor_of_the_dtype_of_the_vae(vae, x):
    with one_line_value_error(r"^x must be a tensor of shape \(B, 3\) .* got list"):
        Oracle(vae, x.tolist())
    with one_line_value_error("^x must have the dtype .* torch.float64 on .* got torch.float32"):
        Oracle(vae, x.float())
    Oracle(vae.float(), x.float())


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
