r"""Objectives against collapsed latents, term by term."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from pyro import poutine
from test_hierarchy import linear_hierarchy

from pyro_vaediff import GaussianPrior
from pyro_vaediff.evaluate import elbo_surgery, evaluate
from pyro_vaediff.infer import (
    FreeBits,
    KLBalance,
    KLWeight,
    Reweighted,
    Timestep_ELBO,
    TotalCorrelation,
    TraceKL_ELBO,
    total_correlation,
)
from pyro_vaediff.testing import linear_gaussian_vae
from pyro_vaediff.train import TrainConfig
from pyro_vaediff.train.objective import make_objective


@pytest.fixture
def x(device):
    torch.manual_seed(1)
    return torch.randn(2, 3, dtype=torch.float64, device=device)


def terms_of(elbo, vae, x):
    torch.manual_seed(0)
    return elbo.terms(vae.model, vae.guide, x)


def gradient(elbo, vae, x, parameters):
    torch.manual_seed(0)
    vae.zero_grad()
    elbo.loss_and_grads(vae.model, vae.guide, x)
    return torch.stack([p.grad.abs().sum() for p in parameters])


def test_the_weight_is_that_of_all_but_the_data(x):
    vae, weight = linear_hierarchy("top").to(x.device), KLWeight()
    bound, objective = Timestep_ELBO("all"), Reweighted(Timestep_ELBO("all"), weight)
    exact = terms_of(bound, vae, x)
    for value in (0.0, 0.25, 1.0):
        weight.value = value
        for name, term in terms_of(objective, vae, x).items():
            torch.testing.assert_close(term, exact[name] * (1.0 if name == "x" else value))


def test_each_group_may_have_a_weight_of_its_own(x):
    vae = linear_hierarchy("top").to(x.device)
    exact = terms_of(Timestep_ELBO("all"), vae, x)
    weight = KLWeight(0.5, groups={"group2": 3.0})
    for name, term in terms_of(Reweighted(Timestep_ELBO("all"), weight), vae, x).items():
        factor = 1.0 if name == "x" else 1.5 if "group2" in name else 0.5
        torch.testing.assert_close(term, factor * exact[name])


def group_sums(terms):
    sums = {"group1": 0.0, "group2": 0.0}
    for name, term in terms.items():
        for group in sums:
            sums[group] += term if group in name else 0.0
    return sums


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("elbo", [lambda: Timestep_ELBO("all"), lambda: Timestep_ELBO(k=2)])
def test_a_group_below_its_free_nats_costs_these_and_is_not_trained(x, elbo, scale):
    vae, x = linear_hierarchy("top").to(x.device), x.repeat(50, 1)
    model, guide = (poutine.scale(p, scale) for p in (vae.model, vae.guide))
    kls = group_sums(terms_of(elbo(), vae, x))
    low, high = sorted(kls, key=kls.get)
    nats = (kls[low] + kls[high]).item() / 2 / len(x)  # between the two, per datum
    torch.manual_seed(0)
    free = group_sums(FreeBits(elbo(), nats).terms(model, guide, x))
    assert free[low].item() == pytest.approx(scale * nats * len(x))
    torch.testing.assert_close(free[high], scale * kls[high])
    parameters = list(vae.prior.groups[int(low[-1]) - 1].parameters())
    assert not gradient(FreeBits(elbo(), nats), vae, x, parameters).any()
    assert gradient(FreeBits(elbo(), 0.0), vae, x, parameters).all()


def test_latents_without_a_scope_are_one_group(x):
    vae = linear_gaussian_vae(seed=0).to(x.device)
    terms = terms_of(TraceKL_ELBO(), vae, x)
    kl = sum(term for name, term in terms.items() if name != "x").item()
    free = terms_of(FreeBits(TraceKL_ELBO(), kl / 2 + 1.0), vae, x)
    assert sum(free.values()).item() == pytest.approx(terms["x"].item() + kl + 2.0)
    free = terms_of(FreeBits(TraceKL_ELBO(), kl / 2 - 0.1), vae, x)
    assert sum(free.values()).item() == pytest.approx(terms["x"].item() + kl)


# --- KL balancing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_kls_are_balanced_by_use_per_latent_until_they_have_warmed_up(x, scale):
    vae, weight = linear_hierarchy("top").to(x.device), KLWeight(0.5)
    programs = [poutine.scale(p, scale) for p in (vae.model, vae.guide)]

    def balanced(elbo):
        torch.manual_seed(0)
        return KLBalance(elbo, weight).terms(*programs, x)

    exact = terms_of(Timestep_ELBO("all"), vae, x)
    kl = group_sums(exact)
    sizes = {"group1": 2, "group2": 1}
    use = {group: (kl[group].abs() / len(x) + 0.01) / sizes[group] for group in kl}
    gamma = {group: 2 * use[group] / sum(use.values()) for group in kl}
    for name, term in balanced(Timestep_ELBO("all")).items():
        group = next((group for group in kl if group in name), None)
        factor = 0.5 * gamma[group] if group else 1.0
        torch.testing.assert_close(term, scale * factor * exact[name])
    for weight.value, factor in ((1.0, 1.0), (2.0, 2.0)):
        for name, term in balanced(Timestep_ELBO("all")).items():
            expected = scale * exact[name] * (1.0 if name == "x" else factor)
            torch.testing.assert_close(term, expected)


def test_the_coefficients_of_the_balance_have_no_gradient(x):
    vae = linear_hierarchy("top").to(x.device)
    parameters = list(vae.prior.groups[1].parameters())
    group = gradient(Reweighted(Timestep_ELBO("all"), KLWeight(0.5)), vae, x, parameters)
    balanced = gradient(KLBalance(Timestep_ELBO("all"), KLWeight(0.5)), vae, x, parameters)
    kl = group_sums(terms_of(Timestep_ELBO("all"), vae, x))
    use = torch.stack([kl[group].abs() / len(x) + 0.01 for group in ("group1", "group2")])
    use = use / torch.tensor([2, 1], device=x.device)
    torch.testing.assert_close(balanced, group * (use[1] / use.mean()))


# --- Total correlation ----------------------------------------------------------------------------


def posteriors(*shape):
    loc, scale = torch.randn(*shape).double(), 0.2 + torch.rand(*shape).double()
    return dist.Normal(loc.requires_grad_(), scale.requires_grad_()).to_event(1)


def test_the_total_correlation_has_the_gradient_of_minibatch_weighted_sampling():
    B, D, N = 5, 3, 1000
    q = posteriors(B, D)
    z = q.rsample()
    log_q = q.base_dist.log_prob(z[:, None])  # of z_b under the posterior of datum j
    joint = torch.stack([torch.stack([log_q[b, j].sum() for j in range(B)]) for b in range(B)])
    mws = joint.logsumexp(1) - math.log(N * B)
    mws = mws - sum(log_q[:, :, d].logsumexp(1) - math.log(N * B) for d in range(D))
    ours = total_correlation(q, z)
    torch.testing.assert_close(ours, mws - (D - 1) * math.log(N), atol=1e-10, rtol=0)
    parameters = (q.base_dist.loc, q.base_dist.scale)
    weights = torch.rand(B).double()
    gradients = (
        torch.autograd.grad((weights * tc).sum(), parameters, retain_graph=True)
        for tc in (ours, mws)
    )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_the_total_correlation_is_that_of_the_mixture_by_quadrature():
    q, n = posteriors(3, 2), 20_000
    with torch.no_grad():
        tc = total_correlation(q, q.sample((n,))).mean(-1)
        ticks = torch.linspace(-8, 8, 801).double()
        density = q.base_dist.log_prob(ticks[:, None, None]).exp()  # (ticks, B, D)
        joint = torch.einsum("ib,jb->ij", density[..., 0], density[..., 1]) / 3
        product = density.mean(1)[:, None, 0] * density.mean(1)[None, :, 1]
        exact = torch.xlogy(joint, joint / product).nan_to_num().sum() * 0.02**2
    se = tc.std() / n**0.5
    assert abs(tc.mean() - exact) < 5 * se and se < 0.01
    assert exact > 20 * se


@pytest.mark.parametrize("elbo", [TraceKL_ELBO, lambda: Timestep_ELBO(k=2)])
@pytest.mark.parametrize("prior", ["gaussian", "diffusion"])
def test_the_weight_of_the_total_correlation(x, elbo, prior):
    vae, x, scale, seen = linear_gaussian_vae(seed=0).to(x.device), x.repeat(3, 1), 0.2, {}
    if prior == "gaussian":
        vae.prior = GaussianPrior(2).to(vae.prior.origin)

    def guide(x):
        trace = poutine.trace(vae.guide).get_trace(x)
        seen.update(trace.nodes["z_0"])
        return trace.nodes["_RETURN"]["value"]

    def terms(objective):
        torch.manual_seed(0)
        programs = (poutine.scale(p, scale) for p in (vae.model, guide))
        return objective.terms(*programs, x)

    bound, objective = terms(elbo()), terms(TotalCorrelation(elbo(), 4.0))
    tc = objective.pop("TC[z_0]")
    assert objective.keys() == bound.keys()
    assert all(torch.equal(term, bound[name]) for name, term in objective.items())
    expected = total_correlation(seen["fn"], seen["value"]).sum()
    torch.testing.assert_close(tc, 3 * scale * expected)
    assert terms(TotalCorrelation(elbo(), 1.0))["TC[z_0]"] == 0


def test_particles_have_their_own_total_correlation(x):
    vae = linear_gaussian_vae(seed=0).to(x.device)
    options = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 3}
    objective = TotalCorrelation(Timestep_ELBO(k=2, **options), 3.0)
    assert objective.terms(vae.model, vae.guide, x)["TC[z_0]"].isfinite()
    q = posteriors(4, 3, 2)
    z = q.sample()
    each = torch.stack([total_correlation(posterior_of(q, p), z[p]) for p in range(4)])
    torch.testing.assert_close(total_correlation(q, z), each, atol=1e-10, rtol=0)


def posterior_of(q, p):
    return dist.Normal(q.base_dist.loc[p], q.base_dist.scale[p]).to_event(1)


def test_what_has_no_total_correlation(x):
    hierarchy, vae = linear_hierarchy("top").to(x.device), linear_gaussian_vae(seed=0).to(x.device)
    vae.prior.order = "reversed"
    for elbo, model, match in (
        (Timestep_ELBO(), hierarchy, "got group1/z_0, group2/z_0"),
        (TraceKL_ELBO(), vae, "got none"),
    ):
        with one_line_value_error(f"the total correlation needs one site of .*, {match}"):
            TotalCorrelation(elbo, 2.0).loss(model.model, model.guide, x)
    with one_line_value_error("the total correlation needs .* conditioning='z_0', got 'x'"):
        TotalCorrelation(FreeBits(Timestep_ELBO(conditioning="x"), 1.0), 2.0)
    with one_line_value_error("the total correlation needs a diagonal Gaussian, got a "):
        total_correlation(dist.Laplace(x, 1.0).to_event(1), x)


# --- All of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, names",
    [
        ({}, []),
        ({"beta": (1.0,)}, ["KL weight"]),
        ({"free_bits": 0.5, "kl_warmup": 2}, ["KL weight", "free bits, 0.5 nats"]),
        (
            {"beta": (2.0, 0.5), "kl_warmup": 2, "kl_balance": True},
            ["KL balancing", "KL weight"],
        ),
    ],
    ids=str,
)
def test_the_objective_of_a_configuration(x, options, names):
    vae, bound = linear_hierarchy("top").to(x.device), Timestep_ELBO("all")
    objective, weight = make_objective(vae, bound, TrainConfig(**options))
    weight.value = 0.5
    terms, exact = (terms_of(elbo, vae, x) for elbo in (objective, bound))
    if options.get("kl_balance"):  # what a group has in common is not changed by its weight
        factors = {name: terms[name] / exact[name] for name in exact}
        assert factors["x"] == 1
        torch.testing.assert_close(factors["group1/z_s"], factors["-H[group1/z_0]"])
    found = []
    while isinstance(objective, Reweighted):
        found.append(objective.name)
        objective = objective.elbo
    assert found == names and objective is bound


def test_the_constant_weights_of_a_configuration(x):
    vae, bound = linear_hierarchy("top").to(x.device), Timestep_ELBO("all")
    exact = terms_of(bound, vae, x)
    for beta, expected in (((0.25,), (0.25, 0.25)), ((2.0, 0.5), (2.0, 0.5))):
        objective, _ = make_objective(vae, bound, TrainConfig(beta=beta))
        for name, term in terms_of(objective, vae, x).items():
            factor = expected[0] if "group1" in name else expected[1] if "group2" in name else 1.0
            torch.testing.assert_close(term, factor * exact[name])
    single = linear_gaussian_vae(seed=0).to(x.device)
    objective, _ = make_objective(single, bound, TrainConfig(beta=(0.25,), tc_weight=3.0))
    terms, exact = (terms_of(elbo, single, x) for elbo in (objective, bound))
    torch.testing.assert_close(terms["z_3"], 0.25 * exact["z_3"])
    tc = terms_of(TotalCorrelation(bound, 3.0), single, x)["TC[z_0]"]
    torch.testing.assert_close(terms["TC[z_0]"], tc)  # which beta does not weigh


@pytest.mark.parametrize(
    "options, match",
    [
        ({"beta": (1.0, 2.0, 3.0)}, "beta must be one number or one for each of 1 groups of lat"),
        ({"kl_balance": True, "kl_warmup": 1}, "kl_balance is for a hierarchy"),
        ({"tc_weight": 2.0}, "tc_weight is for latents without groups"),
    ],
    ids=str,
)
def test_objectives_that_fit_no_group(options, match):
    vae = linear_hierarchy("top") if "tc_weight" in options else linear_gaussian_vae(seed=0)
    with one_line_value_error(match):
        make_objective(vae, Timestep_ELBO(), TrainConfig(**options))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"beta": (-1.0,)}, "each of beta must be a finite number >= 0, got -1.0"),
        ({"tc_weight": -1.0}, "tc_weight must be a finite number >= 0, got -1.0"),
        ({"kl_balance": True}, "kl_balance ends with the warm-up of the KL: give kl_warmup"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(options, match):
    with one_line_value_error(match):
        TrainConfig(**options)


def test_none_is_reported_as_a_bound(x):
    vae = linear_gaussian_vae(seed=0).to(x.device)
    for objective in (
        Reweighted(Timestep_ELBO(), KLWeight(0.5)),
        KLBalance(Timestep_ELBO(), KLWeight(0.5)),
        TotalCorrelation(Timestep_ELBO(), 2.0),
    ):
        with one_line_value_error("elbo must estimate a bound, got Reweighted"):
            evaluate(vae, x, objective)
        with one_line_value_error("elbo must estimate a bound, got Reweighted"):
            elbo_surgery(vae, x, elbo=objective)
        assert isinstance(objective.bound, Timestep_ELBO)
    with one_line_value_error("elbo must estimate a bound, got Reweighted .free bits, 1.0 nats."):
        evaluate(vae, x, FreeBits(TraceKL_ELBO(), 1.0))
    with one_line_value_error("elbo must estimate a bound, got Reweighted .KL weight."):
        evaluate(vae, x, Reweighted(TraceKL_ELBO(), KLWeight(0.5)))
    bound = TraceKL_ELBO()
    assert Reweighted(FreeBits(bound, 1.0), KLWeight(0.5)).bound is bound
    assert FreeBits(bound, 1.0).bound is bound


@pytest.mark.parametrize("value", [-1, float("nan"), "x"])
def test_numbers_that_are_refused(value):
    with one_line_value_error("value must be a finite number >= 0"):
        KLWeight(value)
    with one_line_value_error(r"groups\['group1'\] must be a finite number >= 0"):
        KLWeight(groups={"group1": value})
    with one_line_value_error("beta must be a finite number >= 0"):
        TotalCorrelation(TraceKL_ELBO(), value)
    with one_line_value_error("nats must be a finite number >= 0"):
        FreeBits(TraceKL_ELBO(), value)
