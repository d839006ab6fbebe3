r"""Posteriors that are flows: their density, their start, their bounds, and what they refuse."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from grid.cells import read_preset
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vaediff import VAE, ExemplarPrior, GaussianPrior, Timestep_ELBO, TraceKL_ELBO
from pyro_vaediff.evaluate import (
    active_units,
    aggregate_log_prob,
    aggregate_prior,
    elbo_surgery,
    importance_weighted_bound,
    kl_by_timestep,
    log_likelihood,
)
from pyro_vaediff.infer import TotalCorrelation
from pyro_vaediff.nn import (
    POSTERIOR_FLOWS,
    FlowEncoder,
    MLPEncoder,
    NoiseMatched,
    masked_autoregressive_flow,
)
from pyro_vaediff.sampling import interpolate, reconstruct
from pyro_vaediff.testing import LinearGaussian, Oracle, linear_gaussian_vae
from pyro_vaediff.train.build import make_vae
from pyro_vaediff.train.config import ModelConfig
from pyro_vaediff.train.main import main
from pyro_vaediff.train.runs import load_vae

FLOWS = list(POSTERIOR_FLOWS)
SHAPES = [(3,), (1,), (2, 2, 3)]
CASES = [(flow, s) for flow in FLOWS for s in SHAPES if (flow, s) != ("coupling", (1,))]


def away(module, scale=0.3):
    r"""Moves parameters away from where they start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def make_encoder(device, flow, shape=(2,), num_steps=2):
    made = POSTERIOR_FLOWS[flow](shape, 2 * math.prod(shape), num_steps)
    encoder = FlowEncoder(LinearGaussian(3, shape, log_scale=-0.5), made)
    away(encoder.transform, 0.1)
    return encoder.to(device, torch.float64)


def make_vae_of(encoder, prior, num_data=3):
    decoder = LinearGaussian(prior.event_shape, num_data, log_scale=0.0)
    return VAE(encoder, decoder, prior).to(encoder.encoder.weight)


@pytest.fixture
def x(device):
    torch.manual_seed(1)
    return torch.randn(2, 3, dtype=torch.float64, device=device)


# --- The density ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flow, shape", CASES)
def test_the_density_is_the_change_of_variables(device, x, flow, shape):
    encoder = make_encoder(device, flow, shape)
    q, base = encoder(x[:1]), encoder.encoder(x[:1])
    u = base.sample()
    move = q.dist.transform.inv
    jacobian = torch.autograd.functional.jacobian(lambda u: move(u.reshape(1, -1)).sum(0), u)
    jacobian = jacobian.reshape(u.numel(), u.numel())
    z = move(u.flatten(1)).reshape(u.shape)
    expected = base.log_prob(u) - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(q.log_prob(z), expected, atol=1e-10, rtol=0)
    # That of a draw is known when it is drawn.
    z = q.rsample()
    torch.testing.assert_close(q.log_prob(z), encoder(x[:1]).log_prob(z), atol=1e-10, rtol=0)
    assert (z.shape, z.dtype) == ((1, *shape), torch.float64)


@pytest.mark.parametrize("flow", FLOWS)
def test_it_is_another_posterior_for_each_datum(device, x, flow):
    r"""Of two data with the same base draws, the flow makes different shapes."""
    encoder = make_encoder(device, flow)
    u = torch.randn(2, 2, dtype=torch.float64, device=device)
    one, two = (encoder(datum.expand(2, 3)).dist.transform.inv(u) for datum in x)
    assert (one - two).abs().min() > 1e-4


# --- The start ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("prior", ["gaussian", "flow", "diffusion"])
def test_it_starts_at_the_numbers_of_the_gaussian_posterior(device, flow, prior):
    losses, x = [], torch.rand(4, 1, 8, 8, device=device)
    options = {"num_timesteps": 4} if prior == "diffusion" else {}
    # The KL to N(0, I) has a closed form with a Gaussian only.
    elbos = [Trace_ELBO(), *([Timestep_ELBO(k=2)] if prior != "gaussian" else [])]
    for posterior in ("gaussian", flow):
        torch.manual_seed(0)
        config = ModelConfig(prior, 5, posterior=posterior, width=4, prior_width=16, **options)
        vae = make_vae(config).to(device)
        pyro.set_rng_seed(3)
        losses.append([elbo.loss(vae.model, vae.guide, x) for elbo in elbos])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("flow, shape", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_starts_at_the_identity(device, x, flow, shape, dtype):
    made = POSTERIOR_FLOWS[flow](shape, 2 * math.prod(shape), 3)
    encoder = FlowEncoder(LinearGaussian(3, shape, log_scale=-0.5), made).to(device, dtype)
    q, base = encoder(x.to(dtype)), encoder.encoder(x.to(dtype))
    torch.manual_seed(0)
    z = q.rsample()
    torch.manual_seed(0)
    torch.testing.assert_close(z, base.rsample(), atol=1e-6, rtol=0)
    torch.testing.assert_close(q.log_prob(z), base.log_prob(z), atol=1e-5, rtol=1e-5)


# --- The bound ------------------------------------------------------------------------------------


class AffineFlowOracle(Oracle):
    r"""The oracle of a posterior that is an affine flow: a Gaussian with a full covariance."""

    def __init__(self, vae, x):
        encoder = vae.encoder
        super().__init__(VAE(encoder.encoder, vae.decoder, vae.prior), x)
        move, identity = encoder(x).dist.transform.inv, torch.eye(2).to(x)
        offset = move(torch.zeros_like(self.z[0].mean))
        columns = [move(e.expand_as(offset)) - offset for e in identity]
        matrix = torch.stack([column[0] for column in columns], -1)
        assert all((column - column[0]).abs().max() < 1e-12 for column in columns)
        keep = (1 - self.beta).sqrt()
        noise = [self.z[t] - self.z[t - 1] * keep[t] for t in range(1, self.T + 1)]
        self.z = [matrix @ self.z[0] + offset]
        for t in range(1, self.T + 1):
            self.z.append(self.z[t - 1] * keep[t] + noise[t - 1])


def affine_vae(device, **options):
    torch.manual_seed(0)
    vae = linear_gaussian_vae(**options)
    flow = masked_autoregressive_flow(2, 4, num_steps=2, hidden_features=(), inverse=True)
    with torch.no_grad():
        for step in flow.transform.transforms:
            last = step.inv.hyper[-1]
            last.weight.normal_(std=0.5), last.bias.normal_(std=0.3)
            last.weight[1::2] = 0.0  # of the log-scales, which are constants then
    vae.encoder = FlowEncoder(vae.encoder, flow)
    return vae.to(device, torch.float64)


ESTIMATORS = {
    "Trace_ELBO": (Trace_ELBO, {}),
    "Trace_ELBO, posterior": (Trace_ELBO, {"order": "posterior"}),
    "TraceKL_ELBO, posterior": (lambda: TraceKL_ELBO(entropy="path"), {"order": "posterior"}),
    "Timestep_ELBO, path": (lambda: Timestep_ELBO("uniform", k=2), {}),
    "Timestep_ELBO, exact": (lambda: Timestep_ELBO(k=1, entropy="exact"), {}),
    "Timestep_ELBO, all": (lambda: Timestep_ELBO("all"), {"reverse_variance": "learned"}),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_bounds_and_gradients_are_unbiased(device, x, name):
    make, options = ESTIMATORS[name]
    vae, copies, found = affine_vae(device, **options), 500, []
    names, parameters = zip(*vae.named_parameters(), strict=True)

    def numbers(loss):
        grads = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        # A weight of a log-scale would make the flow another one than an affine one.
        pairs = zip(names, grads, strict=True)
        rows = [g[::2] if name.endswith("hyper.0.weight") else g for name, g in pairs]
        return torch.cat([loss.detach().reshape(1), *(g.flatten() for g in rows)])

    exact = numbers(AffineFlowOracle(vae, x).negative_elbo.sum())
    elbo, many = make(), x.repeat(copies, 1)
    for _ in range(60):
        loss = elbo.differentiable_loss(vae.model, vae.guide, many)
        found.append(numbers(loss / copies))
    draws = torch.stack(found)
    mean, se = draws.mean(0), draws.std(0) / len(draws) ** 0.5
    assert (se < 0.03 * exact.abs().max()).all()
    assert ((mean - exact).abs() < 5 * se + 1e-10).all()


def test_the_affine_posterior_is_that_gaussian(device, x):
    vae = affine_vae(device)
    z_0 = AffineFlowOracle(vae, x).z[0]
    exact = dist.MultivariateNormal(z_0.mean, z_0.coef @ z_0.coef.mT)
    z = torch.randn(2, 2, dtype=torch.float64, device=device)
    torch.testing.assert_close(vae.encoder(x).log_prob(z), exact.log_prob(z), atol=1e-10, rtol=0)
    assert (z_0.coef @ z_0.coef.mT)[0, 1].abs() > 0.01  # which no diagonal Gaussian has


# --- What works -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", FLOWS)
def test_a_draw_and_its_score_take_one_pass(device, x, flow):
    encoder, calls = make_encoder(device, flow), []
    vae = make_vae_of(encoder, GaussianPrior(2))
    for step in encoder.transform.transforms:
        net = step.inv.hyper if flow == "iaf" else getattr(step, "conditioner", None)
        if net is not None:
            net.register_forward_hook(lambda *_: calls.append(1))
    for run, passes in (
        (lambda: TraceKL_ELBO().loss_and_grads(vae.model, vae.guide, x), 1),
        (lambda: Trace_ELBO().loss_and_grads(vae.model, vae.guide, x), 1),
        (lambda: log_likelihood(vae, x, 3), 3),
        (lambda: importance_weighted_bound(vae.model, vae.guide, x), 64),
    ):
        calls.clear()
        run()
        assert len(calls) == 2 * passes


@pytest.mark.parametrize("flow", FLOWS)
def test_particles_and_mean_field(device, x, flow):
    vae = make_vae_of(make_encoder(device, flow), GaussianPrior(2))
    options = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 3}
    for elbo in (Timestep_ELBO(**options), TraceMeanField_ELBO(), Trace_ELBO(num_particles=2)):
        assert math.isfinite(elbo.loss_and_grads(vae.model, vae.guide, x))
    assert all(p.grad.isfinite().all() for p in vae.parameters())


@pytest.mark.parametrize("flow, shape", CASES)
def test_what_needs_a_point_takes_a_draw(device, x, flow, shape):
    vae = make_vae_of(make_encoder(device, flow, shape), GaussianPrior(shape))
    assert reconstruct(vae, x).shape == x.shape
    assert interpolate(vae, x, x + 1, num_frames=3).shape == (3, 2, 3)


def test_active_units_without_a_mean(device):
    shift = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0]], dtype=torch.float64, device=device)
    encoder = make_encoder(device, "iaf").to(device)
    base, data = encoder.encoder, torch.randn(400, 3, dtype=torch.float64, device=device)
    with torch.no_grad():  # the second latent alone moves with x, the flow is a constant shift
        base.weight.copy_(shift), base.log_scale.zero_()
        for step in encoder.transform.transforms:
            nn.init.zeros_(step.inv.hyper[-1].weight)
    vae = make_vae_of(encoder, GaussianPrior(2))
    assert active_units(vae, data)[""] == (1, 2)
    vae.encoder = make_encoder(device, "coupling")
    assert 0 <= elbo_surgery(vae, data[:50]).active_units <= 2


def test_the_aggregate_of_flows_is_their_mixture(device, x, monkeypatch):
    encoder = make_encoder(device, "coupling")
    z = torch.randn(5, 2, dtype=torch.float64, device=device)
    each = torch.stack([encoder(datum[None]).log_prob(z) for datum in x])
    expected = each.logsumexp(0) - math.log(2)
    for chunk in (1, 4, 10**6):
        monkeypatch.setattr("pyro_vaediff.evaluate.aggregate.NETWORK_CHUNK", chunk)
        found = aggregate_log_prob(z, [encoder(x[:1]), encoder(x[1:])])
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_a_run_and_its_checkpoint(tmp_path, capsys):
    r"""A smoke test of the option, from the command line to the report, and back."""
    out = tmp_path / "run"
    words = "--posterior iaf --posterior-flows 2 --num-timesteps 5 --epochs 2 --limit 40 --width 4"
    main([*words.split(), "--features", "none", "--device", "cpu", "--quiet", "--out", str(out)])
    pyro.enable_validation(True)
    printed = capsys.readouterr().out
    assert "latents are active" in printed
    assert "not available for the KL by timestep: q(z_t | x)" in printed
    assert (out / "reconstructions.png").exists()
    vae, config = load_vae(out)
    assert (config.posterior, config.posterior_flows) == ("iaf", 2)
    assert len(vae.encoder.transform.transforms) == 2
    again, x = load_vae(out)[0], torch.rand(3, 1, 8, 8)
    losses = []
    for each in (vae, again):
        pyro.set_rng_seed(0)
        losses.append(Timestep_ELBO().loss(each.model, each.guide, x))
    assert losses[0] == losses[1]
    assert any(p.any() for p in vae.encoder.transform.transforms[0].inv.hyper[-1].parameters())


def test_the_preset_is_the_grid():
    cells = read_preset("posteriors").cells
    found = [(c.seed, c.options["prior"], c.options.get("posterior", "gaussian")) for c in cells]
    grid = itertools.product((0, 1, 2), ("gaussian", "flow", "diffusion"), ("gaussian", "iaf"))
    assert sorted(found) == sorted(grid)


# --- What is refused ------------------------------------------------------------------------------


def refused(device):
    x = torch.zeros(2, 3, dtype=torch.float64, device=device)
    vae = linear_gaussian_vae(order="reversed").to(device)
    vae.encoder = make_encoder(device, "iaf")
    simple = make_vae_of(vae.encoder, GaussianPrior(2))

    def loss(elbo, vae=vae):
        return elbo.loss(vae.model, vae.guide, x)

    class Laplace(nn.Module):
        def forward(self, x):
            return dist.Laplace(x[:, :2], 1.0).to_event(1)

    exemplar = ExemplarPrior(2, 5).to(x)
    given_x = r"diagonal Gaussian encoder, got FlowDistribution: use conditioning='z_0', or order="
    return [
        (lambda: loss(Timestep_ELBO(conditioning="x")), given_x),
        (lambda: loss(Trace_ELBO()), given_x),
        (lambda: kl_by_timestep(vae, x), given_x),
        (
            lambda: loss(TotalCorrelation(Timestep_ELBO(), 2.0), simple),
            "total correlation needs a diagonal Gaussian, got a FlowDistribution",
        ),
        (lambda: elbo_surgery(simple, x), "inverse autoregressive flow D passes each: use a Gau"),
        (lambda: aggregate_prior(simple, x), "must be Gaussian for an aggregate_prior, got a Flow"),
        (lambda: NoiseMatched(vae.encoder)(x), "with a mean for NoiseMatched, got a FlowDistrib"),
        (
            lambda: FlowEncoder(Laplace(), POSTERIOR_FLOWS["iaf"](2, 4))(x),
            "encoder must return a diagonal Gaussian, .* got a Independent: leave the flow out",
        ),
        (
            lambda: exemplar.remember(vae.encoder(x), x[:, :1]),
            "needs the means of a Gaussian encoder, got a FlowDistribution: use a Diff",
        ),
        (lambda: POSTERIOR_FLOWS["iaf"](2, 4, 0), "num_steps must be a whole number >= 1, got 0"),
        (lambda: POSTERIOR_FLOWS["coupling"](1, 2), "coupling flow needs two variables or more"),
        (lambda: ModelConfig(posterior="iaf", latent_groups=("2", "1x2x2")), "latent_groups=.* ne"),
    ]


@pytest.mark.parametrize("number", range(12))
def test_what_needs_a_gaussian_is_refused(device, number):
    call, match = refused(device)[number]
    with one_line_value_error(match):
        call()


def test_the_flow_is_one_of_an_mlp_encoder_under_autocast(device):
    encoder = FlowEncoder(MLPEncoder(3, 2, (8,)), POSTERIOR_FLOWS["iaf"](2, 4)).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        q = encoder(torch.randn(4, 3, device=device))
        z = q.rsample()
    assert z.dtype == q.log_prob(z).dtype == torch.float32
