r"""What every estimator promises whatever it estimates: its interface, its errors, its terms."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import SVI, Trace_ELBO

from pyro_vaediff import VAE, DiffusionPrior, GaussianPrior, Reweighted, Timestep_ELBO, TraceKL_ELBO
from pyro_vaediff.infer import check_mean_field, elbo_terms
from pyro_vaediff.testing import LinearGaussian, Oracle, linear_gaussian_vae

ESTIMATORS = {
    "TraceKL_ELBO": TraceKL_ELBO,
    **{
        f"Timestep_ELBO({', '.join(map(str, options.values()))})": (
            lambda options=options, **kwargs: Timestep_ELBO(**options, **kwargs)
        )
        for options in (
            {"timesteps": "all", "chunk_size": 2},
            {"timesteps": "uniform", "low_discrepancy": False},
            {"timesteps": "importance", "conditioning": "x", "k": 3},
            {"timesteps": "loss-aware"},
        )
    },
    **{
        name: (lambda name=name, **kwargs: Reweighted(Timestep_ELBO(**kwargs), name))
        for name in ("simple", "paper")
    },
}
# Of five steps, or in continuous time, where only timesteps are known.
CASES = [
    *((name, 5) for name in ESTIMATORS),
    *((name, None) for name in ESTIMATORS if name.startswith("Timestep")),
]
PARTICLES = [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}]


@pytest.fixture
def x(device):
    return torch.randn(5, 3, dtype=torch.float64, device=device)


@pytest.fixture
def vae(device):
    return linear_gaussian_vae(5).to(device)


def gradients(vae):
    return [p.grad.clone() for p in vae.parameters()]


# --- The interface --------------------------------------------------------------------------------


@pytest.mark.parametrize("particles", PARTICLES, ids=str)
@pytest.mark.parametrize("name, T", CASES)
def test_every_way_to_ask_gives_the_same_loss_and_gradient(x, name, T, particles):
    vae = linear_gaussian_vae(T).to(x.device)
    losses, grads = [], []
    for way in ("loss", "differentiable_loss", "loss_and_grads", "module", "terms"):
        elbo = ESTIMATORS[name](**particles)  # a new one: a loss-aware proposal learns from each
        vae.zero_grad()
        torch.manual_seed(3)
        if way == "module":
            loss = elbo(vae.model, vae.guide)(x)
        elif way == "terms":
            loss = sum(elbo.terms(vae.model, vae.guide, x).values())
        else:
            loss = getattr(elbo, way)(vae.model, vae.guide, x)
        if isinstance(loss, torch.Tensor):
            loss.backward()
        losses.append(loss.item() if isinstance(loss, torch.Tensor) else loss)
        if way != "loss":
            grads.append(gradients(vae))
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-10)
    for other in grads[1:]:
        torch.testing.assert_close(grads[0], other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name, T", CASES)
def test_svi_takes_the_steps_of_a_torch_optimizer(x, name, T):
    vae = linear_gaussian_vae(T).to(x.device)
    svi = SVI(vae.model, vae.guide, pyro.optim.SGD({"lr": 1e-3}), loss=ESTIMATORS[name]())
    before = [p.detach().clone() for p in vae.parameters()]
    torch.manual_seed(3)
    loss = svi.step(x)
    after = [p.detach().clone() for p in vae.parameters()]
    for parameter, start in zip(vae.parameters(), before, strict=True):
        parameter.data.copy_(start)
    vae.zero_grad()
    torch.manual_seed(3)
    assert loss == pytest.approx(ESTIMATORS[name]().loss_and_grads(vae.model, vae.guide, x))
    expected = [p - 1e-3 * g for p, g in zip(before, gradients(vae), strict=True)]
    torch.testing.assert_close(after, expected)


def test_loss_aware_learns_from_training_only(vae, x):
    elbo = Timestep_ELBO("loss-aware")
    elbo.loss(vae.model, vae.guide, x)
    start = elbo.state_dict()["0.squares"].clone()
    elbo.loss(vae.model, vae.guide, x)
    assert (elbo.state_dict()["0.squares"] == start).all()
    elbo.loss_and_grads(vae.model, vae.guide, x)
    assert (elbo.state_dict()["0.squares"] != start).any()

    other = Timestep_ELBO("loss-aware")
    other.load_state_dict(elbo.state_dict())
    losses = []
    for estimator in (elbo, other):
        torch.manual_seed(3)
        losses.append(estimator.loss(vae.model, vae.guide, x))
    assert losses[0] == losses[1]


# --- Terms per datum ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("name, T", CASES)
def test_terms_sum_to_the_loss(x, name, T, num_particles):
    vae = linear_gaussian_vae(T).to(x.device)
    torch.manual_seed(3)
    elbo = ESTIMATORS[name](num_particles=num_particles)
    loss = elbo.loss(vae.model, vae.guide, x)
    torch.manual_seed(3)
    terms = elbo_terms(vae.model, vae.guide, x, elbo=elbo)
    assert sum(term.sum().item() for term in terms.values()) == pytest.approx(loss, rel=1e-6)
    assert all(term.shape[-1:] == (len(x),) for term in terms.values())


@pytest.mark.parametrize("conditioning", ["z_0", "x"])
@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde", "learned"])
@pytest.mark.parametrize("T", [1, 2, 5])
def test_each_term_has_the_right_mean(x, T, reverse_variance, conditioning):
    num_replicas = 20_000
    vae = linear_gaussian_vae(T, reverse_variance=reverse_variance).to(x.device)
    oracle = Oracle(vae, x)
    exact = oracle.terms(conditioning)
    elbo = Timestep_ELBO("all", conditioning=conditioning, chunk_size=2)
    with torch.no_grad():
        terms = elbo_terms(vae.model, vae.guide, x.repeat(num_replicas, 1), elbo=elbo)
    if conditioning == "z_0" and reverse_variance != "learned" and T > 1:
        # What the variances alone contribute to the KLs is in a term of its own.
        ratio = torch.stack([oracle.beta_tilde(t) / oracle.sigma(t) ** 2 for t in range(2, T + 1)])
        constants = (ratio - 1 - ratio.log()).sum(-1, keepdim=True) / 2
        exact["z_s"] = exact["z_s"] - constants
        if reverse_variance == "beta" or "constant" in terms:  # zero, up to rounding, for the other
            exact["constant"] = constants.sum().expand(len(x))
    assert terms.keys() == {name for name in exact if len(exact[name])}  # no steps for T = 1
    for name, term in terms.items():
        draws = term.unflatten(-1, (num_replicas, len(x)))
        mean, se = draws.mean(-2), draws.std(-2) / num_replicas**0.5
        assert (se < 0.05).all(), name
        assert ((mean - exact[name]).abs() < 5 * se + 1e-10).all(), name


def test_an_auxiliary_site_of_the_guide_is_part_of_the_bound(device):
    # q(z) = int q(u) q(z | u) du with u ~ N(m, r^2), z ~ N(u, s^2), and p(z) = N(0, 1).
    m, r, s = (torch.tensor(v, dtype=torch.float64, device=device) for v in (0.3, 0.5, 0.7))

    def model():
        pyro.sample("z", dist.Normal(0 * m, 1.0))

    def guide():
        u = pyro.sample("u", dist.Normal(m, r), infer={"is_auxiliary": True})
        return pyro.sample("z", dist.Normal(u, s))

    torch.manual_seed(1)
    terms = TraceKL_ELBO().terms(model, guide)
    torch.manual_seed(1)
    expected = {
        "-H[u]": -(2 * math.pi * math.e * r**2).log() / 2,
        "-H[z]": -(2 * math.pi * math.e * s**2).log() / 2,
        "z": -dist.Normal(0 * m, 1.0).log_prob(guide()),
    }
    torch.testing.assert_close(terms, expected, atol=1e-12, rtol=0)


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, match",
    [
        ({"timesteps": "some"}, "timesteps 'some'"),
        ({"conditioning": "y"}, "conditioning 'y'"),
        ({"k": 0}, "k must be .* got 0"),
        ({"k": 1.5}, "k must be .* got 1.5"),
        ({"chunk_size": 0}, "chunk_size must be .* got 0"),
    ],
    ids=str,
)
def test_unknown_options(options, match):
    with one_line_value_error(match):
        Timestep_ELBO(**options)


class LaplaceEncoder(LinearGaussian):
    def forward(self, x):
        base = super().forward(x).base_dist
        return dist.Laplace(base.loc, base.scale).to_event(1)


@pytest.mark.parametrize(
    "order, elbo, valid",
    [
        ("forward", Timestep_ELBO(conditioning="x"), False),
        ("forward", Timestep_ELBO("all", conditioning="x"), False),
        ("reversed", Trace_ELBO(), False),
        ("forward", Timestep_ELBO(), True),
        ("forward", Trace_ELBO(), True),
        ("posterior", TraceKL_ELBO(), True),
    ],
)
def test_given_x_needs_a_gaussian_encoder(vae, x, order, elbo, valid):
    vae.encoder = LaplaceEncoder(3, 2, log_scale=0.0).to(x.device)
    vae.prior.order = order
    if valid:
        elbo.loss_and_grads(vae.model, vae.guide, x)
        return
    with one_line_value_error("Gaussian encoder, got Laplace"):
        elbo.loss(vae.model, vae.guide, x)


@pytest.mark.parametrize("weighting", ["simple", "paper"])
@pytest.mark.parametrize(
    "reverse_variance, conditioning", [("learned", "z_0"), ("beta", "x"), ("beta_tilde", "x")]
)
def test_weightings_need_fixed_variances_and_z_0(x, weighting, reverse_variance, conditioning):
    vae = linear_gaussian_vae(3, reverse_variance=reverse_variance).to(x.device)
    elbo = Reweighted(Timestep_ELBO(conditioning=conditioning), weighting)
    with one_line_value_error("'simple' and 'paper' are defined for"):
        elbo.loss(vae.model, vae.guide, x)


class NonreparameterizedEncoder(LinearGaussian):
    def forward(self, x):
        base = super().forward(x).base_dist
        return NonreparameterizedNormal(base.loc, base.scale).to_event(1)


@pytest.mark.parametrize("prior", [GaussianPrior(2), DiffusionPrior(2, 3)])
@pytest.mark.parametrize("elbo", [TraceKL_ELBO(), Timestep_ELBO()])
def test_sites_must_be_reparameterized(x, elbo, prior):
    encoder = NonreparameterizedEncoder(3, 2, log_scale=0.0)
    vae = VAE(encoder, LinearGaussian(2, 3, log_scale=0.0), prior).double().to(x.device)
    with one_line_value_error("'z_0' is not reparameterized"):
        elbo.loss(vae.model, vae.guide, x)


@pytest.mark.parametrize(
    "elbo, match",
    [
        (Trace_ELBO(), "got Trace_ELBO"),
        (TraceKL_ELBO(num_particles=2, vectorize_particles=True), "vectorize"),
    ],
)
def test_terms_need_an_estimator_that_has_them(vae, x, elbo, match):
    with one_line_value_error(match):
        elbo_terms(vae.model, vae.guide, x, elbo=elbo)


# --- Validity of closed-form KLs ------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 4])
@pytest.mark.parametrize("order", ["forward", "posterior", "reversed"])
def test_check_mean_field_names_the_invalid_sites(x, order, T):
    vae = linear_gaussian_vae(T, order=order).to(x.device)
    invalid = {"forward": range(T), "posterior": range(1), "reversed": ()}[order]
    expected = {f"z_{t}": {f"z_{t + 1}"} for t in invalid}
    assert check_mean_field(vae.model, vae.guide, x) == expected


def test_check_mean_field_agrees_with_the_flags_of_the_guide(x):
    for order in ("forward", "posterior", "reversed"):
        vae = linear_gaussian_vae(4, order=order).to(x.device)
        trace = pyro.poutine.trace(vae.guide).get_trace(x)
        flagged = {
            n for n in trace.stochastic_nodes if trace.nodes[n]["infer"].get("closed_form_kl")
        }
        assert not flagged & check_mean_field(vae.model, vae.guide, x).keys()


def test_check_mean_field_follows_descendants_of_descendants():
    def guide():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("c", dist.Normal(b, 1.0))

    def model():
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("a", dist.Normal(c, 1.0))

    assert check_mean_field(model, guide) == {"a": {"c"}}
    assert check_mean_field(guide, guide) == {}
