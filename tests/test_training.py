r"""Training: the steps, resuming, the best model, and what goes wrong."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
from functools import partial

import pyro
import pytest
import torch
from errors import one_line_value_error
from pyro.infer import Trace_ELBO

from pyro_vaediff import Reweighted, Timestep_ELBO
from pyro_vaediff.data import load
from pyro_vaediff.diffusion import base_normal
from pyro_vaediff.evaluate import evaluate, preprocess, value_elbo
from pyro_vaediff.nn import MLPBackbone
from pyro_vaediff.priors import PRIORS
from pyro_vaediff.schedules import CosineSchedule
from pyro_vaediff.train import build, load_checkpoint, loop, save_checkpoint, saving, splits
from pyro_vaediff.train.build import make_vae
from pyro_vaediff.train.config import ModelConfig, TrainConfig
from pyro_vaediff.train.loop import NonFiniteError, Trainer
from pyro_vaediff.train.runs import load_vae


@pytest.fixture(scope="module")
def data():
    return load("digits", limit=60)


@pytest.fixture
def make_trainer(data, device, tmp_path):
    r"""Makes trainers of a tiny model, with 3 steps per epoch."""

    def make(epochs=2, elbo=None, out="run", model=None, data=data, init=None, **options):
        defaults = {"prior": "diffusion", "latent_dim": 2, "width": 4, "num_timesteps": 10}
        shape = {"image_shape": data.image_shape, "levels": data.levels}
        model_config = ModelConfig(**defaults | shape | (model or {}))
        options = {"epochs": epochs, "batch_size": 20, "lr": 5e-3} | options
        elbo = Timestep_ELBO(k=2) if elbo is None else elbo
        out = None if out is None else tmp_path / out
        return Trainer.from_config(
            model_config, TrainConfig(**options), elbo, data, device, out, init=init
        )

    return make


def weights(vae):
    return {name: value.detach().cpu().clone() for name, value in vae.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def batch_norm(monkeypatch):
    r"""Gives the networks of new trainers BatchNorm layers, which have statistics."""
    for network in ("ConvEncoder", "ConvDecoder"):
        monkeypatch.setattr(build, network, partial(getattr(build, network), norm="batch"))


def assert_one_line(error):
    assert "\n" not in str(error.value)


# --- Resuming -------------------------------------------------------------------------------------

SETTINGS = {
    "plain": {},
    "EMA and cosine": {"ema": 0.9, "lr_schedule": "cosine", "reverse_variance": "diagonal"},
    "loss-aware": {"timesteps": "loss-aware"},
    "BatchNorm": {"ema": 0.5},
    "Trace_ELBO": {"timesteps": None},
    "flow": {"prior": "flow"},
    "three phases": {
        "gaussian_epochs": 1,
        "prior_epochs": 2,
        "prior_lr": 1e-2,
        "prior_weight_decay": 0.1,
        "warmup": 2,
        "lr_schedule": "cosine",
    },
    "VampPrior": {"prior": "vamp", "prior_epochs": 2, "ema": 0.9},
    "ExemplarPrior": {"prior": "exemplar", "prior_epochs": 2, "ema": 0.9},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_is_the_run_that_never_stopped(make_trainer, monkeypatch, name):
    options = dict(SETTINGS[name])
    timesteps = options.pop("timesteps", "importance")
    model = {"prior": options.pop("prior", "diffusion")}
    model["reverse_variance"] = options.pop("reverse_variance", "beta")
    if name == "BatchNorm":
        batch_norm(monkeypatch)

    def make(out, epochs=4):
        elbo = Timestep_ELBO(timesteps, k=2) if timesteps else Trace_ELBO()
        return make_trainer(epochs, elbo, out, model, **options)

    straight = make("straight")
    best = straight.fit(progress=False)

    stopped = make("resumed")
    monkeypatch.setattr(stopped, "save", stop_after(stopped.save, 2))
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(progress=False)
    torch.rand(7)  # whatever happens in between
    resumed = make("resumed")
    resumed.resume()
    assert len(resumed.history) == 2
    resumed_best = resumed.fit(progress=False)

    assert resumed.history == straight.history
    assert_same(weights(resumed.vae), weights(straight.vae))
    assert_same(weights(resumed_best), weights(best))
    if straight.average is not None:
        assert_same(resumed.average.state_dict(), straight.average.state_dict())
    if timesteps == "loss-aware":
        assert_same(resumed.elbo.state_dict(), straight.elbo.state_dict())
    metrics = [(trainer.out / "metrics.csv").read_bytes() for trainer in (straight, resumed)]
    assert metrics[0] == metrics[1]
    assert_same(load_checkpoint(resumed.out / "best.pt")["vae"], weights(best))


def stop_after(save, num_calls):
    calls = iter(range(1, 100))

    def stopping_save():
        save()
        if next(calls) == num_calls:
            raise KeyboardInterrupt

    return stopping_save


@pytest.mark.parametrize("file", ["best.pt", "checkpoint.pt"])
def test_a_run_that_was_killed_while_saving_repeats_its_epoch(make_trainer, monkeypatch, file):
    straight = make_trainer(3, out="straight")
    straight.fit(progress=False)

    def kill(path, state):
        if path.name == file and len(state["history"]) == 2:
            raise SystemExit("killed")
        save_checkpoint(path, state)

    killed = make_trainer(3)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_checkpoint", kill)
        with pytest.raises(SystemExit):
            killed.fit(progress=False)
    assert killed.best_epoch() == 2  # or its best.pt would not be written
    assert len(load_checkpoint(killed.out / "checkpoint.pt")["history"]) == 1
    num_saved = len(load_checkpoint(killed.out / "best.pt")["history"])
    assert num_saved == (1 if file == "best.pt" else 2)

    resumed = make_trainer(3)
    resumed.resume()
    resumed.fit(progress=False)
    assert resumed.history == straight.history
    assert_same(weights(resumed.vae), weights(straight.vae))
    for name in ("best.pt", "checkpoint.pt"):
        ours, theirs = (load_checkpoint(t.out / name) for t in (resumed, straight))
        assert ours["best_epoch"] == theirs["best_epoch"]
        assert_same(ours["vae"], theirs["vae"])


@pytest.fixture
def one_epoch(make_trainer):
    make_trainer(1).fit(progress=False)
    return make_trainer


OTHERS = {
    "lr": {"lr": 1e-3},
    "batch_size": {"batch_size": 30},
    "lr_schedule": {"lr_schedule": "cosine"},
    "ema": {"ema": 0.9},
    "seed": {"seed": 1},
    "precision": {"precision": "float64"},
    "clip_norm": {"clip_norm": None},
    "prior": {"model": {"prior": "gaussian"}},
    "latent_dim": {"model": {"latent_dim": 3}},
    "num_timesteps": {"model": {"num_timesteps": 11}},
    "parameterization": {"model": {"parameterization": "v"}},
    "likelihood": {"model": {"likelihood": "bernoulli"}},
    "estimator": {"elbo": Trace_ELBO()},
    "timesteps": {"elbo": Timestep_ELBO("uniform", k=2)},
    "k": {"elbo": Timestep_ELBO(k=3)},
    "conditioning": {"elbo": Timestep_ELBO(k=2, conditioning="x")},
    "weighting": {"elbo": Reweighted(Timestep_ELBO(k=2), "simple")},
    "train_images": {"data": load("digits", limit=59)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_cannot_resume(one_epoch, name):
    with one_line_value_error(f"with {name}=.*started with"):
        one_epoch(1, **OTHERS[name]).resume()


def test_more_epochs_continue_a_run_unless_the_schedule_depends_on_them(make_trainer):
    straight = make_trainer(3, out="straight")
    straight.fit(progress=False)
    make_trainer(1).fit(progress=False)
    longer = make_trainer(3)
    longer.resume()
    longer.fit(progress=False)
    assert longer.history == straight.history

    make_trainer(1, out="cosine", lr_schedule="cosine").fit(progress=False)
    with one_line_value_error("with epochs=3: the run was started with 1"):
        make_trainer(3, out="cosine", lr_schedule="cosine").resume()


def test_a_finished_run_stays_as_it_is(one_epoch):
    trainer = one_epoch(1)
    trainer.resume()
    files = {path: path.read_bytes() for path in trainer.out.iterdir()}
    best = trainer.fit(progress=False)
    assert {path: path.read_bytes() for path in trainer.out.iterdir()} == files
    assert_same(weights(best), load_checkpoint(trainer.out / "best.pt")["vae"])


def test_nothing_to_resume_from(make_trainer):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*checkpoint\.pt"):
        make_trainer().resume()
    with one_line_value_error("out must be a run directory"):
        make_trainer(out=None).resume()


def test_resuming_restores_the_best_model_and_tidies_up(one_epoch):
    trainer = one_epoch(1)
    best, whole = trainer.out / "best.pt", (trainer.out / "best.pt").read_bytes()
    # A run was killed after its second epoch had written a better model, but not its checkpoint.
    best.write_bytes(b"of an epoch that will be repeated, with other random numbers perhaps")
    (trainer.out / ".checkpoint.pt.abc.unfinished").write_bytes(b"half of a")
    trainer.resume()
    assert best.read_bytes() == whole
    trainer.fit(progress=False)
    assert not list(trainer.out.glob(".*"))


# --- Random numbers -------------------------------------------------------------------------------


def random_numbers(trainer, data, monkeypatch):
    r"""Returns what is random in an epoch, separately."""
    found = {"order": [], "flips": [], "dequantization": [], "t": [], "noise of z_0": []}
    found["noise of z_t"] = []
    get_trace = trainer.elbo._get_trace

    def spy_images(vae, batch):
        found["order"].append(batch.flatten(1).double().mean(1))
        found["flips"].append(batch[..., 0].flatten(1).double().mean(1))
        x = preprocess(vae, batch)
        found["dequantization"].append((x.double() + 1) * data.levels / 2 - batch)
        return x

    def spy_sites(*args):
        traces = get_trace(*args)
        nodes = traces[1].nodes
        found["t"].append(nodes["t"]["value"])
        for name in ("z_0", "z_t"):
            normal = base_normal(nodes[name]["fn"])
            noise = (nodes[name]["value"] - normal.loc) / normal.scale
            found[f"noise of {name}"].append(noise.detach())
        return traces

    with monkeypatch.context() as patch:
        patch.setattr(loop, "preprocess", spy_images)
        patch.setattr(trainer.elbo, "_get_trace", spy_sites)
        trainer.fit(progress=False)
    assert (torch.cat(found["dequantization"]) > -1e-4).all()
    assert (torch.cat(found["dequantization"]) < 1 + 1e-4).all()
    return {name: torch.cat([x.flatten() for x in values]).cpu() for name, values in found.items()}


def test_the_seed_covers_everything_that_is_random(make_trainer, data, monkeypatch):
    flipping = dataclasses.replace(data, horizontal_flip=True)

    def draw(seed, epochs=1):
        trainer = make_trainer(epochs, out=None, data=flipping, seed=seed)
        return random_numbers(trainer, data, monkeypatch)

    first, again, other = draw(0), draw(0), draw(1)
    two = draw(0, epochs=2)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert not torch.equal(value, other[name]), name
        assert torch.equal(two[name][: len(value)], value), name
        assert not torch.equal(two[name][len(value) :], value), name  # each epoch has its own


# --- The best model -------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_best_model_has_the_lowest_validation_loss(make_trainer, monkeypatch, ema):
    losses = [5.0, 2.0, 3.0, 2.0]
    trainer, seen = make_trainer(4, ema=ema), []

    def validate(epoch):
        seen.append(trainer.weights())
        return losses[len(seen) - 1]

    monkeypatch.setattr(trainer, "validate", validate)
    best = trainer.fit(progress=False)
    assert not best.training
    assert_same(weights(best), seen[1])
    state = load_checkpoint(trainer.out / "best.pt")
    assert state["best_epoch"] == 2
    assert_same(state["vae"], seen[1])
    assert any((seen[1][name] != seen[3][name]).any() for name in seen[1])


def test_the_average_is_the_exponential_moving_average(make_trainer):
    trainer = make_trainer(1, ema=0.75, precision="float64")
    history, update = [], trainer.average.update

    def spy(vae):
        history.append(weights(vae))
        update(vae)

    trainer.average.update = spy
    trainer.fit(progress=False)
    expected = history[0]  # the first update copies
    for step in history[1:]:
        expected = {name: 0.75 * expected[name] + 0.25 * step[name] for name in expected}
    average = trainer.weights()
    for name in expected:
        torch.testing.assert_close(average[name], expected[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize("path", [".", "best.pt"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_load_vae_round_trip(make_trainer, data, device, precision, path):
    trainer = make_trainer(2, precision=precision)
    best = trainer.fit(progress=False)
    vae, config = load_vae(trainer.out / path, device)
    assert config == trainer.model_config
    assert not vae.training
    assert_same(weights(vae), weights(best))
    x = preprocess(vae, data.test[:4].to(device))
    assert x.dtype == getattr(torch, precision)
    with torch.no_grad():
        assert torch.equal(vae.encoder(x).mean, best.encoder(x).mean)


def test_a_checkpoint_loads_with_weights_only(one_epoch):
    out = one_epoch(1).out
    for name in ("best.pt", "checkpoint.pt"):
        state = torch.load(out / name, weights_only=True, map_location="cpu")
        assert state["model_config"]["latent_dim"] == 2
        assert state["train_config"]["epochs"] == 1


# --- What a run does and does not do --------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
def test_training_reduces_the_validation_loss(make_trainer, data, prior):
    trainer = make_trainer(8, out=None, model={"prior": prior})
    options = {"elbo": Timestep_ELBO("all"), "seed": 5}
    before = sum(evaluate(trainer.vae, data.validation, **options).values())
    best = trainer.fit(progress=False)
    after = sum(evaluate(best, data.validation, **options).values())
    assert after < before - 5
    assert trainer.history[-1]["train"] < trainer.history[0]["train"] - 5


def test_a_record_holds_terms_that_sum_to_the_loss(make_trainer):
    trainer = make_trainer(2)
    trainer.fit(progress=False)
    with open(trainer.out / "metrics.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == trainer.history
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        terms = [value for name, value in row.items() if name.startswith("train ")]
        assert len(terms) == 6
        assert sum(terms) == pytest.approx(row["train"], rel=1e-6)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_validation_is_the_loss_of_the_validation_images(make_trainer, data, ema):
    trainer = make_trainer(1, out=None, ema=ema)
    trainer.vae.eval()  # whatever mode it comes in, it is trained in train mode
    modes = []
    trainer.vae.encoder.register_forward_pre_hook(lambda net, _: modes.append(net.training))
    trainer.fit(progress=False)
    assert modes[:3] == [True] * 3 and not any(modes[3:])
    if ema:
        trainer.vae.load_state_dict(trainer.average.values)
    elbo = value_elbo(trainer.config.validate_k)
    expected = sum(evaluate(trainer.vae, data.validation, elbo).values())
    found = [trainer.history[0]["validation"], trainer.validate(1), trainer.validate(2)]
    assert found == pytest.approx([expected] * 3, rel=1e-9)  # the noise is the same in each epoch


def test_two_trainers_do_not_disturb_each_other(make_trainer):
    class Run:
        r"""A trainer with a random number generator of its own."""

        def __init__(self, **options):
            self.trainer = make_trainer(3, out=None, **options)
            self.rng = torch.get_rng_state()
            self.records = []

        def epoch(self):
            torch.set_rng_state(self.rng)
            with pyro.get_param_store().scope():
                self.records.append(self.trainer.train_epoch(loop.tqdm(disable=True)))
            self.rng = torch.get_rng_state()

    options = [{"seed": 0}, {"seed": 1, "model": {"latent_dim": 2}}]
    separate = []
    for option in options:
        run = Run(**option)
        for _ in range(3):
            run.epoch()
        separate.append(run)
    together = [Run(**option) for option in options]
    for _ in range(3):
        for run in together:
            run.epoch()
    for a, b in zip(separate, together, strict=True):
        assert a.records == b.records
        assert_same(weights(a.trainer.vae), weights(b.trainer.vae))
    assert separate[0].records != separate[1].records
    assert dict(pyro.get_param_store().items()) == {}


def test_the_global_parameter_store_is_left_alone(make_trainer, data):
    pyro.param("mine", torch.tensor(1.0))
    trainer = make_trainer(1, out=None)
    evaluate(trainer.fit(progress=False), data.test)
    assert list(pyro.get_param_store().keys()) == ["mine"]


def test_evaluation_is_seeded_and_leaves_no_trace(make_trainer, data):
    vae = make_trainer(1, out=None).vae.train()
    state = torch.get_rng_state()
    first = evaluate(vae, data.test)
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.training
    torch.rand(3)
    assert evaluate(vae, data.test) == first
    assert evaluate(vae, data.test, seed=1) != first


def test_precision(make_trainer, data):
    trainer = make_trainer(1, out=None, precision="float64")
    best = trainer.fit(progress=False)
    assert {p.dtype for p in best.parameters()} == {torch.float64}

    trainer, dtypes = make_trainer(1, out=None, precision="bf16"), set()
    convolution = set()
    trainer.vae.decoder.maps[-2].register_forward_hook(
        lambda module, args, output: convolution.add(output.dtype) if module.training else None
    )
    original = trainer.svi.step

    def spy(x):
        original(x)
        dtypes.update(term.dtype for term in trainer.svi.loss.terms.values())
        with torch.autocast(x.device.type, torch.bfloat16):
            q = trainer.vae.encoder(x)
            dtypes.update(p.dtype for p in (q.mean, q.stddev, trainer.vae.decoder(q.mean).mean))

    trainer.svi.step = spy
    trainer.fit(progress=False)
    assert convolution == {torch.bfloat16}
    assert dtypes == {torch.float32}
    assert {p.dtype for p in trainer.vae.parameters()} == {torch.float32}


# --- Numbers that are not finite ------------------------------------------------------------------


@pytest.fixture
def no_validation():
    pyro.enable_validation(False)  # as in long runs; otherwise torch itself refuses a NaN


def poison(trainer, step):
    r"""Makes the decoder return NaN at a step of the training."""
    steps = iter(range(1, 1000))

    def hook(module, args, output):
        if module.training and next(steps) == step:
            return output * math.nan

    trainer.vae.decoder.maps.register_forward_hook(hook)


def test_a_nan_names_its_step_its_term_and_the_last_good_checkpoint(make_trainer, no_validation):
    trainer = make_trainer(5)
    poison(trainer, step=7)  # the first step of the third epoch
    with pytest.raises(NonFiniteError, match=r"step 7 \(epoch 3\).* x = nan") as info:
        trainer.fit(progress=False)
    assert_one_line(info)
    assert f"last good checkpoint is {trainer.out / 'checkpoint.pt'} (epoch 2)" in str(info.value)
    assert "z_s = nan" not in str(info.value)  # that term was fine

    vae, _ = load_vae(trainer.out)
    assert all(p.isfinite().all() for p in vae.parameters())
    resumed = make_trainer(5)
    resumed.resume()
    resumed.fit(progress=False)
    assert len(resumed.history) == 5


def test_a_nan_in_the_first_epoch(make_trainer, no_validation):
    trainer = make_trainer(1)
    poison(trainer, step=2)
    with pytest.raises(NonFiniteError, match=r"step 2 \(epoch 1\).*no checkpoint was written yet"):
        trainer.fit(progress=False)


def test_a_gradient_that_is_not_finite(make_trainer, no_validation):
    trainer = make_trainer(1)
    trainer.vae.decoder.maps[-2].weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NonFiniteError, match=r"step 1 .*: the norm of the gradient = (inf|nan)"):
        trainer.fit(progress=False)


def test_a_divergent_learning_rate(make_trainer, no_validation):
    with pytest.raises(NonFiniteError, match="try a smaller lr") as info:
        make_trainer(3, lr=1e30).fit(progress=False)
    assert_one_line(info)


def test_a_validation_loss_that_is_not_finite(make_trainer, monkeypatch):
    trainer = make_trainer(3)
    terms = iter([{"x": 1.0}, {"x": math.nan}])
    monkeypatch.setattr(splits, "evaluate", lambda *args, **kwargs: next(terms))
    with pytest.raises(NonFiniteError, match=r"validation loss is nan after epoch 2.*\(epoch 1\)"):
        trainer.fit(progress=False)


# --- Configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, match",
    [
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": math.nan}, "lr must be positive and finite, got nan"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, got 0.0"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"ema": -0.1}, r"ema must be in \[0, 1\), got -0.1"),
        ({"lr_schedule": "step"}, "unknown lr_schedule 'step'"),
        ({"precision": "float16"}, "unknown precision 'float16'"),
    ],
    ids=str,
)
def test_train_config(options, match):
    with one_line_value_error(match):
        TrainConfig(**options)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"prior": "copula"}, "unknown prior 'copula'"),
        ({"networks": "unet"}, "unknown networks 'unet'"),
        ({"likelihood": "poisson"}, "unknown likelihood 'poisson'"),
        ({"latent_dim": 0}, "latent_dim must be .* got 0"),
        ({"width": 0}, "width must be .* got 0"),
        ({"num_timesteps": 0}, "num_timesteps must be .* got 0"),
        ({"schedule": "sqrt"}, "unknown schedule 'sqrt'"),
        ({"parameterization": "x"}, "unknown parameterization 'x'"),
        ({"reverse_variance": "x"}, "unknown reverse_variance 'x'"),
        ({"image_shape": (9, 9)}, r"got \(9, 9\)"),
        ({"networks": "paper"}, "32 or 64 pixels"),
    ],
    ids=str,
)
def test_model_config(options, match):
    with one_line_value_error(match):
        make_vae(ModelConfig(**options))


def test_every_option_of_a_model_reaches_its_prior():
    def make(prior, **options):
        return build.make_prior(ModelConfig(prior, latent_dim=3, **options))

    assert make("mixture", num_components=7).loc.shape == (7, 3)
    assert make("vamp", num_components=7).pseudo_inputs.shape == (7, 1, 8, 8)
    assert 13 in {n for p in make("flow", prior_width=13).parameters() for n in p.shape}
    options = {"beta_min": 2e-4, "beta_max": 0.03, "parameterization": "v"}
    prior = make("diffusion", prior_width=13, reverse_variance="learned", **options)
    betas = prior.schedule.original("betas")[1:]
    assert (len(betas), betas[0].item(), betas[-1].item()) == pytest.approx((1000, 2e-4, 0.03))
    assert prior.denoiser.parameterization == "v"
    assert prior.denoiser.variance.num_outputs == 2
    assert prior.denoiser.backbone.inputs.weight.shape == (13, 3)
    prior = make("diffusion", num_timesteps=7, schedule="cosine", denoiser="mlp")
    assert torch.equal(prior.schedule.original("betas"), CosineSchedule(7).original("betas"))
    assert isinstance(prior.denoiser.backbone.net, MLPBackbone)
    assert make("diffusion", denoiser="preconditioned").denoiser.preconditioning is not None


@pytest.mark.parametrize(
    "model, conditioning",
    [({}, "x"), *(({"reverse_variance": v}, "z_0") for v in ("learned", "analytic"))],
)
def test_a_weighting_that_is_not_defined(make_trainer, model, conditioning):
    elbo = Reweighted(Timestep_ELBO(conditioning=conditioning), "simple")
    with one_line_value_error("the weightings 'simple' and 'paper' are defined for"):
        make_trainer(elbo=elbo, model=model).fit(progress=False)


def test_a_run_does_not_depend_on_what_others_draw(make_trainer):
    runs = []
    for draws in (0, 7):
        trainer = make_trainer(2, out=None)
        torch.randn(draws)
        trainer.fit(progress=False)
        runs.append(trainer)
    assert runs[0].history == runs[1].history
    assert_same(weights(runs[0].vae), weights(runs[1].vae))


# --- Phases, and starts from other runs -----------------------------------------------------------


def changed(before, after):
    r"""Returns the names of the networks whose weights differ."""
    names = {
        name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])
    }
    return sorted(names)


def test_each_phase_trains_its_networks(make_trainer, monkeypatch):
    batch_norm(monkeypatch)  # whose statistics must stay, too, where a network is not trained
    trainer = make_trainer(2, gaussian_epochs=1, prior_epochs=2, out=None)
    history = [weights(trainer.vae)]
    save = trainer.save

    def spy():
        save()
        history.append(weights(trainer.vae))

    monkeypatch.setattr(trainer, "save", spy)
    trainer.fit(progress=False)
    phases = [changed(*pair) for pair in itertools.pairwise(history)]
    everything = ["decoder", "encoder", "prior"]
    assert phases == [["decoder", "encoder"], everything, ["prior"], ["prior"]]
    # Each phase has its terms: a Gaussian prior's KL, the chain's, and no reconstruction.
    records = [set(record) for record in trainer.history]
    assert "train z_0" in records[0] and "train z_s" not in records[0]
    assert {"train", "train z_s", "train x"} <= records[1]
    assert "train z_s" in records[2] and not {"train", "train x"} & records[2]


def test_in_its_own_phase_a_vamp_prior_leaves_the_encoder_alone(make_trainer):
    trainer = make_trainer(
        0, prior_epochs=1, out=None, model={"prior": "vamp", "num_components": 3}
    )
    before = weights(trainer.vae)
    trainer.fit(progress=False)
    assert changed(before, weights(trainer.vae)) == ["prior"]
    assert all(p.requires_grad for p in trainer.vae.parameters())


def test_in_its_own_phase_the_prior_gets_better_and_its_loss_is_the_kl(make_trainer, data):
    trainer = make_trainer(4, prior_epochs=8, out=None, prior_lr=2e-2)
    best = trainer.fit(progress=False)
    validation = [record["validation"] for record in trainer.history]
    assert min(validation[4:]) < validation[3] - 0.1
    terms = evaluate(best, data.train)
    kl = sum(value for name, value in terms.items() if name != "x")
    last = trainer.history[-1]
    assert sum(v for k, v in last.items() if k.startswith("train ")) == pytest.approx(kl, abs=1.0)


def test_a_gaussian_prior_has_no_phase_of_its_own(make_trainer):
    trainer = make_trainer(1, prior_epochs=3, model={"prior": "gaussian"}, out=None)
    trainer.fit(progress=False)
    assert len(trainer.history) == 1
    with one_line_value_error("epochs must be positive, got 0: a GaussianPrior has no parameters"):
        make_trainer(0, prior_epochs=3, model={"prior": "gaussian"}, out=None)


def test_the_learning_rates_follow_the_phases(make_trainer):
    options = {"lr": 1e-3, "prior_lr": 1e-2, "lr_schedule": "cosine", "warmup": 2}
    trainer = make_trainer(2, prior_epochs=1, out=None, **options)  # 3 steps per epoch
    rates = []
    trainer.optim.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    trainer.fit(progress=False)

    def cosine(done):
        return (1 + math.cos(math.pi * done)) / 2

    factors = [0.5, *(cosine(i / 6) for i in range(1, 6)), *(cosine(i / 3) for i in range(3))]
    assert [rate[0] for rate in rates] == pytest.approx([1e-3 * f for f in factors])
    assert [rate[1] for rate in rates] == pytest.approx([1e-2 * f for f in factors])


def test_weight_decay_is_of_the_matrices_of_the_prior(make_trainer):
    trainer = make_trainer(1, out=None, lr=1e-3, prior_lr=1e-2, prior_weight_decay=0.5)
    before, optimizer = weights(trainer.vae), trainer.optim.optimizer
    for parameter in trainer.vae.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # nothing moves but by the decay
    after = weights(trainer.vae)
    for name, parameter in trainer.vae.named_parameters():
        factor = 1 - 1e-2 * 0.5 if name.startswith("prior.") and parameter.ndim >= 2 else 1.0
        torch.testing.assert_close(after[name], before[name] * factor, atol=1e-7, rtol=0)


def test_a_vamp_prior_starts_from_training_images(make_trainer, data):
    # The space of this likelihood adds no noise to pixels.
    model = {"prior": "vamp", "num_components": 5, "likelihood": "discretized-logistic"}
    vae = make_trainer(1, out=None, model=model).vae
    assert torch.equal(vae.prior.pseudo_inputs, preprocess(vae, data.train[:5]))
    # The noise of other spaces is that of the seed.
    starts = [
        make_trainer(1, out=None, seed=seed, model={"prior": "vamp", "num_components": 5})
        for seed in (0, 0, 1)
    ]
    first, again, other = (trainer.vae.prior.pseudo_inputs for trainer in starts)
    assert torch.equal(first, again) and not torch.equal(first, other)
    # But not if it is that of another run, which was trained.
    first = make_trainer(1, out="first", model=model)
    best = first.fit(progress=False)
    second = make_trainer(1, out=None, model=model, init=first.out)
    assert torch.equal(second.vae.prior.pseudo_inputs, best.prior.pseudo_inputs)


@pytest.mark.parametrize("prior", ["gaussian", "diffusion"])
def test_a_run_starts_from_another_one(make_trainer, prior):
    first = make_trainer(1, out="first", model={"prior": prior})
    best = first.fit(progress=False)
    second = make_trainer(0, prior_epochs=1, out="second", init=first.out)
    start, end = weights(second.vae), weights(second.fit(progress=False))
    for name, value in weights(best).items():
        assert torch.equal(start[name], value), name
        assert name.startswith("prior.") or torch.equal(end[name], value), name
    assert changed(start, end) == ["prior"]


def test_a_run_starts_only_from_networks_that_fit_and_the_same_splits(make_trainer, data):
    first = make_trainer(1, out="first")
    first.fit(progress=False)
    with one_line_value_error("cannot start from .*first: other networks"):
        make_trainer(1, out=None, init=first.out, model={"width": 6})
    other = dataclasses.replace(data, groups="persons.txt (sha256 0)")
    with one_line_value_error("trained on other splits, .*groups=None, not persons.txt"):
        make_trainer(1, out=None, init=first.out, data=other)
