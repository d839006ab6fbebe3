r"""Networks, data and estimators of one's own: trained, resumed and reported without a config."""

from __future__ import annotations

import copy
import json

import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from torch import nn

from pyro_vaediff import VAE, DiffusionPrior, GaussianPrior, Timestep_ELBO
from pyro_vaediff.data import ImageData, load
from pyro_vaediff.evaluate import evaluate
from pyro_vaediff.likelihoods import GaussianLikelihood
from pyro_vaediff.nn import ResidualMLP
from pyro_vaediff.train import (
    TrainConfig,
    Trainer,
    load_checkpoint,
    load_data,
    load_vae,
    load_weights,
)
from pyro_vaediff.train.average import WeightAverage
from pyro_vaediff.train.report import report
from pyro_vaediff.train.splits import Splits


class Encoder(nn.Module):
    def __init__(self, context=0):
        super().__init__()
        self.net = nn.Linear(6 + context, 4)

    def forward(self, x, c=None):
        loc, raw = self.net(x if c is None else torch.cat([x, c], -1)).chunk(2, -1)
        return dist.Normal(loc, raw.exp()).to_event(1)


class Decoder(nn.Module):
    r"""Its Laplace distribution has a mean, and no pixel space belongs to it."""

    def __init__(self, context=0):
        super().__init__()
        self.net = nn.Linear(2 + context, 6)

    def forward(self, z, c=None):
        loc = self.net(z if c is None else torch.cat([z, c.expand(*z.shape[:-1], -1)], -1))
        return dist.Laplace(loc, torch.ones_like(loc)).to_event(1)


def make_vae(context=0, prior=None):
    torch.manual_seed(0)
    prior = prior or DiffusionPrior(2, 5, context_features=context)
    return VAE(Encoder(context), Decoder(context), prior)


X = torch.randn(60, 6, generator=torch.Generator().manual_seed(1)) @ torch.randn(
    6, 6, generator=torch.Generator().manual_seed(2)
)
DATA = X[:40], X[40:]
FAST = {"epochs": 3, "batch_size": 10, "lr": 1e-2}


def trainer(out=None, vae=None, data=DATA, elbo=None, options=None, **kwargs):
    config = TrainConfig(**FAST | (options or {}))
    return Trainer(vae or make_vae(), data, elbo or Timestep_ELBO(k=2), config, out=out, **kwargs)


def test_a_run_of_ones_own_is_resumed_loaded_and_reported(tmp_path, device):
    records = []
    straight = trainer(tmp_path / "a", on_epoch=records.append, device=device)
    best = straight.fit(progress=False)
    assert records == straight.history and [r["epoch"] for r in records] == [1, 2, 3]

    trainer(tmp_path / "b", options={"epochs": 1}, device=device).fit(progress=False)
    resumed = trainer(tmp_path / "b", device=device)
    resumed.resume()
    resumed.fit(progress=False)
    assert resumed.history == straight.history

    loaded = load_weights(tmp_path / "b", make_vae())
    for name, value in best.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.cpu()), name
    with one_line_value_error("has no model_config: make the VAE and use load_weights"):
        load_vae(tmp_path / "b")
    with one_line_value_error("has weights of other networks"):
        load_weights(tmp_path / "b", make_vae(prior=GaussianPrior(2)))

    lines = report(best, X[40:].to(device), straight.history, tmp_path / "a")
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["test_negative_elbo"] == pytest.approx(sum(evaluate(best, X[40:]).values()))
    assert set(results["not_available"]) == {"bits/dim", "pictures"}
    assert sum(line.startswith("not available for") for line in lines) == 2
    assert (tmp_path / "a" / "kl_by_timestep.csv").exists()


def test_a_trained_model_can_be_saved_whole(tmp_path):
    best = trainer().fit(progress=False)
    evaluate(best, X[:4])
    torch.save(best, tmp_path / "vae.pt")
    again = torch.load(tmp_path / "vae.pt", weights_only=False)
    assert torch.equal(again.encoder(X).mean, best.encoder(X).mean)


def test_a_callback_of_steps(tmp_path):
    for epochs, expected in ((1, range(1, 5)), (3, range(5, 13))):
        steps = []
        run = trainer(tmp_path, options={"epochs": epochs}, on_step=steps.append)
        if epochs > 1:
            run.resume()
        run.fit(progress=False)
        assert steps == list(expected)


def test_any_optimizer_of_torch():
    run = trainer(make_optimizer=torch.optim.RAdam, options={"prior_lr": 1e-3, "epochs": 9})
    assert isinstance(run.optim.optimizer, torch.optim.RAdam)
    assert [group["lr"] for group in run.optim.optimizer.param_groups] == [1e-2, 1e-3]
    run.fit(progress=False)
    assert run.history[-1]["train"] < run.history[0]["train"]


@pytest.mark.parametrize(
    "options, epochs, steps",
    [
        ({"max_steps": 6}, 2, 6),  # of 4 steps per epoch
        ({"max_seconds": 1e-9}, 1, 1),
        ({"epochs": 9, "patience": 2}, 3, 12),
        ({"validate_every": 2}, 3, 12),
    ],
    ids=str,
)
def test_budgets(monkeypatch, options, epochs, steps):
    run, calls = trainer(options=options), []
    if "patience" in options:
        validated = iter([1.0, 2.0, 3.0])
        monkeypatch.setattr(run, "validate", lambda epoch: next(validated))
    else:
        original = run.current
        monkeypatch.setattr(run, "current", lambda: calls.append(1) or original())
    run.fit(progress=False)
    assert (len(run.history), run.steps) == (epochs, steps)
    if "validate_every" in options:
        assert len(calls) == 3  # the first, the second, and the last epoch
    before = copy.deepcopy(run.history)
    run.fit(progress=False)
    assert run.history == before  # it is finished


def test_patience_waits_for_a_validation(monkeypatch):
    run, losses = (
        trainer(options={"epochs": 9, "patience": 2, "validate_every": 4}),
        [3.0, 2.0, 9.0],
    )
    original = run.validate

    def validate(epoch):
        if epoch in (1, 4, 8):
            return losses.pop(0)
        return original(epoch)

    monkeypatch.setattr(run, "validate", validate)
    run.fit(progress=False)
    assert [record["validation"] for record in run.history] == [3.0] * 3 + [2.0] * 4 + [9.0]


@pytest.mark.parametrize("budget", [{"max_steps": 10}, {"max_seconds": 50.0}], ids=str)
def test_the_last_epoch_is_validated_whichever_budget_ends_it(monkeypatch, budget):
    run = trainer(options={"epochs": 99, "validate_every": 50, "validate_k": 32} | budget)
    if "max_seconds" in budget:  # over in the third epoch
        monkeypatch.setattr(run, "is_late", lambda seconds: run.steps >= 10)
    run.fit(progress=False)
    last, first = run.history[-1]["validation"], run.history[0]["validation"]
    assert (len(run.history), run.steps) == (3, 10)
    assert last < first
    state = run.best_model().state_dict()
    assert all(torch.equal(x, state[name]) for name, x in run.vae.state_dict().items())


@pytest.mark.parametrize(
    "options, optimizer, name",
    [
        ({"max_steps": 8, "lr_schedule": "cosine"}, torch.optim.AdamW, "max_steps"),
        ({"max_steps": 4, "lr_schedule": "cosine"}, torch.optim.SGD, "optimizer"),
    ],
)
def test_a_run_is_not_resumed_with_another_schedule_or_optimizer(
    tmp_path, options, optimizer, name
):
    trainer(tmp_path, options={"max_steps": 4, "lr_schedule": "cosine"}).fit(progress=False)
    with one_line_value_error(name):
        trainer(tmp_path, options=options, make_optimizer=optimizer).resume()


def test_the_data_of_a_run_without_a_configuration_cannot_be_loaded(tmp_path):
    trainer(tmp_path, options={"epochs": 1}).fit(progress=False)
    with one_line_value_error("model_config"):
        load_data(tmp_path)


def test_the_cosine_ends_with_the_last_step():
    run = trainer(options={"max_steps": 6, "lr_schedule": "cosine"})
    run.fit(progress=False)
    assert run.optim.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_a_context_goes_with_its_data_to_every_network():
    c, vae, told = X[:, :2].double(), make_vae(2), {}
    for network in (vae.encoder, vae.decoder, vae.prior.denoiser.backbone):
        network.register_forward_pre_hook(
            lambda network, args: told.setdefault(type(network), []).append(args)
        )
    options = {"epochs": 1, "prior_epochs": 1, "batch_size": 15}
    run = trainer(vae=vae, data=((X[:40], c[:40]), (X[40:], c[40:])), options=options)
    run.fit(progress=False)
    assert run.steps == 2 * 2  # a last batch of ten is left out
    pairs = told[Encoder]
    assert {len(x) for x, _ in pairs} == {15, 20}
    assert all(torch.equal(x[:, :2], given) for x, given in pairs)
    # The others are told the same, but for the decoder while the prior is trained alone.
    contexts = [
        {tuple(args[-1].flatten().tolist()) for args in told[network]}
        for network in (Encoder, ResidualMLP, Decoder)
    ]
    assert contexts[0] == contexts[1]
    assert contexts[2] < contexts[0]


def test_labels_of_images_are_the_context_one_hot():
    data = load("digits", limit=20)

    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.net = [], nn.Linear(64, 4)

        def forward(self, x, c):
            self.seen.append((x, c))
            loc, raw = self.net(x.flatten(-3)).chunk(2, -1)
            return dist.Normal(loc, raw.exp()).to_event(1)

    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 64)

        def forward(self, z, c):
            loc = self.net(z).unflatten(-1, (1, 8, 8))
            return dist.Normal(loc, torch.ones_like(loc)).to_event(3)

    vae = VAE(Images(), Pixels(), GaussianPrior(2), GaussianLikelihood((1, 8, 8)).space(17))
    run = Trainer(vae, data, Timestep_ELBO(), TrainConfig(epochs=1, batch_size=20), labels=True)
    run.fit(progress=False)
    x, c = vae.encoder.seen[0]  # the training images are one batch, with noise within a pixel value
    images = ((x + 1) * 8.5).floor().to(torch.uint8)
    numbers = (images[:, None] == data.train).flatten(2).all(-1).long().argmax(1)
    assert sorted(numbers.tolist()) == list(range(20))
    assert torch.equal(c, nn.functional.one_hot(data.train_labels[numbers], 10).float())


def test_the_average_is_of_weights_and_statistics_not_of_tables():
    vae = make_vae()
    average = WeightAverage(vae, 0.5)
    for _ in range(2):
        average.update(vae)
    assert torch.isinf(vae.prior.schedule.log_snr[0])  # which has no average
    assert average.values.keys() == vae.state_dict().keys()
    for name, value in vae.state_dict().items():
        assert torch.equal(average.values[name], value), name


def test_a_snapshot_is_the_averaged_model(tmp_path):
    run = trainer(tmp_path, options={"epochs": 1, "ema": 0.5}, snapshots=[1])
    run.fit(progress=False)
    saved = load_checkpoint(tmp_path / "epoch-1.pt")["vae"]
    assert all(torch.equal(saved[name], value) for name, value in run.average.values.items())


def test_flips_are_those_of_the_data(monkeypatch):
    # Of images whose left half is dark: some are flipped iff their data set says so.
    images = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    images[..., 4:] = 16
    for flip in (False, True):
        data = ImageData("mine", images, images, images, levels=17, horizontal_flip=flip)
        splits = Splits.of(data)
        ((batch, _),) = splits.train.minibatches(20, torch.device("cpu"), splits.flip)
        left = batch[:, 0, 0, 0] > 0
        assert left.any() == flip and not left.all()


def test_statistics_are_averaged_and_counts_are_copied():
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, 0.75)
    average.update(model)
    with torch.no_grad():
        model.weight += 8.0
        model.running_mean += 4.0
        model.num_batches_tracked += 3
    average.update(model)
    assert average.values["weight"].tolist() == [3.0, 3.0]  # from 1 to 9
    assert average.values["running_mean"].tolist() == [1.0, 1.0]
    assert average.values["num_batches_tracked"].item() == 3


@pytest.mark.parametrize(
    "data", [X, (X,), (X, X[:0]), ((X, X[:3]), X), "digits"], ids=lambda data: type(data).__name__
)
def test_data_that_are_none(data):
    with one_line_value_error("data must be ImageData, or a training and a validation split"):
        trainer(data=data)


def test_frozen_networks_stay_frozen_and_others_do_not():
    vae = make_vae()
    vae.encoder.requires_grad_(False)
    best = trainer(vae=vae, options={"prior_epochs": 1}).fit(progress=False)
    assert not any(p.requires_grad for p in best.encoder.parameters())
    assert all(p.requires_grad for p in best.decoder.parameters())
