r"""Training steps wait for no device: counted on the meta device, and on a GPU if there is one.

A tensor on the meta device has a shape and no values. Whatever would wait for a GPU to finish in
order to read a value from it, raises an error there.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pyro
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from pyro_vaediff import Reweighted, Timestep_ELBO, TraceKL_ELBO
from pyro_vaediff.data import ImageData
from pyro_vaediff.priors import PRIORS
from pyro_vaediff.train.config import ModelConfig, TrainConfig
from pyro_vaediff.train.loop import Trainer, WeightAverage

ESTIMATORS = {
    "importance": lambda: Timestep_ELBO(k=2),
    "uniform, simple": lambda: Reweighted(Timestep_ELBO("uniform", k=2), "simple"),
    "loss-aware, given x": lambda: Timestep_ELBO("loss-aware", k=2, conditioning="x"),
    "all": lambda: Timestep_ELBO("all", entropy="exact"),
    "particles": lambda: Timestep_ELBO(k=1, num_particles=2, vectorize_particles=True),
    "chain": TraceKL_ELBO,
}
CONTINUOUS = {"num_timesteps": "continuous"}


@pytest.fixture
def no_validation():
    r"""As in long runs: to validate a distribution is to look at its values."""
    pyro.enable_validation(False)
    yield
    pyro.enable_validation(True)


def make_trainer(device, estimator, model, num_images=80, **options) -> Trainer:
    images = torch.randint(0, 17, (num_images, 1, 8, 8), dtype=torch.uint8)
    data = ImageData("noise", images, images, images, levels=17, horizontal_flip=True)
    shape = {"image_shape": data.image_shape, "levels": data.levels}
    small = {"latent_dim": 2, "width": 4, "num_timesteps": 5, "num_components": 5}
    small |= {"prior_width": 16}
    config = {"epochs": 1, "batch_size": 20, "ema": 0.9, "lr_schedule": "cosine"} | options
    elbo = ESTIMATORS[estimator]()
    return Trainer.from_config(
        ModelConfig(**small | shape | model), TrainConfig(**config), elbo, data, device
    )


# --- Without a GPU --------------------------------------------------------------------------------


class Crossings(TorchDispatchMode):
    r"""Records the operations between the host and the meta device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if {"cpu", "meta"} <= {x.device.type for x in tensors}:
            self.found.append(str(function))
        return result


@pytest.mark.parametrize(
    "estimator, model, options",
    [
        *((name, {}, {}) for name in ESTIMATORS),
        *(("importance", {"prior": prior}, {}) for prior in PRIORS if prior != "diffusion"),
        ("importance", {"reverse_variance": "learned", "likelihood": "gaussian-pixel"}, {}),
        ("importance", {"likelihood": "categorical"}, {"warmup": 3, "prior_lr": 1e-2}),
        ("importance", {"likelihood": "discretized-logistic"}, {"precision": "float64"}),
        ("importance", {"likelihood": "bernoulli", "denoiser": "mlp"}, {"clip_norm": None}),
        ("importance", {"reverse_variance": "diagonal"}, {}),
        ("importance", CONTINUOUS, {}),
        ("all", CONTINUOUS, {}),
        ("loss-aware, given x", CONTINUOUS | {"schedule": "learned-diagonal"}, {}),
        ("importance", {"likelihood": "autoregressive-mixture"}, {}),
        ("importance", {}, {"gaussian_epochs": 1}),
        ("importance", {}, {"epochs": 0, "prior_epochs": 1}),
    ],
    ids=str,
)
def test_an_epoch_reads_the_device_at_its_end_only(
    no_validation, monkeypatch, estimator, model, options
):
    # Autocast does not know of the meta device.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    trainer, steps = make_trainer("meta", estimator, model, **options), []
    with Crossings() as crossings:
        for svi in (trainer.svi, trainer.gaussian_svi, trainer.prior_svi):

            def step(*args, original=svi.step):
                steps.append(crossings.found[:])
                crossings.found.clear()
                return original(*args)

            svi.step = step
        with pytest.raises(RuntimeError, match="meta tensor"):
            trainer.train_epoch(tqdm(disable=True))
    assert len(steps) == trainer.steps_per_epoch == 4
    # The first step makes tables. From then on, only the images of each step go to the device, and
    # their numbers if the prior asks for them.
    copies = 2 if model.get("prior") == "exemplar" else 1
    assert steps[2:] == [["aten._to_copy.default"] * copies] * 2


def test_reading_a_value_is_noticed(no_validation, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    trainer, steps = make_trainer("meta", "importance", {}), []
    trainer.vae.decoder.register_forward_hook(
        lambda *_: steps.append(1) if len(steps) < 3 else float(trainer.vae.prior.origin.sum())
    )
    with pytest.raises(RuntimeError, match="meta tensor"):
        trainer.train_epoch(tqdm(disable=True))
    assert len(steps) == 3


def test_the_weight_average_is_that_of_torch(device):
    class Net(torch.nn.Sequential):
        pass

    torch.manual_seed(0)
    model = Net(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(device)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ours = WeightAverage(model, 0.9)
    for _ in range(4):
        model(torch.randn(8, 3, device=device)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        ours.update(model)
        theirs.update_parameters(model)
    for name, value in theirs.module.state_dict().items():
        if not value.is_floating_point():
            continue  # the number of batches is that of the model itself
        assert torch.equal(ours.state_dict()[name], value), name
        assert not ours.state_dict()[name].requires_grad


# --- With a GPU -----------------------------------------------------------------------------------


def synchronizations(trainer: Trainer) -> int:
    r"""Returns how often an epoch waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            trainer.train_epoch(tqdm(disable=True))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts what a GPU is waited for")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_number_of_synchronizations_does_not_depend_on_the_number_of_steps(
    no_validation, estimator
):
    counts = []
    for steps in (3, 15):  # fewer than the 20 after which the terms are read and shown
        trainer = make_trainer("cuda", estimator, {}, num_images=20 * steps)
        trainer.train_epoch(tqdm(disable=True))  # makes tables
        counts.append(synchronizations(trainer))
        assert trainer.steps_per_epoch == steps
    assert counts[0] == counts[1]
    assert counts[0] > 0  # the debug mode counts
