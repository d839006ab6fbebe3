r"""What makes training win early: the number of timesteps, the recipe, and steps without waste."""

from __future__ import annotations

import csv
import math
from functools import partial

import pyro
import pytest
import torch
from errors import one_line_value_error
from scripts import EXPERIMENTS, call, script_errors
from torch import nn

from pyro_vaediff import Reweighted, Timestep_ELBO, register
from pyro_vaediff.data import load
from pyro_vaediff.nn import MLPBackbone, ResidualMLP
from pyro_vaediff.nn.modes import use_channels_last
from pyro_vaediff.register import RegisterOnce
from pyro_vaediff.train import ModelConfig, TrainConfig, Trainer, make_vae
from pyro_vaediff.train.auto_k import AutoK, best_k
from pyro_vaediff.train.average import WeightAverage
from pyro_vaediff.train.config import EstimatorConfig
from pyro_vaediff.train.optim import TermsLoss, TorchOptim, learning_rate, make_svi, per_datum
from pyro_vaediff.train.start import is_settled, stands_in

MODEL = ModelConfig(latent_dim=2, width=4, num_timesteps=10, levels=17)


@pytest.fixture(scope="module")
def data():
    return load("digits", limit=60)


@pytest.fixture
def make_trainer(data, device, tmp_path):
    r"""Makes trainers of a tiny model, with 3 steps per epoch."""

    def make(epochs=4, out=None, auto_k=False, elbo=None, model=MODEL, **options):
        options = {"epochs": epochs, "batch_size": 20, "lr": 5e-3} | options
        out = None if out is None else tmp_path / out
        elbo = Timestep_ELBO(k=4) if elbo is None else elbo
        config = TrainConfig(**options)
        return Trainer.from_config(model, config, elbo, data, device, out, auto_k=auto_k)

    return make


# --- The number of timesteps ----------------------------------------------------------------------


class Noisy:
    r"""Gradients with the variances A of the minibatch and V / k, of parameters in any unit."""

    def __init__(self, elbo, fixed, falling):
        self.elbo, self.fixed, self.falling = elbo, fixed, falling

    def __call__(self, batch):
        noise = math.sqrt(self.falling / self.elbo.collapse.k)
        standard = batch + noise * torch.randn_like(batch)
        return standard, 1e3 * standard  # as Adam divides by the scale, both count the same

    def batch(self):
        return (math.sqrt(self.fixed) * torch.randn(5000),)


@pytest.mark.parametrize(("fixed", "falling", "k"), [(1.0, 16.0, 8), (4.0, 4.0, 2), (0.5, 8.0, 8)])
def test_k_is_the_best_one_for_variances_that_are_known(monkeypatch, fixed, falling, k):
    torch.manual_seed(0)
    elbo = Timestep_ELBO(k=4)
    noisy = Noisy(elbo, fixed, falling)
    auto = AutoK(elbo, num_batches=10)
    monkeypatch.setattr(auto, "count", lambda *args: (4.0, 1.0))
    auto.measure(noisy, [noisy.batch() for _ in range(10)])
    measured = auto.noise[1] / auto.noise[0]
    assert measured == pytest.approx(falling / fixed, rel=0.2)
    assert best_k(fixed, falling, 4.0, 1.0) == pytest.approx(k, abs=0.1)
    assert auto.k == k == elbo.collapse.k
    assert auto.due == 200


@pytest.mark.parametrize("fixed", [0.0, -1.0])
def test_k_has_a_largest_value(monkeypatch, fixed):
    elbo = Timestep_ELBO(k=4)
    auto = AutoK(elbo, most=20)
    monkeypatch.setattr("pyro_vaediff.train.auto_k.split_noise", lambda *args: (fixed, 1.0))
    auto.cost = (1.0, 1.0)
    auto.measure(Noisy(elbo, 1.0, 1.0), [(torch.randn(3),) for _ in range(2)])
    assert auto.k == 20


def test_the_cost_is_that_of_the_products_of_the_denoiser(make_trainer):
    trainer = make_trainer(auto_k=True)
    svi, auto = trainer.svi, trainer.auto_k
    with pyro.get_param_store().scope():
        gradient = partial(svi.loss.gradient, svi.model, svi.guide)
        cost, each = auto.count(gradient, trainer.data.train.draw(trainer.vae, 20))
    net = trainer.vae.prior.denoiser.backbone
    weights = sum(p.numel() for p in net.parameters() if p.ndim == 2)
    # The product, and its gradients with respect to weights and features, for each of 20 data.
    # That of the features that tell the time is not needed.
    unneeded = sum(block.time.weight.numel() for block in net.blocks)
    assert each == 20 * 2 * (3 * weights - unneeded)
    assert cost > each  # the networks of the VAE, and the step t = 1
    assert auto.k == 4  # as before


def test_a_run_with_auto_k_is_resumed_bit_for_bit(make_trainer, monkeypatch):
    def make(out):
        trainer = make_trainer(6, out, auto_k=True, lr_schedule="inverse-sqrt", ema_share=0.3)
        trainer.auto_k.due = min(trainer.auto_k.due, 4)
        return trainer

    straight = make("straight")
    best = straight.fit(progress=False)
    assert straight.auto_k.due == 32 and straight.auto_k.noise is not None

    stopped = make("resumed")
    saves = iter(range(3))
    save = stopped.save

    def stopping_save():
        save()
        if next(saves) == 2:  # after a measurement, and before another one
            raise KeyboardInterrupt

    monkeypatch.setattr(stopped, "save", stopping_save)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(progress=False)
    resumed = make("resumed")
    resumed.resume()
    assert resumed.auto_k.k == stopped.auto_k.k and resumed.auto_k.due == 16
    again = resumed.fit(progress=False)
    assert resumed.history == straight.history
    assert resumed.auto_k.noise == straight.auto_k.noise
    for one, other in zip(best.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)

    fixed = make_trainer(6, "resumed", lr_schedule="inverse-sqrt", ema_share=0.3)
    with one_line_value_error("with k=4: the run was started with 'auto'"):
        fixed.resume()


def test_what_has_no_number_of_timesteps_is_refused(make_trainer):
    for elbo in (Timestep_ELBO("all"), pyro.infer.Trace_ELBO()):
        with one_line_value_error("k='auto' needs a Timestep_ELBO with timesteps that are drawn"):
            make_trainer(auto_k=True, elbo=elbo)
    with one_line_value_error("k='auto' needs timesteps that are drawn"):
        EstimatorConfig(k="auto", timesteps="all")
    with one_line_value_error("num_batches must be at least 2"):
        AutoK(Timestep_ELBO(), num_batches=1)
    assert AutoK(Reweighted(Timestep_ELBO(k=6), "simple")).k == 6


# --- The recipe -----------------------------------------------------------------------------------


def test_an_encoder_has_settled_whatever_the_unit_of_the_loss():
    losses = [math.exp(-epoch / 5) for epoch in range(60)]
    first = next(n for n in range(60) if is_settled(losses[:n]))
    assert 15 < first < 30
    for shift, scale in ((0.0, 1e3), (-50.0, 1.0)):
        assert is_settled([shift + scale * x for x in losses[:first]])
        assert not is_settled([shift + scale * x for x in losses[: first - 1]])
    assert not is_settled([3.0, 2.0, 1.0])  # too few to tell
    assert is_settled([1.0, 1.0, 1.0, 1.0])  # nothing to wait for


def test_a_gaussian_stands_in_until_then_and_not_again():
    losses = [10.0, 1.0, 0.5, 0.4]
    long = TrainConfig(epochs=100, gaussian_epochs="auto")
    assert stands_in(long, losses[:3], 7) and not stands_in(long, losses, 7)
    assert not stands_in(long, [*losses, -50.0, -99.0], 7)  # the prior has a loss of its own
    two = TrainConfig(epochs=3, gaussian_epochs=2)
    assert [stands_in(two, losses[:n], 7) for n in range(4)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("options", "epochs"),
    [({"epochs": 20}, 5), ({"epochs": 2}, 1), ({"epochs": 1000, "max_steps": 7 * 12}, 3)],
    ids=str,
)
def test_a_gaussian_stands_in_for_no_more_than_a_quarter(options, epochs):
    falling = [1000.0 - n for n in range(20)]  # which never settles
    config = TrainConfig(gaussian_epochs="auto", **options)
    assert [stands_in(config, falling[:n], 7) for n in range(9)] == [n < epochs for n in range(9)]


def test_a_run_goes_on_with_its_prior_once_the_encoder_has_settled(make_trainer, monkeypatch):
    trainer = make_trainer(12, gaussian_epochs="auto")
    monkeypatch.setattr("pyro_vaediff.train.start.is_settled", lambda losses: len(losses) >= 2)
    before = [p.detach().clone() for p in trainer.vae.prior.parameters()]
    moved = []
    trainer.on_epoch = lambda record: moved.append(
        any(
            not torch.equal(a, b)
            for a, b in zip(before, trainer.vae.prior.parameters(), strict=True)
        )
    )
    trainer.fit(progress=False)
    assert moved == [False, False, *10 * [True]]


def test_the_inverse_square_root_knows_of_no_end():
    short, long = (
        learning_rate(TrainConfig(epochs=n, lr_schedule="inverse-sqrt", warmup=5), 7)
        for n in (20, 2000)
    )
    assert [short(step) for step in range(200)] == [long(step) for step in range(200)]
    assert short(0) == pytest.approx(1 / 5)
    assert short(69) == 1.0 and short(280) == pytest.approx(0.5)  # after 10 epochs of 7 steps


def test_an_average_over_a_share_of_the_steps():
    model = nn.Linear(1, 1, bias=False)
    everything, tail = WeightAverage(model, share=1.0), WeightAverage(model, share=0.25)
    values = torch.arange(1.0, 41.0)
    for value in values:
        nn.init.constant_(model.weight, value)
        everything.update(model)
        tail.update(model)
    # The first copies; after that the n-th update has the weight 1 / n.
    weights = torch.ones(40)
    for n in range(1, 40):
        weights[:n] *= 1 - 1 / n
        weights[n] = 1 / n
    torch.testing.assert_close(everything.values["weight"].squeeze(), (weights * values).sum())
    assert 30 < tail.values["weight"] < 40


def test_two_averages_are_refused():
    with one_line_value_error(r"ema_share=0.1 takes the place of ema, got 0.9"):
        TrainConfig(ema=0.9, ema_share=0.1)


def test_validation_may_take_fewer_timesteps(make_trainer, monkeypatch):
    ks = []
    sample = Timestep_ELBO.terms

    def terms(elbo, *args, **kwargs):
        ks.append((elbo.collapse.k, torch.is_grad_enabled()))
        return sample(elbo, *args, **kwargs)

    monkeypatch.setattr(Timestep_ELBO, "terms", terms)
    make_trainer(1, validate_k=3).fit(progress=False)
    assert set(ks) == {(4, True), (3, False)}


def test_channels_last_are_a_memory_format_only(data, device):
    torch.manual_seed(0)
    plain = make_vae(ModelConfig(latent_dim=2, width=4, networks="resnet")).to(device).double()
    other = make_vae(ModelConfig(latent_dim=2, width=4, networks="resnet")).to(device).double()
    other.load_state_dict(plain.state_dict())
    use_channels_last(other)
    x = torch.rand(6, 1, 8, 8, dtype=torch.float64, device=device)
    formats = []
    other.decoder.maps[-1].register_forward_hook(
        lambda layer, args, out: formats.append(
            args[0].is_contiguous(memory_format=torch.channels_last)
        )
    )
    results = []
    for vae in (plain, other):
        torch.manual_seed(1)
        loss = Timestep_ELBO().differentiable_loss(vae.model, vae.guide, x)
        gradients = torch.autograd.grad(loss, list(vae.parameters()))
        results.append([loss, *gradients])
        assert all(p.is_contiguous() for p in vae.parameters())
    assert formats == [True]
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_a_run_with_channels_last(make_trainer):
    trainers = [make_trainer(2, channels_last=flag, precision="float64") for flag in (False, True)]
    losses = [trainer.fit(progress=False) and trainer.history[-1]["train"] for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


# --- Steps without waste --------------------------------------------------------------------------


@pytest.mark.parametrize("network", [ResidualMLP, MLPBackbone])
@pytest.mark.parametrize("shape", [(70,), (7, 10), (1, 70)])
def test_blocks_of_latents_have_the_outputs_of_all(device, network, shape):
    torch.manual_seed(0)
    net = network(3, context_features=2).to(device).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    options = {"dtype": torch.float64, "device": device}
    z, c = torch.randn(*shape, 3, **options), torch.randn(shape[-1], 2, **options)
    for told in (torch.rand((), **options), torch.rand(shape, **options), torch.rand(1, **options)):
        for context in (c, c.expand(*shape, 2)):
            with torch.no_grad():
                whole = net(z, told, context)
                net.rows = 20
                blocks = net(z, told, context)
                del net.rows
            torch.testing.assert_close(blocks, whole, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(net(z, told, context), whole, rtol=0, atol=0)


def test_a_block_is_not_larger_than_it_may_be(device):
    net, sizes = ResidualMLP(3).to(device), []
    net.rows = 20
    net.inputs.register_forward_pre_hook(lambda layer, args: sizes.append(args[0].shape[:-1]))
    with torch.no_grad():
        net(torch.zeros(7, 10, 3, device=device), torch.zeros(7, 1, device=device))
    expected = [(2, 10)] * 3 + [(1, 10)] if device.type == "cpu" else [(7, 10)]
    assert [tuple(size) for size in sizes] == expected


def test_a_step_goes_backward_once_and_registers_once(device, monkeypatch):
    vae = make_vae(MODEL).to(device)
    optim = TorchOptim(torch.optim.Adam(vae.parameters(), lr=1e-3), 100.0)
    svi = make_svi(per_datum(vae.model), per_datum(vae.guide), optim, Timestep_ELBO(k=2))
    backward, walks = [], []
    run, walk = torch.Tensor.backward, nn.Module.named_parameters
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda *args, **kw: backward.append(1) or run(*args, **kw)
    )
    monkeypatch.setattr(
        nn.Module,
        "named_parameters",
        lambda net, *args, **kw: walks.append(net) or walk(net, *args, **kw),
    )
    x = torch.rand(4, 1, 8, 8, device=device)
    with pyro.get_param_store().scope():
        svi.step(x)
        assert all(any(net is seen for seen in walks) for net in vae.children())
        walks.clear()
        for _ in range(3):
            svi.step(x)
    assert len(backward) == 4
    assert not any(net is seen for seen in walks for net in vae.children())


def test_two_models_take_turns_and_both_train(device):
    torch.manual_seed(0)
    x = torch.rand(4, 1, 8, 8, device=device)
    vaes = [make_vae(MODEL).to(device) for _ in range(2)]
    vaes[1].load_state_dict(vaes[0].state_dict())
    with pyro.get_param_store().scope():
        steps = []
        for vae in vaes:
            optim = TorchOptim(torch.optim.Adam(vae.parameters(), lr=1e-2), 100.0)
            programs = per_datum(vae.model), per_datum(vae.guide)
            steps.append(make_svi(*programs, optim, Timestep_ELBO(k=2)).step)
        for seed in range(3):
            for step in steps:
                torch.manual_seed(seed)
                step(x)
    for one, other in zip(vaes[0].parameters(), vaes[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_layer_that_was_replaced_is_noticed(device, monkeypatch):
    monkeypatch.setattr(TermsLoss, "register_every", 5)
    vae = make_vae(MODEL).to(device)
    optim = TorchOptim(torch.optim.Adam(vae.parameters(), lr=1e-3))
    svi = make_svi(per_datum(vae.model), per_datum(vae.guide), optim, Timestep_ELBO(k=2))
    x = torch.rand(4, 1, 8, 8, device=device)
    with pyro.get_param_store().scope():
        svi.step(x)
        vae.encoder.head = nn.Linear(vae.encoder.head.in_features, 4).to(device)
        with one_line_value_error("the optimizer lacks parameters"):
            for _ in range(5):
                svi.step(x)


def test_once_is_for_each_module_and_anew_after_clear():
    once, nets = RegisterOnce(), [nn.Linear(2, 2), nn.Linear(2, 2)]

    def count(net):
        with pyro.poutine.trace() as tracer, once:
            assert register("net", net) is net
        return len(tracer.trace.param_nodes)

    with pyro.get_param_store().scope():
        assert [count(net) for net in (*nets, *nets)] == [2, 2, 0, 0]
        once.clear()
        assert count(nets[0]) == 2


def test_clipping_all_gradients_at_once_is_clipping_each(device):
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(n, device=device)) for n in (3, 50)] for _ in "ab")
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    norm = nn.utils.clip_grad_norm_(theirs, 0.5, foreach=False)
    optim = TorchOptim(torch.optim.SGD(ours, lr=1.0), 0.5)
    optim(ours)
    assert optim.grad_norm == norm
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, 1 - b.grad)


# --- The script -----------------------------------------------------------------------------------


def test_the_clock_runs_and_goes_on(tmp_path):
    args = ("--quick", "--networks", "mlp", "--test-k", 2, "--out", tmp_path / "clock")
    first = call("clock.py", "priors", *args, "--recipes", "N(0, I)")
    run = next((tmp_path / "clock" / "runs").iterdir())
    before = run.stat().st_mtime_ns
    recipes = ["N(0, I)", "diffusion, new"]
    page = call("clock.py", "priors", *args, "--recipes", *recipes)
    assert run.stat().st_mtime_ns == before  # it was not repeated
    assert first.count("| mlp |") == 1 and page.count("| mlp |") == 2
    with open(tmp_path / "clock" / "clock.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["recipe"], float(row["budget"])) for row in rows] == [
        (recipe, budget) for recipe in recipes for budget in (0.2, 0.4)
    ]
    assert all(math.isfinite(float(row["loss"])) for row in rows)


def test_the_clock_of_estimators(tmp_path):
    page = call(
        "clock.py", "estimators", "--quick", "--test-k", 2, "--out", tmp_path / "clock",
        "--recipes", "k=1", "new recipe",
    )  # fmt: skip
    assert page.count("| default |") == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("priors", "--recipes", "k=3"), "unknown recipe 'k=3'"),
        (("priors", "--budgets", "0"), "each of --budgets must be positive"),
        (("priors", "--num-test", "0"), "--num-test must be"),
    ],
)
def test_errors_of_the_clock(args, message, tmp_path, monkeypatch, capsys):
    error_of = script_errors(EXPERIMENTS / "clock.py", monkeypatch, capsys)
    assert message in error_of(*args, "--out", tmp_path)
