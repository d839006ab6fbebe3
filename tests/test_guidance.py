r"""Dropped contexts, and guidance against the closed form for Gaussian classes."""

from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from torch import nn

from pyro_vaediff import VAE, DiffusionPrior, FlowPrior, GaussianPrior
from pyro_vaediff.denoise import PARAMETERIZATIONS, REVERSE_VARIANCES
from pyro_vaediff.evaluate import evaluate
from pyro_vaediff.infer import Timestep_ELBO, elbo_terms
from pyro_vaediff.nn import MLPEncoder, from_eps, make_backbone
from pyro_vaediff.sampling import ProbabilityFlow, ddim, guided, sample, trajectory
from pyro_vaediff.schedules import make_schedule

MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.0]]).double()
SCALES = torch.tensor([0.5, 0.8]).double()
WEIGHTS = torch.tensor([0.3, 0.7]).double()


def noised(alpha_bar, label=None):
    r"""Returns the law of z_t, if that of z_0 is the Gaussian of a class, or their mixture."""
    scales = (alpha_bar * SCALES**2 + 1 - alpha_bar).sqrt()[:, None].expand(2, 2)
    rows = slice(None) if label is None else label
    normals = dist.Normal(alpha_bar.sqrt() * MEANS[rows], scales[rows]).to_event(1)
    if label is not None:
        return normals
    return dist.MixtureSameFamily(dist.Categorical(WEIGHTS), normals)


class Exact(nn.Module):
    r"""The noise of the Gaussian of a one-hot class, and of their mixture if that is all zero."""

    def forward(self, z, log_snr, c):
        alpha_bar = torch.sigmoid(log_snr).double()[:, None]
        variances = alpha_bar * SCALES**2 + 1 - alpha_bar
        deviations = z.double()[:, None] - alpha_bar.sqrt()[..., None] * MEANS
        log_probs = -(deviations**2).sum(-1) / 2 / variances - variances.log()
        weights = torch.where(c.any(-1, keepdim=True), c, WEIGHTS)
        posterior = (weights.log() + log_probs).softmax(-1)
        score = -(posterior[..., None] * deviations / variances[..., None]).sum(1)
        return -(1 - alpha_bar).sqrt() * score


def exact_prior(T=20):
    backbone = from_eps(Exact())
    return DiffusionPrior(2, T, backbone=backbone, context_features=2, context_dropout=0.1).double()


def random_prior(**options):
    options = {"context_features": 2, "context_dropout": 0.25} | options
    prior = DiffusionPrior(3, 6, **options).double()
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.3)
    return prior


# --- Guidance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [-1.0, 0.0, 0.5, 3.0])
@pytest.mark.parametrize("label", [0, 1])
def test_the_guided_score_of_gaussian_classes(label, w):
    prior, c = exact_prior(), torch.eye(2).double()[label]
    z = torch.randn(7, 2).double().requires_grad_()
    for t in (1, 9, 20):
        alpha_bar = prior.schedule.original("alphas_cumprod")[t]

        def score(law):
            return torch.autograd.grad(law.log_prob(z).sum(), z)[0]

        expected = (1 + w) * score(noised(alpha_bar, label)) - w * score(noised(alpha_bar))
        with torch.no_grad():
            z_0 = guided(prior, w).denoise(z, t, c.expand(7, 2))
        tweedie = (z + (1 - alpha_bar) * expected) / alpha_bar.sqrt()
        torch.testing.assert_close(z_0, tweedie, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "options",
    [*({"parameterization": name} for name in PARAMETERIZATIONS), {"preconditioning": True}],
    ids=str,
)
@pytest.mark.parametrize("reverse_variance", REVERSE_VARIANCES)
def test_guidance_is_of_the_noise_whatever_is_predicted(options, reverse_variance):
    prior = random_prior(reverse_variance=reverse_variance, **options).eval()
    z, c, t = torch.randn(2, 5, 3).double(), torch.randn(5, 2).double(), torch.tensor([[1], [4]])
    new, w = guided(prior, 1.5), 1.5
    expected = (1 + w) * prior.denoise(z, t, c) - w * prior.denoise(z, t)
    torch.testing.assert_close(new.denoise(z, t, c), expected, atol=1e-10, rtol=0)
    given, free = prior.reverse(z, t, c), prior.reverse(z, t)
    kernel = new.reverse(z, t, c)
    mean = (1 + w) * given.mean - w * free.mean
    torch.testing.assert_close(kernel.mean, mean, atol=1e-10, rtol=0)
    assert torch.equal(kernel.variance, given.variance)


class Linear(nn.Module):
    r"""The noise of N(mean, scale^2), one for each class and one without."""

    mean, scale = {True: 1.5, False: -0.5}, {True: 0.4, False: 1.2}

    def forward(self, z, log_snr, c):
        alpha_bar, known = torch.sigmoid(log_snr)[:, None], bool(c[0].any())
        return gaussian_noise(z, alpha_bar, self.mean[known], self.scale[known])


def gaussian_noise(z, alpha_bar, mean, scale):
    variance = alpha_bar * scale**2 + 1 - alpha_bar
    return (1 - alpha_bar).sqrt() * (z - alpha_bar.sqrt() * mean) / variance


@pytest.mark.parametrize("name", ["ancestral", "ddim"])
def test_the_law_of_guided_samples(name):
    T, w, n = 30, 0.7, 40_000
    prior = DiffusionPrior(
        1, T, backbone=from_eps(Linear()), context_features=1, context_dropout=0.5
    ).double()
    # Both samplers are affine in z: a mean, and a variance through the slope.
    alpha_bar = prior.schedule.original("alphas_cumprod")
    ends, variance = torch.tensor([0.0, 0.0]).double(), torch.ones(()).double()

    def step(z, t):
        a, b = alpha_bar[t], alpha_bar[t - 1]
        eps = (1 + w) * gaussian_noise(z, a, 1.5, 0.4) - w * gaussian_noise(z, a, -0.5, 1.2)
        if name == "ddim":
            z_0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
            return b.sqrt() * z_0 + (1 - b).sqrt() * eps, 0.0
        beta = 1 - a / b
        return (z - beta / (1 - a).sqrt() * eps) / (1 - beta).sqrt(), beta

    mean = ends[0]
    for t in range(T, 0, -1):
        values, noise = step(torch.stack([mean, mean + 1]), t)
        mean, slope = values[0], values[1] - values[0]
        variance = slope**2 * variance + noise
    c = torch.ones(n, 1).double()
    sampler = sample if name == "ancestral" else lambda *args: ddim(*args[:2], T, c=args[2])
    z = sampler(guided(prior, w), n, c)[:, 0]
    se = (variance / n).sqrt()
    assert abs(z.mean() - mean) < 5 * se and se < 0.01
    assert abs(z.var() / variance - 1) < 5 * math.sqrt(2 / n)
    # It is another law than the model's.
    assert abs(z.mean() - sample(prior, n, c).mean()) > 50 * se


def test_a_guided_prior_goes_into_every_sampler_and_shares_all_parameters():
    prior, c = random_prior(), torch.eye(2).double()
    new = guided(prior, 1.0)
    assert {id(p) for p in new.parameters()} == {id(p) for p in prior.parameters()}
    assert prior.training and prior.denoiser.context.dropout == 0.25
    z = torch.randn(2, 3).double()
    assert torch.equal(new.denoise(z, 2, c), new.denoise(z, 2, c))  # nothing is dropped
    assert ddim(new, 2, 3, c=c).shape == sample(new.with_steps(3), 2, c).shape == (2, 3)
    assert trajectory(new, 2, c=c)[1].isfinite().all()
    flow = ProbabilityFlow(guided(exact_prior(), 0.1), c=c)
    assert flow.log_prob(z[:, :2]).isfinite().all()
    torch.testing.assert_close(new.denoise(z, 2), prior.denoise(z, 2), atol=1e-10, rtol=0)


def test_a_guided_prior_has_no_bound():
    vae = make_vae()
    vae.prior = guided(vae.prior, 1.0)
    x, c = torch.randn(4, 3), torch.eye(2)[[0, 1, 0, 1]]
    with one_line_value_error("a guided prior is for sampling only, as its bound is not that of"):
        evaluate(vae, x, c=c)


def test_what_cannot_be_guided():
    with one_line_value_error("prior must have been trained with context_dropout, got one with 0"):
        guided(DiffusionPrior(2, 5, context_features=2), 1.0)
    with one_line_value_error("prior must be a DiffusionPrior, got GaussianPrior"):
        guided(GaussianPrior(2), 1.0)
    for w in (math.nan, math.inf):
        with one_line_value_error(f"w must be a finite number, got {w}"):
            guided(exact_prior(), w)


# --- Dropped contexts -----------------------------------------------------------------------------


def small_backbone(dim, schedule, width=8):
    return make_backbone("residual", dim, schedule, width=width, context_features=2)


def make_vae(dropout=0.25):
    torch.manual_seed(0)
    schedule = make_schedule([0.2, 0.3, 0.4, 0.6], 4)
    options = {"context_features": 2, "context_dropout": dropout}
    prior = DiffusionPrior(2, 4, schedule, small_backbone(2, schedule), **options)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.4 * torch.randn_like(parameter)
    return VAE(MLPEncoder(3, 2, (8,), context_features=2), Decoder(), prior)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, z, c):
        loc = self.net(torch.cat([z, c.expand(*z.shape[:-1], 2)], -1))
        return dist.Normal(loc, 1.0).to_event(1)


def test_each_datum_is_told_its_context_or_the_null_context():
    prior, n = random_prior(), 4000
    z, c = torch.randn(2, n, 3).double(), torch.randn(n, 2).double()
    torch.manual_seed(1)
    told = prior.denoise(z, 3, c)
    torch.manual_seed(1)
    assert torch.equal(prior.denoise(z, 3, c), told)  # as torch is seeded
    free = prior.denoise(z, 3)
    given = prior.eval().denoise(z, 3, c)
    assert torch.equal(prior.denoise(z, 3), free)  # without a context, in either mode
    dropped = (told - free).abs().amax(-1) < 1e-12
    kept = (told - given).abs().amax(-1) < 1e-12
    assert (dropped ^ kept).all()
    assert torch.equal(dropped[0], dropped[1])  # a datum, not each of its timesteps
    p = dropped[0].double().mean().item()
    assert abs(p - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n) < 0.05


def test_the_loss_in_training_is_a_mean_over_contexts_and_the_bound_stays():
    vae, n, p = make_vae(), 20_000, 0.25
    x, c = torch.randn(1, 3).expand(n, 3), torch.eye(2)[[1]].expand(n, 2)
    nn.init.constant_(vae.prior.denoiser.context.null, 10.0)  # which is not like any context
    elbo = Timestep_ELBO("all", entropy="exact", antithetic=False)

    def losses(c_of_prior):
        terms = elbo_terms(
            lambda x, _: vae.prior_model(x, c_of_prior), vae.prior_guide, x, c, elbo=elbo
        )
        return sum(t.reshape(-1, n).sum(0) for t in terms.values()).double()

    with torch.no_grad():
        training = losses(c)
        vae.eval()
        given, free = losses(c), losses(None)
    mean, expected = training.mean(), (1 - p) * given.mean() + p * free.mean()
    se = math.sqrt((training.var() + ((1 - p) * given).var() + (p * free).var()) / n)
    assert abs(mean - expected) < 5 * se and se < 0.05
    assert (given.mean() - free.mean()).abs() > 20 * se  # or there was nothing to be seen
    # Evaluation is in eval mode: the bound of the same networks without any dropping.
    plain = make_vae(dropout=0.0)
    plain.load_state_dict({k: v for k, v in vae.state_dict().items() if "null" not in k})
    assert evaluate(vae.train(), x[:50], c=c[:50]) == evaluate(plain, x[:50], c=c[:50])


def test_the_null_context_learns_the_marginal_and_guidance_sharpens():
    net = small_backbone(1, make_schedule("linear", 50), width=32)
    prior = DiffusionPrior(1, 50, backbone=net, context_features=2, context_dropout=0.3)
    optim = torch.optim.Adam(prior.parameters(), lr=5e-3)
    elbo, n = Timestep_ELBO(k=4), 256

    def loss(label):
        q = dist.Normal(2.0 * (2 * label[:, None] - 1), 0.5).to_event(1)
        c = torch.nn.functional.one_hot(label, 2).float()

        def program(part):
            def run():
                with pyro.plate("data", n, dim=-1):
                    return prior.model(c) if part == "model" else prior.guide(q, c)

            return run

        return elbo.differentiable_loss(program("model"), program("guide")) / n

    for _ in range(250):
        optim.zero_grad()
        loss(torch.randint(2, (n,))).backward()
        optim.step()
    prior.eval()
    assert prior.denoiser.context.null.any()  # it has learned
    free = sample(prior, 4000)
    assert abs(free.mean()) < 0.4 and abs(free.std() - math.sqrt(4.25)) < 0.3
    assert free.abs().sub(2).abs().mean() < 0.7  # two modes, not one in between
    for label, sign in enumerate((-1.0, 1.0)):
        c = torch.eye(2)[[label]].expand(2000, 2)
        given, more = sample(prior, 2000, c), sample(guided(prior, 2.0), 2000, c)
        assert abs(given.mean() - 2 * sign) < 0.2 and abs(given.std() - 0.5) < 0.15
        assert sign * (more.mean() - given.mean()) > -0.1


def test_a_prior_may_ignore_the_context_of_its_program():
    torch.manual_seed(0)
    z, c = torch.randn(4, 2), torch.randn(4, 3)
    for make in (partial(DiffusionPrior, 2, 5), partial(FlowPrior, 2, hidden_features=(8,))):
        ignoring, none = make(context_features=None), make()
        none.load_state_dict(ignoring.state_dict())
        for given in (c, None):
            torch.manual_seed(1)
            expected = none.model()
            torch.manual_seed(1)
            assert torch.equal(ignoring.model(given), expected)
    prior = DiffusionPrior(2, 5, context_features=None)
    assert torch.equal(prior.denoise(z, 3, c), prior.denoise(z, 3))
    with one_line_value_error("context_dropout must be 0 if there is no context to drop"):
        DiffusionPrior(2, 5, context_features=None, context_dropout=0.1)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_probabilities_that_are_refused(dropout):
    with one_line_value_error(r"context_dropout must be in \[0, 1\), got"):
        DiffusionPrior(2, 5, context_features=2, context_dropout=dropout)
    with one_line_value_error("context_dropout must be 0 if there is no context to drop, got 0.1"):
        DiffusionPrior(2, 5, context_dropout=0.1)
