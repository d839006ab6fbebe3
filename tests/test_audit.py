r"""What numbers are said to be, and whether what is said of them is true where log p is known."""

from __future__ import annotations

import inspect
import json
import math

import pytest
import torch
from errors import one_line_value_error
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from test_own_training import X, make_vae

from pyro_vaediff import (
    DiffusionPrior,
    FlowPrior,
    GaussianPrior,
    MixturePrior,
    Reweighted,
    Timestep_ELBO,
    TraceKL_ELBO,
)
from pyro_vaediff.evaluate import (
    BOUNDS,
    NO_BOUNDS,
    audit,
    chain_log_prob,
    demonstrate,
    evaluate,
    importance_log_likelihood,
    importance_weighted_bound,
    log_likelihood,
    prior_log_prob,
    value_elbo,
)
from pyro_vaediff.evaluate.demonstration import (
    HIGH,
    LOW,
    SCALE,
    D,
    T,
    chain_scale,
    exact_prior,
    flow_scale,
    one_probe_log_prob,
)
from pyro_vaediff.infer import FreeBits, KLWeight
from pyro_vaediff.priors import ConditionalGaussianPrior, HierarchicalPrior
from pyro_vaediff.sampling import ProbabilityFlow, sample
from pyro_vaediff.testing import linear_gaussian_vae
from pyro_vaediff.train.report import report

CHAIN, GAUSSIAN = DiffusionPrior(2, num_timesteps=100), GaussianPrior(2)
OF_CHAIN, OF_GAUSSIAN = "the chain of T = 100 steps", "the model with a GaussianPrior"
FLOW = "the probability flow with 50 steps"
KL_WEIGHT = Reweighted(Timestep_ELBO(), KLWeight(0.5))


def hierarchy():
    groups = [DiffusionPrior(2, 3), ConditionalGaussianPrior(2, torch.nn.Linear(2, 4))]
    return HierarchicalPrior(groups, [torch.nn.Identity()] * 2, 2)


# --- What is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, model, options, kind, of, text",
    [
        (Timestep_ELBO(k=64), CHAIN, {}, "ELBO", OF_CHAIN, "64 timesteps per datum"),
        (Timestep_ELBO(k=1), CHAIN, {}, "ELBO", OF_CHAIN, "estimated from 1 timestep per datum"),
        (Timestep_ELBO("all"), CHAIN, {}, "ELBO", OF_CHAIN, "from all timesteps"),
        (Timestep_ELBO(), CHAIN.with_steps(7), {}, "ELBO", "the chain of T = 7 steps", "from 8 "),
        (Timestep_ELBO(), GAUSSIAN, {}, "ELBO", OF_GAUSSIAN, "KLs in closed form"),
        (Timestep_ELBO(), None, {}, "ELBO", "the model", "estimated from 8 timesteps"),
        (TraceKL_ELBO(), CHAIN, {}, "ELBO", OF_CHAIN, "KLs in closed form"),
        (Trace_ELBO(), CHAIN, {}, "ELBO", OF_CHAIN, "from 1 draw of all sites"),
        (TraceGraph_ELBO(num_particles=3), GAUSSIAN, {}, "ELBO", OF_GAUSSIAN, "from 3 draws"),
        (evaluate, CHAIN, {}, "ELBO", OF_CHAIN, "from all timesteps"),
        (evaluate, CHAIN, {"elbo": value_elbo(64)}, "ELBO", OF_CHAIN, "from 64 timesteps"),
        (chain_log_prob, CHAIN, {"elbo": Timestep_ELBO(k=2)}, "ELBO", OF_CHAIN, "2 timesteps"),
        (
            *(Timestep_ELBO(k=2), hierarchy(), {}, "ELBO"),
            "the hierarchy of the chain of T = 3 steps and a ConditionalGaussianPrior",
            "2 timesteps",
        ),
        (ProbabilityFlow(CHAIN), None, {}, "exact density", FLOW, f"another model than {OF_CHAIN}"),
        (prior_log_prob, CHAIN, {}, "exact density", FLOW, f"another model than {OF_CHAIN}"),
        (
            *(prior_log_prob, CHAIN, {"num_steps": 1}, "exact density"),
            *("the probability flow with 1 step", "the exact density of the probability flow"),
        ),
        (prior_log_prob, GAUSSIAN, {"num_steps": 5}, "exact density", OF_GAUSSIAN, "the exact"),
        (
            *(prior_log_prob, MixturePrior(2, 3), {}, "exact density"),
            *("the model with a MixturePrior", "the exact density"),
        ),
        (
            *(log_likelihood, CHAIN, {"num_samples": 16, "num_steps": 50}),
            *("importance-weighted bound", FLOW),
            f"another model than {OF_CHAIN}, from 16 samples per datum",
        ),
        (
            *(log_likelihood, CHAIN, {"log_prior": "chain", "num_steps": 5}),
            *("importance-weighted bound", "the chain of T = 5 steps", "from 64 samples per datum"),
        ),
        (
            *(Timestep_ELBO(), DiffusionPrior(2, num_timesteps=None), {}),
            *("continuous-time bound", "the diffusion in continuous time", "from 8 timesteps"),
        ),
        (
            *(importance_log_likelihood, FlowPrior(2), {"num_steps": 50}),
            *("importance-weighted bound", "the model with a FlowPrior", "from 64 samples"),
        ),
        (
            *(importance_weighted_bound, CHAIN, {"elbo": Trace_ELBO(5)}),
            *("importance-weighted bound", OF_CHAIN, "from 5 samples per datum"),
        ),
        (
            *(importance_weighted_bound, CHAIN, {}),
            *("importance-weighted bound", OF_CHAIN, "from 64 samples per datum"),
        ),
        (
            *("continuous-time bound", CHAIN, {}, "continuous-time bound"),
            *("the diffusion in continuous time", "a bound by"),
        ),
        ("ELBO", CHAIN, {}, "ELBO", OF_CHAIN, f"a bound by {OF_CHAIN}"),
        # No bounds
        (KL_WEIGHT, CHAIN, {}, "reweighted terms", OF_CHAIN, "reweighted by KL weight"),
        (
            *(FreeBits(Timestep_ELBO(), 0.5), CHAIN, {}, "reweighted terms", OF_CHAIN),
            "reweighted by free bits, 0.5 nats",
        ),
        (evaluate, CHAIN, {"elbo": KL_WEIGHT}, "reweighted terms", OF_CHAIN, "for training"),
        *(
            (how, model, {"elbo": elbo}, "log-mean-exp of noisy bounds", of, "log-mean-exp")
            for how, model, of in (
                (importance_weighted_bound, CHAIN, OF_CHAIN),
                (importance_weighted_bound, GAUSSIAN, OF_GAUSSIAN),
            )
            for elbo in (Timestep_ELBO(), TraceKL_ELBO(), TraceMeanField_ELBO(), RenyiELBO())
        ),
        (
            *(importance_weighted_bound, CHAIN, {"elbo": KL_WEIGHT}),
            *("scaled weights", OF_CHAIN, "scaled terms"),
        ),
        *(
            (kind, CHAIN, {}, kind, OF_CHAIN, f"no bound: {reason}")
            for kind, reason in NO_BOUNDS.items()
        ),
    ],
)
def test_verdicts(how, model, options, kind, of, text):
    found = audit(how, model, **options)
    assert (found.kind, found.is_bound, found.of) == (kind, kind in BOUNDS, of)
    assert text in found.text and "\n" not in found.text and str(found) == found.text
    assert found.text.startswith("no bound: ") != found.is_bound
    assert not found.is_bound or of in found.text


def test_a_vae_is_as_its_prior():
    vae = linear_gaussian_vae(num_timesteps=3)
    for how in (Timestep_ELBO(), Trace_ELBO(), evaluate, log_likelihood):
        assert audit(how, vae) == audit(how, vae.prior) != audit(how, GAUSSIAN)


def test_the_defaults_are_those_of_the_functions():
    signatures = [inspect.signature(f) for f in (log_likelihood, importance_log_likelihood)]
    (number,) = {signature.parameters["num_samples"].default for signature in signatures}
    assert f"from {number} samples" in audit(log_likelihood, GAUSSIAN).text
    vae, runs = linear_gaussian_vae(num_timesteps=1), []

    def model(x):
        runs.append(x)
        return vae.model(x)

    importance_weighted_bound(model, vae.guide, torch.zeros(1, 3, dtype=torch.float64))
    assert f"from {len(runs)} samples" in audit(importance_weighted_bound, vae).text


@pytest.mark.parametrize("elbo", [Timestep_ELBO(), TraceKL_ELBO(), KL_WEIGHT, RenyiELBO()])
def test_what_is_no_bound_is_refused_where_it_would_be_computed(elbo):
    vae, x = linear_gaussian_vae(), torch.zeros(1, 3, dtype=torch.float64)
    assert not audit(importance_weighted_bound, vae, elbo=elbo).is_bound
    with one_line_value_error(f"the log-mean-exp of {type(elbo).__name__} is not a bound"):
        importance_weighted_bound(vae.model, vae.guide, x, elbo=elbo)


def test_what_is_compared():
    elbo, flow = audit(evaluate, CHAIN), audit(log_likelihood, CHAIN, num_steps=50)
    chain = audit(importance_weighted_bound, CHAIN)
    assert f"two models, {OF_CHAIN} and {FLOW}" in elbo.against(flow)
    assert "the same model" in elbo.against(chain)
    for pair in ((elbo, audit(KL_WEIGHT, CHAIN)), (audit("quadrature"), elbo)):
        assert pair[0].against(pair[1]).startswith("no comparison")


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: audit("nelbo"), "unknown how 'nelbo': choose one of ELBO, .*, reweighted terms"),
        (lambda: audit(3.5), "how must be an estimator of the ELBO, .* got 3.5"),
        (lambda: audit(demonstrate), "how must be an estimator of the ELBO, .* got <function"),
        (
            lambda: audit(TraceMeanField_ELBO(), CHAIN),
            "got a TraceMeanField_ELBO: check_mean_field tells when TraceMeanField_ELBO is one",
        ),
        (lambda: audit(log_likelihood, hierarchy()), "prior must be a DiffusionPrior, got Hier"),
        (lambda: audit(log_likelihood, CHAIN, num_steps=101), "num_steps must be .*, got 101"),
        (lambda: demonstrate("elbo"), "unknown kind 'elbo': choose one of ELBO, "),
        (lambda: demonstrate(num_data=1), "num_data must be a whole number >= 2 for standard err"),
        (lambda: demonstrate(num_samples=0), "num_samples must be a whole number >= 1, got 0"),
        (lambda: demonstrate(seed=-1), "seed must be a whole number"),
    ],
)
def test_errors(call, match):
    with one_line_value_error(match):
        call()


# --- Whether it is true ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    return demonstrate(num_data=300)


def test_each_verdict_is_seen_to_be_true(rows):
    assert {row.audit.kind for row in rows} == {*BOUNDS, *NO_BOUNDS}
    for row in rows:
        below = row.difference < -5 * row.se - 1e-9
        assert below != row.audit.is_bound, row
        assert (
            row.verdict
            == {
                True: "below -log p",
                False: "equal to -log p" if "exact" in row.audit.kind else "at least -log p",
            }[below]
        )
        assert row.se < 1, row
        exact = row.exact - D / 2 * math.log(2 * math.pi * math.e * SCALE**2)
        assert abs(exact) < 1, "of data from the model, or from one that is close"


def test_bounds_are_as_tight_as_they_must_be(rows):
    found = {row.audit.kind: row for row in rows if row.audit.is_bound}
    assert abs(found["exact density"].difference) < 1e-9
    # The denoiser is perfect: what is left of the bound is the noise at the first log-SNR.
    row = found["continuous-time bound"]
    assert row.se < 0.2 and abs(row.difference) < 5 * row.se
    # Importance weights close most of the gap of the ELBO, with the same chain.
    elbo, weighted = found["ELBO"], found["importance-weighted bound"]
    assert elbo.exact == weighted.exact
    assert 5 * weighted.se < weighted.difference < elbo.difference / 2


def test_a_scale_is_between_the_mean_and_the_largest_of_the_same_weights(rows):
    weighted, scaled = (
        next(row for row in rows if row.audit.kind == kind)
        for kind in ("importance-weighted bound", "scaled weights")
    )
    assert weighted.estimate - math.log(32) < scaled.estimate < weighted.estimate


def test_the_riemann_sum_is_below_by_half_a_cell(rows):
    # E|eps - eps_hat|^2 = D f(lambda), with f = sigmoid(lambda + log s^2): the sum of its values at
    # the ends of cells of width h is below the integral by about h D / 4.
    h = (HIGH - LOW) / T
    log_snr = HIGH - h * torch.arange(1, T + 1, dtype=torch.float64)
    steps = h * D / 2 * torch.sigmoid(log_snr + 2 * math.log(SCALE)).sum().item()
    first = D / 2 * (1 + math.log(2 * math.pi) - HIGH)
    alpha_bar = 1 / (1 + math.exp(-LOW))
    last = D / 2 * (alpha_bar * SCALE**2 - alpha_bar - math.log1p(-alpha_bar))
    entropy = D / 2 * math.log(2 * math.pi * math.e * SCALE**2)
    expected = first + steps + last - entropy
    assert expected == pytest.approx(-h * D / 4, abs=0.2)
    (row,) = [row for row in rows if row.audit.kind == "quadrature"]
    assert row.se < 0.2 and abs(row.difference - expected) < 5 * row.se


def test_the_exact_numbers_are_those_of_the_samples():
    prior, n = exact_prior(), 2000
    one = torch.ones(D, dtype=torch.float64)
    for draws, scale in (
        (sample(prior, n), chain_scale(prior)),
        (ProbabilityFlow(prior, T).sample((n,)), flow_scale(ProbabilityFlow(prior, T))),
    ):
        assert torch.allclose(scale, scale[0] * one)
        ratio = draws.square().mean().item() / scale[0].item() ** 2
        assert abs(ratio - 1) < 5 * math.sqrt(2 / (n * D))
    t, z_t = 12, torch.randn(3, D, dtype=torch.float64)
    alpha_bar, one_minus = prior.schedule.signal(t)
    posterior_mean = alpha_bar.sqrt() * SCALE**2 / (alpha_bar * SCALE**2 + one_minus) * z_t
    torch.testing.assert_close(prior.denoise(z_t, t), posterior_mean, atol=1e-10, rtol=0)


def test_a_random_trace_leaves_the_mean_as_it_is():
    flow = ProbabilityFlow(exact_prior(), T)
    z_0 = SCALE * torch.randn(20_000, D, dtype=torch.float64)
    exact = torch.distributions.Normal(0, flow_scale(flow)).log_prob(z_0).sum(-1)
    error = one_probe_log_prob(flow, z_0) - exact
    se = error.std().item() / math.sqrt(len(z_0))
    assert error.std() > 10 and se < 0.1
    assert abs(error.mean()) < 0.2 + 5 * se  # the trapezoidal rule is off by 0.15


def test_a_row_does_not_depend_on_the_others(rows):
    state = torch.get_rng_state()
    assert demonstrate("ELBO", "quadrature", num_data=300) == [rows[0], rows[4]]
    assert torch.equal(torch.get_rng_state(), state)
    assert demonstrate("quadrature", num_data=300, seed=1) != [rows[4]]


# --- Where it stands ------------------------------------------------------------------------------


def test_results_say_what_the_negative_elbo_is(tmp_path):
    vae = make_vae().eval()
    for elbo, text in (
        (None, "a bound by the chain of T = 5 steps, from all timesteps"),
        (value_elbo(4), "a bound by the chain of T = 5 steps, estimated from 4 timesteps"),
    ):
        lines = report(vae, X[40:], [], tmp_path, elbo=elbo)
        found = json.loads((tmp_path / "results.json").read_text())["test_negative_elbo_is"]
        assert found.startswith(text) and lines[1] == f"    {found}"


def test_a_run_with_an_unknown_estimator_is_reported(tmp_path):
    report(
        make_vae(prior=GaussianPrior(2)).eval(), X[40:], [], tmp_path, elbo=TraceMeanField_ELBO()
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert "test_negative_elbo_is" not in results
    assert "TraceMeanField_ELBO" in results["not_available"]["what the negative ELBO is"]
