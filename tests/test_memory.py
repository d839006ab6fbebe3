r"""Memory: none is lost over many steps, and the exhaustive evaluation needs as much for any N."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tracemalloc

import pyro
import pytest
import torch

from pyro_vaediff.evaluate import evaluate
from pyro_vaediff.infer import PROPOSALS, Timestep_ELBO
from pyro_vaediff.priors import PRIORS
from pyro_vaediff.train.build import make_vae
from pyro_vaediff.train.config import ModelConfig
from pyro_vaediff.train.optim import TorchOptim, make_svi, per_datum

TINY = {"latent_dim": 1, "levels": 17, "width": 1, "num_components": 2, "prior_width": 2}


@pytest.fixture
def without_validation():
    r"""As in training: the checks of distributions take most of the time of such small steps."""
    pyro.enable_validation(False)
    yield
    pyro.enable_validation(True)


def resident():
    r"""The memory of this process that is in use, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_step(prior, timesteps="importance"):
    vae = make_vae(ModelConfig(prior, num_timesteps=5, num_data=9, **TINY))
    optim = TorchOptim(torch.optim.Adam(vae.parameters(), lr=1e-3))
    elbo = Timestep_ELBO(timesteps, k=2)
    svi = make_svi(per_datum(vae.model), per_datum(vae.guide), optim, elbo)
    x = torch.rand(2, 1, 8, 8)

    def step():
        svi.step(x)
        return svi.loss.terms

    return step


def live():
    r"""Returns how many blocks of memory Python's objects take, and how many tensors there are."""
    gc.collect()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    return sys.getallocatedblocks(), tensors


def traced_growth(step, steps, warmup):
    r"""Returns what Python's objects gain over some steps, in bytes."""
    tracemalloc.start()
    try:
        # What is replaced in each step was not traced when it was made.
        for _ in range(warmup):
            step()
        gc.collect()
        start = tracemalloc.get_traced_memory()[0]
        for _ in range(steps):
            step()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - start
    finally:
        tracemalloc.stop()


# Caches of a bounded size, such as that of Python's attributes, still fill: by 40 bytes per step in
# 2000 of them. All that a step returns, if it is kept, has several hundred.
BYTES_PER_STEP = 250


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux only")
def test_memory_does_not_grow_over_2000_steps(without_validation):
    step = make_step("diffusion")
    with pyro.get_param_store().scope():
        for _ in range(100):
            step()
        before = (*live(), resident())
        for _ in range(2000):
            step()
        after = (*live(), resident())
        blocks, tensors, process = (y - x for x, y in zip(before, after, strict=True))
        assert tensors == 0
        assert blocks < 2000, blocks  # less than one per step
        assert process < 20e6, process
        assert traced_growth(step, steps=150, warmup=50) < 150 * BYTES_PER_STEP


def test_a_leak_would_be_seen(without_validation):
    step, kept = make_step("gaussian"), []
    with pyro.get_param_store().scope():
        for _ in range(50):
            step()
        blocks, tensors = live()
        growth = traced_growth(lambda: kept.append(step()), steps=100, warmup=50)
        after = live()
    assert growth > 100 * BYTES_PER_STEP, growth
    assert after[1] - tensors >= 150 and after[0] - blocks >= 150


CASES = [*((prior, "importance") for prior in PRIORS), *(("diffusion", t) for t in PROPOSALS)]


@pytest.mark.parametrize("prior, timesteps", CASES)
def test_no_prior_and_no_proposal_keeps_anything(without_validation, prior, timesteps):
    step = make_step(prior, timesteps)
    with pyro.get_param_store().scope():
        for _ in range(30):
            step()
        blocks, tensors = live()
        for _ in range(50):
            step()
        after = live()
    assert after[1] == tensors
    assert after[0] - blocks < 50 * 10, after[0] - blocks


def test_evaluation_keeps_nothing(without_validation):
    vae = make_vae(ModelConfig("diffusion", num_timesteps=20, **TINY))
    images = torch.randint(0, 17, (10, 1, 8, 8)).byte()
    evaluate(vae, images)
    tensors = live()[1]
    growth = traced_growth(lambda: evaluate(vae, images), steps=20, warmup=10)
    assert growth < 20 * 10 * BYTES_PER_STEP, growth
    assert live()[1] == tensors


# The peak of a process of its own, as memory that was freed need not go back to the system.
SCRIPT = """
import sys
import pyro, torch
from pyro_vaediff.train.build import make_vae
from pyro_vaediff.train.config import ModelConfig
from pyro_vaediff.evaluate import evaluate

def peak():  # ru_maxrss would be that of the process that started this one, if it was larger
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

count, T, D, size = map(int, sys.argv[1:])
pyro.enable_validation(False)
torch.distributions.Distribution.set_default_validate_args(False)
vae = make_vae(ModelConfig("diffusion", D, (1, size, size), 256, width=4, num_timesteps=T))
images = torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8)
evaluate(vae, images[:100])
first = peak()
evaluate(vae, images)
print(first, peak())
"""


def peaks(*args):
    words = [sys.executable, "-c", SCRIPT, *map(str, args)]
    # Tensors that are freed go back to the system: what the allocator keeps is noise of 100 MB.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(words, capture_output=True, text=True, timeout=1200, env=env)
    assert result.returncode == 0, result.stderr
    return map(int, result.stdout.split())


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_exhaustive_evaluation_needs_as_much_memory_for_any_number_of_images():
    first, last = peaks(500, 1000, 8, 8)
    assert last < 2e9
    # The images themselves are there from the start. Five batches need what the first one did.
    assert last - first < 30e6, (first, last)
