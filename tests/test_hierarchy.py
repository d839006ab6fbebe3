r"""Hierarchies: groups of latents against an exact bound, legality, and networks for images."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from hierarchies import Join, Moments, chain, linear_hierarchy
from pyro.infer import Trace_ELBO
from torch import nn
from unbiased import assert_unbiased, draws, exact_values

from pyro_vaediff import VAE, DiffusionPrior, GaussianPrior
from pyro_vaediff.diffusion import kl_normal
from pyro_vaediff.evaluate import active_units, elbo_surgery, kl_by_timestep, log_likelihood
from pyro_vaediff.infer import Timestep_ELBO, TraceKL_ELBO, check_mean_field, elbo_terms
from pyro_vaediff.likelihoods import make_likelihood
from pyro_vaediff.nn import LadderEncoder, ResNetDecoder, ladder_path
from pyro_vaediff.priors import ConditionalGaussianPrior, HierarchicalPrior
from pyro_vaediff.sampling import ancestral, ddim, interpolate, reconstruct
from pyro_vaediff.testing import LinearGaussian, Oracle, exact_elbo, linear_gaussian_vae
from pyro_vaediff.train.report import by_group

# --- Against the exact bound ----------------------------------------------------------------------


@pytest.fixture
def x(device):
    torch.manual_seed(1)
    return torch.randn(2, 3, dtype=torch.float64, device=device)


@pytest.mark.parametrize("order", ["forward", "posterior", "reversed"])
@pytest.mark.parametrize("event_shape", [2, (1, 2, 1)])
def test_the_exact_bound_of_programs_is_that_of_the_oracle(x, order, event_shape):
    for variance in ("beta", "beta_tilde", "learned"):
        vae = linear_gaussian_vae(3, event_shape, order=order, reverse_variance=variance, seed=0)
        vae = vae.to(x.device)
        exact = Oracle(vae, x).negative_elbo
        bound = -exact_elbo(vae.model, vae.guide, x)
        torch.testing.assert_close(bound, exact, rtol=0, atol=1e-10)
        gradients = (
            torch.autograd.grad(loss.sum(), list(vae.parameters()), materialize_grads=True)
            for loss in (bound, exact)
        )
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_the_exact_bound_refuses_what_is_not_gaussian():
    def program(x):
        pyro.sample("z", dist.Laplace(torch.zeros(1), 1.0).to_event(1))

    with one_line_value_error("site 'z' of the guide must be Gaussian"):
        exact_elbo(program, program, torch.zeros(1))


ESTIMATORS = {
    "Trace_ELBO": Trace_ELBO,
    "TraceKL_ELBO": TraceKL_ELBO,
    "all": lambda: Timestep_ELBO("all", chunk_size=1),
    "all, given x": lambda: Timestep_ELBO("all", conditioning="x"),
    "importance": lambda: Timestep_ELBO(k=2),
}


@pytest.mark.parametrize("kind", ["top", "every", "below", "three"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_of_a_hierarchy_are_unbiased(x, name, kind):
    vae = linear_hierarchy(kind).to(x.device)
    exact = exact_values(vae, -exact_elbo(vae.model, vae.guide, x))
    assert_unbiased(draws(ESTIMATORS[name](), vae, x), exact, target=0.05)


@pytest.mark.parametrize("kind", ["top", "every"])
def test_a_hierarchy_with_fewer_steps_is_a_program(x, kind):
    vae = linear_hierarchy(kind).to(x.device)
    whole, vae.prior = vae.prior, vae.prior.with_steps(2)
    sites = list(pyro.poutine.trace(vae.prior.model).get_trace().stochastic_nodes)
    assert sites[:3] == ["group1/z_2", "group1/z_1", "group1/z_0"]
    assert ("group2/z_2" in sites) == (kind == "every") and "group2/z_3" not in sites
    exact = exact_values(vae, -exact_elbo(vae.model, vae.guide, x))
    assert_unbiased(draws(Timestep_ELBO(k=1), vae, x), exact, target=0.05)
    torch.manual_seed(0)
    few = ancestral(whole, 5, num_steps=2)
    torch.manual_seed(0)
    torch.testing.assert_close(few, ancestral(vae.prior, 5))
    assert set(map(id, whole.parameters())) == set(map(id, vae.prior.parameters()))
    with one_line_value_error("prior must be a DiffusionPrior, got HierarchicalPrior"):
        ddim(whole, 5, num_steps=2)


def test_terms_are_those_of_the_groups(x):
    vae = linear_hierarchy("top").to(x.device)
    terms = elbo_terms(vae.model, vae.guide, x)
    assert list(terms) == [
        "group1/constant", "group1/z_3", "group1/z_s", "-H[group1/z_0]", "group1/z_0", "group2/z_0",
        "x",
    ]  # fmt: skip
    assert terms["group2/z_0"].shape == (2,) and (terms["group2/z_0"] > 0).all()


def test_the_legal_sites_of_a_hierarchy(x):
    vae = linear_hierarchy("every").to(x.device)
    for prior in vae.prior.groups:
        prior.order = "reversed"
    assert check_mean_field(vae.model, vae.guide, x) == {}
    vae.prior.groups[0].order = "posterior"
    assert set(check_mean_field(vae.model, vae.guide, x)) == {"group1/z_0"}


def test_a_hierarchy_takes_a_context_at_its_top(x):
    groups = [chain(2, 3, 2), ConditionalGaussianPrior(1, Moments(5, 1))]
    prior = HierarchicalPrior(groups, [Join(), Join()], 6).double().to(x.device)
    c = torch.randn(4, 3, dtype=torch.float64, device=x.device)
    with pyro.plate("data", 4, dim=-1):
        assert prior.model(c).shape == (4, 6)


# --- Images ---------------------------------------------------------------------------------------


def image_hierarchy(groups=((6,), (3, 2, 2), (2, 4, 4)), image_shape=(1, 8, 8), width=8):
    torch.manual_seed(0)
    top, *below = groups
    priors = [DiffusionPrior(top, 20)]
    for shape in below:
        net = nn.Conv2d(width, 2 * shape[0], 3, padding=1)
        priors.append(ConditionalGaussianPrior(shape, net))
    path = ladder_path(groups, image_shape, width)
    state = (width, *path[-1].next_sides)
    likelihood = make_likelihood("discretized-logistic", image_shape, 17)
    encoder = LadderEncoder(image_shape, groups, width)
    decoder = ResNetDecoder(state, likelihood, width)
    return VAE(encoder, decoder, HierarchicalPrior(priors, path, state), likelihood.space(17))


@pytest.mark.parametrize(
    "groups, image_shape",
    [
        (((6,), (3, 2, 2), (2, 4, 4)), (1, 8, 8)),
        (((2, 4, 3), (1, 7, 5)), (3, 28, 20)),
        (((4, 4, 4),), (3, 16, 16)),
    ],
)
def test_ladders_of_any_shape_train(device, groups, image_shape):
    vae = image_hierarchy(groups, image_shape).to(device)
    x = vae.space.preprocess(torch.randint(0, 17, (6, *image_shape)).byte()).to(device)
    elbo = Timestep_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=2)
    first = elbo.loss(vae.model, vae.guide, x)
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    for _ in range(20):
        elbo.loss_and_grads(vae.model, vae.guide, x)
        assert all(p.grad is not None for p in vae.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert elbo.loss(vae.model, vae.guide, x) < 0.95 * first
    assert vae.model(None, num_samples=3).shape == (3, *image_shape)


def test_examples_of_a_ladder_do_not_see_each_other(device):
    vae = image_hierarchy().to(device).double()
    x = vae.space.preprocess(torch.randint(0, 17, (4, 1, 8, 8)).byte()).double().to(device)
    elbo = Timestep_ELBO("all", entropy="exact", conditioning="x", antithetic=False)

    def bound(x):
        torch.manual_seed(0)
        terms = elbo_terms(vae.model, vae.guide, x, elbo=elbo)
        return sum(term.sum(0) if term.ndim > 1 else term for term in terms.values())

    changed = x.clone()
    changed[1:] = x[0]
    assert bound(x)[0].item() == pytest.approx(bound(changed)[0].item(), abs=1e-9)


def test_a_residual_posterior_starts_from_the_prior():
    vae = image_hierarchy()
    posterior = vae.encoder(torch.zeros(5, 1, 8, 8))
    head = vae.encoder.heads[1][-1]
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    p = dist.Normal(torch.randn(5, 3, 2, 2), torch.rand(5, 3, 2, 2) + 0.5)
    q = posterior(2, torch.randn(5, 8, 2, 2), p).base_dist
    # The scale is 1 + min_scale = 1.001 times that of the prior.
    assert kl_normal(q, p).max().item() == pytest.approx(
        0.001 - math.log(1.001) + 0.001**2 / 2, rel=0.1
    )


@pytest.mark.parametrize(
    "groups, match",
    [
        ((), "latent_groups must have one shape or more"),
        (((3, 4, 4), (6,)), "only the first group may be a vector"),
        (((3, 4, 4), (3, 2, 2)), "must be ordered from the top"),
        (((3, 5, 5),), "latent_shape must be D or C h w, where images of 8 x 8 pixels halve"),
    ],
)
def test_groups_that_are_refused(groups, match):
    with one_line_value_error(match):
        LadderEncoder((1, 8, 8), groups)


def test_hierarchies_that_are_refused(x):
    with one_line_value_error("groups and path must have one entry per group, got 1 and 2"):
        HierarchicalPrior([GaussianPrior(2)], [Join(), Join()], 2)
    with one_line_value_error("a ConditionalGaussianPrior needs a context"):
        ConditionalGaussianPrior(2, nn.Linear(2, 4)).distribution()
    with one_line_value_error("each of groups must be a Prior, got a Linear"):
        HierarchicalPrior([GaussianPrior(2), nn.Linear(2, 2)], [Join(), Join()], 4)
    with one_line_value_error(r"must return tensors of shape \(N, 4\), got \(3, 2\)"):
        ConditionalGaussianPrior(2, nn.Linear(2, 2)).distribution(torch.zeros(3, 2))
    vae = linear_hierarchy("top").to(x.device)
    vae.encoder = LinearGaussian(3, 3, log_scale=0.0).to(x.device)
    with one_line_value_error("encoder of a hierarchy must return a function.*, got a Independent"):
        Timestep_ELBO().loss(vae.model, vae.guide, x)


@pytest.mark.parametrize(
    "function",
    [log_likelihood, elbo_surgery, kl_by_timestep, lambda vae, x: interpolate(vae, x, x)],
)
def test_what_needs_a_single_posterior_refuses_a_hierarchy(x, function):
    vae = linear_hierarchy("top").to(x.device)
    with one_line_value_error("HierarchicalPrior.*: use "):
        function(vae, x)


# --- What the groups are used for -----------------------------------------------------------------


def test_active_units_are_those_whose_means_move(x):
    vae = linear_hierarchy("top").to(x.device)
    data = torch.randn(500, 3, dtype=torch.float64, device=x.device)
    for group, units in active_units(vae, data, batch_size=128).items():
        assert units == (2, 2) if group == "group1" else (1, 1)
    top = vae.encoder.nets[0]
    with torch.no_grad():
        top.weight[:, 0] = 0.0  # a unit that says nothing of the data
    assert active_units(vae, data)["group1"] == (1, 2)
    # The variance of a mean that is linear in the data is that of its weights.

    weight = top.weight[0, 1].detach()
    variance = (weight @ torch.cov(data.T, correction=0) @ weight).item()
    for factor, count in ((0.999, 1), (1.001, 0)):
        assert active_units(vae, data, factor * variance)["group1"] == (count, 2)


def test_active_units_of_a_single_prior(x):
    vae = linear_gaussian_vae(seed=0).to(x.device)
    assert active_units(vae, torch.randn(50, 3, dtype=x.dtype).to(x)) == {"": (2, 2)}


def test_reconstructions_from_the_top_groups(device):
    vae = image_hierarchy().to(device).eval()
    x = vae.space.preprocess(torch.randint(0, 17, (4, 1, 8, 8)).byte()).to(device)
    posterior = vae.encoder(x)
    whole = reconstruct(vae, x)
    assert whole.shape == x.shape and torch.equal(whole, reconstruct(vae, x, num_groups=3))
    h = None
    for number, (prior, step) in enumerate(zip(vae.prior.groups, vae.prior.path, strict=True), 1):
        h = step(h, posterior(number, h, vae.prior.gaussian(prior, h)).mean)
    torch.testing.assert_close(vae.decoder(h).mean, whole)
    torch.manual_seed(0)
    first = reconstruct(vae, x, num_groups=1)
    torch.manual_seed(1)
    assert not torch.equal(first, reconstruct(vae, x, num_groups=1))  # the rest is drawn
    for number in (0, 4):
        with one_line_value_error(f"num_groups must be between 1 and 3, got {number}"):
            reconstruct(vae, x, num_groups=number)
    vae = linear_gaussian_vae().to(device)
    with one_line_value_error("num_groups is for a HierarchicalPrior, got 1 and a DiffusionPrior"):
        reconstruct(vae, torch.zeros(2, 3, dtype=torch.float64, device=device), num_groups=1)


def test_the_terms_of_a_group_are_one_bar():
    terms = {"reconstruction": -2.0, "group1/z_s": 4.0, "-H[group1/z_0]": -1.0, "group2/z_0": 1.0}
    assert by_group(terms) == {"reconstruction": -2.0, "KL of group1": 3.0, "KL of group2": 1.0}
    assert by_group({"x": 1.0, "z_s": 2.0}) == {"x": 1.0, "z_s": 2.0}
