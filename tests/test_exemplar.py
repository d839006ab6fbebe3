r"""Mixtures over training data: against their enumeration, and what is left out in training."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from pyro.infer import Trace_ELBO

from pyro_vaediff import VAE, ExemplarPrior, GaussianPrior, Timestep_ELBO, TraceKL_ELBO
from pyro_vaediff.data import ImageData
from pyro_vaediff.evaluate import aggregate_prior, elbo_surgery, evaluate
from pyro_vaediff.nn import MLPEncoder
from pyro_vaediff.priors import AggregatePrior
from pyro_vaediff.testing import LinearGaussian
from pyro_vaediff.train import TrainConfig, Trainer
from pyro_vaediff.train.config import ModelConfig
from pyro_vaediff.train.runs import load_vae


def exact(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def make_prior(device, num_data=6, num_components=500, shape=(2,)):
    prior = ExemplarPrior(shape, num_data, num_components).to(device, torch.float64)
    with torch.no_grad():
        prior.raw_scale.normal_(-1)
        prior.loc.normal_()
    return prior


def component(prior, n, z):
    r"""Returns the density of a component, number by number."""
    scale = prior.distribution().component_distribution.base_dist.scale[0].flatten()
    z, m = z.flatten(-prior.event_dim), prior.loc[n].flatten()
    normals = torch.distributions.Normal(m, scale.detach())
    return normals.log_prob(z).sum(-1).exp()


def linear_vae(device, prior):
    encoder = LinearGaussian(3, 2, log_scale=-0.5)
    encoder.forward = lambda x, c=None: LinearGaussian.forward(encoder, x)
    decoder = LinearGaussian(2, 3, log_scale=0.0)
    decoder.forward = lambda z, c=None: LinearGaussian.forward(decoder, z)
    return VAE(encoder, decoder, prior).to(device, torch.float64)


@pytest.fixture
def x(device):
    torch.manual_seed(1)
    return torch.randn(6, 3, dtype=torch.float64, device=device)


# --- The density ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2,), (1, 2, 2)])
def test_the_density_is_the_mean_over_all_data(device, shape):
    prior = make_prior(device, shape=shape)
    z = torch.randn(4, *shape, dtype=torch.float64, device=device)
    expected = sum(component(prior, n, z) for n in range(6)) / 6
    exact(prior.log_prob(z).detach(), expected.log())
    exact(prior.eval().log_prob(z).detach(), expected.log())


def test_exactly_the_own_component_is_left_out(device):
    prior = make_prior(device)
    numbers = torch.tensor([[3], [0], [5], [3]], device=device)
    z = torch.randn(2, 4, 2, dtype=torch.float64, device=device)
    for c in (numbers, numbers.float()):
        log_prob = prior.log_prob(z, c)
        for b, own in enumerate([3, 0, 5, 3]):
            others = [component(prior, n, z[:, b]) for n in range(6) if n != own]
            exact(log_prob[:, b].detach(), (sum(others) / 5).log())
    # With the own component far from all others, nothing of it is left.
    with torch.no_grad():
        prior.loc[3] = 50.0
    own, other = prior.log_prob(prior.loc[[3, 3]], torch.tensor([[3], [0]], device=device))
    assert own < -1000 < -10 < other


def test_random_components_are_a_lower_bound_of_all(device):
    prior = make_prior(device, num_components=3)
    z, c = torch.zeros(2000, 2, dtype=torch.float64, device=device), torch.full((2000, 1), 4)
    c = c.to(device)
    full = (sum(component(prior, n, z[0]) for n in range(6) if n != 4) / 5).log()
    values = torch.stack([prior.log_prob(z[0].expand(1, 2), c[:1])[0] for _ in range(2000)])
    values = values.detach()
    densities = values.exp()
    se = densities.std() / len(densities) ** 0.5
    assert se < 0.05 * full.exp()
    assert (densities.mean() - full.exp()).abs() < 5 * se  # the density is unbiased,
    assert values.mean() + 5 * values.std() / len(values) ** 0.5 < full  # its logarithm below
    # Without a context, all of them are there.
    exact(prior.log_prob(z[:1]), prior.log_prob(z[:1]))


@pytest.mark.parametrize("own", [None, 2])
def test_it_integrates_to_one(device, own):
    prior = make_prior(device, num_data=4, shape=(1,))
    line = torch.linspace(-30, 30, 20_001, dtype=torch.float64, device=device).unsqueeze(1)
    c = None if own is None else torch.full((len(line), 1), own, device=device)
    mass = prior.log_prob(line, c).exp().sum() * (line[1] - line[0])
    assert mass.item() == pytest.approx(1, abs=1e-6)


def test_it_starts_with_the_moments_of_a_standard_normal(device):
    law = ExemplarPrior(4, 20_000).to(device, torch.float64).distribution()
    mean, second = law.mean, law.variance + law.mean.square()
    se = 20_000**-0.5
    assert (mean.abs() < 5 * 0.5 * se).all()
    assert ((second - 1).abs() < 5 * 0.25 * 2**0.5 * se).all()


def test_samples_are_of_single_components_and_not_of_the_own(device):
    prior = make_prior(device, num_data=3, shape=(1, 2))
    with torch.no_grad():  # each of them far from the others
        prior.loc.copy_(1000 * torch.arange(3).reshape(3, 1, 1).expand(3, 1, 2))
    z = prior.distribution().sample((3000,))
    assert z.shape == (3000, 1, 2)
    which = (z / 1000).round()
    assert torch.equal(which[..., 0], which[..., 1])
    counts = which[:, 0, 0].long().bincount(minlength=3)
    assert ((counts - 1000).abs() < 5 * (3000 * 2 / 9) ** 0.5).all()
    c = torch.tensor([[0], [1], [2], [2]], device=device)
    with pyro.plate("data", 4):
        for _ in range(20):
            drawn = (prior.model(c) / 1000).round()[:, 0, 0]
            assert (drawn != c[:, 0]).all()
    scale = prior.distribution().component_distribution.base_dist.scale[0]
    spread = (z - 1000 * which).std(0)
    assert ((spread / scale - 1).abs() < 5 / 6000**0.5).all()


# --- In programs ----------------------------------------------------------------------------------


def test_the_guide_keeps_the_means_in_training_only(device, x):
    vae = linear_vae(device, make_prior(device))
    before, c = vae.prior.loc.clone(), torch.tensor([[4], [1]], device=device)
    vae.eval().guide(x[:2], c)
    vae.train().guide(x[:2])
    assert torch.equal(vae.prior.loc, before)
    vae.guide(x[:2], c)
    exact(vae.prior.loc[[4, 1]], vae.encoder(x[:2]).mean.detach())
    kept = [0, 2, 3, 5]
    assert torch.equal(vae.prior.loc[kept], before[kept])


@pytest.mark.parametrize("make", [Trace_ELBO, TraceKL_ELBO, Timestep_ELBO])
def test_the_loss_is_that_of_the_enumeration(device, x, make):
    vae, c = linear_vae(device, make_prior(device)), torch.arange(6, device=device).unsqueeze(1)
    pyro.set_rng_seed(0)
    loss = (make(entropy="exact") if make is not Trace_ELBO else make()).loss(
        vae.model, vae.guide, x, c
    )
    pyro.set_rng_seed(0)
    q = vae.encoder(x)
    z = q.rsample()
    others = torch.stack(
        [sum(component(vae.prior, m, z[n]) for m in range(6) if m != n) / 5 for n in range(6)]
    )
    log_q = q.log_prob(z) if make is Trace_ELBO else -q.entropy()
    expected = (log_q - vae.decoder(z).log_prob(x) - others.log()).sum()
    assert loss == pytest.approx(expected.item(), abs=1e-9)


def test_gradients_of_several_particles(device, x):
    vae, c = linear_vae(device, make_prior(device)), torch.arange(6, device=device).unsqueeze(1)
    for options in (
        {"num_particles": 2},
        {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 3},
    ):
        loss = TraceKL_ELBO(**options).differentiable_loss(vae.model, vae.guide, x, c)
        loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in vae.parameters())
    assert not vae.prior.loc.requires_grad


# --- In training ----------------------------------------------------------------------------------


@pytest.fixture
def data():
    torch.manual_seed(0)
    images = torch.randint(0, 17, (50, 1, 8, 8), dtype=torch.uint8)
    return ImageData("noise", images, images[:20], images[:20], levels=17)


@pytest.mark.parametrize("networks", ["default", "mlp", "resnet"])
def test_a_trainer_numbers_the_data(data, device, tmp_path, networks):
    model = ModelConfig(
        "exemplar", 3, levels=17, width=4, likelihood="discretized-logistic", networks=networks,
        num_components=20,
    )  # fmt: skip
    config = TrainConfig(epochs=1, batch_size=10, lr=1e-12)
    elbo = Timestep_ELBO()
    trainer = Trainer.from_config(model, config, elbo, data, device, tmp_path / networks)
    assert trainer.model_config.num_data == 50
    best = trainer.fit(progress=False)
    with torch.no_grad():
        means = best.encoder(best.space.preprocess(data.train.to(device)).float()).mean
    exact(best.prior.loc, means, atol=1e-5)
    # The density is in the checkpoint.
    vae, saved = load_vae(tmp_path / networks, device)
    assert (saved.num_data, saved.num_components) == (50, 20)
    z = torch.randn(7, 3, device=device)
    assert torch.equal(vae.prior.log_prob(z), best.prior.log_prob(z))
    losses = [evaluate(each, data.test, batch_size=20) for each in (vae, best)]
    assert losses[0] == losses[1]


# --- The aggregate posterior ----------------------------------------------------------------------


def test_the_aggregate_prior_is_the_mean_posterior(device, x):
    vae = linear_vae(device, GaussianPrior(2)).float()
    prior = aggregate_prior(vae, x.float(), batch_size=4)
    z = torch.randn(5, 2, device=device)
    with torch.no_grad():
        q = vae.encoder(x.float())
        q = dist.Normal(q.mean.double(), q.stddev.double()).to_event(1)
    expected = torch.stack([q.log_prob(each).logsumexp(0) - math.log(6) for each in z.double()])
    exact(prior.log_prob(z), expected)
    assert not list(prior.parameters())
    with pyro.plate("data", 3):
        assert prior.model().dtype == torch.float32


def test_with_it_the_kl_is_the_mutual_information(device, x):
    vae = linear_vae(device, GaussianPrior(2))
    best = VAE(vae.encoder, vae.decoder, aggregate_prior(vae, x))
    surgery = elbo_surgery(best, x, num_samples=50)
    assert surgery.marginal_kl == pytest.approx((0, 0), abs=1e-8)
    assert 0 < surgery.mutual_information.mean == pytest.approx(surgery.total_kl.mean)
    # No prior is better for these data.
    many = x.repeat(200, 1)
    losses = [sum(evaluate(each, many, Trace_ELBO(), seed=1).values()) for each in (best, vae)]
    assert losses[0] < losses[1]


# --- What is refused ------------------------------------------------------------------------------

REFUSED = [
    (lambda: ExemplarPrior(2, 1), "num_data must be a whole number >= 2, got 1"),
    (lambda: ExemplarPrior(2, 5, 1), "num_components must be .* >= 2, one of which is .* got 1"),
    (
        lambda: ExemplarPrior(2, 5).log_prob(torch.zeros(3, 2), torch.zeros(3, 4)),
        r"must be the number of each training datum, with shape \(B, 1\), got \(3, 4\)",
    ),
    (
        lambda: AggregatePrior(torch.zeros(3, 2), torch.ones(3, 1)),
        r"scale must have the shape of loc, \(3, 2\), got \(3, 1\)",
    ),
    (
        lambda: Trainer(
            VAE(MLPEncoder(3, 2), MLPEncoder(2, 3), ExemplarPrior(2, 5)),
            (torch.zeros(4, 3), torch.zeros(2, 3)),
            Timestep_ELBO(),
        ),
        "num_data of an ExemplarPrior must be the number of training data, 4, got 5",
    ),
    (
        lambda: Trainer(
            VAE(MLPEncoder(3, 2), MLPEncoder(2, 3), ExemplarPrior(2, 4)),
            ((torch.zeros(4, 3), torch.zeros(4, 2)), torch.zeros(2, 3)),
            Timestep_ELBO(),
        ),
        "takes no context but its own: leave out labels",
    ),
    (
        lambda: ModelConfig("exemplar", latent_groups=("2", "1x2x2")),
        "prior='exemplar' has no hierarchy",
    ),
]


@pytest.mark.parametrize("call, match", REFUSED)
def test_errors(call, match):
    with one_line_value_error(match):
        call()
