r"""One kernel for any event shape, any number of priors, any times and contexts."""

from __future__ import annotations

import gc
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from pyro.contrib.autoname import scope
from pyro.infer import Trace_ELBO
from torch import nn
from unbiased import assert_matches_oracle, assert_unbiased, draws, exact_values

from pyro_vaediff import (
    VAE,
    DiffusionPrior,
    GaussianPrior,
    Reweighted,
    Timestep_ELBO,
    TraceKL_ELBO,
    register,
)
from pyro_vaediff.diffusion import q_marginal, q_reverse, q_step
from pyro_vaediff.infer import check_mean_field, elbo_terms
from pyro_vaediff.nn import ResidualMLP, TimeAdapter, from_eps
from pyro_vaediff.schedules import CosineSchedule, LinearSchedule, LogSNRSchedule, Schedule
from pyro_vaediff.testing import LinearGaussian, Oracle, linear_gaussian_vae

EVENT = (1, 2, 1)
ORDERS = ("forward", "posterior", "reversed")
VARIANCES = ("beta", "beta_tilde", "learned")


@pytest.fixture
def x(device):
    return torch.randn(2, 3, dtype=torch.float64, device=device)


def exact(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


# --- Any event shape ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("Estimator", [Trace_ELBO, TraceKL_ELBO])
def test_unrolled_chains_of_images(x, Estimator, order):
    vae = linear_gaussian_vae(3, EVENT, order=order).to(x.device)
    assert_matches_oracle(Estimator(), vae, x)


@pytest.mark.parametrize("parameterization", ["eps", "z0", "mu", "v"])
@pytest.mark.parametrize("reverse_variance", VARIANCES)
@pytest.mark.parametrize("timesteps", ["all", "importance", "loss-aware"])
@pytest.mark.parametrize("conditioning", ["z_0", "x"])
def test_timesteps_of_images(x, timesteps, conditioning, reverse_variance, parameterization):
    vae = linear_gaussian_vae(
        4, EVENT, reverse_variance=reverse_variance, parameterization=parameterization
    )
    elbo = Timestep_ELBO(timesteps, k=4, conditioning=conditioning, chunk_size=2)
    assert_matches_oracle(elbo, vae.to(x.device), x, target=0.05)


@pytest.mark.parametrize("name", ["mean", "stddev"])
def test_times_of_a_batch_are_not_broadcast_over_the_height(device, name):
    # Eight images of height 8 with a time each: the shapes would fit the wrong way as well.
    flat = DiffusionPrior(4 * 8 * 8, 10, backbone=ResidualMLP(256, width=8))
    prior = DiffusionPrior((4, 8, 8), 10, backbone=ResidualMLP((4, 8, 8), width=8))
    nn.init.normal_(flat.denoiser.backbone.outputs.weight)
    prior.load_state_dict(flat.state_dict())
    flat, prior = flat.to(device), prior.to(device)
    z, t = torch.randn(8, 4, 8, 8, device=device), torch.arange(1, 9, device=device)
    expected = getattr(flat.reverse(z.flatten(1), t), name).expand(8, 256)
    actual = getattr(prior.reverse(z, t), name).expand(8, 4, 8, 8)
    torch.testing.assert_close(actual.flatten(1), expected)


# --- Several priors -------------------------------------------------------------------------------


class TwoPriors(nn.Module):
    r"""x ~ N(A z^a + B z^b + b), where each of the latents has a diffusion prior of its own."""

    def __init__(self, **options):
        super().__init__()
        self.a, self.b = linear_gaussian_vae(3, 2, **options), linear_gaussian_vae(4, EVENT)

    def model(self, x):
        with pyro.plate("data", len(x)):
            means = []
            for name in "ab":
                vae = getattr(self, name)
                with scope(prefix=name):
                    register("decoder", vae.decoder)
                    means.append(vae.decoder(vae.prior.model()).mean)
            scale = self.a.decoder.log_scale.exp()
            pyro.sample("x", dist.Normal(sum(means), scale).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            for name in "ab":
                vae = getattr(self, name)
                with scope(prefix=name):
                    register("encoder", vae.encoder)
                    vae.prior.guide(vae.encoder(x))

    def negative_elbo(self, x):
        r"""Returns the negative ELBO in closed form, of each datum."""
        oracles = [Oracle(vae, x) for vae in (self.a, self.b)]
        chains = sum(oracle.negative_elbo - oracle.reconstruction for oracle in oracles)
        mean, scatter = -x, 0.0
        for oracle in oracles:
            part = oracle.decoder.weight[0] @ oracle.z[0] + oracle.decoder.bias[0]
            mean, scatter = mean + part.mean, scatter + part.coef.square().sum(-1)
        variance = self.a.decoder.log_scale[0].exp().square()
        squares = (mean.square() + scatter) / variance
        return chains + (squares + (2 * math.pi * variance).log()).sum(-1) / 2


ESTIMATORS = {
    "Trace_ELBO": Trace_ELBO,
    "TraceKL_ELBO": TraceKL_ELBO,
    "all": lambda: Timestep_ELBO("all", chunk_size=2),
    "all, given x": lambda: Timestep_ELBO("all", conditioning="x"),
    "importance": lambda: Timestep_ELBO("importance", k=4),
    "loss-aware": lambda: Timestep_ELBO("loss-aware", k=4, conditioning="x"),
}


@pytest.mark.parametrize("reverse_variance", ["beta", "learned"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_priors_in_one_model(x, name, reverse_variance):
    two = TwoPriors(reverse_variance=reverse_variance, order="posterior").to(x.device)
    estimates = draws(ESTIMATORS[name](), two, x)
    assert_unbiased(estimates, exact_values(two, two.negative_elbo(x)), target=0.05)


def test_terms_are_reported_per_prior_and_an_exact_sum_is_one(x):
    two = TwoPriors().to(x.device)
    terms = elbo_terms(two.model, two.guide, x, elbo=Timestep_ELBO("all", chunk_size=1))
    names = [f"{p}/{n}" for p, T in (("a", 3), ("b", 4)) for n in ("constant", f"z_{T}", "z_s")]
    names += [f"{p}/{n}" for p in "ab" for n in ("-H[", "z_0")]
    found = {name.replace("-H[a/z_0]", "a/-H[").replace("-H[b/z_0]", "b/-H[") for name in terms}
    assert found == {*names, "x"}
    assert terms["a/z_s"].shape == (2, 2) and terms["b/z_s"].shape == (3, 2)


def test_a_loss_aware_proposal_learns_for_each_prior(x):
    two = TwoPriors().to(x.device)
    elbo = Timestep_ELBO("loss-aware", k=4)
    start = {}
    for step in range(3):
        elbo.loss_and_grads(two.model, two.guide, x)
        if step == 0:
            start = {name: value.clone() for name, value in elbo.state_dict().items()}
    state = elbo.state_dict()
    assert {name: len(value) for name, value in state.items()} == {"0.squares": 4, "1.squares": 5}
    assert all((state[name] != start[name]).any() for name in state)
    other = Timestep_ELBO("loss-aware", k=4)
    other.load_state_dict(state)
    losses = []
    for estimator in (elbo, other):
        torch.manual_seed(1)
        losses.append(estimator.loss(two.model, two.guide, x))
    assert losses[0] == losses[1]


def test_legality_is_checked_per_prior(x):
    two = TwoPriors(order="forward").to(x.device)
    two.b.prior.order = "reversed"
    assert set(check_mean_field(two.model, two.guide, x)) == {"a/z_0", "a/z_1", "a/z_2"}


# --- Any times ------------------------------------------------------------------------------------

SCHEDULES = [
    LinearSchedule(10),
    CosineSchedule(7),
    Schedule(torch.rand(6, dtype=torch.float64) * 0.5 + 0.1),
    LogSNRSchedule(lambda t: 9 - 15 * t, 5),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_algebra_holds_between_any_two_times(schedule):
    schedule = schedule.double()
    z_0 = torch.randn(3, dtype=torch.float64)
    posterior = dist.Normal(z_0, torch.rand(3, dtype=torch.float64)).to_event(1)
    for s, t in ((0.2, 0.7), (0.35, 0.36), (1, 3), (2, 5)):
        alpha_bar = [schedule.signal(u)[0] for u in (s, t)]
        for start in (z_0, posterior):
            q_s, q_t = (q_marginal(schedule, start, u) for u in (s, t))
            # q(z_t) is q(z_s) after the step, and Bayes' rule turns the step around.
            step = q_step(schedule, torch.zeros_like(z_0), t, s)
            exact(q_t.mean, (alpha_bar[1] / alpha_bar[0]).sqrt() * q_s.mean)
            exact(q_t.variance, alpha_bar[1] / alpha_bar[0] * q_s.variance + step.variance)
            z_t, z_s = torch.randn(2, 3, dtype=torch.float64)
            joint = q_s.log_prob(z_s) + q_step(schedule, z_s, t, s).log_prob(z_t)
            reverse = q_t.log_prob(z_t) + q_reverse(schedule, start, z_t, t, s).log_prob(z_s)
            exact(joint, reverse, atol=1e-9)


def test_indices_and_the_times_of_the_grid_agree():
    schedule = CosineSchedule(10).double()
    t = torch.tensor([3, 9, 10])
    for one, other in zip(schedule.signal(t), schedule.signal(t.double() / 10), strict=True):
        exact(one, other)
    exact(schedule.beta(t), schedule.beta(t, t - 1))
    exact(schedule.beta(t), schedule.beta(t.double() / 10, (t - 1).double() / 10))
    exact(schedule.position(schedule.log_snr[1:]), torch.arange(1, 11).double(), atol=1e-8)
    outside = torch.tensor([100.0, -100.0]).double()
    exact(schedule.position(outside), torch.tensor([1.0, 10.0]).double())


@pytest.mark.parametrize("preconditioning", [False, True])
@pytest.mark.parametrize("reverse_variance", [*VARIANCES, "analytic", "diagonal"])
def test_a_prior_with_other_steps_has_the_same_denoiser(reverse_variance, preconditioning):
    outputs = 2 if reverse_variance == "learned" else 1
    prior = DiffusionPrior(
        3,
        100,
        backbone=ResidualMLP(3, num_outputs=outputs, width=8),
        reverse_variance=reverse_variance,
        preconditioning=preconditioning,
    )
    nn.init.normal_(prior.denoiser.backbone.outputs.weight, std=0.3)
    prior = prior.double()
    few, z = prior.with_steps(5), torch.randn(4, 3, dtype=torch.float64)
    for t in range(1, 6):
        exact(few.denoise(z, t), prior.denoise(z, 20 * t))  # the same estimate of z_0
        p = few.reverse(z, t)
        if t > 1:
            exact(p.mean, q_reverse(few.schedule, few.denoise(z, t), z, t).mean, atol=1e-9)
        between = prior.denoiser(z, t / 5, (t - 1) / 5)
        exact(p.mean, between.mean)
        if reverse_variance != "learned" or t > 1:
            exact(p.stddev, between.stddev, atol=1e-9)
    same = prior.with_steps(100)
    exact(same.reverse(z, 50).mean, prior.reverse(z, 50).mean)
    assert {id(p) for p in few.parameters()} == {id(p) for p in prior.parameters()}


def test_a_coarse_grid_is_a_program_with_its_own_bound(x):
    # The oracle knows the chain of the coarse schedule, and the network is told its times.
    fine = LinearSchedule(8, 1e-3, 5e-3)
    coarse = linear_gaussian_vae(4)
    net = coarse.prior.denoiser.backbone.net
    schedule = fine.with_steps(4)
    coarse.prior = DiffusionPrior(2, 4, schedule, TimeAdapter(net, schedule, "index"))
    prior = DiffusionPrior(2, 8, fine, TimeAdapter(net, schedule, "index"))
    prior.denoiser.backbone = coarse.prior.denoiser.backbone
    vae = VAE(coarse.encoder, coarse.decoder, prior.with_steps(4)).double().to(x.device)
    expected = Oracle(coarse.double().to(x.device), x).negative_elbo
    for elbo in (Timestep_ELBO("all"), Trace_ELBO()):
        assert_unbiased(draws(elbo, vae, x)[..., :1], expected.detach()[:, None], target=0.03)


def test_a_grid_must_go_from_0_to_1():
    schedule = LinearSchedule(10)
    for steps in (0, torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.5, 0.5, 1.0])):
        with one_line_value_error("^steps must be"):
            schedule.with_steps(steps)
    with one_line_value_error("^log_snr must decrease"):
        LogSNRSchedule(lambda t: t, 3)


# --- Backbones as people write them ---------------------------------------------------------------


class Sinusoidal(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 3)

    def forward(self, z, t):
        return self.net(torch.cat([z, t[:, None].sin(), t[:, None].cos()], 1))


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.net = nn.Embedding(21, 3), nn.Linear(3, 3)

    def forward(self, z, t):
        return self.net(z + self.time(t))


class Appended(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, z, log_snr):
        return self.net(torch.cat([z, log_snr.unsqueeze(-1)], -1))


class Sampled(nn.Module):
    r"""Returns an object with ``.sample``, as the models of diffusers do."""

    def __init__(self):
        super().__init__()
        self.net = Appended()

    def forward(self, z, log_snr):
        return type("Output", (), {"sample": self.net(z, log_snr)})


class Unwrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, z, log_snr):
        return self.net(z, log_snr).sample


def unet():
    azula = pytest.importorskip("azula.nn.unet")

    class Unet(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = azula.UNet(1, 1, hid_channels=(4, 8), hid_blocks=(1, 1), mod_features=1)

        def forward(self, z, log_snr):
            return self.net(z, log_snr[:, None])

    return Unet()


@pytest.mark.parametrize(
    "shape, make",
    [
        ((3,), lambda schedule: TimeAdapter(Sinusoidal(), schedule)),
        ((3,), lambda schedule: TimeAdapter(Embedded(), schedule, "index")),
        ((3,), lambda schedule: Appended()),
        ((3,), lambda schedule: Unwrapped(Sampled())),
        ((1, 8, 8), lambda schedule: unet()),
    ],
    ids=["sinusoidal", "embedding", "appended", "object", "azula"],
)
def test_backbones_as_people_write_them(device, shape, make):
    schedule = LinearSchedule(20)
    prior = DiffusionPrior(shape, 20, schedule, make(schedule)).to(device)
    z, t = torch.randn(6, 5, *shape, device=device), torch.randint(1, 21, (6, 5), device=device)
    p = prior.reverse(z, t)
    for i, j in ((0, 0), (3, 4)):  # each latent is told its own time
        alone = prior.reverse(z[i, j], t[i, j].item())
        torch.testing.assert_close(p.mean[i, j], alone.mean, atol=1e-5, rtol=1e-4)
    q_z0 = dist.Normal(torch.zeros(4, *shape, device=device), 1.0).to_event(len(shape))

    def model():
        with pyro.plate("data", 4):
            prior.model()

    def guide():
        with pyro.plate("data", 4):
            prior.guide(q_z0)

    assert math.isfinite(Timestep_ELBO(k=3).loss_and_grads(model, guide))
    assert any(p.grad.abs().sum() > 0 for p in prior.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: DiffusionPrior(3, 5, backbone=nn.Sequential()), None),
        (lambda: DiffusionPrior(2, 5, backbone=Appended()), None),
        (lambda: DiffusionPrior(3, 5, backbone=Sampled()), "must return a tensor of the shape"),
        (
            lambda: DiffusionPrior(3, 5, backbone=Appended(), reverse_variance="learned"),
            r"must return 2 tensors of the shape of z, \(2, 3\).* Learned",
        ),
        (
            lambda: DiffusionPrior(3, 5, backbone=ResidualMLP(3, num_outputs=2)),
            "must return a tensor of the shape",
        ),
        (lambda: DiffusionPrior(3, 5, denoiser=Appended()), "denoiser must be a Denoiser"),
    ],
)
def test_a_backbone_is_checked_at_construction(make, match):
    if match is None:
        with pytest.raises((TypeError, RuntimeError)):
            make()
    else:
        with one_line_value_error(match):
            make()


def test_a_network_that_predicts_the_whole_noise(device):
    # Exact for z_0 ~ N(m, s^2), in the convention of other libraries.
    m, s = 0.7, 0.4

    class Exact(nn.Module):
        def forward(self, z, log_snr):
            alpha_bar = log_snr.sigmoid().unsqueeze(-1)
            variance = alpha_bar * s**2 + 1 - alpha_bar
            return (1 - alpha_bar).sqrt() * (z - alpha_bar.sqrt() * m) / variance

    prior = DiffusionPrior(2, 1000, backbone=from_eps(Exact())).to(device, torch.float64)
    z = torch.randn(5, 2, dtype=torch.float64, device=device)
    for t in (1, 400, 1000):
        alpha_bar = prior.schedule.alphas_cumprod[t]
        gain = alpha_bar.sqrt() * s**2 / (alpha_bar * s**2 + 1 - alpha_bar)
        exact(prior.denoise(z, t), m + gain * (z - alpha_bar.sqrt() * m), atol=1e-6)


@pytest.mark.parametrize("kind", [torch.tensor, list, np.array], ids=lambda kind: kind.__name__)
def test_betas_are_a_schedule(kind):
    betas = [0.1, 0.2, 0.3]
    prior = DiffusionPrior(2, 3, kind(betas))
    torch.testing.assert_close(prior.schedule.betas[1:], torch.tensor(betas))
    with one_line_value_error("^num_timesteps is 1000, but the schedule has 3$"):
        DiffusionPrior(2, schedule=kind(betas))
    with one_line_value_error("^betas must lie in"):
        DiffusionPrior(2, 1000, kind([2.0] * 1000))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_tables(dtype):
    prior = DiffusionPrior(4, 1000, backbone=ResidualMLP(4, width=4)).to(dtype)
    q = dist.Normal(torch.zeros(16, 4), 1.0).to_event(1)
    assert prior.denoiser.network(q.mean, 3)[0].dtype == torch.float32  # that of the latents

    def program(run):
        with pyro.plate("data", 16):
            run()

    with torch.no_grad():
        terms = elbo_terms(
            lambda: program(prior.model),
            lambda: program(lambda: prior.guide(q)),
            elbo=Timestep_ELBO("all", conditioning="x"),
        )
        with pyro.plate("samples", 1000):
            z = prior.model().float()
    kl = sum(term.sum(0) if term.ndim > 1 else term for term in terms.values())
    assert kl.mean().abs() < 0.01
    assert (z.std(0) - 1).abs().max() < 5 * 2000**-0.5


# --- Contexts -------------------------------------------------------------------------------------


class Conditional(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.net = nn.Linear(inputs + 2, outputs)

    def forward(self, x, c):
        c = c.expand(*x.shape[:-1], -1)
        return dist.Normal(self.net(torch.cat([x, c], -1)), 1.0).to_event(1)


@pytest.mark.parametrize("make_elbo", [Trace_ELBO, TraceKL_ELBO, Timestep_ELBO])
def test_a_context_goes_through_the_programs(device, make_elbo):
    prior = DiffusionPrior(4, 3, context_features=2)
    for p in prior.parameters():
        nn.init.normal_(p, std=0.3)
    vae = VAE(Conditional(3, 4), Conditional(4, 3), prior).to(device)
    x, c = torch.randn(6, 3, device=device), torch.eye(2, device=device).repeat(3, 1)
    assert math.isfinite(make_elbo().loss_and_grads(vae.model, vae.guide, x, c))
    assert vae.model(None, c).shape == (6, 3)
    torch.manual_seed(0)
    one = Timestep_ELBO("all").loss(vae.model, vae.guide, x, c)
    torch.manual_seed(0)
    assert one != Timestep_ELBO("all").loss(vae.model, vae.guide, x, c.flip(0))
    # Each datum has its own: the terms are permuted with the contexts.
    prior, c = prior.double(), c.double()
    z = torch.randn(5, 6, 4, device=device, dtype=torch.float64)
    many = prior.reverse(z, 2, c).mean
    for i in (0, 3):
        exact(many[:, i], prior.reverse(z[:, i], 2, c[i : i + 1]).mean)


# --- Pyro as Pyro ---------------------------------------------------------------------------------


def small_vae(device="cpu"):
    return VAE(LinearGaussian(3, 2, -0.5), LinearGaussian(2, 3, 0.0), DiffusionPrior(2, 3)).to(
        device, torch.float64
    )


def take_steps(vae, x, steps=3):
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Timestep_ELBO())
    return [svi.step(x) for _ in range(steps)]


def moved(vae, before):
    return [n for n, p in vae.named_parameters() if (p.detach() != before[n]).any()]


def weights(vae):
    return {name: p.detach().clone() for name, p in vae.named_parameters()}


def test_a_saved_store_is_restored_and_trained(x, tmp_path):
    vae = small_vae(x.device)
    take_steps(vae, x)
    saved = weights(vae)
    pyro.get_param_store().save(tmp_path / "store.pt")
    names = set(pyro.get_param_store().keys())
    pyro.clear_param_store()
    del vae  # as in a new process, where the names are free

    other = small_vae(x.device)
    pyro.get_param_store().load(tmp_path / "store.pt")
    other.model(num_samples=1), other.guide(x)
    assert all(torch.equal(value, saved[name]) for name, value in weights(other).items())
    assert set(pyro.get_param_store().keys()) == names
    take_steps(other, x)
    assert len(moved(other, saved)) == len(saved)


@pytest.mark.parametrize("change", ["assign", "layer"])
def test_replaced_parameters_are_trained(x, change):
    vae = small_vae(x.device)
    take_steps(vae, x)
    if change == "assign":
        state = {name: value.clone() + 0.1 for name, value in vae.state_dict().items()}
        vae.load_state_dict(state, assign=True)
    else:
        vae.decoder = LinearGaussian(2, 3, 0.0).to(x.device)
        vae.prior.denoiser.backbone.inputs = nn.Linear(2, 256).to(x.device, torch.float64)
    before = weights(vae)
    take_steps(vae, x)
    assert len(moved(vae, before)) == len(before)


def test_the_store_does_not_grow_with_models_that_are_gone(x):
    sizes = []
    for _ in range(4):
        take_steps(small_vae(x.device), x, 1)
        sizes.append(len(pyro.get_param_store()))
    assert len(set(sizes)) == 1


def test_models_that_are_gone_leave_nothing_in_the_store(x):
    take_steps(small_vae(x.device), x, 1)
    gc.collect()
    register("other", nn.Linear(2, 2))
    assert {name.partition("$$$")[0] for name in pyro.get_param_store()} == {"other"}


def test_the_parameters_of_an_elbo_module_are_complete(x):
    vae = small_vae(x.device)
    for elbo in (Timestep_ELBO(), TraceKL_ELBO(), Trace_ELBO()):
        module = elbo(vae.model, vae.guide)
        assert {id(p) for p in module.parameters()} == {id(p) for p in vae.parameters()}
    optimizer, before = torch.optim.Adam(module.parameters(), lr=1e-2), weights(vae)
    for _ in range(4):
        optimizer.zero_grad()
        module(x).backward()
        optimizer.step()
    assert len(moved(vae, before)) == len(before)


def test_an_elbo_takes_what_its_parent_takes(x):
    vae = small_vae(x.device)
    elbo = Timestep_ELBO(
        retain_graph=True, strict_enumeration_warning=False, ignore_jit_warnings=True
    )
    x = x * torch.ones(3).to(x).requires_grad_()  # a graph that is made once, and used twice
    for either in (elbo, Reweighted(elbo, "simple")):
        for _ in range(2):
            either.loss_and_grads(vae.model, vae.guide, x)


@pytest.mark.parametrize(
    "part, output, match",
    [
        ("encoder", lambda x: (x, x), "the encoder must return .* got a tuple"),
        ("encoder", lambda x: torch.distributions.Normal(x, 1.0), "of pyro.distributions"),
        ("decoder", lambda z: z, "vae.decoder must return a distribution .* got a Tensor"),
    ],
)
def test_networks_that_do_not_return_distributions(x, part, output, match):
    class Wrong(nn.Module):
        def forward(self, x):
            return output(x)

    vae = small_vae(x.device)
    setattr(vae, part, Wrong())
    with one_line_value_error(match):
        Timestep_ELBO().loss(vae.model, vae.guide, x)


def test_an_autoguide_needs_the_unrolled_estimator(x):
    vae = small_vae(x.device)
    guide = pyro.infer.autoguide.AutoNormal(pyro.poutine.block(vae.model, hide=["x"]))
    with one_line_value_error("guide must call prior.guide|for an AutoGuide"):
        Timestep_ELBO().loss(vae.model, guide, x)


# --- Masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: Timestep_ELBO("all"),
        lambda: Timestep_ELBO("all", conditioning="x"),
        lambda: Timestep_ELBO("importance", k=4),
        lambda: Timestep_ELBO("loss-aware", k=4, conditioning="x"),
        lambda: Reweighted(Timestep_ELBO("all"), "simple"),
        TraceKL_ELBO,
        lambda: TraceKL_ELBO(entropy="path"),
    ],
)
def test_masked_data_are_no_part_of_the_bound(x, make):
    vae = linear_gaussian_vae(4, order="reversed").to(x.device)
    mask = torch.tensor([True, False, True], device=x.device)
    data = x[[0, 1, 1]]
    programs = vae.model, vae.guide
    terms = []
    for pair in (programs, [pyro.poutine.mask(program, mask=mask) for program in programs]):
        torch.manual_seed(1)
        terms.append(elbo_terms(*pair, data, elbo=make()))
    # For the same draws, each term is zero for the masked datum and as it was for the others.
    assert terms[0].keys() == terms[1].keys()
    for name, term in terms[0].items():
        assert term.all()
        assert torch.equal(terms[1][name], term * mask), name


def test_missing_pixels_are_no_part_of_the_bound(x):
    # As docs/howto/model.md has it: the value of a pixel that is not there does not matter.
    vae = linear_gaussian_vae(4).to(x.device)
    observed = torch.tensor([[True, False, True], [False, True, True]], device=x.device)

    def model(x):
        with pyro.plate("data", len(x)):
            pixels = vae.decoder(vae.prior.model()).base_dist
            pyro.sample("x", pixels.mask(observed).to_event(1), obs=x)

    def guide(x):
        return vae.guide(x * observed)

    terms = []
    for values in (x, torch.where(observed, x, 7.0)):
        torch.manual_seed(1)
        terms.append(elbo_terms(model, guide, values))
    torch.testing.assert_close(*terms, atol=0, rtol=0)
    torch.manual_seed(1)
    p_x = vae.decoder(guide(x)).base_dist
    expected = -(p_x.log_prob(x) * observed).sum(-1)
    torch.testing.assert_close(terms[0]["x"], expected, atol=1e-10, rtol=0)


def test_a_flow_posterior_is_scored_when_it_is_drawn(x):
    # 17 evaluations of the network in place of one, if a copy of the sample were scored.
    arn = pyro.nn.AutoRegressiveNN(16, [20])
    calls = []
    arn.register_forward_hook(lambda *args: calls.append(1))
    transform = pyro.distributions.transforms.AffineAutoregressive(arn)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.transform = nn.Linear(3, 16), transform

        def forward(self, x):
            base = dist.Normal(self.net(x), 1.0).to_event(1)
            return dist.TransformedDistribution(base, [self.transform])

    decoder = LinearGaussian(16, 3, 0.0)
    vae = VAE(Encoder(), decoder, GaussianPrior(16)).to(x.device, torch.float32)
    with pyro.validation_enabled(False):
        Timestep_ELBO().loss_and_grads(vae.model, vae.guide, x.float())
    assert len(calls) == 1


def test_parameters_in_another_memory_format_are_refused():
    # Pyro's store makes what it holds contiguous: SVI would train a copy.
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    with one_line_value_error("parameter weight of the decoder must be contiguous, or Pyro"):
        register("decoder", net)
