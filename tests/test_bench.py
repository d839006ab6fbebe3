r"""The bench measures what it says: bias, noise and cost, against closed forms and known counts."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from types import SimpleNamespace

import pyro
import pytest
import torch
from estimators import BASELINE, ENTRIES, SERIOUS
from estimators import entries as entries_module
from estimators.counterexamples import NoisyIWAE, log_mean_exp_bias, mean_field_bias
from estimators.page import markdown_table, significant
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy import integrate
from unbiased import draws as replicas

from pyro_vaediff import Timestep_ELBO
from pyro_vaediff.bench import (
    Entry,
    add_merits,
    count_evaluations,
    draw,
    draw_values,
    exact_reference,
    exhaustive_reference,
    gradient_noise_by_timestep,
    measure,
    measure_costs,
    minibatch_noise,
    noise_of,
    peak_memory,
    rms_error,
    step_times,
    timestep_entry,
    whole_step,
)
from pyro_vaediff.bench import cost as cost_module
from pyro_vaediff.bench import harness as harness_module
from pyro_vaediff.evaluate import importance_weighted_bound
from pyro_vaediff.infer import ImportanceTimesteps, Proposal, Reweighted, UniformTimesteps
from pyro_vaediff.testing import Oracle, linear_gaussian_vae
from pyro_vaediff.train.build import make_vae
from pyro_vaediff.train.config import ModelConfig

MODULES = ("encoder", "decoder", "prior")


@pytest.fixture
def vae(device):
    return linear_gaussian_vae(4).to(device)


@pytest.fixture
def x(device):
    return torch.randn(4, 3, dtype=torch.float64, device=device)


def image_vae(device, **options):
    config = ModelConfig(latent_dim=3, width=4, num_timesteps=6, **options)
    return make_vae(config).to(device), torch.rand(5, *config.image_shape, device=device) * 2 - 1


def mean_and_se(values, target):
    r"""Returns the mean over the first dimension and its standard error, which must be small."""
    mean, se = values.mean(0), values.std(0) / len(values) ** 0.5
    assert (se < target).all(), se
    return mean, se


# --- Draws and their noise ------------------------------------------------------------------------


class Exact:
    r"""An "estimator" without noise: the closed form of a linear-Gaussian VAE."""

    def __init__(self, vae):
        self.vae = vae

    def loss_and_grads(self, model, guide, x):
        loss = Oracle(self.vae, x).negative_elbo.sum()
        loss.backward()
        return loss.item()


def test_draws_without_noise_are_the_exact_gradients(vae, x):
    batches = [x, x[:1], x]
    for p in vae.parameters():
        p.grad = torch.full_like(p, 7.0)  # of an earlier step
    sample = draw(Exact(vae), vae, batches)
    assert sample.values.shape == (3,) and sample.values.dtype == torch.float64
    assert list(sample.gradients) == list(MODULES)
    for i, batch in enumerate(batches):
        loss = Oracle(vae, batch).negative_elbo.mean()
        assert sample.values[i].item() == pytest.approx(loss.item(), rel=1e-12)
        for name in MODULES:
            gradient = torch.autograd.grad(
                loss,
                list(getattr(vae, name).parameters()),
                retain_graph=True,
                materialize_grads=True,
            )
            expected = torch.cat([g.flatten() for g in gradient])
            torch.testing.assert_close(sample.gradients[name][i], expected, atol=1e-12, rtol=1e-12)
    assert all(p.grad is None for p in vae.parameters())


def test_draws_leave_no_trace_and_can_be_repeated(vae, x):
    pyro.param("mine", torch.ones(()))
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    samples = []
    for _ in range(2):
        torch.manual_seed(3)
        samples.append(draw(Trace_ELBO(), vae, itertools.repeat(x, 3)))
    assert list(pyro.get_param_store()) == ["mine"]
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    first, second = samples
    assert torch.equal(first.values, second.values)
    assert first.values.unique().numel() == 3
    for name in MODULES:
        assert torch.equal(first.gradients[name], second.gradients[name])
        assert first.gradients[name].isfinite().all() and first.gradients[name].any()


def test_draws_of_a_network_in_single_precision(device):
    vae, images = image_vae(device)
    sample = draw(Timestep_ELBO(k=2), vae, [images, images])
    for name, module in vae.named_children():
        count = sum(p.numel() for p in module.parameters())
        assert sample.gradients[name].shape == (2, count)
        assert sample.gradients[name].isfinite().all()
    assert not pyro.get_param_store()


@pytest.mark.parametrize("n, scale", [(20, 2.0), (2000, 0.5)])
def test_noise_of_gaussian_gradients(device, n, scale):
    r"""Over many sets of n draws, means are the closed forms and standard errors are true."""
    P, repeats = 5, 400
    true = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64, device=device)
    deviations = scale * torch.linspace(0.5, 1.5, P, dtype=torch.float64, device=device)
    noises = [
        noise_of(1.3 * true + deviations * torch.randn(n, P).to(true), true) for _ in range(repeats)
    ]
    columns = {
        field.name: torch.tensor([getattr(noise, field.name) for noise in noises]).double()
        for field in dataclasses.fields(noises[0])
    }
    trace = deviations.square().sum().item()
    along = (deviations * true).norm().item() / true.square().sum().item()
    for name, exact in (("variance", trace), ("bias", 0.3)):
        mean, se = mean_and_se(columns[name], 0.02 * trace)
        assert abs(mean - exact) < 5 * se
    # tr S^2 = sum of d_i^2 chi^2_{n-1} / (n - 1), whose variance is sum of 2 d_i^4 / (n - 1).
    variance_se = (2 * deviations.pow(4).sum().item() / (n - 1)) ** 0.5
    for name, exact in (("variance_se", variance_se), ("bias_se", along / n**0.5)):
        spread = columns[name.removesuffix("_se")].std().item()
        assert spread == pytest.approx(exact, rel=5 / (2 * repeats) ** 0.5)
        assert columns[name].median().item() == pytest.approx(exact, rel=0.15)
    snr = 1.3 * true.norm().item() / trace**0.5
    assert columns["snr"].median().item() == pytest.approx(snr, rel=0.03)


def test_noise_of_three_draws_by_hand():
    gradients = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]], dtype=torch.float64)
    noise = noise_of(gradients, torch.tensor([2.0, 0.0], dtype=torch.float64))
    # The mean is (2, 1); the squares are 2, 2 and 4, times 3 / 2.
    assert noise.variance == pytest.approx(4.0)
    assert noise.variance_se == pytest.approx(3**0.5 / 3**0.5)
    assert noise.snr == pytest.approx(((5 - 4 / 3) / 4) ** 0.5)
    assert noise.bias == pytest.approx(0.0) and noise.bias_se == pytest.approx(0.5 / 3**0.5)


def test_noise_without_signal_and_signal_without_noise():
    gradients = torch.randn(50, 3, dtype=torch.float64)
    gradients -= gradients.mean(0)
    assert noise_of(gradients, torch.ones(3, dtype=torch.float64)).snr == 0.0
    noise = noise_of(torch.ones(4, 3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    assert (noise.variance, noise.snr, noise.bias, noise.bias_se) == (0.0, math.inf, 0.0, 0.0)


# --- The noise of each timestep -------------------------------------------------------------------


def squares_by_hand(vae, datum, t, given, num_draws):
    r"""Returns squared gradient norms of the KL of step t, for the encoder and for the denoiser.

    Every draw has parameters of its own. The formulas are those of Ho et al. (2020), equation (7),
    and given x those of the conditional of two Gaussian variables.
    """
    oracle = Oracle(vae, datum[None])
    alpha_bar = torch.cumprod(1 - vae.prior.schedule.betas, 0).detach()
    beta, alpha, ab, ab_s = oracle.beta[t], 1 - oracle.beta[t], alpha_bar[t], alpha_bar[t - 1]
    net = vae.prior.denoiser.backbone.net
    encoder = [vae.encoder.weight[0], vae.encoder.bias[0], vae.encoder.log_scale[0]]
    denoiser = [net.weight[0, t], net.bias[0, t]]
    copies = [
        p.detach().expand(num_draws, *p.shape).clone().requires_grad_() for p in encoder + denoiser
    ]
    A, c, r, M, n = copies
    m, s2 = A @ datum + c, (2 * r).exp()
    z_0 = m + s2.sqrt() * torch.randn_like(m)
    z_t = ab.sqrt() * z_0 + (1 - ab).sqrt() * torch.randn_like(m)
    sigma2 = oracle.sigma(t).square().detach()
    mu = (1 - sigma2).sqrt() * z_t + oracle.gain(t).detach() * ((M @ z_t[..., None])[..., 0] + n)
    if given == "z_0":
        mean = (ab_s.sqrt() * beta * z_0 + alpha.sqrt() * (1 - ab_s) * z_t) / (1 - ab)
        kl = ((mean - mu).square() / (2 * sigma2)).sum(-1)
    else:
        v_s, v_t = ab_s * s2 + 1 - ab_s, ab * s2 + 1 - ab
        gain = alpha.sqrt() * v_s / v_t
        mean = ab_s.sqrt() * m + gain * (z_t - ab.sqrt() * m)
        variance = v_s - gain.square() * v_t
        ratio = variance / sigma2
        kl = (((mean - mu).square() / sigma2 + ratio - 1 - ratio.log()) / 2).sum(-1)
    gradients = torch.autograd.grad(kl.sum(), copies, materialize_grads=True)
    norms = [g.flatten(1).square().sum(-1) for g in gradients]
    return {"encoder": sum(norms[:3]), "prior": sum(norms[3:])}


@pytest.mark.parametrize("given", ["z_0", "x"])
def test_gradient_noise_by_timestep(vae, x, given):
    pyro.enable_validation(False)  # a third of the time
    x, timesteps, draws = x[:2], [2, 4], 150
    noise = gradient_noise_by_timestep(vae, x, timesteps, given, draws)
    assert not pyro.get_param_store()
    for i, t in enumerate(timesteps):
        by_datum = [squares_by_hand(vae, datum, t, given, 50_000) for datum in x]
        for module in ("encoder", "prior"):
            squares = torch.stack([squares[module] for squares in by_datum])
            exact = squares.mean().item()
            # Its draws are as noisy as those by hand.
            se = (squares.var(1).sum() / draws).sqrt().item() / len(x)
            assert se < 0.2 * exact
            assert abs(noise[module][i].square().item() - exact) < 5 * se


class Fixed(Proposal):
    def __init__(self, probs):
        super().__init__()
        self.probs = probs

    def forward(self, prior, conditioning):
        return self.probs


def test_timesteps_in_proportion_to_the_noise_minimize_the_variance(vae, x):
    pyro.enable_validation(False)
    x = x[:1]
    vae.prior.denoiser.backbone.net.bias.data[0, 3] += 2.0  # noisier than the others
    rms = gradient_noise_by_timestep(vae, x, [2, 3, 4], draws=250)["prior"]
    proposals = {
        "optimal": rms / rms.sum(),
        "uniform": UniformTimesteps()(vae.prior, "z_0"),
        "importance": ImportanceTimesteps()(vae.prior, "z_0"),
    }
    moments = {}
    for name, probs in proposals.items():
        elbo = Timestep_ELBO(Fixed(probs), k=1, low_discrepancy=False)
        estimates = replicas(elbo, vae, x)[:, 0]
        # The rows of the denoiser's tables are times, so that t = 1 can be left out.
        sizes = [1] + [p.numel() for p in vae.parameters()]
        columns = dict(
            zip(["value", *dict(vae.named_parameters())], estimates.split(sizes, -1), strict=True)
        )
        net = vae.prior.denoiser.backbone.net
        squares = sum(
            columns[f"prior.denoiser.backbone.net.{key}"]
            .unflatten(-1, getattr(net, key).shape[1:])[:, 2:]
            .flatten(1)
            .square()
            .sum(-1)
            for key in ("weight", "bias")
        )
        moments[name] = mean_and_se(squares, 0.1 * squares.mean())
        predicted = (rms.square() / probs).sum()
        # 250 draws of each timestep know rms^2 to about 10 %.
        assert abs(moments[name][0] / predicted - 1) < 0.3
    best, se = moments.pop("optimal")
    for name, (moment, other_se) in moments.items():
        assert best - moment < 5 * (se**2 + other_se**2) ** 0.5, name
    assert moments["uniform"][0] > 1.3 * best


# --- Costs ----------------------------------------------------------------------------------------


def evaluations_of(elbo, vae, x):
    with count_evaluations(vae) as counts:
        elbo.loss_and_grads(vae.model, vae.guide, x)
    elbo.loss(vae.model, vae.guide, x)  # does not count
    return counts


PARTICLES = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 3}


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize(
    "make, encoder, decoder, denoiser",
    [
        (lambda: Timestep_ELBO(k=1), 1, 1, 2),
        (lambda: Timestep_ELBO(k=8, antithetic=False), 1, 1, 9),
        (lambda: Timestep_ELBO(k=4, conditioning="x"), 1, 1, 5),
        (lambda: Timestep_ELBO("all", chunk_size=2), 1, 1, 6),
        (lambda: Reweighted(Timestep_ELBO(k=4), "simple"), 1, 1, 5),
        (lambda: Timestep_ELBO(k=4, num_particles=3), 3, 3, 15),
        (lambda: Timestep_ELBO(k=4, **PARTICLES), 1, 3, 15),
        (Trace_ELBO, 1, 1, 6),
        (ENTRIES["importance LD k=8 | z_0, Hybrid"].make, 1, 1, 17),
        (ENTRIES["importance LD k=8 | z_0, ControlVariate"].make, 1, 1, 9),
        (ENTRIES["log-mean-exp of 16 x uniform k=1 | z_0"].make, 16, 16, 32),
    ],
)
def test_evaluations_are_counted(device, x, make, encoder, decoder, denoiser, images):
    r"""One t = 1 step, k others and T in all; the networks run for every datum and particle."""
    vae = linear_gaussian_vae(6).to(device)
    if images:
        vae, x = image_vae(device, image_shape=(3, 8, 8))
    counts = evaluations_of(make(), vae, x)
    expected = {"encoder": encoder, "decoder": decoder, "denoiser": denoiser}
    assert counts == {name: count * len(x) for name, count in expected.items()}


def test_counts_add_up_and_end_with_their_context(vae, x):
    with count_evaluations(vae) as counts:
        vae.encoder(x)
        vae.encoder(x[:2])
        vae.decoder(torch.zeros(7, 5, 2, dtype=x.dtype, device=x.device))
    vae.encoder(x)
    assert counts == {"encoder": 6, "decoder": 35, "denoiser": 0}
    with pytest.raises(KeyError), count_evaluations(vae):
        raise KeyError
    assert not any(network._forward_pre_hooks for network in vae.modules())


MB = 1 << 20


def blocks(n, device):
    r"""Makes n MiB."""
    return torch.zeros(n * MB // 4, dtype=torch.float32, device=device)


def test_peak_memory_of_known_tensors(device):
    def in_turn():
        a = blocks(1, device)
        b = blocks(2, device)
        del a
        c = blocks(4, device)  # 2 + 4
        del b, c
        return blocks(5, device)

    def together():
        return [blocks(1, device), blocks(2, device), blocks(4, device)]

    def in_one_operation():
        return torch.zeros(2, MB // 4, device=device).unbind(0)

    for step, peak in ((in_turn, 6), (together, 7), (in_one_operation, 2)):
        for _ in range(2):
            assert peak_memory(step, device) == peak * MB


def test_views_and_operations_in_place_take_no_memory(device):
    outside, target = blocks(2, device), blocks(2, device)

    def views():
        x = outside.view(2, -1)
        x.mT[3:].unsqueeze(0).expand(5, -1, -1)
        x.add_(1.0)
        x[0].mul_(2.0)
        torch.add(outside, 1.0, out=target)
        outside.detach().zero_()
        [part.neg_() for part in x.unbind(0)]

    assert peak_memory(views, device) == 0

    def views_of_new():
        x = blocks(3, device)
        part = x.view(3, -1)[1:].mul_(2.0)
        del x
        assert part.untyped_storage().nbytes() == 3 * MB
        del part
        return blocks(2, device).detach()  # after the storage of x is free

    assert peak_memory(views_of_new, device) == 3 * MB


def test_peak_memory_of_a_backward_pass(device):
    weight, x = blocks(1, device).requires_grad_(), blocks(1, device)

    def step():
        y = weight * x
        y.sum().backward()  # grad x, while there is y
        weight.grad = None

    step()
    assert 2 * MB <= peak_memory(step, device) <= 2 * MB + 4096
    freed = blocks(3, device)

    def frees():
        nonlocal freed
        freed = None
        return blocks(1, device)

    if device.type == "cpu":  # what was there before is not counted
        assert peak_memory(frees, device) == MB


def test_steps_take_turns_and_the_median_counts(monkeypatch, device):
    clock, order = 0.0, []
    durations = {"a": iter([9.0, 0.001, 0.003]), "b": iter([0.5, 0.4, 8.0])}

    def step(name):
        def run():
            nonlocal clock
            order.append(name)
            clock += next(durations[name])

        return run

    monkeypatch.setattr(cost_module, "time", SimpleNamespace(perf_counter=lambda: clock))
    times = step_times([step("a"), step("b")], 3, device)
    assert "".join(order) == "ababab"
    assert times == pytest.approx([3.0, 500.0])


def test_costs_of_entries(device, x):
    vae = linear_gaussian_vae(5, order="posterior").to(device)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    names = [
        BASELINE,
        "importance LD k=8 | z_0, 2 particles",
        "all | x",
        "loss-aware LD k=8 | z_0",
        "Trace_ELBO",
        "closed-form KLs, reversed",
        "TraceMeanField_ELBO, forward",
    ]
    with pytest.warns(UserWarning, match="mean field"):
        costs = measure_costs([ENTRIES[name] for name in names], vae, x, repeats=1)
    assert list(costs) == names
    found = {
        name: tuple(cost[f"{n}_evaluations"] for n in ("encoder", "decoder", "denoiser"))
        for name, cost in costs.items()
    }
    assert found == dict(
        zip(
            names,
            [(1, 1, 2), (1, 2, 18), (1, 1, 5), (1, 1, 9), (1, 1, 5), (1, 1, 5), (1, 1, 5)],
            strict=True,
        )
    )
    assert all(cost["ms"] > 0 and 0 < cost["megabytes"] < 1 for cost in costs.values())
    many, one = (costs[name]["megabytes"] for name in (names[1], names[0]))
    assert many > one
    # Nothing is left behind: neither a step of the optimizer nor an order of the guide.
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert vae.prior.order == "posterior"
    assert not pyro.get_param_store()


def test_slow_steps_are_timed_once(vae, x, monkeypatch):
    calls, first = [], iter([5.0, 2000.0, 7.0])

    def times(steps, repeats, device):
        calls.append((len(steps), repeats))
        return [[next(first)]] if len(calls) <= 3 else [[float(repeats)] * repeats for _ in steps]

    monkeypatch.setattr(harness_module, "timings", times)
    names = [BASELINE, "Trace_ELBO", "all | z_0"]
    costs = measure_costs([ENTRIES[name] for name in names], vae, x, repeats=9)
    # The first step of each decides with which others it is timed, in turns.
    assert calls == [(1, 1)] * 3 + [(2, 9), (1, 1)]
    assert [costs[name]["ms"] for name in names] == [9.0, 1.0, 9.0]
    assert [costs[name].get("ms_se") for name in names] == [0.0, None, 0.0]


@pytest.mark.parametrize("name", [BASELINE, "Trace_ELBO"])
def test_the_state_of_the_optimizer_is_not_memory_of_a_step(device, name):
    vae, images = image_vae(device)
    step = whole_step(ENTRIES[name].make(), vae, images)
    first, *later = (peak_memory(step, device) for _ in range(3))
    # The parameters are 0.4 MB, the states twice that.
    assert sum(4 * p.numel() for p in vae.parameters()) > 400_000
    assert later[0] == later[1] == pytest.approx(first, abs=10_000)


# --- References -----------------------------------------------------------------------------------


def test_exact_reference_is_the_oracle(vae, x):
    reference, oracle = exact_reference(vae, x), Oracle(vae, x)
    assert reference.value == pytest.approx(oracle.negative_elbo.mean().item(), rel=1e-12)
    assert reference.evidence == pytest.approx(oracle.log_evidence.mean().item(), rel=1e-12)
    assert reference.value_se == 0 and reference.value > -reference.evidence
    gradients = dict(zip(dict(vae.named_parameters()), oracle_gradients(vae, x), strict=True))
    for name, module in vae.named_children():
        expected = torch.cat([gradients[f"{name}.{k}"] for k, _ in module.named_parameters()])
        torch.testing.assert_close(reference.gradients[name], expected, atol=1e-12, rtol=1e-12)


def oracle_gradients(vae, x):
    loss = Oracle(vae, x).negative_elbo.mean()
    gradients = torch.autograd.grad(loss, list(vae.parameters()), materialize_grads=True)
    return [g.flatten() for g in gradients]


def test_exhaustive_reference_is_unbiased(vae, x):
    exact = exact_reference(vae, x)
    data = x.repeat(20, 1)
    references = [exhaustive_reference(vae, data, draws=4) for _ in range(30)]
    assert references[0].evidence is None
    values = torch.tensor([r.value for r in references], dtype=torch.float64)
    mean, se = mean_and_se(values, 0.1)
    assert abs(mean - exact.value) < 5 * se
    # Its standard error is that of the mean over its draws.
    claimed = torch.tensor([r.value_se for r in references]).square().mean().sqrt().item()
    assert claimed == pytest.approx(values.std().item(), rel=0.5)
    for name in MODULES:
        rows = torch.stack([r.gradients[name] for r in references])
        mean, se = mean_and_se(rows, 0.05 * exact.gradients[name].norm())
        assert ((mean - exact.gradients[name]).abs() < 5 * se + 1e-10).all()


def test_minibatch_noise_is_the_covariance_of_exact_gradients(vae, x):
    r"""A batch holds copies of one datum, so that the estimator's own noise averages out."""
    gradients = {name: [] for name in MODULES}
    for datum in x:
        for name, gradient in exact_reference(vae, datum[None]).gradients.items():
            gradients[name].append(gradient)
    runs = {
        copies: [minibatch_noise(vae, [datum.repeat(copies, 1) for datum in x]) for _ in range(40)]
        for copies in (1, 100)
    }
    for name in MODULES:
        exact = torch.stack(gradients[name]).var(0).sum().item()
        (one, se_one), (many, se_many) = (
            (values.mean(), values.std() / len(values) ** 0.5)
            for values in (torch.tensor([run[name] for run in runs[n]]) for n in runs)
        )
        # Of copies, the estimator's own noise is a hundredth of what it is of a single one.
        own = (one - exact) / 100
        se = math.hypot(se_many, se_one / 100)
        assert se < 0.03 * exact
        assert abs(many - exact - own) < 5 * se
        assert one > exact - 5 * se_one


# --- Entries --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(request):
    r"""A VAE, copies of four data that it generated, and what the oracle says of them."""
    device = torch.device(request.config.getoption("--device"))
    vae = linear_gaussian_vae(4, seed=0).to(device)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = vae.model(num_samples=4)
    return vae, x.repeat(50, 1), exact_reference(vae, x)


UNBIASED = [name for name, entry in ENTRIES.items() if not entry.counterexample]


@pytest.mark.parametrize("name", UNBIASED)
def test_entries_are_unbiased(bench, name):
    pyro.enable_validation(False)
    vae, x, reference = bench
    record, sample = measure(ENTRIES[name], vae, x, reference, draws=30)
    assert record["draws"] == len(sample.values) == 30
    assert record["bias_se"] < 0.01 * reference.value
    assert abs(record["bias"]) < 5 * record["bias_se"]
    assert record["predicted_bias"] == 0
    for module in MODULES:
        # Every fourth datum is the same here: it has every fourth Sobol point, which are alike.
        noisy = "SobolPerBatch" in name or (
            ENTRIES[name].group == "score function" and module == "encoder"
        )
        assert record[f"{module}_bias_se"] < (0.5 if noisy else 0.03)
        assert abs(record[f"{module}_bias"]) < 5 * record[f"{module}_bias_se"]


@pytest.mark.filterwarnings("ignore:Failed to verify mean field restriction")
@pytest.mark.parametrize("name", sorted(ENTRIES.keys() - set(UNBIASED)))
def test_counterexamples_are_off_by_what_is_predicted(bench, name):
    pyro.enable_validation(False)
    vae, x, reference = bench
    entry = ENTRIES[name]
    record, _ = measure(entry, vae, x, reference, draws=20)
    assert record["bias_se"] < 0.01 * reference.value
    assert abs(record["bias"]) > 5 * record["bias_se"]
    if isinstance(entry.make(), NoisyIWAE):
        # Of groups of new estimates, from all copies of a datum: drawing with replacement from a
        # few, as `log_mean_exp_bias` does, misses a part of their tail.
        elbo = entry.make()
        pool = torch.stack(
            [w for _ in range(12) for w in elbo.log_weights(vae.model, vae.guide, x)]
        )
        groups = pool.unflatten(1, (-1, 4)).flatten(0, 1).unflatten(0, (-1, elbo.num_particles))
        bounds = groups.logsumexp(1) - math.log(elbo.num_particles)
        predictions = (groups.mean(1) - bounds).mean(1).double().detach()
        assert abs(log_mean_exp_bias(elbo, vae, x, draws=3) / predictions.mean() - 1) < 0.1
    else:
        predictions = mean_field_bias(vae, x, entry.order, draws=100).double()
    mean, se = mean_and_se(predictions, 0.1)
    assert abs(record["bias"] - mean) < 5 * math.hypot(record["bias_se"], se)
    predicted_se = math.hypot(record["predicted_bias_se"], se)
    assert 0 < predicted_se < 0.2
    assert abs(record["predicted_bias"] - mean) < 5 * predicted_se
    off = [record[f"{m}_bias"] / record[f"{m}_bias_se"] for m in MODULES]
    assert max(map(abs, off)) > 5


def test_an_entry_is_measured_in_its_order_and_for_its_time(bench):
    vae, x, reference = bench
    vae.prior.order = "forward"
    seen = []

    class Spy(Trace_ELBO):
        def _get_traces(self, *args):
            seen.append(vae.prior.order)
            return super()._get_traces(*args)

    entry = Entry("spy", "test", Spy, order="reversed", warmup=2)
    for options, count in (({"seconds": 0.0, "min_draws": 3}, 3), ({"seconds": 1e6}, 8)):
        seen.clear()
        record, sample = measure(entry, vae, x, reference, draws=8, **options)
        assert record["draws"] == len(sample.values) == count
        assert all(len(rows) == count for rows in sample.gradients.values())
        assert seen == ["reversed"] * (2 + count)
        assert record["sd"] == pytest.approx(sample.values.std().item())
        assert record["bias"] == pytest.approx(sample.values.mean().item() - reference.value)
        assert record["bias_se"] == pytest.approx(record["sd"] / count**0.5)
    assert vae.prior.order == "forward"


def test_values_alone(bench):
    vae, x, reference = bench
    vae.prior.order = "forward"
    for name in ("closed-form KLs, reversed", "loss-aware LD k=8 | z_0", "all | x"):
        values = draw_values(ENTRIES[name], vae, x, draws=40)
        assert values.shape == (40,) and values.dtype == torch.float64
        mean, se = mean_and_se(values, 0.1)
        assert abs(mean - reference.value) < 5 * se
    # The loss of a counterexample is the one that it is trained with.
    entry = ENTRIES["log-mean-exp of 16 x uniform k=1 | z_0"]
    values = draw_values(entry, vae, x, draws=100, seconds=0.0, min_draws=3)
    assert len(values) == 3 and (values < reference.value - 1).all()
    assert vae.prior.order == "forward" and not pyro.get_param_store()
    assert all(p.grad is None for p in vae.parameters())


def test_proposals_that_learn_have_learned_before_they_are_measured(bench):
    vae, x, reference = bench
    made = []

    def make():
        made.append(ENTRIES["loss-aware k=8 | z_0"].make())
        made[-1].before = None
        return made[-1]

    learned = [n for n in ENTRIES if re.search("loss-|gradient-|Regressed|Taylor", n)]
    assert learned and all(ENTRIES[name].warmup > 0 for name in learned)
    assert all((ENTRIES[name].warmup > 0) == (name in learned) for name in ENTRIES)
    entry = dataclasses.replace(ENTRIES["loss-aware k=8 | z_0"], make=make)
    measure(entry, vae, x, reference, draws=2, min_draws=2)
    (elbo,) = made
    fresh = ENTRIES["loss-aware k=8 | z_0"].make().proposal(vae.prior, "z_0")
    assert (elbo.proposal(vae.prior, "z_0") / fresh - 1).abs().max() > 0.05


def describe(elbo):
    r"""Returns the options of an estimator, in the form of a name."""
    collapse = elbo.collapse
    proposal = "all" if elbo.proposal is None else type(elbo.proposal).__name__
    proposal = proposal.removesuffix("Timesteps")
    words = re.sub("(?<=[a-z])(?=[A-Z])", "-", proposal).lower()
    words += " LD" if collapse.low_discrepancy else ""
    words += f" k={collapse.k}" if elbo.proposal is not None else ""
    words += f" | {collapse.conditioning}"
    words += ", antithetic" if elbo.antithetic else ""
    # These have neither a path nor, but for the baseline, several particles.
    scored = type(elbo).__name__ in ("ScoreFunction_ELBO", "VarGrad_ELBO")
    words += ", path" if elbo.entropy == "path" and not scored else ""
    words += f", {elbo.num_particles} particles" if elbo.num_particles > 1 and not scored else ""
    if type(elbo) is not Timestep_ELBO:
        words += f", {type(elbo).__name__.removesuffix('_ELBO')}"
    return words


def test_names_are_unique_and_describe_the_options():
    assert len(ENTRIES) == len(entries_module._entries)
    for name, entry in ENTRIES.items():
        elbo = entry.make()
        assert elbo is not entry.make()
        assert entry.name == name
        if isinstance(elbo, Timestep_ELBO) and not entry.counterexample:
            assert describe(elbo) == name
            assert not entry.unrolled
            assert elbo.vectorize_particles == (elbo.num_particles > 1) or "VarGrad" in name
        assert entry.unrolled == (not isinstance(elbo, Timestep_ELBO))
        if isinstance(elbo, TraceMeanField_ELBO):
            assert entry.order in name and entry.counterexample
    noisy = ENTRIES["log-mean-exp of 16 x uniform k=1 | z_0"].make()
    words = describe(noisy).split(", ")
    assert words[0] == "uniform k=1 | z_0" and words[-2:] == ["16 particles", "NoisyIWAE"]


def test_the_chosen_ones_are_entries():
    assert BASELINE in SERIOUS and set(SERIOUS) <= ENTRIES.keys()
    assert len(set(SERIOUS)) == len(SERIOUS)
    assert not any(ENTRIES[name].counterexample for name in SERIOUS)
    assert describe(ENTRIES[BASELINE].make()) == BASELINE == "uniform k=1 | z_0"


def test_options_of_an_entry():
    entry = timestep_entry("uniform", 3, "x", chunk_size=5, antithetic=True)
    assert (entry.name, entry.group) == ("uniform k=3 | x, antithetic", "given x")
    assert entry.make().collapse.chunk_size == 5
    assert timestep_entry("all", group="mine").group == "mine"


# --- Counterexamples ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [2, 64])
@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("order", ["forward", "posterior", "reversed"])
def test_mean_field_bias(device, order, reverse_variance, T, chunk_size):
    vae = linear_gaussian_vae(T, reverse_variance=reverse_variance).to(device)
    x = torch.randn(2000, 3, dtype=torch.float64, device=device)
    exact = Oracle(vae, x).mean_field_bias(order)
    assert (exact == exact[0]).all()
    predicted = mean_field_bias(vae, x, order, draws=25, chunk_size=chunk_size).double()
    assert predicted.shape == (25,)
    if order == "reversed":
        assert not predicted.any() and not exact.any()
        return
    mean, se = mean_and_se(predicted, 0.05)
    assert abs(mean - exact[0].cpu()) < 5 * se


class Squares(torch.nn.Module):
    def forward(self, z, log_snr):
        return 0.3 * z.square()


@pytest.mark.filterwarnings("ignore:Failed to verify mean field restriction")
@pytest.mark.parametrize("order", ["forward", "posterior"])
def test_mean_field_bias_of_a_denoiser_that_is_not_linear(device, order):
    r"""Then the covariances depend on where z_t is. The bias is that of what Pyro's ELBO says."""
    pyro.enable_validation(False)
    vae = linear_gaussian_vae(4, parameterization="mu").to(device)
    vae.prior.denoiser.backbone = Squares()
    vae.encoder.bias.data += 1.0
    x = 0.5 * torch.randn(2000, 3, dtype=torch.float64, device=device)
    wrong = draw_values(ENTRIES[f"TraceMeanField_ELBO, {order}"], vae, x, draws=40)
    right = draw_values(ENTRIES["all | x"], vae, x, draws=40)
    (mean, se), (other, other_se) = mean_and_se(wrong, 0.1), mean_and_se(right, 0.1)
    predicted, predicted_se = mean_and_se(mean_field_bias(vae, x, order, 40).double(), 0.1)
    se = (se**2 + other_se**2 + predicted_se**2) ** 0.5
    assert predicted > 50 * se
    assert abs(mean - other - predicted) < 5 * se


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_log_mean_exp_of_two_normal_estimates(device, spread):
    r"""log((e^a + e^b) / 2) = (a + b) / 2 + log cosh((a - b) / 2)."""

    class Normal(NoisyIWAE):
        def log_weights(self, model, guide, x):
            level = torch.arange(len(x), dtype=torch.float64, device=device)  # by datum
            return [level - spread * torch.randn_like(level) for _ in range(2)]

    fake = SimpleNamespace(model=None, guide=None)
    x = torch.zeros(500, 1, device=device)
    predictions = [log_mean_exp_bias(Normal(num_particles=2), fake, x, draws=60) for _ in range(20)]
    mean, se = mean_and_se(torch.tensor(predictions, dtype=torch.float64), 0.01)
    exact, _ = integrate.quad(
        lambda e: math.log(math.cosh(spread * e / 2**0.5)) * math.exp(-(e**2) / 2), -12, 12
    )
    # Two draws with replacement are the same one once in 120 times.
    exact *= -(1 - 1 / 120) / (2 * math.pi) ** 0.5
    assert abs(mean - exact) < 5 * se


def test_a_log_mean_exp_of_noisy_estimates_exceeds_the_evidence(x):
    r"""Without a network, and with the posterior of N(0, I), the bound is tight."""
    vae = linear_gaussian_vae(4).to(x.device)
    for parameter in vae.prior.denoiser.parameters():
        parameter.data.zero_()
    # One latent dimension is seen by one feature each, such that the posterior is diagonal.
    W, b, s2 = (
        vae.decoder.weight.data[0],
        vae.decoder.bias.data[0],
        vae.decoder.log_scale.data[0].mul(2).exp(),
    )
    W.copy_(torch.tensor([[1.0, 0.0], [0.0, -0.7], [0.0, 0.0]]).to(W))
    precision = 1 + (W.square() / s2[:, None]).sum(0)
    vae.encoder.weight.data[0] = (W / s2[:, None]).mT / precision[:, None]
    vae.encoder.bias.data[0] = -vae.encoder.weight.data[0] @ b
    vae.encoder.log_scale.data[0] = -precision.log() / 2
    oracle = Oracle(vae, x)
    evidence = oracle.log_evidence.detach()
    torch.testing.assert_close(-oracle.negative_elbo, evidence, atol=1e-10, rtol=0)

    # Of the unrolled programs it is a bound, here a tight one.
    elbo = Trace_ELBO(num_particles=16)
    bound = importance_weighted_bound(vae.model, vae.guide, x, elbo=elbo)
    torch.testing.assert_close(bound, evidence, atol=1e-10, rtol=0)

    data = x.repeat(200, 1)
    noisy = NoisyIWAE("uniform", k=1, num_particles=16, antithetic=False, low_discrepancy=False)
    with torch.no_grad():
        log_weights = torch.stack(noisy.log_weights(vae.model, vae.guide, data)).unflatten(
            1, (200, 4)
        )
    mean, se = mean_and_se(log_weights.flatten(0, 1), 0.1)
    assert ((mean - evidence).abs() < 5 * se).all()  # the estimates themselves are unbiased
    claims = log_weights.logsumexp(0) - math.log(16)
    mean, se = mean_and_se(claims, 0.1)
    assert (mean - evidence > 5 * se).all()
    # Which is what its loss says, however it is asked.
    losses = []
    for way in ("loss", "differentiable_loss", "loss_and_grads", "terms"):
        torch.manual_seed(0)
        loss = getattr(noisy, way)(vae.model, vae.guide, data)
        loss = sum(loss.values()) if way == "terms" else loss
        losses.append(torch.as_tensor(loss).item() / len(data))
    assert losses == pytest.approx([losses[0]] * 4)
    assert -losses[0] > evidence.mean() + 5 * se.norm() / 4

    # With a posterior that is off, the bound of the unrolled programs falls, as it must.
    vae.encoder.bias.data += 0.3
    bound = importance_weighted_bound(vae.model, vae.guide, data, elbo=elbo)
    bounds = bound.unflatten(0, (200, 4))
    mean, se = mean_and_se(bounds, 0.05)
    assert (mean < evidence + 5 * se).all() and (
        mean > -Oracle(vae, x).negative_elbo - 5 * se
    ).all()


# --- Error against samples ------------------------------------------------------------------------


def test_rms_error_falls_with_the_root_of_the_samples():
    N, sd, bias = 1 << 16, 3.0, 0.7
    values = 5.0 + sd * torch.randn(N, dtype=torch.float64)
    samples, error = rms_error(values, 5.0)
    assert samples.tolist() == [2**i for i in range(15)]  # up to N / 4
    # N / n means: squares that are chi^2 distributed.
    tolerance = 5 * (2 * samples / N).sqrt()
    assert ((error.square() * samples / sd**2 - 1).abs() < tolerance).all()
    slope = ((error[8].log() - error[0].log()) / math.log(256)).item()
    assert slope == pytest.approx(-0.5, abs=0.03)
    _, biased = rms_error(values + bias, 5.0)
    assert biased[0].item() == pytest.approx((sd**2 + bias**2) ** 0.5, rel=0.02)
    assert biased[-1].item() == pytest.approx(bias, rel=0.1)
    assert error[-1] < 0.2 * biased[-1]


@pytest.mark.parametrize(
    "count, samples", [(2, [1]), (4, [1]), (7, [1]), (8, [1, 2]), (40, [1, 2, 4, 8])]
)
def test_the_numbers_of_samples(count, samples):
    found, error = rms_error(torch.arange(1.0, count + 1), 0.0)
    assert found.tolist() == samples and error.shape == (len(samples),)
    mean_square = sum(i**2 for i in range(1, count + 1)) / count
    assert error[0].item() == pytest.approx(mean_square**0.5)


def test_rms_error_by_hand():
    # The means of pairs are 2, 4, 6 and 8; of fours 3 and 7, and the last value is left over.
    values = torch.tensor([1.0, 3, 3, 5, 5, 7, 7, 9, 100, 100, 100, 100, 100, 100, 100, 100, 50])
    samples, error = rms_error(values, 100.0)
    assert samples.tolist() == [1, 2, 4]
    assert error[1].item() == pytest.approx(((98**2 + 96**2 + 94**2 + 92**2) / 8) ** 0.5)
    assert error[2].item() == pytest.approx(((97**2 + 93**2) / 4) ** 0.5)


# --- Tables ---------------------------------------------------------------------------------------


def record(name, variance=1.0, ms=1.0, **others):
    values = {f"{m}_variance": variance * (i + 1) for i, m in enumerate(MODULES)}
    values |= {f"{m}_snr": 0.5 for m in MODULES} | {"ms": ms, "estimator": name}
    values |= {"bias": 0.0, "bias_se": 0.1, "sd": 2.0, "draws": 100}
    values |= {"predicted_bias": 0.0, "predicted_bias_se": 0.0}
    return values | {"denoiser_evaluations": 9.0, "megabytes": 12.34} | others


def test_merits_are_ratios_of_variance_times_time():
    records = [
        record("half the time", 1.0, 2.0),
        record(BASELINE, 1.0, 4.0),
        record("worse", 10.0, 1.0),
        record("mixed", 0.5, 1.0, prior_variance=30.0),
        record("exact", 0.0, 100.0),
    ]
    add_merits(records, BASELINE)
    merits = [[r[f"{m}_merit"] for m in MODULES] for r in records]
    assert merits[0] == pytest.approx([2.0] * 3) and merits[1] == [1.0] * 3
    assert merits[2] == pytest.approx([0.4] * 3)
    assert merits[3] == pytest.approx([8.0, 8.0, 0.4])
    assert merits[4] == [math.inf] * 3


def test_the_standard_error_of_a_merit_is_that_of_a_ratio():
    r"""Over many tables of noisy variances and times, it is the spread of the multipliers."""
    generator, tables = torch.Generator().manual_seed(0), []
    for _ in range(2000):
        noise = 1 + 0.02 * torch.randn(4, generator=generator, dtype=torch.float64)
        rows = [
            record(name, ms=2 * m, ms_se=0.04)
            | {f"{g}_variance": 3 * v for g in MODULES}
            | {f"{g}_variance_se": 0.06 for g in MODULES}
            for name, v, m in (("other", *noise[:2].tolist()), (BASELINE, *noise[2:].tolist()))
        ]
        add_merits(rows, BASELINE)
        assert rows[1]["prior_merit_se"] == 0
        tables.append([rows[0]["prior_merit"], rows[0]["prior_merit_se"]])
    merits, claimed = torch.tensor(tables, dtype=torch.float64).unbind(1)
    assert claimed.median().item() == pytest.approx(merits.std().item(), rel=0.08)
    assert claimed.median().item() == pytest.approx(0.04, rel=0.02)  # the root of 4 times 0.02^2


def test_the_standard_error_of_a_median():
    times = 5 + 0.3 * torch.randn(3000, 21, dtype=torch.float64)
    spread = times.median(1).values.std().item()
    claimed = torch.tensor([cost_module.median_se(row.tolist()) for row in times]).mean().item()
    assert claimed == pytest.approx(spread, rel=0.15)
    # A step that was disturbed does not count.
    assert cost_module.median_se([1.0, 1.0, 1.0, 1.0, 900.0]) == 0.0


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0"),
        (1.0, "1.0"),
        (0.123456, "0.12"),
        (0.00123456, "0.0012"),
        (0.000123456, "1.2e-04"),
        (12.3456, "12"),
        (123.456, "123"),
        (1.96, "2.0"),
        (-3.14159, "-3.1"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_significant_digits(value, text):
    assert significant(value) == text


def cells(line):
    assert line.startswith("|") and line.endswith("|")
    return [cell.strip() for cell in line[1:-1].split("|")]


def test_markdown_table():
    records = [
        record(BASELINE),
        record(
            "biased",
            bias=-0.5,
            bias_se=0.05,
            predicted_bias=-0.47,
            predicted_bias_se=0.01,
            counterexample="why",
        ),
        record("tiny", bias=-0.001, encoder_variance=1234.5, prior_snr=0.0),
    ]
    add_merits(records, BASELINE)
    lines = markdown_table(records, dict.fromkeys(MODULES, 0.25))
    rows = [cells(line) for line in lines]
    assert {len(row) for row in rows} == {16} and len(rows) == 2 + 3 + 1
    assert set(rows[1]) == {"---"}
    assert rows[0][:5] == ["estimator", "draws", "bias (nats)", "sd", "gradient variance: prior"]
    # Columns are in the order prior, encoder, decoder; the records' variances are not.
    assert rows[2] == [
        "uniform k=1 given z_0", "100", "+0.00 ± 0.20", "2.0",
        *("3.0", "1.0", "2.0"), *("0.50", "0.50", "0.50"), *("9", "1.0", "12"),
        *("1.0 ± 0", "1.0 ± 0", "1.0 ± 0"),
    ]  # fmt: skip
    assert rows[3][0].startswith("biased") and rows[3][0].endswith("why)")
    assert rows[3][2:3] == ["−0.50 ± 0.10 (predicted −0.47 ± 0.02)"]
    assert rows[4][2] == "+0.00 ± 0.20" and rows[4][5] == "1234" and rows[4][7] == "0"
    assert rows[5] == ["*the minibatch's own noise*", "", "", "", *["0.25"] * 3, *[""] * 9]
    assert len(markdown_table(records)) == 2 + 3
