r"""The best reverse variances and the best grids, where both are known."""

from __future__ import annotations

import gc
import io
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from pyro import poutine
from pyro.infer import Trace_ELBO
from test_probability_flow import MixtureDenoiser
from torch import nn

from pyro_vaediff import DiffusionPrior, Timestep_ELBO, TraceKL_ELBO
from pyro_vaediff.denoise import Analytic, Denoiser, Diagonal
from pyro_vaediff.diffusion import kl_normal, q_marginal, q_step
from pyro_vaediff.evaluate import chain_log_prob
from pyro_vaediff.nn import ResidualMLP
from pyro_vaediff.priors import fit_variances, optimal_steps, step_costs
from pyro_vaediff.schedules import CosineSchedule, LinearSchedule
from pyro_vaediff.testing import Oracle, exact_elbo, linear_gaussian_vae

MEAN, SCALE = [0.3, -2.0], [0.2, 1.7]
KINDS = {"analytic": Analytic, "diagonal": Diagonal}


def exact(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def moments(shape):
    return (torch.tensor(x, dtype=torch.float64).reshape(shape) for x in (MEAN, SCALE))


def gaussian_prior(shape=(2,), T=1000, scale=SCALE, schedule=None, reverse_variance="beta"):
    r"""Returns a prior whose denoiser is exact for clean latents from N(MEAN, scale^2)."""
    schedule = LinearSchedule(T) if schedule is None else schedule
    net = ResidualMLP(shape, num_outputs=2 if reverse_variance == "learned" else 1, width=4)
    prior = DiffusionPrior(
        shape, T, schedule, net, reverse_variance=reverse_variance, preconditioning=True
    ).double()
    known = prior.denoiser.preconditioning
    with torch.no_grad():
        known.mean.copy_(torch.tensor(MEAN, dtype=torch.float64).reshape(shape))
        scale = torch.tensor(scale, dtype=torch.float64).reshape(shape)
        known.log_scale.copy_(scale.log() / known.gain)
    return prior


def posterior_variance(prior, scale):
    r"""Returns the variance of clean latents from N(m, scale^2) given z_t, for t = T, ..., 1."""
    alpha_bar = torch.sigmoid(prior.schedule.log_snr[1:].flip(0))
    alpha_bar = alpha_bar.reshape(-1, *[1] * scale.ndim)
    return scale**2 * (1 - alpha_bar) / (alpha_bar * scale**2 + 1 - alpha_bar)


def with_errors(prior, kind, errors):
    r"""Returns the prior with the best variances for errors at t = T, ..., 1."""
    variance = kind(prior.event_shape, prior.schedule.log_snr[1:].flip(0)).double()
    variance.set_error(errors)
    prior = prior.with_steps(prior.schedule.original("times"))
    prior.denoiser.variance = variance
    return prior


# --- Gaussian latents -----------------------------------------------------------------------------

GRIDS = [1, 2, 7, [0.0, 0.01, 0.5, 0.6, 1.0]]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("steps", GRIDS, ids=str)
@pytest.mark.parametrize(
    "kind, shape", [("diagonal", (2,)), ("diagonal", (1, 2, 1)), ("analytic", (2,))]
)
def test_gaussian_latents_have_no_gap_in_any_number_of_steps(device, kind, shape, steps, late):
    r"""The reverse kernels are the posteriors of the chain: what is lost is N(0, I) for q(z_T)."""
    mean, scale = (x.to(device) for x in moments(shape))
    if kind == "analytic":
        scale = torch.full_like(scale, 0.4)
    schedule = LinearSchedule(1000)
    schedule = schedule.starting_at(2.0) if late else schedule
    if isinstance(steps, list):
        steps = torch.tensor([max(t, schedule.start) for t in steps], dtype=torch.float64)
        steps = steps.unique()
    prior = gaussian_prior(shape, scale=scale.tolist(), schedule=schedule).to(device)
    prior = prior.with_steps(steps)
    errors = posterior_variance(prior, scale)
    if kind == "analytic":
        errors = errors.mean(tuple(range(1, errors.ndim)), keepdim=True)
    prior = with_errors(prior, KINDS[kind], errors)
    alpha_bar = torch.sigmoid(prior.schedule.log_snr)

    def law(t):
        root = (alpha_bar[t] * scale**2 + 1 - alpha_bar[t]).sqrt()
        return dist.Normal(alpha_bar[t].sqrt() * mean, root).to_event(len(shape))

    z_0 = law(0).sample((20,))
    prior.order = "posterior"
    with pyro.plate("data", 20):
        guide = poutine.trace(prior.guide).get_trace(dist.Delta(z_0, event_dim=len(shape)))
        model = poutine.trace(poutine.replay(prior.model, trace=guide)).get_trace()
    log_p, log_q = (
        sum(s["fn"].log_prob(s["value"]) for s in tr.nodes.values() if s["type"] == "sample")
        for tr in (model, guide)
    )
    z_T = guide.nodes[f"z_{prior.num_timesteps}"]["value"]
    expected = law(0).log_prob(z_0) + prior.standard_normal().log_prob(z_T) - law(-1).log_prob(z_T)
    exact(log_p - log_q, expected, atol=1e-9)  # for each path, not in the mean


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde", "learned", "diagonal"])
def test_errors_of_gaussian_latents_are_measured(device, reverse_variance, late):
    N, T = 20_000, 12
    schedule = LinearSchedule(T)
    schedule = schedule.starting_at(2.0) if late else schedule
    prior = gaussian_prior((2, 1), T, SCALE, schedule, reverse_variance).to(device)
    mean, scale = (x.to(device) for x in moments((2, 1)))
    alpha_bar = torch.sigmoid(prior.schedule.log_snr)
    root = (alpha_bar[0] * scale**2 + 1 - alpha_bar[0]).sqrt()
    z_0 = alpha_bar[0].sqrt() * mean + root * torch.randn(N, 2, 1).to(root)
    errors = posterior_variance(prior, scale)
    for per_dimension in (True, False):
        fitted = fit_variances(prior, z_0, per_dimension=per_dimension)
        truth = errors if per_dimension else errors.mean((1, 2), keepdim=True)
        table = fitted.denoiser.variance
        se = (2 / N) ** 0.5 * truth
        if late:  # the squares have the variance of z_0 given z_t and clean latents, too
            times = prior.schedule.original("times")
            jump = prior.denoiser.step(times[1:].flip(0), times[0])
            given = (jump["betas_tilde"] / jump["b"] ** 2).to(truth).reshape(-1, 1, 1)
            se = (2 / N) ** 0.5 * (truth + given)
        measured = table.error(prior.schedule.log_snr[1:].flip(0))
        assert ((measured - truth).abs() < 5 * se).all()
        assert fitted.num_timesteps == T and set(fitted.denoiser.backbone.parameters()) == set(
            prior.denoiser.backbone.parameters()
        )
        z = torch.randn(3, 2, 1).to(root)
        for t in (1, T):  # the mean is that of the trained denoiser
            exact(fitted.reverse(z, t).mean, prior.reverse(z, t).mean)
            exact(fitted.with_steps(3).denoise(z, 3), prior.denoise(z, T))


def test_every_path_through_gaussian_latents_costs_the_same(device):
    mean, scale = (x.to(device) for x in moments((2,)))
    prior = gaussian_prior(T=9).to(device)
    prior = with_errors(prior, Diagonal, posterior_variance(prior, scale))
    costs, alpha_bar = step_costs(prior), torch.sigmoid(prior.schedule.log_snr[-1])
    z_T = dist.Normal(alpha_bar.sqrt() * mean, (alpha_bar * scale**2 + 1 - alpha_bar).sqrt())
    standard = dist.Normal(torch.zeros_like(mean), 1.0)
    # H[z_0] + KL(q(z_T) || N) less the part of the bound that no path changes
    last = kl_normal(dist.Normal(alpha_bar.sqrt() * mean, (1 - alpha_bar).sqrt()), standard)
    last = (last + alpha_bar * scale**2 / 2).sum()  # averaged over z_0
    expected = (dist.Normal(mean, scale).entropy() + kl_normal(z_T, standard)).sum() - last
    for n in range(9):
        for between in itertools.combinations(range(1, 9), n):
            path = [0, *between, 9]
            total = sum(costs[t, s] for s, t in itertools.pairwise(path))
            exact(total, expected.cpu(), atol=1e-9)


# --- Latents that are not Gaussian ----------------------------------------------------------------


def mixture(device, T=50):
    r"""Returns a prior with the best denoiser for a mixture of two Gaussians, and the mixture."""
    locs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64, device=device)
    net = MixtureDenoiser(locs, 0.2)
    prior = DiffusionPrior(1, T, CosineSchedule(T), net, parameterization="z0").double().to(device)
    components = dist.Normal(locs, torch.full_like(locs, 0.2)).to_event(1)
    return prior, dist.MixtureSameFamily(dist.Categorical(torch.ones_like(locs[:, 0])), components)


def test_errors_of_a_mixture_are_those_of_quadrature(device):
    prior, law = mixture(device)
    N = 20_000
    fitted = fit_variances(prior, law.sample((N,)))
    z = torch.linspace(-9, 9, 20_001, dtype=torch.float64, device=device)[:, None]
    for t in (1, 5, 20, 40, 50):
        alpha_bar = prior.schedule.alphas_cumprod[t]
        v = alpha_bar * 0.04 + 1 - alpha_bar
        density = sum(
            dist.Normal(loc * alpha_bar.sqrt(), v.sqrt()).log_prob(z).exp() / 2 for loc in (-1, 1)
        )
        # E z_0^2 - E E[z_0 | z_t]^2, where z_0 = +-1 has the posterior mean tanh(sqrt(abar) z / v)
        side = torch.tanh(alpha_bar.sqrt() * z / v)
        gain = alpha_bar.sqrt() * 0.04 / v
        mean = gain * z + (1 - gain * alpha_bar.sqrt()) * side
        error = 1.04 - (mean.square() * density).sum() * (z[1, 0] - z[0, 0])
        measured = fitted.denoiser.variance.error(prior.schedule.log_snr[t]).item()
        assert measured == pytest.approx(error.item(), rel=5 * 0.03)  # e^4 is at most 18 e^2


class Wrong(nn.Module):
    r"""A denoiser that is the best one for nothing."""

    def forward(self, z, log_snr):
        return (z + log_snr[:, None] / 4).sin()


@pytest.mark.parametrize("kind", KINDS)
def test_the_variance_is_the_mean_square_of_what_the_mean_misses(device, kind):
    r"""Whatever the mean: by steps of the forward chain, whose posteriors it does not need."""
    N, scale = 40_000, torch.tensor([0.5, 1.5], dtype=torch.float64, device=device)
    prior = DiffusionPrior(
        2, 20, backbone=Wrong(), parameterization="v", reverse_variance="beta_tilde"
    )
    prior = prior.double().to(device)
    draw = lambda: scale * torch.randn(N, 2).to(scale).sign() + 0.1  # noqa: E731
    few = fit_variances(prior, draw(), per_dimension=kind == "diagonal").with_steps(4)
    z_0 = draw()
    for t in range(1, 5):
        z_s = z_0 if t == 1 else q_marginal(few.schedule, z_0, t - 1).sample()
        z_t = q_step(few.schedule, z_s, t).sample()
        p = few.reverse(z_t, t)
        exact(p.mean, prior.with_steps(4).reverse(z_t, t).mean)
        square = (z_s - p.mean).square()
        if kind == "analytic":
            square = square.mean(-1, keepdim=True)
        se = 2 * square.std(0) / N**0.5  # that of the fit is no larger than this one
        assert (se < 0.02 * square.mean(0)).all()
        assert ((square - p.variance).mean(0).abs() < 5 * se).all()


def test_costs_are_those_of_the_bound(device):
    prior, law = mixture(device)
    fitted, z_0 = fit_variances(prior, law.sample((20_000,))), law.sample((20_000,))
    costs, grid = step_costs(fitted), prior.schedule.original("times")
    last = kl_normal(
        q_marginal(prior.schedule, z_0, 50).base_dist, prior.standard_normal().base_dist
    ).sum(-1)
    for path in ([0, 50], [0, 3, 50], [0, 1, 9, 25, 40, 50]):
        few = fitted.with_steps(grid[path])
        with torch.no_grad():
            bound = last + chain_log_prob(few, z_0, Timestep_ELBO("all"))
        se = 2**0.5 * bound.std().item() / len(z_0) ** 0.5  # of the fit as well
        total = sum(costs[t, s].item() for s, t in itertools.pairwise(path))
        assert se < 0.02
        assert bound.mean().item() == pytest.approx(-total, abs=5 * se)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_grid_is_that_of_all_grids(device, kind):
    T = 9
    prior = DiffusionPrior(3, T, "cosine", reverse_variance=kind).double().to(device)
    with torch.no_grad():
        prior.denoiser.variance.log_ratios.normal_(std=0.1)
    alpha_bar = prior.schedule.original("alphas_cumprod")
    error = prior.denoiser.variance.error(prior.schedule.log_snr).detach().cpu().expand(-1, 3)

    def cost(t, s):
        # Precisions add up, and the weight of sqrt(abar_s) z_0 is its share of them.
        beta = 1 - alpha_bar[t] / alpha_bar[s]
        if s == 0:
            return (2 * math.pi * math.e * error[t]).log().sum().item() / 2
        given = 1 / ((1 - beta) / beta + 1 / (1 - alpha_bar[s]))
        weight = given / (1 - alpha_bar[s]) * alpha_bar[s].sqrt()
        return (1 + weight**2 * error[t] / given).log().sum().item() / 2

    costs = step_costs(prior)
    for t, s in itertools.combinations(range(T, -1, -1), 2):
        assert costs[t, s].item() == pytest.approx(cost(t, s), abs=1e-9)
        assert costs[s, t] == math.inf
    for n in range(1, T + 1):
        paths = [[0, *between, T] for between in itertools.combinations(range(1, T), n - 1)]
        totals = [sum(cost(t, s) for s, t in itertools.pairwise(path)) for path in paths]
        best = paths[totals.index(min(totals))]
        assert optimal_steps(prior, n).tolist() == prior.schedule.original("times")[best].tolist()


# --- The table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_is_interpolated(kind):
    knots = torch.tensor([-2.0, 1.0, 2.0]).double()
    variance = KINDS[kind]((2, 1), knots).double()
    with torch.no_grad():
        variance.log_ratios.normal_(std=0.1)
    r = variance.gain * variance.log_ratios.detach()
    log_snr = torch.tensor([[-9.0, -2.0, 0.5], [1.0, 1.25, 99.0]]).double()
    expected = torch.stack([r[0], r[0], (r[0] + 5 * r[1]) / 6, r[1], (3 * r[1] + r[2]) / 4, r[2]])
    expected = expected.exp().unflatten(0, (2, 3)) / (1 + log_snr.exp())[..., None, None]
    exact(variance.error(log_snr), expected)
    exact(variance.error(log_snr[0, 2]), expected[0, 2])
    single = KINDS[kind]((2, 1), knots[:1]).double()
    exact(
        single.error(log_snr),
        (1 / (1 + log_snr.exp()))[..., None, None].expand(2, 3, *single.log_ratios.shape[1:]),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_fitted_variances_are_saved_with_the_prior(kind):
    prior = DiffusionPrior((1, 2, 2), 30)
    fitted = fit_variances(prior, torch.randn(50, 1, 2, 2), per_dimension=kind == "diagonal")
    file = io.BytesIO()
    torch.save(fitted.state_dict(), file)
    file.seek(0)
    loaded = DiffusionPrior((1, 2, 2), 30, reverse_variance=kind)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    z = torch.randn(3, 1, 2, 2)
    for one, other in ((fitted, loaded), (fitted.with_steps(4), loaded.with_steps(4))):
        exact(one.reverse(z, 4).stddev, other.reverse(z, 4).stddev, atol=0)
    trained = DiffusionPrior((1, 2, 2), 30, reverse_variance=kind)
    trained.denoiser.variance.log_ratios.data.normal_()
    loaded.load_state_dict(trained.state_dict())
    exact(loaded.reverse(z, 4).stddev, trained.reverse(z, 4).stddev, atol=0)


class Told(nn.Module):
    r"""A denoiser to whom the clean latents are told, up to noise, as a context."""

    def forward(self, z, log_snr, c):
        return c[..., None, None] - torch.sigmoid(log_snr).sqrt()[..., None, None, None] * z


def test_errors_given_a_context():
    prior = DiffusionPrior(
        (2, 1, 1), 5, backbone=Told(), parameterization="z0", context_features=2
    ).double()
    c = torch.randn(5000, 2).double()
    z_0 = (c + torch.tensor([0.1, 0.5]) * torch.randn(5000, 2)).reshape(-1, 2, 1, 1)
    fitted = fit_variances(prior, z_0, c, per_dimension=True)
    error = fitted.denoiser.variance.error(prior.schedule.log_snr[1:]).detach()
    expected = torch.tensor([0.01, 0.25]).double().reshape(2, 1, 1).expand(5, 2, 1, 1)
    torch.testing.assert_close(error, expected, atol=0, rtol=5 * (2 / 5000) ** 0.5)
    few = fitted.with_steps(optimal_steps(fitted, 2))
    assert few.reverse(z_0, 1, c).mean.shape == z_0.shape


# --- Training -------------------------------------------------------------------------------------


def random_vae(kind, T=4, **options):
    vae = linear_gaussian_vae(T, reverse_variance=kind, **options)
    nn.init.normal_(vae.prior.denoiser.variance.log_ratios, std=0.1)
    return vae


@pytest.fixture
def x(device):
    return torch.randn(2, 3, dtype=torch.float64, device=device)


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_knows_the_variances(x, kind, T):
    vae = random_vae(kind, T).to(x.device)
    exact(Oracle(vae, x).negative_elbo, -exact_elbo(vae.model, vae.guide, x))
    for conditioning in ("z_0", "x"):
        terms = Oracle(vae, x).terms(conditioning).values()
        total = sum(term.sum(0) if term.ndim > 1 else term for term in terms)
        exact(total, Oracle(vae, x).negative_elbo)


ESTIMATORS = {
    "unrolled": Trace_ELBO,
    "closed-form": TraceKL_ELBO,
    "all": lambda: Timestep_ELBO("all"),
    "given x": lambda: Timestep_ELBO("all", conditioning="x"),
    "importance": lambda: Timestep_ELBO(k=2),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_of_variances_are_unbiased(x, kind, name):
    vae = random_vae(kind, order="posterior").to(x.device)
    parameters = [vae.prior.denoiser.variance.log_ratios, vae.prior.denoiser.backbone.net.weight]

    def row(loss):
        gradients = torch.autograd.grad(loss, parameters)
        return torch.cat([loss.detach().reshape(1), *(g.flatten() for g in gradients)])

    elbo, copies = ESTIMATORS[name](), 2000
    data = x.repeat(copies, 1)
    rows = torch.stack(
        [row(elbo.differentiable_loss(vae.model, vae.guide, data) / copies) for _ in range(30)]
    )
    truth, mean, se = row(Oracle(vae, x).negative_elbo.sum()), rows.mean(0), rows.std(0) / 30**0.5
    assert (se < 0.02 * truth.abs().amax()).all()
    assert ((mean - truth).abs() < 6 * se + 1e-10).all()  # a t-value with 29 degrees of freedom


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_one_loss(x, kind):
    vae, elbo, losses = random_vae(kind).to(x.device), Timestep_ELBO(), []
    for call in (elbo.loss, elbo.differentiable_loss, elbo.loss_and_grads, elbo.loss):
        torch.manual_seed(3)
        loss = call(vae.model, vae.guide, x)
        losses.append(loss if isinstance(loss, float) else loss.item())
    assert losses == [losses[0]] * 4


def train(prior, z_0, steps, lr):
    optimizer = torch.optim.Adam(prior.parameters(), lr)
    for _ in range(steps):
        loss = -chain_log_prob(prior, z_0[torch.randint(len(z_0), (256,))], Timestep_ELBO()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_variances_learn_what_is_measured(device):
    start, law = mixture(device, T=20)
    net, schedule = start.denoiser.backbone, CosineSchedule(20)
    prior = DiffusionPrior(1, 20, schedule, net, "z0", "analytic").double().to(device)
    train(prior, law.sample((20_000,)), 100, lr=0.02)
    fitted, z_0 = fit_variances(prior, law.sample((20_000,))), law.sample((5000,))
    bounds = []
    for chain in (prior, fitted, start):
        pyro.set_rng_seed(1)
        with torch.no_grad():
            bounds.append(chain_log_prob(chain, z_0, Timestep_ELBO("all")))
    learned, measured, beta = bounds
    assert (learned - measured).mean().abs() < 0.02  # in nats
    gain = measured - beta
    assert gain.mean() > 0.05 + 5 * gain.std() / 5000**0.5


def test_a_few_steps_are_tuned_by_training_their_chain(device):
    torch.manual_seed(0)
    z_0 = torch.randn(4000, 2, device=device).sign() + 0.1 * torch.randn(4000, 2, device=device)
    prior = DiffusionPrior(2, 100, backbone=ResidualMLP(2, width=32), reverse_variance="analytic")
    train(prior.to(device), z_0, 100, lr=0.01)
    few = prior.with_steps(optimal_steps(prior, 4))

    def bound():
        pyro.set_rng_seed(1)
        with torch.no_grad():
            return chain_log_prob(few, z_0, Timestep_ELBO("all"))

    before = bound()
    train(few, z_0, 50, lr=0.003)
    gain = bound() - before
    assert gain.mean() > 5 * gain.std() / len(z_0) ** 0.5
    assert all(p is q for p, q in zip(few.parameters(), prior.parameters(), strict=True))


def test_chains_of_one_denoiser_share_a_parameter_store(device):
    def sites(prior):
        model = lambda: prior.model()  # noqa: E731
        nodes = poutine.trace(model, param_only=True).get_trace().nodes
        return {id(s["value"].unconstrained()) for s in nodes.values() if s["type"] == "param"}

    prior = DiffusionPrior(2, 6).to(device)
    parameters = {id(p) for p in prior.parameters()}
    for _ in range(2):
        for chain in (prior, prior.with_steps(2), prior.with_steps(3)):
            assert sites(chain) == parameters
        assert len(pyro.get_param_store()) == len(parameters)
    del chain, prior
    gc.collect()
    sites(DiffusionPrior(2, 6).to(device))  # what was before is forgotten
    assert len(pyro.get_param_store()) == len(parameters)


# --- Grids ----------------------------------------------------------------------------------------


def test_grids_that_there_are_not():
    prior = DiffusionPrior(2, 4)
    with one_line_value_error("prior must have analytic .* got Beta: use fit_variances"):
        optimal_steps(prior, 2)
    fitted = fit_variances(prior, torch.randn(4, 2))
    with one_line_value_error("num_steps must be at most T = 4, got 5"):
        optimal_steps(fitted, 5)
    with one_line_value_error("num_steps must be a whole number >= 1, got 0"):
        optimal_steps(fitted, 0)


def test_a_variance_can_be_an_object():
    denoiser = Denoiser(ResidualMLP(2, width=4), LinearSchedule(3), (2,), "eps", Diagonal((2,)))
    assert "variance.log_ratios" in dict(denoiser.named_parameters())
