r"""Bounds of many samples: values, gradients and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from torch import nn
from unbiased import assert_matches_oracle, assert_unbiased, draws

from pyro_vaediff import VAE, DiffusionPrior, FlowPrior, GaussianPrior, Timestep_ELBO
from pyro_vaediff.evaluate import audit, importance_log_likelihood
from pyro_vaediff.infer import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    STL_IWAE_ELBO,
    DoublyReparameterized,
    DReG_ELBO,
    GDReG_ELBO,
    StickingTheLanding,
    log_mean_exp,
)
from pyro_vaediff.priors import Prior
from pyro_vaediff.register import register
from pyro_vaediff.sampling import ProbabilityFlow
from pyro_vaediff.testing import LinearGaussian, Oracle, linear_gaussian_vae

ESTIMATORS = {
    "iwae": IWAE_ELBO,
    "stl": STL_IWAE_ELBO,
    "dreg": DReG_ELBO,
    "gdreg": GDReG_ELBO,
    "miwae": lambda **options: MIWAE_ELBO(groups=2, **options),
    "piwae": lambda **options: PIWAE_ELBO(groups=2, **options),
    "ciwae": lambda **options: CIWAE_ELBO(beta=0.3, **options),
    "miwae, dreg": lambda **options: MIWAE_ELBO(2, gradient=DoublyReparameterized(), **options),
}
VECTORIZED = {"vectorize_particles": True, "max_plate_nesting": 1}
WAYS = [{}, VECTORIZED, {"vectorize_particles": True, "max_plate_nesting": 3}]


class LearnedGaussian(Prior):
    r"""A Gaussian prior that has parameters."""

    def __init__(self, event_shape):
        super().__init__(event_shape)
        self.loc = nn.Parameter(torch.randn(1, *self.event_shape))
        self.log_scale = nn.Parameter(torch.randn(1, *self.event_shape) / 3)

    def distribution(self, c=None):
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(self.event_dim)

    def model(self, c=None):
        register("prior", self)
        return pyro.sample("z_0", self.distribution())


def make_vae(prior, device, encoder=LinearGaussian):
    if prior == "diffusion":
        return linear_gaussian_vae(3).to(device)
    encoder, decoder = encoder(3, 2, log_scale=-0.5), LinearGaussian(2, 3, log_scale=0.0)
    return VAE(encoder, decoder, prior(2)).double().to(device)


PRIORS = ["diffusion", GaussianPrior, LearnedGaussian]


@pytest.fixture
def x(device):
    return torch.randn(4, 3, dtype=torch.float64, device=device)


@pytest.fixture(scope="module")
def fitted(request):
    r"""A VAE with a chain of two steps, not far from the best one for its data."""
    device = torch.device(request.config.getoption("--device"))
    vae = linear_gaussian_vae(2, seed=0).to(device)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = vae.model(num_samples=2)
    adam = torch.optim.Adam(vae.parameters(), lr=0.03)
    for _ in range(20):
        adam.zero_grad()
        Oracle(vae, x).negative_elbo.mean().backward()
        adam.step()
    vae.zero_grad()
    return vae, x


def gradients(vae, names=""):
    parts = [torch.zeros(0, dtype=torch.float64)]
    for name, p in vae.named_parameters():
        if name.startswith(names):
            parts.append((torch.zeros_like(p) if p.grad is None else p.grad).flatten().cpu())
    return torch.cat(parts)


def evaluate(elbo, vae, x, seed=3):
    r"""Returns a loss and its gradients by module."""
    vae.zero_grad()
    torch.manual_seed(seed)
    loss = elbo.loss_and_grads(vae.model, vae.guide, x)
    return loss, {name: gradients(vae, name) for name in ("encoder", "decoder", "prior")}


def log_weights(vae, x, K, seed=3):
    r"""Returns K log-weights of each datum, from traces."""
    torch.manual_seed(seed)
    rows = []
    for _ in range(K):
        guide = poutine.trace(vae.guide).get_trace(x)
        model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
        for trace in (guide, model):
            trace.compute_log_prob()
        q, p = (
            sum(s["log_prob"] for s in trace.nodes.values() if s["type"] == "sample")
            for trace in (guide, model)
        )
        rows.append(p - q)
    return torch.stack(rows).detach()


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
def test_values_by_hand(x, prior):
    vae = make_vae(prior, x.device)
    log_w = log_weights(vae, x, 6)
    iwae = log_w.exp().mean(0).log().sum()
    groups = torch.stack([log_w[:3].exp().mean(0).log(), log_w[3:].exp().mean(0).log()])
    expected = dict.fromkeys(("iwae", "stl", "dreg", "gdreg", "piwae"), iwae)
    expected |= dict.fromkeys(("miwae", "miwae, dreg"), groups.mean(0).sum())
    expected |= {"ciwae": 0.3 * log_w.mean(0).sum() + 0.7 * iwae}
    for name, make in ESTIMATORS.items():
        loss, _ = evaluate(make(num_particles=6), vae, x)
        assert loss == pytest.approx(-expected[name].item(), abs=1e-10), name


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("prior", PRIORS)
def test_the_plain_estimator_is_that_of_pyro(x, prior, way):
    vae = make_vae(prior, x.device)
    mine, theirs = (
        evaluate(elbo, vae, x)
        for elbo in (IWAE_ELBO(num_particles=5, **way), RenyiELBO(0, num_particles=5, **way))
    )
    assert mine[0] == pytest.approx(theirs[0], abs=1e-10)
    for name in mine[1]:
        torch.testing.assert_close(mine[1][name], theirs[1][name], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("K", [1, 4, 64])
def test_the_mean_weight_is_the_evidence(fitted, K):
    vae, x = fitted
    exact, number = Oracle(vae, x).log_evidence.detach(), 1000
    scale = torch.ones(number * len(x), dtype=x.dtype, device=x.device, requires_grad=True)
    model, guide = (poutine.scale(fn, scale=scale) for fn in (vae.model, vae.guide))
    elbo = IWAE_ELBO(num_particles=K, **VECTORIZED)
    loss = elbo.differentiable_loss(model, guide, x.repeat(number, 1))
    gaps = exact + torch.autograd.grad(loss, scale)[0].unflatten(0, (number, len(x)))
    (weight, weight_se), (gap, gap_se) = (
        (values.mean(0), values.std(0) / number**0.5) for values in ((-gaps).exp(), gaps)
    )
    assert (weight_se < 0.05).all() and ((weight - 1).abs() < 5 * weight_se).all()
    low, high = {1: (0.1, 0.3), 4: (0.01, 0.1), 64: (0.0, 0.01)}[K]  # the gap closes
    assert (gap_se < 0.03).all()
    assert (low < gap + 5 * gap_se).all() and (gap - 5 * gap_se < high).all()


def test_an_exact_flow_density_is_a_prior_like_any_other(device):
    vae = VAE(
        LinearGaussian(3, 2, log_scale=-0.5),
        LinearGaussian(2, 3, log_scale=0.0),
        DiffusionPrior(2, 2, schedule=[0.6, 0.99]),
    )
    vae = vae.double().to(device)
    nn.init.normal_(vae.prior.denoiser.backbone.outputs.weight, std=0.1)
    x = torch.randn(4, 3, dtype=torch.float64, device=device)

    class Flow(Prior):
        def __init__(self, prior):
            super().__init__(prior.event_shape)
            self.prior = prior

        def model(self, c=None):
            register("prior", self.prior)
            return pyro.sample("z_0", ProbabilityFlow(self.prior))

    flow = VAE(vae.encoder, vae.decoder, Flow(vae.prior)).double().to(device)
    torch.manual_seed(3)
    expected = importance_log_likelihood(vae, x, 5, log_prior="flow").sum().item()
    for elbo in (IWAE_ELBO, DReG_ELBO):
        loss, grads = evaluate(elbo(num_particles=5), flow, x)
        assert loss == pytest.approx(-expected, abs=1e-8)
        assert all(grad.isfinite().all() and grad.any() for grad in grads.values())
    with one_line_value_error("'z_0' is a ProbabilityFlow in the model"):
        GDReG_ELBO(num_particles=5).differentiable_loss(flow.model, flow.guide, x)


# --- Gradients: exact expectations in one dimension -----------------------------------------------


class Nodes(dist.Normal):
    r"""A Gaussian whose draws are the nodes of a quadrature."""

    noise: torch.Tensor

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise


class NodeEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1))
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return Nodes(self.loc.expand(len(x), 1), self.log_scale.exp()).to_event(1)


class Line:
    r"""A VAE with one latent, whose expectations are integrals over the noise of two draws."""

    def __init__(self, monkeypatch, device, pattern=(0, 1)):
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(30))
        pairs = torch.cartesian_prod(nodes, nodes).T.to(device)  # (2, n^2)
        self.eps = pairs[list(pattern)]
        self.weights = (weights.outer(weights).flatten() / (2 * math.pi)).to(device)
        monkeypatch.setattr(Nodes, "noise", self.eps[..., None], raising=False)
        vae = VAE(NodeEncoder(), LinearGaussian(1, 1, log_scale=0.0), LearnedGaussian(1))
        values = (0.2, -0.3, 0.5, 0.1, -0.2, 0.1, 0.1)  # in which thirty nodes are exact
        for parameter, value in zip(vae.parameters(), values, strict=True):
            nn.init.constant_(parameter, value)
        self.vae = vae.double().to(device)
        self.x = torch.tensor([[0.7]], dtype=torch.float64, device=device)

    def estimate(self, elbo):
        r"""Returns the expectation of the loss and its gradient, by the library."""
        pyro.enable_validation(False)
        many = self.x.expand(self.eps.shape[1], 1)
        model, guide = (
            poutine.scale(f, scale=self.weights) for f in (self.vae.model, self.vae.guide)
        )
        self.vae.zero_grad()
        loss = elbo(**VECTORIZED).loss_and_grads(model, guide, many)
        return loss, self.grads()

    def grads(self):
        return {name: gradients(self.vae, name) for name in ("encoder", "decoder", "prior")}

    def log_w(self, z=None):
        r"""Returns log-weights by hand, with shape (K, n^2)."""
        e, d, p = self.vae.encoder, self.vae.decoder, self.vae.prior
        z = e.loc + e.log_scale.exp() * self.eps if z is None else z
        mean = d.weight.squeeze() * z + d.bias.squeeze()
        log_p = self.log_normal(self.x.squeeze(), mean, d.log_scale.squeeze())
        log_p = log_p + self.log_normal(z, p.loc.squeeze(), p.log_scale.squeeze())
        return log_p - self.log_normal(z, e.loc, e.log_scale)

    @staticmethod
    def log_normal(x, loc, log_scale):
        return -(((x - loc) / log_scale.exp()) ** 2 + math.log(2 * math.pi)) / 2 - log_scale

    def exact(self, bound):
        r"""Returns the same by hand, where autograd differentiates the integral."""
        self.vae.zero_grad()
        loss = -(self.weights * bound(self.log_w())).sum()
        loss.backward()
        return loss.item(), self.grads()

    def dropped(self):
        r"""Returns the mean of the score of the guide, by its formula."""
        e, shares = self.vae.encoder, self.log_w().softmax(0).detach()
        scores = (self.eps / e.log_scale.exp(), self.eps**2 - 1)  # of the mean and the log-scale
        rows = [(self.weights * shares * score).sum() for score in scores]
        return torch.stack(rows).detach().cpu()


def log_mean(log_w):
    return log_w.exp().mean(0).log()


def assert_same(left, right, names=("encoder", "decoder", "prior"), tolerance=1e-8):
    for name in names:
        torch.testing.assert_close(left[name], right[name], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["iwae", "dreg", "gdreg"])
def test_unbiased_gradients_are_exact(monkeypatch, device, name):
    line = Line(monkeypatch, device)
    value, grads = line.exact(log_mean)
    estimate, estimated = line.estimate(lambda **way: ESTIMATORS[name](num_particles=2, **way))
    assert estimate == pytest.approx(value, abs=1e-10)
    assert_same(estimated, grads)


def test_sticking_the_landing_is_biased_by_the_score(monkeypatch, device):
    line = Line(monkeypatch, device)
    _, grads = line.exact(log_mean)
    _, biased = line.estimate(lambda **way: STL_IWAE_ELBO(2, **way))
    bias = -line.dropped()  # of the gradient of the loss, whose score has the opposite sign
    assert bias.abs().max() > 0.01
    torch.testing.assert_close(biased["encoder"] - grads["encoder"], bias, atol=1e-8, rtol=0)
    assert_same(biased, grads, ("decoder", "prior"))


@pytest.mark.parametrize("gradient", [None, DoublyReparameterized()])
def test_combinations_are_exact(monkeypatch, device, gradient):
    line = Line(monkeypatch, device)
    expected = line.exact(lambda log_w: 0.3 * log_w.mean(0) + 0.7 * log_mean(log_w))
    value, grads = line.estimate(lambda **way: CIWAE_ELBO(0.3, 2, gradient=gradient, **way))
    assert value == pytest.approx(expected[0], abs=1e-10)
    assert_same(grads, expected[1])

    # Two groups of two, whose draws are the same integral.
    expected = line.exact(log_mean)
    twice = Line(monkeypatch, device, pattern=(0, 1, 1, 0))
    twice.vae = line.vae
    value, grads = twice.estimate(lambda **way: MIWAE_ELBO(2, 4, gradient=gradient, **way))
    assert value == pytest.approx(expected[0], abs=1e-10)
    assert_same(grads, expected[1])


# --- Gradients of a chain -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["iwae", "stl", "dreg", "gdreg", "ciwae"])
@pytest.mark.parametrize("order", ["forward", "reversed"])
def test_one_particle_makes_the_elbo(fitted, order, name):
    vae, x = fitted
    vae.prior.order = order
    assert_matches_oracle(ESTIMATORS[name](num_particles=1), vae, x)


@pytest.mark.parametrize("order", ["forward", "posterior", "reversed"])
def test_gradients_of_a_chain_agree(fitted, order):
    vae, x = fitted
    vae.prior.order = order
    pyro.enable_validation(False)
    estimates = {}
    for name in ("iwae", "stl", "dreg", "gdreg"):
        torch.manual_seed(0)  # the same latents: the differences have less noise
        estimates[name] = draws(ESTIMATORS[name](num_particles=3, **VECTORIZED), vae, x)
    plain = estimates["iwae"]
    zero = torch.zeros_like(plain[0])
    for name in ("dreg", "gdreg"):
        assert_unbiased(plain - estimates[name], zero, target=0.03)
    difference = plain - estimates["stl"]
    with pytest.raises(AssertionError):
        assert_unbiased(difference, zero, target=0.03)
    size = sum(p.numel() for p in vae.encoder.parameters())
    assert (difference[..., 1 + size :].abs() < 1e-10).all()  # the model has no part in it
    assert_less_noise(estimates, vae)


def assert_less_noise(estimates, vae):
    r"""Asserts that the encoder's gradient is less noisy without its score."""
    size = sum(p.numel() for p in vae.encoder.parameters())
    noise = {name: rows[..., 1 : 1 + size].var(0).sum() for name, rows in estimates.items()}
    assert noise["dreg"] < noise["iwae"]


# --- Identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_identities(fitted, way):
    vae, x = fitted

    def same(one, other, names=("encoder", "decoder", "prior")):
        (left, left_grads), (right, right_grads) = (evaluate(e, vae, x) for e in (one, other))
        assert_same(left_grads, right_grads, names, 1e-10)
        return left == pytest.approx(right, abs=1e-10)

    options = {"num_particles": 6} | way
    assert same(CIWAE_ELBO(beta=0, **options), IWAE_ELBO(**options))
    assert same(CIWAE_ELBO(beta=1, **options), Trace_ELBO(**options))
    assert same(MIWAE_ELBO(groups=6, **options), Trace_ELBO(**options))
    assert same(MIWAE_ELBO(groups=1, **options), IWAE_ELBO(**options))
    assert same(PIWAE_ELBO(groups=3, **options), IWAE_ELBO(**options), ("decoder", "prior"))
    assert not same(PIWAE_ELBO(groups=3, **options), MIWAE_ELBO(groups=3, **options), ["encoder"])
    stl = StickingTheLanding()
    assert same(MIWAE_ELBO(6, gradient=stl, **options), CIWAE_ELBO(1, gradient=stl, **options))
    # Of an ELBO, the path is all there is to the doubly reparameterized gradient.
    twice = DoublyReparameterized()
    assert same(CIWAE_ELBO(1, gradient=stl, **options), CIWAE_ELBO(1, gradient=twice, **options))


def test_derivatives_of_bounds():
    log_w = torch.randn(6, 2, dtype=torch.float64)
    bounds = [lambda w: log_mean_exp(w, 2), PIWAE_ELBO(3, 6).guide_bound]
    for bound in (*bounds, CIWAE_ELBO(0.3).model_bound):

        def total(log_w, bound=bound):
            return bound(log_w).value.sum()

        first = torch.autograd.functional.jacobian(total, log_w)
        second = torch.autograd.functional.hessian(total, log_w).reshape(12, 12).diagonal()
        torch.testing.assert_close(bound(log_w).first, first)
        torch.testing.assert_close(bound(log_w).second, second.reshape(6, 2))
        assert bound(log_w).value.shape == (2,)


# --- The contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_way_to_ask_gives_the_same_loss_and_gradient(x, name, way):
    vae = make_vae("diffusion", x.device)
    elbo = ESTIMATORS[name](num_particles=4, **way)
    losses, grads = [], []
    for ask in ("loss", "differentiable_loss", "loss_and_grads", "module"):
        vae.zero_grad()
        torch.manual_seed(3)
        ask_for = elbo(vae.model, vae.guide) if ask == "module" else getattr(elbo, ask)
        loss = ask_for(x) if ask == "module" else ask_for(vae.model, vae.guide, x)
        if isinstance(loss, torch.Tensor):
            loss.backward()
        losses.append(loss.item() if isinstance(loss, torch.Tensor) else loss)
        if ask != "loss":
            grads.append(gradients(vae))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-10)
    for other in grads[1:]:
        torch.testing.assert_close(grads[0], other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_svi_takes_the_steps_of_a_torch_optimizer(x, name):
    vae = make_vae("diffusion", x.device)
    elbo = ESTIMATORS[name](num_particles=4)
    loss, grads = evaluate(elbo, vae, x)
    before = torch.cat([p.detach().flatten().cpu() for p in vae.parameters()])
    vae.zero_grad()
    svi = SVI(vae.model, vae.guide, pyro.optim.SGD({"lr": 1e-3}), loss=elbo)
    torch.manual_seed(3)
    assert svi.step(x) == pytest.approx(loss, rel=1e-12)
    after = torch.cat([p.detach().flatten().cpu() for p in vae.parameters()])
    torch.testing.assert_close(after, before - 1e-3 * torch.cat(list(grads.values())))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_other_priors_train(x, name):
    flow = VAE(
        LinearGaussian(3, 2, log_scale=-0.5), LinearGaussian(2, 3, log_scale=0.0), FlowPrior(2)
    )
    flow = flow.double().to(x.device)
    elbo = ESTIMATORS[name](num_particles=4)
    if name == "gdreg":
        with one_line_value_error("'z_0' is a .* in the model, and only the noise of Gaussians"):
            elbo.loss_and_grads(flow.model, flow.guide, x)
        return
    _, grads = evaluate(elbo, flow, x)
    assert all(grad.isfinite().all() and grad.any() for grad in grads.values())


def test_audit_knows_what_the_value_is():
    found = audit(DReG_ELBO(num_particles=16), DiffusionPrior(2, 3))
    assert found.is_bound and "importance-weighted bound" in found.text
    assert "from 16 samples per datum" in found.text


# --- Plates and scales ----------------------------------------------------------------------------


def nested(x, total=None, index=None):
    r"""Returns programs with pixels in a plate inside of that of the data, maybe a subsample."""
    loc = torch.tensor(0.3, dtype=x.dtype, device=x.device, requires_grad=True)
    size = total or len(x)

    def model(x):
        with pyro.plate("data", size, subsample=index, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(loc), 1.0))
            with pyro.plate("pixels", x.shape[1], dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.mT)

    def guide(x):
        with pyro.plate("data", size, subsample=index, dim=-1):
            pyro.param("loc", loc)
            pyro.sample("z", dist.Normal(loc * x.mean(1), 0.5))

    return model, guide


def by_hand(x, K, way):
    torch.manual_seed(3)
    q = dist.Normal(0.3 * x.mean(1), 0.5)
    z = q.sample((K,)) if way else torch.stack([q.sample() for _ in range(K)])
    log_p = dist.Normal(z[..., None], 1.0).log_prob(x).sum(-1) + dist.Normal(0.0, 1.0).log_prob(z)
    return log_mean(log_p - q.log_prob(z)).sum().item()


@pytest.mark.parametrize("way", [{}, {"vectorize_particles": True}], ids=str)
def test_a_plate_inside_of_a_datum_is_summed(x, way):
    model, guide = nested(x)
    for elbo in (IWAE_ELBO(5, **way), DReG_ELBO(5, max_plate_nesting=2, **way)):
        torch.manual_seed(3)
        assert elbo.loss(model, guide, x) == pytest.approx(-by_hand(x, 5, way), abs=1e-10)


@pytest.mark.parametrize("way", [{}, {"vectorize_particles": True}], ids=str)
def test_the_scale_of_a_subsample_is_outside_of_the_logarithm(x, way):
    # The indices of a subsample come from the same generator: they are given.
    index = torch.arange(len(x), device=x.device)
    model, guide = nested(x, total=40, index=index)
    torch.manual_seed(3)
    loss = DReG_ELBO(5, max_plate_nesting=2, **way).loss(model, guide, x)
    assert loss == pytest.approx(-10 * by_hand(x, 5, way), abs=1e-9)


def test_a_global_latent_makes_one_weight_of_all_data(x):
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x[0, 0]), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(z[..., None], torch.ones_like(x[0])).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x.mean(), 0.5))

    q = dist.Normal(x.mean(), 0.5)
    torch.manual_seed(3)
    z = torch.stack([q.sample() for _ in range(5)])
    log_w = dist.Normal(z[:, None, None], 1.0).log_prob(x).sum((1, 2))
    log_w = log_w + dist.Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)
    for way in ({}, {"vectorize_particles": True, "max_plate_nesting": 1}):
        torch.manual_seed(3)
        loss = IWAE_ELBO(5, **way).loss_and_grads(model, guide, x)
        assert loss == pytest.approx(-log_mean(log_w).item(), abs=1e-10)


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: IWAE_ELBO(0), "num_particles must be a whole number >= 1, got 0"),
        (lambda: MIWAE_ELBO(0, 4), "groups must be a whole number >= 1, got 0"),
        (lambda: MIWAE_ELBO(3, 4), "num_particles must be a multiple of groups=3, got 4"),
        (lambda: CIWAE_ELBO(1.5), "beta must be in .*, got 1.5: elsewhere it is no bound"),
    ],
)
def test_unknown_options(make, match):
    with one_line_value_error(match):
        make()


@pytest.mark.parametrize("name", ["iwae", "dreg"])
def test_what_is_no_bound_is_refused(x, name):
    vae = make_vae("diffusion", x.device)
    elbo = ESTIMATORS[name](num_particles=4)
    for timesteps, why in (("all", "'z_1' must have a density"), ("uniform", "'t' is not repara")):
        collapse = Timestep_ELBO(timesteps).collapse  # a noisy inner estimate
        with one_line_value_error(why):
            elbo.loss(collapse(vae.model), collapse(vae.guide), x)
    with one_line_value_error("has a scale of its own, and the log-mean-exp of a multiple"):
        elbo.loss(poutine.scale(vae.model, scale=0.5), vae.guide, x)
    with one_line_value_error("has a scale of its own"):
        scale = torch.rand(3, 1, dtype=x.dtype, device=x.device)
        elbo.loss(*(poutine.scale(fn, scale=scale) for fn in (vae.model, vae.guide)), x)
    with one_line_value_error("the model has no data: its bound is on log 1"):
        elbo.loss(vae.prior_model, vae.prior_guide, x)
    with one_line_value_error("the guide has no site 'z_3'"):
        elbo.loss(vae.model, make_vae(GaussianPrior, x.device).guide, x)

    def auxiliary(x):
        pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        return vae.guide(x)

    with one_line_value_error("site 'u' must have a density in both programs"):
        elbo.loss(vae.model, auxiliary, x)


class BernoulliEncoder(LinearGaussian):
    def forward(self, x):
        return dist.Bernoulli(logits=super().forward(x).mean).to_event(1)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_guides_must_be_reparameterized(x, name):
    vae = make_vae(GaussianPrior, x.device, BernoulliEncoder)
    with one_line_value_error("site 'z_0' is not reparameterized"):
        ESTIMATORS[name](num_particles=4).loss(vae.model, vae.guide, x)
