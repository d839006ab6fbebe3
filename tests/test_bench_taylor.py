r"""Two contenders: a Taylor expansion of the denoiser, and timesteps for each datum."""

from __future__ import annotations

import pytest
import torch
from errors import one_line_value_error
from estimators.corrections import Taylor_ELBO
from estimators.per_datum import PerDatum_ELBO, TimestepsPerDatum, posterior_kl
from pyro import poutine
from scipy import stats
from unbiased import draws

from pyro_vaediff import Timestep_ELBO
from pyro_vaediff.diffusion import normal
from pyro_vaediff.infer import Antithetic, Timesteps, typical_kl
from pyro_vaediff.infer.collapse import PLATE
from pyro_vaediff.testing import Oracle, linear_gaussian_vae

IID = {"low_discrepancy": False, "antithetic": False}


@pytest.fixture
def x(device):
    return torch.randn(2, 3, dtype=torch.float64, device=device)


def without_network(vae):
    for parameter in vae.prior.denoiser.parameters():
        parameter.data.zero_()
    return vae


def values_of(elbo, vae, x):
    r"""Returns the variances of the loss over replicas by datum, and their standard errors."""
    squares = draws(elbo, vae, x)[..., 0]
    squares = (squares - squares.mean(0)).square()
    return squares.mean(0), squares.std(0) / len(squares) ** 0.5


# --- The linear term of the denoiser --------------------------------------------------------------


def controls(vae, x, guide):
    r"""Returns the linear terms of a Taylor_ELBO, with shape (k, B)."""
    elbo, seen = Taylor_ELBO("uniform", k=4, low_discrepancy=False), []
    control = elbo.control
    elbo.control = lambda *args: seen.append(control(*args)) or seen[-1]
    elbo.differentiable_loss(vae.model, guide, x)
    ((linear, expected),) = seen
    assert not expected.any()
    return linear


def test_antithetic_pairs_cancel_the_linear_term(x):
    vae = linear_gaussian_vae(5).to(x.device)
    one = controls(vae, x, vae.guide)
    assert one.abs().min() > 1e-4 and (one[:2] + one[2:]).abs().max() > 1e-2
    pairs = controls(vae, x, Antithetic(PLATE)(vae.guide))
    assert pairs.abs().min() > 1e-4
    torch.testing.assert_close(pairs[:2], -pairs[2:], atol=1e-10, rtol=0)
    with one_line_value_error("antithetic pairs cancel the linear term"):
        Taylor_ELBO(antithetic=True)


@pytest.mark.parametrize("reverse_variance", ["beta", "learned"])
def test_what_is_left_is_even_in_the_noise(x, reverse_variance):
    r"""Of a KL that is a quadratic form of z_t, no more than its square is left."""
    vae = linear_gaussian_vae(5, reverse_variance=reverse_variance).to(x.device)
    elbo, seen = Taylor_ELBO("uniform", k=4, low_discrepancy=False), []
    elbo.products = (1.0, 1.0)
    correct = elbo.correct

    def spied(term, z_t, start):
        terms = list(correct(term, z_t, start))
        seen.append(terms[-1].value / term.site["scale"])
        return terms

    elbo.correct = spied
    elbo.differentiable_loss(vae.model, Antithetic(PLATE)(vae.guide), x)
    (left,) = seen
    assert left.abs().min() > 1e-4
    torch.testing.assert_close(left[:2], left[2:], atol=1e-10, rtol=0)


def test_the_linear_term_has_less_variance_without_it(x):
    r"""A learned coefficient lowers the noise of the value and of the encoder's gradient."""
    vae = linear_gaussian_vae(4, seed=1).to(x.device)
    with torch.no_grad():
        vae.prior.denoiser.backbone.net.bias.mul_(4)  # far from the origin, where KLs are steep
    elbo = Taylor_ELBO("uniform", k=1, low_discrepancy=False)
    for _ in range(60):
        elbo.loss_and_grads(vae.model, vae.guide, x.repeat(20, 1))
    vae.zero_grad()
    assert elbo.products[0] / elbo.products[1] > 0.1
    (with_it, se), (without, se_without) = (
        values_of(e, vae, x) for e in (Timestep_ELBO("uniform", k=1, **IID), elbo)
    )
    assert (se < 0.1 * with_it).all()
    assert (with_it - without > 5 * (se**2 + se_without**2).sqrt()).all()


def test_a_value_without_a_gradient_is_the_same(x):
    vae = linear_gaussian_vae(4).to(x.device)
    losses = []
    for way in ("loss", "loss_and_grads"):
        elbo = Taylor_ELBO("uniform", k=3)
        elbo.products = (0.7, 1.0)
        torch.manual_seed(0)
        losses.append(getattr(elbo, way)(vae.model, vae.guide, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


# --- Timesteps for each datum ---------------------------------------------------------------------


@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde", "learned"])
@pytest.mark.parametrize("event_shape", [2, (1, 2, 1)])
def test_the_kls_of_a_posterior_are_exact_without_a_network(x, reverse_variance, event_shape):
    r"""For a scale that is the same in all dimensions, as only its mean square counts."""
    vae = linear_gaussian_vae(6, event_shape, reverse_variance=reverse_variance).to(x.device)
    vae = without_network(vae)
    vae.encoder.log_scale.data.fill_(-0.7)
    oracle, q = Oracle(vae, x), vae.encoder(x)
    found = vae.prior.latent_dim * posterior_kl(vae.prior, q)
    exact = oracle.terms("x")["z_s"]
    if reverse_variance == "learned":  # between beta and beta_tilde: close, as a proposal has to be
        assert ((found.mT - exact).abs() < 0.2 * exact).all()
    else:
        torch.testing.assert_close(found.mT, exact, atol=1e-10, rtol=0)
    if reverse_variance == "beta":
        # Given z_0, in expectation, without the constant part.
        z_0 = q.rsample([200_000])
        given = vae.prior.latent_dim * posterior_kl(vae.prior, z_0)
        constant = (
            torch.stack([oracle.kl(t, [oracle.z[0]]) for t in range(2, 7)])
            - vae.prior.latent_dim * variance_part(vae.prior)[:, None]
        )
        se = given.std(0) / len(z_0) ** 0.5
        assert (se.mT < 0.01 * constant).all()
        assert ((given.mean(0).mT - constant).abs() < 5 * se.mT).all()


def variance_part(prior):
    r"""Returns the constant part of the KLs given z_0, from its definition."""
    beta, alpha_bar = prior.schedule.betas, prior.schedule.alphas_cumprod
    t = torch.arange(2, prior.num_timesteps + 1, device=beta.device)
    ratio = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
    return (ratio - 1 - ratio.log()) / 2


@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde"])
def test_typical_latents_have_the_typical_kls(device, reverse_variance, scale):
    prior = linear_gaussian_vae(6, reverse_variance=reverse_variance).to(device).prior
    m = torch.full((1, 2), (1 - scale**2) ** 0.5, dtype=torch.float64, device=device)
    found = posterior_kl(prior, normal(m, torch.full_like(m, scale), 1))[0]
    torch.testing.assert_close(found.cpu(), typical_kl(prior, scale)[2:], atol=1e-10, rtol=0)
    point = posterior_kl(prior, torch.ones_like(m))[0]
    torch.testing.assert_close(point.cpu(), typical_kl(prior, 0.0)[2:], atol=1e-10, rtol=0)


PROBS = torch.tensor([[0.5, 0.03, 0.2, 0.27], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)


@pytest.mark.parametrize("low_discrepancy", [False, True])
def test_each_datum_has_its_own_law(device, low_discrepancy):
    law = TimestepsPerDatum(PROBS.to(device), 2, low_discrepancy).expand([3, 2])
    samples = torch.stack([law.sample() for _ in range(4000)])
    assert samples.shape == (4000, 3, 2)
    for datum, probs in enumerate(PROBS):
        for sample in samples[..., datum].T.cpu():
            counts = torch.bincount(sample - 2, minlength=4)
            assert stats.chisquare(counts, 4000 * probs).pvalue > 1e-5
    expected = PROBS.to(device).gather(1, samples[0].T - 2).T.log()
    torch.testing.assert_close(law.log_prob(samples[0]), expected)
    assert law.support.upper_bound == 5


def test_equal_laws_are_those_of_a_single_one(device):
    probs = PROBS[0].to(device)
    for low_discrepancy in (False, True):
        samples = []
        for law in (
            Timesteps(probs, 2, low_discrepancy),
            TimestepsPerDatum(probs.expand(7, 4), 2, low_discrepancy),
        ):
            torch.manual_seed(0)
            samples.append(law.expand([5, 7]).sample())
        assert torch.equal(*samples)


@pytest.mark.parametrize("conditioning", ["z_0", "x"])
def test_weights_are_the_inverse_probabilities_of_the_datum(x, conditioning):
    vae = linear_gaussian_vae(5).to(x.device)
    x = x * x.new_tensor([[0.1], [5.0]])  # one near the origin, one far from it
    elbo = PerDatum_ELBO(k=4, conditioning=conditioning, antithetic=False)
    guide_trace = poutine.trace(elbo.collapse(vae.guide)).get_trace(x)
    replayed = poutine.replay(elbo.collapse(vae.model), trace=guide_trace)
    t = guide_trace.nodes["t"]["value"]
    start = vae.encoder(x) if conditioning == "x" else guide_trace.nodes["z_0"]["value"]
    kl = posterior_kl(vae.prior, start)
    probs = 0.9 * kl / kl.sum(-1, keepdim=True) + 0.1 / 4
    assert (probs[0] - probs[1]).abs().max() > 0.01
    weights = 1 / (4 * probs.gather(1, t.T - 2).T)
    for trace in (guide_trace, poutine.trace(replayed).get_trace(x)):
        torch.testing.assert_close(trace.nodes["z_s"]["scale"], weights)
        assert not trace.nodes["z_s"]["scale"].requires_grad


def test_data_far_from_and_near_the_origin_have_less_noise(device):
    r"""Where the mean of a posterior, not its aggregate, decides which timesteps matter."""
    vae = without_network(linear_gaussian_vae(8)).to(device)
    vae.encoder.log_scale.data.fill_(-3.0)
    vae.encoder.weight.data.zero_()
    vae.encoder.bias.data.fill_(4.0)
    x = torch.zeros(1, 3, dtype=torch.float64, device=device)
    (one, se), (own, se_own) = (
        values_of(make("importance", k=1, conditioning="x", **IID), vae, x)
        for make in (Timestep_ELBO, PerDatum_ELBO)
    )
    assert (se < 0.1 * one).all()
    assert (one - own > 5 * (se**2 + se_own**2).sqrt()).all()


def test_only_an_importance_proposal_is_mixed_with(device):
    with one_line_value_error("timesteps of a PerDatum_ELBO must be 'importance', got 'uniform'"):
        PerDatum_ELBO("uniform")
